"""Several examples in one row, each a segment of its own: best-fit decreasing.

Longest first, each example goes into the row that it leaves least room in, or a new one (Johnson 1973; for training
Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830). No example is cut.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Where each of N examples lies. Rows are numbered as they were opened: those of long examples come first."""

    lengths: np.ndarray  # int64 [N]
    capacity: int  # tokens of a row
    row: np.ndarray  # int64 [N]
    offset: np.ndarray  # int64 [N]: of the first token, in its row
    order: np.ndarray  # int64 [N]: the examples by row, and in a row by offset
    bounds: np.ndarray  # int64 [num_rows + 1]: those of row r are order[bounds[r] : bounds[r + 1]]

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1

    @property
    def efficiency(self) -> float:
        """The part of all rows' places that holds a token."""
        return float(self.lengths.sum() / (self.num_rows * self.capacity))


def pack_apart(lengths: np.ndarray, groups: np.ndarray, capacity: int) -> tuple[Packing, list[int]]:
    """As `pack`, where no row has examples of two groups, int [N] from 0; and how many rows each group has.

    The rows of one group follow those of the group before it. ValueError also for a group of nothing.
    """
    lengths = np.asarray(lengths, np.int64)
    row, offset = np.empty_like(lengths), np.empty_like(lengths)
    orders, bounds = [], [np.zeros(1, np.int64)]
    counts: list[int] = []
    for group in range(groups.max(initial=0) + 1):
        members = np.flatnonzero(groups == group)
        packed = pack(lengths[members], capacity)
        row[members], offset[members] = packed.row + sum(counts), packed.offset
        orders.append(members[packed.order])
        bounds.append(bounds[-1][-1] + packed.bounds[1:])
        counts.append(packed.num_rows)
    whole = Packing(
        lengths=lengths, capacity=capacity, row=row, offset=offset, order=np.concatenate(orders),
        bounds=np.concatenate(bounds),
    )  # fmt: skip
    return whole, counts


def pack(lengths: np.ndarray, capacity: int) -> Packing:
    """int [N] lengths of at least one example, each in 1..capacity; ties go by index, so the result is determined.

    Raises ValueError for other lengths: what is too long for a row is the caller's to drop.
    """
    lengths = np.asarray(lengths, np.int64)
    if not lengths.size or lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths to pack must lie in 1..{capacity}, and there must be one")
    longest_first = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(-lengths, return_counts=True)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    rooms = 0  # bit r: with_room[r] is not empty
    num_rows = 0
    # One entry for each time that a row was given examples of one length: the row, its room before, how many.
    rows, befores, numbers = [], [], []
    for size, count in zip((-sizes).tolist(), counts.tolist()):
        while count:
            if fitting := rooms >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                row = with_room[room].pop()
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                room, row = capacity, num_rows
                num_rows += 1
            # The room that is left, if another one fits, is again the smallest in which it does.
            take = min(count, room // size)
            rows.append(row)
            befores.append(room)
            numbers.append(take)
            count -= take
            if room := room - take * size:
                with_room[room].append(row)
                rooms |= 1 << room
    takes = np.array(numbers)
    nth = np.arange(len(lengths)) - np.repeat(np.cumsum(takes) - takes, takes)
    row, offset = np.empty_like(lengths), np.empty_like(lengths)
    row[longest_first] = np.repeat(rows, takes)
    offset[longest_first] = capacity - np.repeat(befores, takes) + nth * lengths[longest_first]
    order, bounds = np.lexsort((offset, row)), np.concatenate([[0], np.cumsum(np.bincount(row))])
    return Packing(lengths=lengths, capacity=capacity, row=row, offset=offset, order=order, bounds=bounds)
