"""What continuous tokens are trained and drawn by, through a tiny decoder: each layout with heads that go with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxup.continuous.drawing import draw, tell
from jaxup.continuous.examples import Example
from jaxup.continuous.heads import Cosine, Flow, Gaussian, Head
from jaxup.continuous.layouts import MASK, Frames, Raster, Scales, Sets
from jaxup.continuous.nets import MLP, Spatial, linear
from jaxup.continuous.task import Task
from jaxup.errors import UserError
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Decoder
from jaxup.model.spec import spec, unflatten
from jaxup.training.step import StepConfig, TrainState, make_train_step

BASE = ModelConfig.llama(
    vocab_size=11, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, max_positions=99
)
SMALL = ModelConfig.llama(
    vocab_size=1, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=2, max_positions=99,
    tie_embeddings=True,
)  # fmt: skip
GRID = {"rows": 4, "columns": 4, "channels": 3, "length": 56, "drop": 0.5}
GAUSSIAN = Gaussian(channels=3, least_deviation=0.01)
FLOW = Flow(channels=3, net=MLP(width=8, depth=1), draws=1, times="uniform", stages=1)
TASKS = {
    "raster": Task(layout=Raster(**GRID), head=GAUSSIAN),
    "cosine": Task(layout=Raster(**GRID, see=True), head=Cosine(channels=3)),
    "scales": Task(layout=Scales(**GRID, scales=(1, 4)), head=FLOW),
    "stages": Task(
        layout=Scales(**GRID, scales=(1, 2, 4)),
        head=Flow(channels=3, net=Spatial(width=8, depth=1, heads=2), draws=1, times="uniform", stages=3),
    ),
    "frames": Task(layout=Frames(**GRID, frames=3), head=GAUSSIAN, text=0.0),
    "nova": Task(layout=Frames(**GRID, frames=3, sets=True), head=FLOW, spatial=SMALL, rank=2, text=0.0),
    "sets": Task(layout=Sets(**GRID), head=FLOW),
}  # fmt: skip
HOW = {"chunk": 64, "z_loss": 0.0}
DRAWN = {"seed": 5, "head_steps": 3, "sets": 4, "temperature": 1.0}


def decoder_of(task, seed=0):
    """Random values for all parameters: what begins as zeros would hide what it is multiplied by."""
    config = dataclasses.replace(BASE, beside=task.beside(BASE))
    rng = np.random.default_rng(seed)
    leaves = {
        path: (param.fill + rng.normal(0, 0.15, param.shape)).astype(np.float32) for path, param in spec(config).items()
    }
    return Decoder(config, jax.tree.map(jnp.asarray, unflatten(leaves)))


@functools.cache
def made(name):
    return TASKS[name], decoder_of(TASKS[name])


def example(layout, kind="draw", *, seed=0, prompt=(5, 6, 7), answer=()):
    values = np.random.default_rng(seed).normal(size=layout.shape).astype(np.float32)
    ids = {name: np.asarray(given, np.int32) for name, given in (("prompt", prompt), ("answer", answer))}
    return Example(kind=kind, values=None if kind == "text" else values, **ids)


@functools.cache
def said(name):
    """Jitted: (loss, sums, what is said where values are predicted [B, M, D or E]) of a batch."""
    task, decoder = made(name)
    found = {}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Heard(type(task.head)):
        def loss(self, params, z_BSD, *args, **how):
            found["z"] = z_BSD
            return super().loss(params, z_BSD, *args, **how)

    heard = dataclasses.replace(
        task, head=Heard(**{f.name: getattr(task.head, f.name) for f in dataclasses.fields(task.head)})
    )

    @jax.jit
    def run(batch):
        batch, count = heard.weighed(batch)
        loss, sums = heard.sums(decoder, decoder.hidden, batch, HOW)
        return loss / count, sums, found["z"]

    return run


def some(names):
    """All tasks, of which only these are among the default tests: each is a program of its own."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]


