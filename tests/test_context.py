"""Sequences that a mesh splits: what each device has of them, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxup.model.attention import attention, balanced
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import init
from jaxup.training.sharding import BATCH_AXES, MeshConfig, batch_sharding, make_mesh
from jaxup.training.step import StepConfig, TrainState, make_train_step


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_all_devices_have_equal_parts_of_a_causal_mask(parts):
    order = balanced(96, parts)
    assert sorted(order) == list(range(96))
    pairs = (order + 1).reshape(parts, -1).sum(axis=1)  # a query at position p sees p + 1 keys
    assert (pairs == 96 * 97 // 2 // parts).all()


@pytest.mark.parametrize(
    ("implementation", "sizes", "segmented", "window"),
    [
        ("blocked", (1, 2, 2, 2), True, 100),
        ("splash", (2, 1, 4, 1), True, None),
        pytest.param("blocked", (1, 1, 8, 1), True, None, marks=pytest.mark.slow),
        pytest.param("splash", (1, 2, 2, 2), False, 100, marks=pytest.mark.slow),
        pytest.param("xla", (2, 2, 2, 1), True, None, marks=pytest.mark.slow),
    ],
)
def test_attention_of_split_sequences_is_that_of_whole_ones(implementation, sizes, segmented, window, monkeypatch):
    monkeypatch.setattr("jaxup.model.attention._TPU_BLOCK", 128)
    monkeypatch.setattr("jaxup.model.attention._TPU_FUSED", 2 if window else 8)
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True))))
    seq, parts = 400, sizes[2]
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (4, seq, n, 16)) for key, n in zip(keys, (4, 2, 2), strict=True))
    q = q * 0.25
    segments = jnp.stack([1 + jnp.arange(seq) // each for each in (70, 150, 390, 1000)]) if segmented else None
    order = balanced(seq, parts)

    def run(how, *arrays):
        def total(q, k, v, ids):
            out = attention(q, k, v, window=window, segment_ids=ids, implementation=how, batch_axes=BATCH_AXES)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)

    (_, dense), dense_grads = run("xla", q, k, v, segments)
    with jax.set_mesh(mesh):
        mine = jax.tree.map(lambda x: x[:, order], (q, k, v, segments))
        (_, out), grads = run(implementation, *mine)
    assert out.sharding.shard_shape(out.shape)[1] == seq // parts
    np.testing.assert_allclose(out, dense[:, order], atol=2e-6)
    for a, b in zip(grads, dense_grads, strict=True):
        assert relative(a, b[:, order]) < 1e-6


@pytest.mark.slow
def test_each_device_has_the_activations_of_its_part():
    """Of one row of 4,096 tokens, as the compiler planned it: weights are small beside them."""
    model = ModelConfig.llama(
        vocab_size=64, hidden_size=32, intermediate_size=1024, num_layers=4, num_heads=2, num_kv_heads=1,
        max_positions=4096,
    )  # fmt: skip
    params = jax.eval_shape(lambda: init(model, 0))
    compute, config = Compute(batch_axes=BATCH_AXES), StepConfig(accumulation=1, loss_chunk=128, z_loss=0.0)

    def temporary(parts):
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, context=parts, tensor=1), jax.devices()[:parts])
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        like = lambda dtype: jax.ShapeDtypeStruct((1, 4096), dtype, sharding=batch_sharding(mesh))  # noqa: E731
        batch = {name: like(jnp.int32) for name in ("tokens", "targets", "positions")}
        batch["loss_weights"] = like(jnp.float32)
        descent = optax.sgd(1.0)
        state = TrainState(
            params, descent.init(params), *(jax.ShapeDtypeStruct((), kind) for kind in (jnp.int32, jnp.bool_))
        )
        with jax.set_mesh(mesh):
            step = jax.jit(make_train_step(model, compute, descent, config), in_shardings=(whole, None, None))
            return step.lower(state, batch, np.float32(1)).compile().memory_analysis().temp_size_in_bytes

    # A quarter, and what is there of one layer alone: all keys and values, and one block's logits of all keys.
    assert temporary(4) < 0.35 * temporary(1)
