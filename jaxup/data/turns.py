"""What one turn of a chat says: its role, its text, what else it gives a template, and whether it is trained on."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxup.errors import suggest

NOTHING: Mapping[str, Any] = {}


class BadRow(Exception):
    """A row is not of its layout; says what is wrong, in one line, without the place."""


class Turn(NamedTuple):
    role: str  # system | user | assistant, or one of a tool's
    text: str
    trained: bool  # its tokens count in the loss
    input: str = ""  # what Alpaca's instruction, then the text, is to be applied to
    more: Mapping[str, Any] = NOTHING  # other keys of the message: reasoning, calls of tools, a name
    masked: tuple[tuple[int, int], ...] = ()  # [start, end) of the text that are not trained on though the rest is

    def joined(self) -> Turn:
        """The same with no input of its own, for formats without a place for it: as LLaMA-Factory joins the two."""
        return self._replace(text=f"{self.text}\n{self.input}", input="") if self.input else self

    def stripped(self) -> Turn:
        """The same without the blanks around its text."""
        before, text = len(self.text) - len(self.text.lstrip()), self.text.strip()
        masked = ((max(0, start - before), min(len(text), end - before)) for start, end in self.masked)
        return self._replace(text=text, masked=tuple(span for span in masked if span[0] < span[1]))

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Its text, cut where what is trained on begins and ends."""
        at = 0
        for start, end in self.masked:
            yield self.text[at:start], self.trained
            yield self.text[start:end], False
            at = end
        yield self.text[at:], self.trained

    @property
    def message(self) -> dict[str, Any]:
        """As transformers' templates take it."""
        return {"role": self.role, "content": self.text, **self.more}


class Conversation(tuple[Turn, ...]):
    """[system], then user and assistant in turn, and tools after the assistant; at least one turn is trained."""

    options: Mapping[str, Any]  # what the row gives a template besides its messages: OPTIONS, by name
    written: str  # the turns but the last as Metharme's prompt spells them, if the row has it so

    def __new__(cls, turns: Iterable[Turn], options: Mapping[str, Any] = NOTHING, written: str = "") -> Conversation:
        self = super().__new__(cls, turns)
        self.options, self.written = options, written
        return self


ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant")
TOOLS = {"tool", "function", "ipython"}  # roles of what a tool says
ROLES |= {role: role for role in TOOLS} | dict.fromkeys(("observation", "tool_response"), "tool")
CALLS = ("function_call", "tool_call")  # roles of an assistant's turn whose text is the call, as JSON

# Keys of a turn or a row that take it out of the loss, and all that sound like them.
FLAGS = ("train", "training", "loss", "loss_weight", "loss_mask", "weight")
_OF_LOSS = re.compile(r"(?i)(^|_)(un)?(train|loss|mask|weight)")
# Keys of a turn that are not to be lost in silence; a tool's name and the ids of calls often are, by design.
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers gives a template each by the name it reads
SPOKEN = (*REASONING, "tool_calls", "function_call")
OPTIONS = ("tools", "functions", "documents", "chat_template_kwargs")


def turn_list(turns: Any, who: str, what: str, *, unmask: bool = False, where: str = "turn") -> list[Turn]:
    """The turns of a list whose items have their roles under `who`, and their text under `what`."""
    if not isinstance(turns, list):
        raise BadRow(f"{where}s are {kind(turns)}, not a list")
    said: list[Turn] = []
    masks = {bool(turn["mask"]) for turn in turns if isinstance(turn, dict) and turn.get("mask") in (0, 1)
             and ROLES.get(str(turn.get(who))) != "assistant"}  # fmt: skip
    if len(masks) > 1:
        raise BadRow(f'{where}s that are not the assistant\'s differ in "mask": no telling what it means')
    # What the user's turns have is what is not trained on; by itself true stands for masked out.
    masked = next(iter(masks), True)
    for number, turn in enumerate(turns, 1):
        one = _turn(turn, who, what, unmask, masked, f"{where} {number}")
        # Calls at the same time, a turn each, are one of the assistant's.
        if said and turn[who] in CALLS and turns[number - 2][who] in CALLS and said[-1].trained == one.trained:
            calls = [*said.pop().more["tool_calls"], *one.more["tool_calls"]]
            one = one._replace(more={**one.more, "tool_calls": calls})
        said.append(one)
    return said


