"""Reads a model from a local directory in the layout of transformers, checking before reading."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxup.errors import UserError
from jaxup.hub.families import Family, config_from_hf, family_of_hf
from jaxup.hub.header import TensorInfo, parse_json, read_header
from jaxup.hub.layouts import Tensor, expected_tensors, flatten, from_file
from jaxup.hub.manifest import check_manifest
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params, abstract

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_JSON = 16 * 2**20
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


def load_config(path: str | Path) -> ModelConfig:
    """The ModelConfig of the directory's config.json; UserError if it cannot be represented."""
    root = _directory(path)
    hf = _json(root, "config.json")
    try:
        config = config_from_hf(hf)
    except UserError as error:
        raise UserError(f"{root}: config.json: {error}") from None
    check_manifest(root, ["config.json"])
    return config


def load_params(
    path: str | Path, config: ModelConfig, *, dtype: np.dtype | type | str | None = None, verify: bool = True
) -> Params:
    """The params of the directory's safetensors as numpy arrays, in the tree of `abstract(config)`.

    `dtype` None keeps what is stored (float32, float16 or bfloat16; a stack of layers stored in
    several takes the one that holds them all). Names, shapes and dtypes are all checked before any
    tensor is read; `verify` also compares digests where a jaxup manifest lists them. UserError for
    a directory that is not exactly this model, including non-finite values.
    """
    root = _directory(path)
    family = _family(root)
    infos, files = _headers(root)
    shapes = {p: tuple(leaf.shape) for p, leaf in flatten(abstract(config)[1]).items()}
    found, tied = _match(root, family, shapes, infos)
    if verify:
        check_manifest(root, files)

    maps = {info.file: np.memmap(info.file, np.uint8, mode="r") for info in infos.values() if info.shape}
    leaf_dtypes: dict[str, np.dtype] = {}
    for tensor, info in found:
        for p in tensor.paths:
            stored = _DTYPES[info.dtype]
            leaf_dtypes[p] = np.dtype(dtype) if dtype else np.promote_types(leaf_dtypes.get(p, stored), stored)
    leaves = {p: np.empty(shape, leaf_dtypes[p]) for p, shape in shapes.items()}
    for tensor, info in found:
        array = _array(maps, info)
        if not np.isfinite(array).all():
            raise UserError(f"{root}: {info.file.name}: tensor {tensor.name!r} holds NaN or infinity")
        for p, part in zip(tensor.paths, from_file(tensor, array), strict=True):
            leaves[p][... if tensor.layer is None else tensor.layer] = part
    if tied is not None:
        embedding = next(info for tensor, info in found if tensor.paths == ("embed_tokens",))
        if not np.array_equal(_array(maps, tied), _array(maps, embedding)):
            raise UserError(f"{root}: config.json ties the embeddings, but lm_head.weight differs from them")
    return _nest(leaves)


def _array(maps: dict[Path, np.ndarray], info: TensorInfo) -> np.ndarray:
    dtype = _DTYPES[info.dtype]
    count = int(np.prod(info.shape)) * dtype.itemsize
    return maps[info.file][info.offset : info.offset + count].view(dtype).reshape(info.shape)


