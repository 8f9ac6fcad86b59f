"""Training some of the params: the same loss and gradients as of the whole model, and nothing for the rest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_model import GPT2, LLAMA, MIXED, noisy, tokens_for

from jaxup.depth.freeze import only, trainable
from jaxup.depth.plan import ZEROED, DepthPlan, Row
from jaxup.depth.recipes import interleave
from jaxup.model.config import Compute
from jaxup.model.decoder import abstract
from jaxup.model.stack import _patterns
from jaxup.training.partition import Partition
from jaxup.training.step import StepConfig, TrainState, make_train_step


def deep(config, num_layers):
    return config.with_layers([i % config.num_layers for i in range(num_layers)])


def plan_of(roles):
    rows = [Row("m", 0, "copy", ZEROED) if role == "z" else Row("m", 0) for role in roles]
    return DepthPlan(tuple(rows), *["m"] * 4, (("m", 1),))


CASES = {
    "copies": (LLAMA, "0zz0", {"layers": "copies"}, Compute(unroll=0)),
    "copies' projections, interleaved": (
        MIXED, "00z0z0zz", {"layers": "copies", "parameters": "o_proj|down_proj"}, Compute(remat="dots")),
    "originals": (GPT2, "0z0z0", {"layers": "originals"}, Compute(remat="full")),
    "norms and the head": (LLAMA, "000", {"parameters": "norm|lm_head"}, Compute()),
    "everything": (LLAMA, "000", {}, Compute()),
}  # fmt: skip


def total(x_BSD, kernel_DV):
    return jnp.sum(jnp.sin(x_BSD @ kernel_DV))


@functools.cache
def whole(config, compute):
    """(params, tokens) -> total and gradients of the model in one piece."""
    graphdef, _ = abstract(config, compute)

    def function(params, tokens):
        decoder = nnx.merge(graphdef, params)
        return total(decoder.hidden(tokens), decoder.head_kernel())

    return jax.jit(jax.value_and_grad(function))


# Rows of two kinds one by one are in the interleaved case as well, and `full` in `test_lora`.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "originals")) for case in CASES]
)
def test_loss_and_gradients_are_those_of_the_whole_model(case):
    config, roles, select, compute = CASES[case]
    config, plan = deep(config, len(roles)), plan_of(roles)
    params, tokens = noisy(config), tokens_for(config)
    masks = trainable(plan, params, **select)
    partition = Partition(config, compute, masks)

    def parts(trained, frozen, tokens):
        decoder, x_BSD = partition.hidden(trained, frozen, tokens)
        return total(x_BSD, decoder.head_kernel())

    split = jax.jit(partition.split)
    trained, frozen = split(params)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(partition.join)(trained, frozen), params)
    value, grads = whole(config, compute)(params, tokens)
    got, got_grads = jax.jit(jax.value_and_grad(parts))(trained, frozen, tokens)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    want_grads, _ = split(grads)
    assert jax.tree.structure(got_grads) == jax.tree.structure(want_grads)
    # Relative to the largest gradient: sums of float32 in another order.
    scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale)


def test_a_step_trains_what_it_is_told_to_and_keeps_every_other_bit():
    """Against a step of the whole model whose other updates are undone."""
    config, plan = deep(LLAMA, 4), plan_of("00z0")
    params = noisy(config)
    masks = trainable(plan, params, layers="copies", parameters="o_proj|down_proj|norm")
    partition = Partition(config, Compute(), masks)
    trained, frozen = jax.jit(partition.split)(params)
    tokens = jnp.asarray(tokens_for(config))
    batch = {"tokens": tokens, "targets": tokens[:, ::-1], "loss_weights": jnp.ones(tokens.shape)}
    # Plain descent: Adam's first step would be the sign of the gradient, however wrong its size.
    optimizer, options = optax.sgd(0.1), StepConfig(accumulation=2, loss_chunk=5, z_loss=0.0)
    state = TrainState(trained, optimizer.init(trained), jnp.int32(0), jnp.bool_(False))
    step = jax.jit(make_train_step(config, Compute(), optimizer, options, partition), donate_argnums=0)
    whole = optax.chain(optax.sgd(0.1), only(masks))
    all_state = TrainState(params, whole.init(params), jnp.int32(0), jnp.bool_(False))
    state, metrics = step(jax.tree.map(jnp.copy, state), batch, np.float32(0.1), frozen)
    all_state, all_metrics = jax.jit(make_train_step(config, Compute(), whole, options))(
        all_state, batch, np.float32(0.1)
    )
    after = jax.jit(partition.join)(state.params, frozen)

    def check(path, mask, old, new, want):
        old, new, want, mask = (np.broadcast_to(np.asarray(a), old.shape) for a in (old, new, want, mask))
        np.testing.assert_array_equal(new[~mask].view(np.uint32), old[~mask].view(np.uint32), err_msg=str(path))
        np.testing.assert_allclose(new[mask], want[mask], atol=1e-6)

    jax.tree_util.tree_map_with_path(check, masks, params, after, all_state.params)
    np.testing.assert_allclose(metrics["loss"], all_metrics["loss"], rtol=1e-6)
    assert np.flatnonzero(metrics["gradient_norm_layers"]).tolist() == [2]


def test_what_is_frozen_has_no_gradient_and_is_not_copied():
    """Temporary memory of a step that goes back through eight frozen layers: far less than they take."""
    config, plan = dataclasses.replace(LLAMA, num_layers=9, hidden_size=64, intermediate_size=512), plan_of("z00000000")
    shapes = abstract(config)[1]
    masks = trainable(plan, shapes, layers="copies")
    partition = Partition(config, Compute(), masks)
    trained, frozen = jax.eval_shape(partition.split, shapes)

    def loss(trained, frozen, tokens):
        return jnp.sum(partition.hidden(trained, frozen, tokens)[1])

    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(trained, frozen, tokens).compile().memory_analysis()
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert memory.output_size_in_bytes < 1.01 * size(trained) + 1000
    # A row of each stack in hand, its gradient, and little more.
    assert memory.temp_size_in_bytes < 3 * size(frozen["blocks"]) / 8


def test_what_repeats_is_one_program():
    masks = trainable(
        interleave("m", 30, range(5, 25), copies=2), {"blocks": {"x": np.zeros((70, 1))}}, layers="copies"
    )
    kinds = [(bool(m),) for m in masks["blocks"]["x"][:, 0]]
    f, t = (False,), (True,)
    assert _patterns(kinds) == [([(f, 6)], 1), ([(t, 2), (f, 1)], 19), ([(t, 2)], 1), ([(f, 5)], 1)]


def test_an_order_of_layers_beside_a_stack_is_refused():
    params = noisy(LLAMA)
    masks = trainable(plan_of("0" * LLAMA.num_layers), params, layers="0")
    partition = Partition(LLAMA, Compute(), masks)
    split = jax.jit(partition.split)(params)
    with pytest.raises(ValueError, match="own order"):
        partition.hidden(*split, jnp.asarray(tokens_for(LLAMA)), order=jnp.zeros(2, jnp.int32))
