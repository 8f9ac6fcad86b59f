"""Rooms import only from the rooms above them in CONTRIBUTING.md; and types are checked while tests run."""

import ast
import inspect
import re
from pathlib import Path

import jaxtyping
import pytest
import typed

ROOT = Path(__file__).parent.parent


def imported(path):
    """The modules and names of jaxup that a file takes from anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_from_those_above_them():
    rows = re.findall(r"^\| (`[\w./` ]+`) \|", (ROOT / "CONTRIBUTING.md").read_text().partition("## What to")[0], re.M)
    floor = {Path(name).stem: number for number, row in enumerate(rows) for name in re.findall(r"`([\w./]+)`", row)}
    files = [path for path in (ROOT / "jaxup").rglob("*.py") if path != ROOT / "jaxup" / "__init__.py"]
    rooms = {path: path.relative_to(ROOT / "jaxup").parts[0].removesuffix(".py") for path in files}
    assert set(rooms.values()) == floor.keys()
    wrong = []
    for path, room in rooms.items():
        for name in imported(path):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top == "jaxup" and other in floor and floor[other] > floor[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_what_is_defined_anew_at_each_call_is_checked_at_each():
    """Functions inside of others share what checks them, and nothing else: see `typed`."""

    def outer(factor, answer=0):
        @typed.jaxtyped(typechecker=typed.check)
        def inner(x: int, plus: int = factor) -> int:
            return str(x) if x < 0 else inner(x - 1) + 1 if x else factor + plus + answer

        return inner

    first, second = outer(1), outer(10, answer=5)
    assert (first(2), second(2), first(0, plus=3), second(0)) == (4, 27, 4, 25)
    assert inspect.signature(second).parameters["plus"].default == 10
    for function in (first, second):
        with pytest.raises(jaxtyping.TypeCheckError, match="checking the parameters"):
            function("2")
        with pytest.raises(jaxtyping.TypeCheckError, match="checking the return value"):
            function(-1)
    assert (first(1), second(1)) == (3, 26)
