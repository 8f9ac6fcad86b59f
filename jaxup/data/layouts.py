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
| `chosen` | `chosen` and `rejected`, or true and false under `label`, beside any of these | the chosen answer |

What tells the three lists of turns apart is the keys of a turn: they may all stand under `messages`, under
`conversations` or be the row itself. A list may be the text of one in JSON.

| key | means |
|---|---|
| `train`, `training`, `loss`, `loss_weight`, `loss_mask`, `weight`: true, 1, false or 0 | of an answer, a part of \
it or a row: whether it is trained on |
| `mask` of a turn | the same the other way round: what the user's turns have, else true, is not trained on |
| `loss_mask` of a row as a list | one for each turn |
| `unmask`: true beside the turns (InstructLab) | the user's turns are trained on, too |
| `tools`, `functions`, `documents`, `chat_template_kwargs` of a row | go to the template |
| `reasoning_content`, `tool_calls`, `name` and any other key of a turn | go to the template |
| `images`, `audio`, `chosen`, a `label` and their like | refused: a text's loss cannot mean them |

A key that is null or empty is not there; keys of a row that are not named here are passed over. `chosen` is never
detected: preferences are asked for by that name, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxup.data.turns import (
    FLAGS,
    OPTIONS,
    ROLES,
    BadRow,
    Conversation,
    Turn,
    check,
    flag,
    held,
    is_nothing,
    kind,
    missing,
    read,
    shown,
    text_of,
    turn_list,
    without_null,
)


class Segment(NamedTuple):
    """Text that is no turn of a chat: no format is put around it."""

    text: str
    trained: bool


Segments = tuple[Segment, ...]

