"""Qwen2 and Qwen3 (Yang et al. 2024, 2025): some layers may have a window."""

from __future__ import annotations

import dataclasses

from jaxup.families.llama import ATTENTION_BIAS, ROTARY, SIZES, llama_keys
from jaxup.families.mistral import MISTRAL
from jaxup.families.rope import ROPE
from jaxup.families.windows import SOME_WINDOWS

_DEFAULTS = {
    "vocab_size": 151936, "num_key_value_heads": 32, "intermediate_size": 22016, "max_position_embeddings": 32768
}  # fmt: skip

QWEN2 = dataclasses.replace(
    MISTRAL,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=llama_keys(**_DEFAULTS),
    rules=(SIZES, ROPE, SOME_WINDOWS),
    fixed={**ROTARY, "use_mrope": (False,)},
    has_bias={"qkv_bias": True},
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(*llama_keys(**_DEFAULTS, head_dim=128), ATTENTION_BIAS),
    fixed=ROTARY,
    fields={**QWEN2.fields, "qk_norm": True},
    has_bias={},
)
