"""The cells of a study: what is compared, each a configuration that differs from the study's in a few keys.

They are bundles that a configuration names, axes whose values are combined, or both: then each bundle is combined with
each value. All that a run of a cell needs is in the study's configuration once its axes have been made into cells.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxup.errors import UserError, suggest, within
from jaxup.experiments.config import get, leaves, override, read

if TYPE_CHECKING:
    from ml_collections import ConfigDict

ALONE = "run"  # the only cell of a study that has nothing but seeds
_VARIANT = "variant"  # the axis of the experiment file's own variants
_LONGEST = 80  # characters of a name
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")
_OWN = ("experiment", "seed")  # what all cells have in common, or what the study says

Cell = dict[str, Any]  # dotted key -> value


def expand(config: ConfigDict, variant: Callable[[str], ConfigDict]) -> None:
    """Makes cells of the axes of `config.study`; UserError, before anything is made, if they are too many.

    Args:
      variant: the configuration of the same file with one more variant, by its word.
    """
    if "study" not in config:
        return
    s = config.study
    s.seeds = _seeds(s.seeds)
    with within("study.axes"):
        axes = _parse(s.axes)
        for key in axes:
            _allowed(key)
    bundles = {str(name): _bundle(config, name, cell) for name, cell in s.cells.items()}
    if not axes and not bundles:
        s.cells = {ALONE: {}} if s.seeds else {}
        return
    count = max(1, len(bundles)) * math.prod(map(len, axes.values())) * max(1, len(s.seeds))
    if count > s.max_cells:
        raise _too_many(config, count)
    with within("study.axes"):
        names = _short([key for key in axes if key != _VARIANT])
        values = [
            [_of_variant(config, word, variant) if key == _VARIANT else _value(config, names[key], key, word)
             for word in words]
            for key, words in axes.items()
        ]  # fmt: skip
    cells: dict[str, Cell] = {}
    for (bundle, own), *chosen in itertools.product(bundles.items() or [("", {})], *values):
        name = _safe(",".join(filter(None, [bundle, *(label for label, _ in chosen)])))
        cell: Cell = dict(own)
        for _, part in chosen:
            if twice := [key for key in part if key in cell and cell[key] != part[key]]:
                raise UserError(f"cell {name!r} says {twice[0]} twice", at="study.axes")
            cell |= part
        if name in cells:
            raise UserError(f"cell {name!r} is there twice", at="study.axes", hint="leave one of them out")
        cells[name] = cell
    s.cells, s.axes = cells, ""


def check(config: ConfigDict, files: Sequence[Mapping[str, Any]] | None) -> None:
    """UserError for cells that cannot be, as far as a configuration says; `files`: see `config.change`."""
    if "study" not in config or not config.study.cells:
        return
    s = config.study
    if s.control and s.control not in s.cells:
        raise UserError(f"is no cell{suggest(s.control, s.cells)}", at=f"study.control={s.control}")
    also(config)
    if (count := len(s.cells) * max(1, len(s.seeds))) > s.max_cells:
        raise _too_many(config, count)
    seen: dict[str, str] = {}
    for name, cell in s.cells.items():
        made = configured(config, name)
        with within(f"cell {name!r}"):
            read(made, list(cell), None if files is None else [*files, config.to_dict()])
        said = json.dumps(made.to_dict(), sort_keys=True)
        if (other := seen.setdefault(said, name)) != name:
            raise UserError(f"{other!r} and {name!r} are the same", at="study", hint="leave one of them out")


def configured(config: ConfigDict, name: str, seed: int | None = None) -> ConfigDict:
    """The configuration of a cell, as of any run; `seed`: None = that of the study's configuration."""
    from jaxup.experiments.defaults import study

    made = copy.deepcopy(config)
    made.study = study()
    with made.unlocked():  # a variant may have settings of its own
        for key, value in config.study.cells[name].items():
            *sections, last = key.split(".")
            node = made
            for section in sections:
                node = node[section]
            with node.unlocked():
                node[last] = value
    made.seed = made.seed if seed is None else seed
    made.lock()
    return made


def again(config: ConfigDict, changed: Sequence[str]) -> None:
    """Of a study that is there, whose axes are cells; `changed`: the keys that are others now."""
    if "study" not in config:
        return
    for key in ("study.axes", "study.cells"):
        if key in changed:
            hint = "the same command with more values, cells or seeds adds them"
            raise UserError("goes with --config, and not with a study that is there", at=key, hint=hint)
    config.study.seeds = _seeds(config.study.seeds)
    check(config, None)


def seeds(config: ConfigDict) -> tuple[int, ...]:
    """Those that each cell has a run of."""
    return tuple(config.study.seeds) or (config.seed,)


