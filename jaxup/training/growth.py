"""Growth while a model trains: a plan applied to what a smaller one has become, its optimizer's moments included."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxup.depth.apply import apply
from jaxup.depth.plan import DepthPlan
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params, init
from jaxup.training.loop import as_argument, load_trained, make_program, restore_trained
from jaxup.training.run import Part, Result, Run, Update
from jaxup.training.selection import EVERYTHING
from jaxup.training.step import TrainState


def grown(
    run: Run, smaller: Result, small: ModelConfig, plan: DepthPlan, model: ModelConfig, part: Part, *, restart: bool
) -> TrainState:
    """The state that `model` begins `part` with: what `plan` makes of the last one of `smaller`, on the mesh.

    Moments are gathered and scaled as the parameters are, so that those of a zeroed projection are zero, as are those
    of what is newly initialised; the optimizer's count, and what is known of spikes, go on, and averages grow as the
    parameters do. With `restart` they are all fresh, as in Inheritune, and where there are averages it is these that
    training goes on from. New values are those of a model of this depth, and others at each growth.
    """
    grow = _growth(plan, model, run.settings.update, run.mesh, restart)
    source = load_trained(run, smaller, small) if restart else restore_trained(run, smaller, small)
    return grow(as_argument(run.settings.seed), np.int32(part.first), source)


@functools.lru_cache(maxsize=8)
def _growth(
    plan: DepthPlan, model: ModelConfig, update: Update, mesh: Mesh, restart: bool
) -> Callable[..., TrainState]:
    """(seed, steps before, state; to restart params) -> state: the same for all seeds."""
    program, ((name, _),) = make_program(model, update, mesh, EVERYTHING), plan.sources

    def applied(tree: Params, new: Params) -> Params:
        return apply(plan, {name: tree}, new)

    def fresh(seed: jax.Array, first: jax.Array) -> Params:
        return init(model, jax.random.fold_in(jax.random.key(seed), first))

    def begun(seed: jax.Array, first: jax.Array, params: Params) -> TrainState:
        return program.init_state(applied(params, fresh(seed, first)))._replace(step=first)

    def gone_on(seed: jax.Array, first: jax.Array, state: TrainState) -> TrainState:
        params = applied(state.params, fresh(seed, first))
        none = jax.tree.map(jnp.zeros_like, params)
        is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731

        def deeper(part: optax.OptState) -> optax.OptState:
            return part._replace(mu=applied(part.mu, none), nu=applied(part.nu, none)) if is_adam(part) else part

        ema = None if state.ema is None else applied(state.ema, fresh(seed, first))
        opt_state = jax.tree.map(deeper, state.opt_state, is_leaf=is_adam)
        return state._replace(params=params, opt_state=opt_state, ema=ema)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    return jax.jit(begun if restart else gone_on, out_shardings=shardings)
