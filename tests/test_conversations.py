"""Rows of chat data: every layout against turns written by hand, the places of errors, weights, laziness."""

import itertools
import json
import os
import random
import re
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxup.data import readers, sources
from jaxup.data.layouts import LAYOUTS, Segment, fitting, parse
from jaxup.data.mixture import Mixture, open_mixture
from jaxup.data.turns import BadRow, Turn
from jaxup.errors import UserError


def S(text):
    return Turn("system", text, False)


def U(text, trained=False, input=""):
    return Turn("user", text, trained, input)


def A(text, trained=True):
    return Turn("assistant", text, trained)


def messages(*pairs, **more):
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


def sharegpt(*pairs, **more):
    return {"conversations": [{"from": who, "value": value} for who, value in pairs], **more}


def asked(n):
    return messages(("user", f"question {n}"), ("assistant", f"answer {n}"))


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def opened(files, layout=None, seed=0, on_bad="error"):
    return Said(**vars(open_mixture(files, layout=layout, seed=seed, on_bad=on_bad)))


class Said(Mixture):
    """A mixture of which only what the examples say is looked at."""

    def __iter__(self):
        return (example.said for example in super().__iter__())


def refused(files, layout=None, **options):
    """The one line that reading all of `files` ends with."""
    with pytest.raises(UserError) as error:
        list(opened(files, layout, **options))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


# Layouts

CHAT = (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"))
TURNS = (S("S"), U("U"), A("A"), U("V"), A("B"))
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
METHARME = "<|system|>S<|user|>U\n<|model|> A<|user|>V<|model|>"

EXPECTED = [
    ("messages", messages(*CHAT), TURNS),
    ("messages", messages(*CHAT, id=3, tools=None), TURNS),
    ("messages", messages(("developer", "S"), ("user", PARTS), ("assistant", " A\n")), (S("S"), U("ab"), A(" A\n"))),
    ("messages", messages(*CHAT, unmask=True), (S("S"), U("U", True), A("A"), U("V", True), A("B"))),
    ("messages", messages(*CHAT, unmask=False), TURNS),
    ("messages", {"conversations": messages(*CHAT)["messages"]}, TURNS),
    ("messages", messages(*CHAT)["messages"], TURNS),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "U", "weight": None, "name": "x"},
                {"role": "assistant", "content": "A", "weight": 0},
                {"role": "user", "content": "V", "weight": 0},
                {"role": "assistant", "content": "B", "weight": 1.0},
            ]
        },
        (U("U")._replace(more={"name": "x"}), A("A", False), U("V"), A("B")),
    ),
    # A Sequence of structs, as `datasets` keeps it
    ("messages", {"messages": {"role": ["user", "assistant"], "content": ["U", "A"]}}, (U("U"), A("A"))),
    ("messages", messages(("user", "U"), ("assistant", "A"), ("user", "")), (U("U"), A("A"), U(""))),
    ("sharegpt", sharegpt(("system", "S"), ("human", "U"), ("gpt", "A"), ("user", "V"), ("chatgpt", "B")), TURNS),
    ("sharegpt", sharegpt(("human", "U"), ("bot", "A"), ("human", "V"), ("model", "B"), system="S"), TURNS),
    ("sharegpt", sharegpt(("human", "U"), ("assistant", "A"), system=" "), (U("U"), A("A"))),
    ("sharegpt", {"messages": sharegpt(("human", "U"), ("gpt", "A"))["conversations"]}, (U("U"), A("A"))),
    (
        "pygmalion",
        {"conversations": [{"role": r, "value": v} for r, v in (("system", "S"), ("human", "U"), ("bot", "A"))]},
        TURNS[:3],
    ),
    ("pygmalion", [{"role": r, "value": v} for r, v in (("system", "S"), ("human", "U"), ("bot", "A"))], TURNS[:3]),
    ("alpaca", {"instruction": "I", "input": "", "output": "O"}, (U("I"), A("O"))),
    ("alpaca", {"instruction": "I", "output": "O", "text": "I O"}, (U("I"), A("O"))),
    ("alpaca", {"instruction": "I", "input": "X", "output": "O", "system": "S"}, (S("S"), U("I", input="X"), A("O"))),
    ("alpaca", {"instruction": "", "input": "X", "output": "O"}, (U("X"), A("O"))),
    (
        "alpaca",
        {"instruction": "V", "input": "X", "output": "B", "history": [["U", "A"]]},
        (U("U"), A("A"), U("V", input="X"), A("B")),
    ),
    ("alpaca", {"instruction": "V", "input": None, "output": "B", "system": "S", "history": [["U", "A"]]}, TURNS),
    ("metharme", {"prompt": "U", "generation": "A"}, (U("U"), A("A"))),
    ("metharme", {"prompt": "say <|user|>", "generation": "A"}, (U("say <|user|>"), A("A"))),
    ("metharme", {"prompt": METHARME, "generation": "B"}, (S("S"), U("U\n"), A(" A", False), U("V"), A("B"))),
    ("metharme", {"prompt": "<|user|>U", "generation": "A"}, (U("U"), A("A"))),
    ("metharme", {"prompt": "<|model|>A<|model|>", "generation": "B"}, (A("A", False), A("B"))),
    ("metharme", {"prompt": "<|user|>U<|user|>V<|model|>", "generation": "B"}, (U("U"), U("V"), A("B"))),
    ("prompt_completion", {"prompt": "P ", "completion": "C"}, (Segment("P ", False), Segment("C", True))),
    ("prompt_completion", {"prompt": "", "completion": "C"}, (Segment("C", True),)),
    (
        "prompt_completion",
        {"prompt": messages(*CHAT[:4])["messages"], "completion": messages(CHAT[4])["messages"]},
        (S("S"), U("U"), A("A", False), U("V"), A("B")),
    ),
    ("text", {"text": " all of it\n", "meta": {"a": [1]}}, (Segment(" all of it\n", True),)),
    (
        "segments",
        {"segments": [{"label": False, "text": "P"}, {"label": True, "text": "C\n"}, {"label": True, "text": ""}]},
        (Segment("P", False), Segment("C\n", True)),
    ),
]


