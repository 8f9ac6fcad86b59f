"""A store of token rows: a directory, local or gs://, that a training run reads at random.

STORE/meta.json       what the tokens were made from, and digests of all files; written last, so it marks a
                      complete store
STORE/progress.json   the same and how far an unfinished store has come; gone when it is complete
STORE/tokenizer/      the tokenizer, as `save_pretrained` writes it
STORE/train/, STORE/validation/   zarr3 arrays; see `rows.py`
STORE/scratch/, STORE/rest-N      what an unfinished store holds that is not in rows yet
STORE/lock            held by the process that prepares the store
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts

from jaxup.data import integrity
from jaxup.data.sources import SPLITS
from jaxup.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_hash
from jaxup.errors import UserError, storage_error
from jaxup.files.bucket import place
from jaxup.files.lock import hold
from jaxup.files.storage import SECONDS
from jaxup.progress import Waiting, say
from jaxup.text import parse_json, remote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3
META, PROGRESS, TOKENIZER, LOCK = "meta.json", "progress.json", "tokenizer/", "lock"
# A shard is one file, written at once: about this many tokens, and no more than so many rows.
SHARD_TOKENS = 4 * 2**20
SHARD_ROWS = 4096
CACHE_BYTES = 64 * 2**20  # shard indices, mostly: a row is then one read of a byte range
CHUNK = 8 * 2**20  # bytes of a file that are hashed at once
_LARGEST_JSON = 64 * 2**20  # bytes; the digests of 400,000 shards

_ANOTHER = "choose another data.store or delete it"

# One context for all, so that the cache is shared.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


class Store:
    """The files of one store. Every failure of the storage is a UserError naming it."""

    def __init__(self, path: str):
        self.local = "://" not in path
        self.path = os.path.abspath(os.path.expanduser(path)) if self.local else path.rstrip("/")
        with self.errors():
            self._files = ts.KvStore.open(self._location(""), context=_CONTEXT).result()

    def read_json(self, key: str) -> dict[str, Any] | None:
        """What `write_json` wrote; UserError for anything else, whatever is wrong with it."""
        if self.local and os.path.exists(path := f"{self.path}/{key}") and not _is_file(path, _LARGEST_JSON):
            raise UserError(f"{path} is not a regular file, or too large", at="store", hint=_ANOTHER)
        with self.errors():
            result = self._files.read(key).result(SECONDS)
        if result.state == "missing":
            return None
        try:
            value = parse_json(result.value, key)
        except UserError:
            value = {}
        if value.get("format") != FORMAT:
            what = f"{self.path}/{key} is not what this version of jaxup writes (format {FORMAT})"
            raise UserError(what, at="store", hint=_ANOTHER)
        if value.pop("digest", None) != _digest_of(value):
            raise UserError(f"{self.path}/{key} is damaged: its digest is another", at="store", hint=_ANOTHER)
        if key == META and (fault := integrity.check_meta(value)):
            raise UserError(f"{self.path}/{key} is damaged: {fault}", at="store", hint=_ANOTHER)
        return value

    def write_json(self, key: str, value: dict[str, Any]) -> None:
        value = {"format": FORMAT, **value}
        self.write(key, json.dumps({**value, "digest": _digest_of(value)}, indent=1).encode())

    def files(self) -> dict[str, int | None]:
        """The files that hold tokens and the tokenizer, and their sizes, where the storage tells them for nothing."""
        with self.errors():
            listed = [self._files.list(_below(part)) for part in (TOKENIZER, *(f"{split}/" for split in SPLITS))]
            names = sorted(key.decode(errors="replace") for keys in listed for key in keys.result())
            return {name: os.path.getsize(f"{self.path}/{name}") if self.local else None for name in names}

    def read(self, key: str) -> bytes:
        """All of a file; nothing if it is not there."""
        with self.errors():
            return self._files.read(key).result().value

    def write(self, key: str, content: bytes) -> None:
        with self.errors():
            self._files.write(key, content).result()

    def digest(self, key: str, stop: int) -> str:
        """SHA-256 of the first `stop` bytes of a file; UserError if it has not so many."""
        if self.local and not _is_file(f"{self.path}/{key}"):  # opening a pipe would wait for ever
            raise UserError("it is not a regular file")
        digest = hashlib.sha256()
        with self.errors():
            for start in range(0, stop, CHUNK):
                part = slice(start, min(stop, start + CHUNK))
                digest.update(self._files.read(key, byte_range=part).result().value)
        return digest.hexdigest()

    def complete_meta(self) -> dict[str, Any] | None:
        """What META says of the store; None if it is not complete, UserError unless its files are those it tells."""
        meta = self.read_json(META)
        if meta is not None:
            integrity.check(self, meta)
        return meta

    def finish(self, meta: dict[str, Any]) -> None:
        """Writes META, with the digests of what is there."""
        self.write_json(META, {**meta, "files": integrity.describe(self)})

    def delete(self, key: str) -> None:
        with self.errors():
            self._files.write(key, None).result()

    def save_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with tempfile.TemporaryDirectory() as directory:
            save_tokenizer(tokenizer, directory, "store", directory)
            with self.errors():
                for path in sorted(Path(directory).iterdir()):
                    if path.is_file():
                        self._files.write(TOKENIZER + path.name, path.read_bytes()).result()
        self.load_tokenizer(tokenizer_hash(tokenizer))  # the copy must tokenise as the original does

    def load_tokenizer(self, expected_hash: str) -> PreTrainedTokenizerBase:
        """The store's own copy. UserError when it is not the tokenizer that wrote the tokens."""
        with tempfile.TemporaryDirectory() as directory:
            for key in self.files():
                name = key.removeprefix(TOKENIZER)
                if "/" not in name:
                    Path(directory, name).write_bytes(self.read(key))
            tokenizer = load_tokenizer(directory, name=f"{self.path}/tokenizer")
        if tokenizer_hash(tokenizer) != expected_hash:
            what = f"{self.path}/tokenizer is not the tokenizer that wrote the tokens"
            raise UserError(what, at="store", hint="delete it")
        return tokenizer

    def create_array(self, name: str, *, width: int, dtype: str) -> ts.TensorStore:
        """[0, width], or the array that is there."""
        with self.errors():
            if self._files.read(f"{name}/zarr.json").result().state != "missing":
                return ts.open(self._array(name), context=_CONTEXT, open=True).result()
            little, crc = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
            sharding = {"chunk_shape": [1, width], "codecs": [little, crc], "index_codecs": [little, crc]}
            shard_rows = max(1, min(SHARD_ROWS, SHARD_TOKENS // width))
            metadata = {
                "shape": [0, width],
                "data_type": dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, width]}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            }
            return ts.open({**self._array(name), "metadata": metadata}, context=_CONTEXT, create=True).result()

    def open_array(self, name: str, meta: dict[str, Any], *, rows: int, width: int, dtype: str) -> ts.TensorStore:
        """UserError unless the array is such a one, and its shards can hold so much."""
        with self.errors():
            array = ts.open(self._array(name), context=_CONTEXT, open=True, read=True).result()
        held = sum(size for file, (size, *_) in meta["files"].items() if file.startswith(f"{name}/c/"))
        fault = ""
        if array.shape != (rows, width):
            fault = f"it has {' x '.join(map(str, array.shape))} tokens, not {rows} x {width}"
        elif array.dtype.name != dtype or array.chunk_layout.read_chunk.shape != (1, width):
            fault = f"its rows are not one by one, or not {dtype}"
        elif not rows or rows * width * array.dtype.numpy_dtype.itemsize > held:  # rows are not compressed
            fault = f"{rows} rows are not in {held} bytes"
        if fault:
            raise UserError(f"{self.path}/{name} is damaged: {fault}", at="store", hint="delete the store")
        return array

    def complete(self, wanted: dict[str, Any], make: Callable[[], None]) -> dict[str, Any]:
        """What META says of the store, which `make` fills first if it is not complete; UserError if it is another."""
        while (meta := self.complete_meta()) is None:
            with self.lock():
                # Another process may have finished it between our look and our lock.
                if self.read_json(META) is None:
                    make()
        check_same(self, meta, wanted)
        return meta

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Waits while another process prepares the same store, and keeps others from it. No lock on s3:// and others.

        UserError, and nothing is written, if what is there is neither a store nor one begun.
        """
        if self.read_json(META) is None and self.read_json(PROGRESS) is None and not self.is_empty():
            what = f"{self.path} is not empty and not a token store"
            raise UserError(what, at="store", hint="choose another data.store")
        path = place(self.path)
        if not self.local and not remote(path):
            yield
            return
        waiting = Waiting(first=0.0)

        def wait(holder: str) -> None:
            waiting.on(f"{holder}, which prepares {self.path}")
            time.sleep(0.2)

        with contextlib.ExitStack() as stack:
            while True:
                with self.errors(), contextlib.suppress(FileNotFoundError):  # the other gave up, and removed it
                    path.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(hold(path / LOCK, wait))
                    break
            yield

    def is_empty(self) -> bool:
        """No file there but the lock."""
        if self.local:  # not by listing: this may be somebody's home directory
            files = (name for _, _, names in os.walk(self.path) for name in names)
            return all(name.partition(".")[0] == LOCK for name in files)
        with self.errors():
            return not {key.decode() for key in self._files.list().result()} - {LOCK}

    def discard(self) -> None:
        """Deletes what an unfinished store consists of."""
        with self.errors():
            for directory in (TOKENIZER, "train/", "validation/"):
                self._files.delete_range(_below(directory)).result()
            self._files.delete_range(ts.KvStore.KeyRange("rest-", "rest.")).result()
        self.delete(PROGRESS)
        if self.local:
            for directory in (TOKENIZER, "train/", "validation/"):
                shutil.rmtree(f"{self.path}/{directory}", ignore_errors=True)  # empty ones
            with contextlib.suppress(OSError):  # there is something else in it
                os.remove(os.path.join(self.path, LOCK))
                os.rmdir(self.path)

    def _location(self, key: str) -> str | dict[str, str]:
        return {"driver": "file", "path": f"{self.path}/{key}"} if self.local else f"{self.path}/{key}"

    def _array(self, name: str) -> dict[str, Any]:
        # "open": what is cached is checked once, at opening; a complete store does not change.
        # What is missing is an error and no zeros; so zeros are written like all else.
        return {
            "driver": "zarr3", "kvstore": self._location(f"{name}/"), "recheck_cached_data": "open",
            "fill_missing_data_reads": False, "store_data_equal_to_fill_value": True,
        }  # fmt: skip

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """TensorStore raises ValueError for nearly everything: permissions, networks, missing buckets."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise storage_error(error, "store", self.path) from None


