"""Another tokenizer for a result than its base model's: mergekit's `tokenizer_source` and `chat_template`.

A row of an embedding or head belongs to a token. Under another tokenizer it goes where that token is;
a token that the model does not know gets zeros.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxup.data.tokenizer import auto_tokenizer
from jaxup.errors import UserError, first_line, suggest
from jaxup.families.keys import short
from jaxup.hub.directory import TOKEN_IDS, carried_files, tokenizer_directory
from jaxup.recipes.open import Recipe
from jaxup.text import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = "generation_config.json"
_SHOWN = 5  # tokens


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a result, where it is not that of the models it is made from.

    Attributes:
      size: of the result's embedding and head; None: as the models have it.
      rows: for "embed_tokens" and "lm_head": the row of the source's that is in each row of the
        result, int [size], -1 for zeros. What is left out is as it is in the source.
      files: of the tokenizer, the chat template and the generation config, by name; they replace
        all of the base model's. None: the base model's.
      token_ids: keys of config.json that name tokens, where they change.
      notes: what becomes of rows and ids of the models, one line each.
    """

    size: int | None = None
    rows: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] | None = None
    token_ids: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


class NoTokenizer(UserError):
    """The tokenizer that would say which token has which row is not at hand."""


def open_vocabulary(recipe: Recipe) -> Vocabulary:
    """What the recipe's `tokenizer` and `chat_template` come to; UserError if they cannot be had."""
    vocabulary = Vocabulary() if recipe.tokenizer is None else _remapped(recipe, recipe.tokenizer)
    if recipe.chat_template is None:
        return vocabulary
    files = dict(vocabulary.files or _carried(recipe, recipe.base))
    return dataclasses.replace(vocabulary, files=with_template(files, _template(recipe)))


# ---- tokenizers


def _remapped(recipe: Recipe, source: str) -> Vocabulary:
    source = recipe.base if source == "base" else source
    names = [recipe.base, *([] if source == "union" else [source]), *recipe.models]
    if absent := [name for name in names if recipe.models[name].stand_in]:
        raise NoTokenizer(f"{recipe.name}: tokenizer_source needs the tokenizer of {absent[0]!r}, which is not at hand")
    tokenizers = {name: _load(recipe, name) for name in dict.fromkeys(names)}
    if (own := tokenizers[recipe.base]) is None:
        raise NoTokenizer(f"{recipe.name}: tokenizer_source needs the tokenizer of {recipe.base!r}, which has none")
    known = {}  # of each model: token -> row
    for name, tokenizer in tokenizers.items():
        if tokenizer is None:
            warnings.warn(f"{name}: no tokenizer; taken to be that of {recipe.base}", stacklevel=2)
        size = recipe.models[name].config.vocab_size
        vocab = (tokenizer or own).get_vocab()
        known[name] = {token: i for token, i in vocab.items() if i < size}

    if source == "union":
        files, vocab = _union([tokenizer for tokenizer in tokenizers.values() if tokenizer], known, recipe.base)
        files |= {name: text for name, text in _carried(recipe, recipe.base).items() if name == _GENERATION}
    else:
        files, vocab = _carried(recipe, source), (tokenizers[source] or own).get_vocab()
        if source == recipe.base and len(known[source]) < len(vocab):
            size = recipe.models[source].config.vocab_size
            raise UserError(f"{recipe.name}: the tokenizer of {source!r} has tokens beyond its vocab_size={size}")
        generation = _carried(recipe, recipe.base).get(_GENERATION)
        files |= {_GENERATION: generation} if generation else {}
    size = max(vocab.values()) + 1
    if recipe.pad_to_multiple_of and size % recipe.pad_to_multiple_of:
        raise UserError(
            f"{recipe.name}: pad_to_multiple_of={recipe.pad_to_multiple_of} would add rows to a vocabulary of {size}, "
            "which is not supported; leave it out"
        )
    rows = {}
    for end in ("embed_tokens", "lm_head"):
        if (donor := getattr(recipe.plan, end)) is not None:
            rows[end] = np.full(size, -1, np.int64)
            for token, i in vocab.items():
                rows[end][i] = known[donor].get(token, -1)
    # The ids that name tokens, from the base model's tokenizer to this one.
    move = {i: vocab[token] for token, i in known[recipe.base].items() if token in vocab}
    hf = recipe.models[recipe.base].hf
    token_ids = _moved(hf, move)
    notes = [*_changes(recipe, rows, known, vocab), *_named("config.json", hf, token_ids)]
    if _GENERATION in files:
        settings = parse_json(files[_GENERATION], f"{recipe.base}: {_GENERATION}")
        moved = _moved(settings, move)
        files[_GENERATION] = _json(settings | moved)
        notes += _named(_GENERATION, settings, moved)
    return Vocabulary(size, rows, files, token_ids, tuple(notes))


