"""Fills a store: examples as a stream -> text -> tokens -> rows, shard by shard.

`progress.json` says how many examples were read and what was made of them, so a killed process goes on from there and
writes the same bytes. A corpus becomes rows as it comes. Chats are packed, which needs all lengths: they lie in scratch
files until they are all tokenised, and packing is done again from the start.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from jaxup.data.chat_formats import Encoded, Rendered
from jaxup.data.config import DataConfig
from jaxup.data.mixture import Example, Mixture, documents, split_spec
from jaxup.data.phases import FILES, STACKED, phase_of
from jaxup.data.rendering import renderer
from jaxup.data.rows import CONCATENATED, Concatenated, Scratch, write_packed
from jaxup.data.sources import SPLITS, draw
from jaxup.data.store import PROGRESS, Store
from jaxup.data.tokenizer import batched, bpe_vocab_size, encoder, train_bpe
from jaxup.errors import NoRoom, UserError, storage_error, within
from jaxup.progress import Progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A vocabulary is trained on the first so many characters of the training split: enough, and bounded.
TRAINING_CHARACTERS = 200_000_000

T = TypeVar("T")
S = TypeVar("S")
Streams = Mapping[str, Mixture]  # the key of the configuration that names it -> examples
Check = Callable[[int, str], None]
# Of each example its tokens, whether of validation, its text's hash, and what says of which phase it is.
Batch = tuple[list[Encoded], list[bool], list[int], list[int]]

Tokenise = Callable[[dict[str, Any]], Iterator[Batch]]


@runtime_checkable
class Encoding(Protocol):
    """What makes tokens of examples: a chat format, `Plain`, `Ids`."""

    def examples(self, said: Sequence[Any]) -> Sequence[list[Any] | UserError]: ...
    def tokenize(self, rendered: Sequence[Any]) -> list[Encoded]: ...


_MORE = "give more data, another data.val_fraction or data.val_files"


class Plain:
    """A corpus: documents, each with EOS after it. Text that spells a special token stays ordinary text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._encode, self._eos = encoder(tokenizer), tokenizer.eos_token_id

    def examples(self, said: Sequence[Any]) -> list[list[Rendered]]:
        return [[Rendered(one[0].text, ())] for one in said]

    def tokenize(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        made = (np.array([*ids, self._eos], np.int32) for ids in self._encode([text for text, _ in rendered]))
        return [Encoded(ids, np.ones(len(ids), bool)) for ids in made]


class Ids:
    """Tokens as they are; UserError for one that is none of the vocabulary's."""

    def __init__(self, spec: str, vocab_size: int):
        self._spec, self._vocab_size = spec, vocab_size

    def examples(self, said: Sequence[Any]) -> list[list[tuple[np.ndarray]]]:
        return [[(one,)] for one in said]

    def tokenize(self, rendered: Sequence[tuple[np.ndarray]]) -> list[Encoded]:
        for (ids,) in rendered:
            if ids.max() >= self._vocab_size:
                vocabulary = f"the vocabulary of {self._spec}, which has {self._vocab_size} tokens"
                raise UserError(f"token {ids.max()} is outside {vocabulary}", at="source")
        return [Encoded(ids, np.ones(len(ids), bool)) for (ids,) in rendered]


def look(streams: Streams, config: DataConfig, encoding: Encoding) -> dict[str, int]:
    """What can be wrong is looked for before anything is written: how many "rows" there are, and "bad" ones."""
    counts = {"rows": 0, "bad": 0}
    for key, mixture in streams.items():
        with within(key):
            rows, bad, _ = mixture.check_all()
            counts = {"rows": counts["rows"] + rows, "bad": counts["bad"] + bad}
            first = next(iter(mixture))
        if config.on_bad == "error":
            (made,) = encoding.examples([first.said])
            if isinstance(made, UserError):
                raise made.within("format", first.place)
    return counts


def trained_tokenizer(spec: str, streams: Streams) -> PreTrainedTokenizerBase:
    """The vocabulary of `bpe:N`, trained on the beginning of the training split."""

    def beginning() -> Iterator[str]:
        characters = 0
        for text in documents(streams["source"], "train"):
            yield text
            characters += len(text)
            if characters >= TRAINING_CHARACTERS:
                return

    say(f"training a vocabulary of {bpe_vocab_size(spec)} tokens")
    return train_bpe(beginning(), bpe_vocab_size(spec))


def prepare(
    config: DataConfig, store: Store, encoding: Encoding, streams: Streams, made: dict[str, Any],
    begun: dict[str, Any] | None, read: dict[str, int], check: Check, tokenizer: PreTrainedTokenizerBase,
) -> None:  # fmt: skip
    """Makes `store` complete, `tokenizer` in it. The caller holds the lock. `made` is what META says.

    `begun` is its record, if there is one, of the same rows. `check` may refuse the largest token id of an example; it
    is told where that lies.
    """
    progress = begun or {"made": made, "kept": False, **_nothing_read()}
    started, concatenated = time.monotonic(), config.packing == CONCATENATED
    # Beside the rows, where a killed process finds it again; for an object store somewhere on this machine.
    beside = contextlib.nullcontext(f"{store.path}/scratch")
    with beside if store.local or concatenated else tempfile.TemporaryDirectory(prefix="jaxup-") as place:
        directory = Path(place)
        try:
            # The record first: it marks what else is found there as ours.
            store.write_json(PROGRESS, progress)
            if not progress["kept"]:
                store.save_tokenizer(tokenizer)
                progress["kept"] = True
                store.write_json(PROGRESS, progress)
            tokenise = functools.partial(_tokenised, config, encoding, streams, check)
            if concatenated:
                of = _concatenate(config, store, tokenise, progress, made)
            else:
                of = _pack(config, store, tokenise, progress, made, directory)
        except OSError as error:
            raise storage_error(error, "store", str(directory)) from None
        except NoRoom:
            raise
        except UserError:
            # Data that will not do leaves nothing behind; rows of a corpus once written are kept to go on from.
            if not (concatenated and any(progress["sink"].get("rows", {}).values())):
                shutil.rmtree(directory, ignore_errors=True)
                with contextlib.suppress(UserError):
                    store.discard()
            raise
        counts = progress["counts"]
        for split in SPLITS:
            counts[split] |= of[split]
        if concatenated:
            bad = sum(mixture.skipped.total() for mixture in streams.values())
            read = {"rows": progress["read"] + bad, "bad": bad}
        store.finish({**made, "statistics": {"shared": 0, **counts, **read}})
        shutil.rmtree(directory, ignore_errors=True)
    if rest := progress["sink"].get("rest"):  # until now a killed process goes on from it
        store.delete(rest)
    store.delete(PROGRESS)
    if concatenated:
        told = ", ".join(f"{counts[split]['tokens']:,} {split} tokens" for split in SPLITS)
        say(f"{store.path}: {told} in {time.monotonic() - started:.1f} s")


def _nothing_read() -> dict[str, Any]:
    split = {"examples": 0, "too_long": 0, "shortest_too_long": 0, "untrained": 0, "tokens": 0, "loss_tokens": 0,
             "most": 0}  # fmt: skip
    counts: dict[str, Any] = {"refused": 0, "first_refused": "", **{name: dict(split) for name in SPLITS}}
    return {"read": 0, "counts": counts, "sink": {}, "done": False}


def _concatenate(
    config: DataConfig, store: Store, tokenise: Tokenise, progress: dict[str, Any], made: Any
) -> dict[str, dict[str, Any]]:
    if not progress["sink"] or not Concatenated.is_there(store, progress["sink"]):
        progress |= _nothing_read() | {"sink": Concatenated.nothing()}
    rows = Concatenated(store, made, progress["sink"])
    for encoded, validation, *_ in tokenise(progress):
        if rows.add(encoded, validation):
            before = rows.keep(progress["read"])
            store.write_json(PROGRESS, progress)
            if before:
                store.delete(before)
    found = rows.finish()
    counts = progress["counts"]
    for split in SPLITS:
        if not found[split]["rows"]:
            tokens = f"its {split} split has {counts[split]['tokens']} tokens"
            what = f"no text found for one row: {tokens}, data.seq_len={config.seq_len} needs {config.seq_len + 1}"
            hint = _MORE if split == "validation" and not config.val_files else ""
            raise UserError(what, at=("source", config.files), hint=hint)
    return found


def _pack(
    config: DataConfig, store: Store, tokenise: Tokenise, progress: dict[str, Any], made: Any, directory: Path
) -> dict[str, dict[str, Any]]:  # fmt: skip
    scratch = Scratch(directory)
    if not scratch.cut(progress["sink"].get("written", (0, 0))):
        progress |= _nothing_read()
    counts = progress["counts"]
    for encoded, validation, hashes, keys in tokenise(progress):
        if encoded:
            scratch.append(encoded, validation, hashes, keys)
        progress["sink"] = {"written": [sum(counts[split][of] for split in SPLITS) for of in ("examples", "tokens")]}
        store.write_json(PROGRESS, progress)
    progress["done"] = True
    store.write_json(PROGRESS, progress)
    _check_counts(config, counts)
    table, tokens = scratch.read()
    found: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        chosen = table["validation"] == (split == "validation")
        how = config.phases if split == "train" else STACKED
        phase, names = phase_of(how, table["key"][chosen], [name for name, _ in split_spec(config.files)])
        examples = np.bincount(phase, minlength=len(names)).tolist()
        if not min(examples):
            what = f"of {sum(examples):,} examples none is left for the phase {names[examples.index(0)]}"
            raise UserError(what, at=f"phases={how!r}", hint="give more data")
        with Progress(f"packing, {split}", total=None, unit="rows") as bar:
            packed, rows = write_packed(store, split, (table, tokens), chosen, phase, made=made, progress=bar.update)
        found[split] = {"rows": packed.num_rows, "efficiency": packed.efficiency}
        if how:
            found[split]["phases"] = {"names": list(names), "examples": examples, "rows": rows}
    train, validation = (table["text_hash"][table["validation"] == side] for side in (False, True))
    counts["shared"] = int(np.isin(validation, train).sum())
    return found


def _tokenised(
    config: DataConfig, encoding: Encoding, streams: Streams, check: Check, progress: dict[str, Any]
) -> Iterator[Batch]:
    """What is kept, a batch at a time.

    `progress` is up to date with what was handed out; what it counts as read is passed over.
    """
    counts, whole = progress["counts"], config.packing == CONCATENATED
    read = itertools.islice(() if progress["done"] else _read(streams), progress["read"], None)
    batches = batched(read, lambda one: _size(one.said))

    def render(batch: list[Example]) -> list[_Rendered]:
        made = encoding.examples([one.said for one in batch])
        return [_rendered(config, *pair) for pair in zip(batch, made, strict=True)]

    def tokenise(batch: list[_Rendered]) -> Iterator[tuple[_Rendered, Encoded]]:
        texts = [(one, text) for one in batch for text in one.texts]
        return zip([one for one, _ in texts], encoding.tokenize([text for _, text in texts]))

    with (
        Progress("tokenising", total=None, unit="examples", start=progress["read"]) as bar,
        contextlib.closing(_ahead(render, batches)) as rendered,
        contextlib.closing(_ahead(tokenise, (made for _, made in rendered))) as tokenised,
    ):
        for batch, encoded in tokenised:
            progress["read"] += len(batch)
            for refused in filter(None, (one.refused for one in batch)):
                counts["refused"] += 1
                counts["first_refused"] = counts["first_refused"] or refused
            kept: Batch = ([], [], [], [])
            for of, one in encoded:
                length, drawn = len(one.ids), 0
                if not whole or of.side is None:
                    drawn = draw(f"{config.seed}\0{of.texts[-1][0]}")  # prefixes of a chat are on the side of all of it
                is_validation = (drawn < config.val_fraction * 2**64) if of.side is None else of.side == "validation"
                count, losses = counts[SPLITS[is_validation]], int(one.trained[0 if whole else 1 :].sum())
                if length > config.seq_len and not whole:
                    count["too_long"] += 1
                    count["shortest_too_long"] = min(count["shortest_too_long"] or length, length)
                elif not losses and not whole:
                    count["untrained"] += 1
                else:
                    check(most := int(one.ids.max()), of.place)
                    count["examples"] += 1
                    count["tokens"] += length
                    count["loss_tokens"] += losses
                    count["most"] = max(count["most"], most)
                    kept[0].append(one)
                    kept[1].append(is_validation)
                    kept[2].append(drawn)
                    kept[3].append(of.entry if config.phases == FILES else losses)
            bar.update(progress["read"], f"{sum(counts[split]['tokens'] for split in SPLITS):,} tokens")
            yield kept
    if counts["refused"]:
        say(f"warning: {counts['refused']:,} examples skipped; the first: {counts['first_refused']}")


class _Rendered(NamedTuple):
    place: str
    side: str | None
    entry: int
    texts: list[Any]  # none of what the format refuses
    refused: str = ""


def _rendered(config: DataConfig, example: Example, texts: list[Any] | UserError) -> _Rendered:
    if not isinstance(texts, UserError):
        return _Rendered(example.place, example.side, example.entry, texts)
    error = texts.within("format", example.place)
    if config.on_bad == "error":
        raise error
    return _Rendered(example.place, example.side, example.entry, [], str(error.within("data.")))


def _size(said: Any) -> int:
    """Characters, or tokens."""
    return len(said) if isinstance(said, np.ndarray) else sum(len(one.text) for one in said)


def _ahead(work: Callable[[T], S], items: Iterable[T]) -> Generator[tuple[T, S]]:
    """Each item and what `work` makes of it, in a thread: meanwhile the next item is got ready."""
    with ThreadPoolExecutor(1) as pool:
        try:
            begun: tuple[T, Future[S]] | None = None
            for item in items:
                before, begun = begun, (item, pool.submit(work, item))
                if before is not None:
                    yield before[0], before[1].result()
            if begun is not None:
                yield begun[0], begun[1].result()
        except BaseException:
            renderer.stop()  # of what it is asked there may be for minutes, for which nobody waits
            raise


def _read(streams: Streams) -> Iterator[Example]:
    for key, mixture in streams.items():
        with within(key):
            yield from mixture


def _check_counts(config: DataConfig, counts: dict[str, Any]) -> None:
    """Raises UserError when a split is left without an example."""
    total = sum(counts[split]["examples"] for split in SPLITS)
    for split, key in zip(SPLITS, (config.key, "val_files" if config.val_files else config.key)):
        of = counts[split]
        if of["examples"]:
            continue
        if of["too_long"]:
            what = f"all {of['too_long']:,} {split} examples are longer"
            hint = f"the shortest needs data.seq_len={of['shortest_too_long']}"
            raise UserError(what, at=f"seq_len={config.seq_len}", hint=hint)
        if of["untrained"]:
            what = f"no token to train on in any of {of['untrained']:,} {split} examples"
            raise UserError(what, at=key)
        if counts["refused"] and not total:
            what = f"none of {counts['refused']:,} examples can be expressed"
            raise UserError(what, at="format", hint=f"the first: {counts['first_refused']}")
        what = f"of {total:,} examples none is left for {split}"
        raise UserError(what, at=f"val_fraction={config.val_fraction}", hint=_MORE)
