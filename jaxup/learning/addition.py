"""Addition of two whole numbers of up to so many digits: `47+85=`, answered by `132`.

With `steps` the columns come first, from the right, each with what it carries: `7+5+0=12`, `4+8+1=13`, `132`. The sum
decides whether an answer is right, and what columns are wrong `steps` says. a+b and b+a are one problem.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Iterator
from typing import ClassVar

from jaxup.learning.generated import Generated, shuffled
from jaxup.learning.problem import Problem

DIGITS = range(1, 101)
_COLUMN = re.compile(r"[0-9]\+[0-9]\+[01]=1?[0-9]")
_STATED = re.compile(r" *(0|[1-9][0-9]{0,99}) *\+ *(0|[1-9][0-9]{0,99}) *=? *")
_SUM = re.compile(r"0|[1-9][0-9]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition(Generated):
    alphabet: ClassVar = "0123456789+=\n"

    def problems(self, draw: random.Random) -> Iterator[Problem]:
        below = 10**self.size
        for number in shuffled(below * (below + 1) // 2, draw):
            high = (math.isqrt(8 * number + 1) - 1) // 2  # of the pairs (high, low <= high) in their order
            low = number - high * (high + 1) // 2
            yield self._problem(*draw.sample((high, low), 2))

    def _problem(self, a: int, b: int) -> Problem:
        return Problem(f"{min(a, b)}+{max(a, b)}", f"{a}+{b}=", "\n".join(self._lines(a, b)), str(a + b))

    def stated(self, prompt: str) -> Problem | None:
        found = _STATED.fullmatch(prompt)
        if found is None or max(map(len, found.groups())) > self.size:
            return None
        return self._problem(int(found[1]), int(found[2]))

    def _lines(self, a: int, b: int) -> list[str]:
        lines, carry = [], 0
        for place in range(max(len(str(a)), len(str(b))) if self.step else 0):
            x, y = a // 10**place % 10, b // 10**place % 10
            lines.append(f"{x}+{y}+{carry}={x + y + carry}")
            carry = (x + y + carry) // 10
        return [*lines, str(a + b)]

    def _right_lines(self, problem: Problem) -> list[str]:
        a, b = problem.prompt.removesuffix("=").split("+")
        return self._lines(int(a), int(b))

    def right(self, problem: Problem, text: str) -> bool:
        *columns, last = text.strip().split("\n")
        many = len(self._right_lines(problem)) - 1
        return last == problem.answer and len(columns) == many and all(map(_COLUMN.fullmatch, columns))

    def steps(self, problem: Problem, text: str) -> list[float]:
        """1 for each line that is as it should be."""
        if not self.step:
            return super().steps(problem, text)
        right = self._right_lines(problem)
        lines = text.strip().split("\n")
        return [float(place < len(right) and line == right[place]) for place, line in enumerate(lines)]

    def final(self, problem: Problem, text: str) -> str:
        *columns, last = text.strip().split("\n")
        return last if _SUM.fullmatch(last) and (self.step or not columns) else ""
