"""The models of a run directory, finished or not: found, and read back from their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxup import devices
from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError, suggest
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params, abstract
from jaxup.model.spec import flatten, unflatten
from jaxup.progress import say
from jaxup.text import misfit, read_json
from jaxup.training.checkpoint import partial_load, quietly, restoring
from jaxup.training.lora import LoraConfig
from jaxup.training.run import ABOUT
from jaxup.training.rundir import FORMAT
from jaxup.training.selection import TrainConfig, select
from jaxup.training.sound import check_sound, newest_sound, steps_in

# Kinds of models that a run is for: the deepest is exported unless another is named.
MADE = ("target", "healed", "taught", "learned", "organism", "model")


class Stored(NamedTuple):
    """What `checkpoints/NAME/model.json` holds."""

    kind: str  # see jaxup.training.run.Result
    model: ModelConfig
    store: str  # of the tokens, with the tokenizer
    plan: DepthPlan | None
    dtypes: dict[str, str]  # by path; float32 where none is given
    healed: dict[str, Any] | None  # of a model of whose parameters some trained: the rest, and which


def parse(model: str) -> tuple[str, int | None]:
    """NAME or NAME/STEP as both."""
    name, slash, step = model.partition("/")
    if slash and not step.isdecimal():
        raise UserError(f"{step!r} is no step", hint="after the model, such as healed/100")
    return name, int(step) if slash else None


def choose(run: Path, name: str | None, step: int | None) -> tuple[str, int, Stored]:
    """A model of the run, of which a checkpoint is there, the step and what is known of it; None as for `export`."""
    steps = _checkpoints(run)
    if name is None:
        made = {n: stored for n in steps if (stored := read_stored(run, n)).kind in MADE}
        if not made:
            raise UserError(f"{run}: no target yet; choose with --model among {', '.join(steps)}")
        name = max(made, key=lambda n: made[n].model.num_layers)
    elif name not in steps:
        raise UserError(f"{run}: no checkpoints of a model {name!r}{suggest(name, steps)}")
    if step is None:
        step = _newest(run / "checkpoints" / name)
    elif step not in steps[name]:
        raise UserError(f"{run}: no checkpoint of {name} at step {step}; there are {', '.join(map(str, steps[name]))}")
    else:
        check_sound(run / "checkpoints" / name / str(step), "choose another step")
    return name, step, read_stored(run, name)


def read_stored(run: Path, name: str) -> Stored:
    path = run / "checkpoints" / name / "model.json"
    again = "the command that made the run writes it when it is given again"
    about = read_json(path, ABOUT, f"delete it: {again}")
    if about is None:
        raise UserError(f"is not there; {again}", at=str(path))
    try:
        if (format := about.get("format") or 1) > FORMAT:
            raise UserError(f"format {format}, and {FORMAT} is the newest that it knows")
        if "before" in about and (wrong := misfit(about, _HEALED) or _misplaced(name, about["before"])):
            raise UserError(wrong)
        return Stored(
            about.get("kind") or name.partition("_")[0],  # of format 1 the name says it: target_3, control_2x, healed
            ModelConfig.from_dict(about["model"]), about["store"],
            None if about["plan"] is None else DepthPlan.from_yaml(about["plan"]), about.get("dtypes") or {},
            about if "before" in about else None,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"not what this version of jaxup writes: {error}", at=str(path)) from None


# What model.json says of a model that healing left some of unchanged.
_HEALED = {"before": str, "train": TrainConfig, "lora": LoraConfig, "seed": int}


def _misplaced(name: str, before: str) -> str:
    return "" if before == Path(before).name != name else f"before={before[:80]!r} is no other model of the run"


def _checkpoints(run: Path) -> dict[str, list[int]]:
    """The steps of every model that has a checkpoint."""
    found = {}
    for directory in sorted((run / "checkpoints").iterdir()):
        if steps := steps_in(directory):
            found[directory.name] = steps
    if not found:
        raise UserError(f"{run}: this run has no checkpoints yet")
    return found


def _newest(directory: Path) -> int:
    """The newest step that can be restored. Nothing is set aside: the run may be going on."""
    step, faults = newest_sound(directory)
    for newer, fault in faults.items():
        say(f"warning: {directory}/{newer}: {fault}" + ("" if step is None else f"; step {step} is taken"))
    if step is None:
        raise UserError(f"{directory}: no checkpoint here can be restored")
    return step


def restore(run: Path, name: str, step: int, stored: Stored) -> Params:
    """The model's params as numpy arrays, each in the dtype it is stored in."""
    healed = stored.healed
    if healed is None or stored.plan is None:
        flat = flatten(abstract(stored.model)[1])
        flat = {path: leaf.update(dtype=stored.dtypes.get(path, leaf.dtype)) for path, leaf in flat.items()}
        return _read(run, name, step, unflatten(flat))
    # What trained, in the place it has in the model before healing.
    selection = select(
        stored.model, stored.plan, TrainConfig(**{**healed["train"], "rates": {}}), LoraConfig(**healed["lora"]),
        compute=Compute(), seed=healed["seed"],
    )  # fmt: skip
    before = healed["before"]
    with devices.host():  # it need not fit into an accelerator
        trained = _read(run, name, step, selection.trained(abstract(stored.model)[1]))
        check_sound(run / "checkpoints" / before / "0", "the command that made the run builds it again")
        params = selection.merge(trained, restore(run, before, 0, read_stored(run, before)._replace(healed=None)))
        return jax.tree.map(np.asarray, params)


def _read(run: Path, name: str, step: int, wanted: Params) -> Params:
    """Params like `wanted` as numpy arrays: no device is needed, however many the run had. The run may be going on."""
    path = run / "checkpoints" / name / str(step)
    arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
    with quietly(), partial_load(), restoring(str(path), "choose another step"):
        return ocp.load(path.resolve(), {"params": arrays})["params"]
