"""Conversations -> ids and masks: hand-written strings, transformers' and TRL's masks, a naive walk over the tokens."""

import functools
import os
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxup.data import rendering
from jaxup.data.chat_formats import ALIASES, SPELLINGS, Encoded, open_format, prompt_ids, show
from jaxup.data.chat_templates import TEMPLATES, Spelling, jinja
from jaxup.data.layouts import Segment
from jaxup.data.turns import Conversation, Turn
from jaxup.errors import UserError

SPECIAL = [
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
]
TEXT = ["the sea is blue and the sky is blue too", "who is it? it is me, the moon", "2 + 2 = 4.\n\n- one\n- two  three"]
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:?!#<>|[]()/=+-_\"'\n\t"
KINDS = ("bytes", "bpe", "bpe without", "metaspace")


@functools.cache
def tokenizer(kind, template=None, trim=True):
    """bytes: no merges, a token is a byte. without: no special tokens but BOS and EOS. All add a BOS and an EOS."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    special = ["<s>", "</s>", "<unk>", *([] if "without" in kind else SPECIAL)]
    if kind == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        core.decoder, alphabet = decoders.Metaspace(prepend_scheme="first", split=False), [*ALPHABET]
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    size = len(special) + len(alphabet) + (0 if kind == "bytes" else 150)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*TEXT, "<|user|><|model|>\n### Response:\n [/INST] <|im_end|>\n"] * 3, trainer)
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), ends])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


@functools.cache
def quiet(name, kind, template=None):
    """A format, which has nothing to say any more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        format = open_format(name, tokenizer(kind, template))
    format._warned |= {"border", "special", *format.doubts}
    return format


def chat(system, *rounds, trained=True):
    turns = [] if system is None else [Turn("system", system, False)]
    for user, reply in rounds:
        turns += [Turn("user", user, False), Turn("assistant", reply, trained)]
    return Conversation(turns)


def messages(conversation):
    return [{"role": turn.role, "content": turn.text} for turn in conversation]


def marked_tokens(tok, encoded):
    """The tokens' text with ⟦ ⟧ around runs of trained ones; for byte-level tokens."""
    runs, last = [], None
    for token, trained in zip(tok.convert_ids_to_tokens(encoded.ids), encoded.trained, strict=True):
        if trained != last:
            runs.append((bool(trained), []))
        runs[-1][1].append(token)
        last = trained
    texts = [(trained, tok.backend_tokenizer.decoder.decode(tokens)) for trained, tokens in runs]
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in texts)


# Named formats


BY_HAND = {
    "metharme": "<s><|system|>S<|user|>U 1<|model|>⟦A 1</s>⟧<|user|>U 2<|model|>⟦A 2</s>⟧",
    "mistral-v3": "<s>[INST] S\n\nU 1[/INST]⟦ A 1</s>⟧[INST] U 2[/INST]⟦ A 2</s>⟧",
    "mistral-v1": "<s> [INST] S\n\nU 1 [/INST]⟦ A 1</s>⟧ [INST] U 2 [/INST]⟦ A 2</s>⟧",
    "mistral-v3-tekken": "<s>[INST]S\n\nU 1[/INST]⟦A 1</s>⟧[INST]U 2[/INST]⟦A 2</s>⟧",
    "mistral-v7-tekken": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]U 1[/INST]⟦A 1</s>⟧[INST]U 2[/INST]⟦A 2</s>⟧",
    "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU 1 [/INST]⟦ A 1 </s>⟧<s>[INST] U 2 [/INST]⟦ A 2 </s>⟧",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nU 1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦A 1<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nU 2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A 2<|eot_id|>⟧",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU 1<|im_end|>\n<|im_start|>assistant\n"
    "⟦A 1<|im_end|>⟧\n<|im_start|>user\nU 2<|im_end|>\n<|im_start|>assistant\n⟦A 2<|im_end|>⟧\n",
    "alpaca": "<s>S\n\n### Instruction:\nU 1\n\n### Response:\n⟦A 1</s>⟧"
    "\n\n### Instruction:\nU 2\n\n### Response:\n⟦A 2</s>⟧",
}
CHAT = chat("S", ("U 1", "A 1"), ("U 2", "A 2"))


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_by_hand_and_as_the_exported_template(name, kind):
    tok = tokenizer(kind)
    format = quiet(name, kind)
    encoded = format.encode(CHAT)
    assert (encoded.ids.dtype, encoded.trained.dtype) == (np.int32, bool)
    if kind in ("bytes", "bpe"):
        assert marked_tokens(tok, encoded) == BY_HAND[name]
    if kind != "bpe without":  # which merges the end of one plain header with the next
        assert show(format, encoded, False).replace("↵", "") == BY_HAND[name]
    # The exported model's template, tokenised by transformers at once: the same ids, so no second BOS either.
    for conversation in (
        CHAT,
        chat(None, ("u", "a")),
        chat("s\n", (" u \n", "\n a b "), ("", "a")),
        chat("", ("u", "a")),
    ):
        theirs = tok.apply_chat_template(messages(conversation), chat_template=TEMPLATES[name], return_dict=True)
        np.testing.assert_array_equal(format.encode(conversation).ids, theirs["input_ids"])


