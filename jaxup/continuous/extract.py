"""Features of pictures by a vision model of transformers, or latents by a VAE of diffusers, through torch.

Shape suffixes: B pictures, T what a model gives of one, H, W rows and columns of tokens, C channels.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxup.continuous.builtin import Pictures, builtin
from jaxup.continuous.images import as_coloured, resize
from jaxup.continuous.tables import ABOUT, CAPTIONS, FEATURES, SAID, read_table
from jaxup.errors import UserError, first_line
from jaxup.files.names import check_hub_name
from jaxup.files.staging import check_replaceable, check_space, staged_directory
from jaxup.progress import Progress, say
from jaxup.text import read_json

Encode = Callable[[list[np.ndarray]], np.ndarray]  # pictures, uint8 [.., .., 3] -> float32 [B, H, W, C]


def extract(
    model: str, data: str, out: str, *, vae: bool, size: int, grid: tuple[int, int] | None, normalize: bool,
    columns: str, stored: str, dtype: str, batch: int, force: bool, revision: str | None,
) -> tuple[int, ...]:  # fmt: skip
    """Writes a directory `out` of features and captions, whole or not at all; gives the shape of the array.

    Args:
      model: directory or Hub id. No code of it is run, and its weights are read from safetensors.
      data: what `tables.read_table` reads, or one of `builtin.SOURCES`.
      vae: it is an AutoencoderKL of diffusers: the means of its latents.
      size: pixels of a side that pictures are made for a VAE; a vision model has its own.
      grid: (rows, columns) that tokens are pooled to, bilinearly.
      normalize: each token is made of length 1, after pooling.
      columns: as in PairsConfig.
      stored: "npy" or "zarr"; dtype: "float32" or "float16".
      batch: pictures at once.
      force: replaces an `out` that is such a directory.

    UserError for what is missing or wrong, among it numbers that are not finite.
    """
    place = Path(os.path.expanduser(out))
    check_replaceable(place, force, (ABOUT,))
    if not place.absolute().parent.is_dir():
        raise UserError("its parent is not a directory", at=out)
    encode = (_vae if vae else _vision)(model, revision, size)
    pictures = builtin(data) or read_table(data, size=0, columns=columns, alike=False)
    count = len(pictures.keys)
    shape: tuple[int, ...] = ()
    array: Any = None
    with staged_directory(place, force=force, marks=(ABOUT,)) as staging:
        with Progress("features", total=count, unit="pictures") as progress:
            for start in range(0, count, batch):
                many = [pictures.look([n])[0] for n in range(start, min(start + batch, count))]
                frames = [_frames(each) for each in many]
                with torch_errors(model):
                    found_BHWC = encode([frame for each in frames for frame in each])
                    pooled_BHWC = _pool(found_BHWC, grid) if grid else found_BHWC
                if normalize:
                    lengths = np.linalg.norm(pooled_BHWC, axis=-1, keepdims=True)
                    pooled_BHWC = pooled_BHWC / np.maximum(lengths, 1e-12)
                if not np.isfinite(pooled_BHWC).all():
                    raise UserError(
                        f"numbers that are not finite, among pictures {start} to {start + len(many) - 1}", at=model
                    )
                _, rows, width, channels = pooled_BHWC.shape
                clip = len(frames[0]) if _is_clip(many[0]) else 0
                one = (*([clip] if clip else []), rows * width, channels)
                if array is None:
                    shape, made = (count, *one), (rows, width)
                    check_space(place.absolute().parent, place, count * int(np.prod(one)) * np.dtype(dtype).itemsize)
                    array = _array(staging, stored, shape, dtype)
                if one != shape[1:] or made != (rows, width):
                    what = f"features of {list(one)}, and those before have {list(shape[1:])}"
                    raise UserError(what, at=model, hint="--grid makes them alike")
                array[start : start + len(many)] = pooled_BHWC.reshape(len(many), *one).astype(dtype)
                progress.update(start + len(many))
        if stored == "npy":
            array.flush()
        _captions(staging / CAPTIONS, pictures)
        about = {
            "model": model, "revision": revision, "data": data, "vae": vae, "grid": list(made), "normalized": normalize,
            "shape": list(shape), "dtype": dtype,
        }  # fmt: skip
        (staging / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    return shape


def _is_clip(picture: np.ndarray) -> bool:
    return picture.ndim == 4 or (picture.ndim == 3 and picture.shape[-1] != 3)


def _frames(picture: np.ndarray) -> list[np.ndarray]:
    """In colours, which vision models take."""
    coloured = picture if picture.shape[-1] == 3 and picture.ndim > 2 else as_coloured(picture)
    return list(coloured) if coloured.ndim == 4 else [coloured]


def _array(staging: Path, stored: str, shape: tuple[int, ...], dtype: str) -> Any:
    """What is written to as an array, a part at a time."""
    if stored == "npy":
        return np.lib.format.open_memmap(staging / f"{FEATURES}.npy", mode="w+", dtype=dtype, shape=shape)
    import tensorstore as ts

    kvstore = {"driver": "file", "path": f"{(staging / f'{FEATURES}.zarr').resolve()}/"}
    chunks = (min(64, shape[0]), *shape[1:])
    grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
    return ts.open(
        {"driver": "zarr3", "kvstore": kvstore, "metadata": {"chunk_grid": grid}}, create=True, dtype=dtype, shape=shape
    ).result()


def _captions(path: Path, pictures: Pictures) -> None:
    """A line of JSON for each picture."""
    labels = [""] * len(pictures.keys)
    if pictures.labels is not None:
        labels = [pictures.classes[label] for label in pictures.labels]
    columns = dict(zip(SAID, (pictures.texts, pictures.questions, pictures.answers, labels), strict=True))
    with path.open("w", encoding="utf-8") as file:
        for number in range(len(labels)):
            line = {name: column[number] for name, column in columns.items() if column[number]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def torch_errors(model: str) -> Iterator[None]:
    """What a model's files, or its library, make it fail with, in one line."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"needs what is not installed: {first_line(error)}", at=model) from None
    except Exception as error:  # OSError, ValueError, KeyError, RuntimeError, SafetensorError, ...
        raise UserError(f"{type(error).__name__}: {first_line(error)}"[:300], at=model) from None


