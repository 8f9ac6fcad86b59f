"""Files and datasets, mixed by weight -> examples, one after the other. What a row may be stands in `layouts.py`.

A weight is how often a file's rows are taken in one pass over all: 2 twice, 0.5 the half of them, 1.5 all once
and half of them again. Which half is decided by a hash of (seed, file, row), so it depends on neither the order of
reading nor the other files. Files are interleaved in proportion to their length: all end at about the same time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxup.data.layouts import LAYOUTS, Segment, Segments, fitting, parse
from jaxup.data.readers import Row
from jaxup.data.sources import Corpus, File, Split, draw, find_files, near_layout, os_errors
from jaxup.data.turns import BadRow, Conversation
from jaxup.errors import UserError, suggest

MOST_PASSES = 1000  # over a file: all of them are tokenised
FIRST_ROWS = 16  # the layout is detected from


class Example(NamedTuple):
    said: Conversation | Segments | np.ndarray  # or token ids
    place: str  # the file and the line, or the number of the row
    side: Split | None  # the split it is of, if that is settled
    entry: int  # of those that are mixed, which it is of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Iterable as often as wanted, always in the same order; made by `open_mixture`."""

    mixed: tuple[tuple[tuple[File, ...], float], ...]  # the files of one entry follow each other
    seed: int
    on_bad: str  # "error" | "skip"
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)  # of each file, when all of it was read
    blanks: bool = False  # text may be blank, and where it is empty there is no example: documents of a corpus

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex; other examples have another one."""
        # The seed decides nothing unless a part of some file is left out.
        drawn_by = self.seed if any(weight % 1 for _, weight in self.mixed) else None
        with os_errors():
            content = [
                [weight, [(f.name, f.hash(), f.layout, *(["ends"] if f.ends else [])) for f in files]]
                for files, weight in self.mixed
            ]
        return hashlib.blake2b(json.dumps([drawn_by, content]).encode(), digest_size=16).hexdigest()

    @functools.cached_property
    def files(self) -> list[File]:
        return [file for files, _ in self.mixed for file in files]

    @property
    def layouts(self) -> dict[str, str]:
        """For each file how it is read."""
        return {file.path: file.layout for file in self.files}

    def __iter__(self) -> Iterator[Example]:
        """UserError at the first bad row, or, when those are skipped, a warning at the end how many there were.

        UserError also for a file that cannot be read, and, at the end, when there was no example.
        """
        self.skipped.clear()
        first_bad: dict[str, str] = {}

        def skip(file: File, error: BadRow) -> None:
            if self.on_bad == "error":
                raise UserError(str(error)) from None
            self.skipped[file.path] += 1
            first_bad.setdefault(file.path, str(error))

        found = False
        entries = (self._examples(at, files, weight, skip) for at, (files, weight) in enumerate(self.mixed))
        with os_errors():
            for _, example in heapq.merge(*entries, key=lambda item: item[0]):
                found = True
                yield example
        if not found:
            bad = self.skipped.total()
            why = f"; the first of {bad} bad rows: {next(iter(first_bad.values()))}" if bad else ""
            what = "text" if set(self.layouts.values()) == {"text"} else "conversation"
            raise UserError(f"{', '.join(list(self.layouts)[:8])}: no {what} found{why}")
        for path in self.layouts:
            if bad := self.skipped[path]:
                warnings.warn(f"{path}: {bad:,} bad rows skipped; the first: {first_bad[path]}", stacklevel=2)

    def check_all(self) -> tuple[int, int, str]:
        """Reads every row of every file once, whatever its weight: (rows, bad ones, the error of the first).

        Unless those are skipped, UserError tells the first of them and how many.
        """
        rows, bad, first_bad = 0, 0, ""
        with os_errors():
            for file in {file.path: file for file in self.files}.values():
                for row in file.rows():
                    rows += 1
                    try:
                        self._parse(row, file.layout)
                    except BadRow as error:
                        bad += 1
                        first_bad = first_bad or str(error)
        if bad and self.on_bad == "error":
            raise UserError(f"{first_bad}; {f'the first of {bad:,}' if bad > 1 else 'the only'} bad of {rows:,} rows")
        return rows, bad, first_bad

    def _examples(
        self, entry: int, files: tuple[File, ...], weight: float, skip: Callable[[File, BadRow], None]
    ) -> Iterator[tuple[float, Example]]:
        """Each with how much of the entry lies before it."""
        passes, size = math.ceil(weight), sum(file.size for file in files)
        for this in range(passes):
            before = 0
            for file in files:
                for row in file.rows():
                    share = weight - this  # of the rows, in this pass
                    if share < 1 and draw(f"{self.seed}\0{file.name}\0{row.number}") / 2**64 >= share:
                        continue
                    try:
                        said = self._parse(row, file.layout)
                    except BadRow as error:
                        if this == 0:  # a bad row is counted once
                            skip(file, error)
                        continue
                    if len(said):
                        place = row.place if row.place != file.path else f"{row.place}, row {row.number}"
                        example = Example(said, place, file.side(row), entry)
                        yield (this + (before + row.done * file.size) / size) / passes, example
                before += file.size

    def _parse(self, row: Row, layout: str) -> Conversation | Segments | np.ndarray:
        """What the row says."""
        try:
            if layout == "ids":
                return row.value
            if self.blanks and layout == "text" and isinstance(row.value, dict) and "text" in row.value:
                text = row.value["text"]
                if not text or (isinstance(text, str) and not text.strip()):
                    return (Segment(text, True),) if text else ()
            if not row.fault:
                return parse(row.value, layout)
            wrong = f"JSON: {row.fault}"
        except BadRow as error:
            wrong = f"{layout}: {error}"
        except RecursionError:
            wrong = f"{layout}: it is nested too deeply"
        raise BadRow(f"{row.place}: row {row.number} is not {wrong}")


def open_mixture(
    files: Sequence[tuple[str, float | int]] | str, *, layout: str | None, seed: int, on_bad: str = "error",
    corpus: Corpus | None = None, side: Split | None = None,
) -> Mixture:  # fmt: skip
    """The examples of all `files`, each a path or dataset and its weight, or "a.jsonl*2,b.parquet*0.5".

    In the string form a path holds no comma and no "*", unless the string is just the one path. `layout` None: that
    of each file is detected from its first rows. `corpus`, `side`: see `find_files`. UserError for what is not there
    or holds nothing.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"layout={layout!r}: no such layout{suggest(layout, LAYOUTS)}")
    with os_errors():
        mixed = []
        for spec, weight in split_spec(files) if isinstance(files, str) else files:
            if not 0 < weight < math.inf:
                raise UserError(f"{spec}: its weight {weight} is not a number above 0")
            if weight > MOST_PASSES:
                raise UserError(f"{spec}: its weight {weight} is more than {MOST_PASSES} passes over the file")
            found = find_files(spec, corpus, side=side)
            layouts = (file.layout if file.layout == "ids" else layout or _detect(file) for file in found)
            mixed.append((tuple(map(_with_layout, found, layouts)), float(weight)))
    if not mixed:
        raise UserError("no data named")
    return Mixture(mixed=tuple(mixed), seed=seed, on_bad=on_bad, blanks=corpus is not None)