@pytest.mark.parametrize(("layout", "row", "expected"), EXPECTED)
def test_a_row_is_detected_and_says_what_it_says(tmp_path, layout, row, expected):
    path = jsonl(tmp_path / "a.jsonl", [row])
    found = opened(path)
    assert found.layouts == {path: layout}
    assert list(found) == [expected]
    assert list(opened(path, layout)) == [expected]


def test_every_layout_is_tested():
    assert {layout for layout, *_ in EXPECTED} == set(LAYOUTS) - {"chosen"}


@pytest.mark.parametrize(
    ("rows", "layout"),
    [
        ([asked(1) | {"text": "rendered"}], "messages"),
        ([{"text": "t"}, {"text": "t"}, asked(1)], "text"),
        ([{"a": 1}, "broken", asked(1)], "messages"),
        ([asked(1) | {"prompt": "p", "prompt_id": "7"}], "messages"),
        ([asked(1) | {"prompt": "p", "completion": "c"}, asked(2)], "messages"),
        ([asked(1) | {"instruction": None, "output": None}], "messages"),
    ],
)
def test_detection_by_the_first_rows(tmp_path, rows, layout):
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert opened(path).layouts == {path: layout}


def test_detection_asks_where_it_cannot_know(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [asked(1) | {"prompt": "p", "completion": "c", "text": "t"}])
    message = f"{path}: its first rows are both prompt_completion and messages; name the layout that is meant"
    assert refused(path) == message
    assert list(opened(path, "messages")) == [(U("question 1"), A("answer 1"))]
    assert list(opened(path, "text")) == [(Segment("t", True),)]
    path = jsonl(tmp_path / "b.jsonl", [asked(1) | sharegpt(("human", "U"), ("gpt", "A"))])
    assert "both messages and sharegpt" in refused(path)
    assert list(opened(path, "messages")) == [(U("question 1"), A("answer 1"))]
    assert list(opened(path, "sharegpt")) == [(U("U"), A("A"))]
    assert refused(path, "massages") == "layout='massages': no such layout; did you mean 'messages'?"


# What is refused

