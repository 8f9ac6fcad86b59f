"""All that has digests in a run, a model directory or a token store, compared with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxup.errors import UserError
from jaxup.files import bucket, manifest
from jaxup.files.names import nearest_path
from jaxup.text import read_json, remote
from jaxup.training.sound import DIGESTS, fault_of

Lines = Iterator[tuple[str, bool]]  # a line, and whether it is of a damaged file


def verified(place: str) -> Lines:
    """A line for each damaged file, for each part that is what was written, and for each that has no digests.

    UserError for what is neither there nor anything that this project writes.
    """
    root = bucket.place(place)
    if "://" in place and not remote(root):
        yield from _store(place)
        return
    if not root.is_dir():
        what = "not a directory" if root.exists() else "no such directory"
        raise UserError(what, at=place, hint=nearest_path(place))
    found, todo, stores = False, [root], dict[Path, None]()
    while todo:
        directory = todo.pop(0)
        lines = list(_of(directory))
        yield from lines
        found |= bool(lines)
        if (directory / "checkpoints").is_dir():
            found = True
            yield from _run(directory, stores)
        if not lines:
            todo[:0] = sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
    for store in stores:
        if root.resolve() not in store.parents:
            yield from _store(str(store))
    if not found:
        raise UserError("neither a run, nor a model, nor a token store", at=place)


def _of(directory: Path) -> Lines:
    """Of a model, a store or a checkpoint; nothing for a directory that is none."""
    if (directory / "meta.json").exists():
        yield from _store(str(directory))
    elif (directory / manifest.NAME).exists():
        for file, fault in manifest.faults(directory):
            added = fault == manifest.ADDED  # by a user, who may
            yield (f"{directory}/{file}: no digest" if added else f"{directory}/{file}: {fault}"), not added
        yield f"{directory}: compared with {manifest.NAME}", False
    elif (directory / DIGESTS).exists():
        yield from ((f"{directory}/{file}: {fault}", True) for file, fault in manifest.faults(directory, name=DIGESTS))
        yield f"{directory}: compared with {DIGESTS}", False
    elif directory.name.isdecimal() and directory.parent.parent.name == "checkpoints":
        unfinished = fault_of(directory)
        yield f"{directory}: {unfinished or 'no digests'}", unfinished is not None
    elif (directory / "config.json").exists() and not (directory / "checkpoints").is_dir():
        yield f"{directory}: no digests", False


def _run(directory: Path, stores: dict[Path, None]) -> Lines:
    """Of a run's own small files, which have none; the stores that its models name are added to `stores`."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    yield f"{directory}: no digests of {', '.join(names)}", False
    for path in sorted((directory / "checkpoints").glob("*/model.json")):
        try:
            store = (read_json(path, {"store": str}, "delete it") or {}).get("store", "")
        except UserError as error:
            yield f"{error}", True
            continue
        if "://" in store:
            yield f"{path}: its token store is {store}, which is verified by itself", False
        elif store and Path(store).is_dir():
            stores.setdefault(Path(store).resolve())
        else:
            yield f"{path}: its token store {store} is not here", False


def _store(path: str) -> Lines:
    from jaxup.data import integrity
    from jaxup.data.store import META, Store

    try:
        store = Store(path)
        meta = store.read_json(META)
    except UserError as error:
        yield f"{path}: {error}", True
        return
    if meta is None:
        yield f"{path}: not a complete token store: no digests yet", False
        return
    yield from ((f"{path}/{file}: {fault}", True) for file, fault in integrity.faults(store, meta, whole=True))
    yield f"{path}: compared with {META}", False
