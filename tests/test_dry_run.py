"""What a run would do: said without doing it, and as it is done."""

import json
import re
import shutil

import processes
import pytest
from runs import arguments, result

from jaxup import train
from jaxup.errors import UserError
from jaxup.experiments import dry_run
from jaxup.model.config import ModelConfig
from jaxup.model.spec import flops_per_token
from jaxup.text import read_json
from jaxup.training import trial

pytestmark = pytest.mark.usefixtures("one_device")


def run(*args):
    train.main(["train", *map(str, args)])


def rows(said):
    """The table of models: name -> cells."""
    table = re.search(r"^models of the run.*?\n\n", said, re.M | re.S)[0].splitlines()[2:]
    return {name: cells for name, *cells in (line.split() for line in table if line and "as long as" not in line)}


def test_a_run_does_what_was_said(finished, corpus, tmp_path, capsys, monkeypatch):
    """Steps, parameters and tokens are those of the finished run; nothing of a run is written, and all is said."""
    store = next((finished[0].parent / "data").iterdir())
    tried = []
    monkeypatch.setattr(trial, "_made", lambda *args, made=trial._made: tried.append(made(*args)) or tried[-1])
    run(*arguments(corpus, tmp_path / "runs" / "run", f"--config.data.store={store}"), "--dry-run")
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert f"run directory {tmp_path / 'runs' / 'run'}: would be made" in said
    assert "  steps=8, in the file 20\n" in said
    assert re.search(r"^  model: \{.*hidden_size: 16", said, re.M)
    table = rows(said)
    assert [*table] == ["reference", "target_2", "control", "target_4"]
    for name, (layers, params, trained, steps, batch, tokens, epochs, flop) in table.items():
        if name in ("control", "target_4"):  # with the second row of that name: of the size of a target that has grown
            assert layers == "4"
            continue
        done = result(finished[0], name)
        assert [layers, params, steps, tokens] == [f"{done[k]:,}" for k in ("layers", "params", "steps", "tokens")]
        assert (trained, batch, epochs) == ("all", "256", f"{done['epochs']:.3g}")
        config = ModelConfig.from_dict(read_json(finished[0] / "checkpoints" / name / "model.json", {}, "")["model"])
        assert flop == f"{8 * 256 * flops_per_token(config, 32) / 1e15:.3g}"
    assert "  the first row of training begins:\n  | " in said
    numbers = [float(n) for n in re.findall(r"^ +([\d.]+) GiB", said, re.M)]
    assert numbers[-1] == pytest.approx(sum(numbers[:-1]), abs=0.005)
    assert len(tried) == 1
    assert re.search(r"by 3 steps of reference: .* s each, .* TFLOP/s a device; compiled in \d+ s$", said, re.M)
    assert re.search(r"^  about [\d:]+, of which [\d:]+ to compile; .*\n  up to [\d:]+", said, re.M)


@pytest.fixture
def untried(monkeypatch):
    """Nothing is compiled: a device as slow as this, and as small."""

    def init(self, stage, mesh, speed, room):
        assert (speed, room) == (1e4, 2**30)
        self.memory = {"parameters": 2**30, "gradients, activations, batch": 2**30}
        self.stage, self.failed, self.seconds, self.compiling = stage, "", None, 30.0

    monkeypatch.setattr(trial.Trial, "__init__", init)
    monkeypatch.setattr(dry_run, "measure_device", lambda dtype: (1e4, 2**30))


def test_what_does_not_fit_and_cannot_be_tried(finished, corpus, tmp_path, untried, capsys):
    store = next((finished[0].parent / "data").iterdir())
    run(*arguments(corpus, tmp_path / "run", f"--config.data.store={store}", "--config.inherit.grow_by=0"), "--dry-run")
    said = capsys.readouterr().out
    assert "not good enough" not in said
    assert re.search(r"2.000 GiB  in all, of 1.0 GiB here\n  it does not fit; step.accumulation, .*mesh.fsdp", said)
    tera = re.search(r"a step of reference has ([\d.e-]+) TFLOP; a product of matrices reaches 1e-08 TFLOP/s", said)[1]
    hours, minutes, seconds = map(int, re.search(r"(\d+):(\d+):(\d+)  reference$", said, re.M).groups())
    # Eight steps, and evaluations of as many rows as a batch has, at the start and twice after it.
    assert hours * 3600 + minutes * 60 + seconds == pytest.approx(float(tera) * 1e8 * (8 + 3 / 3), rel=0.01)
    assert re.search(r"^  at least [\d:]+, of which 2:00 to compile", said, re.M)  # the reference's, and the target's


def test_what_is_left_of_a_run(finished, corpus, tmp_path, untried, capsys):
    shutil.copytree(finished[0].parent, tmp_path / "runs")
    workdir = tmp_path / "runs" / "whole"
    command = arguments(corpus, workdir)
    run(*command, "--dry-run")
    assert "finished before: " in capsys.readouterr().out  # as without the flag
    for name in ("finished.json", "checkpoints/control/result.json", "checkpoints/control/8"):
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    run(*command, "--dry-run", "--config.log.interval=2", "--skip-step=7")
    said = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    assert "whole: holds this run, and the same command goes on with it\n" in said
    assert re.findall("^  changed under the run: (.*)$", said, re.M) == ["log.interval was 1, now 2", "step 7 left out"]
    assert re.search(r"^  reference .* is finished$", said, re.M)
    assert re.search(r"^  control +2 .* 6 steps are done$", said, re.M)
    assert re.findall(r"^ +[\d:]+  (\w+)$", said, re.M) == ["control"]
    run(f"--resume={workdir}", "--dry-run")
    assert "configuration of the run;" in capsys.readouterr().out

    inputs = json.loads((workdir / "inputs.json").read_text())
    (workdir / "inputs.json").write_text(json.dumps({**inputs, "data": "other"}))
    for flags in (["--dry-run"], []):
        with pytest.raises(UserError, match="this run was begun with another data: put back what it was"):
            run(*command, *flags)


@pytest.mark.parametrize("place", ["run/store", "run"])
def test_tokens_do_not_lie_in_the_run(place, corpus, tmp_path):
    """Where they would keep it from ever beginning."""
    for flags in (["--dry-run"], []):
        with pytest.raises(UserError, match=r"data.store=.*run\S*: lies in the run's directory; choose another"):
            run(*arguments(corpus, tmp_path / "run", f"--config.data.store={tmp_path / place}"), *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_of_several_processes_one_prints(finished, corpus, tmp_path):
    store = next((finished[0].parent / "data").iterdir())
    command = arguments(corpus, tmp_path / "run", f"--config.data.store={store}", "--dry-run")
    first, second = processes.run_two("-m", "jaxup.train", *command, devices=2)
    assert re.search(r"^time on 4 x cpu, by 3 steps of reference: .*\n", first.stdout, re.M)
    assert [line for line in second.stdout.splitlines() if "[Gloo]" not in line] == []
    assert list(tmp_path.iterdir()) == []
