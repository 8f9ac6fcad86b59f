"""Qwen2 and Qwen3 (Yang et al. 2024, 2025): some layers may have a window."""

from __future__ import annotations

import dataclasses

from jaxup.families import keys
from jaxup.families.keys import Key
from jaxup.families.llama import RMS_NORM, ROTARY, SIZES, llama_keys
from jaxup.families.mistral import MISTRAL
from jaxup.families.rope import ROPE
from jaxup.families.windows import SOME_WINDOWS

QWEN2 = dataclasses.replace(
    MISTRAL,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=llama_keys(vocab_size=151936, kv_heads=32, intermediate_size=22016, max_positions=32768),
    rules=(SIZES, ROPE, SOME_WINDOWS),
    fixed={**ROTARY, "use_mrope": (False,)},
    requires={**RMS_NORM, "qk_norm": False, "o_bias": False, "mlp_bias": False},
    has_bias={"qkv_bias": True},
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(
        *llama_keys(vocab_size=151936, kv_heads=32, head_dim=128, intermediate_size=22016, max_positions=32768),
        Key("attention_bias", ("qkv_bias", "o_bias"), False, keys.boolean),
    ),
    fixed=ROTARY,
    requires={**RMS_NORM, "qk_norm": True, "mlp_bias": False},
    has_bias={},
)
