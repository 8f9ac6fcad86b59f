"""Trackers: a run of each model, that overlay, and that go on when the model does."""

import importlib
import inspect
import os
import types
from importlib.machinery import ModuleSpec

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from jaxup.errors import UserError
from jaxup.training.metrics import MetricsLog
from jaxup.training.trackers import check_trackers


class Tracker(types.ModuleType):
    """Stands for wandb or trackio: what each run was begun with, and the steps that it was told by name of value."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__, self.asked, self.told, self.open, self.fault = ModuleSpec(name, None), {}, {}, 0, None

    def init(self, project, **how):
        if self.fault:
            raise self.fault
        if real := REAL[self.__name__]:
            inspect.signature(real.init).bind(project, **how)
        assert how["resume"] == "allow"
        self.asked[how["name"]], self.open = how, self.open + 1
        told = self.told.setdefault(how["name"], {})

        def log(data, step):
            for name in data:
                told.setdefault(name, []).append(step)

        return types.SimpleNamespace(log=log, finish=lambda: setattr(self, "open", self.open - 1))


def real(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


REAL = {name: real(name) for name in ("wandb", "trackio")}


@pytest.fixture
def trackers(monkeypatch):
    fakes = {name: Tracker(name) for name in REAL}
    for name, fake in fakes.items():
        monkeypatch.setitem(importlib.sys.modules, name, fake)
    return fakes


def train(directory, names, model, start, stop, *, value=1.0):
    """Steps after `start` up to `stop` of a model, evaluated every two, in a process that is then killed."""
    directory.mkdir(exist_ok=True)
    log = MetricsLog(directory / "metrics.jsonl", names, {"seed": 0})
    log.rewind(model, start)
    evaluated = {r["step"] for r in log.read() if r["model"] == model and "val_loss" in r}
    for step in range(start, stop + 1):
        if step > start:
            log.write(model, step, loss=value, gradient_norm_layers=[1.0], mfu=None)
        if step % 2 == 0 and step not in evaluated:
            log.write(model, step, val_loss=value)
    return log


def shown(directory):
    """What TensorBoard shows of it: the steps of each value, by run; files of one second have no order."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(os.fspath(directory)).Reload()
    runs = {name: multiplexer.GetAccumulator(name) for name in multiplexer.Runs()}
    return {name: {tag: sorted(event.step for event in run.Tensors(tag)) for tag in run.Tags()["tensors"]}
            for name, run in runs.items()}  # fmt: skip


ALL = ("tensorboard", "wandb", "trackio")
SIX = {"loss": [1, 2, 3, 4, 5, 6], "val_loss": [0, 2, 4, 6]}


def test_the_models_of_a_run_overlay_and_no_step_is_told_twice(trackers, tmp_path):
    run = tmp_path / "run"
    train(run, ALL, "reference", 0, 5)
    train(run, ALL, "reference", 2, 3)  # killed before it is where it was
    train(run, ALL, "reference", 2, 6).close()
    train(run, ALL, "target_2", 0, 6).close()
    assert shown(run) == {"tensorboard/reference": SIX, "tensorboard/target_2": SIX}
    for tracker in trackers.values():
        (group,) = {how["group"] for how in tracker.asked.values()}
        assert group.startswith("run-")
        assert tracker.told == {f"{group}-reference": SIX, f"{group}-target_2": SIX}
    assert {how["id"] for how in trackers["wandb"].asked.values()} == trackers["wandb"].told.keys()
    (tmp_path / "elsewhere").mkdir()
    train(tmp_path / "elsewhere" / "run", ALL, "reference", 0, 2)
    assert len(trackers["wandb"].told) == 3


def test_one_that_is_new_or_was_away_is_told_all(trackers, tmp_path, capsys):
    run, wandb = tmp_path / "run", trackers["wandb"]
    train(run, ALL[:1], "reference", 0, 3)
    train(run, ALL[:2], "reference", 2, 3)
    train(run, ALL[:1], "reference", 2, 5)
    wandb.open = 0
    log = train(run, ALL[:2], "reference", 4, 6)
    assert [*wandb.told.values()] == [SIX]
    assert wandb.open == 1
    wandb.fault = RuntimeError("No API key\nconfigured")
    log.rewind("target_2", 0)
    assert "warning: log.trackers: wandb: No API key; target_2 goes on without it" in capsys.readouterr().err
    assert wandb.open == 0
    with pytest.raises(UserError, match=r"^log.trackers: wandb: No API key; metrics.jsonl has all"):
        train(run, ALL[:2], "target_2", 0, 6)
    train(run, ALL[:1], "target_2", 0, 6)
    assert shown(run) == {"tensorboard/reference": SIX, "tensorboard/target_2": SIX}


def test_one_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ALL:
        with pytest.raises(UserError, match=rf'^log.trackers: {name} is not installed; pip install "jaxup\[{name}\]"$'):
            check_trackers((name,), tmp_path)
