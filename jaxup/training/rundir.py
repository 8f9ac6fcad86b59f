"""The run directory: one writer at a time, one configuration, nothing half written.

config.json  inputs.json  plan.yaml  metrics.jsonl  checkpoints/MODEL/STEP/  plots/  export/  models/  SUMMARY.md

Its JSON files have a `format`; those from before there was one are of format 1.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxup.errors import UserError
from jaxup.files.lock import hold
from jaxup.text import read_json, remote, write_atomically

FORMAT = 2
TOKENIZER = "tokenizer"  # a directory of the run, where no store of tokens holds its models' tokenizer


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A file of the run, with its format."""
    write_atomically(path, json.dumps({"format": FORMAT, **values}, indent=1) + "\n")


class InUse(UserError):
    """Another process writes into the directory: `holder`, in words."""

    holder = ""


@contextlib.contextmanager
def writer_lock(directory: Path, busy: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds `directory/.lock`, until this process dies, however it dies; InUse naming another holder.

    `busy`: called with who that is, again and again, instead.
    """

    def refuse(holder: str) -> None:
        error = InUse(f"{directory}: in use by {holder}; wait for it or choose another --workdir")
        error.holder = holder
        raise error

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(directory / ".lock", busy or refuse))
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {error.strerror}") from None
        yield


def read_config(directory: Path, elsewhere: str = "choose another --workdir") -> dict[str, Any] | None:
    """The configuration of the run in `directory`, or None if one can begin there; else a UserError, `elsewhere` being
    what else to do."""
    for path in () if remote(directory) else (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, not a directory for runs")
    stored = read_json(directory / "config.json", {"format": int | None}, f"put it back, or {elsewhere}")
    if stored is None:
        # A start that was killed leaves a lock and what it had not finished writing.
        if directory.is_dir() and any(
            not p.name.startswith(".lock") and not _unfinished(p) for p in directory.iterdir()
        ):
            what = "not empty and not a run directory (no config.json)"
            raise UserError(what, at=str(directory), hint=elsewhere)
        return None
    if "model_type" in stored:
        raise UserError("holds a model, not a run", at=str(directory), hint=elsewhere)
    if (format := stored.pop("format", 1)) != FORMAT:
        when = "an earlier" if format < FORMAT else "a later"
        what = f"made by {when} version of jaxup (format {format}, here {FORMAT}), which this one cannot resume"
        raise UserError(what, at=str(directory), hint=f"{elsewhere} (`jaxup export` still writes its models)")
    return stored


def clean(directory: Path) -> None:
    """Removes what killed writers of small files have left; for the one who holds the lock."""
    for path in (*directory.glob(".*.tmp"), *directory.glob("checkpoints/*/.*.tmp")):
        path.unlink()


def _unfinished(path: Path) -> bool:
    """Whether `write_atomically` was killed before it gave the file its name."""
    return path.name.startswith(".") and path.name.endswith(".tmp")
