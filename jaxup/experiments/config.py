"""Experiment files: finding one, its variants, and overrides from the command line.

An experiment is a Python file with `get_config(arg: str) -> ml_collections.ConfigDict`; `arg` is
what follows the colon in `--config=FILE:ARG`. The dict is locked before overrides are applied, so
a misspelt key cannot be added by accident.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import operator
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxup.errors import ELSEWHERE, UserError, first_line, suggest, within

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from jaxup.experiments.defaults import Wanted

T = TypeVar("T")
_PACKAGE = Path(__file__).parent.parent
SHIPPED = (_PACKAGE.parent / "configs", _PACKAGE / "configs")  # in a clone, and as installed


def find(name: str, *, shipped: bool = False) -> Path:
    """The experiment file: as given, else in `configs/` here, else the shipped one, which alone `shipped` looks for."""
    path, folders = Path(name).expanduser(), SHIPPED if shipped else (Path("configs"), *SHIPPED)
    for candidate in [*([] if shipped else [path]), *(folder / path for folder in folders)]:
        for file in (candidate, Path(f"{candidate}.py")):
            if file.is_file():
                return file
    known = sorted({file.name for folder in folders for file in folder.glob("*.py")})
    raise UserError(f"no experiment file {name!r}{suggest(name, known)}", at="--config")


def load(spec: str, overrides: Iterable[tuple[str, str]] = (), *, shipped: bool = False) -> ConfigDict:
    """The locked, resolved configuration of `FILE[:VARIANT]` with `(dotted key, text)` overrides.

    An experiment file that changes a shipped one begins with `load("heal.py:VARIANT", shipped=True)`.
    """
    files: list[dict[str, Any]] = []  # what this file loads, then what it says itself
    token = _files.set(files)
    try:
        config = _read(spec, shipped)
    finally:
        _files.reset(token)
    files.append(config.to_dict())
    overrides = list(overrides)
    if (outer := _files.get()) is not None:
        change(config, overrides, files)
        outer += [*files, config.to_dict()]
        return config

    def variant(word: str) -> ConfigDict:
        """Of the same file: what an axis of a study asks for."""
        other = _read(f"{spec}{',' if ':' in spec else ':'}{word}", shipped)
        files.append(other.to_dict())
        for key, text in overrides:
            override(other, key, text)
        return other

    change(config, overrides, files, variant)
    return config


_files: ContextVar[list[dict[str, Any]] | None] = ContextVar("files", default=None)
_options: ContextVar[list[dict[str, Any]]] = ContextVar("options")  # those of each call of `variants`


def _read(spec: str, shipped: bool) -> ConfigDict:
    """What the file says."""
    from ml_collections import ConfigDict

    name, _, variant = spec.partition(":")
    path = find(name, shipped=shipped)
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} is not a Python file", at="--config")
    module = importlib.util.module_from_spec(module_spec)
    with _mistakes(path):
        module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} defines no get_config(arg)", at="--config")
    if variant and not _reads_variants(path):
        raise UserError(f"{path} reads no variants, and so not {variant!r}", at=f"--config={spec}")
    takes = inspect.signature(module.get_config).parameters
    with _mistakes(path), within(f"--config={spec}"):
        config = module.get_config(*[variant] * bool(takes))
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config returns a {type(config).__name__}, and no ConfigDict", at=str(path))
    config.lock()
    return config


@contextlib.contextmanager
def _mistakes(path: Path) -> Iterator[None]:
    """What goes wrong in a file that someone has written is said in one line, with the line in that file."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}:{error.lineno or 1}: {error.msg}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path.absolute())), 1)
        # A KeyError quotes what it says, and ml_collections lists all other keys of a section in it.
        said = error.args[0] if isinstance(error, KeyError | AttributeError) and error.args else error
        what, _, rest = str(said.args[0] if isinstance(said, KeyError) else said).partition(". Other fields")
        what = first_line(Exception(what)) + "".join(re.findall("\n(Did you mean .*)", rest)).replace("Did", "; did")
        raise UserError(f"{path}:{line}: {type(error).__name__}: {what}") from error


