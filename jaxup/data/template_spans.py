"""What a tokenizer's own chat template makes of a conversation, and which of its characters are trained on.

That is what is inside of `{% generation %}` marks, if the template has one for each assistant's turn; else what a turn
adds to the text that asks for it. A header is neither, wherever the template puts one: what it does with turns whose
text is a sentinel tells. It renders the template several times, and runs where `rendering.py` has it run.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from jaxup.data.turns import NOTHING, REASONING, TOOLS

_SENTINEL = "\ue000jaxup{}\ue001"  # stands for a turn's text, to see what a template puts around it
_HISTORY = (
    "train on the last answer only (data.history=last), on each as an example of its own (data.history=each), "
    "or take the earlier ones out of the loss (weight 0, or prompt_completion)"
)

_LOST = "take it out of the rows if nothing of it is meant"
_TOKENS = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|.", re.DOTALL)  # as far as it matters here
_THINKS = r"\s*(<think>)?\s*(</think>)?\s*"

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


class Unclear(Exception):
    """What is to be trained on cannot be told, or something that the row says would be lost."""

    def __init__(self, what: str, hint: str = ""):
        super().__init__(what)
        self.hint = hint


class Habits(NamedTuple):
    """What a template does with every conversation."""

    tail: str = ""  # ends the text, and is gone once the conversation goes on
    is_header: bool = False  # that is one, which nobody asked for; else EOS
    marked: str = ""  # the header that its marks begin with


class Template:
    """A template, and the special tokens that it may name, in transformers' sandbox."""

    def __init__(self, template: str, special: Mapping[str, str | list[str]]):
        self._options: dict[str, Any] = {"chat_template": template, **special}
        self._source, self._eos = template, special.get("eos_token")
        self._has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._asks: bool | None = None  # it has a header that asks for a reply

    def render(self, messages: Messages, options: Mapping[str, Any] = NOTHING, *, asks: bool = False) -> str:
        """The text; with `asks` up to where the next reply begins."""
        return self._made(messages, options, add_generation_prompt=asks)[0][0]

    def spans(
        self, messages: Messages, trained: Sequence[bool], options: Mapping[str, Any] = NOTHING
    ) -> tuple[str, list[Span]]:
        """The text, and [start, end) of what is trained on in each of the messages that are `trained`, in order."""
        self._check_options(options)
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            text, marked = self._marked(messages, options)
        except Exception:
            if (told := _with_text_arguments(messages)) == messages:
                raise
            return self.spans(told, trained, options)
        spans = dict(zip(replies, marked))
        # Marks in macros or around half of a turn lie about where they are.
        held = len(marked) == len(replies)
        if not held or any(_said(messages[i]) not in text[slice(*spans[i])] for i in replies):
            spans = {i: self._by_prefix(messages, i, text, options) for i in replies if trained[i]}
        for i, message in enumerate(messages):
            if trained[i] and message["role"] != "assistant":
                spans[i] = self._by_sentinel(messages, i, text, options)
        spans = {i: self._without_headers(text, spans[i]) for i in sorted(spans) if trained[i]}
        self._check_said(messages, text, spans, options)
        return text, list(spans.values())

    @property
    def notes(self) -> list[str]:
        """What the user is to know of the template."""
        header = self.habits.marked
        told = f"the template marks the header {header!r} as the assistant's; it is not trained on"
        return [told] if header.strip() else []

    @functools.cached_property
    def habits(self) -> Habits:
        for system in ([], [{"role": "system", "content": _SENTINEL.format("")}]):
            said = [{"role": ("assistant", "user")[n % 2], "content": _SENTINEL.format(n)} for n in range(1, 5)]
            messages = [*system, *said]
            try:
                text, marked = self._marked(messages)
                plain, asked = (self.render(messages[: len(system) + 1], asks=asks) for asks in (False, True))
            except Exception:  # it refuses such a conversation, for reasons of its own
                continue
            pieces = re.split(_SENTINEL.format("([1-4])"), text)
            if pieces[1::2] == ["1", "2", "3", "4"]:
                break
        else:
            return Habits()
        before, _, between, _, after = (_TOKENS.findall(piece) for piece in pieces[::2])
        # The end of a turn is what comes after a reply whether or not a user's turn follows, up to what opens a turn.
        end = _shared(after, between)
        opens = next((token for token in before if len(token) > 1 and token in between), "")
        end = after.index(opens, 1) if opens in after[1:end] else end
        tail = "".join(after[end:])
        is_header = tail.strip() != self._eos and (plain.endswith(tail) or "".join(between).endswith(tail))
        if not tail.strip() or not (is_header or tail.strip() == self._eos):
            tail, is_header = "", False
        if len(marked) != 2 or any(said[2 * n + 1]["content"] not in text[slice(*marked[n])] for n in (0, 1)):
            return Habits(tail, is_header)
        # What asks for a reply, as far as the marks have it; before the text of a template that never asks is a header.
        asks, start = asked.removeprefix(plain), text[marked[1][0] :].partition(messages[-1]["content"])[0]
        inside = len(start) if asks.startswith(start) or (not asks and start.strip()) else 0
        inside = max([inside, *(n for n in range(len(start) + 1) if asks.endswith(start[:n]))])
        return Habits(tail, is_header, start[:inside])

    def _made(self, messages: Messages, options: Mapping[str, Any], **how: Any) -> Any:
        given = {key: value for key, value in options.items() if key != "chat_template_kwargs"}
        given = {**options.get("chat_template_kwargs", {}), **given, **self._options, **how}
        return render_jinja_template(conversations=[[dict(message) for message in messages]], **given)

    def _by_prefix(self, messages: Messages, i: int, whole: str, options: Mapping[str, Any]) -> Span:
        """What the reply `i` adds to the text that asks for it, without the blanks after its end of turn."""
        turn = f"turn {i + 1}, the assistant's"
        asked = self.render(messages[:i], options, asks=True)
        told = self.render(messages[: i + 1], options) if i + 1 < len(messages) else whole
        if self.habits.is_header or not whole.startswith(told):
            told = told.removesuffix(self.habits.tail)
        # A prompt may go on into the reasoning, which a reply that has none spells in another way.
        if not told.startswith(asked) and re.fullmatch(_THINKS, asked[_shared(asked, told) :]):
            asked = asked[: _shared(asked, told)]
        if not told.startswith(asked) or not whole.startswith(told):
            what = f"the chat template spells what is before the end of {turn}, in another way once the conversation"
            raise Unclear(f"{what} goes on: no telling what to train on", _HISTORY if told.startswith(asked) else "")
        if self._asks is None:
            self._asks = asked != self.render(messages[:i], options)
        start, said = len(asked), _said(messages[i])
        if not self._asks:
            # What is before the text is a header, unless it is blank.
            sentinel = _SENTINEL.format("")
            model = self.render([*messages[:i], {"role": "assistant", "content": sentinel}], options)
            header = model[start:].partition(sentinel)[0]
            start += len(header) if header.strip() else 0
        at = told.find(said, start)
        if at < 0:
            raise Unclear(f"the chat template changes or leaves out text of {turn}")
        end = len(told.rstrip())
        # A template without an end of turn: the line end is all there is.
        return start, end if end > at + len(said) else len(told)

    def _by_sentinel(self, messages: Messages, i: int, whole: str, options: Mapping[str, Any]) -> Span:
        """The text of turn `i`: what the sentinel stands for when it takes its place."""
        sentinel = _SENTINEL.format("")
        model = self.render([*messages[:i], {**messages[i], "content": sentinel}, *messages[i + 1 :]], options)
        before, _, after = model.partition(sentinel)
        end = len(whole) - len(after)
        around = whole.startswith(before) and whole.endswith(after)
        if not around or whole[len(before) : end].strip() != _said(messages[i]):
            raise Unclear(f"the chat template changes text of turn {i + 1}: no telling what to train on")
        return len(before), end

    def _without_headers(self, text: str, span: Span) -> Span:
        (start, end), habits = span, self.habits
        start += len(habits.marked) if text.startswith(habits.marked, start) else 0
        return start, end - len(habits.tail) if habits.is_header and text.endswith(habits.tail, start, end) else end

    def _marked(self, messages: Messages, options: Mapping[str, Any] = NOTHING) -> tuple[str, list[Span]]:
        """The text, and what is inside of `{% generation %}` marks as [start, end) of its characters.

        The mask that transformers makes of these does not say which turn is which, and loses replies that begin with a
        blank where the tokenizer trims its offsets. Marks that touch are one.
        """
        if not self._has_marks:
            return self.render(messages, options), []
        texts, marks = self._made(messages, options, return_assistant_tokens_mask=True)
        spans: list[Span] = []
        for start, end in marks[0]:
            spans[-1:] = [(spans[-1][0], end)] if spans and spans[-1][1] == start else [*spans[-1:], (start, end)]
        return texts[0], spans

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for key in options.get("chat_template_kwargs", ()):
            if not re.search(rf"\b{re.escape(key)}\b", self._source) or key in (*self._options, "messages", *_OURS):
                raise Unclear(f'the chat template has no use for "{key}" of "chat_template_kwargs"', _LOST)

    def _check_said(self, messages: Messages, text: str, spans: Mapping[int, Span], options: Mapping[str, Any]) -> None:
        """Unclear for what the row says and the text does not."""

        def lost(what: str, messages: Messages, options: Mapping[str, Any]) -> None:
            try:
                same = self.render(messages, options) == text
            except Exception:  # it cannot do without
                same = False
            if same:
                raise Unclear(f"the chat template leaves out {what}", _LOST)

        for key in options.keys() - {"chat_template_kwargs"}:
            lost(f'"{key}"', messages, {name: value for name, value in options.items() if name != key})
        if any("name" in message for message in messages if message["role"] not in TOOLS):
            named = [{k: v for k, v in m.items() if k != "name" or m["role"] in TOOLS} for m in messages]
            lost('the "name" of turns', named, options)
        if any(message["role"] in TOOLS for message in messages):
            silent = [{**m, "content": _SENTINEL.format("")} if m["role"] in TOOLS else m for m in messages]
            lost("what tools say", silent, options)
        for i, message in enumerate(messages):
            for key in {*REASONING, "tool_calls", "function_call"} & message.keys():
                names = REASONING if key in REASONING else (key,)
                wanted = [message[key].strip()] if key in REASONING else []
                wanted += [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
                if not any(name in self._source for name in names) or (
                    i in spans and any(piece not in text[slice(*spans[i])] for piece in wanted)
                ):
                    raise Unclear(f'the chat template leaves out "{key}" of turn {i + 1}', _LOST)


# What transformers is told by these names.
_OURS = ("conversations", "tools", "documents", "add_generation_prompt", "continue_final_message",
         "return_assistant_tokens_mask")  # fmt: skip


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How much both have at their beginnings."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _with_text_arguments(value: Any) -> Any:
    """The messages with the arguments of calls as JSON's text, which some templates join to other text."""
    if isinstance(value, list):
        return [_with_text_arguments(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {key: _with_text_arguments(item) for key, item in value.items()}
    if isinstance(value.get("arguments"), dict) and isinstance(value.get("name"), str):
        made["arguments"] = json.dumps(value["arguments"], ensure_ascii=False)
    return made


def _said(message: Mapping[str, Any]) -> str:
    return (message.get("content") or "").strip()
