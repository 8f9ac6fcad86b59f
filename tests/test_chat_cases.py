"""Rows as people have them, from JSON to what is trained on: each is right to the token, or refused by name."""

import ast
import functools
import importlib.util
import re
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxup.data.chat_formats import end_ids, open_format, show
from jaxup.data.chat_templates import TEMPLATES
from jaxup.data.layouts import LAYOUTS, fitting, parse, unfitting
from jaxup.data.template_spans import Template
from jaxup.data.turns import BadRow
from jaxup.errors import UserError


@functools.cache
def tokenizer(template=None, bos="<s>", eos="</s>", extra="<|im_start|> <|im_end|>", adds=""):
    """A token is a byte, but for special ones; `adds` stands before each text."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([token for token in dict.fromkeys([bos, eos, *extra.split()]) if token])
    if adds:
        pairs = [(token, core.token_to_id(token)) for token in adds.split()]
        core.post_processor = processors.TemplateProcessing(single=f"{adds} $A", special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, chat_template=template)


def trained(row, tok, name=None, layout=None, history=""):
    """The examples of a row as a run shows them, and what it is warned of."""
    layouts = [layout] if layout else fitting(row)
    assert len(layouts) == 1, unfitting(row)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        format = open_format(name, tok, history)
        (made,) = format.examples([parse(row, layouts[0])])
        if isinstance(made, UserError):
            raise made
        shown = [show(format, one, False).replace("↵", "") for one in format.tokenize(made)]
    assert shown == [show(format, format.tokenize([one])[0], False).replace("↵", "") for one in made]
    return shown, [str(warning.message) for warning in said]


def chat(*turns, **more):
    """ "u: text" or ("a: text", {key: value}) -> a row of messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    pairs = [turn if isinstance(turn, tuple) else (turn, {}) for turn in turns]
    made = [{"role": roles[text[0]], "content": text[3:], **keys} for text, keys in pairs]
    return {"messages": [{k: v for k, v in m.items() if v != "-"} for m in made], **more}


ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if documents %}{% for d in documents %}[{{ d.text }}]{% endfor %}{% endif %}{% if loud %}!{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.name and m.role == 'user' %} {{ m.name }}{% endif %}{{ '\n' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}" + ASKS
)
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS
USER, HEADER = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
Q = USER.format("U") + HEADER
QA = Q + "⟦A<|im_end|>⟧\n"
TWO = Q + "A<|im_end|>\n" + USER.format("V") + HEADER + "⟦B<|im_end|>⟧\n"
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1], "y": [2]}'}}


def two(**flags):
    """Two rounds, the first answer with these flags."""
    return chat("u: U", ("a: A", flags), "u: V", "a: B")


# What takes an answer out of the loss


@pytest.mark.parametrize("key", ["train", "training", "loss", "loss_weight", "loss_mask", "weight"])
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_an_answer_is_taken_out_of_the_loss(key, value):
    assert trained(two(**{key: value}), tokenizer(PLAIN)) == ([TWO], [])
    kept, _ = trained(two(**{key: not value}), tokenizer(PLAIN))
    assert kept == [TWO.replace("A<|im_end|>", "⟦A<|im_end|>⟧")]


def test_masks_mean_what_the_users_turns_have():
    row = two(mask=True)
    assert trained(row, tokenizer(PLAIN)) == ([TWO], [])
    masks = [0, 0, 0, 1]  # of the loss, as it is for those who write one for every turn
    for turn, value in zip(row["messages"], masks):
        turn["mask"] = value
    assert trained(row, tokenizer(PLAIN)) == ([TWO], [])
    assert trained({"messages": two()["messages"], "loss_mask": masks}, tokenizer(PLAIN)) == ([TWO], [])


def parts(*pieces):
    return [{"type": "text", "text": text, **flags} for text, flags in pieces]


