"""Recipes: functions that make a DepthPlan from a few numbers.

All but `concat` begin with the source's name and its number of layers; `jaxup.recipes.functions` has them on
models, too. Layers are a range, `range(19, 41)` for layers 19 to 40, also as `slice(19, 41)` or "19:41", or a
list of numbers and ranges. Where a layer occurs several times, the first that is not zeroed is the original
and the others are its copies. Zeroed copies have o_proj and down_proj scaled by 0: they add nothing to the
residual stream, so the result computes what the source does until it is trained. Numbers that make no sense
are a UserError.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

from jaxup.depth.compose import all_sources
from jaxup.depth.plan import ALL_PARTS, ENDS, PARTS, ZEROED, DepthPlan, Row
from jaxup.errors import UserError, suggest, within
from jaxup.model.config import MAX_LAYERS

Layers = range | slice | str | Sequence[int | range | slice | str]  # several layers

WHICH = ("first", "middle", "last")  # parts of a source that `inherit` takes a number of layers from
RECIPES: dict[str, Callable[..., DepthPlan]] = {}  # by name

_Recipe = TypeVar("_Recipe", bound=Callable[..., DepthPlan])


def recipe(function: _Recipe) -> _Recipe:
    """Makes a function a recipe of the one-line language, too; its errors begin with its name.

    It takes (source, source_layers, ...), or any number of plans. The annotations of what follows say
    how that is written in one line: `jaxup.recipes.line` lists those there are.
    """
    RECIPES[function.__name__] = named = within(function.__name__)(function)
    return named


@recipe
def identity(source: str, source_layers: int) -> DepthPlan:
    """Every layer, once, in order."""
    return _plan(source, source_layers, range(source_layers))


@recipe
def inherit(
    source: str,
    source_layers: int,
    layers: int | Layers | None = None,
    *,
    which: str = "first",
    every: int = 1,
    parts: Sequence[str] = ALL_PARTS,
) -> DepthPlan:
    """A small model that inherits some layers of a larger one (Inheritune, arXiv 2404.08634).

    Args:
      layers: how many layers, or which ones; None is all. Of a layer named again, the later ones are copies.
      which: for a number of layers, the part of the source that they are taken from: first, middle or last.
      every: takes only every so many-th layer, from the first of them or, with which="last", back from the last.
      parts: what is inherited, of ALL_PARTS; the rest is newly initialised. The paper inherits all
        but the final norm and the positions; its ablations leave out mlp, attention or norms.
    """
    for part in parts:
        if part not in ALL_PARTS:
            raise UserError(f"unknown part {part!r}{suggest(part, ALL_PARTS)}")
    if which not in WHICH:
        raise UserError(f"unknown which={which!r}{suggest(which, WHICH)}")
    _at_least(1, every=every)
    if layers is None or isinstance(layers, int):
        pool = list(range(source_layers))
    elif which != "first":
        raise UserError(f"which={which!r} goes with a number of layers, not with a list of them")
    else:
        pool = _layers(source, source_layers, layers)
    pool = pool[::-1][::every][::-1] if which == "last" else pool[::every]
    if isinstance(layers, int):
        if layers < 1:
            raise UserError(f"at least one layer must be inherited, not {layers}")
        if layers > len(pool):
            of = f", {len(pool)} of them with every={every}" if every > 1 else ""
            raise UserError(f"{layers} layers asked of {source!r}, which has {source_layers}{of}")
        begin = {"first": 0, "middle": (len(pool) - layers) // 2, "last": len(pool) - layers}[which]
        pool = pool[begin : begin + layers]
    return _plan(source, source_layers, pool, parts=parts)


@recipe
def duplicate(source: str, source_layers: int, layers: Layers, *, times: int = 1) -> DepthPlan:
    """Runs ranges of layers again, `times` more, each right after itself ("repeat yourself", RYS).

    RYS's (i, j), layers 0 to j-1 and then from i on, is `range(i, j)`. Nothing is zeroed.
    """
    _at_least(1, times=times)
    return _repeat(source, source_layers, layers, times, zeroed=False)


@recipe
def upscale(source: str, source_layers: int, layers: Layers, *, copies: int = 1) -> DepthPlan:
    """Zeroed copies of whole ranges, `copies` times, each right after its range.

    Llama-3-15B-Instruct-zeroed is 32 layers with `range(8, 24)` twice, and the Tunguska 39B would be
    56 layers with `range(19, 41)` twice, had its recipe not left layer 55 out by a slip.
    """
    _at_least(1, copies=copies)
    return _repeat(source, source_layers, layers, copies)


@recipe
def interleave(source: str, source_layers: int, layers: Layers, *, copies: int = 1) -> DepthPlan:
    """Each of the layers, followed by `copies` zeroed copies of it."""
    _at_least(1, copies=copies)
    return _repeat(source, source_layers, _layers(source, source_layers, layers), copies)


@recipe
def expand(source: str, source_layers: int, every: int) -> DepthPlan:
    """Block expansion: after every so many-th layer a zeroed copy of it (LLaMA Pro, arXiv 2401.02415).

    The paper makes 40 layers of 32 with every=4, and trains the new ones only.
    """
    _at_least(1, every=every)
    if every > source_layers:
        raise UserError(f"every={every} adds nothing to {source!r}, which has {source_layers} layers")
    return _repeat(source, source_layers, [*range(every - 1, source_layers, every)], 1)


@recipe
def solar(source: str, source_layers: int, m: int) -> DepthPlan:
    """Depth up-scaling: the source without its last `m` layers, then without its first (SOLAR, arXiv 2312.15166).

    The paper makes 48 layers of 32 with m=8.
    """
    _at_least(0, m=m)
    if 2 * m > source_layers:
        raise UserError(
            f"m={m} would leave layers of {source!r} out, which has {source_layers}: m is at most {source_layers // 2}"
        )
    return _plan(source, source_layers, [*range(source_layers - m), *range(m, source_layers)])


@recipe
def stack(source: str, source_layers: int, times: int, *, noise: float = 0.0) -> DepthPlan:
    """All layers, `times` times in all (G_stack, arXiv 2405.15319).

    The paper's optimum is 2 to 4 times. `noise` is the share of newly initialised values mixed into
    the kernels of the copies: the paper finds that 0.2 helps slightly.
    """
    _at_least(1, times=times)
    _check_size(source_layers * times)
    if not 0 <= noise <= 1:
        raise UserError(f"noise={noise} is not a share from 0 to 1")
    return _plan(source, source_layers, [*range(source_layers)] * times, noise=noise)


@recipe
def drop(
    source: str,
    source_layers: int,
    which: int | Layers | None = None,
    *,
    layers: int | Layers | None = None,
    params: int | float | None = None,
) -> DepthPlan:
    """The source without these layers (ShortGPT, arXiv 2403.03853; The Unreasonable Ineffectiveness
    of the Deeper Layers, arXiv 2403.17887).

    Args:
      which: those that go; a number is that one layer, not how many.
      layers: as a number how many are left. The deepest ones go but for the last, which is the second paper's choice
        for a model that nothing is known of; `jaxup.probe` finds others. As a range or list it is `which`.
      params: so many parameters are left at most, in as many layers as that allows; those go as with `layers`.
        It needs a model, not a number of layers.
    """
    if layers is not None and not isinstance(layers, int):
        which, layers = (layers, None) if which is None else (which, 0)
    if sum(given is not None for given in (which, layers, params)) != 1:
        raise UserError("what goes is said in one way: [21:29], layers=24 or params=6e9")
    if which is None:
        left = depth_within(source_layers, layers=layers, params=params, source=source)
        which = range(left - 1, source_layers - 1) if left < source_layers else []
        if not which:
            return identity(source, source_layers)
    dropped = set(_layers(source, source_layers, [which] if isinstance(which, int) else which))
    kept = [layer for layer in range(source_layers) if layer not in dropped]
    if not kept:
        raise UserError(f"nothing would be left of {source!r}, which has {source_layers} layers")
    return _plan(source, source_layers, kept)


def depth_within(
    source_layers: int, *, layers: int | None = None, params: int | float | None = None,
    sizes: Sequence[int] | None = None, source: str = "model",
) -> int:  # fmt: skip
    """How many layers are left where so many, or at most so many parameters, are asked for.

    `sizes` are the parameters of what is no layer, and of a layer. UserError for more than the source has, and for
    fewer than one layer.
    """
    if layers is not None:
        _at_least(1, layers=layers)
        if layers > source_layers:
            raise UserError(f"layers={layers} are more than the {source_layers} of {source!r}")
        return layers
    if sizes is None or params is None:
        raise UserError(f"params={params:g} needs a model: of {source!r} only the number of layers is known")
    ends, each = sizes
    if params > (most := ends + each * source_layers):
        raise UserError(f"params={params:g} are more than the {most:,} of {source!r}")
    if params < ends + each:
        raise UserError(f"params={params:g}: with a single layer {source!r} has {ends + each:,}")
    return int((params - ends) // each)


@recipe
def concat(*plans: DepthPlan) -> DepthPlan:
    """What the plans make, one after the other: embeddings of the first, final norm and head of the last.

    This is how one model is made of several ("frankenmerges"). UserError if two plans have different
    numbers of layers for a source, and for a plan that casts or scales ends, as only the whole may.
    """
    if not plans:
        raise UserError("no plans are given")
    first, last = plans[0], plans[-1]
    _check_size(sum(plan.num_layers for plan in plans))
    if any(plan.scales or plan.dtype or plan.out_dtype for plan in plans):
        raise UserError("a plan that casts, or scales what is no layer, is a whole model's")
    sources = all_sources(source for plan in plans for source in plan.sources)
    rows, seen = list[Row](), set[tuple[str, int]]()
    for row in (row for plan in plans for row in plan.rows):
        if row.role == "original":
            row = dataclasses.replace(row, role="copy" if (row.source, row.layer) in seen else "original")
            seen.add((row.source, row.layer))
        rows.append(row)
    return DepthPlan(tuple(rows), first.embed_tokens, first.embed_positions, last.norm, last.lm_head, sources)


def as_range(item: int | range | slice | str, source_layers: int) -> int | range:
    """A layer or a range of layers, however it is written."""
    if isinstance(item, str):
        ends = re.fullmatch(r"(\d{0,18}):(\d{0,18})", item.replace(" ", ""), re.ASCII)
        if ends is None:
            raise UserError(f"{item!r} is no range of layers: {hyphenated(item) or 'one is written 8:24'}")
        item = slice(*(int(end) if end else None for end in ends.groups()))
    if isinstance(item, slice):
        stop = source_layers if item.stop is None else item.stop
        return range(item.start or 0, stop, 1 if item.step is None else item.step)
    try:
        return item if isinstance(item, range) else operator.index(item)
    except TypeError:
        raise UserError(f"{item!r} is neither a layer nor a range of layers") from None


def only_two(layers: object) -> str:
    """Of a list such as [8, 24], which may be meant for a range, what it is, in words; else ""."""
    if not isinstance(layers, list) or [type(layer) for layer in layers] != [int, int] or layers[0] + 1 >= layers[1]:
        return ""
    first, second = layers
    return f"[{first}, {second}] is layers {first} and {second} only; a range is {first}:{second}"


def hyphenated(text: str) -> str:
    """Of "19-40", what was meant, in words; else ""."""
    if (ends := re.fullmatch(r"(\d{1,18})-(\d{1,18})", text, re.ASCII)) is None:
        return ""
    first, last = sorted(map(int, ends.groups()))
    return f"layers {first} to {last} are written {first}:{last + 1}"


def check_layers(layers: Iterable[int | range], source: str, source_layers: int) -> None:
    """UserError for a layer that the source does not have, and for a range that holds none."""
    has = f"{source!r} has layers 0-{source_layers - 1}, 0:{source_layers} as a range"
    for item in layers:
        if isinstance(item, int):
            if not 0 <= item < source_layers:
                raise UserError(f"layer {item} is not there: {has}")
            continue
        start, stop = item.start, item.stop
        if item.step != 1:
            raise UserError(f"{start}:{stop}:{item.step} has a step; ranges of layers have none")
        if start == stop:
            # The likely slip, 19:19 for the one layer 19; at the end of the model it would be 55:56 for 56:56.
            first = min(max(start, 0), source_layers - 1)
            raise UserError(f"{start}:{stop} is empty: ranges are half open; did you mean {first}:{first + 1}?")
        if start > stop:
            raise UserError(f"{start}:{stop} is empty: ranges go up; did you mean {stop}:{start}?")
        if start < 0 or stop > source_layers:
            raise UserError(f"{start}:{stop} is too far: {has}")


def _spans(source: str, source_layers: int, layers: Layers) -> list[range]:
    """The ranges asked for; a single layer is a range of one."""
    if isinstance(layers, int):
        raise UserError(f"a range or a list of layers is needed; did you mean {layers}:{layers + 1}?")
    if isinstance(layers, slice | str) or (isinstance(layers, range) and layers.step == 1):
        layers = [layers]
    items = [as_range(item, source_layers) for item in layers]
    if not items:
        raise UserError("the list of layers is empty")
    check_layers(items, source, source_layers)
    return [range(item, item + 1) if isinstance(item, int) else item for item in items]


def _layers(source: str, source_layers: int, layers: Layers) -> list[int]:
    return [layer for span in _spans(source, source_layers, layers) for layer in span]


def _repeat(source: str, source_layers: int, layers: Layers, times: int, *, zeroed: bool = True) -> DepthPlan:
    """The source with each range followed by `times` more of it."""
    spans = sorted(_spans(source, source_layers, layers), key=lambda span: span.start)
    for a, b in itertools.pairwise(spans):
        if b.start < a.stop:
            raise UserError(f"{a.start}:{a.stop} and {b.start}:{b.stop} overlap")
    _check_size(source_layers + times * sum(map(len, spans)))
    order, silent, done = list[int](), set[int](), 0
    for span in [*spans, range(source_layers, source_layers)]:
        order += range(done, span.stop)
        silent |= {*range(len(order), len(order) + len(span) * times)}
        order += [*span] * times
        done = span.stop
    return _plan(source, source_layers, order, silent if zeroed else ())


def _plan(
    source: str, source_layers: int, order: Iterable[int], zeroed: Collection[int] = (), *, noise: float = 0.0,
    parts: Sequence[str] = ALL_PARTS,
) -> DepthPlan:  # fmt: skip
    """The plan with these layers; `zeroed` are the places in `order` that add nothing, `noise` is that of copies."""
    of_blocks = tuple(part for part in PARTS if part in parts)
    rows, seen = list[Row](), set[int]()
    for i, layer in enumerate(order):
        if i in zeroed:
            rows.append(Row(source, layer, "copy", ZEROED))
            continue
        role = "new" if not of_blocks else "copy" if layer in seen else "original"
        rows.append(Row(source, layer, role, (), of_blocks, noise if role == "copy" else 0.0))
        seen.add(layer)
    ends: dict[str, Any] = {end: source if end in parts else None for end in ENDS}
    return DepthPlan(tuple(rows), **ends, sources=((source, source_layers),))


def _at_least(least: int, **number: int) -> None:
    for name, value in number.items():
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")


def _check_size(layers: int) -> None:
    if layers > MAX_LAYERS:
        raise UserError(f"the result would have {layers} layers; {MAX_LAYERS} are the most")
