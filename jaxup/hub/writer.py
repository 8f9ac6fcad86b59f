"""Writes a model as a directory that transformers loads; see `staging` for why it is never half there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxup.errors import UserError, suggest
from jaxup.hub import manifest
from jaxup.hub.families import config_to_hf, with_family_biases
from jaxup.hub.layouts import Tensor, expected_tensors, flatten, to_file
from jaxup.hub.reader import INDEX, SINGLE
from jaxup.hub.staging import staged_directory
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params, abstract

_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def save(
    out: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    extra_files: Mapping[str, str | bytes] | None = None,
    force: bool = False,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes the directory `out`; UserError, and nothing written, if that cannot be done.

    `params` is the tree of `abstract(config)`, of numpy or jax arrays, cast to `dtype`. Biases that
    the transformers family has and the model lacks are written as zeros. `tokenizer` is one of
    transformers' (its eos and bos go into the configs); `extra_files` maps plain file names to
    contents. Shards hold at most `max_shard_size` bytes unless one tensor is larger. An existing
    `out` is refused, or with `force` replaced if it holds a model.
    """
    extra_files = extra_files or {}
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be saved{suggest(dtype, _DTYPES)}")
    eos, bos = (_token_id(tokenizer, name, config) for name in ("eos_token_id", "bos_token_id"))
    hf = config_to_hf(config, dtype=dtype, eos_token_id=eos, bos_token_id=bos)
    leaves = _checked(config, params)
    family, exported = with_family_biases(config)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract(exported)[1]).items()}
    tensors = list(expected_tensors(family.tensors, shapes))
    for name in extra_files:
        if Path(name).name != name or name in ("config.json", "generation_config.json", SINGLE, INDEX, manifest.NAME):
            raise UserError(f"extra file {name!r} is not a plain file name of its own")

    with staged_directory(out, force=force, marks=("config.json", manifest.NAME)) as directory:
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        for name, content in extra_files.items():
            if (directory / name).exists():
                raise UserError(f"extra file {name!r} is one that the tokenizer writes")
            (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
        _write_json(directory / "config.json", hf)
        _write_json(directory / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
        _write_tensors(directory, tensors, leaves, _DTYPES[dtype], max_shard_size)
        manifest.write_manifest(directory)


def _token_id(tokenizer: Any, name: str, config: ModelConfig) -> int | None:
    token = None if tokenizer is None else getattr(tokenizer, name)
    if token is not None and not 0 <= token < config.vocab_size:
        raise UserError(f"the tokenizer's {name}={token} is not below the model's vocab_size={config.vocab_size}")
    return token


def _checked(config: ModelConfig, params: Params) -> dict[str, Any]:
    """The leaves by dotted path; UserError unless they are exactly the config's."""
    leaves = flatten(params)
    needed = {path: tuple(leaf.shape) for path, leaf in flatten(abstract(config)[1]).items()}
    for path in sorted(set(needed) ^ set(leaves)):
        raise UserError(f"params: {path} is {'missing' if path in needed else 'not part of the model'}")
    for path, shape in needed.items():
        if tuple(leaves[path].shape) != shape:
            raise UserError(f"params: {path} is {list(leaves[path].shape)}, the config needs {list(shape)}")
    return leaves


def _write_tensors(
    directory: Path, tensors: list[Tensor], leaves: dict[str, Any], dtype: np.dtype, max_shard_size: int
) -> None:
    size = lambda tensor: int(np.prod(tensor.shape)) * dtype.itemsize  # noqa: E731
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + size(tensor) > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size(tensor)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(size(tensor) for tensor in tensors)
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, shard in zip(names, shards, strict=True):
        arrays = {tensor.name: _cast(tensor, leaves, dtype) for tensor in shard}
        try:
            safetensors.numpy.save_file(arrays, directory / name, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # how it reports a full disk
            raise UserError(f"{directory}: {name} could not be written: {error}") from error


def _cast(tensor: Tensor, leaves: dict[str, Any], dtype: np.dtype) -> np.ndarray:
    """The contiguous array that the file holds, one layer taken off the device at a time."""
    parts = []
    for path, shape in zip(tensor.paths, tensor.part_shapes, strict=True):
        if path not in leaves:  # a bias that only the transformers family has
            parts.append(np.zeros(shape, dtype))
            continue
        leaf = leaves[path]
        parts.append(np.asarray(leaf if tensor.layer is None else leaf[tensor.layer]))
    with np.errstate(over="ignore"):  # a value beyond the dtype becomes infinite and is refused below
        array = np.ascontiguousarray(to_file(tensor, parts).astype(dtype))
    if not np.isfinite(array).all():
        raise UserError(f"params: {tensor.name} would hold NaN or infinity as {dtype.name}")
    return array


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