AN_A = ("assistant", "A")
WRONG = [
    ("messages", messages(), "the conversation is empty"),
    ("messages", messages(("user", "U")), "no turn of the assistant's: nothing to train on"),
    ("messages", messages(("system", "S")), "no turn of the assistant's"),
    ("messages", messages(("user", "U"), ("user", "V"), AN_A), "turns 1 and 2 are both the user's; join them"),
    ("messages", messages(("user", "U"), AN_A, AN_A), "turns 2 and 3 are both the assistant's"),
    ("messages", messages(AN_A, ("user", "U")), "the assistant speaks first"),
    ("messages", messages(("system", "S"), AN_A), "the assistant speaks first"),
    ("messages", messages(("user", "U"), ("system", "S"), AN_A), "turn 2 is the system's; only the first may be"),
    ("messages", messages(("system", "S"), ("system", "S"), AN_A), "turn 2 is the system's"),
    ("messages", messages(("user", "U"), ("assistant", " \n")), "turn 2, the assistant's, is empty"),
    ("messages", messages(("usr", "U"), AN_A), "turn 1: 'usr' is no role; did you mean 'user'?"),
    ("messages", messages(("Human\n\x1b[31m", "U"), AN_A), r"turn 1: 'Human\n\x1b[31m' is no role"),
    ("messages", messages(("user", "U"), ("tool", "x")), "turn 2 is a tool's, and comes after no turn of the"),
    ("messages", messages((["user"], "U")), 'turn 1: its "role" is a list, not text'),
    ("messages", messages(("user", 3)), 'turn 1: its "content" is a number, not text'),
    ("messages", messages(("user", None)), 'turn 1: its "content" is null, not text'),
    ("messages", messages(("user", {"a": 1})), 'turn 1: its "content" is an object, not text'),
    ("messages", messages(("user", "\ud83d")), r'turn 1: its "content" holds half a character, \ud83d'),
    (
        "messages",
        messages(("user", [PARTS[0], {"type": "image_url", "image_url": {"url": "x"}}])),
        "turn 1: its \"content\": part 2 has the type 'image_url'; only text can be trained on",
    ),
    ("messages", messages(("user", ["U"])), 'turn 1: its "content": part 1 is text; only'),
    ("messages", messages(("user", [{"type": "text"}])), 'turn 1: its "content": part 1 has no text'),
    ("messages", {"messages": ["U"]}, "turn 1 is text, not an object"),
    ("messages", {"messages": '[{"role": "user"}]'}, "turn 1: no \"content\"; its keys: 'role'"),
    ("messages", {"messages": '[{"role": "user}]'}, "turns are text that holds JSON, not a list"),
    ("messages", {"messages": {"role": ["user"], "content": []}}, "turns are an object, not a list"),
    ("messages", {"messages": [{"content": "U"}]}, "turn 1: no \"role\"; its keys: 'content'"),
    ("messages", {"messages": [{"role": "user", "contents": "U"}]}, "turn 1: no \"content\"; is 'contents' meant?"),
    ("messages", {"message": []}, "no \"messages\"; is 'message' meant?"),
    ("messages", {}, 'no "messages"; its keys: none'),
    ("messages", {"instruction": "I", "output": "O"}, 'no "messages"; it looks like alpaca'),
    ("messages", sharegpt(("human", "U"), ("gpt", "A")), "it looks like sharegpt"),
    ("messages", 3, "turns are a number, not a list"),
    ("messages", messages(("user", "U"), AN_A, unmask="yes"), '"unmask" is text, not true or false'),
    ("messages", messages(("system", "S"), ("user", "U"), AN_A, system="T"), '"system" and a first turn of the'),
    ("sharegpt", {"prompt": "U", "generation": "A"}, 'no "conversations"; it looks like metharme'),
    ("sharegpt", sharegpt(("humn", "U")), "turn 1: 'humn' is no role; did you mean 'human'?"),
    ("alpaca", {"instruction": "I", "output": ""}, "turn 2, the assistant's, is empty"),
    ("prompt_completion", {"prompt": "U", "generation": "A"}, 'no "completion"; it looks like metharme'),
    ("alpaca", {"instruction": "I", "outputs": "O", "text": "t"}, "no \"output\"; is 'outputs' meant?"),
    ("alpaca", {"instruction": "I", "output": "O", "history": [["U"]]}, '"history" is not a list of [question'),
    ("alpaca", {"instruction": "I", "output": "O", "history": "U"}, '"history" is not a list of [question'),
    ("alpaca", {"instruction": 1, "output": "O"}, '"instruction" is a number, not text'),
    ("alpaca", ["I"], "it is a list, not an object"),
    ("metharme", {"prompt": "U", "generation": "\t"}, "turn 2, the assistant's, is empty"),
    ("prompt_completion", {"prompt": "P", "completion": " "}, "nothing to train on: its trained text is empty"),
    ("prompt_completion", {"prompt": "P", "completion": []}, '"prompt" is text and "completion" is a list'),
    (
        "prompt_completion",
        {"prompt": [{"role": "user", "content": 1}], "completion": []},
        '"prompt": turn 1: its "content" is a number',
    ),
    ("text", {"text": ""}, "nothing to train on"),
    ("text", {"text": float("nan")}, '"text" is a number, not text'),
    ("text", {"txt": "t"}, "no \"text\"; is 'txt' meant?"),
    ("segments", {"segments": []}, "nothing to train on"),
    ("segments", {"segments": [{"label": False, "text": "P"}]}, "nothing to train on"),
    ("segments", {"segments": [{"label": 1, "text": "P"}]}, 'segment 1: its "label" is 1, not true or false'),
    ("segments", {"segments": [{"text": "P"}]}, "segment 1: no \"label\"; its keys: 'text'"),
    ("segments", {"segments": {"label": True}}, '"segments" is an object, not a list'),
]


