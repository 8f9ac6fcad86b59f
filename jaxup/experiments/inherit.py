"""Inheritune (arXiv 2404.08634): inherit the first layers, train, and grow or compare sizes.

1. Train a reference of L layers, or take one; its validation loss is the benchmark.
2. Build the target from n of its layers and what else `parts` names, and train it for T steps.
3. With much data: while the target is worse than the benchmark by more than `tolerance`, n += grow_by,
   rebuild from the reference (nothing of the smaller target is kept) and train for T steps again.
   With little: T steps are several epochs, and nothing grows; `sweep` trains targets of several sizes.
4. Train controls of the final target's size, or of each of a sweep's, from random initialisation.

What the paper compares this with is said by `start`, and by `which` and `distill`; no reference is trained that
nothing needs:
  random      the target begins as a control does
  stacked     it begins with the layers of a model of half its depth, trained as long from random values, twice
  half_width  it begins with the first half of heads and MLP in the layers that it inherits
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax

from jaxup.data.open import Data
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import WHICH, inherit, stack
from jaxup.depth.result import result_config
from jaxup.depth.width import halved
from jaxup.errors import UserError, suggest, within
from jaxup.experiments import report
from jaxup.experiments.common import OnText, build, corpus, measured, new_model, on_course, train_fresh, unchanged
from jaxup.experiments.config import section
from jaxup.hub.directory import tokenizer_directory
from jaxup.hub.load import load
from jaxup.hub.reader import load_config
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params
from jaxup.text import write_atomically
from jaxup.training.loop import load_trained, random_params, train_model
from jaxup.training.objective import TEXT, Objective, Taught
from jaxup.training.optimizer import learning_rate
from jaxup.training.run import Result, Run, Settings, Stage

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

REFERENCE = "reference"
HALF = "half"  # the model of half the layers that a stacked target begins with
STARTS = ("inherited", "random", "stacked", "half_width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InheritConfig:
    layers: int  # of the first target; 0 = half of the reference's
    start: str  # of STARTS, what the target begins with
    which: str  # "first", "middle", "last", or the layers themselves: "0,2,4" (then there is no growing)
    parts: tuple[str, ...]  # attention, mlp, norms, embed_tokens, embed_positions, norm, lm_head
    grow_by: int  # 0 = one target only
    sweep: str  # layers of several targets, each from the reference: "4,6,8"; "" = grow from `layers`
    tolerance: float  # nats by which the target may be worse than the reference
    control: int  # trains a control for T steps and, from 2 on, another for control * T; 0 = none
    distill: Mapping[str, float]  # alpha, the share of the reference's predictions in a target's loss, and temperature

    @property
    def inherits(self) -> bool:
        """Whether the target begins with something of the reference."""
        return self.start in ("inherited", "half_width")

    @property
    def asks_reference(self) -> bool:
        """Whether anything in the run does."""
        return self.inherits or self.distill["alpha"] != 0

    def objective(self, reference: ModelConfig) -> Objective:
        """Of targets."""
        with within("inherit.distill"):
            return Taught(model=reference, **self.distill) if self.distill["alpha"] != 0 else TEXT


class Inherit(OnText):
    sections = ("reference", "inherit")
    data: Data

    def __init__(self, config: ConfigDict, settings: Settings, mesh: Mesh):
        super().__init__(config, settings, mesh)
        self._inherit, reference = section(InheritConfig, config.inherit), config.reference
        self._check_steps()
        if reference.steps < 0:
            raise UserError(f"reference.steps must be at least 0, not {reference.steps}")
        if reference.steps:
            learning_rate(settings.optimizer, reference.steps)
        model = self._read_model()
        self.scored = f"target_{check(self._inherit, model)[-1].num_layers}"
        tokenizer = {"tokenizer_files": config.data.tokenizer}
        if reference.path and not config.data.tokenizer:  # the one that it brings along
            files = tokenizer_directory(reference.path, revision=reference.revision or None)
            tokenizer = {"tokenizer": reference.path, "tokenizer_files": str(files)}
        self._data_config = corpus(config.data, **tokenizer)
        self._vocab_size = model.vocab_size if reference.path or config.model.vocab_size else None  # None: the data's
        self._check_model(model)

    def open_data(self, root: str) -> None:
        super().open_data(root)
        if not self._config.reference.path and self._inherit.asks_reference:
            self.inputs["reference.steps"] = self._config.reference.steps or self.steps

    def stages(self, *, most: bool = False) -> list[Stage]:
        plans = check(self._inherit, self._model)
        while most and (larger := self._grown(plans[-1])) is not None:
            plans.append(larger)
        return self._stages(plans)

    def _stages(self, plans: Sequence[DepthPlan]) -> list[Stage]:
        """With these targets."""
        c, stage = self._config.reference, functools.partial(Stage, settings=self._settings)
        data = self.data.whole() if c.all_data and not c.path else self.data
        steps = 0 if c.path else c.steps or self.steps
        found, objective = list[Stage](), self._inherit.objective(self._model)
        if self._inherit.asks_reference:
            found.append(stage(name=REFERENCE, model=self._model, steps=steps, data=data, fresh=steps > 0))
        if self._inherit.start == "stacked":
            found.append(stage(name=HALF, model=self._begins(plans[0]), steps=self.steps, data=self.data, fresh=True))
        for plan in plans:
            name, model = f"target_{plan.num_layers}", self._made(plan)
            found.append(stage(name=name, model=model, steps=self.steps, data=self.data, objective=objective))
        for name, model, steps in self._controls(plans):
            found.append(stage(name=name, model=model, steps=steps, data=self.data, fresh=True))
        return found

    def _begins(self, plan: DepthPlan) -> ModelConfig:
        """The model that the plan takes from: the reference, or one of fewer of its layers."""
        ((_, layers),) = plan.sources
        return self._model.with_layers(range(layers))

    def _wide(self, plan: DepthPlan) -> ModelConfig:
        """What the plan makes."""
        ((name, _),) = plan.sources
        return result_config(plan, {name: self._begins(plan)})

    def _made(self, plan: DepthPlan) -> ModelConfig:
        """The target: that, or one of half its width."""
        return halved(self._wide(plan)) if self._inherit.start == "half_width" else self._wide(plan)

    def carry_out(self, run: Run, title: str) -> None:
        """Each model resumes, or is skipped if it is finished."""
        c, objective = self._inherit, self._inherit.objective(self._model)
        plans, pending = [], collections.deque(check(c, self._model))
        ends = {self.steps, self._config.reference.steps, *(steps for _, _, steps in self._controls(list(pending)))}
        run = on_course(dataclasses.replace(run, evaluated=frozenset(ends)), self.stages())
        results = list[Result]()
        benchmark: Result | None = None
        known: Callable[[], Params] | None = None  # what gives the reference
        if c.asks_reference:
            benchmark, known = self._reference(run)
            results.append(benchmark)
            print(f"benchmark: validation loss {benchmark.val_loss:.4f}, tolerance {c.tolerance}", flush=True)
        begun, begin = (benchmark, known) if c.inherits else (None, None)
        if c.start == "stacked":
            small = self._begins(pending[0])
            begun = train_fresh(run, HALF, small, steps=self.steps)
            begin = functools.partial(load_trained, run, begun, small)
            results.append(begun)
        while pending:
            plans.append(plan := pending.popleft())
            target_model, wide = self._made(plan), self._wide(plan)
            fresh = functools.partial(random_params, run, target_model)
            target = train_model(
                run, f"target_{plan.num_layers}", target_model, kind="target", steps=self.steps, plan=plan,
                origin=self._describe(plan), objective=objective, teacher=known if objective.teacher else None,
                initialise=functools.partial(build, run, plan, target_model, begin, wide) if begin else fresh,
            )  # fmt: skip
            results.append(target)
            self.scored = target.name
            if benchmark is None:
                continue
            enough = target.val_loss - benchmark.val_loss <= c.tolerance
            more = report.worse_by(target, benchmark)
            reached = "reached" if enough else "not reached"
            print(f"{target.name}: validation loss {target.val_loss:.4f}, {more:+.4f} to the reference: {reached}",
                  flush=True)  # fmt: skip
            if not enough and (larger := self._grown(plan)) is not None:
                pending.append(larger)
                run = on_course(run, self._stages([*plans, *pending]))

        for name, control_model, steps in self._controls(plans):
            results.append(train_fresh(run, name, control_model, kind="control", steps=steps))

        if jax.process_index() == 0:
            write_atomically(run.directory / "plan.yaml", plan.to_yaml())
        params = load_trained(run, target, target_model)
        origin = "random values" if begun is None else begun.origin
        if begun is not None and begun.steps:
            origin = (
                f"a {begun.name} trained in the same run" if begun.name == REFERENCE else "a model of half its layers"
            )
        self._finish(
            run, title, results, target_model, params, plan, made=target, plan_title="The final target's plan",
            loss_of="token",
            finding=functools.partial(report.inherited, sweep=bool(c.sweep)),
            export={"tokenizer": self.data.tokenizer, "dtype": "float32", "source": origin},
        )  # fmt: skip

    def _controls(self, plans: Sequence[DepthPlan]) -> Iterator[tuple[str, ModelConfig, int]]:
        """Names, models and steps: of the last target's size, or of each of a sweep's."""
        c = self._inherit
        for plan in plans if c.sweep else plans[-1:]:
            name = f"control_{plan.num_layers}" if c.sweep else "control"
            for factor in sorted({1, c.control} if c.control and c.start != "random" else ()):
                longer = "" if factor == 1 else f"_{factor}x"
                yield name + longer, self._made(plan), factor * self.steps

    def _grown(self, plan: DepthPlan) -> DepthPlan | None:
        """Of the next target, if this one is not good enough; None: it is the last."""
        c, n, most = self._inherit, plan.num_layers, self._model.num_layers
        if not c.grow_by or n >= most or c.which not in WHICH or not c.inherits:
            return None
        return _plan(c, most, min(n + c.grow_by, most))

    def _describe(self, plan: DepthPlan) -> str:
        """How the target begins, and whom it learns from."""
        c, layers = self._inherit, [row.layer for row in plan.rows]
        consecutive = layers == list(range(layers[0], layers[0] + len(layers)))
        which = f"{layers[0]}-{layers[-1]}" if consecutive and len(layers) > 1 else ", ".join(map(str, layers))
        inherited = f"layers {which} of the reference ({', '.join(c.parts)})"
        began = {
            "inherited": inherited, "half_width": f"the first half of heads and MLP of {inherited}",
            "random": f"random, seed {self._settings.seed}", "stacked": f"the layers of {HALF}, twice",
        }[c.start]  # fmt: skip
        objective = c.objective(self._model)
        return f"{began}; learns from the reference's predictions ({objective})" if objective.teacher else began

    def _reference(self, run: Run) -> tuple[Result, Callable[[], Params]]:
        """How good it is, and how to get it: it is gone again once a target is built from it."""
        c, model = self._config.reference, self._model
        if c.path:
            origin = c.path + (f" at {c.revision}" if c.revision else "")
            load = functools.partial(unchanged, run, REFERENCE, model, self._load_reference)
            return measured(run, REFERENCE, model, origin=origin, params=load), load
        whole = dataclasses.replace(run, data=self.data.whole()) if c.all_data else run
        found = train_fresh(whole, REFERENCE, model, steps=c.steps or self.steps)
        return found, functools.partial(load_trained, run, found, model)

    def _load_reference(self) -> Params:
        """The params as float32 master weights, each device's part read straight onto it."""
        c = self._config.reference
        model = load(
            c.path, dtype="float32", mesh=self._mesh, revision=c.revision or None, strict=True,
            allow_pickle=c.allow_pickle, progress=True,
        )  # fmt: skip
        if model.config != self._model:
            raise UserError("config.json has been replaced while the run was going on", at=c.path)
        return model.params

    def _read_model(self, tokens: int = 1) -> ModelConfig:
        """The reference's ModelConfig: of the model at `reference.path`, else of the `model` section."""
        reference = self._config.reference
        if reference.path:
            return load_config(reference.path, revision=reference.revision or None)
        return new_model(self._config.model, tokens)


