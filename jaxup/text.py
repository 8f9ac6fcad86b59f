"""Text on its way to people and to files: what may be printed, small JSON that is untrusted, files written whole."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from jaxup.errors import UserError


def printable(text: str) -> str:
    """With a blank for what could move the cursor of a terminal; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def named(name: str) -> str:
    """A name as it is, or as Python's literal if it cannot be printed."""
    return name if name.isprintable() else repr(name)


def escaped(text: str, keep: str = "") -> str:
    """Control characters, and those that turn the direction of text or have no width, as Python's escapes."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def backticks(text: str, least: int = 3) -> str:
    """More backticks than `text` has in a row: Markdown between two of them cannot be closed by it."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def size(nbytes: int) -> str:
    """Bytes in powers of 1000: "39.41 GB"."""
    power = min(len(str(nbytes)) - 1, 12) // 3
    return f"{nbytes / 1000**power:,.2f} {('KB', 'MB', 'GB', 'TB')[power - 1]}" if power else f"{nbytes} bytes"


def parse_json(text: bytes, shown: str) -> dict[str, Any]:
    """A JSON object without duplicate keys; UserError (starting with `shown`) for anything else."""

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
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise UserError(f"{shown}: nested too deeply") from None
    except ValueError as error:  # malformed JSON, malformed UTF-8 or a number of thousands of digits
        raise UserError(f"{shown}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{shown}: must be a JSON object, not {type(value).__name__}")
    return value


def read_json(path: Path) -> Any:
    """The parsed file of this project's own, or None if there is none; UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Whoever reads `path` sees the old content or the new, whatever kills the writer."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
