"""The rows of data files, as values of JSON, from whatever holds them; a few in memory at a time.

Lines of JSON are independent: a broken one is a row with a fault. What else is broken ends the reading. Plain text is
rows too, `{"text": piece}`. Files of text and JSON may be compressed (`.gz`, `.zst`).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, cast

from jaxup.errors import UserError, first_line

MIB = 2**20
LONGEST_ROW = 64 * MIB  # a longer one is a mistake, such as a whole file on one line
JSON_CHARACTERS = MIB  # of a .json file are read at a time
BATCH_ROWS = 64  # of a parquet file or a dataset
PIECE_CHARACTERS = 64 * 1024  # a longer plain-text file becomes several documents
COMPRESSED = {".gz", ".zst"}

Choose = Callable[[list[str]], list[str]]  # which columns to read, of those that there are


class Row(NamedTuple):
    number: int  # in its file, from 1
    place: str  # the file and, where it has lines, the line
    value: Any  # of JSON; of nanoGPT's tokens an array
    fault: str  # why there is no value, or ""
    done: float  # how much of the file lies before it, 0 to 1


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read: ".jsonl" of a.jsonl.gz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@contextlib.contextmanager
def _content(path: Path) -> Iterator[tuple[io.BufferedReader, Callable[[int], float]]]:
    """The bytes of a file, decompressed; and which part of it lies before one of them, which only ever grows."""
    size = max(1, path.stat().st_size)
    # How long a compressed file is only its end tells. This comes near 1 and is the same everywhere.
    packed = path.suffix in COMPRESSED
    try:
        with _opened(path) as file:
            yield file, lambda before: before / (before + size) if packed else min(1.0, before / size)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        what = f"not a sound {path.suffix.removeprefix('.')} file ({first_line(error)})"
        raise UserError(what, at=str(path)) from None


def _opened(path: Path) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(path)))
    if path.suffix == ".zst":
        pa = pyarrow(path)
        with _arrow_errors(path):
            return io.BufferedReader(_Zstd(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), path))
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """What pyarrow decompresses, as a file of Python's."""

    def __init__(self, stream: Any, path: Path):
        self._stream, self._path = stream, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _arrow_errors(self._path):
            content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        what = f'{path.suffix.removeprefix(".")} needs pyarrow; pip install "jaxup[data]"'
        raise UserError(what, at=str(path)) from None
    return pyarrow


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    pa = pyarrow(path)
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        what = f"not a sound {path.suffix.removeprefix('.')} file ({first_line(error)})"
        raise UserError(what, at=str(path)) from None


def read_jsonl(path: Path) -> Iterator[Row]:
    number, before = 0, 0
    with _content(path) as (file, done):
        for line_number in count(1):
            line = file.readline(LONGEST_ROW + 1)
            if not line:
                return
            if len(line) > LONGEST_ROW:
                hint = "" if kind_of(path) == ".json" else "; one list of all rows is a .json file"
                raise UserError(f"{path}:{line_number}: a line longer than {LONGEST_ROW // MIB} MiB{hint}")
            if line_number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                number += 1
                value, fault = _loads(line)
                yield Row(number, f"{path}:{line_number}", value, fault, done(before))
            before += len(line)


def _loads(line: bytes) -> tuple[Any, str]:
    """The value and "", or None and what is wrong."""
    try:
        return json.loads(line.decode().rstrip()), ""
    except UnicodeDecodeError as error:
        return None, f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8"
    except json.JSONDecodeError as error:
        spread = "; a row must stand on one line" if line.strip() in (b"{", b"[") else ""
        return None, f"{error.msg} at column {error.colno}{spread}"
    except RecursionError:
        return None, "it is nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        return None, first_line(error)


# What stands before a row of a list, or after the last.
_BETWEEN = re.compile(r"\s*([\[,\]])\s*")


