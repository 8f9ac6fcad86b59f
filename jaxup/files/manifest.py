"""`jaxup_manifest.json`: size and SHA-256 of every file of a directory, written last.

A file has one digest, or, if it was put together from pieces that were hashed once and written several
times, one for each of the consecutive spans that make it up.

Where SHA-256 takes too long beside what is done (0.2 of the processor's time of saving a checkpoint), "sums" take its
place, at what reading the file costs: see `_Sums`. They notice what befalls files, and no forger.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxup.errors import UserError
from jaxup.files.bucket import Bucket
from jaxup.files.storage import Local, open_storage
from jaxup.text import named, parse_json, remote, write_atomically

NAME = "jaxup_manifest.json"
ADDED = "is not one of the files that were written here"  # a fault where only programs write
_LARGEST = 64 * 2**20  # bytes of a manifest, which has a line for each file
_CHUNK = 2**20  # bytes
_PART = 64 * 2**20  # of them, which a bucket is asked for at once
_ROW = 2**14  # of them
_THREADS = 4

# (where it ends, its SHA-256 in hexadecimal, or "sums:" and those) of each span; the first begins at 0.
Spans = Sequence[tuple[int, str]]
_SUMS = "sums:"


def write_manifest(
    directory: Path, digests: Mapping[str, Spans] | None = None, *, name: str = NAME,
    kind: Literal["sha256", "sums"] = "sha256",
) -> None:  # fmt: skip
    """Describes all files that `directory` holds now; those named in `digests` are not read again."""
    known = digests or {}
    names = [file for file in _below(directory) if file != name]

    def entry(file: str) -> dict[str, Any]:
        if file in known:
            return {"size": known[file][-1][0], "parts": known[file]}
        size, digest = _digest(directory / file, 0, None, _SUMS if kind == "sums" else "")
        return {"size": size, kind: digest}

    with _threads(directory) as pool:
        files = dict(zip(names, pool.map(entry, names), strict=True))
    # A line for each file: there may be thousands of parts.
    lines = ",\n".join(f"    {json.dumps(file)}: {json.dumps(entry)}" for file, entry in files.items())
    write_atomically(directory / name, f'{{\n  "version": 1,\n  "files": {{\n{lines}\n  }}\n}}\n')


def check_manifest(directory: Path, names: Iterable[str], *, added: bool = False) -> None:
    """UserError if one of the files `names` is not as it was written, or not there any more; no manifest, no check.

    `added`: one that the manifest does not list is one that a user has put there since.
    """
    files = read_manifest(directory)
    if files is None:
        return
    for name in names:
        if name in files and not agrees(files[name], directory / name):
            raise mismatch(directory, name)
        if not added and (directory / name).exists():
            check_listed(directory, files, name)


def check_listed(directory: Path, files: Mapping[str, Spans], name: str) -> None:
    if name not in files:
        raise UserError(f"{directory}: {NAME} does not list {name}")


def faults(directory: Path, *, name: str = NAME) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) of a directory that has a manifest, the manifest itself included."""
    try:
        files = read_manifest(directory, name=name) or {}
    except UserError as error:
        yield name, f"is damaged: {error.what}"
        return
    found = set(_below(directory)) - {name}
    for file in sorted(found ^ files.keys()):
        yield file, "is missing" if file in files else ADDED
    both = sorted(found & files.keys())

    def fault(file: str) -> str:
        try:
            return "" if agrees(files[file], directory / file) else f"is not what was written: see {name}"
        except OSError as error:
            if remote(directory):  # the network, which says nothing of the file
                raise
            return f"cannot be read: {error.strerror}"

    with _threads(directory) as pool:
        yield from ((file, what) for file, what in zip(both, pool.map(fault, both)) if what)


def mismatch(directory: Path, name: str) -> UserError:
    what = f"{name} is not the file that was written here: it does not match {NAME}"
    return UserError(f"{what} (delete the manifest if the change was meant)", at=str(directory))


