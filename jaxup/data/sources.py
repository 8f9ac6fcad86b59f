"""Where the text comes from: the standard library, files, datasets, or tokens made by nanoGPT.

A source is named by one string:

| `data.source` | is | split into train and validation by |
|---|---|---|
| `python` | the standard library of the running interpreter, about 10 MB | a hash of each file's path |
| a file or a directory | text, .jsonl (key "text"), .parquet (column "text") | a hash of (file, document) |
| a directory of `save_to_disk` | a `datasets` Dataset or DatasetDict | its own splits, else `train_test_split` |
| a directory with train.bin and val.bin | nanoGPT's flat uint16 tokens | the two files |
| `NAME` or `NAME:CONFIG` | a dataset on the Hugging Face hub | its own splits, else `train_test_split` |

Documents come in a fixed order and are never all in memory. `./python` is a directory of that name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxup.errors import UserError, first_line, suggest, within
from jaxup.files.storage import SECONDS, ask_hub, check_hub_id

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

PROSE_SUFFIXES = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".csv", ".toml", ".yaml", ".yml"}
CODE_SUFFIXES = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh"}
CORPUS_SUFFIXES = PROSE_SUFFIXES | CODE_SUFFIXES | {".jsonl", ".parquet"}
# A name that ends so was meant as a path even when nothing is there; hub names never do.
PATH_SUFFIXES = CORPUS_SUFFIXES | {".json", ".gz", ".zst", ".zip", ".bin"}
# Directories of the standard library that are tests, or not the library at all.
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3"}

MIB = 2**20
PIECE_CHARACTERS = 64 * 1024  # a longer plain-text file becomes several documents
WHOLE_HASH_BYTES = 16 * MIB  # the fingerprint of a longer file has its size, when it was changed,
HASHED_BLOCKS, HASHED_BYTES = 64, 64 * 1024  # and so many blocks of so many bytes, from its first to its last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Documents (or, when `is_tokens`, tokens) in two splits; made by `open_source`."""

    spec: str  # as the user wrote it; error messages name it
    name: str  # short, fit for a file name
    fingerprint: str  # hex; other content has another one
    val_fraction: float | None = None  # None: the source brings its own splits, the setting decides nothing
    seed: int | None = None  # None: the split does not depend on it
    read: Callable[[Split], Iterable[str | None]] = lambda split: ()  # the documents; what is empty is passed over
    bins: dict[Split, Path] = dataclasses.field(default_factory=dict)  # or nanoGPT's tokens, uint16

    def documents(self, split: Split) -> Iterator[str]:
        """The non-empty documents of `split`, lazily, in an order that never changes.

        UserError for a file that cannot be read or parsed, and, at the end, when the split was empty.
        """
        found = False
        with within("source"), os_errors(self.spec):
            for text in self.read(split):
                if text:
                    found = True
                    yield text
            if not found:
                hint = "" if self.val_fraction is None else f" with data.val_fraction={self.val_fraction}"
                raise UserError(f"no text found in its {split} split{hint}", at=self.spec)

    @property
    def is_tokens(self) -> bool:
        return bool(self.bins)

    def tokens(self, split: Split) -> np.memmap:
        """uint16 [tokens], in which documents end with their EOS."""
        return np.memmap(self.bins[split], dtype="<u2", mode="r")


def open_source(spec: str, *, val_fraction: float, seed: int) -> Source:
    """The source that `spec` names; UserError when there is none, it holds no text or a package is missing."""
    if not 0 < val_fraction < 1:
        raise UserError("must lie between 0 and 1", at=f"val_fraction={val_fraction}")
    path = Path(spec).expanduser()
    with within("source"), os_errors(spec):
        if spec == "python":
            return _file_source(spec, spec, library(), val_fraction, whole=True)
        if not spec or not path.exists():
            return _hub_source(spec, val_fraction, seed)
        if not path.is_dir() and not path.is_file():  # opening a pipe would wait for ever
            raise UserError("neither a file nor a directory", at=spec)
        if path.is_file():
            return _file_source(spec, path.stem, [(path.name, path)], val_fraction)
        if (path / "train.bin").exists() and (path / "val.bin").exists():
            return _token_source(spec, path)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            data = load_dataset(spec, "load_from_disk", str(path))
            return _dataset_source(spec, path.resolve().name, data, val_fraction, seed)
        files = _text_files(path)
        return _file_source(spec, files[0][1].stem if len(files) == 1 else path.resolve().name, files, val_fraction)


Files = list[tuple[str, Path]]  # paths within a directory, by which the splits are drawn, and where they lie


def library() -> Files:
    """The standard library's."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(path.relative_to(root), path) for path in sorted(root.rglob("*.py"))]
    return [(name.as_posix(), path) for name, path in files if NOT_LIBRARY.isdisjoint(name.parts)]


def _text_files(directory: Path) -> Files:
    paths = (p for p in directory.rglob("*") if p.suffix in CORPUS_SUFFIXES and p.is_file())
    return sorted((p.relative_to(directory).as_posix(), p) for p in paths if not hidden(p, directory))


def _file_source(spec: str, name: str, files: Files, val_fraction: float, *, whole: bool = False) -> Source:
    if not any(path.stat().st_size for _, path in files):
        raise UserError(f"no text found (looked for {', '.join(sorted(CORPUS_SUFFIXES))})", at=spec)
    read = functools.partial(_documents, files, whole, val_fraction)
    return Source(spec=spec, name=safe_name(name), fingerprint=files_hash(files), val_fraction=val_fraction, read=read)


def _documents(files: Files, whole: bool, val_fraction: float, split: Split) -> Iterator[str | None]:
    """Of `whole` files each is one document, and as such in one split."""
    for name, path in files:
        read = _READERS.get(path.suffix, _read_text)
        texts = [path.read_text(encoding="utf-8-sig", errors="replace")] if whole else read(path)
        for index, text in enumerate(texts):
            if (draw(name if whole else f"{name}\0{index}") / 2**64 < val_fraction) == (split == "validation"):
                yield text


def draw(key: str) -> int:
    """64 bits, always the same for a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "big")


