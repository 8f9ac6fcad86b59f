"""A model opened to be read in blocks of rows of its tensors, whether it lies in files or in a run's checkpoint."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError, first_line
from jaxup.families.layouts import Tensor
from jaxup.files.header import TensorInfo
from jaxup.files.names import split_run
from jaxup.files.storage import LARGEST_TEXT, Local
from jaxup.hub.directory import PLAN
from jaxup.hub.reader import Checkpoint, dtype_of, open_checkpoint
from jaxup.model.config import ModelConfig
from jaxup.model.spec import Param, flatten, spec
from jaxup.text import remote

HEAD, _EMBEDDING = "lm_head.kernel", "embed_tokens"


class Part(NamedTuple):
    """One layer of a parameter as a matrix, of which rows can be read. A vector is a column."""

    rows: int
    columns: int
    turned: bool  # it has the outputs of a kernel as rows, as most files do; a parameter here has its inputs
    itemsize: int
    read: Callable[[slice], np.ndarray]  # [n, columns]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.rows * self.columns * self.itemsize

    def as_turned(self, turned: bool) -> Part:
        """The same with the outputs as rows, or not. What is stored otherwise is read as a whole, once."""
        if turned == self.turned:
            return self
        whole = functools.cache(lambda: self.read(slice(0, self.rows)))
        return Part(self.columns, self.rows, turned, self.itemsize, lambda rows: whole()[:, rows].T)


class Side(NamedTuple):
    """A model."""

    name: str  # as it was given
    config: ModelConfig
    plan: DepthPlan | None  # that it was made by, where that is known
    part: Callable[[str, int | None], Part]  # of a path, and a layer if it is stacked
    remote: bool = False  # every read is a request

    def find(self, path: str, layer: int | None) -> Part | None:
        """None where the model has no such parameter. The head of a tied model is its embedding."""
        if path in spec(self.config):
            return self.part(path, layer)
        if path == HEAD:
            part = self.part(_EMBEDDING, None)
            return part._replace(turned=not part.turned)
        return None


def open_side(model: str | os.PathLike, *, allow_pickle: bool = False) -> Side:
    """The model of that name, see `jaxup.files.names`: RUN@NAME/STEP need not be exported. UserError if it is none."""
    name = os.fspath(model)
    found = split_run(name)
    if found and found[1]:
        from jaxup.training.stored import choose, parse

        run, which = found
        chosen, step, stored = choose(run, *parse(which))
        if not (run / "models" / chosen / str(step)).is_dir():
            return Side(name, stored.model, stored.plan, _in_checkpoint(run, chosen, step, stored), remote(run))
        name = f"{name.rpartition('@')[0]}@{chosen}/{step}"
    checkpoint = open_checkpoint(name, allow_pickle=allow_pickle)
    storage = checkpoint.storage
    plan = None
    if storage.exists(PLAN):
        text = storage.whole(PLAN, LARGEST_TEXT).decode("utf-8", "replace")
        plan = DepthPlan.from_yaml(text, f"{storage.name}: {PLAN}")
    return Side(os.fspath(model), checkpoint.config, plan, _in_files(checkpoint), not isinstance(storage, Local))


# ---- files


def _in_files(checkpoint: Checkpoint) -> Callable[[str, int | None], Part]:
    where = {(path, tensor.layer): (tensor, info) for tensor, info in checkpoint.tensors for path in tensor.paths}
    return lambda path, layer: _file_part(checkpoint, *where[path, layer], path)


def _file_part(checkpoint: Checkpoint, tensor: Tensor, info: TensorInfo, path: str) -> Part:
    """A tensor of a file may hold several parameters, one after the other along the outputs."""
    index, (_, _, layout, inputs) = tensor.paths.index(path), tensor.row
    before, shape = tensor.part_shapes[:index], tensor.part_shapes[index]
    itemsize = dtype_of(info).itemsize
    if layout == "conv1d":
        first, count = (sum(math.prod(s[inputs:]) for s in some) for some in (before, (shape,)))
        columns = slice(first, first + count)
        return Part(tensor.shape[0], count, False, itemsize, lambda rows: checkpoint.read(info, rows)[:, columns])
    if layout == "linear":
        first, count = (sum(math.prod(s[inputs:]) for s in some) for some in (before, (shape,)))
        width = tensor.shape[1]
    elif len(tensor.shape) == 1:
        first, count, width = sum(map(math.prod, before)), math.prod(shape), 1
    else:
        first, (count, width) = 0, shape

    def read(rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(count)
        return checkpoint.read(info, slice(first + start, first + stop)).reshape(-1, width)

    return Part(count, width, layout == "linear", itemsize, read)


# ---- checkpoints


def _in_checkpoint(run: Path, name: str, step: int, stored: Any) -> Callable[[str, int | None], Part]:
    table = spec(stored.model)
    if stored.healed is not None:  # a part of it trained: it is put together with the rest, in memory
        from jaxup.training.stored import restore

        leaves = flatten(restore(run, name, step, stored))
        return lambda path, layer: _array_part(leaves[path], layer, table[path])
    opened = functools.cache(_store(run / "checkpoints" / name / str(step)))
    return lambda path, layer: _array_part(opened(path), layer, table[path])


def _array_part(array: Any, layer: int | None, param: Param) -> Part:
    """Of an array of NumPy or TensorStore, blocks stacked."""
    each = param.each
    inputs = param.inputs or 1
    rows, columns = math.prod(each[:inputs]), math.prod(each[inputs:])
    one = array if layer is None else array[layer]
    itemsize = array.dtype.itemsize if isinstance(array, np.ndarray) else array.dtype.numpy_dtype.itemsize
    if inputs == 1:
        return Part(rows, columns, False, itemsize, lambda some: np.asarray(one[some]).reshape(-1, columns))
    whole = functools.cache(lambda: np.asarray(one).reshape(rows, columns))
    return Part(rows, columns, False, itemsize, lambda some: whole()[some])


def _store(checkpoint: Path) -> Callable[[str], Any]:
    """Path -> its array, opened and not read. Arrays lie in large chunks, which hold all layers: the last ones stay."""
    import tensorstore as ts

    items = [path.parent for path in checkpoint.glob("*/_METADATA")]
    if len(items) != 1:
        raise UserError("not a checkpoint as Orbax writes it", at=str(checkpoint))
    base = f"{items[0]}/" if remote(items[0]) else f"file://{items[0].resolve()}/"
    context = ts.Context({"cache_pool": {"total_bytes_limit": 2**30}})

    def opened(path: str) -> Any:
        kvstore = {"driver": "ocdbt", "base": base, "path": f"params.{path}/"}
        try:
            return ts.open({"driver": "zarr3", "kvstore": kvstore}, context=context, open=True, read=True).result()
        except ValueError as error:
            raise UserError(f"cannot read {path}: {first_line(error)[:300]}", at=str(checkpoint)) from None

    return opened
