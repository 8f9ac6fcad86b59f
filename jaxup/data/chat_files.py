"""The rows of chat data, as values of JSON, from whatever holds them; a few in memory at a time.

Lines of JSON are independent: a broken one is a row with a fault. What else is broken ends the reading.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from jaxup.data.layouts import COLUMNS, LAYOUTS
from jaxup.data.sources import (
    file_hash,
    hidden,
    import_datasets,
    is_dataset_name,
    load_dataset,
    of_split_train,
    parquet_batches,
    reach_dataset,
)  # fmt: skip
from jaxup.errors import UserError, first_line, nearest, within

MIB = 2**20
LONGEST_ROW = 64 * MIB  # a longer one is a mistake, such as a whole file on one line
JSON_CHARACTERS = MIB  # of a .json file are read at a time
BATCH_ROWS = 64  # of a parquet file or a dataset


class Row(NamedTuple):
    number: int  # in its file, from 1
    place: str  # the file and, where it has lines, the line
    value: Any  # of JSON
    fault: str  # why there is no value, or ""
    done: float  # how much of the file lies before it, 0 to 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One file, or one dataset."""

    path: str  # as messages name it
    name: str  # what its rows are chosen by: the same wherever the data lies
    size: int  # bytes of a file, rows of a dataset
    hash: Callable[[], str]  # of all of it
    rows: Callable[[], Iterator[Row]]
    layout: str = ""  # one of LAYOUTS once it is known


def find_files(spec: str) -> list[File]:
    path = Path(os.path.expanduser(spec))  # leaves an unknown ~user as it is
    if not spec or not path.exists():
        return [_hub_dataset(spec)]
    if path.is_file():
        return [_file(path, path.name)]
    if not path.is_dir():  # opening a pipe would wait for ever
        raise UserError(f"{spec}: neither a file nor a directory")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [_dataset(spec, path.resolve().name, load_dataset(spec, "load_from_disk", str(path)))]
    paths = [p for p in path.rglob("*") if p.suffix in _READERS and not hidden(p, path)]
    # Beside data in other files, .json says something about it.
    json_too = all(p.suffix == ".json" for p in paths)
    names = {p.relative_to(path).as_posix(): p for p in paths if json_too or p.suffix != ".json"}
    found = [_file(p, name) for name, p in sorted(names.items()) if p.is_file() and p.stat().st_size]
    if not found:
        raise UserError(f"{spec}: no chat data in this directory (looked for {', '.join(_READERS)})")
    return found


def _file(path: Path, name: str) -> File:
    if path.suffix not in _READERS:
        raise UserError(f"{path}: chat data is {', '.join(_READERS)}")
    size = path.stat().st_size
    if not size:
        raise UserError(f"{path}: no rows: the file is empty")
    rows = functools.partial(_READERS[path.suffix], path)
    return File(path=str(path), name=name, size=size, hash=functools.partial(file_hash, path, whole=True), rows=rows)


def _read_jsonl(path: Path) -> Iterator[Row]:
    size, number, before = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        for line_number in count(1):
            line = file.readline(LONGEST_ROW + 1)
            if not line:
                return
            if len(line) > LONGEST_ROW:
                hint = "" if path.suffix == ".json" else "; one list of all rows is a .json file"
                raise UserError(f"{path}:{line_number}: a line longer than {LONGEST_ROW // MIB} MiB{hint}")
            if line_number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                number += 1
                value, fault = _loads(line)
                yield Row(number, f"{path}:{line_number}", value, fault, min(1.0, before / size))
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


def _read_json(path: Path) -> Iterator[Row]:
    """The rows of one list, as they come; a file that does not begin with "[" is taken to be lines.

    Where a row of a list is not JSON nothing tells where the next one begins: UserError.
    """
    with path.open("rb") as file:
        if not file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _read_jsonl(path)
            return
    size, number, line, before = path.stat().st_size, 0, 1, 0
    text, at, more = "", 0, True
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", newline="") as file:
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
                yield Row(number, f"{path}:{here}", value, "", min(1.0, before / size))
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


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    for batch, rows in parquet_batches(path, BATCH_ROWS, lambda schema: _columns(str(path), schema.names)):
        for value in batch.to_pylist():
            number += 1
            yield Row(number, str(path), value, "", (number - 1) / rows)


def _columns(path: str, names: list[str]) -> list[str]:
    if known := [name for name in names if name in COLUMNS]:
        return known
    raise UserError(f"{path}: its columns are of no layout{near_layout(dict.fromkeys(names))}")


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _dataset(spec: str, name: str, data: Any) -> File:
    """`data` is a datasets.Dataset or DatasetDict."""
    data = of_split_train(spec, data)
    if not len(data):
        raise UserError(f"{spec}: no rows")
    rows = functools.partial(_read_dataset, spec, data.select_columns(_columns(spec, data.column_names)))
    return File(path=spec, name=name, size=len(data), hash=lambda: data._fingerprint, rows=rows)


def _read_dataset(spec: str, dataset: Any) -> Iterator[Row]:
    for start in range(0, len(dataset), BATCH_ROWS):
        columns = dataset[start : start + BATCH_ROWS]
        for number, values in enumerate(zip(*columns.values(), strict=True), start + 1):
            yield Row(number, spec, dict(zip(columns, values, strict=True)), "", (number - 1) / len(dataset))


def _hub_dataset(spec: str) -> File:
    name, _, config = spec.partition(":")
    if not is_dataset_name(spec):
        raise UserError(f"no such file or directory: {spec or repr(spec)}")
    reach_dataset(name, import_datasets(spec))
    with within(f"no such file or directory: {spec}, and on the Hugging Face hub"):
        return _dataset(spec, spec, load_dataset(spec, "load_dataset", name, config or None, split="train"))


def near_layout(row: Any) -> str:
    if not isinstance(row, dict):
        return f"; known: {', '.join(LAYOUTS)}"
    for key in row:
        if told := nearest(key[:40], COLUMNS):
            return f": no layout has {key[:40]!r}{told}"
    keys = ", ".join(repr(key[:40]) for key in islice(row, 12))
    return f"; its keys: {keys or 'none'}; known: {', '.join(LAYOUTS)}"
