"""The one exception a user's mistake raises, and how an entry point ends.

Every `python -m jaxup.NAME` runs under `entry_point`, so exit codes mean the same everywhere:

| code | meaning |
|---|---|
| 0 | done |
| 1 | the machine or a library failed: a disk, memory, a file that no check foresaw; or a mistake of ours, a traceback |
| 2 | the user's mistake: one line on stderr, nothing written |
| 3 | training stopped because a gradient or loss was not finite |
| 5 | of several processes one died, or made no progress |
| 6 | a disk is full: what was there stays, and with room again the same command goes on |
| 130, 143 | Ctrl-C or SIGTERM; a training run has saved its state first |

Of several processes all end with the code of the one that was first.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

from jaxup.progress import printable, say

# What other tools (mergekit, transformers, TRL, axolotl, nanoGPT) call what is here, and what it is called here.
ELSEWHERE = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32",
    "out_shard_size": "max_shard_size", "torch_dtype": "dtype", "max_new_tokens": "max_tokens",
    "output_dir": "workdir", "resume_from_checkpoint": "resume", "tokenizer_name": "tokenizer",
    "model_name_or_path": "path", "base_model": "path", "dataset_name": "data.files",
    "datasets": "data.files", "train_file": "data.files", "chat_template": "data.format",
    "max_seq_length": "data.seq_len", "max_length": "data.seq_len", "sequence_len": "data.seq_len",
    "sample_packing": "data.packing", "val_set_size": "data.val_fraction",
    "max_steps": "steps", "num_train_epochs": "epochs", "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "step.accumulation", "gradient_checkpointing": "compute.remat",
    "lr": "learning_rate", "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "max_grad_norm": "clip_norm",
    "adam_beta1": "b1", "adam_beta2": "b2", "adam_epsilon": "eps", "lora_r": "lora.rank", "lora_alpha": "lora.alpha",
    "logging_steps": "log.interval", "report_to": "log.trackers", "eval_steps": "eval.interval",
    "save_steps": "checkpoint.interval", "save_total_limit": "checkpoint.keep",
    "n_layer": "num_layers", "n_head": "num_heads", "n_embd": "hidden_size", "block_size": "data.seq_len",
    "scale_attn_by_inverse_layer_idx": "depth_scaled_attention", "max_iters": "steps", "warmup_iters": "warmup_steps",
    "min_lr": "end_learning_rate", "beta1": "b1", "beta2": "b2", "grad_clip": "clip_norm",
    "eval_interval": "eval.interval", "eval_iters": "eval.rows",
}  # fmt: skip
_BYTES = "tensors are copied from file to file as they are"
# What others have to be asked for.
NEEDLESS = {
    "lazy_unpickle": _BYTES, "low_cpu_memory": _BYTES, "clone_tensors": _BYTES, "gpu_rich": _BYTES,
    "read_to_gpu": _BYTES, "copy_tokenizer": "the tokenizer comes along", "write_model_card": "there always is one",
    "cuda": "accelerators are found without it, and a build needs none", "safe_serialization": "nothing else is made",
    "trust_remote_code": "code in a model directory is never run", "allow_crimes": "what is unusual is said, and built",
    "do_sample": "tokens are drawn unless --greedy is given",
}  # fmt: skip


class UserError(Exception):
    """Something the user can put right, in one line: `AT: WHAT; HINT`.

    Args:
      what: what is wrong.
      at: the places it is in, the widest first: a file, a flag, a key of the configuration, a line
        and column. A place that ends in a point is a section, and its key follows at once.
      hint: what was probably meant, or what to do.
    """

    exit_code = 2

    def __init__(self, what: str, *, at: str | Sequence[str] = (), hint: str = ""):
        self.what, self.hint = what, hint
        self.at = (at,) if isinstance(at, str) else tuple(at)
        places = "".join(place if place.endswith(".") else f"{place}: " for place in self.at)
        # One line, whatever names and messages of others are in it.
        super().__init__(printable(f"{places}{what}" + (f"; {hint}" if hint else ""), keep=""))

    def within(self, *at: str) -> UserError:
        """The same error inside of wider places: `raise error.within("config.json") from None`."""
        return type(self)(self.what, at=(*at, *self.at), hint=self.hint)

    def _render_traceback_(self) -> list[str]:
        """For notebooks: the lines of whoever called, none of ours, and what is wrong."""
        import traceback

        ours = (os.path.dirname(__file__) + os.sep, contextlib.__file__)
        frames = [
            frame for frame in traceback.extract_tb(self.__traceback__)
            if not frame.filename.startswith(ours) and f"{os.sep}IPython{os.sep}" not in frame.filename
        ]  # fmt: skip
        return [*traceback.format_list(frames), f"{type(self).__name__}: {self}"]


class NoRoom(UserError):
    """There is no room for what was to be written; what was there before stays as it was."""

    exit_code = 6


def storage_error(error: BaseException, *at: str, hint: str = "") -> UserError:
    """What the machine or a library says of a file, in one line; NoRoom if it says that a disk or quota is full."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # TensorStore and Orbax pass on the system's words, and not its number.
    if getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full):
        what = next((os.strerror(code) for code in full if os.strerror(code) in str(error)), first_line(error))
        return NoRoom(what, at=at, hint="with room again the same command goes on")
    return UserError(getattr(error, "strerror", None) or first_line(error).replace("\0", ""), at=at, hint=hint)


