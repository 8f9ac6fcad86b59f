"""How pictures become continuous tokens and back: patches as they are, or their principal components.

Shape suffixes: F frames, H, W pixels, N tokens of a frame, C channels of a token, P numbers of a patch. Tokens are in
reading order; a patch is rows of pixels, each pixel its colours. Pixels are -1 to 1.

| encoder | is |
|---|---|
| `patches:K` | K x K pixels each: nothing is lost, and nothing is fitted |
| `pca:K:C` | the C principal components of such patches, fitted to the training part |
| `features` | what is stored already; there is no way back to pixels |

What a model sees are `(encoded - shift) / scale`, of unit deviation over the training part: one number for all tokens
and channels, as MAR scales its latents, so that components keep their proportions. Pixels and components are centred
by one number too; features are not, because a cosine head predicts their direction.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxup.errors import UserError, first_line, suggest

ENCODERS = ("patches:K", "pca:K:C", "features")
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """Fitted, with all that decoding needs: it is kept with a run, so that a model draws without the data.

    Args:
      spec: as written in the configuration.
      patch: pixels of a patch's side; 0 of features.
      grid: (rows, columns) of the tokens of a frame.
      frames: of a clip; 0 of pictures.
      channels: of a token.
      colours: 1 (grey) or 3; 0 of features.
      shift, scale: a value is `(encoded - shift) / scale`.
      mean: float32 [P], components: float32 [C, P]; both empty unless the encoder is `pca`.
    """

    spec: str
    patch: int
    grid: tuple[int, int]
    frames: int
    channels: int
    colours: int
    shift: float = 0.0
    scale: float = 1.0
    mean: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    components: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @property
    def decodes(self) -> bool:
        """Whether there is a way back to pixels."""
        return self.patch > 0

    @property
    def tokens(self) -> int:
        """Of one frame."""
        return self.grid[0] * self.grid[1]

    def encode(self, content: np.ndarray) -> np.ndarray:
        """uint8 [.., H, W] or [.., H, W, 3] (features: float [.., N, C]) -> values, float32 [.., N, C]."""
        return ((self.raw(content) - np.float32(self.shift)) / np.float32(self.scale)).astype(np.float32)

    def raw(self, content: np.ndarray) -> np.ndarray:
        """The same before it is made of unit deviation."""
        if not self.decodes:
            return np.asarray(content, np.float32)
        patches = _patches(content, self.patch, self.colours)
        return (patches - self.mean) @ self.components.T if self.components.size else patches

    def decode(self, values: np.ndarray) -> np.ndarray:
        """float [.., N, C] -> uint8 [.., H, W], or [.., H, W, 3] of colours; UserError of features."""
        if not self.decodes:
            raise UserError("stored features have no way back to pixels", at=f"encoder={self.spec}")
        patches = np.asarray(values, np.float32) * np.float32(self.scale) + np.float32(self.shift)
        if self.components.size:
            patches = patches @ self.components + self.mean
        (rows, columns), lead = self.grid, patches.shape[:-2]
        parts = patches.reshape(*lead, rows, columns, self.patch, self.patch, self.colours)
        pixels = np.moveaxis(parts, -3, -4).reshape(*lead, rows * self.patch, columns * self.patch, self.colours)
        # What is not finite was not drawn: black, and no warning from numpy in its place.
        pixels = np.clip(np.nan_to_num((pixels + 1) * 127.5, nan=0.0), 0, 255).round().astype(np.uint8)
        return pixels[..., 0] if self.colours == 1 else pixels

    @property
    def digest(self) -> str:
        """Another one for another encoder."""
        return hashlib.blake2b(self._content(), digest_size=16).hexdigest()

    def _content(self) -> bytes:
        settings = json.dumps(self._settings(), sort_keys=True).encode()
        return b"\0".join([settings, self.mean.astype("<f4").tobytes(), self.components.astype("<f4").tobytes()])

    def _settings(self) -> dict[str, Any]:
        arrays = ("mean", "components")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in arrays}

    def to_bytes(self) -> bytes:
        """As an npz file with its digest."""
        out = io.BytesIO()
        settings = json.dumps({"format": _FORMAT, "digest": self.digest, **self._settings()})
        np.savez(out, settings=np.frombuffer(settings.encode(), np.uint8), mean=self.mean, components=self.components)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, at: str) -> Encoder:
        """What `to_bytes` made; UserError for anything else."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                settings = json.loads(file["settings"].tobytes())
                digest, version = settings.pop("digest"), settings.pop("format")
                arrays = {name: file[name].astype(np.float32) for name in ("mean", "components")}
            if version != _FORMAT:
                raise ValueError(f"its format is {version!r}")
            encoder = cls(**settings | {"grid": tuple(settings["grid"])}, **arrays)
            if encoder.digest != digest:
                raise ValueError("its digest is another")
        except Exception as error:  # a damaged archive makes zipfile and numpy raise all kinds
            raise UserError(f"not an encoder that jaxup has written: {first_line(error)}", at=at) from None
        return encoder