@pytest.mark.parametrize("name", some(["raster", "stages"]))
def test_what_a_step_says_does_not_depend_on_what_it_predicts(name):
    task, _ = made(name)
    layout = task.layout
    own = example(layout)
    values = own.values.copy()
    token = (-1, 5) if layout.frames else (5,)
    values[token] += 1
    if isinstance(layout, Scales):  # the coarser maps stay what they are
        values[4] -= 1
    both = [own, dataclasses.replace(own, values=values)]
    # Of sets the changed value is fed in some draws, and predicted in most.
    batches = (layout.pack(both, [draw, draw]) for draw in range(9))
    batch = next(b for b in batches if (b["value_weights"][0] * np.ptp(b["value_targets"], 0).any(-1)).any())
    loss, sums, z_BMD = jax.device_get(said(name)(batch))
    target, weight = batch["value_targets"], batch["value_weights"]
    steps = batch.get("steps", np.arange(layout.length, dtype=np.int32)[None].repeat(2, 0))
    changed = (target[0] != target[1]).any(-1) & (weight[0] > 0)
    assert changed.any()
    steps_M = steps[0][batch["spots"][0]]
    before = (steps_M <= steps_M[changed].min()) & (weight[0] > 0)
    np.testing.assert_array_equal(z_BMD[0][before], z_BMD[1][before])
    # And it does depend on what came before.
    other = layout.pack([own, example(layout, seed=1)], [3, 3])
    moved = np.abs(np.subtract(*jax.device_get(said(name)(other))[2])).max(-1) > 0
    assert (
        moved[(steps_M > steps_M.min()) & (weight[0] > 0)].all() if len({*steps_M}) > 1 else moved[weight[0] > 0].all()
    )
    # The loss is the sum of the two means, each over the whole batch.
    means = {each: total / max(count, 1) for each, (total, count) in sums.items()}
    assert np.isclose(loss, sum(means.values()), rtol=1e-5)
    assert np.isclose(task.mean({k: (float(a), float(b)) for k, (a, b) in sums.items()}), loss, rtol=1e-5)


@pytest.mark.slow
def test_micro_batches_add_up_to_the_loss_of_the_batch():
    task, decoder = made("raster")
    layout = task.layout
    examples = [example(layout), example(layout, "tell", answer=(1, 2)), example(layout, "text", answer=(3,) * 9)]
    examples.append(example(layout, seed=3))
    batch = jax.tree.map(jnp.asarray, layout.pack(examples, range(4)))
    whole, _ = task.weighed(batch)
    losses = [
        float(task.sums(decoder, decoder.hidden, {k: v[rows] for k, v in whole.items()}, HOW)[0])
        for rows in (slice(0, 4), slice(0, 4, 2), slice(1, 4, 2))
    ]
    assert np.isclose(losses[0], losses[1] + losses[2], rtol=1e-5)