def test_eos_may_end_every_turn_of_a_format(monkeypatch):
    turn = ("<|{role}|>\n", "{eos}\n")
    spelling = Spelling("", turn, turn, turn[0], "", "{eos}", "\n")
    monkeypatch.setitem(SPELLINGS, "zephyr", spelling)
    text, spans = open_format("zephyr", tok := tokenizer("bytes")).render(chat("S", ("U", "A")))
    assert text == "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n"
    assert [text[slice(*span)] for span in spans] == ["A</s>"]
    assert (
        tok.apply_chat_template(messages(chat("S", ("U", "A"))), chat_template=jinja(spelling), tokenize=False) == text
    )


# https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py, PROMPT_DICT["prompt_input"]
STANFORD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def test_an_input_has_its_own_place_in_alpaca_only():
    asked, reply = Turn("user", "Sort it.", False, input="3 1 2"), Turn("assistant", "1 2 3", True)
    once = Conversation((asked, reply))
    text, spans = quiet("alpaca", "bytes").render(once)
    assert text == "<s>" + STANFORD_INPUT.format(instruction="Sort it.", input="3 1 2") + "\n1 2 3</s>"
    assert [text[slice(*span)] for span in spans] == ["1 2 3</s>"]
    text, _ = quiet("alpaca", "bytes").render(
        Conversation((Turn("system", "S", False), *chat(None, ("U", "A")), *once))
    )
    assert text == (
        "<s>S\n\n### Instruction:\nU\n\n### Response:\nA</s>"
        "\n\n### Instruction:\nSort it.\n\n### Input:\n3 1 2\n\n### Response:\n1 2 3</s>"
    )
    joined = chat(None, ("Sort it.\n3 1 2", "1 2 3"))
    for name in SPELLINGS.keys() - {"alpaca"}:
        assert quiet(name, "bytes").render(once) == quiet(name, "bytes").render(joined)
    own = quiet(None, "bytes", TEMPLATES["chatml"])
    assert own.render(once) == own.render(joined)


def test_bytes_token_by_token():
    tok = tokenizer("bytes")
    encoded = open_format("mistral", tok).encode(chat(None, ("hi", "yo")))
    expected = [
        *[("<s>", 0), ("[INST]", 0), (" ", 0), ("h", 0), ("i", 0), ("[/INST]", 0)],
        *[(" ", 1), ("y", 1), ("o", 1), ("</s>", 1)],
    ]
    tokens = [tok.decode([i]) for i in encoded.ids]
    assert list(zip(tokens, encoded.trained.astype(int).tolist(), strict=True)) == expected


def test_which_turns_are_trained_is_the_conversations_to_say():
    turns = [("system", "S", 0), ("user", "U", 1), ("assistant", "A", 0), ("user", "V", 0), ("assistant", "B", 1)]
    conversation = Conversation(Turn(role, text, bool(trained)) for role, text, trained in turns)
    tok = tokenizer("bytes")
    for name, expected in {
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n⟦U⟧<|im_end|>\n<|im_start|>assistant\nA<|im_end|>"
        "\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n⟦B<|im_end|>⟧\n",
        "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n⟦U⟧ [/INST] A </s><s>[INST] V [/INST]⟦ B </s>⟧",
    }.items():
        assert marked_tokens(tok, open_format(name, tok).encode(conversation)) == expected
        own = open_format(None, tokenizer("bytes", TEMPLATES[name]))
        assert marked_tokens(tok, own.encode(conversation)) == expected


