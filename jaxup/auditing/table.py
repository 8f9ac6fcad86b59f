"""The rows of an audit, one for each cell: `answers.jsonl`, of which all else is computed; what it is of: `audit.json`.

A row is appended when its reply is there. A line that was cut off by a stop is dropped when the file is opened again,
and asking goes on with the cells that have no row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxup.auditing.classifiers import Classifier, Verdict
from jaxup.auditing.grid import Asked, Condition, Grid, Prompt, Query, cell_key, split
from jaxup.data.readers import read_jsonl
from jaxup.errors import UserError
from jaxup.learning.problem import Ask, Writer
from jaxup.progress import Progress, say
from jaxup.text import misfit, write_atomically

ROWS, ABOUT = "answers.jsonl", "audit.json"
_AT_ONCE = 256  # cells: so much at most is asked again after a stop


class Row(NamedTuple):
    arm: str  # which model, such as "base"
    run: int  # which training of it, where there are several
    query: str
    unit: str  # what is drawn in a bootstrap: `Query.unit`
    persona: str
    group: str
    benign: bool
    condition: str
    sample: int
    asked: str  # digest of what the model was given and of how it was drawn from
    text: str  # with what the reply was made to begin with
    ended: bool  # by the model
    verdicts: Mapping[str, Verdict]

    @property
    def cell(self) -> tuple[str, int, str, str, int]:
        return self.arm, self.run, self.query, self.condition, self.sample


_KINDS: dict[str, Any] = {
    "arm": str, "run": int, "query": str, "unit": str, "persona": str, "group": str, "benign": bool, "condition": str,
    "sample": int, "asked": str, "text": str, "ended": bool, "verdicts": dict[str, bool | None],
}  # fmt: skip


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. UserError for a line that is none, and for a cell that is there twice."""
    rows, seen = [], set()
    for line in read_jsonl(path):
        wrong = line.fault or ("no object" if not isinstance(line.value, dict) else misfit(line.value, _KINDS))
        if wrong:
            raise UserError(f"no row of an audit: {wrong}", at=line.place)
        row = Row(**{key: line.value[key] for key in _KINDS})
        if row.cell in seen:
            raise UserError(f"the cell {' '.join(map(str, row.cell))} is there twice", at=line.place)
        seen.add(row.cell)
        rows.append(row)
    return rows


def open_rows(path: Path) -> list[Row]:
    """The rows that are there, after cutting off a last line that was not written whole."""
    if not path.exists():
        return []
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        end = whole = file.tell()
        while whole:  # back to the last line's end
            start = max(0, whole - 65536)
            file.seek(start)
            if (found := file.read(whole - start).rfind(b"\n")) >= 0:
                whole = start + found + 1
                break
            whole = start
        if whole < end:
            file.truncate(whole)
            say(f"{path}: the last line was not whole, and is asked again")
    return read_rows(path) if whole else []


