"""`jaxup.generate`: prompts of text or messages in, text out, whole or in pieces as it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.errors import UserError
from jaxup.text import parse_json

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from jaxup.model.decoder import Decoder

Prompt = str | Sequence[dict[str, str]]  # text to go on from, or the messages of a chat that waits for a reply


def generate(
    model: Decoder,
    prompts: Sequence[Prompt],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    order: Sequence[int] | np.ndarray | None = None,
    max_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Collection[int] | None = None,
) -> list[str]:
    """What the model writes after each prompt, without the prompt; all prompts are one batch.

    Args:
      model: as `jaxup.load` or training gives one; it computes in the dtype of its `compute`.
      prompts: each a text that is gone on with, or a chat such as `[{"role": "user", "content": "Why?"}]`,
        spelt by the tokenizer's chat template.
      tokenizer: None: that which the model came with.
      order: which layer runs when; see `Decoder`. None: each once, as they lie.
      max_tokens: new tokens of each at most.
      temperature: divides the logits; 0 is greedy.
      top_k: draw from the likeliest so many tokens; 0 = from all.
      top_p: draw from the fewest tokens that hold so much of the probability.
      seed: the same seed gives the same text.
      eos_ids: tokens that end a text; None: as the model's directory says, else the tokenizer's.

    Raises:
      UserError: a value that cannot be, a prompt without tokens or with those of another tokenizer,
        a chat without a template, more positions or layers than the model has, or no tokenizer.
    """
    how = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    writing = Writing(model, prompts, tokenizer=tokenizer, order=order, eos_ids=eos_ids, **how)
    pieces = [*writing, writing.rest()]
    return ["".join(row) for row in zip(*pieces, strict=True)]


class Writing:
    """`generate` as it goes on: iterating gives the next piece of each prompt's text, in whole characters.

    `rest()` is what then is left, or whenever iterating is broken off; `counts` are the tokens drawn at each step.
    """

    def __init__(self, model: Decoder, prompts: Sequence[Prompt], *, tokenizer: PreTrainedTokenizerBase | None = None,
                 order: Any = None, eos_ids: Collection[int] | None = None, **options: Any):  # fmt: skip
        from jaxup.data.tokenizer import load_tokenizer
        from jaxup.hub.directory import tokenizer_directory
        from jaxup.model import sampling

        check_options(options)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise UserError(f"prompts are a list, not {type(prompts).__name__}", at="generate", hint='["..."]')
        origin = model.origin
        if tokenizer is None and origin is None:
            raise UserError("the model came without a tokenizer", at="generate", hint="tokenizer=...")
        if origin is not None and (tokenizer is None or eos_ids is None):
            directory = tokenizer_directory(origin.path, revision=origin.revision)
            tokenizer = tokenizer or load_tokenizer(str(directory))
            eos_ids = stop_ids(directory, tokenizer) if eos_ids is None else eos_ids
        assert tokenizer is not None
        eos_ids = stop_ids(None, tokenizer) if eos_ids is None else eos_ids
        ids = [encode(tokenizer, prompt) for prompt in prompts]
        self.counts: list[int] = []
        self._ends = frozenset(eos_ids)
        # A reply in a chat is a text of its own; otherwise the prompt's goes on.
        self._texts = [Detokenizer(tokenizer, row if isinstance(p, str) else []) for row, p in zip(ids, prompts)]
        self._steps = sampling.generate(
            model.config, model.params, ids, order=order, eos_ids=tuple(eos_ids),
            vocab_size=drawable(model, tokenizer), dtype=model.compute.dtype, **options,
        )  # fmt: skip

    def __iter__(self) -> Iterator[list[str]]:
        for drawn in self._steps:
            self.counts.append(int((drawn >= 0).sum()))
            yield [
                text.push(token) if token >= 0 and token not in self._ends else ""
                for text, token in zip(self._texts, drawn.tolist(), strict=True)
            ]

    def rest(self) -> list[str]:
        """What no piece had yet: a last character may lack some of its bytes."""
        return [text.rest() for text in self._texts]


class Chat:
    """A conversation that is remembered; one compilation serves all of it, whatever is said.

    `reply(text)` gives the pieces of the next reply. What is said with it is in `messages` then, and what of it was
    drawn if it was broken off. A context that is full loses its oldest questions with their answers: `dropped` counts
    those that the last reply did without. `cut` is why it ended before the model ended it, in words; or "".

    Args:
      model, tokenizer: as for `generate`; the tokenizer with a chat template.
      eos_ids: tokens that end a reply.
      context: tokens of all that is said; 0 = as many as the model takes, and at most 4,096.
      system: what it is told to begin with.
      options: as of `generate`, all of them.

    Raises:
      UserError: a value that cannot be.
    """

    def __init__(self, model: Decoder, tokenizer: PreTrainedTokenizerBase, *, eos_ids: Collection[int],
                 context: int = 0, system: str | None = None, **options: Any):  # fmt: skip
        from jaxup.model import sampling

        check_options(options)
        most = model.config.max_positions
        if not 0 <= context <= most:
            raise UserError(f"{context} tokens, and the model takes from 1 to {most}", at="context")
        self.context = context or min(most, 4096)
        self.messages: list[dict[str, str]] = []
        self.dropped, self.cut = 0, ""
        self._tokenizer, self._ends = tokenizer, frozenset(eos_ids)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._max_tokens = options.pop("max_tokens")
        self._session = sampling.Session(
            model.config, model.params, context=self.context,
            vocab_size=drawable(model, tokenizer), dtype=model.compute.dtype, **options,
        )  # fmt: skip

    def reply(self, text: str) -> Generator[str, None, None]:
        """Pieces in whole characters. UserError, and nothing is remembered of it, if it cannot be said."""
        messages, ids = self._fitting([*self.messages, {"role": "user", "content": text}])
        self.dropped, self.cut = (len(self.messages) + 1 - len(messages)) // 2, ""
        wanted = min(self._max_tokens, self.context - len(ids))
        pieces, said, rest, token = Detokenizer(self._tokenizer, []), "", "", None
        try:
            for token in self._session(ids, max_tokens=wanted, eos_ids=self._ends):
                if token not in self._ends and (piece := pieces.push(token)):
                    said += piece
                    yield piece
            rest = pieces.rest()  # a last character may lack some of its bytes
            if token not in self._ends:
                full = f"the context of {self.context} tokens is full"
                self.cut = full if wanted < self._max_tokens else f"{wanted} tokens are the most of a reply"
        finally:
            if token is not None:  # else it was broken off before there was anything
                self.messages = [*messages, {"role": "assistant", "content": (said + rest).strip()}]
        yield rest

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The newest of them that leave room for a reply, and their tokens."""
        room = min(self._max_tokens, max(1, self.context // 4))
        while True:
            ids = encode(self._tokenizer, [*self._system, *messages])
            if len(ids) + room <= self.context or (len(messages) == 1 and len(ids) < self.context):
                return messages, ids
            if len(messages) == 1:
                raise UserError(f"{len(ids)} tokens, and the context holds {self.context} with the reply")
            messages = messages[2:]


# How `generate` draws: what a value must be, as a test and in words.
OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda n: n >= 1, "at least 1"),
    "temperature": (lambda t: 0 <= t < math.inf, "a number and not negative"),
    "top_k": (lambda k: k >= 0, "not negative"),
    "top_p": (lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "seed": (lambda n: 0 <= n < 2**32, "between 0 and 2^32 - 1"),
}


def check_options(options: Mapping[str, Any], spelt: Callable[[str], str] = "generate: {}".format) -> None:
    """UserError for a value of `generate` that cannot be; `spelt` is how the user knows a name."""
    for name, (good, wanted) in OPTIONS.items():
        if not good(options[name]):
            raise UserError(f"{spelt(name)} must be {wanted}, not {options[name]}")
    for name, all_tokens in (("top_k", 0), ("top_p", 1)):
        if options["temperature"] == 0 and options[name] != all_tokens:
            raise UserError(f"{spelt(name)} goes with a temperature above 0: nothing is drawn at 0")


def drawable(model: Decoder, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that may be drawn: a table may be padded beyond its tokenizer."""
    return min(max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens that a text is gone on from."""
    from jaxup.data.chat_formats import prompt_ids
    from jaxup.data.tokenizer import tokenizing

    with tokenizing():
        return tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt_ids(tokenizer, prompt)


def stop_ids(directory: Path | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text: of generation_config.json, else config.json, else the tokenizer."""
    from jaxup.files.storage import Local

    storage = None if directory is None else Local(directory)
    for file in ("generation_config.json", "config.json"):
        if storage is None or not storage.exists(file):
            continue
        ids = parse_json(storage.whole(file), f"{storage.name}: {file}").get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int for i in ids):
                raise UserError(f"{storage.name}: {file}: eos_token_id={ids} is not a token id or a list of them")
            return tuple(ids)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


class Detokenizer:
    """The text of tokens that come one by one, after those of `prompt`; in whole characters only.

    A token's text depends on its neighbours (bytes of one character, the blank before the first word),
    so each piece is the difference between two decoded ends of the tokens: from the piece before on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]):
        self._tokenizer, self._ids = tokenizer, list(prompt)
        self._known = len(self._ids)  # of `_ids`, whose text has been returned

    def push(self, token: int) -> str:
        self._ids.append(token)
        piece = self.rest()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return piece

    def rest(self) -> str:
        """What has not been returned yet: a last character may lack some of its bytes."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._known])) :]

    def _decode(self, ids: list[int]) -> str:
        from jaxup.data.tokenizer import tokenizing

        with tokenizing():
            return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
