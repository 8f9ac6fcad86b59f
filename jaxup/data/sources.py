"""Where the text comes from: the standard library, files, datasets, or tokens made by nanoGPT.

A source is named by one string:

| `data.source` | is | split into train and validation by |
|---|---|---|
| `python` | the standard library of the running interpreter, about 10 MB | a hash of each file's path |
| a file or a directory | text, .jsonl (key "text"), .parquet (column "text") | a hash of (file, document) |
| a directory of `save_to_disk` | a `datasets` Dataset or DatasetDict | its own splits, else `train_test_split` |
| a directory with train.bin and val.bin | nanoGPT's flat uint16 tokens | the two files |
| `NAME` or `NAME:CONFIG` | a dataset on the Hugging Face hub | its own splits, else `train_test_split` |

Documents come in a fixed order and are never all in memory. `./python` reaches a directory that
happens to be called python.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import difflib
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxup.errors import UserError, first_line, suggest, within

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

PROSE_SUFFIXES = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".csv", ".toml", ".yaml", ".yml"}
CODE_SUFFIXES = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh"}
CORPUS_SUFFIXES = PROSE_SUFFIXES | CODE_SUFFIXES | {".jsonl", ".parquet"}
# A name that ends so was meant as a path even when nothing is there; hub names never do.
PATH_SUFFIXES = CORPUS_SUFFIXES | {".json", ".gz", ".zst", ".zip", ".bin"}
# Directories of the standard library that are tests, or not the library at all.
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3"}

PIECE_CHARACTERS = 64 * 1024  # a longer plain-text file becomes several documents
WHOLE_HASH_BYTES = 16 * 2**20  # the fingerprint of a longer file hashes its size, head and tail
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """Documents (or, when `is_tokens`, tokens) in two splits; made by `open_source`."""

    spec: str  # as the user wrote it; error messages name it
    name: str  # short, fit for a file name
    fingerprint: str  # hex; other content has another one
    val_fraction: float | None  # None: the source brings its own splits, the setting decides nothing
    seed: int | None  # None: the split does not depend on it
    is_tokens: bool = False

    def documents(self, split: Split) -> Iterator[str]:
        """The non-empty documents of `split`, lazily, in an order that never changes.

        Raises UserError for a file that cannot be read or parsed, and, at the end, when the split
        was empty.
        """
        found = False
        with within("source"), os_errors(self.spec):
            for text in self._documents(split):
                if text:
                    found = True
                    yield text
            if not found:
                hint = "" if self.val_fraction is None else f" with data.val_fraction={self.val_fraction}"
                raise UserError(f"no text found in its {split} split{hint}", at=self.spec)

    def tokens(self, split: Split) -> np.memmap:
        """uint16 [tokens]; only when `is_tokens`."""
        raise TypeError(f"the source {self.spec} holds text, not tokens")

    @abc.abstractmethod
    def _documents(self, split: Split) -> Iterator[str | None]: ...


def open_source(spec: str, *, val_fraction: float, seed: int) -> Source:
    """The source that `spec` names. Reads no more than the fingerprint needs; a hub dataset is downloaded.

    Raises UserError, in one line, when there is none, it holds no text or a package is missing.
    """
    if not 0 < val_fraction < 1:
        raise UserError("must lie between 0 and 1", at=f"val_fraction={val_fraction}")
    path = Path(spec).expanduser()
    with within("source"), os_errors(spec):
        if spec == "python":
            return python_source(val_fraction)
        if not spec or not path.exists():
            return _hub_source(spec, val_fraction, seed)
        if path.is_file():
            return _file_source(spec, path.parent, [path], val_fraction)
        if (path / "train.bin").exists() and (path / "val.bin").exists():
            return _token_source(spec, path)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _dataset_source(spec, path.resolve().name, _load_from_disk(spec, path), val_fraction, seed)
        return _file_source(spec, path, _text_files(path), val_fraction)


# Files


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """Text, .jsonl and .parquet files; `files` are (name the split is decided by, path)."""

    val_fraction: float
    files: tuple[tuple[str, Path], ...]
    whole_files: bool  # a file is one document and wholly in one split

    def _documents(self, split: Split) -> Iterator[str | None]:
        for name, path in self.files:
            if self.whole_files:
                if self._split(name) == split:
                    yield path.read_text(encoding="utf-8-sig", errors="replace")
                continue
            for index, text in enumerate(_READERS.get(path.suffix, _read_text)(path)):
                if self._split(f"{name}\0{index}") == split:
                    yield text

    def _split(self, key: str) -> Split:
        return "validation" if draw(key) / 2**64 < self.val_fraction else "train"


def draw(key: str) -> int:
    """Of 64 bits, always the same for a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "big")


