"""Healing: train a model of another depth, or any part of it, on chat data, and compare with what it was made of.

1. Build the model by its plan; keep it in the run, in the dtype it came in, as `before`.
2. Measure the model that the plan begins from (`base`) and `before` on the same validation data: an
   up-scaled model whose copies are zeroed computes what its base does.
3. Train what is selected. A checkpoint stays from the end of each epoch.
4. Train the base itself for the same steps on the same batches: what healing gives beyond training.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxup.depth.freeze import trainable
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import identity
from jaxup.errors import UserError, suggest
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params, abstract
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import STACK, count_params, flatten, unflatten
from jaxup.text import read_json, write_atomically
from jaxup.training.checkpoint import Checkpoints
from jaxup.training.loop import (
    Result,
    Run,
    abstract_params,
    check_digest,
    describe_model,
    evaluate,
    load_trained,
    read_result,
    train_model,
)
from jaxup.training.lora import Adapters, LoraConfig
from jaxup.training.partition import EVERYTHING, Partition, Selection

BASE, BEFORE, HEALED, MERGED, CONTROL = "base", "before", "healed", "merged", "control"
RATES = ("copies", "originals", "new", "ends")
_ROLES = {"copy": "copies", "original": "originals", "new": "new"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What trains; see `jaxup.depth.freeze.trainable`."""

    layers: str  # all | copies | originals | new | ranges such as "9:12,20" of the result's layers
    parameters: str  # regular expression on their paths; "" = all
    freeze: str  # layers that do not train all the same: originals, ranges, ...; "" = none
    rates: Mapping[str, float]  # by role, and of the ends (embedding, norm, head): what multiplies the learning rate


class Source(NamedTuple):
    """A model, and how to get it."""

    model: ModelConfig
    params: Callable[[], Params]  # in the dtype it is stored in, on the run's mesh
    origin: str  # in words


class Outcome(NamedTuple):
    results: tuple[Result, ...]
    params: Params  # of the healed model: `before`, with what was trained in it


def select(
    model: ModelConfig, plan: DepthPlan, train: TrainConfig, lora: LoraConfig, *, compute: Compute, seed: int
) -> Selection:
    """What `train` and `lora` choose of the model that `plan` makes; UserError if that is nothing, or cannot be."""
    for role, rate in train.rates.items():
        if role not in RATES:
            raise UserError(f"train.rates: unknown {role!r}{suggest(role, RATES)}")
        if not 0 <= rate < float("inf"):
            raise UserError(f"train.rates.{role}={rate}: must be a number and not negative; to freeze: train.freeze")
    shapes = abstract(model)[1]
    try:
        masks = trainable(
            plan, shapes, layers=train.layers, parameters=train.parameters, freeze=train.freeze
        )  # fmt: skip
    except UserError as error:
        raise UserError("train" + str(error).removeprefix("freeze")) from None
    if lora.rank:
        partition = Adapters(model, compute, masks, lora, seed)
    elif all(mask.all() for mask in jax.tree.leaves(masks)):
        partition = None
    else:
        partition = Partition(model, compute, masks)
    rates = None
    if any(rate != 1 for rate in train.rates.values()):
        rates = _rates(plan, shapes if partition is None else jax.eval_shape(partition.split, shapes)[0], partition,
                       train.rates)  # fmt: skip
    return Selection(partition=partition, rates=rates)


def _rates(plan: DepthPlan, trained: Params, partition: Any, rates: Mapping[str, float]) -> Params:
    """A tree like `trained`, of float32 arrays: [rows, 1, ...] in "blocks", [] elsewhere."""
    rate_M = np.array([rates.get(_ROLES[row.role], 1.0) for row in plan.rows], np.float32)

    def rate(path: str, leaf: Any) -> np.ndarray:
        if not path.startswith(STACK):
            return np.float32(rates.get("ends", 1.0)).reshape((1,) * leaf.ndim)
        rows = slice(None) if partition is None else partition.rows(path)
        return rate_M[rows].reshape(-1, *[1] * (leaf.ndim - 1))

    return unflatten({path: rate(path, leaf) for path, leaf in flatten(trained).items()})


