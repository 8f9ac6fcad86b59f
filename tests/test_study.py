"""Studies: what their configurations become, what is refused, and that what cells share is done once."""

import contextlib
import dataclasses
import json
import random
import subprocess

import outcomes
import processes
import pytest
import runs

from jaxup import train
from jaxup.errors import NonFinite, UserError
from jaxup.experiments import cells, resuming, rounds
from jaxup.experiments.config import load
from jaxup.experiments.stopping import Rule
from jaxup.training.loop import make_program


def study(axes="", *more, spec="inherit_gpt2.py:smoke"):
    return load(spec, [("study.axes", axes), *more])


def test_axes_are_combined_and_named_by_what_differs():
    config = study("batch_size: 8 16; optimizer.learning_rate: 1e-3 2e-3", ("study.seeds", "0,1"))
    assert config.study.cells == {
        f"batch_size={batch},learning_rate={rate}": {"batch_size": batch, "optimizer.learning_rate": rate}
        for batch in (8, 16) for rate in (0.001, 0.002)
    }  # fmt: skip
    assert config.study.axes == ""
    assert cells.seeds(config) == (0, 1)
    cell = cells.configured(config, "batch_size=8,learning_rate=0.002", 1)
    assert (cell.batch_size, cell.optimizer.learning_rate, cell.seed) == (8, 0.002, 1)
    # A run like any other, and all but what was named is the study's.
    assert not cell.study.cells
    assert not cell.study.seeds
    assert cell.model == config.model
    assert cell.data == config.data
    assert config.batch_size == 16


def test_variants_are_an_axis_and_need_their_file_no_more():
    config = study("variant: ablation=attn control=2", ("inherit.tolerance", "0.5"))
    assert [*config.study.cells] == ["ablation=attn", "control=2"]  # in their order: the first is the control
    assert config.study.cells["control=2"] == {"inherit.control": 2}
    assert "mlp" not in cells.configured(config, "ablation=attn").inherit.parts
    assert cells.configured(config, "control=2").inherit.tolerance == 0.5


def test_bundles_are_multiplied_by_axes_and_seeds_alone_are_a_study():
    named = ("study.cells", "{'wide': {'model.hidden_size': 256}, 'last': {'inherit.which': 'last'}}")
    config = study("steps: 5 7", named)
    assert [*config.study.cells] == ["wide,steps=5", "wide,steps=7", "last,steps=5", "last,steps=7"]
    assert study("", named).study.cells["wide"] == {"model.hidden_size": 256}
    assert study("", ("study.seeds", "3,4")).study.cells == {cells.ALONE: {}}
    assert study().study.cells == {}


def test_values_may_have_spaces_and_names_are_those_of_directories():
    config = study("plan: 'identity(base)' \"upscale(base, 1:3, copies=1)\"", spec="heal.py:smoke")
    first, second = config.study.cells
    assert config.study.cells[second] == {"plan": "upscale(base, 1:3, copies=1)"}
    assert first.startswith("plan=identity_base_")
    assert second.startswith("plan=upscale_base,_1_3,_copies=1_")


