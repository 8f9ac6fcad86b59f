"""From checked files to params on devices, through a plan.

On accelerators and meshes every tensor of the files is split by rows over all devices, read by each
process for its own devices only, put there, and then moved, transposed to our layout, into its place
in the stack of layers by one compiled program per kind of tensor. So each matrix is read once by all
processes together, ranges are contiguous however the params are sharded, and a process holds a few
pieces of tensors more than it keeps. For one CPU the stacks are filled in place, and become its arrays.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxup.depth.apply import scale_rows
from jaxup.depth.arithmetic import rescale
from jaxup.depth.materials import Bill, Material, common
from jaxup.errors import UserError
from jaxup.families.layouts import Tensor, as_head, from_file, transpose
from jaxup.files.header import TensorInfo
from jaxup.files.storage import Local, aligned
from jaxup.hub import reader
from jaxup.hub.reader import Checkpoint, dtype_of, is_finite
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import init
from jaxup.model.spec import STACK, flatten, spec
from jaxup.progress import Progress
from jaxup.together import gather

_READ_AHEAD = 64 * 2**20  # bytes


def transfer(
    bill: Bill, config: ModelConfig, checkpoints: Mapping[str, Checkpoint], shardings: Mapping[str, Any],
    dtype: str | None, *, strict: bool, progress: bool,
) -> dict[str, jax.Array]:  # fmt: skip
    """The leaves, by path, of a model of `config` made of these materials, but for their noise; see `load`."""
    moves = list(_moves(bill, checkpoints))
    alone = jax.process_count() == 1
    # Elsewhere a process would have to read what belongs to others.
    digests = [_in_background(checkpoint.check_digests) for checkpoint in checkpoints.values()] if alone else []
    casts = {path: _Casts.of(rows, dtype) for path, rows in bill.items()}
    fresh = _fresh(bill, config, shardings, casts)
    sharding = next(iter(shardings.values()))
    platforms = {device.platform for device in sharding.device_set}
    on_host = isinstance(sharding, SingleDeviceSharding) and platforms == {"cpu"}
    target = (_Host if on_host else _Devices)(bill, spec(config), shardings, casts, fresh)
    finite = np.ones(len(moves), bool)
    total, done = sum(_nbytes(move.info) for move in moves), 0
    # Over a network it is the requests in flight that make the speed; here, more threads cost memory.
    local = all(isinstance(checkpoint.storage, Local) for checkpoint in checkpoints.values())
    with (
        concurrent.futures.ThreadPoolExecutor(2 if local else 16) as pool,
        Progress("load", total=total // 10**6, unit="MB", shown=progress) as bar,
    ):
        for i, (move, fetched) in enumerate(_read_ahead(pool, moves, target.fetch)):
            array, finite[i] = fetched.result()
            target.put(move, array)
            done += _nbytes(move.info)
            bar.update(done // 10**6)
    if not alone:
        finite = np.all(gather(finite.tolist(), "done reading"), axis=0)
    for digest in digests:
        digest.result()
    if not finite.all():
        wrong = [move for move, ok in zip(moves, finite, strict=True) if not ok]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        named = ", ".join(move.tensor.name for move in wrong[:3])
        message = f"{wrong[0].checkpoint.storage.name}: NaN or infinity in {named}{more}"
        if strict:
            raise UserError(message)
        warnings.warn(message, stacklevel=3)
    return target.finish()


# (leaf, layer, index among the tensor's paths, factors)
_Target = tuple[str, int | None, int, tuple[float, ...]]


class _Move(NamedTuple):
    """A tensor of a file and the places in the result that it is put into."""

    checkpoint: Checkpoint
    tensor: Tensor
    info: TensorInfo
    targets: tuple[_Target, ...]


def _moves(bill: Bill, checkpoints: Mapping[str, Checkpoint]) -> Iterator[_Move]:
    """What is to be read, in the order in which it lies in the files."""
    wanted = collections.defaultdict(list)  # (source, path, layer) -> places of the result
    for path, rows in bill.items():
        for i, made in enumerate(rows):
            # What is scaled by zero stays as the stack begins, and is not read.
            if made.source is not None and not (made.is_zero and path.startswith(STACK)):
                place = (path, i if path.startswith(STACK) else None)
                wanted[made.source, made.path, made.layer].append((*place, made.factors))
    for name, checkpoint in checkpoints.items():
        for tensor, info in sorted(checkpoint.tensors, key=lambda pair: (pair[1].file, pair[1].offset)):
            targets: list[_Target] = []
            heads: list[_Target] = []
            for part, origin in enumerate(tensor.paths):
                for path, layer, factors in wanted[name, origin, tensor.layer]:
                    # A tied embedding that is a head of its own in the result lies there transposed.
                    (targets if path == origin else heads).append((path, layer, part, factors))
            if targets:
                yield _Move(checkpoint, tensor, info, tuple(targets))
            if heads:
                yield _Move(checkpoint, as_head(tensor), info, tuple(heads))


class _Casts(NamedTuple):
    """The dtypes that a leaf's values take: before they are scaled, after, and in the end."""

    before: np.dtype
    after: np.dtype
    leaf: np.dtype

    @classmethod
    def of(cls, rows: tuple[Material, ...], dtype: str | None) -> _Casts:
        """All layers of a leaf have one dtype: `dtype`, or that which holds them all."""
        before, after = common(made.before for made in rows), common(made.after for made in rows)
        return cls(jnp.dtype(before), jnp.dtype(after), jnp.dtype(dtype or after))

    @property
    def one(self) -> bool:
        return self.before == self.after == self.leaf


