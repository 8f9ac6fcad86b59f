"""One mesh of four axes, and how batches and optimizer states lie on it; for params see `jaxup.model.sharding`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxup.errors import UserError
from jaxup.model.attention import balanced
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params
from jaxup.model.sharding import named, undivided

# Rows of a batch are split over both: fsdp is data parallelism that also splits the parameters.
BATCH_AXES = ("data", "fsdp")
_AXES = (*BATCH_AXES, "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int  # one of the four may be -1: all the devices that are left
    fsdp: int
    tensor: int
    context: int = 1  # splits the sequences of a batch


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, context, tensor) over all devices of all processes, or over these, as those of a topology.

    UserError if they do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [getattr(config, axis) for axis in _AXES], len(devices)
    known = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh: {', '.join(_AXES)} must be positive, or one of them -1; got {sizes}")
    sizes = [max(count // known, 1) if s == -1 else s for s in sizes]
    if math.prod(sizes) != count:
        product = f"{' x '.join(_AXES)} = {' x '.join(map(str, sizes))}"
        raise UserError(f"mesh: {product} is not the {count} devices here")
    return Mesh(device_grid(sizes, devices), _AXES, axis_types=(AxisType.Auto,) * len(_AXES))


def device_grid(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices [data, fsdp, ...], so that the later of these axes have the shorter ways.

    Slices of a pod, which devices tell by their `slice_index`, are connected by a slower network than their devices
    are among each other. Along `data` gradients alone are summed: it runs over slices as far as it goes, then fsdp.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, fsdp, *others = sizes
    across = math.gcd(slices, data), slices // math.gcd(slices, data)
    if fsdp % across[1]:
        what = f"data x fsdp = {data} x {fsdp} does not divide over the {slices} slices that these devices are in"
        raise UserError(f"mesh: {what}; data={slices} would")
    # Axes that are no product of a torus' own (data=2, fsdp=32 on 4x4x4) split one of them.
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within, one = (data // across[0], fsdp // across[1], *others), (1,) * len(others)
    return mesh_utils.create_hybrid_device_mesh(within, (*across, *one), devices, allow_split_physical_axes=True)


def check_batch(name: str, size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Refuses a batch whose rows do not divide evenly over the mesh and the micro-batches, 0 = those that fit."""
    parts, cuts = math.prod(mesh.shape[axis] for axis in BATCH_AXES), accumulation or 1
    if size >= 1 and size % (parts * cuts) == 0:
        return
    splits = f"data x fsdp = {parts} devices" + (f" and {cuts} micro-batches" if cuts > 1 else "")
    hint = f"{math.ceil(max(size, 1) / (parts * cuts)) * parts * cuts} would"
    if fewer := [count for count in micro_batches(size, mesh) if count < cuts]:
        hint += f", or step.accumulation={fewer[-1]} (0 = the fewest that fit)"
    raise UserError(f"{name}={size} does not divide over {splits}; {hint}")


def check_length(name: str, seq_len: int, mesh: Mesh) -> None:
    """Refuses rows of which not each device of the axis "context" has two chunks of one length."""
    if seq_len % (chunks := 2 * mesh.shape["context"]) and chunks > 2:
        fits = math.ceil(seq_len / chunks) * chunks
        raise UserError(
            f"{name}={seq_len} does not divide into two chunks for each of mesh.context={chunks // 2}"
            f" devices; {fits} would"
        )


def micro_batches(size: int, mesh: Mesh) -> list[int]:
    """Into how many a batch of `size` rows can be cut, from 1 to one row on each device; none if it does not divide."""
    rows, rest = divmod(size, math.prod(mesh.shape[axis] for axis in BATCH_AXES))
    return [] if rest else [count for count in range(1, rows + 1) if rows % count == 0]


def check_host_memory(compute: Compute, mesh: Mesh) -> None:
    """Refuses to put activations aside in the memory of the host on devices that cannot; all TPUs can."""
    devices = [] if mesh.devices.flat[0].platform == "tpu" else mesh.local_devices[:1]
    if compute.remat == "offload" and any("pinned_host" not in _memories(device) for device in devices):
        what = f"{devices[0].device_kind} cannot put activations aside in the memory of its host"
        raise UserError(what, at="compute.remat=offload", hint="full takes the least of those that can")


def _memories(device: Any) -> set[str]:
    return {memory.kind for memory in device.addressable_memories()}


_HELD = {"embed": "hidden size", "kv_heads": "key/value heads", "mlp": "MLP width", "vocab": "vocabulary"}


def check_heads(model: ModelConfig, mesh: Mesh) -> str:
    """A line on what of the model each device of an axis holds whole, as its size does not divide over it, or "".

    Fewer key/value heads than devices are as good as they get. UserError for the heads of queries: each device would
    compute all of the attention.
    """
    whole = undivided(model, mesh)
    if heads := whole.pop("heads", 0):
        tensor = mesh.shape["tensor"]
        fits = next(n for n in range(tensor - 1, 0, -1) if heads % n == 0 and mesh.size % n == 0)
        raise UserError(f"{heads} attention heads do not divide over mesh.tensor={tensor}; {fits} would")
    over = lambda axis: " x ".join(f"{name}={mesh.shape[name]}" for name in named(axis, mesh))  # noqa: E731
    axes = [f"{_HELD[axis]} {size:,} over {over(axis)}" for axis, size in whole.items()]
    return f"mesh: held whole by each device, as it does not divide: {', '.join(axes)}" if axes else ""


def state_shardings(optimizer: optax.GradientTransformation, opt_state: Any, params: Params, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: moments lie where their parameters do, the rest is replicated."""
    whole = NamedSharding(mesh, PartitionSpec())
    return optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, opt_state, params, transform_non_params=lambda _: whole
    )


def batch_sharding(mesh: Mesh, axes: int = 2) -> NamedSharding:
    """Of the fields of a batch with so many axes: rows, positions of these, and others, which are not split."""
    return NamedSharding(mesh, PartitionSpec(*(BATCH_AXES, "context")[:axes]))


def local_rows(size: int, mesh: Mesh) -> slice:
    """The rows of a global batch of `size` that this process's devices hold."""
    shape = (size, mesh.shape["context"])
    spans = [_span(index, size) for index in batch_sharding(mesh).addressable_devices_indices_map(shape).values()]
    return slice(min(start for start, _ in spans), max(stop for _, stop in spans))


def _span(index: tuple[slice, ...] | None, size: int) -> tuple[int, int]:
    """The rows of `size` that a device holds, from and up to; without an index all."""
    start, stop, _ = index[0].indices(size) if index else (0, size, 1)
    return start, stop


def ordered(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """The batch with its rows in the order in which the axis "context" splits them, and with positions, if it does."""
    if (parts := mesh.shape["context"]) == 1:
        return batch
    tokens = batch["tokens"]
    order = balanced(tokens.shape[1], parts).astype(np.int32)
    return {"positions": np.broadcast_to(order, tokens.shape)} | {
        name: array[:, order] if array.ndim > 1 else array for name, array in batch.items()
    }


def place_batch(local: dict[str, np.ndarray], size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch of `size` rows on the mesh, from each process's `local_rows` of it."""
    first = local_rows(size, mesh).start

    def place(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop = _span(index, size)
            return array[start - first : stop - first, *(index or ())[1:]]

        return jax.make_array_from_callback((size, *array.shape[1:]), batch_sharding(mesh, array.ndim), shard)

    return {name: place(array) for name, array in ordered(local, mesh).items()}
