"""Batches of token rows, each a pure function of (seed, step).

Position i = step * batch_size + j of the run is row permutation(seed, i // N)[i % N]: each epoch visits
each of the N rows once, and one follows the other even within a batch. Of rows in phases each pass over one phase is
what an epoch is of all. So a run resumes knowing its step alone, and any number of processes reads the same global
batch, each only its share.

Rows of which something is drawn anew each time, such as noise, come with a random number for each, of (seed, i) alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from jaxup.data.phases import Phases

SUBSET_EPOCH = 2**64 - 1  # the permutation that chooses a subset's rows; no run gets there
REPLAY = 2**63  # and this plus its number the one that chooses what is seen again in a pass
TRAINING_DRAWS, VALIDATION_DRAWS = 2**64 - 3, 2**64 - 4  # no permutations: the numbers that rows are drawn by


@runtime_checkable
class Fields(Protocol):
    """Rows that make batches; see `rows.py`."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """int [B] row numbers -> tokens, targets int32 [B, S], loss_weights float32 [B, S].

        Where segments are kept apart also segment_ids (from 1; 0 = padding) and positions (from 0 in
        each segment), int32 [B, S]. IndexError outside the rows.

        Rows may have other fields [B, ...]; a second axis is S where sequences are split over devices. Those whose
        names end in "weights" say what counts: they are 0 where a batch is filled up.
        """


class Drawn(Fields, Protocol):
    """Rows of which something is drawn each time that they are seen: `draws` says so."""

    draws: bool

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """As that of `Fields`, drawn by a random uint32 [B] for each row, and by nothing else."""


@runtime_checkable
class TrainingData(Protocol):
    """What training asks of the data that it is on."""

    @property
    def validation(self) -> Fields: ...

    @property
    def store(self) -> str: ...  # where it is kept

    @property
    def seq_len(self) -> int: ...

    @property
    def packed(self) -> bool: ...  # whether a row has parts that do not see each other

    @property
    def stepwise(self) -> bool: ...  # whether rows come with steps, as `Decoder.hidden` takes them

    @property
    def train_rows(self) -> int: ...  # those that are used

    @property
    def epoch_rows(self) -> int: ...  # in an epoch, with what is seen again in it

    def tokens_of(self, rows: int) -> int: ...  # of so many training rows, without padding

    def batches(self, *, batch_size: int, seed: int) -> Batches: ...

    def validation_batches(self, **how: Any) -> Iterator[dict[str, np.ndarray]]: ...  # as the function below


class Batches:
    """Training batches: `Batches(...)(step)`.

    `num_rows` keeps a random subset of the rows that depends on `seed` alone, and lies in any larger one. Rows in
    `phases` are all seen, in the order of these.
    """

    def __init__(
        self, rows: Fields, *, batch_size: int, seed: int, num_rows: int | None = None, phases: Phases | None = None
    ):
        self.batch_size, self._seed = batch_size, seed
        self._rows, self._phases = rows, phases
        self._subset = None
        self.num_rows = len(rows) if num_rows is None else num_rows
        if self.num_rows < len(rows):
            self._subset = np.sort(permutation(seed, SUBSET_EPOCH, len(rows))[:num_rows])
        # Where each pass of a round begins, and where the next round does.
        self._starts = np.cumsum([0, *(phases.lengths() if phases else [self.num_rows])])
        # Two are kept: a batch may straddle two passes.
        self._pass = functools.lru_cache(2)(self._rows_of_pass)

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of the global batch of `step` (0-based): int64 [batch_size]."""
        rounds, offset = divmod(step * self.batch_size, int(self._starts[-1]))
        place = int(np.searchsorted(self._starts, offset, side="right")) - 1
        number, offset = rounds * (len(self._starts) - 1) + place, offset - self._starts[place]
        parts, missing = [], self.batch_size
        while missing:
            part = self._pass(number)[offset : offset + missing]
            parts.append(part)
            missing -= len(part)
            number, offset = number + 1, 0
        return np.concatenate(parts)

    def _rows_of_pass(self, number: int) -> np.ndarray:
        """Of the pass with this number, over all rows or over a phase, in their order."""
        place = number % (len(self._starts) - 1)
        order = permutation(self._seed, number, int(self._starts[place + 1] - self._starts[place]))
        if self._phases is not None:
            phase = place // self._phases.passes
            begin, count = self._phases.before[phase], self._phases.rows[phase]
            again = permutation(self._seed, REPLAY + number, begin)[: self._phases.replayed[phase]]
            return np.concatenate([np.arange(begin, begin + count), again])[order]
        return order if self._subset is None else self._subset[order]

    def __call__(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The batch of `step`, or the `rows` of it that this process owns; only those are read."""
        numbers = (step * self.batch_size + np.arange(self.batch_size))[rows]
        return _batch(
            self._rows, self.rows_of(step)[rows], functools.partial(draws, self._seed, TRAINING_DRAWS, numbers)
        )


def validation_batches(
    rows: Fields, *, batch_size: int, max_rows: int, part: slice = slice(None)
) -> Iterator[dict[str, np.ndarray]]:
    """The first `max_rows` rows (0 = all) in their order, as batches of one shape with the fields of `Batches`.

    The last batch is filled up with rows of weight 0. `part`: the rows of each batch to read. What a row is drawn by
    depends on its number alone.
    """
    total = min(max_rows, len(rows)) if max_rows else len(rows)
    for start in range(0, total, batch_size):
        indices = np.arange(start, start + batch_size)[part]
        held = np.minimum(indices, total - 1)
        batch = _batch(rows, held, functools.partial(draws, 0, VALIDATION_DRAWS, held))
        for name, values in batch.items():
            if name.endswith("weights"):
                values[indices >= total] = 0
        yield batch


def _batch(rows: Fields, indices: np.ndarray, drawn: Callable[[], np.ndarray]) -> dict[str, np.ndarray]:
    if getattr(rows, "draws", False):
        return cast(Drawn, rows).batch(indices, drawn())
    return rows.batch(indices)


def draws(seed: int, stream: int, numbers: np.ndarray) -> np.ndarray:
    """uint32 [n], for each of these ascending numbers: what Philox has at that place of the stream."""
    if not numbers.size:
        return np.zeros(0, np.uint32)
    first, key = int(numbers[0]), np.array([seed % 2**64, stream], np.uint64)
    raw = np.random.Philox(key=key, counter=first).random_raw(4 * (int(numbers[-1]) - first + 1))
    return (raw[::4] >> np.uint64(32)).astype(np.uint32)[numbers - first]


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count]. Generator.permutation may change between versions of numpy; Philox's raw stream may not."""
    key = np.array([seed % 2**64, epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def positions(begins: np.ndarray) -> np.ndarray:
    """bool [B, S], where segments begin -> int32 [B, S], from 0 in each; the first place begins one in any case."""
    index = np.arange(begins.shape[1], dtype=np.int32)
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
