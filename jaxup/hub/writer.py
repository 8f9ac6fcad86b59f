"""Writes a model as a directory that transformers loads; see `staging` for why it is never half there.

Tensors are taken off the devices, cast and written one at a time.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxup.data.tokenizer import save_tokenizer
from jaxup.depth.materials import common
from jaxup.errors import UserError, suggest
from jaxup.families import config_to_hf, folded, with_family_biases
from jaxup.families.layouts import Tensor, expected_tensors, to_file
from jaxup.files import manifest
from jaxup.files.shards import DTYPES, INDEX, SINGLE, Stored, index, json_bytes, parse_size, split, write_shard
from jaxup.files.staging import check_space, staged_directory
from jaxup.files.storage import TEMPLATES
from jaxup.hub.directory import MARKS
from jaxup.hub.reader import is_finite
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params
from jaxup.model.spec import flatten, spec
from jaxup.progress import Progress, say
from jaxup.together import told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OWN = ("config.json", SINGLE, INDEX, manifest.NAME)
_TOKEN_IDS = ("bos_token_id", "eos_token_id")

Fetch = Callable[[Tensor], list[np.ndarray]]


def save(
    out: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | None = "float32",
    model_type: str | None = None,
    carried: Mapping[str, bytes] | None = None,
    hf_extra: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    force: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> None:
    """Writes the directory `out`; arguments that are not here, and errors, are those of `jaxup.save`.

    Args:
      params: the tree of `abstract(config)`, of numpy or jax arrays. Biases that the transformers
        family has and the model lacks are written as zeros, and factors of norms are folded into their weights, which
        is said. If jax arrays span processes, all
        processes must call this, and all return or raise together; else whoever calls it writes.
      tokenizer: one of transformers'; its eos and bos go into the configs.
      model_type: the family to prefer where several can express the model.
      carried: files of the model that this one comes from, written as they are: the tokenizer's,
        the chat template, generation_config.json. A `tokenizer` takes their place, and that of
      hf_extra: keys of that model's config.json to keep: bos_token_id, eos_token_id, pad_token_id.
      extra_files: plain file names and their contents.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be saved{suggest(dtype, DTYPES)}")
    max_shard_size = parse_size(max_shard_size)
    leaves = _checked(config, params)
    family, exported = with_family_biases(config, model_type)
    most = dtype or main_dtype(params)
    tensors = [
        Stored(tensor, DTYPES[dtype or common(leaves[p].dtype.name for p in tensor.paths if p in leaves) or most])
        for tensor in expected_tensors(family.rows(spec(exported)), spec(exported))
    ]
    shards = split(tensors, max_shard_size)

    texts = dict(carried or {}) if tokenizer is None else {}
    of_config: dict[str, Any] = {**dict.fromkeys(_TOKEN_IDS), **(hf_extra or {})}
    ids = of_config if tokenizer is None else {name: _token_id(tokenizer, name, config) for name in _TOKEN_IDS}
    named = {name: ids[name] for name in _TOKEN_IDS}
    hf = config_to_hf(config, dtype=most, model_type=model_type, **named) | ids
    texts.setdefault("generation_config.json", json_bytes(named))
    for name, content in (extra_files or {}).items():
        if name in texts:
            raise UserError(f"extra file {name!r} is not a plain file name of its own")
        texts[name] = content.encode() if isinstance(content, str) else content
    for name in texts:
        if os.path.dirname(name) not in ("", TEMPLATES) or not os.path.basename(name) or name in (*_OWN, *shards):
            raise UserError(f"extra file {name!r} is not a plain file name of its own")

    def write(fetch: Fetch) -> None:
        with staged_directory(out, force=force, marks=MARKS) as directory:
            check_space(directory, out, sum(stored.nbytes for stored in tensors) + sum(map(len, texts.values())))
            if tokenizer is not None:
                save_tokenizer(tokenizer, directory, str(out), "not written")
            for name, content in texts.items():
                if (directory / name).exists():
                    raise UserError(f"extra file {name!r} is one that the tokenizer writes")
                (directory / name).parent.mkdir(exist_ok=True)
                (directory / name).write_bytes(content)
            (directory / "config.json").write_bytes(json_bytes(hf))
            if len(shards) > 1:
                (directory / INDEX).write_bytes(index(shards))
            manifest.write_manifest(directory, _write_shards(directory, shards, fetch, progress))

    fetch = functools.partial(_fetch, leaves, None if family.native or folded(config) == config else config)
    if fetch.args[1] is not None and jax.process_index() == 0:
        say(f"{out}: a {family.model_type} model knows no factors of norms: they are folded into the norms' weights")
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves.values()):
        _together(write, fetch, [stored.tensor for shard in shards.values() for stored in shard])
    else:
        write(fetch)


