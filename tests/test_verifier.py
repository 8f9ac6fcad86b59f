"""A learned verifier: its labels, how good it is said to be, a run that trains one, and it as a guide."""

import itertools
import json
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import runs
from scipy.stats import mannwhitneyu

from jaxup import export, train
from jaxup.data.tokenizer import load_tokenizer
from jaxup.errors import UserError
from jaxup.experiments.answered import judged_by
from jaxup.learning.guides import open_guide
from jaxup.learning.problem import Problem, Written
from jaxup.learning.rewards import open_reward
from jaxup.learning.rounds import LABELS, Samples, by_steps, labelled, sample
from jaxup.learning.search import open_method
from jaxup.learning.search import run as search
from jaxup.learning.statistics import auc, best_of
from jaxup.learning.tasks import Own, open_task, tokenizer_for
from jaxup.learning.verifier import checked, label_rows, rollouts_of

TINY = [
    "--config=search_and_learn.py:smoke", "--config.model.hidden_size=16", "--config.model.intermediate_size=24",
    "--config.compute.unroll=1", "--config.pretrain.steps=2", "--config.pretrain.optimizer.warmup_steps=1",
    "--config.learn.task=countdown:3:steps", "--config.learn.train=40", "--config.learn.test=6", "--config.steps=4",
    "--config.learn.final_samples=4", "--config.learn.slots=16", "--config.learn.reward=random",
    "--config.learn.clone_rounds=0", "--config.learn.method=verdict", "--config.learn.labels=rollouts:2",
    "--config.learn.eval_every=1", "--config.optimizer.learning_rate=0.01", "--config.sample.tokens=0",
]  # fmt: skip


# ---- how good one is


def test_the_area_below_the_curve_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.3  # many are equal
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(scores[right], scores[~right])]
    # Sums of multiples of a half: exact.
    assert auc(scores, right) == sum(pairs) / len(pairs)
    of_scipy = mannwhitneyu(scores[right], scores[~right]).statistic / len(pairs)
    np.testing.assert_allclose(auc(scores, right), of_scipy, rtol=1e-14)
    assert (auc(right.astype(float), right), auc(np.zeros(40), right)) == (1, 0.5)
    assert math.isnan(auc(scores, np.ones(40, bool)))


def test_what_is_said_of_a_verifier():
    said, right = np.array([[0.9, 0.2, 0.6], [0.1, 0.3, 0.7]]), np.array([[1, 0, 1], [0, 0, np.nan]])
    found = judged_by(said, right)  # what cannot be verified does not count
    assert (found.auc, found.auc_within, found.accuracy, found.right) == (1, 1, 1, 2 / 5)
    np.testing.assert_allclose(found.brier, (0.1**2 + 0.2**2 + 0.4**2 + 0.1**2 + 0.3**2) / 5)


# ---- labels


def test_labels_stand_where_the_token_is_read():
    prompts, answers = [(1, 2), (3,)], [[4, 5, 6], [7]]
    labels = [np.array([np.nan, 0.25, 1.0]), np.array([0.0])]
    found = label_rows(prompts, answers, labels, 6)
    for row, (prompt, answer, of) in enumerate(zip(prompts, answers, labels, strict=True)):
        whole = [*prompt, *answer]
        assert found["tokens"][row, : len(whole)].tolist() == whole
        for place in range(6):
            known = len(prompt) <= place < len(whole) and not np.isnan(of[place - len(prompt)])
            assert found["loss_weights"][row, place] == known
            assert found["labels"][row, place] == (of[place - len(prompt)] if known else 0)


class Dice:
    """Writes by its keys: tokens are characters, the last of which ends a text."""

    alphabet = "12+\n$"

    def prefix(self, problem):
        return tuple(map(ord, problem.prompt))

    def write(self, asks):
        written = []
        for ask in asks:
            text = ""
            while len(text) < ask.max_tokens and not (text and text[-1] in ("$", ask.until)):
                place = len(ask.prefix) + len(text)
                text += self.alphabet[zlib.crc32(repr((ask.key, place)).encode()) % 5]
            numbers = np.array([*map(ord, text)], np.int32)
            said, ended = text.rstrip("$"), text.endswith("$")
            stopped = not ended and bool(ask.until) and ask.until in text
            of = np.full(len(text), -1.0, np.float32)
            written.append(Written(numbers, of, -of, said, ended, stopped))
        return written


