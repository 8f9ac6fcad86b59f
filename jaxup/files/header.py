"""A strict check of a safetensors file's header, made before any of its data is touched.

The format: 8 bytes of little-endian length, a JSON object of that length, the data. The official
reader accepts some files that break the specification, so every byte must be accounted for here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from jaxup.errors import UserError
from jaxup.files.storage import Local, Storage
from jaxup.text import parse_json

# Thirty thousand tensors in one file; parsing costs some fifteen times its size in memory.
_MAX_HEADER = 4 * 2**20
_MAX_RANK = 16

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """Where one tensor lies."""

    file: str
    dtype: str  # safetensors' name, e.g. "BF16"
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


def read_header(storage: Storage, file: str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name; UserError if it is malformed. Reads the header only."""
    shown = f"{storage.name}: {file}"
    if not storage.reaches(file, 10):
        raise UserError(f"{shown}: not a safetensors file: it is too short")
    length = int.from_bytes(storage.read(file, 0, 8).tobytes(), "little")
    if not 2 <= length <= _MAX_HEADER or not storage.reaches(file, 8 + length):
        raise UserError(f"{shown}: not a safetensors file: its header would have {length} bytes")
    text = storage.read(file, 8, 8 + length).tobytes()
    if not text.startswith(b"{"):
        raise UserError(f"{shown}: not a safetensors file: the header is not a JSON object")
    header = parse_json(text, shown)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{shown}: malformed safetensors header: __metadata__ must hold strings")
    spans, infos = [], {}
    for name, entry in header.items():
        if problem := _wrong(entry):
            raise UserError(f"{shown}: malformed safetensors header: tensor {name[:200]!r}: {problem}")
        begin, end = entry["data_offsets"]
        spans.append((begin, end, name))
        infos[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = "overlaps the one before" if begin < position else "leaves a hole before it"
            raise UserError(f"{shown}: malformed safetensors header: tensor {name[:200]!r} {kind}")
        position = end
    end = 8 + length + position
    if not storage.reaches(file, end):
        raise UserError(f"{shown}: truncated: its header describes {end} bytes")
    if storage.reaches(file, end + 1):
        raise UserError(f"{shown}: goes on after the {end} bytes that its header describes")
    if isinstance(storage, Local):  # a second opinion
        try:
            with safe_open(storage.path(file), "np"):
                pass
        except SafetensorError as error:
            raise UserError(f"{shown}: malformed safetensors header: {error}") from None
    return infos


def _wrong(entry: Any) -> str | None:
    """What is wrong with one tensor's entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "must have dtype, shape and data_offsets and nothing else"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"unknown dtype {str(dtype)[:20]!r}"
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        return "shape must be a short list of sizes"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "data_offsets must be two increasing offsets"
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        return f"{offsets[1] - offsets[0]} bytes do not hold {dtype}{shape}"
    return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
