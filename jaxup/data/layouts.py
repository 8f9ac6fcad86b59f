"""What one row of chat data says: each layout in use, its turns, and which of them are trained.

| layout | a row | trained |
|---|---|---|
| `messages` | `{"messages": [{"role", "content"}]}` (OpenAI, TRL) | the assistant's turns |
| `sharegpt` | `{"conversations": [{"from", "value"}]}`, optional `system` | the assistant's turns |
| `pygmalion` | `{"conversations": [{"role", "value"}]}` | the assistant's turns |
| `alpaca` | `{"instruction", "output"}`, optional `input`, `system`, `history` of pairs | the assistant's turns |
| `metharme` | `{"prompt", "generation"}`, the prompt plain or in `<|user|>` and its like | the generation |
| `prompt_completion` | `{"prompt", "completion"}` (TRL), both text or both lists of messages | the completion |
| `text` | `{"text"}` | all |
| `segments` | `{"segments": [{"label", "text"}]}` | those labelled true |

What tells the three lists of turns apart is the keys of a turn: they may all stand under `messages`, under
`conversations` or be the row itself. A turn's `weight` (OpenAI: 0 or 1) decides for that answer alone;
`"unmask": true` beside the turns (InstructLab) trains all but the system's. A key that is null is not there; keys
that no layout knows are passed over.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, NamedTuple

from jaxup.errors import suggest


class Turn(NamedTuple):
    role: str  # system | user | assistant
    text: str
    trained: bool  # its tokens count in the loss
    input: str = ""  # what Alpaca's instruction, then the text, is to be applied to

    def joined(self) -> Turn:
        """The same with no input of its own, for formats without a place for it: as LLaMA-Factory joins the two."""
        return self._replace(text=f"{self.text}\n{self.input}", input="") if self.input else self


class Segment(NamedTuple):
    """Text that is no turn of a chat: no format is put around it."""

    text: str
    trained: bool


Conversation = tuple[Turn, ...]  # [system], then user and assistant in turn; at least one of the assistant's
Segments = tuple[Segment, ...]


class BadRow(Exception):
    """A row is not of its layout; says what is wrong, in one line, without the place."""


ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant")
TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}

CONTAINERS = ("messages", "conversations")
TURN_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value"), "pygmalion": ("role", "value")}
FIELDS = {
    "alpaca": ("instruction", "output"),
    "metharme": ("prompt", "generation"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "segments": ("segments",),
}
LAYOUTS = (*TURN_KEYS, *FIELDS)
# All that `parse` looks at: other columns of a file need not be read.
COLUMNS = {*CONTAINERS, "unmask", *(key for keys in FIELDS.values() for key in keys), "input", "system", "history"}


def fitting(row: Any) -> list[str]:
    """The layouts whose keys `row` has. `text` only when alone: beside another it is that one, rendered."""
    found: list[str] = []
    if isinstance(row, dict):
        found = [name for name, keys in FIELDS.items() if all(row.get(key) is not None for key in keys)]
    for turns in _turn_lists(row):
        found += _turn_layouts(turns)
    if not found and isinstance(row, dict) and [] in _turn_lists(row):  # of what is plain
        found = ["messages" if row.get("messages") is not None else "sharegpt"]
    return [name for name in dict.fromkeys(found) if name != "text"] or found


def parse(row: Any, layout: str) -> Conversation | Segments:
    """What `row`, a value of JSON, says when read as `layout`. Raises BadRow when it is not that."""
    if layout in TURN_KEYS:
        return _check(_chat(row, layout))
    if not isinstance(row, dict):
        raise BadRow(f"it is {_kind(row)}, not an object")
    for key in FIELDS[layout]:
        if row.get(key) is None:
            raise BadRow(_missing(key, row, row=True))
    if layout == "text":
        return _check_segments([Segment(_text(row["text"], '"text"'), True)])
    if layout == "segments":
        return _check_segments(_labelled(row["segments"]))
    if layout == "alpaca":
        return _check(_alpaca(row))
    if layout == "metharme":
        return _check([*_metharme(row["prompt"]), Turn("assistant", _text(row["generation"], '"generation"'), True)])
    return _prompt_completion(row["prompt"], row["completion"])


def _chat(row: Any, layout: str) -> list[Turn]:
    lists, unmask, system = _turn_lists(row), None, None
    if isinstance(row, dict):
        if not lists:
            raise BadRow(_missing(CONTAINERS[layout != "messages"], row, row=True))
        unmask, system = row.get("unmask"), row.get("system")
        if unmask not in (None, True, False):
            raise BadRow(f'"unmask" is {_kind(unmask)}, not true or false')
    if (others := fitting(row)) and layout not in others:
        raise BadRow(f"it looks like {others[0]}")
    turns = next((turns for turns in lists if layout in _turn_layouts(turns)), lists[0])
    return _with_system(system, _turn_list(turns, layout, unmask=bool(unmask), where="turn"))


def _turn_list(turns: Any, layout: str, *, unmask: bool, where: str) -> list[Turn]:
    who, what = TURN_KEYS[layout]
    if not isinstance(turns, list):
        raise BadRow(f"{where}s are {_kind(turns)}, not a list")
    return [_turn(turn, who, what, unmask, f"{where} {n}") for n, turn in enumerate(turns, 1)]


def _turn(turn: Any, who: str, what: str, unmask: bool, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise BadRow(f"{where} is {_kind(turn)}, not an object")
    name = turn.get(who)
    if name is None:
        raise BadRow(f"{where}: {_missing(who, turn)}")
    if not isinstance(name, str):
        raise BadRow(f'{where}: its "{who}" is {_kind(name)}, not text')
    if name in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise BadRow(f"{where} calls or answers a tool, which cannot be trained on")
    if name not in ROLES:
        raise BadRow(f"{where}: {_shown(name)} is no role{suggest(name[:40], ROLES)}")
    role = ROLES[name]
    if what not in turn:
        raise BadRow(f"{where}: {_missing(what, turn)}")
    text = _text(turn[what], f'{where}: its "{what}"')
    trained, weight = role == "assistant" or (unmask and role == "user"), turn.get("weight")
    if weight is not None:
        if not isinstance(weight, int | float) or weight not in (0, 1):
            raise BadRow(f'{where}: its "weight" is {_shown(weight)}, not 0 or 1')
        if weight and not trained:
            raise BadRow(f"{where}: a {role}'s turn of weight 1; \"unmask\": true trains on the user's turns")
        trained = bool(weight)
    return Turn(role, text, trained)


def _alpaca(row: dict[str, Any]) -> list[Turn]:
    asked = [_text(row.get(key), f'"{key}"') for key in ("instruction", "input") if row.get(key) is not None]
    asked = [text for text in asked if text] or [""]
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRow('"history" is not a list of [question, answer]')
    answered = [*pairs, [asked[0], row["output"]]]
    said = []
    for number, (question, answer) in enumerate(answered, 1):
        where = '"output"' if number == len(answered) else f'pair {number} of "history"'
        said += [Turn("user", _text(question, where), False), Turn("assistant", _text(answer, where), True)]
    said[-2] = said[-2]._replace(input="".join(asked[1:]))
    return _with_system(row.get("system"), said)


def _metharme(prompt: Any) -> list[Turn]:
    """The turns of a prompt, which may be written out as the model sees it; only the generation is trained."""
    before, *marked = re.split(r"<\|(system|user|model)\|>", _text(prompt, '"prompt"'))
    if before.strip() or not marked:
        return [Turn("user", prompt, False)]
    said = [Turn(ROLES[role], text, False) for role, text in zip(marked[::2], marked[1::2], strict=True)]
    if said[-1].role == "assistant" and not said[-1].text.strip():
        said.pop()  # the <|model|> that the generation goes on from
    return said


def _prompt_completion(prompt: Any, completion: Any) -> Conversation | Segments:
    """As TRL has it: text is taken as it is, with no format; the loss is on the completion."""
    prompt, completion = _rows_of(prompt), _rows_of(completion)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise BadRow(f'"prompt" is {_kind(prompt)} and "completion" is {_kind(completion)}; both are text or lists')
    if not isinstance(prompt, list):
        return _check_segments(
            [Segment(_text(prompt, '"prompt"'), False), Segment(_text(completion, '"completion"'), True)]
        )
    context = _turn_list(prompt, "messages", unmask=False, where='"prompt": turn')
    answer = _turn_list(completion, "messages", unmask=False, where='"completion": turn')
    return _check([*(turn._replace(trained=False) for turn in context), *answer])


def _labelled(segments: Any) -> list[Segment]:
    segments = _rows_of(segments)
    if not isinstance(segments, list):
        raise BadRow(f'"segments" is {_kind(segments)}, not a list')
    found = []
    for number, segment in enumerate(segments, 1):
        if not isinstance(segment, dict):
            raise BadRow(f"segment {number} is {_kind(segment)}, not an object")
        for key in ("label", "text"):
            if segment.get(key) is None:
                raise BadRow(f"segment {number}: {_missing(key, segment)}")
        if not isinstance(segment["label"], bool):
            raise BadRow(f'segment {number}: its "label" is {_shown(segment["label"])}, not true or false')
        found.append(Segment(_text(segment["text"], f'segment {number}: its "text"'), segment["label"]))
    return found


def _check(said: list[Turn]) -> Conversation:
    if not said:
        raise BadRow("the conversation is empty")
    expected = "user"
    for number, turn in enumerate(said, 1):
        if turn.role == "system":
            if number > 1:
                raise BadRow(f"turn {number} is the system's; only the first may be")
            continue
        if turn.role != expected:
            if expected == "user" and number == 1 + (said[0].role == "system"):
                raise BadRow("the assistant speaks first; a user's turn comes before its answer")
            raise BadRow(f"turns {number - 1} and {number} are both the {turn.role}'s; join them or split the row")
        if turn.role == "assistant" and not turn.text.strip():
            raise BadRow(f"turn {number}, the assistant's, is empty")
        expected = "assistant" if turn.role == "user" else "user"
    if all(turn.role != "assistant" for turn in said):
        raise BadRow("no turn of the assistant's: nothing to train on")
    if not any(turn.trained for turn in said):
        raise BadRow("every answer has the weight 0: nothing to train on")
    return tuple(said)


def _check_segments(found: list[Segment]) -> Segments:
    if not any(segment.trained and segment.text.strip() for segment in found):
        raise BadRow("nothing to train on: its trained text is empty")
    return tuple(segment for segment in found if segment.text)


def _with_system(system: Any, said: list[Turn]) -> list[Turn]:
    text = "" if system is None else _text(system, '"system"')
    if not text.strip():
        return said
    if said and said[0].role == "system":
        raise BadRow('"system" and a first turn of the system\'s: two system prompts')
    return [Turn("system", text, False), *said]


def _turn_lists(row: Any) -> list[Any]:
    """What stands under each container that `row` has; a row that is no object is the list itself."""
    held = [row[key] for key in CONTAINERS if row.get(key) is not None] if isinstance(row, dict) else [row]
    return [_rows_of(value) for value in held]


def _turn_layouts(turns: Any) -> list[str]:
    """By the keys of the first turn."""
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict):
        return []
    return [name for name, (who, what) in TURN_KEYS.items() if first.get(who) is not None and what in first]


def _rows_of(value: Any) -> Any:
    """A struct of lists, as `datasets` keeps a Sequence of structs, is the list of structs it stands for."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _text(value: Any, where: str) -> str:
    """Text, or the joined text of OpenAI's list of parts."""
    if isinstance(value, list):
        for number, part in enumerate(value, 1):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                told = f"is {_kind(part)}" if not isinstance(part, dict) else f"has the type {_shown(kind)}"
                raise BadRow(f"{where}: part {number} {told}; only text can be trained on")
            if not isinstance(part.get("text"), str):
                raise BadRow(f"{where}: part {number} has no text")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow(f"{where} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's \ud83d without its other half
        raise BadRow(f"{where} holds half a character, \\u{ord(value[error.start]):04x}") from None
    return value


def _missing(key: str, holder: dict[str, Any], *, row: bool = False) -> str:
    """What to say of a turn, a segment or a whole row without `key`."""
    keys = [str(name) for name, value in holder.items() if value is not None]
    # A key of another layout is no slip of the pen, near as generation is to conversations.
    if near := difflib.get_close_matches(key, [name for name in keys if name not in COLUMNS], n=1):
        return f'no "{key}"; is {_shown(near[0])} meant?'
    if row and (others := fitting(holder)):
        return f'no "{key}"; it looks like {others[0]}'
    return f'no "{key}"; its keys: {", ".join(map(_shown, keys[:12])) or "none"}'


def _kind(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return "text that holds JSON"
    kinds = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    """Whatever a file holds, quoted, on one line and short."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}...{text[:1]}"