@pytest.mark.parametrize("name", [None, "chatml", "llama-3", "metharme"])
def test_a_part_of_an_answer_is_taken_out_of_the_loss(name):
    row = chat("u: U", "a: ")
    row["messages"][1]["content"] = parts((" one", {}), (" two", {"train": False}), (" one ", {"weight": 1}))
    shown, _ = trained(row, tokenizer(PLAIN), name)
    inside = "".join(re.findall("⟦(.*?)⟧", shown[0]))
    assert re.fullmatch(r" ?one one ?(<\|im_end\|>|</s>|<\|eot_id\|>)", inside), shown


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (two(weight=0.5), 'turn 2: its "weight" is 0.5, not 0 or 1'),
        (two(train="no"), "turn 2: its \"train\" is 'no', not 0 or 1"),
        (two(train_detail=[{"begin_offset": 0}]), 'turn 2: "train_detail" is not heeded'),
        (two(loss_scale=1.0), 'turn 2: "loss_scale" is not heeded'),
        (two(masked=True), 'turn 2: "masked" is not heeded'),
        (two(train=True, weight=0), "turn 2: 'train' and 'weight' contradict each other"),
        (two() | {"loss_mask": [0, 1]}, '"loss_mask" has 2 values for 4 turns'),
        (two() | {"loss_mask": [1, 0, 0, 1]}, '"loss_mask" of turn 1 is 1'),
        (two() | {"loss_mask": 0}, "'loss_mask' of the whole row: nothing to train on"),
        (two() | {"weight": 0.25}, 'its "weight" is 0.25, not 0 or 1'),
        (two() | {"mask": "User"}, '"mask" beside the turns is not heeded'),
        (chat(("u: U", {"train": True}), "a: A"), "turn 1: a user's turn of train True"),
        (chat("u: U", ("a: A", {"reasoning": ["x"]})), 'turn 2: its "reasoning" is a list, not text'),
        (chat("u: U", ("a: A", {"tool_calls": [{"id": 3}]})), 'turn 2: its "tool_calls": a call of a tool without a'),
        (chat("u: U", "a: A", tools={"a": 1}), '"tools" is an object, not a list'),
        (chat("u: <image>", "a: A", images=["1.png"]), 'it has "images"; only text can be trained on'),
        (chat("u: U", "a: A", label=False), 'its "label" is a preference'),
        (chat("u: U", chosen={"role": "assistant", "content": "A"}, rejected="B"), 'its "chosen" and "rejected" are'),
        ({"prompt": "P", "completion": "C", "tools": TOOLS}, '"tools" beside text, to which no template is applied'),
    ],
)
def test_rows_that_are_refused_by_name(row, wrong):
    with pytest.raises(BadRow, match=re.escape(wrong)):
        parse(row, fitting(row)[0])


# What a row says besides role and text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat("u: U", ("a: A", {"reasoning_content": "hm"})), Q + "⟦<think>hm</think>A<|im_end|>⟧\n"),
        (chat("u: U", ("a: A", {"thinking": "hm"})), Q + "⟦<think>hm</think>A<|im_end|>⟧\n"),
        (
            chat("u: U", "a: A", tools='[{"type": "function"}]'),
            '<|im_start|>system\n[{"type": "function"}]<|im_end|>\n' + QA,
        ),
        (chat("u: U", "a: A", documents=[{"text": "D"}]), "[D]" + QA),
        (
            chat("u: U", "a: A", chat_template_kwargs={"loud": True}),
            "!" + QA,
        ),
        (
            chat(("u: U", {"name": "Ann"}), "a: A"),
            USER.format("U").replace("user", "user Ann") + HEADER + "⟦A<|im_end|>⟧\n",
        ),
        (
            chat("u: U", ("a: -", {"content": None, "tool_calls": [CALL]}), ("t: 3", {"name": "f"}), "a: A"),
            Q + '⟦[f {"x": [1], "y": [2]}]<|im_end|>⟧\n<|im_start|>tool\n3<|im_end|>\n'
            + HEADER + "⟦A<|im_end|>⟧\n",
        ),
        (
            {"conversations": [
                {"from": "human", "value": "U"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "3"}, {"from": "gpt", "value": "A"},
            ], "tools": "[]"},
            Q + "⟦[f {}]<|im_end|>⟧\n<|im_start|>tool\n3<|im_end|>\n" + HEADER + "⟦A<|im_end|>⟧\n",
        ),
        (
            chat("u: U", ("a: A", {"reasoning_content": "", "tool_calls": [], "name": None}), tools=[], documents=None),
            QA,
        ),
    ],
)  # fmt: skip
def test_what_a_row_says_reaches_the_template_or_is_refused(row, expected):
    assert trained(row, tokenizer(CHATML)) == ([expected], [])
    if "think" in expected or "[" in expected or "!" in expected or "Ann" in expected:
        for tok, name in ((tokenizer(PLAIN), None), (tokenizer(PLAIN), "chatml")):
            with pytest.raises(UserError, match=r"leaves out|has no use for|there is no place for") as error:
                trained(row, tok, name)
            assert "\n" not in str(error.value)


