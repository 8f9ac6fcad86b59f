"""Gemma 1 (Gemma Team 2024): norms that multiply by 1 + their weight, scaled embeddings, GELU."""

from __future__ import annotations

import dataclasses

from jaxup.families.keys import Rule
from jaxup.families.llama import ATTENTION_BIAS, LLAMA, ROTARY, SIZES, llama_keys
from jaxup.families.rope import ROPE
from jaxup.families.windows import NO_WINDOW
from jaxup.model.config import ModelConfig

_KEYS = llama_keys(
    vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=16, head_dim=256, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip


def _embed_obstacle(config: ModelConfig) -> str | None:
    scale = config.hidden_size**0.5
    return None if config.embed_scale == scale else f"embed_scale={scale!r}, the root of hidden_size"


_EMBED_SCALE = Rule(
    (), ("embed_scale",), lambda hf, fields: {"embed_scale": fields["hidden_size"] ** 0.5}, obstacle=_embed_obstacle
)

GEMMA = dataclasses.replace(
    LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    keys=(*(key for key in _KEYS if key.name != "hidden_act"), ATTENTION_BIAS),
    rules=(SIZES, ROPE, NO_WINDOW, _EMBED_SCALE),
    fixed={
        **ROTARY,
        "use_bidirectional_attention": (None, False),
        # Which of the two transformers reads depends on its version. "gelu" in the first is what early files say; they
        # mean the approximation.
        "hidden_act": ("gelu_pytorch_tanh", "gelu_new", "gelu"),
        "hidden_activation": (None, "gelu_pytorch_tanh", "gelu_new"),
    },
    fields={**LLAMA.fields, "activation": "gelu_tanh", "norm_offset": 1.0},
    obstacle=lambda c: None,
)
