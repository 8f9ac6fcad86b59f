"""Text as a training run reads it: documents one after the other, each with its EOS, cut into rows.

The rows lie in a store (`prepare.py`, `store.py`), which is found again by what it was made from.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxup.data.batches import Data
from jaxup.data.prepare import prepare
from jaxup.data.sources import SPLITS, open_source, safe_name
from jaxup.data.store import Rows, Store, default_path, open_unchecked
from jaxup.data.tokenizer import bpe_vocab_size, load_tokenizer, tokenizer_hash
from jaxup.errors import UserError, within


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
class TokenData(Data):
    train: Rows
    validation: Rows

    def __str__(self) -> str:
        used = "" if self.train_rows == len(self.train) else f" ({self.train_rows * self.seq_len:,} of them used)"
        return (
            f"{self.store}: {self.train.num_tokens:,} training{used} and {self.validation.num_tokens:,} validation "
            f"tokens, vocabulary {self.vocab_size:,}, rows of {self.seq_len}"
        )


@within("data.")
def open_data(config: DataConfig, *, root: str) -> TokenData:
    """The tokens that `config` describes; they are made first if their store is not there.

    UserError for a source or tokenizer that will not do, a store of other tokens, or one that is being made.
    """
    if config.seq_len < 1:
        raise UserError("must be at least 1", at=f"seq_len={config.seq_len}")
    if not 0 < config.fraction <= 1:
        raise UserError("must be above 0 and at most 1", at=f"fraction={config.fraction}")
    if config.tokens < 0:
        raise UserError("must be positive, or 0 for all", at=f"tokens={config.tokens}")
    if config.tokens and config.fraction < 1:
        raise UserError("give one of the two", at=f"tokens={config.tokens} and data.fraction={config.fraction}")
    try:
        source = open_source(config.source, val_fraction=config.val_fraction, seed=config.seed)
        tokenizer = None
        if not bpe_vocab_size(config.tokenizer):
            tokenizer = load_tokenizer(config.tokenizer_files or config.tokenizer)
        elif source.is_tokens:
            what = f"{config.source} holds tokens; name the tokenizer that made them (nanoGPT: gpt2)"
            raise UserError(what, at="tokenizer")
    except UserError as error:
        specs = {"source": config.source, "tokenizer": config.tokenizer}
        store, meta = open_unchecked(config.store, error, "text", specs, lambda meta: {
            **meta, "seq_len": config.seq_len,
            **{key: getattr(config, key) for key in ("val_fraction", "seed") if meta.get(key) is not None},
        })  # fmt: skip
    else:
        wanted: dict[str, Any] = {
            "source": {"spec": config.source, "name": source.name, "fingerprint": source.fingerprint},
            "tokenizer": {"spec": config.tokenizer, "hash": "" if tokenizer is None else tokenizer_hash(tokenizer)},
            "seq_len": config.seq_len,
            "val_fraction": source.val_fraction,
            "seed": source.seed,
        }
        decides = [source.fingerprint, wanted["tokenizer"]["hash"] or config.tokenizer]
        decides += [wanted[key] for key in ("seq_len", "val_fraction", "seed")]
        names = source.name, safe_name(config.tokenizer.replace(":", "").rstrip("/").split("/")[-1])
        store = Store(config.store or default_path(root, *names, decides=decides))
        meta = store.complete(wanted, lambda: prepare(store, source, tokenizer, wanted))
    tokenizer = store.load_tokenizer(meta["tokenizer"]["hash"])
    isolate_eos = tokenizer.eos_token_id if config.isolate_documents else None
    train, validation = (store.open_rows(split, meta, isolate_eos) for split in SPLITS)
    return TokenData(
        tokenizer=tokenizer,
        vocab_size=meta["tokenizer"]["vocab_size"],
        eos_id=tokenizer.eos_token_id,
        train=train,
        validation=validation,
        store=store.path,
        seq_len=meta["seq_len"],
        train_rows=_train_rows(config, train, store.path),
    )


def _train_rows(config: DataConfig, train: Rows, store: str) -> int:
    """How many rows `fraction` or `tokens` leave, at least one; UserError if there are not so many."""
    if not config.tokens:
        return max(1, round(config.fraction * len(train)))
    count = max(1, round(config.tokens / train.seq_len))
    if count > len(train):
        what = f"{store} holds {train.num_tokens:,} training tokens"
        hint = "give more text, or tokens=0 for all there are"
        raise UserError(what, at=f"tokens={config.tokens:,}", hint=hint)
    return count
