"""`jaxup.load`: a language model, with what was put beside it to see and draw, if anything was."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxup.continuous import files
from jaxup.depth.plan import DepthPlan
from jaxup.hub import load as hub
from jaxup.hub.reader import load_config
from jaxup.model.decoder import Decoder, abstract
from jaxup.model.sharding import param_shardings


@functools.wraps(hub.load)
def load(
    path_or_id: str | os.PathLike | DepthPlan | Mapping[str, str | os.PathLike],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    plan: DepthPlan | None = None,
    revision: str | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    progress: bool = False,
) -> Decoder:
    hub.check_dtype(dtype)  # before anything is looked for
    how: Any = {"dtype": dtype, "mesh": mesh, "revision": revision, "strict": strict, "allow_pickle": allow_pickle}
    how["progress"] = progress
    if isinstance(path_or_id, DepthPlan | Mapping) or plan is not None:
        return hub.load(path_or_id, plan=plan, **how)  # what is beside a model was taught to that one
    where: Any = {"revision": revision}
    if (side := files.read(path_or_id, **where)) is None:
        return hub.load(path_or_id, **how)
    # Before the model is read, which takes longer.
    beside = files.read_arrays(path_or_id, side, load_config(os.fspath(path_or_id), **where), **where)
    alone = hub.load(path_or_id, **how)
    config = dataclasses.replace(alone.config, beside=side.task.beside(alone.config))
    if mesh is None:
        (device,) = jax.tree.leaves(alone.params)[0].devices()
        placed = jax.tree.map(lambda leaf: jax.device_put(jnp.asarray(leaf), device), beside)
    else:
        place = lambda leaf, to: jax.make_array_from_callback(leaf.shape, to, lambda part: leaf[part])  # noqa: E731
        placed = jax.tree.map(place, beside, param_shardings(config, mesh)["beside"])
    model = nnx.merge(abstract(config, alone.compute)[0], {**alone.params, "beside": placed})
    model.origin, model.task = alone.origin, side.task
    return model
