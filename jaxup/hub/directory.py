"""What a model directory holds besides config and tensors: its tokenizer and what this project adds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jaxup.files import manifest
from jaxup.files.shards import INDEX, SINGLE
from jaxup.files.storage import LARGEST_TEXT, Local, open_storage

CARD, PLAN = "README.md", "jaxup_plan.yaml"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json
# One of these makes a directory a model's, which `force` may replace. A config.json is not enough: runs have one.
MARKS = (manifest.NAME, SINGLE, INDEX)

# What a model directory may have besides config and tensors, and keeps when the model is saved again.
CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def carried_files(path_or_id: str | os.PathLike, revision: str | None = None) -> dict[str, bytes]:
    """Tokenizer, chat template and generation config of a model directory, by file name; text only, never run."""
    storage = open_storage(path_or_id, revision=revision)
    files = {file: storage.whole(file, LARGEST_TEXT) for file in CARRIED if storage.exists(file)}
    if isinstance(storage, Local):
        manifest.check_manifest(storage.root, CARRIED, added=True)
    return files


def tokenizer_directory(path_or_id: str | os.PathLike, *, revision: str | None = None) -> Path:
    """A local directory with the model's tokenizer and chat template.

    A local model's own; for any other a temporary one, which disappears with the process.
    """
    storage = open_storage(path_or_id, revision=revision)
    if type(storage) is Local:
        manifest.check_manifest(storage.root, CARRIED, added=True)
        return storage.root
    directory = tempfile.TemporaryDirectory(prefix="jaxup-tokenizer-")
    _temporary.append(directory)
    for file in ("config.json", *CARRIED):
        if storage.exists(file):
            Path(directory.name, file).write_bytes(storage.whole(file, LARGEST_TEXT))
    return Path(directory.name)


_temporary: list[tempfile.TemporaryDirectory] = []