def _changes(
    recipe: Recipe, rows: Mapping[str, np.ndarray], known: Mapping[str, dict[str, int]], vocab: Mapping[str, int]
) -> Iterator[str]:
    """What becomes of the rows of embedding and head, in words: those that are cut, that move, and that are zeros."""
    donors = {"embedding": recipe.plan.embed_tokens}
    if recipe.plan.head({name: config.tie_embeddings for name, config in recipe.configs.items()}) is not None:
        donors["head"] = recipe.plan.lm_head
    for donor in dict.fromkeys(filter(None, donors.values())):
        ends = [end for end, name in donors.items() if name == donor]
        new = rows["embed_tokens" if ends[0] == "embedding" else "lm_head"]
        whose, size = f"{' and '.join(ends)} of {donor!r}", recipe.models[donor].config.vocab_size
        if size != len(new):
            yield f"{whose}: {size:,} rows become {len(new):,}, as the tokenizer has tokens"
        own, tokens = ({i: token for token, i in of.items()} for of in (known[donor], vocab))
        places = np.arange(len(new))
        for what, found, named in (
            ("cut", np.setdiff1d(np.arange(size), new), own),
            ("moved", places[(new >= 0) & (new != places)], tokens),
            ("of zeros", places[new < 0], tokens),
        ):
            if len(found):
                yield f"{whose}: {len(found):,} row{'s' * (len(found) > 1)} {what} ({_some(found.tolist(), named)})"


def _some(rows: list[int], tokens: Mapping[int, str]) -> str:
    """The first of the tokens of these rows, which may be any characters, and how many more there are."""
    named = [tokens[i] for i in rows if i in tokens]
    shown = [short(token) for token in named[:_SHOWN]]
    shown += [f"{len(named) - _SHOWN:,} more"] if len(named) > _SHOWN else []
    shown += [f"{len(rows) - len(named):,} of no token"] if len(rows) > len(named) else []
    return ", ".join(shown)


def _named(file: str, settings: Mapping[str, Any], moved: Mapping[str, Any]) -> Iterator[str]:
    """The ids in a file that become others, or that the result has no token for."""
    for key, value in moved.items():
        if value != (old := settings[key]):
            lost = value is None or (isinstance(value, list) and len(value) < len(old))
            hint = ": the result's tokenizer has no such token" if lost else ""
            yield f"{file}: {key} {short(old)} becomes {json.dumps(value)}{hint}"


def _union(
    tokenizers: list[PreTrainedTokenizerBase], known: Mapping[str, dict[str, int]], base: str
) -> tuple[dict[str, bytes], dict[str, int]]:
    """The base's tokenizer, the first, with the others' tokens after its own: its files, and token -> id."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizers[0].save_pretrained(directory)
        union = auto_tokenizer(str(directory), local_files_only=True)
        added = [tokenizer.added_tokens_decoder for tokenizer in tokenizers]
        special = {token.content: token for tokens in added for token in tokens.values()}
        new = {token: None for name in known for token in sorted(known[name], key=known[name].__getitem__)}
        # First what the models' own vocabularies have, then what was added to them.
        for tokens in ([t for t in new if t not in special], [t for t in new if t in special]):
            union.add_tokens([special.get(token, token) for token in tokens if token not in known[base]])
        union.save_pretrained(directory)
        made = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in made}
    return files, union.get_vocab()


def _load(recipe: Recipe, name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model of the recipe; None if it has none. No code of the model is run."""
    model = recipe.models[name]
    directory = tokenizer_directory(model.path, revision=model.revision)
    if not set(_carried(recipe, name)) - {_GENERATION}:
        return None
    try:
        return auto_tokenizer(str(directory), local_files_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise UserError(f"{model.path}: its tokenizer cannot be read: {first_line(error)[:200]}") from None


def _carried(recipe: Recipe, name: str) -> dict[str, bytes]:
    model = recipe.models[name]
    return carried_files(model.path, model.revision)


def _moved(ids: Mapping[str, Any], move: Mapping[int, int]) -> dict[str, Any]:
    """The entries of `ids` that name tokens, with their new ids; one that is gone becomes null."""

    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [i for i in map(new, value) if isinstance(i, int)] or None
        return move.get(value) if isinstance(value, int) else None

    return {key: new(ids[key]) for key in TOKEN_IDS if ids.get(key) is not None}


# ---- chat templates


def _template(recipe: Recipe) -> str:
    """The text that the recipe's `chat_template` is, names, or chooses."""
    from jaxup.data.chat_templates import TEMPLATES

    given = recipe.chat_template or ""
    if given == "auto":  # the one that most models have
        found = [t.strip() for name in recipe.models if (t := getattr(_load(recipe, name), "chat_template", None))]
        if not found:
            raise UserError(f"{recipe.name}: chat_template: auto: no model has one")
        return collections.Counter(found).most_common(1)[0][0]
    if "{" in given:
        return given
    if given not in TEMPLATES:
        hint = suggest(given, TEMPLATES)
        raise UserError(f"{recipe.name}: chat_template {given[:40]!r} is neither Jinja nor known{hint}")
    return TEMPLATES[given]


def with_template(files: dict[str, bytes], template: str) -> dict[str, bytes]:
    """A model's files with this chat template, where newer and where older versions of transformers look for it."""
    config = "tokenizer_config.json"
    if not set(files) - {_GENERATION}:
        raise UserError("chat_template: the base model has no tokenizer to give it to")
    files = {name: text for name, text in files.items() if name != "chat_template.json"}
    settings = parse_json(files.get(config, b"{}"), config)
    return files | {"chat_template.jinja": template.encode(), config: _json(settings | {"chat_template": template})}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
