"""The tree that all searches grow, the budget that they keep to, and who answers what they ask.

A search is a generator: it yields a `Request`, is sent the answer, and returns what it found. So searches of many
problems go on side by side, and all that they ask at a time is one call of the policy (`drive`).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxup.learning.problem import Ask, Problem, Task, Writer, Written

T = TypeVar("T")


class Scores(NamedTuple):
    """A request to have things scored: all that go to one `score` are scored together."""

    score: Callable[[Sequence[Any]], Sequence[float]]
    what: Sequence[Any]


Request = list[Ask] | Scores
Talk = Generator[Request, Any, T]  # is sent list[Written] or list[float], and returns T


def drive(writer: Writer, talks: Sequence[Talk[T]], told: Callable[[int], None] = lambda done: None) -> list[T]:
    """Carries on all of them until each has returned; what each is sent does not depend on the others.

    `told` hears after each round how many have returned.
    """
    results: dict[int, T] = {}
    waiting: dict[int, Request] = {}

    def go_on(number: int, answer: Any) -> None:
        try:
            waiting[number] = talks[number].send(answer)
        except StopIteration as stop:
            results[number] = stop.value

    for number in range(len(talks)):
        go_on(number, None)
    while waiting:
        requests, waiting = waiting, {}
        asks = [ask for request in requests.values() if isinstance(request, list) for ask in request]
        written = iter(writer.write(asks) if asks else ())
        scored: dict[Any, Iterator[float]] = {}
        for score in {id(r.score): r.score for r in requests.values() if isinstance(r, Scores)}.values():
            what = [x for r in requests.values() if isinstance(r, Scores) and r.score is score for x in r.what]
            scored[id(score)] = iter(score(what))
        for number, request in requests.items():
            if isinstance(request, Scores):
                go_on(number, [float(next(scored[id(request.score)])) for _ in request.what])
            else:
                go_on(number, [next(written) for _ in request])
        told(len(results))
    return [results[number] for number in range(len(talks))]


class Budget:
    """Tokens that may be written for one problem, whatever for: thrown away ones and rollouts count as well."""

    def __init__(self, tokens: int):
        self.tokens, self.used = tokens, 0
        self.keep = 0  # of them, for what is to come: what is asked now may not take them
        self.short = False  # something was not written, or not to its end, for want of tokens

    @property
    def left(self) -> int:
        return self.tokens - self.used

    def write(self, asks: Sequence[Ask]) -> Talk[list[Written | None]]:
        """What is written, in this order; None from where on there is no more for it.

        All that is asked at a time fits, however long it gets. As most gets less long, it is asked in several waves,
        the last of a single text with all that is left: it counts if it ends within that.
        """
        done: list[Written | None] = []
        while len(done) < len(asks) and (room := self.left - self.keep) > 0:
            wave = [asks[len(done)]._replace(max_tokens=min(asks[len(done)].max_tokens, room))]
            room -= wave[0].max_tokens
            for ask in asks[len(done) + 1 :]:
                if ask.max_tokens > room:
                    break
                wave.append(ask)
                room -= ask.max_tokens
            for ask, written in zip(wave, (yield wave), strict=True):
                assert len(written.tokens) <= ask.max_tokens, "a policy wrote more than it was asked"
                self.used += len(written.tokens)
                cut = ask.max_tokens < asks[len(done)].max_tokens and not (written.ended or written.stopped)
                self.short |= cut
                done.append(None if cut else written)
        self.short |= len(done) < len(asks)
        return [*done, *[None] * (len(asks) - len(done))]


@dataclasses.dataclass(eq=False)
class Node:
    """An answer, or the beginning of one."""

    path: tuple[int, ...] = ()  # which sample it is of its parent's, and so on from the root
    text: str = ""
    tokens: tuple[int, ...] = ()  # of the answer
    logp: float = 0.0  # of all of them, nats
    done: bool = False  # it has ended, or is as long as an answer may be
    prompt: tuple[int, ...] = ()  # tokens
    parent: Node | None = None
    children: list[Node] = dataclasses.field(default_factory=list)  # no two with the same tokens
    count: int = 1  # how often it was drawn
    draws: int = 0  # samples drawn of what follows it
    value: float = math.nan  # by the guide
    visits: int = 0  # of it and what is below it, in a tree search
    total: float = 0.0  # their values

    @property
    def mean(self) -> float:
        return self.total / self.visits if self.visits else self.value

    def step(self) -> str:
        """Its text after its parent's."""
        return self.text[len(self.parent.text) :] if self.parent else self.text

    def back_up(self, value: float) -> None:
        node: Node | None = self
        while node is not None:
            node.visits += 1
            node.total += value
            node = node.parent

    def walk(self) -> Iterator[Node]:
        """It and all below it, from the top."""
        yield self
        for child in self.children:
            yield from child.walk()


