"""What the layers of a model do to rows of text: each is run alone, and what follows it is run without it.

The hidden states between layers are kept, so that a skip begins where it differs: all runs of consecutive layers of an
N-layer model take (N^3 - N) / 6 passes through a layer where running each model whole takes twice as many. Layers are
looked up by a number that is an argument, as the decoder's `order` is: the programs are compiled once.

Shape suffixes: L layers, B batch, S sequence, D hidden, N heads.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxup.lens.probe_attention import ranks
from jaxup.model.decoder import Decoder, column_arrays
from jaxup.training.loss import cross_entropy

_CHUNK = 128  # positions whose logits are there at once
RANK_TOKENS = 100  # Inheritune's: the first so many positions of a row have their attention looked at


class Seen(NamedTuple):
    """What one layer makes of a batch; the numbers are means over its tokens."""

    after: jax.Array
    without_attention: jax.Array
    without_mlp: jax.Array
    influence: jax.Array  # 1 - cos(before, after)
    norm: jax.Array  # of what comes in
    attention_norm: jax.Array  # of what attention adds
    mlp_norm: jax.Array


class Layers:
    """The layers of a model, to be run piece by piece on batches of one shape.

    `passes` counts how often a batch went forward through a layer.
    """

    def __init__(self, model: Decoder, advance: Callable[[int], Any] = lambda passes: None):
        # Programs are those of all models of this shape, wherever they came from.
        self.model = copy.copy(model)
        vars(self.model).pop("origin", None)
        self.num_layers, self.passes, self._advance = model.config.num_layers, 0, advance

    def states(self, tokens_BS: np.ndarray) -> tuple[list[jax.Array], list[Seen]]:
        """The hidden states before each layer and after the last one, L + 1; and what was seen on the way."""
        x_BSD, seen = _embed(self.model, tokens_BS), list[Seen]()
        states = [x_BSD]
        for layer in range(self.num_layers):
            seen.append(_look(self.model, states[-1], layer))
            states.append(seen[-1].after)
            self._ran(1)
        return states, seen

    def norm(self, x_BSD: jax.Array) -> jax.Array:
        """The mean norm of a batch's hidden states."""
        return _norm(x_BSD)

    def loss(self, x_BSD: jax.Array, order: Sequence[int], targets_BS: np.ndarray) -> jax.Array:
        """The mean cross-entropy of a batch in nats, where these layers, L at most, follow the hidden states."""
        padded = np.full(self.num_layers, -1, np.int32)  # -1 runs nothing: all orders share a program
        padded[: len(order)] = order
        self._ran(len(order))
        return _loss(self.model, x_BSD, padded, targets_BS)

    def run_losses(self, states: list[jax.Array], targets_BS: np.ndarray, longest: int) -> dict[tuple[int, int], Any]:
        """(first, count) -> the loss without this run of layers, of all runs up to so long and, with count 0, of the
        whole model; without all layers from `first` on in any case."""
        found = {(first, self.num_layers - first): self.loss(x, (), targets_BS) for first, x in enumerate(states)}
        for first in range(self.num_layers):
            for count in range(1, min(longest, self.num_layers - first - 1) + 1):
                found[first, count] = self.loss(states[first], range(first + count, self.num_layers), targets_BS)
        return found

    def gradient_norms(self, states: list[jax.Array], targets_BS: np.ndarray) -> list[jax.Array]:
        """[L]: of the mean loss of the batch by the parameters of each layer."""
        dx_BSD, norms = _head_gradient(self.model, states[-1], targets_BS), list[jax.Array]()
        for layer in reversed(range(self.num_layers)):
            norm, dx_BSD = _layer_gradient(self.model, states[layer], layer, dx_BSD)
            norms.append(norm)
        return norms[::-1]

    def attention(self, states: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Rank and mass, float64 [L, N]: means over the rows of the batch."""
        of = [_attention(self.model, x_BSD[:, :RANK_TOKENS], layer) for layer, x_BSD in enumerate(states[:-1])]
        found = np.array([ranks(np.asarray(weights_BNSS)) for weights_BNSS in of])  # [L, 2, B, N]
        return found[:, 0].mean(1), found[:, 1].mean(1)

    def order_loss(self, tokens_BS: np.ndarray, targets_BS: np.ndarray, order: Sequence[int]) -> jax.Array:
        """The loss of the model that has these layers."""
        return self.loss(_embed(self.model, tokens_BS), order, targets_BS)

    def _ran(self, passes: int) -> None:
        self.passes += passes
        self._advance(self.passes)


def run_passes(layers: int, longest: int) -> int:
    """Passes through a layer that `run_losses` takes, beside those of the whole model."""
    return sum(layers - end for end in range(1, layers) for count in range(1, min(longest, end) + 1))


def angles(last_LRD: np.ndarray) -> np.ndarray:
    """d(l, n) = arccos(cos(x_l, x_{l+n})) / pi, of hidden states [L + 1, rows, D] at the last token: [L, L + 1].

    The mean over rows ("The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887); NaN where the model
    has no layer l + n.
    """
    x_LRD = last_LRD.astype(np.float64)
    x_LRD = x_LRD / np.linalg.norm(x_LRD, axis=-1, keepdims=True)
    cosines = np.einsum("LRD,MRD->RLM", x_LRD, x_LRD)
    angle_LL = (np.arccos(np.clip(cosines, -1, 1)) / np.pi).mean(0)
    layers = len(angle_LL) - 1
    found = np.full((layers, layers + 1), np.nan)
    for first in range(layers):
        found[first, : layers + 1 - first] = angle_LL[first, first:]
    return found


# ---- programs


def _positions(x: Any) -> jax.Array:
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]


@jax.jit
def _embed(model: Decoder, tokens_BS: Any) -> jax.Array:
    return model.embed(tokens_BS, _positions(tokens_BS))


def _pick(model: Decoder, layer: Any) -> tuple[Any, Any]:
    """A block and its entries of the columns."""
    pick = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
    return jax.tree.map(pick, (model.blocks, column_arrays(model.config)))


@jax.jit
def _look(model: Decoder, x_BSD: jax.Array, layer: Any) -> Seen:
    block, kind = _pick(model, layer)
    without_mlp, attended, _ = block.attend(
        x_BSD, layer=layer, kind=kind, positions_BS=_positions(x_BSD), segment_ids_BS=None
    )
    after, added = block.feed_forward(without_mlp, kind)
    # 1 - cos is half the square of a chord: what is nearly 1 keeps its digits.
    chord = _unit(after) - _unit(x_BSD)
    influence = jnp.mean(jnp.sum(jnp.square(chord), -1)) / 2
    without_attention, _ = block.feed_forward(x_BSD, kind)
    return Seen(after, without_attention, without_mlp, influence, *map(_mean_norm, (x_BSD, attended, added)))


def _mean_norm(x_BSD: jax.Array) -> jax.Array:
    return jnp.mean(jnp.linalg.norm(x_BSD.astype(jnp.float32), axis=-1))


_norm = jax.jit(_mean_norm)


def _unit(x_BSD: jax.Array) -> jax.Array:
    x_BSD = x_BSD.astype(jnp.float32)
    return x_BSD / jnp.maximum(jnp.linalg.norm(x_BSD, axis=-1, keepdims=True), 1e-30)


def _head_loss(model: Decoder, x_BSD: jax.Array, targets_BS: jax.Array) -> jax.Array:
    weights = jnp.ones(targets_BS.shape, jnp.float32)
    total, _ = cross_entropy(
        model.norm(x_BSD), model.head_kernel(), targets_BS, weights, chunk=_CHUNK, z_loss=0.0
    )  # fmt: skip
    return total / targets_BS.size


@jax.jit
def _loss(model: Decoder, x_BSD: jax.Array, order: jax.Array, targets_BS: jax.Array) -> jax.Array:
    return _head_loss(model, model.run(x_BSD, _positions(x_BSD), order=order)[0], targets_BS)


@jax.jit
def _head_gradient(model: Decoder, x_BSD: jax.Array, targets_BS: jax.Array) -> jax.Array:
    return jax.grad(_head_loss, argnums=1)(model, x_BSD, targets_BS)


@jax.jit
def _layer_gradient(model: Decoder, x_BSD: jax.Array, layer: Any, dy_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    block, kind = _pick(model, layer)

    def run(block: Any, x_BSD: jax.Array) -> jax.Array:
        return block(x_BSD, layer=layer, kind=kind, positions_BS=_positions(x_BSD), segment_ids_BS=None)[0]

    dblock, dx_BSD = jax.vjp(run, block, x_BSD)[1](dy_BSD)
    squares: Iterable[jax.Array] = (jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(dblock))
    return jnp.sqrt(sum(squares, jnp.float32(0))), dx_BSD


@jax.jit
def _attention(model: Decoder, x_BSD: jax.Array, layer: Any) -> jax.Array:
    block, kind = _pick(model, layer)
    return block.self_attn.weights(block.seen(x_BSD, kind), kind=kind, positions_BS=_positions(x_BSD))
