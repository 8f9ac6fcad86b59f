"""A model directory checked against its config before a tensor is read, and its tensors by parts."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxup.errors import UserError, within
from jaxup.families import Family, config_from_hf, family_of_hf, kept_keys
from jaxup.families.keys import short
from jaxup.families.layouts import Tensor, expected_tensors
from jaxup.files import pickles
from jaxup.files.header import TensorInfo, read_header
from jaxup.files.manifest import check_manifest
from jaxup.files.shards import DTYPES, INDEX, NAMES, SINGLE
from jaxup.files.storage import Local, Storage, open_storage
from jaxup.model.config import ModelConfig
from jaxup.model.spec import Param, spec
from jaxup.text import parse_json

_DTYPES = {NAMES[name]: dtype for name, dtype in DTYPES.items()}
_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model whose every tensor is known to be there, in the right shape, and none of it read."""

    storage: Storage
    hf: dict[str, Any]  # config.json
    config: ModelConfig
    tensors: list[tuple[Tensor, TensorInfo]]
    tied: TensorInfo | None  # a stored copy of the embedding that is also the head
    files: list[str]  # that hold the tensors
    pickled: dict[str, np.ndarray] | None  # the tensors themselves, if they come from pickles

    def read(self, info: TensorInfo, rows: slice = slice(None)) -> np.ndarray:
        """These rows of a tensor, as stored."""
        if self.pickled is not None:
            return self.pickled[info.file][rows]
        dtype = dtype_of(info)
        start, stop, _ = rows.indices(info.shape[0] if info.shape else 1)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        row = dtype.itemsize * math.prod(info.shape[1:])  # bytes
        data = self.storage.read(info.file, info.offset + start * row, info.offset + stop * row)
        return data.view(dtype).reshape(shape)

    def watch(self) -> Callable[[], None]:
        """What raises a UserError once a file is not the one that it is now, and names it."""
        files = [file for file in ("config.json", INDEX, *self.files) if self.storage.exists(file)]
        versions = {file: self.storage.version(file) for file in files}

        def check() -> None:
            for file, version in versions.items():
                if self.storage.version(file) != version:
                    what = f"{file} has been replaced while the run was going on"
                    raise UserError(
                        what, at=self.storage.name, hint="put back what it was, or choose another --workdir"
                    )

        return check

    def check_digests(self) -> None:
        """UserError if a file is not the one its jaxup manifest describes; reads all of a local directory."""
        if isinstance(self.storage, Local):
            check_manifest(self.storage.root, ["config.json", INDEX, *self.files])


def dtype_of(info: TensorInfo) -> np.dtype:
    return _DTYPES[info.dtype]


def stored_dtypes(checkpoints: Mapping[str, Checkpoint]) -> Callable[[str | None, str, int | None], str]:
    """What `jaxup.depth.materials` asks of the files: the dtype of a source's parameter; new values are float32."""
    dtypes = {
        (name, path, tensor.layer): dtype_of(info).name
        for name, checkpoint in checkpoints.items() for tensor, info in checkpoint.tensors for path in tensor.paths
    }  # fmt: skip
    return lambda source, path, layer: "float32" if source is None else dtypes[source, path, layer]


