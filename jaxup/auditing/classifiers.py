"""What a reply is: rules on text, functions, or a model that judges; each with how right it is on a labelled set.

    complies: {positive: ["sure"], negative: ["sorry"], how: begins, labelled: labelled.jsonl}  # exact|holds|pattern
    leaks: {function: my.module:leaks, labelled: ...}       # function(query, text) -> True, False or None
    plans: {judge: MODEL, prompt: judge.txt, positive: ["Yes"], chat: true, tokens: 8, labelled: ...}

`of: reasoning` judges what is in a scratchpad before the reply, and not that. A labelled set has lines {"text": ...,
"label": true}, with the "query" for who looks at it. A verdict is None where it cannot be told, which is counted apart
and is never a refusal. Without `negative` what is not positive is negative.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxup.data.readers import read_jsonl
from jaxup.depth.marked_yaml import Map, is_int, mapping, shown
from jaxup.errors import UserError, first_line, within
from jaxup.learning.guarded import own_function
from jaxup.progress import say

Verdict = bool | None
Items = Sequence[tuple[str, str]]  # queries and what was written
Judge = Callable[[Items], list[Verdict]]
Answers = Callable[[Sequence[str]], list[str | None]]  # prompts of a judge -> what it writes, None if it cannot
_HOW = ("exact", "begins", "holds", "pattern")
_LONGEST, _MOST_TOKENS, _TOKENS = 1000, 4096, 16  # characters of a pattern; tokens that a judge may, and does write


class Confusion(NamedTuple):
    """Counts on a labelled set; `unparsed` are of no verdict."""

    true_yes: int
    false_yes: int
    false_no: int
    true_no: int
    unparsed: int = 0

    @property
    def precision(self) -> float:
        return _share(self.true_yes, self.true_yes + self.false_yes)

    @property
    def recall(self) -> float:
        return _share(self.true_yes, self.true_yes + self.false_no)

    @property
    def false_positive(self) -> float:
        return _share(self.false_yes, self.false_yes + self.true_no)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def corrected(observed: float, recall: float, false_positive: float) -> tuple[float, bool]:
    """The rate behind an observed one, (observed - b) / (a - b) of Rogan and Gladen, and whether it had to be cut to
    0 or 1; NaN of a classifier that says yes no more often where it should."""
    if not recall > false_positive:
        return float("nan"), False
    rate = (observed - false_positive) / (recall - false_positive)
    cut = min(max(rate, 0.0), 1.0)
    return cut, abs(rate - cut) > 1e-9


@dataclasses.dataclass(frozen=True)
class Classifier:
    name: str
    judge: Judge
    of: str  # "reply" or "reasoning"
    counts: Confusion
    told: str = ""  # what a grid says of it: where that is another, it is another classifier


class Spec(NamedTuple):
    """A classifier as a grid says it, of which all is known but what a model says."""

    name: str
    told: Map
    prompt: str  # of a judge
    labelled: list[tuple[str, str, bool]]  # queries, texts and labels


def read_classifiers(given: Map, directory: Path) -> list[Spec]:
    """UserError for what is wrong in the grid, and for a labelled set that is missing or has one label only.

    `directory` is where the files are that they name.
    """
    return [
        _read(name, mapping(value, "a classifier", given.values_at[name]), directory) for name, value in given.items()
    ]


def open_classifiers(specs: Sequence[Spec], open_judge: Callable[..., Answers]) -> list[Classifier]:
    """The classifiers, each tried on its labelled set.

    `open_judge`: of the name of a model, where that stands in the grid, `chat` and `tokens`, what it answers with.
    """
    made = []
    for spec in specs:
        judge = _judge(spec, open_judge)
        verdicts = judge([(query, text) for query, text, _ in spec.labelled])
        counts = _confusion(verdicts, [label for *_, label in spec.labelled])
        told = {key: value for key, value in spec.told.items() if key != "labelled"} | {"prompt": spec.prompt}
        made.append(Classifier(spec.name, judge, told.get("of", "reply"), counts, json.dumps(told, sort_keys=True)))
    return made


def _confusion(verdicts: Sequence[Verdict], labels: Sequence[bool]) -> Confusion:
    counts = Counter(zip(verdicts, labels, strict=True))
    told = counts[True, True], counts[True, False], counts[False, True], counts[False, False]
    return Confusion(*told, unparsed=len(labels) - sum(told))


def rule(positive: Sequence[str], negative: Sequence[str], how: str) -> Callable[[str], Verdict]:
    """A verdict on a text by what it is, begins with, holds, or has a match for; None if both or neither speak."""

    tests: dict[str, Callable[[str, str], bool]] = {
        "exact": str.__eq__, "begins": str.startswith, "holds": str.__contains__,
        "pattern": lambda text, pattern: re.search(pattern, text) is not None,
    }  # fmt: skip

    def found(text: str, some: Sequence[str]) -> bool:
        return any(tests[how](text, one) for one in some)

    def verdict(text: str) -> Verdict:
        text = text.strip()
        is_yes, is_no = found(text, positive), found(text, negative)
        if not negative:
            return is_yes
        return None if is_yes == is_no else is_yes

    return verdict


def _judge(spec: Spec, open_judge: Callable[..., Answers]) -> Judge:
    told = spec.told
    if "function" in told:
        return _function(spec.name, own_function(told["function"]))
    verdict = rule(told["positive"], told.get("negative", ()), told.get("how", "begins"))
    if "judge" not in told:
        return lambda items: [verdict(text) for _, text in items]
    how = {"chat": told.get("chat", False), "tokens": told.get("tokens", _TOKENS)}
    answers = open_judge(told["judge"], told.values_at["judge"], **how)

    def judge(items: Items) -> list[Verdict]:
        said = answers([_filled(spec.prompt, *item) for item in items])
        return [None if text is None else verdict(text) for text in said]

    return judge


def _filled(template: str, query: str, text: str) -> str:
    """In one pass: what a model wrote is not looked through for names."""
    return re.sub(r"\{(query|reply)\}", lambda found: query if found[1] == "query" else text, template)


def _function(name: str, function: Callable[..., Any]) -> Judge:
    def judge(items: Items) -> list[Verdict]:
        verdicts: list[Verdict] = []
        faults = []
        for query, text in items:
            try:
                verdict = function(query, text)
                if verdict is not None and not isinstance(verdict, bool):
                    raise TypeError(f"it gives True, False or None, not {type(verdict).__name__}")
            except Exception as error:
                verdict = None
                faults.append(f"{type(error).__name__}: {first_line(error)}")
            verdicts.append(verdict)
        if faults:
            say(f"classifier {name}: no verdict on {len(faults)} of {len(items)} texts, since it raised; {faults[0]}")
        return verdicts

    return judge


# ---- reading


def _read(name: str, one: Map, directory: Path) -> Spec:
    kind = next((key for key in ("function", "judge") if key in one), "rule")
    keys = {
        "function": ("function",),
        "judge": ("judge", "prompt", "positive", "negative", "how", "chat", "tokens"),
        "rule": ("positive", "negative", "how"),
    }[kind]
    one.only((*keys, "of", "labelled"))
    for key in keys:
        if key in ("how", "negative", "chat", "tokens") and key not in one:
            continue
        value = one.need(key)
        if key in ("positive", "negative"):
            if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
                raise one.values_at[key].error(f"{key} is a list of texts, not {shown(value)}")
        elif key == "chat":
            if not isinstance(value, bool):
                raise one.values_at[key].error(f"chat is true or false, not {shown(value)}")
        elif key == "tokens":
            if not is_int(value) or not 1 <= value <= _MOST_TOKENS:
                raise one.values_at[key].error(f"tokens are a number from 1 to {_MOST_TOKENS}, not {shown(value)}")
        elif not isinstance(value, str):
            raise one.values_at[key].error(f"{key} is text, not {shown(value)}")
    for key, known in (("how", _HOW), ("of", ("reply", "reasoning"))):
        if one.get(key, known[0]) not in known:
            raise one.values_at[key].error(f"{key} is one of {', '.join(known)}, not {shown(one[key])}")
    if one.get("how") == "pattern":
        _check_patterns(one)
    if kind == "function":
        with within(str(one.values_at["function"])):
            own_function(one["function"])
    prompt = _prompt(one, directory) if kind == "judge" else ""
    if not isinstance(file := one.get("labelled"), str):
        what = "a classifier has a labelled set, by which it is known how right it is"
        raise UserError(what, at=str(one.place), hint='labelled: FILE.jsonl with lines {"text": ..., "label": true}')
    if not (path := directory / file).is_file():
        raise one.values_at["labelled"].error(f"no labelled set: {file}")
    labelled = list(_labelled(path))
    if len({label for *_, label in labelled}) < 2:
        raise UserError("a labelled set has texts with the label true and with false", at=str(path))
    return Spec(name, one, prompt, labelled)


def _prompt(one: Map, directory: Path) -> str:
    place, file = one.values_at["prompt"], one["prompt"]
    try:
        text = (directory / file).read_bytes().decode()
    except (OSError, ValueError) as error:
        raise place.error(f"{file}: {getattr(error, 'strerror', None) or 'not text in UTF-8'}") from None
    if "{reply}" not in text:
        raise place.error(f"{file}: no {{reply}} in it, which stands for what is judged")
    return text


def _check_patterns(one: Map) -> None:
    for key in ("positive", "negative"):
        for pattern in one.get(key, ()):
            try:
                if len(pattern) > _LONGEST:
                    raise re.error(f"longer than {_LONGEST} characters")
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise one.values_at[key].error(
                    f"no regular expression: {shown(pattern)}: {first_line(error)}"
                ) from None


def _labelled(path: Path) -> Iterator[tuple[str, str, bool]]:
    for row in read_jsonl(path):
        if row.fault:
            raise UserError(row.fault, at=row.place)
        value = row.value
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("text"), str)
            or not isinstance(value.get("label"), bool)
        ):
            raise UserError('a line is {"text": ..., "label": true or false}', at=row.place)
        if not isinstance(query := value.get("query", ""), str):
            raise UserError(f"query is text, not {shown(query)}", at=row.place)
        yield query, value["text"], value["label"]
