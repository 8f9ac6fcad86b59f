"""Questions and answers from real text that is on every machine: what the docstrings of Python's library say.

`docstrings` in `data.files` is all of them, `docstrings:2000` so many, drawn by the seed. They are of three kinds:

| spec | asks | answer |
|---|---|---|
| `docstrings` | what a function does, or a class is for | the first paragraph of its docstring |
| `docstrings:knowledge` | what else there is to know of it | the other paragraphs |
| `docstrings:code` | to write a function, given what it does | its source |
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
KINDS = KNOWLEDGE, CODE = "knowledge", "code"


def is_docstrings(spec: str) -> bool:
    return spec.partition(":")[0] == "docstrings"


def write_docstrings(spec: str, root: str, seed: int) -> str:
    """The path of the file of messages, in `root`, that `spec` stands for; made if it is not there.

    It is named after the library's content and what was drawn. UserError for a number that is none.
    """
    found = re.fullmatch(rf"docstrings(?::({'|'.join(KINDS)}))?(?::([1-9][0-9]{{0,8}}))?", spec)
    if found is None:
        kinds = " and ".join(f"docstrings:{kind}" for kind in KINDS)
        hint = f"{kinds}, with :N or without, are others"
        raise UserError("write docstrings for all pairs, or docstrings:N for N of them", at=spec, hint=hint)
    kind, number = found[1] or "", found[2] or ""
    files = library()
    made_from = [sys.version_info[:2], [(name, file_hash(path)) for name, path in files], number]
    key = json.dumps([*made_from, seed if number else None, *([kind] if kind else [])])
    path = Path(root, f"docstrings-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}.jsonl").expanduser()
    with within(spec), os_errors(str(path)):
        if path.exists():
            return str(path)
        pairs = list(question_answers(files, kind))
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


def question_answers(files: Iterable[tuple[str, Path]], kind: str = "") -> Iterator[tuple[str, str]]:
    """For each public function and class of `files` (path within the library, where it lies) what is asked and
    answered; of "" the first paragraph of its docstring, as the answer to what it does. No question comes twice."""
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
        for question, answer in _within(tree, module, kind):
            if question not in asked and len(answer) >= SHORTEST and len(question) <= LONGEST_QUESTION:
                asked.add(question)
                yield question, answer


def _within(holder: ast.Module | ast.ClassDef, name: str, kind: str) -> Iterator[tuple[str, str]]:
    for node in holder.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        path = f"{name}.{node.name}"
        paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(ast.get_docstring(node) or ""))
        first, *others = (" ".join(paragraph.split()) for paragraph in paragraphs)
        if isinstance(node, ast.ClassDef):
            yield from _within(node, path, kind)
        if kind == KNOWLEDGE:
            yield f"What else is there to know of `{path}`?", "\n".join(others)
        elif isinstance(node, ast.ClassDef):
            if not kind:
                yield f"What is the class `{path}` for?", first
        elif not kind:
            yield f"What does `{path}({ast.unparse(node.args)})` do?", first
        elif first:
            node.body = node.body[1:] or [ast.Pass()]  # the answer would begin with what is asked
            yield f"Write `{node.name}` of {name}. {first}", ast.unparse(node)