@contextlib.contextmanager
def within(*at: str) -> Iterator[None]:
    """Says in what wider places a user's mistake is that comes up in the block, or in the decorated function."""
    try:
        yield
    except UserError as error:
        raise error.within(*at) from None


class Stopped(BaseException):
    """A signal asked the program to leave, and it has saved what it had. Only `entry_point` catches it: like
    KeyboardInterrupt it may come up anywhere, and is not an error of what was being done."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class NonFinite(Exception):
    """A loss or gradient was NaN or infinite; the message names the model and the step.

    `kept`: the step of training that the state is of, which is a finite one.
    """

    exit_code = 3

    def __init__(self, message: str, kept: int = 0):
        super().__init__(message)
        self.kept = kept


class Parser(argparse.ArgumentParser):
    """The ArgumentParser of the command `jaxup NAME`: a wrong flag is a user's mistake like any other, one line."""

    def __init__(self, name: str, description: str | None, *, add_help: bool = True):
        super().__init__(
            prog=f"jaxup {name}", description=description, allow_abbrev=False, add_help=add_help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """What argparse says in a sentence, with what was probably meant."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            raise self.unknown(unknown[1].partition("=")[0])
        choice = re.search(r"invalid choice: '?([^' ]*).*choose from (.*)", message)
        meant = nearest(choice[1], re.findall(r"[\w.-]+", choice[2])) if choice else ""
        raise UserError(f"{message}{meant or '; see --help'}")

    def unknown(self, flag: str, meant: str = "") -> UserError:
        """The error of an argument that the command does not have; `meant`, if anything, is what to give instead."""
        if why := NEEDLESS.get(_plain(flag)):
            return UserError(f"unknown argument {flag!r}", hint=f"leave it out: {why}")
        meant = meant or nearest(flag, self._option_string_actions)
        return UserError(f"unknown argument {flag!r}{meant or '; see --help'}")


def is_panic(error: BaseException) -> bool:
    """Whether it is a failed assertion in a library written in Rust, such as tokenizers: no Exception of Python."""
    return type(error).__module__ == "pyo3_runtime"


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the candidate nearest to `name`, or "" if none is near."""
    candidates = [str(c) for c in candidates]
    ours = ELSEWHERE.get(_plain(name), _plain(name)).rpartition(".")[2]
    near = [c for c in candidates if _plain(c) == ours] or difflib.get_close_matches(str(name), candidates, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _plain(name: str) -> str:
    """However it is written: as a flag, or with hyphens."""
    return str(name).lstrip("-").replace("-", "_").lower()


def suggest(name: str, candidates: Iterable[str]) -> str:
    """As `nearest`, or the list of them all if none is near."""
    candidates = [str(c) for c in candidates]
    return nearest(name, candidates) or (f"; known: {', '.join(candidates)}" if candidates else "")


def entry_point(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(sys.argv)` and exits the process with the code that its outcome calls for."""
    warnings.formatwarning = lambda message, *_: f"jaxup: warning: {printable(message)}\n"  # no file and line of ours
    usual = sys.unraisablehook

    def hook(ignored: sys.UnraisableHookArgs) -> None:
        """A Ctrl-C that came up where Python ignores exceptions, such as in a callback of jax, comes up again."""
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            usual(ignored)

    sys.unraisablehook = hook
    try:
        code = main(sys.argv) or 0
    except (UserError, NonFinite, Stopped) as error:
        say(error)
        code = error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except BrokenPipeError:  # `... | head` closed our stdout; it is not an error worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        told = storage_error(error, *([str(error.filename)] if error.filename else []))
        say(told)
        code = told.exit_code if isinstance(told, NoRoom) else 1
    except MemoryError as error:
        say(f"there is not enough memory: {first_line(error)}")
        code = 1
    except BaseException as error:
        if not isinstance(error, RecursionError) and not is_panic(error):
            raise
        say(f"a file is nested too deeply, or damaged: {first_line(error)}")
        code = 1
    sys.exit(code)