@pytest.mark.parametrize(("axes", "more", "said"), [
    ("batch_siz: 8 16", (), "did you mean 'batch_size'"),
    ("batch_size: 8 many", (), "batch_size: expected an int, not 'many'"),
    ("batch_size 8 16", (), "'batch_size 8 16' is no axis"),
    ("batch_size: 8 8", (), "8 is there twice"),
    ("optimizer.learning_rate: 1e-3 0.001", (), "'learning_rate=0.001' is there twice"),
    ("seed: 0 1", (), "study.seeds says which"),
    ("study.stop: norms halving", (), "study.stop is the same in all cells"),
    ("variant: smok large", (), "unknown variant 'smok'; did you mean"),
    ("step.spike_window: 50 100", (), "cell 'spike_window=50': step.spike_window=50: goes with step.spike_factor"),
    ("batch_size: 1 2 3 4 5; steps: 1 2 3 4 5", (("study.max_cells", "20"),), "study.max_cells=20: 25 runs, each of"),
    ("batch_size: 8 16", (("study.seeds", "0,1,2"), ("study.max_cells", "5")), "6 runs"),
    ("batch_size: 8 16", (("study.seeds", "0,0"),), "study.seeds=0,0"),
    ("batch_size: 8 16", (("study.seeds", "one"),), "study.seeds=one: are whole numbers"),
    ("batch_size: 8 16", (("study.control", "batch_size=9"),), "study.control=batch_size=9: is no cell; did you mean"),
    ("batch_size: 8 16", (("study.also", "batch_size=8: batch_size=9"),), "'batch_size=9' is no cell; did you mean"),
    ("batch_size: 8 16", (("study.also", "batch_size=8"),), "two cells with a colon between them"),
    ("", (("study.control", "a"),), "study.control=a: goes with study.cells"),
    ("", (("study.cells", "{'a': {}, 'b': {'batch_size': 16}}"),), "study: 'a' and 'b' are the same"),
    ("", (("study.cells", "{'a/b': {}}"),), "'a/b': is a directory's name, too"),
    ("", (("study.cells", "{'a': {'steps': 2.5}}"),), "expected an int, not 2.5"),
    ("", (("study.cells", "{'a': {'modle.num_layers': 2}}"),), "did you mean"),
])  # fmt: skip
def test_mistakes_are_one_line(axes, more, said):
    with pytest.raises(UserError) as error:
        study(axes, *more)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


SMALL = [
    "--config.model.num_layers=2", "--config.inherit.control=0", "--config.steps=4", "--config.sample.tokens=0",
    "--config.checkpoint.interval=100",
]  # fmt: skip


def train_study(corpus, workdir, *more):
    """Two cells of one shape: a target of one layer, the first or the last of a reference of two."""
    axes = "--config.study.axes=inherit.which: first last"
    train.main(["train", *runs.arguments(corpus, workdir, *SMALL, axes, *more)])


@pytest.mark.usefixtures("one_device")
def test_a_study_shares_programs_and_references_and_takes_more_seeds(corpus, tmp_path, capsys):
    make_program.cache_clear()
    study = tmp_path / "study"
    train_study(corpus, study)
    train_study(corpus, study, "--config.study.seeds=0,1")
    said = capsys.readouterr().out
    assert "changed in the study: study.seeds was [], now [0, 1]" in said
    assert "run 3 of 4: cell which=first, seed 1" in said
    # Both cells and both seeds have the programs of a reference and of a target.
    assert make_program.cache_info().misses == 2
    names = [f"which={which}-{seed}" for seed in (0, 1) for which in ("first", "last")]
    assert sorted(path.name for path in (study / "cells").iterdir()) == sorted(names)
    assert len(list((study / "shared").iterdir())) == 2  # a reference for each seed
    assert (tmp_path / "data").is_dir()

    train_study(corpus, study, "--config.study.seeds=0,1", "--config.study.control=which=last")
    assert json.loads((study / "study.json").read_text())["control"] == "which=last"
    capsys.readouterr()

    # A run of the study is what a run by itself is, to the bit, and goes on by itself.
    cell, alone = study / "cells" / "which=last-1", tmp_path / "alone"
    more = ["--config.inherit.which=last", "--config.seed=1"]
    train.main(["train", *runs.arguments(corpus, alone, *SMALL, *more)])
    assert runs.losses(cell) == runs.losses(alone)
    for name in ("reference", "target_1"):
        assert runs.result(cell, name)["val_loss"] == runs.result(alone, name)["val_loss"]
    train.main(["train", f"--resume={cell}"])
    assert "finished before" in capsys.readouterr().out

    # What is finished is not done again, whatever else is asked for.
    train.main(["train", f"--resume={study}", "--dry-run"])
    assert "4 runs, 2 cells with seeds 0, 1; 0 are left" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"study\.axes: goes with --config"):
        train.main(["train", f"--resume={study}", "--config.study.axes=steps: 1 2"])
    with pytest.raises(UserError, match=r"cell 'which=first' was .* now"):
        train_study(
            corpus, study, "--config.study.axes=", "--config.study.cells={'which=first': {'inherit.layers': 2}}"
        )
    with pytest.raises(UserError, match="holds a study, and not one run"):
        train_study(corpus, study, "--config.study.axes=")