def _digest(text: str) -> int:
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


EXPAND, ROLLOUT = 0, 1  # what a draw is for: part of its key


@dataclasses.dataclass
class Search:
    """One problem's: its tree, its budget, and what has been found. What is drawn depends on `seed`, on the problem
    and on the place in the tree, and on nothing else."""

    task: Task
    problem: Problem
    writer: Writer
    budget: Budget
    max_tokens: int  # of an answer
    seed: int
    root: Node = dataclasses.field(init=False)
    finished: list[Node] = dataclasses.field(default_factory=list)  # answers, in the order in which they were written
    outgrown: bool = False  # it ended as a prompt left no room for an answer

    def __post_init__(self):
        self.root = Node(prompt=tuple(self.writer.prefix(self.problem)))

    def key(self, purpose: int, node: Node, number: int) -> tuple[int, ...]:
        """Of the draw of that number after a node. All have as many numbers, so that all may be drawn together."""
        return self.seed, _digest(self.problem.id), purpose, _digest(str(node.path)), number

    def ask(self, purpose: int, node: Node, number: int, until: str = "") -> Ask:
        most = self.max_tokens - len(node.tokens)
        return Ask(node.prompt + node.tokens, self.key(purpose, node, number), most, until)

    def expand(self, nodes: Sequence[Node], until: str = "") -> Talk[list[Node | None]]:
        """The children drawn for these nodes, one for each time that a node is named: the same one again if it is drawn
        again, None where the budget is short. Those that are done are among `finished`."""
        asks, places = [], []
        for node in nodes:
            places.append((*node.path, node.draws))
            asks.append(self.ask(EXPAND, node, node.draws, until))
            node.draws += 1
        written = yield from self.budget.write(asks)
        return [
            None if text is None else self._child(node, path, text)
            for node, path, text in zip(nodes, places, written, strict=True)
        ]

    def _child(self, parent: Node, path: tuple[int, ...], written: Written) -> Node:
        child = self.after(parent, path, written)
        same = next((other for other in parent.children if other.tokens == child.tokens), None)
        if same is not None:
            same.count += 1
            return same
        parent.children.append(child)
        if child.done:
            self.finished.append(child)
        return child

    def after(self, parent: Node, path: tuple[int, ...], written: Written) -> Node:
        """What comes of a node by what was written."""
        tokens = (*parent.tokens, *map(int, written.tokens))
        done = not written.stopped or len(tokens) >= self.max_tokens
        logp = parent.logp + float(written.logp.sum())
        return Node(path, parent.text + written.text, tokens, logp, done, parent.prompt, parent)


def shown(root: Node) -> Iterator[str]:
    """A line for each node of a tree: its step, value and visits."""

    def lines(node: Node, indent: str) -> Iterator[str]:
        for number, child in enumerate(node.children, 1):
            last = number == len(node.children)
            notes = [f"{child.value:.2f}"] if not math.isnan(child.value) else []
            notes += [f"mean {child.mean:.2f} of {child.visits}"] if child.visits > 1 else []
            notes += [f"drawn {child.count} times"] if child.count > 1 else []
            about = f"  [{', '.join(notes)}{'; done' if child.done else ''}]"
            yield f"{indent}{'└─' if last else '├─'} {child.step()!r}{about}"
            yield from lines(child, indent + ("   " if last else "│  "))

    yield from lines(root, "")
