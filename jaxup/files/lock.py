"""Locks that end with the process that holds them, however it ends.

The kernel lets `flock` go. Some file systems of networks and in user space have no flock (gcsfuse, Lustre as it is
often mounted): there a file beside the lock, `NAME.held`, says who holds it. One left by a process of this machine
that is gone is removed; of processes of other machines nothing can be known, and the message says what to do.

In a bucket the lock is an object, written only if it still is what was seen. Its holder writes it anew every `_BEAT`
seconds: one of another machine that has not done so for `_SILENCE` is gone. Whoever was taken for gone, and is not,
ends at once: what it would write is another's by then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from jaxup.files.bucket import Bucket
from jaxup.progress import say
from jaxup.together import identity, lives

_BEAT, _SILENCE = 20.0, 120.0  # seconds
_NONE_HERE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)


def flock(file: int, *, wait: bool = False) -> bool:
    """Locks an open file or directory until it is closed; False where the file system has no locks.

    BlockingIOError, unless it is to wait, if another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NONE_HERE:
            return False
        raise
    return True


@contextlib.contextmanager
def hold(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock `path` in the block; OSError where it cannot be made.

    As long as another process has it `busy` is called with who that is, again and again: it waits a little, or raises.
    """
    me = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    if isinstance(path, Bucket):
        with _held(path, f"{me}\n{identity()}", busy):
            yield
        return
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                has_locks = flock(file.fileno())
            except BlockingIOError:
                file.seek(0)
                busy(file.read().strip() or "another process")
                continue
            if has_locks and not _is(file.fileno(), path):
                continue  # whoever had it has removed the file
            if has_locks:
                file.truncate(0)
                file.write(f"{me}\n")
                file.flush()
                yield
                return
        held = path.with_name(f"{path.name}.held")
        say(f"{path.parent}: its file system has no locks: {held.name} there says that it is in use")
        while (holder := _claim(held, me)) is not None:
            busy(holder)
        try:
            yield
        finally:
            held.unlink(missing_ok=True)
        return


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _claim(held: Path, me: str) -> str | None:
    """Makes the file, if it is not there or its process is gone; else says who has it."""
    try:
        with open(held, "x", encoding="utf-8") as file:
            file.write(f"{me}\n{identity()}\n")
        return None
    except FileExistsError:
        pass
    try:
        text = held.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return _claim(held, me)
    holder, _, who = text.strip().partition("\n")
    if (there := lives(who)) is None:
        return f"{holder or 'another process'} (if that is gone, delete {held})"
    if there:
        return holder
    # Moved before it is removed: another process may have come first, and made it anew.
    aside = held.with_name(f"{held.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(held, aside)
        if aside.read_text(encoding="utf-8", errors="replace") != text:
            os.rename(aside, held)
            return "another process"
        aside.unlink()
    return _claim(held, me)


@contextlib.contextmanager
def _held(path: Bucket, me: str, busy: Callable[[str], None]) -> Iterator[None]:
    generation, done = _take(path, me, busy), threading.Event()

    def live() -> None:
        nonlocal generation
        while not done.wait(_BEAT):
            try:
                generation = _write(path, me, generation) or _lost(path)
            except OSError:  # the network: the next time tells
                continue

    living = threading.Thread(target=live, daemon=True)
    living.start()
    try:
        yield
    finally:
        done.set()
        living.join()
        with contextlib.suppress(OSError):
            path.write_if(None, generation)


def _take(path: Bucket, me: str, busy: Callable[[str], None]) -> bytes:
    seen, since = None, 0.0
    while True:
        text, generation = path.look()
        holder, who, *_ = [*(text or "").split("\n"), "", ""]
        here = lives(who) if text else False
        # One of another machine lives if it writes while we look.
        if here or (here is None and seen not in (None, generation)):
            busy(holder)
            seen, since = generation, time.monotonic()
        elif here is None and (seen is None or time.monotonic() - since < _SILENCE):
            if seen is None:
                seen, since = generation, time.monotonic()
                say(f"{path}: {holder}: waits {_SILENCE:.0f} s for a sign of life (if it is gone, delete that object)")
            time.sleep(1)
        elif (made := _write(path, me, generation)) is not None:
            return made


def _write(path: Bucket, me: str, generation: bytes) -> bytes | None:
    """The new generation; None if another has written meanwhile."""
    if (made := path.write_if(f"{me}\n{time.time()}\n", generation)) is not None:
        return made
    there, generation = path.look()
    return generation if (there or "").startswith(f"{me}\n") else None  # it was written, and the answer got lost


def _lost(path: Bucket) -> NoReturn:
    say(f"{path}: this process gave no sign of life for {_SILENCE:.0f} s, and another goes on with the run: ends")
    os._exit(5)
