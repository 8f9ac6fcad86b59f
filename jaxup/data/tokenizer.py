"""Tokenizers: loaded from a directory or the hub, or trained on the source; and what identifies one."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxup.errors import UserError, first_line, is_panic, storage_error, within
from jaxup.files.names import check_hub_name, in_run, is_hub_name, nearest_path, split_revision
from jaxup.files.storage import SECONDS, ask_hub, check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# transformers says on import that it misses PyTorch, which its tokenizers do not need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# What a directory with a tokenizer has at least one of.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")

_MOST_GROWTH = 100  # of text by a normaliser
END_OF_TEXT = "<|endoftext|>"
BATCH_CHARACTERS = 2**18  # texts are tokenised in batches of about so much,
BATCH_TEXTS = 1024  # and no more than so many of them
SMALLEST_VOCABULARY = 257  # the 256 bytes and END_OF_TEXT


def bpe_vocab_size(spec: str) -> int:
    """N when `spec` is `bpe:N` (train a byte-level BPE of N tokens on the source), 0 when it names a tokenizer."""
    if not spec.startswith("bpe:"):
        return 0
    size = spec.removeprefix("bpe:")
    if not re.fullmatch(r"[0-9]{1,9}", size) or int(size) < SMALLEST_VOCABULARY:
        wanted = f"a vocabulary of N >= {SMALLEST_VOCABULARY} tokens on the source, such as bpe:8192"
        raise UserError(f"{spec!r}: write bpe:N to train {wanted}", at="tokenizer")
    return int(size)


_NUMBERS = re.compile(r"ids:([1-9][0-9]{0,7})(?::([0-9]{1,8}))?")


def number_tokenizer(spec: str) -> PreTrainedTokenizerFast | None:
    """Of `ids:N`, or `ids:N:EOS`: token i is the text "i", for ids of which nothing else is known.

    None for any other spec.
    """
    if not spec.startswith("ids:"):
        return None
    if not (found := _NUMBERS.fullmatch(spec)) or int(found[2] or 0) >= int(found[1]):
        what = f"{spec!r}: write ids:N for the ids 0 to N - 1, ids:N:EOS where EOS ends a text"
        raise UserError(what, at="tokenizer", hint="such as ids:50257:50256")
    with _torch_later():
        from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(int(found[1]))}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[^0-9]+"), "removed")
    special = {} if found[2] is None else {"eos_token": AddedToken(str(int(found[2])), single_word=True)}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def load_tokenizer(spec: str, *, name: str = "") -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer in the directory `spec`, of that run or hub id; from the local cache if it is there.

    No code that comes with a tokenizer is ever run. UserError on any failure; `name` is what it calls the directory.
    """
    if (numbers := number_tokenizer(spec)) is not None:
        return numbers
    name = name or spec
    if bpe_vocab_size(spec):
        raise UserError(f"{spec!r} is trained when a token store is made; there is none to load", at="tokenizer")
    with within("tokenizer"):
        path = ("://" not in spec and in_run(spec)) or Path(os.path.expanduser(spec))
    if os.path.isdir(path):
        if not any((path / file).exists() for file in _FILES):
            raise UserError(f"no tokenizer in {name}: none of {', '.join(_FILES)}", at="tokenizer")
        return _from_pretrained(str(path), name)
    if os.path.lexists(path):
        raise UserError("not a directory", at=("tokenizer", spec))
    repo, revision = split_revision(spec)
    if not is_hub_name(repo):
        raise UserError(f"no such directory: {name}", at="tokenizer", hint=nearest_path(spec))
    with within("tokenizer"):
        check_hub_name(repo, sure=revision is not None)
    with contextlib.suppress(UserError):
        return _from_pretrained(repo, name, revision=revision, local_files_only=True)
    from huggingface_hub import hf_hub_download

    try:
        ask_hub(functools.partial(hf_hub_download, repo, "tokenizer_config.json", revision=revision))
    except TimeoutError:
        raise UserError(
            f"no such directory, and the Hub does not answer within {SECONDS} s", at=("tokenizer", spec)
        ) from None
    except Exception:  # it answers: what it says of the tokenizer is said below
        pass
    try:
        return _from_pretrained(repo, name, revision=revision)
    except UserError as error:
        raise UserError(f"no such directory, and {error.what}", at=error.at, hint=error.hint) from None


