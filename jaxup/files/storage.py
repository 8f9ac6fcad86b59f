"""Where a model directory lies: a local path, a Hugging Face Hub id, or gs://, s3://, https://.

A model directory is untrusted input: names of files come from its index.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from jaxup.errors import UserError, first_line, suggest
from jaxup.files.names import SCHEMES, check_hub_name, in_run, split_revision

# A server that is down or slow: after so many tries and seconds it is an error. What is read afterwards has as many
# seconds, and one more for each MiB.
SECONDS = 20
RETRIES = {
    f"{kind}_request_retries": {"max_retries": 2, "initial_delay": "200ms", "max_delay": "1s"}
    for kind in ("http", "gcs", "s3")
}
_SMALL = 4 * 2**20  # bytes; a config, or the index of 30,000 tensors
TEMPLATES = "additional_chat_templates"  # a directory in a model's, as transformers names it
LARGEST_TEXT = 100 * 2**20  # bytes; a tokenizer.json
# Whatever class of tokenizer the directory names.
_TEXTS = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|tekken|(tokenizer|vocab|chat_template|\w*processor).*)"
    r"\.json|(vocab|merges).*\.txt|.*\.(jinja|model|tiktoken)"
)


T = TypeVar("T")


@runtime_checkable
class Storage(Protocol):
    """All that reading a model needs of where it lies."""

    name: str  # as the user knows it, for messages
    place: str  # what `open_storage` opens again as it is now: a Hub id at its commit

    def version(self, file: str) -> str:
        """Something else once the file is written again; "" where nothing says that. UserError if it is gone."""

    def exists(self, file: str) -> bool: ...

    def reaches(self, file: str, size: int) -> bool:
        """Whether the file has at least `size` bytes."""

    def read(self, file: str, start: int, stop: int) -> np.ndarray:
        """uint8 [stop - start]; UserError if that cannot be read."""

    def whole(self, file: str, limit: int = _SMALL) -> bytes:
        """All of a small file; UserError if it is larger than `limit`."""

    def files(self) -> list[str]:
        """What lies in it and in its TEMPLATES, as far as there is a listing."""


def open_storage(path_or_id: str | os.PathLike, *, revision: str | None = None) -> Storage:
    """The storage of what `path_or_id` names, see `jaxup.files.names`; UserError if it can be nothing.

    A revision in a hub id, "org/name@revision", goes before `revision`.
    """
    text = os.fspath(path_or_id)
    scheme, separator, _ = text.partition("://")
    if separator:
        if scheme not in SCHEMES:
            raise UserError(f"cannot read {scheme}://{suggest(scheme, SCHEMES)}", at=text)
        if revision is not None:
            raise UserError("a revision goes with a hub id, not with a URL", at=text)
        return _Remote(text)
    path = in_run(text) or Path(os.path.expanduser(text))
    if os.path.isdir(path):
        if revision is not None:
            raise UserError("a revision goes with a hub id, and this is a directory", at=text)
        return Local(path)
    if os.path.lexists(path):
        raise UserError("not a directory", at=str(path))
    if re.match(r"\w+\(", text):
        raise UserError("no such directory", at=text, hint="a recipe is opened by jaxup.open_plan")
    repo, own = split_revision(text)
    check_hub_name(repo, sure=(own or revision) is not None)
    return _Hub(repo, own or revision)


def ask_hub(call: Callable[[], T]) -> T:
    """What a first look at the Hub gives; TimeoutError if it takes too long. What it logs of its tries is not shown."""
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        threading.Thread(target=ask, daemon=True).start()  # left to itself if it takes longer
        return answer.result(SECONDS)
    finally:
        log.setLevel(level)


def aligned(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """An uninitialised array that XLA's CPU can take as it is: at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


class Local:
    """A directory. Files must be regular and lie inside it, links followed."""

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        self.name = self.place = str(root)

    def version(self, file: str) -> str:
        status = self.path(file).stat()
        return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"

    def exists(self, file: str) -> bool:
        return os.path.lexists(self.root / file)

    def reaches(self, file: str, size: int) -> bool:
        return self.path(file).stat().st_size >= size

    def read(self, file: str, start: int, stop: int) -> np.ndarray:
        # Not mapped: if the file shrinks, reading a map kills the process.
        buffer = aligned((stop - start,), np.uint8)
        view, done = buffer.data, 0
        try:
            with open(self.path(file), "rb", buffering=0) as opened:
                while done < len(view):
                    count = os.preadv(opened.fileno(), [view[done:]], start + done)
                    if count == 0:
                        raise UserError(f"{self.name}: {file} ends before byte {stop}")
                    done += count
        except OSError as error:
            raise UserError(f"{self.name}: {file} cannot be read: {error.strerror}") from error
        return buffer

    def files(self) -> list[str]:
        folders = [folder for folder in ("", TEMPLATES) if (self.root / folder).is_dir()]
        return [os.path.join(folder, name) for folder in folders for name in sorted(os.listdir(self.root / folder))]

    def whole(self, file: str, limit: int = _SMALL) -> bytes:
        self.check_size(file, limit)
        return self.read(file, 0, self.path(file).stat().st_size).tobytes()

    def check_size(self, file: str, limit: int) -> None:
        if self.reaches(file, limit + 1):
            raise UserError(f"{self.name}: {file} is larger than {limit} bytes")

    def path(self, file: str) -> Path:
        """Where the file is, if it is a regular file that lies here, or in the blobs of a hub cache."""
        path, root = self.root / file, self.root.resolve()
        try:
            real = path.resolve(strict=True)
            mode = real.stat().st_mode
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that is not Unicode
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.name}: {file} cannot be read: {reason}") from None
        allowed = [root]
        if root.parent.name == "snapshots":  # a hub cache: snapshots/COMMIT/NAME -> ../../blobs/DIGEST
            allowed.append(root.parent.parent / "blobs")
        if not any(real.is_relative_to(place) for place in allowed):
            raise UserError(f"{self.name}: {file} is a link that leaves the directory")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise UserError(f"{self.name}: {file} is not a regular file")
        return path


