"""What samples are worth: each reward, what is added of several, and what cannot be said."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxup.errors import UserError
from jaxup.learning.problem import Problem
from jaxup.learning.rewards import Score, open_reward
from jaxup.learning.tasks import open_task

TASK = open_task("countdown:4:steps", train=20, test=10, seed=0)
PROBLEM = TASK.train[0]
RIGHT = PROBLEM.solution
LINES = RIGHT.split("\n")
LATE = "\n".join([*LINES[:2], "1+1=3"])  # wrong at its last step


def value(spec, text, task=TASK, problem=PROBLEM):
    return open_reward(spec, task).score(problem, [text])[0].value


def test_each_reward():
    assert [value("outcome", text) for text in (RIGHT, LATE, "")] == [1, 0, 0]
    assert [value("process", text) for text in (RIGHT, LATE, "", LINES[0])] == pytest.approx([1, 2 / 3, 0, 1 / 3])
    assert [value("format", text) for text in (RIGHT, LATE, "")] == [1, 1, 0]
    assert [value("length:-0.01", text) for text in ("", "a" * 50)] == [0, -0.5]
    assert {value("shaped", text) for text in (RIGHT, LATE, "", "x\n" * 9)} == {-1}


def test_several_rewards():
    reward = open_reward("outcome + 0.2*format+-.5*length:2", TASK)
    score = reward.score(PROBLEM, [RIGHT, "x"])
    assert score[0].value == pytest.approx(1.2 - len(RIGHT))
    assert score[0].parts == {"outcome": 1, "format": 1, "length:2": 2 * len(RIGHT)}
    assert score[1] == Score(-1.0, {"outcome": 0, "format": 0, "length:2": 2}, None)


def test_steps_are_credited():
    reward = open_reward("outcome+shaped", TASK)
    right, late, early = reward.score(PROBLEM, [RIGHT, LATE, f"9+9=9\n{LATE}"])
    assert right.steps == [0, 0, 0]  # phi falls from 1 to 0 at the end, where the outcome pays 1
    assert late.steps == [0, 0, -1]
    assert early.steps == [-1, 0, 0, 0]
    by_process = open_reward("0.5*process+outcome", TASK).score(PROBLEM, [RIGHT])[0]
    assert by_process.steps == pytest.approx([1 / 6, 1 / 6, 7 / 6])


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=2, max_size=6), st.randoms())
def test_shaping_moves_every_return_alike(paths, draw):
    """Whatever steps are worth, by -phi(start) (Ng, Harada and Russell 1999); so no group's advantages change."""
    outcomes = {str(i): draw.random() for i in range(len(paths))}
    task = SimpleNamespace(
        name="any", step="\n", train=[PROBLEM], test=[], verify=lambda _, text: outcomes[text],
        steps=lambda _, text: paths[int(text)], final=lambda _, text: text,
    )  # fmt: skip
    plain, shaped = (open_reward(spec, task).score(PROBLEM, list(outcomes)) for spec in ("outcome", "outcome+shaped"))
    for before, after, path in zip(plain, shaped, paths):
        assert len(after.steps) == len(path)
        # Each of at most 8 steps is a difference of numbers up to 1, rounded once, as is their sum.
        assert after.value == pytest.approx(before.value - 1, abs=1e-14)
        assert math.fsum(after.steps) == pytest.approx(after.value, abs=1e-14)


def test_draws_are_of_the_problem_and_the_answer():
    texts = [str(i) for i in range(2000)]
    drawn = [score.value for score in open_reward("random", TASK).score(PROBLEM, texts)]
    assert drawn == [open_reward("random", TASK).score(PROBLEM, [text])[0].value for text in texts]
    assert drawn != [score.value for score in open_reward("random", TASK).score(TASK.train[1], texts)]
    assert set(drawn) == {0, 1}
    # A fair coin is so far from even once in a million.
    assert scipy.stats.binomtest(int(sum(drawn)), len(drawn)).pvalue > 1e-6