@contextlib.contextmanager
def tokenizing() -> Iterator[None]:
    """What a tokenizer's file makes it fail with, as a mistake of the user's: a panic of Rust is no Exception."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(f"the tokenizer fails: {first_line(error)[:200]}") from None


def _from_pretrained(spec: str, name: str, **options: Any) -> PreTrainedTokenizerBase:
    try:
        return auto_tokenizer(spec, **options)
    except UserError as error:
        raise error.within("tokenizer") from None
    except BaseException as error:  # OSError, ValueError, KeyError, tokenizers' bare Exception, ...
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = first_line(error).replace(spec, name)
        raise UserError(f"cannot load {name}: {reason}", at="tokenizer") from None


def auto_tokenizer(spec: str, **options: Any) -> PreTrainedTokenizerBase:
    """What transformers' AutoTokenizer makes of a directory or hub id, with its errors; no code of it is run.

    UserError for a directory that would have it read other files than its own.
    """
    if os.path.isdir(spec):
        check_texts(spec)
        _check_sentencepiece(Path(spec))
    with _torch_later(), _without_panics():
        from transformers import AutoTokenizer

        # It looks for a model beside the tokenizer, and remarks on one of this project's own format.
        heard, ours = logging.getLogger("transformers.configuration_utils"), "a model of type `jaxup`"
        heard.addFilter(unremarked := lambda record: ours not in record.getMessage())
        try:
            tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=False, **options)
        finally:
            heard.removeFilter(unremarked)
    if not len(tokenizer):
        raise UserError("the tokenizer has no tokens", at=spec)
    for token, content in tokenizer.special_tokens_map.items():
        if content == "":  # which is none, and would be looked up for ever
            setattr(tokenizer, token, None)
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if not isinstance(template, str | None):
            raise UserError(f"its chat template is no text, but {str(template)[:40]!r}", at=spec)
    if (normalizer := getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)) is not None:
        _check_growth([json.loads(normalizer.__getstate__())], spec)
    with _without_panics():
        tokenizer("some text")  # if a panic is to come, it comes now as a rule
    return tokenizer


def _check_sentencepiece(directory: Path) -> None:
    """UserError where only a package that is not there reads the tokenizer: what transformers says is of another."""
    if (directory / "tokenizer.json").exists() or importlib.util.find_spec("sentencepiece") is not None:
        return
    for path in directory.glob("*.model"):
        with path.open("rb") as file:
            if file.read(1) == b"\n":  # as the first field of a protocol buffer; a file of tiktoken's is text
                raise UserError("needs sentencepiece", at=path.name, hint="pip install sentencepiece")


def _check_growth(normalizers: list[dict[str, Any]], spec: str) -> None:
    """UserError for a normaliser that makes far more text than it is given: a tokenizer has no limit of memory."""
    steps: list[tuple[str | None, str]] = []  # what is replaced, None = every character at worst; by what
    added = 0
    while normalizers:
        step, *normalizers = normalizers
        normalizers = [*step.get("normalizers", ()), *normalizers]
        if "content" in step:
            steps.append((step["pattern"].get("String"), step["content"]))
        if "precompiled_charsmap" in step:  # of sentencepiece: the size of a trie, it, and what is put for characters
            table = base64.b64decode(step["precompiled_charsmap"] or "")
            trie = int.from_bytes(table[:4], "little")
            steps.append((None, max(table[4 + trie :].decode(errors="replace").split("\0"), key=len)))
        added += len(step.get("prepend", ""))
    if added > _MOST_GROWTH:
        raise UserError("the tokenizer's normalizer multiplies text", at=spec)
    for begun in {pattern or "a" for pattern, _ in steps}:
        text = begun
        for pattern, content in steps:
            text = text * max(1, len(content)) if pattern is None else text.replace(pattern, content)
            if len(text) > _MOST_GROWTH * len(begun):
                raise UserError("the tokenizer's normalizer multiplies text", at=spec)


@contextlib.contextmanager
def _without_panics() -> Iterator[None]:
    """Keeps what Rust itself writes on stderr of a panic, which is an exception here, to itself."""
    sys.stderr.flush()
    panicked, stderr = False, os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            said.seek(0)
            text = said.read()
            os.write(stderr, text.partition(b"\nthread '")[0] if panicked else text)
            os.close(stderr)


@contextlib.contextmanager
def _torch_later() -> Iterator[None]:
    """What is imported inside gets PyTorch when it first uses it.

    transformers imports it where it is installed, which takes seconds, and its tokenizers never use it.
    """
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None:
        yield
        return
    stand_in = sys.modules["torch"] = _Later(spec.name)
    stand_in.__spec__ = spec
    try:
        yield
    finally:
        stand_in.leave()


class _Later(types.ModuleType):
    """Stands for a module that is imported when something of it is asked for."""

    def leave(self) -> None:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def __getattr__(self, name: str) -> Any:
        self.leave()
        return getattr(importlib.import_module(self.__name__), name)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike, *shown: str) -> None:
    """Its files, into `directory`; what a full disk raises is a UserError whose place is `shown`."""
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # tokenizers raise a bare one, with the system's words
        raise storage_error(error, *shown) from None


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, END_OF_TEXT among them; the same text gives the same one.

    Any text comes back from its ids unchanged. A small corpus may hold fewer merges than asked for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        what = f"a vocabulary of {vocab_size} is too small; at least {SMALLEST_VOCABULARY}"
        raise UserError(what, at="tokenizer")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    special = dict.fromkeys(("eos_token", "bos_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def train_characters(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each character that occurs, in the order of Unicode, after <pad>, <bos>, <eos> and <unk>.

    A text of these characters comes back from its ids unchanged; every other character becomes <unk>, which decoding
    shows. For small models of small alphabets, such as arithmetic.
    """
    with _torch_later():
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    characters = sorted(set().union(*texts))
    if not characters or any("\ud800" <= c <= "\udfff" for c in characters):
        raise UserError("no text, or halves of characters (lone surrogates), to make tokens of", at="tokenizer")
    tokens = {token: i for i, token in enumerate([*special.values(), *characters])}
    backend = Tokenizer(models.WordLevel(tokens, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def train_words(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each word that occurs, of those that white space parts, in the order of Unicode, after <pad>, <bos>,
    <eos> and <unk>. Decoding puts one space between words. For small models of small closed languages."""
    with _torch_later():
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    words = sorted({word for text in texts for word in text.split()} - {*special.values()})
    tokens = {token: i for i, token in enumerate([*special.values(), *words])}
    backend = Tokenizer(models.WordLevel(tokens, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def unknown_characters(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> str:
    """Those of the texts' characters that a tokenizer has no token for, in the order of Unicode."""
    characters = sorted(set().union(*texts))
    ids = encoder(tokenizer)(characters) if characters else []
    return "".join(c for c, of in zip(characters, ids) if tokenizer.unk_token_id in of)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex hash of all that decides the ids of a text: vocabulary, merges, normaliser, added tokens, EOS.

    Without truncation, padding and the template of special tokens, which calling a tokenizer may change.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in pure Python
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        state = {key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    state["eos"] = tokenizer.eos_token_id
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


T = TypeVar("T")


def batched(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of as many items, each with so much text, as are tokenised at once."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += characters(item)
        if total >= BATCH_CHARACTERS or len(batch) == BATCH_TEXTS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Documents -> ids, without special tokens; text that spells a special token stays ordinary text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizing()(
            lambda texts: tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True
    return tokenizing()(lambda texts: [e.ids for e in plain.encode_batch_fast(texts, add_special_tokens=False)])
