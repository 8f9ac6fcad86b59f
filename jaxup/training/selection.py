"""What of a model trains, and how fast: as a configuration says it, by the roles and numbers of a plan's layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxup.depth.freeze import ROLES, trainable
from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError, suggest
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params, abstract
from jaxup.model.spec import BESIDE, STACK, flatten, unflatten
from jaxup.training.lora import Adapters, LoraConfig
from jaxup.training.partition import Partition

RATES = (*ROLES, "ends", "beside")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What trains; see `jaxup.depth.freeze.trainable`."""

    layers: str  # all | copies | originals | new | ranges such as "9:12,20" of the result's layers
    parameters: str  # regular expression on their paths; "" = all
    freeze: str  # of these layers, those to leave out: originals, ranges, ...; "" = none
    rates: Mapping[str, float]  # what multiplies the learning rate: of each role, of the ends, of what is beside


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What trains, and how fast. Compared by identity, so that it can be part of a cache's key."""

    partition: Partition | None = None  # None: everything trains
    rates: Params | None = None  # what the learning rate of each trained leaf is multiplied by; None: 1

    def trained(self, params: Params) -> Params:
        """Of abstract params, those that train."""
        return params if self.partition is None else jax.eval_shape(self.partition.split, params)[0]

    def shardings(self, whole: Params, mesh: Mesh) -> Params:
        """NamedShardings of what trains, where `whole` are those of all params."""
        return whole if self.partition is None else self.partition.shardings(mesh)[0]

    def merge(self, trained: Params, before: Params) -> Params:
        """`before` with what was trained in its place; every leaf keeps the dtype it came in."""
        if self.partition is None:
            return jax.tree.map(lambda new, old: new.astype(old.dtype), trained, before)
        return self.partition.merge(trained, before)

    def order_before(self, model: ModelConfig, plan: DepthPlan) -> np.ndarray | None:
        """int32 [layers]: which layers run when, -1 none, so that params computed from it as it was before training.

        To the bit, whatever has been trained: so it is where layers that began with nothing to add are all that trains.
        None where others train, or kernels are quantised. What is beside the decoder is not looked at.
        """
        zeroed = [index for index, row in enumerate(plan.rows) if row.zeroed]
        if self.partition is None or self.partition.rounds:
            return None
        for path in flatten(self.trained(abstract(model)[1])):
            if path.startswith(BESIDE):
                continue
            if not path.startswith(STACK) or not np.isin(self.partition.rows(path), zeroed).all():
                return None
        return np.array([-1 if row.zeroed else index for index, row in enumerate(plan.rows)], np.int32)


EVERYTHING = Selection()


def select(
    model: ModelConfig, plan: DepthPlan, train: TrainConfig, lora: LoraConfig, *, compute: Compute, seed: int
) -> Selection:
    """What `train` and `lora` choose of the model that `plan` makes; UserError if that is nothing, or cannot be.

    The same choice is the same Selection, so that runs one after the other have their programs in common.
    """
    rates = tuple(train.rates.items())
    return _select(
        model, plan, train.layers, train.parameters, train.freeze, rates, lora, compute, seed * bool(lora.rank)
    )


@functools.lru_cache(maxsize=16)
def _select(
    model: ModelConfig, plan: DepthPlan, layers: str, parameters: str, freeze: str, said: tuple[tuple[str, float], ...],
    lora: LoraConfig, compute: Compute, seed: int,
) -> Selection:  # fmt: skip
    rates = dict(said)
    for role, rate in rates.items():
        if role not in RATES:
            raise UserError(f"unknown {role!r}{suggest(role, RATES)}", at="train.rates")
        if not 0 <= rate < float("inf"):
            raise UserError(f"train.rates.{role}={rate}: must be a number and not negative; to freeze: train.freeze")
    shapes = abstract(model)[1]
    try:
        masks = trainable(plan, shapes, layers=layers, parameters=parameters, freeze=freeze)
    except UserError as error:
        raise UserError(error.what, at="train", hint=error.hint) from None
    partition: Partition | None = None
    if lora.rank:
        partition = Adapters(model, compute, masks, lora, seed)
    elif not all(mask.all() for mask in jax.tree.leaves(masks)):
        partition = Partition(model, compute, masks)
    selection = EVERYTHING if partition is None else Selection(partition=partition)
    if all(rate == 1 for rate in rates.values()):
        return selection
    return dataclasses.replace(selection, rates=_rates(plan, selection.trained(shapes), partition, rates))


def _rates(plan: DepthPlan, trained: Params, partition: Partition | None, rates: Mapping[str, float]) -> Params:
    """A tree like `trained`, of float32 arrays: [rows, 1, ...] in "blocks", [] elsewhere."""
    by_role = {role: name for name, role in ROLES.items()}
    names = [by_role[row.role] for row in plan.rows]
    idle = {name: rate for name, rate in rates.items() if rate != 1}

    def rate(path: str, leaf: Any) -> np.ndarray:
        found = ["beside" if path.startswith(BESIDE) else "ends"]
        if path.startswith(STACK):
            found = names if partition is None else [names[row] for row in partition.rows(path)]
        for name in found:
            idle.pop(name, None)
        return np.array([rates.get(name, 1.0) for name in found], np.float32).reshape(-1, *[1] * (leaf.ndim - 1))

    tree = {path: rate(path, leaf) for path, leaf in flatten(trained).items()}
    for name, of in idle.items():
        raise UserError("nothing of that kind is among what trains", at=f"train.rates.{name}={of}")
    return unflatten(tree)
