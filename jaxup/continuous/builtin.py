"""Pictures that every machine has: scikit-learn's digits, the same moving about, drawn shapes, and textures.

| source | is |
|---|---|
| `digits` | scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, as people wrote them (extra `vision`) |
| `moving_digits:F` | each of them in four clips of F frames of 16 x 16 pixels, one for each direction |
| `shapes` | four shapes in three colours on 16 x 16 pixels, drawn |
| `xor` | textures of 8 x 8 pixels, 4 x 4 cells: of each two cells beside each other exactly one is bright |

A clip is 16 x 16 pixels and a patch of one 4 x 4, so that a frame is 16 tokens and the digit is as legible as it was
written: tokens cost time, channels of a token do not. From edge to edge it goes 8 pixels, one a frame if there are 9.
The prompt says the digit and the direction and not how far from the side it runs, which only the frames before tell.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxup.errors import UserError

SOURCES = ("digits", "moving_digits", "shapes", "xor")
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}  # (rows, columns)
CANVAS, DIGIT = 16, 8  # pixels of a clip's frame, and of the digit in it
FRAMES = 8
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (220, 50, 47), "green": (80, 180, 60), "blue": (38, 110, 220)}
DRAWN = 2048  # pictures of those sources that are drawn
CELLS, CELL = 4, 2  # of a texture in a row, and pixels of one


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Pictures with what is said of them.

    Args:
      pixels: uint8 [n, H, W], [n, H, W, 3], or of clips [n, F, H, W] and [n, F, H, W, 3]; of stored features float32
        [n, N, C] or [n, F, N, C]. An array, or what gives one for a number.
      texts: what each is drawn for.
      questions, answers: what is asked of each, and told; "" where nothing is, as in `texts`.
      labels: int [n], the class of each by its number in `classes`; None if there are no classes.
      keys: what each is held out by: pictures of one key are all seen or all unseen.
      paths: float32 [n, F, 2], how far (rows, columns) each frame of a clip is from its first, where that is known.
    """

    pixels: Any
    texts: list[str]
    questions: list[str]
    answers: list[str]
    keys: list[bytes]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    paths: np.ndarray | None = None

    def look(self, numbers: np.ndarray | Iterable[int]) -> np.ndarray:
        """Those of these numbers, stacked."""
        return np.stack([np.asarray(self.pixels[int(number)]) for number in numbers])


def builtin(spec: str) -> Pictures | None:
    """The pictures of a source of this file, None if `spec` is none of them; UserError for one that is misspelt."""
    name, _, rest = spec.partition(":")
    if name not in SOURCES:
        return None
    if name == "moving_digits":
        if not (rest or str(FRAMES)).isdecimal() or not 2 <= int(rest or FRAMES) <= 64:
            raise UserError(f"{rest!r} frames", at=spec, hint="moving_digits:8 has 8, and 2 to 64 can be")
        return _moving_digits(int(rest or FRAMES))
    if rest:
        raise UserError(f"{name} takes nothing after a colon", at=spec)
    return {"digits": _digits, "shapes": _shapes, "xor": _textures}[name]()


@functools.cache
def _written() -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [1797, 8, 8], int [1797])."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('digits need scikit-learn; pip install "jaxup[vision]"') from None
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def _digits() -> Pictures:
    pixels, labels = _written()
    return Pictures(
        pixels=pixels, texts=[f"draw {label}" for label in labels], questions=["which digit?"] * len(labels),
        answers=[f" {label}" for label in labels], keys=[picture.tobytes() for picture in pixels], labels=labels,
        classes=tuple("0123456789"),
    )  # fmt: skip


