"""The one exception a user's mistake raises, and how an entry point ends.

Every `python -m jaxup.NAME` runs under `entry_point`, so exit codes mean the same everywhere:

| code | meaning |
|---|---|
| 0 | done |
| 2 | the user's mistake: one line on stderr, nothing written |
| 3 | training stopped because a gradient or loss was not finite |
| 130, 143 | Ctrl-C or SIGTERM; a training run has saved its state first |
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """Something the user can put right, in one line: `AT: WHAT; HINT`.

    Args:
      what: what is wrong.
      at: the places it is in, the widest first: a file, a flag, a key of the configuration, a line
        and column. A place that ends in a point is a section, and its key follows at once.
      hint: what was probably meant, or what to do.
    """

    def __init__(self, what: str, *, at: str | Sequence[str] = (), hint: str = ""):
        self.what, self.hint = what, hint
        self.at = (at,) if isinstance(at, str) else tuple(at)
        places = "".join(place if place.endswith(".") else f"{place}: " for place in self.at)
        super().__init__(f"{places}{what}" + (f"; {hint}" if hint else ""))

    def within(self, *at: str) -> UserError:
        """The same error inside of wider places: `raise error.within("config.json") from None`."""
        return UserError(self.what, at=(*at, *self.at), hint=self.hint)


class Stopped(Exception):
    """A signal asked the program to leave, and it has saved what it had."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class NonFinite(Exception):
    """A loss or gradient was NaN or infinite; the message names the model and the step."""


class Parser(argparse.ArgumentParser):
    """The ArgumentParser of the command `jaxup NAME`: a wrong flag is a user's mistake like any other, one line."""

    def __init__(self, name: str, description: str | None):
        super().__init__(
            prog=f"jaxup {name}", description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def suggest(name: str, candidates: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the candidate nearest to `name`, else the list of them all."""
    candidates = [str(c) for c in candidates]
    near = difflib.get_close_matches(str(name), candidates, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(candidates)}" if candidates else ""


def entry_point(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs `main(argv)` and exits the process with the code that its outcome calls for."""
    warnings.formatwarning = lambda message, *_: f"jaxup: warning: {message}\n"  # no file and line of ours
    try:
        code = main(sys.argv if argv is None else argv) or 0
    except UserError as error:
        code = _say(error, 2)
    except NonFinite as error:
        code = _say(error, 3)
    except Stopped as error:
        code = _say(error, error.exit_code)
    except KeyboardInterrupt:
        code = _say("interrupted", 130)
    except BrokenPipeError:  # `... | head` closed our stdout; it is not an error worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _say(message: object, code: int) -> int:
    print(f"jaxup: {message}", file=sys.stderr, flush=True)
    return code
