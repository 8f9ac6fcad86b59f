"""The shapes of a Decoder's params as plain tuples: for reading, writing and counting without jax."""

from __future__ import annotations

import math

from jaxup.model.config import ModelConfig


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every param of a `jaxup.model.decoder.Decoder` of this config."""
    c = config
    L, D, F, V = c.num_layers, c.hidden_size, c.intermediate_size, c.vocab_size
    N, K, H = c.num_heads, c.num_kv_heads, c.head_dim

    def norm(path: str, *shape: int, bias: bool = c.norm_bias) -> dict[str, tuple[int, ...]]:
        return {f"{path}.scale": shape} | ({f"{path}.bias": shape} if bias else {})

    def linear(path: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool) -> dict[str, tuple[int, ...]]:
        kernel = {f"blocks.{path}.kernel": (L, *inputs, *outputs)}
        return kernel | ({f"blocks.{path}.bias": (L, *outputs)} if bias else {})

    shapes = {"embed_tokens": (V, D)}
    if c.positions == "learned":
        shapes["embed_positions"] = (c.max_positions, D)
    shapes |= norm("blocks.input_layernorm", L, D) | norm("blocks.post_attention_layernorm", L, D)
    for name, heads in (("q", N), ("k", K), ("v", K)):
        shapes |= linear(f"self_attn.{name}_proj", (D,), (heads, H), c.qkv_bias)
    shapes |= linear("self_attn.o_proj", (N, H), (D,), c.o_bias)
    if c.qk_norm:
        for name in "qk":
            shapes |= norm(f"blocks.self_attn.{name}_norm", L, H, bias=False)
    for name in ("gate", "up") if c.gated_mlp else ("up",):
        shapes |= linear(f"mlp.{name}_proj", (D,), (F,), c.mlp_bias)
    shapes |= linear("mlp.down_proj", (F,), (D,), c.mlp_bias)
    shapes |= norm("norm", D)
    if not c.tie_embeddings:
        shapes["lm_head.kernel"] = (D, V)
    return shapes


def count_params(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(map(math.prod, param_shapes(config).values()))
