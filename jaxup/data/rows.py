"""The token rows of a store: what its arrays hold, how batches are made of them, how they are written.

A split is SPLIT/ids [rows, width], the tokens, uint16 or uint32; and, unless all of them are trained on, SPLIT/marks,
uint8 bits: TRAINED, BEGINS (an example), PADDING. All fields of a batch follow from these.

Rows are cut in one of two ways. Concatenated, they are a stream of examples one after the other: row r holds the
tokens [r*seq_len, r*seq_len + seq_len] of it, both ends included. Rows overlap by one token, so that each next-token
pair is in exactly one of them. Packed, a row of seq_len tokens holds whole examples, then padding.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxup.data.batches import permutation, positions
from jaxup.data.chat_formats import Encoded
from jaxup.data.packing import Packing, pack_apart
from jaxup.data.sources import SPLITS, Split
from jaxup.data.store import Store, gather, in_vocabulary, shard_rows

if TYPE_CHECKING:
    import tensorstore as ts

TRAINED, BEGINS, PADDING = 1, 2, 4
ROW_ORDER = 2**64 - 2  # the permutation of a split's rows: no epoch and no subset has it


class Rows:
    """The rows of one split.

    Args:
      arrays: ids, and marks unless all is trained on.
      isolate: attention and loss do not cross from one example into the next.
      eos: what ends an example, where there are no marks.
    """

    def __init__(
        self,
        arrays: Sequence[ts.TensorStore],
        name: str,
        *,
        seq_len: int,
        vocab_size: int,
        isolate: bool,
        eos: int | None,
    ):
        self._arrays, self._name = arrays, name
        self.seq_len, self.isolate, self._vocab_size, self._eos = seq_len, isolate, vocab_size, eos

    def __len__(self) -> int:
        return self._arrays[0].shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding too."""
        return len(self) * self.seq_len

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int [n] row numbers, in any order, repeats allowed -> ids int32 and marks uint8, both [n, width].

        IndexError outside the rows. UserError for what cannot be read, and for tokens that the tokenizer has not.
        """
        ids, *marks = gather(self._arrays, indices, self._name)
        ids = in_vocabulary(ids, self._vocab_size, self._name)
        return ids, marks[0] if marks else unmarked(ids, self._eos)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See `jaxup.data.batches.Fields`; the loss weight is 1 where the target is trained on.

        Where examples are kept apart, what would predict another one has no target. Padding, and what has no target,
        is 0.
        """
        ids, marks = self.read(indices)
        if ids.shape[1] == self.seq_len:  # what follows a row is none of its tokens
            ids, marks = (np.pad(array, ((0, 0), (0, 1)), constant_values=end) for array, end in
                          ((ids, 0), (marks, PADDING)))  # fmt: skip
        tokens, held, begins = ids[:, :-1], (marks & PADDING) == 0, (marks & BEGINS) != 0
        follows = held[:, 1:] & ~begins[:, 1:] if self.isolate else held[:, 1:]
        batch = {
            "tokens": tokens.copy(),
            "targets": ids[:, 1:] * follows,
            "loss_weights": (follows & ((marks[:, 1:] & TRAINED) != 0)).astype(np.float32),
        }
        if self.isolate:
            held, begins = held[:, :-1], begins[:, :-1]
            begins[:, 0] = True
            batch["segment_ids"] = np.cumsum(begins, axis=1, dtype=np.int32) * held
            batch["positions"] = positions(begins) * held
        return batch

    def examples(self, row: int) -> list[Encoded]:
        """Those of one row, in order; of a concatenated one as far as they are in it."""
        (ids,), (marks,) = self.read(np.array([row]))
        held = int(((marks & PADDING) == 0).sum())
        edges = sorted({0, *np.flatnonzero(marks & BEGINS).tolist(), held})
        trained = (marks & TRAINED) != 0
        return [Encoded(ids[a:b], trained[a:b]) for a, b in itertools.pairwise(edges)]


def unmarked(ids: np.ndarray, eos: int | None) -> np.ndarray:
    """Marks of ids [n, width] that are all trained on: an example begins after each EOS, if there is such a token."""
    marks = np.full(ids.shape, TRAINED, np.uint8)
    if eos is not None:
        marks[:, 1:] |= np.where(ids[:, :-1] == eos, BEGINS, 0).astype(np.uint8)
    return marks