def open_encoder(spec: str, shape: tuple[int, ...], *, frames: int, grid: tuple[int, int] | None = None) -> Encoder:
    """An encoder of that name for content of `shape`, not fitted yet.

    Args:
      spec: one of ENCODERS.
      shape: [H, W] or [H, W, 3] of a picture; [N, C] of features.
      frames: of a clip, 0 of pictures.
      grid: of features, where it is known.
    """
    name, *numbers = spec.split(":")
    wanted = {"patches": 1, "pca": 2, "features": 0}.get(name)
    if wanted is None:
        raise UserError(f"no encoder {name!r}{suggest(name, ['patches', 'pca', 'features'])}", at="encoder")
    if len(numbers) != wanted or not all(re.fullmatch("[1-9][0-9]{0,5}", number) for number in numbers):
        form = next(form for form in ENCODERS if form.startswith(name))
        raise UserError(f"{spec!r}: write {form} with numbers from 1", at="encoder")
    if name == "features":
        tokens, channels = shape
        side = int(tokens**0.5)
        grid = grid or ((side, side) if side * side == tokens else (1, tokens))
        if grid[0] * grid[1] != tokens:
            raise UserError(f"a grid of {grid[0]} x {grid[1]} and {tokens} tokens", at="encoder")
        return Encoder(spec=spec, patch=0, grid=grid, frames=frames, channels=channels, colours=0)
    height, width, colours = (*shape, 1)[:3]
    patch = int(numbers[0])
    if height % patch or width % patch:
        divisors = [str(k) for k in range(1, min(height, width) + 1) if not height % k and not width % k]
        what = f"patches of {patch} x {patch} pixels do not divide images of {height} x {width}"
        raise UserError(what, at=f"encoder={spec}", hint=f"{', '.join(divisors)} would")
    inputs = patch * patch * colours
    channels = int(numbers[1]) if name == "pca" else inputs
    if channels > inputs:
        what = f"{channels} components of patches that have {inputs} numbers"
        raise UserError(what, at=f"encoder={spec}", hint=f"at most {inputs}")
    grid = height // patch, width // patch
    return Encoder(spec=spec, patch=patch, grid=grid, frames=frames, channels=channels, colours=colours)


def fit(encoder: Encoder, training: Callable[[], Iterable[np.ndarray]]) -> Encoder:
    """The encoder fitted to what `training()` yields, the content of the training part, which is read twice at most.

    UserError where all of it is the same, so that nothing could be scaled.
    """
    if encoder.spec.startswith("pca:"):
        moments = _Moments(encoder.patch**2 * encoder.colours)
        for content in training():
            moments.add(_patches(content, encoder.patch, encoder.colours))
        values, vectors = np.linalg.eigh(moments.covariance())
        order = np.argsort(values)[::-1][: encoder.channels]
        rank = int((values > values.max() * 1e-10).sum())
        if rank < encoder.channels:
            what = f"{encoder.channels} components, but {moments.count:,} patches of the training part span {rank}"
            raise UserError(what, at=f"encoder={encoder.spec}")
        components = vectors[:, order].T
        # A component and its negative are the same: the largest entry is positive, whatever the library says.
        largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
        components = (components * np.sign(largest)).astype(np.float32)
        encoder = dataclasses.replace(encoder, mean=moments.mean.astype(np.float32), components=components)
    moments = _Moments(1)
    for content in training():
        moments.add(encoder.raw(content).reshape(-1, 1))
    scale = float(moments.covariance()[0, 0]) ** 0.5
    if not scale > 0:
        raise UserError("all of the training part is one value: there is nothing to learn", at="encoder")
    shift = float(moments.mean[0]) if encoder.decodes else 0.0
    return dataclasses.replace(encoder, shift=shift, scale=scale)


class _Moments:
    """Mean and covariance of rows that come a few at a time, in float64 (Chan, Golub and LeVeque)."""

    def __init__(self, width: int):
        self.count, self.mean, self._products = 0, np.zeros(width), np.zeros((width, width))

    def add(self, rows: np.ndarray) -> None:
        rows = rows.reshape(-1, len(self.mean)).astype(np.float64)
        mean = rows.mean(0)
        apart, total = mean - self.mean, self.count + len(rows)
        self._products += (rows - mean).T @ (rows - mean) + np.outer(apart, apart) * (self.count * len(rows) / total)
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    def covariance(self) -> np.ndarray:
        return self._products / self.count


def _patches(pixels: np.ndarray, patch: int, colours: int) -> np.ndarray:
    """uint8 [.., H, W] or [.., H, W, 3] -> float32 [.., N, P], -1 to 1."""
    if colours == 1:
        pixels = pixels[..., None]
    *lead, height, width, _ = pixels.shape
    parts = pixels.reshape(*lead, height // patch, patch, width // patch, patch, colours)
    patches = np.moveaxis(parts, -3, -4).reshape(*lead, (height // patch) * (width // patch), patch * patch * colours)
    return patches.astype(np.float32) / np.float32(127.5) - np.float32(1)