@pytest.mark.parametrize(("layout", "row", "wrong"), WRONG)
def test_a_row_that_is_not_its_layout(tmp_path, layout, row, wrong):
    path = jsonl(tmp_path / "a.jsonl", [row])
    assert refused(path, layout).startswith(f"{path}:1: row 1 is not {layout}: {wrong}")


@pytest.mark.parametrize("weight", [2, -1, float("nan"), "1"])
def test_weights_of_turns_are_0_or_1(weight):
    row = asked(1)
    row["messages"][1]["weight"] = weight
    with pytest.raises(BadRow, match=r'turn 2: its "weight" is .*, not 0 or 1'):
        parse(row, "messages")
    row["messages"][1]["weight"] = 0
    with pytest.raises(BadRow, match="every answer has the weight 0: nothing to train on"):
        parse(row, "messages")
    row["messages"][0]["weight"] = 1
    with pytest.raises(BadRow, match="a user's turn of weight 1"):
        parse(row, "messages")
    assert parse(row | {"unmask": True}, "messages") == (U("question 1", True), A("answer 1", False))


TURN_KEYS = "a role content from value type text train mask weight tool_calls function name arguments thinking"
SAID = ["user", "assistant", "text", "function_call", "[]", '[{"role": "user", "content": "U"}]']
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(0, 1) | st.text(max_size=3) | st.sampled_from(SAID),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TURN_KEYS.split()), inner),
    max_leaves=6,
)
KEYS = (
    "messages conversations unmask system prompt generation completion text segments instruction output history "
    "chosen rejected label loss_mask weight mask tools chat_template_kwargs images"
)


@settings(max_examples=150)
@given(row=json_values | st.dictionaries(st.sampled_from(KEYS.split()), json_values, max_size=4))
def test_any_json_is_a_conversation_or_a_bad_row(row):
    assert set(fitting(row)) <= set(LAYOUTS)
    for layout in LAYOUTS:
        said, wrong = (), ""
        try:
            said = parse(row, layout)
        except BadRow as error:
            wrong = str(error)
        assert wrong or any(part.trained for part in said)
        assert "\n" not in wrong
        assert len(wrong) < 700


