"""The bytes of a result's tensors, brought to its files: read once, hashed once, written wherever they go.

Tensors are handled in pieces, each hashed for itself: as many at a time as there are threads, each
with a few MB in hand. Zeros are not written: a file begins as one hole, or as allocated blocks that
read as zeros.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxup.building.origins import Found, Origin
from jaxup.depth.arithmetic import rescale
from jaxup.errors import UserError
from jaxup.families.layouts import Tensor
from jaxup.files import shards
from jaxup.files.header import TensorInfo
from jaxup.files.manifest import check_listed, mismatch, read_manifest, span_agrees
from jaxup.files.shards import Stored
from jaxup.files.storage import Local
from jaxup.hub.reader import Checkpoint, dtype_of, is_finite
from jaxup.progress import Progress

_CHUNK = 2 * 2**20  # bytes in hand; what the processor's caches hold
_FAR_CHUNK = 8 * 2**20  # of a request over a network
_THREADS, _FAR_THREADS = 2, 16  # more cost memory, but over a network it is the requests in flight that make the speed

Shards = Mapping[str, Sequence[tuple[Stored, Origin]]]
# (tensor of the result) -> its new values in the file's layout, float32
New = Callable[[Tensor], np.ndarray]


class _Piece(NamedTuple):
    """Rows of a tensor, and of all that are equal to it."""

    origin: Origin
    tensor: Tensor
    start: int
    stop: int
    places: list[tuple[str, int]]  # (file, offset)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * _row_bytes(self.tensor.shape, self.origin.after)


class _Span(NamedTuple):
    """Bytes of a source's file, of which its manifest has a digest."""

    source: str
    file: str
    begin: int
    end: int


def write_tensors(
    directory: Path,
    files: Shards,
    checkpoints: Mapping[str, Checkpoint],
    *,
    gather: Mapping[str, np.ndarray],
    new: New,
    sparse: bool,
    progress: bool,
) -> dict[str, list[tuple[int, str]]]:
    """Writes the safetensors files; (end, SHA-256) of the spans of each, as a manifest takes them.

    Args:
      gather: for "embed_tokens" and "lm_head", where an origin says so: the source's row that is in
        each row of the result [V] int, -1 for zeros.
      sparse: zeros are holes of the files, else blocks of the disk.

    UserError for a source that cannot be read or is not what its manifest describes, OSError for a full disk.
    """
    pieces: dict[tuple[Origin, int, int, int], _Piece] = {}
    spans = {}
    for file, tensors in files.items():
        header = shards.header([stored for stored, _ in tensors])
        offset, spans[file] = len(header), [(len(header), hashlib.sha256(header).hexdigest())]
        written = [(0, offset)]  # spans that get blocks
        for stored, origin in tensors:
            row, step = stored.row_bytes, stored.piece_rows
            rows = stored.nbytes // row
            if not (sparse and origin.is_zero):
                begin = written.pop()[0] if written[-1][1] == offset else offset
                written.append((begin, offset + stored.nbytes))
            for start in range(0, rows, step):
                stop = min(rows, start + step)
                piece = _Piece(origin, stored.tensor, start, stop, [])
                pieces.setdefault((origin, row, start, stop), piece).places.append((file, offset))
                offset += (stop - start) * row
        with open(directory / file, "wb") as opened:
            opened.truncate(offset)
            opened.write(header)
            opened.flush()
            # Writing is faster where blocks have been allocated, and a disk that is too small is known at once.
            allocated = all(_allocate(opened.fileno(), *span) for span in written)
        if not sparse and not allocated:
            _fill(directory / file, len(header), offset)

    run = _Run(directory, checkpoints, gather, new)
    # As they lie in the files that they come from.
    rest = [piece for piece in pieces.values() if not piece.origin.is_zero]
    rest.sort(key=lambda piece: (piece.origin.found or (), piece.start))
    total = sum(piece.nbytes * len(piece.places) for piece in rest)
    with Progress("build", total=math.ceil(total / 1e6), unit="MB", shown=progress) as bar:
        run.work(rest, bar)
        bar.update(math.ceil(total / 1e6), "flushing to disk")
        for file in files:  # as the staging directory would, but under the eyes of who waits
            with open(directory / file, "rb") as opened:
                os.fsync(opened.fileno())
    run.warn()

    for piece in pieces.values():
        digest = _zeros_digest(piece.nbytes) if piece.origin.is_zero else run.digests[id(piece)]
        for file, offset in piece.places:
            spans[file].append((offset + piece.nbytes, digest))
    return {file: sorted(found) for file, found in spans.items()}


