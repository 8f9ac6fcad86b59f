"""What may be run, in words: the shipped experiment files, and one of them with every key and its value."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.experiments.config import SHIPPED, find, get, known_variants, leaves, unread
from jaxup.progress import printable

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def listed() -> str:
    """The shipped files, each with the first line of its docstring and its variants."""
    files = {file.name: file for folder in SHIPPED for file in sorted(folder.glob("*.py"))}
    width = max(map(len, files), default=0) + 2
    lines = ["experiments, as --config=FILE[:VARIANT,VARIANT=VALUE,...]:", ""]
    for name, file in files.items():
        words = ", ".join(known_variants(str(file)))
        lines += [f"  {name:<{width}}{docstring(file).partition(chr(10))[0]}"]
        lines += textwrap.wrap(words, 110, initial_indent=" " * (width + 2), subsequent_indent=" " * (width + 2))
    return "\n".join([
        *lines, "",
        "`jaxup train --config=FILE[:VARIANT] --help` says what one does, with its variants, and every key and value.",
        "`jaxup train --config=FILE[:VARIANT] --config.KEY=VALUE` runs it; `jaxup resume RUN` goes on with a run.",
    ])  # fmt: skip


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_bytes())) or ""


def described(config: ConfigDict, spec: str = "") -> str:
    """The docstring of the file that `spec` names, if any, and each key with its value and meaning."""
    values, about = config.to_dict(), comments(config.get("experiment", ""))
    lines = [docstring(find(spec.partition(":")[0])), ""] if spec else []
    lines += ["Every key with its value here, as --config.KEY=VALUE:", ""]
    shown, last = dict(sorted(leaves(values), key=lambda leaf: leaf[0].rpartition("."))), ""
    width = min(max(len(f"{key}={as_text(value)}") for key, value in shown.items()), 44)
    for key, value in shown.items():
        section = key.rpartition(".")[0]
        if section != last and section in about:
            lines += textwrap.wrap(f"{section}: {about[section]}", 116, initial_indent="  ", subsequent_indent="    ")
        last = section
        notes = [about[key]] if key in about else []
        if why := unread(config, key):
            other, _ = why
            notes.append(f"(not read: {other}={as_text(get(config, other))})")
        lines.append(f"  {f'{key}={as_text(value)}':<{width}}  {'  '.join(notes)}".rstrip())
    return printable("\n".join(lines))


def as_yaml(config: ConfigDict) -> str:
    """All of it, in few lines."""
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(config.to_dict())), sort_keys=False, default_flow_style=None)


def as_text(value: Any) -> str:
    """As it may be given on the command line."""
    return printable(",".join(map(str, value)) if isinstance(value, tuple) else value, keep="")


def comments(kind: str) -> dict[str, str]:
    """What stands beside keys and sections in `defaults.py`, whose source is where it is said once."""
    from jaxup.experiments import defaults

    found: dict[str, dict[str, str]] = {}  # by function, then key
    calls: dict[str, list[tuple[str, str]]] = {}  # a section, and the function that makes it
    name, above = "", ""
    for line in inspect.getsource(defaults).splitlines():
        if match := re.match(r"def (\w+)", line):
            name = match[1]
        elif match := re.match(r" {4}# (.*)", line):
            above = f"{above} {match[1]}".strip()
            continue
        elif match := re.match(r" {4}c\.([\w.]+?)(?: = |\.update\()(.*?)(?:  # (.*))?$", line):
            key, value, beside = match.groups()
            if said := beside or above:
                before = found.setdefault(name, {})
                before[key] = f"{before[key]} {said}" if key in before else said
            if call := re.fullmatch(r"(\w+)\(\)", value):
                calls.setdefault(name, []).append((key, call[1]))
        above = ""

    def of(name: str) -> dict[str, str]:
        made = dict(found.get(name, {}))
        for section, function in calls.get(name, ()):
            made = {f"{section}.{key}": said for key, said in of(function).items()} | made
        return made

    own = defaults.SECTIONS.get(kind)
    return (of(own.__name__) if own else {}) | of("defaults")