def check(config: InheritConfig, model: ModelConfig) -> list[DepthPlan]:
    """Plans of the first target, or of all of a sweep's; UserError for anything about `config` that cannot work.

    They take from the reference, but that of a stacked target from the model of half its layers.
    """
    if config.start not in STARTS:
        raise UserError(f"unknown {config.start!r}{suggest(config.start, STARTS)}", at="inherit.start")
    config.objective(model)
    if model.tie_embeddings and "lm_head" in config.parts and "embed_tokens" not in config.parts:
        raise UserError("inherit.parts: the head of this model is its embed_tokens; name embed_tokens to inherit it")
    for key in ("grow_by", "control"):
        if getattr(config, key) < 0:
            raise UserError(f"inherit.{key} must be at least 0, not {getattr(config, key)}")
    if math.isnan(config.tolerance):  # nothing is within it
        raise UserError("inherit.tolerance must be a number")
    if config.start == "half_width":
        with within("inherit.start=half_width"):
            halved(model)
    if not config.sweep or not config.inherits:
        return [_plan(config, model.num_layers, config.layers or max(1, model.num_layers // 2))]
    if config.which not in WHICH:
        raise UserError(f"inherit.sweep: goes with inherit.which={_or(WHICH)}, not with {config.which!r}")
    for key in ("grow_by", "layers"):
        if getattr(config, key):
            raise UserError(f"inherit.sweep: goes with inherit.{key}=0, not {getattr(config, key)}")
    try:
        sizes = [int(n) for n in config.sweep.split(",")]
    except ValueError:
        raise UserError(f"inherit.sweep={config.sweep!r}: not numbers of layers such as '4,6,8'") from None
    if repeated := [n for n, count in collections.Counter(sizes).items() if count > 1]:
        raise UserError(f"inherit.sweep={config.sweep!r}: {repeated[0]} is named more than once")
    return [_plan(config, model.num_layers, n) for n in sizes]


def _plan(config: InheritConfig, reference_layers: int, n: int) -> DepthPlan:
    if not config.inherits:
        nothing = inherit(REFERENCE, reference_layers, n, parts=())  # and refuses more layers than there are
        if config.start == "random":
            return nothing
        if n % 2:
            even = _or([str(m) for m in (n - 1, n + 1) if 0 < m <= reference_layers])
            raise UserError(
                f"{n} layers are no model of half of them twice; {even} would be", at="inherit.start=stacked"
            )
        return stack(HALF, n // 2, 2)
    if config.which in WHICH:
        return inherit(REFERENCE, reference_layers, n, which=config.which, parts=config.parts)
    try:
        layers = [int(layer) for layer in config.which.split(",")]
    except ValueError:
        names = ", ".join(map(repr, WHICH))
        raise UserError(f"inherit.which={config.which!r} is neither {names} nor layers such as '0,2,4'") from None
    return inherit(REFERENCE, reference_layers, layers, parts=config.parts)


def _or(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
