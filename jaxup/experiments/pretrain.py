"""Pretraining: train one model on text, from random values.

With `train.grow` it begins with fewer layers and gets more at a share of the steps: each depth is a model of its own
in the run's checkpoints, begun with the last state of the one before it, and all have one curve.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxup.depth.compose import compose
from jaxup.depth.plan import ZEROED, DepthPlan
from jaxup.depth.recipes import inherit
from jaxup.depth.result import result_config
from jaxup.errors import UserError, suggest, within
from jaxup.experiments import report
from jaxup.experiments.common import OnText, corpus, new_model, on_course
from jaxup.experiments.config import section
from jaxup.experiments.measures import check, measured
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params
from jaxup.training.growth import grown
from jaxup.training.loop import load_trained, random_params, train_model
from jaxup.training.optimizer import learning_rate
from jaxup.training.run import Part, Result, Run, Settings, Stage
from jaxup.training.step import TrainState

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

MODEL = "model"
# What of a copy is not as in the layer that it is of.
BY: dict[str, dict[str, Any]] = {
    "zeroed": {"scales": ZEROED}, "copied": {}, "random": {"role": "new", "parts": ()},
}  # fmt: skip
RECIPES = ("interleave", "stack")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    grow: str  # layers, and the share of the steps after which there are so many: "2@0, 4@0.4"; "" = all from the start
    grown_by: str  # what new layers are, of BY
    grow_recipe: str  # where they are, of RECIPES
    restart: bool  # each depth has a fresh optimizer and a schedule of its own

    def __post_init__(self):
        for key, known in (("grown_by", BY), ("grow_recipe", RECIPES)):
            if (value := getattr(self, key)) not in known:
                raise UserError(f"unknown {value!r}{suggest(value, known)}", at=f"train.{key}")


class Pretrain(OnText):
    sections = ("model", "data", "train", "measure")
    scored = MODEL

    def __init__(self, config: ConfigDict, settings: Settings, mesh: Mesh):
        super().__init__(config, settings, mesh)
        self._growth = section(GrowthConfig, config.train)
        self._check_steps()
        self._data_config = corpus(config.data, tokenizer_files=config.data.tokenizer)
        self._vocab_size = config.model.vocab_size or None
        model = self._read_model()
        self._check_model(model)
        check(config.measure.rows)
        depths = depths_of(self._growth.grow, model)
        with within("train.grow"):  # a zeroed copy of a layer that is normalised after the sum is not silent
            for (fewer, _), (more, _) in itertools.pairwise(depths):
                result_config(deeper(MODEL, fewer, more, self._growth), {MODEL: model.with_layers(range(fewer))})
        if config.steps:  # else the data says how many
            self._parts(depths, config.steps)

    def _read_model(self, tokens: int = 1) -> ModelConfig:
        return new_model(self._config.model, tokens)

    def open_data(self, root: str) -> None:
        super().open_data(root)
        if self._growth.grow:
            stages = self.stages()
            self.inputs["growth"] = ", ".join(f"{stage.model.num_layers} from step {stage.first}" for stage in stages)

    def stages(self, *, most: bool = False) -> list[Stage]:
        return [
            Stage(
                name=MODEL if layers == self._model.num_layers else f"{MODEL}_{layers}", first=first, steps=last,
                model=self._model.with_layers(range(layers)), data=self.data, settings=self._settings,
            )
            for layers, first, last in self._parts(depths_of(self._growth.grow, self._model), self.steps)
        ]  # fmt: skip

    def _parts(self, depths: list[tuple[int, float]], steps: int) -> list[tuple[int, int, int]]:
        """(layers, steps before, steps in the end) of each depth."""
        ends = [*(round(share * steps) for _, share in depths), steps]
        parts = [(layers, first, last) for (layers, _), first, last in zip(depths, ends, ends[1:])]
        for layers, first, last in parts:
            if first >= last:
                what = f"of {steps} steps, {layers} layers have those from {first} to {last}, which are none"
                raise UserError(what, at=f"train.grow={self._growth.grow}")
            if self._growth.restart:
                learning_rate(self._settings.optimizer, last - first)  # refuses a warmup that does not fit
        return parts

    def carry_out(self, run: Run, title: str) -> None:
        stages, growth = self.stages(), self._growth
        run, results, plan = on_course(run, stages), list[Result](), None
        for index, stage in enumerate(stages):
            part = Part(
                curve=MODEL, first=stage.first, seconds=results[-1].seconds if results else 0.0,
                schedule=(stage.first, stage.own_steps) if growth.restart else (0, self.steps),
            )  # fmt: skip
            origin = f"random, seed {run.settings.seed}"
            initialise: Callable[[], Params | TrainState] = functools.partial(random_params, run, stage.model)
            if index:
                before = stages[index - 1]
                step = deeper(before.name, before.model.num_layers, stage.model.num_layers, growth)
                plan, origin = compose(step, {before.name: plan} if plan else {}), _described(growth, before, stage)
                initialise = functools.partial(
                    grown, run, results[-1], before.model, step, stage.model, part, restart=growth.restart
                )
            trained = train_model(
                run, stage.name, stage.model, kind=MODEL, steps=stage.steps, origin=origin, plan=plan,
                initialise=initialise, part=part,
            )  # fmt: skip
            results.append(trained)
        made = results[-1]
        params, rows, notes = load_trained(run, made, self._model), self._config.measure.rows, list[str]()
        if rows:
            start = None if len(stages) > 1 else functools.partial(random_params, run, self._model)
            notes = measured(run, rows, self._model, params, start)
        source = f"{MODEL} at step {made.steps} of the run {run.directory.resolve().name}"
        self._finish(
            run, title, results, self._model, params, plan, made=made, notes=notes,
            plan_title="The layers of the first depth in the last one", loss_of="token",
            finding=report.trained,
            export={"tokenizer": self.data.tokenizer, "dtype": "float32", "source": source},
        )  # fmt: skip


def depths_of(grow: str, model: ModelConfig) -> list[tuple[int, float]]:
    """The depths of a training with the shares of its steps from which on they are; UserError if nothing grows."""
    if not grow:
        return [(model.num_layers, 0.0)]
    at, found = f"train.grow={grow}", re.findall(r"(\d{1,6})@(\d*\.?\d+)", grow)
    if re.sub(r"\s", "", grow) != ",".join(map("@".join, found)):
        raise UserError("not layers and shares of the steps such as '2@0, 4@0.4'", at=at)
    depths = [(int(layers), float(share)) for layers, share in found]
    if len(depths) == 1:
        raise UserError("one depth is no growth", at=at, hint="leave it empty, and set model.num_layers")
    if depths[0][0] < 1 or depths[0][1]:
        raise UserError("it begins with at least one layer, at 0", at=at)
    for (fewer, sooner), (more, later) in itertools.pairwise(depths):
        if more <= fewer:
            raise UserError(f"{more} layers after {fewer}: a model only grows", at=at)
        if not sooner < later < 1:
            raise UserError(f"{later:g} after {sooner:g}: shares of the steps go up and stay below 1", at=at)
    if (last := depths[-1][0]) != model.num_layers:
        raise UserError(f"it ends with {last} layers, and model.num_layers={model.num_layers}", at=at)
    if names := ", ".join(model.columns()):
        raise UserError(f"the layers of this model differ ({names}): which are there first is not said", at=at)
    return depths


def deeper(source: str, source_layers: int, layers: int, growth: GrowthConfig) -> DepthPlan:
    """The plan of a growth. Where there is not one copy of each layer those of the later ones come first."""
    n, m = source_layers, layers
    if growth.grow_recipe == "interleave":
        order = [-(-(i + 1) * n // m) - 1 for i in range(m)]
    else:
        order = [*range(n)] * (m // n) + [*range(n - m % n, n)]
    plan, new = inherit(source, n, order), BY[growth.grown_by]
    rows = (dataclasses.replace(row, **new) if row.role == "copy" else row for row in plan.rows)
    return dataclasses.replace(plan, rows=tuple(rows))


def _described(growth: GrowthConfig, before: Stage, stage: Stage) -> str:
    new = "random layers" if growth.grown_by == "random" else f"{growth.grown_by} copies"
    where = "between its layers" if growth.grow_recipe == "interleave" else "after its layers"
    how = "a fresh optimizer" if growth.restart else "its optimizer"
    return f"{before.name} at step {stage.first}, with {new} {where} and {how}"
