"""Models compared tensor by tensor: what each layer of one differs in from the layer of another that it came from."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from jaxup.depth.draw import CHARACTERS, ranges
from jaxup.depth.plan import BLOCK_PATHS, END_PATHS, DepthPlan
from jaxup.errors import UserError
from jaxup.files.staging import staged_directory
from jaxup.lens import heatmap
from jaxup.lens.alignment import Alignment, Origin, align
from jaxup.lens.metrics import METRICS, RANK
from jaxup.lens.page import page
from jaxup.lens.sides import HEAD, Side, open_side
from jaxup.lens.streaming import Pair, Tensor, compared
from jaxup.model.config import ModelConfig
from jaxup.model.spec import STACK, spec
from jaxup.text import escaped, misfit, parse_json

FILE = "differences.json"
FORMAT = 1
_DRAWN = ("mean_abs", "relative")
_COPIES = "Xz"  # roles
# In the table, the medians of these follow.
_SHOWN = {"relative": "relative", "cosine": "1 - cos", "changed": "changed", RANK: "rank"}
_KINDS = {
    "format": int, "models": list[str], "pairs": list[list[int]], "modules": list[str],
    "origins": list[dict[str, str | int | None]], "values": dict[str, list[Any]], "ends": dict[str, dict[str, Any]],
    "notes": list[str],
}  # fmt: skip
# Fields of a configuration that keep parameters from being compared, where the tables of them differ, and fields that
# say nothing of a layer. What else differs is said, such as a bias that the files of a family always have.
_SHAPING = (
    "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "positions", "gated_mlp",
    "qk_norm", "max_positions",
)  # fmt: skip
_FREE = ("num_layers", "kinds", "tie_embeddings", "init_std")


@dataclasses.dataclass(frozen=True)
class Differences:
    """What models differ in. Every number of a pair is of (the second - the first) of its two models.

    Attributes:
      models: as they were given, the base first.
      pairs: which two are compared, by their places in `models`: first those that follow each other, then each with
        the first.
      modules: the columns, in the order of a block; biases have columns of their own, "q_proj.bias".
      origins: one for each row. The rows are the layers of what the plan makes, or of all models if there is none.
      values: metric -> float64 [pairs, layers, modules]; NaN where there is nothing to compare. The metrics are
        mean_abs: mean of |difference|; relative: Frobenius norm of the difference over that of the first, inf where
        the first is zero; rms of the difference; cosine: 1 - cos; largest |difference|; changed: share of the values
        that are not the same; rank: see `jaxup.lens.metrics.Rank`, of matrices, if it was asked for.
      ends: metric -> what is no layer, "embed_tokens", "norm", "lm_head", ... -> float64 [pairs].
      notes: what was compared how, values that are not finite, what is not compared.
    """

    models: tuple[str, ...]
    pairs: tuple[Pair, ...]
    modules: tuple[str, ...]
    origins: tuple[Origin, ...]
    values: dict[str, np.ndarray]
    ends: dict[str, dict[str, np.ndarray]]
    notes: tuple[str, ...]

    def save(self, out: str | os.PathLike) -> None:
        """Makes the directory `out`; UserError if it is there already.

        In it are `index.html`, which shows every number and needs no other file, pictures of `mean_abs` and
        `relative`, and all numbers in `differences.json`.
        """
        with staged_directory(Path(out), force=False, marks=(FILE,)) as directory:
            (directory / FILE).write_text(self.to_json())
            (directory / "index.html").write_text(page(self), "utf-8")
            for metric in _DRAWN:
                (directory / f"{metric}.png").write_bytes(heatmap.png(heatmap.differences(self, metric)))

    def to_json(self) -> str:
        """NaN is null, infinity is "inf"; what is no ASCII is escaped."""

        def plain(values: Any) -> Any:
            if np.ndim(values):
                return [plain(each) for each in values]
            value = float(values)
            return None if math.isnan(value) else "inf" if math.isinf(value) else value

        about = {"format": FORMAT} | dataclasses.asdict(self) | {
            "origins": [origin._asdict() for origin in self.origins],
            "values": {metric: plain(values) for metric, values in self.values.items()},
            "ends": {
                metric: {end: plain(values) for end, values in ends.items()} for metric, ends in self.ends.items()
            },
        }  # fmt: skip
        return json.dumps(about) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = FILE) -> Differences:
        """The inverse of `to_json`; UserError for anything else."""

        def array(values: Any) -> np.ndarray:
            return np.array(values, object if values is None else None).astype(np.float64)

        about = parse_json(text.encode(), name)
        try:
            if wrong := misfit(about, _KINDS):
                raise ValueError(wrong)
            if about["format"] != FORMAT:
                raise UserError(f"format {about['format']}, and {FORMAT} is what this version of jaxup knows", at=name)
            return cls(
                tuple(about["models"]), tuple((a, b) for a, b in about["pairs"]), tuple(about["modules"]),
                tuple(Origin(**origin) for origin in about["origins"]),
                {metric: array(values) for metric, values in about["values"].items()},
                {m: {end: array(values) for end, values in ends.items()} for m, ends in about["ends"].items()},
                tuple(about["notes"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not what jaxup.diff writes: {error}", at=name) from None

    def __str__(self) -> str:
        """For each pair a table: of each kind of module the median over layers, by their roles, and the largest."""
        lines = [f"note: {note}" for note in self.notes]
        for index in range(len(self.pairs)):
            lines += ["", *self._table(index)]
        return "\n".join(map(escaped, lines)).lstrip("\n")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        drawn = base64.b64encode(heatmap.png(heatmap.differences(self), dpi=80)).decode()
        alt = "mean |difference| by layers and modules"
        image = f'<img alt="{alt}" style="max-width: 100%" src="data:image/png;base64,{drawn}">'
        return f"{image}<details><summary>in words</summary><pre>{escape(str(self))}</pre></details>"

    def _table(self, pair: int) -> Iterator[str]:
        first, second = (self.models[index] for index in self.pairs[pair])
        roles = "".join(origin.role for origin in self.origins)
        said = ", ".join(f"{roles.count(role)} {CHARACTERS[role][0]}" for role in CHARACTERS if role in roles)
        yield f"{first} -> {second}: {len(roles)} layers ({said})"
        groups = {
            "originals": np.array([role == "=" for role in roles]),
            "copies": np.array([role in _COPIES for role in roles]),
        }
        split = all(group.any() for group in groups.values())
        means, others = self.values["mean_abs"][pair], [name for name in _SHOWN if name in self.values]
        head = ["mean |difference|", "median", *([*groups, "ratio"] if split else []), "largest", "layer"]
        rows = [head + [_SHOWN[name] for name in others]]
        for column, module in enumerate(self.modules):
            values = means[:, column]
            if np.isnan(values).all():
                continue
            cells = [module, _shown(_median(values))]
            if split:
                originals, copies = (_median(values[group]) for group in groups.values())
                cells += [_shown(originals), _shown(copies), _shown(copies / originals if originals else math.nan)]
            largest = int(np.nanargmax(values))
            cells += [_shown(values[largest]), str(largest)]
            rows.append(cells + [_shown(_median(self.values[name][pair, :, column])) for name in others])
        for end, found in self.ends["mean_abs"].items():
            if not np.isnan(found[pair]):
                more = [_shown(self.ends[name][end][pair]) for name in others]
                rows.append([end, _shown(found[pair]), *[""] * (len(head) - 2), *more])
        widths = [max(map(len, cells)) for cells in zip(*rows)]
        for cells in rows:
            yield "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()


def _median(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(np.median(there)) if there.size else math.nan


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


# ---- comparing


def diff(
    *models: str | os.PathLike, plan: str | os.PathLike | DepthPlan | None = None, rank: bool = False,
    common: bool = False, as_built: bool = False, allow_pickle: bool = False, progress: bool = False,
) -> Differences:  # fmt: skip
    """Compares models tensor by tensor, each layer with the one that it came from.

    Two models of any size take the memory of a few blocks of their tensors; those in the checkpoints of runs that of
    the arrays that lie there, which hold a parameter of all layers.

    Args:
      models: directories, Hub ids, URLs, runs or models of runs (RUN@NAME/STEP); the base first.
      plan: by which layers of models of different depth belong together: a file, one line, or a DepthPlan; by default
        that of the first model that has one, else what their weights say (`jaxup.lens.explain`).
      rank: the effective rank of each change too, which takes far longer.
      common: compares what two models both have, where else they are refused.
      as_built: what the plan scales or casts is scaled and cast before it is compared, so that a zeroed copy is
        compared with zeros and not with its origin: what was done since the model was built.
      allow_pickle: reads pytorch_model.bin where there is nothing better.

    Raises:
      UserError: what is no model; models that do not fit each other; layers that nothing puts in relation.
    """
    if len(models) < 2:
        raise UserError(f"needs at least two models, and got {len(models)}", at="diff")
    sides = [open_side(model, allow_pickle=allow_pickle) for model in models]
    alignment = align(sides, plan)
    apart = list(_apart(sides))
    if apart and not common:
        raise UserError(apart[0], hint="--common compares what both have")
    pairs: list[Pair] = [(i, i + 1) for i in range(len(sides) - 1)]
    pairs += [(0, i) for i in range(2, len(sides))]
    return _compared(sides, alignment, pairs, [*alignment.notes, *_remarks(sides), *apart], rank, as_built, progress)


def _compared(
    sides: Sequence[Side], alignment: Alignment, pairs: Sequence[Pair], notes: list[str], rank: bool, as_built: bool,
    progress: bool,
) -> Differences:  # fmt: skip
    tables = [spec(side.config) for side in sides]
    paths = [path for path in BLOCK_PATHS if any(STACK + path in table for table in tables)]
    modules, ends = [_column(path) for path in paths], [path for path in END_PATHS if _anywhere(path, tables)]
    metrics = (*METRICS, RANK) if rank else METRICS
    values = {name: np.full((len(pairs), len(alignment.origins), len(modules)), np.nan) for name in metrics}
    of_ends = {name: {_column(path): np.full(len(pairs), np.nan) for path in ends} for name in metrics}

    # The layers of a shallow model stand in several rows: the same tensors are compared once.
    tensors: dict[object, Tensor] = {}
    cells: dict[object, list[tuple[str, int | None]]] = {}
    where = [(STACK + path, row) for path in paths for row in range(len(alignment.origins))]
    for path, row in [*where, *((path, None) for path in ends)]:
        places = [alignment.place(index, path, row) for index in range(len(sides))]
        parts = [side.find(path, layer) if has else None for side, (has, layer) in zip(sides, places)]
        first = next((part for part in parts if part is not None), None)
        fit = [part if first is not None and part is not None and _fits(part, first) else None for part in parts]
        scaled = [alignment.scaled(i, path, row) if as_built else ((), None, None) for i in range(len(sides))]
        key: object = (path, *((place[1], part is not None) for place, part in zip(places, fit)), *scaled)
        tensors.setdefault(key, Tensor(tuple(fit), tuple(scaled)))
        cells.setdefault(key, []).append((path, row))

    lost: dict[tuple[int, str], dict[int | None, int]] = {}
    any_remote = any(side.remote for side in sides)
    for key, found in compared(tensors, pairs, rank=rank, remote=any_remote, progress=progress):
        for pair, (measured, not_finite) in found.items():
            index = pairs.index(pair)
            for path, row in cells[key]:
                for name, value in measured.items():
                    if row is None:
                        of_ends[name][_column(path)][index] = value
                    else:
                        values[name][index, row, modules.index(_column(path))] = value
                for side, count in zip(pair, not_finite):
                    if count:
                        lost.setdefault((side, path), {})[alignment.place(side, path, row)[1]] = count
    for (side, path), counts in sorted(lost.items()):
        of = "" if None in counts else f" in layers {ranges(sorted(layer or 0 for layer in counts))}"
        notes.append(f"{sides[side].name}: {path}{of}: {sum(counts.values()):,} values are not finite, and left out")
    names = tuple(side.name for side in sides)
    return Differences(names, tuple(pairs), tuple(modules), alignment.origins, values, of_ends, tuple(notes))


def _anywhere(path: str, tables: Sequence[Mapping[str, Any]]) -> bool:
    return any(path in table for table in tables)


def _column(path: str) -> str:
    """The module's own name; of a bias with ".bias"."""
    module, _, leaf = path.rpartition(".")
    name = (module or path).rpartition(".")[2]
    return f"{name}.bias" if leaf == "bias" else name