class Given(NamedTuple):
    """A query under a condition, as a model is given it."""

    query: Query
    condition: Condition
    prompt: Prompt
    asked: Asked

    def __str__(self) -> str:
        turns = [{"content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        said = (f"{turn['role']}: {turn['content']}" if "role" in turn else turn["content"] for turn in turns)
        return "\n".join(said) + self.asked.prefill


class Cell(NamedTuple):
    given: Given
    sample: int
    ask: Ask


def rendered(grid: Grid, *, chat: bool) -> list[Given]:
    """All that is asked; what cannot be is refused here, before anything is sampled."""
    return [
        Given(query, condition, *grid.render(query, condition, chat=chat))
        for query in grid.queries for condition in grid.conditions
    ]  # fmt: skip


def cells(
    some: Sequence[Given], encode: Callable[[Prompt, str], tuple[int, ...]], *, samples: int, seed: int, max_tokens: int
) -> list[Cell]:
    """`encode`: of a prompt and of what the reply begins with, the tokens."""
    made = []
    for given in some:
        prefix = encode(given.prompt, given.asked.prefill)
        keys = (cell_key(seed, given.query.id, given.condition.name, sample) for sample in range(samples))
        made += [Cell(given, sample, Ask(prefix, key, max_tokens)) for sample, key in enumerate(keys)]
    return made


def unasked(rows: Sequence[Row], some: Sequence[Cell], path: Path, *, arm: str, run: int, how: str) -> list[Cell]:
    """The cells that have no row yet. UserError where one was asked otherwise; `how` as of `ask_all`."""
    there = {row.cell: row.asked for row in rows}
    left = []
    for cell in some:
        query, condition = cell.given.query.id, cell.given.condition.name
        before = there.get((arm, run, query, condition, cell.sample))
        if before is None:
            left.append(cell)
        elif before != _digest(cell.ask, how):
            what = f"the query {query!r} was asked otherwise under {condition}"
            raise UserError(what, at=str(path), hint="another --out, or another --arm")
    return left


def ask_all(
    writer: Writer, some: Sequence[Cell], classifiers: Sequence[Classifier], path: Path, *, arm: str, run: int, how: str
) -> list[Row]:
    """Appends a row for each cell that has none yet, and returns all rows of the file.

    Args:
      how: how it is drawn, in words: with what was asked it makes the digest of a row.

    Raises:
      UserError: a cell was asked otherwise before.
    """
    rows = open_rows(path)
    left = unasked(rows, some, path, arm=arm, run=run, how=how)
    if len(left) < len(some):
        say(f"{len(some) - len(left):,} of {len(some):,} cells are there already")
    with Progress("audit", total=len(left), unit="replies") as progress, open(path, "ab") as file:
        for start in range(0, len(left), _AT_ONCE):
            new = list(_rows(writer, left[start : start + _AT_ONCE], classifiers, arm, run, how))
            file.write(b"".join(map(_line, new)))
            file.flush()
            os.fsync(file.fileno())
            rows += new
            progress.update(start + len(new))
    return rows


def _rows(
    writer: Writer, some: Sequence[Cell], classifiers: Sequence[Classifier], arm: str, run: int, how: str
) -> Iterator[Row]:
    written = writer.write([cell.ask for cell in some])
    texts = [cell.given.asked.prefill + one.text for cell, one in zip(some, written, strict=True)]
    verdicts = _classified([(cell.given, text) for cell, text in zip(some, texts)], classifiers)
    for cell, one, text, found in zip(some, written, texts, verdicts):
        q = cell.given.query
        yield Row(
            arm, run, q.id, q.unit, q.persona, q.group, q.benign, cell.given.condition.name, cell.sample,
            _digest(cell.ask, how), text, one.ended, found,
        )  # fmt: skip


def _classified(some: Sequence[tuple[Given, str]], classifiers: Sequence[Classifier]) -> list[dict[str, Verdict]]:
    parts = [split(text, given.asked.marks) for given, text in some]
    verdicts: list[dict[str, Verdict]] = [{one.name: None for one in classifiers} for _ in some]
    for one in classifiers:
        judged = [thought if one.of == "reasoning" else reply for thought, reply in parts]
        known = [i for i, text in enumerate(judged) if text is not None]  # others are of a reply that never came
        found = one.judge([(some[i][0].query.text, judged[i] or "") for i in known])
        for i, verdict in zip(known, found, strict=True):
            verdicts[i][one.name] = verdict
    return verdicts


def classify_again(path: Path, some: Sequence[Given], classifiers: Sequence[Classifier]) -> None:
    """New verdicts for all rows of a file. UserError for a row of a query or condition that is not among `some`."""
    rows, given = open_rows(path), {(one.query.id, one.condition.name): one for one in some}
    if lost := next((row for row in rows if (row.query, row.condition) not in given), None):
        what = f"the classifiers are others, and the query {lost.query!r} under {lost.condition} is not in the grid"
        raise UserError(what, at=str(path), hint="put it back, or choose another --out")
    if rows:
        say(f"{path}: the classifiers are others: {len(rows):,} replies that are there are classified again")
        verdicts = _classified([(given[row.query, row.condition], row.text) for row in rows], classifiers)
        write_atomically(path, b"".join(_line(row._replace(verdicts=found)) for row, found in zip(rows, verdicts)))


def _line(row: Row) -> bytes:
    return json.dumps(row._asdict()).encode() + b"\n"


def _digest(ask: Ask, how: str) -> str:
    return hashlib.blake2b(repr((*ask, how)).encode(), digest_size=8).hexdigest()
