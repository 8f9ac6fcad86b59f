"""Guides of a search: what an answer, or the beginning of one, is worth, from 0 to 1."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxup.errors import UserError, suggest, within
from jaxup.learning.guarded import noisy
from jaxup.learning.problem import Problem, Task
from jaxup.learning.tree import ROLLOUT, Node, Scores, Search, Talk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN = 0.5  # what is said of a beginning by a guide of whole answers


@dataclasses.dataclass(frozen=True)
class Guide:
    """What values nodes.

    Args:
      name: as it is written.
      value: of nodes of a search, each from 0 to 1, in their order; what it asks for counts in the search's budget.
      among: what it says of an answer depends on the other answers: it is asked again when all are there, and a value
        of 1 is not the best that there can be.
      samples: it draws text of its own.
      verifies: it asks the task what is right.
      tokenizer: the hash of that whose tokens it reads; "": it reads none.
    """

    name: str
    value: Callable[[Search, Sequence[Node]], Talk[list[float]]]
    among: bool = False
    samples: bool = False
    verifies: bool = False
    tokenizer: str = ""

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """UserError unless the tokens that it reads are those of this one."""
        from jaxup.data.tokenizer import tokenizer_hash

        if self.tokenizer and self.tokenizer != tokenizer_hash(tokenizer):
            what = "it reads the tokens of another tokenizer than the model's"
            raise UserError(what, at=f"guide {self.name}")


def _at_once(name: str, value: Callable[[Search, Node], float], *, verifies: bool = True) -> Guide:
    """One that asks nobody, and says of each node by itself."""

    def values(search: Search, nodes: Sequence[Node]) -> Talk[list[float]]:
        return [value(search, node) for node in nodes]
        yield  # what makes it a generator

    return Guide(name, values, verifies=verifies)


def verdict(task: Task, problem: Problem, text: str) -> float:
    """What the verifier says of an answer; `UNKNOWN` where it cannot say."""
    said = task.verify(problem, text)
    return UNKNOWN if said is None or math.isnan(said) else float(said)


def _verified(search: Search, node: Node) -> float:
    return verdict(search.task, search.problem, node.text) if node.done else UNKNOWN


def noisy_verdict(task: Task, problem: Problem, text: str, tpr: float, fpr: float) -> float:
    """`noisy` of what the verifier says; what it cannot say counts as wrong."""
    return noisy(verdict(task, problem, text) >= 1, problem, text, tpr, fpr)


def _noisy(name: str, tpr: float, fpr: float) -> Guide:
    _shares(name, tpr, fpr)

    def value(search: Search, node: Node) -> float:
        return noisy_verdict(search.task, search.problem, node.text, tpr, fpr) if node.done else UNKNOWN

    return _at_once(name, value)


def _length(name: str, weight: float, tpr: float = 1.0, fpr: float = 0.0) -> Guide:
    """A proxy: a noisy verdict, and a weight for long answers (or, below 0, for short ones). As the most liked of ever
    more samples are the longest, it is misled the more of them there are (Gao et al. 2022, 2210.10760)."""
    _shares(name, abs(weight), tpr, fpr)

    def value(search: Search, node: Node) -> float:
        said = noisy_verdict(search.task, search.problem, node.text, tpr, fpr) if node.done else UNKNOWN
        long = len(node.tokens) / search.max_tokens
        return (1 - abs(weight)) * said + abs(weight) * (long if weight > 0 else 1 - long)

    return _at_once(name, value)


def _shares(name: str, *numbers: float) -> None:
    if not all(0 <= number <= 1 for number in numbers):
        raise UserError("its numbers are shares, from 0 to 1", at=f"guide {name}")


def _likely(search: Search, node: Node) -> float:
    """The geometric mean of the probabilities of its tokens."""
    return math.exp(node.logp / len(node.tokens)) if node.tokens else UNKNOWN


_OF_STEPS: dict[str, Callable[[list[float]], float]] = {"last": lambda s: s[-1], "min": min, "product": math.prod}


def _steps(name: str, how: str = "last") -> Guide:
    """What the task says of its steps, as one number (2408.03314 compares the three)."""
    if how not in _OF_STEPS:
        raise UserError(f"unknown way {how!r}{suggest(how, _OF_STEPS)}", at=f"guide {name}")

    def value(search: Search, node: Node) -> float:
        steps = search.task.steps(search.problem, node.text)
        return _OF_STEPS[how](steps) if steps else UNKNOWN

    return _at_once(name, value)


def _consistency(name: str) -> Guide:
    """The share of the finished samples that say the same (2203.11171)."""

    def values(search: Search, nodes: Sequence[Node]) -> Talk[list[float]]:
        def says(node: Node) -> str:
            return search.task.final(search.problem, node.text)

        said = Counter[str]()
        for node in search.finished:
            said[says(node)] += node.count
        of = sum(said.values())
        return [(said[says(n)] / of if says(n) and of else 0.0) if n.done else UNKNOWN for n in nodes]
        yield

    return Guide(name, values, among=True)


def _rollouts(name: str, k: float) -> Guide:
    """The share of K answers that begin so which verify (2312.08935). They are answers as others are, and found."""
    if k != int(k) or k < 1:
        raise UserError("a number of rollouts, at least 1", at=f"guide {name}")

    def values(search: Search, nodes: Sequence[Node]) -> Talk[list[float]]:
        # The first of each, then the second of each: where the budget is short it is so for all alike.
        asked = [(node, number) for number in range(int(k)) for node in nodes if not node.done]
        asks = [search.ask(ROLLOUT, node, number) for node, number in asked]
        verdicts: dict[int, list[float]] = {id(node): [] for node in nodes}
        for (node, number), written in zip(asked, (yield from search.budget.write(asks)), strict=True):
            if written is not None:
                answer = search.after(node, (*node.path, number), written)
                answer.value = _verified(search, answer)
                verdicts[id(node)].append(answer.value)
                search.finished.append(answer)

        def share(node: Node) -> float:
            if node.done:
                return _verified(search, node)
            return sum(verdicts[id(node)]) / max(1, len(verdicts[id(node)]))

        return [share(node) for node in nodes]

    return Guide(name, values, samples=True, verifies=True)


def learned(
    name: str, score: Callable[[Sequence[tuple[int, ...]]], Sequence[float]], tokenizer: str = ""
) -> Guide:  # fmt: skip
    """One that was trained.

    Args:
      score: tokens of prompts and what was written after them -> values from 0 to 1, such as a head's probabilities.
        All that is valued at a time, of all problems, is one call.
      tokenizer: the hash of theirs.
    """

    def values(search: Search, nodes: Sequence[Node]) -> Talk[list[float]]:
        return (yield Scores(score, [node.prompt + node.tokens for node in nodes]))

    return Guide(name, values, tokenizer=tokenizer)


def _of_run(spec: str) -> Guide:
    """A verifier that a run trained: its newest one, or that of RUN@NAME/STEP."""
    from jaxup.learning.verifier import Learned  # which needs jax

    with within(f"guide {spec}"):
        score = Learned(spec.partition(":")[2])
    return learned(spec, score, score.tokenizer)


_GUIDES: dict[str, tuple[Callable[..., Guide], int, int]] = {  # and how many numbers it has, at least and at most
    "verifier": (lambda name: _at_once(name, _verified), 0, 0),
    "noisy": (_noisy, 2, 2),
    "logp": (lambda name: _at_once(name, _likely, verifies=False), 0, 0),
    "consistency": (_consistency, 0, 0),
    "rollouts": (_rollouts, 1, 1),
    "length": (_length, 1, 3),
}  # fmt: skip
KNOWN = ("verifier", "noisy:TPR:FPR", "logp", "consistency", "rollouts:K", "steps[:last|min|product]",
         "length:WEIGHT[:TPR:FPR]", "learned:RUN[@NAME/STEP]")  # fmt: skip


def open_guide(spec: str) -> Guide:
    """A guide as a user writes it, one of `KNOWN`.

    Raises:
      UserError: there is none of that name, or its numbers are not what it takes.
    """
    name, *given = spec.split(":")
    if name == "learned" and spec != "learned":
        return _of_run(spec)
    if name == "steps" and len(given) <= 1:
        return _steps(spec, *given)
    if name not in _GUIDES:
        raise UserError(f"unknown guide {name!r}{suggest(name, [*_GUIDES, 'steps', 'learned'])}")
    make, least, most = _GUIDES[name]
    try:
        numbers = [float(number) for number in given]
    except ValueError:
        numbers = [math.nan]
    usage = next(known for known in KNOWN if known.startswith(name))
    if not least <= len(numbers) <= most or not all(map(math.isfinite, numbers)):
        raise UserError("its numbers are wrong", at=f"guide {spec}", hint=usage)
    return make(spec, *numbers)