def run_heal(
    run: Run, plan: DepthPlan, base: Source | None, before: Source, *, selection: Selection, steps: int,
    milestones: frozenset[int], control: Selection | None, about: dict[str, Any],
) -> Outcome:  # fmt: skip
    """Carries it out; what is finished is not done again.

    `base` None: there is no one model that the plan begins from. `control` None: no control is
    trained. `about`: what `jaxup.export` needs to know to put a checkpoint together.
    """
    results = []
    if base is not None:
        base = base._replace(params=functools.partial(_unchanged, run, base.params))
    if base is not None and plan.rows != identity(plan.rows[0].source, base.model.num_layers).rows:
        results.append(_measured(run, BASE, base, base.params))
    begin = lambda: _kept(run, plan, before)  # noqa: E731
    results.append(_measured(run, BEFORE, before, begin))
    healed = train_model(
        run, HEALED, before.model, steps=steps, origin=before.origin, initialise=begin, plan=plan,
        selection=selection, milestones=milestones, about={"before": BEFORE, **about},
    )  # fmt: skip
    results.append(healed)
    if control is not None:
        results.append(train_model(
            run, CONTROL, base.model, steps=steps, origin=f"{base.origin}, trained on the same batches",
            initialise=base.params, selection=control,
        ))  # fmt: skip
    trained = load_state(run, HEALED, before.model, selection)
    with jax.set_mesh(run.mesh):
        whole = param_shardings(before.model, run.mesh)
        params = jax.jit(functools.partial(put_together, selection), out_shardings=whole)(trained, begin())
    if isinstance(selection.partition, Adapters):  # as exported: merged, and where blocks were quantised, not any more
        merged = before._replace(origin=f"{HEALED}, its adapters merged into {BEFORE}")
        results.insert(results.index(healed) + 1, _measured(run, MERGED, merged, lambda: params))
    return Outcome(tuple(results), params)


def put_together(selection: Selection, trained: Params, before: Params) -> Params:
    """The model before healing with what was trained in its place; every leaf keeps the dtype it came in."""
    if selection.partition is None:
        return jax.tree.map(lambda new, old: new.astype(old.dtype), trained, before)
    return selection.partition.merge(trained, before)


def load_state(run: Run, name: str, model: ModelConfig, selection: Selection = EVERYTHING) -> Params:
    """What trained of a finished model."""
    wanted = abstract_params(model, run.mesh)
    if selection.partition is not None:
        shapes = jax.eval_shape(selection.partition.split, wanted)[0]
        wanted = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes, selection.partition.shardings(run.mesh)[0],
        )  # fmt: skip
    return load_trained(run, name, wanted)


def _unchanged(run: Run, params: Callable[[], Params]) -> Params:
    """The base, each time the one that it was at first: files may change under a run."""
    loaded = params()
    directory = run.directory / "checkpoints" / BASE
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    check_digest(directory, loaded)
    return loaded


def _measured(run: Run, name: str, source: Source, params: Callable[[], Params]) -> Result:
    """The model's validation loss and a sample; kept, so that resuming does not load it again."""
    directory = run.directory / "checkpoints" / name
    if stored := read_result(directory):
        return stored
    loaded = params()
    result = Result(
        name=name, origin=source.origin, layers=source.model.num_layers, params=count_params(source.model), steps=0,
        tokens=0, val_loss=evaluate(run, source.model, loaded), seconds=0.0, sample=run.sample(source.model, loaded),
    )  # fmt: skip
    print(f"{name}: {source.origin}; validation loss {result.val_loss:.4f}", flush=True)
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "result.json", json.dumps(dataclasses.asdict(result), indent=1))
    return result


def _kept(run: Run, plan: DepthPlan, before: Source) -> Params:
    """The model before healing, from the run if it is there, else built and put there."""
    directory = run.directory / "checkpoints" / BEFORE
    shapes = abstract_params(before.model, run.mesh)
    advice = f"remove {directory} to have it built again"
    with jax.set_mesh(run.mesh), Checkpoints(directory, keep=1, advice=advice) as checkpoints:
        if checkpoints.latest is not None:
            dtypes = (read_json(directory / "model.json") or {}).get("dtypes")
            if dtypes is None:
                raise UserError(f"{directory}/model.json: gone or damaged; {advice}")
            flat = {
                path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path], sharding=leaf.sharding)
                for path, leaf in flatten(shapes).items()
            }
            return checkpoints.restore_params(0, unflatten(flat))
        params = before.params()
        if jax.process_index() == 0:
            dtypes = {path: leaf.dtype.name for path, leaf in flatten(params).items()}
            describe_model(directory, run, before.model, plan, dtypes=dtypes)
        checkpoints.save_params(0, params)
        return params
