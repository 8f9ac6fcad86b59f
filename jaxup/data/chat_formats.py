"""Conversations -> token ids and the mask of those that are trained on.

What a named format puts around the turns stands in `chat_templates.py`; None is the tokenizer's own chat template. A
named format is to the letter what an exported model gets under the same name, but for the input that a row of Alpaca's
may have: messages have no place for one.

Trained are an assistant's text and what ends its turn (EOS, <|eot_id|>, <|im_end|>). The blank after `[/INST]` is the
reply's: generation starts before it. Tokens are those of the whole text at once, as at inference; one that straddles
the border of what is trained is trained if it begins inside. So where the tokenizer merges the end of a prompt in
plain text with the first characters of what follows, those are not trained on; and, as everywhere, text that spells a
special token becomes that token. Of both there is one warning, and so there is where nothing is trained on that ends a
reply. Where a row says what a format has no place for, such as tools, the conversation is refused.
"""

from __future__ import annotations

import abc
import bisect
import contextlib
import functools
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxup.data.chat_templates import ALIASES, SPELLINGS
from jaxup.data.layouts import Segment, Segments
from jaxup.data.rendering import render, render_all, renderer
from jaxup.data.tokenizer import tokenizing
from jaxup.data.turns import SPOKEN, TOOLS, Conversation, Turn
from jaxup.errors import UserError, suggest
from jaxup.text import escaped

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n]: there is a loss for predicting this token


class Rendered(NamedTuple):
    """The text the model sees, and the [start, end) of its characters that are trained on, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


_NAME_ONE = f"choose a format by name: {', '.join(SPELLINGS)}"


HISTORIES = ("", "last", "each")


def open_format(name: str | None, tokenizer: PreTrainedTokenizerBase, history: str = "") -> Format:
    """The format of that name, or with None the tokenizer's own chat template.

    `history` is for templates that spell earlier turns in another way once the conversation goes on: "" refuses what
    they change, "last" trains on the last answer only, "each" makes the last answer of each prefix its own example.

    Warns when the tokenizer lacks special tokens that the format is made of. UserError for an unknown name and a
    tokenizer that will not do. A missing template is an error of the first conversation: segments need none.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        what = "the tokenizer is one in pure Python, which does not say what characters a token is made of"
        raise UserError(what, at="chat format", hint="save it with a tokenizer.json")
    if history not in HISTORIES:
        raise UserError(f"history={history!r}: not known{suggest(history, HISTORIES[1:])}")
    if name is None:
        return TemplateFormat(tokenizer, history)
    name = ALIASES.get(name, name)
    if name not in SPELLINGS:
        raise UserError(f"chat format: {name[:40]!r} is not known{suggest(name, [*SPELLINGS, *ALIASES])}")
    return NamedFormat(name, tokenizer, history)