def check_texts(directory: str | os.PathLike) -> None:
    """UserError if a file that transformers may open for a tokenizer is none, lies elsewhere, or is far too large."""
    storage = Local(directory)
    for file in storage.files():
        if _TEXTS.fullmatch(os.path.basename(file)) and (storage.root / file).exists():  # else it is a link to nothing
            storage.check_size(file, LARGEST_TEXT)


class _Hub(Local):
    """A model on the Hugging Face Hub, each file fetched into its cache when first asked for."""

    def __init__(self, repo: str, revision: str | None):
        self.name, self._repo = repo if revision is None else f"{repo} at {revision}", repo
        self._revision, self._fetch = revision, functools.cache(self._download)
        config = self._fetch("config.json")
        if config is None:
            raise UserError("no such directory, and the model on the Hub has no config.json", at=self.name)
        # All further files come from the commit that this one came from.
        self.root, self._revision = config.parent, config.parent.name
        self.place = f"{repo}@{self._revision}"

    def exists(self, file: str) -> bool:
        return self._fetch(file) is not None

    def files(self) -> list[str]:
        from huggingface_hub import HfApi

        try:
            return ask_hub(functools.partial(HfApi().list_repo_files, self._repo, revision=self._revision))
        except Exception:  # there is none: what the cache has
            return super().files()

    def path(self, file: str) -> Path:
        if self._fetch(file) is None:
            raise UserError(f"{self.name}: the model on the Hub has no {file}")
        return super().path(file)

    def _download(self, file: str) -> Path | None:
        """Where the file is; None if the model has none of that name."""
        from huggingface_hub import constants, errors, hf_hub_download

        try:
            download = functools.partial(hf_hub_download, self._repo, file, revision=self._revision)
            return Path(ask_hub(download) if file == "config.json" else download())
        except TimeoutError:
            reason = f"no such directory, and the Hub does not answer within {SECONDS} s"
        except errors.GatedRepoError:
            reason = "it is gated: accept its terms on its page and set HF_TOKEN"
        except errors.RepositoryNotFoundError:
            reason = "no such directory, and no such model on the Hub (a private one needs HF_TOKEN)"
        except errors.RevisionNotFoundError:
            reason = "the model on the Hub has no such revision"
        except errors.LocalEntryNotFoundError:
            if file != "config.json" and constants.HF_HUB_OFFLINE:
                return None
            reason = f"no such directory, and {file} is not in the Hub's cache and could not be fetched"
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # a name that is none, the network, a full disk: all kinds
            reason = first_line(error)[:300]
        raise UserError(reason, at=self.name)


class _Remote:
    """A directory that TensorStore's key-value stores reach; credentials are the driver's own."""

    def __init__(self, url: str):
        import tensorstore as ts

        self.name = self.place = url.rstrip("/")
        try:
            self._files = ts.KvStore.open(self.name + "/", context=ts.Context(RETRIES)).result(SECONDS)
        except (ValueError, TimeoutError) as error:
            raise UserError(first_line(error)[:300], at=url) from None

    def version(self, file: str) -> str:
        if self.name.startswith("http"):  # two servers of one place may tell their ETags apart
            return ""
        answer = self._ask(file, slice(0, 0), 0)
        return "" if answer is None else answer.stamp.generation.hex()

    def exists(self, file: str) -> bool:
        return self._read(file, slice(0, 0), 0) is not None

    def reaches(self, file: str, size: int) -> bool:
        # No driver tells a size: a byte that is not there is out of range.
        return size == 0 or self._read(file, slice(size - 1, size), 1) is not None

    def read(self, file: str, start: int, stop: int) -> np.ndarray:
        value = self._read(file, slice(start, stop), stop - start) if stop > start else b""
        if value is None or len(value) != stop - start:
            raise UserError(f"{self.name}: {file} is missing, or ends before byte {stop}")
        return np.frombuffer(value, np.uint8)

    def whole(self, file: str, limit: int = _SMALL) -> bytes:
        if self.reaches(file, limit + 1):
            raise UserError(f"{self.name}: {file} is larger than {limit} bytes")
        value = self._read(file, None, limit)
        if value is None:
            raise UserError(f"{self.name}: {file} is missing")
        return value

    def files(self) -> list[str]:
        import tensorstore as ts

        keys = ts.KvStore.KeyRange(f"{TEMPLATES}/", f"{TEMPLATES}0")
        try:
            return [key.decode() for key in self._files.list(keys).result(SECONDS)]
        except (ValueError, TimeoutError, NotImplementedError):  # https has none
            return []

    def _read(self, file: str, byte_range: slice | None, most: int) -> bytes | None:
        """None if the file is missing or does not reach so far. No more than `most` bytes are to come."""
        answer = self._ask(file, byte_range, most)
        return answer.value if answer is not None and answer.state == "value" else None

    def _ask(self, file: str, byte_range: slice | None, most: int) -> Any:
        """What the key-value store answers; None if the file does not reach so far."""
        seconds = SECONDS + (most >> 20)
        try:
            return self._files.read(file, byte_range=byte_range).result(seconds)
        except TimeoutError:
            raise UserError(f"{self.name}: {file} cannot be read: no answer within {seconds} s") from None
        except ValueError as error:
            if str(error).startswith("OUT_OF_RANGE"):
                return None
            raise UserError(f"{self.name}: {file} cannot be read: {first_line(error)[:300]}") from None
