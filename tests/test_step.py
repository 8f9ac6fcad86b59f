"""The training step: what it optimises does not depend on how the batch is cut or where it lies."""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxup.errors import UserError
from jaxup.experiments.common import read_settings
from jaxup.experiments.config import load, section
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import abstract, init
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import flops_per_token
from jaxup.targets import hlo
from jaxup.training import compiling
from jaxup.training import step as training_step
from jaxup.training.compiling import accepted, compiler_options, fewest_that_fit, fitting_step, memory
from jaxup.training.loss import cross_entropy, distillation
from jaxup.training.objective import Objective, Taught
from jaxup.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, updates_made
from jaxup.training.run import Run
from jaxup.training.sharding import (
    BATCH_AXES,
    MeshConfig,
    batch_sharding,
    check_batch,
    check_heads,
    check_host_memory,
    check_length,
    device_grid,
    local_rows,
    make_mesh,
    micro_batches,
    ordered,
    place_batch,
    state_shardings,
)
from jaxup.training.step import StepConfig, TrainState, gradient_norms, make_eval_step, make_train_step, skip_step

MODEL = ModelConfig.gpt2(vocab_size=64, hidden_size=16, num_layers=3, num_heads=4, max_positions=16, bias=True)
WIDE = ModelConfig.gpt2(vocab_size=64, hidden_size=24, num_layers=1, num_heads=4, max_positions=16, bias=True)
ROWS, SEQ = 16, 12
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, end_learning_rate=1e-3, schedule="constant", warmup_steps=0, decay_fraction=0.0,
    b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0,
)  # fmt: skip
RATE = np.float32(OPTIMIZER.learning_rate)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (ROWS, SEQ + 1)).astype(np.int32)
    # Uneven weights: a mean of micro-batch means would differ from the mean over all loss tokens.
    weights = (rng.random((ROWS, SEQ)) < rng.random((ROWS, 1))).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": weights}


initial = functools.cache(jax.jit(init, static_argnums=(0, 1)))  # step by step it is many programs


@functools.cache
def program(accumulation, compute=Compute()):  # noqa: B008 frozen
    optimizer = make_optimizer(OPTIMIZER)
    config = StepConfig(accumulation=accumulation, loss_chunk=5, z_loss=1e-3)
    return jax.jit(make_train_step(MODEL, compute, optimizer, config))


@functools.cache
def fresh():
    params = initial(MODEL, 0)
    state = TrainState(params, make_optimizer(OPTIMIZER).init(params), jnp.int32(0), jnp.bool_(False))
    return jax.device_get(state)  # of no mesh


def run(accumulation, steps=2, compute=Compute()):  # noqa: B008 frozen
    step = program(accumulation, compute)
    state = fresh()
    for i in range(steps):
        state, metrics = step(state, make_batch(i), RATE)
    return state, metrics


def assert_close(a, b, rtol=2e-5, atol=2e-6):
    # float32 sums in another order: a few parts in 1e7 a step, amplified where Adam divides by a small moment.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# In more of them the two tests below are as well.
@pytest.mark.parametrize("accumulation", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 16))])
def test_accumulation_does_not_change_the_gradient(accumulation):
    one, many = run(1, steps=1), run(accumulation, steps=1)
    # Adam's first moment after one step is (1 - b1) times the clipped gradient itself.
    assert_close(one[0].opt_state[1].mu, many[0].opt_state[1].mu, rtol=1e-5, atol=1e-7)
    assert_close(one[1], many[1])


def test_a_teacher_is_an_argument_of_the_step_and_changes_what_is_optimised_alone():
    """The same in micro-batches; its logits come from what is passed, and the plain loss is the student's own."""
    optimizer, teacher = make_optimizer(OPTIMIZER), Taught(model=WIDE, alpha=0.6, temperature=2.0)
    configs = [StepConfig(accumulation=count, loss_chunk=5, z_loss=1e-3) for count in (1, 4)]
    step = functools.partial(make_train_step, MODEL, Compute(), optimizer, objective=teacher)
    whole, cut = (jax.jit(step(config)) for config in configs)
    known = initial(WIDE, 1)
    (first, one), (second, two) = (step(fresh(), make_batch(), RATE, known) for step in (whole, cut))
    _, surer = whole(fresh(), make_batch(), RATE, jax.tree.map(lambda a: 5 * a, known))
    assert_close(first.opt_state[1].mu, second.opt_state[1].mu, rtol=1e-5, atol=1e-7)
    assert_close(one, two)
    plain = run(1, steps=1)[1]
    np.testing.assert_allclose([one["loss"], surer["loss"]], plain["loss"], rtol=1e-6)
    assert len({float(m["loss_with_z"]) for m in (one, surer, plain)}) == 3


