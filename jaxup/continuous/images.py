"""Pictures read into arrays: files from anywhere are untrusted, and what is no sound picture is said in one line.

Shape suffixes: H, W pixels. A picture is uint8 [H, W] of grey or [H, W, 3] of colours.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxup.errors import UserError, first_line
from jaxup.files.names import nearest_path

# Pillow reads many more: EPS by starting another program, TIFF by a library that prints what it finds wrong.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")
MOST_BYTES = 256 * 2**20  # of a file
_NAMES = {
    b"<!doc": "an HTML page", b"<html": "an HTML page", b"<?xml": "XML, perhaps an SVG drawing",
    b"<svg": "an SVG drawing",
    b"%pdf": "a PDF", b"%!ps": "PostScript", b"pk\3\4": "a zip archive", b"\x1f\x8b": "compressed with gzip",
    b"version https://git-lfs": "a pointer of Git LFS, not the file", b"\x93numpy": "an array of NumPy",
}  # fmt: skip


def read_picture(value: Any, root: Path, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """The picture that a row of data has: a path, an encoded file, or the pixels themselves.

    Args:
      value: a path, relative to `root` or absolute; the bytes of a file, also as a "data:image/...;base64," text or
        as `datasets` keeps them ({"bytes", "path"}); an array or nested lists of uint8 [H, W] or [H, W, 1 or 3].
      root: directory of the file that names it. No relative path leads out of it, through links neither.
      size: (H, W) that it is made; see `resize`.

    Returns: uint8 [H, W] or [H, W, 3]. Transparent pixels are on white, and a turned photograph is upright.
    UserError without a place for whatever is none.
    """
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, str | bytes) and not value):
        raise UserError("no image: it is empty")
    if isinstance(value, str) and value.startswith("data:"):
        value = _inline(value)
    if isinstance(value, str):
        content = _file(value, root)
    elif isinstance(value, bytes | bytearray):
        content = bytes(value)
    else:
        return resize(_pixels(value), size)
    return resize(_decoded(content), size)


def _inline(text: str) -> bytes:
    head, _, body = text.partition(",")
    if not head.endswith(";base64"):
        raise UserError(f"{head[:40]!r} is not base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise UserError(f"not base64: {first_line(error)}") from None


def _file(name: str, root: Path) -> bytes:
    if "://" in name:
        raise UserError(f"{name[:80]!r} is a URL", hint="download the images first")
    if "\0" in name:
        raise UserError("a zero byte in a path")
    path = Path(name) if os.path.isabs(name) else root / name
    if not os.path.isabs(name) and not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{name} leads out of {root}", hint="an image elsewhere is named by its absolute path")
    if not path.is_file():  # opening a pipe would wait for ever
        what = "not a file" if os.path.lexists(path) else "no such file"
        raise UserError(f"{what}: {path}", hint=nearest_path(str(path)))
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(f"{path}: longer than {MOST_BYTES // 2**20} MiB")
        with path.open("rb") as file:  # files of /proc have no size, and some no end
            return file.read(size)
    except OSError as error:
        raise UserError(error.strerror or first_line(error), at=str(path)) from None


def _decoded(content: bytes) -> np.ndarray:
    if not content:
        raise UserError("no image: the file is empty")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Above Pillow's limit of pixels a warning, above twice that an error: here each is the end.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if not image.width or not image.height:
                    raise UserError(f"an image of {image.width} x {image.height} pixels")
                if (frames := getattr(image, "n_frames", 1)) > 1:
                    raise UserError(f"{frames} pictures in one file", hint="a clip is a list of them, named `frames`")
                image.load()
                return _plain(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        what = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit"
        raise UserError(what, hint="such a file may be made to fill the memory; make it smaller first") from None
    except UnidentifiedImageError:
        start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        told = next((f": it is {name}" for magic, name in _NAMES.items() if start.startswith(magic)), "")
        raise UserError(f"no image{told}; known: {', '.join(FORMATS)}") from None
    except UserError:
        raise
    except Exception as error:  # of a damaged file decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"not a sound image: {first_line(error)}") from None


def _plain(image: Any) -> np.ndarray:
    """Of a Pillow image whatever its mode."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        raise UserError(f"pixels of more than 8 bits (Pillow's mode {image.mode})", hint="save it with 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        below = Image.new("RGBA", image.size, "white")
        below.alpha_composite(above)
        image = below.convert("L" if image.mode in ("LA", "La", "L", "1") else "RGB")
    elif image.mode in ("L", "1"):
        image = image.convert("L")
    else:
        image = image.convert("RGB")
    return np.asarray(image)


def _pixels(value: Any) -> np.ndarray:
    """Of an array, or of lists as JSON and parquet have them."""
    try:
        array = np.asarray(value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind == "O" else value)
    except ValueError:
        raise UserError("an image whose rows are not equally long") from None
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
        if array.dtype.kind not in "uif":
            raise UserError(f"no image: {str(value)[:40]!r}")
        raise UserError(f"pixels of shape {list(array.shape)}", hint="[height, width], and [.., 3] of colours")
    if array.dtype.kind not in "ui" or array.min() < 0 or array.max() > 255:
        raise UserError(f"pixels of {array.dtype} from {array.min()} to {array.max()}", hint="whole numbers 0 to 255")
    return array.astype(np.uint8)


def resize(picture: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] made of `size`, by Pillow's Lanczos filter; None: as it is."""
    if size is None or picture.shape[:2] == size:
        return picture
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.LANCZOS))


