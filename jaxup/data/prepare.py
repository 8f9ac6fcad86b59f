"""Fills a token store: tokenises a source as a stream and writes rows, shard by shard.

The stream of a split is its documents in order, each followed by EOS; what is left after the last
whole row (fewer than seq_len tokens) is dropped. After each shard `progress.json` says at which token
of which document the next row begins, so a killed process goes on from there and writes the same bytes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxup.data.sources import SPLITS, Source, Split
from jaxup.data.store import PROGRESS, Store, check_same, shard_rows
from jaxup.data.tokenizer import batched, bpe_vocab_size, encoder, tokenizer_hash, train_bpe
from jaxup.errors import UserError
from jaxup.progress import Progress, say

if TYPE_CHECKING:
    import tensorstore as ts
    from transformers import PreTrainedTokenizerBase

TOKEN_SLICE = 2**20  # a source of tokens is read in slices of this many
# A vocabulary is trained on the first so many characters of the training split: enough, and bounded.
TRAINING_CHARACTERS = 200_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where the next row begins. Documents of a source of tokens are slices of TOKEN_SLICE tokens."""

    documents: int = 0  # those that lie wholly before it
    skip: int = 0  # tokens of the next document that lie before it
    rows: int = 0  # written so far
    tokens: int = 0  # in the whole stream; known when `done`
    done: bool = False


def prepare(store: Store, source: Source, tokenizer: PreTrainedTokenizerBase | None, wanted: dict[str, Any]) -> None:
    """Makes `store` complete, going on from its progress record if it has one. The caller holds the lock.

    `tokenizer` None: one is trained, as the spec bpe:N says. UserError for an unfinished store of other tokens.
    """
    made = {**wanted, "tokenizer": dict(wanted["tokenizer"])}
    progress = store.read_json(PROGRESS) or {"made": made, "splits": {}, "tokenizer_saved": False}
    check_same(store, progress["made"], wanted)
    started = time.monotonic()
    try:
        splits = _fill(store, source, tokenizer, progress)
    except UserError:
        # A source that will not do leaves nothing behind; rows once written are kept to go on from.
        if not any(position["rows"] for position in progress["splits"].values()):
            with contextlib.suppress(UserError):
                store.discard()
        raise
    store.finish({**progress["made"], "splits": splits})
    store.delete(PROGRESS)
    counts = ", ".join(f"{splits[split]['tokens']:,} {split} tokens" for split in SPLITS)
    say(f"{store.path}: {counts} in {time.monotonic() - started:.1f} s")


def _fill(
    store: Store, source: Source, tokenizer: PreTrainedTokenizerBase | None, progress: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """Writes what `progress`, which it keeps up to date, does not count as done: split -> rows and tokens."""
    made = progress["made"]
    if progress["tokenizer_saved"]:
        tokenizer = store.load_tokenizer(made["tokenizer"]["hash"])
    else:
        spec = made["tokenizer"]["spec"]
        if tokenizer is None:
            say(f"training a vocabulary of {bpe_vocab_size(spec)} tokens on {source.name}")
            tokenizer = train_bpe(_beginning(source), bpe_vocab_size(spec))
        if tokenizer.eos_token_id is None:
            what = f"{spec} has no end-of-sequence token (eos_token) to end documents with"
            raise UserError(what, at="tokenizer")
        vocab_size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))  # numbers may be left out
        made["tokenizer"] |= {"hash": tokenizer_hash(tokenizer), "vocab_size": vocab_size}
        made["dtype"] = "uint16" if vocab_size <= 2**16 else "uint32"
        store.write_json(PROGRESS, progress)
        store.save_tokenizer(tokenizer)
        progress["tokenizer_saved"] = True
        store.write_json(PROGRESS, progress)
    splits: dict[str, dict[str, int]] = {}
    for split in reversed(SPLITS):  # validation first: the split that may be too small is found at once
        position = Position(**progress["splits"].get(split, {}))
        if not position.done:
            array = store.create_array(split, width=made["seq_len"] + 1, dtype=made["dtype"])
            start = position.documents
            with Progress(f"tokenising {source.name}, {split}", total=None, unit="documents", start=start) as bar:
                documents = _watched(_token_documents(source, split, tokenizer, made, start), bar, start)
                for reached in _write_rows(store, array, documents, position):
                    position = reached
                    progress["splits"][split] = dataclasses.asdict(position)
                    store.write_json(PROGRESS, progress)
        if not position.rows:
            seq_len, found = made["seq_len"], f"its {split} split has {position.tokens} tokens"
            what = f"no text found for one row: {found}, data.seq_len={seq_len} needs {seq_len + 1}"
            raise UserError(what, at=("source", source.spec))
        splits[split] = {"rows": position.rows, "tokens": position.tokens}
    return splits