def _checked(config: ModelConfig, params: Params) -> dict[str, Any]:
    """The leaves by dotted path; UserError unless they are exactly the config's."""
    leaves = flatten(params)
    needed = spec(config)
    for path in sorted(set(needed) ^ set(leaves)):
        raise UserError(f"params: {path} is {'missing' if path in needed else 'not part of the model'}")
    for path, param in needed.items():
        if tuple(leaves[path].shape) != param.shape:
            raise UserError(f"params: {path} is {list(leaves[path].shape)}, the config needs {list(param.shape)}")
    return leaves


def main_dtype(params: Params) -> str:
    """The dtype of most parameters; UserError if one of them has a dtype that cannot be kept."""
    counts: collections.Counter[str] = collections.Counter()
    for path, leaf in flatten(params).items():
        if leaf.dtype.name not in DTYPES:
            raise UserError(f"params: {path} is {leaf.dtype.name}, not {', '.join(DTYPES)}; say which dtype to save")
        counts[leaf.dtype.name] += math.prod(leaf.shape)
    return counts.most_common(1)[0][0]


def _token_id(tokenizer: PreTrainedTokenizerBase, name: str, config: ModelConfig) -> int | None:
    token = getattr(tokenizer, name)
    if token is not None and not 0 <= token < config.vocab_size:
        raise UserError(f"the tokenizer's {name}={token} is not below the model's vocab_size={config.vocab_size}")
    return token


def _fetch(leaves: Mapping[str, Any], config: ModelConfig | None, tensor: Tensor) -> list[np.ndarray]:
    """The params of one tensor, without their layer axis, on the host; of a `config` with its factors in its norms."""
    found = [
        _on_host(leaves[path], tensor.layer) if path in leaves else np.zeros(shape, np.float32)
        for path, shape in zip(tensor.paths, tensor.part_shapes, strict=True)
    ]
    if config is None or tensor.layer is None or spec(config)[tensor.paths[0]].part != "norms":
        return found
    # As `jaxup.model.layers.Norm` multiplies them: in float32, so that the folded model computes the same.
    factor = np.float32(config.kinds_of_layers[tensor.layer].norm_factor)
    offset = np.float32(config.norm_offset if tensor.paths[0].endswith("scale") else 0)
    return [(part.astype(np.float32) + offset) * factor - offset for part in found]


def _on_host(leaf: Any, layer: int | None) -> np.ndarray:
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable and isinstance(leaf.sharding, NamedSharding):
            return np.asarray(_layer_of(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf, layer))
        if {device.platform for device in leaf.devices()} != {"cpu"} or len(leaf.devices()) > 1:
            # Of the layer only: what is taken off a device whole stays on the host as long as the array.
            return np.asarray(leaf if layer is None else _layer_of(None)(leaf, layer))
        leaf = np.asarray(leaf)  # a view
    return leaf if layer is None else leaf[layer]


@functools.cache
def _layer_of(sharding: NamedSharding | None) -> Callable[[jax.Array, int | None], jax.Array]:
    """With the layer an argument: leaf[layer] is one program for each layer."""

    def take(leaf: jax.Array, layer: int | jax.Array | None) -> jax.Array:
        return leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

    return jax.jit(take, out_shardings=sharding)


def _write_shards(
    directory: Path, shards: Mapping[str, list[Stored]], fetch: Fetch, progress: bool
) -> dict[str, manifest.Spans]:
    """The digests of the files written."""
    total, done, began = sum(stored.nbytes for shard in shards.values() for stored in shard), 0, time.monotonic()
    bar = Progress("saving", total=math.ceil(total / 1e6), unit="MB", shown=progress)

    def arrays(shard: Iterable[Stored]) -> Iterator[np.ndarray]:
        nonlocal done
        for stored in shard:
            with np.errstate(over="ignore"):  # a value beyond the dtype becomes infinite and is refused
                array = to_file(stored.tensor, fetch(stored.tensor), stored.dtype)
            if not is_finite(array):
                raise UserError(f"params: {stored.tensor.name} would hold NaN or infinity as {stored.dtype.name}")
            yield array
            done += stored.nbytes
            bar.update(math.ceil(done / 1e6), f"{done / 1e6 / (time.monotonic() - began):,.0f} MB/s")

    with bar:
        return {name: write_shard(directory / name, shard, arrays(shard)) for name, shard in shards.items()}


def _together(write: Callable[[Fetch], None], fetch: Fetch, tensors: list[Tensor]) -> None:
    """Process 0 writes; the others take part in each gather, until it says how the writing ended.

    A refusal or a full disk is process 0's alone to notice: without its word the others would wait for ever.
    """
    what = "write the next tensor"
    if jax.process_index() != 0:
        left = iter(tensors)
        while told(lambda: True, what):
            fetch(next(left))
        return

    def lead(tensor: Tensor) -> list[np.ndarray]:
        told(lambda: True, what)
        return fetch(tensor)

    try:
        write(lead)
    except BaseException as error:
        _tell(error, what)
        raise
    told(lambda: False, what)


def _tell(error: BaseException, what: str) -> None:
    def fail() -> bool:
        raise error

    with contextlib.suppress(BaseException):
        told(fail, what)
