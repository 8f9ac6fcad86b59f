"""Batches of token rows, each a pure function of (seed, step).

Position i = step * batch_size + j of the run is row permutation(seed, i // N)[i % N]: each epoch visits
each of the N rows once, and one follows the other even within a batch. So a run resumes knowing its
step alone, and any number of processes reads the same global batch, each only its share.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from jaxup.data.prepare import prepare
from jaxup.data.sources import open_source, safe_name
from jaxup.data.store import FORMAT, META, Rows, Store, check_same
from jaxup.data.tokenizer import bpe_vocab_size, load_tokenizer, tokenizer_hash
from jaxup.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUBSET_EPOCH = 2**64 - 1  # the permutation that chooses a subset's rows; no run gets there


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str  # "python", a path, or a dataset's name; see jaxup.data.sources
    tokenizer: str  # bpe:N = train N tokens on the source; else a Hugging Face directory or id
    seq_len: int
    val_fraction: float  # of the documents, where the source has no validation split
    fraction: float  # of the training rows, chosen at random; 1.0 = all
    tokens: int  # training tokens, in whole rows chosen like those of a fraction; 0 = all
    isolate_documents: bool  # attention and loss do not cross from one document into the next
    store: str  # directory of the tokens, local or gs://; "" = one under `root` named after its contents
    seed: int  # of the split into train and validation, where a source is split at random
    tokenizer_files: str = ""  # where the files of `tokenizer` lie, if its name does not say


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenData:
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    eos_id: int
    train: Rows
    validation: Rows
    store: str
    seq_len: int
    train_rows: int  # of `train`, those that are used
    isolate_eos: int | None  # the EOS id to keep documents apart, None to let attention cross them

    def __str__(self) -> str:
        used = "" if self.train_rows == len(self.train) else f" ({self.train_rows * self.seq_len:,} of them used)"
        return (
            f"{self.store}: {self.train.num_tokens:,} training{used} and {self.validation.num_tokens:,} validation "
            f"tokens, vocabulary {self.vocab_size:,}, rows of {self.seq_len}"
        )

    def whole(self) -> TokenData:
        """The same with all of its training rows in use."""
        return dataclasses.replace(self, train_rows=len(self.train))

    def batches(self, *, batch_size: int, seed: int) -> Batches:
        """The training batches this data is configured for."""
        rows = TextRows(self.train, self.isolate_eos)
        return Batches(rows, batch_size=batch_size, seed=seed, num_rows=self.train_rows)

    def validation_batches(
        self, *, batch_size: int, max_rows: int, part: slice = slice(None)
    ) -> Iterator[dict[str, np.ndarray]]:
        """See the function of that name."""
        rows = TextRows(self.validation, self.isolate_eos)
        return validation_batches(rows, batch_size=batch_size, max_rows=max_rows, part=part)


def open_data(config: DataConfig, *, root: str) -> TokenData:
    """The tokens that `config` describes; they are made first if their store is not there.

    Raises UserError, in one line, for a source or tokenizer that will not do, a store of other tokens,
    or one that another process is making.
    """
    if config.seq_len < 1:
        raise UserError(f"data.seq_len={config.seq_len}: must be at least 1")
    if not 0 < config.fraction <= 1:
        raise UserError(f"data.fraction={config.fraction}: must be above 0 and at most 1")
    if config.tokens < 0:
        raise UserError(f"data.tokens={config.tokens}: must be positive, or 0 for all")
    if config.tokens and config.fraction < 1:
        raise UserError(f"data.tokens={config.tokens} and data.fraction={config.fraction}: give one of the two")
    try:
        source = open_source(config.source, val_fraction=config.val_fraction, seed=config.seed)
        is_bpe = bpe_vocab_size(config.tokenizer) is not None
        if is_bpe and source.is_tokens:
            raise UserError(
                f"data.tokenizer: {config.source} holds tokens; name the tokenizer that made them (nanoGPT: gpt2)"
            )
        tokenizer = None if is_bpe else load_tokenizer(config.tokenizer_files or config.tokenizer)
    except UserError as error:
        return _open_without_source(config, error)
    wanted = {
        "source": {"spec": config.source, "name": source.name, "fingerprint": source.fingerprint},
        "tokenizer": {"spec": config.tokenizer, "hash": "" if is_bpe else tokenizer_hash(tokenizer)},
        "seq_len": config.seq_len,
        "val_fraction": source.val_fraction,
        "seed": source.seed,
    }
    store = Store(config.store or f"{root.rstrip('/')}/{_store_name(config.tokenizer, wanted)}")
    meta = store.read_json(META)
    if meta is None:
        with store.lock():
            # Another process may have finished it between our look and our lock.
            if store.read_json(META) is None:
                prepare(store, source, tokenizer, wanted)
        meta = store.read_json(META)
    check_same(store, meta, wanted)
    return _opened(config, store, meta)


def _open_without_source(config: DataConfig, error: UserError) -> TokenData:
    """A complete store named in the config serves a machine that has not got what it was made from."""
    meta = Store(config.store).read_json(META) if config.store else None
    if (
        meta is None
        or meta.get("kind", "text") != "text"
        or (meta["source"]["spec"], meta["tokenizer"]["spec"]) != (config.source, config.tokenizer)
    ):
        raise error
    store = Store(config.store)
    wanted = {**meta, "seq_len": config.seq_len}
    wanted |= {k: getattr(config, k) for k in ("val_fraction", "seed") if meta[k] is not None}
    check_same(store, meta, wanted)
    print(f"jaxup: using {store.path} unchecked: {error}", file=sys.stderr, flush=True)
    return _opened(config, store, meta)


def _opened(config: DataConfig, store: Store, meta: dict[str, Any]) -> TokenData:
    tokenizer = store.load_tokenizer(meta["tokenizer"]["hash"])
    train = store.open_rows("train", meta)
    return TokenData(
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        eos_id=tokenizer.eos_token_id,
        train=train,
        validation=store.open_rows("validation", meta),
        store=store.path,
        seq_len=meta["seq_len"],
        train_rows=_train_rows(config, train, store.path),
        isolate_eos=tokenizer.eos_token_id if config.isolate_documents else None,
    )


def _train_rows(config: DataConfig, train: Rows, store: str) -> int:
    """How many rows `fraction` or `tokens` leave, at least one; UserError if there are not so many."""
    if not config.tokens:
        return max(1, round(config.fraction * len(train)))
    count = max(1, round(config.tokens / train.seq_len))
    if count > len(train):
        raise UserError(
            f"data.tokens={config.tokens:,}: {store} holds {train.num_tokens:,} training tokens; "
            "give more text, or data.tokens=0 for all there are"
        )
    return count


def _store_name(tokenizer: str, wanted: dict[str, Any]) -> str:
    decides = [FORMAT, wanted["source"]["fingerprint"], wanted["tokenizer"]["hash"] or tokenizer]
    decides += [wanted[key] for key in ("seq_len", "val_fraction", "seed")]
    digest = hashlib.blake2b(json.dumps(decides).encode(), digest_size=4).hexdigest()
    return f"{wanted['source']['name']}-{safe_name(tokenizer.replace(':', '').rstrip('/').split('/')[-1])}-{digest}"


@runtime_checkable
class Fields(Protocol):
    """Rows that make batches: of text below, of chats in `packed.py`."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """int [B] row numbers -> tokens, targets int32 [B, S], loss_weights float32 [B, S].

        Where segments are kept apart also segment_ids (from 1; 0 = padding) and positions (from 0 in
        each segment), int32 [B, S].
        """


class Batches:
    """Training batches: `Batches(...)(step)`.

    `num_rows` keeps a random subset of the rows that depends on `seed` alone (a smaller one's rows
    are among a larger one's).
    """

    def __init__(self, rows: Fields, *, batch_size: int, seed: int, num_rows: int | None = None):
        self.batch_size = batch_size
        self._rows, self._seed = rows, seed
        self._subset = None
        self.num_rows = len(rows) if num_rows is None else num_rows
        if self.num_rows < len(rows):
            self._subset = np.sort(permutation(seed, SUBSET_EPOCH, len(rows))[:num_rows])
        # Two: a batch may straddle two epochs. Least recently used first.
        self._permutations: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of the global batch of `step` (0-based): int64 [batch_size]."""
        epoch, offset = divmod(step * self.batch_size, self.num_rows)
        parts, missing = [], self.batch_size
        while missing:
            part = self._permutation(epoch)[offset : offset + missing]
            parts.append(part)
            missing -= len(part)
            epoch, offset = epoch + 1, 0
        order = np.concatenate(parts)
        return order if self._subset is None else self._subset[order]

    def __call__(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The batch of `step`, or the `rows` of it that this process owns; only those are read."""
        return self._rows.batch(self.rows_of(step)[rows])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            self._permutations[epoch] = permutation(self._seed, epoch, self.num_rows)
            if len(self._permutations) > 2:
                self._permutations.popitem(last=False)
        self._permutations.move_to_end(epoch)
        return self._permutations[epoch]


def validation_batches(
    rows: Fields, *, batch_size: int, max_rows: int, part: slice = slice(None)
) -> Iterator[dict[str, np.ndarray]]:
    """The first `max_rows` rows (0 = all) in their order, as batches of one shape with the fields of `Batches`.

    The last batch is filled up with rows of loss weight 0. `part`: the rows of each batch to read.
    """
    total = min(max_rows, len(rows)) if max_rows else len(rows)
    for start in range(0, total, batch_size):
        indices = np.arange(start, start + batch_size)[part]
        batch = rows.batch(np.minimum(indices, total - 1))
        batch["loss_weights"][indices >= total] = 0
        yield batch


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count]. Generator.permutation may change between versions of numpy; Philox's raw stream may not."""
    key = np.array([seed % 2**64, epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Rows of text as fields of batches."""

    rows: Rows
    isolate_eos: int | None  # the EOS id to keep documents apart, None to let attention cross them

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = self.rows.read(indices)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        batch = {"tokens": tokens.copy(), "targets": targets.copy(), "loss_weights": np.ones(tokens.shape, np.float32)}
        if self.isolate_eos is None:
            return batch
        is_eos = tokens == self.isolate_eos
        # A document owns its EOS; what the EOS would predict belongs to the next document.
        begins = np.zeros(tokens.shape, bool)
        begins[:, 1:] = is_eos[:, :-1]
        batch["loss_weights"][is_eos] = 0
        batch["segment_ids"] = 1 + np.cumsum(begins, axis=1, dtype=np.int32)
        batch["positions"] = positions(begins)
        return batch


def positions(begins: np.ndarray) -> np.ndarray:
    """bool [B, S], where segments begin -> int32 [B, S], from 0 in each; the first place begins one in any case."""
    index = np.arange(begins.shape[1], dtype=np.int32)
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
