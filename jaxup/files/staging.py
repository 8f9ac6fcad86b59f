"""A directory that appears under its name only when it is whole, whenever the process is killed.

Files are written into a sibling `.NAME.jaxup-new-PID`, which is flushed to disk and then renamed. When a directory is
replaced, the old one is `.NAME.jaxup-old-PID` between two renames. The writer holds a lock on its staging directory,
so that the next writer can tell one in progress from what a killed process left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxup.errors import NoRoom, UserError, storage_error
from jaxup.files.bucket import Bucket
from jaxup.files.lock import flock
from jaxup.text import remote


@contextlib.contextmanager
def staged_directory(out: str | Path, *, force: bool, marks: tuple[str, ...]) -> Iterator[Path]:
    """Yields an empty directory that becomes `out` when the block ends well, else disappears.

    UserError as of `check_replaceable`, for a parent that cannot be written, and for a disk that fills up meanwhile.
    """
    if isinstance(out, Bucket):
        with _uploaded(out, force, marks) as staging:
            yield staging
        return
    out = Path(os.path.abspath(out))
    if not out.name or not out.parent.is_dir():
        raise UserError(f"{out}: its parent is not a directory")
    try:
        staging, lock = _create(out, force, marks)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        yield staging
        _sync(staging)
        _publish(staging, out, force, marks)
    except OSError as error:
        raise storage_error(error, str(out), "not written") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def _uploaded(out: Bucket, force: bool, marks: tuple[str, ...]) -> Iterator[Path]:
    """The same in a bucket, from a directory of this machine. While it is written it has no config.json, and one of
    `marks`, the first of which comes last."""
    check_replaceable(out, force, marks)
    last = ("config.json", marks[0])
    with tempfile.TemporaryDirectory(prefix="jaxup-") as staging:
        try:
            yield Path(staging)
            check_replaceable(out, force, marks)
            before = out.below()
            files = {path.relative_to(staging).as_posix(): path for path in Path(staging).rglob("*") if path.is_file()}
            for name in last:
                (out / name).unlink()
            for name in sorted(files.keys() - {*last}, key=lambda name: (name not in marks, name)):
                (out / name).write_bytes(files[name].read_bytes())
            for name in before:
                if name not in files:
                    (out / name).unlink()
            for name in last:
                if name in files:
                    (out / name).write_bytes(files[name].read_bytes())
        except OSError as error:
            raise storage_error(error, str(out), "not written") from error


def _create(out: Path, force: bool, marks: tuple[str, ...]) -> tuple[Path, int]:
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        # Between creating a staging directory and locking it, it looks like a killed writer's.
        flock(parent, wait=True)
        _clean_up(out)
        check_replaceable(out, force, marks)
        staging = out.parent / f".{out.name}.jaxup-new-{os.getpid()}"
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
        flock(lock, wait=True)
        return staging, lock
    finally:
        os.close(parent)


def _clean_up(out: Path) -> None:
    """Removes what killed writers of `out` left; puts the old directory back if it was aside."""
    for path in _siblings(out, "new"):
        lock = os.open(path, os.O_RDONLY)
        try:
            if not flock(lock):  # the file system has no locks: so much can be known of a process of this machine
                os.kill(int(path.name.rpartition("-")[2]), 0)
                raise BlockingIOError
        except BlockingIOError:
            raise UserError(f"{out}: process {path.name.rpartition('-')[2]} is writing it") from None
        except ProcessLookupError:
            pass
        finally:
            os.close(lock)
        shutil.rmtree(path)
    for path in _siblings(out, "old"):
        if os.path.lexists(out):
            shutil.rmtree(path)
        else:
            os.rename(path, out)


def _siblings(out: Path, kind: str) -> list[Path]:
    prefix = f".{out.name}.jaxup-{kind}-"
    return sorted(path for path in out.parent.iterdir() if path.name.startswith(prefix))


def check_space(directory: Path, out: str | Path, needed: int) -> None:
    """NoRoom unless `needed` bytes, for what will be `out`, are free where `directory` is."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise NoRoom(f"{out}: needs {needed / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free there")


def check_replaceable(out: Path, force: bool, marks: tuple[str, ...]) -> None:
    """UserError if `out` exists, but with `force` only if it is not empty and holds none of the files `marks`: a
    mistyped path cannot delete something else."""
    if not (out.exists() if remote(out) else os.path.lexists(out)):
        return
    if not force:
        raise UserError(f"{out}: exists already; choose another place, or force (--force) to replace it")
    if out.is_symlink() or not out.is_dir():
        raise UserError(f"{out}: is not a directory and will not be replaced")
    names = [path.name for path in out.iterdir()]
    if names and not any(mark in names for mark in marks):
        raise UserError(f"{out}: holds none of {', '.join(marks)}, so it will not be replaced")


def _publish(staging: Path, out: Path, force: bool, marks: tuple[str, ...]) -> None:
    check_replaceable(out, force, marks)  # it may have appeared meanwhile
    aside = out.parent / f".{out.name}.jaxup-old-{os.getpid()}"
    replacing = os.path.lexists(out)
    if replacing:
        os.rename(out, aside)
    try:
        os.rename(staging, out)
    except BaseException:
        if replacing and not os.path.lexists(out):
            os.rename(aside, out)
        raise
    _sync_one(out.parent)
    if replacing:
        shutil.rmtree(aside)


def _sync(directory: Path) -> None:
    """Flushes every file and directory below, so that the rename cannot reach the disk before them."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync_one(Path(folder, name))
        _sync_one(Path(folder))


def _sync_one(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
