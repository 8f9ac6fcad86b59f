"""A policy: prompts as tokens, where answers stop, and what is counted."""

import functools

import jax
import numpy as np
import pytest

from jaxup.data.chat_formats import prompt_ids
from jaxup.data.chat_templates import with_format
from jaxup.data.tokenizer import train_bpe
from jaxup.errors import UserError
from jaxup.learning.policy import Policy
from jaxup.learning.problem import Ask, Problem
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import init

KNOWN = ["the cat sat on the mat , and it sat  well .", "don't  you think so ?"]
CONFIG = ModelConfig.llama(
    vocab_size=320, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=2, max_positions=128
)
PROBLEM = Problem("a", "the cat")


@functools.cache
def tokenizer():
    return train_bpe(KNOWN, 290)


@functools.cache
def policy(**changes):
    params = jax.jit(init, static_argnums=0)(CONFIG, 0)
    how = dict(ends=(tokenizer().eos_token_id,), temperature=1.0, top_k=0, top_p=1.0, slots=4, length=96)
    return Policy(CONFIG, params, tokenizer(), **{**how, "vocab_size": len(tokenizer()), **changes})


def ask(sample=0, max_tokens=40, until="", prefix=None):
    return Ask(policy().prefix(PROBLEM) if prefix is None else prefix, (1, 2, sample), max_tokens, until)


def decode(tokens):
    return tokenizer().decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
