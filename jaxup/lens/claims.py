"""What is said of healed up-scaled models, as numbers with intervals: do copies change more than originals, ...?

The claims are those of the write-up of the Tunguska models, which read them off heatmaps of weight differences.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxup.depth.draw import ranges
from jaxup.errors import UserError
from jaxup.files.names import split_run
from jaxup.files.staging import staged_directory
from jaxup.lens import ratios
from jaxup.lens.bootstrap import DRAWS, LEAST, LEVEL, SEED, interval
from jaxup.lens.differences import FILE, Differences, diff
from jaxup.text import backticks, escaped

MARKDOWN, JSON, FORMAT = "CLAIMS.md", "claims.json", 1
HOLDS, NOT, OPEN = "holds", "does not hold", "cannot be told"
_SAME = 1.25  # a ratio that is closer to 1 is as good as 1
_HEALED, _BEFORE, _CONTROL = "healed", "before", "control"  # models of a run


class Asks(NamedTuple):
    """Where a ratio has to be: above `low` and below `high`; or, with `outside`, not between the two."""

    low: float = 0.0
    high: float = math.inf
    outside: bool = False

    def verdict(self, low: float, high: float) -> str:
        """Of an interval; one that reaches over a bound, or is none, leaves it open."""
        inside, apart = self.low < low and high < self.high, high < self.low or self.high < low
        holds, fails = (apart, inside) if self.outside else (inside, apart)
        return HOLDS if holds else NOT if fails else OPEN

    def __str__(self) -> str:
        if self.outside:
            return f"below {self.low:g} or above {self.high:g}"
        bounds = [f"above {self.low:g}"] * bool(self.low) + [f"below {self.high:g}"] * math.isfinite(self.high)
        return " and ".join(bounds)


class Question(NamedTuple):
    sentence: str  # of the write-up
    number: str
    units: str  # that are drawn in each run
    asks: Asks


MORE, LESS = Asks(low=1.0), Asks(high=1.0)
QUESTIONS = {
    "copies": Question(
        "Copies change more than originals in every kind of module but o_proj.",
        "mean change of copies over that of the originals of the same source layers; of o_proj it has to be below 1",
        "source layers, each with its original and all its copies", MORE,
    ),
    "gradient": Question(
        "Each slice of copies has a gradient of its own from its bottom to its top.",
        "change at the top of a slice over that at its bottom, by a line through the logarithms. A slice is the first, "
        "second, ... copy of each source layer. The originals of the same layers are beside them",
        "layers of the slice", Asks(1 / _SAME, _SAME, outside=True),
    ),
    "first_layers": Question(
        "The first two layers change hugely.",
        "mean change of the first two layers over that of all others; hugely is taken as twice as much",
        "layers, those of the first two and the others apart", Asks(low=2.0),
    ),
    "epochs": Question(
        "The rate of change is the same in epochs 1 and 2.",
        "mean change from the end of epoch 1 to that of epoch 2, over that of epoch 1; the same is taken as within "
        f"a factor of {_SAME:g}",
        "layers", Asks(1 / _SAME, _SAME),
    ),
    "o_proj": Question(
        "o_proj is less sensitive to being a copy than the others.",
        "the ratio of the first claim for o_proj over its geometric mean for the other projections",
        "source layers, each with its original and all its copies", LESS,
    ),
}  # fmt: skip


class Result(NamedTuple):
    """One number of a claim."""

    claim: str  # a key of QUESTIONS
    of: str  # which module, slice, model
    measure: str  # mean_abs: mean |difference|; relative: Frobenius norms, the change over what it began as
    ratio: float
    low: float
    high: float
    asks: Asks
    verdict: str


@dataclasses.dataclass(frozen=True)
class Claims:
    """Each claim with its numbers, their intervals, and whether it holds by them.

    Attributes:
      models: those of each run: before healing, and after each epoch.
      notes: what was left out.
    """

    models: tuple[tuple[str, ...], ...]
    results: tuple[Result, ...]
    notes: tuple[str, ...]

    def save(self, out: str | os.PathLike) -> None:
        """Makes the directory `out` with CLAIMS.md and claims.json; UserError if it is there already."""
        with staged_directory(Path(out), force=False, marks=(JSON, FILE)) as directory:
            (directory / MARKDOWN).write_text(f"{self}\n", "utf-8")
            (directory / JSON).write_text(self.to_json())

    def to_json(self) -> str:
        """What cannot be told is null, and so is a bound that is not asked for."""
        known = lambda value: value if math.isfinite(value) else None  # noqa: E731
        results = [
            result._asdict()
            | {name: known(getattr(result, name)) for name in ("ratio", "low", "high")}
            | {"asks": {"low": result.asks.low, "high": known(result.asks.high), "outside": result.asks.outside}}
            for result in self.results
        ]
        questions = {
            name: {"sentence": question.sentence, "number": question.number, "units": question.units}
            for name, question in QUESTIONS.items()
        }
        about = {"format": FORMAT, "models": self.models, "level": LEVEL, "draws": DRAWS, "seed": SEED}
        return json.dumps(about | {"claims": questions, "results": results, "notes": self.notes}, indent=1) + "\n"

    def __str__(self) -> str:
        """As Markdown."""
        return "\n".join(self._lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def _lines(self) -> Iterator[str]:
        yield "# Claims"
        yield ""
        for models in self.models:
            yield f"- {' -> '.join(map(_quoted, models))}"
        yield ""
        yield (
            f"A ratio is followed by its {LEVEL:.0%} interval: percentiles of {DRAWS:,} bootstrap draws (seed {SEED}) "
            f"of runs, and of units within each. A claim {HOLDS} where the interval lies wholly where it asks for, "
            f"{NOT} where it lies wholly elsewhere; else, and with fewer than {LEAST} units, it {OPEN}. Intervals of "
            "few runs and layers are too narrow. Module kinds are not independent of each other."
        )
        yield ""
        yield from (f"- {_plain(note)}" for note in self.notes)
        for name, question in QUESTIONS.items():
            rows: dict[str, dict[str, Result]] = collections.defaultdict(dict)
            for result in self.results:
                if result.claim == name:
                    rows[result.of][result.measure] = result
            yield from ("", f"## {question.sentence}", "")
            yield f"Ratio: {question.number}. It asks for {question.asks}. Units: {question.units}."
            yield ""
            if not rows:
                yield f"It {OPEN}: there is nothing to compare."
                continue
            for measure in ratios.MEASURES:
                count = collections.Counter(row[measure].verdict for row in rows.values())
                said = ", ".join(f"{verdict} in {count[verdict]}" for verdict in (HOLDS, NOT, OPEN) if count[verdict])
                yield f"- {_HEADS[measure]}: {said} of {len(rows)}"
            yield ""
            yield "| | " + " | ".join(f"{_HEADS[measure]} | verdict" for measure in ratios.MEASURES) + " |"
            yield "|---|---:|---|---:|---|"
            for of, row in rows.items():
                cells = [f"{_shown(row[measure])} | {row[measure].verdict}" for measure in ratios.MEASURES]
                yield f"| {_plain(of)} | " + " | ".join(cells) + " |"


_HEADS = {"mean_abs": "mean abs. difference", "relative": "relative to its norm"}


def _shown(result: Result) -> str:
    if math.isnan(result.ratio):
        return "-"
    bounds = "" if math.isnan(result.low) else f" [{result.low:.3g}, {result.high:.3g}]"
    return f"{result.ratio:.3g}{bounds}"


def _quoted(name: str) -> str:
    """A name in Markdown: between as many backticks as it takes, on one line."""
    ticks = backticks(name, 1)
    return f"{ticks} {escaped(name)} {ticks}" if "`" in name else f"{ticks}{escaped(name)}{ticks}"


def _plain(text: str) -> str:
    """Text that may hold the names of modules and models of a file, so that Markdown takes none of it as its own."""
    return "".join(f"\\{c}" if c in "\\`*<>[]|!&#" else c for c in escaped(text))


# ---- testing them


def _numbers(layers: ratios.Layers, rows: int) -> Iterator[tuple[str, str, Asks, ratios.Units, ratios.Statistic]]:
    """Claim, of what, what it asks for, and how the number is made."""
    columns = dict(enumerate(layers.modules))
    for column, module in columns.items():
        asks = LESS if module == "o_proj" else MORE
        yield "copies", module, asks, functools.partial(ratios.beside, layers, column), ratios.ratio
    originals = tuple(original for original, _ in layers.pairs)
    for kind, some in [*(("copies", rows) for rows in layers.slices), ("originals", originals)]:
        for column, module in columns.items():
            if len(some) > 1:
                of, statistic = f"{kind}, layers {ranges(some)}: {module}", functools.partial(ratios.slope, some)
                units = functools.partial(ratios.along, some, column)
                yield "gradient", of, QUESTIONS["gradient"].asks, units, statistic
    for column, module in columns.items():
        units = functools.partial(ratios.apart, range(rows), column)
        yield "first_layers", module, QUESTIONS["first_layers"].asks, units, ratios.ratio_of_means
    for column, module in columns.items():
        yield "epochs", module, QUESTIONS["epochs"].asks, functools.partial(ratios.in_turn, column), ratios.ratio
    projections = [column for column, module in columns.items() if module.endswith("_proj") and module != "o_proj"]
    if "o_proj" in layers.modules and projections:
        both = [layers.modules.index("o_proj"), *projections]
        yield "o_proj", "o_proj", LESS, functools.partial(ratios.all_beside, layers, both), ratios.against_others


def claims(runs: Sequence[Differences], controls: Sequence[Differences] = ()) -> Claims:
    """What is said of healed up-scaled models, tested on several runs of one experiment.

    Args:
      runs: of each (seed) the model before healing and those after each epoch, in this order.
      controls: of each the model before healing and the base that trained on the same data, for what is said of
        originals as well; copies in it are not looked at.

    Raises:
      UserError: no run, no copies, runs of different plans; the model before healing is not the first.
    """
    if not runs:
        raise UserError("needs the differences of at least one run", at="claims")
    for found in [*runs, *controls]:
        _check(found, runs[0])
    layers, rows = ratios.Layers.of(runs[0]), len(runs[0].origins)
    if not layers.slices:
        raise UserError("none of its layers is a copy", at=runs[0].models[-1], hint="claims are of up-scaled models")
    inherited = [row for row, origin in enumerate(runs[0].origins) if origin.role == "="]
    changes = [ratios.changes(found, layers) for found in runs]
    beside = [ratios.changes(found, layers) for found in controls]
    results: list[Result] = []

    numbers = [(number, changes) for number in _numbers(layers, rows)]
    for column, module in enumerate(layers.modules if beside else ()):
        asks, apart = QUESTIONS["first_layers"].asks, functools.partial(ratios.apart, inherited, column)
        numbers.append((("first_layers", f"control: {module}", asks, apart, ratios.ratio_of_means), beside))
    for (claim, of, asks, units, statistic), some in numbers:
        for measure in ratios.MEASURES:
            value, low, high = interval([units(change[measure]) for change in some], statistic)
            results.append(Result(claim, of, measure, value, low, high, asks, asks.verdict(low, high)))
    empty = {module for module, all in zip(layers.modules, np.isnan(runs[0].values["mean_abs"]).all((0, 1))) if all}
    kept = tuple(result for result in results if result.of.rpartition(": ")[2] not in empty)
    return Claims(tuple(found.models for found in runs), kept, tuple(_notes(runs, layers, changes)))


def _check(found: Differences, first: Differences) -> None:
    at = found.models[-1] if found.models else "claims"
    shape = (len(found.pairs), len(found.origins), len(found.modules))
    needed = {(0, len(found.models) - 1), *([(0, 1), (1, 2)] if len(found.models) > 2 else [])}
    metrics = ("mean_abs", "rms", "relative")
    missing = [metric for metric in metrics if metric not in found.values or found.values[metric].shape != shape]
    if len(found.models) < 2 or missing or not needed <= {*found.pairs}:
        raise UserError(f"not differences of two models or more{f': no {missing[0]}' if missing else ''}", at=at)
    if [origin[:2] for origin in found.origins] != [origin[:2] for origin in first.origins]:
        raise UserError("its layers are not those of the first run: of one experiment only the seed may differ", at=at)
    if found.modules != first.modules:
        raise UserError("its modules are not those of the first run", at=at)
    start = found.pairs.index((0, 1))
    silent = [found.modules.index(name) for name in ("o_proj", "down_proj") if name in found.modules]
    zeroed = [row for row, origin in enumerate(found.origins) if origin.role == "z"]
    relative = found.values["relative"][start][np.ix_(zeroed, silent)]
    if not np.nan_to_num(found.values["mean_abs"][start]).any() or (relative.size and (relative == 1).all()):
        what = f"nothing was trained from {found.models[0]} to {found.models[1]}"
        raise UserError(what, at=at, hint="the model before healing, RUN@before, comes first")


def _notes(
    runs: Sequence[Differences], layers: ratios.Layers, changes: Sequence[Mapping[str, ratios.Changes]],
) -> Iterator[str]:  # fmt: skip
    yield from dict.fromkeys(note for found in runs for note in found.notes)
    alone = {row for rows in layers.slices for row in rows} - {row for _, rows in layers.pairs for row in rows}
    if alone:
        yield f"copies whose original is not in the model, which are no part of ratios to it: {ranges(sorted(alone))}"
    for found, change in zip(runs, changes):
        frozen = np.flatnonzero(np.isnan(change["mean_abs"]["total"]).all(1))
        if frozen.size:
            yield f"{found.models[-1]}: did not train, and left out: layers {ranges(map(int, frozen))}"
    if any("2" not in change["mean_abs"] for change in changes):
        yield "there is one epoch only in some runs"


# ---- runs


def open_runs(names: Sequence[str], *, progress: bool = False) -> tuple[list[Differences], list[Differences]]:
    """Of healing runs, or directories that `jaxup diff` made, the differences, and those of the controls they have.

    A run's models are that before healing, and those at the ends of its epochs, or the last if there was less than one.
    """
    runs, controls = [], []
    for name in names:
        if (path := Path(name).expanduser() / FILE).is_file():
            runs.append(Differences.from_json(path.read_text("utf-8", "replace"), str(path)))
            continue
        models, control = _models(name)
        runs.append(diff(*models, progress=progress))
        if control:
            controls.append(diff(models[0], control, progress=progress))
    return runs, controls


def _models(name: str) -> tuple[list[str], str | None]:
    from jaxup.training.run import read_result
    from jaxup.training.sound import steps_in

    found = split_run(name)
    if found is None or found[1]:
        raise UserError("neither a run nor a directory with differences.json", at=name, hint="see jaxup diff --help")
    kept = found[0] / "checkpoints"
    there = {model: steps_in(kept / model) for model in (_BEFORE, _HEALED, _CONTROL)}
    result = read_result(kept / _HEALED) if there[_HEALED] else None
    if not there[_BEFORE] or result is None:
        raise UserError(f"no run of healing that is finished: it has no models {_BEFORE} and {_HEALED}", at=name)
    ends = {result.steps}
    if result.epochs:
        # As many steps as it takes to see all rows once more. The quotient is a few units of rounding off.
        each = result.steps / result.epochs
        ends |= {math.ceil(round(epoch * each, 6)) for epoch in range(1, int(result.epochs) + 1)}
    steps = sorted(ends & {*there[_HEALED]})
    control = f"{name}@{_CONTROL}" if there[_CONTROL] and read_result(kept / _CONTROL) is not None else None
    return [f"{name}@{_BEFORE}", *(f"{name}@{_HEALED}/{step}" for step in steps)], control
