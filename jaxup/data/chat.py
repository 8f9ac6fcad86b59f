"""Chat data as a training run reads it: conversations in packed rows, each a segment of its own.

Files are rendered and tokenised as a stream, split by a hash of each text, packed and written into a store
(`prepare_chat.py`, `packed.py`), which is found again by what it was made from. A conversation longer than a row is
dropped, never cut, and so is one that leaves nothing to predict; both are counted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.data.batches import Data
from jaxup.data.chat_formats import ALIASES, SPELLINGS, Format, open_format, show
from jaxup.data.chat_templates import TEMPLATES
from jaxup.data.conversations import Conversations, open_conversations, split_spec
from jaxup.data.docstrings import is_docstrings, write_docstrings
from jaxup.data.layouts import LAYOUTS
from jaxup.data.packed import PackedRows, open_packed
from jaxup.data.prepare_chat import ChatConfig, look, prepare_chat
from jaxup.data.sources import SPLITS, safe_name
from jaxup.data.store import META, Store, default_path, open_unchecked
from jaxup.data.tokenizer import tokenizer_hash
from jaxup.errors import UserError, suggest, within
from jaxup.progress import printable, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ON_BAD = ("error", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatData(Data):
    train: PackedRows
    validation: PackedRows
    chat_template: str | None  # for the tokenizer of an exported model; None: it has none, and needed none
    # rows and bad ones of the files, refused by the format, shared by validation and train; and for each split
    # conversations, too_long, untrained (both dropped), tokens, loss_tokens, rows, efficiency
    statistics: dict[str, Any]
    layouts: dict[str, str]  # for each file how it was read
    format: Format

    def __str__(self) -> str:
        train, validation = (self.statistics[split] for split in SPLITS)
        return (
            f"{self.store}: {train['conversations']:,} training and {validation['conversations']:,} validation "
            f"conversations in {train['rows']:,} and {validation['rows']:,} rows of {self.seq_len}, "
            f"{train['loss_tokens']:,} training tokens with a loss, vocabulary {self.vocab_size:,}"
        )

    def example(self, color: bool) -> str:
        """One conversation of training as the model sees it; see `show`. A row has its longest one first."""
        held = self.train.conversations(0)
        return show(self.format, held[len(held) // 2], color)

    def report(self, color: bool) -> str:
        """What was read and how, what became of it, and one example: several lines, for a terminal."""
        counts = self.statistics
        lines = [f"chat data in {self.store}", *(f"  {path}: {layout}" for path, layout in self.layouts.items())]
        told = {"rows": "rows", "bad": "bad, skipped", "refused": "skipped that the format cannot express",
                "shared": "of validation also in training"}  # fmt: skip
        lines.append("  " + "; ".join(f"{counts[key]:,} {what}" for key, what in told.items() if counts[key]))
        for split in SPLITS:
            of = counts[split]
            lines.append(
                f"  {split}: {of['conversations']:,} conversations, {of['tokens']:,} tokens, {of['loss_tokens']:,} with"
                f" a loss; {of['rows']:,} rows of {self.seq_len:,}, {of['efficiency']:.1%} full; dropped:"
                f" {of['too_long']:,} longer than a row, {of['untrained']:,} with nothing to train on"
            )
        lines.append(f"  an example; {'green' if color else 'between ⟦ ⟧'}: what is trained on")
        return "\n".join([*map(printable, lines), self.example(color)])


def open_chat(config: ChatConfig, *, tokenizer: PreTrainedTokenizerBase, root: str) -> ChatData:
    """The rows that `config` describes; they are made first if their store is not there.

    What the formats warn of goes to stderr. UserError for what will not do, as of `jaxup.data.documents.open_data`.
    """
    check_config(config)
    with within("data."), warnings.catch_warnings():
        # What the user is to know of the data, as lines on stderr.
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        with within("format"):
            format = open_format(config.format or None, tokenizer)
        if tokenizer.eos_token_id is None:
            raise UserError("it has no end-of-sequence token (eos_token)", at="tokenizer")
        try:
            streams = _open_files(config, root)
        except UserError as error:
            store, meta = open_unchecked(
                config.store, error, "chat", {"source": _spec(config)},
                lambda meta: {**_wanted(config, format, []), "source": meta["source"]},
            )  # fmt: skip
            layouts = meta["layouts"]
        else:
            wanted = _wanted(config, format, [stream.fingerprint for stream in streams.values()])
            layouts = {path: layout for stream in streams.values() for path, layout in stream.layouts.items()}
            decides = {**wanted, "source": wanted["source"]["fingerprint"], "tokenizer": wanted["tokenizer"]["hash"]}
            names = safe_name(Path(next(iter(layouts))).stem), config.format or "chat"
            store = Store(config.store or default_path(root, *names, decides=[decides]))
            read = {} if store.read_json(META) else look(streams, config, format)
            about = {"layouts": layouts, "chat_template": _chat_template(config, tokenizer)}
            make = functools.partial(prepare_chat, config, store, format, streams, wanted, read, about)
            meta = store.complete(wanted, make)
        train, validation = (open_packed(store, split, meta) for split in SPLITS)
    return ChatData(
        tokenizer=tokenizer,
        vocab_size=meta["tokenizer"]["vocab_size"],
        eos_id=tokenizer.eos_token_id,
        train=train,
        validation=validation,
        store=store.path,
        seq_len=meta["seq_len"],
        train_rows=len(train),
        chat_template=meta["chat_template"],
        statistics=meta["statistics"],
        layouts=layouts,
        format=format,
    )


@within("data.")
def check_config(config: ChatConfig) -> None:
    """UserError for what is wrong whatever the files hold."""
    if config.seq_len < 2:
        raise UserError("must be at least 2", at=f"seq_len={config.seq_len}")
    if not config.val_files and not 0 < config.val_fraction < 1:
        raise UserError("must lie between 0 and 1", at=f"val_fraction={config.val_fraction}")
    if not config.files:
        raise UserError("name the chat data: files, directories or datasets", at="files")
    for key, known in (("layout", ("", *LAYOUTS)), ("on_bad", ON_BAD), ("format", ("", *SPELLINGS, *ALIASES))):
        if (value := getattr(config, key)) not in known:
            raise UserError(f"not known{suggest(value, filter(None, known))}", at=f"{key}={value!r}")


@within("data.")
def check_files(config: ChatConfig, root: str) -> None:
    """UserError for files that are not there or not chat data, as far as their first rows tell."""
    _open_files(config, root)


def _open_files(config: ChatConfig, root: str) -> dict[str, Conversations]:
    """What is in `files`, and in `val_files` if there are any."""
    streams = {}
    for key in ("files", *(["val_files"] if config.val_files else [])):
        with within(key):
            files = [
                (write_docstrings(path, root, config.seed) if is_docstrings(path) else path, weight)
                for path, weight in split_spec(getattr(config, key))
            ]
            layout = config.layout or None
            streams[key] = open_conversations(files, layout=layout, seed=config.seed, on_bad=config.on_bad)
    return streams


def _wanted(config: ChatConfig, format: Format, fingerprints: list[str]) -> dict[str, Any]:
    """All that decides what the rows hold."""
    template = _chat_template(config, format.tokenizer) or ""
    own = f"the tokenizer's template ({hashlib.blake2b(template.encode(), digest_size=4).hexdigest()})"
    fingerprint = hashlib.blake2b(json.dumps(fingerprints).encode(), digest_size=16).hexdigest()
    return {
        "kind": "chat",
        "source": {"spec": _spec(config), "fingerprint": fingerprint},
        "tokenizer": {"spec": format.tokenizer.name_or_path, "hash": tokenizer_hash(format.tokenizer)},
        "chat_format": config.format or own,
        "seq_len": config.seq_len,
        "val_fraction": None if config.val_files else config.val_fraction,
        "on_bad": config.on_bad,
        "packing": config.packing,
        "seed": config.seed,
    }


def _spec(config: ChatConfig) -> str:
    return config.files + (f" and for validation {config.val_files}" if config.val_files else "")


def _chat_template(config: ChatConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if config.format:
        return TEMPLATES[config.format]
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own