@dataclasses.dataclass(frozen=True)
class TextAndHidden(Objective):
    """The mean cross-entropy, and so many times the mean square of what the head is applied to, where that counts."""

    share: float

    def weighed(self, batch):
        whole = {name: batch[name] / jnp.sum(batch[name]) for name in ("loss_weights", "value_weights")}
        return batch | whole, jnp.float32(1)

    def sums(self, decoder, hidden, batch, how, *teacher):
        x_BSD = hidden(batch["tokens"])
        targets, weights_BS = (batch["targets"], batch["loss_weights"]), batch["value_weights"]
        loss, text = cross_entropy(x_BSD, decoder.head_kernel(), *targets, **how)
        values = jnp.sum(weights_BS * jnp.mean(jnp.square(x_BSD - batch["values"]), axis=-1))
        counts = jnp.sum(batch["loss_weights"]), jnp.sum(weights_BS)
        return loss + self.share * values, {"text": (text, counts[0]), "values": (values, counts[1])}

    def mean(self, sums):
        text, values = (total / count for total, count in sums.values())
        return text + self.share * values


def test_an_objective_of_two_means_does_not_depend_on_micro_batches():
    """Nor does one of its two parts on how much there is of the other; both are reported."""
    rng = np.random.default_rng(5)
    batch = make_batch() | {"values": rng.standard_normal((ROWS, SEQ, 16), np.float32)}
    batch["value_weights"] = (rng.random((ROWS, SEQ)) < rng.random((ROWS, 1)) ** 4).astype(np.float32)
    objective, how = TextAndHidden(0.5), {"loss_chunk": 5, "z_loss": 0.0}
    step = functools.partial(make_train_step, MODEL, Compute(), optax.sgd(1.0), objective=objective)
    params = initial(MODEL, 0)
    state = TrainState(params, optax.sgd(1.0).init(params), jnp.int32(0), jnp.bool_(False))
    (one, whole), (many, cut) = (
        jax.jit(step(StepConfig(accumulation=count, **how)))(state, batch, RATE) for count in (1, 8)
    )
    # A parameter of about 0.02 to 1 less its gradient: sums in another order, and a subtraction.
    assert_close(one.params, many.params, rtol=1e-5, atol=2e-7)
    assert_close(whole, cut)
    sums = jax.jit(make_eval_step(MODEL, Compute(), StepConfig(accumulation=1, **how), objective=objective))
    found = {name: total / count for name, (total, count) in sums(params, batch).items()}
    assert_close(whole["means"], found)
    np.testing.assert_allclose(whole["loss"], found["text"] + 0.5 * found["values"], rtol=1e-6)
    np.testing.assert_allclose(whole["loss"], objective.mean(jax.device_get(sums(params, batch))), rtol=1e-6)
    assert whole["loss_tokens"] == batch["loss_weights"].sum()
    with pytest.raises(UserError, match=r"^step\.noise_scale=True: measures micro-batches, and of these"):
        step(StepConfig(accumulation=2, noise_scale=True, **how))


