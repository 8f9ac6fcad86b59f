"""Text on its way to people and to files: what may be printed, small JSON that is untrusted, files written whole."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import reprlib
import stat
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxup.errors import UserError

_LARGEST = 64 * 2**20  # bytes of a JSON file of ours


def named(name: str) -> str:
    """A name as it is, or as Python's literal if it cannot be printed."""
    return name if name.isprintable() else repr(name)


def escaped(text: str, keep: str = "") -> str:
    """Control characters, and those that turn the direction of text or have no width, as Python's escapes."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def broken(*texts: str) -> bool:
    """Whether any has half of a character (a lone surrogate), which no encoding and no tokenizer takes."""
    return any("\ud800" <= c <= "\udfff" for text in texts for c in text)


def backticks(text: str, least: int = 3) -> str:
    """More backticks than `text` has in a row: Markdown between two of them cannot be closed by it."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def size(nbytes: int) -> str:
    """Bytes in powers of 1000: "39.41 GB"."""
    power = min(len(str(nbytes)) - 1, 12) // 3
    return f"{nbytes / 1000**power:,.2f} {('KB', 'MB', 'GB', 'TB')[power - 1]}" if power else f"{nbytes} bytes"


def parse_json(text: bytes, shown: str, *, constants: bool = False) -> dict[str, Any]:
    """A JSON object without duplicate keys; UserError (starting with `shown`) for anything else.

    `constants`: NaN and infinity may be in it, which Python writes though JSON has no such numbers.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in result if names.count(name) > 1)
            raise UserError(f"{shown}: the key {twice[:200]!r} appears twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=None if constants else refuse)
    except RecursionError:
        raise UserError(f"{shown}: nested too deeply") from None
    except ValueError as error:  # malformed JSON, malformed UTF-8 or a number of thousands of digits
        raise UserError(f"{shown}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{shown}: not a JSON object but {type(value).__name__}")
    return value


def remote(path: os.PathLike) -> bool:
    """Whether it lies in a bucket, where what is written is there at once and whole, or not at all."""
    return "://" in os.fspath(path)


def read_json(path: Path, kinds: Mapping[str, Any], hint: str) -> dict[str, Any] | None:
    """A JSON object that this project wrote, or None if there is no such file.

    Args:
      kinds: the types of the keys that are read; more keys may be there.
      hint: what to do with a damaged one.

    Raises:
      UserError: it is damaged: no JSON object, or a key is not there or of another type.
    """
    try:
        found = None if remote(path) else path.stat()
        if found and not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise UserError("not a regular file", at=str(path), hint=hint)
        if found and found.st_size > _LARGEST:
            raise UserError(f"damaged: larger than {_LARGEST} bytes", at=str(path), hint=hint)
        value = parse_json(path.read_bytes(), "damaged", constants=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", at=str(path)) from None
    except UserError as error:
        raise UserError(error.what, at=str(path), hint=hint) from None
    if wrong := misfit(value, kinds):
        raise UserError(f"damaged: {wrong}", at=str(path), hint=hint)
    return value


def misfit(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    """What keeps the values of a JSON object from being of these types, in words; "" if nothing does."""
    for name, kind in kinds.items():
        if name not in values and not _fits(None, kind):
            return f"{name} is missing"
        if not _fits(values.get(name), kind):
            return f"{name} must be {getattr(kind, '__name__', kind)}, not {reprlib.repr(values[name])}"
    return ""


def kinds_of(cls: Any, values: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The types of the fields of a dataclass, for `misfit`; of those with a default if they are among `values`."""
    hints, missing = typing.get_type_hints(cls), dataclasses.MISSING
    fields = ((field, field.default is field.default_factory is missing) for field in dataclasses.fields(cls))
    return {field.name: hints[field.name] for field, needed in fields if needed or field.name in values}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a type such as `dict[str, int | None]`; a dataclass is an object of its fields."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is typing.Literal:
        return isinstance(value, str) and value in of
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in of)
    if origin is tuple or origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(each, of[0]) for each in value)
    if origin is not None:
        return isinstance(value, dict) and all(_fits(each, of[1]) for each in value.values())
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict) and not misfit(value, kinds_of(kind, value))
    return type(value) is kind or (kind is float and type(value) is int) or (value is None and kind is type(None))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Whoever reads `path` sees the old content or the new, whatever kills the writer."""
    if remote(path):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
