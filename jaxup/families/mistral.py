"""Mistral (Jiang et al. 2023): 7B, Nemo, Small. LLaMA with a window that all layers have, or none."""

from __future__ import annotations

import dataclasses

from jaxup.families.llama import LLAMA, ROTARY, SIZES, llama_keys
from jaxup.families.rope import ROPE
from jaxup.families.windows import one_window

MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=llama_keys(num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072),
    rules=(SIZES, ROPE, one_window(4096)),
    fixed={**ROTARY, "attention_bias": (False, None), "mlp_bias": (False, None)},
    obstacle=lambda c: None,
)
