"""What tasks have in common whose problems are generated."""

from __future__ import annotations

import abc
import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import ClassVar

from jaxup.errors import UserError
from jaxup.learning.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated(abc.ABC):
    """A task of which every problem can be named, and an answer is right or wrong; `size` is the number in its name."""

    alphabet: ClassVar[str]  # what its prompts and right answers are written in
    name: str
    size: int
    step: str = ""
    train: Sequence[Problem] = ()
    test: Sequence[Problem] = ()

    @abc.abstractmethod
    def problems(self, draw: random.Random) -> Iterator[Problem]:
        """Each problem there is at least once, in an order that `draw` decides; the same ones whoever stops early."""

    @abc.abstractmethod
    def stated(self, prompt: str) -> Problem | None:
        """The problem that a prompt states, which is no longer than those of the task; None for any other text."""

    def problem(self, prompt: str) -> Problem:
        """A problem of one's own. UserError where the prompt states none of this task that has an answer."""
        if (problem := self.stated(prompt)) is None:
            example = next(self.problems(random.Random(0))).prompt
            raise UserError(f"{prompt[:80]!r} is no problem of {self.name} with an answer", hint=f"such as {example}")
        return problem

    @abc.abstractmethod
    def right(self, problem: Problem, text: str) -> bool:
        """Whether that is a whole answer and a right one, with nothing before or after it but blanks; of any text."""

    @abc.abstractmethod
    def final(self, problem: Problem, text: str) -> str:
        """As of a Task."""

    def verify(self, problem: Problem, text: str) -> float | None:
        return float(self.right(problem, text))

    def steps(self, problem: Problem, text: str) -> list[float]:
        return [float(self.right(problem, text))]


def shuffled(total: int, draw: random.Random) -> Iterator[int]:
    """The numbers below `total` in a random order, each once: Fisher and Yates, of whom only what was moved is kept."""
    moved: dict[int, int] = {}
    for place in range(total):
        other = draw.randrange(place, total)
        here = moved.pop(place, place)
        if other == place:
            yield here
        else:
            yield moved.get(other, other)
            moved[other] = here
