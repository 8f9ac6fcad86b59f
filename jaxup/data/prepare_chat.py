"""Fills a store of chats: conversations as a stream -> tokens in scratch files -> packed rows, shard by shard.

After each batch of conversations `progress.json` says how many were read and how much of the scratch files holds, so a
killed process goes on from there. Rows are written once all lengths are known; that is done again from the start.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxup.data.chat_formats import Format, Rendered
from jaxup.data.conversations import Conversations
from jaxup.data.layouts import Conversation, Segments
from jaxup.data.packed import Scratch, write_packed
from jaxup.data.sources import SPLITS, draw
from jaxup.data.store import PROGRESS, Store, check_same
from jaxup.data.tokenizer import batched
from jaxup.errors import NoRoom, UserError, storage_error, within
from jaxup.progress import Progress, say


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    files: str  # "a.jsonl*2,b.parquet": paths and datasets with weights; "docstrings": see jaxup.data.docstrings
    layout: str  # one of layouts.LAYOUTS; "" = detected, for each file
    format: str  # one of chat_formats; "" = the tokenizer's own chat template
    seq_len: int  # tokens of a row; longer conversations are dropped
    val_files: str  # "" = a part of `files`
    val_fraction: float  # of the conversations of `files`; decides nothing beside val_files
    on_bad: str  # "error" | "skip": a row that is not of its layout, or that the format cannot express
    packing: bool  # False: one conversation a row, for comparison
    store: str  # directory of the rows, local or gs://; "" = one under `root` named after its contents
    seed: int  # of weights' choice of rows, of the split and of the order of rows


def look(streams: dict[str, Conversations], config: ChatConfig, format: Format) -> dict[str, int]:
    """What can be wrong is looked for before anything is written: how many "rows" there are, and "bad" ones."""
    counts = {"rows": 0, "bad": 0}
    for key, conversations in streams.items():
        with within(key):
            rows, bad, _ = conversations.check_all()
            counts = {"rows": counts["rows"] + rows, "bad": counts["bad"] + bad}
            first = next(iter(conversations))
        if config.on_bad == "error":
            _render(format, first)
    return counts


def prepare_chat(
    config: ChatConfig, store: Store, format: Format, streams: dict[str, Conversations], wanted: dict[str, Any],
    read: dict[str, int], about: dict[str, Any],
) -> None:  # fmt: skip
    """Makes `store` complete. The caller holds the lock. `about`: its META has this too, the "chat_template" in it."""
    progress = store.read_json(PROGRESS) or {"made": wanted, **_nothing_read()}
    check_same(store, progress["made"], wanted)
    vocab_size = 1 + max(format.tokenizer.get_vocab().values())
    # Beside the rows, where a killed process finds it again; for an object store somewhere on this machine.
    beside = contextlib.nullcontext(f"{store.path}/scratch")
    with beside if store.local else tempfile.TemporaryDirectory(prefix="jaxup-") as place:
        directory = Path(place)
        try:
            # The record first: it marks what else is found there as ours.
            store.write_json(PROGRESS, progress)
            scratch = Scratch(directory)
            if not scratch.cut(progress["written"]):
                progress |= _nothing_read()
            _tokenise(config, store, format, streams, scratch, progress)
            _check_counts(config, progress["counts"])
            table, tokens = scratch.read()
        except OSError as error:
            raise storage_error(error, "store", str(directory)) from None
        except NoRoom:
            raise
        except UserError:
            # Data that will not do leaves nothing behind.
            shutil.rmtree(directory, ignore_errors=True)
            with contextlib.suppress(UserError):
                store.discard()
            raise
        statistics = {**read, **progress["counts"]}
        dtype = "uint16" if vocab_size <= 2**16 else "uint32"
        for split in SPLITS:
            chosen = table["validation"] == (split == "validation")
            with Progress(f"packing, {split}", total=None, unit="rows") as bar:
                packed = write_packed(
                    store, split, (table, tokens), chosen, seq_len=config.seq_len, dtype=dtype, packing=config.packing,
                    seed=config.seed, progress=bar.update,
                )  # fmt: skip
            statistics[split] |= {"rows": packed.num_rows, "efficiency": packed.efficiency}
        hashes = {split: table["text_hash"][table["validation"] == (split == "validation")] for split in SPLITS}
        statistics["shared"] = int(np.isin(hashes["validation"], hashes["train"]).sum())
        tokenizer = copy.copy(format.tokenizer)
        tokenizer.chat_template = about["chat_template"]
        store.save_tokenizer(tokenizer)
        made = {**wanted, "tokenizer": {**wanted["tokenizer"], "vocab_size": vocab_size}, "dtype": dtype}
        store.finish({**made, "statistics": statistics, **about})
        shutil.rmtree(directory, ignore_errors=True)
    store.delete(PROGRESS)


def _nothing_read() -> dict[str, Any]:
    split = {"conversations": 0, "too_long": 0, "shortest_too_long": 0, "untrained": 0, "tokens": 0, "loss_tokens": 0}
    counts: dict[str, Any] = {"refused": 0, "first_refused": "", **{name: dict(split) for name in SPLITS}}
    # written: conversations and tokens in the scratch files
    return {"read": 0, "written": [0, 0], "counts": counts, "done": False}


def _tokenise(
    config: ChatConfig, store: Store, format: Format, streams: dict[str, Conversations], scratch: Scratch,
    progress: dict[str, Any],
) -> None:  # fmt: skip
    """Appends to `scratch` what `progress`, which is kept up to date, does not count as read."""
    counts = progress["counts"]
    rendered = _rendered(config, format, streams, progress["read"], counts)
    with Progress("tokenising chats", total=None, unit="conversations", start=progress["read"]) as bar:
        for batch in () if progress["done"] else batched(rendered, lambda one: len(one[1].text) if one[1] else 0):
            progress["read"] += len(batch)
            told = [(is_validation, text) for is_validation, text in batch if text is not None]
            kept = []
            for (is_validation, (text, _)), one in zip(told, format.tokenize([text for _, text in told])):
                drawn = draw(f"{config.seed}\0{text}")
                if not config.val_files:
                    is_validation = drawn < config.val_fraction * 2**64
                of, length, losses = counts[SPLITS[is_validation]], len(one.ids), int(one.trained[1:].sum())
                if length > config.seq_len:
                    of["too_long"] += 1
                    of["shortest_too_long"] = min(of["shortest_too_long"] or length, length)
                elif not losses:
                    of["untrained"] += 1
                else:
                    of["conversations"] += 1
                    of["tokens"] += length
                    of["loss_tokens"] += losses
                    kept.append((one, is_validation, drawn))
            if kept:
                scratch.append(*zip(*kept))
            progress["written"] = [sum(counts[split][of] for split in SPLITS) for of in ("conversations", "tokens")]
            store.write_json(PROGRESS, progress)
            bar.update(progress["read"], f"{progress['written'][1]:,} tokens")
    progress["done"] = True
    store.write_json(PROGRESS, progress)
    if counts["refused"]:
        say(f"warning: {counts['refused']:,} conversations skipped; the first: {counts['first_refused']}")


def _rendered(
    config: ChatConfig, format: Format, streams: dict[str, Conversations], skip: int, counts: dict[str, Any]
) -> Iterator[tuple[bool, Rendered | None]]:
    """From conversation number `skip` on whether it is of val_files and its text; None: the format refuses it."""
    for key, conversation in itertools.islice(_read(streams), skip, None):
        rendered = None
        try:
            rendered = _render(format, conversation)
        except UserError as error:
            if config.on_bad == "error":
                raise
            counts["refused"] += 1
            counts["first_refused"] = counts["first_refused"] or str(error.within("data."))
        yield key == "val_files", rendered


def _read(streams: dict[str, Conversations]) -> Iterator[tuple[str, Conversation | Segments]]:
    for key, conversations in streams.items():
        with within(key):
            for conversation in conversations:
                yield key, conversation


def _render(format: Format, conversation: Conversation | Segments) -> Rendered:
    # Where it lies is not known any more; what it begins with can be searched for.
    with within("format", f"in the conversation that begins {conversation[0].text[:40]!r}"):
        return format.render(conversation)


def _check_counts(config: ChatConfig, counts: dict[str, Any]) -> None:
    """Raises UserError when a split is left without a conversation."""
    total = sum(counts[split]["conversations"] for split in SPLITS)
    for split, key in zip(SPLITS, ("files", "val_files" if config.val_files else "files")):
        of = counts[split]
        if of["conversations"]:
            continue
        if of["too_long"]:
            what = f"all {of['too_long']:,} {split} conversations are longer"
            hint = f"the shortest needs data.seq_len={of['shortest_too_long']}"
            raise UserError(what, at=f"seq_len={config.seq_len}", hint=hint)
        if of["untrained"]:
            what = f"no token to train on in any of {of['untrained']:,} {split} conversations"
            raise UserError(what, at=key)
        if counts["refused"] and not total:
            what = f"none of {counts['refused']:,} conversations can be expressed"
            raise UserError(what, at="format", hint=f"the first: {counts['first_refused']}")
        what = f"of {total:,} conversations none is left for {split}"
        hint = "give more data, another fraction or data.val_files"
        raise UserError(what, at=f"val_fraction={config.val_fraction}", hint=hint)
