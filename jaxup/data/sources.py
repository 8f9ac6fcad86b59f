"""Where data come from: files, directories, datasets, the standard library, tokens made by nanoGPT.

| spec | is |
|---|---|
| a file | .jsonl, .json or .parquet; in a corpus also text, a piece a row; .gz or .zst of these |
| a directory | such files; or what `datasets.save_to_disk` wrote; in a corpus also nanoGPT's train.bin and val.bin |
| `NAME` or `NAME:CONFIG` | a dataset on the Hugging Face hub |
| `python` | in a corpus the standard library of the running interpreter, about 10 MB; `./python` is a directory |

Where a dataset or a directory has splits, "train" is read; `SPEC:SPLIT` names another. A directory's are told by the
card of a dataset (README.md), else by the names of its files, as `datasets.load_dataset` tells them. A corpus is split
in two by itself: by the splits that it has, else a dataset by `train_test_split`, as nanoGPT does, and files by a hash
of (file, row); of little text the end of each piece is held out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxup.data.layouts import COLUMNS, LAYOUTS, unfitting
from jaxup.data.readers import (
    COMPRESSED,
    MIB,
    PIECE_CHARACTERS,
    Row,
    kind_of,
    read_dataset,
    read_json,
    read_jsonl,
    read_parquet,
    read_text,
)  # fmt: skip
from jaxup.errors import UserError, first_line, nearest, suggest
from jaxup.files.names import check_hub_name, is_hub_name, nearest_path
from jaxup.files.storage import SECONDS, ask_hub
from jaxup.progress import say

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

ROWS = {".jsonl", ".json", ".parquet"}
PROSE = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".csv", ".toml", ".yaml", ".yml"}
CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh"}
CORPUS = PROSE | CODE | ROWS - {".json"}
# A name that ends so was meant as a path even when nothing is there; hub names never do.
_PATHS = CORPUS | ROWS | COMPRESSED | {".zip", ".bin"}
TEXT_IS_A_CORPUS = "text is a corpus, for experiments that inherit and for `jaxup prepare --packing concatenated`"
FEW_HELD_OUT = 8  # pieces of text: fewer are not left to a draw, which might take none
# Directories of the standard library that are tests, or not the library at all.
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3"}

TOKEN_SLICE = 2**20  # nanoGPT's tokens are read in rows of this many
WHOLE_HASH_BYTES = 16 * MIB  # the fingerprint of a longer file of a corpus has its size, when it was changed,
HASHED_BLOCKS, HASHED_BYTES = 64, 64 * 1024  # and so many blocks of so many bytes, from its first to its last

# What `datasets` takes for the name of a split in that of a file, between dots, dashes, blanks and digits.
_WORDS = dict.fromkeys(("train", "training"), "train")
_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_WORDS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
_HELD_OUT = ("validation", "test")


class Corpus(NamedTuple):
    """That what is read is text, one document a row, and how it is split in two where it is not already."""

    val_fraction: float
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One file, or one dataset."""

    path: str  # as messages name it
    name: str  # what its rows are chosen by: the same wherever the data lies
    size: int  # bytes of a file, rows of a dataset
    hash: Callable[[], str]  # of all of it
    rows: Callable[[], Iterator[Row]]
    layout: str = ""  # one of LAYOUTS once it is known, or "ids"
    side: Callable[[Row], Split | None] = lambda row: None  # the split of a row, if that is settled
    drawn: bool = False  # `side` depends on the fraction of a corpus,
    seeded: bool = False  # and on its seed
    ends: bool = False  # every second row is the end of a piece of text, to be held out


