"""What samples are worth to learning: rewards by name, weighted and added, such as `outcome+0.2*format`.

| term | is |
|---|---|
| `outcome` | what the task says of the whole answer, 0 to 1 |
| `process` | the mean of what it says of each step; steps that only the problem's solution has count 0 |
| `format` | 1 for an answer from which something can be read, right or wrong; else 0 |
| `length:C` | C times the number of characters, such as `length:-0.01` |
| `noisy:TPR:FPR` | the verdict 1 with probability TPR if the answer is right, FPR if it is not; else 0 |
| `random` | 0 or 1, with equal chances: a control, of which nothing can be learned |
| `shaped` | by a potential phi of what is written so far: phi(after) - phi(before) for each step |
| `package.module:function` | what a function of one's own (problem, text) says: a number, or None |

phi is 1 at the beginning and then what the worst step so far is worth; after the last step it is 0. So `shaped` adds
-phi(start) = -1 to whatever is written and changes no advantage within a group of answers to one problem (Ng, Harada
and Russell 1999): only which step is credited. Draws are a hash of the problem, the answer and the term, so a run is
reproducible, and equal answers are drawn equally.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxup.errors import UserError, suggest, within
from jaxup.learning.guarded import DOTTED, finite, judged, noisy, own_function
from jaxup.learning.problem import Problem, Task
from jaxup.learning.tasks import Own

_NUMBER = re.compile(r"-?(?:[0-9]{1,30}(?:\.[0-9]*)?|\.[0-9]+)")
_TERM = re.compile(rf"(?:({_NUMBER.pattern})\*)?([A-Za-z_][\w.]*)((?::[^:*]*)*)")

TERMS: dict[str, tuple[str, ...]] = {  # with the numbers that each has
    "outcome": (), "process": (), "format": (), "length": ("C",), "noisy": ("TPR", "FPR"), "random": (), "shaped": (),
}  # fmt: skip
BY_STEP = ("process", "shaped")  # the others are said of a whole answer, and paid at its last step


class Score(NamedTuple):
    value: float | None  # None: it cannot be said, and nothing is to be learned from this sample
    parts: dict[str, float | None]  # of each term by itself, before weighing
    steps: list[float] | None  # what each step adds to `value`; None where no term looks at steps


class Term(NamedTuple):
    name: str  # as it is written, without its weight
    weight: float
    kind: str  # one of TERMS, or "own"
    numbers: tuple[float, ...]
    own: Callable[[Problem, str], float | None] | None


@dataclasses.dataclass(frozen=True)
class Reward:
    task: Task
    terms: tuple[Term, ...]
    # By term and reason, how many samples a function raised for, or said no finite number of.
    failed: Counter[str] = dataclasses.field(default_factory=Counter)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[Score]:
        """Of each answer by itself. Its value is None if one of its terms is."""
        return [self._score(problem, text) for text in texts]

    def _score(self, problem: Problem, text: str) -> Score:
        paid = {term.name: self._paid(term, problem, text) for term in self.terms}
        parts = {name: None if by_step is None else math.fsum(by_step) for name, by_step in paid.items()}
        known = {name: by_step for name, by_step in paid.items() if by_step is not None}
        if len(known) < len(paid):
            return Score(None, parts, None)
        sums = [term.weight * math.fsum(known[term.name]) for term in self.terms]
        value = judged("the sum", self.failed, lambda: math.fsum(sums))
        if value is None or not any(term.kind in BY_STEP for term in self.terms):
            return Score(value, parts, None)
        count = max(map(len, known.values()))
        steps = [0.0] * count
        for term in self.terms:
            for place, pay in enumerate(known[term.name], count - len(known[term.name])):
                steps[place] += term.weight * pay
        return Score(value, parts, steps)

    def _paid(self, term: Term, problem: Problem, text: str) -> list[float] | None:
        """What a term pays, at each step or all of it at the last; None where it cannot be said."""
        if term.kind in BY_STEP:
            judgements = self._said(term, lambda: self.task.steps(problem, text))
            if not judgements or None in judgements:
                return None
            good = [each for each in judgements if each is not None]
            if term.kind == "process":
                # Else an answer that stops after a good beginning would be worth most.
                solved = problem.solution.count(self.task.step) + 1 if self.task.step and problem.solution else 1
                return [each / max(len(good), solved) for each in good]
            phi = [1.0, *itertools.accumulate(good[:-1], min), 0.0]
            return [after - before for before, after in itertools.pairwise(phi)]
        paid = self._said(term, lambda: [self._whole(term, problem, text)])
        return None if paid is None or paid[0] is None else [paid[0]]

    def _whole(self, term: Term, problem: Problem, text: str) -> Any:
        if term.own:
            return term.own(problem, text)
        if term.kind == "format":
            return float(self.task.final(problem, text) != "")
        if term.kind == "length":
            return term.numbers[0] * len(text)
        if term.kind == "random":
            return float(_drawn(term, problem, text) < 0.5)
        verdict = self.task.verify(problem, text)
        if term.kind == "noisy" and verdict is not None:
            return noisy(verdict >= 1, problem, text, *term.numbers)
        return verdict

    def _said(self, term: Term, values: Callable[[], Sequence[Any]]) -> list[float | None] | None:
        """Each as a finite number or None; None for all of them where there are none to be had."""
        try:
            return [finite(term.name, self.failed, value) for value in values()]
        except Exception as error:
            self.failed[f"{term.name}: {type(error).__name__}"] += 1
            return None


def _drawn(term: Term, problem: Problem, text: str) -> float:
    """A number in [0, 1) that these three decide."""
    key = repr((term.name, problem.id, text)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64


def open_reward(spec: str, task: Task) -> Reward:
    """The reward of a spec for answers to a task. UserError where it says none."""
    with within("reward"):
        terms = tuple(_term(part.strip(), spec) for part in spec.split("+"))
        if twice := [name for name, count in Counter(term.name for term in terms).items() if count > 1]:
            raise UserError(f"{twice[0]} is in {spec!r} twice")
    # A task of the user's own counts what failed in it; here it is one count.
    return Reward(task, terms, task.failed if isinstance(task, Own) else Counter())


def _term(part: str, spec: str) -> Term:
    if (found := _TERM.fullmatch(part)) is None:
        raise UserError(f"{part!r} in {spec!r} is no reward", hint="such as outcome+0.2*format")
    weight, kind = float(found[1] or 1), found[2]
    name = kind + found[3]
    if kind in TERMS:
        options, wanted = found[3].split(":")[1:], TERMS[kind]
        if len(options) != len(wanted) or not all(map(_NUMBER.fullmatch, options)):
            raise UserError(f"{name!r} is not {':'.join((kind, *wanted))}", at=spec if spec != name else ())
        numbers = tuple(map(float, options))
        if kind == "noisy" and not all(0 <= number <= 1 for number in numbers):
            raise UserError(f"{name!r}: TPR and FPR are probabilities, 0 to 1")
        return Term(name, weight, kind, numbers, None)
    if not DOTTED.fullmatch(name):
        raise UserError(f"unknown reward {name!r}{suggest(kind, [*TERMS, 'package.module:function'])}")
    return Term(name, weight, "own", (), own_function(name, tuple(TERMS)))