def test_the_place_of_a_bad_row_is_its_line(tmp_path):
    rows = ["\ufeff" + json.dumps(asked(1)), "", asked(2), "   ", {"text": "t"}, asked(3)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    message = f'{path}:5: row 3 is not messages: no "messages"; it looks like text'
    conversations = iter(opened(path))
    assert [next(conversations), next(conversations)] == [(U(f"question {n}"), A(f"answer {n}")) for n in (1, 2)]
    with pytest.raises(UserError) as error:
        next(conversations)
    assert str(error.value) == message


BROKEN = [
    (b"{'messages': []}", "Expecting property name enclosed in double quotes at column 2"),
    (b"[", "Expecting value at column 2; a row must stand on one line"),
    (b'{"messages": [}', "Expecting value at column 15"),
    (b'{"messages": [] "x": 1}', "Expecting ',' delimiter at column 17"),
    (b'{"messages": []} {}', "Extra data at column 18"),
    (b'{"messages": "\xff"}', "byte 0xff at column 15 is not UTF-8"),
    (b'{"messages": "\0"}', "Invalid control character at at column 15"),
    (b"[" * 200_000, "it is nested too deeply"),
    (b'{"a":' * 200_000, "it is nested too deeply"),
    (b'{"messages": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    (json.dumps(asked(1)).encode("utf-16"), "byte 0xff at column 1 is not UTF-8"),
]


@pytest.mark.parametrize(("line", "wrong"), BROKEN)
def test_a_broken_line(tmp_path, line, wrong):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(asked(1)).encode() + b"\r\n\n" + line.replace(b"\n", b"") + b"\n")
    assert refused(str(path)).startswith(f"{path}:3: row 2 is not JSON: {wrong}")
    assert refused(str(path), on_bad="error") == refused(str(path))
    with pytest.warns(UserWarning, match="1 bad rows skipped"):
        assert len(list(opened(str(path), on_bad="skip"))) == 1
    path.write_bytes(line + b"\n")
    assert refused(str(path)).startswith(f"{path}:1: row 1 is not JSON: ")


def test_nan_beside_the_conversation_does_not_matter(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [asked(1) | {"score": float("nan")}])
    assert len(list(opened(path))) == 1


def test_too_long_a_line_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_ROW", 2 * 2**20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(asked(1)).encode() + b"\n" + b"x" * 2**22)
    conversations = opened(str(path), "messages")
    assert len(list(itertools.islice(conversations, 1))) == 1
    message = "a.jsonl:2: a line longer than 2 MiB; one list of all rows is a .json file"
    assert refused(str(path), "messages", on_bad="skip") == str(tmp_path / message)


def test_all_bad_rows_are_counted(tmp_path):
    bad = {"messages": []}
    path = jsonl(tmp_path / "a.jsonl", [asked(1), bad, "{", asked(2), bad])
    other = jsonl(tmp_path / "b.jsonl", [bad, asked(3)])
    first = f"{path}:2: row 2 is not messages: the conversation is empty"
    with pytest.raises(UserError) as error:
        opened([(path, 0.01), (other, 2)]).check_all()
    assert str(error.value) == f"{first}; the first of 4 bad of 7 rows"
    with pytest.raises(UserError, match="the only bad of 2 rows"):
        opened(other).check_all()
    skipping = opened([(path, 2.0), (other, 1.0)], on_bad="skip")
    assert skipping.check_all() == (7, 4, first)
    with pytest.warns(UserWarning, match="bad rows skipped") as said:
        found = list(skipping)
    assert sorted(turns[0].text for turns in found) == [f"question {n}" for n in (1, 1, 2, 2, 3)]
    assert [str(warning.message) for warning in said] == [
        f"{path}: 3 bad rows skipped; the first: {first}",
        f"{other}: 1 bad rows skipped; the first: {other}:1: row 1 is not messages: the conversation is empty",
    ]
    path = jsonl(tmp_path / "c.jsonl", [bad, bad])
    assert refused(path, on_bad="skip").startswith(f"{path}: no conversation found; the first of 2 bad rows: ")
    good = jsonl(tmp_path / "d.jsonl", [asked(1)] * 3)
    assert opened(good).check_all() == (3, 0, "")


# Files


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("characters", [1, 7, 2**20])
def test_a_json_list_is_read_as_the_lines_would_be(tmp_path, monkeypatch, indent, characters):
    monkeypatch.setattr(readers, "JSON_CHARACTERS", characters)
    rows = [messages(("user", f'{n} ], "[ \\ ü 🎉'), ("assistant", "x" * n)) for n in range(1, 40)]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n \n", encoding="utf-8")
    lines = opened(jsonl(tmp_path / "a.jsonl", rows))
    assert list(opened(str(path))) == list(lines)
    places = [row.place for row in readers.read_json(path)]
    starts = [n for n, line in enumerate(path.read_text().split("\n"), 1) if line.startswith("  {")]
    assert places == [f"{path}:{n}" for n in (starts if indent else [1] * len(rows))]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[", ":1: row 1 is not JSON: Expecting value"),
        ('[{"text": "a"}', ":1: row 2 is not JSON: a comma or ] is missing"),
        ('[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]', ":2: row 3 is not JSON: a comma or ] is missing"),
        ('[{"text": "a"},\n{"text": }]', ":2: row 2 is not JSON: Expecting value"),
        ('[{"text": "a"},\n]', ":2: row 2 is not JSON: Expecting value"),
        ('[{"text": "a"}]\n[{"text": "b"}]', ":1: there is more after the end of the list; rows that are lists"),
        ("[" * 100_000, ":1: row 1 is not JSON: it is nested too deeply"),
        ("[]", ": no rows"),
        ('["\udcff"]', ": not UTF-8 text: 'utf-8' codec"),
        ('{"data": [\n1]}', ":1: row 1 is not JSON: "),
        ("  ", ": no rows"),
        ("", ": no rows: the file is empty"),
        ("[1, 2]", ":1: row 1 is of no layout; known: messages, "),
    ],
)
@pytest.mark.parametrize("characters", [1, 2**20])
def test_a_broken_json_list(tmp_path, monkeypatch, characters, text, wrong):
    monkeypatch.setattr(readers, "JSON_CHARACTERS", characters)
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert refused(str(path)).startswith(f"{path}{wrong}")
    assert refused(str(path), on_bad="skip").startswith(f"{path}{wrong}")


