"""`jaxup_manifest.json`: size and SHA-256 of every file of a directory, written last.

A file has one digest, or, if it was put together from pieces that were hashed once and written several
times, one for each of the consecutive spans that make it up.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxup.errors import UserError
from jaxup.text import parse_json

NAME = "jaxup_manifest.json"
_CHUNK = 2**20  # bytes

# (where it ends, its SHA-256 in hexadecimal) of each span; the first begins at 0.
Spans = Sequence[tuple[int, str]]


def write_manifest(directory: Path, digests: Mapping[str, str | Spans] | None = None) -> None:
    """Describes all files that `directory` holds now; those named in `digests` are not read again."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name, size = path.relative_to(directory).as_posix(), path.stat().st_size
        digest = (digests or {}).get(name) or next(_digests(path, [size]))
        files[name] = {"size": size, "sha256" if isinstance(digest, str) else "parts": digest}
    # A line for each file: there may be thousands of parts.
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in files.items())
    (directory / NAME).write_text(f'{{\n  "version": 1,\n  "files": {{\n{lines}\n  }}\n}}\n')


def check_manifest(directory: Path, names: list[str]) -> None:
    """UserError if one of the files `names` is not the one that was written; no manifest, no check."""
    files = _files(directory)
    if files is None:
        return
    for name in names:
        entry = files.get(name)
        if not isinstance(entry, dict):
            raise UserError(f"{directory}: {NAME} does not list {name}")
        if not _agrees(entry, directory / name):
            raise mismatch(directory, name)


def mismatch(directory: Path, name: str) -> UserError:
    what = f"{name} is not the file that was written here: it does not match {NAME}"
    return UserError(f"{what} (delete the manifest if the change was meant)", at=str(directory))


def span_digests(directory: Path, names: Iterable[str]) -> dict[tuple[str, int, int], str]:
    """(file, begin, end) -> SHA-256 of that span, for those of the files whose spans the manifest knows."""
    files, digests = _files(directory) or {}, {}
    for name in names:
        for (begin, _), (end, digest) in itertools.pairwise([(0, ""), *_spans(files.get(name))]):
            digests[name, begin, end] = digest
    return digests


def _files(directory: Path) -> dict[str, Any] | None:
    try:
        text = (directory / NAME).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{directory}: {NAME} cannot be read: {error.strerror}") from error
    files = parse_json(text, f"{directory}: {NAME}").get("files")
    return files if isinstance(files, dict) else {}


def _agrees(entry: dict[str, Any], path: Path) -> bool:
    size = path.stat().st_size
    spans = _spans(entry) if "parts" in entry else [(size, entry.get("sha256"))]
    if entry.get("size") != size or not spans or spans[-1][0] != size:
        return False
    found = _digests(path, [end for end, _ in spans])
    return all(digest == read for (_, digest), read in zip(spans, found, strict=True))


def _spans(entry: Any) -> list[tuple[int, str]]:
    """The parts of a file's entry; none if they are not consecutive spans, from the file's first byte on."""
    parts = entry.get("parts") if isinstance(entry, dict) else None
    spans = [tuple(part) for part in parts if isinstance(part, list)] if isinstance(parts, list) else []
    if not all(len(span) == 2 and type(span[0]) is int and isinstance(span[1], str) for span in spans):
        return []
    ends = [0, *(end for end, _ in spans)]
    return spans if len(spans) == len(parts or []) and all(a < b for a, b in itertools.pairwise(ends)) else []


def _digests(path: Path, ends: Iterable[int]) -> Iterator[str]:
    """SHA-256 of the consecutive spans of a file that end there."""
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        begin = 0
        for end in ends:
            digest = hashlib.sha256()
            while begin < end and (count := file.readinto(buffer[: min(_CHUNK, end - begin)])):
                digest.update(buffer[:count])
                begin += count
            yield digest.hexdigest()