@pytest.mark.parametrize("mesh_config", [pytest.param(None, marks=pytest.mark.slow), (2, 4)])
def test_norms_of_micro_batches_by_hand(mesh_config):
    """Each of 4 has 4 rows: strided ones, and where a device sums over its own those of its half."""
    accumulation, placed = (4 if mesh_config is None else 2), make_batch()
    optimizer = make_optimizer(dataclasses.replace(OPTIMIZER, clip_norm=1e-3))
    config = StepConfig(accumulation=accumulation, loss_chunk=5, z_loss=1e-3, noise_scale=True)
    step, compute = functools.partial(make_train_step, MODEL, optimizer=optimizer), Compute(batch_axes=BATCH_AXES)
    with contextlib.ExitStack() as stack:
        if mesh_config:
            mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp"), mesh_config)), tensor=1))
            stack.enter_context(jax.set_mesh(mesh))
            placed = place_batch(placed, ROWS, mesh)
        _, metrics = jax.jit(step(compute=compute, config=config))(fresh(), placed, RATE)
    alone = jax.jit(step(compute=Compute(), config=dataclasses.replace(config, accumulation=1, noise_scale=False)))
    rows = np.arange(ROWS).reshape(*((4, 4) if mesh_config is None else (2, 4, 2))).swapaxes(-1, -2).reshape(4, 4)
    state, each = fresh(), []
    for micro in rows:
        after, of = alone(state, {key: value[micro] for key, value in make_batch().items()}, RATE)
        each.append(float(of["gradient_norm"]))
        # It is the norm before clipping; the moment is of the clipped gradient.
        np.testing.assert_allclose(optax.tree.norm(after.opt_state[1].mu), 1e-3 * (1 - OPTIMIZER.b1), rtol=1e-5)
    assert min(each) > 0.1
    np.testing.assert_allclose(metrics["gradient_square_micro"], np.mean(np.square(each)), rtol=1e-5)
    assert metrics["micro_rows"] == 4
    assert metrics["gradient_square_micro"] > metrics["gradient_norm"] ** 2  # by the noise


