"""Half the width of a model: against slicing by hand, and against the whole model without its other half."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from jaxup.depth.width import halved, narrow
from jaxup.errors import UserError
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import abstract
from jaxup.model.spec import flatten, unflatten

SIZES = {"vocab_size": 16, "hidden_size": 8, "num_layers": 2, "num_heads": 4, "max_positions": 8}
GPT2 = ModelConfig.gpt2(**SIZES, bias=True)
LLAMA = ModelConfig.llama(**SIZES, intermediate_size=12, num_kv_heads=2)
# By hand: of each parameter that is cut the part that stays.
CUT = {
    "self_attn.q_proj.kernel": lambda a: a[:, :, :2], "self_attn.q_proj.bias": lambda a: a[:, :2],
    "self_attn.k_proj.kernel": lambda a: a[:, :, : a.shape[2] // 2], "self_attn.k_proj.bias": lambda a: a[:, :2],
    "self_attn.v_proj.kernel": lambda a: a[:, :, : a.shape[2] // 2], "self_attn.v_proj.bias": lambda a: a[:, :2],
    "self_attn.o_proj.kernel": lambda a: a[:, :2], "mlp.gate_proj.kernel": lambda a: a[:, :, :6],
    "mlp.up_proj.kernel": lambda a: a[:, :, : a.shape[2] // 2], "mlp.up_proj.bias": lambda a: a[:, :16],
    "mlp.down_proj.kernel": lambda a: a[:, : a.shape[1] // 2],
}  # fmt: skip


def noise(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract(config)[1])


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama, grouped queries"])
def test_half_of_each_layer_is_sliced_and_nothing_else(config):
    params, half = noise(config), halved(config)
    assert (half.num_heads, half.num_kv_heads) == (2, config.num_kv_heads // 2)
    assert half.intermediate_size == config.intermediate_size // 2
    assert (half.hidden_size, half.head_dim, half.num_layers) == (8, 2, 2)
    found, want = flatten(narrow(params, half)), {}
    for path, leaf in flatten(params).items():
        want[path] = CUT.get(path.removeprefix("blocks."), lambda a: a)(leaf)
    assert found.keys() == want.keys()
    assert sum(found[path].shape != leaf.shape for path, leaf in flatten(params).items()) == len(CUT) - (
        1 if config is GPT2 else 4
    )
    for path in want:
        np.testing.assert_array_equal(found[path], want[path])


def test_it_computes_what_the_whole_does_without_the_other_half():
    """Each query keeps its key: the whole model without what the other heads and the other MLP give out."""
    params, half = flatten(noise(LLAMA)), halved(LLAMA)
    without = {path: leaf.copy() for path, leaf in params.items()}
    without["blocks.self_attn.o_proj.kernel"][:, 2:] = 0
    without["blocks.mlp.down_proj.kernel"][:, 6:] = 0
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)

    def logits(config, params):
        return jax.jit(lambda params: nnx.merge(abstract(config, Compute())[0], params)(tokens))(unflatten(params))

    got = logits(half, flatten(narrow(unflatten(params), half)))
    # Sums of half as many terms, the others zeros: in float32 they differ by their order.
    np.testing.assert_allclose(got, logits(LLAMA, without), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_halved_is_refused():
    for wrong, config in (
        ("num_heads=3", ModelConfig.gpt2(**{**SIZES, "num_heads": 3, "hidden_size": 9}, bias=False)),
        ("num_kv_heads=1", ModelConfig.llama(**SIZES, intermediate_size=12, num_kv_heads=1)),
        ("intermediate_size=11", ModelConfig.llama(**SIZES, intermediate_size=11, num_kv_heads=2)),
    ):
        with pytest.raises(UserError, match=re.escape(f"{wrong} cannot be halved")):
            halved(config)
    with pytest.raises(UserError, match=re.escape("embed_tokens has shape [16, 8], and [32, 8] is no part of it")):
        narrow(noise(LLAMA), ModelConfig.llama(**{**SIZES, "vocab_size": 32}, intermediate_size=12, num_kv_heads=2))
