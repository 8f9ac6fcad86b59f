"""Safetensors files written tensor by tensor: no more of a model is in memory than the tensors in hand.

The bytes are those of safetensors' own writer for the same tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxup.errors import UserError
from jaxup.families.layouts import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # in the order in which a file holds them

PIECE = 64 * 2**20  # bytes that are hashed together

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40
}  # fmt: skip


def parse_size(size: int | str) -> int:
    """Bytes of "5GB" (10^9 each), "2GiB" (2^30 each), "0.5 MB" or a plain int; UserError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        count = size
    else:
        match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]+)\s*", str(size), re.ASCII)
        if not match or match[2].upper() not in _UNITS:
            units = "such as 5GB, 500MB, 300KB (powers of 10) or 2GiB (powers of 2)"
            raise UserError(f"max_shard_size={str(size)[:40]!r}: expected a number with a unit, {units}")
        count = int(float(match[1]) * _UNITS[match[2].upper()])
    if count < 1:
        raise UserError(f"max_shard_size={size!r}: must be at least one byte")
    return count


class Stored(NamedTuple):
    """A tensor and the dtype that a file holds it in."""

    tensor: Tensor
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.tensor.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.tensor.shape[1:]) * self.dtype.itemsize

    @property
    def piece_rows(self) -> int:
        """Rows that have one digest."""
        return max(1, PIECE // self.row_bytes)


def split(tensors: Iterable[Stored], max_shard_size: int) -> dict[str, list[Stored]]:
    """File name -> what it holds, in its order; a file has at most so many bytes unless one tensor is larger."""
    shards: list[list[Stored]] = [[]]
    filled = 0
    for stored in tensors:
        if shards[-1] and filled + stored.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(stored)
        filled += stored.nbytes
    for shard in shards:
        # As safetensors does: the widest first, so that all are aligned.
        shard.sort(key=lambda stored: (list(NAMES).index(stored.dtype.name), stored.tensor.name))
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def header(shard: Sequence[Stored]) -> bytes:
    """What comes before the data: its length in 8 bytes, and JSON that says where each tensor lies."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, dtype in shard:
        begin, end = end, end + Stored(tensor, dtype).nbytes
        entries[tensor.name] = {"dtype": NAMES[dtype.name], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(shards: Mapping[str, Sequence[Stored]]) -> bytes:
    """model.safetensors.index.json: which tensor is in which of several files."""
    everything = [stored for shard in shards.values() for stored in shard]
    total = {
        "total_parameters": sum(math.prod(stored.tensor.shape) for stored in everything),
        "total_size": sum(stored.nbytes for stored in everything),
    }
    weight_map = {stored.tensor.name: name for name, shard in shards.items() for stored in shard}
    return json_bytes({"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_shard(path: Path, shard: Sequence[Stored], arrays: Iterable[np.ndarray]) -> list[tuple[int, str]]:
    """Writes contiguous `arrays`, one for each of `shard`, as they come; (end, SHA-256) of the header and each piece.

    An array is written and hashed while the next one is made, so two of them are in memory.
    """
    start = header(shard)
    spans = [(len(start), hashlib.sha256(start).hexdigest())]

    def digest(data: memoryview, size: int) -> None:
        for begin in range(0, len(data), size):
            piece = data[begin : begin + size]
            spans.append((spans[-1][0] + len(piece), hashlib.sha256(piece).hexdigest()))

    with open(path, "wb") as file, ThreadPoolExecutor(2) as pool:
        file.write(start)
        pending: list[Future] = []
        for stored, array in zip(shard, arrays, strict=True):
            for done in pending:
                done.result()
            data = array.reshape(-1).view(np.uint8).data
            size = stored.piece_rows * stored.row_bytes
            pending = [pool.submit(file.write, data), pool.submit(digest, data, size)]
        for done in pending:
            done.result()
    return spans