def open_rows(store: Store, meta: dict[str, Any], *, isolate: bool, eos: int | None) -> tuple[Rows, Rows]:
    """Those of training and of validation, as the store's `meta` describes them."""
    width = meta["seq_len"] + (meta["packing"] == CONCATENATED)
    dtypes = {"ids": meta["dtype"], **({"marks": "uint8"} if meta["marked"] else {})}

    def rows(split: str) -> Rows:
        arrays = [
            store.open_array(f"{split}/{name}", meta, rows=meta["statistics"][split]["rows"], width=width, dtype=dtype)
            for name, dtype in dtypes.items()
        ]
        return Rows(
            arrays, f"{store.path}/{split}", seq_len=meta["seq_len"], vocab_size=meta["tokenizer"]["vocab_size"],
            isolate=isolate, eos=eos,
        )  # fmt: skip

    train, validation = map(rows, SPLITS)
    return train, validation


CONCATENATED, BEST_FIT, ONE = PACKINGS = "concatenated", "best_fit", "one"


class Writer:
    """The arrays of a split, written shard by shard. Writing again what is there changes nothing."""

    def __init__(self, store: Store, split: str, *, width: int, dtype: str, marked: bool):
        dtypes = {"ids": dtype, **({"marks": "uint8"} if marked else {})}
        self._store, self._dtypes, self._width = store, dtypes, width
        self._arrays = [store.create_array(f"{split}/{name}", width=width, dtype=kind) for name, kind in dtypes.items()]
        self.at_once = min(map(shard_rows, self._arrays))

    def write(self, begin: int, ids: np.ndarray, marks: np.ndarray) -> None:
        """Rows from number `begin` on, [n, width]; they are there when this returns."""
        end = begin + len(ids)
        with self._store.errors():
            for at, array in enumerate(self._arrays):
                if array.shape[0] < end:
                    self._arrays[at] = array.resize(exclusive_max=[end, self._width]).result()
            values = [value.astype(kind) for value, kind in zip((ids, marks), self._dtypes.values())]
            for future in [array[begin:end].write(value) for array, value in zip(self._arrays, values)]:
                future.result()


TOKEN = np.dtype("<u4")  # one on its way into a row: its marks in the lowest bits, above them its id
_ID, _MARKS = 3, 7


def flagged(encoded: Encoded) -> np.ndarray:
    """TOKEN [n] of one example."""
    tokens = (encoded.ids.astype(TOKEN) << _ID) | encoded.trained
    tokens[:1] |= BEGINS
    return tokens