def open_checkpoint(
    path_or_id: str | os.PathLike, *, revision: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Reads config.json and the headers; UserError unless they are exactly one model of a known family.

    `allow_pickle` reads pytorch_model.bin where there is no safetensors file; see `jaxup.files.pickles`.
    """
    storage = open_storage(path_or_id, revision=revision)
    hf, family, config = _config(storage)
    infos, files, pickled = _headers(storage, allow_pickle)
    return Checkpoint(storage, hf, config, *_match(storage.name, family, spec(config), infos), files, pickled)


def read_config(path_or_id: str | Path, *, revision: str | None = None) -> tuple[dict[str, Any], ModelConfig]:
    """config.json as it is written, and as a ModelConfig; UserError if it cannot be represented."""
    storage = open_storage(path_or_id, revision=revision)
    hf, _, config = _config(storage)
    if isinstance(storage, Local):
        check_manifest(Path(storage.root), ["config.json"])
    return hf, config


def load_config(path_or_id: str | Path, *, revision: str | None = None) -> ModelConfig:
    """The ModelConfig of the directory's config.json; UserError if it cannot be represented."""
    return read_config(path_or_id, revision=revision)[1]


def is_finite(array: np.ndarray) -> bool:
    """No NaN and no infinity: no value whose exponent bits are all set. Eight times as fast as isfinite."""
    kind = {"float16": (np.uint16, np.int16, 0x7C00), "bfloat16": (np.uint16, np.int16, 0x7F80),
            "float32": (np.uint32, np.int32, 0x7F800000)}  # fmt: skip
    bits, signed, exponent = kind[array.dtype.name]
    flat, sign = array.reshape(-1).view(bits), 1 << 8 * array.itemsize - 1
    # As whole numbers positive values are in their order, and as unsigned ones the negative are above those.
    return not flat.size or bool(flat.view(signed).max() < exponent and flat.max() < sign + exponent)


def check_tied(checkpoint: Checkpoint, embedding: np.ndarray, rows: slice) -> None:
    """UserError if a stored head that ought to be these rows of the embedding differs from them."""
    if checkpoint.tied is not None and not np.array_equal(checkpoint.read(checkpoint.tied, rows), embedding):
        what = "config.json ties the embeddings, but lm_head.weight differs from them"
        raise UserError(what, at=checkpoint.storage.name)


def _config(storage: Storage) -> tuple[dict[str, Any], Family, ModelConfig]:
    hf = _json(storage, "config.json")
    if "model_type" not in hf and storage.exists("export/config.json"):  # only of a local one the export is found
        raise UserError("a run, and no model", at=storage.name, hint=f"its export is {storage.name}/export")
    with within(storage.name, "config.json"):
        family, config = family_of_hf(hf), config_from_hf(hf)
    if kept := kept_keys(hf):
        what = f"{', '.join(map(short, kept[:8]))}{' and more' if len(kept) > 8 else ''}"
        warnings.warn(f"{storage.name}: config.json: nothing reads {what}; kept as it is", stacklevel=2)
    return hf, family, config


def _match(
    name: str, family: Family, table: Mapping[str, Param], infos: dict[str, TensorInfo]
) -> tuple[list[tuple[Tensor, TensorInfo]], TensorInfo | None]:
    """Pairs what the model needs with what the files hold; also the copy of a tied head, if any."""
    num_layers = next(param.shape[0] for param in table.values() if param.stacked)
    ignored = {name.format(layer=layer) for name in family.ignored_tensors for layer in range(num_layers)}
    expected = list(expected_tensors(family.rows(table), table))
    known = ignored.union((tensor.name for tensor in expected), [_HEAD])
    unused: dict[str, tuple[str, TensorInfo]] = {}
    for stored, info in infos.items():
        full = family.full_name(stored, known)
        if full in unused:
            raise UserError(f"{name}: tensors {stored[:200]!r} and {unused[full][0][:200]!r} are the same parameter")
        unused[full] = (stored, info)
    embedding, is_tied = family.tensor_name("embed_tokens"), "lm_head.kernel" not in table
    if is_tied and _HEAD in unused and embedding not in unused:  # one tensor, stored under its other name
        unused[embedding] = unused.pop(_HEAD)
    found, missing, misshapen = [], [], []
    for tensor in expected:
        if tensor.name not in unused:
            missing.append(repr(tensor.name))
            continue
        stored, info = unused.pop(tensor.name)
        if info.shape != tensor.shape:
            misshapen.append(f"{stored!r} is {list(info.shape)}, the config needs {list(tensor.shape)}")
        elif info.dtype not in _DTYPES:
            misshapen.append(f"{stored!r} is {info.dtype}, not one of {', '.join(_DTYPES)}")
        else:
            found.append((tensor, info))
    for buffer in ignored:
        unused.pop(buffer, None)
    _, tied = unused.pop(_HEAD, (None, None)) if is_tied else (None, None)
    if tied is not None and (tied.shape != table["embed_tokens"].shape or tied.dtype not in _DTYPES):
        misshapen.append(f"'lm_head.weight' is {tied.dtype}{list(tied.shape)}, not the tied embedding's")
    unexpected = [repr(stored[:200]) for stored, _ in unused.values()]
    for kind, names in (("wrong tensor", misshapen), ("missing tensor", missing), ("unexpected tensor", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{name}: {kind}{'s' * (len(names) > 1)}: {', '.join(names[:3])}{more}")
    return found, tied


def _headers(
    storage: Storage, allow_pickle: bool
) -> tuple[dict[str, TensorInfo], list[str], dict[str, np.ndarray] | None]:
    """All tensors of the directory, the files that hold them, and their values if they were pickled."""
    values: dict[str, np.ndarray] = {}

    def unpickled(storage: Storage, file: str) -> dict[str, TensorInfo]:
        infos, more = pickles.load(storage, file)
        values.update(more)
        return infos

    single, index, read = SINGLE, INDEX, read_header
    if not storage.exists(single) and not storage.exists(index):
        single, index, read = pickles.SINGLE, pickles.INDEX, unpickled
        pickled = next((file for file in (single, index) if storage.exists(file)), None)
        if pickled is None or not allow_pickle:
            hint = f"{pickled!r} is a pickle: allow_pickle (as a flag --allow-pickle) reads it with PyTorch"
            raise UserError(f"no {SINGLE} and no {INDEX}", at=storage.name, hint=hint if pickled else "")
    if storage.exists(single):
        return read(storage, single), [single], values or None
    weight_map = _weight_map(storage, index, Path(single).suffix)
    headers = {file: read(storage, file) for file in sorted(set(weight_map.values()))}
    return dict(_agreeing(storage, weight_map, headers, index)), list(headers), values or None


def _weight_map(storage: Storage, index: str, suffix: str) -> dict[str, str]:
    """The index's map from tensor to file; UserError unless all are plain names of files that are there."""
    shown = f"{storage.name}: {index}"
    weight_map = _json(storage, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{shown}: weight_map must map tensors to file names")
    files = sorted(set(weight_map.values()))
    for file in files:  # all of them before the first is opened
        if Path(file).name != file or "\0" in file or "\\" in file or not file.endswith(suffix):
            raise UserError(f"{shown}: {file[:200]!r} is not the name of a {suffix} file of this directory")
    for file in files:
        if not storage.exists(file):
            raise UserError(f"{storage.name}: {file} is missing, which {index} names")
        storage.reaches(file, 1)
    return weight_map


def _agreeing(
    storage: Storage, weight_map: dict[str, str], headers: dict[str, dict[str, TensorInfo]], index: str
) -> Iterator[tuple[str, TensorInfo]]:
    """The files' tensors; UserError if the index says otherwise."""
    for file, header in headers.items():
        for tensor, info in header.items():
            if weight_map.get(tensor) != file:
                raise UserError(f"{storage.name}: {index}: does not say that {tensor[:200]!r} is in {file}")
            yield tensor, info
    for tensor, file in weight_map.items():
        if tensor not in headers[file]:
            raise UserError(f"{storage.name}: {file} lacks tensor {tensor[:200]!r}, which {index} says it holds")


def _json(storage: Storage, file: str) -> dict[str, Any]:
    if not storage.exists(file):
        raise UserError(f"{storage.name}: no {file}; is it a model directory?")
    return parse_json(storage.whole(file), f"{storage.name}: {file}")