def as_coloured(picture: np.ndarray) -> np.ndarray:
    """Grey [.., H, W] as colours [.., H, W, 3]."""
    return np.repeat(picture[..., None], 3, -1)


def grid_png(
    pictures: np.ndarray | Sequence[np.ndarray], columns: int, titles: Sequence[str] = (), *, least: int = 48
) -> bytes:
    """A PNG of pictures in a grid, row by row, each with its title above; clips are strips, a frame beside the other.

    Args:
      pictures: uint8 [n, H, W], [n, H, W, 3], or with frames [n, F, H, W], [n, F, H, W, 3].
      columns: pictures (or clips) in a row.
      titles: as many as pictures, or none.
      least: a picture smaller than that is shown larger, each pixel as a square.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not len(pictures) or (titles and len(titles) != len(pictures)) or columns < 1:
        raise UserError(f"{len(pictures)} pictures in {columns} columns with {len(titles)} titles")
    shown = [_strip(np.asarray(picture), least) for picture in pictures]
    font, gap, head = ImageFont.load_default(11), 4, 15 if titles else 0
    width, height = max(p.shape[1] for p in shown), max(p.shape[0] for p in shown)
    if titles:
        width = max(width, *(int(font.getlength(title)) + 2 for title in titles))
    rows = -(-len(shown) // columns)
    columns = min(columns, len(shown))
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + head + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(shown):
        row, column = divmod(number, columns)
        left, top = gap + column * (width + gap), gap + row * (height + head + gap)
        if titles:
            draw.text((left, top), titles[number], fill="black", font=font)
        sheet.paste(Image.fromarray(picture), (left, top + head))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _strip(picture: np.ndarray, least: int) -> np.ndarray:
    """uint8 [h, w, 3] of a picture or of a clip's frames side by side, large enough to be looked at."""
    if picture.ndim == 2 or (picture.ndim == 3 and picture.shape[-1] != 3):
        picture = as_coloured(picture)
    frames = picture if picture.ndim == 4 else picture[None]
    times = max(1, -(-least // frames.shape[1]))
    frames = frames.repeat(times, 1).repeat(times, 2)
    line = np.full((frames.shape[1], 2, 3), 255, np.uint8)
    return np.concatenate([part for frame in frames for part in (line, frame)][1:], 1)