@pytest.mark.parametrize("guidance", [3.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", some(["nova"]))
def test_drawing_by_the_cache_is_drawing_without(name, guidance):
    task, decoder = made(name)
    prompts = [[5, 6, 7], [1], []]
    how = DRAWN | {"guidance": guidance}
    one, two = (draw(decoder, task, prompts, cached=cached, **how) for cached in (True, False))
    assert one.shape == (3, *task.layout.shape)
    assert np.isfinite(one).all()
    assert one.std() > 0.1
    # Sums in another order: some dozens of roundings of 6e-8, where no step of these weights makes much of the last's.
    np.testing.assert_allclose(one, two, rtol=0, atol=2e-5)
    # In the same program a row is what it is alone, to the bit.
    other = draw(decoder, task, [prompts[0], [2, 2, 2], [9]], **how)
    np.testing.assert_array_equal(other[0], one[0])
    assert (other[1] != one[1]).any()


@pytest.mark.parametrize("name", ["raster", pytest.param("frames", marks=pytest.mark.slow)])
def test_what_is_drawn_is_what_training_would_predict(name):
    """Without noise: each value is the mean that the head has, where the values before it are those drawn."""
    task, decoder = made(name)
    how = DRAWN | {"temperature": 0.0, "guidance": 1.0}
    prompts = [[5, 6, 7], [1]]
    drawn = draw(decoder, task, prompts, **how)
    empty = np.asarray([], np.int32)
    examples = [
        Example(kind="draw", prompt=np.asarray(prompt, np.int32), values=values, answer=empty)
        for prompt, values in zip(prompts, drawn)
    ]
    layout = dataclasses.replace(task.layout, drop=0.0)
    z_BMD = said(name)(layout.pack(examples, [0, 1]))[2]
    mean = task.head.sample(
        decoder.beside["head"], z_BMD, jax.random.split(jax.random.key(0), 2), steps=1, temperature=0.0, guidance=1
    )
    np.testing.assert_allclose(np.asarray(mean).reshape(drawn.shape), drawn, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_guidance_of_nearly_one_is_nearly_none():
    task, decoder = made("nova")
    prompts = [[5, 6, 7], [1], []]
    plain, near = (draw(decoder, task, prompts, **DRAWN, guidance=guidance) for guidance in (1.0, 1 + 1e-6))
    np.testing.assert_allclose(plain, near, rtol=0, atol=1e-4)  # differences of up to 10, times 1e-6


@pytest.mark.slow
def test_more_rows_than_are_drawn_at_once():
    task, decoder = made("raster")
    prompts = [[5, 6, 7], [1], [], [2, 3], [4]]
    whole = draw(decoder, task, prompts, **DRAWN, guidance=1.0)
    np.testing.assert_allclose(
        draw(decoder, task, prompts, batch=3, **DRAWN, guidance=1.0), whole, rtol=1e-4, atol=1e-4
    )


def test_what_is_told_is_what_training_would_predict():
    task, decoder = made("raster")
    layout = task.layout
    prompts, values = [[5, 6], [7]], np.stack([example(layout, seed=seed).values for seed in (1, 2)])
    told = tell(decoder, task, values, prompts, max_tokens=3)
    assert [len(text) for text in told] == [3, 3]
    examples = [
        Example(kind="tell", prompt=np.asarray(prompt, np.int32), values=each, answer=np.asarray(text, np.int32))
        for prompt, each, text in zip(prompts, values, told)
    ]
    batch = jax.tree.map(jnp.asarray, layout.pack(examples, [0, 1]))

    @jax.jit
    def best_of(batch):
        fed = {"values_BMC": batch["values"], "fed_BS": batch["fed"], "vectors_BS": batch["vectors"]}
        inputs = task.inputs(decoder.beside, jnp.float32, **fed, places_BS=batch["places"])
        return jnp.argmax(decoder.logits(decoder.hidden(batch["tokens"], inputs_BSD=inputs)), -1)

    best = np.asarray(best_of(batch))
    learned = batch["loss_weights"] > 0
    assert (best[learned] == batch["targets"][learned]).all()
    assert tell(decoder, task, values, prompts, max_tokens=3, eos_ids={told[0][0]})[0] == []


def test_a_clip_begins_as_the_first_decoder_says_and_goes_on_scaled_and_shifted():
    task, decoder = made("nova")
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 16)), jnp.float32)
    told = jax.jit(task.told)(decoder.beside, z, z[:, :1])
    np.testing.assert_array_equal(told[:, 0], z[:, 0])
    between, flat = decoder.beside["between"], jax.nn.silu(z[:, 2])
    scale, shift = jnp.split(linear(between["wide"], linear(between["narrow"], flat)), 2, -1)
    np.testing.assert_allclose(told[:, 2], (1 + scale) * z[:, 0] + shift, rtol=1e-5, atol=1e-5)
    plain = dataclasses.replace(task, shift=False)
    np.testing.assert_array_equal(plain.told(decoder.beside, z, z[:, :1]), z)
    assert not any("between.wide" in param.path for param in plain.beside(BASE))
    begun = {param.path: param for param in task.beside(BASE)}["between.wide.kernel"]
    assert begun.std == 0
    assert begun.fill == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coin(Head):
    """Draws 1 or -1: by a coin where z says nothing, else the opposite of its sign."""

    def table(self, hidden):
        return ()

    def loss(self, *args, **how):
        raise AssertionError

    def sample(self, params, z_BSD, key_B, *, steps, temperature, guidance, start_BSC=None, stage=0, map_BS=None):
        coin = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (z_BSD.shape[1],)))(key_B)
        said = z_BSD[..., 0]
        return jnp.where(jnp.abs(said) < 1e-3, jnp.where(coin, 1.0, -1.0), -jnp.sign(said))[..., None]

    def flops(self, hidden, tokens):
        return 0.0


