"""Pairs of words and pictures: what they are made from, which of them are never trained on, and which few are.

A picture is unseen when a digest of its content says so, whatever its file is called and whatever is said of it: the
same picture is never trained on and validated on, a larger collection leaves the others where they are, and no seed
changes it. Of the seen ones `pairs` and `tell` take so many, always the same for a seed, and 20 of them are the 10 and
10 more; each class has as many, as far as that divides.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from jaxup import together
from jaxup.continuous.builtin import Pictures, builtin
from jaxup.continuous.encoders import Encoder, fit, open_encoder
from jaxup.continuous.examples import Example, Kind
from jaxup.continuous.tables import read_features, read_table
from jaxup.data.mixture import documents, open_mixture
from jaxup.data.sources import Corpus, draw, safe_name
from jaxup.data.tokenizer import bpe_vocab_size, load_tokenizer, tokenizing, train_bpe
from jaxup.errors import UserError, within
from jaxup.progress import say
from jaxup.text import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 256  # pictures that are encoded together


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    source: str  # one of builtin.SOURCES; a .jsonl or .parquet file; a dataset; a .npy or .zarr, or a directory of it
    encoder: str  # one of encoders.ENCODERS
    size: int = 0  # pixels of a side that all pictures are made; 0 = they must be of one size
    columns: str = ""  # "image=img,text=caption": what a file's columns are called, where not as in tables.COLUMNS
    captions: str = ""  # of stored features: a .jsonl with a line for each; "" = the one beside them
    pairs: int = -1  # training examples that draw; -1 = all seen pictures
    tell: int = -1  # training examples that ask of a picture; -1 = all that something is asked of
    balance: bool = False  # whether those that draw or those that ask are repeated, if they are fewer than the others
    text: int = 0  # training rows of text alone
    corpus: str = ""  # where that text is from: a corpus as in DataConfig.files
    text_tokens: int = 128  # of such a row at most
    val_fraction: float = 0.1  # of the pictures, which are never trained on
    seed: int = 0  # of which pictures `pairs` and `tell` take


class Examples(Sequence[Example]):
    """Examples, each made when it is asked for."""

    def __init__(self, pairs: Pairs, chosen: Sequence[tuple[Kind, int]]):
        self._pairs, self.chosen = pairs, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Examples: ...

    def __getitem__(self, at: int | slice) -> Example | Examples:
        if isinstance(at, slice):
            return Examples(self._pairs, self.chosen[at])
        kind, number = self.chosen[at]
        return self._pairs.example(kind, number)

    def of(self, kind: Kind) -> Examples:
        """Those of one kind."""
        return Examples(self._pairs, [one for one in self.chosen if one[0] == kind])


class Pairs:
    """What `open_pairs` gives.

    Attributes:
      train, validation: the examples.
      encoder: fitted; `encoder.to_bytes()` is kept with a run, for decoding without the data.
      pictures: all that there are; `seen` and `unseen` (int arrays) are the numbers of those that may be trained on and
        of those that are held out.
      digest: of the examples, and of how they are encoded.
    """

    def __init__(
        self, pictures: Pictures, encoder: Encoder, tokenizer: PreTrainedTokenizerBase,
        seen: np.ndarray, unseen: np.ndarray,
        prompts: dict[str, np.ndarray], answers: dict[str, np.ndarray], rows: dict[str, list[np.ndarray]],
        chosen: dict[str, list[tuple[Kind, int]]], digest: str,
    ):  # fmt: skip
        self.pictures, self.encoder, self.seen, self.unseen, self.digest = pictures, encoder, seen, unseen, digest
        self.tokenizer = tokenizer
        self._prompts, self._answers, self._rows = prompts, answers, [*rows["train"], *rows["validation"]]
        self.train, self.validation = Examples(self, chosen["train"]), Examples(self, chosen["validation"])

    @property
    def grid(self) -> tuple[int, int]:
        return self.encoder.grid

    @property
    def frames(self) -> int:
        return self.encoder.frames

    @property
    def channels(self) -> int:
        return self.encoder.channels

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest answer."""
        prompts, answers = self._prompts.values(), [*self._answers.values(), *self._rows]
        return max(map(len, prompts), default=0), max(map(len, answers), default=0)

    def example(self, kind: Kind, number: int) -> Example:
        """Of a picture by its number, or of a row of text by its."""
        nothing = np.zeros(0, np.int32)
        if kind == "text":
            return Example(kind=kind, prompt=nothing, values=None, answer=self._rows[number])
        values = self.encoder.encode(self.pictures.look([number])[0])
        if kind == "draw":
            return Example(kind=kind, prompt=self._prompts[self.pictures.texts[number]], values=values, answer=nothing)
        prompt = self._prompts[self.pictures.questions[number]]
        answer = self._answers[self.pictures.answers[number]]
        return Example(kind=kind, prompt=prompt, values=values, answer=answer)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """float [.., N, C] -> uint8 [.., H, W] or [.., H, W, 3]; UserError where the encoder has no way back."""
        return self.encoder.decode(values)

    def look(self, numbers: np.ndarray | Iterable[int]) -> np.ndarray:
        """The pictures (features) of these numbers, stacked."""
        return self.pictures.look(numbers)


