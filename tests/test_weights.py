"""What samples weigh: closed forms, the plainest sums, and what must not matter."""

import dataclasses
import itertools

import numpy as np
import pytest

from jaxup.errors import UserError
from jaxup.learning.weights import METHODS, Method, advantages, gae, pairs, spread, terminal, whitened

GRPO = dataclasses.replace(METHODS["grpo"], eps=1e-300)


def weigh(method, rewards, scored=None, texts=None):
    rewards = np.asarray(rewards, np.float64)
    scored = np.ones(rewards.shape, bool) if scored is None else np.asarray(scored)
    texts = texts or [[f"{p} {g}" for g in range(rewards.shape[1])] for p in range(rewards.shape[0])]
    return advantages(METHODS[method] if isinstance(method, str) else method, rewards, scored, texts)


def test_group_advantages_of_right_and_wrong_in_closed_form():
    G = 8
    for right in range(G + 1):
        found = weigh(GRPO, [[1.0] * right + [0.0] * (G - right)])[0]
        p = right / G
        if right in (0, G):
            assert (found == 0).all()
            continue
        high, low = np.sqrt((1 - p) * (G - 1) / (p * G)), -np.sqrt(p * (G - 1) / ((1 - p) * G))
        np.testing.assert_allclose(found, [high] * right + [low] * (G - right), rtol=1e-14)
        assert abs(found.sum()) < 1e-14
        if right == 1:
            np.testing.assert_allclose(found[:2], [2.475, -0.354], atol=5e-4)


def test_group_advantages_do_not_depend_on_the_scale_of_rewards_and_doctor_grpos_do():
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    np.testing.assert_allclose(weigh(GRPO, 4 * rewards - 2), weigh(GRPO, rewards), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weigh("drgrpo", 4 * rewards - 2), 4 * weigh("drgrpo", rewards), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weigh("drgrpo", rewards), rewards - rewards.mean(1, keepdims=True), atol=1e-15)
    np.testing.assert_allclose(
        weigh("grpo", rewards),
        (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4), rtol=1e-13,
    )  # fmt: skip
    of_batch = weigh(dataclasses.replace(GRPO, scale="batch"), rewards)
    np.testing.assert_allclose(of_batch * rewards.std(ddof=1), weigh("drgrpo", rewards), atol=1e-14)


def test_equal_rewards_weigh_nothing_whatever_their_mean_is_rounded_to():
    rewards = np.full((1, 3), 0.1)
    assert (rewards - rewards.mean(1) != 0).any(), "or this says nothing"
    assert (weigh(GRPO, rewards) == 0).all()
    assert not spread(rewards, np.ones((1, 3), bool)).any()


def test_a_leave_one_out_baseline_is_the_mean_of_the_others_and_is_not_divided():
    rewards = np.random.default_rng(1).normal(size=(3, 5))
    others = [[np.delete(row, g).mean() for g in range(5)] for row in rewards]
    np.testing.assert_allclose(weigh("rloo", rewards), rewards - others, atol=1e-14)
    # G / (G - 1) times what the mean of all would give.
    np.testing.assert_allclose(weigh("rloo", rewards), 5 / 4 * weigh("drgrpo", rewards), atol=1e-14)
    with pytest.raises(UserError, match=r"^scale=group: a leave-one-out baseline is not divided by a deviation"):
        dataclasses.replace(METHODS["rloo"], scale="group", eps=1e-4)


def test_reinforce_has_the_batchs_mean_or_none():
    rewards = np.random.default_rng(2).normal(size=(3, 4))
    np.testing.assert_allclose(weigh("reinforce", rewards), rewards - rewards.mean(), atol=1e-15)
    np.testing.assert_array_equal(weigh(Method(advantage="plain"), rewards), rewards)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.advantage])
def test_what_cannot_be_scored_weighs_nothing_and_changes_nothing(method):
    """As if it were not there, whatever its number is."""
    rewards = np.array([[1.0, 0.0, 0.3, 1.0], [0.0, 1.0, 1.0, 0.2]])
    scored = np.ones((2, 5), bool)
    scored[:, 2] = False
    for nothing in (np.nan, 1e9):
        found = weigh(method, np.insert(rewards, 2, nothing, axis=1), scored)
        assert (found[:, 2] == 0).all()
        np.testing.assert_allclose(np.delete(found, 2, axis=1), weigh(method, rewards), rtol=1e-13, atol=1e-15)
    assert (weigh(method, rewards, np.zeros((2, 4), bool)) == 0).all()
    with pytest.raises(UserError, match=r"^a reward that counts as scored is not finite$"):
        weigh(method, [[np.nan, 1.0]])


@pytest.mark.parametrize("method", ["rloo", "grpo", "drgrpo"])
def test_one_sample_that_is_scored_has_nothing_to_be_compared_with(method):
    assert (weigh(method, [[3.0, 0.0]], [[True, False]]) == 0).all()


def test_rejection_keeps_right_answers_each_once_and_so_many_of_a_problem():
    rewards = [[1.0, 0.0, 1.0, 0.5, 1.0], [0.0, 0.0, 0.0, -1.0, 0.0]]
    texts = [["a", "b", "a", "c", "d"], ["a", "b", "c", "d", "e"]]
    keep = lambda cap, scored=None: weigh(dataclasses.replace(METHODS["reject"], cap=cap), rewards, scored, texts)  # noqa: E731
    np.testing.assert_array_equal(keep(0), [[1, 0, 0, 1, 1], [0] * 5])
    np.testing.assert_array_equal(keep(2), [[1, 0, 0, 1, 0], [0] * 5])
    # Where the first of two equal texts is not scored, the other is kept.
    np.testing.assert_array_equal(keep(1, np.arange(10).reshape(2, 5) > 0), [[0, 0, 1, 0, 0], [0] * 5])