def _beginning(source: Source) -> Iterator[str]:
    """What a vocabulary is trained on."""
    characters = 0
    for text in source.documents("train"):
        yield text
        characters += len(text)
        if characters >= TRAINING_CHARACTERS:
            return


def _token_documents(
    source: Source, split: Split, tokenizer: PreTrainedTokenizerBase, made: dict[str, Any], start: int
) -> Iterator[np.ndarray]:
    """The tokens of each document from number `start` on, EOS included; [length] of the store's dtype."""
    dtype, vocab_size = made["dtype"], made["tokenizer"]["vocab_size"]
    if source.is_tokens:
        tokens = source.tokens(split)
        for at in range(start * TOKEN_SLICE, len(tokens), TOKEN_SLICE):
            part = np.asarray(tokens[at : at + TOKEN_SLICE])
            if part.max() >= vocab_size:
                vocabulary = f"the vocabulary of {made['tokenizer']['spec']}, which has {vocab_size} tokens"
                raise UserError(f"token {part.max()} is outside {vocabulary}", at=("source", source.spec))
            yield part.astype(dtype)
        return
    encode, eos = encoder(tokenizer), tokenizer.eos_token_id
    for batch in batched(itertools.islice(source.documents(split), start, None), len):
        for ids in encode(batch):
            ids.append(eos)
            yield np.array(ids, dtype)


def _write_rows(
    store: Store, array: ts.TensorStore, documents: Iterator[np.ndarray], position: Position
) -> Iterator[Position]:
    """Writes the rows from `position` on and yields the position after each shard; the last one is `done`.

    `documents` begins with document number `position.documents`.
    """
    seq_len = array.shape[1] - 1
    rows_at_once = shard_rows(array)
    pending: collections.deque[np.ndarray] = collections.deque()
    held = -position.skip  # tokens of `pending` at and after the position

    def write(rows: int) -> Position:
        nonlocal array, held
        flat = np.concatenate(pending)[position.skip :][: rows * seq_len + 1]
        end = position.rows + rows
        values = np.lib.stride_tricks.sliding_window_view(flat, seq_len + 1)[::seq_len]
        with store.errors():
            if array.shape[0] < end:
                array = array.resize(exclusive_max=[end, seq_len + 1]).result()
            array[position.rows : end].write(values).result()
        held -= rows * seq_len
        documents_done, skip = position.documents, position.skip + rows * seq_len
        while pending and skip >= len(pending[0]):
            skip -= len(pending.popleft())
            documents_done += 1
        return Position(documents=documents_done, skip=skip, rows=end)

    for document in documents:
        pending.append(document)
        held += len(document)
        while held > rows_at_once * seq_len:
            position = write(rows_at_once)
            yield position
    if held > seq_len:
        position = write((held - 1) // seq_len)
    yield dataclasses.replace(position, tokens=position.rows * seq_len + max(0, held), done=True)


def _watched(documents: Iterable[np.ndarray], progress: Progress, done: int) -> Iterator[np.ndarray]:
    """Passes `documents` through, counting from `done` on."""
    tokens = 0
    for count, document in enumerate(documents, done + 1):
        yield document
        tokens += len(document)
        progress.update(count, f"{tokens:,} tokens")