def _fresh(
    bill: Bill, config: ModelConfig, shardings: Mapping[str, Any], casts: Mapping[str, _Casts]
) -> dict[str, jax.Array]:
    """Newly initialised leaves of which nothing is inherited, or not in every layer."""
    paths = {path for path, rows in bill.items() if any(made.source is None for made in rows)}
    if not paths:
        return {}

    def make() -> dict[str, jax.Array]:
        made, leaves = flatten(init(config, 0)), {}
        for path in paths:
            leaf = made[path].astype(casts[path].before)
            # What is inherited comes later: zero till then.
            factors = [row.factors if row.source is None else (0.0,) for row in bill[path]]
            stack = leaf if path.startswith(STACK) else leaf[None]
            leaves[path] = scale_rows(stack, factors, casts[path].after).astype(casts[path].leaf).reshape(leaf.shape)
        return leaves

    return jax.jit(make, out_shardings={path: shardings[path] for path in paths})()


def _read_ahead(
    pool: concurrent.futures.Executor, moves: Iterable[_Move], fetch: Callable[[_Move], Any]
) -> Iterator[tuple[_Move, concurrent.futures.Future]]:
    """Starts reading a few tensors before they are asked for."""
    queue: collections.deque[tuple[_Move, concurrent.futures.Future]] = collections.deque()
    size, share = 0, jax.process_count()
    for move in moves:
        queue.append((move, pool.submit(fetch, move)))
        size += _nbytes(move.info) // share
        while size > _READ_AHEAD:
            size -= _nbytes(queue[0][0].info) // share
            yield queue.popleft()
    yield from queue


def _rows(move: _Move, rows: slice) -> tuple[np.ndarray, bool]:
    """Rows of the tensor, and whether they are finite."""
    piece = move.checkpoint.read(move.info, rows)
    if move.tensor.paths == ("embed_tokens",):
        reader.check_tied(move.checkpoint, piece, rows)
    return piece, is_finite(piece)


class _Host:
    """Leaves in the memory of this process, filled by the threads that read."""

    def __init__(self, bill, table, shardings, casts, fresh):
        self._shardings, self._casts = shardings, casts
        self._leaves = {path: aligned(param.shape, casts[path].leaf) for path, param in table.items()}
        for path, leaf in self._leaves.items():
            if path in fresh:
                leaf[...] = fresh[path]
            elif any(made.is_zero for made in bill[path]):
                leaf[...] = 0

    def fetch(self, move: _Move) -> tuple[None, bool]:
        piece, finite = _rows(move, slice(None))
        tensor = move.tensor
        for path, layer, part, factors in move.targets:
            leaf, casts = self._leaves[path], self._casts[path]
            as_it_is = casts.one and not factors
            if as_it_is and layer is None and tensor.row.layout == "same" and piece.dtype == leaf.dtype:
                self._leaves[path] = piece
                continue
            leaf = leaf[... if layer is None else layer]
            if not as_it_is:
                leaf[...] = rescale(from_file(tensor, piece)[part], factors, casts.before, casts.after)
            elif tensor.row.layout == "linear":
                sizes = [math.prod(shape[tensor.row.inputs :]) for shape in tensor.part_shapes]
                start = sum(sizes[:part])
                transpose(piece[start : start + sizes[part]], leaf.reshape(-1, sizes[part]))
            else:
                leaf[...] = from_file(tensor, piece)[part]
        return None, finite

    def put(self, move: _Move, array: None) -> None:
        pass

    def finish(self) -> dict[str, jax.Array]:
        # No copies: they are aligned as XLA wants them.
        return {path: jax.device_put(leaf, self._shardings[path]) for path, leaf in self._leaves.items()}