@pytest.mark.usefixtures("one_device")
def test_rates_schedules_and_steps_are_no_programs(corpus, tmp_path, caplog):
    """One step and one evaluation for runs that differ in nothing else."""
    make_program.cache_clear()
    other = {"optimizer.learning_rate": 3e-3, "optimizer.schedule": "wsd", "optimizer.warmup_steps": 0, "steps": 6}
    cells = {"usual": {}, "other": other}
    more = [f"--config.data.source={corpus}", "--config.steps=4", "--config.step.accumulation=0"]
    more += [f"--config.study.cells={cells}"]
    with caplog.at_level("DEBUG", logger="jax._src.dispatch"):
        train.main(["train", *runs.PRETRAIN, *more, f"--workdir={tmp_path / 'study'}"])
    compiled = [line.split()[4] for line in caplog.messages if line.startswith("Finished XLA compilation of")]
    assert [compiled.count(f"jit({name})") for name in ("train_step", "init_state", "eval_step")] == [1, 1, 1]
    assert make_program.cache_info().misses == 1
    logged = {
        name: [r["learning_rate"] for r in runs.losses(tmp_path / "study" / "cells" / f"{name}-0") if "loss" in r]
        for name in cells
    }
    expected = {"usual": [1e-3, 2e-3, 2e-3, 2e-4], "other": [3e-3] * 5 + [2e-4]}
    assert {name: pytest.approx(rates) for name, rates in expected.items()} == logged


@pytest.mark.usefixtures("one_device")
def test_a_run_that_diverges_ends_alone_and_what_cannot_work_is_said_before_the_first(corpus, tmp_path, monkeypatch):
    begun = []

    def diverges(config, directory, title, *_, command, **__):
        begun.append(directory.name)
        resuming.begin(directory, config, {}, title, command)
        raise NonFinite("target_1: step 3: loss nan is not finite")

    monkeypatch.setattr("jaxup.experiments.study.run_one", diverges)
    with pytest.raises(UserError, match="cell 'layers=9'"):
        train_study(corpus, tmp_path / "bad", "--config.study.axes=inherit.layers: 1 9")
    assert not (tmp_path / "bad").exists()
    train_study(corpus, tmp_path / "study")
    assert begun == ["which=first-0", "which=last-0"]
    train_study(corpus, tmp_path / "study")  # which ended is not begun again
    assert len(begun) == 2
    why = json.loads((tmp_path / "study" / "cells" / begun[0] / "ended.json").read_text())["why"]
    assert why == "diverged: target_1: step 3: loss nan is not finite"


@pytest.mark.parametrize(("flag", "said"), [
    ("--target=v5p:2x2x1", "--target"), ("--preflight", "--preflight"), ("--skip-step=3", "step 3 left out"),
])  # fmt: skip
def test_what_is_of_one_run_goes_without_a_study(tmp_path, flag, said):
    where = [] if flag.startswith("--target") else [f"--workdir={tmp_path}/study"]
    with pytest.raises(UserError, match=said) as error:
        train.main(["train", "--config=inherit_gpt2.py:smoke", "--config.study.axes=steps: 2 3", flag, *where])
    assert "study" in str(error.value)


def came_of(study):
    """All that does not depend on time, of each run."""
    found = {}
    for cell in sorted((study / "cells").iterdir()):
        losses = {
            path.parent.name: json.loads(path.read_text())["val_loss"]
            for path in cell.glob("checkpoints/*/result.json")
        }
        found[cell.name] = (losses, runs.losses(cell))
    return found


@pytest.mark.slow
def test_two_processes_and_kills_end_in_the_same_study(corpus, tmp_path):
    small = ["--config.model.num_layers=2", "--config.inherit.control=0", "--config.steps=12"]
    more = ["--config.study.axes=inherit.which: first last", "--config.study.seeds=0,1"]
    command = lambda name: ("-m", "jaxup.train", *runs.arguments(corpus, tmp_path / name, *small, *more))  # noqa: E731
    processes.run(*command("whole"))
    with processes.started(*command("two")) as first, processes.started(*command("two")) as second:
        said = [process.communicate(timeout=processes.LIMIT)[0] for process in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0]
    assert all("run directory" in text for text in said)  # each had some of them
    assert came_of(tmp_path / "two") == came_of(tmp_path / "whole")
    draw = random.Random(0)
    for _ in range(20):
        with processes.started(*command("killed")) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=draw.uniform(2, 15))
            process.kill()
    processes.run(*command("killed"))
    assert came_of(tmp_path / "killed") == came_of(tmp_path / "whole")


