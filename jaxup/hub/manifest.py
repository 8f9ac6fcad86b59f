"""`jaxup_manifest.json`: size and SHA-256 of every file of a directory, written last.

A flipped bit in a tensor is still a number; only a digest notices it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from jaxup.errors import UserError
from jaxup.hub.header import parse_json

NAME = "jaxup_manifest.json"


def write_manifest(directory: Path, digests: Mapping[str, str] | None = None) -> None:
    """Describes all files that `directory` holds now; those named in `digests` are not read again."""
    digests = digests or {}
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": digests.get(name) or _digest(path)}
    (directory / NAME).write_text(json.dumps({"version": 1, "files": files}, indent=2) + "\n")


def check_manifest(directory: Path, names: list[str]) -> None:
    """UserError if one of the files `names` is not the one that was written; no manifest, no check."""
    try:
        text = (directory / NAME).read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{directory}: {NAME} cannot be read: {error.strerror}") from error
    files = parse_json(text, f"{directory}: {NAME}").get("files")
    for name in names:
        entry = files.get(name) if isinstance(files, dict) else None
        if not isinstance(entry, dict):
            raise UserError(f"{directory}: {NAME} does not list {name}")
        path = directory / name
        if entry.get("size") != path.stat().st_size or entry.get("sha256") != _digest(path):
            raise UserError(
                f"{directory}: {name} is not the file that was written here: it does not match {NAME} "
                "(delete the manifest if the change was meant)"
            )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
