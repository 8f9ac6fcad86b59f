"""A run, and what it keeps of each of its models beside the checkpoints: model.json, digest.json, result.json."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from jaxup.data.batches import Batches, TrainingData
from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params
from jaxup.text import kinds_of, read_json, write_atomically
from jaxup.together import told
from jaxup.training.corrections import Corrections
from jaxup.training.metrics import MetricsLog
from jaxup.training.objective import TEXT, Objective
from jaxup.training.optimizer import AdamW, OptimizerConfig
from jaxup.training.partition import digest
from jaxup.training.processes import Processes
from jaxup.training.rundir import write_json
from jaxup.training.selection import EVERYTHING, Selection
from jaxup.training.step import StepConfig


class Update(NamedTuple):
    """What decides the program of an update, besides the model. Learning rates, schedules and steps do not."""

    optimizer: AdamW
    step: StepConfig
    compute: Compute


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all models of a run have in common."""

    seed: int
    batch_size: int  # rows of the global batch
    optimizer: OptimizerConfig
    step: StepConfig
    compute: Compute
    eval_interval: int
    eval_rows: int  # the first so many validation rows; 0 = all
    eval_batch_size: int
    log_interval: int
    checkpoint_interval: int
    keep_checkpoints: int

    @property
    def update(self) -> Update:
        return Update(self.optimizer.adamw, self.step, self.compute)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A model of a run: what it is trained on, and how."""

    name: str
    model: ModelConfig
    steps: int = 0  # of its training; 0: it is measured only
    first: int = 0  # of them those that a smaller model took, from which it goes on
    data: TrainingData
    settings: Settings
    selection: Selection = EVERYTHING
    dtype: str = "float32"  # of what does not train
    objective: Objective = TEXT
    fresh: bool = False  # it begins with random values: runs of a study that would train the same one have it in common

    @property
    def own_steps(self) -> int:
        return self.steps - self.first

    @property
    def flops(self) -> float:
        """Of a step, as if everything trained: what a part of it spares is not known."""
        tokens = self.settings.batch_size * self.data.seq_len
        return tokens * self.objective.flops(self.model, self.data.seq_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The steps of one model in a training that several take, each deeper than the one before it."""

    curve: str  # the name by which all of it is logged, corrected and paused
    first: int  # steps that were taken before
    seconds: float  # that they took
    schedule: tuple[int, int]  # the step before which the schedule of its learning rate begins, and how long it is


@runtime_checkable
class Rounds(Protocol):
    """Batches that are made while a model trains, of what it is at the beginning of each round."""

    length: int  # steps of a round

    def __call__(self, step: int, params: Params) -> Batches:
        """From the first step of a round on, or from `step` within one, where a training goes on: then they have to be
        what they were, and `params` are not those that they were made of."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and with what a run's models are trained."""

    directory: Path
    settings: Settings
    mesh: Mesh
    data: TrainingData
    log: MetricsLog
    processes: Processes
    sample: Callable[[ModelConfig, Params], str]  # a short text by the model, for the summary
    # What is asked of the next model that trains, which takes it out.
    asked: list[Corrections] = dataclasses.field(default_factory=list)
    # The models that train, in their order, and about how many FLOPs each takes: how far the run is, for people.
    course: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Steps after which a model is evaluated besides those of the interval: curves side by side have the same points.
    evaluated: frozenset[int] = frozenset()
    common: Path | None = None  # where the runs of a study have what they all train: see `training/in_common.py`
    # Names of models, and the step after which the training of each saves and raises `Paused`.
    pauses: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def place(self, name: str, steps: int) -> tuple[str, float]:
        """Which of its models this is, in words, and for how many of its steps those after it will take as long."""
        names = list(self.course)
        if name not in self.course:
            return "", 0.0
        index = names.index(name)
        after = sum(self.course[other] for other in names[index + 1 :])
        return f"{index + 1} of {len(names)}", steps * after / self.course[name]

    @property
    def val_rows(self) -> int:
        """How many rows it is evaluated on."""
        count = len(self.data.validation)
        return min(self.settings.eval_rows or count, count)