def _with_layout(file: File, layout: str) -> File:
    return dataclasses.replace(file, layout=layout)


def split_spec(spec: str) -> list[tuple[str, float]]:
    if Path(os.path.expanduser(spec)).exists():
        return [(spec, 1.0)]
    found = []
    for entry in spec.split(","):
        path, _, weight = entry.strip().partition("*")
        try:
            found.append((path, float(weight or 1)))
        except ValueError:
            raise UserError(f"{entry.strip()}: {weight!r} is no weight; write PATH*NUMBER") from None
    return found


def _detect(file: File) -> str:
    """The layout that most of the first rows have."""
    first_rows = list(islice(file.rows(), FIRST_ROWS))
    if not first_rows:
        raise UserError(f"{file.path}: no rows")
    fit = Counter(layout for row in first_rows if not row.fault for layout in fitting(row.value))
    best = [layout for layout, rows in fit.items() if rows == max(fit.values())]
    if len(best) == 1:
        return best[0]
    if best:
        raise UserError(f"{file.path}: its first rows are both {' and '.join(best)}; name the layout that is meant")
    row = first_rows[0]
    if row.fault:
        raise UserError(f"{row.place}: row {row.number} is not JSON: {row.fault}")
    raise UserError(f"{row.place}: row {row.number} is of no layout{near_layout(row.value)}")


def documents(mixture: Mixture, side: Split) -> Iterator[str]:
    """The text of a corpus, as far as it is of one split."""
    for example in mixture:
        said = example.said
        if example.side == side and isinstance(said, tuple) and isinstance(said[0], Segment):
            yield said[0].text