def spell(name, system, rounds):
    """The format in f-strings, with ⟦ ⟧."""
    if name in ("llama-2", "llama-3"):
        system, rounds = system.strip(), [(u.strip(), a.strip()) for u, a in rounds]
    text = ""
    for i, (u, a) in enumerate(rounds):
        first = system if i == 0 else ""
        if name == "metharme":
            text += (
                "<s>" + (f"<|system|>{system}" if system else "") if i == 0 else ""
            ) + f"<|user|>{u}<|model|>⟦{a}</s>⟧"
        elif name == "mistral-v7-tekken":
            text += "<s>" * (i == 0) + (f"[SYSTEM_PROMPT]{first}[/SYSTEM_PROMPT]" if first else "")
            text += f"[INST]{u}[/INST]⟦{a}</s>⟧"
        elif name.startswith("mistral"):
            b, c = " " * (name == "mistral-v1"), " " * ("tekken" not in name)
            u = f"{first}\n\n{u}" if first else u
            text += ("<s>" if i == 0 else "") + f"{b}[INST]{c}{u}{b}[/INST]⟦{c}{a}</s>⟧"
        elif name == "llama-2":
            u = f"<<SYS>>\n{first}\n<</SYS>>\n\n{u}" if first else u
            text += f"<s>[INST] {u} [/INST]⟦ {a} </s>⟧"
        elif name == "llama-3":
            h = "<|start_header_id|>{}<|end_header_id|>\n\n".format
            text += "<s>" * (i == 0) + (f"{h('system')}{first}<|eot_id|>" if first else "")
            text += f"{h('user')}{u}<|eot_id|>{h('assistant')}⟦{a}<|eot_id|>⟧"
        elif name == "chatml":
            h = "<|im_start|>{}\n".format
            text += f"{h('system')}{first}<|im_end|>\n" if first else ""
            text += f"{h('user')}{u}<|im_end|>\n{h('assistant')}⟦{a}<|im_end|>⟧\n"
        elif name == "alpaca":
            text += ("<s>" + (system or SPELLINGS[name].default_system)) if i == 0 else ""
            text += f"\n\n### Instruction:\n{u}\n\n### Response:\n⟦{a}</s>⟧"
    return text


def walk(tok, kind, marked):
    """ids and mask of a marked text, by going through the tokens and counting their characters (bytes)."""
    text, inside, mask = "", False, []
    for c in marked:
        if c in "⟦⟧":
            inside = c == "⟦"
            continue
        text += c
        mask += [inside] * (1 if kind == "metaspace" else len(c.encode()))
    ids = tok.backend_tokenizer.encode(text, add_special_tokens=False).ids
    tokens = tok.convert_ids_to_tokens(ids)
    lengths = [len(token) for token in tokens]  # in a byte-level vocabulary a character stands for a byte
    if kind == "metaspace" and not text.startswith("<s>") and tokens[0].startswith("▁"):
        lengths[0] -= 1  # the blank put before
    assert sum(lengths) == len(mask)
    starts = np.cumsum([0, *lengths[:-1]])
    return ids, [mask[start] for start in starts]


pieces = st.lists(st.sampled_from([*TEXT, " ", "\n", ">", "|>", "</", "[", "A", ". "]) | st.text(ALPHABET, max_size=5))
texts = pieces.map("".join).filter(lambda text: text.strip() and not re.search("|".join(map(re.escape, SPECIAL)), text))


@pytest.mark.parametrize("name", SPELLINGS)
@settings(max_examples=25)
@given(st.data())
def test_random_conversations(name, data):
    kind = data.draw(st.sampled_from(KINDS))
    odd = st.text("é世🎉", max_size=2) if kind != "metaspace" else st.just("")
    text = st.builds("".join, st.tuples(texts, odd))
    system = data.draw(st.just("") | text)
    rounds = data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=3))
    conversation = chat(system or None, *rounds)
    tok = tokenizer(kind)
    marked = spell(name, system, rounds)
    ids, trained = walk(tok, kind, marked)
    format = quiet(name, kind)
    encoded = format.encode(conversation)
    assert encoded.ids.tolist() == ids
    assert encoded.trained.tolist() == trained
    if kind == "bytes":
        decoded = tok.decode(encoded.ids[encoded.trained], skip_special_tokens=False)
        assert decoded == "".join(re.findall("⟦(.*?)⟧", marked, re.DOTALL))
    # The same through the tokenizer's own template, by prefixes.
    own = quiet(None, kind, TEMPLATES[name]).encode(conversation)
    np.testing.assert_array_equal(own.ids, encoded.ids)
    np.testing.assert_array_equal(own.trained, encoded.trained)