class _Run:
    """What the threads share."""

    def __init__(
        self, directory: Path, checkpoints: Mapping[str, Checkpoint], gather: Mapping[str, np.ndarray], new: New
    ):
        self._directory, self._checkpoints, self._gather, self._new = directory, checkpoints, gather, new
        self._far = not all(isinstance(checkpoint.storage, Local) for checkpoint in checkpoints.values())
        self._known: dict[_Span, str] = {}  # digests, of those sources that have a manifest
        for source, checkpoint in checkpoints.items():
            if isinstance(storage := checkpoint.storage, Local):
                listed = read_manifest(storage.root) or {}
                for file in checkpoint.files if listed else ():
                    check_listed(storage.root, listed, file)
                    for (begin, _), (end, digest) in itertools.pairwise([(0, ""), *listed[file]]):
                        self._known[_Span(source, file, begin, end)] = digest
        self._stop = threading.Event()
        self._written = [0] * (_FAR_THREADS if self._far else _THREADS)  # bytes, by thread
        self._overflown: dict[str, None] = {}  # names of tensors, in the order in which they come up
        self._not_finite: dict[str, None] = {}
        self.digests: dict[int, str] = {}  # by the piece's id

    def work(self, pieces: Sequence[_Piece], bar: Progress) -> None:
        todo: queue.SimpleQueue[_Piece | _Span] = queue.SimpleQueue()
        for piece in pieces:
            todo.put(piece)
        for span in self._unread(pieces):
            todo.put(span)
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(len(self._written)) as pool:
            pending = {pool.submit(self._thread, i, todo) for i in range(len(self._written))}
            try:
                while pending:
                    done, pending = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    megabytes = sum(self._written) / 1e6
                    bar.update(int(megabytes), f"{megabytes / (time.monotonic() - began):,.0f} MB/s")
            finally:
                self._stop.set()

    def warn(self) -> None:
        said = {"finite values are too large for the dtype: infinity": self._overflown,
                "NaN or infinity in what is inherited": self._not_finite}  # fmt: skip
        for what, names in said.items():
            if names:
                first, *others = names
                more = f" and {len(others)} more" if others else ""
                warnings.warn(f"{first}{more}: {what}", stacklevel=4)

    def _unread(self, pieces: Sequence[_Piece]) -> list[_Span]:
        """What no piece is exactly made from, of the bytes that have a digest and that the result depends on: headers,
        files of one digest, what is gathered, and the large tensors that become those of another dtype."""
        read = {self._span(piece) for piece in pieces if piece.origin.found and piece.origin.rows is None}
        used: dict[tuple[str, str], set[tuple[int, int]]] = {}
        for found in {piece.origin.found for piece in pieces}:
            if found is not None:
                used.setdefault((found.source, found.info.file), set()).add(_extent(found.info))
        rest = []
        for span in self._known.keys() - read:
            of = used.get((span.source, span.file), ())
            pickled = self._checkpoints[span.source].pickled is not None
            within = any(begin < span.end and span.begin < end for begin, end in of)
            if pickled or within or (of and not span.begin):
                rest.append(span)
        return sorted(rest)

    def _thread(self, number: int, todo: queue.SimpleQueue[_Piece | _Span]) -> None:
        buffer = memoryview(bytearray(_CHUNK))
        with contextlib.suppress(queue.Empty):
            while not self._stop.is_set():
                item = todo.get_nowait()
                if isinstance(item, _Piece):
                    self._handle(number, item, buffer)
                elif not span_agrees(self._root(item.source) / item.file, item.begin, item.end, self._known[item]):
                    raise mismatch(self._root(item.source), item.file)

    def _handle(self, number: int, piece: _Piece, buffer: memoryview) -> None:
        digest, position = hashlib.sha256(), 0
        copied = piece.origin.copied
        with contextlib.ExitStack() as stack:
            opened = {
                file: stack.enter_context(open(self._directory / file, "r+b", buffering=0)).fileno()
                for file, _ in piece.places
            }
            for chunk in self._copied(piece, copied, buffer) if copied else self._computed(piece):
                if self._stop.is_set():
                    return
                digest.update(chunk)
                if copied and not _finite(chunk, position, piece.origin.after):
                    self._not_finite.setdefault(piece.tensor.name)
                for file, offset in piece.places:
                    _write(opened[file], chunk, offset + position)
                    self._written[number] += len(chunk)
                position += len(chunk)
        self.digests[id(piece)] = digest.hexdigest()
        if copied:
            self._check(piece, digest)

    def _copied(self, piece: _Piece, found: Found, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of a source's rows, chunk by chunk; a chunk is gone when the next one is asked for."""
        checkpoint, info = self._checkpoints[found.source], found.info
        _, _, begin, end = self._span(piece)
        if checkpoint.pickled is not None or not isinstance(checkpoint.storage, Local):
            row = _row_bytes(info.shape, dtype_of(info))
            step = max(1, _FAR_CHUNK // row)
            for start in range(piece.start, piece.stop, step):
                array = checkpoint.read(info, slice(start, min(piece.stop, start + step)))
                yield _bytes(array)
            return
        try:
            with open(checkpoint.storage.path(info.file), "rb", buffering=0) as file:
                while begin < end:
                    # Not mapped: if the file shrinks, reading a map kills the process.
                    count = os.preadv(file.fileno(), [buffer[: min(len(buffer), end - begin)]], begin)
                    if count == 0:
                        raise UserError(f"{checkpoint.storage.name}: {info.file} ends before byte {end}")
                    begin += count
                    yield buffer[:count]
        except OSError as error:
            raise UserError(f"{checkpoint.storage.name}: {info.file} cannot be read: {error.strerror}") from error

    def _computed(self, piece: _Piece) -> Iterator[memoryview]:
        """The bytes of rows that are cast, scaled, gathered or new, chunk by chunk."""
        origin, tensor = piece.origin, piece.tensor
        new, found, digest = functools.cache(self._new), origin.found, hashlib.sha256()
        step = max(1, _CHUNK // _row_bytes(tensor.shape, np.dtype(np.float32)))
        for start in range(piece.start, piece.stop, step):
            stop = min(piece.stop, start + step)
            if found is None:
                x = new(tensor)[start:stop]
            elif origin.rows is None:
                x = self._checkpoints[found.source].read(found.info, slice(start, stop))
                digest.update(_bytes(x))
            else:
                x = self._gathered(found, self._gather[origin.rows][start:stop])
            y = _rescaled(tensor, x.reshape(stop - start, -1), start, origin)
            if origin.noise:
                noise = np.float32(origin.noise)
                mixed = (1 - noise) * y.astype(np.float32) + noise * new(tensor)[start:stop].reshape(y.shape)
                y = mixed.astype(y.dtype)
            if not is_finite(y):
                (self._overflown if is_finite(x) else self._not_finite).setdefault(tensor.name)
            yield _bytes(y)
        if found is not None and origin.rows is None:
            self._check(piece, digest)

    def _gathered(self, found: Found, wanted: np.ndarray) -> np.ndarray:
        """These rows of a source's embedding or head, -1 for zeros, in the order of the result's vocabulary."""
        checkpoint, info = self._checkpoints[found.source], found.info
        x, position = np.zeros((len(wanted), *info.shape[1:]), dtype_of(info)), 0
        # Neighbours that are neighbours there too are read together.
        pairs = enumerate(wanted.tolist())
        for _, run in itertools.groupby(pairs, lambda pair: None if pair[1] < 0 else pair[1] - pair[0]):
            rows = [row for _, row in run]
            if rows[0] >= 0:
                x[position : position + len(rows)] = checkpoint.read(info, slice(rows[0], rows[-1] + 1))
            position += len(rows)
        return x

    def _check(self, piece: _Piece, digest: hashlib._Hash) -> None:
        """UserError if the source's manifest has another digest of the bytes that the piece was made from."""
        known = self._known.get(span := self._span(piece))
        if known is not None and known != digest.hexdigest():
            raise mismatch(self._root(span.source), span.file)

    def _span(self, piece: _Piece) -> _Span:
        """What a piece of a tensor is made from."""
        found = piece.origin.found
        assert found is not None
        row = _row_bytes(found.info.shape, dtype_of(found.info))
        begin, _ = _extent(found.info)
        return _Span(found.source, found.info.file, begin + piece.start * row, begin + piece.stop * row)

    def _root(self, source: str) -> Path:
        storage = self._checkpoints[source].storage
        assert isinstance(storage, Local)
        return storage.root


def _extent(info: TensorInfo) -> tuple[int, int]:
    """The bytes of its file that a tensor is."""
    return info.offset, info.offset + math.prod(info.shape) * dtype_of(info).itemsize


def _finite(chunk: memoryview, position: int, dtype: np.dtype) -> bool:
    """`is_finite` of the numbers in a chunk of a tensor that begins at byte `position` of it."""
    start = -position % dtype.itemsize
    return is_finite(np.frombuffer(chunk, dtype, (len(chunk) - start) // dtype.itemsize, start))


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _rescaled(tensor: Tensor, x: np.ndarray, start: int, origin: Origin) -> np.ndarray:
    """Rows [rows, columns] of a tensor from row `start` on, each of its params with its own factors."""
    layout, inputs = tensor.row.layout, tensor.row.inputs
    first = inputs if layout in ("linear", "conv1d") else 0
    sizes = [math.prod(shape[first:]) for shape in tensor.part_shapes]
    if len(sizes) == 1:
        return rescale(x, origin.factors[0], origin.before, origin.after)
    y = np.empty(x.shape, origin.after)
    for end, size, factors in zip(itertools.accumulate(sizes), sizes, origin.factors, strict=True):
        columns, rows = slice(end - size, end), slice(max(end - size - start, 0), max(end - start, 0))
        part: Any = (slice(None), columns) if layout == "conv1d" else rows
        y[part] = rescale(x[part], factors, origin.before, origin.after)
    return y


def _row_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape[1:]) * dtype.itemsize


def _write(fd: int, chunk: memoryview, offset: int) -> None:
    while chunk:
        count = os.pwrite(fd, chunk, offset)
        chunk, offset = chunk[count:], offset + count


def _allocate(fd: int, begin: int, end: int) -> bool:
    """Blocks for a span of a file, which read as zeros until they are written; False where that is not possible."""
    # Not os.posix_fallocate: where the file system has no such call, it reads and writes every block instead.
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return False
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while fallocate(fd, 0, begin, end - begin):
        error = ctypes.get_errno()
        if error in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))
    return True


def _fill(path: Path, begin: int, end: int) -> None:
    """Writes zeros."""
    zeros = memoryview(bytes(_CHUNK))
    with open(path, "r+b", buffering=0) as file:
        for offset in range(begin, end, _CHUNK):
            _write(file.fileno(), zeros[: min(_CHUNK, end - offset)], offset)


@functools.lru_cache(maxsize=64)
def _zeros_digest(size: int) -> str:
    return hashlib.sha256(bytes(size)).hexdigest()  # of pages that are never there: they are only read