def find_files(spec: str, corpus: Corpus | None = None, *, side: Split | None = None) -> list[File]:
    """What `spec` names; UserError when that is nothing, or nothing that can be read.

    `side` says which of the two splits it is all for; of what has splits, one fit for that is read.
    """
    with os_errors(spec):
        path, split = _place(spec)
    choice = _Choice(spec, split, corpus, side)
    with os_errors(spec):
        if spec == "python" and corpus:
            files = [_file(path, name, corpus, whole=True) for name, path in library()]
            return [choice.drawn(file) for file in files]
        if spec == "python" and not path.exists():
            raise UserError("the standard library is no chats", at=spec, hint=TEXT_IS_A_CORPUS)
        if not spec or not path.exists():
            return _hub(spec, corpus, side)
        if path.is_file():
            return [choice.drawn(_file(path, path.name, corpus, ends=choice.ends([path])))]
        if not path.is_dir():  # opening a pipe would wait for ever
            raise UserError("neither a file nor a directory", at=spec)
        if corpus and (path / "train.bin").exists() and (path / "val.bin").exists():
            return [_tokens(path / "val.bin", "validation"), _tokens(path / "train.bin", "train")]
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return choice.datasets(path.resolve().name, load_dataset(spec, "load_from_disk", str(path)))
        return choice.files(path)


