"""The parts of a block: projections, norms, rotary positions, MLP.

A module takes its parameters from `Leaves`: arrays, or shapes of them, by their paths in
`jaxup.model.spec`. One that the table does not have, such as a bias, is left out of the computation.

Shape suffixes: B batch, S sequence, D hidden, N heads, H head_dim, F MLP width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxup.model.attention import attention, attention_weights, context_size
from jaxup.model.config import PLACEMENTS, Compute, ModelConfig, RopeScaling
from jaxup.model.spec import spec

Leaves = Mapping[str, Any]  # path -> array or ShapeDtypeStruct, with all layers if it is stacked


def param(leaves: Leaves, path: str) -> nnx.Param | None:
    """The parameter at this path, None if the model has none there."""
    return nnx.Param(leaves[path]) if path in leaves else None


class Linear(nnx.Module):
    """y = x @ kernel + bias over the last `inputs` axes of x; the rest of the kernel's are outputs.

    `jaxup.training.lora` may give it an adapter, [in, rank] and [rank, out], whose product times
    `lora_scale` is added to the kernel, and make the kernel a `qwix.QArray` [in, out].
    """

    def __init__(self, config: ModelConfig, leaves: Leaves, path: str):
        table = spec(config)[f"{path}.kernel"]
        self.kernel, self.bias = nnx.Param(leaves[f"{path}.kernel"]), param(leaves, f"{path}.bias")
        self.inputs, self.outputs = table.inputs, table.each[table.inputs :]
        self.kernel_lora_a: nnx.Param | None = None
        self.kernel_lora_b: nnx.Param | None = None
        self.lora_scale = 0.0

    def __call__(self, x):
        kernel = self.kernel.get_value()
        if hasattr(kernel, "qvalue"):
            import qwix  # an extra

            kernel = qwix.dequantize(kernel)
        kernel = kernel.astype(x.dtype)
        batch, outputs = x.shape[: x.ndim - self.inputs], self.outputs
        # As one matrix product of two dimensions: on CPU, XLA runs the gradients of a product with
        # several batch axes a third slower. But no sharding says what rows that are split along both axes are as one.
        x = x.reshape(*((math.prod(batch),) if context_size() == 1 else batch), -1)
        y = x @ kernel.reshape(-1, math.prod(outputs))
        if self.kernel_lora_a is not None and self.kernel_lora_b is not None:
            a, b = (param[...].astype(x.dtype) for param in (self.kernel_lora_a, self.kernel_lora_b))
            y = y + x @ a @ b * self.lora_scale
        y = y.reshape(*batch, *outputs)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(x.dtype), range(len(batch)))


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32."""

    def __init__(self, config: ModelConfig, leaves: Leaves, path: str, kind: str | None = None):
        self.kind, self.eps, self.offset = kind or config.norm, config.norm_eps, config.norm_offset
        self.scale, self.bias = nnx.Param(leaves[f"{path}.scale"]), param(leaves, f"{path}.bias")

    def __call__(
        self, x: Float[Array, "*batch size"], factor: float | Float[Array, ""] = 1.0
    ) -> Float[Array, "*batch size"]:
        """`factor` multiplies scale and bias, as if it had been folded into them."""
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        batch = range(x.ndim - 1)
        scaled = not (isinstance(factor, float) and factor == 1)
        scale = self.scale[...]
        if self.offset:
            scale = scale.astype(jnp.float32) + self.offset
        if scaled:
            scale = scale.astype(jnp.float32) * factor
        y = y * jnp.expand_dims(scale, batch)
        if self.bias is not None:
            bias = self.bias[...].astype(jnp.float32) * factor if scaled else self.bias[...]
            y = y + jnp.expand_dims(bias, batch)
        return y.astype(x.dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """(radians per position [head_dim / 2], factor of the cosines and sines), by `RopeScaling`.

    In float64: the frequencies are a constant of the compiled program.
    """
    half = head_dim // 2
    frequency_H = theta ** (-np.arange(half) / half)
    if scaling is None:
        return frequency_H, 1.0
    if scaling.kind == "linear":
        return frequency_H / scaling.factor, 1.0
    original = scaling.original_max_positions
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns_H = original * frequency_H / (2 * np.pi)
        kept_H = np.clip((turns_H - low) / (high - low), 0, 1)
        return frequency_H * (kept_H + (1 - kept_H) / scaling.factor), 1.0

    def dimension(turns: float) -> float:  # which one turns this often within the original context
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    # transformers' guard against a division by zero, which decides between kept and divided.
    ramp_H = (np.arange(half) - first) / (last - first if last != first else 0.001)
    kept_H = 1 - np.clip(ramp_H, 0, 1)
    return frequency_H * (kept_H + (1 - kept_H) / scaling.factor), scaling.attention_factor


def rotary(
    x_BSNH: Float[Array, "batch seq heads head_dim"],
    positions_BS: Int[Array, "#batch seq"],
    theta: float,
    scaling: RopeScaling | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary positions (Su et al. 2021), in the half-split layout of transformers' LLaMA."""
    frequency_H, factor = rotary_frequencies(x_BSNH.shape[-1], theta, scaling)
    frequency_111H = jnp.asarray(frequency_H[None, None, None], jnp.float32)
    angle_BS1H = positions_BS[:, :, None, None].astype(jnp.float32) * frequency_111H
    cos, sin = factor * jnp.cos(angle_BS1H), factor * jnp.sin(angle_BS1H)
    a, b = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSNH.dtype)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query self-attention."""

    def __init__(self, config: ModelConfig, compute: Compute, leaves: Leaves):
        self.config, self.compute = config, compute
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(config, leaves, f"blocks.self_attn.{name}_proj") for name in "qkvo"
        )
        self.q_norm, self.k_norm = (
            Norm(config, leaves, f"blocks.self_attn.{name}_norm", "rmsnorm") if config.qk_norm else None
            for name in "qk"
        )

    def __call__(
        self, x_BSD, *, layer, kind, positions_BS, segment_ids_BS, steps_BS=None, cache=None, start=0, first_B=None,
        together=False,
    ):  # fmt: skip
        """Returns the output and, when decoding, all layers' (k, v) cache with this one's updated.

        `layer` is where in the cache that is; `kind` has this layer's entry of each of the model's `columns`.
        """
        q, k = self._queries_keys(x_BSD, kind, positions_BS)
        v = self.v_proj(x_BSD)
        if cache is not None:
            cache = tuple(_written(c, y.astype(c.dtype), layer, start) for c, y in zip(cache, (k, v), strict=True))
            k, v = (jnp.swapaxes(jax.lax.dynamic_index_in_dim(c, layer, keepdims=False), 1, 2) for c in cache)

        def attend(window: int | None, q: Array, k: Array, v: Array) -> Array:
            return attention(
                q, k.astype(q.dtype), v.astype(q.dtype), q_start=start, window=window, segment_ids=segment_ids_BS,
                first=first_B, steps=steps_BS, together=together, implementation=self.compute.attention,
                batch_axes=self.compute.rows_over,
            )  # fmt: skip

        return self.o_proj(self._by_window(attend, kind, q, k, v)), cache

    def weights(
        self, x_BSD: Float[Array, "batch seq hidden"], *, kind: Mapping[str, Any], positions_BS: Any
    ) -> Float[Array, "batch heads seq seq"]:
        """The weights of the values, of each query and key: what no call computes whole."""
        q, k = self._queries_keys(x_BSD, kind, positions_BS)
        return self._by_window(lambda window, q, k: attention_weights(q, k, window), kind, q, k)

    def _queries_keys(self, x_BSD, kind, positions_BS):
        c = self.config
        q, k = self.q_proj(x_BSD), self.k_proj(x_BSD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.rope_theta is not None:
            q, k = (rotary(y, positions_BS, c.rope_theta, c.rope_scaling) for y in (q, k))
        scale = c.head_dim**-0.5 / kind.get("attention_divisor", c.kinds[0].attention_divisor)
        return (q * scale).astype(x_BSD.dtype), k

    def _by_window(self, run, kind, *arrays):
        """`run(window, *arrays)`: the window decides which program runs, so it is chosen among those of the model."""
        programs = [functools.partial(run, window) for window in self.config.windows]
        return jax.lax.switch(kind["window"], programs, *arrays) if len(programs) > 1 else programs[0](*arrays)


def _written(
    cache_LBKTH: Float[Array, "layers batch heads room head_dim"],
    y_BSKH: Float[Array, "batch seq heads head_dim"],
    layer: Any,
    start: Int[Array, ""] | Int[Array, " batch"],
) -> Float[Array, "layers batch heads room head_dim"]:
    """The cache with these from slot `start` on, of all rows or of each; what has no room is not written."""
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice(cache_LBKTH, jnp.swapaxes(y_BSKH, 1, 2)[None], (layer, 0, 0, start, 0))
    slot_BS = start[:, None] + jnp.arange(y_BSKH.shape[1])[None]
    row_B1 = jnp.arange(len(start))[:, None]
    return cache_LBKTH.at[layer, row_B1, :, slot_BS].set(y_BSKH, mode="drop", unique_indices=True)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, leaves: Leaves):
        self.activation = config.activation
        self.gate_proj = Linear(config, leaves, "blocks.mlp.gate_proj") if config.gated_mlp else None
        self.up_proj, self.down_proj = (Linear(config, leaves, f"blocks.mlp.{name}_proj") for name in ("up", "down"))

    def __call__(self, x_BSD: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        act, up = ACTIVATIONS[self.activation], self.up_proj(x_BSD)
        return self.down_proj(act(up) if self.gate_proj is None else act(self.gate_proj(x_BSD)) * up)


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream; where they are normalised is `LayerKind.placement`.

    Where layers before the sum and after it are in one model, each computes both norms and takes what is its own. A
    norm is cheap beside what it stands around, and `select` goes through XLA's fusions where a branch would end them.
    Nor can what is not taken harm the gradient: a norm's is finite wherever its input is, for its epsilon is not 0.
    """

    def __init__(self, config: ModelConfig, compute: Compute, leaves: Leaves):
        self.config = config
        self.input_layernorm = Norm(config, leaves, "blocks.input_layernorm")
        self.self_attn = Attention(config, compute, leaves)
        self.post_attention_layernorm = Norm(config, leaves, "blocks.post_attention_layernorm")
        self.mlp = MLP(config, leaves)
        self.attention_output_layernorm, self.feedforward_output_layernorm = (
            Norm(config, leaves, f"blocks.{name}_output_layernorm") if "peri" in config.placements else None
            for name in ("attention", "feedforward")
        )

    def __call__(self, x_BSD, *, kind, **attention_inputs):
        x_BSD, _, cache = self.attend(x_BSD, kind=kind, **attention_inputs)
        return self.feed_forward(x_BSD, kind)[0], cache

    def attend(self, x_BSD, *, kind, **attention_inputs):
        """(the stream after attention, what attention adds to it, the cache); inputs are those of `Attention`."""
        added_BSD, cache = self.self_attn(self.seen(x_BSD, kind), kind=kind, **attention_inputs)
        if self.attention_output_layernorm is not None:
            added_BSD = self.attention_output_layernorm(added_BSD)
        return self._after(self.input_layernorm, x_BSD + added_BSD, kind), added_BSD, cache

    def feed_forward(self, x_BSD, kind):
        """(the stream after the MLP, what the MLP adds to it)."""
        added_BSD = self.mlp(self._before(self.post_attention_layernorm, x_BSD, kind))
        if self.feedforward_output_layernorm is not None:
            added_BSD = self.feedforward_output_layernorm(added_BSD)
        return self._after(self.post_attention_layernorm, x_BSD + added_BSD, kind), added_BSD

    def seen(self, x_BSD, kind):
        """What attention sees of the stream."""
        return self._before(self.input_layernorm, x_BSD, kind)

    def _before(self, norm, x_BSD, kind):
        if self.config.placements == {"post"}:
            return x_BSD
        return self._if_post(kind, x_BSD, norm(x_BSD, kind.get("norm_factor", self.config.kinds[0].norm_factor)))

    def _after(self, norm, x_BSD, kind):
        return x_BSD if "post" not in self.config.placements else self._if_post(kind, norm(x_BSD), x_BSD)

    def _if_post(self, kind, post_BSD, other_BSD):
        if "placement" not in kind:  # all layers are alike
            return post_BSD if "post" in self.config.placements else other_BSD
        return jnp.where(kind["placement"] == PLACEMENTS.index("post"), post_BSD, other_BSD)
