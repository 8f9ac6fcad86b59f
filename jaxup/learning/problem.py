"""Problems, what is written for them, and who writes: what all of this room speaks of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    id: str  # its canonical form: problems that are the same have the same
    prompt: str  # the text that an answer goes on from
    solution: str = ""  # an answer that verifies, with its steps; "" where none is known
    answer: str = ""  # what is compared with, where a task compares


@runtime_checkable
class Task(Protocol):
    """Problems of one kind and what answers to them are worth. Answers are parsed and never executed."""

    @property
    def name(self) -> str: ...

    @property
    def step(self) -> str:
        """What ends a step of an answer, such as a line's end; "": an answer is one step."""

    @property
    def train(self) -> Sequence[Problem]: ...

    @property
    def test(self) -> Sequence[Problem]:
        """Of which none is in `train`, by its id."""

    def verify(self, problem: Problem, text: str) -> float | None:
        """What an answer is worth, from 0 to 1 (right); None if that cannot be said. Pure and total."""

    def steps(self, problem: Problem, text: str) -> list[float]:
        """For each step of an answer, from 0 to 1, what is good about it; none if that cannot be said."""

    def final(self, problem: Problem, text: str) -> str:
        """What votes count: equal for answers that say the same; "" for none."""


class Ask(NamedTuple):
    """What a policy is to go on from."""

    prefix: tuple[int, ...]  # tokens: of the prompt and of what is written so far
    key: tuple[int, ...]  # numbers that decide what is drawn, and nothing else does
    max_tokens: int
    until: str = ""  # what ends it, besides an end of the text: the token with which this is written is the last


class Written(NamedTuple):
    tokens: np.ndarray  # int32 [n], with the token that ended it
    logp: np.ndarray  # float32 [n]: of each token under the distribution that it was drawn from
    entropy: np.ndarray  # float32 [n], nats: of these distributions
    text: str  # without what ends a text
    ended: bool  # by an end of the text
    stopped: bool  # by `until`


@runtime_checkable
class Writer(Protocol):
    """A policy, as search sees it."""

    def prefix(self, problem: Problem) -> tuple[int, ...]:
        """The tokens of the prompt."""

    def write(self, asks: Sequence[Ask]) -> list[Written]:
        """In the order of `asks`; each depends on its own ask alone."""
