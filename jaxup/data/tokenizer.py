"""Tokenizers: loaded from a directory or the hub, or trained on the source; and what identifies one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxup.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# transformers says on import that it misses PyTorch, which its tokenizers do not need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# What a directory with a tokenizer has at least one of.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")

_PLACE = ("data.", "tokenizer")  # of mistakes
END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and END_OF_TEXT


def bpe_vocab_size(spec: str) -> int | None:
    """N when `spec` is `bpe:N` (train a byte-level BPE of N tokens on the source), None when it names a tokenizer."""
    if not spec.startswith("bpe:"):
        return None
    size = spec.removeprefix("bpe:")
    if not re.fullmatch(r"[0-9]{1,9}", size) or int(size) < SMALLEST_VOCABULARY:
        raise UserError(
            f"{spec!r}: write bpe:N to train a vocabulary of N >= {SMALLEST_VOCABULARY} tokens"
            " on the source, such as bpe:8192", at=_PLACE,
        )  # fmt: skip
    return int(size)


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer in the directory `spec`, or of that hub id; from the local cache if it is there.

    No code that comes with a tokenizer is ever run. Raises UserError, in one line, on any failure.
    """
    if bpe_vocab_size(spec):
        raise UserError(f"{spec!r} is trained when a token store is made; there is none to load", at=_PLACE)
    path = Path(spec).expanduser()
    if path.is_dir():
        if not any((path / file).exists() for file in _FILES):
            raise UserError(f"no tokenizer in {spec}: none of {', '.join(_FILES)}", at=_PLACE)
        return _from_pretrained(spec, str(path))
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", spec):
        raise UserError(f"no such directory: {spec}", at=_PLACE)
    try:
        return _from_pretrained(spec, spec, local_files_only=True)
    except UserError:
        return _from_pretrained(spec, spec)


def _from_pretrained(spec: str, path: str, **kwargs) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs)
    except Exception as error:  # OSError, ValueError, KeyError, tokenizers' bare Exception, ...
        reason = first_line(error)
        raise UserError(f"cannot load {spec}: {reason}", at=_PLACE) from None


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, END_OF_TEXT among them; the same text gives the same one.

    Any text comes back from its ids unchanged. A small corpus may hold fewer merges than asked for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"a vocabulary of {vocab_size} is too small; at least {SMALLEST_VOCABULARY}", at=_PLACE)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    special = dict.fromkeys(("eos_token", "bos_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex hash of all that decides the ids of a text: vocabulary, merges, normaliser, added tokens, EOS.

    Truncation, padding and the template of special tokens are left out: token stores use none of
    them, and calling a tokenizer may change them. Saving and loading does not change the hash.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in pure Python
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        state = {key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    state["eos"] = tokenizer.eos_token_id
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


class Encoder:
    """Documents -> ids, without special tokens; text that spells a special token stays ordinary text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = None if backend is None else _plain_copy(backend)

    def __call__(self, documents: list[str]) -> list[list[int]]:
        if self._backend is None:
            return self._tokenizer(documents, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [e.ids for e in self._backend.encode_batch_fast(documents, add_special_tokens=False)]


def _plain_copy(backend: Tokenizer) -> Tokenizer:
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy
