"""Tasks by name: problems to train on, others to test on, and what answers are worth.

| spec | is |
|---|---|
| `countdown:N`, `countdown:N:steps` | 2 to 5 numbers: an expression that makes the target; its operations, one a line |
| `addition:DIGITS`, `addition:DIGITS:steps` | a sum of two numbers of up to so many digits; column by column |
| `brackets:LENGTH` | a string of so many brackets, half of them holes |
| `FILE.jsonl[:MATCH]` | `prompt` and `answer` a line; MATCH is `exact` (the default), `numeric` or `choice` |
| `FILE.jsonl:package.module:function` | the same, verified by a function (problem, text) -> a number or None |
| `package.module:function` | what that function (train, test, seed) gives: an object with `train`, `test`, `verify` |

The problems of a test are drawn first: they are the same however many are trained on, and none of them is.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jaxup.errors import UserError, first_line, suggest, within
from jaxup.learning import addition, brackets, countdown
from jaxup.learning.generated import Generated
from jaxup.learning.given import MATCHES, Given, exact, in_order, read_problems
from jaxup.learning.guarded import DOTTED, finite, judged, own_function
from jaxup.learning.problem import Problem, Task
from jaxup.text import broken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST = 10**6  # problems of a task

TASKS: dict[str, tuple[str, range, Callable[..., Generated]]] = {  # what its number is, which ones there are
    "countdown": ("N", countdown.COUNTS, countdown.Countdown),
    "addition": ("DIGITS", addition.DIGITS, addition.Addition),
    "brackets": ("LENGTH", brackets.LENGTHS, brackets.Brackets),
}
BY_STEPS = ("countdown", "addition")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
    """A task of the user's own. What its functions do wrong is counted in `failed`, and ends nothing."""

    name: str
    task: Any
    train: Sequence[Problem]
    test: Sequence[Problem]
    step: str
    failed: Counter[str] = dataclasses.field(default_factory=Counter)

    def verify(self, problem: Problem, text: str) -> float | None:
        return judged(self.name, self.failed, lambda: self.task.verify(problem, text))

    def steps(self, problem: Problem, text: str) -> list[float]:
        if not hasattr(self.task, "steps"):
            values = [self.verify(problem, text)]
        else:
            try:
                values = [finite(f"{self.name}.steps", self.failed, each) for each in self.task.steps(problem, text)]
            except Exception as error:
                self.failed[f"{self.name}.steps: {type(error).__name__}"] += 1
                return []
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else []

    def final(self, problem: Problem, text: str) -> str:
        try:
            return str(self.task.final(problem, text)) if hasattr(self.task, "final") else exact(text)
        except Exception as error:
            self.failed[f"{self.name}.final: {type(error).__name__}"] += 1
            return ""


def open_task(spec: str, *, train: int, test: int, seed: int) -> Task:
    """The task of a spec, with so many problems of each kind; -1: all that there are.

    Raises:
      UserError: there is no such task, or there are fewer problems.
    """
    with within("task"):
        if train < -1 or test < -1 or not (train or test):
            raise UserError(f"{train} problems to train on and {test} to test on", at=spec, hint="-1 is all of them")
        if file := re.fullmatch(r"(.*?\.jsonl)(?::(.*))?", spec, re.S):
            return _of_file(spec, file[1], file[2] or "exact", train, test, seed)
        name = spec.partition(":")[0]
        if name in TASKS:
            task = _generated(spec)
            problems = task.problems(random.Random(f"{spec} {seed}"))
            first, rest = _drawn(spec, problems, problems, train, test)
            return dataclasses.replace(task, train=rest, test=first)
        if not DOTTED.fullmatch(spec):
            known = [*TASKS, "FILE.jsonl", "package.module:function"]
            raise UserError(f"unknown task {spec!r}{suggest(name, known)}")
        return _own(spec, train, test, seed)


def tokenizer_for(task: Task) -> PreTrainedTokenizerFast:
    """One of single characters: those that answers to a generated task are made of, and those of all its texts."""
    from jaxup.data.tokenizer import train_characters

    texts = ((each.prompt, each.solution, each.answer) for each in itertools.chain(task.train, task.test))
    return train_characters([getattr(task, "alphabet", ""), *itertools.chain.from_iterable(texts)])