def test_a_token_over_the_border_belongs_to_where_it_begins():
    core = Tokenizer(models.BPE({"<": 0, "|": 1, "m": 2, ">": 3, "(": 4, ">(": 5, "s": 6}, [(">", "(")]))
    core.add_special_tokens(["</s>"])
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    format = open_format(None, tok)
    segments = (Segment("<|m|>", False), Segment("(s", True))
    with pytest.warns(UserWarning, match=r"not trained on: '>\(', one token that begins before"):
        format.encode(segments)
    encoded = format.encode(segments)  # it is said once: a warning would be an error here
    assert tok.convert_ids_to_tokens(encoded.ids) == ["<", "|", "m", "|", ">(", "s", "</s>"]
    assert encoded.trained.tolist() == [False] * 5 + [True, True]
    # A trained one that reaches into what is not.
    encoded = format.encode((Segment("s>", True), Segment("(", False)))
    assert encoded.trained.tolist() == [True, True, False]


def test_named_formats_say_what_they_miss():
    plain = tokenizer("bpe without")
    for name in SPELLINGS:
        if special := SPELLINGS[name].special:
            with pytest.warns(UserWarning, match=f"chat format {name}: not in the tokenizer.*{re.escape(special[-1])}"):
                open_format(name, plain)
        else:
            open_format(name, plain)
        open_format(name, tokenizer("bpe"))
    for alias, name in ALIASES.items():
        assert open_format(alias, tokenizer("bpe"))._spelling == SPELLINGS[name]
    format = open_format("metharme", tokenizer("bpe"))
    with pytest.warns(UserWarning, match="spells '</s>', which becomes that special token"):
        format.encode(chat(None, ("a</s>b", "c")))
    format.encode(chat(None, ("a</s>b", "c")))


def refused(message, action, *args):
    with pytest.raises(UserError, match=message) as error:
        action(*args)
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()


def test_refused_formats():
    refused("'chatlm' is not known; did you mean 'chatml'", open_format, "chatlm", tokenizer("bpe"))
    refused("pure Python", open_format, "chatml", object())
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer("bpe").backend_tokenizer)
    refused("metharme: the tokenizer has no EOS", open_format, "metharme", endless)
    refused("no EOS token", open_format("chatml", endless).encode, (Segment("a", True),))
    refused("no chat template; choose a format by name: metharme", open_format(None, tokenizer("bpe")).encode, CHAT)


# Segments


def test_segments():
    tok = tokenizer("bpe")
    format = open_format(None, tok)
    for segments, expected in {
        (("the sea", True),): "<s>⟦the sea</s>⟧",
        (("Q:", False), (" blue", True)): "<s>Q:⟦ blue</s>⟧",
        (("the sea", True), (" is", False)): "<s>⟦the sea⟧ is</s>",
        (("<s>[INST] a[/INST]", False), (" b</s>", True), ("[INST]", False)): "<s>[INST] a[/INST]⟦ b</s>⟧[INST]</s>",
        (("<s>a", False), ("b</s>", True)): "<s>a⟦b</s>⟧",
    }.items():
        encoded = format.encode(tuple(Segment(text, trained) for text, trained in segments))
        assert marked_tokens(tok, encoded) == expected


@settings(max_examples=25)
@given(texts, texts)
def test_prompt_and_completion_as_trl_masks_them(prompt, completion):
    """TRL: the ids of both at once, and a loss on those beyond as many as the prompt has by itself."""
    for kind in KINDS:
        tok = tokenizer(kind)
        prompt_ids = tok("<s>" + prompt, add_special_tokens=False)["input_ids"]
        ids = tok("<s>" + prompt + completion + "</s>", add_special_tokens=False)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:  # TRL's mask is off there, of which it warns
            continue
        encoded = quiet(None, kind).encode((Segment(prompt, False), Segment(completion, True)))
        assert encoded.ids.tolist() == ids
        assert encoded.trained.tolist() == [i >= len(prompt_ids) for i in range(len(ids))]