def read_json(path: Path) -> Iterator[Row]:
    """The rows of one list, as they come; a file that does not begin with "[" is taken to be lines.

    Where a row of a list is not JSON nothing tells where the next one begins: UserError.
    """
    with _content(path) as (raw, done):
        if not raw.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from read_jsonl(path)
            return
    number, line, before = 0, 1, 0
    text, at, more = "", 0, True
    decoder = json.JSONDecoder()
    with _content(path) as (raw, done), io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        while True:
            between, value, fault = _BETWEEN.match(text, at), None, ""
            start = between.end() if between else at
            if between and (between[1] == "]" or (between[1] == "[" and text[start : start + 1] == "]")):
                if (text[start:].removeprefix("]") + file.read(4096)).strip():
                    hint = "; rows that are lists, one a line, are a .jsonl file"
                    raise UserError(f"{path}:{line}: there is more after the end of the list{hint}")
                return
            if not between:
                fault = "a comma or ] is missing"
            elif (between[1] == "[") != (number == 0):
                fault = "[ between two rows" if number else "it does not begin with ["
            else:
                try:
                    value, end = decoder.raw_decode(text, start)
                except RecursionError:
                    fault = "it is nested too deeply"
                except json.JSONDecodeError as error:
                    fault = error.msg
                except ValueError as error:
                    fault = first_line(error)
            here = line + text.count("\n", at, start)
            if not fault:
                number += 1
                yield Row(number, f"{path}:{here}", value, "", done(before))
                line, before, at = here + text.count("\n", start, end), before + end - at, end
                continue
            # Perhaps the row only goes on beyond what was read.
            if not more or len(text) - at > LONGEST_ROW:
                raise UserError(f"{path}:{here}: row {number + 1} is not JSON: {fault}")
            try:
                added = file.read(max(JSON_CHARACTERS, len(text) - at))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 text: {first_line(error)}, after line {here}") from None
            text, at, more = text[at:] + added, 0, bool(added)


def read_parquet(path: Path, choose: Choose) -> Iterator[Row]:
    pyarrow(path)
    import pyarrow.parquet as pq

    number = 0
    with _arrow_errors(path), pq.ParquetFile(path) as file:
        columns = choose(file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            for value in batch.to_pylist():
                number += 1
                yield Row(number, str(path), value, "", (number - 1) / file.metadata.num_rows)


def read_dataset(spec: str, dataset: Any, choose: Choose) -> Iterator[Row]:
    """`dataset` is a datasets.Dataset."""
    dataset = dataset.select_columns(choose(dataset.column_names))
    for start in range(0, len(dataset), BATCH_ROWS):
        columns = dataset[start : start + BATCH_ROWS]
        for number, values in enumerate(zip(*columns.values(), strict=True), start + 1):
            yield Row(number, spec, dict(zip(columns, values, strict=True)), "", (number - 1) / len(dataset))


def read_text(path: Path, *, whole: bool = False, ends: float = 0.0) -> Iterator[Row]:
    """The text in pieces that end at the end of a line, unless that is far away; or `whole` in one.

    With `ends`, that share at the end of each piece is a row of its own: every second one.
    """
    with _content(path) as (raw, done):
        if b"\0" in raw.read(8192):
            raise UserError("not a text file (it holds zero bytes)", at=str(path))
    # newline="": the text is taken as it is, line ends included; but for a file of code, read as Python does.
    how: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "replace", "newline": None if whole else ""}
    with _content(path) as (raw, done), io.TextIOWrapper(raw, **how) as file:
        number, before = 0, 0
        while piece := file.read(-1 if whole else PIECE_CHARACTERS):
            piece += file.readline(PIECE_CHARACTERS)
            for part in _apart(piece, ends) if ends else [piece]:
                number += 1
                if part:
                    yield Row(number, str(path), {"text": part}, "", done(before))
            before += len(piece)


def _apart(piece: str, share: float) -> tuple[str, str]:
    """A text and that share at its end, which begins with a line unless that makes it twice as long."""
    held = round(share * len(piece))
    if not held:
        return piece, ""
    line = piece.rfind("\n", 0, len(piece) - held) + 1
    cut = line if len(piece) - line <= 2 * held else len(piece) - held
    return piece[:cut], piece[cut:]
