"""Where a finished model came from: the plan that made it, and what was trained since, from its bytes.

A few rows of each tensor are compared with the same rows of other models. A layer is known again by its
direction: weights that were drawn or trained apart have a cosine of about 1/sqrt(n) for n values, scaling
leaves it at 1, and healing takes little from it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from jaxup.depth.draw import ranges
from jaxup.depth.plan import ENDS, DepthPlan, Row, simplest_scales
from jaxup.depth.result import result_config
from jaxup.errors import UserError
from jaxup.hub.reader import Checkpoint, is_finite, open_checkpoint
from jaxup.lens.explanation import Explanation, Trained
from jaxup.lens.fitting import Cast, Fit, casts, finite, fit
from jaxup.lens.origins import SILENCED, Match, Place, Values, match
from jaxup.lens.samples import Samples, sample
from jaxup.model.config import ModelConfig
from jaxup.model.spec import PART_OF, STACK, is_kernel, spec
from jaxup.progress import Progress
from jaxup.text import named

# What two models must have alike for a tensor of one to have the shape of the other's.
_SHAPES = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "positions", "gated_mlp",
           "norm", "norm_bias", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")  # fmt: skip
_UNCHANGED = 0.8, 1.25  # factors between which training is the simpler reason


def explain(
    model: str | os.PathLike[str], *, against: Sequence[str | os.PathLike[str]], allow_pickle: bool = False,
    progress: bool = False,
) -> Explanation:  # fmt: skip
    """The plan of a finished model, inferred from a few rows of its tensors and of those it may be made of.

    Args:
      model: directory, run, Hub id or URL, as `jaxup.load` takes it.
      against: the models that it may be made of; the plan has these names for them.
      allow_pickle: read pytorch_model.bin where there is no safetensors file, all of it.
      progress: show it on stderr.

    Raises:
      UserError: something is no model, or is one whose tensors have other shapes.
    """
    names = [os.fspath(name) for name in ([against] if isinstance(against, str | os.PathLike) else against)]
    if not names:
        raise UserError("no models are given that it may be made of", at="against")
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError("given twice", at=repeated[0])
    result = open_checkpoint(model, allow_pickle=allow_pickle)
    sources = {name: open_checkpoint(name, allow_pickle=allow_pickle) for name in names}
    for name, source in sources.items():
        for field in _SHAPES:
            a, b = getattr(result.config, field), getattr(source.config, field)
            if a != b:
                raise UserError(f"{field} is {b!r}, and {a!r} in {os.fspath(model)}: other shapes of tensors", at=name)
    return _Inference(os.fspath(model), result, sources, progress).explanation()


class _Inference:
    """The samples of a model and of those it may be made of, and what follows from them."""

    def __init__(self, model: str, result: Checkpoint, sources: Mapping[str, Checkpoint], progress: bool):
        self.model, self.result, self.sources = model, result, sources
        everything = (result, *sources.values())
        vocabulary, positions = (
            min(getattr(c.config, field) for c in everything) for field in ("vocab_size", "max_positions")
        )
        total, done = sum(len(checkpoint.tensors) for checkpoint in everything), iter(range(1, 10**9))
        with Progress("explain", total=total, unit="tensors", shown=progress) as bar:
            advance = lambda: bar.update(next(done))  # noqa: E731
            read = [sample(checkpoint, vocabulary, positions, advance) for checkpoint in everything]
        self.read, self.origins = read[0], dict(zip(sources, read[1:], strict=True))
        self.table = spec(result.config)
        self.inside = [path.removeprefix(STACK) for path in self.table if path.startswith(STACK)]
        self.notes: list[str] = []

    def explanation(self) -> Explanation:
        layers = [self._values(self.read, layer) for layer in range(self.result.config.num_layers)]
        places = {
            Place(name, layer): self._values(origin, layer)
            for name, origin in self.origins.items() for layer in range(self.sources[name].config.num_layers)
        }  # fmt: skip
        fills = {
            path: self.table[STACK + path].fill
            for path in self.inside if PART_OF[STACK + path] == "norms" and path.endswith(".scale")
        }  # fmt: skip
        kinds = {name: source.config.kinds_of_layers for name, source in self.sources.items()}
        mine = self.result.config.kinds_of_layers
        matches = match(layers, places, fills, lambda layer, place: kinds[place.source][place.layer] == mine[layer])
        made = [
            (values[path], [places[found.place][path]])
            for values, found in zip(layers, matches) for path in self.inside if PART_OF[STACK + path] in found.parts
        ]  # fmt: skip
        made += [
            (self.read.values[path, None], self._ends_of(path)) for path in self.table if not path.startswith(STACK)
        ]
        cast = self._cast(made)
        rows, trained = list[Row](), list[Trained]()
        seen = set[Place]()
        for i, (values, found) in enumerate(zip(layers, matches)):
            row, told = self._row(i, values, places[found.place], found, cast, seen)
            rows.append(row)
            trained.append(told)
        self._note_matches(matches)
        used = [name for name in self.sources if any(row.source == name for row in rows)]
        ends, scales, told_ends = self._ends(cast, rows)
        used += [name for name in self.sources if name not in used and name in ends.values()]
        plan = DepthPlan(
            tuple(rows), **ends, sources=tuple((name, self.sources[name].config.num_layers) for name in used),
            scales=simplest_scales(scales) if scales else (), dtype=cast.dtype, out_dtype=cast.out_dtype,
        )  # fmt: skip
        self._note_config(plan)
        read = {self.model: self.read, **self.origins}
        sizes = {name: (samples.read, samples.total) for name, samples in read.items()}
        return Explanation(self.model, plan, tuple(trained), told_ends, tuple(self.notes), sizes)

    def _values(self, samples: Samples, layer: int) -> Values:
        return {path: samples.values[STACK + path, layer] for path in self.inside}

    def _cast(self, made: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]]) -> Cast:
        """The casts of the plan by which most is what it is, the simplest of these; `made`: (y, of which x)."""
        before = {x.dtype.name for _, several in made for x in several}
        possible = casts(before, {y.dtype.name for y, _ in made})
        best, most = possible[0], -1
        for cast in possible:
            exact = sum(any(fit(y, x, cast).factors is not None for x in several) for y, several in made)
            if exact > most:
                best, most = cast, exact
            if exact == len(made):
                break
        return best

    # ---- layers

    def _row(
        self, i: int, values: Values, origin: Values, found: Match, cast: Cast, seen: set[Place]
    ) -> tuple[Row, Trained]:
        place = found.place
        fits = {path: fit(values[path], origin[path], cast) for path in self.inside}
        inherited = [path for path in self.inside if PART_OF[STACK + path] in found.parts]
        noise = self._noise([path for path in inherited if is_kernel(path)], fits) if found.parts else 0.0
        factors = {path: () if noise else self._factors(i, path, values[path], fits[path], path in inherited)
                   for path in self.inside}  # fmt: skip
        factors |= {path: () for path in self.inside if not is_kernel(path) and noise}
        for path in self.inside:  # zeros of zeros may have any factor: that of their kernel
            kernel = path.replace(".bias", ".kernel")
            if kernel in factors and not values[path].any() and not origin[path].any():
                factors[path] = factors[kernel]
        scales = simplest_scales(factors)
        role = "original" if found.parts else "new"
        row = Row(place.source, place.layer, role, scales, found.parts, noise)
        if row.zeroed or place in seen:
            row = dataclasses.replace(row, role="copy" if found.parts else "new")
        elif found.parts:
            seen.add(place)
        kept = [path for path in inherited if factors[path] != (0.0,)]
        silent = [path for path in inherited if factors[path] == (0.0,)]
        told = _trained([(fits[p], 1 - noise if is_kernel(p) else 1.0, factors[p]) for p in kept], found.nearest)
        grown = math.sqrt(_ratio([fits[p] for p in silent]))
        return row, told._replace(grown=grown, changed=0.0 if noise else told.changed)

    def _factors(self, i: int, path: str, y: np.ndarray, found: Fit, inherited: bool) -> tuple[float, ...]:
        """What the plan multiplies a parameter of layer `i` with, training aside."""
        if not inherited:
            param = self.table[STACK + path]
            return (0.0,) if not y.any() and (param.std or param.fill) else ()
        if found.factors is not None:
            return found.factors
        if found.similarity < 0.5 and path in SILENCED:
            return (0.0,)  # and trained since
        if found.similarity < 0.5 and is_kernel(path):
            self.notes.append(f"layer {i}: {path} is not that of its origin, which no plan says")
            return ()
        factor = found.factor
        return () if _UNCHANGED[0] < factor < _UNCHANGED[1] or not is_kernel(path) else (float(f"{factor:.2g}"),)

    def _noise(self, kernels: Sequence[str], fits: Mapping[str, Fit]) -> float:
        """The share of new values that explains all kernels of a layer: it shrinks them, and adds what `init` draws."""
        if any(fits[path].factors is not None or not fits[path].xx for path in kernels) or not kernels:
            return 0.0
        variances = {path: self.table[STACK + path].std ** 2 for path in kernels}
        along = sum(fits[path].xy / variances[path] for path in kernels)
        whole = sum(fits[path].xx / variances[path] for path in kernels)
        noise = 1 - along / whole
        if not 0 < noise < 1:
            return 0.0
        for path in kernels:
            n = self.read.values[STACK + path, 0].size
            drawn = fits[path].left(1 - noise) / n / (noise**2 * variances[path])
            if abs(drawn - 1) > 0.05 + 5 * math.sqrt(2 / n):
                return 0.0
        deviation = noise / math.sqrt(whole)
        shorter = (float(f"{noise:.{digits}g}") for digits in range(1, 17))
        return next((value for value in shorter if abs(value - noise) <= 3 * deviation), noise)

    # ---- what is no layer

    def _ends(
        self, cast: Cast, rows: Sequence[Row]
    ) -> tuple[dict[str, str | None], dict[str, tuple[float, ...]], dict[str, Trained]]:
        """The source of each end, the factors of each parameter, and what was trained since."""
        first, last = rows[0].source, rows[-1].source
        ends: dict[str, str | None] = {}
        scales: dict[str, tuple[float, ...]] = {}
        told: dict[str, Trained] = {}
        for end in ENDS:
            paths = [path for path in self.table if path.split(".")[0] == end]
            likely = first if end.startswith("embed") else ends.get("norm") or last
            if not paths:  # not there, or tied: as recipes have it, but a tied head is that of a tied model
                tied = end == "lm_head" and ends["norm"] is not None
                tied = tied and self.sources[str(ends["norm"])].config.tie_embeddings
                ends[end] = ends["norm"] if tied else ends["embed_tokens"]
                continue
            fits: dict[str, list[Fit]] = {}
            for name in sorted(self.sources, key=lambda name: name != likely):
                fits[name] = [
                    fit(self.read.values[path, None], x, cast) for path in paths for x in self._ends_of(path, name)
                ]
            known = {row.source for row in rows if row.parts} | {*ends.values()}
            strange = {name: self._strangeness(end, found, name in known) for name, found in fits.items()}
            name, nearest = min(strange, key=strange.__getitem__), max(map(_similarity, fits.values()))
            if strange[name] >= 0.75:
                ends[end], told[end] = None, Trained(math.nan, 0.0, 0.0, nearest)
                self.notes.append(f"{end} matches nothing (the nearest has a cosine of {nearest:.2f}): new")
                continue
            ends[end] = name
            factors = [found.factors if found.factors is not None else () for found in fits[name]]
            scales |= dict(zip(paths, factors))
            told[end] = _trained([(found, 1.0, f) for found, f in zip(fits[name], factors)], nearest)
        return ends, scales, told

    def _ends_of(self, path: str, source: str | None = None) -> list[np.ndarray]:
        """What an end may be made of, in this source or in all: a tied model's head is its embedding."""
        found = []
        for origin in self.origins.values() if source is None else [self.origins[source]]:
            other = ("embed_tokens", None) if path == "lm_head.kernel" else (path, None)
            x = origin.values.get((path, None), origin.values.get(other))
            found += [x] if x is not None else []
        return found

    def _strangeness(self, end: str, fits: Sequence[Fit], known: bool) -> float:
        """0: as it is, below 0.5: by a factor, below 0.75: trained since; `known` are models that more is from."""
        if not fits:
            return 1.0
        if all(found.factors is not None for found in fits):
            return 0.0 if not any(found.factors for found in fits) else 0.2 if fits[0].factors != (0.0,) else 0.4
        left, all_of_it = sum(found.left(1.0) for found in fits), sum(found.xx for found in fits)
        if end == "norm":  # those of strangers are alike, too: it must be near a model that more is from
            y, new = finite(self.read.values["norm.scale", None]), self.table["norm.scale"].fill
            near = left < 0.25 * all_of_it and left <= len(fits) * float(np.sum((y - new) ** 2)) + 1e-12
            return 0.5 + left / all_of_it if known and near else 1.0
        return 0.5 + (1 - _similarity(fits)) / 2

    # ---- what is said besides

    def _note_matches(self, matches: Sequence[Match]) -> None:
        odd = [f"{path.removeprefix(STACK)}{'' if layer is None else f' of layer {layer}'}"
               for (path, layer), x in self.read.values.items() if not is_finite(x)]  # fmt: skip
        if odd:
            self.notes.append(f"NaN or infinity in {', '.join(odd[:4])}{' and more' if len(odd) > 4 else ''}")
        if new := [i for i, found in enumerate(matches) if not found.parts]:
            nearest = max(matches[i].nearest for i in new)
            many = len(new) > 1
            what = f"layer{'s' * many} {ranges(new)} match{'es' * (not many)} nothing"
            self.notes.append(f"{what} (the nearest has a cosine of {nearest:.2f}): new")
        if unsure := [i for i, found in enumerate(matches) if len(found.alike) > 1 and found.parts]:
            found = matches[unsure[0]]
            others = ", ".join(f"{named(place.source)} {place.layer}" for place in found.alike[:4])
            what = f"layer{'s' * (len(unsure) > 1)} {ranges(unsure)} may come from several that are alike"
            which = f"layer {unsure[0]} from {others}{', ...' * (len(found.alike) > 4)}"
            self.notes.append(f"{what} ({which}); runs are taken")
        for i, found in enumerate(matches):
            for part, place in found.elsewhere.items():
                here = f"layer {i}: its {part} is that of layer {place.layer} of {named(place.source)}"
                self.notes.append(f"{here}, the rest of {found.place.layer} of {named(found.place.source)}, "
                                  "which no plan says")  # fmt: skip

    def _note_config(self, plan: DepthPlan) -> None:
        """What the plan's result computes otherwise than the model."""
        try:
            made: ModelConfig = result_config(plan, {name: c.config for name, c in self.sources.items()})
        except UserError as error:
            self.notes.append(f"cannot be built as it is: {error}")
            return
        for field in dataclasses.fields(ModelConfig):
            a, b = getattr(self.result.config, field.name), getattr(made, field.name)
            if field.name == "kinds":
                pairs = enumerate(zip(self.result.config.kinds_of_layers, made.kinds_of_layers))
                if differ := [i for i, (x, y) in pairs if x != y]:
                    self.notes.append(
                        f"layers {ranges(differ)} have other constants, such as windows, than their origin"
                    )
            elif a != b and field.name not in ("init_std", "num_layers"):
                self.notes.append(f"{field.name} is {a!r}, and {b!r} in what the plan makes")


def _trained(parts: Sequence[tuple[Fit, float, tuple[float, ...]]], nearest: float) -> Trained:
    """Of (fit, factor, factors) of what is inherited and not zeroed."""
    left = all_of_it = 0.0
    for found, factor, factors in parts:
        factor *= math.prod(factors)
        left += found.left(factor)
        all_of_it += factor**2 * found.xx
    changed = math.sqrt(left / all_of_it) if all_of_it else math.inf if left else 0.0
    return Trained(_similarity([found for found, _, _ in parts]), changed, 0.0, nearest)


def _similarity(fits: Sequence[Fit]) -> float:
    """The mean over the tensors."""
    there = [found.similarity for found in fits if not math.isnan(found.similarity)]
    return min(1.0, sum(there) / len(there)) if there else math.nan


def _ratio(fits: Sequence[Fit]) -> float:
    """The squared size of y beside that of x."""
    y, x = sum(found.yy for found in fits), sum(found.xx for found in fits)
    return y / x if x else math.inf if y else 0.0
