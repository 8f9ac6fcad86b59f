"""Damage as disks, interrupted copies and people do it: one file of a directory, chosen and changed by a seed.

And disks that are full, and file systems that cannot be written.
"""

import builtins
import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
from pathlib import Path
from unittest import mock

from runs import metrics

KINDS = ("flip", "truncate", "delete", "zero", "swap", "add")


def files(directory, skip=()):
    """All files below, sorted, but those whose name is in `skip`."""
    return sorted(p for p in Path(directory).rglob("*") if p.is_file() and p.name not in skip)


def damage(directory, seed, kinds=KINDS, skip=()):
    """Damages one file below `directory` and returns what was done, in words. Every second one is drawn by its size.

    Where a kind of damage would change nothing, such as the truncation of an empty file, the file is deleted.
    """
    rng, found = random.Random(seed), files(directory, skip)
    weights = [path.stat().st_size for path in found] if rng.random() < 0.5 else [1] * len(found)
    (path,), kind = rng.choices(found, weights), rng.choice(kinds)
    content, name = path.read_bytes(), path.relative_to(directory)
    twins = [p for p in found if p.suffix == path.suffix and p.read_bytes() != content]
    if kind == "flip" and content:
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        return f"bit {bit} of byte {at} of {len(content)} of {name} flipped"
    if kind == "truncate" and content:
        path.write_bytes(content[: (at := rng.randrange(len(content)))])
        return f"{name} truncated from {len(content)} to {at} bytes"
    if kind == "zero" and content.strip(b"\0"):
        at = rng.randrange(len(content))
        zeroed = content[:at] + bytes(len(content[at : at + 512])) + content[at + 512 :]
        path.write_bytes(zeroed if zeroed != content else bytes(len(content)))
        return f"{name} zeroed from byte {at} of {len(content)}"
    if kind == "swap" and twins:
        shutil.copyfile(twin := rng.choice(twins), path)
        return f"{name} replaced by {twin.relative_to(directory)}"
    if kind != "add":
        os.remove(path)
        return f"{name} deleted"
    path = rng.choice([p for p in found if p.parent != Path(directory)] or found)  # where it is most among others
    added = path.with_name(f"{path.name}.{seed}")
    added.write_bytes(content)
    return f"{added.relative_to(directory)} added"


def stop_early(run):
    """Makes of a finished run one that has stopped at step 6 of its second model, an older checkpoint beside it."""
    target = run / "checkpoints" / "target_2"
    for gone in (target / "8", target.with_name("control"), run / "export"):
        shutil.rmtree(gone, ignore_errors=True)
    (target / "result.json").unlink()
    log = [r for r in metrics(run) if r["model"] == "reference" or (r["model"] == "target_2" and r["step"] <= 6)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in log))


@contextlib.contextmanager
def full_at(size):
    """No file of this process can grow beyond `size` bytes: what a full disk is to what writes them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only(directory):
    """What Python's own functions would make below `directory` they refuse, as on a file system mounted read-only."""
    below = f"{os.path.abspath(directory)}{os.sep}"

    def refusing(real, writes):
        def call(path, *args, **options):
            place = "" if isinstance(path, int) else f"{os.path.abspath(path)}{os.sep}"
            if place.startswith(below) and writes(*args, **options):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
            return real(path, *args, **options)

        return call

    to_file = lambda mode="r", *_, **__: not {*mode}.isdisjoint("wax+")  # noqa: E731
    to_number = lambda flags=0, *_, **__: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))  # noqa: E731
    always = lambda *_, **__: True  # noqa: E731
    places = [(builtins, "open", to_file), (io, "open", to_file), (os, "open", to_number)]
    places += [(os, name, always) for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "symlink")]
    with contextlib.ExitStack() as stack:
        for module, name, writes in places:
            stack.enter_context(mock.patch.object(module, name, refusing(getattr(module, name), writes)))
        yield