def _turn(turn: Any, who: str, what: str, unmask: bool, masked: bool, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise BadRow(f"{where} is {kind(turn)}, not an object")
    name = turn.get(who)
    if name is None:
        raise BadRow(f"{where}: {missing(who, turn)}")
    if not isinstance(name, str):
        raise BadRow(f'{where}: its "{who}" is {kind(name)}, not text')
    if name not in ROLES and name not in CALLS:
        raise BadRow(f"{where}: {shown(name)} is no role{suggest(name[:40], ROLES)}")
    role = ROLES.get(name, "assistant")
    if len(turn) == 2 and name not in CALLS and isinstance(turn.get(what), str):  # most are no more than that
        return Turn(
            role, text_of(turn[what], f'{where}: its "{what}"'), role == "assistant" or (unmask and role == "user")
        )
    more = {key: without_null(value) for key, value in turn.items() if key not in (who, what) and not is_nothing(value)}
    flags = {key: more.pop(key) for key in list(more) if _OF_LOSS.search(key)}
    for key in REASONING:
        if key in more:
            text_of(more[key], f'{where}: its "{key}"')
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], f'{where}: its "tool_calls"')
    calls = role == "assistant" and ("tool_calls" in more or "function_call" in more)
    if what not in turn and not calls:
        raise BadRow(f"{where}: {missing(what, turn)}")
    text, pieces = "", list[bool | None]()
    if turn.get(what) is None and calls:
        more["content"] = None
    else:
        text, pieces = _parts(turn[what], f'{where}: its "{what}"')
    if name in CALLS:
        called = [{"type": "function", "function": call} for call in _calls(text, f'{where}: its "{what}"')]
        text, more = "", {**more, "content": None, "tool_calls": called}
    trained = role == "assistant" or (unmask and role == "user")
    if (kept := flag(flags, where, masked)) is not None:
        if kept and not trained:
            key, value = next(iter(flags.items()))
            raise BadRow(
                f"{where}: a {role}'s turn of {key} {shown(value)}; \"unmask\": true trains on the user's turns"
            )
        trained = kept
    if any(pieces) and not trained and role != "assistant":
        raise BadRow(f"{where}: a part of a {role}'s turn to train on; \"unmask\": true trains on the user's turns")
    trained = trained and (not pieces or any(piece is not False for piece in pieces))
    return Turn(role, text, trained, more=more, masked=_masked(turn[what], pieces) if trained and pieces else ())


def flag(holder: Mapping[str, Any], where: str = "", masked: bool = True) -> bool | None:
    """Whether it is trained on, as far as its keys say; `masked` is what "mask" has where it is not."""
    said: dict[str, bool] = {}
    at = f"{where}: " if where else ""
    for key, value in holder.items():
        if is_nothing(value) or not _OF_LOSS.search(key):
            continue
        if key not in (*FLAGS, "mask"):
            raise BadRow(f'{at}"{key}" is not heeded; say what is trained on by "train": true or false')
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(f'{at}its "{key}" is {shown(value)}, not 0 or 1')
        said[key] = bool(value) != masked if key == "mask" else bool(value)
    if len(set(said.values())) > 1:
        raise BadRow(f"{at}{' and '.join(map(shown, said))} contradict each other")
    return next(iter(said.values()), None)


