"""Whether a token store is what was written: what its meta.json must say, and a digest for each of its files.

Opening a store compares names and sizes in one listing, and digests: of all bytes where those are few, else of the
beginning of each file, so that no shard is taken for another. Inside a shard each row has a checksum of its own, which
reading it compares. `jaxup verify` compares all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import NoneType
from typing import TYPE_CHECKING, Any

from jaxup.errors import UserError
from jaxup.progress import Progress

if TYPE_CHECKING:
    from jaxup.data.store import Store

HEAD = 4096  # bytes that tell one shard from another
WHOLE = 2**30  # a local store of so many bytes is hashed whole each time: a second or so
_THREADS = 4  # enough for the disk, and for requests over a network; each holds a shard

_SPLIT = dict.fromkeys(("examples", "too_long", "untrained", "tokens", "loss_tokens", "most", "rows"), int)
_COUNTS: dict[str, Any] = dict.fromkeys(("rows", "bad", "refused", "shared"), int)
_PHASES = {"names": str, "examples": int, "rows": int}
_KINDS = {
    "source": {"spec": str, "fingerprint": str}, "tokenizer": {"spec": str, "hash": str, "vocab_size": int},
    "dtype": str, "seq_len": int, "packing": str, "marked": bool, "files": Mapping, "layouts": Mapping,
    "chat_template": (str, NoneType), "val_fraction": (float, NoneType), "seed": (int, NoneType),
    "statistics": _COUNTS | {split: {**_SPLIT, "efficiency": float} for split in ("train", "validation")},
}  # fmt: skip


def describe(store: Store) -> dict[str, list[Any]]:
    """The files of a store: name -> size, SHA-256 of all bytes, SHA-256 of the first HEAD."""
    described: dict[str, list[Any]] = {}

    def entry(name: str) -> list[Any]:
        content = store.read(name)
        return [len(content), *(hashlib.sha256(part).hexdigest() for part in (content, content[:HEAD]))]

    names = list(store.files())
    with Progress("digests", total=len(names), unit="files") as bar, ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(names, pool.map(entry, names)):
            described[name] = found
            bar.update(len(described))
    return described


def check_meta(meta: dict[str, Any]) -> str:
    """What is wrong with what a meta.json says, or "": whoever wrote it, its values are of the kinds they should be."""
    key = _misfit(meta, _KINDS)
    if key is None and meta["tokenizer"]["vocab_size"] > 2**29:
        key = "tokenizer.vocab_size"
    for entry in () if key else meta["files"].values():
        if not (isinstance(entry, list) and [type(part) for part in entry] == [int, str, str] and entry[0] >= 0):
            key = "files"
    if key is None and meta.get("phases") and not _are_phases(meta["statistics"]["train"]):
        key = "statistics.train.phases"
    return f"its {key} is missing or not what it should be" if key else ""


def _are_phases(train: dict[str, Any]) -> bool:
    """Whether what is said of the phases of all training rows can be."""
    phases = train.get("phases")
    if not isinstance(phases, dict) or any(not isinstance(phases.get(key), list) for key in _PHASES):
        return False
    kinds = all(type(one) is kind for key, kind in _PHASES.items() for one in phases[key])
    return kinds and len({len(phases[key]) for key in _PHASES}) == 1 and train["rows"] == sum(phases["rows"])


def _misfit(value: Any, wanted: Any, key: str = "") -> str | None:
    """The first key whose value is not of the type that is wanted, numbers neither negative nor beyond 64 bits."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return key
        inner = ((name, value.get(name, ...), of) for name, of in wanted.items())
        return next((bad for name, one, of in inner if (bad := _misfit(one, of, f"{key}.{name}".lstrip(".")))), None)
    good = type(value) is wanted if wanted in (int, float) else isinstance(value, wanted)
    return None if good and (wanted not in (int, float) or 0 <= value < 2**63) else key


def check(store: Store, meta: dict[str, Any]) -> None:
    """UserError naming the first file of a store that is missing, too much, or not the one that was written."""
    whole = store.local and sum(size for size, *_ in meta["files"].values()) <= WHOLE
    for name, fault in faults(store, meta, whole=whole):
        hint = "bring that file back, or delete the store"
        raise UserError(f"{store.path}/{name} {fault}", at="store", hint=hint)


def faults(store: Store, meta: dict[str, Any], *, whole: bool) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it); what a listing tells comes first. `whole`: all bytes are read."""
    files, found = meta["files"], store.files()
    for name in sorted(files.keys() | found.keys()):
        if name not in found:
            yield name, "is missing"
        elif name not in files:
            yield name, "is not a file of this store"
        elif found[name] not in (None, files[name][0]):
            yield name, f"has {found[name]:,} bytes, not {files[name][0]:,}"
    names = [name for name in found if name in files and found[name] in (None, files[name][0])]

    def differs(name: str) -> str:
        size, digest, head = files[name]
        try:
            same = store.digest(name, size if whole else min(size, HEAD)) == (digest if whole else head)
        except UserError as error:
            return f"cannot be read: {error.what}"
        return "" if same else "is not what was written: its digest is another"

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from ((name, fault) for name, fault in zip(names, pool.map(differs, names)) if fault)