def _place(spec: str) -> tuple[Path, str]:
    """The path that `spec` is, or that it names a split of."""
    whole, (base, _, split) = Path(os.path.expanduser(spec)), spec.rpartition(":")
    part = Path(os.path.expanduser(base))  # expanduser of os leaves an unknown ~user as it is
    return (part, split) if base and not whole.exists() and part.exists() else (whole, "")


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which of several splits are read, and what for."""

    spec: str
    named: str
    corpus: Corpus | None
    side: Split | None

    def pick(self, splits: Mapping[str, Any]) -> dict[Split | None, str]:
        """side -> the name of a split: of a corpus two where it has them; None: what decides the side comes later."""
        there = [name for name in splits if name]
        if self.named and self.named not in there:
            what = f'no split "{self.named}"{suggest(self.named, there)}; its splits: {", ".join(there) or "none"}'
            raise UserError(what, at=self.spec)
        held = next((name for name in _HELD_OUT if name in there), None)
        train = self.named or next((name for name in ("train", "") if name in splits), None)
        if self.side == "validation":
            train = self.named or held or train or (there[0] if len(there) == 1 else None)
        if train is None:
            hint = f"name one, as in {self.spec}:{there[0]}"
            raise UserError(f'no split "train"; its splits: {", ".join(there)}', at=self.spec, hint=hint)
        if self.corpus and self.side is None and not self.named and held and "train" in there:
            return {"validation": held, "train": train}
        left_out = [name or "files of no split" for name in splits if name != train]
        if left_out and self.side is None:
            offer = f"; data.val_files={self.spec}:{held} evaluates on {held}" if held else ""
            say(f"{self.spec}: the split {train or 'of no name'} is read; not {', '.join(left_out)}{offer}")
        return {self.side: train}

    def ends(self, paths: Collection[Path]) -> float:
        """The share at the end of each piece of text that is held out where a draw among so few might take none; or 0.

        Rows of other files are not counted before they are read.
        """
        if self.side or not self.corpus or any(kind_of(path) in ROWS for path in paths):
            return 0.0
        pieces = sum(1 + path.stat().st_size // PIECE_CHARACTERS for path in paths)
        return self.corpus.val_fraction if pieces * self.corpus.val_fraction < FEW_HELD_OUT else 0.0

    def drawn(self, file: File) -> File:
        """The same with the rows' side, if a corpus has it drawn, or of each piece the end held out."""
        if self.side or not self.corpus:
            return dataclasses.replace(file, side=lambda row: self.side)
        if file.ends:
            return dataclasses.replace(file, side=lambda row: SPLITS[row.number % 2 == 0], drawn=True)
        below = self.corpus.val_fraction
        # Of a file that is one document the name alone decides, as it always has.
        key = (lambda row: file.name) if file.layout == "whole" else lambda row: f"{file.name}\0{row.number - 1}"

        def side(row: Row) -> Split:
            return "validation" if draw(key(row)) / 2**64 < below else "train"

        return dataclasses.replace(file, side=side, drawn=True)

    def files(self, directory: Path) -> list[File]:
        wanted = CORPUS if self.corpus else ROWS
        found = {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if kind_of(p) in wanted}
        # Beside data in other files, .json says something about it.
        json_too = all(kind_of(path) == ".json" for path in found.values())
        found = {
            name: path for name, path in found.items()
            if not hidden(name) and (json_too or kind_of(path) != ".json") and path.is_file() and path.stat().st_size
        }  # fmt: skip
        if not found:
            looked = ", ".join(sorted(wanted))
            what = "no text found" if self.corpus else "no chat data in this directory"
            text = not self.corpus and any(kind_of(path) in CORPUS for path in directory.rglob("*"))
            raise UserError(f"{what} (looked for {looked})", at=self.spec, hint=TEXT_IS_A_CORPUS if text else "")
        splits: dict[str, list[str]] = {}
        data = ROWS.issuperset(map(kind_of, found.values()))  # among other text such names say nothing
        told = self._told_by_card(directory, list(found))
        for name in sorted(found):
            splits.setdefault(told.get(name, "") if told else split_of(name) if data else "", []).append(name)
        chosen: dict[Split | None, str] = {self.side: ""}
        if self.corpus and not (self.named or self.side or told) and not ("train" in splits and len(splits) > 1):
            splits = {"": sorted(found)}  # what held-out files there are would be all that is read
        if self.named or list(splits) != [""]:
            chosen = self.pick(splits)
        files = []
        for side, split in chosen.items():
            choice = dataclasses.replace(self, side=side)
            ends = choice.ends([found[name] for name in splits[split]])
            files += [choice.drawn(_file(found[name], name, self.corpus, ends=ends)) for name in splits[split]]
        return files

    def _told_by_card(self, directory: Path, names: list[str]) -> dict[str, str]:
        """name -> split, of the files that the card of a dataset lists; nothing if it lists none."""
        card = directory / "README.md"
        if not card.is_file() or card.stat().st_size > MIB:
            return {}
        import yaml
        from huggingface_hub import metadata_load

        try:
            configs = [
                config for config in (metadata_load(card) or {}).get("configs") or () if config.get("data_files")
            ]
            default = [config for config in configs if config.get("default") or config.get("config_name") == "default"]
            found: dict[str, str] = {}
            for config in default[:1] or configs:
                files = config["data_files"]
                for entry in files if isinstance(files, list) else [files]:
                    split, paths = ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
                    for pattern in [paths] if isinstance(paths, str) else paths:
                        for name in filter(functools.partial(_matches, pattern), names):
                            found.setdefault(name, str(split))
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError):  # whatever else it is, no such list
            return {}
        if found and len(configs) > 1 and not default:
            say(f"{self.spec}: its configurations {', '.join(str(c.get('config_name')) for c in configs)} are all read")
        return found

    def datasets(self, name: str, data: Any) -> list[File]:
        """`data` is a datasets.Dataset or DatasetDict."""
        splits = dict(data) if isinstance(data, dict) else {"train": data}
        found = []
        for side, split in self.pick(splits).items():
            dataset = splits[split]
            if not len(dataset):
                raise UserError("no rows", at=self.spec)
            self._columns(dataset.column_names)
            file = File(
                path=self.spec, name=name, size=len(dataset), hash=functools.partial(getattr, dataset, "_fingerprint"),
                rows=functools.partial(read_dataset, self.spec, dataset, self._columns),
            )  # fmt: skip
            if side or not self.corpus:
                found.append(dataclasses.replace(self, side=side).drawn(file))
            else:
                held = _held_out_rows(self.spec, len(dataset), self.corpus)
                side_of = functools.partial(_side_of, held)
                found.append(dataclasses.replace(file, side=side_of, drawn=True, seeded=True))
        return found

    def _columns(self, names: list[str]) -> list[str]:
        return columns_of(self.spec, names)


def columns_of(path: str, names: list[str]) -> list[str]:
    if known := [name for name in names if name in COLUMNS]:
        return known
    raise UserError(f"its columns are of no layout{near_layout(dict.fromkeys(names))}", at=path)


