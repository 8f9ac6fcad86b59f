"""The parts of a block: projections, norms, rotary positions, MLP.

Every parameter is an `nnx.Param` that carries the names of its axes as metadata `axes`; shardings
follow from the names by one rule table (`jaxup.training.sharding`). Modules are named as
transformers names them in its LLaMA models, whatever the family: one vocabulary for recipes,
filters and reports.

Shape suffixes: B batch, S sequence, D hidden, N heads, H head_dim, F MLP width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxup.model.attention import attention
from jaxup.model.config import Compute, ModelConfig


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """y = x @ kernel + bias over the last `inputs` axes of x; the rest of `shape` are outputs.

    `jaxup.training.lora` may give it a low-rank adapter: a pair [in, rank], [rank, out] over the
    inputs and outputs as one axis each, whose product times `lora_scale` is added to the kernel. Its
    kernel may be a `qwix.QArray` [in, out].
    """

    def __init__(self, shape, axes, *, inputs: int = 1, bias: bool, std: float, rngs: nnx.Rngs):
        self.kernel = normal(rngs, shape, axes, std)
        self.bias = nnx.Param(jnp.zeros(shape[inputs:]), axes=axes[inputs:]) if bias else None
        self.inputs, self.outputs = inputs, tuple(shape[inputs:])
        self.kernel_lora_a = self.kernel_lora_b = None
        self.lora_scale = 0.0

    def __call__(self, x):
        kernel = self.kernel.get_value()
        if hasattr(kernel, "qvalue"):
            import qwix  # an extra

            kernel = qwix.dequantize(kernel)
        kernel = kernel.astype(x.dtype)
        batch, outputs = x.shape[: x.ndim - self.inputs], self.outputs
        # As one matrix product of two dimensions: on CPU, XLA runs the gradients of a product with
        # several batch axes a third slower.
        x = x.reshape(math.prod(batch), -1)
        y = x @ kernel.reshape(-1, math.prod(outputs))
        if self.kernel_lora_a is not None:
            a, b = (param[...].astype(x.dtype) for param in (self.kernel_lora_a, self.kernel_lora_b))
            y = y + x @ a @ b * self.lora_scale
        y = y.reshape(*batch, *outputs)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(x.dtype), range(len(batch)))


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32."""

    def __init__(self, kind: str, size: int, eps: float, *, bias: bool = False):
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param(jnp.ones(size), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(size), axes=("norm",)) if bias else None

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        batch = range(x.ndim - 1)
        y = y * jnp.expand_dims(self.scale[...], batch)
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...], batch)
        return y.astype(x.dtype)


def block_norm(config: ModelConfig) -> Norm:
    return Norm(config.norm, config.hidden_size, config.norm_eps, bias=config.norm_bias)


def rotary_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """(radians per position [head_dim / 2], factor of the cosines and sines), by `RopeScaling`.

    In float64: the frequencies are a constant of the compiled program.
    """
    half, theta, scaling = config.head_dim // 2, config.rope_theta, config.rope_scaling
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
    x_BSNH: Float[Array, "batch seq heads head_dim"], positions_BS: Int[Array, "#batch seq"], config: ModelConfig
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary positions (Su et al. 2021), in the half-split layout of transformers' LLaMA."""
    frequency_H, factor = rotary_frequencies(config)
    frequency_H = jnp.asarray(frequency_H, jnp.float32)
    angle_BS1H = positions_BS[:, :, None, None].astype(jnp.float32) * frequency_H[None, None, None]
    cos, sin = factor * jnp.cos(angle_BS1H), factor * jnp.sin(angle_BS1H)
    a, b = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSNH.dtype)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query self-attention."""

    def __init__(self, config: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        std, bias = config.init_std, config.qkv_bias
        residual_std = std / (2 * config.num_layers) ** 0.5
        self.q_proj = Linear((D, N, H), ("embed", "heads", "head_dim"), bias=bias, std=std, rngs=rngs)
        self.k_proj = Linear((D, K, H), ("embed", "kv_heads", "head_dim"), bias=bias, std=std, rngs=rngs)
        self.v_proj = Linear((D, K, H), ("embed", "kv_heads", "head_dim"), bias=bias, std=std, rngs=rngs)
        self.o_proj = Linear(
            (N, H, D), ("heads", "head_dim", "embed"), inputs=2, bias=config.o_bias, std=residual_std, rngs=rngs
        )
        self.q_norm = Norm("rmsnorm", H, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm("rmsnorm", H, config.norm_eps) if config.qk_norm else None

    def __call__(self, x_BSD, *, layer, full, positions_BS, segment_ids_BS, cache=None, start=0, first_B=None):
        """Returns the output and, when decoding, all layers' (k, v) cache with this one's updated.

        `full` is a boolean scalar: this layer ignores the sliding window. It matters in models with
        layers of both types only.
        """
        c = self.config
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.positions == "rope":
            q, k = (rotary(y, positions_BS, c) for y in (q, k))
        scale = c.head_dim**-0.5
        if c.depth_scaled_attention:
            scale = scale / (layer + 1).astype(jnp.float32)
        q = (q * scale).astype(x_BSD.dtype)
        if cache is not None:
            cache = tuple(jax.lax.dynamic_update_slice(c, y.astype(c.dtype)[None], (layer, 0, start, 0, 0))
                          for c, y in zip(cache, (k, v), strict=True))  # fmt: skip
            k, v = (jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in cache)

        def attend(window: int | None, q, k, v):
            return attention(
                q, k.astype(q.dtype), v.astype(q.dtype), q_start=start, window=window, segment_ids=segment_ids_BS,
                first=first_B, implementation=self.compute.attention,
            )  # fmt: skip

        windowed = functools.partial(attend, c.sliding_window)
        if c.layer_types is None:
            out = windowed(q, k, v)
        else:
            # The window decides which program runs, so a layer's own is chosen among the two.
            out = jax.lax.cond(full, functools.partial(attend, None), windowed, q, k, v)
        return self.o_proj(out), cache


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F, std, bias = config.hidden_size, config.intermediate_size, config.init_std, config.mlp_bias
        residual_std = std / (2 * config.num_layers) ** 0.5
        self.activation = config.activation
        self.gate_proj = Linear((D, F), ("embed", "mlp"), bias=bias, std=std, rngs=rngs) if config.gated_mlp else None
        self.up_proj = Linear((D, F), ("embed", "mlp"), bias=bias, std=std, rngs=rngs)
        self.down_proj = Linear((F, D), ("mlp", "embed"), bias=bias, std=residual_std, rngs=rngs)

    def __call__(self, x_BSD: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        act, up = ACTIVATIONS[self.activation], self.up_proj(x_BSD)
        return self.down_proj(act(up) if self.gate_proj is None else act(self.gate_proj(x_BSD)) * up)


class Block(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.input_layernorm = block_norm(config)
        self.self_attn = Attention(config, compute, rngs=rngs)
        self.post_attention_layernorm = block_norm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_BSD, **attention_inputs):
        attended, cache = self.self_attn(self.input_layernorm(x_BSD), **attention_inputs)
        x_BSD = x_BSD + attended
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD)), cache
