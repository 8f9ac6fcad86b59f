"""A model that writes answers: problems and texts in, texts out, on `jaxup.model.sampling.Sampler`."""

from __future__ import annotations

import bisect
import copy
import functools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxup.data.tokenizer import tokenizing
from jaxup.errors import UserError
from jaxup.hub.text_generation import encode
from jaxup.learning.problem import Ask, Problem, Written
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params
from jaxup.model.sampling import Request, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a prefix that what follows is decoded with: a token's text depends on those just before it.
_CONTEXT = 8


class Policy:
    """A `Writer`: what a model draws for each `Ask`, as `Sampler` does, and its text.

    Args:
      ends: tokens that end a text.
      length: positions of the longest text. An answer ends where there is no room, as at `max_tokens`.
      chat: a prompt is what a user says, spelt by the tokenizer's chat template; otherwise it is gone on with as it is.
      others: as for `Sampler`.
    """

    def __init__(
        self, config: ModelConfig, params: Params, tokenizer: PreTrainedTokenizerBase, *, ends: Collection[int],
        temperature: float, top_k: int, top_p: float, vocab_size: int, slots: int, length: int, chat: bool = False,
        order: Sequence[int] | np.ndarray | None = None, dtype: str = "float32",
    ):  # fmt: skip
        self.tokenizer, self.ends, self.length, self.chat = tokenizer, frozenset(ends), length, chat
        self._sampler = Sampler(
            config, params, slots=slots, length=length, temperature=temperature, top_k=top_k, top_p=top_p,
            vocab_size=vocab_size, order=order, dtype=dtype,
        )  # fmt: skip
        self._spelling = functools.cache(functools.partial(_spelling, tokenizer, vocab_size))

    def with_params(self, params: Params) -> Policy:
        """The same with other parameters of the same shapes, by the same programs; it goes on counting."""
        other = copy.copy(self)
        other._sampler = self._sampler.with_params(params)
        return other

    @property
    def tokens_drawn(self) -> int:
        """All that were drawn so far, with those that came after an `until` and are in no answer."""
        return self._sampler.drawn

    def prefix(self, problem: Problem) -> tuple[int, ...]:
        """The tokens of the prompt. UserError if it has none, or leaves no room for an answer."""
        prompt = [{"role": "user", "content": problem.prompt}] if self.chat else problem.prompt
        tokens = tuple(encode(self.tokenizer, prompt))
        if not tokens:
            raise UserError("the prompt has no tokens", at=f"problem {problem.id}")
        if len(tokens) >= self.length:
            what = f"a prompt of {len(tokens)} tokens, and a text has {self.length} with its answer"
            raise UserError(what, at=f"problem {problem.id}")
        return tokens

    def write(self, asks: Sequence[Ask], *, progress: Callable[[int, int], None] | None = None) -> list[Written]:
        """In the order of `asks`, each by itself; `progress` as of `Sampler`.

        `until` is looked for in what is written, not in the prefix, and in whole: tokens may share it. Where one token
        has it all, the text stops there; where it lies across some, a few more may be drawn, which are dropped.
        """
        requests = [
            Request(ask.prefix, ask.key, min(ask.max_tokens, self.length - len(ask.prefix)),
                    self.ends | (self._spelling(ask.until) if ask.until else frozenset()))
            for ask in asks
        ]  # fmt: skip
        across = [len(ask.until.encode()) > 1 for ask in asks]

        def cut(index: int, tokens: np.ndarray) -> int | None:
            return self._stop(asks[index], tokens) if across[index] else None

        drawn = self._sampler(requests, cut=cut if any(across) else None, progress=progress)
        written = []
        for ask, (tokens, logp, entropy, _) in zip(asks, drawn, strict=True):
            ended = bool(len(tokens)) and int(tokens[-1]) in self.ends
            text = self._text(ask.prefix, tokens[: len(tokens) - ended])
            stopped = not ended and bool(ask.until) and ask.until in text
            written.append(Written(tokens, logp, entropy, text, ended, stopped))
        return written

    def places(self, prefix: Sequence[int], tokens: np.ndarray, lengths: Sequence[int]) -> list[int]:
        """For each of these lengths of the text of an answer's tokens, the first token with which it is that long."""
        known = functools.cache(lambda at: len(self._text(prefix, tokens[: at + 1])))
        return [bisect.bisect_left(range(len(tokens) - 1), length, key=known) for length in lengths]

    def _stop(self, ask: Ask, tokens: np.ndarray) -> int | None:
        """How many of the tokens it takes until `until` is written."""
        if ask.until not in self._text(ask.prefix, tokens):
            return None
        counts = range(1, len(tokens) + 1)
        return counts[bisect.bisect_left(counts, True, key=lambda n: ask.until in self._text(ask.prefix, tokens[:n]))]

    def _text(self, prefix: Sequence[int], tokens: np.ndarray) -> str:
        before = list(prefix[-_CONTEXT:])
        known, whole = _decoded(self.tokenizer, before), _decoded(self.tokenizer, [*before, *tokens.tolist()])
        return whole[len(known.rstrip("\N{REPLACEMENT CHARACTER}")) :]  # a character of which the prefix has a part


def _spelling(tokenizer: PreTrainedTokenizerBase, vocab_size: int, until: str) -> frozenset[int]:
    """The tokens that have it in their text."""
    return frozenset(token for token in range(vocab_size) if until in _decoded(tokenizer, [token]))


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """With special tokens: an answer that has some is not the one without them, which may be right."""
    with tokenizing():
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
