"""How a tensor of a transformers file holds params of ours, and the way back.

Kernels here are shaped by heads with inputs first, and blocks are stacked on axis 0; files hold one
matrix per layer, in the layout that a `TensorRow` names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxup.model.spec import Param

Layout = Literal["linear", "conv1d", "flat", "same"]


class TensorRow(NamedTuple):
    """A tensor of the file and the params it holds, concatenated along the output axis.

    Layouts, for a kernel of shape [*inputs, *outputs]: `linear` stores [out, in], `conv1d` stores
    [in, out], `flat` stores a vector, `same` stores the param's own shape.
    """

    name: str  # with {layer} where the layer's number stands
    paths: tuple[str, ...]  # dotted, into the params tree
    layout: Layout
    inputs: int = 1  # how many leading axes of the kernel are inputs


class Tensor(NamedTuple):
    """A row for one layer, with its shapes."""

    name: str
    shape: tuple[int, ...]  # in the file
    paths: tuple[str, ...]
    layer: int | None  # index on axis 0 of every param, None for params without a layer axis
    part_shapes: tuple[tuple[int, ...], ...]  # of the params, without the layer axis
    row: TensorRow


def as_head(embedding: Tensor) -> Tensor:
    """The tensor of a tied embedding as that of a head: the file's [vocab, hidden] serves both."""
    vocab, hidden = embedding.shape
    row = TensorRow("lm_head.weight", ("lm_head.kernel",), "linear")
    return Tensor(row.name, (vocab, hidden), row.paths, None, ((hidden, vocab),), row)


def expected_tensors(rows: Sequence[TensorRow], table: Mapping[str, Param]) -> Iterator[Tensor]:
    """The tensors of the files of a model with this `spec`, blocks layer by layer; `rows` are those of its family."""
    stacked = [row for row in rows if table[row.paths[0]].stacked]
    for row in rows:
        if row not in stacked:
            yield _tensor(row, None, [table[path].each for path in row.paths])
    for layer in range(table[stacked[0].paths[0]].shape[0]):
        for row in stacked:
            yield _tensor(row, layer, [table[path].each for path in row.paths])


def _tensor(row: TensorRow, layer: int | None, parts: list[tuple[int, ...]]) -> Tensor:
    inputs, outputs = math.prod(parts[0][: row.inputs]), sum(math.prod(part[row.inputs :]) for part in parts)
    shapes: dict[Layout, tuple[int, ...]] = {
        "linear": (outputs, inputs), "conv1d": (inputs, outputs), "flat": (sum(map(math.prod, parts)),),
        "same": parts[0],
    }  # fmt: skip
    return Tensor(row.name.format(layer=layer), shapes[row.layout], row.paths, layer, tuple(parts), row)


def to_file(tensor: Tensor, parts: list[np.ndarray], dtype: np.dtype | None = None) -> np.ndarray:
    """Params (each without a layer axis) -> the contiguous array of `tensor.shape` that the file holds.

    `dtype` None is that of the first part. What already lies there as the file has it is not copied.
    """
    layout, inputs, dtype = tensor.row.layout, tensor.row.inputs, dtype or parts[0].dtype
    if len(parts) == 1 and layout != "linear":
        return np.ascontiguousarray(parts[0].reshape(tensor.shape), dtype)
    array, end = np.empty(tensor.shape, dtype), 0
    for part in parts:
        part = part.reshape(-1) if layout == "flat" else part.reshape(math.prod(part.shape[:inputs]), -1)
        begin, end = end, end + part.shape[-1]
        if layout == "linear":
            transpose(part, array[begin:end])
        else:
            array[..., begin:end] = part
    return array


def transpose(matrix: np.ndarray, out: np.ndarray) -> None:
    """`out[...] = matrix.T`, cast to the dtype of `out`, five times as fast as numpy does it for 16 bits.

    Strips of rows are first copied to where they lie an odd number of cache lines apart: rows whose
    length is a power of two would drive each other out of the cache.
    """
    height, width = matrix.shape
    strip = np.empty((64, width + 64 // out.itemsize), out.dtype)[:, :width]
    bits = f"u{out.itemsize}"  # numpy copies integers faster than bfloat16
    for i in range(0, height, 64):
        rows = strip[: min(64, height - i)]
        rows[...] = matrix[i : i + 64]
        out.view(bits)[:, i : i + 64] = rows.view(bits).T


def from_file(tensor: Tensor, array: np.ndarray) -> list[np.ndarray]:
    """The inverse of `to_file`, as views of `array`."""
    layout, inputs, shapes = tensor.row.layout, tensor.row.inputs, tensor.part_shapes
    if layout == "same":
        return [array]
    if layout == "linear":
        array = array.T
    first = inputs if layout != "flat" else 0
    ends = np.cumsum([math.prod(s[first:]) for s in shapes])[:-1]
    return [part.reshape(s) for part, s in zip(np.split(array, ends, axis=-1), shapes, strict=True)]
