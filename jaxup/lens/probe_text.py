"""The text that a model is probed on, as rows of tokens."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxup.data.mixture import open_mixture
from jaxup.data.sources import Corpus
from jaxup.data.tokenizer import batched, encoder, load_tokenizer
from jaxup.errors import UserError, within
from jaxup.hub.directory import tokenizer_directory
from jaxup.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What trainings on the standard library hold out unless they are told otherwise: see `experiments/defaults.py`.
_LIBRARY = Corpus(val_fraction=0.05, seed=0)


def read_ids(spec: str, tokenizer: PreTrainedTokenizerBase, count: int, *, least: int) -> np.ndarray:
    """The first tokens of a text: int32 [count] at most, documents one after the other with EOS between them.

    Args:
      spec: what `data.source` of a training may be: a file, a directory, a dataset, "python". Of what has splits, that
        for validation; of the standard library what trainings hold out.
      least: how many there must be.

    Raises:
      UserError: no such text, or too little of it.
    """
    with within("data"):
        side = None if spec == "python" else "validation"
        mixture = open_mixture([(spec, 1.0)], layout="text", seed=0, corpus=_LIBRARY, side=side)  # type: ignore[arg-type]
        said = (one.said for one in mixture if one.side == "validation")
        ids = np.fromiter(itertools.islice(_tokens(said, tokenizer), count), np.int32)
        if len(ids) < least:
            what = f"its text has {len(ids):,} tokens, and a row takes {least:,}"
            raise UserError(what, at=spec, hint="give more text, or shorter rows with --seq-len")
    return ids


def _tokens(said: Iterator[Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    encode, eos = encoder(tokenizer), tokenizer.eos_token_id
    for batch in batched(said, lambda one: len(one) if isinstance(one, np.ndarray) else len(one[0].text)):
        if isinstance(batch[0], np.ndarray):  # tokens already
            yield from itertools.chain.from_iterable(ids.tolist() for ids in batch)
            continue
        for ids in encode([segments[0].text for segments in batch]):
            yield from ids
            if eos is not None:
                yield eos


def as_rows(ids: np.ndarray, seq_len: int, rows: int) -> np.ndarray:
    """int32 [n, seq_len + 1], at most so many rows; they overlap by a token, so that each is predicted once."""
    count = min(rows, (len(ids) - 1) // seq_len)
    return np.lib.stride_tricks.sliding_window_view(ids, seq_len + 1)[::seq_len][:count]


def tokenizer_of(model: str | os.PathLike | Decoder) -> PreTrainedTokenizerBase:
    """That which a model came with; UserError if it came with none."""
    place, revision = model, None
    if isinstance(place, Decoder):
        if place.origin is None:
            raise UserError("the model came with no tokenizer; give one, or token ids", at="probe")
        place, revision = place.origin.path, place.origin.revision
    return load_tokenizer(str(tokenizer_directory(place, revision=revision)))