def test_arguments_of_calls_are_text_where_the_template_needs_that():
    template = CHATML.replace("c.function.arguments | tojson", "'' + c.function.arguments")
    row = chat("u: U", ("a: -", {"content": None, "tool_calls": [CALL]}))
    expected = Q + '⟦[f {"x": [1], "y": [2]}]<|im_end|>⟧\n'
    assert trained(row, tokenizer(template)) == trained(row, tokenizer(CHATML)) == ([expected], [])


# Headers and ends of turns


H = "<|im_start|>{{ m.role }}\n"
EACH = "{% for m in messages %}"
MARKED = EACH + "{% if m.role == 'assistant' %}{% generation %}"
OTHERS = "{% endgeneration %}{% else %}" + H + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
ONE, BOTH = chat("u: U", "a: A"), chat("u: U", "a: A", "u: V", "a: B")
CASES = {
    "a header after the reply": (
        EACH + H + "{{ m.content }}<|im_end|>{% endfor %}{{ '<|im_start|>assistant\n' }}", BOTH,
        "<|im_start|>user\nU<|im_end|><|im_start|>assistant\n⟦A<|im_end|>⟧<|im_start|>user\nV<|im_end|>"
        "<|im_start|>assistant\n⟦B<|im_end|>⟧<|im_start|>assistant\n", "", "</s> <|im_end|>",
    ),
    "a header after the reply, behind a system prompt of its own": (
        "<|im_start|>system\nHi<|im_end|>" + EACH + H
        + "{{ m.content }}<|im_end|>{% endfor %}{{ '<|im_start|>assistant\n' }}", ONE,
        "<|im_start|>system\nHi<|im_end|><|im_start|>user\nU<|im_end|><|im_start|>assistant\n⟦A<|im_end|>⟧"
        "<|im_start|>assistant\n", None, None,
    ),
    "EOS once at the end": (
        PLAIN + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", BOTH,
        TWO.replace("A<|im_end|>", "⟦A<|im_end|>⟧").replace("B<|im_end|>⟧\n", "B<|im_end|>\n</s>⟧"), "",
        "</s> <|im_end|>",
    ),
    "marks, and a last EOS in marks of its own": (
        MARKED.replace("{% gen", H + "{% gen") + "{{ m.content }}<|im_end|>\n" + OTHERS + ASKS
        + "{% if not add_generation_prompt %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}", BOTH,
        TWO.replace("A<|im_end|>\n", "⟦A<|im_end|>\n⟧").replace("B<|im_end|>⟧\n", "B<|im_end|>\n</s>⟧"), "",
        "</s> <|im_end|>",
    ),
    "marks around the header": (
        MARKED + H + "{{ m.content }}<|im_end|>\n" + OTHERS + ASKS, ONE,
        Q + "⟦A<|im_end|>\n⟧", "marks the header '<|im_start|>assistant", "</s> <|im_end|>",
    ),
    "marks without the end of turn": (
        MARKED.replace("{% gen", H + "{% gen") + "{{ m.content }}{% endgeneration %}<|im_end|>\n"
        + OTHERS.removeprefix("{% endgeneration %}") + ASKS, ONE,
        Q + "⟦A⟧<|im_end|>\n", "nothing that ends a reply is trained on", "</s>",
    ),
    "a prompt that goes on into the reasoning": (
        PLAIN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), ONE,
        QA, "", "</s> <|im_end|>",
    ),
    "a template that needs a system's turn": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN,
        chat("s: S", "u: U", "a: A"),
        "<|im_start|>system\nS<|im_end|>\n" + QA, "", "</s> <|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_never_on_headers_always_on_the_end_of_turn(case):
    template, row, expected, warned, stops = CASES[case]
    shown, said = trained(row, tokenizer(template))
    assert shown == [expected]
    if warned is not None:
        assert len(said) == bool(warned)
        assert all(warned in told for told in said)
        assert set(end_ids(None, tokenizer(template))) == set(tokenizer().convert_tokens_to_ids(stops.split()))


