"""Countdown: make a target of some numbers, each used exactly once, by + - * /.

The prompt `3 5 7=26:` is the problem's canonical form and a colon. Numbers are 1 to 14, targets 1 to 99. An answer is
an expression (`3*7+5`), or with `steps` one operation a line (`3*7=21`, `21+5=26`), whose results are whole and not
negative, as in the game. Where an expression exists such steps do: a sign can be moved to where it does no harm.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import ClassVar, NamedTuple

from jaxup.learning.arithmetic import arithmetic
from jaxup.learning.generated import Generated
from jaxup.learning.problem import Problem

LARGEST, TARGETS = 14, range(1, 100)
COUNTS = range(2, 6)  # of numbers
_STATED = re.compile(r" *((?:[1-9][0-9]? +){1,4}[1-9][0-9]?) *= *([1-9][0-9]?) *:? *")
_WHOLE = r"(-?[1-9][0-9]{0,17}|0)"
_OPERATION = re.compile(rf"{_WHOLE}([-+*/]){_WHOLE}={_WHOLE}")


class Made(NamedTuple):
    """A number that was made of two others."""

    operator: str
    left: How
    right: How


How = int | Made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown(Generated):
    alphabet: ClassVar = "0123456789+-*/()= :\n"

    def problems(self, draw: random.Random) -> Iterator[Problem]:
        """First one target for each set of numbers, then a second for each, and so on."""
        sets = list(itertools.combinations_with_replacement(range(1, LARGEST + 1), self.size))
        draw.shuffle(sets)
        rest = []
        for numbers in sets:
            found = [(target, how) for target, how in _combined(numbers).items() if target in TARGETS]
            draw.shuffle(found)
            if found:
                yield self._problem(numbers, *found[0])
                rest.append([(numbers, *each) for each in found[1:]])
        for round_ in itertools.zip_longest(*rest):
            yield from (self._problem(*each) for each in round_ if each)

    def _problem(self, numbers: tuple[int, ...], target: int, how: How) -> Problem:
        form = f"{' '.join(map(str, numbers))}={target}"
        return Problem(form, f"{form}:", "\n".join(_operations(how)) if self.step else _written(how))

    def stated(self, prompt: str) -> Problem | None:
        if (found := _STATED.fullmatch(prompt)) is None:
            return None
        numbers, target = tuple(sorted(map(int, found[1].split()))), int(found[2])
        if len(numbers) != self.size or numbers[-1] > LARGEST or target not in TARGETS:
            return None
        how = _reachable(numbers).get(target)
        return None if how is None else self._problem(numbers, target, how)

    def right(self, problem: Problem, text: str) -> bool:
        numbers, target = _parts(problem)
        if self.step:
            good, left = self._followed(problem, text)
            return all(good) and left == (target,)
        said = arithmetic(text.strip())
        return said is not None and said.value == target and sorted(said.numbers) == sorted(numbers)

    def steps(self, problem: Problem, text: str) -> list[float]:
        """1 for an operation that is right, of numbers that are there, after which the target is in reach; once one is
        not, 0."""
        return [float(good) for good in self._followed(problem, text)[0]] if self.step else super().steps(problem, text)

    def _followed(self, problem: Problem, text: str) -> tuple[list[bool], tuple[int, ...]]:
        """Which steps leave the target in reach, and what numbers are left after them."""
        numbers, target = _parts(problem)
        lines = text.strip().split("\n")
        good: list[bool] = []
        for line in lines:
            after = _after(numbers, line)
            if after is None or target not in _reachable(after):
                break
            numbers = after
            good.append(True)
        return good + [False] * (len(lines) - len(good)), numbers

    def final(self, problem: Problem, text: str) -> str:
        """What is done, however it is written: `3*7 5+21` of `5+7*3`; with the results that it says, right or wrong, of
        an answer by steps. Nothing here knows the problem, so a vote is no verdict."""
        if self.step:
            found = [_OPERATION.fullmatch(line) for line in text.strip().split("\n")]
            lines = [f"{_either_way(each[2], int(each[1]), int(each[3]))}={each[4]}" for each in found if each]
            return " ".join(lines) if len(lines) == len(found) else ""
        said = arithmetic(text.strip())
        if said is None:
            return ""
        return " ".join(sorted(_either_way(*each) for each in said.operations)) or str(said.value)


def _either_way(name: str, a: int | Fraction, b: int | Fraction) -> str:
    return f"{min(a, b)}{name}{max(a, b)}" if name in "+*" else f"{a}{name}{b}"


def _parts(problem: Problem) -> tuple[tuple[int, ...], int]:
    numbers, _, target = problem.id.partition("=")
    return tuple(map(int, numbers.split())), int(target)


def _after(numbers: tuple[int, ...], line: str) -> tuple[int, ...] | None:
    """The numbers that are left, sorted, after a step that is right; None after one that is not."""
    if (found := _OPERATION.fullmatch(line)) is None:
        return None
    a, b, result = int(found[1]), int(found[3]), int(found[4])
    left = Counter(numbers)
    left.subtract((a, b))
    if min(left.values()) < 0 or (found[2], result) not in _results(a, b):
        return None
    return tuple(sorted([*left.elements(), result]))


def _results(a: int, b: int) -> list[tuple[str, int]]:
    results = [("+", a + b), ("*", a * b)]
    if a >= b:
        results.append(("-", a - b))
    if b and a % b == 0:
        results.append(("/", a // b))
    return results


def _combined(numbers: tuple[int, ...]) -> dict[int, How]:
    """What can be made of all these numbers, and the first way that is found to make it."""
    if len(numbers) == 1:
        return {numbers[0]: numbers[0]}
    found: dict[int, How] = {}
    for left, right in _splits(numbers):
        for (a, how_a), (b, how_b) in itertools.product(_reachable(left).items(), _reachable(right).items()):
            if a < b:
                a, how_a, b, how_b = b, how_b, a, how_a
            for name, value in _results(a, b):
                if value not in found:
                    found[value] = Made(name, how_a, how_b)
    return found


# All sets of up to four numbers of a task are 3,059, each with some hundred values at most.
_reachable = functools.lru_cache(maxsize=2**12)(_combined)


def _splits(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each way to split them in two, once."""
    seen = set()
    for mask in range(1, 2 ** (len(numbers) - 1)):  # the last is always on the right
        left = tuple(n for i, n in enumerate(numbers) if mask >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not mask >> i & 1)
        if (left, right) not in seen:
            seen |= {(left, right), (right, left)}
            yield left, right


_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}


def _written(how: How) -> str:
    """As an expression with no more parentheses than it needs."""
    if isinstance(how, int):
        return str(how)
    name, left, right = how
    rank = _RANK[name]
    tight = rank + (name in "-/")  # a - (b + c)
    texts = (f"({_written(side)})" if _rank(side) < least else _written(side)
             for side, least in ((left, rank), (right, tight)))  # fmt: skip
    return name.join(texts)


def _rank(how: How) -> int:
    return 3 if isinstance(how, int) else _RANK[how.operator]


def _operations(how: How) -> list[str]:
    """One a line, each after those that it needs."""
    if isinstance(how, int):
        return []
    name, left, right = how
    a, b = _value(left), _value(right)
    return [*_operations(left), *_operations(right), f"{a}{name}{b}={_value(how)}"]


def _value(how: How) -> int:
    if isinstance(how, int):
        return how
    return dict(_results(_value(how.left), _value(how.right)))[how.operator]
