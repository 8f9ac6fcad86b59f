"""What only a GPU can show; elsewhere skipped. On one: `JAX_PLATFORMS=cuda python -m pytest -n 0 tests/test_gpu.py`.

With `JAX_DEFAULT_MATMUL_PRECISION=highest` test_parity and test_model run there as well: by itself XLA rounds the
factors of float32 products to 11 bits.
"""

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
from jaxup.model.attention import attention, choose
from jaxup.model.config import Compute
from jaxup.model.decoder import abstract, init
from jaxup.training.optimizer import OptimizerConfig, make_optimizer
from jaxup.training.step import StepConfig, TrainState, make_train_step

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU, or JAX_PLATFORMS is not cuda")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_are_those_of_transformers_on_a_cpu(family, torch, tmp_path):
    theirs = hf_model(family)
    theirs.save_pretrained(tmp_path)
    ours = jaxup.load(tmp_path)
    tokens = tokens_for(ours.config)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda model, tokens: model(tokens))(ours, tokens)
    np.testing.assert_allclose(exact, want, atol=1e-4)
    graphdef, _ = abstract(ours.config, Compute(dtype="bfloat16"))
    params = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    low = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))(params, tokens)
    assert relative(low.astype(jnp.float32), want) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [GPT2, LLAMA, MIXED], ids=["gpt2", "llama", "mixed"])
def test_zeroed_copies_do_not_change_a_bit(config, dtype):
    params, tokens = noisy(config), tokens_for(config, seq=16)
    rows = [Row("m", layer) for layer in range(config.num_layers)]
    plan = DepthPlan((*rows, Row("m", 1, "copy", ZEROED), Row("m", 0, "copy", ZEROED)), *["m"] * 4,
                     (("m", config.num_layers),))  # fmt: skip

    def logits(config, params):
        graphdef, _ = abstract(config, Compute(dtype=dtype))
        return jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))(params, tokens)

    upscaled = logits(result_config(plan, {"m": config}), jax.jit(apply, static_argnums=0)(plan, {"m": params}))
    np.testing.assert_array_equal(upscaled, logits(config, params))


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_same_steps_give_the_same_bits_where_xla_is_told_to(config):
    """Sums of the embedding's gradient, for one, are otherwise added in whatever order they come."""
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-3, end_learning_rate=1e-3, schedule="constant", warmup_steps=0,
                        decay_fraction=0.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0),
        100,
    )  # fmt: skip
    tokens = tokens_for(config, batch=8, seq=129)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.ones((8, 128), np.float32)}
    batch["segment_ids"] = np.tile(np.arange(128, dtype=np.int32) // 50, (8, 1))
    compute, step = Compute(dtype="bfloat16"), StepConfig(accumulation=2, loss_chunk=64, z_loss=0.0)

    def trained(**options):
        params = init(config, 0)
        state = TrainState(params, optimizer.init(params), jnp.int32(0), jnp.bool_(False))
        take = jax.jit(make_train_step(config, compute, optimizer, step), donate_argnums=0, compiler_options=options)
        losses = []
        for _ in range(10):
            state, metrics = take(state, batch)
            losses.append(float(metrics["loss"]))
        return losses, [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

    def same(options):
        (losses, first), (_, second) = trained(**options), trained(**options)
        assert losses[-1] < losses[0], losses
        return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))

    print("the same bits without:", same({}))
    assert same({"xla_gpu_deterministic_ops": True})


@pytest.mark.parametrize("implementation", ["cudnn", "blocked"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "window", "seq"),
    [(64, 4, None, 512), (128, 2, None, 2304), (128, 1, 300, 2304), (100, 4, 1, 512), (256, 1, None, 512)],
)
def test_attention_equals_dense(implementation, packed, head_dim, kv_heads, window, seq):
    """In value and gradients, of inputs that are bfloat16: a few roundings of 2^-9, independent, are less than 1%."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (
        jax.random.normal(key, (2, seq, heads, head_dim), jnp.bfloat16)
        for key, heads in zip(keys, (4, kv_heads, kv_heads, 4), strict=True)
    )
    q = q * head_dim**-0.5
    segments = jnp.stack([jnp.arange(seq) // 70, jnp.minimum(jnp.arange(seq) // 301, 2)]) if packed else None
    asked = {"dtype": q.dtype, "seq_len": seq, "head_dim": head_dim, "packed": packed}
    assert choose("auto", **asked) == choose("cudnn", **asked) == "cudnn"

    def run(implementation, *given):
        def total(*given):
            out = attention(*given, window=window, segment_ids=segments, implementation=implementation)
            return jnp.vdot(out.astype(jnp.float32), weights.astype(jnp.float32)), out

        (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*given)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    with jax.default_matmul_precision("highest"):
        exact = run("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    errors = [relative(a, b) for a, b in zip(run(implementation, q, k, v), exact, strict=True)]
    print(*(f"{error:.1e}" for error in errors))
    assert max(errors) < 0.01