def test_of_a_pair_that_must_differ_half_is_valid_at_once_and_all_in_two_sets():
    """By hand: attention adds the mean of what is fed, and what is fed of a value is its sign; of a mask nothing."""
    base = ModelConfig.llama(
        vocab_size=2, hidden_size=4, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1, max_positions=9
    )
    task = Task(layout=Sets(rows=1, columns=2, channels=1, length=4), head=Coin(channels=1), text=0.0)
    config = dataclasses.replace(base, beside=task.beside(base))
    leaves = {path: np.full(param.shape, param.fill, np.float32) for path, param in spec(config).items()}
    eye = np.eye(4, dtype=np.float32)
    leaves["blocks.self_attn.v_proj.kernel"] = eye.reshape(1, 4, 1, 4)
    leaves["blocks.self_attn.o_proj.kernel"] = eye.reshape(1, 1, 4, 4)
    # gelu(x) - gelu(-x) = x.
    leaves["beside.connector.up.kernel"][:] = [[1, -1, 0, 0]]
    leaves["beside.connector.down.kernel"][:2, 0] = [1, -1]
    leaves["beside.vectors"][MASK, 1] = 1
    decoder = Decoder(config, jax.tree.map(jnp.asarray, unflatten(leaves)))
    share = {}
    for sets in (1, 2):
        drawn = draw(
            decoder, task, [[1]] * 400, seed=0, head_steps=1, sets=sets, schedule="mar", temperature=1.0, guidance=1.0,
            batch=400,
        )  # fmt: skip
        assert set(np.unique(drawn)) == {-1.0, 1.0}
        share[sets] = (drawn[:, 0] != drawn[:, 1]).mean()
    # 400 coins: a deviation of .025.
    assert share[2] == 1
    assert abs(share[1] - 0.5) < 0.1


def test_training_lowers_both_losses():
    layout = Raster(rows=2, columns=2, channels=3, length=12, see=True)
    task = Task(layout=layout, head=Gaussian(channels=3, least_deviation=0.1))
    decoder = decoder_of(task)
    batch = layout.pack(
        [example(layout, kind, seed=seed, prompt=(seed,), answer=(seed + 4, 1) if kind == "tell" else ())
         for seed in range(4) for kind in ("draw", "tell")], range(8),
    )  # fmt: skip
    optimizer = optax.adam(0.02)
    how = StepConfig(accumulation=2, loss_chunk=12, z_loss=0.0)
    step = jax.jit(make_train_step(decoder.config, Compute(), optimizer, how, objective=task))
    state = TrainState(decoder.params, optimizer.init(decoder.params), jnp.int32(0), jnp.bool_(False))
    logged = []
    for _ in range(60):
        state, metrics = step(state, batch, jnp.float32(0.02))
        logged.append(jax.device_get(metrics["means"]))
    assert not state.halted
    assert logged[-1]["text"] < logged[0]["text"] / 10
    assert logged[-1]["values"] < logged[0]["values"] - 1


