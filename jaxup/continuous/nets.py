"""The nets of heads that draw by many steps: from a noisy token, its time and what the decoder says, to a token.

A table of parameters is a tuple of `Beside`; params are the tree of arrays that it describes.

Shape suffixes: B batch, S sequence, D hidden of the decoder, C channels of a token, O outputs for a token, W width of
the net, F frequencies.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxup.errors import UserError, within
from jaxup.model.attention import context_size
from jaxup.model.config import Beside, Compute, ModelConfig
from jaxup.model.decoder import abstract
from jaxup.model.spec import is_kernel, spec

Table = tuple[Beside, ...]
_FREQUENCIES = 256  # of the embedding of times, as DiT and MAR have
_UNROLLED = 4  # blocks of a net that are no loop: a fifth faster on CPUs, and few to compile


def dense(path: str, inputs: int, outputs: int, *, std: float | None = None, depth: int = 0) -> Table:
    """A linear layer, or `depth` of them in one array; by default its first values keep the size of what goes through,
    forth and back (Glorot & Bengio 2010)."""
    stack, axes = ((depth,), ("",)) if depth else ((), ())
    std = math.sqrt(2 / (inputs + outputs)) if std is None else std
    return (
        Beside(f"{path}.kernel", (*stack, inputs, outputs), (*axes, "embed", "mlp"), std=std, inputs=1),
        Beside(f"{path}.bias", (*stack, outputs), (*axes, "mlp")),
    )


def linear(params: Mapping[str, Any], x_BSI: Float[Array, "batch seq inputs"]) -> Float[Array, "batch seq outputs"]:
    """What `dense` has the parameters of, computed in the dtype of x."""
    batch, outputs = x_BSI.shape[:2], params["bias"].shape[-1]
    # One matrix product of two dimensions, for the reason that `jaxup.model.layers.Linear` gives.
    x = x_BSI.reshape(math.prod(batch), -1) if context_size() == 1 else x_BSI
    y_BSO = (x @ params["kernel"].astype(x.dtype)).reshape(*batch, outputs)
    return y_BSO + params["bias"].astype(x.dtype)[None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net(abc.ABC):
    """Called on params and

    y_BSC   tokens on their way from noise, float32
    time_BS where on the way, float32 from 0 (clean) to 1000 (noise)
    z_BSD   what the decoder says of each token; its dtype is the one that the net computes in
    map_BS  which map each token belongs to; None: each row is one map

    it gives float32 outputs. The last layer begins as zeros, and so do they.
    """

    width: int
    depth: int

    joint: ClassVar[bool]  # whether the tokens of a map see each other, and so have their times in common

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise UserError("must be at least 1", at=f"net.{field.name}={value}")

    @abc.abstractmethod
    def table(self, hidden: int, channels: int, outputs: int) -> Table: ...

    @abc.abstractmethod
    def __call__(
        self,
        params: Mapping[str, Any],
        y_BSC: Float[Array, "batch seq channels"],
        time_BS: Float[Array, "batch seq"],
        z_BSD: Float[Array, "batch seq hidden"],
        map_BS: Int[Array | np.ndarray, "batch seq"] | None,
    ) -> Float[Array, "batch seq outputs"]: ...

    def flops(self, hidden: int, channels: int, outputs: int, tokens: int) -> float:
        """Of one token in one pass forward, where a map has so many tokens; as `flops_per_token` counts them."""
        return 2.0 * sum(math.prod(p.shape) for p in self.table(hidden, channels, outputs) if is_kernel(p.path))

    def _inputs(self, hidden: int, channels: int) -> Table:
        return (
            *dense("token", channels, self.width),
            *dense("condition", hidden, self.width),
            *dense("time.up", _FREQUENCIES, self.width, std=0.02),
            *dense("time.down", self.width, self.width, std=0.02),
        )

    def _conditions(self, params, time_BS, z_BSD):
        """Time and condition as one vector of the width."""
        # From periods of 2 pi thousandths of the way on.
        frequency_F = jnp.asarray(10_000.0 ** (-np.arange(_FREQUENCIES // 2) / (_FREQUENCIES // 2)), jnp.float32)
        angle_BSF = time_BS[..., None] * frequency_F[None, None]
        wave_BSF = jnp.concatenate([jnp.cos(angle_BSF), jnp.sin(angle_BSF)], axis=-1).astype(z_BSD.dtype)
        time_BSW = linear(params["time"]["down"], jax.nn.silu(linear(params["time"]["up"], wave_BSF)))
        return time_BSW + linear(params["condition"], z_BSD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP(Net):
    """MAR's head (arXiv 2406.11838): each token by itself, through residual blocks whose scale, shift and gate come
    from time and condition and begin as zeros (AdaLN-zero of arXiv 2212.09748)."""

    joint: ClassVar[bool] = False

    def table(self, hidden: int, channels: int, outputs: int) -> Table:
        width, depth = self.width, self.depth
        return (
            *self._inputs(hidden, channels),
            *dense("blocks.modulation", width, 3 * width, std=0.0, depth=depth),
            *dense("blocks.up", width, width, depth=depth),
            *dense("blocks.down", width, width, depth=depth),
            *dense("modulation", width, 2 * width, std=0.0),
            *dense("output", width, outputs, std=0.0),
        )

    def __call__(self, params, y_BSC, time_BS, z_BSD, map_BS):
        condition_BSW = jax.nn.silu(self._conditions(params, time_BS, z_BSD))

        def block(x_BSW, own):
            scale, shift, gate = jnp.split(linear(own["modulation"], condition_BSW), 3, axis=-1)
            inner_BSW = jax.nn.silu(linear(own["up"], _normed(x_BSW) * (1 + scale) + shift))
            return x_BSW + gate * linear(own["down"], inner_BSW), None

        x_BSW = linear(params["token"], y_BSC.astype(z_BSD.dtype))
        x_BSW, _ = jax.lax.scan(block, x_BSW, params["blocks"], unroll=_UNROLLED)
        scale, shift = jnp.split(linear(params["modulation"], condition_BSW), 2, axis=-1)
        return linear(params["output"], _normed(x_BSW) * (1 + scale) + shift).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spatial(Net):
    """A small `Decoder` in which all tokens of a map see each other: the flow net of an image.

    It is fed the sum of token, time and condition. Positions are rotary: they count within a map, wherever in a row
    the map begins.
    """

    heads: int

    joint: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        with within("net"):
            _ = self.model

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.llama(
            vocab_size=1, hidden_size=self.width, intermediate_size=-(-8 * self.width // 3), num_layers=self.depth,
            num_heads=self.heads, num_kv_heads=self.heads, max_positions=1, tie_embeddings=True,
        )  # fmt: skip

    def table(self, hidden: int, channels: int, outputs: int) -> Table:
        own = (
            Beside(f"decoder.{path}", p.shape, ("", *p.axes[1:]) if p.stacked else p.axes, p.fill, p.std, p.inputs)
            for path, p in spec(self.model).items()
            if path != "embed_tokens"
        )
        return (*self._inputs(hidden, channels), *own, *dense("output", self.width, outputs, std=0.0))

    def __call__(self, params, y_BSC, time_BS, z_BSD, map_BS):
        x_BSW = linear(params["token"], y_BSC.astype(z_BSD.dtype)) + self._conditions(params, time_BS, z_BSD)
        graphdef, _ = abstract(self.model, Compute(dtype=z_BSD.dtype.name))
        # Nothing is looked up: the table of tokens stands for one that nobody trains.
        none = jnp.zeros((1, self.width), jnp.float32)
        decoder = nnx.merge(graphdef, {**params["decoder"], "embed_tokens": none})
        zeros = jnp.zeros(time_BS.shape, jnp.int32)
        x_BSW = decoder.hidden(
            zeros - 1, inputs_BSD=x_BSW, steps_BS=zeros, segment_ids_BS=zeros if map_BS is None else map_BS,
            positions_BS=jnp.arange(zeros.shape[1], dtype=jnp.int32)[None],
        )  # fmt: skip
        return linear(params["output"], x_BSW).astype(jnp.float32)

    def flops(self, hidden: int, channels: int, outputs: int, tokens: int) -> float:
        attention = 4.0 * self.width * tokens * self.depth  # every token with every one of its map: no half is masked
        return super().flops(hidden, channels, outputs, tokens) + attention


NETS: dict[str, type[Net]] = {"mlp": MLP, "decoder": Spatial}


def _normed(x_BSW):
    """LayerNorm without parameters, which the modulation would make needless; in float32."""
    y = x_BSW.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)).astype(x_BSW.dtype)
