"""What jax computes on: the accelerator that the machine has, and programs that were compiled before."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

from jaxup.errors import Parser, UserError, first_line

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # and what jax calls them
_LARGEST_CACHE = 4 << 30  # bytes; what was not used for longest goes


def add_flag(parser: Parser) -> None:
    parser.add_argument("--platform", choices=PLATFORMS, help="compute on this and nothing else (the fastest there is)")


def choose(name: str | None) -> None:
    """Has jax take this platform; to be called before it is imported."""
    if name is not None:
        os.environ["JAX_PLATFORMS"] = PLATFORMS[name]


def ready() -> None:
    """Starts the devices and the cache of compiled programs.

    UserError where they do not start, and where the machine has an accelerator that jax does not see, unless the
    processor is asked for: a busy TPU, or a jax without CUDA, would otherwise be a run that takes weeks.
    """
    import jax

    asked = _with_processor()
    hint = "end what else uses it, or compute on the processor by --platform=cpu"
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the second, without a word, where there is nothing to start
        said = first_line(error).partition(" (set JAX_PLATFORMS")[0] if str(error) else ""
        what = said or f"jax has no {asked} to compute on"
        raise UserError(what, at="devices", hint=hint) from None
    wanted = (asked or backend).split(",")[0]
    if backend == "cpu" != wanted:  # jax passes over CUDA where there is no GPU
        raise UserError(f"jax has no {wanted} to compute on", at="devices", hint=hint)
    if backend == "cpu" and not asked and (found := _accelerator()):
        what = f"this machine has {found[0]}, and jax sees none"
        raise UserError(what, at="devices", hint=f"install jaxup[{found[1]}], {hint}")
    _keep_programs(backend)


def host() -> contextlib.AbstractContextManager[Any]:
    """Computing on the processor, as for what need not fit into an accelerator, whatever platform is asked for."""
    import jax

    asked = _with_processor()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise UserError(first_line(error), at="devices", hint=f"JAX_PLATFORMS={asked},cpu has both") from None


def _with_processor() -> str:
    """The platforms that jax was asked for, "" for all; if its devices are not started yet, it has the host's, too."""
    import jax

    asked = str(jax.config.jax_platforms or "")  # type: ignore[attr-defined]  # jax adds its options at run time
    if asked and "cpu" not in asked:
        jax.config.update("jax_platforms", f"{asked},cpu")
    return asked


def _accelerator() -> tuple[str, str] | None:
    """What the machine has, whatever jax is installed, and the extra of this package that is for it."""
    from jax._src import hardware_utils

    if hardware_utils.num_available_tpu_chips_and_device_id()[0]:
        return "TPUs", "tpu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    there = any(map(os.path.exists, ("/dev/nvidia0", "/dev/nvidiactl")))
    return ("NVIDIA GPUs", "cuda") if there and not hidden else None


def _keep_programs(backend: str) -> None:
    """Keeps what takes a second or more to compile in the user's cache directory, unless jax is told of another."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    kind = backend
    if backend == "cpu":  # its programs run on processors of the same features alone, and a home may be of many
        try:
            features = next(line for line in Path("/proc/cpuinfo").read_text().split("\n") if line[:5] in _FEATURES)
        except (OSError, StopIteration):
            features = platform.processor()
        kind += "-" + hashlib.blake2b(features.encode(), digest_size=4).hexdigest()
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxup" / "programs" / kind
        directory.mkdir(parents=True, exist_ok=True)
        _clean(directory)
    except (OSError, RuntimeError):  # no home, or none that is for writing: everything is compiled again
        return
    if not os.access(directory, os.W_OK):
        return
    # So it is where the disk is full or the lock is taken for long, and jax would say it of each program.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_max_size", _LARGEST_CACHE)
    jax.config.update("jax_compilation_cache_dir", str(directory))


def _clean(directory: Path) -> None:
    """Removes what a writer left that was killed, or had no more room. It would be found damaged by each run, written
    by none, and end jax's search for what to remove: of a program that is whole there is a second file, of its use."""
    for program in directory.glob("*-cache"):
        whole = program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists()
        if not whole and time.time() - program.stat().st_mtime > _WRITING:
            program.unlink(missing_ok=True)


_WRITING = 600  # seconds that writing a program may take
_FEATURES = ("flags", "Featu")
