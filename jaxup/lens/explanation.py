"""What is known of a model's origin, as an object: its plan, what was trained since, and both in words."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jaxup.depth.draw import ranges
from jaxup.depth.plan import DepthPlan, runs
from jaxup.errors import UserError
from jaxup.progress import printable
from jaxup.text import named, size, write_atomically


class Trained(NamedTuple):
    """A layer, or an end, beside what the plan makes."""

    similarity: float  # cosine with its origin, of what is inherited and not zeroed; NaN if that is nothing
    changed: float  # |difference| / |what the plan makes|, of the same; 0.0: the same to the bit
    grown: float  # of what the plan zeroes: its size now beside its origin's
    nearest: float  # the largest cosine that a part of it has with that of any layer

    @property
    def untouched(self) -> bool:
        return not self.changed and not self.grown


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a model was made of; `plan` makes it, but for what was trained since.

    Attributes:
      layers, ends: what was trained since, of each row of the plan and of each end that the model has.
      notes: what no plan says, what could as well be otherwise, and what matches nothing.
      read: (bytes read, bytes of the files) of each model, the one explained first.
    """

    model: str
    plan: DepthPlan
    layers: tuple[Trained, ...]
    ends: Mapping[str, Trained]
    notes: tuple[str, ...]
    read: Mapping[str, tuple[int, int]]

    @property
    def exact(self) -> bool:
        """Whether all that was read is what the plan makes; what is new it makes of random values."""
        return all(trained.untouched for trained in (*self.layers, *self.ends.values()))

    def describe(self) -> str:
        """The plan, what was trained since, and what was read."""
        lines = [self.plan.describe(), *self._trained(), *(f"note: {note}" for note in self.notes)]
        shares = (f"{size(read)} of the {size(total)} of {named(name)}" for name, (read, total) in self.read.items())
        return "\n".join([*lines, f"read: {', '.join(shares)}"])

    __str__ = describe

    def _trained(self) -> Iterator[str]:
        """What was trained since, a line for each run of layers."""
        if self.exact:
            if any(row.parts for row in self.plan.rows):
                yield "nothing was trained since: what was read is what the plan makes, bit for bit"
            return
        yield "trained since:"
        first = 0
        for run in runs(self.plan.rows):
            layers = range(first, first := first + len(run))
            if run[0].parts:
                yield f"  {ranges(layers)}: {_told([self.layers[i] for i in layers])}"
        yield from (f"  {end}: {_told([trained])}" for end, trained in self.ends.items() if getattr(self.plan, end))

    def to_json(self) -> str:
        """All of it; NaN is null."""
        rows = [
            {"source": row.source if row.parts else None, "layer": row.layer if row.parts else None, "role": row.role,
             "parts": row.parts, "zeroed": row.zeroed, **_plain(trained)}
            for row, trained in zip(self.plan.rows, self.layers, strict=True)
        ]  # fmt: skip
        ends = {end: {"source": getattr(self.plan, end), **_plain(trained)} for end, trained in self.ends.items()}
        read = {name: {"read": read, "of": total} for name, (read, total) in self.read.items()}
        data = {"model": self.model, "layers": rows, "ends": ends, "notes": self.notes, "bytes": read}
        return json.dumps(data, indent=2) + "\n"

    def to_yaml(self) -> str:
        """The plan as a file that `jaxup.build` takes, with what else is known as comments."""
        lines = [f"What {self.model} was made of, as its bytes say", *self._trained(), *self.notes]
        comments = "".join(f"# {printable(line, keep='')}".rstrip() + "\n" for line in lines)
        return f"{comments}\n{self.plan.to_yaml()}"

    def save(self, place: str | os.PathLike[str]) -> None:
        """A file that ends in .yaml has the plan; else a directory gets it as plan.yaml, and explain.json."""
        path = Path(place).expanduser()
        files = {path: self.to_yaml()}
        if path.suffix not in (".yaml", ".yml"):
            files = {path / "plan.yaml": self.to_yaml(), path / "explain.json": self.to_json()}
        if there := [file for file in files if os.path.lexists(file)]:
            raise UserError("exists already; choose another name", at=str(there[0]))
        try:
            for file, text in files.items():
                file.parent.mkdir(exist_ok=True)
                write_atomically(file, text)
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", at=str(path)) from None

    def __repr__(self) -> str:
        return f"<Explanation of {self.model!r}: {self.plan!r}>"

    def _repr_html_(self) -> str:
        """For notebooks: the picture of the plan, and all that is known in words."""
        drawn = self.plan._repr_html_().partition("<details>")[0] if self.plan._repr_png_() else ""
        return f"{drawn}<pre>{escape(self.describe())}</pre>"


def _told(layers: Sequence[Trained]) -> str:
    """Some layers in words, the least to the most."""
    if all(layer.untouched for layer in layers):
        return "nothing"
    words = []
    if changed := [layer.changed for layer in layers if layer.changed]:
        words.append(f"changed by {_range([100 * share for share in changed], '.2g', '%')}")
        words.append(f"similarity {_range([layer.similarity for layer in layers if layer.changed], '.4f')}")
    if grown := [100 * layer.grown for layer in layers if layer.grown]:
        words.append(f"what was zeroed has grown to {_range(grown, '.2g', '%')} of its origin's size")
    return ", ".join(words)


def _range(numbers: Sequence[float], form: str, unit: str = "") -> str:
    ends = dict.fromkeys(f"{number:{form}}" for number in (min(numbers), max(numbers)))
    return f"{' to '.join(ends)}{unit}"


def _plain(trained: Trained) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in trained._asdict().items()}