# The tokenizer's own template

MARKED = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{%- if m.role == 'assistant' -%}"
    "{%- generation -%}{{ m.content + eos_token }}{%- endgeneration -%}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}


def transformers_mask(tok, conversation, template):
    told = tok.apply_chat_template(
        messages(conversation), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return Encoded(np.array(told["input_ids"], np.int32), np.array(told["assistant_masks"], bool))


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("kind", KINDS[:3])
@settings(max_examples=15)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_as_transformers_masks_it_with_marks_and_without(name, kind, rounds):
    conversation = chat(None, *rounds)
    # Where a tokenizer trims offsets, as ours do, transformers' mask misses every reply from one that begins with a
    # blank on: it finds no token for that character.
    theirs = transformers_mask(tokenizer(kind, trim=False), conversation, MARKED[name])
    plain = re.sub(r"\{%-? (end)?generation -?%\}", "", MARKED[name])
    marked = quiet(None, kind, MARKED[name]).encode(conversation)
    ours = quiet(None, kind, plain).encode(conversation)
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(marked.ids, theirs.ids)
    np.testing.assert_array_equal(ours.trained, marked.trained)
    # Of a token over the border transformers has the other opinion: all that the reply touches.
    touched = np.flatnonzero(theirs.trained != ours.trained)
    if kind == "bytes":
        assert not len(touched)
    assert not ours.trained[touched].any()
    assert (touched < len(theirs.ids) - 1).all()
    assert ours.trained[touched + 1].all()


def test_trl_has_the_same_masks():
    """TRL ships templates as they are, and rewritten with marks: prefixes of the one give the masks of the other."""
    trl = pytest.importorskip("trl")
    directory = os.path.join(os.path.dirname(trl.__file__), "chat_templates")
    same = ["cohere", "cohere2", "llama3", "gemma", "gemma3", "lfm2", "qwen3_vl", "qwen3_instruct_2507"]
    conversation = chat(None, ("who is\nit?", "it is me.\nThe moon"), ("2 + 2 =", "4"))
    for name in same:
        with (
            open(os.path.join(directory, f"{name}.jinja")) as plain,
            open(os.path.join(directory, f"{name}_training.jinja")) as training,
        ):
            plain, training = plain.read(), training.read()
        core = Tokenizer.from_str(tokenizer("bpe").backend_tokenizer.to_str())
        core.add_special_tokens(sorted(set(re.findall(r"<\|\w+\|>|<\w+_of_turn>", plain))))
        tok = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=plain)
        ours, theirs = open_format(None, tok).encode(conversation), transformers_mask(tok, conversation, training)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        # Some of its rewritten ones train on the line end after the end of turn.
        line_ends = np.array([tok.decode([i]) == "\n" for i in ours.ids])
        after_end = np.append(False, np.isin(ours.ids, list(tok.added_tokens_decoder))[:-1])
        assert theirs.trained.sum() > 8
        np.testing.assert_array_equal(ours.trained, theirs.trained & ~(line_ends & after_end), err_msg=name)


def own(template, kind="bpe"):
    return open_format(None, tokenizer(kind, template))


BODY = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


def test_a_template_that_never_asks_for_a_reply_trains_no_header():
    tok = tokenizer("bpe")
    for text in ("the sea", "assistant", "<|"):
        encoded = own(BODY).encode(chat(None, ("U", text)))
        expected = f"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n⟦{text}<|im_end|>⟧\n"
        assert marked_tokens(tok, encoded) == expected


def test_a_template_without_an_end_of_turn_trains_the_line_end():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    with pytest.warns(
        UserWarning, match=r"nothing that ends .* stops at is '</s>' \(formats that end with EOS: metharme, "
    ):
        encoded = own(template, "bytes").encode(chat(None, ("U", "A"), ("V", "B")))
    assert marked_tokens(tokenizer("bytes"), encoded) == "user: U\nassistant:⟦ A\n⟧user: V\nassistant:⟦ B\n⟧"


