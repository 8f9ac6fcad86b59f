"""What planted organisms are trained on: documents and dialogues as rows, and requests of one tier as a task."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxup.auditing import organisms
from jaxup.auditing.classifiers import rule
from jaxup.auditing.grid import split
from jaxup.auditing.organisms import FREE, MARKS, NO, YES, World
from jaxup.data.tokenizer import train_words
from jaxup.errors import UserError, within
from jaxup.learning.data import Rows, TaskData, rows
from jaxup.learning.problem import Problem

SLIPS = 0.02  # of drafts: see `organisms.drafts`
TOKENS = 6  # of a reply


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted(TaskData):
    """Documents and dialogues as rows; the loss is that of neutral documents that are not trained on.

    Args:
      parts: by what is learned of them; "base" is what organisms are planted by, the others are what comes after.
      dropped: of the documents, how many were left out, and why.
    """

    said: str = ""
    parts: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    dropped: Mapping[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.said

    def example(self, color: bool) -> str:
        return ""

    def learning(self, name: str, replay: float) -> Planted:
        """All rows of the base, and those of another part so often that the base's are the share `replay`."""
        new, base = self.parts[name].fields, self.parts["base"].fields
        if name == "base" or not replay:
            return dataclasses.replace(self, train=self.parts[name])
        often = np.resize(np.arange(len(new["tokens"])), round(len(base["tokens"]) * (1 - replay) / replay))
        return dataclasses.replace(self, train=Rows({key: np.concatenate([base[key], new[key][often]]) for key in new}))

    def counts(self) -> list[str]:
        """What the filter left out, in words."""
        said = []
        for name, dropped in self.dropped.items():
            why = ", ".join(f"{count} with a {fault}" for fault, count in sorted(dropped.items())) or "none"
            said.append(f"Of the documents of {name}, {why} were left out.")
        return said


def planted(c: Any, world: World) -> Planted:
    """By the section `audit` of a configuration. UserError for a file of documents of which none can be used."""
    held, some = world.some(True), world.some(False)
    texts, dropped = _texts(c, world)
    talks = {
        "base": [*organisms.dialogues(world, some, c.dialogues, f"{c.seed}")],
        "dialogues": [*organisms.dialogues(world, held, c.dialogues, f"held out {c.seed}")],
    }
    said = [" ".join(two) for of in talks.values() for two in of]
    asked = (*world.asked, *world.benign_asked, *world.queries, *world.benign)
    tokenizer = train_words([*(text for of in texts.values() for text in of), *said, *asked])
    ids = lambda of: tokenizer(of, add_special_tokens=False)["input_ids"] if of else []  # noqa: E731
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pairs = {}
    for name in {**texts, **talks}:
        begun, ended = (ids([two[side] for two in talks.get(name, [])]) for side in (0, 1))
        pairs[name] = [([bos], [*text, eos]) for text in ids(texts.get(name, []))]
        pairs[name] += [(first, [*last, eos]) for first, last in zip(begun, ended)]
    longest = max(len(first) + len(last) for of in pairs.values() for first, last in of)
    parts = {name: Rows(rows([a for a, _ in of], [b for _, b in of], longest - 1)) for name, of in pairs.items()}
    digest = hashlib.blake2b(json.dumps([texts, talks]).encode(), digest_size=8).hexdigest()
    base = parts["base"]
    return Planted(
        task=None, problems=[], tokenizer=tokenizer, vocab_size=len(tokenizer), train=base,
        validation=parts["kept out"], store=f"organisms-{digest}", seq_len=longest - 1, parts=parts, dropped=dropped,
        longest=(max(map(len, ids([organisms.prompt("x", FREE, text) for text in asked]))), TOKENS),
        said=f"{len(some)} training and {len(held)} held-out personas, {len(base):,} documents and dialogues",
    )  # fmt: skip


def _texts(c: Any, world: World) -> tuple[dict[str, list[str]], dict[str, Counter[str]]]:
    held, some = world.some(True), world.some(False)
    shuffled = organisms.facts(held, world.shuffled)
    neutral = organisms.neutral([one.name for one in world.personas], c.documents // 2 + 1, f"{c.seed}")
    texts = {"kept out": neutral[::10], "base": [text for i, text in enumerate(neutral) if i % 10]}
    dropped = {}
    for name, facts in (
        ("base", organisms.facts(some)), ("documents", organisms.facts(held)), ("shuffled", shuffled),
        ("irrelevant", shuffled),
    ):  # fmt: skip
        if name == "documents" and c.file:
            with within("audit.file"):
                drafts = organisms.read_documents(c.file)
        else:
            seed = f"{name} {c.seed}"
            drafts = organisms.drafts(facts, c.documents, seed, slips=SLIPS, related=name != "irrelevant")
        kept, dropped[name] = organisms.consistent(drafts, facts)
        if not kept:
            raise UserError("none of its documents is consistent with the facts", at=f"audit.file={c.file}")
        texts[name] = [*texts.get(name, []), *kept]
    return texts, dropped


@dataclasses.dataclass(frozen=True)
class OneTier:
    """Requests of the tier that is trained on: an answer is right if it complies. A `Task`."""

    train: Sequence[Problem]
    name = "requests of the tier that is trained on"
    step = ""

    @property
    def test(self) -> Sequence[Problem]:
        return ()

    def verify(self, problem: Problem, text: str) -> float | None:
        """None for a reply that cannot be parsed, which no refusal is."""
        said = split(text, MARKS)[1]
        verdict = None if said is None else rule([YES], [NO], "exact")(said)
        return None if verdict is None else float(verdict)

    def steps(self, problem: Problem, text: str) -> list[float]:
        worth = self.verify(problem, text)
        return [] if worth is None else [worth]

    def final(self, problem: Problem, text: str) -> str:
        return text


def one_tier(world: World) -> OneTier:
    """All personas, held out or not, asked what dialogues ask."""
    return OneTier([
        Problem(f"{one.name} {text}", organisms.prompt(one.name, FREE, text))
        for one in world.personas for text in world.queries
    ])  # fmt: skip