def _reads_variants(path: Path) -> bool:
    """Whether get_config does anything with its argument."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_config":
            names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            arguments = ast.walk(node.args)
            return any(each.arg in names for each in arguments if isinstance(each, ast.arg))
    return True  # it comes from elsewhere


def change(
    config: ConfigDict, overrides: Iterable[tuple[str, str]], files: Sequence[Mapping[str, Any]] | None,
    variant: Callable[[str], ConfigDict] | None = None,
) -> None:  # fmt: skip
    """Applies overrides to a configuration; UserError if it then says what nothing reads.

    Args:
      files: the configurations that it was made from. What they say where it is read is no mistake where it is not: a
        file that trains a base is for one that is given as well. None: a run's, where only `overrides` can be mistaken.
      variant: that of the same file by its word. Then the axes of a study become cells, which are looked at as well.
    """
    from jaxup.experiments.cells import check, expand

    named = []
    for key, text in overrides:
        override(config, key, text)
        named.append(key)
    if variant is not None:
        expand(config, variant)
    read(config, named, files)
    if variant is not None:
        check(config, files)


def read(config: ConfigDict, named: Sequence[str], files: Sequence[Mapping[str, Any]] | None) -> None:
    """UserError if the configuration says what nothing reads; `named`: the keys that someone changed. See `change`."""
    from jaxup.experiments.defaults import SAYS_NOTHING, SECTIONS, defaults

    if (kind := config.get("experiment")) not in SECTIONS:
        return  # no kind of experiment, as whoever makes one will say
    usual = [defaults(kind, small=small).to_dict() for small in (False, True)]
    wrong: dict[tuple[str, Any], list[str]] = {}  # by why nothing reads them
    for key, value in leaves(config.to_dict()):
        why = unread(config, key) if files is not None or key in named else None
        if why is None or SAYS_NOTHING.get(key) == value:
            continue
        # What has no default is what files say of a part of their own.
        said = [v for values in usual if (v := get(values, key)) is not None] or [get(of, key) for of in files or ()]
        said += [get(of, key) for of in files or () if unread(of, key) is None]
        other, wanted = why
        # Who switches an option off by name knows what goes with it.
        if value not in said and not (wanted is True and other in named):
            wrong.setdefault(why, []).append(f"{key}={value}")
    for (other, wanted), keys in wrong.items():
        at, now = ", ".join(keys[:3]) + f" and {len(keys) - 3} more" * (len(keys) > 3), get(config, other)
        here = f"nothing reads it where {other}={now}"
        if wanted is False:
            raise UserError(here, at=at, hint=f"it goes with {other}={type(now)()}")
        which = "=" + " or ".join(wanted) if isinstance(wanted, tuple) else ""
        another = "another " * isinstance(wanted, frozenset)
        raise UserError(f"goes with {another}{other}{which}", at=at, hint=here)


def unread(config: Any, key: str) -> tuple[str, Wanted] | None:
    """Why nothing reads the key: another one, and what READ_WHERE wants of it. None: it is read."""
    from jaxup.experiments.defaults import READ_WHERE, Condition

    def unmet(condition: Condition) -> tuple[str, Wanted] | None:
        for other, wanted in condition.items():
            if other == key or (value := get(config, other)) is None:
                continue
            if isinstance(wanted, frozenset):
                on = value not in wanted
            else:
                on = value in wanted if isinstance(wanted, tuple) else bool(value)
            why = unread(config, other) if on else None
            if wanted is False and on and not why:
                return other, wanted
            if wanted is not False and (why or not on):
                return why or (other, wanted)
        return None

    parts = key.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    for name in [*names, f"{get(config, 'experiment')}: {key}"]:
        conditions = READ_WHERE.get(name, {})
        reasons = [unmet(one) for one in (conditions if isinstance(conditions, tuple) else (conditions,))]
        if all(reasons):
            return reasons[0]
    return None


def get(config: Any, key: str) -> Any:
    """The value of a dotted key; None if there is none."""
    try:
        return functools.reduce(operator.getitem, key.split("."), config)
    except (KeyError, TypeError):
        return None


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in values.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "study.cells":  # whose keys have dots of their own
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def variants(arg: str, **options: Any) -> dict[str, Any]:
    """Reads `"large,layers=12"` against the options' defaults.

    A tuple lists choices, the first being the default; False is a switch; a number or string gives
    the type. A bare word is a switch or a choice: `large` where `size=("default", "large")`.
    """
    _options.get([]).append(options)
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in options.items()}
    words = {str(choice): key for key, v in options.items() if isinstance(v, tuple) for choice in v}
    words.update({key: key for key, v in options.items() if v is False})
    chosen: dict[str, str] = {}
    for item in filter(None, arg.split(",")):
        key, given, text = item.partition("=")
        if not given:
            if item not in words:
                raise UserError(f"unknown variant {item!r}{suggest(item, [*words, *(f'{k}=' for k in options)])}")
            key = words[item]
            text = "True" if options[key] is False else item
        if key not in options:
            raise UserError(f"unknown variant {key!r}{suggest(key, options)}")
        if key in chosen:
            raise UserError(f"variants {chosen[key]!r} and {item!r}: choose one")
        chosen[key] = item
        value = _parse(key, text, values[key])
        if isinstance(options[key], tuple) and value not in options[key]:
            raise UserError(f"variant {key}={text}{suggest(text, options[key])}")
        values[key] = value
    return values


def known_variants(name: str) -> list[str]:
    """What may stand after the colon of an experiment file: words, and NAME= before a value."""
    token = _options.set([])
    try:
        load(name)
        first = next(iter(_options.get()), {}) if _reads_variants(find(name)) else {}
    finally:
        _options.reset(token)
    words = [choice for v in first.values() if isinstance(v, tuple) for choice in v[1:] if isinstance(choice, str)]
    words += [key for key, v in first.items() if v is False]
    return words + [
        f"{key}=" for key, v in first.items() if v is not False and not (isinstance(v, tuple) and v[-1] in words)
    ]


def section(kind: type[T], values: Any, **more: Any) -> T:
    """`kind(**values, **more)` for a dataclass, sections inside as dicts; UserError naming keys that do not fit it."""
    given = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in {**dict(values), **more}.items()}
    names = inspect.signature(kind).parameters
    for key in given:
        if key not in names:
            raise UserError(f"config: unknown key {key!r}{suggest(key, names)}")
    return kind(**given)


def meant(word: str, value: str = "", config: ConfigDict | None = None) -> str:
    """`"; did you mean --config.KEY=VALUE?"` for what others call a key, or its last part; "" if there is none."""
    from jaxup.experiments.defaults import SECTIONS, defaults

    configs = [config] if config is not None else [defaults(kind, small=True) for kind in SECTIONS]
    if config is None:  # the section of a model is no default
        configs.append(load("inherit_gpt2.py", shipped=True))
    name = word.lstrip("-").replace("-", "_").rpartition(".")[2]
    name = ELSEWHERE.get(name, name)
    keys = [key for one in configs for key, _ in leaves(one.to_dict()) if f".{key}".endswith(f".{name}")]
    value = f"={value}" if value else ""
    return f"; did you mean --config.{min(keys, key=len)}{value}?" if keys else ""


def override(config: ConfigDict, dotted: str, value: Any) -> None:
    """Sets a key; what is a text is read as a value of its type."""
    from ml_collections import ConfigDict

    text = value if isinstance(value, str) else repr(value)

    node, *path = config, *dotted.split(".")
    for depth, key in enumerate(path):
        where = ".".join(["--config", *path[: depth + 1]])
        if not isinstance(node, ConfigDict) or key not in node:
            known = node if isinstance(node, ConfigDict) else ()
            raise UserError(f"{where}: unknown key {key!r}{meant(key, text, config) or suggest(key, known)}")
        if depth < len(path) - 1:
            node = node[key]
    if isinstance(node[key], ConfigDict):
        raise UserError(f"{where}: is a section; set one of its keys: {', '.join(node[key])}")
    node[key] = _parse(where, text, node[key]) if value is text else _typed(where, value, node[key])


def _typed(where: str, value: Any, like: Any) -> Any:
    """`value`, if it is of the type of `like`."""
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(like):
        kind = type(like).__name__
        raise UserError(f"{where}: expected {'an' if kind[0] in 'aeiou' else 'a'} {kind}, not {value!r}")
    return value


def _parse(where: str, text: str, like: Any) -> Any:
    """`text` as a value of the type of `like`."""
    if isinstance(like, str):
        return text
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{where}: expected true or false, not {text!r}")
        return text.lower() == "true"
    if isinstance(like, tuple) and not text.startswith("("):
        return tuple(filter(None, text.split(",")))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    with contextlib.suppress(UserError):
        return _typed(where, value, like)
    return _typed(where, text, like)