def _side_of(held_out: np.ndarray, row: Row) -> Split:
    return "validation" if held_out[row.number - 1] else "train"


def _held_out_rows(spec: str, count: int, corpus: Corpus) -> np.ndarray:
    """bool [count]: those that `train_test_split` takes out."""
    if count < 2:
        raise UserError(f"no text found: {count} documents cannot be split in two", at=spec)
    # The row numbers are split, not the dataset: that would write its indices into the user's directory.
    numbers = import_datasets(spec).Dataset.from_dict({"row": np.arange(count)}).with_format("numpy")
    drawn = numbers.train_test_split(test_size=corpus.val_fraction, seed=corpus.seed, shuffle=True)
    held_out = np.zeros(count, bool)
    held_out[drawn["test"]["row"][:]] = True
    return held_out


def _file(path: Path, name: str, corpus: Corpus | None, *, whole: bool = False, ends: float = 0.0) -> File:
    kind, size = kind_of(path), path.stat().st_size
    if not corpus and kind not in ROWS:
        hint = TEXT_IS_A_CORPUS if kind in CORPUS else ""
        raise UserError(f"chat data is {', '.join(sorted(ROWS))}", at=str(path), hint=hint)
    if not size and not whole:
        raise UserError("no text found" if corpus else "no rows: the file is empty", at=str(path))
    reads: dict[str, Callable[[], Iterator[Row]]] = {
        ".jsonl": functools.partial(read_jsonl, path),
        ".json": functools.partial(read_json, path),
        ".parquet": functools.partial(read_parquet, path, functools.partial(columns_of, str(path))),
    }
    rows = reads.get(kind, functools.partial(read_text, path, whole=whole, ends=ends))
    hashed = functools.partial(file_hash, path, whole=not corpus)
    return File(
        path=str(path), name=name, size=max(1, size), hash=hashed, rows=rows, layout="whole" if whole else "",
        ends=bool(ends),
    )  # fmt: skip


def _tokens(path: Path, side: Split) -> File:
    """nanoGPT's flat uint16, in which documents end with their EOS."""
    size = path.stat().st_size
    if not size or size % 2:
        what = f"not uint16 tokens: its size of {size} bytes is odd" if size else "no text found: the file is empty"
        raise UserError(what, at=str(path))

    def rows() -> Iterator[Row]:
        tokens = np.memmap(path, dtype="<u2", mode="r")
        for number, at in enumerate(range(0, len(tokens), TOKEN_SLICE), 1):
            yield Row(number, str(path), np.asarray(tokens[at : at + TOKEN_SLICE]), "", at / len(tokens))

    hashed = functools.partial(file_hash, path)
    return File(path=str(path), name=path.name, size=size, hash=hashed, rows=rows, layout="ids", side=lambda row: side)


def _matches(pattern: str, name: str) -> bool:
    """As a glob: no `*` but `**` goes across directories."""
    pattern = pattern.removeprefix("./")
    deep = "**" in pattern or name.count("/") == pattern.count("/")
    return deep and (fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern.replace("**/", "")))


def split_of(name: str) -> str:
    """Of which split a file is, as its path within a directory tells; "" if it does not."""
    *directories, stem = Path(name).with_suffix("").parts
    if shard := re.fullmatch(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*", stem):
        return _WORDS.get(shard[1], shard[1])
    for part in (stem, *reversed(directories)):
        if found := [_WORDS[word] for word in re.split(r"[-._ 0-9]+", part.lower()) if word in _WORDS]:
            return found[0]
    return ""


def library() -> list[tuple[str, Path]]:
    """The standard library's files: path within it, and where that lies."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(path.relative_to(root), path) for path in sorted(root.rglob("*.py"))]
    return [(name.as_posix(), path) for name, path in files if NOT_LIBRARY.isdisjoint(name.parts)]


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def draw(key: str) -> int:
    """64 bits, always the same for a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "big")


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