@pytest.mark.parametrize(
    "mesh_config",
    [
        (2, 2, 2),
        (2, 4, 1),
        (1, 2, 2, 2),
        # Their axes are among those above, two or three at a time.
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
        pytest.param((1, 2, 4), marks=pytest.mark.slow),
        pytest.param((4, 1, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_mesh_does_not_change_the_step(mesh_config, capfd):
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor", "context"), mesh_config))))
    compute = Compute(batch_axes=BATCH_AXES)
    optimizer = make_optimizer(OPTIMIZER)
    params = param_shardings(MODEL, mesh)
    state = fresh()
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = TrainState(params, state_shardings(optimizer, state.opt_state, params, mesh), replicated, replicated)
    with jax.set_mesh(mesh):
        step = jax.jit(
            make_train_step(MODEL, compute, optimizer, StepConfig(accumulation=2, loss_chunk=5, z_loss=1e-3)),
            out_shardings=(shardings, replicated),
        )
        state, before = jax.device_put(state, shardings), state
        # What the loss of text does not read, but others would: a number for each row, a vector for each position.
        batch = make_batch() | {
            "noise": np.arange(ROWS, dtype=np.uint32),
            "values": np.arange(ROWS * SEQ * 2).reshape(ROWS, SEQ, 2),
        }
        assert local_rows(ROWS, mesh) == slice(0, ROWS)
        placed = place_batch(batch, ROWS, mesh)
        assert placed["tokens"].sharding == batch_sharding(mesh)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), ordered(batch, mesh))
        rate = jax.device_put(RATE, replicated)
        step = step.lower(state, placed, rate).compile()
        state, metrics = step(state, placed, rate)
    data, *others = mesh_config
    if sum(size > 1 for size in others) <= 1:
        # Along data the gradients are summed once, not in each of the two micro-batches: in float32, of what a device
        # keeps of the parameters. Besides them there are some sums of a few numbers.
        sizes = jax.tree.map(lambda p, s: math.prod(s.shard_shape(p.shape)) * 4, before.params, params)
        found = hlo.collectives(hlo.parse(step.as_text()), dict(mesh.shape))
        across = sum(c.bytes * c.times for c in found if "data" in c.axes)
        once = 2 * (data - 1) / data * sum(jax.tree.leaves(sizes))
        assert once <= across < once + 1000
    expected_state, expected_metrics = run(2, steps=1)
    assert_close(expected_state.opt_state[1].mu, state.opt_state[1].mu, rtol=1e-5, atol=1e-7)
    assert_close(expected_metrics, metrics)
    q = state.params["blocks"]["self_attn"]["q_proj"]["kernel"]
    hidden, heads = mesh.shape["fsdp"] * mesh.shape["context"], mesh.shape["tensor"]
    assert q.sharding.shard_shape(q.shape) == (3, 16 // hidden, 4 // heads, 4)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err  # XLA's warning of a whole copy on each


@pytest.mark.slow
@pytest.mark.parametrize("mesh_config", [(8, 1, 1, 1), (4, 1, 1, 2), (2, 4, 1, 1), (4, 1, 2, 1)])
def test_sums_over_data_with_the_kernel_for_tpus(mesh_config):
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor", "context"), mesh_config))))
    compute, config = (
        Compute(batch_axes=BATCH_AXES, attention="splash"),
        StepConfig(accumulation=2, loss_chunk=5, z_loss=1e-3),
    )
    optimizer = make_optimizer(OPTIMIZER)
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(MODEL, compute, optimizer, config))
        _, metrics = step(fresh(), place_batch(make_batch(), ROWS, mesh), RATE)
    assert_close(run(2, steps=1)[1], metrics)


@pytest.mark.parametrize("taught", [False, True])
def test_no_chunk_of_the_loss_speaks_to_other_devices(taught):
    """Heads are gathered before the loop over chunks, and the gradient summed after it; each once."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=1))
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((ROWS, SEQ, 16), np.float32), rng.standard_normal((16, 64), np.float32)
    batch, how = make_batch(), {"chunk": 3, "z_loss": 1e-3}
    teacher = (x[..., :8] + 1, kernel[:8]) if taught else ()

    def loss(batch_axes, *heads_and_targets):
        function = functools.partial(distillation, alpha=0.6, temperature=2.0) if taught else cross_entropy
        return function(*heads_and_targets, **how, batch_axes=batch_axes)

    graded = jax.value_and_grad(loss, (1, 2), has_aux=True)
    inputs = (x, kernel, *teacher, batch["targets"], batch["loss_weights"])
    want = jax.jit(graded, static_argnums=0)((), *inputs)
    rows = batch_sharding(mesh)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(inputs, (rows, split, *[rows, split] * taught, rows, rows))
        program = jax.jit(graded, static_argnums=0).lower(BATCH_AXES, *placed).compile()
        got = program(*placed)
    assert_close(got, want)
    text = program.as_text()
    assert text.count(" all-gather(") == 1 + taught
    loops = re.findall(r"\bbody=%?([\w.-]+)", text)
    assert loops
    for name in loops:
        body = re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.M | re.S)[0]
        assert not re.search("all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all", body)


# ---- packed rows


def conversations():
    """Ids and what is trained, of lengths that fill two rows of 12 but for one place."""
    rng = np.random.default_rng(3)
    return [(rng.integers(0, 64, n).astype(np.int32), rng.random(n) < 0.6) for n in (5, 7, 4, 3, 4)]


def packed(groups, width):
    """One row for each group of conversations; the fields by their definition, a token at a time."""
    fields = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((len(groups), width), np.int32) for name in fields}
    batch["loss_weights"] = np.zeros((len(groups), width), np.float32)
    for row, group in enumerate(groups):
        at = 0
        for segment, (ids, trained) in enumerate(group, 1):
            for position, token in enumerate(ids):
                batch["tokens"][row, at], batch["positions"][row, at] = token, position
                batch["segment_ids"][row, at] = segment
                if position + 1 < len(ids):
                    batch["targets"][row, at] = ids[position + 1]
                    batch["loss_weights"][row, at] = trained[position + 1]
                at += 1
    return batch


ROPE = ModelConfig.llama(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, max_positions=16
)


def loss_and_gradient(model, params, batch):
    """The mean loss over the loss tokens, and its gradient, as one plain step of descent shows it."""
    step = make_train_step(model, Compute(), optax.sgd(1.0), StepConfig(accumulation=1, loss_chunk=5, z_loss=0.0))
    state = TrainState(params, optax.sgd(1.0).init(params), jnp.int32(0), jnp.bool_(False))
    state, metrics = step(state, batch, jnp.float32(RATE))
    return metrics["loss"], jax.tree.map(jnp.subtract, params, state.params)


@pytest.mark.parametrize("model", [MODEL, ROPE], ids=["learned positions", "rotary positions"])
def test_packed_rows_have_the_loss_and_gradient_of_rows_of_one_conversation(model):
    c, step = conversations(), jax.jit(functools.partial(loss_and_gradient, model, initial(model, 0)))
    # Three rows with nothing in them: one program for both batches.
    loss, gradient = step(packed([[c[0], c[1]], [c[2], c[3], c[4]], [], [], []], 12))
    want, want_gradient = step(packed([[one] for one in c], 12))
    # The same sums of float32 in another order; a subtraction of params of about 0.02 to 1 loses up to 6e-8.
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-7), gradient, want_gradient)


def test_no_gradient_flows_between_segments():
    """The loss of one conversation, and every token that only the other has."""
    first, second = np.arange(0, 5, dtype=np.int32), np.arange(10, 17, dtype=np.int32)
    # A head of its own: a tied one gives every token of the vocabulary a gradient.
    params = initial(ROPE, 0)
    graphdef, _ = abstract(ROPE)

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        logits = nnx.merge(graphdef, params)(
            batch["tokens"], positions_BS=batch["positions"], segment_ids_BS=batch["segment_ids"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["loss_weights"])

    for trained, other in ((first, second), (second, first)):
        group = [(ids, np.full(len(ids), ids is trained)) for ids in (first, second)]
        rows = np.abs(gradient(params, packed([group], 12))["embed_tokens"]).max(axis=1)
        assert (rows[trained[:-1]] > 0).all()  # the last token predicts nothing
        assert (rows[other] == 0).all()


def test_gradient_norms_per_layer():
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), initial(MODEL, 0))
    norm, layers = gradient_norms(grads)
    blocks = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads["blocks"])]
    expected = [np.sqrt(sum((g[layer] ** 2).sum() for g in blocks)) for layer in range(3)]
    np.testing.assert_allclose(layers, expected, rtol=1e-6)
    everything = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
    np.testing.assert_allclose(norm, np.sqrt(sum((g**2).sum() for g in everything)), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    step = program(2)
    state, _ = run(2, steps=1)
    batch = make_batch(1)
    batch["loss_weights"] = batch["loss_weights"] * np.float32(1)
    batch["loss_weights"][3, 4] = bad
    halted, metrics = step(state, batch, RATE)
    assert metrics["halted"]
    jax.tree.map(np.testing.assert_array_equal, tuple(state[:3]), tuple(halted[:3]))
    # The host looks one step late: the step dispatched meanwhile, on a good batch, changes nothing either.
    after, metrics = step(halted, make_batch(2), RATE)
    assert metrics["halted"]
    jax.tree.map(np.testing.assert_array_equal, tuple(state[:3]), tuple(after[:3]))


def test_bfloat16_compute_keeps_float32_state():
    state, metrics = run(1, compute=Compute(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    _, reference = run(1)
    # bfloat16 has 8 bits of mantissa: 2^-9 relative rounding, averaged over the tokens.
    np.testing.assert_allclose(metrics["loss"], reference["loss"], rtol=5e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: make_mesh(MeshConfig(data=3, fsdp=1, tensor=1)), "3 x 1 x 1 x 1 is not the 8 devices"),
        (lambda m: make_mesh(MeshConfig(data=-1, fsdp=-1, tensor=1)), "one of them -1"),
        (lambda m: check_batch("batch_size", 12, m), "batch_size=12 does not divide over data x fsdp = 8 devices; 16"),
        (lambda m: check_batch("batch_size", 8, m, 2), r"and 2 micro-batches; 16 would, or step.accumulation=1 \(0 ="),
        (lambda m: check_batch("batch_size", 96, m, 8), "and 8 micro-batches; 128 would, or step.accumulation=6 "),
        (lambda m: check_batch("batch_size", 12, m, 0), "does not divide over data x fsdp = 8 devices; 16 would$"),
        (lambda m: check_length("data.seq_len", 100, make_mesh(MeshConfig(data=2, fsdp=1, context=4, tensor=1))),
         r"^data\.seq_len=100 does not divide into two chunks for each of mesh\.context=4 devices; 104 would$"),
        (lambda m: check_heads(GROUPED, make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))), "^6 attention heads do not "
         r"divide over mesh\.tensor=8; 2 would$"),
    ],
)  # fmt: skip
def test_mesh_refusals(call, message):
    with pytest.raises(UserError, match=message):
        call(make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1)))


class Refused:
    """A step that a compiler has no memory for."""

    def lower(self, *_):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.30G of 15.75G"
        )


def test_a_step_is_cut_into_the_fewest_micro_batches_that_fit(monkeypatch):
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    assert micro_batches(96, mesh) == [1, 2, 3, 4, 6, 12]
    assert micro_batches(100, mesh) == []
    made = []

    @functools.cache
    def make(count):
        made.append(count)
        wide = lambda rows: jnp.sum(jnp.sin(rows @ jnp.ones((8, 512))) @ jnp.ones((512, 8)))  # noqa: E731
        return jax.jit(lambda x: jnp.sum(jax.lax.map(wide, x.reshape(count, -1, 8))))

    inputs = [jax.ShapeDtypeStruct((96, 8), jnp.float32)]
    needs = {count: compiling._needs(make(count).lower(*inputs).compile()).total for count in (1, 2, 3, 4, 6, 12)}
    assert needs[1] > needs[2] > needs[6]

    def fewest(room, make=make):
        make.cache_clear()
        made.clear()
        monkeypatch.setattr(compiling, "_room", lambda _: room)
        return fewest_that_fit(make, micro_batches(96, mesh), inputs, mesh)

    count, step = fewest(math.inf)
    assert (count, made) == (1, [1])
    x = np.linspace(0, 1, 96 * 8, dtype=np.float32).reshape(96, 8)
    np.testing.assert_allclose(step(x), 4096 * jnp.sum(jnp.sin(jnp.sum(x, 1))), rtol=1e-5)
    # What the first program needs says that half of it does not fit either: it is not compiled.
    assert fewest(needs[6])[0] == 6
    assert 2 not in made
    with pytest.raises(UserError, match="not enough memory for a step, not even in 12 micro-batches; use more devices"):
        fewest(1)
    # Where the compiler is who refuses.
    refusing = functools.cache(lambda count: make(count) if count >= 4 else Refused())
    assert fewest(math.inf, refusing)[0] == 4
    refusal = r"^step.accumulation=2: .*Used 18.30G of 15.75G; more micro-batches take less"
    with pytest.raises(UserError, match=refusal), memory(StepConfig(accumulation=2, loss_chunk=1, z_loss=0.0)):
        Refused().compile()


def test_a_run_that_resumes_on_such_devices_takes_as_many_micro_batches(tmp_path, monkeypatch, capsys):
    mesh, tried = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1)), []
    (tmp_path / "checkpoints" / "model").mkdir(parents=True)

    def third(make, counts, inputs, mesh):
        tried.append(counts)
        return counts[2], make

    monkeypatch.setattr(compiling, "fewest_that_fit", third)
    for compute in (Compute(), Compute(), Compute(remat="full")):
        run = mock.Mock(spec=Run, directory=tmp_path, mesh=mesh, processes=mock.MagicMock())
        run.settings = mock.Mock(batch_size=96, compute=compute)
        fitting_step(run, "model", lambda count: count, ())
    assert tried == [[1, 2, 3, 4, 6, 12], [3, 4, 6, 12], [1, 2, 3, 4, 6, 12]]
    assert "model: the 96 rows of a step in 6 micro-batches of 16\n" in capsys.readouterr().out


def test_pod_configurations_start_on_pods():
    """Of as many devices as a pod has, by their shape alone."""
    for name, devices in itertools.product(("heal.py", "heal_tunguska.py", "inherit_gpt2.py:medium"), (16, 32, 64)):
        c = load(name, shipped=True)
        settings = read_settings(c)
        assert settings.step.accumulation == 0
        mesh = make_mesh(section(MeshConfig, c.mesh), [Chip(n, 0) for n in range(devices)])
        check_batch("batch_size", settings.batch_size, mesh, settings.step.accumulation)
        check_batch("eval.batch_size", settings.eval_batch_size, mesh)
        assert micro_batches(settings.batch_size, mesh)[0] == 1


def test_devices_whose_host_has_no_memory_for_them_are_refused():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    check_host_memory(Compute(remat="offload"), mesh)
    device = mock.Mock(platform="gpu", device_kind="old", **{"addressable_memories.return_value": []})
    without = mock.Mock(spec=jax.sharding.Mesh, devices=np.array([device]), local_devices=[device])
    check_host_memory(Compute(remat="full"), without)
    with pytest.raises(UserError, match=r"^compute.remat=offload: old cannot put .* of its host; full "):
        check_host_memory(Compute(remat="offload"), without)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a layout asks of a device."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize(
    ("sizes", "slices", "apart"),  # along which axes neighbours are in two slices
    [((4, 2, 1), 2, (0,)), ((2, 2, 2), 2, (0,)), ((2, 4, 1), 4, (0, 1)), ((1, 8, 1), 2, (1,)), ((2, 2, 2), 1, ())],
)
def test_slices_are_apart_along_data_before_fsdp(sizes, slices, apart):
    chips = [Chip(n, n % slices) for n in range(8)]
    grid = device_grid(sizes, chips)
    assert grid.shape == sizes
    assert {chip.id for chip in grid.flat} == set(range(8))
    index = np.array([grid[at].slice_index for at in np.ndindex(sizes)]).reshape(sizes)
    assert tuple(axis for axis in range(3) if np.diff(index, axis=axis).any()) == apart


def test_slices_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="does not divide over the 4 slices that these devices are in; data=4 would"):
        device_grid((2, 1, 4), [Chip(n, n % 4) for n in range(8)])


def test_an_option_that_a_compiler_does_not_take_is_left_out_with_a_line(capsys):
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    assert compiler_options(mesh) == {}  # those are for TPUs
    known = {"xla_cpu_enable_fast_math": False}
    assert accepted(mesh, {"xla_of_another_version": True} | known) == known
    assert "does not take the option xla_of_another_version" in capsys.readouterr().err


GROUPED = ModelConfig.llama(
    vocab_size=50, hidden_size=12, intermediate_size=8, num_layers=1, num_heads=6, num_kv_heads=1, max_positions=8
)


def test_what_a_mesh_does_not_split_is_said():
    """One head of keys and values is as few as there can be: it is on each device, and the six of queries are split."""
    meshes = [MeshConfig(data=-1, fsdp=f, tensor=t) for f, t in ((1, 1), (4, 2), (8, 1))]
    assert [check_heads(GROUPED, make_mesh(mesh)) for mesh in meshes] == [
        "",
        "mesh: held whole by each device, as it does not divide: key/value heads 1 over tensor=2",
        "mesh: held whole by each device, as it does not divide: hidden size 12 over fsdp=8",
    ]


def test_flops_count_the_matrix_products():
    # By hand: 6 x weights of every product plus causal attention at half.
    per_layer = 16 * 16 * 4 + 2 * 16 * 64
    expected = 6 * (3 * per_layer + 16 * 64) + 3 * 12 * 16 * 12 / 2
    assert flops_per_token(MODEL, 12) == expected
    gated = dataclasses.replace(MODEL, gated_mlp=True)
    assert flops_per_token(gated, 12) == expected + 6 * 3 * 16 * 64


# ---- steps that are left out


def steps_of(gradients, config, monkeypatch):
    """Two numbers trained on a loss whose gradient is what the batch says; (states, metrics) after each step."""
    monkeypatch.setattr(
        training_step,
        "_make_loss",
        lambda *_: lambda params, batch: (jnp.sum(params["w"] * batch["g"]), {"text": (jnp.float32(1),) * 2}),
    )
    settings = dataclasses.replace(OPTIMIZER, schedule="linear", clip_norm=0.0)
    optimizer, schedule = make_optimizer(settings), learning_rate(settings, 20)
    step = jax.jit(make_train_step(MODEL, Compute(), optimizer, config))
    params = {"w": jnp.array([1.0, -2.0])}
    ema = dict(params) if config.ema else None
    states = [TrainState(params, optimizer.init(params), jnp.int32(0), jnp.bool_(False), config.spikes(), ema)]
    metrics = []
    for g in gradients:
        rate = jnp.float32(schedule(updates_made(states[-1].opt_state)))
        state, found = step(states[-1], {"g": jnp.asarray(g, jnp.float32), "loss_weights": jnp.ones(1)}, rate)
        states.append(state)
        metrics.append(found)
    return states, metrics


def test_a_spike_is_a_norm_beyond_so_many_times_the_median(monkeypatch):
    """Against the rule in NumPy, through spikes in a row, one before the window is full, and a change that stays."""
    window, factor = 5, 3.0
    rng = np.random.default_rng(0)
    sizes = [1, 9, 1, 1, 1, 1, 10, 1, 10, 10, 1, 1, *[8] * 8]
    gradients = np.array(sizes)[:, None] * rng.uniform(0.9, 1.1, (len(sizes), 2)).astype(np.float32)
    config = StepConfig(accumulation=1, loss_chunk=1, z_loss=0.0, spike_factor=factor, spike_window=window)
    states, metrics = steps_of(gradients, config, monkeypatch)
    norms = np.linalg.norm(gradients, axis=1)
    expected = [n >= window and norms[n] > factor * np.median(norms[n - window : n]) for n in range(len(norms))]
    assert [bool(m["skipped"]) for m in metrics] == expected
    assert [n for n, skipped in enumerate(expected) if skipped] == [6, 8, 9, 12]
    assert states[-1].spikes.skipped == 4
    taken = [n for n, skipped in enumerate(expected) if not skipped]
    for n, (before, after) in enumerate(itertools.pairwise(states)):
        assert after.step == after.opt_state[-1].count == n + 1  # the schedule goes on
        assert (np.asarray(before.params["w"]) != after.params["w"]).all() == (n in taken)
    assert states[-1].opt_state[1].count == len(taken)  # and Adam's does not
    # Without the option the program has nothing of it, and the steps that are taken before a spike are the same bits.
    plain, _ = steps_of(gradients, dataclasses.replace(config, spike_factor=0.0), monkeypatch)
    assert plain[0].spikes is None
    np.testing.assert_array_equal(plain[6].params["w"], states[6].params["w"])


def test_averages_are_those_of_the_updates_that_are_made(monkeypatch):
    """Against a plain loop: not of a step with a spike, nor of one that is not finite, after which there is none."""
    gradients = np.random.default_rng(1).uniform(0.9, 1.1, (9, 2)).astype(np.float32)
    gradients[5] *= 100
    gradients[7] = np.nan
    config = StepConfig(accumulation=1, loss_chunk=1, z_loss=0.0, spike_factor=3.0, spike_window=3, ema=0.9)
    states, metrics = steps_of(gradients, config, monkeypatch)
    assert [bool(m["skipped"]) for m in metrics] == [n == 5 for n in range(9)]
    assert [bool(m["halted"]) for m in metrics] == [n >= 7 for n in range(9)]
    wanted = np.asarray(states[0].params["w"], np.float64)
    for number, state in enumerate(states[1:]):
        if number not in (5, 7, 8):
            wanted = 0.9 * wanted + 0.1 * np.asarray(state.params["w"], np.float64)
        # Each update rounds twice, numbers of up to 2.
        np.testing.assert_allclose(state.averaged["w"], wanted, atol=9 * 2 * 2**-23)
    np.testing.assert_array_equal(states[7].averaged["w"], states[9].averaged["w"])
    # What trains does not know of them.
    plain, _ = steps_of(gradients, dataclasses.replace(config, ema=0.0), monkeypatch)
    np.testing.assert_array_equal(plain[-1].averaged["w"], states[-1].params["w"])
    for ema in (1.0, -0.1, math.nan):
        with pytest.raises(UserError, match=f"^step\\.ema={ema}: must be a decay from 0"):
            dataclasses.replace(config, ema=ema)


def test_a_step_left_out_moves_the_schedule_alone():
    state = fresh()
    after = skip_step(state)
    assert (after.step, after.opt_state[-1].count, after.opt_state[1].count) == (1, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state[1]), (after.params, after.opt_state[1]))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # which is what it is about
def test_an_update_that_is_not_finite_is_not_made(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "OPTIMIZER", dataclasses.replace(OPTIMIZER, learning_rate=1e39))
    config = StepConfig(accumulation=1, loss_chunk=1, z_loss=0.0)
    states, metrics = steps_of(np.ones((2, 2)), config, monkeypatch)
    assert np.isfinite(metrics[0]["loss"])
    assert np.isfinite(metrics[0]["gradient_norm"])
    assert metrics[0]["halted"]
    jax.tree.map(np.testing.assert_array_equal, states[0][:3], states[2][:3])