def test_advantages_of_tokens_by_their_definition():
    """Sums of (gamma lam)^l delta; masks with what is no answer before, after and in between."""
    rng = np.random.default_rng(3)
    rewards, values = rng.normal(size=(3, 9)), rng.normal(size=(3, 9))
    mask = np.array([[0, 0, 1, 1, 1, 1, 0, 0, 0], [1] * 9, [0, 1, 1, 0, 0, 1, 0, 1, 0]])
    found, returns = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    for row in range(3):
        at = np.flatnonzero(mask[row])
        after = [*values[row, at[1:]], 0.0]
        deltas = rewards[row, at] + 0.9 * np.array(after) - values[row, at]
        want = [sum((0.9 * 0.7) ** (i - t) * deltas[i] for i in range(t, len(at))) for t in range(len(at))]
        np.testing.assert_allclose(found[row, at], want, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(returns, np.where(mask, found + values, 0))
    assert (found[mask == 0] == 0).all()


def test_of_gamma_and_lambda_1_a_return_is_what_is_still_to_come():
    mask = np.array([[0, 1, 1, 1, 0]])
    rewards = terminal(np.array([2.5]), mask)
    np.testing.assert_array_equal(rewards, [[0, 0, 0, 2.5, 0]])
    found, returns = gae(rewards, np.array([[9.0, 1.0, -1.0, 0.5, 9.0]]), mask, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, 2.5 * mask)
    np.testing.assert_allclose(found, [[0, 1.5, 3.5, 2.0, 0]])
    assert (terminal(np.array([1.0]), np.zeros((1, 4))) == 0).all()


def test_a_potential_moves_returns_by_that_of_the_beginning_and_no_group_advantage():
    """Ng, Harada & Russell 1999: r + phi(s') - phi(s), where the end has the potential 0."""
    rng = np.random.default_rng(4)
    rewards, phi = rng.normal(size=(4, 6)), np.insert(rng.normal(size=(4, 5)), 0, 0.8, axis=1)
    shaped = rewards + np.append(phi[:, 1:], np.zeros((4, 1)), axis=1) - phi
    np.testing.assert_allclose(shaped.sum(1), rewards.sum(1) - 0.8, atol=1e-14)
    np.testing.assert_allclose(weigh("grpo", [shaped.sum(1)]), weigh("grpo", [rewards.sum(1)]), atol=1e-12)


def test_whitened_tokens():
    rng = np.random.default_rng(5)
    given, mask = rng.normal(size=(3, 7)), rng.random((3, 7)) < 0.6
    found = whitened(given, mask, 1e-8)
    np.testing.assert_allclose([found[mask].mean(), found[mask].std()], [0, 1], atol=1e-7)
    assert abs(np.corrcoef(found[mask], given[mask])[0, 1] - 1) < 1e-12
    assert (found[~mask] == 0).all()
    assert (whitened(given, np.zeros((3, 7)), 1e-8) == 0).all()


def test_pairs_are_the_best_and_the_worst_where_they_are_apart():
    scores = np.array([[0.2, 0.9, 0.9, 0.1], [0.5, 0.5, 0.5, 0.5], [1.0, 0.4, 0.6, 0.5], [1.0, 0.0, 0.5, 0.5]])
    texts = [list("abcd"), list("abcd"), list("abcd"), list("aabb")]
    scored = np.ones((4, 4), bool)
    np.testing.assert_array_equal(pairs(scores, scored, texts, 0.0), [[0, 1, 3], [2, 0, 1]])
    np.testing.assert_array_equal(pairs(scores, scored, texts, 0.7), [[0, 1, 3]])
    scored[0, 1] = scored[2, 1] = False
    np.testing.assert_array_equal(pairs(scores, scored, texts, 0.0), [[0, 2, 3], [2, 0, 3]])
    assert pairs(scores, np.zeros((4, 4), bool), texts, 0.0).shape == (0, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"advantage": "grop"}, r"^advantage=grop: not known; did you mean 'group'"),
        ({"scale": "std"}, r"^scale=std: is not one of none, group, batch$"),
        ({"scale": "group", "eps": 1e-4}, r"^scale=group: tokens have no group; scale=batch, or none$"),
        ({"scale": "batch"}, r"^eps=0: must be above 0 where advantages are divided"),
        ({"normaliser": "mean"}, r"^normaliser=mean: is not one of"),
        ({"ratio": "gspo"}, r"^ratio=gspo: is not one of none, token, sequence, product$"),
    ],
)
def test_what_is_no_method_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Method(**fields)


def test_the_expected_gradient_has_no_bias_by_leave_one_out_and_has_one_by_the_groups_mean():
    """All pairs of samples of three answers: the mean of A * grad log pi is the gradient, or (G - 1) / G of it."""
    chance, rewards = np.array([0.2, 0.5, 0.3]), np.array([1.0, 0.0, 0.4])
    exact = chance * (rewards - chance @ rewards)
    for method, factor in (("rloo", 1.0), ("drgrpo", 1 / 2)):
        total = np.zeros(3)
        for drawn in itertools.product(range(3), repeat=2):
            A = weigh(method, [rewards[list(drawn)]])[0]
            each = [a * (np.eye(3)[i] - chance) for a, i in zip(A, drawn, strict=True)]
            total += chance[list(drawn)].prod() * np.mean(each, axis=0)
        np.testing.assert_allclose(total, factor * exact, atol=1e-15)
