"""A few rows of every tensor of a model, read by byte range: enough to know a tensor again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jaxup.families.layouts import Tensor
from jaxup.files.header import TensorInfo
from jaxup.hub.reader import Checkpoint, dtype_of
from jaxup.model.spec import STACK

VALUES = 8192  # of a parameter, but at least a row at each place; two random ones of so many have a cosine of 0.01
_PLACES, _PLACES_OF_ENDS = 2, 8  # in a matrix; which rows of an embedding are trained depends on the data
_THREADS = 16  # over a network it is the requests in flight that make the speed


class Samples(NamedTuple):
    """The same places of every parameter, of whichever model of this width."""

    values: Mapping[tuple[str, int | None], np.ndarray]  # (path, layer) -> [n], in the dtype of the file
    read: int  # bytes
    total: int  # bytes of the model's files


def sample(checkpoint: Checkpoint, vocabulary: int, positions: int, advance: Callable[[], object]) -> Samples:
    """Samples within the first rows of embedding, head and positions, which models may have different numbers of.

    `advance` is called for each tensor.
    """
    rows = {"embed_tokens": vocabulary, "lm_head.kernel": vocabulary, "embed_positions": positions}

    def values(pair: tuple[Tensor, TensorInfo]) -> tuple[int, dict[tuple[str, int | None], np.ndarray]]:
        tensor, info = pair
        pieces = [_read(checkpoint, info, spans) for spans in _spans(tensor, rows.get(tensor.paths[0]))]
        read = sum(piece.nbytes for piece in pieces)
        if len(pieces) == 1 < len(tensor.paths):  # several params beside each other in each row, or in a vector
            inputs = tensor.row.inputs if tensor.row.layout == "conv1d" else 0
            widths = [math.prod(shape[inputs:]) for shape in tensor.part_shapes]
            pieces = np.split(pieces[0], list(itertools.accumulate(widths))[:-1], axis=-1)
        advance()
        return read, {(path, tensor.layer): piece.reshape(-1) for path, piece in zip(tensor.paths, pieces, strict=True)}

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(values, checkpoint.tensors))
    infos = [info for _, info in checkpoint.tensors]
    headers = sum(min(info.offset for info in infos if info.file == file) for file in {info.file for info in infos})
    total = headers + sum(math.prod(info.shape) * dtype_of(info).itemsize for info in infos)
    merged = {key: piece for _, pieces in found for key, piece in pieces.items()}
    return Samples(merged, headers + sum(read for read, _ in found), total)


def _spans(tensor: Tensor, rows: int | None) -> Iterator[list[slice]]:
    """The rows of the file's array that are read: of each param that has rows of its own, else of all at once."""
    if len(tensor.shape) == 1:
        yield [slice(0, tensor.shape[0])]
        return
    width = math.prod(tensor.shape[1:])
    sizes = [tensor.shape[0]]
    if tensor.row.layout == "linear":
        sizes = [math.prod(shape[tensor.row.inputs :]) for shape in tensor.part_shapes]
    places = _PLACES if tensor.paths[0].startswith(STACK) else _PLACES_OF_ENDS
    for begin, size in zip(itertools.accumulate(sizes, initial=0), sizes):
        size = min(size, rows or size)
        each = max(1, -(-VALUES // (width * places)))
        if each * places >= size:
            yield [slice(begin, begin + size)]
            continue
        starts = [begin + (size - each) * (2 * i + 1) // (2 * places) for i in range(places)]
        yield [slice(start, start + each) for start in starts]


def _read(checkpoint: Checkpoint, info: TensorInfo, spans: list[slice]) -> np.ndarray:
    return np.concatenate([checkpoint.read(info, span) for span in spans])