def gather(arrays: Sequence[ts.TensorStore], indices: np.ndarray, name: str) -> list[np.ndarray]:
    """Rows `indices`, int [n], of arrays [rows, width], all read at once; `name` stands in errors."""
    indices, count = np.asarray(indices, np.int64), arrays[0].shape[0]
    if not indices.size:
        return [np.zeros((0, array.shape[1]), array.dtype.numpy_dtype) for array in arrays]
    if indices.min() < 0 or indices.max() >= count:
        raise IndexError(f"rows {indices.min()}..{indices.max()} of {name}, which has {count}")
    try:
        return [future.result() for future in [array[indices].read() for array in arrays]]
    except ValueError as error:  # a checksum that does not match, a file or a network gone
        raise storage_error(error, "store", name) from None


def in_vocabulary(tokens: np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    """Tokens as int32; UserError if one of them is none of the vocabulary's."""
    if tokens.size and (most := tokens.max()) >= vocab_size:
        what = f"it is damaged: token {most} is not below the vocabulary's {vocab_size}"
        raise UserError(what, at=("store", name), hint="delete the store")
    return tokens.astype(np.int32)


def shard_rows(array: ts.TensorStore) -> int:
    """The rows of one shard, which is written at once."""
    return array.chunk_layout.to_json()["write_chunk"]["shape"][0]


def _below(directory: str) -> ts.KvStore.KeyRange:
    """The keys that begin with `directory`, which ends with a slash ("0" is the character after it)."""
    return ts.KvStore.KeyRange(directory, directory[:-1] + "0")


def _is_file(path: str, largest: int | None = None) -> bool:
    found = os.stat(path)
    return stat.S_ISREG(found.st_mode) and (largest is None or found.st_size <= largest)


def _digest_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_same(store: Store, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError, naming the store and all that differs ('seq_len=8, not 16'), unless it is the one wanted."""
    found: list[tuple[str, Any, Any]] = []
    if made["source"]["fingerprint"] != wanted["source"]["fingerprint"]:
        old, new = (f"{m['source']['spec']} ({m['source']['fingerprint'][:8]})" for m in (made, wanted))
        found.append(("source", old, new))
    # A vocabulary to be trained has no hash yet; what it is trained on is compared with the source.
    by = "hash" if wanted["tokenizer"]["hash"] else "spec"
    if made["tokenizer"][by] != wanted["tokenizer"][by]:
        found.append(("tokenizer", _short_tokenizer(made["tokenizer"]), _short_tokenizer(wanted["tokenizer"])))
    others = (key for key in wanted if key not in ("source", "tokenizer") and made.get(key) != wanted[key])
    found += [(key, made.get(key), wanted[key]) for key in others]
    if found:
        told = "; ".join(f"{name}={old}, not {new}" for name, old, new in found)
        raise UserError(f"{store.path} was made with {told}", at="store", hint=_ANOTHER)


def _short_tokenizer(tokenizer: dict[str, Any]) -> str:
    return tokenizer["spec"] + (f" ({tokenizer['hash'][:8]})" if tokenizer["hash"] else "")


def open_unchecked(
    path: str, error: UserError, specs: dict[str, str], wanted: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[Store, dict[str, Any]]:
    """A complete store named in the config serves a machine that has not got what it was made from.

    Raises `error`, which says what is not there, unless that is a store of the same `specs`; and as `check_same`
    does for what is `wanted` of it, given what it says of itself.
    """
    if not path:
        raise error
    store = Store(path)
    meta = store.complete_meta()
    if meta is None or any(meta[of]["spec"] != specs[of] for of in specs):
        raise error
    check_same(store, meta, wanted(meta))
    say(f"using {store.path} unchecked: {error.within('data.')}")
    return store, meta


def default_path(root: str, *names: str, decides: Sequence[Any]) -> str:
    """Of the store that is named after what it holds: all that `decides` it, any value of JSON."""
    digest = hashlib.blake2b(json.dumps([FORMAT, *decides]).encode(), digest_size=4).hexdigest()
    return f"{root.rstrip('/')}/{'-'.join(names)}-{digest}"