def open_pairs(config: PairsConfig, tokenizer: PreTrainedTokenizerBase | str, root: Path) -> Pairs:
    """The examples of `config`, with an encoder that is fitted once and then lies in `root`.

    All of the data is read once, and a fitted encoder reads the training part again. UserError, with nothing written,
    for whatever is wrong with it.
    """
    _check(config)
    pictures, grid = _open(config)
    shape = pictures.look([0]).shape[1:]
    features = config.encoder == "features"
    clip = len(shape) == 3 if features or shape[-1] != 3 else len(shape) == 4
    encoder = open_encoder(config.encoder, shape[clip:], frames=shape[0] if clip else 0, grid=grid)
    sides = [draw(key.hex()) / 2**64 < config.val_fraction for key in pictures.keys]
    held = np.array(sides, bool)
    seen, unseen = np.flatnonzero(~held), np.flatnonzero(held)
    if not len(seen) or not len(unseen):
        which, many = ("seen", "unseen") if not len(seen) else ("unseen", "seen")
        what = f"none of {len(held):,} pictures is {which}, all are {many}"
        raise UserError(what, at=f"val_fraction={config.val_fraction}", hint="more pictures, or another part of them")
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer(tokenizer, pictures)
    rows = {"train": [], "validation": []} if not config.text else _text(config, tokenizer)
    chosen = _choose(config, pictures, seen, unseen, rows)
    with within("source"):
        asked = {*pictures.texts, *pictures.questions} - {""}
        prompts = {text: prompt_ids(tokenizer, text) for text in sorted(asked)}
        answers = {text: _answer_ids(tokenizer, text) for text in sorted({*pictures.answers} - {""})}
    # What is fitted depends on the seen pictures, not on how few of them are trained on: all runs of a study have it in
    # common, and their losses can be compared.
    content = hashlib.blake2b(repr([config.encoder, config.val_fraction, shape]).encode(), digest_size=16)
    for key in pictures.keys:
        content.update(repr(key).encode())
    path = root / f"{safe_name(config.source)}-{safe_name(config.encoder)}-{content.hexdigest()[:12]}.npz"
    training = functools.partial(_content, pictures, seen)
    made = together.told(lambda: _fitted(encoder, training, path), f"fit {config.encoder}")
    encoder = Encoder.from_bytes(base64.b64decode(made), str(path))
    said = [chosen, pictures.texts, pictures.questions, pictures.answers]
    digest = hashlib.blake2b(repr([content.hexdigest(), encoder.digest, said]).encode(), digest_size=16)
    for array in [*prompts.values(), *answers.values(), *rows["train"], *rows["validation"]]:
        digest.update(repr(array.tolist()).encode())
    return Pairs(pictures, encoder, tokenizer, seen, unseen, prompts, answers, rows, chosen, digest.hexdigest())


def _tokenizer(spec: str, pictures: Pictures) -> PreTrainedTokenizerBase:
    """One that `spec` names, or trained on what is said of the pictures."""
    size = bpe_vocab_size(spec)
    if not size:
        return load_tokenizer(spec)
    said = [f"{a}{b}" for a, b in itertools.zip_longest(pictures.questions, pictures.answers, fillvalue="")]
    return train_bpe([*pictures.texts, *said], size)


def _check(config: PairsConfig) -> None:
    for key in ("pairs", "tell", "text"):
        if (count := getattr(config, key)) < (0 if key == "text" else -1):
            raise UserError(f"{count} examples", at=key, hint="" if key == "text" else "-1 is all of them")
    if not 0 < config.val_fraction < 1:
        raise UserError("not a fraction between 0 and 1", at=f"val_fraction={config.val_fraction}")
    if config.size < 0:
        raise UserError("not a number of pixels", at=f"size={config.size}")
    if config.text_tokens < 1:
        raise UserError("a row of text needs a token", at=f"text_tokens={config.text_tokens}")
    if config.text and not config.corpus:
        raise UserError(f"text={config.text} and no text", at="corpus", hint="a file, a directory or python")


def _open(config: PairsConfig) -> tuple[Pictures, tuple[int, int] | None]:
    """The pictures, and of features their grid where that is known."""
    stored = config.encoder.partition(":")[0] == "features"
    found = builtin(config.source)
    if found is not None:
        given = [key for key in ("size", "columns", "captions") if getattr(config, key)]
        if stored or given:
            what = f"{config.source} is pictures of its own" if given else f"{config.source} has no stored features"
            raise UserError(what, at=given[0] if given else "encoder")
        return found, None
    if stored:
        if config.size or config.columns:
            raise UserError("stored features have neither size nor columns of pictures", at="source")
        return read_features(config.source, config.captions)
    if config.captions:
        raise UserError("goes with the encoder features", at="captions")
    return read_table(config.source, size=config.size, columns=config.columns), None


