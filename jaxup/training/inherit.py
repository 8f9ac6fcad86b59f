"""Inheritune, full-data procedure (arXiv 2404.08634): inherit the first layers, train, grow.

1. Train a reference of L layers for T steps, or take a Hugging Face directory; its validation
   loss is the benchmark.
2. Build the target from n of the reference's layers and whatever else `parts` names, with a
   fresh optimizer, and train it for T steps.
3. While its validation loss is worse than the benchmark by more than `tolerance`: n += grow_by,
   rebuild from the reference (nothing of the smaller target is kept), train for T steps again.
4. Train controls of the final target's size from random initialisation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from jaxup.depth.apply import apply, result_config
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import inherit
from jaxup.errors import UserError
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params, count_params, init
from jaxup.model.sharding import param_shardings
from jaxup.training.loop import Result, Run, evaluate, load_trained, random_params, train_model

REFERENCE = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InheritConfig:
    layers: int  # of the first target; 0 = half of the reference's
    which: str  # "first", "last", or the layers themselves: "0,2,4" (then there is no growing)
    parts: tuple[str, ...]  # attention, mlp, norms, embed_tokens, embed_positions, norm, lm_head
    grow_by: int
    tolerance: float  # nats by which the target may be worse than the reference
    control: int  # trains a control for T steps and, from 2 on, another for control * T; 0 = none


@dataclasses.dataclass(frozen=True)
class Outcome:
    results: tuple[Result, ...]  # reference, targets in the order of growth, controls
    plan: DepthPlan  # of the final target
    target: Result
    target_model: ModelConfig


def check(config: InheritConfig, model: ModelConfig) -> DepthPlan:
    """The first target's plan; UserError for anything about `config` that cannot work."""
    if model.tie_embeddings and "lm_head" in config.parts and "embed_tokens" not in config.parts:
        raise UserError("inherit.parts: the head of this model is its embed_tokens; name embed_tokens to inherit it")
    if config.grow_by < 1:
        raise UserError(f"inherit.grow_by must be at least 1, not {config.grow_by}")
    return _plan(config, model.num_layers, config.layers or max(1, model.num_layers // 2))


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
    pretrained: Callable[[], Params] | None = None,
    pretrained_name: str = "",
) -> Outcome:
    """Carries the procedure out; each model resumes, or is skipped if it is finished.

    `model` is the reference's configuration. With `pretrained`, its weights are given and only
    evaluated.
    """
    plan = check(config, model)
    if pretrained is None:
        reference = train_model(
            run, REFERENCE, model, steps=steps, origin=f"random, seed {run.settings.seed}",
            initialise=lambda: random_params(run, model),
        )  # fmt: skip
        source = lambda: load_trained(run, REFERENCE, model)  # noqa: E731
    else:
        source = lambda: jax.device_put(pretrained(), param_shardings(model, run.mesh))  # noqa: E731
        params = source()
        reference = Result(
            name=REFERENCE, origin=pretrained_name, layers=model.num_layers, params=count_params(model), steps=0,
            tokens=0, val_loss=evaluate(run, model, params, steps), seconds=0.0, sample=run.sample(model, params),
        )  # fmt: skip
        del params
    print(f"benchmark: validation loss {reference.val_loss:.4f}, tolerance {config.tolerance}", flush=True)

    results = [reference]
    while True:
        n = plan.num_layers
        target_model = result_config(plan, {REFERENCE: model})
        target = train_model(
            run, f"target_{n}", target_model, steps=steps, origin=_describe(plan, config),
            initialise=lambda plan=plan, target_model=target_model: build(run, plan, target_model, source()),
        )  # fmt: skip
        results.append(target)
        worse_by = target.val_loss - reference.val_loss
        enough = worse_by <= config.tolerance
        print(
            f"target_{n}: validation loss {target.val_loss:.4f}, {worse_by:+.4f} to the reference: "
            + ("reached" if enough else "not reached"),
            flush=True,
        )
        if enough or n >= model.num_layers or config.which not in ("first", "last"):
            break
        plan = _plan(config, model.num_layers, min(n + config.grow_by, model.num_layers))

    for factor in sorted({1, config.control} if config.control else ()):
        control = train_model(
            run, "control" if factor == 1 else f"control_{factor}x", target_model, steps=factor * steps,
            origin=f"random, seed {run.settings.seed}", initialise=lambda: random_params(run, target_model),
        )  # fmt: skip
        results.append(control)
    return Outcome(tuple(results), plan, target, target_model)


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