def also(config: ConfigDict) -> list[tuple[str, str]]:
    """Pairs of cells to compare, besides each with the control."""
    found = []
    for pair in config.study.also:
        cell, colon, other = (part.strip() for part in str(pair).partition(":"))
        if unknown := [name for name in (cell, other) if name not in config.study.cells]:
            what = f"{unknown[0]!r} is no cell{suggest(unknown[0], config.study.cells)}"
            raise UserError(what, at=f"study.also={pair}", hint="" if colon else "two cells with a colon between them")
        found.append((cell, other))
    return found


def _parse(text: str) -> dict[str, list[str]]:
    """`KEY: VALUE VALUE; KEY: ...`; quotes keep spaces and semicolons."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";")
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise UserError(f"{text!r}: {error}", hint='such as "batch_size: 8 16; seed: 0"') from None
    axes: dict[str, list[str]] = {}
    for end, group in itertools.groupby(words, lambda word: set(word) == {";"}):
        if end:
            continue
        first, *values = group
        key, colon, value = first.partition(":")
        values = [value] * bool(value) + values
        if not colon or not key or not values:
            what = f"{' '.join([first, *values])!r} is no axis"
            raise UserError(what, hint='an axis is a key, a colon and values: "batch_size: 8 16"')
        if key in axes:
            raise UserError(f"{key!r} is there twice")
        if repeated := [value for value in values if values.count(value) > 1]:
            raise UserError(f"{key}: {repeated[0]} is there twice")
        axes[key] = values
    return axes


def _allowed(key: str) -> None:
    if key == "seed":
        raise UserError("seed is no axis", hint="study.seeds says which seeds each cell has")
    if key in _OWN or key.partition(".")[0] == "study":
        raise UserError(f"{key} is the same in all cells")


def _bundle(config: ConfigDict, name: Any, cell: Any) -> Cell:
    """What a file says of a cell."""
    with within(f"study.cells: {name!r}"):
        if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST:
            raise UserError("is a directory's name, too", hint="letters, digits and any of _.,=+- may be in it")
        if not isinstance(cell, Mapping):
            raise UserError(f"has keys with their values, and not {cell!r}")
        trial = copy.deepcopy(config)
        for key, value in leaves(cell):
            _allowed(key)
            override(trial, key, value)
        return {key: get(trial, key) for key, _ in leaves(cell)}


def _seeds(given: Any) -> tuple[int, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError("is a tuple of whole numbers, such as (0, 1, 2)", at=f"study.seeds={given!r}")
    try:
        found = tuple(int(str(seed)) for seed in given)
    except ValueError:
        raise UserError("are whole numbers", at=f"study.seeds={','.join(map(str, given))}") from None
    if any(seed < 0 for seed in found) or len(set(found)) < len(found):
        raise UserError("each is there once, and not negative", at=f"study.seeds={','.join(map(str, found))}")
    return found


def _value(config: ConfigDict, label: str, key: str, word: str) -> tuple[str, Cell]:
    """A value of an axis, with its name."""
    trial = copy.deepcopy(config)
    override(trial, key, word)
    value = get(trial, key)
    return f"{label}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}", {key: value}


def _of_variant(config: ConfigDict, word: str, variant: Callable[[str], ConfigDict]) -> tuple[str, Cell]:
    """What a variant says that the configuration does not."""
    ours, theirs = dict(_outside(config)), dict(_outside(variant(word)))
    if gone := [key for key in ours if key not in theirs]:
        raise UserError(f"variant {word!r} has no {gone[0]}, and the study has it", hint="give it a value there")
    cell = {key: value for key, value in theirs.items() if key not in ours or ours[key] != value}
    for key in _OWN:
        if key in cell:
            raise UserError(f"variant {word!r} has another {key}, which is the same in all cells")
    return word, cell


def _outside(config: ConfigDict) -> Iterator[tuple[str, Any]]:
    return (leaf for leaf in leaves(config.to_dict()) if not leaf[0].startswith("study."))


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Of each key as many of its last parts as tell it from the others."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found[key] = next(e for e in ends if sum(f".{other}".endswith(f".{e}") for other in keys) == 1 or e == key)
    return found


def _safe(name: str) -> str:
    """As the name of a directory."""
    safe = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", name).lstrip(".,=+-").rstrip("_") or "_"
    if safe == name and len(safe) <= _LONGEST:
        return safe
    # What was taken out may be all that it differs in.
    return f"{safe[: _LONGEST - 7]}_{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"


def _too_many(config: ConfigDict, count: int) -> UserError:
    """With what so many runs take, if the configuration says it."""
    steps, batch, length = config.get("steps", 0), config.get("batch_size", 0), get(config, "data.seq_len") or 0
    tokens = count * steps * batch * length
    each = f", each of about {steps:,} steps of {batch} rows of {length} tokens: {tokens:,} tokens" if tokens else ""
    hint = "fewer axes, values, cells or seeds make fewer, and a larger study.max_cells allows them"
    return UserError(f"{count:,} runs{each}", at=f"study.max_cells={config.study.max_cells}", hint=hint)
