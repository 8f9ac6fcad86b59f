"""Which rows of a plan's result train: masks over stacked params, and the optax transformation that obeys them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError, suggest
from jaxup.model.spec import STACK, without_beside

ROLES = {"copies": "copy", "originals": "original", "new": "new"}  # as they are called here: as rows have them


def trainable(
    plan: DepthPlan, params: Mapping[str, Any], *, layers: str | Sequence[int] = "all", parameters: str = "",
    freeze: str | Sequence[int] = "",
) -> dict[str, Any]:  # fmt: skip
    """Which of the result's params train.

    Args:
      params: the result's tree, of arrays or ShapeDtypeStructs; leaves under "blocks" [M, ...].
      layers: "all", "copies", "originals", "new", half-open ranges such as "9:12, 20", or numbers
        of layers of the result. Embeddings, final norm and head train with "all" and "originals", and what
        stands beside the decoder (`ModelConfig.beside`) whatever is chosen.
      freeze: layers, chosen in the same way, that are taken out of these again; "" = none. "all" and
        "originals" take the ends out too.
      parameters: a regular expression that the dotted path of what trains contains, such as
        "o_proj|down_proj" of "blocks.self_attn.o_proj.kernel".

    Returns:
      A tree of the same structure, of bool arrays: [M, 1, ...] under "blocks", [] elsewhere. UserError
      if nothing would train, or there are no such layers.
    """
    whole = ("all", "originals")
    rows, ends = _rows(plan, layers), layers in whole and freeze not in whole
    if freeze:
        rows = rows & ~_rows(plan, freeze)
    try:
        pattern = re.compile(parameters)
    except re.error as error:
        raise UserError(f"parameters={parameters!r} is not a regular expression: {error}", at="freeze") from None

    def mask(keys: Any, leaf: Any) -> np.ndarray:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        found = pattern.search(path) is not None
        if path.startswith(STACK):
            return (rows & found).reshape(-1, *[1] * (leaf.ndim - 1))
        return np.array(ends and found)

    masks = jax.tree_util.tree_map_with_path(mask, without_beside(params))
    if not any(leaf.any() for leaf in jax.tree.leaves(masks)):
        chosen = f"{layers} without {freeze}" if freeze else layers
        kind = f"no layers are {chosen}" if not rows.any() else f"no parameter's path contains {parameters!r}"
        raise UserError(f"nothing would train: {kind}", at="freeze")
    beside = {name: params[name] for name in params.keys() - masks.keys()}
    return masks | jax.tree.map(lambda _: np.array(True), beside)


def _rows(plan: DepthPlan, layers: str | Sequence[int]) -> np.ndarray:
    """bool [M]."""
    if layers == "all":
        return np.ones(plan.num_layers, bool)
    if isinstance(layers, str) and layers in ROLES:
        return np.array([row.role == ROLES[layers] for row in plan.rows])
    chosen: list[int] = []
    for item in map(str, layers.split(",") if isinstance(layers, str) else layers):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?::\s*(\d{1,9})\s*)?", item)
        if match is None:
            known = ["all", *ROLES]
            raise UserError(f"layers={item!r} is no layer and no range such as 9:12{suggest(item, known)}", at="freeze")
        first, stop = int(match[1]), int(match[2] or int(match[1]) + 1)
        if first >= stop or stop > plan.num_layers:
            shown = str(item).strip()
            raise UserError(f"layers {shown!r}: the model has layers 0:{plan.num_layers}, half open", at="freeze")
        chosen += range(first, stop)
    return np.isin(np.arange(plan.num_layers), chosen)


def only(masks: Mapping[str, Any]) -> optax.GradientTransformation:
    """Makes the updates of what does not train -0.0: put it last in the chain, after weight decay.

    Adding -0.0, as `optax.apply_updates` does, leaves every bit of a parameter as it is; +0.0 would not.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        keep = lambda update, mask: jnp.where(mask, update, jnp.array(-0.0, update.dtype))  # noqa: E731
        return jax.tree.map(keep, updates, dict(masks)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
