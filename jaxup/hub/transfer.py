"""From checked files to sharded params, through a plan.

Every tensor of the files is split by rows over all devices, read by each process for its own devices
only, put there, and then moved, transposed to our layout, into its place in the stack of layers by
one compiled program per kind of tensor. So each byte is read by one process, ranges are contiguous
however the params are sharded, and a process holds a few pieces of tensors more than it keeps.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError
from jaxup.hub import reader
from jaxup.hub.header import TensorInfo
from jaxup.hub.layouts import Tensor, flatten
from jaxup.hub.reader import Checkpoint, dtype_of, is_finite
from jaxup.hub.storage import Local
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import abstract, init
from jaxup.progress import Progress

_READ_AHEAD = 64 * 2**20  # bytes


def transfer(
    plan: DepthPlan, config: ModelConfig, checkpoints: Mapping[str, Checkpoint], shardings: Mapping[str, Any],
    dtype: str | None, *, strict: bool, progress: bool,
) -> dict[str, jax.Array]:  # fmt: skip
    """The leaves, by dotted path, of what `plan` makes of the checkpoints: a model of `config`; see `load`."""
    moves = list(_moves(plan, config, checkpoints))
    alone = jax.process_count() == 1
    # Elsewhere a process would have to read what belongs to others.
    digests = [_in_background(checkpoint.check_digests) for checkpoint in checkpoints.values()] if alone else []
    leaves = _initial(plan, config, shardings, _leaf_dtypes(plan, shardings, checkpoints, dtype))
    finite = np.ones(len(moves), bool)
    total, done = sum(_nbytes(move.info) for move in moves), 0
    # Over a network it is the requests in flight that make the speed; here, more threads cost memory.
    local = all(isinstance(checkpoint.storage, Local) for checkpoint in checkpoints.values())
    with (
        concurrent.futures.ThreadPoolExecutor(2 if local else 16) as pool,
        Progress("load", total=total // 10**6, unit="MB") if progress else contextlib.nullcontext() as shown,
    ):
        for i, (move, fetched) in enumerate(_read_ahead(pool, moves, shardings)):
            array, finite[i] = fetched.result()
            for path, layer, part, scale in move.targets:
                leaf, sharding = leaves[path], shardings[path]
                if layer is None and (array.shape, array.dtype, array.sharding) == (leaf.shape, leaf.dtype, sharding):
                    leaves[path] = array
                    continue
                # One program for all layers.
                like = move.tensor._replace(name="", layer=None if layer is None else 0)
                place = _placer(like, part, scale, leaf.dtype, sharding)
                leaves[path] = place(None if layer is None else leaf, array, np.int32(layer or 0))
            # One tensor at a time on the device: the next ones are read meanwhile.
            jax.block_until_ready([leaves[path] for path, *_ in move.targets])
            done += _nbytes(move.info)
            if shown:
                shown.update(done // 10**6)
    if not alone:
        finite = multihost_utils.process_allgather(finite).all(axis=0)
    for digest in digests:
        digest.result()
    if not finite.all():
        _report([move for move, ok in zip(moves, finite, strict=True) if not ok], strict)
    return leaves


class _Move(NamedTuple):
    """A tensor of a file and the places in the result that it is put into."""

    checkpoint: Checkpoint
    tensor: Tensor
    info: TensorInfo
    targets: tuple[tuple[str, int | None, int, float], ...]  # (leaf, layer, index among the tensor's paths, scale)


def _moves(plan: DepthPlan, config: ModelConfig, checkpoints: Mapping[str, Checkpoint]) -> Iterator[_Move]:
    """What is to be read, in the order in which it lies in the files."""
    leaves = flatten(abstract(config)[1])
    placed = collections.defaultdict(list)
    for position, row in enumerate(plan.rows):
        placed[row.source, row.layer].append((position, row))
    for name, checkpoint in checkpoints.items():
        for tensor, info in sorted(checkpoint.tensors, key=lambda pair: (pair[1].file, pair[1].offset)):
            targets = []
            for part, path in enumerate(tensor.paths):
                if tensor.layer is None:
                    if path in leaves and getattr(plan, path.split(".")[0]) == name:
                        targets.append((path, None, part, 1.0))
                    continue
                inside = path.removeprefix("blocks.")
                for position, row in placed[name, tensor.layer]:
                    # A parameter that is scaled by zero stays as the stack begins, and is not read.
                    if row.inherits(inside) and row.scale(inside):
                        targets.append((path, position, part, row.scale(inside)))
            if targets:
                yield _Move(checkpoint, tensor, info, tuple(targets))


def _leaf_dtypes(
    plan: DepthPlan, paths: Iterable[str], checkpoints: Mapping[str, Checkpoint], dtype: str | None
) -> dict[str, np.dtype]:
    if dtype is not None:
        return dict.fromkeys(paths, jnp.dtype(dtype))
    stored = {name: reader.common_dtypes(checkpoint.tensors) for name, checkpoint in checkpoints.items()}
    dtypes = {}
    for path in paths:
        inside = path.removeprefix("blocks.")
        sources = (
            {getattr(plan, path.split(".")[0])} - {None}
            if inside == path
            else {row.source for row in plan.rows if row.inherits(inside)}
        )
        found = [stored[name][path] for name in sources]
        dtypes[path] = functools.reduce(np.promote_types, found) if found else jnp.dtype("float32")
    return dtypes


def _initial(
    plan: DepthPlan, config: ModelConfig, shardings: Mapping[str, Any], dtypes: Mapping[str, np.dtype]
) -> dict[str, Any]:
    """What the tensors are put into: zeros, or fresh parameters where the plan inherits nothing.

    What is wholly replaced is a ShapeDtypeStruct only.
    """
    shapes = flatten(abstract(config)[1])
    leaves = {path: jax.ShapeDtypeStruct(shape.shape, dtypes[path]) for path, shape in shapes.items()}
    fresh = {path for path in leaves if _is_fresh(plan, path)}
    made = fresh | {path for path in leaves if path.startswith("blocks.")}

    def make() -> dict[str, jax.Array]:
        values = flatten(init(config, 0)) if fresh else {}
        result = {path: values[path] if path in fresh else jnp.zeros(leaves[path].shape) for path in made}
        for path in fresh:
            if path.startswith("blocks."):
                inside = path.removeprefix("blocks.")
                scales = np.array([0 if row.inherits(inside) else row.scale(inside) for row in plan.rows], np.float32)
                scales = scales.reshape(-1, *[1] * (result[path].ndim - 1))
                result[path] = jnp.where(scales == 0, 0, result[path] * scales)
        return {path: leaf.astype(dtypes[path]) for path, leaf in result.items()}

    return leaves | jax.jit(make, out_shardings={path: shardings[path] for path in made})()


def _is_fresh(plan: DepthPlan, path: str) -> bool:
    inside = path.removeprefix("blocks.")
    if inside == path:
        return getattr(plan, path.split(".")[0]) is None
    return not all(row.inherits(inside) for row in plan.rows)


def _read_ahead(
    pool: concurrent.futures.Executor, moves: Iterable[_Move], shardings: Mapping[str, Any]
) -> Iterator[tuple[_Move, concurrent.futures.Future]]:
    """Starts reading a few tensors before they are asked for."""
    queue, size, share = collections.deque(), 0, jax.process_count()
    for move in moves:
        queue.append((move, pool.submit(_fetch, move, shardings[move.targets[0][0]])))
        size += _nbytes(move.info) // share
        while size > _READ_AHEAD:
            size -= _nbytes(queue[0][0].info) // share
            yield queue.popleft()
    yield from queue


def _fetch(move: _Move, target: Any) -> tuple[jax.Array, bool]:
    """A tensor on the devices, inputs first, and whether what this process read of it is finite.

    Matrices are split over all devices of the mesh, along the rows of the file, of which the last
    device may get fewer: zeros make up for them. Vectors are everywhere. `target` is the sharding
    of the leaf that the tensor becomes part of.
    """
    shape, transposed = move.info.shape, move.tensor.row.layout == "linear"
    sharding = target
    if isinstance(target, NamedSharding):
        mesh, matrix = target.mesh, len(shape) == 2
        rows = [_axes(move.tensor, target).all_rows] if matrix else []
        sharding = NamedSharding(mesh, PartitionSpec(*([None] * transposed + rows)))
        if matrix:
            shape = (-(-shape[0] // mesh.size) * mesh.size, shape[1])
    if transposed:
        shape = shape[::-1]
    devices = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        start, stop, _ = index[-1 if transposed else 0].indices(shape[-1 if transposed else 0])
        devices[start, stop].append(device)
    arrays, finite = {}, True
    for (start, stop), group in devices.items():
        rows = slice(min(start, move.info.shape[0]), min(stop, move.info.shape[0]))
        piece = move.checkpoint.read(move.info, rows)
        finite = finite and is_finite(piece)
        if move.tensor.paths == ("embed_tokens",):
            reader.check_tied(move.checkpoint, piece, rows)
        if len(piece) < stop - start:
            piece = np.concatenate([piece, np.zeros((stop - start - len(piece), *piece.shape[1:]), piece.dtype)])
        # Transposed by the transfer: XLA's is several times as fast as numpy's, or its own on a CPU.
        arrays |= {device: jax.device_put(piece.T if transposed else piece, device) for device in group}
    jax.block_until_ready(list(arrays.values()))
    ordered = [arrays[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, ordered), finite


class _Axes(NamedTuple):
    """Mesh axes that split a matrix of the file: along its rows, along its columns, and those that do not."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def all_rows(self) -> tuple[str, ...]:
        """The rows split over all: in this order every step to the leaf's own layout moves the last axis only."""
        return self.rows + self.columns + self.others