def _content(pictures: Pictures, numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), AT_ONCE):
        yield pictures.look(numbers[start : start + AT_ONCE])


def _fitted(encoder: Encoder, training: functools.partial[Iterator[np.ndarray]], path: Path) -> str:
    """The fitted encoder in base64: what lies at `path`, or made and put there."""
    if path.exists():
        kept = Encoder.from_bytes(path.read_bytes(), str(path))
        if kept.spec == encoder.spec and kept.grid == encoder.grid and kept.frames == encoder.frames:
            return base64.b64encode(kept.to_bytes()).decode()
        raise UserError("an encoder of other data", at=str(path), hint="delete it, and it is fitted anew")
    fitted = fit(encoder, training)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, fitted.to_bytes())
    return base64.b64encode(fitted.to_bytes()).decode()


def _choose(
    config: PairsConfig, pictures: Pictures, seen: np.ndarray, unseen: np.ndarray, rows: dict[str, list[np.ndarray]]
) -> dict[str, list[tuple[Kind, int]]]:
    """(kind, number) of the examples of both sides; to validate, each unseen picture is drawn and asked of."""
    train: list[tuple[Kind, int]] = []
    validation: list[tuple[Kind, int]] = []
    kinds: tuple[tuple[Kind, str, list[str]], ...] = (
        ("draw", "pairs", pictures.texts), ("tell", "tell", pictures.answers),
    )  # fmt: skip
    for kind, key, said in kinds:
        count, fit = getattr(config, key), np.array([bool(text) for text in said], bool)
        usable = seen[fit[seen]]
        if count > len(usable):
            what = f"{count:,} examples, and of the seen pictures of {config.source} {len(usable):,} are for that"
            raise UserError(what, at=key, hint="-1 is all of them")
        order = _order(pictures, usable, f"{config.seed}\0{kind}") if count >= 0 else usable.tolist()
        train += [(kind, number) for number in (order if count < 0 else order[:count])]
        validation += [(kind, number) for number in unseen[fit[unseen]].tolist()]
    counts = [sum(one[0] == kind for one in train) for kind, _, _ in kinds]
    if config.balance and all(counts):
        times = {kind: round(max(counts) / count) for (kind, _, _), count in zip(kinds, counts)}
        train = [one for one in train for _ in range(times[one[0]])]
    train += [("text", number) for number in range(len(rows["train"]))]
    validation += [("text", len(rows["train"]) + number) for number in range(len(rows["validation"]))]
    if not train:
        raise UserError("pairs, tell and text are all 0: there is nothing to train on", at="pairs")
    return {"train": train, "validation": validation}


def _order(pictures: Pictures, numbers: np.ndarray, seed: str) -> list[int]:
    """By chance, but one of each class before a second of any."""
    drawn = sorted(numbers.tolist(), key=lambda number: draw(f"{seed}\0{pictures.keys[number].hex()}\0{number}"))
    if pictures.labels is None:
        return drawn
    before: Counter[int] = Counter()
    turns = {}
    for number in drawn:
        label = int(pictures.labels[number])
        turns[number] = before[label]
        before[label] += 1
    return sorted(drawn, key=lambda number: turns[number])  # which keeps the order by chance within a turn


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """int32 [P] of what comes first in an example: with the token that the tokenizer begins a text with, if any."""
    ids = _ids(tokenizer, text)
    first = tokenizer.bos_token_id
    begins = first is not None and tokenizer("a")["input_ids"][:1] == [first]
    return np.array([*([first] if begins else []), *ids], np.int32)


def _answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """int32 [A] of an answer, with the token that ends a text, if there is one."""
    end = tokenizer.eos_token_id
    return np.array([*_ids(tokenizer, text), *([] if end is None else [end])], np.int32)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    with tokenizing():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"{text[:40]!r} has no tokens in this tokenizer")
    return list(ids)


def _text(config: PairsConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[np.ndarray]]:
    """Rows of text, the beginning of one document each: `text` to train on, and a tenth as many of held-out ones."""
    with within("corpus"):
        mixture = open_mixture([(config.corpus, 1)], layout="text", seed=0, corpus=Corpus(0.1, 0))
        rows: dict[str, list[np.ndarray]] = {}
        sides: tuple[Literal["train", "validation"], ...] = ("train", "validation")
        for side in sides:
            count = config.text if side == "train" else -(-config.text // 10)
            # A token is at most some characters long: the rest of a long document is not tokenised for nothing.
            texts = (text[: 32 * config.text_tokens] for text in documents(mixture, side) if text.strip())
            made = (prompt_ids(tokenizer, text)[: config.text_tokens] for text in itertools.islice(texts, count))
            rows[side] = [row for row in made if len(row) > 1]
        if len(rows["train"]) < config.text:
            say(f"corpus {config.corpus}: it has {len(rows['train']):,} documents, and text={config.text:,} is more")
    return rows