class Paused(Exception):
    """A training is where `Run.pauses` says, or beyond, and its state is saved; it goes on without the pause."""

    def __init__(self, name: str, step: int):
        super().__init__(f"{name}: paused at step {step}")
        self.name, self.step = name, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    name: str
    # What it is in its run: reference, half, target, control, pretrained, base, before, healed, merged or model.
    kind: str
    origin: str  # how it was initialised, in words
    layers: int
    params: int
    steps: int
    tokens: int  # that it was trained on, each counted once; without padding
    val_loss: float  # nats a token
    seconds: float  # spent training in the process that finished it
    sample: str
    epochs: float | None = None  # how often it saw each of them; None: it was not written down, or none
    trained: int | None = None  # parameters that train; None = all. At the end every bit of the others is as it was
    val_rows: int | None = None  # that val_loss is of; None: it was not written down
    corrected: str = ""  # what was not as configured: steps that were skipped, another rate

    def holds(self, run: Run) -> bool:
        """Whether it was measured, and on the rows that the run measures on now."""
        return math.isfinite(self.val_loss) and self.val_rows in (None, run.val_rows)


def read_result(directory: Path) -> Result | None:
    """That of the finished model whose checkpoints are in `directory`, or None: process 0 reads it for all."""
    read = lambda: read_json(directory / "result.json", kinds_of(Result), "delete it to finish again")  # noqa: E731
    stored = told(read, "look for results")
    return None if stored is None else Result(**{key: stored[key] for key in kinds_of(Result, stored)})


def write_result(directory: Path, result: Result) -> None:
    """Marks the model as finished; one of several processes does."""
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "result.json", dataclasses.asdict(result))


Dtypes = dict[str, Literal["float32", "bfloat16", "float16"]]  # of parameters, by path

# What model.json holds besides what it says of a model that healing left some of unchanged.
ABOUT = {
    "format": int | None, "kind": str | None, "model": dict[str, Any], "store": str, "plan": str | None,
    "dtypes": Dtypes | None,
}  # fmt: skip


def describe_model(
    directory: Path, run: Run, kind: str, model: ModelConfig, plan: DepthPlan | None, **more: Any
) -> None:
    """Writes model.json: what an export needs besides a checkpoint. UserError if it was of another model before."""
    about = {"kind": kind, "model": dataclasses.asdict(model), "store": run.data.store, "plan": plan and plan.to_yaml()}
    directory.mkdir(parents=True, exist_ok=True)
    path, then = directory / "model.json", model
    with contextlib.suppress(UserError, KeyError, TypeError, ValueError):  # one that is damaged is written anew
        then = ModelConfig.from_dict((read_json(path, {"model": dict[str, Any]}, "") or {})["model"])
    fields = [(f.name, getattr(then, f.name), getattr(model, f.name)) for f in dataclasses.fields(model)]
    if differing := [f"{name} was {old}, now {new}" for name, old, new in fields if old != new]:
        hint = "put the config.json that it began with back, or choose another --workdir"
        raise UserError(f"the run began with another model: {'; '.join(differing[:3])}", at=str(directory), hint=hint)
    write_json(path, about | more)


def check_digest(directory: Path, params: Any) -> str:
    """The digest of params that stay the same, kept in `directory`; UserError if it was another before."""
    now, path = digest(params), directory / "digest.json"
    hint = "delete it if these parameters are those the run began with"
    then = told(lambda: read_json(path, {"digest": str | None}, hint), f"read {path}")
    if then is not None and then.get("digest") != now:
        raise UserError(
            f"{directory}: these parameters are not those the run began with; "
            "put the model that it began with back, or choose another --workdir"
        )
    if jax.process_index() == 0 and then is None:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"digest": now}))
    return now