def task_with(name="raster", **changed):
    return lambda: dataclasses.replace(TASKS[name], **changed)


@pytest.mark.parametrize(("make", "message"), [
    (task_with(head=dataclasses.replace(GAUSSIAN, channels=4)), "layout 'raster': the head has 4 channels, the tokens"),
    (task_with(head=TASKS["stages"].head), "sees whole maps, and here a part of one is drawn at once; net 'mlp'"),
    (task_with(head=dataclasses.replace(FLOW, stages=3)), "a flow of 3 stages goes with layout 'scales'; stages=1"),
    (task_with("scales", head=dataclasses.replace(FLOW, stages=2)), "each twice the one before, not (1, 4)"),
    (task_with("stages", head=dataclasses.replace(FLOW, stages=2)), "a flow of 2 stages wants as many scales"),
    (task_with("nova", spatial=None), "layout 'frames': sets=True needs a second decoder"),
    (task_with("frames", spatial=SMALL), "layout 'frames': a second decoder needs sets=True"),
    (task_with("sets", spatial=SMALL), "layout 'sets': a second decoder goes with layout 'frames'"),
    (task_with("nova", spatial=BASE), "the second decoder has one token, tied embeddings and nothing beside it"),
    (task_with(text=0.0, values=0.0), "text=0.0 and values=0.0 are no weights of losses"),
])  # fmt: skip
def test_what_does_not_go_together(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: draw(*reversed(made("raster")), [[1]], **DRAWN | {"guidance": float("nan")}), "guidance=nan and"),
    (lambda: draw(*reversed(made("raster")), [], **DRAWN, guidance=1.0), "no prompts"),
    (lambda: draw(*reversed(made("raster")), [[11]], **DRAWN, guidance=1.0), "token 11 is not there"),
    (lambda: draw(*reversed(made("nova")), [[1]], **DRAWN | {"sets": 17}, guidance=1.0), "sets=17 is no number"),
    (lambda: draw(made("raster")[1], task_with(layout=Raster(**GRID | {"drop": 0.0}))(), [[1]], **DRAWN, guidance=2.0),
     "guidance=2.0 needs a model that has learned to draw without its prompt as well; train with drop=0.1"),
    (lambda: tell(*reversed(made("sets")), np.zeros((1, 16, 3)), [[1]], max_tokens=1), "cannot tell of an image"),
    (lambda: tell(*reversed(made("raster")), np.zeros((1, 16, 4)), [[1]], max_tokens=1), "[1, 16, 3] would do"),
    (lambda: tell(*reversed(made("raster")), np.full((1, 16, 3), np.nan), [[1]], max_tokens=1), "image 0 are not all"),
    (lambda: TASKS["raster"].check(
        ModelConfig.gpt2(vocab_size=9, hidden_size=4, num_layers=1, num_heads=1, max_positions=55, bias=True), []),
     "rows of 56 positions, and the base has learned 55"),
])  # fmt: skip
def test_what_cannot_be_drawn_or_told(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)


def test_flops_count_what_is_computed():
    task = TASKS["raster"]
    words = dataclasses.replace(task, text=0.0)
    row = task.layout.length
    assert np.isclose((task.flops(BASE, row) - words.flops(BASE, row)) * row, 6 * row * 16 * 11)
    draws = dataclasses.replace(TASKS["sets"], head=dataclasses.replace(FLOW, draws=4))
    extra = (draws.flops(BASE, row) - TASKS["sets"].flops(BASE, row)) * row
    assert np.isclose(extra, 3 * 3 * 16 * FLOW.flops(16, 16))
    sets = TASKS["sets"]
    assert sets.head_flops(BASE, 5) == 5 * 16 * FLOW.flops(16, 16)
    assert TASKS["raster"].head_flops(BASE, 5) == 16 * TASKS["raster"].head.flops(16, 1)
