"""Verdicts that may be wrong: those of the user's own functions, by dotted name, which end no run whatever they do, and
those with noise of known rates."""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from jaxup.errors import UserError, first_line, suggest
from jaxup.learning.problem import Problem

DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def own_function(spec: str, known: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The function that `package.module:function` names, imported as Python does; so what is in that module is run.

    UserError where there is none; `known` are names of something else that may have been meant.
    """
    module, _, name = spec.partition(":")
    if not DOTTED.fullmatch(spec):
        raise UserError(f"{spec!r} is no package.module:function{suggest(module, known)}")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            hint = "a module is looked for in PYTHONPATH and, by `python -m`, in the directory that one is in"
            raise UserError(f"no module named {error.name!r}{suggest(module, known)}", at=spec, hint=hint) from None
        raise UserError(f"importing it raises {type(error).__name__}: {first_line(error)}", at=spec) from None
    function = getattr(found, name, None)
    if not callable(function):
        names = [each for each in vars(found) if not each.startswith("_") and callable(getattr(found, each))]
        raise UserError(f"no function {name!r} in {module}{suggest(name, names)}", at=spec)
    return function


def judged(name: str, failed: Counter[str], verdict: Callable[[], Any]) -> float | None:
    """What somebody's function says of an answer. None where it says None, and where it fails: that is counted.

    It fails if it raises, or says what is no finite number; `failed` then has one more of `NAME: REASON`.
    """
    try:
        return finite(name, failed, verdict())
    except Exception as error:
        failed[f"{name}: {type(error).__name__}"] += 1
        return None


def finite(name: str, failed: Counter[str], value: Any) -> float | None:
    """The same of what it said."""
    if value is None:
        return None
    number = math.nan if isinstance(value, str | bytes) else float(value)
    if not math.isfinite(number):
        failed[f"{name}: not a finite number"] += 1
        return None
    return number


def noisy(right: bool, problem: Problem, text: str, tpr: float, fpr: float) -> float:
    """1 for a share `tpr` of the right answers and `fpr` of the others, else 0; always the same of the same answer."""
    digest = hashlib.sha256(f"{problem.id}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return float(int.from_bytes(digest[:8], "big") < (tpr if right else fpr) * 2**64)
