"""What a run's model draws, beside what was asked for and real pictures, as a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

_SIDE = 64  # pixels that a small picture is enlarged to, at least
_GAP, _APART, _LINE = 2, 14, 20  # pixels between pictures, between columns of a sheet, and of a line of text


def sheet(texts: Sequence[str], real: np.ndarray, drawn: np.ndarray) -> bytes:
    """A PNG with a row for each text: what was asked for, a real picture or more, and what was drawn.

    Args:
      real, drawn: uint8 [rows, n, H, W] or [rows, n, H, W, 3], the n of each may differ; of a clip n are its frames.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    parts = [_tiled(part.reshape(-1, *part.shape[2:]), part.shape[1]) for part in (real, drawn)]
    each = (parts[0].shape[0] + _GAP) // len(texts)
    left = int(max(map(font.getlength, texts))) + 2 * _APART
    starts = (left, left + parts[0].shape[1] + _APART)
    shown = np.full((_LINE + len(parts[0]), starts[1] + parts[1].shape[1], *parts[0].shape[2:]), 255, np.uint8)
    for start, part in zip(starts, parts):
        shown[_LINE:, start : start + part.shape[1]] = part
    image = Image.fromarray(shown)
    draw, black = ImageDraw.Draw(image), 0 if shown.ndim == 2 else (0, 0, 0)
    for start, title in zip((_APART, *starts), ("asked for", "real", "drawn")):
        draw.text((start, 4), title, fill=black, font=font)
    for row, text in enumerate(texts):
        draw.text((_APART, _LINE + row * each + (each - _LINE) // 2), text, fill=black, font=font)
    return _png(np.asarray(image))


def _tiled(pictures: np.ndarray, columns: int) -> np.ndarray:
    count, height, width, *_ = pictures.shape
    factor = max(1, -(-_SIDE // max(height, width)))
    shown = pictures.repeat(factor, 1).repeat(factor, 2)
    rows, (high, wide) = -(-count // columns), (height * factor + _GAP, width * factor + _GAP)
    tiles = np.full((rows * high - _GAP, columns * wide - _GAP, *pictures.shape[3:]), 255, np.uint8)
    for index, picture in enumerate(shown):
        top, left = (index // columns) * high, (index % columns) * wide
        tiles[top : top + high - _GAP, left : left + wide - _GAP] = picture
    return tiles


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="PNG")
    return out.getvalue()