CONTAINERS = ("messages", "conversations")
TURN_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value"), "pygmalion": ("role", "value")}
FIELDS = {
    "alpaca": ("instruction", "output"),
    "metharme": ("prompt", "generation"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "segments": ("segments",),
}
LAYOUTS = (*TURN_KEYS, *FIELDS, "chosen")
SIDES = ("chosen", "rejected")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# All that `parse` looks at: other columns of a file need not be read.
COLUMNS = {
    *CONTAINERS, *(key for keys in FIELDS.values() for key in keys), "input", "system", "history",
    "unmask", "mask", *FLAGS, *OPTIONS, *SIDES, *MEDIA, "label",
}  # fmt: skip


def fitting(row: Any) -> list[str]:
    """The layouts whose keys `row` has. `text` only when alone: beside another it is that one, rendered."""
    row, found = _opened(row), []
    if isinstance(row, dict):
        found = [name for name, keys in FIELDS.items() if all(row.get(key) is not None for key in keys)]
    for turns in _turn_lists(row):
        found += _turn_layouts(turns)
    if not found and isinstance(row, dict) and [] in _turn_lists(row):  # of what is plain
        found = ["messages" if row.get("messages") is not None else "sharegpt"]
    return [name for name in dict.fromkeys(found) if name != "text"] or found


def unfitting(row: Any) -> str:
    """Of a row that fits no layout, what it is missing for the first that it has a key of; "" if it has none."""
    if not isinstance(row, dict):
        return ""
    if all(not is_nothing(row.get(side)) for side in SIDES):
        return _PREFERENCE
    containers = {"messages": ("messages",), "sharegpt": ("conversations",)}
    for layout, keys in {**containers, **FIELDS}.items():
        if any(row.get(key) is not None for key in keys):
            try:
                parse(row, layout)
            except BadRow as error:
                return f"not {layout}: {error}"
    return ""


def parse(row: Any, layout: str) -> Conversation | Segments:
    """What `row`, a value of JSON, says when read as `layout`. Raises BadRow when it is not that."""
    row = _opened(row)
    if isinstance(row, dict):
        _check_meant(row, layout)
        if layout == "chosen":
            row, layout = _chosen(row)
    said = _said(row, layout)
    if not isinstance(row, dict):
        return said
    if isinstance(said, Conversation):
        said.options = _options(row)
    elif layout == "prompt_completion" and (unsaid := [key for key in OPTIONS if not is_nothing(row.get(key))]):
        raise BadRow(f'"{unsaid[0]}" beside text, to which no template is applied')
    return _flagged(said, row)


def _said(row: Any, layout: str) -> Conversation | Segments:
    if layout in TURN_KEYS:
        return Conversation(check(_chat(row, layout)))
    if not isinstance(row, dict):
        raise BadRow(f"it is {kind(row)}, not an object")
    for key in FIELDS[layout]:
        if row.get(key) is None:
            raise BadRow(_missing(key, row))
    if layout == "text":
        return _check_segments([Segment(text_of(row["text"], '"text"'), True)])
    if layout == "segments":
        return _check_segments(_labelled(row["segments"]))
    if layout == "alpaca":
        return Conversation(check(_alpaca(row)))
    if layout == "metharme":
        return _metharme(row["prompt"], Turn("assistant", text_of(row["generation"], '"generation"'), True))
    return _prompt_completion(row["prompt"], row["completion"])


_PREFERENCE = 'its "chosen" and "rejected" are a preference; layout=chosen trains on the chosen answer'


def _check_meant(row: Mapping[str, Any], layout: str) -> None:
    """BadRow for what training on text cannot mean."""
    for key in MEDIA:
        if not is_nothing(row.get(key)):
            raise BadRow(f'it has "{key}"; only text can be trained on')
    if layout == "chosen":
        return
    if all(not is_nothing(row.get(side)) for side in SIDES):
        raise BadRow(_PREFERENCE)
    if isinstance(row.get("label"), bool) and layout not in ("text", "segments"):
        raise BadRow('its "label" is a preference; layout=chosen trains on the rows of label true')


def _chosen(row: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The row without its rejected side, and the layout that it then has."""
    if isinstance(row.get("label"), bool):
        if not row["label"]:
            raise BadRow('its "label" is false: not the chosen side')
        row = {key: value for key, value in row.items() if key != "label"}
    elif is_nothing(row.get("chosen")):
        raise BadRow(_missing("chosen", row))
    else:
        chosen = _messages(row["chosen"])
        row = {key: value for key, value in row.items() if key not in SIDES}
        answer = chosen if isinstance(chosen, list) else [chosen]
        if turns := next((turns for turns in _turn_lists(row) if isinstance(turns, list)), None):
            row = {key: value for key, value in row.items() if key not in CONTAINERS} | {"messages": [*turns, *answer]}
        elif row.get("instruction") is not None:
            row["output"] = chosen
        elif isinstance(chosen, list) and not isinstance(_messages(row.get("prompt")), list):
            # All of the conversation, of which the last answer is the chosen one.
            row |= {"prompt": chosen[:-1], "completion": chosen[-1:]}
        else:
            row["completion"] = answer if isinstance(chosen, dict) else chosen
    if len(layouts := fitting(row)) != 1:
        raise BadRow(f'beside "chosen" it is {" and ".join(layouts) or "of no layout"}')
    return row, layouts[0]


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: without_null(read(row[key])) for key in OPTIONS if not is_nothing(read(row.get(key)))}
    for key, value in options.items():
        of_kind = dict if key == "chat_template_kwargs" else list
        if not isinstance(value, of_kind):
            raise BadRow(f'"{key}" is {kind(value)}, not {"an object" if of_kind is dict else "a list"}')
    return options


def _flagged(said: Conversation | Segments, row: Mapping[str, Any]) -> Conversation | Segments:
    """Heeds what the row as a whole says of the loss."""
    flags = {key: held(row[key]) for key in (*FLAGS, "mask") if not is_nothing(row.get(key))}
    if isinstance(mask := flags.get("loss_mask"), list) and isinstance(said, Conversation):
        del flags["loss_mask"]
        if len(mask) != len(said):
            raise BadRow(f'"loss_mask" has {len(mask)} values for {len(said)} turns')
        kept = [flag({"loss_mask": value}, f"turn {number}") for number, value in enumerate(mask, 1)]
        if wrong := [number for number, keep in enumerate(kept, 1) if keep and said[number - 1].role != "assistant"]:
            raise BadRow(f'"loss_mask" of turn {wrong[0]} is 1, which is not the assistant\'s; "unmask" is for these')
        turns = [turn._replace(trained=turn.trained and bool(keep)) for turn, keep in zip(said, kept)]
        said = Conversation(check(turns, ordered=False), said.options, said.written)
    if "mask" in flags:
        raise BadRow('"mask" beside the turns is not heeded; "loss_mask" is')
    if flag(flags) is False:
        raise BadRow(f"{' and '.join(map(shown, flags))} of the whole row: nothing to train on")
    return said


def _chat(row: Any, layout: str) -> list[Turn]:
    lists, unmask, system = _turn_lists(row), None, None
    if isinstance(row, dict):
        if not lists:
            raise BadRow(_missing(CONTAINERS[layout != "messages"], row))
        unmask, system = row.get("unmask"), row.get("system")
        if unmask not in (None, True, False):
            raise BadRow(f'"unmask" is {kind(unmask)}, not true or false')
    if (others := fitting(row)) and layout not in others:
        raise BadRow(f"it looks like {others[0]}")
    turns = next((turns for turns in lists if layout in _turn_layouts(turns)), lists[0])
    return _with_system(system, turn_list(turns, *TURN_KEYS[layout], unmask=bool(unmask)))


def _alpaca(row: dict[str, Any]) -> list[Turn]:
    asked = [text_of(row.get(key), f'"{key}"') for key in ("instruction", "input") if row.get(key) is not None]
    asked = [text for text in asked if text] or [""]
    pairs = held(row.get("history") or [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRow('"history" is not a list of [question, answer]')
    answered = [*pairs, [asked[0], row["output"]]]
    said = []
    for number, (question, answer) in enumerate(answered, 1):
        where = '"output"' if number == len(answered) else f'pair {number} of "history"'
        said += [Turn("user", text_of(question, where), False), Turn("assistant", text_of(answer, where), True)]
    said[-2] = said[-2]._replace(input="".join(asked[1:]))
    return _with_system(row.get("system"), said)


def _metharme(prompt: Any, generation: Turn) -> Conversation:
    """The turns of a prompt, which may be written out as the model sees it; only the generation is trained.

    Written out it may have any order: the model first, no user, several of them.
    """
    before, *marked = re.split(r"<\|(system|user|model)\|>", text_of(prompt, '"prompt"'))
    if before.strip() or not marked:
        return Conversation(check([Turn("user", prompt, False), generation]))
    said = [Turn(ROLES[role], text, False) for role, text in zip(marked[::2], marked[1::2], strict=True)]
    if said[-1].role == "assistant" and not said[-1].text.strip():
        said.pop()  # the <|model|> that the generation goes on from
    return Conversation(check([*said, generation], ordered=False), written=prompt)


def _prompt_completion(prompt: Any, completion: Any) -> Conversation | Segments:
    """As TRL has it: text is taken as it is, with no format; the loss is on the completion."""
    prompt, completion = _messages(prompt), _messages(completion)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise BadRow(f'"prompt" is {kind(prompt)} and "completion" is {kind(completion)}; both are text or lists')
    if not isinstance(prompt, list):
        pieces = [Segment(text_of(prompt, '"prompt"'), False), Segment(text_of(completion, '"completion"'), True)]
        return _check_segments(pieces)
    context = _messages_of(prompt, '"prompt": turn')
    answer = _messages_of(completion, '"completion": turn')
    return Conversation(check([*(turn._replace(trained=False, masked=()) for turn in context), *answer]))


def _messages_of(turns: list[Any], where: str) -> list[Turn]:
    layout = next(iter(_turn_layouts(turns)), "messages")
    return turn_list(turns, *TURN_KEYS[layout], where=where)


def _messages(value: Any) -> Any:
    """A list of messages, perhaps as JSON's text, which other text is not taken for."""
    found = held(value)
    return found if not isinstance(value, str) or _turn_layouts(found) else value


def _labelled(segments: Any) -> list[Segment]:
    segments = held(segments)
    if not isinstance(segments, list):
        raise BadRow(f'"segments" is {kind(segments)}, not a list')
    found = []
    for number, segment in enumerate(segments, 1):
        if not isinstance(segment, dict):
            raise BadRow(f"segment {number} is {kind(segment)}, not an object")
        for key in ("label", "text"):
            if segment.get(key) is None:
                raise BadRow(f"segment {number}: {missing(key, segment)}")
        if not isinstance(segment["label"], bool):
            raise BadRow(f'segment {number}: its "label" is {shown(segment["label"])}, not true or false')
        found.append(Segment(text_of(segment["text"], f'segment {number}: its "text"'), segment["label"]))
    return found


def _check_segments(found: list[Segment]) -> Segments:
    if not any(segment.trained and segment.text.strip() for segment in found):
        raise BadRow("nothing to train on: its trained text is empty")
    return tuple(segment for segment in found if segment.text)


def _with_system(system: Any, said: list[Turn]) -> list[Turn]:
    text = "" if system is None else text_of(system, '"system"')
    if not text.strip():
        return said
    if said and said[0].role == "system":
        raise BadRow('"system" and a first turn of the system\'s: two system prompts')
    return [Turn("system", text, False), *said]


def _opened(row: Any) -> Any:
    """The row, its lists of turns as such."""
    if not isinstance(row, dict):
        return held(row)
    return row | {key: held(row[key]) for key in CONTAINERS if row.get(key) is not None}


def _turn_lists(row: Any) -> list[Any]:
    """What stands under each container that `row` has; a row that is no object is the list itself."""
    return [row[key] for key in CONTAINERS if row.get(key) is not None] if isinstance(row, dict) else [row]


def _turn_layouts(turns: Any) -> list[str]:
    """By the keys of the first turn."""
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict):
        return []
    return [name for name, (who, what) in TURN_KEYS.items() if first.get(who) is not None and what in first]


def _missing(key: str, row: dict[str, Any]) -> str:
    """What to say of a row without `key`."""
    # A key of another layout is no slip of the pen, near as generation is to conversations.
    told = missing(key, row, COLUMNS)
    others = fitting(row)
    return f'no "{key}"; it looks like {others[0]}' if others and "is " not in told else told
