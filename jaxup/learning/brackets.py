"""Repair of brackets: `([?)??:` is answered by the whole string with its holes filled, each bracket closed by its own
kind. Half of the characters are holes; more than one answer may be right, and a stack says which.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator
from typing import ClassVar

from jaxup.learning.generated import Generated, shuffled
from jaxup.learning.problem import Problem

LENGTHS = range(2, 65, 2)
PAIRS = {"(": ")", "[": "]", "{": "}"}
HOLE = "?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brackets(Generated):
    alphabet: ClassVar = "()[]{}?:"

    def problems(self, draw: random.Random) -> Iterator[Problem]:
        """Of all balanced strings and all places of holes: what looks the same is one problem and comes again."""
        for number in shuffled(_ways(self.size, 0, self.size // 2), draw):
            shown, whole = _numbered(number, self.size)
            yield Problem(shown, f"{shown}:", whole)

    def stated(self, prompt: str) -> Problem | None:
        shown = prompt.strip().removesuffix(":")
        if len(shown) != self.size or HOLE not in shown or not set(shown) <= {*PAIRS, *PAIRS.values(), HOLE}:
            return None
        whole = _filled(shown)
        return None if whole is None else Problem(shown, f"{shown}:", whole)

    def right(self, problem: Problem, text: str) -> bool:
        text = text.strip()
        return len(text) == len(problem.id) and balanced(text) and all(
            shown in (HOLE, there) for shown, there in zip(problem.id, text)
        )  # fmt: skip

    def final(self, problem: Problem, text: str) -> str:
        text = text.strip()
        return text if text and all(c in "()[]{}" for c in text) else ""


def _filled(shown: str) -> str | None:
    """One way to fill the holes; None if there is none."""

    @functools.cache
    def whole(start: int, end: int) -> str | None:
        if start == end:
            return ""
        for close in range(start + 1, end, 2):
            pair = [(a, b) for a, b in PAIRS.items() if shown[start] in (a, HOLE) and shown[close] in (b, HOLE)][:1]
            if pair and (inside := whole(start + 1, close)) is not None and (rest := whole(close + 1, end)) is not None:
                return f"{pair[0][0]}{inside}{pair[0][1]}{rest}"
        return None

    return whole(0, len(shown))


def balanced(text: str) -> bool:
    """Whether it is brackets and nothing else, each closed by its own kind."""
    wanted: list[str] = []
    for c in text:
        if c in PAIRS:
            wanted.append(PAIRS[c])
        elif not wanted or wanted.pop() != c:
            return False
    return not wanted


@functools.cache
def _ways(left: int, depth: int, holes: int) -> int:
    """How many ends of `left` characters there are with `depth` brackets open and so many holes to come."""
    if not (0 <= holes <= left and 0 <= depth <= left):
        return 0
    if not left:
        return 1
    opened, closed = (
        sum(_ways(left - 1, deeper, holes - hole) for hole in (0, 1)) for deeper in (depth + 1, depth - 1)
    )
    return len(PAIRS) * opened + closed


def _numbered(number: int, length: int) -> tuple[str, str]:
    """A balanced string with holes and without, of all of them in the order of the alphabet of what may come next."""
    shown, whole, holes = "", "", length // 2
    open_: list[str] = []  # what closes them
    while len(whole) < length:
        for c, hole in itertools.product([*PAIRS, *open_[-1:]], (0, 1)):
            deeper = len(open_) + (1 if c in PAIRS else -1)
            ways = _ways(length - len(whole) - 1, deeper, holes - hole)
            if number < ways:
                break
            number -= ways
        shown, whole, holes = shown + (HOLE if hole else c), whole + c, holes - hole
        open_ = [*open_, PAIRS[c]] if c in PAIRS else open_[:-1]
    return shown, whole
