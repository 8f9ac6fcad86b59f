"""A directory in a bucket of Google Cloud Storage, `gs://BUCKET/...`, as a path like any other.

TensorStore asks the store, with the machine's own credentials: no further package is needed, and Orbax takes such a
path for a directory. What is different there:

- An object is written as a whole or not at all, so nothing is written under another name first.
- There are no directories: one is there as long as an object is in it. Nothing can be renamed: `rename` copies.
- Nothing can be appended, and no lock is held by a kernel: `look` and `write_if` are what locks are made of.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any

from jaxup.errors import UserError, first_line

if TYPE_CHECKING:
    import tensorstore as ts

SCHEME = "gs://"
# Seconds for a look, and for what carries bytes or changes something: TensorStore tries again and again meanwhile.
_LOOK, _PATIENCE = 20.0, 300.0


def place(text: str) -> Path:
    """The path of that name, in a bucket if it begins with gs://; UserError if that names none."""
    if not text.startswith(SCHEME):
        return Path(os.path.expanduser(text))  # which leaves an unknown ~user as it is
    if not re.match("gs://[^/]", text):
        raise UserError("names no bucket", at=text, hint="such as gs://BUCKET/RUN")
    return _for_orbax()(text)


def remove(directory: Path) -> None:
    """All that is in it, and itself; nothing if it is not there."""
    if isinstance(directory, Bucket):
        directory.rmtree()
    elif directory.exists():
        shutil.rmtree(directory)


@functools.cache
def _for_orbax() -> type[Bucket]:
    """Orbax asks of a path whether it is one of etils, and makes paths of names anew."""
    from etils import epath

    class OrbaxBucket(Bucket, epath.Path):
        pass

    epath.register_path_cls(SCHEME)(OrbaxBucket)
    return OrbaxBucket


@functools.cache
def _opened(bucket: str) -> ts.KvStore:
    import tensorstore as ts

    store = ts.KvStore.open(f"{SCHEME}{bucket}/").result()
    store.list(ts.KvStore.KeyRange("\0", "\1")).result(_LOOK)  # one that is not there, or not for us, says so at once
    return store


class Bucket(PosixPath):
    """What of `Path` a run needs. Whatever the store answers but what was asked is an OSError."""

    def __str__(self) -> str:
        return super().__str__().replace("gs:/", SCHEME, 1)

    # What is there

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        look = lambda store: store.read(self._key, byte_range=slice(0, 0))  # noqa: E731
        return bool(self._key) and self._ask(look).state == "value"

    def is_dir(self, **_: Any) -> bool:
        return bool(self.below())

    def is_symlink(self) -> bool:
        return False

    def below(self) -> list[str]:
        """The names of all objects in it, from here, sorted; but those that the console makes for empty folders."""
        return sorted(key[len(self._inside) :] for key in self._keys() if not key.endswith("/"))

    def iterdir(self) -> Generator[Bucket, None, None]:
        return (self / name for name in dict.fromkeys(key.partition("/")[0] for key in self.below()))

    def glob(self, pattern: str, **_: Any) -> Generator[Bucket, None, None]:
        depth = pattern.count("/") + 1
        found = dict.fromkeys("/".join(key.split("/")[:depth]) for key in self.below())
        return (self / name for name in found if name.count("/") == depth - 1 and Path(name).match(pattern))

    # Its content

    def read_bytes(self) -> bytes:
        return self.read()

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        """These bytes of it; FileNotFoundError if it is not there, OSError if it has not so many."""
        span = slice(begin, end) if begin or end is not None else None
        found = self._ask(lambda store: store.read(self._key, byte_range=span), _PATIENCE)
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, "No such object", str(self))
        return found.value

    def has_size(self, size: int) -> bool:
        """Whether it is there and has so many bytes."""
        try:
            return len(self.read(max(0, size - 1))) == min(size, 1)
        except FileNotFoundError:
            return False
        except OSError as error:
            if "OUT_OF_RANGE" in str(error):
                return False
            raise

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
        return self.read().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        self._ask(lambda store: store.write(self._key, bytes(data)), _PATIENCE + (len(data) >> 20))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, *_: Any, **__: Any) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if not self.is_file():
            self.write_bytes(b"")

    def look(self) -> tuple[str | None, bytes]:
        """What it holds, None if it is not there, and the generation to give to `write_if`."""
        found = self._ask(lambda store: store.read(self._key))
        text = found.value.decode(errors="replace") if found.state == "value" else None
        return text, found.stamp.generation

    def write_if(self, text: str | None, generation: bytes) -> bytes | None:
        """Writes it, or removes it, if it still is of that generation; the new one, or None if it is not."""
        data = None if text is None else text.encode()
        return self._ask(lambda store: store.write(self._key, data, if_equal=generation)).generation or None

    # What changes what is there

    def mkdir(self, *_: Any, **__: Any) -> None:
        pass

    def unlink(self, missing_ok: bool = True) -> None:
        self._ask(lambda store: store.write(self._key, None), _PATIENCE)

    def rmtree(self, missing_ok: bool = True) -> None:
        keys = self._keys()
        with self._errors():
            for gone in [_opened(self.parts[1]).write(key, None) for key in keys]:
                gone.result(_PATIENCE)

    def rename(self, target: Any) -> Bucket:
        target = type(self)(target)
        for name in self.below():
            (target / name).write_bytes((self / name).read())
        self.rmtree()
        return target

    # It is where it says it is, whatever the working directory

    def resolve(self, strict: bool = False) -> Bucket:
        return self

    def absolute(self) -> Bucket:
        return self

    def expanduser(self) -> Bucket:
        return self

    @property
    def _key(self) -> str:
        return "/".join(self.parts[2:])

    @property
    def _inside(self) -> str:
        return f"{self._key}/" if self._key else ""

    def _keys(self) -> list[str]:
        """Of all that is in it."""
        import tensorstore as ts

        keys = ts.KvStore.KeyRange(self._inside, self._inside[:-1] + "0" if self._inside else "")
        found = (key.decode() for key in self._ask(lambda store: store.list(keys)))
        return [key for key in found if key.startswith(self._inside)]

    def _ask(self, ask: Callable[[ts.KvStore], Any], seconds: float | None = None) -> Any:
        with self._errors():
            return ask(_opened(self.parts[1])).result(_LOOK if seconds is None else seconds)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "no answer in time", str(self)) from None
        except ValueError as error:
            raise OSError(errno.EIO, first_line(error)[:300], str(self)) from None