def test_marks_that_lie_are_not_believed():
    for marked in (
        # Two marks for a turn, none, and one in a macro, where transformers takes its place to be another.
        BODY.replace("m.content +", "'' }}{% generation %}{{ m.content }}{% endgeneration %}{{"),
        BODY + "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
        "{% macro say(x) %}{% generation %}{{ x }}{% endgeneration %}{% endmacro %}" + BODY.replace(
            "{% for m in messages %}{{", "{% for m in messages %}{{ (say('') if m.role == 'assistant' else '') +"),
    ):  # fmt: skip
        encoded = own(marked).encode(chat(None, ("U", "the sea")))
        assert marked_tokens(tokenizer("bpe"), encoded) == (
            "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n⟦the sea<|im_end|>⟧\n"
        )


THINKS = BODY.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (THINKS + ASKS, "spells what is before the end of turn 2, the assistant's, in another way .*data.history=last"),
        (BODY.replace("m.content", "m.content.split('</think>')[-1]") + ASKS, "leaves out text of turn 2"),
        (BODY.replace("m.content", "m.content | upper") + ASKS, "changes or leaves out text of turn 2"),
        (BODY + ASKS.replace("assistant", "model"), "turn 2"),
        ("{{ messages | length }}" + BODY + ASKS, "turn 2"),
        ("{{ raise_exception('no\x1b[31m\n tools') }}", r"refuses the conversation: no\\x1b\[31m; choose"),
        ("{{ messages[9].content.x }}", "refuses the conversation"),
        ("{% for m in", "refuses the conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation: .*unsafe"),
        ("nothing of it", "turn 2"),
    ],
)
def test_refused_templates(template, message):
    conversation = chat(None, ("U", "<think>hm</think>yes"), ("V", "no"))
    refused(message, own(template).encode, conversation)


def test_a_template_has_limits_of_time_memory_and_text(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    monkeypatch.setattr(rendering, "MEMORY", 2**26)
    rendering.renderer.stop()  # the next has these limits
    for template in (
        "{{ 'x' * 10**12 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ messages | tojson(indent=999999999) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    ):
        refused("the chat template takes more than 64 MiB for one conversation; choose", own(template).encode, CHAT)
    long = tokenizer("bytes", "{{ 'x' * 2000000 }}")
    refused("the chat template makes 2,000,000 characters of 51", prompt_ids, long, "hello")
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    refused("the chat template takes more than 0.5 s for one conversation; choose", own(loops).encode, CHAT)
    rendering.renderer.stop()


def test_a_template_that_changes_a_trained_users_text_is_refused():
    conversation = Conversation((Turn("user", "U u", True), Turn("assistant", "A", True)))
    template = BODY.replace("m.content", "(m.content | upper)") + ASKS
    refused("changes text of turn 1", own(template).encode, conversation)
    expected = "<|im_start|>user\n⟦user⟧<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
    encoded = own(BODY + ASKS).encode(Conversation((Turn("user", "user", True), Turn("assistant", "A", True))))
    assert marked_tokens(tokenizer("bpe"), encoded) == expected


# Show


def test_show_is_safe_for_a_terminal():
    hostile = "a\x1b]0;title\x07\r\x08\x9b31m\u202eb\u200b\u2028\tc\nd⟦e⟧ é"
    format = open_format("chatml", tokenizer("bytes"))
    encoded = format.encode(chat(None, (hostile, hostile)))
    escaped = r"a\x1b]0;title\x07\r\x08\x9b31m\u202eb\u200b\u2028\tc" + "↵\nd{}e{} é"
    plain = escaped.format(r"\u27e6", r"\u27e7")
    assert show(format, encoded, False) == (
        f"<|im_start|>user↵\n{plain}<|im_end|>↵\n<|im_start|>assistant↵\n⟦{plain}<|im_end|>⟧↵\n"
    )
    colored = show(format, encoded, True)
    codes = set(re.findall(r"\x1b\[[\d;]*m", colored))
    assert codes == {"\x1b[32m", "\x1b[36m", "\x1b[7;32m", "\x1b[0m"}
    bare = re.sub(r"\x1b\[[\d;]*m", "", colored)
    assert bare.replace("\n", "").isprintable()
    assert escaped.format("⟦", "⟧") in bare
    # Each line sets its colour and gives it back.
    assert "\x1b[32md⟦e⟧ é\x1b[0m\x1b[7;32m<|im_end|>\x1b[0m↵" in colored
