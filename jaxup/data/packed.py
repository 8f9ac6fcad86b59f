"""Chats as packed token rows on disk: what an array holds, how the rows are written and read.

A split is two arrays [rows, seq_len]: SPLIT/ids, the tokens (uint16 or uint32), and SPLIT/marks, uint8 bits: TRAINED,
BEGINS (a conversation), PADDING. All fields of a batch follow from these.

How many tokens a conversation has is known only once it is tokenised, and rows are packed by length. So between the
two, conversations lie one after the other in flat files: memory holds a few bytes for each of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxup.data.batches import permutation, positions
from jaxup.data.chat_formats import Encoded
from jaxup.data.packing import Packing, pack
from jaxup.data.store import Store, gather, in_vocabulary, shard_rows

if TYPE_CHECKING:
    import tensorstore as ts

TRAINED, BEGINS, PADDING = 1, 2, 4
ROW_ORDER = 2**64 - 2  # the permutation of a split's rows: no epoch and no subset has it


class PackedRows:
    """The rows of one split."""

    def __init__(self, ids: ts.TensorStore, marks: ts.TensorStore, name: str, vocab_size: int):
        self._arrays, self._name, self._vocab_size = (ids, marks), name, vocab_size

    def __len__(self) -> int:
        return self._arrays[0].shape[0]

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `Fields` says; the loss weight is 1 where the target is a trained token of the same segment.

        Padding, and what has no target, is 0.
        """
        tokens, marks = self._read(indices)
        held, begins = (marks & PADDING) == 0, (marks & BEGINS) != 0
        follows = held[:, 1:] & ~begins[:, 1:]  # the next token is of the same segment
        targets, loss_weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        targets[:, :-1] = tokens[:, 1:] * follows
        loss_weights[:, :-1] = follows & ((marks[:, 1:] & TRAINED) != 0)
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_weights": loss_weights,
            "segment_ids": np.cumsum(begins, axis=1, dtype=np.int32) * held,
            "positions": positions(begins) * held,
        }

    def conversations(self, row: int) -> list[Encoded]:
        """Those of one row, in order."""
        (ids,), (marks,) = self._read(np.array([row]))
        held = (marks & PADDING) == 0
        edges = [*np.flatnonzero(marks & BEGINS).tolist(), int(held.sum())]
        trained = (marks & TRAINED) != 0
        return [Encoded(ids[a:b], trained[a:b]) for a, b in itertools.pairwise(edges)]

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, marks = gather(self._arrays, indices, self._name)
        return in_vocabulary(ids, self._vocab_size, self._name), marks


def open_packed(store: Store, split: str, meta: dict[str, Any]) -> PackedRows:
    size = {"rows": meta["statistics"][split]["rows"], "width": meta["seq_len"]}
    dtypes = {"ids": meta["dtype"], "marks": "uint8"}
    ids, marks = (store.open_array(f"{split}/{name}", meta, **size, dtype=dtype) for name, dtype in dtypes.items())
    return PackedRows(ids, marks, f"{store.path}/{split}", meta["tokenizer"]["vocab_size"])


class Scratch:
    """Tokenised conversations in flat files in `directory`, appended to and then read by number."""

    CONVERSATION = np.dtype([("length", "<i4"), ("validation", "?"), ("text_hash", "<u8")])
    TOKEN = np.dtype("<u4")  # id * 2 + trained

    def __init__(self, directory: Path):
        directory.mkdir(exist_ok=True)
        self._paths = {self.CONVERSATION: directory / "conversations.bin", self.TOKEN: directory / "tokens.bin"}
        for path in self._paths.values():
            path.touch()

    def cut(self, counts: Sequence[int]) -> bool:
        """Leaves so many conversations and tokens; False, and nothing is left, if there are not so many."""
        sizes = [count * dtype.itemsize for count, dtype in zip(counts, self._paths)]
        enough = all(path.stat().st_size >= size for path, size in zip(self._paths.values(), sizes))
        for path, size in zip(self._paths.values(), sizes):
            with path.open("r+b") as file:
                file.truncate(size if enough else 0)
        return enough

    def append(self, encoded: Sequence[Encoded], validation: Sequence[bool], hashes: Sequence[int]) -> None:
        """What is appended is in the files when this returns."""
        lengths = [len(one.ids) for one in encoded]
        rows = np.array(list(zip(lengths, validation, hashes)), self.CONVERSATION)
        tokens = [one.ids.astype(self.TOKEN) * 2 + one.trained for one in encoded]
        for path, array in zip(self._paths.values(), (rows, np.concatenate(tokens))):
            with path.open("ab") as file:
                file.write(array.tobytes())

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """CONVERSATION [n], and the tokens of all, TOKEN [sum of lengths], of which only what is used is read."""
        conversations = np.fromfile(self._paths[self.CONVERSATION], self.CONVERSATION)
        # As a plain array: slices of a memmap cost more than their bytes.
        return conversations, np.asarray(np.memmap(self._paths[self.TOKEN], self.TOKEN, mode="r"))


def write_packed(
    store: Store, split: str, conversations: tuple[np.ndarray, np.ndarray], chosen: np.ndarray, *, seq_len: int,
    dtype: str, packing: bool, seed: int, progress: Callable[[int], None],
) -> Packing:  # fmt: skip
    """Writes the rows of the `chosen` conversations, bool [n], of `Scratch.read`, shard by shard.

    Which rows `pack` makes depends on the lengths alone, long ones first, so they are put into a random order, which
    depends on `seed`. Writing again what is there changes nothing.
    """
    table, tokens = conversations
    lengths = table["length"].astype(np.int64)
    starts, lengths = (np.cumsum(lengths) - lengths)[chosen], lengths[chosen]
    # One example as long as a row is alone in it.
    packed = pack(lengths if packing else np.full_like(lengths, seq_len), seq_len)
    packed = dataclasses.replace(packed, lengths=lengths)
    order = permutation(seed, ROW_ORDER, packed.num_rows)
    dtypes = {"ids": dtype, "marks": "uint8"}
    arrays = [store.create_array(f"{split}/{name}", width=seq_len, dtype=kind) for name, kind in dtypes.items()]
    with store.errors():
        arrays = [array.resize(exclusive_max=[packed.num_rows, seq_len]).result() for array in arrays]
    at_once = min(map(shard_rows, arrays))
    for begin in range(0, packed.num_rows, at_once):
        rows = order[begin : begin + at_once]
        ids, marks = assemble(packed, tokens, starts, rows)
        with store.errors():
            end = begin + len(rows)
            for future in [array[begin:end].write(value) for array, value in zip(arrays, (ids.astype(dtype), marks))]:
                future.result()
        progress(end)
    return packed


def assemble(packed: Packing, tokens: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """ids uint32 and marks uint8, both [len(rows), capacity]."""
    both = np.zeros((len(rows), packed.capacity), np.uint32)
    marks = np.full(both.shape, PADDING, np.uint8)
    for r, row in enumerate(rows.tolist()):
        members = packed.order[packed.bounds[row] : packed.bounds[row + 1]]
        for start, offset, length in zip(
            starts[members].tolist(), packed.offset[members].tolist(), packed.lengths[members].tolist()
        ):
            both[r, offset : offset + length] = tokens[start : start + length]
            marks[r, offset : offset + length] = 0
            marks[r, offset] = BEGINS
    marks |= (both & 1).astype(np.uint8)  # TRAINED
    return both >> 1, marks