class Concatenated:
    """Rows of the stream of each split. What is not yet a shard lies in the store beside the progress record."""

    def __init__(self, store: Store, made: Mapping[str, Any], state: dict[str, Any]):
        self._store, self._seq_len, self.state = store, made["seq_len"], state
        how = {"width": self._seq_len + 1, "dtype": made["dtype"], "marked": made["marked"]}
        self._writers = {split: Writer(store, split, **how) for split in SPLITS}
        self._held: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        if state["rest"]:
            tokens = np.frombuffer(store.read(state["rest"]), TOKEN)
            edges = np.cumsum([0, *(state["held"][split] for split in SPLITS)]).tolist()
            for split, (start, end) in zip(SPLITS, itertools.pairwise(edges)):
                self._held[split].append(tokens[start:end])

    @staticmethod
    def nothing() -> dict[str, Any]:
        return {"rows": dict.fromkeys(SPLITS, 0), "held": dict.fromkeys(SPLITS, 0), "rest": ""}

    @staticmethod
    def is_there(store: Store, state: Mapping[str, Any]) -> bool:
        """Whether what `state` speaks of is, so that one may go on from it."""
        return not state["rest"] or len(store.read(state["rest"])) == sum(state["held"].values()) * TOKEN.itemsize

    def add(self, encoded: Sequence[Encoded], validation: Sequence[bool]) -> bool:
        """True if it is time to remember the state: a shard was written."""
        wrote = False
        for one, is_validation in zip(encoded, validation):
            split = SPLITS[is_validation]
            self._held[split].append(flagged(one))
            self.state["held"][split] += len(one.ids)
            while self.state["held"][split] > (at_once := self._writers[split].at_once) * self._seq_len:
                self._write(split, at_once)
                wrote = True
        return wrote

    def keep(self, read: int) -> str:
        """Puts what is held into the store, after so many examples; the key of what is no longer needed then."""
        rest = np.concatenate([np.zeros(0, TOKEN), *itertools.chain(*(self._held[split] for split in SPLITS))])
        before, self.state["rest"] = self.state["rest"], f"rest-{read}"
        self._store.write(self.state["rest"], rest.tobytes())
        return before

    def finish(self) -> dict[str, dict[str, Any]]:
        """Writes what is held; a last row that would not be full is left out. The statistics of each split."""
        for split in SPLITS:
            if (held := self.state["held"][split]) > self._seq_len:
                self._write(split, (held - 1) // self._seq_len)
        return {split: {"rows": self.state["rows"][split], "efficiency": 1.0} for split in SPLITS}

    def _write(self, split: Split, rows: int) -> None:
        seq_len = self._seq_len
        tokens = np.concatenate(self._held[split])
        values = np.lib.stride_tricks.sliding_window_view(tokens[: rows * seq_len + 1], seq_len + 1)[::seq_len]
        self._writers[split].write(self.state["rows"][split], values >> _ID, values & _MARKS)
        self._held[split] = [tokens[rows * seq_len :]]
        self.state["held"][split] -= rows * seq_len
        self.state["rows"][split] += rows


class Scratch:
    """Tokenised examples in flat files in `directory`, appended to and then read by number.

    How many tokens an example has is known only once it is tokenised, and rows are packed by length. So between the
    two, examples lie one after the other in files: memory holds a few bytes for each of them.
    """

    # `key` says of which phase it is; see `phases.phase_of`.
    EXAMPLE = np.dtype([("length", "<i4"), ("validation", "?"), ("text_hash", "<u8"), ("key", "<i4")])

    def __init__(self, directory: Path):
        directory.mkdir(exist_ok=True)
        self._paths = {self.EXAMPLE: directory / "table.bin", TOKEN: directory / "tokens.bin"}
        for path in self._paths.values():
            path.touch()

    def cut(self, counts: Sequence[int]) -> bool:
        """Leaves so many examples and tokens; False, and nothing is left, if there are not so many."""
        sizes = [count * dtype.itemsize for count, dtype in zip(counts, self._paths)]
        enough = all(path.stat().st_size >= size for path, size in zip(self._paths.values(), sizes))
        for path, size in zip(self._paths.values(), sizes):
            with path.open("r+b") as file:
                file.truncate(size if enough else 0)
        return enough

    def append(
        self, encoded: Sequence[Encoded], validation: Sequence[bool], hashes: Sequence[int], keys: Sequence[int]
    ) -> None:
        """What is appended is in the files when this returns."""
        lengths = [len(one.ids) for one in encoded]
        rows = np.array(list(zip(lengths, validation, hashes, keys)), self.EXAMPLE)
        for path, array in zip(self._paths.values(), (rows, np.concatenate(list(map(flagged, encoded))))):
            with path.open("ab") as file:
                file.write(array.tobytes())

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """EXAMPLE [n], and the tokens of all, TOKEN [sum of lengths], of which only what is used is read."""
        examples = np.fromfile(self._paths[self.EXAMPLE], self.EXAMPLE)
        # As a plain array: slices of a memmap cost more than their bytes.
        return examples, np.asarray(np.memmap(self._paths[TOKEN], TOKEN, mode="r"))


def write_packed(
    store: Store, split: str, examples: tuple[np.ndarray, np.ndarray], chosen: np.ndarray, phase: np.ndarray, *,
    made: Mapping[str, Any], progress: Callable[[int], None],
) -> tuple[Packing, list[int]]:  # fmt: skip
    """Writes the rows of the `chosen` examples, bool [n], of `Scratch.read`, shard by shard.

    `phase`, int [chosen]: the rows of one follow those of the phase before; also returned is how many each has. Which
    rows `pack` makes depends on the lengths alone, long ones first, so those of a phase are put into a random order,
    which depends on the seed.
    """
    table, tokens = examples
    seq_len = made["seq_len"]
    lengths = table["length"].astype(np.int64)
    starts, lengths = (np.cumsum(lengths) - lengths)[chosen], lengths[chosen]
    # One example as long as a row is alone in it.
    places = lengths if made["packing"] == BEST_FIT else np.full_like(lengths, seq_len)
    packed, counts = pack_apart(places, phase, seq_len)
    packed = dataclasses.replace(packed, lengths=lengths)
    begins = itertools.accumulate(counts, initial=0)
    order = np.concatenate([begin + permutation(made["seed"], ROW_ORDER, n) for begin, n in zip(begins, counts)])
    writer = Writer(store, split, width=seq_len, dtype=made["dtype"], marked=True)
    for begin in range(0, packed.num_rows, writer.at_once):
        rows = order[begin : begin + writer.at_once]
        writer.write(begin, *assemble(packed, tokens, starts, rows))
        progress(begin + len(rows))
    return packed, counts


def assemble(packed: Packing, tokens: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """ids uint32 and marks uint8, both [len(rows), capacity]."""
    made = np.full((len(rows), packed.capacity), PADDING, TOKEN)
    for r, row in enumerate(rows.tolist()):
        members = packed.order[packed.bounds[row] : packed.bounds[row + 1]]
        for start, offset, length in zip(
            starts[members].tolist(), packed.offset[members].tolist(), packed.lengths[members].tolist()
        ):
            made[r, offset : offset + length] = tokens[start : start + length]
    return made >> _ID, (made & _MARKS).astype(np.uint8)
