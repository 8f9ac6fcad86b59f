"""What a tokenizer's own chat template makes of a conversation, and which of its characters are trained on.

That is what is inside of `{% generation %}` marks, if the template has one for each assistant's turn; else what a turn
adds to the text that asks for it. It renders the template several times, and runs where `rendering.py` has it run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_SENTINEL = "\ue000jaxup\ue001"  # stands for a turn's text, to see what a template puts around it

Messages = list[dict[str, str]]
Span = tuple[int, int]


class Unclear(Exception):
    """What is to be trained on cannot be told."""


class Template:
    """A template, and the special tokens that it may name, in transformers' sandbox."""

    def __init__(self, template: str, special: dict[str, str | list[str]]):
        self._options: dict[str, Any] = {"chat_template": template, **special}
        self._has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._asks: bool | None = None  # it has a header that asks for a reply

    def render(self, messages: Messages, *, asks: bool = False) -> str:
        """The text; with `asks` up to where the next reply begins."""
        made: Any = render_jinja_template(conversations=[messages], add_generation_prompt=asks, **self._options)
        return made[0][0]

    def spans(self, messages: Messages, trained: Sequence[bool]) -> tuple[str, list[Span]]:
        """The text, and [start, end) of what is trained on in each of the messages that are `trained`, in order."""
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text, marked = self._marked(messages)
        spans = dict(zip(replies, marked))
        # Marks in macros or around half of a turn lie about where they are.
        held = len(marked) == len(replies)
        if not held or any(messages[i]["content"].strip() not in text[slice(*spans[i])] for i in replies):
            spans = {i: self._by_prefix(messages, i, text) for i in replies if trained[i]}
        for i, message in enumerate(messages):
            if trained[i] and message["role"] != "assistant":
                spans[i] = self._by_sentinel(messages, i, text)
        return text, [spans[i] for i in sorted(spans) if trained[i]]

    def _by_prefix(self, messages: Messages, i: int, whole: str) -> Span:
        """What the reply `i` adds to the text that asks for it, without the blanks after its end of turn."""
        turn = f"turn {i + 1}, the assistant's"
        asked = self.render(messages[:i], asks=True)
        told = self.render(messages[: i + 1])
        if not told.startswith(asked) or not whole.startswith(told):
            what = f"the chat template spells what is before the end of {turn}, in another way once the conversation"
            raise Unclear(f"{what} goes on: no telling what to train on")
        if self._asks is None:
            self._asks = asked != self.render(messages[:i])
        start, said = len(asked), messages[i]["content"].strip()
        if not self._asks:
            # What is before the text is a header, unless it is blank.
            model = self.render([*messages[:i], {"role": "assistant", "content": _SENTINEL}])
            header = model[start:].partition(_SENTINEL)[0]
            start += len(header) if header.strip() else 0
        at = told.find(said, start)
        if at < 0:
            raise Unclear(f"the chat template changes or leaves out text of {turn}")
        end = len(told.rstrip())
        # A template without an end of turn: the line end is all there is.
        return start, end if end > at + len(said) else len(told)

    def _by_sentinel(self, messages: Messages, i: int, whole: str) -> Span:
        """The text of turn `i`: what the sentinel stands for when it takes its place."""
        model = self.render([*messages[:i], messages[i] | {"content": _SENTINEL}, *messages[i + 1 :]])
        before, _, after = model.partition(_SENTINEL)
        end = len(whole) - len(after)
        around = whole.startswith(before) and whole.endswith(after)
        if not around or whole[len(before) : end].strip() != messages[i]["content"].strip():
            raise Unclear(f"the chat template changes text of turn {i + 1}: no telling what to train on")
        return len(before), end

    def _marked(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text, and what is inside of `{% generation %}` marks as [start, end) of its characters.

        The mask that transformers makes of these does not say which turn is which, and loses replies that begin with a
        blank where the tokenizer trims its offsets.
        """
        if not self._has_marks:
            return self.render(messages), []
        made: Any = render_jinja_template(conversations=[messages], return_assistant_tokens_mask=True, **self._options)
        return made[0][0], made[1][0]