def _generated(spec: str) -> Generated:
    name, *options = spec.split(":")
    meaning, numbers, make = TASKS[name]
    by_steps = name in BY_STEPS and options[1:] == ["steps"]
    shown = f"{name}:{meaning}" + ("[:steps]" if name in BY_STEPS else "")
    if not options or (len(options) > 1 and not by_steps):
        raise UserError(f"{spec!r} is not {shown}", hint=f"such as {name}:{numbers[1]}")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", options[0]) or int(options[0]) not in numbers:
        even = " and even" if numbers.step == 2 else ""
        raise UserError(f"{meaning} in {shown} is {numbers[0]} to {numbers[-1]}{even}, not {options[0]!r}")
    return make(size=int(options[0]), name=spec, step="\n" if by_steps else "")


def _of_file(spec: str, path: str, match: str, train: int, test: int, seed: int) -> Task:
    own = own_function(match, tuple(MATCHES)) if match not in MATCHES else None
    found = read_problems(path, MATCHES.get(match))
    sides = [iter(in_order(found.get(side, []), seed)) for side in ("test", "train", "")]
    to_test, to_train, both = sides
    first, rest = _drawn(path, *((both, both) if "" in found else (to_test, to_train)), train, test)
    if own:
        task = SimpleNamespace(verify=own)
        return Own(name=spec, task=task, train=rest, test=first, step="")
    return Given(name=spec, match=MATCHES[match], train=rest, test=first)


def _own(spec: str, train: int, test: int, seed: int) -> Task:
    function = own_function(spec, tuple(TASKS))
    try:
        task = function(train=train, test=test, seed=seed)
        given = [list(task.test), list(task.train)]
    except Exception as error:
        raise UserError(f"it raises {type(error).__name__}: {first_line(error)}", at=spec) from None
    if not callable(getattr(task, "verify", None)) or not isinstance(step := getattr(task, "step", ""), str):
        raise UserError("what it gives has no function `verify`, or a `step` that is no text", at=spec)
    for problem in itertools.chain(*given):
        fields = dataclasses.astuple(problem) if isinstance(problem, Problem) else (None,)
        if not all(isinstance(field, str) for field in fields) or not problem.id:
            what = f"{str(problem)[:80]} is no Problem(id, prompt, solution, answer) of texts"
            raise UserError(what, at=spec, hint="from jaxup.learning.problem import Problem")
        if broken(*fields):
            raise UserError(f"{problem.id[:80]!r} has half of a character (a lone surrogate)", at=spec)
    if both := {each.id for each in given[0]} & {each.id for each in given[1]}:
        what = f"{len(both)} problems to test on are trained on as well, such as {min(both)[:80]!r}"
        raise UserError(what, at=spec)
    first, rest = _drawn(spec, iter(given[0]), iter(given[1]), train, test)
    return Own(name=spec, task=task, train=rest, test=first, step=step)


def _drawn(
    name: str, to_test: Iterator[Problem], to_train: Iterator[Problem], train: int, test: int
) -> tuple[list[Problem], list[Problem]]:
    """The first problems for the test, then those to train on, each once; from one iterator or from two."""
    seen: set[str] = set()

    def new(problems: Iterator[Problem], wanted: int) -> list[Problem]:
        found: list[Problem] = []
        while len(found) != wanted and (problem := next(problems, None)) is not None:
            if problem.id not in seen:
                seen.add(problem.id)
                found.append(problem)
            if len(seen) > MOST:
                raise UserError(f"more than {MOST} problems", at=name)
        return found

    found = new(to_test, test), new(to_train, train)
    for problems, wanted, use in zip(found, (test, train), ("test", "train")):
        if len(problems) < wanted or (wanted == -1 and not problems):
            asked = "all" if wanted == -1 else wanted
            there = f"there are {len(seen)}, {len(found[0])} of them to test on" if to_test is to_train else (
                f"there are {len(problems)}")  # fmt: skip
            raise UserError(f"{asked} problems to {use} on are asked for; {there}", at=name)
    return found