def test_no_end_of_turn_may_be_an_error():
    template = CASES["marks without the end of turn"][0]
    with pytest.raises(UserError, match="nothing that ends a reply is trained on"):
        open_format(None, tokenizer(template)).check(strict=True)
    open_format(None, tokenizer(PLAIN)).check(strict=True)


# Templates that rewrite history

REWRITES = (
    EACH + H + "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS
)


def test_history_that_is_rewritten():
    tok = tokenizer(REWRITES)
    row = chat("u: U", ("a: A", {"reasoning_content": "hm"}), "u: V", "a: B", "u: W")
    with pytest.raises(UserError, match=r"history=last.*history=each.*weight 0, or prompt_completion"):
        trained(row, tok)
    first = Q + "⟦<think>hm</think>A<|im_end|>⟧\n"
    second = Q + "A<|im_end|>\n" + USER.format("V") + HEADER + "⟦<think></think>B<|im_end|>⟧\n"
    assert trained(row, tok, history="each") == ([first, second], [])
    assert trained(row, tok, history="last") == ([second], [])
    row["messages"][3]["weight"] = 0
    assert trained(row, tok, history="last") == ([first], [])
    with pytest.raises(UserError, match="history='all': not known; known: last, each"):
        open_format(None, tok, "all")


# Named formats, BOS


def test_bos_is_what_the_tokenizer_puts_first():
    text, pair = {"text": "T"}, {"prompt": "P", "completion": "C"}
    for adds, before in (("", ""), ("<s>", "<s>"), ("<|im_start|> <|im_end|>", "<|im_start|><|im_end|>")):
        tok = tokenizer(adds=adds)
        assert trained(text, tok) == ([before + "⟦T</s>⟧"], [])
        assert trained(pair, tok) == ([before + "P⟦C</s>⟧"], [])
        assert trained({"text": before + "T"}, tok)[0] == [before + "⟦T</s>⟧" if not before else f"⟦{before}T</s>⟧"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_system_turn_is_as_in_the_exported_template(name):
    row = chat("s: ", "u: U", "a: A")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        format = open_format(name, tokenizer())
        text = format.render(parse(row, "messages")).text
    assert text == tokenizer().apply_chat_template(row["messages"], chat_template=TEMPLATES[name], tokenize=False)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|system|>S<|model|>Hi!<|user|>V<|model|>", "<s><|system|>S<|model|>Hi!<|user|>V<|model|>⟦B</s>⟧"),
        ("<|system|>S<|model|>", "<s><|system|>S<|model|>⟦B</s>⟧"),
        ("<|system|>S<|user|>a<|user|>b", "<s><|system|>S<|user|>a<|user|>b<|model|>⟦B</s>⟧"),
        ("a", "<s><|user|>a<|model|>⟦B</s>⟧"),
    ],
)
def test_a_prompt_of_metharme_stands_as_it_is(prompt, expected):
    row = {"prompt": prompt, "generation": "B"}
    assert trained(row, tokenizer(), "metharme", "metharme")[0] == [expected]
    assert trained(row, tokenizer(PLAIN), None, "metharme")[0][0].endswith(HEADER + "⟦B<|im_end|>⟧\n")
    if "model|>Hi" in prompt:
        with pytest.raises(UserError, match="system's text stands in the first turn, which is no user's"):
            trained(row, tokenizer(extra="[INST] [/INST]"), "mistral", "metharme")


# Layouts


MESSAGES = ONE["messages"]
ANSWER = MESSAGES[1:]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": MESSAGES[:1], "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "x"}]},
        {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "x"}]},
        {"prompt": "U", "chosen": MESSAGES, "rejected": MESSAGES},
        {"messages": MESSAGES[:1], "chosen": ANSWER[0], "rejected": ANSWER[0]},
        {"conversations": [{"from": "human", "value": "U"}], "chosen": {"from": "gpt", "value": "A"}, "rejected": "x"},
        {"instruction": "U", "input": "", "chosen": "A", "rejected": "x"},
        {**ONE, "label": True},
        {"prompt": MESSAGES[:1], "completion": ANSWER, "label": True},
    ],
)
def test_the_chosen_side_is_taken_when_asked(row):
    expected = QA
    assert trained(row, tokenizer(PLAIN), layout="chosen")[0] == [expected]
    for layout in set(LAYOUTS) - {"chosen", "text", "segments"}:
        with pytest.raises(BadRow, match=r"layout=chosen|no \"|it looks like"):
            parse(row, layout)


