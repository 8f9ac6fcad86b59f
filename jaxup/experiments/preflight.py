"""What must be so on every machine before a run begins there, looked at in seconds: nothing is read, made or trained.

That all processes came, of one code and configuration, and that their devices started is so by now: a run looks at
that itself. They had longer for it than a run gives them, for machines come back one after the other.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

import jaxup
from jaxup.errors import UserError, storage_error
from jaxup.progress import tell
from jaxup.together import gather, here, told

if TYPE_CHECKING:
    from jax.sharding import Mesh

_WORD = b"process 0 was here"


def show(mesh: Mesh, places: Mapping[str, Path]) -> None:
    """Prints what was found; all processes of the run call this, and process 0 prints.

    UserError, naming the process and its machine, for devices that are not those of process 0, and for a place that
    one of them cannot read or write, or where it does not see what process 0 wrote.

    Args:
      places: directories that all processes share, by the flag that says where they are. One that is complete, a store
        of tokens, is only read.
    """
    devices = jax.local_devices()
    kind = f"{len(devices)} x {devices[0].device_kind}"
    name = told(lambda: f".{secrets.token_hex(4)}", "choose a name")
    left: list[Path] = []
    try:
        told(lambda: _leave_word(places, name, left), "write what the others are to find")
        wrong = [line for flag, place in places.items() if (line := _fault(flag, place, name))]
        found = gather({"host": socket.gethostname(), "devices": kind, "wrong": wrong}, "done with looking")
    finally:
        _clean(left)
    for machine in found:
        if machine["devices"] != found[0]["devices"]:
            machine["wrong"].append(f"has {machine['devices']}, and process 0 {found[0]['devices']}")
    faults = [f"process {rank} ({m['host']}) {line}" for rank, m in enumerate(found) for line in m["wrong"]]
    if faults:
        raise UserError(faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""), at="preflight")
    if here()[0] == 0:
        shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        count = f"{len(found)} process{'es' if len(found) > 1 else ''}"
        tell(f"preflight: {count} of {kind}, mesh {shape}; jaxup {jaxup.__version__}, jax {jax.__version__}")
        tell("\n".join(f"preflight: all read and write {flag}={place}" for flag, place in places.items()))


def _complete(place: Path) -> bool:
    return (place / "meta.json").is_file()


def _leave_word(places: Mapping[str, Path], name: str, left: list[Path]) -> None:
    """By process 0, in each place that is not complete; `left` gets what this makes, directories before their files."""
    for flag, place in places.items():
        try:
            if _complete(place):
                continue
            left += reversed([path for path in (place, *place.parents) if not path.exists()])
            place.mkdir(parents=True, exist_ok=True)
            left.append(place / f"{name}.tmp")
            left[-1].write_bytes(_WORD)
        except OSError as error:
            raise storage_error(error, "preflight", f"{flag}={place}", hint="process 0 cannot write there") from None


def _fault(flag: str, place: Path, name: str) -> str:
    """What is wrong with the place for this process, "" if nothing is."""
    word, own = place / f"{name}.tmp", place / f"{name}-{here()[0]}.tmp"
    try:
        if _complete(place):
            return ""
        if not word.exists() or word.read_bytes() != _WORD:
            return (
                f"does not see in {flag}={place} what process 0 wrote there: all need the same, such as gs://BUCKET/RUN"
            )
        own.write_bytes(b"")
        own.unlink()
    except OSError as error:
        return f"cannot write {flag}={place}: {storage_error(error)}"
    return ""


def _clean(left: Sequence[Path]) -> None:
    for path in reversed(left):
        if path.is_file():
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
