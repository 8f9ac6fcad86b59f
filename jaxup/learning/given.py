"""Problems of a file, a JSON object with `prompt` and `answer` a line, and how an answer is found in a text.

A problem is known by its prompt with single blanks. Which are the test's a hash of that and of the
seed decides, unless the file has `split`; so a row that is added moves no other from one side to the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from jaxup.data.readers import read_jsonl
from jaxup.errors import UserError, storage_error, suggest
from jaxup.learning.problem import Problem
from jaxup.progress import say
from jaxup.text import broken

KEYS = ("prompt", "answer", "solution", "split")
SPLITS = ("train", "test")
LONGEST = 100_000  # characters of a text whose end is looked at

_BOXED = re.compile(r"\\(?:boxed|fbox)\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}")
_AFTER = re.compile(r"####(.*)")
# A sign counts where it is no minus between two numbers, and figures inside of words are no numbers.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])(?P<sign>[-+]))?(?<![\w.])"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3}){1,33}(?![0-9])|[0-9]{1,100}(?![0-9])|(?=\.[0-9]))"
    r"(?:\.(?P<decimals>[0-9]{1,100}))?(?:[eE](?P<power>[-+]?[0-9]{1,3}))?(?![0-9]|[eE][-+]?[0-9])"
    r"(?: ?/ ?(?P<below>[0-9]{1,100})(?![0-9]))?"
)
_LETTER = (  # of these the first that is found, where it is last
    re.compile(r"\A\s*\(?([A-Za-z])[).:]*\s*\Z"),  # the whole text
    re.compile(r"(?i:\b(?:answer|choice|option)(?: is)?)[\s:*]*(?:\(([A-Za-z])\)|([A-Z])(?![\w']))"),
    re.compile(r"\(([A-Z])\)|^([A-Z])[).:](?=\s)", re.M),
)
_MARKED = re.compile(r"####|\b(?:answer|solution)(?:\s*[:=]|\s+is\b)", re.I)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """A task whose answers are compared with those of a file."""

    name: str
    match: Callable[[str], str]  # what a text answers, one of MATCHES; "" where it answers nothing
    train: Sequence[Problem] = ()
    test: Sequence[Problem] = ()
    step: str = ""

    def verify(self, problem: Problem, text: str) -> float | None:
        return float(self.match(text) == self.match(problem.answer))

    def steps(self, problem: Problem, text: str) -> list[float]:
        return [self.verify(problem, text) or 0.0]

    def final(self, problem: Problem, text: str) -> str:
        return self.match(text)


def exact(text: str) -> str:
    """The whole text, in lower case and with single blanks."""
    return " ".join(text.casefold().split())


def numeric(text: str) -> str:
    r"""Its last number, exactly: of `\boxed{}` or after `####` if there is one. `1,000`, `3/4`, `-.5`, `2e3` and
    `\frac{3}{4}` are numbers; units and a percent sign are not looked at, so that 50% is 50."""
    text = _FRACTION.sub(r"\1/\2", text[-LONGEST:].replace("\u2212", "-").replace("\\!", "").replace("$", ""))
    for where in (_BOXED, _AFTER):
        if marked := where.findall(text):
            text = marked[-1]
            break
    for found in reversed(list(_NUMBER.finditer(text))):
        if below := int(found["below"] or 1):
            decimals = found["decimals"] or ""
            value = Fraction(int(found["whole"].replace(",", "") + decimals), below)
            value *= Fraction(10) ** (int(found["power"] or 0) - len(decimals))
            return str(-value if found["sign"] == "-" else value)
    return ""


def choice(text: str) -> str:
    r"""The letter of the choice that it names, as `B`, `(B)`, `B. because`, `the answer is B` or `\boxed{B}`."""
    text = _TEXT.sub(r"\1", text[-LONGEST:])
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    for pattern in _LETTER:
        if found := list(pattern.finditer(text)):
            return next(letter for letter in found[-1].groups() if letter).upper()
    return ""


MATCHES: dict[str, Callable[[str], str]] = {"exact": exact, "numeric": numeric, "choice": choice}


def read_problems(path: str, match: Callable[[str], str] | None) -> dict[str, list[Problem]]:
    """The problems of a file by what `split` says of them; all of them are of "" if none has one.

    Args:
      match: what an answer has to answer something by; None: answers are somebody else's business.

    Raises:
      UserError: there is no such file or nothing in it; a line is no problem; one problem has two answers, or is in two
        splits, or its prompt ends with its answer.
    """
    if not Path(path).is_file():
        raise UserError("no such file", at=path)
    first: dict[str, tuple[str, Problem, str]] = {}
    unread: Counter[str] = Counter()
    again = 0
    try:
        for row in read_jsonl(Path(path)):
            problem, split = _problem(row.value, row.fault, row.place, match)
            unread.update(key for key in row.value if key not in KEYS)
            place, before, where = first.setdefault(problem.id, (row.place, problem, split))
            if (match or exact)(before.answer) != (match or exact)(problem.answer):
                raise UserError(f"the problem of {place} with another answer", at=row.place)
            if split != where:
                what = f"the problem of {place}, which is of split {where!r}, in {split!r}"
                raise UserError(what if split and where else "of two problems only one has `split`", at=row.place)
            again += place != row.place
    except OSError as error:
        raise storage_error(error, path) from None
    if not first:
        raise UserError("no problems: the file is empty", at=path)
    off = [place for place, each, _ in first.values() if match and match(each.solution) != match(each.answer)]
    if off:
        say(f"{path}: of {len(off)} problems the solution does not give the answer; the first is that of {off[0]}")
    if again:
        say(f"{path}: {again} of {again + len(first)} lines are problems that came before, and are left out")
    if unread:
        say(f"{path}: not read: {', '.join(sorted(unread))}")
    found: dict[str, list[Problem]] = {}
    for place, problem, split in first.values():
        if ("" in found) != (split == "") and found:
            raise UserError("no `split`, which other problems have" if not split else "`split`, which others have not",
                            at=place)  # fmt: skip
        found.setdefault(split, []).append(problem)
    return found


def _problem(row: Any, fault: str, place: str, match: Callable[[str], str] | None) -> tuple[Problem, str]:
    """A line's problem, and its split."""
    if fault or not isinstance(row, dict):
        raise UserError(fault or f"not a JSON object but {type(row).__name__}", at=place)
    if missing := [key for key in KEYS[:2] if key not in row]:
        raise UserError(f"no {' and no '.join(missing)}; its keys: {', '.join(map(str, row)) or 'none'}", at=place)
    row = {key: row[key] for key in KEYS if row.get(key) is not None}
    if type(row.get("answer")) in (int, float):
        row["answer"] = str(row["answer"])
    for key in KEYS:
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{key} is no text but {type(row[key]).__name__}", at=place)
        if broken(row.get(key, "")):
            raise UserError(f"{key} has half of a character (a lone surrogate)", at=place)
    prompt, answer, split = row.get("prompt", ""), row.get("answer", ""), row.get("split", "")
    if not prompt.strip():
        raise UserError("an empty prompt", at=place)
    if not (match or exact)(answer):
        what = "no number" if match is numeric else "no letter of a choice" if match is choice else "empty"
        raise UserError(f"the answer {answer[:50]!r} is {what}", at=place)
    if "split" in row and split not in SPLITS:
        raise UserError(f"unknown split {split[:50]!r}{suggest(split, SPLITS)}", at=place)
    if _bare(_end(prompt)) == _bare(answer) != "":
        raise UserError(f"the prompt ends with the answer {answer[:50]!r}", at=place, hint="a model would only copy it")
    return Problem(" ".join(prompt.split()), prompt, row.get("solution") or answer, answer), split


def _end(prompt: str) -> str:
    """Where an answer would stand that somebody forgot: after the last `answer:` or `####`, or on a last line."""
    if marked := list(_MARKED.finditer(prompt)):
        return prompt[marked[-1].end() :]
    *before, last = prompt.rstrip().split("\n")
    return last if before else ""


def _bare(text: str) -> str:
    return re.sub(r"[\s.,:$%()*]", "", text.casefold())


def in_order(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """In an order that a hash of each problem and of the seed decides."""
    return sorted(problems, key=lambda each: hashlib.blake2b(f"{seed} {each.id}".encode()).digest())
