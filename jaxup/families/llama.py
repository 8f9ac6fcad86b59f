"""LLaMA 1 to 3.x (Touvron et al. 2023) and OpenLLaMA; what its relatives have in common with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxup.families import keys
from jaxup.families.family import FIXED, Family, our_names
from jaxup.families.keys import Key, Rule
from jaxup.families.rope import ROPE
from jaxup.families.windows import NO_WINDOW

_KEYS = (
    Key("vocab_size", ("vocab_size",), 32000, keys.size),
    Key("hidden_size", ("hidden_size",), 4096, keys.size),
    Key("intermediate_size", ("intermediate_size",), 11008, keys.size),
    Key("num_hidden_layers", ("num_layers",), 32, keys.layers),
    Key("num_attention_heads", ("num_heads",), 32, keys.size),
    Key("num_key_value_heads", ("num_kv_heads",), None, keys.optional_size),  # null: as many as heads
    Key("head_dim", ("head_dim",), None, keys.optional_size),  # null: hidden_size // heads
    Key("max_position_embeddings", ("max_positions",), 2048, keys.size),
    Key("hidden_act", ("activation",), "silu", keys.activation),
    Key("rms_norm_eps", ("norm_eps",), 1e-6, keys.positive),
    Key("initializer_range", ("init_std",), 0.02, keys.positive),
    Key("tie_word_embeddings", ("tie_embeddings",), False, keys.boolean),
)
ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "o_bias"), False, keys.boolean)


def llama_keys(**defaults: Any) -> tuple[Key, ...]:
    """With the defaults that transformers has for one of the relatives."""
    return tuple(key._replace(default=defaults.get(key.name, key.default)) for key in _KEYS)


def _sizes(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "head_dim": fields["head_dim"] or fields["hidden_size"] // fields["num_heads"],
        "num_kv_heads": fields["num_kv_heads"] or fields["num_heads"],
    }


SIZES = Rule((), (), _sizes)
ROTARY = {**FIXED, "partial_rotary_factor": (None, 1.0, 1)}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(*_KEYS, ATTENTION_BIAS, Key("mlp_bias", ("mlp_bias",), False, keys.boolean)),
    rules=(SIZES, ROPE, NO_WINDOW),
    fixed={**ROTARY, "sliding_window": (None,)},
    fields={"norm": "rmsnorm", "positions": "rope", "gated_mlp": True},
    # transformers 5 refuses to load what is not
    obstacle=lambda c: "hidden_size to be a multiple of num_heads" if c.hidden_size % c.num_heads else None,
    modules=our_names("model"),
    ignored_tensors=("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)
