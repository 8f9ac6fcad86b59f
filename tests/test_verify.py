"""`verify` against whole models run by the Decoder."""

import re

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from jaxup.building.verify import verify
from jaxup.depth.apply import apply
from jaxup.depth.materials import materials
from jaxup.depth.plan import ZEROED, DepthPlan, Row
from jaxup.depth.recipes import inherit
from jaxup.depth.result import result_config
from jaxup.errors import UserError
from jaxup.hub.reader import open_checkpoint, stored_dtypes
from jaxup.hub.writer import save
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import abstract
from jaxup.model.spec import spec

CONFIGS = {
    "gpt2": ModelConfig.gpt2(vocab_size=41, hidden_size=16, num_layers=3, num_heads=2, max_positions=30, bias=True),
    "llama": ModelConfig.llama(vocab_size=41, hidden_size=16, intermediate_size=20, num_layers=3, num_heads=4,
                               num_kv_heads=2, max_positions=64),
    "gemma": ModelConfig(
        vocab_size=41, hidden_size=16, intermediate_size=20, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=10,
        max_positions=64, norm="rmsnorm", norm_eps=1e-6, positions="rope", rope_theta=100.0, activation="gelu_tanh",
        gated_mlp=True, tie_embeddings=True, norm_offset=1.0, embed_scale=4.0,
    ),
}  # fmt: skip
UPSCALE = DepthPlan((Row("m", 0), Row("m", 1), Row("m", 1, "copy", ZEROED), Row("m", 2)), *["m"] * 4, (("m", 3),))


def build(root, name, plan, seed=0):
    """A model's directory, that of what the plan makes of it, and both trees."""
    rng = np.random.default_rng(seed)
    leaves = {path: rng.standard_normal(param.shape, np.float32) for path, param in spec(CONFIGS[name]).items()}
    params = traverse_util.unflatten_dict(leaves, sep=".")
    built = jax.tree.map(np.asarray, jax.jit(apply, static_argnums=0)(plan, {"m": params}))
    save(root / "source", CONFIGS[name], params)
    save(root / "result", result_config(plan, {"m": CONFIGS[name]}), built)
    return params, built


def checked(root, plan):
    sources = {"m": open_checkpoint(root / "source")}
    config = sources["m"].config
    table = spec(result_config(plan, {"m": config}))
    bill = materials(plan, table, {"m": config.tie_embeddings}, stored_dtypes(sources))
    return verify(bill, sources, root / "result")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_zeroed_upscale_differs_by_nothing(name, tmp_path):
    build(tmp_path, name, UPSCALE)
    assert checked(tmp_path, UPSCALE).splitlines()[1:] == [
        "  the plan in memory: 0, bit for bit",
        "  'm': 0, bit for bit",
    ]


def test_an_inherited_half_differs_by_what_the_decoder_says(tmp_path):
    plan = inherit("m", 3, 2)
    trees = build(tmp_path, "llama", plan)
    text = checked(tmp_path, plan)
    tokens = np.random.default_rng(0).integers(0, 41, (2, 32), np.int32)
    small = result_config(plan, {"m": CONFIGS["llama"]})
    whole, half = (
        jax.jit(lambda params, config=config: nnx.merge(abstract(config)[0], params)(jax.numpy.asarray(tokens)))(params)
        for params, config in zip(trees, (CONFIGS["llama"], small), strict=True)
    )
    largest, size, agree = re.search(r"'m': (\S+) of (\S+); .* (\d+) of 64$", text).groups()
    assert float(largest) == pytest.approx(np.max(np.abs(whole - half)), rel=1e-2)
    assert float(size) == pytest.approx(np.max(np.abs(whole)), rel=1e-2)
    assert int(agree) == np.sum(whole.argmax(-1) == half.argmax(-1))


def test_a_result_that_is_not_the_plans_is_refused(tmp_path):
    _, built = build(tmp_path, "llama", UPSCALE)
    kernel = built["blocks"]["mlp"]["down_proj"]["kernel"].copy()
    kernel[2, 0, 0] = 1e-3  # in the zeroed copy
    built["blocks"]["mlp"]["down_proj"]["kernel"] = kernel
    save(tmp_path / "result", result_config(UPSCALE, {"m": CONFIGS["llama"]}), built, force=True)
    with pytest.raises(UserError, match="verify: the result is not what the plan makes: "):
        checked(tmp_path, UPSCALE)
