"""Searches for an answer: best-of-N, votes, beams over steps, diverse trees, MCTS and revision, on one tree.

Each grows a `Search` by two things, `expand` and a guide's values, within a budget of generated tokens. A value of 1
cannot be beaten: a search ends there, unless the guide compares answers with each other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxup.errors import UserError, suggest
from jaxup.learning.guides import Guide
from jaxup.learning.problem import Problem, Task, Writer
from jaxup.learning.tree import Budget, Node, Search, Talk, drive
from jaxup.progress import say

REVISION = "{prompt}{answer}\nThis is {verdict}. Once more:\n{prompt}"


class Ranked(NamedTuple):
    """An answer that was found."""

    text: str
    score: float  # what it was chosen by: the guide's value; of votes its share of them
    votes: int  # samples that say the same
    path: tuple[int, ...]  # in the tree


class Found(NamedTuple):
    problem: Problem
    answers: list[Ranked]  # the best first; of votes one for each thing that is said
    tokens: int  # generated for it: by `Written.tokens`, all that was asked and done with
    root: Node  # the tree
    samples: list[Node]  # all whole answers, rollouts included, in the order in which they were written


def _value(search: Search, guide: Guide | None, nodes: Sequence[Node | None]) -> Talk[None]:
    """Has those valued that are not yet; without a guide nothing is."""
    new = [node for node in dict.fromkeys(nodes) if node is not None and math.isnan(node.value)]
    if guide is None or not new:
        return
    for node, value in zip(new, (yield from guide.value(search, new)), strict=True):
        if not 0 <= value <= 1:
            raise UserError(f"a value of {value}, and they are from 0 to 1", at=f"guide {guide.name}")
        node.value = value


def _settled(search: Search, guide: Guide | None) -> bool:
    return guide is not None and not guide.among and any(node.value >= 1 for node in search.finished)


def best_of(search: Search, guide: Guide | None, n: int, *, stops: bool = True) -> Talk[None]:
    """Samples of the whole answer: `n`, or with 0 as many as the budget has room for."""
    drawn = 0
    while search.budget.left and (wave := n - drawn if n else max(1, search.budget.left // search.max_tokens)):
        grown = yield from search.expand([search.root] * wave)
        drawn += wave
        yield from _value(search, guide, grown)
        if stops and _settled(search, guide):
            return


def _votes(search: Search, guide: Guide | None, n: int) -> Talk[None]:
    yield from best_of(search, guide, n, stops=False)


def _majority(search: Search, guide: Guide | None, n: int) -> Talk[None]:
    yield from best_of(search, None, n)


def beam(search: Search, guide: Guide | None, n: int, m: int, iterations: int) -> Talk[None]:
    """Beams over steps: n candidates for the next step, of which the best n/m go on, with m continuations each.

    What ends leaves them. The last of the iterations goes to the end of the answer; so does the one after which the
    budget is short. While there is some left it begins again, with other samples. (Snell et al. 2024, 2408.03314; as
    in Hugging Face's search-and-learning, but each problem by itself.)
    """
    yield from _beams(search, guide, [n], n // m, iterations)


def dvts(search: Search, guide: Guide | None, n: int, m: int, iterations: int) -> Talk[None]:
    """Diverse trees: n/m beams that never compete, each going on with the best of its m continuations."""
    yield from _beams(search, guide, [m] * (n // m), 1, iterations)


def greedy(search: Search, guide: Guide | None, m: int, iterations: int) -> Talk[None]:
    """One beam: always the best of m continuations."""
    yield from _beams(search, guide, [m], 1, iterations)


def _beams(search: Search, guide: Guide | None, sizes: Sequence[int], keep: int, iterations: int) -> Talk[None]:
    """Groups of beams, with so many candidates each, of which the best `keep` go on."""
    budget, most = search.budget, search.max_tokens
    while budget.left:
        groups, budget.short, last = [[search.root] for _ in sizes], False, False
        for iteration in range(iterations):
            last = iteration == iterations - 1 or budget.short
            # What it takes to end any of them is kept, until there is a whole answer.
            longest = max(most - len(node.tokens) for group in groups for node in group)
            budget.keep = 0 if search.finished or last else longest
            # One of each node first: where the budget is short it is so for what is worse.
            named = [
                (number, group[i % len(group)])
                for i in range(max(sizes))
                for number, (group, size) in enumerate(zip(groups, sizes, strict=True))
                if group and i < size
            ]
            grown = yield from search.expand([node for _, node in named], "" if last else search.task.step)
            yield from _value(search, guide, grown)
            if _settled(search, guide):
                return
            for number, group in enumerate(groups):
                mine = [node for (of, _), node in zip(named, grown, strict=True) if of == number and node is not None]
                going = [node for node in dict.fromkeys(mine) if not node.done]
                groups[number] = sorted(going, key=lambda node: -node.value)[:keep] if mine else group
            if last or not any(groups):
                break


def mcts(search: Search, guide: Guide | None, width: int) -> Talk[None]:
    """A tree search: the child with the highest mean value and bonus, down to a node that is to grow; `width` samples
    of its next step, each valued, and the values backed up.

    The bonus is PUCT's with the constants of AlphaZero's pseudocode, as in OpenR (2410.09671). A child's prior is its
    share of the samples drawn, as these come from the policy. Of a node that was visited often more are drawn: as many
    times `width` as the square root of its visits over `width`.
    """
    budget = search.budget
    while budget.left and not _settled(search, guide):
        budget.keep = 0 if search.finished else search.max_tokens
        grown = yield from search.expand([_leaf(search.root, width)] * width, search.task.step)
        yield from _value(search, guide, grown)
        if budget.short and not search.finished:  # what was kept is for the best of what there is
            budget.keep, budget.short = 0, False
            best = max(search.root.walk(), key=lambda node: -math.inf if math.isnan(node.value) else node.value)
            grown += yield from search.expand([best])
            yield from _value(search, guide, grown)
        for node in grown:
            if node is not None:
                node.back_up(node.mean)


def _leaf(node: Node, width: int) -> Node:
    """The node to grow: one with fewer samples than its visits are worth, or all of whose children are done."""
    while node.draws >= width * max(1, math.isqrt(node.visits // width)):
        going = [child for child in node.children if not child.done]
        if not going:
            break
        node = max(going, key=functools.partial(puct, node))
    return node


def puct(parent: Node, child: Node) -> float:
    """Mean value, and a bonus for what is likely and was visited rarely."""
    rate = math.log((parent.visits + 19653) / 19652) + 1.25
    prior = child.count / sum(other.count for other in parent.children)
    return child.mean + rate * prior * math.sqrt(parent.visits) / (1 + child.visits)


def revise(search: Search, guide: Guide | None, n: int, *, template: str) -> Talk[None]:
    """One attempt after the other, each with the one before it and its verdict in the prompt: `n`, or with 0 as many
    as the budget has room for, or the model for the prompt."""
    root, base = search.root, search.root
    while search.budget.left and (root.draws < n or not n):
        base.draws = root.draws  # the attempts are numbered through, and so are their keys
        (attempt,) = yield from search.expand([base])
        root.draws = base.draws
        yield from _value(search, guide, [attempt])
        if attempt is None:
            return
        if base is not root:
            root.children.append(attempt)
        if _settled(search, guide):
            return
        prompt = revised(template, search.problem, attempt.text, attempt.value)
        try:
            base = Node(prompt=tuple(search.writer.prefix(dataclasses.replace(search.problem, prompt=prompt))))
        except UserError:  # it has outgrown the model
            search.outgrown = True
            return


def revised(template: str, problem: Problem, answer: str, value: float) -> str:
    """The prompt for another attempt. All is put in at once: what an answer has in braces is no field."""
    fields = {"{prompt}": problem.prompt, "{answer}": answer, "{score}": f"{value:.2f}",
              "{verdict}": "right" if value >= 0.5 else "wrong"}  # fmt: skip
    return re.sub("|".join(map(re.escape, fields)), lambda field: fields[field[0]], template)


class Method(NamedTuple):
    name: str  # as it is written
    grow: Callable[[Search, Guide | None], Talk[None]]
    steps: bool  # it goes over the steps of an answer
    guided: bool
    votes: bool  # it chooses what most samples say, or (guided) those with the most value


# Of each its function, its numbers by default, whether it goes over steps, is guided, and has votes counted.
_METHODS: dict[str, tuple[Callable[..., Talk[None]], tuple[int, ...], bool, bool, bool]] = {
    "best_of": (best_of, (0,), False, True, False),
    "vote": (_votes, (0,), False, True, True),
    "majority": (_majority, (0,), False, False, True),
    "greedy": (greedy, (4, 40), True, True, False),
    "beam": (beam, (4, 4, 40), True, True, False),
    "dvts": (dvts, (8, 4, 40), True, True, False),
    "mcts": (mcts, (4,), True, True, False),
    "revise": (revise, (0,), False, True, False),
}  # fmt: skip
KNOWN = ("best_of[:N]", "vote[:N]", "majority[:N]", "greedy[:M[:ITERATIONS]]", "beam[:N[:M[:ITERATIONS]]]",
         "dvts[:N[:M[:ITERATIONS]]]", "mcts[:CHILDREN]", "revise[:N]")  # fmt: skip


def open_method(spec: str, *, revision: str = REVISION) -> Method:
    """A method as a user writes it, one of `KNOWN`; N of 0 is as many as the budget has room for.

    Args:
      revision: of `revise` the prompt after the first; {prompt}, {answer}, {verdict} (right or wrong) and {score} are
        put in.

    Raises:
      UserError: there is none of that name, or its numbers are not what it takes.
    """
    name, *given = spec.split(":")
    if name not in _METHODS:
        raise UserError(f"unknown search {name!r}{suggest(name, _METHODS)}")
    function, usual, steps, guided, votes = _METHODS[name]
    at, usage = f"search {spec}", next(known for known in KNOWN if known.startswith(name))
    if len(given) > len(usual) or not all(re.fullmatch("[0-9]{1,6}", number) for number in given):
        raise UserError("its numbers are wrong", at=at, hint=usage)
    numbers = (*map(int, given), *usual[len(given) :])
    if steps and min(numbers) < 1:
        raise UserError("its numbers are at least 1", at=at, hint=usage)
    if name in ("beam", "dvts") and numbers[0] % numbers[1]:
        raise UserError(f"{numbers[0]} candidates are no multiple of {numbers[1]} continuations", at=at, hint=usage)
    if name == "revise":
        if "{answer}" not in revision:
            raise UserError("the earlier attempt is not in the template", at=at, hint="{answer}")
        function = functools.partial(revise, template=revision)
    return Method(spec, lambda search, guide: function(search, guide, *numbers), steps, guided, votes)


def check(task: Task, method: Method, guide: Guide | None, budget: int, max_tokens: int) -> None:
    """UserError for what `run` cannot do, before there is a model."""
    if max_tokens < 1:
        raise UserError(f"an answer of {max_tokens} tokens", hint="at least 1")
    if budget < max_tokens:
        raise UserError(f"a budget of {budget} tokens is smaller than one answer of up to {max_tokens}")
    if method.steps and not task.step:
        raise UserError("it goes over steps, and an answer to this task is one step", at=f"search {method.name}")
    if method.guided and guide is None:
        raise UserError("it needs a guide", at=f"search {method.name}")


def run(
    writer: Writer, task: Task, problems: Sequence[Problem], method: Method, guide: Guide | None, *, budget: int,
    max_tokens: int, seed: int, told: Callable[[int], None] = lambda done: None,
) -> list[Found]:  # fmt: skip
    """Searches for answers to all problems side by side; what is found for one does not depend on the others.

    Args:
      guide: None only where the method is not guided.
      budget: tokens that may be generated for each problem, at least those of one answer: so that there is one.
      max_tokens: of one answer.
      seed: the same gives the same.
      told: hears how many problems are done.

    Raises:
      UserError: as `check`: a budget smaller than one answer, steps of answers that have none, a guide that is missing.
    """
    check(task, method, guide, budget, max_tokens)
    searches = [Search(task, problem, writer, Budget(budget), max_tokens, seed) for problem in problems]
    found = drive(writer, [_whole(search, method, guide) for search in searches], told)
    if outgrown := sum(search.outgrown for search in searches):
        say(f"of {outgrown} of {len(searches)} problems the revised prompt outgrew the model, and their searches ended")
    return found


def _whole(search: Search, method: Method, guide: Guide | None) -> Talk[Found]:
    yield from method.grow(search, guide)
    if method.guided and guide is not None and guide.among:
        for node in search.finished:
            node.value = math.nan
    if method.guided:
        yield from _value(search, guide, search.finished)
    assert search.budget.used <= search.budget.tokens
    return Found(search.problem, _ranked(search, method), search.budget.used, search.root, search.finished)


def _ranked(search: Search, method: Method) -> list[Ranked]:
    """One for each text, or of votes for each thing that is said; the earlier of two that are equal first."""
    says = {id(node): search.task.final(search.problem, node.text) for node in search.finished}
    votes, weights = Counter[str](), defaultdict[str, float](float)
    for node in search.finished:
        votes[says[id(node)]] += node.count
        weights[says[id(node)]] += node.count * (node.value if method.guided else 1)
    counted = method.votes and any(votes.keys() - {""})
    total = sum(weight for said, weight in weights.items() if said) or 1
    best: dict[str, Ranked] = {}
    for node in sorted(search.finished, key=lambda node: 0 if math.isnan(node.value) else -node.value):
        said = says[id(node)]
        if not counted:
            score = 0.0 if math.isnan(node.value) else node.value
            best.setdefault(node.text, Ranked(node.text, score, votes[said] if said else 0, node.path))
        elif said:
            best.setdefault(said, Ranked(node.text, weights[said] / total, votes[said], node.path))
    return sorted(best.values(), key=lambda ranked: -ranked.score)
