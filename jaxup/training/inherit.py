"""Inheritune (arXiv 2404.08634): inherit the first layers, train, and grow or compare sizes.

1. Train a reference of L layers, or take a model that is there; its validation loss is the
   benchmark.
2. Build the target from n of the reference's layers and whatever else `parts` names, with a
   fresh optimizer, and train it for T steps.
3. Full-data procedure: while the target's validation loss is worse than the benchmark by more than
   `tolerance`, n += grow_by, rebuild from the reference (nothing of the smaller target is kept),
   train for T steps again.
   Low-data procedure: T steps are several epochs of little data and there is no growing
   (grow_by = 0). `sweep` trains a target of each of several sizes instead of one.
4. Train controls of the final target's size, or of each of a sweep's, from random initialisation.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable

import jax

from jaxup.depth.apply import apply
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import inherit
from jaxup.depth.result import result_config
from jaxup.errors import UserError
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params, init
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import count_params
from jaxup.text import write_atomically
from jaxup.training.loop import (
    Result,
    Run,
    abstract_params,
    evaluate,
    load_trained,
    random_params,
    read_result,
    train_model,
)

REFERENCE = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InheritConfig:
    layers: int  # of the first target; 0 = half of the reference's
    which: str  # "first", "last", or the layers themselves: "0,2,4" (then there is no growing)
    parts: tuple[str, ...]  # attention, mlp, norms, embed_tokens, embed_positions, norm, lm_head
    grow_by: int  # 0 = one target only
    sweep: str  # layers of several targets, each from the reference: "4,6,8"; "" = grow from `layers`
    tolerance: float  # nats by which the target may be worse than the reference
    control: int  # trains a control for T steps and, from 2 on, another for control * T; 0 = none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Where the reference comes from."""

    pretrained: Callable[[], Params] | None  # loads it onto the run's mesh; None = it is trained here
    name: str  # of what is loaded
    steps: int  # to train it for, 0 = as many as a target
    all_data: bool  # it is trained on all rows, whatever part of them the targets get


@dataclasses.dataclass(frozen=True)
class Outcome:
    results: tuple[Result, ...]  # reference, targets in the order they were trained, controls
    plan: DepthPlan  # of the final target
    target: Result
    target_model: ModelConfig


def check(config: InheritConfig, model: ModelConfig) -> list[DepthPlan]:
    """Plans of the first target, or of all of a sweep's; UserError for anything about `config` that cannot work."""
    if model.tie_embeddings and "lm_head" in config.parts and "embed_tokens" not in config.parts:
        raise UserError("inherit.parts: the head of this model is its embed_tokens; name embed_tokens to inherit it")
    for key in ("grow_by", "control"):
        if getattr(config, key) < 0:
            raise UserError(f"inherit.{key} must be at least 0, not {getattr(config, key)}")
    if not config.sweep:
        return [_plan(config, model.num_layers, config.layers or max(1, model.num_layers // 2))]
    if config.which not in ("first", "last"):
        raise UserError(f"inherit.sweep: goes with inherit.which=first or last, not with {config.which!r}")
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
    if config.which in ("first", "last"):
        return inherit(REFERENCE, reference_layers, n, which=config.which, parts=config.parts)
    try:
        layers = [int(layer) for layer in config.which.split(",")]
    except ValueError:
        raise UserError(
            f"inherit.which={config.which!r} is neither 'first', 'last' nor layers such as '0,2,4'"
        ) from None
    return inherit(REFERENCE, reference_layers, layers, parts=config.parts)


def run_inherit(
    run: Run,
    config: InheritConfig,
    model: ModelConfig,
    steps: int,
    *,
    reference: Reference,
) -> Outcome:
    """Carries the procedure out for `steps` updates a model; each resumes, or is skipped if it is finished.

    `model` is the reference's configuration.
    """
    pending = collections.deque(check(config, model))
    if reference.pretrained is None:
        reference_run = dataclasses.replace(run, data=run.data.whole()) if reference.all_data else run
        benchmark = train_model(
            reference_run, REFERENCE, model, steps=reference.steps or steps, origin=f"random, seed {run.settings.seed}",
            initialise=lambda: random_params(run, model),
        )  # fmt: skip
        source = lambda: load_trained(run, REFERENCE, abstract_params(model, run.mesh))  # noqa: E731
    else:
        source = reference.pretrained
        benchmark = _measure(run, model, reference)
    print(f"benchmark: validation loss {benchmark.val_loss:.4f}, tolerance {config.tolerance}", flush=True)

    results, controls = [benchmark], []
    while pending:
        plan = pending.popleft()
        n = plan.num_layers
        target_model = result_config(plan, {REFERENCE: model})
        target = train_model(
            run, f"target_{n}", target_model, steps=steps, origin=_describe(plan, config), plan=plan,
            # The reference is gone again when the target is built.
            initialise=lambda plan=plan, target_model=target_model: build(run, plan, target_model, source()),
        )  # fmt: skip
        results.append(target)
        worse_by = target.val_loss - benchmark.val_loss
        enough = worse_by <= config.tolerance
        print(
            f"target_{n}: validation loss {target.val_loss:.4f}, {worse_by:+.4f} to the reference: "
            + ("reached" if enough else "not reached"),
            flush=True,
        )
        if config.grow_by and not enough and n < model.num_layers and config.which in ("first", "last"):
            pending.append(_plan(config, model.num_layers, min(n + config.grow_by, model.num_layers)))
        if config.sweep or not pending:
            controls.append((f"control_{n}" if config.sweep else "control", target_model))

    for name, control_model in controls:
        for factor in sorted({1, config.control} if config.control else ()):
            control = train_model(
                run, name if factor == 1 else f"{name}_{factor}x", control_model, steps=factor * steps,
                origin=f"random, seed {run.settings.seed}",
                initialise=lambda control_model=control_model: random_params(run, control_model),
            )  # fmt: skip
            results.append(control)
    return Outcome(tuple(results), plan, target, target_model)


def _measure(run: Run, model: ModelConfig, reference: Reference) -> Result:
    """What a model that is there reaches; kept beside the checkpoints, so that resuming does not load it again."""
    directory = run.directory / "checkpoints" / REFERENCE
    if stored := read_result(directory):
        return stored
    params = reference.pretrained()
    result = Result(
        name=REFERENCE, origin=reference.name, layers=model.num_layers, params=count_params(model), steps=0,
        tokens=0, val_loss=evaluate(run, model, params), seconds=0.0, sample=run.sample(model, params),
    )  # fmt: skip
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "result.json", json.dumps(dataclasses.asdict(result), indent=1))
    return result


def build(run: Run, plan: DepthPlan, model: ModelConfig, reference: Params) -> Params:
    """The plan applied to the reference's sharded parameters, under jit; what is not inherited is fresh."""

    def target(reference: Params) -> Params:
        return apply(plan, {REFERENCE: reference}, init(model, run.settings.seed))

    return jax.jit(target, out_shardings=param_shardings(model, run.mesh))(reference)


def _describe(plan: DepthPlan, config: InheritConfig) -> str:
    layers = [row.layer for row in plan.rows]
    consecutive = layers == list(range(layers[0], layers[0] + len(layers)))
    which = f"{layers[0]}-{layers[-1]}" if consecutive and len(layers) > 1 else ", ".join(map(str, layers))
    return f"layers {which} of the reference ({', '.join(config.parts)})"
