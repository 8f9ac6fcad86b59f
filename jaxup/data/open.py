"""Data as a training run reads them: token rows in a store, which is found again by what it was made from.

One chain makes them: rows of files (`sources.py`, `readers.py`) -> what they say (`layouts.py`), mixed by weight
(`mixture.py`) -> text and what of it is trained on (`chat_formats.py`) -> tokens -> rows (`prepare.py`, `rows.py`). A
corpus is text in rows that are full; chats are packed, each an example of its own, and never cut: what is longer than
a row is dropped, and so is what leaves nothing to predict; both are counted.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jaxup.data.batches import Batches, validation_batches
from jaxup.data.chat_formats import ALIASES, HISTORIES, SPELLINGS, Format, open_format, show
from jaxup.data.chat_templates import TEMPLATES
from jaxup.data.config import DataConfig
from jaxup.data.docstrings import is_docstrings, write_docstrings
from jaxup.data.layouts import LAYOUTS
from jaxup.data.mixture import Mixture, open_mixture, split_spec
from jaxup.data.phases import FILES, PHASES, Phases
from jaxup.data.prepare import Encoding, Ids, Plain, look, prepare, trained_tokenizer
from jaxup.data.rows import CONCATENATED, PACKINGS, Rows, open_rows
from jaxup.data.sources import SPLITS, Corpus, safe_name
from jaxup.data.store import META, PROGRESS, Store, check_same, default_path, open_unchecked
from jaxup.data.tokenizer import bpe_vocab_size, load_tokenizer, number_tokenizer, tokenizer_hash
from jaxup.errors import UserError, suggest, within
from jaxup.progress import printable, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ON_BAD = ("error", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run is trained on and evaluated with."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    eos_id: int | None
    train: Rows
    validation: Rows
    store: str
    seq_len: int
    train_rows: int  # of `train`, those that are used
    # rows and bad ones of the files, refused by the format, shared by validation and train; and for each split
    # examples, too_long, untrained (both dropped), tokens, loss_tokens, most (the largest id), rows, efficiency
    statistics: dict[str, Any]
    layouts: dict[str, str]  # for each file how it was read
    chat_template: str | None  # for the tokenizer of an exported model; None: it has none, and needed none
    format: Format | None  # None: a corpus, in which all text is trained on
    phases: Phases | None = None  # None: all rows mixed

    stepwise: ClassVar[bool] = False

    def __str__(self) -> str:
        train, validation = (self.statistics[split] for split in SPLITS)
        vocabulary = f"vocabulary {self.vocab_size:,}"
        if self.format is not None:
            return (
                f"{self.store}: {train['examples']:,} training and {validation['examples']:,} validation "
                f"conversations in {train['rows']:,} and {validation['rows']:,} rows of {self.seq_len}, "
                f"{train['loss_tokens']:,} training tokens with a loss, {vocabulary}"
            )
        used = "" if self.train_rows == len(self.train) else f" ({self.train_rows * self.seq_len:,} of them used)"
        return (
            f"{self.store}: {self.train.num_tokens:,} training{used} and {self.validation.num_tokens:,} validation "
            f"tokens, {vocabulary}, rows of {self.seq_len}"
        )

    @property
    def packed(self) -> bool:
        """Whether the examples of a row do not see each other."""
        return self.train.isolate

    @property
    def epoch_rows(self) -> int:
        """How many training rows an epoch has: those that are used, and what is seen again in a phase."""
        return self.train_rows + sum(self.phases.replayed if self.phases else ())

    def ends(self) -> Iterator[int]:
        """How many training rows were seen when each epoch, or each phase, is at its end, on and on."""
        return self.phases.ends() if self.phases else itertools.count(self.train_rows, self.train_rows)

    def tokens_of(self, rows: int) -> int:
        """Of so many training rows, on average: without padding."""
        return round(rows * self.seq_len * self.statistics["train"]["efficiency"])

    @property
    def validation_tokens(self) -> int:
        """With a loss."""
        return self.validation.num_tokens if self.format is None else self.statistics["validation"]["loss_tokens"]

    def part(self, fraction: float, tokens: int) -> Data:
        """The same with a fraction of its training rows in use, or so many tokens (0 = all); at least one row.

        UserError if there are not so many.
        """
        count = round(tokens / self.seq_len) if tokens else round(fraction * len(self.train))
        if count > len(self.train):
            what = f"{self.store} holds {self.train.num_tokens:,} training tokens"
            raise UserError(what, at=f"tokens={tokens:,}", hint="give more text, or tokens=0 for all there are")
        return dataclasses.replace(self, train_rows=max(1, count))

    def whole(self) -> Data:
        """The same with all of its training rows in use."""
        return dataclasses.replace(self, train_rows=len(self.train))

    def batches(self, *, batch_size: int, seed: int) -> Batches:
        return Batches(self.train, batch_size=batch_size, seed=seed, num_rows=self.train_rows, phases=self.phases)

    def validation_batches(self, **how: Any) -> Iterator[dict[str, np.ndarray]]:
        """See the function of that name."""
        return validation_batches(self.validation, **how)

    def example(self, color: bool) -> str:
        """A line on how it is shown, and one conversation of training: a row has its longest one first. Of a corpus
        the beginning of a row."""
        if self.format is None:
            lines = str(self.tokenizer.decode(self.train.batch(np.zeros(1, int))["tokens"][0])).splitlines()
            return printable("\n".join(["  the first row of training begins:", *(f"  | {line}" for line in lines[:6])]))
        held = self.train.examples(0)
        return f"  an example; {marked(color)}\n{show(self.format, held[len(held) // 2], color)}"

    def examples(self, color: bool) -> Iterator[str]:
        """Those of training as the model sees them, row by row; see `show`."""
        assert self.format is not None
        for row in range(len(self.train)):
            for example in self.train.examples(row):
                yield show(self.format, example, color)

    def report(self) -> str:
        """What was read and how, and what became of it: several lines, for a terminal."""
        counts = self.statistics
        lines = [f"chat data in {self.store}", *(f"  {path}: {layout}" for path, layout in self.layouts.items())]
        told = {"rows": "rows", "bad": "bad, skipped", "refused": "skipped that the format cannot express",
                "shared": "of validation also in training"}  # fmt: skip
        lines.append("  " + "; ".join(f"{counts[key]:,} {what}" for key, what in told.items() if counts[key]))
        for split in SPLITS:
            of = counts[split]
            lines.append(
                f"  {split}: {of['examples']:,} conversations, {of['tokens']:,} tokens, {of['loss_tokens']:,} with"
                f" a loss; {of['rows']:,} rows of {self.seq_len:,}, {of['efficiency']:.1%} full; dropped:"
                f" {of['too_long']:,} longer than a row, {of['untrained']:,} with nothing to train on"
            )
        return "\n".join(map(printable, lines))


class _Zeros(Rows):
    """One row, of zeros."""

    def __init__(self, config: DataConfig):
        super().__init__([], "", seq_len=config.seq_len, vocab_size=1, isolate=config.isolate_documents, eos=None)

    def __len__(self) -> int:
        return 1

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(indices), self.seq_len + 1)
        return np.zeros(shape, np.int32), np.zeros(shape, np.uint8)


def no_data(config: DataConfig) -> Data:
    """Of the shape that the data of `config` would have, for what is compiled without any."""
    rows = _Zeros(config)
    nothing: Any = None
    return Data(
        tokenizer=nothing, vocab_size=1, eos_id=None, train=rows, validation=rows, store="", seq_len=config.seq_len,
        train_rows=1, statistics={}, layouts={}, chat_template=None, format=None,
    )  # fmt: skip


def marked(color: bool) -> str:
    return f"{'green' if color else 'between ⟦ ⟧'}: what is trained on"


@within("data.")
def open_data(
    config: DataConfig, *, root: str, tokenizer: PreTrainedTokenizerBase | None = None, vocab_size: int | None = None
) -> Data:
    """The rows that `config` describes; they are made first if their store is not there.

    What the formats warn of goes to stderr. UserError for data or a tokenizer that will not do, tokens that a model of
    `vocab_size` has not, or a store of other rows.
    """
    _check(config)
    with warnings.catch_warnings():
        # What the user is to know of the data, as lines on stderr.
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        return _Opening(config, root, tokenizer, vocab_size).data()


class _Opening:
    """What opening data comes to know on the way."""

    def __init__(
        self, config: DataConfig, root: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None
    ):
        self._config, self._root, self._tokenizer, self._vocab_size = config, root, tokenizer, vocab_size
        self._corpus = config.packing == CONCATENATED

    def data(self) -> Data:
        config = self._config
        try:
            streams = open_files(config, self._root)
            if self._tokenizer is None and not bpe_vocab_size(config.tokenizer):
                self._tokenizer = load_tokenizer(config.tokenizer_files or config.tokenizer)
            kinds = {layout for mixture in streams.values() for layout in mixture.layouts.values()}
            if self._tokenizer is None and kinds != {"text"}:
                what = f"{config.files} holds tokens; name the tokenizer that made them (nanoGPT: gpt2), or ids:N"
                if "ids" not in kinds:
                    what = f"{config.tokenizer} is trained on text alone; name a tokenizer for this layout"
                raise UserError(what, at="tokenizer")
            if kinds != {"ids"} and number_tokenizer(config.tokenizer) is not None:
                raise UserError(f"{config.tokenizer} is for files of tokens, not for {config.files}", at="tokenizer")
        except UserError as error:
            specs = {"source": _spec(config)} | ({"tokenizer": config.tokenizer} if config.tokenizer else {})
            store, meta = open_unchecked(config.store, error, specs, self._unchecked)
            if self._tokenizer is None:
                self._tokenizer = store.load_tokenizer(meta["tokenizer"]["hash"])
        else:
            wanted = self._wanted(streams)
            decides = {**wanted, "source": wanted["source"]["fingerprint"], "tokenizer": self._identity()}
            if not config.phases:  # stores keep the names that they had when there were none
                del decides["phases"]
            names = self._names(streams)
            store = Store(config.store or default_path(self._root, *names, decides=[decides]))
            if kinds != {"ids"} or config.isolate_documents:
                self._check_eos()
            # What can be wrong with chats is looked for before anything is written.
            if config.strict and not self._corpus:
                self._format.check(strict=True)
            read = {} if self._corpus or store.read_json(META) else look(streams, config, self._encoding(kinds, 0))
            meta = store.complete(wanted, lambda: self._make(store, streams, kinds, wanted, read))
        return self._opened(store, meta)

    def _opened(self, store: Store, meta: dict[str, Any]) -> Data:
        config = self._config
        if self._tokenizer is None or self._corpus:
            self._tokenizer = store.load_tokenizer(meta["tokenizer"]["hash"])
        for split in SPLITS:
            self._check_token(meta["statistics"][split]["most"], f"the {split} rows of {store.path}")
        eos = self._tokenizer.eos_token_id
        train, validation = open_rows(store, meta, isolate=config.isolate_documents, eos=eos)
        phases = None
        if config.phases:
            of = {key: tuple(values) for key, values in meta["statistics"]["train"]["phases"].items()}
            phases = Phases(**of, replay=config.replay, passes=config.passes)
        data = Data(
            tokenizer=self._tokenizer, vocab_size=meta["tokenizer"]["vocab_size"], eos_id=eos, train=train,
            validation=validation, store=store.path, seq_len=meta["seq_len"], train_rows=len(train),
            statistics=meta["statistics"], layouts=meta["layouts"], chat_template=meta["chat_template"],
            format=None if self._corpus else self._format, phases=phases,
        )  # fmt: skip
        if data.format is not None:
            data.format.check(strict=config.strict)
        return data.part(config.fraction, config.tokens)

    @functools.cached_property
    def _format(self) -> Format:
        assert self._tokenizer is not None
        with within("format"):
            return open_format(self._config.format or None, self._tokenizer, self._config.history)

    def _make(
        self, store: Store, streams: dict[str, Mixture], kinds: set[str], wanted: dict[str, Any],
        read: dict[str, int],
    ) -> None:  # fmt: skip
        """Fills the store. The caller holds the lock."""
        config, tokenizer = self._config, self._tokenizer
        begun = store.read_json(PROGRESS)
        if begun is not None:
            check_same(store, begun["made"], wanted)
        if tokenizer is None and begun is not None and begun["kept"]:
            tokenizer = store.load_tokenizer(begun["made"]["tokenizer"]["hash"])
        tokenizer = self._tokenizer = tokenizer or trained_tokenizer(config.tokenizer, streams)
        vocab_size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))  # numbers may be left out
        layouts = {path: layout for mixture in reversed(streams.values()) for path, layout in mixture.layouts.items()}
        if self._corpus:  # of which there may be thousands of files
            layouts = {_spec(config): ", ".join(sorted(kinds))}
        of = {**wanted["tokenizer"], "hash": tokenizer_hash(tokenizer), "vocab_size": vocab_size}
        made = {
            **wanted, "tokenizer": of, "dtype": "uint16" if vocab_size <= 2**16 else "uint32", "layouts": layouts,
            "marked": not self._corpus or not kinds <= {"text", "ids"},
            "chat_template": self._chat_template(),
        }  # fmt: skip
        kept = copy.copy(tokenizer)
        kept.chat_template = made["chat_template"] or tokenizer.chat_template
        prepare(config, store, self._encoding(kinds, vocab_size), streams, made, begun, read, self._check_token, kept)

    def _encoding(self, kinds: set[str], vocab_size: int) -> Encoding:
        if self._corpus and kinds == {"ids"}:
            return Ids(self._config.tokenizer, vocab_size)
        if self._corpus and kinds == {"text"}:
            assert self._tokenizer is not None
            return Plain(self._tokenizer)
        return self._format

    def _wanted(self, streams: dict[str, Mixture]) -> dict[str, Any]:
        """All that decides what the rows hold."""
        fingerprints = [stream.fingerprint for stream in streams.values()]
        fingerprint = hashlib.blake2b(json.dumps(fingerprints).encode(), digest_size=16).hexdigest()
        files = [file for mixture in streams.values() for file in mixture.files]
        settled = bool(self._config.val_files) or (self._corpus and not any(file.drawn for file in files))
        weights = (weight for mixture in streams.values() for _, weight in mixture.mixed)
        seeded = not self._corpus or any(file.seeded for file in files) or any(weight % 1 for weight in weights)
        return self._settings() | {
            "source": {"spec": _spec(self._config), "fingerprint": fingerprint},
            "val_fraction": None if settled else self._config.val_fraction,
            "seed": self._config.seed if seeded else None,
        }

    def _settings(self) -> dict[str, Any]:
        config, tokenizer = self._config, self._tokenizer
        spec = config.tokenizer or (tokenizer.name_or_path if tokenizer is not None else "")
        template = self._chat_template() or ""
        own = f"the tokenizer's template ({hashlib.blake2b(template.encode(), digest_size=4).hexdigest()})"
        return {
            "tokenizer": {"spec": spec, "hash": "" if tokenizer is None else tokenizer_hash(tokenizer)},
            "chat_format": config.format or ("" if self._corpus else own),
            "history": config.history,
            "packing": config.packing,
            "seq_len": config.seq_len,
            "on_bad": config.on_bad,
            "phases": config.phases or None,
        }

    def _unchecked(self, meta: dict[str, Any]) -> dict[str, Any]:
        """What is wanted of a store whose files are not here, as far as they need not be read for it."""
        settings = {"val_fraction": self._config.val_fraction, "seed": self._config.seed}
        wanted = {**self._settings(), **{key: value for key, value in settings.items() if meta[key] is not None}}
        return {**wanted, "source": meta["source"], **({} if self._tokenizer else {"tokenizer": meta["tokenizer"]})}

    def _check_eos(self) -> None:
        if self._tokenizer is not None and self._tokenizer.eos_token_id is None:
            name = self._config.tokenizer or "it"
            raise UserError(f"{name} has no end-of-sequence token (eos_token) to end a text with", at="tokenizer")

    def _check_token(self, most: int, place: str) -> None:
        """UserError for a token that the model has no row for; one that occurs nowhere is no reason."""
        if self._vocab_size is not None and most >= self._vocab_size and self._tokenizer is not None:
            token = self._tokenizer.convert_ids_to_tokens(most)
            what = f"{token!r} is token {most}, and the model has {self._vocab_size}"
            hint = "take a tokenizer of the model's, or build the model with tokenizer_source, which adds rows"
            raise UserError(what, at=("tokenizer", place), hint=hint)

    def _identity(self) -> str:
        """What decides the ids."""
        return self._config.tokenizer if self._tokenizer is None else tokenizer_hash(self._tokenizer)

    def _chat_template(self) -> str | None:
        if self._config.format:
            return TEMPLATES[self._config.format]
        own = self._tokenizer.chat_template if self._tokenizer is not None else None
        return own.get("default") if isinstance(own, dict) else own

    def _names(self, streams: dict[str, Mixture]) -> tuple[str, str]:
        config, files = self._config, streams[self._config.key].files
        first, _ = split_spec(config.files)[0]
        name, path = first, Path(first).expanduser()
        if path.exists() or not self._corpus:
            name = Path(files[0].path).stem if len(files) == 1 or not self._corpus else path.resolve().name
        by = config.tokenizer.replace(":", "").rstrip("/").split("/")[-1] if self._corpus else config.format or "chat"
        return safe_name(name), safe_name(by)


def open_files(config: DataConfig, root: str) -> dict[str, Mixture]:
    """What is in `val_files`, if there are any, and in `files`."""
    corpus = Corpus(config.val_fraction, config.seed) if config.packing == CONCATENATED else None
    layout = config.layout or ("text" if corpus else None)
    streams = {}
    for key in (*(["val_files"] if config.val_files else []), config.key):
        side: Any = ("validation" if key == "val_files" else "train") if config.val_files else None
        with within(key):
            files = [
                (write_docstrings(path, root, config.seed) if is_docstrings(path) else path, weight)
                for path, weight in split_spec(config.val_files if key == "val_files" else config.files)
            ]
            streams[key] = open_mixture(
                files, layout=layout, seed=config.seed, on_bad=config.on_bad, corpus=corpus, side=side
            )
    return streams


def _spec(config: DataConfig) -> str:
    return config.files + (f" and for validation {config.val_files}" if config.val_files else "")


@within("data.")
def check_config(config: DataConfig) -> None:
    """UserError for what is wrong whatever the files hold."""
    _check(config)


def _check(config: DataConfig) -> None:
    least = 1 if config.packing == CONCATENATED else 2
    if config.seq_len < least:
        raise UserError(f"must be at least {least}", at=f"seq_len={config.seq_len}")
    if not config.val_files and not 0 < config.val_fraction < 1:
        raise UserError("must lie between 0 and 1", at=f"val_fraction={config.val_fraction}")
    if not config.files and config.packing != CONCATENATED:
        raise UserError("name the data: files, directories or datasets", at="files")
    known = {"layout": ("", *LAYOUTS), "on_bad": ON_BAD, "format": ("", *SPELLINGS, *ALIASES), "packing": PACKINGS,
             "history": HISTORIES, "phases": PHASES}  # fmt: skip
    for key, values in known.items():
        if (value := getattr(config, key)) not in values:
            raise UserError(f"not known{suggest(value, filter(None, values))}", at=f"{key}={value!r}")
    if config.phases and config.packing == CONCATENATED:
        raise UserError("for chats; the documents of a corpus run on from row to row", at=f"phases={config.phases!r}")
    if config.phases and (config.fraction < 1 or config.tokens):
        raise UserError("goes with all of the data, not with a fraction or tokens", at=f"phases={config.phases!r}")
    if config.phases == FILES and len(split_spec(config.files)) < 2:
        what = f"each entry of data.files is a phase, and {config.files} is one"
        hint = "name several, a.jsonl,b.jsonl, or take phases=difficulty"
        raise UserError(what, at=f"phases={config.phases!r}", hint=hint)
    if not 0 <= config.replay <= 1:
        raise UserError("must lie between 0 and 1", at=f"replay={config.replay}")
    if not 0 < config.fraction <= 1:
        raise UserError("must be above 0 and at most 1", at=f"fraction={config.fraction}")
    if config.tokens < 0:
        raise UserError("must be positive, or 0 for all", at=f"tokens={config.tokens}")
    if config.tokens and config.fraction < 1:
        raise UserError("give one of the two", at=f"tokens={config.tokens} and data.fraction={config.fraction}")


@within("data.")
def check_files(config: DataConfig, root: str) -> None:
    """UserError for files that are not there or not such data, as far as their first rows tell."""
    open_files(config, root)
