"""Samples in a directory: what is there is not drawn again.

`settings.json` says how they are drawn, `samples.jsonl` has one a line. A line that was not written to its end, as of a
process that was killed, is drawn again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxup.errors import UserError
from jaxup.learning.problem import Problem, Task, Writer
from jaxup.learning.tree import EXPAND, Budget, Node, Search
from jaxup.progress import say
from jaxup.text import misfit, parse_json, read_json, write_atomically

_AT_ONCE = 16  # problems that are written down together
_LONGEST = 2**20  # bytes of a line
_KINDS = {"id": str, "sample": int, "text": str, "tokens": list[int], "logp": float, "ended": bool}
Drawn = dict[tuple[str, int], Node]  # by problem and number


def kept(directory: Path, settings: Mapping[str, Any]) -> Drawn:
    """The samples of a directory; none where it is not there yet, or empty.

    Raises:
      UserError: they were drawn in another way, or files are damaged.
    """
    hint = "name another directory"
    before = read_json(directory / "settings.json", {}, hint)
    if before is None:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError("there is something else", at=str(directory), hint=hint)
        return {}
    for name in settings:
        if before.get(name) != settings[name]:
            what = f"its samples are of {name}={before.get(name)!r}, not {settings[name]!r}"
            raise UserError(what, at=str(directory), hint=hint)
    found: Drawn = {}
    for place, row in _rows(directory / "samples.jsonl"):
        if wrong := misfit(row, _KINDS):
            raise UserError(f"damaged: {wrong}", at=(str(directory / "samples.jsonl"), f"line {place}"), hint=hint)
        node = Node((row["sample"],), row["text"], tuple(row["tokens"]), float(row["logp"]), True)
        found[row["id"], row["sample"]] = node
    return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for place in itertools.count(1):
            line = file.readline(_LONGEST)
            if not line:
                return
            if not line.endswith(b"\n"):
                if len(line) == _LONGEST:
                    raise UserError(f"damaged: a line of more than {_LONGEST} bytes", at=(str(path), f"line {place}"))
                say(f"{path}: line {place} was not written to its end: it is left out")
                return
            yield place, parse_json(line, f"{path}: line {place}")


def begin(directory: Path, settings: Mapping[str, Any]) -> None:
    """Makes the directory, and leaves out a last line that was not written to its end."""
    directory.mkdir(exist_ok=True)
    write_atomically(directory / "settings.json", json.dumps(dict(settings), indent=1) + "\n")
    file = directory / "samples.jsonl"
    if file.is_file() and (whole := file.read_bytes()) and not whole.endswith(b"\n"):
        write_atomically(file, whole[: whole.rfind(b"\n") + 1])


def searches(
    task: Task, problems: Sequence[Problem], writer: Writer, n: int, max_tokens: int, seed: int, there: Drawn
) -> list[Search]:
    """A search of each problem that has found those of its first `n` samples that are there."""
    found = []
    for problem in problems:
        search = Search(task, problem, writer, Budget(n * max_tokens), max_tokens, seed)
        mine = [there[problem.id, i] for i in range(n) if (problem.id, i) in there]
        search.finished += [dataclasses.replace(node, prompt=search.root.prompt, parent=search.root) for node in mine]
        found.append(search)
    return found


def complete(searches: Sequence[Search], writer: Writer, n: int, directory: Path | None) -> Iterator[int]:
    """Draws what is missing of `n` samples of each, some problems at a time, and gives how many problems are done.

    They are those that a search of whole answers draws first: a function of seed, problem and number.
    """
    done = 0
    for some in (searches[i : i + _AT_ONCE] for i in range(0, len(searches), _AT_ONCE)):
        missing = [(s, i) for s in some for i in sorted({*range(n)} - {node.path[0] for node in s.finished})]
        written = writer.write([search.ask(EXPAND, search.root, i) for search, i in missing])
        lines = []
        for (search, i), text in zip(missing, written, strict=True):
            node = search.after(search.root, (i,), text)
            search.finished.append(node)
            right = search.task.verify(search.problem, node.text)
            row = {"id": search.problem.id, "sample": i, "text": node.text, "tokens": node.tokens, "logp": node.logp,
                   "ended": text.ended, "right": None if right is None or math.isnan(right) else right}  # fmt: skip
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if directory is not None:
            with open(directory / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write("".join(lines))
        for search in some:
            search.finished.sort(key=lambda node: node.path)
        done += len(some)
        yield done
