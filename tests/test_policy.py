"""A policy: prompts as tokens, where answers stop, and what is counted."""

import functools

import jax
import numpy as np
import pytest

from jaxup.data.chat_formats import prompt_ids
from jaxup.data.tokenizer import train_bpe
from jaxup.errors import UserError
from jaxup.learning.policy import Policy
from jaxup.learning.problem import Ask, Problem
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import init

KNOWN = ["the cat sat on the mat , and it sat  well .", "don't  you think so ?"]
CONFIG = ModelConfig.llama(
    vocab_size=320, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=2, max_positions=128
)
PROBLEM = Problem("a", "the cat")


@functools.cache
def tokenizer():
    return train_bpe(KNOWN, 290)


@functools.cache
def policy(**changes):
    params = jax.jit(init, static_argnums=0)(CONFIG, 0)
    how = dict(ends=(tokenizer().eos_token_id,), temperature=1.0, top_k=0, top_p=1.0, slots=4, length=96)
    return Policy(CONFIG, params, tokenizer(), **{**how, "vocab_size": len(tokenizer()), **changes})


def ask(sample=0, max_tokens=40, until="", prefix=None):
    return Ask(policy().prefix(PROBLEM) if prefix is None else prefix, (1, 2, sample), max_tokens, until)


def decode(tokens):
    return tokenizer().decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@functools.cache
def drawn():
    """Bytes in any order, from a model that has learned nothing."""
    return policy().write([ask(sample) for sample in range(16)])


def test_texts_are_those_of_the_tokens_without_their_end():
    for written in drawn():
        assert written.text == decode(written.tokens[: len(written.tokens) - written.ended])
        assert written.ended == (written.tokens[-1] == tokenizer().eos_token_id)
        assert not written.stopped
        assert written.ended or len(written.tokens) == 40
    assert len({written.text for written in drawn()}) == 16
    end = int(drawn()[0].tokens[3])
    (early,) = policy(ends=(end,)).write([ask(0)])
    assert (early.ended, early.tokens.tolist()) == (True, drawn()[0].tokens[:4].tolist())
    assert early.text == decode(early.tokens[:-1])


def test_a_token_that_is_no_text_is_seen_in_an_answer():
    end, other = tokenizer().eos_token_id, 289
    answers = policy(ends=(other,)).write([ask(sample) for sample in range(16)])
    having = [written for written in answers if end in written.tokens]
    assert having  # one in 290 of their tokens
    assert all(tokenizer().eos_token in written.text for written in having)


def test_until_is_looked_for_across_tokens_and_cut_at_the_one_that_completes_it():
    """What is asked to end with a piece of what it writes anyhow: characters of one token, and of two or three."""
    asks, wanted = [], []
    for sample, written in enumerate(drawn()):
        for start, width in ((2, 1), (4, 2), (6, 3)):
            until = written.text[start : start + width]
            if "\N{REPLACEMENT CHARACTER}" in until or not until:
                continue
            counts = range(1, len(written.tokens) + 1)
            asks.append(ask(sample, until=until))
            wanted.append((written, next(n for n in counts if until in decode(written.tokens[:n]))))
    assert len(asks) > 12
    before = policy().tokens_drawn
    found = policy().write(asks)
    for got, (whole, count), asked in zip(found, wanted, asks, strict=True):
        assert (got.stopped, got.ended) == (True, False)
        assert asked.until in got.text
        for mine, its in zip(got[:3], whole[:3]):
            assert np.array_equal(mine, its[:count])
    assert policy().tokens_drawn - before >= sum(len(got.tokens) for got in found)


def test_a_text_goes_on_after_a_step_under_the_same_key():
    whole = drawn()[3]
    step = tuple(whole.tokens[:9].tolist())
    (rest,) = policy().write([ask(3, 31, prefix=(*policy().prefix(PROBLEM), *step))])
    assert rest.tokens.tolist() == whole.tokens[9:].tolist()
    if not decode(step).endswith("\N{REPLACEMENT CHARACTER}"):
        assert decode(step) + rest.text == whole.text


def test_an_answer_ends_where_there_is_no_room():
    long = (*policy().prefix(PROBLEM), *[40] * 80)
    cut, none = policy().write([ask(prefix=long, max_tokens=99), ask(prefix=(40,) * 96)])
    assert len(long) + len(cut.tokens) == 96 or cut.ended
    assert (none.text, none.tokens.tolist(), none.ended, none.stopped) == ("", [], False, False)


def test_prompts_as_they_are_and_as_a_user_says_them():
    assert decode(policy().prefix(PROBLEM)) == "the cat"
    spoken = train_bpe(KNOWN, 290)
    spoken.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    chat = Policy(
        CONFIG, jax.jit(init, static_argnums=0)(CONFIG, 0), spoken, ends=(), temperature=1.0, top_k=0, top_p=1.0,
        vocab_size=290, slots=4, length=96, chat=True,
    )  # fmt: skip
    assert decode(chat.prefix(PROBLEM)) == "[user]the cat[assistant]"
    assert chat.prefix(PROBLEM) == tuple(prompt_ids(spoken, "the cat"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"problem b: the prompt has no tokens"),
        ("don't " * 40, r"problem b: a prompt of \d+ tokens, and a text has 96 with its answer"),
    ],
)
def test_prompts_that_leave_no_room(prompt, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        policy().prefix(Problem("b", prompt))


def test_other_parameters_draw_by_their_own_probabilities_and_the_count_goes_on():
    other = policy().with_params(jax.jit(init, static_argnums=0)(CONFIG, 1))
    before = other.tokens_drawn
    assert before == policy().tokens_drawn > 0
    (text,) = other.write([ask(0)])
    assert not np.array_equal(text.logp, drawn()[0].logp)
    assert other.tokens_drawn == before + len(text.tokens)