class _Devices:
    """Leaves on the devices of a mesh, or on one accelerator."""

    def __init__(self, bill, table, shardings, casts, fresh):
        self._shardings, self._casts = shardings, casts
        # Of what stands beside the stacks there is nothing before it is put there.
        self._leaves: dict[str, Any] = {
            path: jax.ShapeDtypeStruct(param.shape, casts[path].leaf) for path, param in table.items()
        }
        stacks = [path for path in table if table[path].stacked and path not in fresh]
        zeros = jax.jit(
            lambda: {path: jnp.zeros(table[path].shape, casts[path].leaf) for path in stacks},
            out_shardings={path: shardings[path] for path in stacks},
        )()
        self._leaves |= fresh | zeros

    def fetch(self, move: _Move) -> tuple[jax.Array, bool]:
        """The tensor on the devices, and whether what this process read of it is finite.

        Matrices are split by rows over all devices of the mesh, filled up by zeros; vectors are everywhere.
        """
        sharding, shape = self._shardings[move.targets[0][0]], move.info.shape
        if isinstance(sharding, NamedSharding):
            mesh, matrix = sharding.mesh, len(shape) == 2
            rows = [sum(_axes(move.tensor, sharding), ())] if matrix else []
            sharding = NamedSharding(mesh, PartitionSpec(*rows))
            if matrix:
                shape = (-(-shape[0] // mesh.size) * mesh.size, shape[1])
        places = collections.defaultdict(list)
        for device, (index, *_) in sharding.addressable_devices_indices_map(shape).items():
            places[index.indices(shape[0])[:2]].append(device)
        arrays: dict[Any, jax.Array] = {}
        finite = True
        for (start, stop), devices in places.items():
            piece, ok = _rows(move, slice(min(start, move.info.shape[0]), min(stop, move.info.shape[0])))
            finite = finite and ok
            if len(piece) < stop - start:
                padding = np.zeros((stop - start - len(piece), *piece.shape[1:]), piece.dtype)
                piece = np.concatenate([piece, padding])
            arrays |= {device: jax.device_put(piece, device) for device in devices}
        ordered = [arrays[device] for device in sharding.addressable_devices_indices_map(shape)]
        return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, ordered)), finite

    def put(self, move: _Move, array: jax.Array) -> None:
        for path, layer, part, factors in move.targets:
            leaf, sharding = self._leaves[path], self._shardings[path]
            # One program for all layers.
            like = move.tensor._replace(name="", layer=None if layer is None else 0)
            place = _placer(like, part, factors, self._casts[path], sharding)
            self._leaves[path] = place(None if layer is None else leaf, array, np.int32(layer or 0))
        # One tensor at a time: the next ones are read meanwhile.
        jax.block_until_ready([self._leaves[path] for path, *_ in move.targets])

    def finish(self) -> dict[str, jax.Array]:
        return self._leaves


def _axes(tensor: Tensor, target: NamedSharding) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that split a matrix of the file: along its rows, along its columns, and those that do not.

    With rows split over all of these, in this order, every step to the leaf's own layout moves the last axis only.
    """
    spec = tuple(target.spec)[0 if tensor.layer is None else 1 :]
    first, second = spec[: tensor.row.inputs], spec[tensor.row.inputs :]
    rows, columns = (second, first) if tensor.row.layout == "linear" else (first, second)
    names = lambda entry: (entry,) if isinstance(entry, str) else entry or ()  # noqa: E731
    rows, columns = (tuple(name for entry in axes for name in names(entry)) for axes in (rows, columns))
    return rows, columns, tuple(name for name in target.mesh.axis_names if name not in rows + columns)


@functools.lru_cache(maxsize=256)
def _placer(
    tensor: Tensor, part: int, factors: tuple[float, ...], casts: _Casts, target: Any
) -> Callable[..., jax.Array]:
    """A compiled (leaf [L, ...] or None, fetched tensor, layer) -> leaf with one of the tensor's parts in it."""
    row, shapes, dtype = tensor.row, tensor.part_shapes, casts.leaf
    shape = shapes[part]

    def place(leaf, array, layer):
        if row.layout == "flat":
            sizes = [math.prod(s) for s in shapes]
            x = array[sum(sizes[:part]) :][: sizes[part]]
        else:
            x = matrix(array)
        x = scale_rows(x.reshape(1, *shape).astype(casts.before), [factors], casts.after)[0].astype(dtype)
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
        begin, end = sum(outputs[:part]), sum(outputs[: part + 1])
        rows, columns = (
            (slice(begin, end), slice(inputs)) if row.layout == "linear" else (slice(inputs), slice(begin, end))
        )
        if isinstance(target, NamedSharding):
            by_rows, by_columns, _ = _axes(tensor, target)
            if x[rows, columns].shape == x.shape:
                x = split(x, by_rows + by_columns, ())
            else:
                x = split(x, (), ())[rows, columns]
            x = split(x, by_rows, by_columns)
        else:
            x = x[rows, columns]
        return x.T if row.layout == "linear" else x

    def split(x: jax.Array, rows: tuple[str, ...], columns: tuple[str, ...]) -> jax.Array:
        # XLA finds the way to each of these, but not to the last at once.
        return jax.lax.with_sharding_constraint(x, NamedSharding(target.mesh, PartitionSpec(rows, columns)))

    return jax.jit(place, donate_argnums=0, out_shardings=target)


def _in_background(call: Callable[[], Any]) -> concurrent.futures.Future:
    """Not in a pool: hashing takes long, and must not keep an interrupted process alive."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _nbytes(info: TensorInfo) -> int:
    return dtype_of(info).itemsize * math.prod(info.shape)
