"""Questions and answers from real text that is on every machine: what the docstrings of Python's library say.

`docstrings` in `data.files` is all of them, `docstrings:2000` so many, drawn by the seed.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxup.data.sources import file_hash, library, os_errors
from jaxup.errors import UserError, within

SHORTEST = 20  # characters of an answer; a shorter one says nothing
LONGEST_QUESTION = 160


def is_docstrings(spec: str) -> bool:
    return spec.partition(":")[0] == "docstrings"


def write_docstrings(spec: str, root: str, seed: int) -> str:
    """The path of the file of messages, in `root`, that `spec` stands for; made if it is not there.

    It is named after the library's content and what was drawn. UserError for a number that is none.
    """
    _, colon, number = spec.partition(":")
    if colon and not re.fullmatch(r"[1-9][0-9]{0,8}", number):
        raise UserError("write docstrings for all pairs, or docstrings:N for N of them", at=spec)
    files = library()
    key = json.dumps(
        [sys.version_info[:2], [(name, file_hash(path)) for name, path in files], number, seed if number else None]
    )
    path = Path(root, f"docstrings-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}.jsonl").expanduser()
    with within(spec), os_errors(str(path)):
        if path.exists():
            return str(path)
        pairs = list(question_answers(files))
        if number:
            pairs.sort(key=lambda pair: hashlib.blake2b(f"{seed}\0{pair[0]}".encode()).digest())
            del pairs[int(number) :]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("w") as file:
            for pair in pairs:
                said = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
                file.write(json.dumps({"messages": said}) + "\n")
        part.replace(path)
    return str(path)


def question_answers(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    """For each public function and class of `files` (path within the library, where it lies): the first paragraph of
    its docstring, as the answer to what it does. No question comes twice."""
    asked = set()
    for name, path in files:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the library's own: escapes that are none
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates, and files that are wrong on purpose
            continue
        for question, answer in _within(tree, module):
            if question not in asked:
                asked.add(question)
                yield question, answer


def _within(holder: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    for node in holder.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        path = f"{name}.{node.name}"
        answer = " ".join(re.split(r"\n\s*\n", inspect.cleandoc(ast.get_docstring(node) or ""))[0].split())
        if isinstance(node, ast.ClassDef):
            question = f"What is the class `{path}` for?"
            yield from _within(node, path)
        else:
            question = f"What does `{path}({ast.unparse(node.args)})` do?"
        if len(answer) >= SHORTEST and len(question) <= LONGEST_QUESTION:
            yield question, answer
