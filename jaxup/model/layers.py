"""The parts of a block: projections, norms, rotary positions, MLP.

Every parameter is an `nnx.Param` that carries the names of its axes as metadata `axes`; shardings
follow from the names by one rule table (`jaxup.training.sharding`). Modules are named as
transformers names them in its LLaMA models, whatever the family: one vocabulary for recipes,
filters and reports.

Shape suffixes: B batch, S sequence, D hidden, N heads, H head_dim, F MLP width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxup.model.attention import attention
from jaxup.model.config import Compute, ModelConfig


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """y = x @ kernel + bias over the last `inputs` axes of x; the rest of `shape` are outputs."""

    def __init__(self, shape, axes, *, inputs: int = 1, bias: bool, std: float, rngs: nnx.Rngs):
        self.kernel = normal(rngs, shape, axes, std)
        self.bias = nnx.Param(jnp.zeros(shape[inputs:]), axes=axes[inputs:]) if bias else None
        self.inputs = inputs

    def __call__(self, x):
        kernel = self.kernel[...].astype(x.dtype)
        batch, outputs = x.shape[: x.ndim - self.inputs], kernel.shape[self.inputs :]
        # As one matrix product of two dimensions: on CPU, XLA runs the gradients of a product with
        # several batch axes a third slower.
        y = x.reshape(math.prod(batch), -1) @ kernel.reshape(-1, math.prod(outputs))
        y = y.reshape(*batch, *outputs)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(x.dtype), range(len(batch)))


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the hidden axis, computed in float32."""

    def __init__(self, config: ModelConfig):
        self.kind, self.eps = config.norm, config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.hidden_size), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size), axes=("norm",)) if config.norm_bias else None

    def __call__(self, x_BSD: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        y = x_BSD.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...][None, None]
        if self.bias is not None:
            y = y + self.bias[...][None, None]
        return y.astype(x_BSD.dtype)


def rotary(
    x_BSNH: Float[Array, "batch seq heads head_dim"], positions_BS: Int[Array, "#batch seq"], *, theta: float
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary positions (Su et al. 2021), in the half-split layout of transformers' LLaMA."""
    half = x_BSNH.shape[-1] // 2
    frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BS1H = positions_BS[:, :, None, None].astype(jnp.float32) * frequency_H[None, None, None]
    cos, sin = jnp.cos(angle_BS1H), jnp.sin(angle_BS1H)
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

    def __call__(self, x_BSD, *, layer, positions_BS, segment_ids_BS, cache=None, start=0):
        """Returns the output and, when decoding, this layer's updated (k, v) cache."""
        c = self.config
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if c.positions == "rope":
            q, k = (rotary(y, positions_BS, theta=c.rope_theta) for y in (q, k))
        scale = c.head_dim**-0.5
        if c.depth_scaled_attention:
            scale = scale / (layer + 1).astype(jnp.float32)
        q = (q * scale).astype(x_BSD.dtype)
        if cache is not None:
            k, v = (jax.lax.dynamic_update_slice_in_dim(c, y.astype(c.dtype), start, axis=1)
                    for c, y in zip(cache, (k, v), strict=True))  # fmt: skip
            cache = (k, v)
        out = attention(
            q, k.astype(q.dtype), v.astype(q.dtype), q_start=start, window=c.sliding_window,
            segment_ids=segment_ids_BS, implementation=self.compute.attention,
        )  # fmt: skip
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
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config, compute, rngs=rngs)
        self.post_attention_layernorm = Norm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_BSD, **attention_inputs):
        attended, cache = self.self_attn(self.input_layernorm(x_BSD), **attention_inputs)
        x_BSD = x_BSD + attended
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD)), cache