def python_source(val_fraction: float) -> FileSource:
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(library.rglob("*.py")) if NOT_LIBRARY.isdisjoint(p.relative_to(library).parts)]
    return _file_source("python", library, paths, val_fraction, name="python")


def _file_source(spec: str, root: Path, paths: list[Path], val_fraction: float, name: str = "") -> FileSource:
    if not any(path.stat().st_size for path in paths):
        raise UserError(f"no text found (looked for {', '.join(sorted(CORPUS_SUFFIXES))})", at=spec)
    files = tuple((path.relative_to(root).as_posix(), path) for path in paths)
    fingerprint = hashlib.blake2b(digest_size=16)
    for file_name, path in files:
        fingerprint.update(f"{file_name}\0{file_hash(path)}\0".encode(errors="replace"))
    return FileSource(
        spec=spec,
        name=name or safe_name(paths[0].stem if len(paths) == 1 else root.resolve().name),
        fingerprint=fingerprint.hexdigest(),
        val_fraction=val_fraction,
        seed=None,
        files=files,
        whole_files=bool(name),
    )


def _text_files(directory: Path) -> list[Path]:
    paths = (p for p in directory.rglob("*") if p.suffix in CORPUS_SUFFIXES and p.is_file())
    return sorted((p for p in paths if not hidden(p, directory)), key=lambda p: p.relative_to(directory).as_posix())


def hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


def file_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_HASH_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(MIB))
            file.seek(size - MIB)
            digest.update(file.read(MIB))
    return digest.hexdigest()


def _read_text(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        if b"\0" in file.read(8192):
            raise UserError("not a text file (it holds zero bytes)", at=str(path))
    # newline="": the text is taken as it is, line ends included.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        # On to the end of the line, unless that is as far again.
        while piece := file.read(PIECE_CHARACTERS):
            yield piece + file.readline(PIECE_CHARACTERS)


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"not a line of JSON ({error})", at=f"{path}:{number}") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError('no string under the key "text"', at=f"{path}:{number}")
            yield record["text"]


def _read_parquet(path: Path) -> Iterator[str | None]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError('parquet needs pyarrow; pip install "jaxup[data]"', at=str(path)) from None
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"not a parquet file ({first_line(error)})", at=str(path)) from None
    with file:
        names = file.schema_arrow.names
        _check_column(str(path), names, str(file.schema_arrow.field("text").type) if "text" in names else "")
        for batch in file.iter_batches(batch_size=256, columns=["text"]):
            yield from batch.column(0).to_pylist()


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


# The datasets library


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSource(Source):
    """For each split a `datasets.Dataset` with a column "text", and which of its rows, in order: int64 [n]."""

    splits: dict[Split, tuple[Any, np.ndarray]]

    def _documents(self, split: Split) -> Iterator[str | None]:
        dataset, rows = self.splits[split]
        for start in range(0, len(rows), 256):
            yield from dataset[rows[start : start + 256]]["text"]


def _dataset_source(spec: str, name: str, data: Any, val_fraction: float, seed: int) -> Source:
    """`data` is a datasets.Dataset or DatasetDict."""
    splits = dict(data) if isinstance(data, dict) else {"train": data}
    train = of_split_train(spec, data)
    held_out = [splits[name] for name in ("validation", "test") if name in splits][:1]
    for dataset in (train, *held_out):
        _check_column(spec, dataset.column_names, getattr(dataset.features.get("text"), "dtype", ""))
    # Of the whole, before any split of ours: val_fraction and seed are compared by themselves.
    fingerprint = "".join(dataset._fingerprint for dataset in (train, *held_out))
    parts: dict[Split, tuple[Any, np.ndarray]]
    if held_out:
        parts = {split: (dataset, np.arange(len(dataset))) for split, dataset in zip(SPLITS, (train, *held_out))}
    else:
        if len(train) < 2:
            raise UserError(f"no text found: {len(train)} documents cannot be split in two", at=spec)
        # The row numbers are split, not the dataset: that would write its indices into the user's directory.
        numbers = import_datasets(spec).Dataset.from_dict({"row": np.arange(len(train))}).with_format("numpy")
        drawn = numbers.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)
        parts = {"train": (train, drawn["train"]["row"][:]), "validation": (train, drawn["test"]["row"][:])}
    return DatasetSource(
        spec=spec,
        name=safe_name(name),
        fingerprint=fingerprint,
        val_fraction=None if held_out else val_fraction,
        seed=None if held_out else seed,
        splits=parts,
    )