def near_layout(row: Any) -> str:
    if told := unfitting(row):
        return f": {told}"
    if not isinstance(row, dict):
        return f"; known: {', '.join(LAYOUTS)}"
    for key in row:
        if key not in COLUMNS and (told := nearest(key[:40], COLUMNS)):
            return f": no layout has {key[:40]!r}{told}"
    keys = ", ".join(repr(key[:40]) for key in list(row)[:12])
    return f"; its keys: {keys or 'none'}; known: {', '.join(LAYOUTS)}"


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


def _hub(spec: str, corpus: Corpus | None, side: Split | None) -> list[File]:
    missing = f"no such file or directory: {spec if corpus else spec or repr(spec)}{_near_python(spec, 0.6, corpus)}"
    python = _near_python(spec, 0.8, corpus)
    if python:
        raise UserError(missing)
    try:
        data, split = from_hub(spec, missing)
    except _Script:
        if not corpus or ":" in spec:
            raise
        return _downloaded(spec, corpus, side)
    return _Choice(spec.removesuffix(f":{split}"), split, corpus, side).datasets(spec, data)


class _Script(UserError):
    """A dataset is what a script makes, which no longer runs."""


def from_hub(spec: str, missing: str) -> tuple[Any, str]:
    """The datasets.Dataset or DatasetDict that `NAME[:CONFIG][:SPLIT]` is on the Hugging Face hub, and SPLIT or "".

    UserError, beginning with `missing`, if there is none or it cannot be loaded.
    """
    name, *more = spec.split(":")
    if "://" in spec or not is_hub_name(name, _PATHS):
        raise UserError(missing, hint=nearest_path(spec))
    datasets = import_datasets(spec)
    _reach_dataset(name, datasets, sure=bool(more))
    config, split = (*more, "", "")[:2]
    try:
        try:
            return datasets.load_dataset(name, config or None), split
        except ValueError as error:  # there is no such configuration: perhaps it is a split
            if not config or split or "BuilderConfig" not in str(error):
                raise
            return datasets.load_dataset(name, None), config
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError):
        raise UserError(f"{missing}, and no such dataset on the Hugging Face hub") from None
    except Exception as error:  # network, quota, gated or damaged: the libraries raise all kinds
        kind = _Script if "scripts are no longer supported" in str(error) else UserError
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise kind(f"{missing}, and the hub's dataset cannot be loaded: {reason}") from None


def _downloaded(spec: str, corpus: Corpus, side: Split | None) -> list[File]:
    """The data files of a hub dataset whose loading script `datasets` no longer runs, read by ourselves."""
    import huggingface_hub

    try:
        wanted = ["*.jsonl", "*.parquet"]
        directory = huggingface_hub.snapshot_download(spec, repo_type="dataset", allow_patterns=wanted)
    except Exception as error:  # as above
        raise UserError(f"cannot be downloaded: {first_line(error)}", at=spec) from None
    return _Choice(spec, "", corpus, side).files(Path(directory))


def _reach_dataset(name: str, datasets: Any, *, sure: bool) -> None:
    """UserError for a dataset of the Hub that is rather a mistyped path, or if the Hub does not answer."""
    if (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        return
    check_hub_name(name, "dataset", sure=sure)
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


def safe_name(text: str) -> str:
    """`text` cut down to letters, digits, dots and dashes: fit for a file name or an object's key."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:48] or "data"


def _near_python(spec: str, cutoff: float, corpus: Corpus | None) -> str:
    near = corpus and difflib.get_close_matches(spec, ["python"], cutoff=cutoff)
    return suggest(spec, ["python"]) if near else ""


@contextlib.contextmanager
def os_errors(spec: str = "") -> Iterator[None]:
    """Those of the machine, as a user's mistake in the file at fault, or in `spec` where that is not known."""
    try:
        yield
    except OSError as error:
        where = error.filename or spec
        raise UserError(error.strerror or first_line(error), at=[str(where)] if where else ()) from None
