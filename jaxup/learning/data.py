"""Prompts and answers as rows that a model trains on.

A row is a prompt with one answer, from the first position on, and padding after it. What is trained on is the answer,
with the token that ends it.

Shape suffixes: N rows, B batch, S sequence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxup.data.batches import Batches, validation_batches
from jaxup.errors import UserError
from jaxup.learning.problem import Problem, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rows:
    """Arrays [N, ...] by name, as rows of a batch; see `jaxup.data.batches.Fields`."""

    def __init__(self, fields: Mapping[str, np.ndarray]):
        self.fields = dict(fields)

    def __len__(self) -> int:
        return len(self.fields["tokens"])

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[indices] for name, array in self.fields.items()}


def rows(prompts: Sequence[Sequence[int]], answers: Sequence[Any], seq_len: int) -> dict[str, np.ndarray]:
    """tokens, targets int32 [N, S], and loss_weights float32 [N, S], which are 1 where the target is of the answer.

    ValueError if a prompt is empty, or with its answer longer than seq_len + 1 tokens.
    """
    tokens_NS, targets_NS = (np.zeros((len(prompts), seq_len), np.int32) for _ in range(2))
    for tokens_S, targets_S, prompt, answer in zip(tokens_NS, targets_NS, prompts, answers, strict=True):
        whole = np.array([*prompt, *answer], np.int32)
        if not len(prompt) or len(whole) > seq_len + 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens and an answer of {len(answer)}, in rows of {seq_len}")
        tokens_S[: len(whole) - 1], targets_S[: len(whole) - 1] = whole[:-1], whole[1:]
    weights = along(prompts, [np.ones(len(answer), np.float32) for answer in answers], seq_len)
    return {"tokens": tokens_NS, "targets": targets_NS, "loss_weights": weights}


def along(prompts: Sequence[Sequence[int]], values: Sequence[np.ndarray], seq_len: int) -> np.ndarray:
    """float32 [N, S]: a value for each token of each answer, where that token is the target; 0 elsewhere."""
    found_NS = np.zeros((len(prompts), seq_len), np.float32)
    for found_S, prompt, of in zip(found_NS, prompts, values, strict=True):
        found_S[len(prompt) - 1 : len(prompt) - 1 + len(of)] = of
    return found_NS


class From(Batches):
    """Batches of a round: those of its rows, the first of them at step `first` of the training."""

    def __init__(self, rows: Rows, *, batch_size: int, seed: int, first: int):
        super().__init__(rows, batch_size=batch_size, seed=seed)
        self._first = first

    def rows_of(self, step: int) -> np.ndarray:
        return super().rows_of(step - self._first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's problems with their solutions, as what a run trains on and is evaluated with.

    Args:
      task: None where there are no data but their shapes.
      problems: those of `train`, row by row.
      store: a name for what decides the rows; nothing is kept there.
      longest: tokens of the longest prompt, and of the longest solution with its end.
      sampled: rows that are made while it trains, in the place of these; 0 = none.
    """

    task: Task | None
    problems: Sequence[Problem]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    train: Rows
    validation: Rows
    store: str
    seq_len: int
    longest: tuple[int, int]
    sampled: int = 0

    phases = None  # rows are seen all mixed
    packed = False  # a row is one answer
    stepwise = False

    def __str__(self) -> str:
        assert self.task is not None
        return (
            f"{self.task.name}: {len(self.task.train):,} training and {len(self.task.test):,} test problems, of which "
            f"{len(self.train):,} and {len(self.validation):,} have solutions; rows of {self.seq_len}, vocabulary "
            f"{self.vocab_size:,}"
        )

    @property
    def train_rows(self) -> int:
        return self.sampled or len(self.train)

    @property
    def epoch_rows(self) -> int:
        return self.train_rows

    @property
    def validation_tokens(self) -> int:
        """With a loss."""
        return int(self.validation.fields["loss_weights"].sum())

    def ends(self) -> Iterator[int]:
        """How many training rows were seen when each epoch is at its end, on and on."""
        return itertools.count(self.train_rows, self.train_rows)

    def tokens_of(self, rows: int) -> int:
        """Of so many training rows, on average: without padding."""
        lengths_N = np.max(np.where(self.train.fields["loss_weights"] > 0, np.arange(1, self.seq_len + 1), 0), axis=1)
        return round(rows * float(lengths_N.mean()))

    def batches(self, *, batch_size: int, seed: int) -> Batches:
        return Batches(self.train, batch_size=batch_size, seed=seed)

    def validation_batches(self, **how: Any) -> Iterator[dict[str, np.ndarray]]:
        """See the function of that name."""
        return validation_batches(self.validation, **how)

    def example(self, color: bool) -> str:
        """Lines on what a problem of training looks like, with its solution."""
        first = self.problems[0]
        text = f"{first.prompt}{first.solution or first.answer}"
        return "\n".join(["  the first problem, with its solution:", *(f"  | {line}" for line in text.splitlines())])


def solved(problem: Problem) -> str:
    """The text of an answer that verifies; "" where none is known."""
    return problem.solution or problem.answer


def task_data(
    task: Task, tokenizer: PreTrainedTokenizerBase, *, prompts: Mapping[str, Sequence[int]], end: int | None,
    vocab_size: int, seq_len: int, answer: int, store: str,
) -> TaskData:  # fmt: skip
    """The problems that have a solution as rows.

    Args:
      prompts: the tokens of each problem's prompt, by its id.
      end: the token that ends an answer; None: nothing does.
      seq_len: of rows; 0 = as many positions as the longest prompt and answer need.
      answer: tokens that an answer may have; 0 = as many as the longest solution.

    Raises:
      UserError: no problem to train or to test with has a solution, or one is longer than a row.
    """
    split = []
    for name, problems in (("training", task.train), ("test", task.test)):
        known = [problem for problem in problems if solved(problem)]
        if not known:
            what = f"no {name} problem has a solution, and the loss is that of solutions"
            raise UserError(what, at=task.name, hint="give some of them a solution")
        texts = tokenizer([solved(problem) for problem in known], add_special_tokens=False)["input_ids"]
        split.append(
            (known, [prompts[each.id] for each in known], [[*ids, *([] if end is None else [end])] for ids in texts])
        )
    longest = max(map(len, prompts.values())), max(len(ids) for _, _, answers in split for ids in answers)
    needed = max(len(p) + len(a) - 1 for _, many, answers in split for p, a in zip(many, answers))
    if seq_len and seq_len < needed:
        what = f"a prompt and its solution have {needed + 1} tokens"
        raise UserError(what, at=f"data.seq_len={seq_len}", hint=f"{needed} is the least")
    seq_len = seq_len or max(needed, longest[0] + (answer or longest[1]) - 1)
    train, test = (Rows(rows(many, answers, seq_len)) for _, many, answers in split)
    return TaskData(
        task=task, problems=split[0][0], tokenizer=tokenizer, vocab_size=vocab_size, train=train, validation=test,
        store=store, seq_len=seq_len, longest=longest,
    )  # fmt: skip


def no_task_data(seq_len: int) -> TaskData:
    """One row of that length, for what is compiled without data."""
    nothing: Any = None
    one = Rows(rows([[0]], [[0] * seq_len], seq_len))
    return TaskData(
        task=nothing, problems=[], tokenizer=nothing, vocab_size=1, train=one, validation=one, store="",
        seq_len=seq_len, longest=(1, seq_len),
    )  # fmt: skip
