"""Growth while a model trains: a plan applied to what a smaller one has become, its optimizer's moments included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxup.depth.apply import apply
from jaxup.depth.plan import DepthPlan
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params, init
from jaxup.training.loop import load_trained, make_program, restore_trained
from jaxup.training.run import Part, Result, Run
from jaxup.training.selection import EVERYTHING
from jaxup.training.step import TrainState


def grown(
    run: Run, smaller: Result, small: ModelConfig, plan: DepthPlan, model: ModelConfig, part: Part, *, restart: bool
) -> TrainState:
    """The state that `model` begins `part` with: what `plan` makes of the last one of `smaller`, on the mesh.

    Moments are gathered and scaled as the parameters are, so that those of a zeroed projection are zero, as are those
    of what is newly initialised; the optimizer's count, and what is known of spikes, go on. With `restart` they are
    all fresh, as in Inheritune. New values are those of a model of this depth, and others at each growth.
    """
    seed = jax.random.fold_in(jax.random.key(run.settings.seed), part.first)
    program = make_program(model, run.settings.update, part.schedule[1], run.mesh, EVERYTHING, ())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    if restart:
        make = jax.jit(_made, static_argnums=(0, 1), out_shardings=shardings.params)
        fresh = program.init_state(make(plan, model, seed, load_trained(run, smaller, small)))
        return fresh._replace(step=jax.device_put(jnp.int32(part.first), shardings.step))
    make = jax.jit(_grown, static_argnums=(0, 1), out_shardings=shardings)
    return make(plan, model, seed, restore_trained(run, smaller, small, part.schedule[1]))


def _grown(plan: DepthPlan, model: ModelConfig, seed: jax.Array, state: TrainState) -> TrainState:
    params = _made(plan, model, seed, state.params)
    none = jax.tree.map(jnp.zeros_like, params)

    def deeper(part: optax.OptState) -> optax.OptState:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        return part._replace(mu=_applied(plan, part.mu, none), nu=_applied(plan, part.nu, none))

    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    return state._replace(params=params, opt_state=jax.tree.map(deeper, state.opt_state, is_leaf=is_adam))


def _made(plan: DepthPlan, model: ModelConfig, seed: jax.Array, params: Params) -> Params:
    return _applied(plan, params, init(model, seed))


def _applied(plan: DepthPlan, tree: Params, new: Params) -> Params:
    ((name, _),) = plan.sources
    return apply(plan, {name: tree}, new)
