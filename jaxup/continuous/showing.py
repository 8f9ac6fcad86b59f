"""Pictures and clips that were drawn, as a PNG file of many."""

from __future__ import annotations

import io

import numpy as np

_SIDE = 64  # pixels that a small picture is enlarged to, at least
_GAP = 2


def grid(pictures: np.ndarray, columns: int, *, clips: bool) -> bytes:
    """A PNG of pictures, so many in a row; of clips each is a row, its frames from left to right.

    Args:
      pictures: uint8 [n, H, W] or [n, H, W, 3]; of clips [n, F, H, W] or [n, F, H, W, 3].
    """
    from PIL import Image

    if clips:
        columns, pictures = pictures.shape[1], pictures.reshape(-1, *pictures.shape[2:])
    count, height, width, *_ = pictures.shape
    columns = min(columns, count)
    factor = max(1, -(-_SIDE // max(height, width)))
    shown = pictures.repeat(factor, 1).repeat(factor, 2)
    rows, (high, wide) = -(-count // columns), (height * factor + _GAP, width * factor + _GAP)
    sheet = np.full((rows * high - _GAP, columns * wide - _GAP, *pictures.shape[3:]), 255, np.uint8)
    for index, picture in enumerate(shown):
        top, left = (index // columns) * high, (index % columns) * wide
        sheet[top : top + high - _GAP, left : left + wide - _GAP] = picture
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, format="PNG")
    return out.getvalue()
