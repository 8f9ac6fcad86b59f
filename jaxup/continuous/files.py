"""What lies beside an exported language model that was taught to see and draw, and puts back what it was taught by.

| file | holds |
|---|---|
| `continuous.json` | its format, the task (layout, head, nets) and how it draws unless told otherwise |
| `continuous.safetensors` | connector, head, learned vectors and places, a second decoder |
| `encoder.npz` | what makes continuous tokens of pictures, and pictures of them |

The directory is that of a language model, which nothing of this changes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxup.continuous import heads, layouts, nets, stages, task
from jaxup.continuous.encoders import Encoder
from jaxup.continuous.task import Task
from jaxup.errors import UserError, first_line, within
from jaxup.files.manifest import check_manifest
from jaxup.files.shards import json_bytes
from jaxup.files.storage import Local, open_storage
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params
from jaxup.model.spec import flatten, unflatten
from jaxup.text import misfit, parse_json

DESCRIPTION, ARRAYS, ENCODER = "continuous.json", "continuous.safetensors", "encoder.npz"
FORMAT = 1
_LARGEST = 2**36  # bytes of a file, which is held in memory
# How pictures are drawn, by what it is called.
DRAWING = {"head_steps": int, "sets": int, "schedule": str, "temperature": float, "guidance": float}


class Side(NamedTuple):
    """What the files say but for the arrays."""

    task: Task
    encoder: Encoder
    drawing: dict[str, Any]  # of DRAWING
    length: float = 1.0  # of values, on average, where a head draws directions alone

    def pictures(self, values: np.ndarray) -> np.ndarray:
        """Values that were drawn, [..., N, C], as uint8 pictures; UserError where there is no way back."""
        return self.encoder.decode(values * np.float32(self.length))


def contents(side: Side, beside: Params | None) -> dict[str, bytes]:
    """The files; without params only what describes them. Of params that several processes have, all call this."""
    about = {"format": FORMAT, "task": _described(side.task), "drawing": side.drawing, "length": side.length}
    files = {DESCRIPTION: json_bytes(about), ENCODER: side.encoder.to_bytes()}
    if beside is not None:
        from safetensors.numpy import save

        files[ARRAYS] = save({path: np.ascontiguousarray(_whole(leaf)) for path, leaf in flatten(beside).items()})
    return files


def _whole(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def read(path_or_id: str | os.PathLike, *, revision: str | None = None) -> Side | None:
    """What lies beside the model, wherever that is; None: nothing does. UserError for what is damaged."""
    storage = open_storage(path_or_id, revision=revision)
    if not storage.exists(DESCRIPTION):
        return None
    if isinstance(storage, Local):
        check_manifest(storage.root, [DESCRIPTION, ARRAYS, ENCODER], added=True)
    if missing := [name for name in (ARRAYS, ENCODER) if not storage.exists(name)]:
        raise UserError(f"{DESCRIPTION} is there and {missing[0]} is not", at=str(path_or_id))
    return parse(storage.whole(DESCRIPTION), storage.whole(ENCODER, _LARGEST), str(path_or_id))


def of_run(run: Path) -> Side:
    """What all models of a run that have something beside them were taught by."""
    for name in (DESCRIPTION, ENCODER):
        if not (run / name).is_file():
            raise UserError(f"{name} is gone", at=str(run), hint="the command that made the run writes it again")
    return parse((run / DESCRIPTION).read_bytes(), (run / ENCODER).read_bytes(), str(run))


def parse(description: bytes, encoder: bytes, at: str) -> Side:
    """Of the two files; UserError for what they do not say."""
    about = parse_json(description, f"{at}: {DESCRIPTION}")
    try:
        if (version := about.get("format")) != FORMAT:
            raise UserError(f"format {version!r}, and {FORMAT} is the one that it knows")
        if wrong := misfit(about, {"task": dict[str, Any], "drawing": dict[str, Any], "length": float}):
            raise UserError(wrong)
        if wrong := misfit(about["drawing"], {key: kind for key, kind in DRAWING.items()}):
            raise UserError(f"drawing.{wrong}")
        if not 0 < about["length"] < math.inf:
            raise UserError(f"length={about['length']}")
        made = _made(about["task"])
        if not isinstance(made, Task):
            raise UserError("task is none")
    except (UserError, KeyError, TypeError, ValueError) as error:
        what = f"not what this version of jaxup writes: {first_line(error)}"
        raise UserError(what, at=(at, DESCRIPTION)) from None
    return Side(made, Encoder.from_bytes(encoder, f"{at}: {ENCODER}"), about["drawing"], about["length"])


def read_arrays(
    path_or_id: str | os.PathLike, side: Side, model: ModelConfig, *, revision: str | None = None
) -> Params:
    """The arrays, as the task asks for them beside `model`; UserError if they are others."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        leaves = load(open_storage(path_or_id, revision=revision).whole(ARRAYS, _LARGEST))
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"damaged: {first_line(error)}", at=(str(path_or_id), ARRAYS)) from None
    with within(str(path_or_id), ARRAYS):
        try:
            wanted = {param.path: param.shape for param in side.task.beside(model)}
        except (TypeError, ValueError, AttributeError) as error:  # of parts that are of no such kind
            raise UserError(f"{DESCRIPTION} is of no model: {first_line(error)}") from None
        for path in sorted(wanted.keys() ^ leaves.keys()):
            raise UserError(f"{path} is {'missing' if path in wanted else 'nothing that the task has'}")
        for path, shape in wanted.items():
            if leaves[path].shape != shape or leaves[path].dtype != np.float32:
                what = f"{path} is {leaves[path].dtype} {list(leaves[path].shape)}"
                raise UserError(f"{what}, and the task needs float32 {list(shape)}", hint="it is of another model")
            if not np.isfinite(leaves[path]).all():
                raise UserError(f"{path} has NaN or infinity")
    return unflatten(leaves)


# ---- a task as json: each of its parts with the name of its class

_CLASSES = {
    each.__name__: each
    for module in (heads, layouts, nets, stages, task)
    for each in vars(module).values()
    if isinstance(each, type) and dataclasses.is_dataclass(each) and each.__module__ == module.__name__
}


def _described(value: Any) -> Any:
    if isinstance(value, ModelConfig):
        return {"class": "ModelConfig", **dataclasses.asdict(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    return [_described(each) for each in value] if isinstance(value, tuple) else value


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_made, value))
    if not isinstance(value, Mapping):
        return value
    fields = {key: each for key, each in value.items() if key != "class"}
    if value["class"] == "ModelConfig":
        return ModelConfig.from_dict(fields)
    if value["class"] not in _CLASSES:
        raise UserError(f"unknown {str(value['class'])[:40]!r}")
    return _CLASSES[value["class"]](**{key: _made(each) for key, each in fields.items()})
