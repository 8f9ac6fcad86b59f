"""A run's second start: what of its configuration may have changed, whether anything is left to do, `--resume`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.errors import UserError
from jaxup.experiments.cells import again
from jaxup.experiments.config import change, get, unread
from jaxup.files.names import nearest_path
from jaxup.text import read_json
from jaxup.training import rundir

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_ABSENT = "(absent)"
_INPUTS = "delete it if data and models are those that the run began with"


@dataclasses.dataclass
class _Start:
    time: float
    command: str


_STARTS = {"starts": list[_Start] | None}


def load_run(directory: Path, overrides: Iterable[tuple[str, str]] = ()) -> tuple[ConfigDict, str]:
    """The configuration of the run in `directory`, with `overrides`, and its title; UserError if there is no run."""
    stored = rundir.read_config(directory, "--resume takes the directory of a run")
    if stored is None:
        hint = nearest_path(str(directory)) or "begin one with --config"
        raise UserError("no run there (no config.json)", at=f"--resume={directory}", hint=hint)
    config = as_config(_tuples(stored))
    overrides = list(overrides)
    change(config, overrides, None)
    again(config, [key for key, _ in overrides])
    title = (read_json(directory / "inputs.json", {"title": str | None}, _INPUTS) or {}).get("title")
    return config, title or directory.resolve().name


def as_config(values: dict[str, Any]) -> ConfigDict:
    """Of what a run has stored, with the defaults of keys that are newer."""
    from ml_collections import ConfigDict

    from jaxup.experiments.defaults import defaults

    values = _complete(values, defaults(values.get("experiment", ""), small=True).to_dict())
    config = ConfigDict({key: value for key, value in values.items() if key != "study"})
    config.study = ConfigDict(values["study"], convert_dict=False)
    config.lock()
    return config


def check_config(directory: Path, config: ConfigDict) -> list[str]:
    """What of the configuration has changed since the run in `directory` began, a line each.

    UserError if that decides the numbers, or the directory holds something else.
    """
    from jaxup.experiments.defaults import COUNTS, MAY_CHANGE

    stored = rundir.read_config(directory)
    if stored is None:
        return []
    now = json.loads(json.dumps(config.to_dict()))
    said, refused = _cells_changed(stored, now, directory)
    for key, old, new in differences(stored, now):
        line = f"{key} was {old!r}, now {new!r}"
        free = next((name for name in (key, key.rpartition(".")[0]) if name in MAY_CHANGE), None)
        if unread(stored, key) and unread(now, key):
            continue  # files of another version may leave out what nothing read
        if old == _ABSENT and any(new == default for default in _defaults(config, key)):
            continue  # the key is newer than the run
        if free:
            said.append(f"{line}{f': {MAY_CHANGE[free]}' if MAY_CHANGE[free] else ''}")
        elif key not in COUNTS:
            refused.append(line)
        elif config.optimizer.schedule != "constant":
            refused.append(f"{line} (which goes with optimizer.schedule=constant)")
        else:  # how many steps that are the data will say
            said.append(line)
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise UserError(
            f"{directory}: holds a run of another configuration: {'; '.join(refused[:3])}{more}; "
            f"choose another --workdir, or give the same configuration to resume (--resume={directory} has it)"
        )
    return said


def _cells_changed(stored: dict[str, Any], now: dict[str, Any], directory: Path) -> tuple[list[str], list[str]]:
    """Takes the cells out of both: there may be others than there were, and each is what it was."""
    then, cells = (values.setdefault("study", {}).pop("cells", {}) for values in (stored, now))
    if bool(then) != bool(cells):
        what, other = ("a study", "one run") if then else ("one run", "a study")
        raise UserError(f"holds {what}, and not {other}", at=str(directory), hint="choose another --workdir")
    said = [f"cell {name!r} is new" for name in cells if name not in then]
    said += [f"cell {name!r} is left out" for name in then if name not in cells]
    both = [name for name in cells if name in then and cells[name] != then[name]]
    return said, [f"cell {name!r} was {then[name]}, now {cells[name]}" for name in both]


def begin(directory: Path, config: ConfigDict, inputs: dict[str, str | int], title: str, command: str) -> None:
    """Writes config.json, and `inputs`, which identify what it only names; refuses to go on with others.

    Beside them it keeps when and by which `command` the run was started, each time.
    """
    check_config(directory, config)  # again, by the one who holds the lock
    stored = check_inputs(directory, config, inputs)
    rundir.clean(directory)
    rundir.write_json(directory / "config.json", config.to_dict())
    starts = [*((stored or {}).get("starts") or []), {"time": time.time(), "command": command}]
    rundir.write_json(directory / "inputs.json", inputs | {"title": title, "starts": starts})


def check_inputs(directory: Path, config: ConfigDict, inputs: dict[str, str | int]) -> dict[str, Any] | None:
    """Those that the run in `directory` began with, if there is one; UserError if they are others.

    Of "steps" there may be more than there were, under a constant schedule; see `check_config`.
    """
    kinds = {key: type(now) | None for key, now in inputs.items()}
    stored = read_json(directory / "inputs.json", kinds | _STARTS, _INPUTS)
    if stored is not None:
        numbers = {key: (stored[key], now) for key, now in inputs.items() if isinstance(now, int) and key in stored}
        for key, (then, now) in numbers.items():
            if now < then or (now > then and (key != "steps" or config.optimizer.schedule != "constant")):
                hint = "there may be more, and not fewer" if key == "steps" else f"--config.{key}={then} keeps it"
                raise UserError(f"{key} was {then}, now {now}", at=str(directory), hint=hint)
        texts = [key for key, now in inputs.items() if isinstance(now, str)]
        if differing := [key for key in texts if stored.get(key) != inputs[key]]:
            raise UserError(
                f"{directory}: this run was begun with {' and '.join(f'another {key}' for key in differing)}: "
                "put back what it was, or choose another --workdir"
            )
    return stored


def starts(directory: Path) -> list[dict[str, Any]]:
    """The "time" (of `time.time`) and the "command" of each; none of runs from before they were kept."""
    return (read_json(directory / "inputs.json", _STARTS, _INPUTS) or {}).get("starts") or []


def finish(directory: Path, config: ConfigDict, models: list[str], scored: str) -> None:
    """Marks the run as finished, with these models, one of which is its result: what is written last."""
    rundir.write_json(directory / "finished.json", {"asked": _asks(config), "models": models, "scored": scored})


def scored(directory: Path) -> str:
    """The model that the result of the finished run is of; "" if it is not finished."""
    mark = read_json(directory / "finished.json", {"scored": str | None}, "delete it")
    return (mark or {}).get("scored") or ""


def finished(directory: Path, config: ConfigDict) -> list[str]:
    """A line for each model of a run that has all that `config` asks for; none if anything is left to do."""
    now = rundir.read_config(directory)
    if now is None or _asks(config) != _asks(now) or not (directory / "SUMMARY.md").exists():
        return []
    if get(config, "measure.rows") and not (directory / "measures.json").exists():
        return []
    losses = _done(directory, _asks(config))
    return [f"{name}: finished before, validation loss {loss:.4f}" for name, loss in losses.items()]


def exported(directory: Path, config: ConfigDict) -> list[str]:
    """The models of the run when it was exported, if all of them have the steps that `config` asks for."""
    from jaxup.experiments.defaults import COUNTS

    return list(_done(directory, {key: get(config, key) for key in COUNTS}))


def _done(directory: Path, asked: dict[str, Any]) -> dict[str, float]:
    """The validation loss of each model of a run that finished with what is `asked`; none if anything is gone since."""
    from jaxup.training.run import read_result

    kinds = {"asked": dict[str, Any], "models": list[str]}
    mark = read_json(directory / "finished.json", kinds, "delete it")
    if mark is None or {**mark["asked"], **asked} != mark["asked"]:
        return {}
    wanted, losses = [directory / "export"], {}
    for name in mark["models"]:
        model = directory / "checkpoints" / name
        if (result := read_result(model)) is None or not math.isfinite(result.val_loss):
            return {}
        wanted += [model / str(result.steps)] * (result.steps > 0)
        losses[name] = result.val_loss
    return losses if all(path.exists() for path in wanted) else {}


def _asks(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """What of that which may change under a run asks for more work."""
    from jaxup.experiments.defaults import COUNTS

    return {key: get(config, key) for key in (*COUNTS, "eval.rows")}


def _defaults(config: ConfigDict, key: str) -> Iterator[Any]:
    """What a key is where nothing is said of it, in JSON."""
    from jaxup.experiments.defaults import defaults
    from jaxup.model.config import ModelConfig

    if key.startswith("model."):
        family = inspect.signature(getattr(ModelConfig, config.model.family, ModelConfig)).parameters
        yield getattr(family.get(key.removeprefix("model.")), "default", _ABSENT)
    for small in (False, True):
        yield json.loads(json.dumps(get(defaults(config.experiment, small=small).to_dict(), key)))


def differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) where two dicts of dicts differ."""
    for key in sorted(old.keys() | new.keys()):
        name, a, b = f"{prefix}{key}", old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{name}.")
        elif isinstance(b, dict) and a == _ABSENT:
            yield from differences({}, b, f"{name}.")
        elif a != b:
            yield name, a, b


def _complete(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """With what `defaults` have and `values` have not: keys that are newer than the run."""
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(values.get(key), dict):
            values[key] = _complete(values[key], default)
        values.setdefault(key, default)
    return values


def _tuples(value: Any) -> Any:
    """JSON has lists for them."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