def _axes(tensor: Tensor, target: NamedSharding) -> _Axes:
    spec = tuple(target.spec)[0 if tensor.layer is None else 1 :]
    first, second = spec[: tensor.row.inputs], spec[tensor.row.inputs :]
    rows, columns = (second, first) if tensor.row.layout == "linear" else (first, second)
    rows, columns = (tuple(name for name in names if name is not None) for names in (rows, columns))
    return _Axes(rows, columns, tuple(name for name in target.mesh.axis_names if name not in rows + columns))


@functools.lru_cache(maxsize=256)
def _placer(tensor: Tensor, part: int, scale: float, dtype: np.dtype, target: Any):
    """A compiled (leaf [L, ...] or None, fetched tensor, layer) -> leaf with one of the tensor's parts in it."""
    row, shapes = tensor.row, tensor.part_shapes
    shape, transposed = shapes[part], row.layout == "linear"

    def place(leaf, array, layer):
        if row.layout == "flat":
            sizes = [math.prod(s) for s in shapes]
            x = array[sum(sizes[:part]) :][: sizes[part]]
        else:
            x = matrix(array)
        x = x.reshape(shape).astype(dtype)
        if scale != 1:
            x = (x.astype(jnp.promote_types(dtype, jnp.float32)) * scale).astype(dtype)
        if leaf is None:
            return x
        # As integers: XLA's CPU updates a bfloat16 array by converting all of it to float32 and back.
        leaf, x = (jax.lax.bitcast_convert_type(a, f"uint{8 * dtype.itemsize}") for a in (leaf, x))
        leaf = jax.lax.dynamic_update_index_in_dim(leaf, x, layer, 0)
        return jax.lax.bitcast_convert_type(leaf, dtype)

    def matrix(x):
        """The part's [inputs, outputs], from all the file's rows on all devices to the leaf's layout."""
        inputs = math.prod(shape[: row.inputs])
        outputs = [math.prod(s[row.inputs :]) for s in shapes]
        start = sum(outputs[:part])
        if not isinstance(target, NamedSharding):
            return x[:, start : start + outputs[part]]
        axes = _axes(tensor, target)
        if len(shapes) > 1 or x.shape != (inputs, outputs[part]):
            x = split(x, (), ())[:inputs, start : start + outputs[part]]
        else:
            x = split(x, axes.rows + axes.columns, ())
        return split(x, axes.rows, axes.columns)

    def split(x, rows: tuple[str, ...], columns: tuple[str, ...]):
        # XLA finds the way to each of these, but not to the last at once.
        spec = PartitionSpec(*((columns, rows) if transposed else (rows, columns)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(target.mesh, spec))

    return jax.jit(place, donate_argnums=0, out_shardings=target)


def _report(moves: list[_Move], strict: bool) -> None:
    names = [f"{move.tensor.name}" for move in moves]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    message = f"{moves[0].checkpoint.storage.name}: NaN or infinity in {', '.join(names[:3])}{more}"
    if strict:
        raise UserError(message)
    warnings.warn(message, stacklevel=4)


def _in_background(call: Callable[[], Any]) -> concurrent.futures.Future:
    """Not in a pool: hashing takes long, and must not keep an interrupted process alive."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _nbytes(info: TensorInfo) -> int:
    return dtype_of(info).itemsize * math.prod(info.shape)