def read_manifest(directory: Path, *, name: str = NAME) -> dict[str, Spans] | None:
    """The spans of each file; None without a manifest, UserError for one that says anything else."""
    storage = open_storage(directory) if remote(directory) else Local(directory)
    if not storage.exists(name):
        return None
    manifest = parse_json(storage.whole(name, _LARGEST), f"{directory}: {name}")
    files = manifest.get("files")
    if manifest.keys() != {"version", "files"} or manifest["version"] != 1 or not isinstance(files, dict):
        raise UserError(f"{directory}: {name}: not what this version of jaxup writes")
    spans = {file: _spans(entry) for file, entry in files.items()}
    for file, found in spans.items():
        if not found:
            raise UserError(f"{directory}: {name}: what it says of {named(file)[:200]} cannot be")
    return spans


def agrees(spans: Spans, path: Path) -> bool:
    """Whether the file is the one that has these digests."""
    if not _has_size(path, spans[-1][0]):
        return False
    begins = (0, *(end for end, _ in spans))
    return all(span_agrees(path, begin, end, digest) for begin, (end, digest) in zip(begins, spans))


def span_agrees(path: Path, begin: int, end: int, digest: str) -> bool:
    """Whether these bytes of a file have this digest."""
    return _digest(path, begin, end, digest) == (end, digest.removeprefix(_SUMS))


def _below(directory: Path) -> list[str]:
    """All files, those in directories too."""
    if isinstance(directory, Bucket):
        return directory.below()
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


def _spans(entry: Any) -> Spans:
    """Of a file's entry; none if they are not consecutive spans, from the file's first byte to its last."""
    if not isinstance(entry, dict) or type(size := entry.get("size")) is not int:
        return []
    whole = entry.get("sha256", _SUMS + str(entry.get("sums")))
    parts = [[size, whole]] if entry.keys() & {"sha256", "sums"} else entry.get("parts")
    if len(entry) != 2 or not isinstance(parts, list) or not all(isinstance(p, list) and len(p) == 2 for p in parts):
        return []
    if not parts or not all(type(end) is int and isinstance(digest, str) for end, digest in parts):
        return []
    ends = [0, *(end for end, _ in parts)]
    rising = all(a < b for a, b in itertools.pairwise(ends)) or ends == [0, 0]
    return [(end, digest) for end, digest in parts] if rising and ends[-1] == size else []


def _digest(path: Path, begin: int, end: int | None, like: str) -> tuple[int, str]:
    """Of these bytes of a file, or all from `begin`: where they end, and SHA-256, or sums if `like` begins so."""
    digest = _Sums() if like.startswith(_SUMS) else hashlib.sha256()
    for chunk in _chunks(path, begin, end):
        digest.update(chunk)
        begin += len(chunk)
    return begin, digest.hexdigest()


def _chunks(path: Path, begin: int, end: int | None) -> Iterator[memoryview]:
    if isinstance(path, Bucket):
        while end is None or begin < end:
            stop = None if end is None else min(begin + _PART, end)
            part = memoryview(path.read(begin, stop))
            yield from (part[at : at + _CHUNK] for at in range(0, len(part), _CHUNK))
            if stop is None:
                return
            begin = stop
        return
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb") as file:
        file.seek(begin)
        while count := file.readinto(buffer[: _CHUNK if end is None else min(_CHUNK, end - begin)]):
            yield buffer[:count]
            begin += count


def _has_size(path: Path, size: int) -> bool:
    if isinstance(path, Bucket):
        return path.has_size(size)
    return path.is_file() and path.stat().st_size == size


def _threads(directory: Path) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS * (4 if remote(directory) else 1))  # which wait more than they work


class _Sums:
    """SHA-256 of what is left of each chunk when its rows of 16 KiB, as 64-bit numbers, are added up.

    A row that changes changes the sum, wherever in it and however much of it; several hide each other with a
    probability of 2^-64. What is not seen is rows of one chunk that change places.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, chunk: memoryview) -> None:
        whole = len(chunk) // _ROW * _ROW
        self._digest.update(np.frombuffer(chunk[:whole], "<u8").reshape(-1, _ROW // 8).sum(axis=0).data)
        self._digest.update(chunk[whole:])

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
