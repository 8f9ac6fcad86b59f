"""What only a GPU can show; elsewhere skipped. What is cheap comes first, attention in blocks last. On one:

    JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -n 4 --dist=load tests/test_gpu.py

With `JAX_DEFAULT_MATMUL_PRECISION=highest` test_parity, test_model and `test_attention.py -k without` run there too:
by itself XLA rounds the factors of float32 products to 11 bits.
"""

import functools

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import hf_model, relative, tokens_for
from test_model import GPT2, LLAMA, MIXED, noisy

import jaxup
from jaxup.depth.apply import apply
from jaxup.depth.plan import ZEROED, DepthPlan, Row
from jaxup.depth.result import result_config
from jaxup.families import FAMILIES
from jaxup.model.attention import attention, choose
from jaxup.model.config import Compute
from jaxup.model.decoder import abstract, init
from jaxup.training.optimizer import AdamW, make_optimizer
from jaxup.training.step import StepConfig, TrainState, make_train_step

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU, or JAX_PLATFORMS is not cuda")


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits(config, dtype, params, tokens):
    graphdef, _ = abstract(config, Compute(dtype=dtype))
    return nnx.merge(graphdef, params)(tokens)


@functools.cache
def upscaled(config):
    """Random weights, those of a plan that copies two layers which then add nothing, and its config."""
    params, rows = noisy(config), [Row("m", layer) for layer in range(config.num_layers)]
    plan = DepthPlan((*rows, Row("m", 1, "copy", ZEROED), Row("m", 0, "copy", ZEROED)), *["m"] * 4,
                     (("m", config.num_layers),))  # fmt: skip
    return params, jax.jit(apply, static_argnums=0)(plan, {"m": params}), result_config(plan, {"m": config})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [GPT2, LLAMA, MIXED], ids=["gpt2", "llama", "mixed"])
def test_zeroed_copies_do_not_change_a_bit(config, dtype):
    (params, more, deeper), tokens = upscaled(config), tokens_for(config, seq=16)
    np.testing.assert_array_equal(logits(deeper, dtype, more, tokens), logits(config, dtype, params, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_on_a_cpu(family, torch, tmp_path):
    theirs = hf_model(family)
    theirs.save_pretrained(tmp_path)
    ours = jaxup.load(tmp_path)
    tokens, params = tokens_for(ours.config), nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(logits(ours.config, "float32", params, tokens), want, atol=1e-4)
    assert relative(logits(ours.config, "bfloat16", params, tokens).astype(jnp.float32), want) < 0.05


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_same_steps_give_the_same_bits_where_xla_is_told_to(config):
    """Sums of the embedding's gradient, for one, are otherwise added in whatever order they come."""
    optimizer = make_optimizer(AdamW(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0))
    tokens = tokens_for(config, batch=8, seq=129)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.ones((8, 128), np.float32)}
    batch["segment_ids"] = np.tile(np.arange(128, dtype=np.int32) // 50, (8, 1))
    compute, step = Compute(dtype="bfloat16"), StepConfig(accumulation=2, loss_chunk=64, z_loss=0.0)

    @jax.jit
    def initial():
        params = init(config, 0)
        return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.bool_(False))

    def same(options):
        take = jax.jit(make_train_step(config, compute, optimizer, step), donate_argnums=0, compiler_options=options)
        ends = []
        for _ in range(2):
            state, losses = initial(), []
            for _ in range(10):
                state, metrics = take(state, batch, np.float32(1e-3))
                losses.append(float(metrics["loss"]))
            assert losses[-1] < losses[0], losses
            ends.append([np.asarray(leaf) for leaf in jax.tree.leaves(state)])
        return all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))

    print("the same bits without:", same({}))
    assert same({"xla_gpu_deterministic_ops": True})


@functools.cache
def drawn(packed, by_steps, head_dim, kv_heads, window, seq):
    """What attention is given, rounded to bfloat16, its segments and steps, and what float64 makes of it."""
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((2, seq, n, head_dim), np.float32) for n in (4, kv_heads, kv_heads, 4)]
    given[0] *= head_dim**-0.5
    given = [np.asarray(x, jnp.bfloat16) for x in given]
    index = np.arange(seq, dtype=np.int32)
    segments = np.stack([index // 70, np.minimum(index // 301, 2)]) if packed else None
    steps = np.where(index % 60 < 20, index // 60 * 60, index)[None] if by_steps else None
    return given, segments, steps, exact.attention(*given, window=window, segment_ids=segments, steps=steps)


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "window", "seq"),
    [(64, 4, None, 512), (100, 4, 1, 512), (256, 1, None, 512), (128, 2, None, 2304), (128, 1, 300, 2304)],
)
@pytest.mark.parametrize(("packed", "by_steps"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("implementation", ["cudnn", "blocked"])
def test_attention_equals_float64(implementation, packed, by_steps, head_dim, kv_heads, window, seq):
    """In value and gradients, of inputs that are bfloat16: a few roundings of 2^-9, independent, are less than 1%."""
    given, segments, steps, want = drawn(packed, by_steps, head_dim, kv_heads, window, seq)
    asked = {"dtype": jnp.bfloat16, "seq_len": seq, "head_dim": head_dim, "packed": packed, "stepwise": by_steps}
    assert choose("auto", **asked) == choose("cudnn", **asked) == "cudnn"

    @jax.jit
    def run(q, k, v, cotangent, segments, steps):
        how = {"window": window, "segment_ids": segments, "steps": steps, "implementation": implementation}
        out, back = jax.vjp(functools.partial(attention, **how), q, k, v)
        return out, *back(cotangent)

    # A window of one leaves q and k no gradient: what is then there is rounding of those of v and the value.
    size = lambda x: np.linalg.norm(x) or np.linalg.norm(want[0]) * head_dim**0.5  # noqa: E731
    errors = [
        np.linalg.norm(np.float64(a) - b) / size(b) for a, b in zip(run(*given, segments, steps), want, strict=True)
    ]
    print(*(f"{error:.1e}" for error in errors))
    assert max(errors) < 0.01