def _fits(part: Any, other: Any) -> bool:
    """Whether they are matrices of the same shape, once they lie the same way."""
    shape = (part.rows, part.columns) if part.turned == other.turned else (part.columns, part.rows)
    return shape == (other.rows, other.columns)


def _apart(sides: Sequence[Side]) -> Iterator[str]:
    """What keeps parameters of a model from being compared with those of the first, one sentence for each cause."""
    table = spec(sides[0].config)
    for other in sides[1:]:
        theirs = spec(other.config)
        shared = table.keys() & theirs.keys()
        alone = [path for path in table.keys() ^ theirs.keys() if path != HEAD and not path.endswith(".bias")]
        if alone or any(table[path].each != theirs[path].each for path in shared):
            yield from _disagreements(sides[0], other, _SHAPING)


def _remarks(sides: Sequence[Side]) -> Iterator[str]:
    """What else differs in models whose parameters may be compared."""
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    for other in sides[1:]:
        yield from _disagreements(sides[0], other, [name for name in fields if name not in (*_FREE, *_SHAPING)])


def _disagreements(base: Side, other: Side, fields: Sequence[str]) -> Iterator[str]:
    for field in fields:
        mine, its = getattr(base.config, field), getattr(other.config, field)
        # With rotary positions the longest text is what a model was trained to, and no size.
        if mine != its and (field != "max_positions" or base.config.positions == "learned"):
            yield f"{field} is {mine!r} in {base.name}, and {its!r} in {other.name}"
