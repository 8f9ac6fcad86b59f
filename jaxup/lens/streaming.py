"""Models of any size compared in the memory of a few blocks of rows: each thread takes a tensor of all of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np

from jaxup.depth.arithmetic import rescale
from jaxup.lens.metrics import BLOCK, RANK, Comparer, Rank, Sums, widened
from jaxup.lens.sides import Part
from jaxup.progress import Progress

Pair = tuple[int, int]
_READ = 2**20  # values of one read; where each is a request:
_REQUEST = 2**24


class Tensor(NamedTuple):
    """A layer of a parameter in each of the models; None where one has nothing to compare."""

    parts: tuple[Part | None, ...]
    # What is done to the values of a model before they are compared: factors, dtype before and after.
    scaled: tuple[tuple[tuple[float, ...], str | None, str | None], ...]

    @property
    def size(self) -> int:
        """Bytes to be read."""
        return sum(part.size for part in self.parts if part is not None)


class Compared(NamedTuple):
    """Of one pair."""

    metrics: dict[str, float]
    not_finite: Pair  # values of the first and of the second


def compared(
    tensors: Mapping[object, Tensor], pairs: Sequence[Pair], *, rank: bool, remote: bool, progress: bool
) -> Iterator[tuple[object, dict[Pair, Compared]]]:
    """(key, what its pairs come to), as each gets ready. The largest are begun first."""
    done, lock, local = 0, threading.Lock(), threading.local()
    total = sum(tensor.size for tensor in tensors.values())
    with Progress("diff", total=max(1, total >> 20), unit="MiB", shown=progress) as bar:

        def read(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                bar.update(done >> 20)

        def work(tensor: Tensor) -> dict[Pair, Compared]:
            if not hasattr(local, "comparer"):
                local.comparer = Comparer()
                local.buffers = [np.empty(BLOCK, np.float32) for _ in tensor.parts]
            values = _REQUEST if remote else _READ
            with np.errstate(all="ignore"):
                return _compare(tensor, pairs, local.comparer, local.buffers, rank=rank, values=values, read=read)

        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1) * (4 if remote else 1))
        try:
            by_size = sorted(tensors, key=lambda key: tensors[key].size, reverse=True)
            futures = {pool.submit(work, tensors[key]): key for key in by_size}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _compare(
    tensor: Tensor, pairs: Sequence[Pair], comparer: Comparer, buffers: Sequence[np.ndarray], *, rank: bool,
    values: int, read: Callable[[int], None],
) -> dict[Pair, Compared]:  # fmt: skip
    there = {index: part for index, part in enumerate(tensor.parts) if part is not None}
    pairs = [(a, b) for a, b in pairs if a in there and b in there]
    if not pairs:
        return {}
    # As most of them lie: turning one takes its memory.
    turned = sorted(part.turned for part in there.values())[len(there) // 2]
    parts = {index: part.as_turned(turned) for index, part in there.items()}
    first = next(iter(parts.values()))
    sums = {pair: Sums() for pair in pairs}
    matrix = rank and first.rows > 1 and first.columns > 1
    ranks = {pair: Rank(first.rows, first.columns) for pair in pairs} if matrix else {}
    step = max(1, values // first.columns)
    for start in range(0, first.rows, step):
        rows = slice(start, min(start + step, first.rows))
        blocks = {}
        for index, part in parts.items():
            block, (factors, before, after) = part.read(rows), tensor.scaled[index]
            if factors or before or after:
                before = before or block.dtype.name
                block = rescale(block, factors, before, after or before)
            blocks[index] = block.reshape(-1)
        size = (rows.stop - start) * first.columns
        for at in range(0, size, BLOCK):
            wide = {index: widened(block[at : at + BLOCK], buffers[index]) for index, block in blocks.items()}
            for a, b in pairs:
                sums[a, b].add(comparer.sums(wide[a], wide[b]))
        for (a, b), matrix_rank in ranks.items():
            difference = blocks[a].astype(np.float32) - blocks[b].astype(np.float32)
            matrix_rank.add(start, difference.reshape(-1, first.columns))
        read(sum(size * part.itemsize for part in parts.values()))
    found = {}
    for pair, total in sums.items():
        metrics = total.metrics() | ({RANK: ranks[pair].value()} if pair in ranks else {})
        found[pair] = Compared(metrics, total.not_finite)
    return found
