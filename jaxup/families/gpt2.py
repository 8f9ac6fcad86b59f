"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxup.errors import UserError
from jaxup.families import keys
from jaxup.families.family import FIXED, Family
from jaxup.families.keys import Key, Rule
from jaxup.model.config import LayerKind, ModelConfig, depth_scaled

_FLAG = "scale_attn_by_inverse_layer_idx"
_LAYER = "transformer.h.{layer}"


def _sizes(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = fields["hidden_size"], fields["num_heads"]
    if hidden % heads:
        raise UserError(f"n_embd={hidden} is not a multiple of n_head={heads}")
    return {"head_dim": hidden // heads, "intermediate_size": fields["intermediate_size"] or 4 * hidden}


def _kinds(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    scaled = keys.parsed(_FLAG, hf.get(_FLAG, False), keys.boolean)
    return {"kinds": depth_scaled(fields["num_layers"]) if scaled else (LayerKind(),)}


def _kinds_obstacle(config: ModelConfig) -> str | None:
    if config.kinds == (LayerKind(),) or config.kinds_of_layers == depth_scaled(config.num_layers):
        return None
    if config.windows != (None,):
        return "layers without a window"
    found = ", ".join(f"{kind.attention_divisor:g}" for kind in config.kinds_of_layers[:20])
    return f"attention divided by l + 1 in layer l ({_FLAG}) or not at all, where its layers divide by {found}"


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys=(
        Key("vocab_size", ("vocab_size",), 50257, keys.size),
        Key("n_positions", ("max_positions",), 1024, keys.size),
        Key("n_embd", ("hidden_size",), 768, keys.size),
        Key("n_layer", ("num_layers",), 12, keys.layers),
        Key("n_head", ("num_heads", "num_kv_heads"), 12, keys.size),
        Key("n_inner", ("intermediate_size",), None, keys.optional_size),  # null: 4 * n_embd
        Key("activation_function", ("activation",), "gelu_new", keys.activation),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5, keys.positive),
        Key("initializer_range", ("init_std",), 0.02, keys.positive),
        Key("tie_word_embeddings", ("tie_embeddings",), True, keys.boolean),
    ),
    rules=(
        Rule((), (), _sizes),
        Rule((_FLAG,), ("kinds",), _kinds, lambda config: {_FLAG: config.kinds != (LayerKind(),)}, _kinds_obstacle),
    ),
    fixed={**FIXED, "scale_attn_weights": (True,), "layer_types": (None,)},
    fields={"norm": "layernorm", "positions": "learned", "rope_theta": None, "gated_mlp": False},
    obstacle=lambda c: None if c.num_kv_heads == c.num_heads == c.hidden_size / c.head_dim else (
        "num_kv_heads=num_heads=hidden_size/head_dim"),
    has_bias=dict.fromkeys(("norm_bias", "qkv_bias", "o_bias", "mlp_bias"), True),
    modules={
        "embed_tokens": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "blocks.input_layernorm": f"{_LAYER}.ln_1",
        **dict.fromkeys((f"blocks.self_attn.{name}_proj" for name in "qkv"), f"{_LAYER}.attn.c_attn"),
        "blocks.self_attn.o_proj": f"{_LAYER}.attn.c_proj",
        "blocks.post_attention_layernorm": f"{_LAYER}.ln_2",
        "blocks.mlp.up_proj": f"{_LAYER}.mlp.c_fc",
        "blocks.mlp.down_proj": f"{_LAYER}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    kernels="conv1d",
    ignored_tensors=(f"{_LAYER}.attn.bias", f"{_LAYER}.attn.masked_bias"),
)  # fmt: skip
