"""What the name of a model means: a URL, a directory, a run or one of its models, else a model of the Hub.

A run holds its models as `checkpoints/NAME/STEP/`, which are no model directories; those are `export/`, which is what
RUN means, and `models/NAME/STEP/`, where `jaxup export RUN@NAME/STEP` puts what then has this name.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path

from jaxup.errors import UserError, suggest
from jaxup.files.bucket import place
from jaxup.text import read_json, remote

SCHEMES = ("gs", "s3", "https", "http", "file")
_HUB_NAME = re.compile(r"(?!.*\.\.)[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Models of the Hub from before it had organisations.
_NAMELESS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
# What the names of files end in, and those of the Hub's models do not.
_SUFFIXES = (".json", ".yaml", ".yml", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".txt", ".zip", ".gz", ".tar")


def is_place(text: str) -> bool:
    """Whether it names something that is there, or a URL, none of which has revisions."""
    here = text.partition("://")[0] in SCHEMES or os.path.lexists(os.path.expanduser(text))
    return here or split_run(text) is not None


def split_revision(text: str) -> tuple[str, str | None]:
    """ "org/name@revision" as both; a directory or URL may have an @ in its name, and a run's model has one."""
    repo, separator, revision = text.rpartition("@")
    return (repo, revision) if separator and repo and not is_place(text) else (text, None)


# ---- runs


def split_run(text: str) -> tuple[Path, str] | None:
    """RUN, RUN@NAME or RUN@NAME/STEP as the run's directory and "", NAME or NAME/STEP; None if it is of no run."""
    path = place(text)
    if is_run(path):
        return path, ""
    before, _, model = text.rpartition("@")
    there = path.exists() if remote(path) else os.path.lexists(path)  # an @ may be in the name of anything
    return (place(before), model) if before and not there and is_run(place(before)) else None


def is_run(path: Path) -> bool:
    inside = path / "checkpoints"
    if not (inside.is_dir() if remote(inside) else os.path.isdir(inside)):
        return False
    with contextlib.suppress(UserError):  # a model may have a directory of that name beside it
        return "model_type" not in (read_json(path / "config.json", {}, "") or {})
    return True


def in_run(text: str) -> Path | None:
    """The directory of the model that RUN, RUN@NAME or RUN@NAME/STEP names; None if it is of no run.

    UserError, saying what the run has, if that model is none or is not in files.
    """
    if (found := split_run(text)) is None:
        return None
    run, model = found
    steps = _steps(run / "checkpoints")
    if not model:
        if (run / "export").is_dir():
            return run / "export"
        what = "this run has no export yet; it is written when the run finishes"
        named = ", ".join(f"{text}@{name}" for name in steps)
        raise UserError(what, at=text, hint=f"what it has so far is {named}" if named else "it has no checkpoints yet")
    name, slash, step = model.partition("/")
    made = _steps(run / "models").get(name, [])
    step = step if slash else (steps.get(name) or made or [""])[-1]
    if step in made:
        return run / "models" / name / step
    known = [*steps, *(f"{name}/{step}" for name, all in steps.items() for step in all)]
    if model not in known:
        raise UserError(f"this run has no {model}{suggest(model, known)}", at=text)
    hint = f"`jaxup export {shlex.quote(text)}` makes files of it, which this name then stands for"
    raise UserError("it is in the run's checkpoints, not in files", at=text, hint=hint)


def _steps(directory: Path) -> dict[str, list[str]]:
    """The steps of each model there, the newest last."""
    found = {model.name: [p.name for p in model.glob("*") if p.name.isdecimal()] for model in directory.glob("*")}
    return {name: sorted(steps, key=int) for name, steps in sorted(found.items()) if steps}


# ---- the Hub


def is_hub_name(text: str, suffixes: Collection[str] = ()) -> bool:
    """Whether the Hub may have something of that name, which is nothing here; else it is rather a mistyped path.

    `suffixes` are of files, beside those of models.
    """
    return _HUB_NAME.fullmatch(text) is not None and Path(text).suffix.lower() not in (*_SUFFIXES, *suffixes)


def check_hub_name(text: str, kind: str = "model", *, sure: bool = False) -> None:
    """UserError for what is rather a path than the Hub's name of a model or dataset: no network is asked for it.

    `sure`: it came with a revision or split, as what is meant for the Hub does, but models of runs do as well.
    """
    from huggingface_hub import constants

    at, near = os.path.normpath(os.path.expanduser(text)), nearest_path(text)
    if not is_hub_name(text):
        raise UserError("no such directory", at=at, hint=near)
    if (Path(constants.HF_HUB_CACHE) / f"{kind}s--{text.replace('/', '--')}").is_dir() or text in _NAMELESS:
        return
    folder = text.rpartition("/")[0]
    if runs := sorted(str(path) for path in Path(folder).glob("*") if is_run(path)) if folder else ():
        raise UserError("no such file or directory", at=at, hint=near or f"the runs there are {', '.join(runs[:8])}")
    if not sure and (near or os.path.isdir(folder)):
        hub = f"the Hub's is {text}@main" if kind == "model" else f"a split of the Hub's is {text}:train"
        hint = near and f"{near} ({hub})" if folder else near
        raise UserError("no such file or directory", at=at, hint=hint or hub)
    if kind == "model" and not folder and not sure:
        raise UserError("no such directory", at=at, hint="a model on the Hub is ORG/NAME")


def nearest_path(text: str) -> str:
    """ "did you mean 'runs/x'?" for what is there and has nearly the path `text`; "" if nothing has."""
    found, wanted = Path(), Path(os.path.expanduser(text))
    for part in wanted.parts:
        if not os.path.lexists(found / part):
            there = os.listdir(found) if os.path.isdir(found) and os.access(found, os.R_OK | os.X_OK) else []
            if not (near := difflib.get_close_matches(part, there, n=1)):
                return ""
            part = near[0]
        found /= part
    return "" if found == wanted else f"did you mean {str(found)!r}?"
