"""A recipe as files: its picture, and itself in other spellings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from jaxup.depth.picture import png
from jaxup.errors import UserError
from jaxup.recipes import mergekit
from jaxup.recipes.open import Recipe, described
from jaxup.text import write_atomically


def written(recipe: Recipe, kind: str) -> bytes:
    """The recipe as a "png", a "mergekit" recipe or a "plan" file; UserError if it cannot be said so."""
    if kind == "png":
        is_file = os.path.lexists(os.path.expanduser(recipe.name))
        return png(recipe.plan, os.path.basename(recipe.name) if is_file else recipe.name)
    if kind == "mergekit":
        names = {path: name for model in recipe.models.values() for path, name in described(model).names.items()}
        return mergekit.dump(recipe.plan, base=recipe.base, names=names).encode()
    return recipe.plan.to_yaml().encode()


def check_files(files: Mapping[str, str], *, force: bool) -> None:
    """UserError for a file that cannot be written, or that holds something; a PNG gives way to a PNG.

    `files` are by their kind, as in `written`.
    """
    paths = {kind: Path(file).expanduser() for kind, file in files.items()}
    for kind, path in paths.items():
        if path.is_dir():
            raise UserError("is a directory; give the name of a file", at=str(path))
        if not path.absolute().parent.is_dir():
            raise UserError("its directory does not exist", at=str(path))
        if os.path.lexists(path):
            if not path.is_file():
                raise UserError("is not a regular file", at=str(path))
            if not force and not (kind == "png" and _is_png(path)):
                raise UserError("exists already; choose another name, or --force to replace it", at=str(path))
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise UserError("is to be written twice", at=str([*paths.values()][-1]))


def _is_png(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8) in (b"\x89PNG\r\n\x1a\n", b"")


def write(file: str, content: bytes) -> None:
    """The file appears, or is replaced, whole; of a link, what it points to."""
    path = Path(file).expanduser().resolve()
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", at=str(path)) from None
