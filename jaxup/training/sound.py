"""Which checkpoints are what was written: each has the digests of its files.

A step is `directory/STEP/`, which Orbax names so once all of it is written; in a bucket, where nothing can be renamed,
it writes `commit_success.txt` into it last. Its digests (`jaxup_digests.json` in it) are written after that, in the
background. A step whose files are those of its digests is sound, and the newest sound one is restored. Newer ones that
are damaged are set aside as `STEP.damaged`, where they neither are in the way of the next checkpoint of that step nor
count among those that are kept.

A step without digests was written by a process that was killed right then, or by an earlier version: nothing speaks
against it and nothing for it. The newest of those is restored only where no step is sound, which is said. Else it is a
save that was not finished, and removed: training from the sound step before makes the same one again.
"""

from __future__ import annotations

from pathlib import Path

from jaxup.errors import UserError
from jaxup.files import manifest
from jaxup.files.bucket import remove
from jaxup.progress import say
from jaxup.text import remote

DIGESTS = "jaxup_digests.json"
UNTOLD = "it has no digests: its save was not finished, or an earlier version made it"
_FINISHED = "_CHECKPOINT_METADATA"  # a file that every checkpoint of Orbax has
_COMMITTED = "commit_success.txt"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names that Orbax gives to what it has not finished


def steps_in(directory: Path) -> list[int]:
    """Of all checkpoints there, the oldest first."""
    if remote(directory):
        found = {path.parent.name for file in (_COMMITTED, DIGESTS) for path in directory.glob(f"*/{file}")}
    else:
        found = {path.name for path in directory.glob("*") if path.is_dir()}
    return sorted(int(name) for name in found if name.isdecimal())


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; "" if it is what was written, None if nothing tells: it has no digests."""
    if (checkpoint / DIGESTS).exists():
        return next((f"{file} {fault}" for file, fault in manifest.faults(checkpoint, name=DIGESTS)), "")
    finished = checkpoint / (_COMMITTED if remote(checkpoint) else _FINISHED)
    return None if finished.exists() else "it is no finished checkpoint"


def newest_sound(directory: Path) -> tuple[int | None, dict[int, str]]:
    """The step to restore, and what is wrong with the newer ones; None if there are steps and none can be."""
    faults: dict[int, str] = {}
    untold = None
    for step in reversed(steps_in(directory)):
        fault = fault_of(directory / str(step))
        if fault == "":
            return step, faults
        if fault is None:
            fault = UNTOLD
            untold = step if untold is None else untold
        faults[step] = fault
    if untold is None:
        return None, faults
    say(f"warning: {directory}/{untold}: {faults[untold]}; it is taken as it is, for want of one that has")
    return untold, {step: fault for step, fault in faults.items() if step > untold}


def check_sound(checkpoint: Path, advice: str) -> None:
    """UserError for a checkpoint that is damaged; a warning for one of which nothing tells."""
    fault = fault_of(checkpoint)
    if fault:
        raise UserError(f"this checkpoint is damaged: {fault}", at=str(checkpoint), hint=advice)
    if fault is None:
        say(f"warning: {checkpoint}: it has no digests that would tell whether it is what was written")


def set_aside(directory: Path) -> int | None:
    """Leaves the newest step that can be restored as the newest that is there, and gives it, None if there is none;
    UserError if there are steps and none can be. What a killed writer left is removed."""
    step, faults = newest_sound(directory)
    if step is None and faults:
        newest, fault = next(iter(faults.items()))
        hint = f"bring its files back from a copy, or remove {directory} to begin this model again"
        raise UserError(f"no checkpoint here can be restored: of step {newest}, {fault}", at=str(directory), hint=hint)
    for newer, fault in faults.items():
        path, aside = directory / str(newer), directory / f"{newer}.damaged"
        if fault == UNTOLD:
            remove(path)
        else:
            remove(aside)
            path.rename(aside)
        what = "removed" if fault == UNTOLD else f"set aside as {aside.name}"
        say(f"warning: {path}: {fault}; {what}, and step {step} is taken")
    steps = {str(one) for one in steps_in(directory)}
    for path in list(directory.glob("*")):
        if _UNFINISHED in path.name or (remote(path) and path.name.isdecimal() and path.name not in steps):
            remove(path)
    return step