def _load_from_disk(spec: str, path: Path) -> Any:
    datasets = import_datasets(spec)
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged directory makes pyarrow, json or datasets raise
        raise UserError(f"cannot load the dataset: {first_line(error)}", at=spec) from None


def _hub_source(spec: str, val_fraction: float, seed: int) -> Source:
    missing = f"no such file or directory: {spec}{_near_python(spec, 0.6)}"
    if not is_dataset_name(spec) or _near_python(spec, 0.8):
        raise UserError(missing)
    name, _, config = spec.partition(":")
    datasets = import_datasets(spec)
    try:
        data = datasets.load_dataset(name, config or None)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError):
        raise UserError(f"{missing}, and no such dataset on the Hugging Face hub") from None
    except Exception as error:  # network, quota, gated or damaged: the libraries raise all kinds
        if "scripts are no longer supported" in str(error) and not config:
            return _downloaded_source(spec, val_fraction)
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{missing}, and the hub's dataset cannot be loaded: {reason}") from None
    return _dataset_source(spec, spec, data, val_fraction, seed)


def _downloaded_source(spec: str, val_fraction: float) -> Source:
    """The data files of a hub dataset whose loading script `datasets` no longer runs, read by ourselves."""
    import huggingface_hub

    try:
        directory = Path(
            huggingface_hub.snapshot_download(spec, repo_type="dataset", allow_patterns=["*.jsonl", "*.parquet"])
        )
    except Exception as error:  # as above
        raise UserError(f"cannot be downloaded: {first_line(error)}", at=spec) from None
    return dataclasses.replace(
        _file_source(spec, directory, _text_files(directory), val_fraction), name=safe_name(spec)
    )


def is_dataset_name(spec: str) -> bool:
    """Whether `spec`, which is nothing on this machine, may be a dataset's on the Hub and not a mistyped path."""
    like_path = re.match(r"[./~\\]|\w+://", spec) or spec.endswith("/") or Path(spec).suffix in PATH_SUFFIXES
    return not like_path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec.partition(":")[0]) is not None


def import_datasets(spec: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError('a dataset needs datasets; pip install "jaxup[data]"', at=spec) from None
    return datasets


def of_split_train(spec: str, data: Any) -> Any:
    """`data` is a datasets.Dataset or DatasetDict."""
    if isinstance(data, dict) and "train" not in data:
        raise UserError(f'no split "train"; its splits: {", ".join(data)}', at=spec)
    return data["train"] if isinstance(data, dict) else data


# nanoGPT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSource(Source):
    """train.bin and val.bin as nanoGPT's prepare.py writes them: uint16, documents end with their EOS."""

    paths: dict[str, Path]

    def tokens(self, split: Split) -> np.memmap:
        return np.memmap(self.paths[split], dtype="<u2", mode="r")

    def _documents(self, split: Split) -> Iterator[str | None]:
        raise TypeError(f"the source {self.spec} holds tokens, not text")


def _token_source(spec: str, directory: Path) -> Source:
    paths = {"train": directory / "train.bin", "validation": directory / "val.bin"}
    for path in paths.values():
        size = path.stat().st_size
        if not size:
            raise UserError("no text found: the file is empty", at=str(path))
        if size % 2:
            raise UserError(f"not uint16 tokens: its size of {size} bytes is odd", at=str(path))
    return TokenSource(
        spec=spec,
        name=safe_name(directory.resolve().name),
        fingerprint=hashlib.blake2b("".join(map(file_hash, paths.values())).encode(), digest_size=16).hexdigest(),
        val_fraction=None,
        seed=None,
        is_tokens=True,
        paths=paths,
    )


def safe_name(text: str) -> str:
    """`text` cut down to letters, digits, dots and dashes: fit for a file name or an object's key."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:48] or "data"


def _near_python(spec: str, cutoff: float) -> str:
    return suggest(spec, ["python"]) if difflib.get_close_matches(spec, ["python"], cutoff=cutoff) else ""


def _check_column(at: str, columns: list[str], type_name: str) -> None:
    if type_name not in ("string", "large_string", "string_view"):
        raise UserError(f'no column "text" of strings; its columns: {", ".join(columns)}', at=at)


@contextlib.contextmanager
def os_errors(spec: str = "") -> Iterator[None]:
    """Those of the machine, as a user's mistake in the file at fault, or in `spec` where that is not known."""
    try:
        yield
    except OSError as error:
        where = error.filename or spec
        raise UserError(error.strerror or first_line(error), at=[str(where)] if where else ()) from None
