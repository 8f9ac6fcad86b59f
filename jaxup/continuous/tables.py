"""Pictures of others: rows of jsonl, parquet and `datasets`, and features that are stored already.

A row of pictures has `image` (or `frames`, a list: a clip), `text` to draw it for, `question` and `answer`, or both,
and perhaps `label`, its class. An image is what `images.read_picture` reads. A row with a label and nothing else is
drawn for its name, and asked for it.

Stored features are an array [n, tokens, channels] (of clips [n, frames, tokens, channels]), FILE.npy or DIR.zarr, with
a line of `text`, `question`, `answer`, `label` for each in a .jsonl beside it; `jaxup features` makes a directory of
both. Nothing of an array is read that is not asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxup.continuous.builtin import SOURCES, Pictures
from jaxup.continuous.images import as_coloured, read_picture, resize
from jaxup.data.readers import Row, kind_of, read_dataset, read_jsonl, read_parquet
from jaxup.data.sources import from_hub, load_dataset, os_errors
from jaxup.errors import UserError, first_line, nearest, suggest
from jaxup.files.names import nearest_path
from jaxup.progress import Progress, say
from jaxup.text import read_json

SAID = ("text", "question", "answer", "label")
COLUMNS = ("image", "frames", *SAID)
# What others call them.
_ALIASES = {
    "img": "image", "picture": "image", "pixel_values": "image", "file_name": "image", "jpg": "image", "png": "image",
    "caption": "text", "prompt": "text", "video": "frames", "labels": "label", "fine_label": "label",
}  # fmt: skip
IN_MEMORY = 2**30  # bytes of decoded pictures that are kept; of more each is decoded again when it is asked for
AT_ONCE = 64  # rows of stored features that are read together
FEATURES, CAPTIONS, ABOUT = "features", "captions.jsonl", "features.json"  # in a directory of `jaxup features`


def read_table(spec: str, *, size: int, columns: str, alike: bool = True) -> Pictures:
    """The pictures of a file or dataset, all of them read once; UserError, with the row, for what is none.

    `alike`: they must be of one size, which `size` makes them unless it is 0.
    """
    rows, root, said = _rows(spec, _renamed(columns))
    lazy = _Lazy(root, size)
    keys: list[bytes] = []
    first: tuple[int, ...] | None = None
    with Progress("read pictures", total=None, unit="pictures") as progress:
        for row in rows:
            content = said.add(row)
            try:
                picture = lazy.read(content)
            except UserError as error:
                raise error.within(row.place, "frames" if isinstance(content, _Clip) else "image") from None
            lazy.add(content, picture)
            shape = picture.shape[: 2 + isinstance(content, _Clip)]
            first = first or shape
            if alike and shape != first:
                side = min(first[-2:])
                hint = "" if size else f"size={side} makes all of them {side} x {side}"
                raise UserError(f"{_pixels(shape)}, and the first has {_pixels(first)}", at=row.place, hint=hint)
            keys.append(hashlib.blake2b(repr(picture.shape).encode() + picture.tobytes(), digest_size=16).digest())
            progress.update(len(keys))
    if not keys:
        raise UserError("no rows", at=spec)
    if lazy.resized:
        say(f"{spec}: {lazy.resized:,} of {len(keys):,} pictures were of another size, and are made {size} x {size}")
    return said.pictures(lazy, keys)


class _Clip(list[Any]):
    """The frames of a clip."""


class _Lazy:
    """Pictures by their number: kept if they are small together, else each decoded again when it is asked for."""

    def __init__(self, root: Path, size: int):
        self._root, self._size = root, (size, size) if size else None
        self._contents: list[Any] = []
        self._kept: list[np.ndarray] | None = []
        self._nbytes, self._coloured, self.resized = 0, False, 0

    def read(self, content: Any) -> np.ndarray:
        if isinstance(content, _Clip):
            frames = [self.read(frame) for frame in content]
            if not frames or len({frame.shape[:2] for frame in frames}) > 1:
                raise UserError("frames of different sizes" if frames else "no frames")
            if any(frame.ndim == 3 for frame in frames):
                frames = [frame if frame.ndim == 3 else as_coloured(frame) for frame in frames]
            return np.stack(frames)
        picture = read_picture(content, self._root)
        made = resize(picture, self._size)
        self.resized += made.shape != picture.shape
        return made

    def add(self, content: Any, picture: np.ndarray) -> None:
        self._contents.append(content)
        self._coloured |= picture.ndim == 3 + isinstance(content, _Clip)
        self._nbytes += picture.nbytes
        if self._kept is not None:
            self._kept.append(picture)
            if self._nbytes > IN_MEMORY:
                self._kept = None

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, number: int) -> np.ndarray:
        content = self._contents[number]
        picture = self._kept[number] if self._kept is not None else self.read(content)
        return as_coloured(picture) if self._coloured and picture.ndim == 2 + isinstance(content, _Clip) else picture


def _pixels(shape: tuple[int, ...]) -> str:
    return f"{shape[-2]} x {shape[-1]} pixels" + (f" in {shape[0]} frames" if len(shape) == 3 else "")


class _Said:
    """What is said of pictures, row by row."""

    def __init__(self, columns: dict[str, str], names: tuple[str, ...] = (), *, pictured: bool = True):
        self._columns, self._names = columns, names
        self._needed = ("image", "frames") if pictured else ()
        self._said: dict[str, list[str]] = {column: [] for column in SAID}

    def add(self, row: Row) -> Any:
        """Takes what a row says, and gives its picture as it stands there."""
        if row.fault or not isinstance(row.value, dict):
            raise UserError(row.fault or f"a row is an object, not {str(row.value)[:40]!r}", at=row.place)
        value = {ours: row.value[theirs] for ours, theirs in self._columns.items() if row.value.get(theirs) is not None}
        image = [column for column in self._needed if column in value]
        if self._needed and len(image) != 1:
            what = "both image and frames" if image else f"neither image nor frames{_meant(row.value, self._needed)}"
            raise UserError(what, at=row.place)
        label = value.pop("label", None)
        if label is not None:
            label = self._names[label] if isinstance(label, int) and 0 <= label < len(self._names) else str(label)
            if not value.keys() & {"text", "question", "answer"}:
                value |= {"text": f"draw {label}", "question": "what is it?", "answer": f" {label}"}
            value["label"] = label
        said = {column: value.get(column, "") for column in SAID}
        for column in SAID:
            if not isinstance(said[column], str) or (column in value and not said[column].strip()):
                what = f"{said[column]!r:.40} is no text" if not isinstance(said[column], str) else "empty"
                raise UserError(what, at=(row.place, column))
        if bool(said["question"]) != bool(said["answer"]):
            raise UserError("a question without an answer, or an answer without a question", at=row.place)
        if not said["text"] and not said["answer"]:
            raise UserError(f"neither text nor question and answer{_meant(row.value, SAID)}", at=row.place)
        for column, text in said.items():
            self._said[column].append(text)
        if not image:
            return None
        if image == ["image"]:
            return value["image"]
        if not isinstance(value["frames"], list):
            raise UserError("not a list of images", at=(row.place, "frames"))
        return _Clip(value["frames"])

    def __len__(self) -> int:
        return len(self._said["text"])

    def pictures(self, pixels: Any, keys: list[bytes]) -> Pictures:
        labels, classes = self._said["label"], tuple(sorted(set(self._said["label"])))
        number = {name: n for n, name in enumerate(classes)}
        return Pictures(
            pixels=pixels, texts=self._said["text"], questions=self._said["question"], answers=self._said["answer"],
            keys=keys, classes=classes if all(classes) else (),
            labels=np.array([number[label] for label in labels], np.int64) if all(classes) else None,
        )  # fmt: skip


def _meant(row: Iterable[str], wanted: Sequence[str]) -> str:
    """Which column of those that are there was probably meant."""
    keys = [str(key)[:40] for key in row]
    for key in keys:
        near = _ALIASES.get(key) or next((ours for ours in wanted if nearest(key, [ours])), None)
        if near and near in wanted and key != near:
            return f"; columns={near}={key} reads {key!r} as that"
    return f"; its columns: {', '.join(map(repr, keys[:12])) or 'none'}"


def _renamed(columns: str) -> dict[str, str]:
    """Our name of each column -> what it is called where it is read from."""
    names = {column: column for column in COLUMNS}
    for part in filter(None, columns.split(",")):
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        if not equals or not theirs:
            raise UserError(f"{part!r}", at="columns", hint="write image=NAME,text=NAME")
        if ours not in names:
            raise UserError(f"no column {ours!r}{suggest(ours, COLUMNS)}", at="columns")
        names[ours] = theirs
    return names


def _rows(spec: str, columns: dict[str, str]) -> tuple[Iterator[Row], Path, _Said]:
    """The rows of a file or dataset, where relative paths in it begin, and what will take what they say."""
    theirs = list(columns.values())

    def choose(names: list[str]) -> list[str]:
        chosen = [name for name in names if name in theirs]
        if not {columns["image"], columns["frames"]} & {*chosen}:
            raise UserError(f"neither image nor frames{_meant(names, ('image', 'frames'))}", at=spec)
        return chosen

    path = Path(os.path.expanduser(spec))
    with os_errors(spec):
        if path.is_file():
            readers: dict[str, Callable[[], Iterator[Row]]] = {
                ".jsonl": lambda: read_jsonl(path), ".parquet": lambda: read_parquet(path, choose)
            }  # fmt: skip
            if (reader := readers.get(kind_of(path))) is None:
                hint = "encoder=features reads it" if kind_of(path) == ".npy" else ""
                raise UserError(f"pictures are {', '.join(readers)}, or a dataset", at=spec, hint=hint)
            return reader(), path.parent, _Said(columns)
        data, split = _dataset(spec, path)
    if isinstance(data, dict):
        split = split or ("train" if "train" in data else next(iter(data)) if len(data) == 1 else "")
        if split not in data:
            raise UserError(f"no split {split or 'train'!r}; its splits: {', '.join(data)}", at=spec)
        data = data[split]
    from datasets import ClassLabel, Image, List

    choose(data.column_names)
    names: tuple[str, ...] = ()
    for name, feature in data.features.items():
        if isinstance(feature, Image):  # its own decoding would have no limits
            data = data.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            data = data.cast_column(name, List(Image(decode=False)))
        elif isinstance(feature, ClassLabel) and name == columns["label"]:
            names = tuple(feature.names)
    return read_dataset(spec, data, choose), path if path.is_dir() else Path(), _Said(columns, names)


def _dataset(spec: str, path: Path) -> tuple[Any, str]:
    """The datasets.Dataset or DatasetDict that `spec` names, and the split at its end, if any."""
    base, _, split = spec.rpartition(":")
    if not path.exists() and base and Path(os.path.expanduser(base)).exists():
        path = Path(os.path.expanduser(base))
    else:
        base, split = spec, ""
    if not path.exists():
        near = nearest(spec.partition(":")[0], SOURCES)
        missing = f"no such source, file or directory: {spec!r}{near}"
        if near or "://" in spec or kind_of(path) in (".jsonl", ".parquet", ".npy", ".zarr"):
            raise UserError(missing, hint="" if near else nearest_path(spec))
        return from_hub(spec, missing)
    if not path.is_dir():  # opening a pipe would wait for ever
        raise UserError("neither a file nor a directory", at=spec)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return load_dataset(base, "load_from_disk", str(path)), split
    what = "not a dataset that `save_to_disk` wrote"
    there = next((name for name in ("metadata.jsonl", CAPTIONS) if (path / name).exists()), None)
    if there == CAPTIONS:
        raise UserError(f"{what}: it has stored features", at=spec, hint="encoder=features reads them")
    hint = f"{path / there} with columns=image=file_name is one of imagefolder" if there else "name a .jsonl in it"
    raise UserError(what, at=spec, hint=hint)


# ---- stored features


def read_features(spec: str, captions: str) -> tuple[Pictures, tuple[int, int] | None]:
    """The features that `spec` names, all of them read once, and their grid if that is known."""
    path = Path(os.path.expanduser(spec))
    if not path.exists():
        raise UserError(f"no such file or directory: {spec}", hint=nearest_path(spec))
    grid = None
    if path.is_dir() and (path / CAPTIONS).exists():
        directory, about = path, read_json(path / ABOUT, {"grid": list[int]}, "") or {}
        grid = tuple(about["grid"]) if len(about.get("grid", ())) == 2 else None
        there = [name for name in (f"{FEATURES}.npy", f"{FEATURES}.zarr") if (directory / name).exists()]
        if len(there) != 1:
            raise UserError(f"there must be {FEATURES}.npy or {FEATURES}.zarr", at=spec)
        path, beside = directory / there[0], directory / CAPTIONS
    else:
        beside = path.with_suffix(".jsonl")
    if captions:
        beside = Path(os.path.expanduser(captions))
    if not beside.is_file():
        raise UserError(f"no captions: {beside}", at=spec, hint="captions=FILE.jsonl has a line for each")
    array = _zarr(path) if path.is_dir() else _npy(path)
    if len(array.shape) not in (3, 4):
        hint = "one token each is [n, 1, channels]" if len(array.shape) == 2 else ""
        what = f"features of shape {list(array.shape)}, and not [n, tokens, channels] or [n, frames, tokens, channels]"
        raise UserError(what, at=str(path), hint=hint)
    if not all(array.shape):
        raise UserError(f"features of shape {list(array.shape)}: there are none", at=str(path))
    said = _Said({column: column for column in COLUMNS}, pictured=False)
    with os_errors(str(beside)):
        for row in read_jsonl(beside):
            said.add(row)
    if len(said) != array.shape[0]:
        raise UserError(f"{len(said):,} captions in {beside}, and {array.shape[0]:,} features", at=str(path))
    keys = []
    with Progress("read features", total=array.shape[0], unit="rows") as progress:
        for start in range(0, array.shape[0], AT_ONCE):
            for number, content in enumerate(array[start : start + AT_ONCE], start):
                if not np.isfinite(content).all():
                    raise UserError(f"row {number} (from 0) holds a number that is not finite", at=str(path))
                keys.append(hashlib.blake2b(content.tobytes(), digest_size=16).digest())
            progress.update(len(keys))
    return said.pictures(array, keys), grid


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """An array in a file: what is asked for is read, as float32."""

    shape: tuple[int, ...]
    at: str
    read: Callable[[Any], Any]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: int | slice) -> np.ndarray:
        if isinstance(where, slice):  # TensorStore does not end it with the array
            where = slice(*where.indices(len(self)))
        try:
            return np.asarray(self.read(where)).astype(np.float32)
        except (ValueError, OSError) as error:
            raise UserError(f"cannot be read: {first_line(error)[:200]}", at=self.at) from None


def _npy(path: Path) -> Stored:
    """Memory-mapped; nothing in it is ever run."""
    with os_errors(str(path)):
        if not path.is_file():  # opening a pipe would wait for ever
            raise UserError("not a file", at=str(path))
        with path.open("rb") as file:
            magic = file.read(6)
    if magic != b"\x93NUMPY":
        archive = magic.startswith(b"PK") or kind_of(path) in (".npz", ".zip", ".tar")
        hint = "an archive; save the array alone, as .npy" if archive else ".npy is what numpy.save writes"
        raise UserError("not an array of NumPy", at=str(path), hint=hint)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # its header is parsed as Python is: SyntaxError, TokenError, RecursionError, ...
        told = "it holds objects of Python" if "object" in str(error).lower() else first_line(error)
        raise UserError(f"cannot be read: {told[:200]}", at=str(path), hint="numbers only, as float32") from None
    return _numbers(array.dtype, array.shape, str(path), array.__getitem__)


def _zarr(path: Path) -> Stored:
    """By tensorstore, zarr of format 2 or 3."""
    import tensorstore as ts

    driver = next((d for d, mark in (("zarr3", "zarr.json"), ("zarr", ".zarray")) if (path / mark).is_file()), None)
    if driver is None:
        raise UserError("not an array of zarr: neither zarr.json nor .zarray is in it", at=str(path))
    kvstore = {"driver": "file", "path": f"{path.resolve()}/"}
    try:
        array = ts.open({"driver": driver, "kvstore": kvstore}, open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise UserError(f"cannot be read: {first_line(error)[:200]}", at=str(path)) from None
    return _numbers(
        array.dtype.numpy_dtype, tuple(array.shape), str(path), lambda where: array[where].read().result()
    )  # fmt: skip


def _numbers(dtype: np.dtype, shape: tuple[int, ...], at: str, read: Callable[[Any], Any]) -> Stored:
    if dtype.kind != "f" and dtype.name != "bfloat16":
        raise UserError(f"features of {dtype}", at=at, hint="they are float32, float16 or bfloat16")
    return Stored(shape, at, read)