RULE = dict(stop_from=0.1, stop_every=0.02, stop_keep=2, stop_norm=0.2, stop_loss=0.02, stop_checks=3, stop_factor=2)


def test_runs_of_a_group_go_in_rounds():
    norms, halving = (Rule(stop=stop, **RULE) for stop in ("norms", "halving"))
    assert pytest.approx([0.14, 0.28, 0.56]) == rounds.pauses(norms)
    assert pytest.approx([0.1, 0.2, 0.4, 0.8]) == rounds.pauses(halving)
    runs = [outcomes.outcome(cell, batch_size=8 if cell in "abc" else 16) for cell in "abcxyz"]
    planned, nobody = {run.name: 100 for run in runs}, dict.fromkeys((run.name for run in runs), 0)

    def limits(reached, done=(), runs=runs):
        found = rounds.limits(runs, planned, nobody | reached, done, norms)
        return {name: step for name, step in found.items() if name[0] in "abc"}

    assert limits({}) == {"a-0": 14, "b-0": 14, "c-0": 14}
    # Those that were there wait for those that were not; another group has its own rounds.
    assert limits({"a-0": 14, "b-0": 14, "x-0": 14}) == {"a-0": 0, "b-0": 0, "c-0": 14}
    assert limits({"a-0": 56, "b-0": 56, "c-0": 56}) == {"a-0": 100, "b-0": 100, "c-0": 100}
    # Who is at its end is waited for no more, and so many as always go on race no more.
    assert limits({"a-0": 14, "b-0": 14}, ("c-0",)) == {"a-0": 28, "b-0": 28}
    stopped = [dataclasses.replace(run, stopped="norms") if run.name == "c-0" else run for run in runs]
    assert limits({"a-0": 14, "b-0": 14}, ("c-0",), stopped) == {"a-0": 100, "b-0": 100}


def test_a_rule_that_looks_before_anything_is_logged_is_refused(corpus, tmp_path):
    with pytest.raises(UserError) as error:
        train_study(corpus, tmp_path / "study", "--config.study.stop=halving", "--config.log.interval=2")
    said = "log.interval=2: cell 'which=first' has 4 steps, and study.stop=halving first looks after 1"
    assert str(error.value) == f"{said}; --config.log.interval=1"
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_poor_runs_stop_and_go_on_if_asked(corpus, tmp_path, capsys):
    axes = "--config.study.axes=optimizer.learning_rate: 1e-5 1e-3 3e-3 1e-2"
    small = ["--config.model.num_layers=2", "--config.inherit.control=0", "--config.steps=20", axes]
    halving = ["--config.study.stop=halving", "--config.study.stop_from=0.2", "--config.study.stop_keep=1"]
    train.main(["train", *runs.arguments(corpus, tmp_path / "study", *small, *halving)])
    cells = tmp_path / "study" / "cells"
    stopped = {path.parent.name: json.loads(path.read_text())["why"] for path in cells.glob("*/ended.json")}
    assert len(stopped) == 3
    assert stopped["learning_rate=1e-05-0"].startswith("halving: validation loss")
    numbers = json.loads((tmp_path / "study" / "study.json").read_text())
    assert {run["cell"] + "-0": run["stopped"] for run in numbers["runs"] if run["stopped"]} == stopped
    # What was stopped is as far as it was, and goes on to what it would have been.
    (cells / "learning_rate=1e-05-0" / "ended.json").unlink()
    train.main(["train", f"--resume={cells / 'learning_rate=1e-05-0'}"])
    assert "resumes at step 4 of 20" in capsys.readouterr().out
    train.main(["train", *runs.arguments(corpus, tmp_path / "whole", *small)])
    name = "learning_rate=1e-05-0/checkpoints/target_1/result.json"
    results = [json.loads((tmp_path / study / "cells" / name).read_text()) for study in ("study", "whole")]
    assert results[0]["val_loss"] == results[1]["val_loss"]