def test_labels_of_steps_are_what_rollouts_from_there_are_worth():
    asked, problems = [], [Problem("a", "a"), Problem("b", "bb")]

    def worth(problem, text):
        asked.append((problem.id, text))
        return float(text.count("1") > text.count("2"))

    task = Own(name="dice", step="\n", train=problems, test=[], task=SimpleNamespace(verify=worth))
    reward, numbers = open_reward("outcome", task), np.array([1, 0])
    how = {"key": (7, 0), "count": 5, "max_tokens": 12}
    plain = sample(Dice(), task, reward, problems, numbers, **how)
    asked.clear()
    found = labelled(by_steps(Dice(), task, reward, problems, numbers, **how, rollouts=3))
    # They are the answers that are drawn without, in steps.
    assert found.texts == plain.texts
    np.testing.assert_array_equal(found.rewards_N, plain.rewards_N)
    assert [of.tolist() for of in found.tokens] == [of.tolist() for of in plain.tokens]
    rolled, drawn = iter(asked), sum(map(len, plain.tokens))
    steps = 0
    ids = [problems[number].id for number in numbers for _ in range(5)]
    labels = {}
    ends = sorted(
        (sum(t.tolist().count(10) for t in [tokens[:end]]), n, end)
        for n, tokens in enumerate(found.tokens)
        for end in np.flatnonzero(tokens == 10) + 1
        if end < 12
    )
    for _, n, end in ends:
        texts = [next(rolled) for _ in range(3)]
        begun = "".join(map(chr, found.tokens[n][:end]))
        assert all(name == ids[n] and text.startswith(begun) for name, text in texts)
        labels[n, end - 1] = np.float32(np.mean([text.count("1") > text.count("2") for _, text in texts]))
        drawn_here = [len(text) - len(begun) for _, text in texts]
        steps += sum(drawn_here)
    for n, of in enumerate(found.known[LABELS]):
        want = [labels.get((n, place), np.nan) for place in range(len(of))]
        want[-1] = found.rewards_N[n]
        np.testing.assert_array_equal(of, np.array(want, np.float32))
    assert len(ends) > 3
    assert len({*labels.values()}) > 1
    # What ends a text is a token too.
    assert drawn + steps <= found.facts["tokens"] <= drawn + steps + 3 * len(ends)


@pytest.mark.parametrize(
    ("labels", "reward", "step", "message"),
    [
        ("rollout:4", "outcome", "\n", "labels=rollout:4: is not one of outcome, rollouts:K"),
        ("rollouts:0", "outcome", "\n", "labels=rollouts:0"),
        ("outcome:2", "outcome", "\n", "labels=outcome:2"),
        ("rollouts:4", "outcome", "", "an answer to this task is one step"),
        ("outcome", "outcome+0.2*format", "\n", "labels are from 0 to 1, and what it says may be more"),
        ("outcome", "length:-0.01", "\n", "what it says may be other numbers"),
    ],
)
def test_labels_that_are_none(labels, reward, step, message):
    task = open_task("countdown:2", train=1, test=1, seed=0)
    with pytest.raises(UserError, match=message):
        rollouts_of(labels, open_reward(reward, task), step)
    assert rollouts_of("rollouts:8", open_reward("0.5*outcome+0.5*format", task), "\n") == 8
    with pytest.raises(UserError, match="a label of 2,"):
        checked(np.array([0.5, np.nan, 2]))


# ---- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("verifier")
    with runs.devices(1):
        train.main(["train", *TINY, f"--workdir={root / 'run'}"])
    return root / "run"


