"""The sampler: its log-probabilities against the trainer's pass and float64, and that a row is by itself to the bit."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from scipy import stats
from scipy.special import log_softmax

from jaxup.errors import UserError
from jaxup.model.config import LayerKind, ModelConfig
from jaxup.model.decoder import abstract, init
from jaxup.model.sampling import Request, Sampler, generate
from jaxup.model.sharding import param_shardings
from jaxup.training.sharding import MeshConfig, make_mesh

LLAMA = ModelConfig.llama(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=256
)
WINDOWED = dataclasses.replace(LLAMA, kinds=(LayerKind(window=5), LayerKind()))
GPT2 = ModelConfig.gpt2(vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, max_positions=100, bias=True)
HOW = dict(slots=4, length=100, temperature=0.9, top_k=30, top_p=0.95, vocab_size=60)
LENGTHS = (5, 40, 1, 17, 33)


@functools.cache
def params_of(config):
    noise = jax.jit(init, static_argnums=0)(config, 0)
    return jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, noise)  # or all contexts give nearly the same logits


@functools.cache
def sampler(config=LLAMA, **changes):
    return Sampler(config, params_of(config), **{**HOW, **changes})


@functools.cache
def prompts():
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(2, 60, length).tolist()) for length in LENGTHS]


def requests(count=3, max_tokens=12, ends=frozenset()):
    """So many samples of each prompt, of which one in two ends early."""
    return [
        Request(prompt, (7, number, sample), max_tokens - 5 * (sample % 2), ends)
        for number, prompt in enumerate(prompts())
        for sample in range(count)
    ]


@functools.cache
def forward(config):
    return jax.jit(lambda params, tokens: nnx.merge(abstract(config)[0], params)(tokens))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def restricted(logits, temperature, top_k, top_p):
    """Log-probabilities in float64 of the distribution over the last axis, -inf for what is left out."""
    logits = log_softmax(logits.astype(np.float64) / temperature)
    if top_k:
        logits = np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)
    order = np.argsort(-logits)
    before = np.cumsum(np.exp(log_softmax(logits))[order]) - np.exp(log_softmax(logits))[order]
    logits[order[before >= top_p]] = -np.inf
    return log_softmax(logits)


# ---- what is drawn, and from which distribution


@pytest.mark.parametrize(
    ("config", "changes"),
    [(LLAMA, {}), (LLAMA, {"top_k": 0, "top_p": 1.0, "temperature": 1.0}), (WINDOWED, {"top_p": 1.0}), (GPT2, {})],
    ids=["llama", "plain", "windowed", "gpt2"],
)
def test_log_probabilities_are_the_trainers_of_the_restricted_distribution(config, changes):
    asked, how = requests(), {**HOW, **changes}
    drawn = sampler(config, **changes)(asked)
    rows = np.zeros((len(asked), 64), np.int32)
    for row, request, got in zip(rows, asked, drawn):
        assert got.tokens.dtype == np.int32
        assert len(got.tokens) == len(got.logp) == len(got.entropy) == request.max_tokens
        text = [*request.prefix, *got.tokens]
        row[: len(text)] = text
    logits = np.asarray(forward(config)(params_of(config), rows))[:, :, :60]
    for row, request, got in zip(logits, asked, drawn):
        for i, token in enumerate(got.tokens):
            want = restricted(row[len(request.prefix) - 1 + i], how["temperature"], how["top_k"], how["top_p"])
            # Sums of 16 and 24 products of numbers near 1, in another order: some 1e-6 of logits of up to 20.
            np.testing.assert_allclose(got.logp[i], want[token], atol=1e-4)
            kept = want[np.isfinite(want)]
            np.testing.assert_allclose(got.entropy[i], -(np.exp(kept) * kept).sum(), atol=1e-4)
    assert len({got.tokens.tobytes() for got in drawn}) > 10


@pytest.mark.parametrize("prompt", [0, 3])
def test_draws_follow_the_distribution(prompt):
    """2,048 samples of one prompt, which is computed once."""
    how = {"top_k": 0, "top_p": 1.0, "temperature": 2.0, "slots": 256}
    drawn = sampler(**how)([Request(prompts()[prompt], (3, i), 1) for i in range(2048)])
    row = np.zeros((15, 64), np.int32)
    row[0, : LENGTHS[prompt]] = prompts()[prompt]
    logits = np.asarray(forward(LLAMA)(params_of(LLAMA), row))[0, LENGTHS[prompt] - 1, :60]
    expected = 2048 * np.exp(restricted(logits, 2.0, 0, 1.0))
    counts = np.bincount([int(got.tokens[0]) for got in drawn], minlength=60)
    few = expected < 5  # together, as chi-square wants
    counts, expected = (np.append(x[~few], x[few].sum() if few.any() else []) for x in (counts, expected))
    assert len(counts) > 5
    assert stats.chisquare(counts, expected, sum_check=False).pvalue > 0.01


def test_the_likeliest_token_at_temperature_0_is_certain():
    greedy = sampler(temperature=0.0, top_k=0, top_p=1.0)(requests(count=2))
    for first, second in zip(greedy[::2], greedy[1::2]):
        assert not np.any([*first.logp, *first.entropy])
        assert np.array_equal(first.tokens[:7], second.tokens)
    how = dict(max_tokens=7, temperature=0.0, top_k=0, seed=0, vocab_size=60)
    steps = generate(LLAMA, params_of(LLAMA), prompts(), **how)
    assert np.stack(list(steps), axis=1).tolist() == [got.tokens.tolist() for got in greedy[1::2]]


def test_a_row_is_what_generate_draws_under_its_key_and_goes_on_where_it_was_broken_off():
    how = {name: HOW[name] for name in ("temperature", "top_k", "top_p", "vocab_size")}
    streamed = np.stack(list(generate(LLAMA, params_of(LLAMA), prompts(), max_tokens=12, seed=7, **how)), axis=1)
    drawn = sampler()([Request(prompt, (7, row), 12) for row, prompt in enumerate(prompts())])
    assert streamed.tolist() == [got.tokens.tolist() for got in drawn]
    rest = sampler()(
        [Request((*prompt, *got.tokens[:5]), (7, row), 7) for row, (prompt, got) in enumerate(zip(prompts(), drawn))]
    )
    assert [got.tokens.tolist() for got in rest] == streamed[:, 5:].tolist()


# ---- a row by itself


def test_neighbours_order_and_queue_change_no_bit():
    """Prefixes are shared in the first call, and each row is refilled some times; alone nothing is shared."""
    first = sampler()(asked := requests())
    ends = frozenset(int(got.tokens[2]) for got in first[:3])
    asked = [request._replace(ends=ends) for request in asked]
    together = sampler()(asked)
    assert {len(got.tokens) for got in together} > {3}
    assert [got.ended for got in together] == [bool({*got.tokens.tolist()} & ends) for got in together]
    for got, whole in zip(together, first, strict=True):  # an end ends it, and changes nothing before
        assert same(got[:3], [x[: len(got.tokens)] for x in whole[:3]])
        assert not ends & {*got.tokens[:-1].tolist()}
    order = np.random.default_rng(1).permutation(len(asked))
    for number, got in zip(order, sampler()([asked[i] for i in order]), strict=True):
        assert same(got, together[number])
    for i in (0, 4, 8, 14):
        assert same(sampler()([asked[i]])[0], together[i])


def test_what_is_not_finite_stays_in_its_row():
    broken = jax.tree.map(np.array, params_of(LLAMA))
    broken["embed_tokens"][61] = np.inf
    poisoned = Sampler(LLAMA, broken, **HOW)
    asked = requests(count=1)
    bad = [Request((61,) * 30, (0, i), 30) for i in range(4)]
    assert np.isnan(poisoned(bad)[0].logp).all()
    assert all(map(same, poisoned([*bad, *asked])[4:], sampler()(asked)))


def test_nothing_is_asked_and_nothing_drawn():
    assert sampler()([]) == []
    empty, full = sampler()([Request((3,), (1,), 0), Request((3,), (1,), 2)])
    assert (len(empty.tokens), empty.ended, len(full.tokens)) == (0, False, 2)


def test_what_is_cut_is_over_and_all_that_was_drawn_is_counted():
    asked = [Request(prompts()[0], (5, i), 80) for i in range(9)]
    whole = sampler()(asked)
    counted, seen = sampler().drawn, []

    def cut(index, tokens):
        return 10 if index % 2 and len(tokens) >= 10 else None

    drawn = sampler()(asked, cut=cut, progress=lambda *numbers: seen.append(numbers))
    for index, (got, all_of_it) in enumerate(zip(drawn, whole, strict=True)):
        assert same(got[:3], [x[: 10 if index % 2 else 80] for x in all_of_it[:3]])
    assert seen[-1] == (9, sampler().drawn)
    assert len(seen) > 4
    assert sampler().drawn - counted >= sum(len(got.tokens) for got in drawn)

    def interrupt(*numbers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler()(asked, progress=interrupt)
    assert all(map(same, sampler()(asked), whole))


# ---- other models and other devices


def test_an_order_is_the_model_that_it_describes():
    repeated = dataclasses.replace(LLAMA, num_layers=3, kinds=(LayerKind(),) * 3)
    params = params_of(LLAMA)
    built = params | {"blocks": jax.tree.map(lambda a: a[np.array([0, 1, 1])], params["blocks"])}
    asked = requests(count=1)
    by_order = Sampler(LLAMA, params, order=[0, 1, 1], **HOW)(asked)
    for got, want in zip(by_order, Sampler(repeated, built, **HOW)(asked), strict=True):
        assert got.tokens.tolist() == want.tokens.tolist()
        np.testing.assert_allclose(got.logp, want.logp, atol=1e-4)


def test_a_mesh_gives_the_same_tokens():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params_of(LLAMA), param_shardings(LLAMA, mesh))
    over = Sampler(LLAMA, placed, **HOW)
    for got, want in zip(over(requests()), sampler()(requests()), strict=True):
        assert got.tokens.tolist() == want.tokens.tolist()
        np.testing.assert_allclose(got.logp, want.logp, atol=1e-4)
    (state,) = over._states.values()
    assert len({str(shard.index) for shard in state.cache.k_LBKTH.addressable_shards}) == 8


def test_other_parameters_by_the_same_programs():
    other = jax.tree.map(lambda a: a * 1.1, params_of(LLAMA))
    want = Sampler(LLAMA, other, **HOW)(requests(count=1))
    assert all(map(same, sampler().with_params(other)(requests(count=1)), want))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), (0,), 3), "the prompt has no tokens"),
        (Request((3, 64), (0,), 3), "the prompt has the token 64, the model those up to 63"),
        (Request((3,) * 98, (0,), 3), "98 tokens and 3 new ones are more than the 100 of a text"),
    ],
)
def test_requests_that_cannot_be(request_, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sampler()([request_])


def test_texts_longer_than_the_learned_positions():
    with pytest.raises(UserError, match="texts of 101 tokens, and the model has 100 positions"):
        Sampler(GPT2, {}, **{**HOW, "length": 101})
