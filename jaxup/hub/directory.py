"""What a model directory holds besides config and tensors: its tokenizer and what this project adds."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from jaxup.files import manifest
from jaxup.files.shards import INDEX, SINGLE
from jaxup.files.storage import LARGEST_TEXT, TEMPLATES, Local, Storage, open_storage

CARD, PLAN = "README.md", "jaxup_plan.yaml"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json
# One of these makes a directory a model's, which `force` may replace. A config.json is not enough: runs have one.
MARKS = (manifest.NAME, SINGLE, INDEX)

# What a model directory may have besides config and tensors, and keeps when the model is saved again.
CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# And what else its tokenizer may read, where there is a listing of it.
_MORE = re.compile(
    rf"(tokenizer|vocab|chat_template)[^/]*\.json|(vocab|merges)[^/]*\.txt|(tokenizer|spiece|source|target)[^/]*\.model"
    rf"|[^/]*\.tiktoken|chat_template[^/]*\.jinja|{TEMPLATES}/[^/]+\.jinja"
)


def _carried(storage: Storage) -> list[str]:
    more = sorted(file for file in storage.files() if _MORE.fullmatch(file))
    return [file for file in dict.fromkeys([*CARRIED, *more]) if storage.exists(file)]


def carried_files(path_or_id: str | os.PathLike, revision: str | None = None) -> dict[str, bytes]:
    """Tokenizer, chat template and generation config of a model directory, by file name; text only, never run."""
    storage = open_storage(path_or_id, revision=revision)
    files = {file: storage.whole(file, LARGEST_TEXT) for file in _carried(storage)}
    if isinstance(storage, Local):
        manifest.check_manifest(storage.root, {*CARRIED, *files}, added=True)
    return files


def tokenizer_directory(path_or_id: str | os.PathLike, *, revision: str | None = None) -> Path:
    """A local directory with the model's tokenizer and chat template.

    A local model's own; for any other a temporary one, which disappears with the process.
    """
    storage = open_storage(path_or_id, revision=revision)
    if type(storage) is Local:
        manifest.check_manifest(storage.root, {*CARRIED, *_carried(storage)}, added=True)
        return storage.root
    directory = tempfile.TemporaryDirectory(prefix="jaxup-tokenizer-")
    _temporary.append(directory)
    for file in ("config.json", *_carried(storage)):
        if storage.exists(file):
            Path(directory.name, file).parent.mkdir(exist_ok=True)
            Path(directory.name, file).write_bytes(storage.whole(file, LARGEST_TEXT))
    return Path(directory.name)


_temporary: list[tempfile.TemporaryDirectory] = []
