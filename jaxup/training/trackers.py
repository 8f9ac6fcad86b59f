"""Trackers draw what `metrics.jsonl` holds: one run there for each model, so that the models of a run overlay."""

from __future__ import annotations

import importlib.util
import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxup.errors import UserError, first_line, suggest
from jaxup.progress import say
from jaxup.text import read_json, remote
from jaxup.training.rundir import write_json

_PROJECT = "jaxup"
_KINDS = {"id": str, "told": dict[str, dict[str, int]], "open": list[str]}


class _Run(NamedTuple):
    """A model's run there."""

    log: Callable[[dict[str, float], int], None]  # values by name, and their step
    finish: Callable[[], None]
    told: dict[str, int]  # the last step of each name that it has


class Trackers:
    """Tells trackers of one model after the other.

    None of them forgets, so a step that is taken again, which gives the same bits, is not told again. `trackers.json`
    says what each has of each model; of those that were open when the run ended, the lines of `metrics.jsonl` say
    the rest. What one has missed, because it is new or was not there, it is told when the model begins again.

    Args:
      names: of `_OPEN`.
      directory: of the run. Its id is made once: a directory of the same name elsewhere is another run.
      config: of the run, to be shown there.
    """

    def __init__(self, names: Iterable[str], directory: Path, config: dict[str, Any]):
        self._names, self._directory, self._config = tuple(names), directory, config
        self._runs: list[_Run] = []
        self._worked: set[str] = set()

    def begin(self, model: str, kept: list[dict[str, Any]], again: list[dict[str, Any]]) -> None:
        """Tells of `model` from now on. UserError for a tracker that does not work; without one that did before, and
        does no more, the run goes on.

        Args:
          kept: the lines that were logged of the model.
          again: those after them, which will be logged again.
        """
        self.close()
        path = self._directory / "trackers.json"
        state = read_json(path, _KINDS, "delete it: trackers then get new runs, with all of it")
        if state is None:
            if not self._names:
                return
            name = re.sub(r"[^\w.-]", "_", self._directory.absolute().name, flags=re.ASCII)[:40]
            state = {"id": f"{name}-{uuid.uuid4().hex[:8]}", "told": {}, "open": []}
        for key in [key for key in state["open"] if key.partition("/")[2] == model]:
            state["open"].remove(key)
            for record in kept + again:
                _note(state["told"][key], record)
        for name in self._names:
            try:
                log, finish = _OPEN[name](self._directory, state["id"], model, self._config)
            except Exception as error:  # no account, no network: what it says is for whoever runs this
                what = f"{name}: {first_line(error)[:300]}"
                if name not in self._worked:
                    hint = "metrics.jsonl has all of it without a tracker"
                    raise UserError(what, at="log.trackers", hint=hint) from None
                say(f"warning: log.trackers: {what}; {model} goes on without it, and the next start tells it the rest")
                continue
            self._worked.add(name)
            state["open"].append(f"{name}/{model}")
            self._runs.append(_Run(log, finish, state["told"].setdefault(f"{name}/{model}", {})))
        for record in kept:
            self.tell(record)
        write_json(path, state)

    def tell(self, record: dict[str, Any]) -> None:
        """A line of the log, of the model that began last."""
        for run in self._runs:
            if values := _note(run.told, record):
                run.log(values, record["step"])

    def close(self) -> None:
        """Waits until they have what they were told."""
        for run in self._runs:
            run.finish()
        self._runs = []


def _note(told: dict[str, int], record: dict[str, Any]) -> dict[str, float]:
    """The values of the line that are new to the one who was told so much, and is told them now."""
    new = {
        key: value for key, value in record.items()
        if key != "step" and isinstance(value, (int, float)) and told.get(key, -1) < record["step"]
    }  # fmt: skip
    told.update(dict.fromkeys(new, record["step"]))
    return new


def check_trackers(names: tuple[str, ...], directory: Path) -> None:
    """UserError for a tracker that is unknown or not installed, or cannot write to `directory`."""
    for name in names:
        if name not in _OPEN:
            raise UserError(f"log.trackers: unknown {name!r}{suggest(name, _OPEN)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f'log.trackers: {name} is not installed; pip install "jaxup[{name}]"')
        if name == "tensorboard" and remote(directory):
            what = "tensorboard writes to a directory of this machine only"
            raise UserError(what, at="log.trackers", hint="metrics.jsonl has all of it, and wandb may be asked")


# Each opens the run of a model, or goes on with it, and returns its `log` and `finish`.


def _tensorboard(directory: Path, run: str, model: str, config: dict[str, Any]) -> tuple[Callable, Callable]:
    from tensorboard.summary import Writer

    writer = Writer(os.fspath(directory / "tensorboard" / model))

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log, writer.close


def _wandb(directory: Path, run: str, model: str, config: dict[str, Any]) -> tuple[Callable, Callable]:
    import wandb

    name, folder = f"{run}-{model}", None if remote(directory) else directory
    there = wandb.init(
        project=_PROJECT, group=run, job_type=model, name=name, id=name, resume="allow", reinit="create_new",
        dir=folder, config=config,
    )  # fmt: skip
    return there.log, there.finish


def _trackio(directory: Path, run: str, model: str, config: dict[str, Any]) -> tuple[Callable, Callable]:
    import trackio

    # It has no ids: a run is gone on with by its name.
    there = trackio.init(_PROJECT, group=run, name=f"{run}-{model}", resume="allow", config=config)
    return there.log, there.finish


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
