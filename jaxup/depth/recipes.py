"""Recipes: functions that make a DepthPlan from a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

from jaxup.depth.plan import ALL_PARTS, ENDS, PARTS, DepthPlan, Row
from jaxup.errors import UserError, suggest


def identity(source: str, layers: int) -> DepthPlan:
    """Every layer of `source`, once, in order."""
    rows = tuple(Row(source, layer, "original") for layer in range(layers))
    return DepthPlan(rows, *[source] * len(ENDS), sources=((source, layers),))


def inherit(
    source: str,
    source_layers: int,
    layers: int | Sequence[int],
    *,
    which: str = "first",
    parts: Sequence[str] = ALL_PARTS,
) -> DepthPlan:
    """A small model that inherits some layers of a larger one (Inheritune, arXiv 2404.08634).

    Args:
      layers: how many layers, or which ones; of a layer named again, the later ones are copies.
      which: for a number of layers, the end of the source that they are taken from.
      parts: what is inherited, of ALL_PARTS; the rest is newly initialised. The paper inherits all
        but the final norm and the positions; its ablations leave out mlp, attention or norms.

    Raises:
      UserError: layers that the source does not have, or an unknown part.
    """
    for part in parts:
        if part not in ALL_PARTS:
            raise UserError(f"inherit: unknown part {part!r}{suggest(part, ALL_PARTS)}")
    if which not in ("first", "last"):
        raise UserError(f"inherit: which={which!r} is neither 'first' nor 'last'")
    if isinstance(layers, int):
        if layers > source_layers:
            raise UserError(f"inherit: {layers} layers asked of {source!r}, which has {source_layers}")
        if layers < 1:
            raise UserError(f"inherit: at least one layer must be inherited, not {layers}")
        start = 0 if which == "first" else source_layers - layers
        layers = range(start, start + layers)
    elif which == "last":
        raise UserError("inherit: which='last' goes with a number of layers, not with a list of them")
    elif not layers:
        raise UserError("inherit: the list of layers is empty")
    block_parts = tuple(part for part in PARTS if part in parts)
    rows, seen = [], set()
    for layer in layers:
        if not 0 <= layer < source_layers:
            raise UserError(f"inherit: layer {layer} asked of {source!r}, which has layers 0-{source_layers - 1}")
        role = "new" if not block_parts else "copy" if layer in seen else "original"
        rows.append(Row(source, layer, role, parts=block_parts))
        seen.add(layer)
    ends = {end: source if end in parts else None for end in ENDS}
    return DepthPlan(tuple(rows), **ends, sources=((source, source_layers),))