def files_hash(files: Files) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, path in files:
        digest.update(f"{name}\0{file_hash(path)}\0".encode(errors="replace"))
    return digest.hexdigest()


def hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


def file_hash(path: Path, *, whole: bool = False) -> str:
    """Another one for other content: of a long file, unless `whole`, by what a few reads and the file system tell."""
    status = path.stat()
    size, last = status.st_size, max(0, status.st_size - HASHED_BYTES)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if whole or size <= WHOLE_HASH_BYTES:
            while content := file.read(MIB):
                digest.update(content)
        else:
            digest.update(str(status.st_mtime_ns).encode())
            for block in range(HASHED_BLOCKS):
                file.seek(block * last // (HASHED_BLOCKS - 1))
                digest.update(file.read(HASHED_BYTES))
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
            except (ValueError, RecursionError) as error:
                raise UserError(f"not a line of JSON ({error})", at=f"{path}:{number}") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError('no string under the key "text"', at=f"{path}:{number}")
            yield record["text"]


def _read_parquet(path: Path) -> Iterator[str | None]:
    def text(schema: Any) -> list[str]:
        _check_column(str(path), schema.names, str(schema.field("text").type) if "text" in schema.names else "")
        return ["text"]

    for batch, _ in parquet_batches(path, 256, text):
        yield from batch.column(0).to_pylist()


def parquet_batches(path: Path, size: int, choose: Callable[[Any], list[str]]) -> Iterator[tuple[Any, int]]:
    """Record batches of `size` rows, of the columns that `choose` takes of a schema; and how many rows the file has."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError('parquet needs pyarrow; pip install "jaxup[data]"', at=str(path)) from None
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=size, columns=choose(file.schema_arrow)):
                yield batch, file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"not a sound parquet file ({first_line(error)})", at=str(path)) from None


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


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

    def read(split: Split) -> Iterator[str | None]:
        dataset, rows = parts[split]
        for start in range(0, len(rows), 256):
            yield from dataset[rows[start : start + 256]]["text"]

    drawn_by: dict[str, Any] = {} if held_out else {"val_fraction": val_fraction, "seed": seed}
    return Source(spec=spec, name=safe_name(name), fingerprint=fingerprint, read=read, **drawn_by)


def load_dataset(spec: str, how: str, *args: Any, **options: Any) -> Any:
    """What the function `how` of datasets gives."""
    datasets = import_datasets(spec)
    if how == "load_from_disk":
        for path in Path(*args).rglob("*"):
            if not path.is_dir() and not path.is_file():  # opening a pipe would wait for ever
                raise UserError(f"{path} is not a regular file", at=spec)
    try:
        return getattr(datasets, how)(*args, **options)
    except Exception as error:  # whatever a damaged directory, a network or the hub makes the libraries raise
        raise UserError(f"cannot load the dataset: {type(error).__name__}: {first_line(error)}", at=spec) from None


def _hub_source(spec: str, val_fraction: float, seed: int) -> Source:
    missing = f"no such file or directory: {spec}{_near_python(spec, 0.6)}"
    if not is_dataset_name(spec) or _near_python(spec, 0.8):
        raise UserError(missing)
    name, _, config = spec.partition(":")
    datasets = import_datasets(spec)
    reach_dataset(name, datasets)
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

    wanted = ["*.jsonl", "*.parquet"]
    try:
        directory = huggingface_hub.snapshot_download(spec, repo_type="dataset", allow_patterns=wanted)
    except Exception as error:  # as above
        raise UserError(f"cannot be downloaded: {first_line(error)}", at=spec) from None
    return _file_source(spec, spec, _text_files(Path(directory)), val_fraction)


def is_dataset_name(spec: str) -> bool:
    """Whether `spec`, which is nothing on this machine, may be a dataset's on the Hub and not a mistyped path."""
    like_path = re.match(r"[./~\\]|\w+://", spec) or spec.endswith("/") or Path(spec).suffix in PATH_SUFFIXES
    return not like_path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec.partition(":")[0]) is not None


def reach_dataset(name: str, datasets: Any) -> None:
    """UserError for a dataset of the Hub that is rather a mistyped path, or if the Hub does not answer."""
    if (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        return
    check_hub_id(name, "dataset")
    import huggingface_hub

    try:
        ask_hub(functools.partial(huggingface_hub.dataset_info, name))
    except TimeoutError:
        raise UserError(f"no such file or directory, and the Hub does not answer within {SECONDS} s", at=name) from None
    except Exception:  # it answers: what it says of the dataset is said where it is loaded
        pass


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


def _token_source(spec: str, directory: Path) -> Source:
    bins: dict[Split, Path] = {"train": directory / "train.bin", "validation": directory / "val.bin"}
    for path in bins.values():
        size = path.stat().st_size
        if not size:
            raise UserError("no text found: the file is empty", at=str(path))
        if size % 2:
            raise UserError(f"not uint16 tokens: its size of {size} bytes is odd", at=str(path))
    fingerprint = hashlib.blake2b("".join(map(file_hash, bins.values())).encode(), digest_size=16).hexdigest()
    return Source(spec=spec, name=safe_name(directory.resolve().name), fingerprint=fingerprint, bins=bins)


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
