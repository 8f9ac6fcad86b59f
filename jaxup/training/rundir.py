"""The run directory: one writer at a time, one configuration, nothing half written.

config.json  inputs.json  plan.yaml  metrics.jsonl  checkpoints/MODEL/STEP/  plots/  export/  SUMMARY.md

Its JSON files have a `format`; those from before there was one are of format 1.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxup.errors import UserError
from jaxup.files.lock import hold
from jaxup.text import read_json, write_atomically

FORMAT = 2


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A file of the run, with its format."""
    write_atomically(path, json.dumps({"format": FORMAT, **values}, indent=1) + "\n")


@contextlib.contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Holds `directory/.lock`, until this process dies, however it dies; UserError naming another holder."""

    def busy(holder: str) -> None:
        raise UserError(f"{directory}: in use by {holder}; wait for it or choose another --workdir")

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(directory / ".lock", busy))
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {error.strerror}") from None
        yield


def check_directory(directory: Path, config: dict[str, Any]) -> None:
    """Refuses a directory that holds a run of another configuration, or something else altogether."""
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, not a directory for runs")
    stored = read_json(directory / "config.json", {"format": int | None}, "put it back, or choose another --workdir")
    if stored is not None:
        if "model_type" in stored:
            raise UserError(f"{directory}: holds a model, not a run; choose another --workdir")
        if (format := stored.pop("format", 1)) != FORMAT:
            when = "an earlier" if format < FORMAT else "a later"
            raise UserError(
                f"{directory}: made by {when} version of jaxup (format {format}, here {FORMAT}), which this one cannot "
                "resume; choose another --workdir (`jaxup export` still writes its models)"
            )
        if differences := list(_differences(stored, json.loads(json.dumps(config)))):
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise UserError(
                f"{directory}: holds a run of another configuration: {'; '.join(differences[:3])}{more}; "
                "choose another --workdir, or give the same configuration to resume"
            )
    elif directory.is_dir() and any(not p.name.startswith(".lock") for p in directory.iterdir()):
        raise UserError(f"{directory}: not empty and not a run directory (no config.json); choose another --workdir")


def begin(directory: Path, config: dict[str, Any], inputs: dict[str, str]) -> None:
    """Writes config.json, and `inputs`, which identify what it only names; refuses to go on with others."""
    check_directory(directory, config)
    hint = "delete it if data and models are those that the run began with"
    stored = read_json(directory / "inputs.json", dict.fromkeys(inputs, str | None), hint)
    if stored is not None and (differing := [key for key in inputs if stored.get(key) != inputs[key]]):
        raise UserError(
            f"{directory}: this run was begun with {' and '.join(f'another {key}' for key in differing)}: "
            "put back what it was, or choose another --workdir"
        )
    write_json(directory / "config.json", config)
    write_json(directory / "inputs.json", inputs)


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        name, a, b = f"{prefix}{key}", old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{name}.")
        elif a != b:
            yield f"{name} was {a!r}, now {b!r}"
