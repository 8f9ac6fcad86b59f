"""Pretraining on small LLaMAs: what it leaves, and that it goes on."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from runs import PRETRAIN, losses, metrics, result

import jaxup
from jaxup import train
from jaxup.data.batches import Batches
from jaxup.depth.plan import DepthPlan, Row
from jaxup.errors import UserError
from jaxup.experiments.common import new_model, read_settings
from jaxup.experiments.config import load, section
from jaxup.experiments.pretrain import GrowthConfig, Pretrain
from jaxup.experiments.pretrain import deeper as deeper_plan
from jaxup.experiments.resuming import load_run
from jaxup.model.decoder import init
from jaxup.model.spec import STACK, flatten
from jaxup.training import growth, loop
from jaxup.training.checkpoint import Checkpoints
from jaxup.training.loop import make_program
from jaxup.training.optimizer import OptimizerConfig, learning_rate
from jaxup.training.run import Part, Paused, Result, Run
from jaxup.training.selection import EVERYTHING
from jaxup.training.sharding import MeshConfig, make_mesh
from jaxup.training.stored import read_stored, restore

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """run(name, *more) -> the run's directory; all of them have the tokens beside them."""
    folder = tmp_path_factory.mktemp("pretrain")

    def started(name, *more):
        train.main(["train", *PRETRAIN, f"--config.data.source={corpus}", *more, f"--workdir={folder / name}"])
        return folder / name

    return started


@pytest.fixture(scope="module")
def fixed(run, drawing):
    with drawing():
        return run("fixed")


@pytest.mark.slow
def test_a_model_from_random_values(fixed):
    made, summary = result(fixed, "model"), (fixed / "SUMMARY.md").read_text()
    assert summary.splitlines()[2] == (
        f"The 3-layer model reaches {made['val_loss']:.4f} nats per token of validation in 12 steps from random "
        "values. One seed: by how much another one's numbers differ is not measured."
    )
    assert re.findall(r"^!\[.*\]\(plots/(\w+)\.png\)$", summary, re.M) == ["validation_loss", "training", "gradients"]
    losses = {r["step"]: r["val_loss"] for r in metrics(fixed) if "val_loss" in r}
    assert list(losses) == [0, 4, 8, 12]
    assert losses[12] == made["val_loss"] < losses[0]
    assert jaxup.load(fixed / "export").config.num_layers == 3
    assert "trained from random values" in (fixed / "export" / "README.md").read_text()


@pytest.fixture
def pausing(run, monkeypatch):
    """pausing(name, step, *more): until that step; the steps that were saved."""
    carry_out, save, saved = Pretrain.carry_out, Checkpoints._save, []

    def paused(name, step, *more):
        saved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                Pretrain, "carry_out",
                lambda self, run, title: carry_out(self, dataclasses.replace(run, pauses={"model": step}), title),
            )  # fmt: skip
            patch.setattr(Checkpoints, "_save", lambda self, at, tree: saved.append(at) or save(self, at, tree))
            with pytest.raises(Paused, match="model: paused at step"):
                run(name, *more)
        return list(saved)

    return paused