def _moving_digits(frames: int) -> Pictures:
    pixels, labels = _written()
    count, ways, far = len(pixels), len(DIRECTIONS), CANVAS - DIGIT
    travel = min(far, frames - 1)
    rng = np.random.default_rng(0)
    along = np.round(np.arange(frames) * travel / (frames - 1)).astype(np.int64)
    before = rng.integers(0, far - travel + 1, (count, ways))  # pixels before the start, which few frames leave
    aside = rng.integers(0, far + 1, (count, ways))
    clips = np.zeros((count, ways, frames, CANVAS, CANVAS), np.uint8)
    paths = np.zeros((count, ways, frames, 2), np.float32)
    side = np.arange(DIGIT)
    for way, (down, right) in enumerate(DIRECTIONS.values()):
        for frame in range(frames):
            at = before[:, way] + along[frame]
            at = far - at if down + right < 0 else at
            top, left = (at, aside[:, way]) if down else (aside[:, way], at)
            rows, columns = top[:, None, None] + side[:, None], left[:, None, None] + side
            clips[np.arange(count)[:, None, None], way, frame, rows, columns] = pixels
        paths[:, way] = along[:, None] * np.array([down, right], np.float32)
    texts = [f"draw {label} moving {way}" for label in labels for way in DIRECTIONS]
    return Pictures(
        pixels=clips.reshape(-1, *clips.shape[2:]), texts=texts, questions=["which digit?"] * len(texts),
        answers=[f" {label}" for label in labels.repeat(ways)], labels=labels.repeat(ways),
        keys=[picture.tobytes() for picture in pixels for _ in range(ways)], classes=tuple("0123456789"),
        paths=paths.reshape(-1, frames, 2),
    )  # fmt: skip


def _shapes() -> Pictures:
    rng, fine = np.random.default_rng(0), 4  # each pixel is the mean of fine x fine
    names = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    labels = np.arange(DRAWN) % len(names)
    radius, grey = rng.uniform(3, 5.5, DRAWN), rng.uniform(0, 40, DRAWN)
    centre = rng.uniform(radius, CANVAS - radius, (2, DRAWN)).T
    rows, columns = np.divmod(np.arange((CANVAS * fine) ** 2).reshape(CANVAS * fine, -1), CANVAS * fine)
    pixels = np.empty((DRAWN, CANVAS, CANVAS, 3), np.uint8)
    for i, label in enumerate(labels):
        y, x = ((axis + 0.5) / fine - centre[i, n] for n, axis in enumerate((rows, columns)))
        y, x = y / radius[i], x / radius[i]
        inside = {
            "circle": y**2 + x**2 < 1,
            "square": np.maximum(abs(y), abs(x)) < 0.85,
            "triangle": (y < 0.8) & (y > 1.8 * abs(x) - 0.9),
            "cross": (np.minimum(abs(y), abs(x)) < 0.3) & (np.maximum(abs(y), abs(x)) < 0.95),
        }[SHAPES[label // len(COLOURS)]]
        share = inside.reshape(CANVAS, fine, CANVAS, fine).mean((1, 3))[..., None]
        colour = np.array(list(COLOURS.values())[label % len(COLOURS)])
        pixels[i] = np.round(share * colour + (1 - share) * grey[i])
    return Pictures(
        pixels=pixels, texts=[f"draw a {names[label]}" for label in labels], questions=["which shape?"] * DRAWN,
        answers=[f" a {names[label]}" for label in labels], keys=[picture.tobytes() for picture in pixels],
        labels=labels.astype(np.int64), classes=tuple(names),
    )  # fmt: skip


def _textures() -> Pictures:
    """Of 8 pairs of cells, so 256 patterns, some of which are held out; how bright a cell is differs as well."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, (DRAWN, CELLS, CELLS // 2))
    bright = np.stack([first, 1 - first], -1).reshape(DRAWN, CELLS, CELLS)
    level = np.where(bright == 1, 255, 0) + np.where(bright == 1, -1, 1) * rng.integers(0, 64, bright.shape)
    pixels = level.repeat(CELL, 1).repeat(CELL, 2).astype(np.uint8)
    return Pictures(
        pixels=pixels, texts=["draw a texture"] * DRAWN, questions=[""] * DRAWN, answers=[""] * DRAWN,
        keys=[pattern.tobytes() for pattern in bright.astype(np.uint8)],
    )  # fmt: skip