def test_the_chosen_side_of_text():
    row = {"prompt": "P", "chosen": "C", "rejected": "x"}
    assert trained(row, tokenizer(), layout="chosen")[0] == ["P⟦C</s>⟧"]
    with pytest.raises(BadRow, match="not the chosen side"):
        parse({**ONE, "label": False}, "chosen")
    assert "layout=chosen" in unfitting(row)


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"instruction": "I", "response": "R"}, "not alpaca: no \"output\"; its keys: 'instruction', 'response'"),
        ({"messages": "hello"}, "not messages: turns are text, not a list"),
        ({"messages": "[{]"}, "not messages: turns are text that holds JSON, not a list"),
        ({"conversations": [["u", "a"]]}, "not sharegpt: turn 1 is a list, not an object"),
        ({"prompt": "P", "answer": "A"}, "not metharme: no \"generation\"; its keys: 'prompt', 'answer'"),
        ({"a": 1}, ""),
    ],
)
def test_what_a_row_of_no_layout_is_missing(row, missing):
    assert fitting(row) == []
    assert unfitting(row) == missing


def test_json_text_is_read_as_what_it_holds():
    text = '[{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]'
    expected = trained(ONE, tokenizer(PLAIN))
    assert trained({"messages": text}, tokenizer(PLAIN)) == expected
    halves = {"prompt": text.replace(", {", "]|").split("|")[0], "completion": "[{" + text.split(", {")[1]}
    assert trained(halves, tokenizer(PLAIN)) == expected
    assert trained({"prompt": "P", "completion": '{"a": 1}'}, tokenizer())[0] == ['P⟦{"a": 1}</s>⟧']


# Every template that others ship


def shipped():
    """name -> template, of packages that are here: files, and in code what reads like one."""
    for package in ("trl", "axolotl", "transformers"):
        spec = importlib.util.find_spec(package)
        for path in Path(spec.origin).parent.rglob("*") if spec and spec.origin else ():
            if path.suffix == ".jinja" and "messages" in path.read_text():
                yield f"{package}: {path.name}", path.read_text()
            elif path.suffix == ".py" and "{%" in (source := path.read_text()):
                for n, node in enumerate(ast.walk(ast.parse(source))):
                    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
                    if re.search(r"\{%-?\s*for \w+ in (messages|loop_messages)", text):
                        yield f"{package}: {path.name} {n}", text


@pytest.mark.slow
def test_every_template_that_is_shipped():
    understood = 0
    for name, template in shipped():
        special = sorted({token for token in re.findall(r"<[|｜][^<>\s]+[|｜]>|<\w+_of_\w+>", template)})
        tok = tokenizer(template, extra=" ".join(special))
        for row in (ONE, BOTH, chat("s: S", "u: U U", "a: A")):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    text, spans = open_format(None, tok).render(parse(row, "messages"))
            except UserError:
                continue
            understood += 1
            theirs = tok.apply_chat_template(row["messages"], tokenize=False)
            assert text == theirs, name
            replies = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
            plain = tok.apply_chat_template(row["messages"][:-1], tokenize=False)
            asked = tok.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
            for reply, (start, end) in zip(replies, spans, strict=True):
                inside = text[start:end]
                assert reply in inside, name
                header = asked.removeprefix(plain).strip()
                assert not header or header not in inside, (name, inside)
                # What follows at once, were it a token that ends the reply, would be missing.
                assert not re.match(r"<[^<>\s]*(end|eot|eom|eos)[^<>\s]*>", text[end:]), (name, text[end:])
            if "generation %}" in template or "generation -%}" in template:
                marked = Template(template, tok.special_tokens_map)._marked(row["messages"])[1]
                assert all(any(a <= start and end <= b for a, b in marked) for start, end in spans), name
    assert understood