def left(workdir):
    return losses(workdir), (workdir / "export" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--config.steps=0"], "steps=0, epochs=0: one of them must be positive"),
        (["--config.optimizer.warmup_steps=20"], "optimizer.warmup_steps=20: does not fit a run of 12 steps"),
        (["--config.model.family=lama"], "model.family: unknown 'lama'; did you mean 'llama'"),
    ],
)
def test_what_cannot_work_is_refused(run, deeper, more, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        run("refused", *more)
    assert not (deeper.parent / "refused").exists()


# ---- growth

# Of 12 steps: from step 5, and from step 10. What is evaluated are averages.
GROW = ["--config.train.grow=1@0, 2@0.4, 3@0.8", "--config.step.ema=0.5"]


@pytest.fixture(scope="module")
def batches():
    """The steps whose batches `deeper` read."""
    return []


@pytest.fixture(scope="module")
def deeper(run, batches, drawing):
    read = Batches.__call__
    with drawing(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__call__", lambda self, step, *share: batches.append(step) or read(self, step, *share))
        return run("deeper", *GROW)


def plan_of(workdir):
    return DepthPlan.from_yaml((workdir / "export" / "jaxup_plan.yaml").read_text())


def validation(workdir):
    return {(r["step"], r["layers"]): r["val_loss"] for r in metrics(workdir) if "val_loss" in r}


def test_a_model_grows_while_it_trains(deeper, batches, run, capsys):
    """What adds nothing changes no loss, to the bit; data, schedule and steps go on, and there is one curve."""
    loss = validation(deeper)
    assert list(loss) == [(0, 1), (4, 1), (5, 1), (5, 2), (8, 2), (10, 2), (10, 3), (12, 3)]
    assert loss[5, 1] == loss[5, 2] > loss[10, 2] == loss[10, 3] > loss[12, 3] == result(deeper, "model")["val_loss"]
    steps = {r["step"]: r for r in metrics(deeper) if "loss" in r}
    assert [*steps] == [*range(1, 13)]
    assert batches == [*range(12)]
    rate = jax.jit(learning_rate(section(OptimizerConfig, load_run(deeper)[0].optimizer), 12))
    for step, record in steps.items():
        assert record["learning_rate"] == float(rate(step - 1))
        assert len(record["gradient_norm_layers"]) == record["layers"] == 1 + (step > 5) + (step > 10)
    assert re.findall(r"^!\[.*\]\(plots/(\w+)\.png\)$", (deeper / "SUMMARY.md").read_text(), re.M) == [
        "validation_loss", "training", "gradients",
    ]  # fmt: skip
    assert [result(deeper, name)["steps"] for name in ("model_1", "model_2", "model")] == [5, 10, 12]
    assert plan_of(deeper).strip() == "=zz"
    assert {r["ema"] for r in metrics(deeper) if "val_loss" in r} == {0.5}
    summary = (deeper / "SUMMARY.md").read_text()
    assert " in 12 steps from random values, of them 5 with 1 layer and 5 with 2 layers. " in summary
    run("said", *GROW, "--dry-run")
    table = re.findall(
        r"^  (model\w*) +(\d) +[\d,]+ +all +(\d+) +256 +([\d,]+) +\S+ +(\S+)", capsys.readouterr().out, re.M
    )
    assert [row[:4] for row in table] == [
        ("model_1", "1", "5", "1,280"), ("model_2", "2", "5", "1,280"), ("model", "3", "2", "512"),
    ]  # fmt: skip
    flops = [float(row[4]) / int(row[2]) for row in table]
    assert flops[1] - flops[0] == pytest.approx(flops[2] - flops[1], rel=0.02)


def test_a_training_pauses_and_goes_on(run, deeper, pausing):
    """To the bit, also where it grows, before the deeper model has a checkpoint; at a pause or beyond it nothing is
    done."""
    assert pausing("paused", 5, *GROW) == [4, 5]
    assert pausing("paused", 7, *GROW) == [7]
    assert pausing("paused", 6, *GROW) == []
    assert not (deeper.parent / "paused/checkpoints/model").exists()
    (lines, export), (want, wanted) = left(run("paused", *GROW)), left(deeper)
    assert [line for line in lines if line in want] == want
    looked_at = {r["step"]: r["val_loss"] for r in lines if r not in want}
    assert [*looked_at] == [7], "where it paused it was looked at"
    assert export == wanted


def test_what_is_read_of_a_run_are_averages(deeper):
    """Of each checkpoint and of the export, by the rule in NumPy; training goes on with the rest."""
    stored, settings = read_stored(deeper, "model_1"), read_settings(load_run(deeper)[0])
    program = make_program(stored.model, settings.update, make_mesh(MeshConfig(data=1, fsdp=1, tensor=1)), EVERYTHING)
    with Checkpoints(deeper / "checkpoints/model_1", keep=2) as checkpoints:
        state = checkpoints.restore(5, program.abstract_state)
    before, after = (flatten(restore(deeper, "model_1", step, stored)) for step in (4, 5))
    for path, trained in flatten(jax.device_get(state.params)).items():
        np.testing.assert_array_equal(after[path], (before[path] + trained) / 2)
        np.testing.assert_array_equal(after[path], flatten(state.ema)[path])
        assert (after[path] != trained).any()
    last = flatten(restore(deeper, "model", 12, read_stored(deeper, "model")))
    for path, exported in flatten(jaxup.load(deeper / "export").params).items():
        np.testing.assert_array_equal(exported, last[path])
    assert "as averages of its parameters over the updates, with a decay of 0.5." in (deeper / "SUMMARY.md").read_text()


@pytest.mark.slow
def test_a_growth_goes_on_from_what_a_kill_leaves(run, deeper, monkeypatch):
    """At each step of it, from the last checkpoint, or from the growth if there is none since."""
    write = loop.Meter._write
    for step in range(1, 13):

        def write_and_die(self, now, step=step, **values):
            write(self, now, **values)
            if now == step and "loss" in values:
                raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(loop.Meter, "_write", write_and_die)
            with pytest.raises(InterruptedError):
                run("killed", *GROW)
    assert left(run("killed", *GROW)) == left(deeper)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["copied", "random"])
def test_new_layers_that_add_something(run, deeper, by):
    workdir = run(by, *GROW, f"--config.train.grown_by={by}", "--config.train.grow_recipe=stack")
    loss, zeroed = validation(workdir), validation(deeper)
    assert loss[5, 1] == zeroed[5, 1]
    assert loss[5, 2] != loss[5, 1]
    assert plan_of(workdir).strip() == {"copied": "=XX", "random": "=nn"}[by]


@pytest.mark.slow
def test_a_restart_at_each_growth(run):
    """Inheritune's: a fresh optimizer, and warmup and decay over the steps of each depth."""
    workdir = run("restart", *GROW, "--config.train.restart=true")
    rates = [r["learning_rate"] for r in metrics(workdir) if "loss" in r]
    assert rates[:5] == rates[5:10]
    assert rates[10:] == [rates[0], rates[1]]
    assert rates[0] < rates[1] > rates[4]
    loss = validation(workdir)
    assert loss[5, 1] == loss[5, 2]


@pytest.mark.parametrize(
    ("by", "where", "layers", "strip", "order"),
    [
        ("zeroed", "interleave", 8, "=z=z=z=z", [0, 0, 1, 1, 2, 2, 3, 3]),
        ("copied", "interleave", 6, "==X==X", [0, 1, 1, 2, 3, 3]),
        ("copied", "stack", 6, "====XX", [0, 1, 2, 3, 2, 3]),
        ("random", "interleave", 5, "====n", [0, 1, 2, 3, 3]),
        ("zeroed", "stack", 10, "====zzzzzz", [0, 1, 2, 3, 0, 1, 2, 3, 2, 3]),
    ],
)
def test_where_new_layers_go(by, where, layers, strip, order):
    plan = deeper_plan("small", 4, layers, GrowthConfig(grow="", grown_by=by, grow_recipe=where, restart=False))
    assert plan.strip() == strip
    assert [row.layer for row in plan.rows] == order


def test_moments_grow_as_parameters_do(monkeypatch):
    """On a mesh: gathered, zero where a copy is zeroed and where a layer is new; all else of the state goes on."""
    sizes = [("model.hidden_size", "16"), ("model.intermediate_size", "24"), ("model.vocab_size", "64")]
    config = load("pretrain.py:smoke", sizes)
    settings, small = read_settings(config), new_model(config.model).with_layers(range(2))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, context=1, tensor=1), jax.local_devices())
    model, part = small.with_layers([0, 0, 1, 1]), Part(curve="model", first=7, seconds=0.0, schedule=(0, 20))
    program = make_program(small, settings.update, mesh, EVERYTHING)
    rng = np.random.default_rng(0)

    def fill(leaf):
        value = rng.normal(size=leaf.shape).astype(leaf.dtype) if leaf.ndim else leaf.dtype.type(7)
        return jax.device_put(value, leaf.sharding)

    state = jax.tree.map(fill, program.abstract_state)._replace(halted=jax.device_put(False))
    monkeypatch.setattr(growth, "restore_trained", lambda *_: state)
    run, smaller = object.__new__(Run), object.__new__(Result)  # of which nothing else is read
    vars(run).update(settings=settings, mesh=mesh)

    plan = deeper_plan("small", 2, 4, GrowthConfig(grow="", grown_by="zeroed", grow_recipe="interleave", restart=False))
    plan = dataclasses.replace(plan, rows=(*plan.rows[:3], Row("small", 1, "new", (), ())))
    with jax.set_mesh(mesh):
        grown = growth.grown(run, smaller, small, plan, model, part, restart=False)
    wanted = make_program(model, settings.update, mesh, EVERYTHING).abstract_state
    laid_out = lambda tree: [(leaf.shape, leaf.sharding) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert laid_out(grown) == laid_out(wanted)
    assert grown.step == 7
    counts = [leaf for leaf in jax.tree.leaves(grown.opt_state) if not leaf.ndim]
    assert [*map(int, counts)] == [7, 7]
    adam, grown_adam = state.opt_state[1], grown.opt_state[1]
    trees = [(state.params, grown.params), (adam.mu, grown_adam.mu), (adam.nu, grown_adam.nu)]
    first = flatten(jax.device_get(jax.jit(init, static_argnums=0)(model, settings.seed)))
    for place, (before, after) in enumerate((flatten(a), flatten(b)) for a, b in trees):
        for path, old in before.items():
            new = np.asarray(after[path])
            if not path.startswith(STACK):
                np.testing.assert_array_equal(new, old)
                continue
            np.testing.assert_array_equal(new[[0, 2]], old)
            zeroed = any(name in path for name in ("o_proj", "down_proj"))
            np.testing.assert_array_equal(new[1], 0 * old[0] if zeroed else old[0])
            if place:
                assert not new[3].any()
            elif "kernel" in path:  # with the deviation of a model of four layers
                std = 0.02 / (2 * 4) ** 0.5 if zeroed else 0.02
                assert np.std(new[3]) == pytest.approx(std, rel=5 / new[3].size ** 0.5)
                assert np.isin(new[3], first[path]).mean() < 0.1, "the values that a model begins with"


@pytest.mark.parametrize(
    ("grow", "said"),
    [
        ("1@0,3", "not layers and shares of the steps such as '2@0, 4@0.4'"),
        ("3@0", "one depth is no growth; leave it empty, and set model.num_layers"),
        ("1@0.1,3@0.5", "it begins with at least one layer, at 0"),
        ("0@0,3@0.5", "it begins with at least one layer, at 0"),
        ("2@0,2@0.3,3@0.5", "2 layers after 2: a model only grows"),
        ("2@0,1@0.3,3@0.5", "1 layers after 2: a model only grows"),
        ("1@0,2@0.5,3@0.5", "0.5 after 0.5: shares of the steps go up and stay below 1"),
        ("1@0,3@1.5", "1.5 after 0: shares of the steps go up and stay below 1"),
        ("1@0,2@0.5", "it ends with 2 layers, and model.num_layers=3"),
        ("1@0,2@0.5,3@0.51", "of 12 steps, 2 layers have those from 6 to 6, which are none"),
        ("1@0,3@0.99", "of 12 steps, 3 layers have those from 12 to 12, which are none"),
    ],
)
def test_growth_that_is_none_is_refused(run, deeper, grow, said):
    with pytest.raises(UserError, match=f"^{re.escape(f'train.grow={grow}: {said}')}$"):
        run("refused", f"--config.train.grow={grow}")
    assert not (deeper.parent / "refused").exists()


def test_other_growth_that_cannot_work_is_refused(run, deeper):
    for more, said in [
        (["--config.train.grown_by=zeored"], "train.grown_by: unknown 'zeored'; did you mean 'zeroed'"),
        (["--config.train.grow_recipe=top"], "train.grow_recipe: unknown 'top'"),
        (["--config.train.restart=true", "--config.optimizer.warmup_steps=4"], "optimizer.warmup_steps=4: does not"),
        (["--config.model.placement=post"], "train.grow: plan: layer 1 has nothing to add, and changes what comes in"),
        (["--config.measure.rows=-1"], "measure.rows must be at least 0, not -1"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=f"^{re.escape(said)}"):
            run("refused", *GROW, *more)
    with pytest.raises(UserError, match=r"^train.grown_by=random: goes with train.grow; nothing reads"):
        run("refused", "--config.train.grown_by=random")
    # At a constant rate there may be more steps; those of a growth are shares of them.
    copy = shutil.copytree(deeper, deeper.parent / "constant")
    (copy / "config.json").write_text((copy / "config.json").read_text().replace('"cosine"', '"constant"'))
    with pytest.raises(UserError, match="this run was begun with another growth"):
        run("constant", *GROW, "--config.optimizer.schedule=constant", "--config.steps=20")