def _place(model: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What from_pretrained is given: a directory is never looked for on the Hub, and nothing in it is code."""
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            vae = os.path.isfile(os.path.join(path, "vae", "config.json"))
            hint = f"its VAE is {os.path.join(model, 'vae')}" if vae else ""
            raise UserError("no config.json in it", at=model, hint=hint)
        return path, {"local_files_only": True, "use_safetensors": True}
    if os.path.lexists(path):
        raise UserError("not a directory", at=model)
    check_hub_name(model, sure=revision is not None)
    return model, {"revision": revision or "main", "use_safetensors": True}


def _torch(model: str) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError("vision models run by torch, which is not installed; pip install torch", at=model) from None
    return torch


def _vision(model: str, revision: str | None, size: int) -> Encode:
    if size:
        raise UserError("goes with --vae: the model's own preprocessing says its size", at=f"--size={size}")
    torch = _torch(model)
    path, options = _place(model, revision)
    with torch_errors(model):
        from transformers import AutoImageProcessor, AutoModel

        # Without torchvision transformers has the same preprocessing by Pillow, which is there.
        plain = {key: value for key, value in options.items() if key != "use_safetensors"}
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False, **plain)
        network = AutoModel.from_pretrained(path, trust_remote_code=False, **options)
    network = getattr(network, "vision_model", network)  # of a model of pictures and words the pictures'
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device).eval()
    told: list[int] = []

    def encode(pictures: list[np.ndarray]) -> np.ndarray:
        inputs = processor(images=pictures, return_tensors="pt")["pixel_values"].to(device, network.dtype)
        with torch.inference_mode():
            hidden = network(pixel_values=inputs).last_hidden_state.float().cpu().numpy()
        if hidden.ndim == 4:  # of a convolutional network [B, C, H, W]
            return np.moveaxis(hidden, 1, -1)
        rows, columns, before = _layout(network.config, inputs.shape[-2:], hidden.shape[1], model)
        if before and not told:
            told.append(before)
            say(f"{model}: of {hidden.shape[1]} tokens the first {before}, which stand for no place, are left out")
        return hidden[:, before:].reshape(len(hidden), rows, columns, -1)

    return encode


def _layout(config: Any, pixels: tuple[int, ...], tokens: int, model: str) -> tuple[int, int, int]:
    """(rows, columns, tokens before those of places) of `tokens` that a transformer gives for pictures of `pixels`."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and patch > 0:
        rows, columns = pixels[0] // patch, pixels[1] // patch
        if 0 <= tokens - rows * columns <= 16:
            return rows, columns, tokens - rows * columns
    side = int(tokens**0.5)
    if side * side != tokens:
        raise UserError(f"{tokens} tokens of pictures of {pixels[0]} x {pixels[1]} are no grid", at=model)
    return side, side, 0


def _vae(model: str, revision: str | None, size: int) -> Encode:
    torch = _torch(model)
    path, options = _place(model, revision)
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("a VAE runs by diffusers, which is not installed; pip install diffusers", at=model) from None
    kind = (read_json(Path(path) / "config.json", {}, "") or {}).get("_class_name") if os.path.isdir(path) else None
    if kind not in (None, AutoencoderKL.__name__):
        raise UserError(f"its config.json is of {kind!r:.40}, and not of an AutoencoderKL", at=model)
    heard = logging.getLogger("diffusers")
    level = heard.level
    heard.setLevel(logging.CRITICAL)  # what is wrong it logs, and then raises
    try:
        with torch_errors(model):
            network = AutoencoderKL.from_pretrained(path, low_cpu_mem_usage=False, **options)
    finally:
        heard.setLevel(level)
    factor = 2 ** (len(network.config.block_out_channels) - 1)
    if size < 1 or size % factor:
        raise UserError(f"a multiple of {factor} pixels, this VAE's factor", at=f"--size={size}", hint="such as 256")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device).eval()

    def encode(pictures: list[np.ndarray]) -> np.ndarray:
        pixels = np.stack([resize(picture, (size, size)) for picture in pictures]).astype(np.float32) / 127.5 - 1
        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1))).to(device, network.dtype)
            latents = network.encode(inputs).latent_dist.mode().float().cpu().numpy()
        return np.moveaxis(latents, 1, -1)

    return encode


def _pool(found_BHWC: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Bilinearly, as MetaMorph makes 8 x 8 of 27 x 27."""
    import torch

    channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(found_BHWC, -1, 1)))
    pooled = torch.nn.functional.interpolate(channels_first, size=grid, mode="bilinear", align_corners=False)
    return np.moveaxis(pooled.numpy(), 1, -1)