def _match(
    root: Path, family: Family, shapes: dict[str, tuple[int, ...]], infos: dict[str, TensorInfo]
) -> tuple[list[tuple[Tensor, TensorInfo]], TensorInfo | None]:
    """Pairs what the model needs with what the files hold; also the copy of a tied head, if any."""
    unused: dict[str, tuple[str, TensorInfo]] = {}
    for name, info in infos.items():
        full = name
        if family.optional_prefix and not name.startswith((family.optional_prefix, "lm_head.")):
            full = family.optional_prefix + name
        if full in unused:
            raise UserError(f"{root}: tensors {name!r} and {unused[full][0]!r} are the same parameter")
        unused[full] = (name, info)
    num_layers = next(shape[0] for path, shape in shapes.items() if path.startswith("blocks."))
    found, missing, misshapen = [], [], []
    for tensor in expected_tensors(family.tensors, shapes):
        name, info = unused.pop(tensor.name, (None, None))
        if info is None:
            missing.append(tensor.name)
        elif info.shape != tensor.shape:
            misshapen.append(f"{name!r} is {list(info.shape)}, the config needs {list(tensor.shape)}")
        elif info.dtype not in _DTYPES:
            misshapen.append(f"{name!r} is {info.dtype}, not one of {', '.join(_DTYPES)}")
        else:
            found.append((tensor, info))
    for template in family.ignored_tensors:
        for layer in range(num_layers if "{layer}" in template else 1):
            unused.pop(template.format(layer=layer), None)
    _, tied = unused.pop("lm_head.weight", (None, None)) if "lm_head.kernel" not in shapes else (None, None)
    if tied is not None and (tied.shape != shapes["embed_tokens"] or tied.dtype not in _DTYPES):
        misshapen.append(f"'lm_head.weight' is {tied.dtype}{list(tied.shape)}, not the tied embedding's")
    for kind, names in (
        ("wrong tensor", misshapen),
        ("missing tensor", [repr(name) for name in missing]),
        ("unexpected tensor", [repr(name[:200]) for name, _ in unused.values()]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{root}: {kind}{'s' * (len(names) > 1)}: {', '.join(names[:3])}{more}")
    return found, tied


def _headers(root: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """All tensors of the directory's safetensors, and the names of the files that hold them."""
    if (root / SINGLE).exists() or (root / SINGLE).is_symlink():
        return read_header(_inside(root, SINGLE), f"{root}: {SINGLE}"), [SINGLE]
    if not ((root / INDEX).exists() or (root / INDEX).is_symlink()):
        pickles = sorted(p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f"; {pickles[0]!r} may run code when read: convert it to safetensors first" if pickles else ""
        raise UserError(f"{root}: no {SINGLE} and no {INDEX}{hint}")
    shown = f"{root}: {INDEX}"
    weight_map = _json(root, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{shown}: weight_map must map tensors to file names")
    files = sorted(set(weight_map.values()))
    for name in files:  # all of them before the first is opened
        if Path(name).name != name or "\0" in name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{shown}: {name[:200]!r} is not the name of a safetensors file of this directory")
        _inside(root, name)
    infos: dict[str, TensorInfo] = {}
    for name in files:
        header = read_header(_inside(root, name), f"{root}: {name}")
        for tensor in header:
            if weight_map.get(tensor) != name:
                raise UserError(f"{shown}: does not say that {tensor[:200]!r} is in {name}")
        infos |= header
    for tensor, name in weight_map.items():
        if tensor not in infos:
            raise UserError(f"{root}: {name} lacks tensor {tensor[:200]!r}, which {INDEX} says it holds")
    return infos, files


def _directory(path: str | Path) -> Path:
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root}: no such directory" if not root.exists() else f"{root}: not a directory")
    return root


def _inside(root: Path, name: str) -> Path:
    """`root / name` if it is a regular file that lies there, or in the blobs of a hub cache."""
    path, real_root = root / name, root.resolve()
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that is not Unicode
        raise UserError(f"{root}: {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    allowed = [real_root]
    if real_root.parent.name == "snapshots":  # a hub cache: snapshots/COMMIT/NAME -> ../../blobs/DIGEST
        allowed.append(real_root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise UserError(f"{root}: {name} is a link that leaves the directory")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise UserError(f"{root}: {name} is not a regular file")
    return path


def _json(root: Path, name: str) -> dict[str, Any]:
    path = _inside(root, name)
    if path.stat().st_size > _MAX_JSON:
        raise UserError(f"{root}: {name} is larger than {_MAX_JSON} bytes")
    try:
        return parse_json(path.read_bytes(), f"{root}: {name}")
    except OSError as error:
        raise UserError(f"{root}: {name} cannot be read: {error.strerror}") from error


def _family(root: Path) -> Family:
    hf = _json(root, "config.json")
    try:
        return family_of_hf(hf)
    except UserError as error:
        raise UserError(f"{root}: config.json: {error}") from None


def _nest(leaves: dict[str, np.ndarray]) -> Params:
    params: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params
