"""Rooms import only from the rooms above them in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

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