def test_json_lines_in_a_json_file(tmp_path):
    assert len(list(opened(jsonl(tmp_path / "a.json", [asked(1), asked(2)])))) == 2


CONTENT = [asked(1), messages(("system", "S"), ("user", "ü\n"), ("assistant", "🎉"))] * 90


def test_parquet_round_trip(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, plain = tmp_path / "a.parquet", jsonl(tmp_path / "a.jsonl", CONTENT)
    pq.write_table(pa.Table.from_pylist([row | {"id": b"\0"} for row in CONTENT]), path)
    assert list(opened(str(path))) == list(opened(plain))
    bad = [*CONTENT[:70], messages(("user", None)), {"messages": None}]
    pq.write_table(pa.Table.from_pylist(bad), path)
    assert refused(str(path)) == f'{path}: row 71 is not messages: turn 1: its "content" is null, not text'
    with pytest.raises(UserError, match="the first of 2 bad of 72 rows"):
        opened(str(path)).check_all()
    pq.write_table(pa.table({"message": [1], "b": ["x"]}), path)
    message = f"{path}: its columns are of no layout: no layout has 'message'; did you mean 'messages'?"
    assert refused(str(path)) == message
    path.write_bytes(path.read_bytes()[:-20])
    assert refused(str(path)).startswith(f"{path}: not a sound parquet file (")


def test_datasets_round_trip(tmp_path):
    import datasets

    plain = jsonl(tmp_path / "a.jsonl", CONTENT)
    single = datasets.Dataset.from_list([row | {"score": 0.5} for row in CONTENT])
    single.save_to_disk(tmp_path / "single")
    (file,) = sources.find_files(str(tmp_path / "single"))
    assert {key for row in file.rows() for key in row.value} == {"messages"}, "columns of no layout are decoded"
    found = opened(str(tmp_path / "single"))
    assert list(found) == list(opened(plain))
    assert found.layouts == {str(tmp_path / "single"): "messages"}
    assert found.fingerprint == opened(str(tmp_path / "single")).fingerprint
    other = datasets.Dataset.from_list([{"text": "validation"}])
    datasets.DatasetDict(train=single, validation=other).save_to_disk(tmp_path / "both")
    assert list(opened(str(tmp_path / "both"))) == list(opened(plain))
    datasets.DatasetDict(test=other).save_to_disk(tmp_path / "test")
    told = refused(str(tmp_path / "test"))
    assert told.endswith(f'no split "train"; its splits: test; name one, as in {tmp_path / "test"}:test')
    bad = datasets.Dataset.from_list([{"text": "a"}, {"text": None}])
    bad.save_to_disk(tmp_path / "bad")
    assert refused(str(tmp_path / "bad")) == f'{tmp_path / "bad"}: row 2 is not text: no "text"; its keys: none'
    (tmp_path / "bad" / "state.json").write_text("{")
    assert "cannot load the dataset" in refused(str(tmp_path / "bad"))


def test_a_directory_is_its_files_in_order(tmp_path):
    data = tmp_path / "data"
    for name in ("b.jsonl", "a/z.jsonl", ".hidden/c.jsonl"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(data / name, [messages(("user", name), ("assistant", str(n))) for n in range(5)])
    (data / "dataset_infos.json").write_text("{}")
    (data / "empty.jsonl").write_text("")
    (data / "README.md").write_text("about")
    found = opened(str(data))
    assert found.layouts == {str(data / name): "messages" for name in ("a/z.jsonl", "b.jsonl")}
    assert [turns[0].text for turns in found] == ["a/z.jsonl"] * 5 + ["b.jsonl"] * 5
    # All the while another entry goes on: nine of its rows between two of these.
    other = jsonl(tmp_path / "other.jsonl", [messages(("user", "other"), ("assistant", "A"))] * 100)
    at = [i for i, turns in enumerate(opened([(str(data), 1), (other, 1)])) if turns[0].text != "other"]
    assert all(8 <= later - earlier <= 14 for earlier, later in itertools.pairwise(at)), at
    # Each file has a choice of its own.
    for name in ("a/z.jsonl", "b.jsonl"):
        jsonl(data / name, [messages(("user", name), ("assistant", str(n))) for n in range(50)])
    halves = [
        {turns[1].text for turns in opened([(str(data), 0.5)]) if turns[0].text == name}
        for name in ("a/z.jsonl", "b.jsonl")
    ]
    assert len(halves[0] & halves[1]) < min(map(len, halves)), halves
    (tmp_path / "none").mkdir()
    assert "no chat data in this directory" in refused(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.jsonl", "no such file or directory: missing.jsonl"),
        ("~nobody-of-that-name/x", "no such file or directory: ~nobody-of-that-name/x"),
        ("./missing", "no such file or directory: ./missing"),
        ("a.jsonl,,b.jsonl", "no such file or directory: ''"),
        ("", "no such file or directory: ''"),
        ("data/*.jsonl", "data/*.jsonl: '.jsonl' is no weight; write PATH*NUMBER"),
        ("x" * 300, "File name too long"),
        ([], "no data named"),
    ],
)
def test_what_is_not_there(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", [asked(1)])
    assert message in refused(spec)


def test_hub_datasets_are_loaded_by_name(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        if args[0] == "nobody/nothing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist\non the Hub")
        return datasets.Dataset.from_list([asked(1)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(opened("some/chats:en")) == [(U("question 1"), A("answer 1"))]
    assert len(list(opened("chats*2"))) == 2
    assert calls == [(("some/chats", "en"), {}), (("chats", None), {})]
    message = refused("nobody/nothing")
    assert message == "no such file or directory: nobody/nothing, and no such dataset on the Hugging Face hub"
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert 'a dataset needs datasets; pip install "jaxup[data]"' in refused("some/chats")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", [asked(1)])
    conversations = opened(path)
    os.remove(path)
    for read in (list, lambda c: c.check_all()):
        with pytest.raises(UserError) as error:
            read(conversations)
        assert str(error.value) == f"{path}: No such file or directory"

    def denied(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    jsonl(tmp_path / "a.jsonl", [asked(1)])
    monkeypatch.setattr(sources, "file_hash", denied)
    with pytest.raises(UserError, match=f"^{re.escape(path)}: Permission denied$"):
        _ = opened(path).fingerprint


# Weights and order


def questions(files, **options):
    return [int(turns[0].text.split()[1]) for turns in opened(files, **options)]


def test_weights_are_how_often_rows_are_taken(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", map(asked, range(1000)))
    assert questions(path) == list(range(1000))
    assert questions(f"{path}*2") == list(range(1000)) * 2
    half = questions([(path, 0.5)])
    assert abs(len(half) - 500) < 5 * (1000 * 0.25) ** 0.5, "further than five deviations of a binomial"
    assert half == sorted(set(half))
    assert questions([(path, 0.5)]) == half
    assert questions([(path, 1.5)]) == [*range(1000), *half]
    assert questions([(path, 0.2)]) == [n for n in questions([(path, 0.2)]) if n in set(half)]
    other = questions([(path, 0.5)], seed=1)
    assert other != half
    assert abs(len(set(other) & set(half)) - 250) < 5 * (1000 * 0.1875) ** 0.5, "seeds do not choose independently"


def test_what_is_chosen_depends_on_neither_place_nor_company(tmp_path):
    rows = list(map(asked, range(200)))
    (tmp_path / "b").mkdir()
    here, there = jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b" / "a.jsonl", rows)
    text = jsonl(tmp_path / "t.jsonl", [{"text": "t"}] * 50)
    alone = list(opened([(here, 0.5)]))
    assert alone == list(opened([(there, 0.5)]))
    for files in ([(text, 2.0), (here, 0.5)], [(here, 0.5), (text, 2.0)]):
        mixed = list(opened(files))
        assert [said for said in mixed if isinstance(said[0], Turn)] == alone
        assert len(mixed) - len(alone) == 100
        assert mixed == list(opened(files)), "another order"


def test_files_are_interleaved_in_proportion(tmp_path):
    names = {"a": (1, 300), "b": (2, 60), "c": (1, 30)}  # weight, rows
    files = []
    for name, (weight, rows) in names.items():
        files.append((jsonl(tmp_path / f"{name}.jsonl", [{"text": name}] * rows), weight))
    spec = ",".join(f"{path}*{weight}" for path, weight in files)
    order = [said[0].text for said in opened(spec)]
    assert order == [said[0].text for said in opened(files)]
    assert Counter(order) == {name: weight * rows for name, (weight, rows) in names.items()}
    for end in range(45, len(order), 45):
        share = end / len(order)
        for name, taken in Counter(order[:end]).items():
            weight, rows = names[name]
            assert abs(taken - share * weight * rows) <= 2, (end, name, taken)


def test_a_weight_that_nobody_waits_for_is_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [asked(1)])
    assert refused(f"{path}*1e9") == f"{path}: its weight 1000000000.0 is more than 1000 passes over the file"


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_is_above_0(tmp_path, weight):
    path = jsonl(tmp_path / "a.jsonl", [asked(1)])
    assert refused([(path, weight)]) == f"{path}: its weight {weight} is not a number above 0"
    assert refused(f"{path}*{weight}") == f"{path}: its weight {float(weight)} is not a number above 0"


def test_one_path_may_hold_what_the_string_form_may_not(tmp_path):
    path = jsonl(tmp_path / "a,b*2.jsonl", [asked(1)])
    assert questions(path) == [1]
    assert questions([(path, 2)]) == [1, 1]


def test_the_fingerprint_is_of_all_that_decides_the_conversations(tmp_path):
    rows = [asked(1) | {"text": "t"}, asked(2) | {"text": "t"}]
    a, b = jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b.jsonl", rows[:1])
    prints = [
        opened(files, layout, seed).fingerprint
        for files, layout, seed in [
            (a, None, 0),
            (a, "text", 0),
            (b, None, 0),
            (f"{a}*2", None, 0),
            (f"{a}*.5", None, 0),
            (f"{a}*.5", None, 1),
            (f"{a},{b}", None, 0),
            (f"{b},{a}", None, 0),
        ]
    ]
    assert len(set(prints)) == len(prints)
    assert opened(a, seed=0).fingerprint == opened(a, "messages", seed=9).fingerprint == prints[0]
    jsonl(tmp_path / "a.jsonl", rows[::-1])
    assert opened(a).fingerprint not in prints


def test_the_fingerprint_is_of_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE_HASH_BYTES", 10)
    path = Path(jsonl(tmp_path / "a.jsonl", [asked(i) for i in range(9000)]))
    before, content = opened(str(path)).fingerprint, path.read_bytes()
    at = content.index(b"4500") + 2
    path.write_bytes(content[:at] + b"9" + content[at + 1 :])
    assert opened(str(path)).fingerprint != before


# Memory


def test_a_file_is_read_as_far_as_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    jsonl(path, map(asked, range(40)))
    os.truncate(path, 2**40)  # a hole of a terabyte: nobody reads that by mistake
    conversations = opened(str(path))
    assert len(list(itertools.islice(conversations, 40))) == 40


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, suffix):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    monkeypatch.setattr(readers, "JSON_CHARACTERS", 2**16)
    rows = [messages(("user", "U"), ("assistant", rng.randbytes(10_000).hex())) for _ in range(600)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        jsonl(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    del rows
    conversations = opened(str(path), "messages")
    tracemalloc.start()
    assert sum(1 for _ in conversations) == 600
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6, f"{peak} bytes of a file of {path.stat().st_size}"


def test_nothing_is_warned_of_when_nothing_is_skipped(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [asked(1)])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        list(opened(path, on_bad="skip"))
    assert not said
