"""What became of one run of a study: all that its statistics and the stopping of poor runs are made of."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxup.errors import UserError
from jaxup.text import kinds_of, misfit, read_json

MEASURES = "measures.json"  # of a run: {name: [a number for each layer]}
TASKS = "tasks.json"  # of a run: {name: a number}, what it measures of its model beside the loss
COMMON = "common.json"  # of a model: what it is a copy of, which other runs of the study have as well
_AGAIN = "delete the run's directory to make it again"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """One run: a cell of the study with one seed. Arrays have one value for each of the N steps that were logged."""

    cell: str
    seed: int
    group: str  # runs whose gradient norms can be compared: of one batch size, one base and one order of the data
    score: float  # validation loss at the end of the model that the run is for; NaN: it is not at its end
    steps: int  # that were taken
    planned: int  # that it was to take
    batch_size: int
    tokens: int  # of these steps, padding and what is seen again included
    flops: float  # of these steps, as if everything trained
    seconds: float
    curve: tuple[tuple[int, float], ...]  # (step, validation loss)
    samples_N: np.ndarray  # rows that were seen after the step
    flops_N: np.ndarray  # that the steps until then took
    loss_N: np.ndarray
    norm_N: np.ndarray  # of the gradient, before clipping
    # Mean of the squared norms of the gradients of parts of the batch, of `micro_rows` rows each; NaN: not logged.
    micro_N: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    micro_rows: int = 0
    # Tokens and FLOPs of all models of the run. What several runs have in common has one name in all of them.
    costs: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    stopped: str = ""  # why; "" = it was not
    measures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # per layer [L], by name
    tasks: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by name; NaN: there was nothing to measure

    @property
    def finished(self) -> bool:
        return not self.stopped and math.isfinite(self.score)

    @property
    def name(self) -> str:
        return f"{self.cell}-{self.seed}"

    @classmethod
    def to_come(cls, cell: str, seed: int, batch_size: int) -> Outcome:
        """Of a run that has not begun."""
        nothing = np.zeros(0)
        return cls(
            cell=cell, seed=seed, group=group_of(batch_size, seed), score=math.nan, steps=0, planned=0,
            batch_size=batch_size, tokens=0, flops=0.0, seconds=0.0, curve=(), samples_N=nothing, flops_N=nothing,
            loss_N=nothing, norm_N=nothing,
        )  # fmt: skip


def group_of(batch_size: int, seed: int) -> str:
    """The seed decides the order of the data, and what is drawn at the start."""
    return f"batch size {batch_size}, seed {seed}"


def read_outcome(
    directory: Path, name: str, *, cell: str, seed: int | None = None, group: str | None = None, stopped: str = "",
) -> Outcome:  # fmt: skip
    """Of the run in `directory` as far as it is.

    Args:
      name: of the model that is scored; "" = the one that was logged last.
      seed: None = that of its configuration.
      group: None = that of its batch size and its seed.
      stopped: why it was stopped.

    Raises:
      UserError: there is no run, or one of its files is damaged; the message names it.
    """
    from jaxup.training.metrics import MetricsLog

    config = read_json(directory / "config.json", _CONFIG, _AGAIN)
    if config is None:
        raise UserError("no run there (no config.json)", at=str(directory))
    inputs = read_json(directory / "inputs.json", {"steps": int | None}, _AGAIN) or {}
    log = directory / "metrics.jsonl"
    records = _checked(log, MetricsLog(log).read())
    name = name or (records[-1]["model"] if records else "")
    mine, costs = [r for r in records if r["model"] == name], dict[str, tuple[int, float]]()
    for model in sorted({r["model"] for r in records}):
        _, tokens, flops_N, _ = _cost(directory, model, config, [r for r in records if r["model"] == model])
        common = read_json(directory / "checkpoints" / model / COMMON, {"of": str}, "delete it")
        costs[common["of"] if common else f"{directory.name}/{model}"] = tokens, float(flops_N[-1])
    steps, tokens, flops_N, seconds = _cost(directory, name, config, mine)
    result = _result(directory, name)
    logged = [r for r in mine if "loss" in r]
    seed = config["seed"] if seed is None else seed
    column = lambda key: np.array([r.get(key, math.nan) for r in logged], float)  # noqa: E731
    # Where there are several losses of a step, the last one is that of the rows that the result is of.
    curve = {r["step"]: r["val_loss"] for r in mine if math.isfinite(r.get("val_loss", math.nan))}
    return Outcome(
        cell=cell, seed=seed, group=group_of(config["batch_size"], seed) if group is None else group,
        score=math.nan if result is None else result["val_loss"], steps=steps,
        planned=max(steps, inputs.get("steps") or config["steps"]) if result is None else result["steps"],
        batch_size=config["batch_size"], tokens=tokens, flops=float(flops_N[-1]), seconds=seconds,
        curve=tuple(sorted(curve.items())), samples_N=column("step") * config["batch_size"],
        flops_N=flops_N[: len(logged)], loss_N=column("loss"), norm_N=column("gradient_norm"),
        micro_N=column("gradient_square_micro"),
        micro_rows=max((r.get("micro_rows", 0) for r in logged), default=0),
        costs=costs, stopped=stopped,
        measures={name: np.array(of, float) for name, of in _numbers(directory / MEASURES, list[float]).items()},
        tasks={name: math.nan if of is None else of for name, of in _numbers(directory / TASKS, float | None).items()},
    )  # fmt: skip


@dataclasses.dataclass
class _Length:
    seq_len: int = 0  # of rows of text


@dataclasses.dataclass
class _Pretrain:
    batch_size: int
    data: _Length


_CONFIG = {"seed": int, "steps": int, "batch_size": int, "data": _Length, "pretrain": _Pretrain | None}
_NUMBERS = dict.fromkeys(("loss", "val_loss", "gradient_norm", "gradient_square_micro"), float | None)
_KINDS = {**_NUMBERS, "micro_rows": int | None, "gradient_norm_layers": list[float] | None}


def _checked(path: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, record in enumerate(records, 1):
        if wrong := misfit(record, _KINDS):
            raise UserError(f"damaged: {wrong}", at=f"{path}:{number}", hint="delete the line: its point is left out")
    return [{key: value for key, value in record.items() if value is not None} for record in records]


def _result(directory: Path, name: str) -> dict[str, Any] | None:
    from jaxup.training.run import Result

    return read_json(directory / "checkpoints" / name / "result.json", kinds_of(Result), "delete it to finish again")


def _cost(
    directory: Path, name: str, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> tuple[int, int, np.ndarray, float]:
    """Steps of a model's training, their tokens, FLOPs until each step that was logged and in all, seconds."""
    from jaxup.model.config import ModelConfig
    from jaxup.model.spec import flops_per_token

    path = directory / "checkpoints" / name / "model.json"
    sizes = {"seq_len": int | None, "flops_per_token": float | None}  # of older runs the configuration says them
    about = read_json(path, {"model": dict[str, Any], "kind": str | None, **sizes}, _AGAIN)
    logged = [r for r in records if "loss" in r]
    if about is None or not logged:
        return 0, 0, np.zeros(1), 0.0
    try:
        model = ModelConfig.from_dict(about["model"])
    except UserError as error:
        raise UserError(error.what, at=str(path), hint=_AGAIN) from None
    # What a healing begins with may be made in the same run, by settings of its own.
    settings = config["pretrain"] if about.get("kind") == "base" and config.get("pretrain") else config
    seq_len = about.get("seq_len") or settings["data"].get("seq_len", 0)
    per_step = settings["batch_size"] * seq_len
    result = _result(directory, name)
    last = logged[-1]["step"] if result is None else result["steps"]

    @functools.cache
    def of_step(layers: int) -> float:
        """A model that grows while it trains has fewer layers at first."""
        if 0 < layers < model.num_layers:
            return per_step * flops_per_token(model.with_layers(range(layers)), seq_len)
        return per_step * float(about.get("flops_per_token") or flops_per_token(model, seq_len))

    flops = np.array([of_step(len(r.get("gradient_norm_layers", ()))) for r in [*logged, logged[-1]]])
    steps = np.diff([0, *(r["step"] for r in logged), last])
    return last, last * per_step, np.cumsum(flops * steps), 0.0 if result is None else result["seconds"]


def _numbers(path: Path, kind: Any) -> dict[str, Any]:
    """What the file holds by name, all of one kind; nothing if it is not there."""
    found = read_json(path, {}, "delete it: the run's next start measures again") or {}
    kinds = {key: kind for key in found if key != "format"}
    if wrong := misfit(found, kinds):
        raise UserError(f"damaged: {wrong}", at=str(path), hint="delete it: the run's next start measures again")
    return {key: found[key] for key in kinds}
