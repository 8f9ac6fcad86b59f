"""A few numbers of each layer that a run may keep of its model: what it is trained by, changes, and is good for.

Shape suffixes: B batch, S sequence, L layers.
"""

from __future__ import annotations

import numpy as np

from jaxup.lens.probe_layers import Layers, angles
from jaxup.model.decoder import Decoder, Params

ANGLE, DELETED, TAIL, GRADIENT, START = (
    "angular_distance", "deletion_loss", "tail_deletion_loss", "gradient_norm", "gradient_norm_start",
)  # fmt: skip


def measures(
    model: Decoder, tokens_BS: np.ndarray, targets_BS: np.ndarray, start: Params | None
) -> dict[str, np.ndarray]:
    """Float64 [L] each, on these rows. Losses are nats a token, of which each target counts.

    Returns:
      angular_distance: arccos(cos(x_l, x_l+1)) / pi at the last token of a row, the mean over rows.
      deletion_loss: by how much the loss is higher without the layer.
      tail_deletion_loss: without this layer and all after it.
      gradient_norm: of the rows' loss by all parameters of the layer.
      gradient_norm_start: the same of the params `start`, if they are given.
    """
    layers, count = Layers(model), model.config.num_layers
    states, _ = layers.states(tokens_BS)
    whole = layers.loss(states[-1], (), targets_BS)
    without = [layers.loss(states[at], range(at + 1, count), targets_BS) for at in range(count)]
    tails = [layers.loss(x_BSD, (), targets_BS) for x_BSD in states[:-1]]
    last = np.stack([np.asarray(x_BSD[:, -1], np.float32) for x_BSD in states])
    found = {
        ANGLE: angles(last)[:, 1], DELETED: np.asarray(without) - np.asarray(whole),
        TAIL: np.asarray(tails) - np.asarray(whole), GRADIENT: layers.gradient_norms(states, targets_BS),
    }  # fmt: skip
    if start is not None:
        first = Layers(model.with_params(start))
        found[START] = first.gradient_norms(first.states(tokens_BS)[0], targets_BS)
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


def late_share(values_L: np.ndarray) -> float:
    """Of what the layers are good for, the share of the second half: .5 where depth is used evenly. A layer that is
    better away is good for nothing; NaN where all are."""
    good_L = np.maximum(values_L, 0)
    return float(good_L[-(len(good_L) // 2) :].sum() / good_L.sum()) if good_L.any() else float("nan")


def said(found: dict[str, np.ndarray], rows: int) -> str:
    """In a sentence or two."""
    deleted, count = found[DELETED], len(found[DELETED])
    quarter, share = max(1, count // 4), late_share(deleted)
    of_late = "" if np.isnan(share) else f", {share:.0%} of it for those of the second half"
    return (
        f"Layers, on {rows} validation rows: without one of them the loss is {deleted.mean():+.4f} nats higher on "
        f"average{of_late}; without the last {quarter} {found[TAIL][-quarter]:+.4f}. `measures.json` has each layer's."
    )