def test_a_run_trains_one(run):
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [row["by"] for row in rows] == ["verdict"] * 2
    samples = [Samples.load(path) for path in sorted((run / "rounds").glob("0*.npz"))]
    assert [row["labels"] for row in rows] == [np.isfinite(np.concatenate(s.known[LABELS])).sum() for s in samples]
    assert all("test_auc" in row and "kl" not in {k for k, v in row.items() if v == v} for row in rows)
    page, summary = (run / "ROUNDS.md").read_text(), (run / "SUMMARY.md").read_text()
    for said, where in [("answers are of the model as it began", page), ("| labels |", page), ("Brier score", summary)]:
        assert said in where
    tasks = json.loads((run / "tasks.json").read_text())
    assert {"pass_1_before", "verifier_auc", "verifier_auc_within", "verifier_accuracy", "verifier_brier"} <= {*tasks}
    assert "pass_1" not in tasks  # what became a verifier is not asked


def test_it_is_a_guide(run, capsys):
    """What it says is what the run said of the same answers: a few roundings of float32, in rows of another length."""
    guide = open_guide(f"learned:{run}@learned/4")
    tokenizer = load_tokenizer(str(run / "tokenizer"))
    guide.check(tokenizer)
    samples, tasks = Samples.load(run / "rounds" / "before.npz"), json.loads((run / "tasks.json").read_text())
    task = open_task("countdown:3:steps", train=40, test=6, seed=2357)
    prompts = [tuple(tokenizer(p.prompt)["input_ids"]) for p in task.test]

    class Kept:  # what was written is written again
        def prefix(self, problem):
            return prompts[[p.id for p in task.test].index(problem.id)]

        def write(self, asks):
            each = [samples.grouped(samples.tokens)[prompts.index(ask.prefix)][ask.key[-1]] for ask in asks]
            texts = [tokenizer.decode(of, skip_special_tokens=True) for of in each]
            return [Written(of, of * 0.0, of * 0.0, text, True, False) for of, text in zip(each, texts, strict=True)]

    most = max(map(len, samples.tokens))
    found = search(Kept(), task, task.test, open_method("best_of:4"), guide, budget=4 * most, max_tokens=most, seed=0)
    said = {(f.problem.id, node.tokens): node.value for f in found for node in f.samples}
    said_PN = np.array([
        [said[problem.id, tuple(map(int, of))] for of in group]
        for problem, group in zip(task.test, samples.grouped(samples.tokens), strict=True)
    ])  # fmt: skip
    right_PN = np.nan_to_num(samples.grouped(samples.right_N))
    np.testing.assert_allclose(judged_by(said_PN, right_PN).brier, tasks["verifier_brier"], rtol=1e-5)
    np.testing.assert_allclose(best_of(said_PN, right_PN, 4).mean(), tasks["best_of_4_learned"], atol=1e-9)
    assert np.ptp(said_PN) > 1e-3  # it has learned something


def test_an_export_says_that_its_head_is_not_in_it(run, tmp_path, capsys):
    export.main(["export", f"{run}@learned", str(tmp_path / "out")])
    assert "its head 'verdict' stays in the run's checkpoints" in capsys.readouterr().err


def test_guides_that_are_no_verifiers(run, tmp_path):
    for name, message in [
        (tmp_path, "there is no run of that name"), (f"{run}@before", "before is no verifier"),
        (f"{run}@pretrained", "pretrained is no verifier"), (f"{run}@learned/3", "no checkpoint of learned at step 3"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            open_guide(f"learned:{name}")
    with pytest.raises(UserError, match="unknown guide 'learned'"):
        open_guide("learned")
    other = tokenizer_for(open_task("brackets:4", train=2, test=2, seed=0))
    guide = open_guide(f"learned:{run}")
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        guide.check(other)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("learn.clone_rounds=1", "learn.clone_rounds=1: a verifier judges"),
        ("learn.labels=rollouts", "learn.labels=rollouts: is not one of"),
        ("data.seq_len=24", "data.seq_len=24"),
    ],
)
def test_what_a_user_may_get_wrong(flag, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train.main(["train", *TINY, f"--config.{flag}", f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