def _parts(value: Any, where: str) -> tuple[str, list[bool | None]]:
    """Text, or the joined text of OpenAI's list of parts, and of each part whether it is trained on if it says so."""
    if not isinstance(value, list):
        return text_of(value, where), []
    flags: list[bool | None] = []
    for number, part in enumerate(value, 1):
        type_ = part.get("type") if isinstance(part, dict) else None
        if type_ != "text":
            told = f"is {kind(part)}" if not isinstance(part, dict) else f"has the type {shown(type_)}"
            raise BadRow(f"{where}: part {number} {told}; only text can be trained on")
        if not isinstance(part.get("text"), str):
            raise BadRow(f"{where}: part {number} has no text")
        flags.append(flag(part, f"{where}: part {number}"))
    return text_of("".join(part["text"] for part in value), where), flags


def _masked(parts: list[dict[str, Any]], flags: list[bool | None]) -> tuple[tuple[int, int], ...]:
    masked, at = [], 0
    for part, trained in zip(parts, flags, strict=True):
        if trained is False and part["text"]:
            masked.append((at, at + len(part["text"])))
        at += len(part["text"])
    return tuple(masked)


def _calls(value: Any, where: str) -> list[Any]:
    """Calls of tools, their arguments as objects: templates write JSON from these, and would quote text again."""
    calls = held(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"{where} {'is' if value is calls else 'holds'} {kind(value)}, not calls of tools")
    done = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{where}: a call of a tool without a name")
        if "arguments" in function:
            function = {**function, "arguments": read(function["arguments"])}
        done.append({**call, "function": function} if "function" in call else function)
    return done


def check(said: list[Turn], *, ordered: bool = True) -> list[Turn]:
    """The turns, if they are a chat with something to train on."""
    if not said:
        raise BadRow("the conversation is empty")
    before = None
    for number, turn in enumerate(said, 1):
        if turn.role == "system":
            if number > 1:
                raise BadRow(f"turn {number} is the system's; only the first may be")
            continue
        if turn.role in TOOLS and before not in ("assistant", "tool"):
            raise BadRow(f"turn {number} is a tool's, and comes after no turn of the assistant's")
        role = "tool" if turn.role in TOOLS else turn.role
        if ordered and role == before and role != "tool":
            raise BadRow(f"turns {number - 1} and {number} are both the {role}'s; join them or split the row")
        if ordered and before is None and role == "assistant":
            raise BadRow("the assistant speaks first; a user's turn comes before its answer")
        if role == "assistant" and not turn.text.strip() and not turn.more.keys() & set(SPOKEN):
            raise BadRow(f"turn {number}, the assistant's, is empty")
        before = role
    if all(turn.role != "assistant" for turn in said):
        raise BadRow("no turn of the assistant's: nothing to train on")
    if not any(turn.trained for turn in said):
        raise BadRow("every answer has the weight 0: nothing to train on")
    return said


def read(value: Any) -> Any:
    """The same, or the list or object of JSON that it is the text of."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def held(value: Any) -> Any:
    """A list, perhaps as JSON's text, or as a struct of lists: how `datasets` keeps a Sequence of structs."""
    value = read(value)
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def without_null(value: Any) -> Any:
    """The same without keys that are null: Arrow gives every object all the keys that any of them has."""
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def text_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's \ud83d without its other half
        raise BadRow(f"{where} holds half a character, \\u{ord(value[error.start]):04x}") from None
    return value


def missing(key: str, holder: Mapping[str, Any], known: Iterable[str] = ()) -> str:
    """What to say of a turn, a segment or a row without `key`; `known` are keys that are no slip of the pen for it."""
    keys = [str(name) for name, value in holder.items() if value is not None]
    if near := difflib.get_close_matches(key, [name for name in keys if name not in known], n=1):
        return f'no "{key}"; is {shown(near[0])} meant?'
    return f'no "{key}"; its keys: {", ".join(map(shown, keys[:12])) or "none"}'


def kind(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return "text that holds JSON"
    kinds = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """Whatever a file holds, quoted, on one line and short."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}...{text[:1]}"
