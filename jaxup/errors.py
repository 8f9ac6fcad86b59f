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
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

from jaxup.progress import printable, say


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
        raise UserError(f"{message}; see --help")


def is_panic(error: BaseException) -> bool:
    """Whether it is a failed assertion in a library written in Rust, such as tokenizers: no Exception of Python."""
    return type(error).__module__ == "pyo3_runtime"


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the candidate nearest to `name`, or "" if none is near."""
    near = difflib.get_close_matches(str(name), [str(c) for c in candidates], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggest(name: str, candidates: Iterable[str]) -> str:
    """As `nearest`, or the list of them all if none is near."""
    candidates = [str(c) for c in candidates]
    return nearest(name, candidates) or (f"; known: {', '.join(candidates)}" if candidates else "")


def entry_point(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(sys.argv)` and exits the process with the code that its outcome calls for."""
    warnings.formatwarning = lambda message, *_: f"jaxup: warning: {printable(message)}\n"  # no file and line of ours
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