class Format(abc.ABC):
    """`examples` of many conversations and then `tokenize`, or `encode` of one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, history: str = ""):
        from tokenizers import Tokenizer

        self.tokenizer, self._history = tokenizer, history
        self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        # No post-processor: it would add a second BOS, and may take the blanks out of the tokens' offsets.
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"post_processor": None, "truncation": None, "padding": None}
        self._backend = Tokenizer.from_str(json.dumps(state))
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._warned: set[str] = set()

    def examples(self, conversations: Sequence[Conversation | Segments]) -> list[list[Rendered] | UserError]:
        """What is trained on of each: one example, or with a `history` as many as that says. Or why it is not."""
        parts = [self._parts(conversation) for conversation in conversations]
        made = iter(self._render_all([part for of in parts for part in of]))
        return [_all(itertools.islice(made, len(of))) for of in parts]

    def _parts(self, conversation: Conversation | Segments) -> list[Conversation | Segments]:
        if not isinstance(conversation, Conversation) or not self._history:
            return [conversation]
        answers = [i for i, turn in enumerate(conversation) if turn.trained and turn.role == "assistant"]
        made: list[Conversation | Segments] = []
        for i, before in list(zip(answers, [-1, *answers]))[-1 if self._history == "last" else 0 :]:
            turns = [turn._replace(trained=turn.trained and n > before) for n, turn in enumerate(conversation[: i + 1])]
            written = conversation.written if i + 1 == len(conversation) else ""
            made.append(Conversation(turns, conversation.options, written))
        return made or [conversation]

    def encode(self, conversation: Conversation | Segments) -> Encoded:
        """Of a conversation that is one example."""
        return self.tokenize([self.render(conversation)])[0]

    def render(self, conversation: Conversation | Segments) -> Rendered:
        """All of it as one example. Raises UserError, in one line, for what the format cannot express."""
        (made,) = self._render_all([conversation])
        if isinstance(made, UserError):
            raise made
        return made

    def _render_all(self, parts: Sequence[Conversation | Segments]) -> list[Rendered | UserError]:
        chats = [part for part in parts if isinstance(part, Conversation)]
        for turn in (turn for chat in chats for turn in chat):
            if found := self._special.search(turn.text) or self._special.search(turn.input):
                self._warn("special", f"a turn's text spells {found[0]!r}, which becomes that special token")
        made = iter(rendered := self._render_chats(chats))
        if any(isinstance(one, Rendered) for one in rendered):
            self.check()
        segments = functools.partial(_or_error, self._render_segments)
        return [next(made) if isinstance(part, Conversation) else segments(part) for part in parts]

    def check(self, *, strict: bool = False) -> None:
        """Warns of all `doubts`, once; UserError if it is `strict`."""
        for doubt in self.doubts:
            if strict:
                raise UserError(doubt, at="chat format")
            self._warn(doubt, doubt)

    def tokenize(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        return self._tokenize(rendered)

    def _tokenize(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        with tokenizing():
            encodings = self._backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        result = []
        for (text, spans), encoding in zip(rendered, encodings):
            ids = np.array(encoding.ids, np.int32)
            trained = np.zeros(len(ids), bool)
            for start, end in spans:
                # Two searches: to have all offsets of a text as Python's numbers takes as long as a third of its ids.
                first, last = (_begins_from(encoding, at) for at in (start, end))
                trained[first:last] = True
                before, after = _characters(encoding, first - 1) if first and not trained[first - 1] else (0, 0)
                if after > start:
                    token = text[before:after]
                    self._warn("border", f"not trained on: {token!r}, one token that begins before what is trained")
            result.append(Encoded(ids, trained))
        return result

    def _warn(self, about: str, message: str) -> None:
        """Says it once for all conversations."""
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"chat format: {message}; said once", stacklevel=4)

    @functools.cached_property
    def doubts(self) -> list[str]:
        """What makes a model trained on chats in this format unlike what is expected, a line each."""
        if (probe := self._probe) is None or np.isin(probe.ids[probe.trained], self.stops).any():
            return []
        ends = [self.tokenizer.convert_ids_to_tokens(token) for token in self.stops]
        what = f"is {' or '.join(map(repr, ends))}" if ends else "does not exist"
        if self.tokenizer.eos_token_id is not None:
            what += f" (formats that end with EOS: {', '.join(n for n, s in SPELLINGS.items() if '{eos}' in s.end)})"
        return [f"nothing that ends a reply is trained on: what generation stops at {what}"]

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a reply: EOS, and what it ends a turn with if that is a token of its own."""
        found = [self.tokenizer.eos_token_id]
        for token in self._probe.ids[self._probe.trained][::-1].tolist() if self._probe else ():
            if token in self.tokenizer.added_tokens_decoder:
                found.append(token)
            elif str(self.tokenizer.decode([token])).strip():
                break
        return tuple(dict.fromkeys(token for token in found if token is not None))

    @functools.cached_property
    def _probe(self) -> Encoded | None:
        """The shortest of chats; None: it cannot be expressed."""
        asked, answered, system = Turn("user", "a", False), Turn("assistant", "b", True), Turn("system", "c", False)
        for turns in ((asked, answered), (system, asked, answered)):
            with contextlib.suppress(UserError):
                (rendered,) = self._render_chats([Conversation(turns)])
                if isinstance(rendered, Rendered):
                    return self._tokenize([rendered])[0]
        return None

    @functools.cached_property
    def _begins(self) -> str:
        """What the tokenizer itself puts before a text, of which its bos_token says nothing."""
        with tokenizing():
            bare, whole = (self.tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
        return "".join(self.tokenizer.convert_ids_to_tokens(whole[: starts[0] if starts else 0]))

    @abc.abstractmethod
    def _render_chats(self, chats: Sequence[Conversation]) -> list[Rendered | UserError]: ...

    def _render_segments(self, segments: Segments) -> Rendered:
        """The pieces as they are, after what the tokenizer begins with and before one EOS, if they lack it."""
        if not self._eos:
            raise UserError("chat format: the tokenizer has no EOS token to end a text with")
        pieces = list(segments)
        if not pieces[0].text.startswith(self._begins):
            pieces.insert(0, Segment(self._begins, False))
        if not pieces[-1].text.endswith(self._eos):
            pieces.append(Segment(self._eos, pieces[-1].trained))
        return _join(pieces)


class NamedFormat(Format):
    """A format of SPELLINGS."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, history: str = ""):
        super().__init__(tokenizer, history)
        spelling = SPELLINGS[name]
        if "{eos}" in spelling.end and not self._eos:
            raise UserError(f"chat format {name}: the tokenizer has no EOS token to end a reply with")
        missing = [token for token in spelling.special if len(self._backend.encode(token).ids) != 1]
        if missing:
            told = f"chat format {name}: not in the tokenizer, so plain text of several tokens: {', '.join(missing)}"
            warnings.warn(told, stacklevel=3)
        self._name, self._spelling = name, spelling

    def _render_chats(self, chats: Sequence[Conversation]) -> list[Rendered | UserError]:
        return [_or_error(self._render_turns, chat) for chat in chats]

    def _render_turns(self, turns: Conversation) -> Rendered:
        unsaid = [f'"{key}"' for key in turns.options]
        for number, turn in enumerate(turns, 1):
            keys = ["role"] if turn.role in TOOLS else [key for key in (*SPOKEN, "name") if key in turn.more]
            unsaid += [f'"{key}" of turn {number}' + f" ({turn.role})" * (key == "role") for key in keys]
        if unsaid:
            hint = "the tokenizer's own chat template may have one"
            raise UserError(f"chat format {self._name}: there is no place for {unsaid[0]}", hint=hint)
        if turns.written and self._name == "metharme":
            asks = "" if turns.written.rstrip().endswith("<|model|>") else "<|model|>"
            return _join([(self._bos + turns.written + asks, False), (turns[-1].text + self._eos, True)])
        return _join(self._pieces(turns))

    def _pieces(self, said: Conversation) -> Iterator[tuple[str, bool]]:
        spelling = self._spelling
        turns = list(said) if spelling.before_input else [turn.joined() for turn in said]
        turns = [turn.stripped() for turn in turns] if spelling.strips else turns
        has_input = any(turn.input for turn in turns)
        system = Turn("system", spelling.default_with_input if has_input else spelling.default_system, False)
        has_system = turns[0].role == "system" or bool(system.text)
        if turns[0].role == "system":
            system, turns = turns[0] if turns[0].text else system, turns[1:]
        if system.text and not spelling.system and turns[0].role != "user":
            raise UserError(f"chat format {self._name}: the system's text stands in the first turn, which is no user's")
        yield self._fill(spelling.start), False
        if has_system and spelling.system:
            yield from self._around(spelling.system, system)
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                yield self._fill(spelling.header, turn.role), False
                yield spelling.lead, turn.trained
                yield from turn.pieces()
                yield self._fill(spelling.end), turn.trained
                yield spelling.gap, False
                continue
            before, after = spelling.user
            yield self._fill(before, turn.role), False
            if number == 0 and system.text and not spelling.system:
                yield from self._around(spelling.in_user, system)
            yield from turn.pieces()
            yield spelling.before_input + turn.input if turn.input else "", turn.trained
            yield self._fill(after), False

    def _around(self, spelling: tuple[str, str], turn: Turn) -> Iterator[tuple[str, bool]]:
        before, after = spelling
        yield self._fill(before, turn.role), False
        yield turn.text, turn.trained
        yield self._fill(after), False

    def _fill(self, spelling: str, role: str = "") -> str:
        return spelling.format(bos=self._bos, eos=self._eos, role=role)


class TemplateFormat(Format):
    """The tokenizer's own chat template, which runs under limits; `template_spans.py` says what is trained."""

    _notes: Sequence[str] = ()  # what is to be known of the template, once it has been used

    @functools.cached_property
    def doubts(self) -> list[str]:
        return [*super().doubts, *self._notes]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, history: str = ""):
        super().__init__(tokenizer, history)
        if tokenizer.chat_template:
            renderer.start()

    def _render_chats(self, chats: Sequence[Conversation]) -> list[Rendered | UserError]:
        said = [[turn.joined() for turn in chat] for chat in chats]
        asked = [
            ([turn.message for turn in turns], [turn.trained for turn in turns], chat.options)
            for chat, turns in zip(chats, said)
        ]
        made: list[Rendered | UserError] = []
        for turns, answer in zip(said, render_all(self.tokenizer, asked), strict=True):
            if isinstance(answer, UserError):
                made.append(UserError(answer.what, hint=answer.hint or _NAME_ONE))
            else:
                text, found, self._notes = answer
                made.append(_or_error(self._unmasked, turns, text, found))
        return made

    @staticmethod
    def _unmasked(said: Sequence[Turn], text: str, found: Sequence[tuple[int, int]]) -> Rendered:
        """Without the parts of turns that are not trained on."""
        spans: list[tuple[int, int]] = []
        for turn, (start, end) in zip((turn.stripped() for turn in said if turn.trained), found, strict=True):
            at = text.rfind(turn.text, start, end)
            if turn.masked and at < 0:
                raise UserError("the chat template changes a text of which only parts are trained on", hint=_NAME_ONE)
            for masked, masked_end in turn.masked:
                spans.append((start, at + masked))
                start = at + masked_end
            spans.append((start, end))
        return Rendered(text, tuple(spans))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, message: str | Sequence[dict[str, str]], system: str | None = None
) -> list[int]:
    """A user's message, or a chat's messages, as the tokenizer's template spells it, up to where the reply begins."""
    messages = [{"role": "user", "content": message}] if isinstance(message, str) else list(message)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text, *_ = render(tokenizer, messages)
    # The template spells BOS itself: nothing is added to its text when it is tokenized.
    with tokenizing():
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_ids(name: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a reply in the format; see `Format.stops`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_format(name, tokenizer).stops


def show(format: Format, encoded: Encoded, color: bool) -> str:
    """The example as the model sees it, for a terminal.

    Trained tokens are green, or between ⟦ ⟧; special tokens are inverse if trained, else cyan. Lines end in ↵, and
    other characters that are not printable are escaped: the text is not to be trusted with a terminal.
    """
    special = np.isin(encoded.ids, list(format.tokenizer.added_tokens_decoder))
    kinds = 2 * special + encoded.trained
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    # The text of ids[:edge] each time: what a token reads as depends on those before it.
    upto = [format._backend.decode(encoded.ids[:edge].tolist(), skip_special_tokens=False) for edge in edges]
    shown = []
    for edge, before, after in zip(edges, upto, upto[1:]):
        text, kind = escaped(after[len(before) :], keep="\n"), int(kinds[edge])
        if color:
            style = ("", "\x1b[32m", "\x1b[36m", "\x1b[7;32m")[kind]
            lines = text.replace("\n", "↵\n").split("\n")
            shown.append("\n".join(f"{style}{line}\x1b[0m" if style and line else line for line in lines))
        else:
            text = text.replace("⟦", "\\u27e6").replace("⟧", "\\u27e7").replace("\n", "↵\n")
            shown.append(f"⟦{text}⟧" if encoded.trained[edge] else text)
    return "".join(shown).replace("⟧⟦", "")


def _begins_from(encoding: Encoding, at: int) -> int:
    """The first token that begins with the character number `at`, or after it."""
    return bisect.bisect_left(range(len(encoding)), at, key=lambda i: _characters(encoding, i)[0])


def _characters(encoding: Encoding, token: int) -> tuple[int, int]:
    """[start, end) of those it is made of."""
    found = encoding.token_to_chars(token)
    assert found is not None  # that is for what a post-processor adds, and there is none
    return found


def _all(made: Iterable[Rendered | UserError]) -> list[Rendered] | UserError:
    """The first error, if there is one."""
    found = []
    for one in made:
        if isinstance(one, UserError):
            return one
        found.append(one)
    return found


def _or_error(make: Callable[..., Rendered], *of: Any) -> Rendered | UserError:
    try:
        return make(*of)
    except UserError as error:
        return error


def _join(pieces: Iterable[tuple[str, bool]]) -> Rendered:
    texts, spans, at = [], list[tuple[int, int]](), 0
    for text, trained in pieces:
        if trained and text:
            touches = spans and spans[-1][1] == at
            spans.append((spans.pop()[0] if touches else at, at + len(text)))
        texts.append(text)
        at += len(text)
    return Rendered("".join(texts), tuple(spans))