def test_a_noisy_verdict():
    right = [TASK.verify(problem, problem.solution) for problem in TASK.train]
    assert set(right) == {1}
    assert {value("noisy:1:0", text) for text in (RIGHT,)} == {1}
    assert {value("noisy:1:0", text) for text in (LATE, "")} == {0}
    texts = [f"{RIGHT}{' ' * (i % 50)}" + "\n" * (i // 50) for i in range(1000)]  # right, and each different
    for truth, answers, rate in ((1, texts, 0.9), (0, ["x" + text for text in texts], 0.2)):
        assert {TASK.verify(PROBLEM, text) for text in answers} == {truth}
        said = [score.value for score in open_reward("noisy:0.9:0.2", TASK).score(PROBLEM, answers)]
        assert scipy.stats.binomtest(int(sum(said)), len(said), rate).pvalue > 1e-6


def test_what_cannot_be_said():
    """A function that raises or says NaN costs its sample and is named; None costs it as well, and is no failure."""
    said = {
        "none": None,
        "nan": math.nan,
        "inf": math.inf,
        "text": "1",
        "list": [1],
        "numpy": np.float32(0.5),
        "bool": True,
        "big": 1e308,
    }
    task = SimpleNamespace(
        name="any", step="", train=[PROBLEM], test=[], verify=lambda _, text: said[text],
        steps=lambda _, text: [1.0, said[text]], final=lambda _, text: text,
    )  # fmt: skip
    reward = open_reward("outcome+0.5*format", task)
    values = {text: score.value for text, score in zip([*said, "raise"], reward.score(PROBLEM, [*said, "raise"]))}
    assert values == dict.fromkeys(["none", "nan", "inf", "text", "list", "raise"]) | {
        "numpy": 1.0,
        "bool": 1.5,
        "big": 1e308,
    }
    assert reward.failed == {"outcome: not a finite number": 3, "outcome: TypeError": 1, "outcome: KeyError": 1}
    assert open_reward("9*outcome", task).score(PROBLEM, ["big"])[0].value is None
    assert reward.score(PROBLEM, ["none"])[0].parts == {"outcome": None, "format": 1}
    reward = open_reward("process", task)
    assert [score.value for score in reward.score(PROBLEM, ["none", "nan", "raise", "numpy"])] == [
        None,
        None,
        None,
        0.75,
    ]
    assert reward.failed == {"process: not a finite number": 1, "process: KeyError": 1}


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def short(problem, text):\n    return 1 / (len(text) - 1)\n\n"
        "def task(train, test, seed):\n    from types import SimpleNamespace\n"
        "    from jaxup.learning.problem import Problem\n"
        "    return SimpleNamespace(train=[Problem('a', 'a')], test=[], verify=lambda problem, text: 1 / len(text))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = open_reward("outcome+2*own_rewards:short", TASK)
    scores = reward.score(PROBLEM, ["abc", "a"])
    assert [score.value for score in scores] == [1, None]
    assert reward.failed == {"own_rewards:short: ZeroDivisionError": 1}
    task = open_task("own_rewards:task", train=1, test=0, seed=0)
    reward = open_reward("outcome", task)
    assert [score.value for score in reward.score(Problem("a", "a"), ["ab", ""])] == [0.5, None]
    assert reward.failed == {"own_rewards:task: ZeroDivisionError": 1}
    assert [score.value for score in open_reward("process", task).score(Problem("a", "a"), ["ab", ""])] == [0.5, None]


@given(st.text())
def test_any_text_has_its_worth(text):
    for score in open_reward("outcome+process+shaped+format+length:1+random+noisy:.5:.5", TASK).score(PROBLEM, [text]):
        # The mean of steps may be rounded: up to a few units in the last place of numbers near `length`.
        assert math.fsum(score.steps) == pytest.approx(score.value, abs=1e-12)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("outcom", "reward: unknown reward 'outcom'; did you mean 'outcome'?"),
        ("", "reward: '' in '' is no reward; such as outcome+0.2*format"),
        ("outcome+", "'' in 'outcome+' is no reward"),
        ("outcome*2", "'outcome*2' in 'outcome*2' is no reward"),
        ("nan*outcome", "'nan*outcome' in 'nan*outcome' is no reward"),
        ("outcome+format+outcome", "outcome is in 'outcome+format+outcome' twice"),
        ("length", "'length' is not length:C"),
        ("outcome+noisy:0.9", "'noisy:0.9' is not noisy:TPR:FPR"),
        ("noisy:2:0", "TPR and FPR are probabilities, 0 to 1"),
        ("random:1", "'random:1' is not random"),
        ("no_such_thing:function", "no module named 'no_such_thing'"),
    ],
)
def test_no_such_reward(spec, message):
    with pytest.raises(UserError) as error:
        open_reward(spec, TASK)
    assert message in str(error.value)
