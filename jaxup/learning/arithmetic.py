"""Arithmetic that a model wrote: read by a grammar of its own, never executed, and exact.

Nothing here needs a limit but that on the length of a text. Stacks take the place of recursion, so depth costs nothing;
and without powers a value has no more digits, above or below the line, than the text has characters.
"""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 1000  # characters of a text that is read

_TOKEN = re.compile(r" *(0|[1-9][0-9]*|[-+*/()])")
_RANK = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}
_BINARY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class Arithmetic(NamedTuple):
    value: Fraction
    numbers: tuple[int, ...]  # those that are written in it, from left to right
    operations: tuple[tuple[str, Fraction, Fraction], ...]  # as they are carried out; -a is 0 - a


def arithmetic(text: str) -> Arithmetic | None:
    """What an expression of whole numbers, + - * /, a sign before a number, and parentheses says, as Python reads it.

    None for anything else: other characters (decimal points, digits of other scripts), a division by zero, a number
    with a leading zero, a text of more than LONGEST characters. It never raises.
    """
    if (tokens := _tokens(text)) is None:
        return None
    values: list[Fraction] = []
    waiting: list[str] = []  # operators and parentheses whose right side is not there yet
    numbers: list[int] = []
    done: list[tuple[str, Fraction, Fraction]] = []
    wants_value = True
    try:
        for token in tokens:
            if wants_value and token.isdigit():
                values.append(Fraction(int(token)))
                numbers.append(int(token))
                wants_value = False
            elif wants_value and token in "-(":
                waiting.append("negative" if token == "-" else token)
            elif wants_value or token == "(" or token.isdigit():
                return None
            elif token == ")":
                _carry_out(values, waiting, done, least=1)
                if not waiting:
                    return None
                waiting.pop()
            else:
                _carry_out(values, waiting, done, least=_RANK[token])
                waiting.append(token)
                wants_value = True
        if wants_value:
            return None
        _carry_out(values, waiting, done, least=1)
    except ZeroDivisionError:
        return None
    return None if waiting else Arithmetic(values[0], tuple(numbers), tuple(done))


def _tokens(text: str) -> list[str] | None:
    if len(text) > LONGEST:
        return None
    tokens, at, text = [], 0, text.rstrip(" ")
    while at < len(text):
        if (found := _TOKEN.match(text, at)) is None:
            return None
        tokens.append(found[1])
        at = found.end()
    return tokens


def _carry_out(
    values: list[Fraction], waiting: list[str], done: list[tuple[str, Fraction, Fraction]], *, least: int
) -> None:
    """What waits on top and binds at least so tightly."""
    while waiting and _RANK[waiting[-1]] >= least:
        name, right = waiting.pop(), values.pop()
        name, left = ("-", Fraction(0)) if name == "negative" else (name, values.pop())
        values.append(_BINARY[name](left, right))
        done.append((name, left, right))
