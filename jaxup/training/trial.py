"""A training step before there is a run: the memory it needs, and the time it takes.

Memory is that of the program which the run compiles, and for that no array is needed. Time is that of a few real steps
on weights that nobody has trained: a table of speeds would know neither the machine nor the mesh. Where they would take
minutes, the speed of a product of matrices, which no step reaches, says how long a step takes at least.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxup.errors import UserError, first_line
from jaxup.progress import say
from jaxup.training.compiling import fewest_that_fit
from jaxup.training.loop import abstract_params, laid_out, make_program
from jaxup.training.run import Stage
from jaxup.training.sharding import local_rows, micro_batches, place_batch
from jaxup.training.step import Batch, TrainState

STEPS = 3  # that are timed, after one that is not
_PATIENCE = 30.0  # seconds that they may take, at the speed of a product of matrices


def measure_device(dtype: str) -> tuple[float, int]:
    """FLOP/s of a product of matrices on one device, and its bytes: a CPU's are those of the machine."""
    device = jax.local_devices()[0]
    size = 1024 if device.platform == "cpu" else 8192
    product, x = jax.jit(lambda x: x @ x / size), jax.device_put(jnp.ones((size, size), dtype), device)
    seconds = []
    for _ in range(4):  # the first one compiles it
        began = time.monotonic()
        jax.block_until_ready(product(x))
        seconds.append(time.monotonic() - began)
    stats = device.memory_stats() or {}
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    return 2 * size**3 / min(seconds), stats.get("bytes_limit", machine)


class Trial:
    """The step of a model, compiled as the run compiles it, and made a few times where that is soon done."""

    def __init__(self, stage: Stage, mesh: Mesh, speed: float, room: int):
        """`speed` and `room`: of a device, as `measure_device` gives them."""
        size, seed = stage.settings.batch_size, stage.settings.seed
        program = make_program(stage.model, stage.settings.update, mesh, stage.selection, stage.objective)
        state, *beside = arguments(stage, mesh)
        batch = place_batch(stage.data.batches(batch_size=size, seed=seed)(0, local_rows(size, mesh)), size, mesh)
        self.stage, self.failed, self.compiling = stage, "", 0.0
        self.micro_batches = stage.settings.step.accumulation
        self.seconds: float | None = None  # of a step; None: it was not made
        self.memory = held(stage, mesh)  # bytes of a device
        if jax.process_index() == 0:
            say(f"compiling the step of {stage.name}")
        try:
            with jax.set_mesh(mesh):
                began = time.monotonic()
                if self.micro_batches:
                    step = program.train_step.lower(state, batch, *beside).compile()
                else:
                    counts = micro_batches(size, mesh)
                    self.micro_batches, step = fewest_that_fit(program.cut_into, counts, (state, batch, *beside), mesh)
                self.compiling, stats = time.monotonic() - began, step.memory_analysis()
                whole = stats.argument_size_in_bytes + stats.temp_size_in_bytes
                whole += stats.output_size_in_bytes - stats.alias_size_in_bytes
                self.memory["gradients, activations, batch"] = whole - sum(self.memory.values())
                if whole < room and (1 + STEPS) * stage.flops / speed / jax.device_count() < _PATIENCE:
                    self.seconds = _made(step, state, batch, beside)
        except (jax.errors.JaxRuntimeError, UserError) as error:  # mostly for want of memory
            self.failed = first_line(error)


def _made(step: Any, state: TrainState, batch: Batch, beside: list[Any]) -> float:
    """Seconds that a step takes."""
    state = _filled(state)._replace(params=_filled(state.params, 0.02))
    beside = _filled(beside, 0.02)
    state, metrics = step(state, batch, *beside)
    jax.block_until_ready(metrics)
    began = time.monotonic()
    for _ in range(STEPS):
        state, metrics = step(state, batch, *beside)
    jax.block_until_ready((state, metrics))
    return (time.monotonic() - began) / STEPS


def _filled(tree: Any, size: float = 0.0) -> Any:
    """Arrays of such values in the place of none; waves, because a device is faster at multiplying zeros."""

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not size or not leaf.ndim:
            return jnp.zeros(leaf.shape, leaf.dtype)
        wave = jnp.sin(jax.lax.broadcasted_iota(jnp.float32, leaf.shape, leaf.ndim - 1))
        return (size * wave).astype(leaf.dtype)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.jit(lambda: jax.tree.map(fill, tree), out_shardings=shardings)()


def needed(stage: Stage, mesh: Mesh) -> int:
    """Bytes of a device that a training holds from its first step to its last."""
    return sum(held(stage, mesh).values())


def held(stage: Stage, mesh: Mesh) -> dict[str, int]:
    """What they are of."""
    state, _, *beside = arguments(stage, mesh)
    parts = {"parameters": _bytes(state.params), "optimizer": _bytes(state.opt_state)}
    parts |= {"averages": _bytes(state.ema)} if state.ema is not None else {}
    if stage.objective.teacher is not None:
        parts["teacher"] = _bytes(beside.pop())
    return parts | ({"what does not train": _bytes(beside)} if beside else {})


def arguments(stage: Stage, mesh: Mesh) -> tuple[Any, ...]:
    """What a step takes besides its batch, without arrays: the state, the learning rate, what does not train, if
    anything does not, and the params of its teacher, if it has one."""
    program = make_program(stage.model, stage.settings.update, mesh, stage.selection, stage.objective)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    whole = jax.tree.map(lambda leaf: leaf.update(dtype=stage.dtype), abstract_params(stage.model, mesh))
    frozen = jax.eval_shape(program.frozen, whole)
    if stage.selection.partition is not None:
        frozen = laid_out(frozen, stage.selection.partition.shardings(mesh)[1:])
    teacher = stage.objective.teacher
    known = () if teacher is None else (abstract_params(teacher, mesh),)
    return program.abstract_state, rate, *frozen, *known


def _bytes(tree: Any) -> int:
    """On one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
