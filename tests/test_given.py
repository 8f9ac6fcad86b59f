"""Problems of files, and tasks of one's own: what is answered, what is refused, and what is counted."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tasks import HOSTILE

from jaxup.errors import UserError
from jaxup.learning.given import MATCHES
from jaxup.learning.tasks import open_task


@pytest.mark.parametrize("match", MATCHES)
@given(text=st.one_of(st.text(), st.text("0123456789.,+-*/(){}\\boxedfrac#$%eE AB"), st.sampled_from(HOSTILE)))
def test_any_text_is_matched(match, text):
    assert isinstance(MATCHES[match](text), str)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_file_is_split_by_its_problems(tmp_path, capsys):
    rows = [{"prompt": f"What is {n} and {n}?", "answer": 2 * n, "level": 1} for n in range(30)]
    twice = {**rows[3], "prompt": "What is  3\nand 3?"}
    task = open_task(write(tmp_path / "a.jsonl", *rows, twice) + ":numeric", train=-1, test=10, seed=0)
    assert "1 of 31 lines are problems that came before, and are left out" in (said := capsys.readouterr().err)
    assert "not read: level" in said
    assert (len(task.train), len(task.test)) == (20, 10)
    assert task.verify(task.test[0], f"It is {task.test[0].answer}.") == 1
    assert task.verify(task.test[0], f"It is 1{task.test[0].answer}.") == 0
    # In another order, and with more of them, those of the test that stay first are the same.
    random.Random(0).shuffle(rows)
    again = open_task(write(tmp_path / "b.jsonl", *rows) + ":numeric", train=5, test=10, seed=0)
    assert again.test == task.test
    assert again.train == task.train[:5]


def test_a_file_with_splits(tmp_path):
    rows = [{"prompt": f"{n}?", "answer": "yes", "split": "test" if n % 3 else "train"} for n in range(12)]
    path = write(tmp_path / "a.jsonl", *rows)
    task = open_task(path, train=-1, test=-1, seed=0)
    assert sorted(int(problem.id[:-1]) % 3 for problem in task.test) == [1] * 4 + [2] * 4
    assert task.verify(task.test[0], " Yes\n") == 1
    with pytest.raises(UserError, match="5 problems to train on are asked for; there are 4"):
        open_task(path, train=5, test=1, seed=0)


ROW = {"prompt": "2+2?", "answer": "4"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "a.jsonl: no problems: the file is empty"),
        ([ROW, "{nope"], "a.jsonl:2: Expecting property name"),
        ([ROW, "[1]"], "a.jsonl:2: not a JSON object but list"),
        ([{"question": "2+2?", "answer": "4"}], "a.jsonl:1: no prompt; its keys: question, answer"),
        ([{}], "a.jsonl:1: no prompt and no answer; its keys: none"),
        ([{**ROW, "prompt": 3}], "a.jsonl:1: prompt is no text but int"),
        ([{**ROW, "prompt": " "}], "a.jsonl:1: an empty prompt"),
        ([{**ROW, "answer": None}], "a.jsonl:1: the answer '' is no number"),
        ([{**ROW, "answer": "four"}], "a.jsonl:1: the answer 'four' is no number"),
        (['{"prompt": "\\ud800", "answer": "4"}'], "a.jsonl:1: prompt has half of a character"),
        ([ROW, '{"prompt": "x", "answer": "4\\udfff"}'], "a.jsonl:2: answer has half of a character"),
        ([ROW, {**ROW, "answer": "5"}], "a.jsonl:2: the problem of {path}:1 with another answer"),
        ([{**ROW, "split": "tset"}], "a.jsonl:1: unknown split 'tset'; did you mean 'test'?"),
        ([{**ROW, "split": "test"}, {**ROW, "split": "train"}], "of {path}:1, which is of split 'test', in 'train'"),
        ([{**ROW, "split": "test"}, {**ROW, "prompt": "x"}], "a.jsonl:2: no `split`, which other problems have"),
        ([{**ROW, "prompt": "x"}, {**ROW, "split": "test"}], "a.jsonl:2: `split`, which others have not"),
        ([{**ROW, "prompt": "2+2? Answer: 4"}], "a.jsonl:1: the prompt ends with the answer '4'"),
        ([{**ROW, "prompt": "2+2?\n#### 4."}], "a.jsonl:1: the prompt ends with the answer '4'"),
        ([{**ROW, "prompt": "1+1?\nAnswer: 2\n2+2?\nThe answer is 4"}], "the prompt ends with the answer '4'"),
        ([{"prompt": "2*500?\n\n1,000", "answer": "1000"}], "a.jsonl:1: the prompt ends with the answer '1000'"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be(tmp_path, rows, message):
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError) as error:
        open_task(f"{path}:numeric", train=-1, test=0, seed=0)
    assert message.format(path=path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "4+0?", "answer": "4"}, {"prompt": "What is 4 times 1?\n4*1=", "answer": "4"},
        {"prompt": "4", "answer": "4"}, {"prompt": "Answer with a number. How many are 2 and 2?", "answer": "4"},
        {"prompt": "2+2?\nA) 3\nB) 4", "answer": "4"},
        {"prompt": "An example: 1+3?\nAnswer: 4\n\n2+2?\nAnswer:", "answer": "4"},
    ],
)  # fmt: skip
def test_no_leak_is_seen_where_none_is(tmp_path, row):
    assert len(open_task(write(tmp_path / "a.jsonl", row) + ":numeric", train=1, test=0, seed=0).train) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"), ("It is 42.", "42"), ("1,234,567 apples", "1234567"), ("12, 13", "13"), ("-3", "-3"),
        ("5-3", "3"),
        ("x = -4", "-4"), ("\u22127", "-7"), ("3.50", "7/2"), (".5", "1/2"), ("3/4", "3/4"), ("6/8", "3/4"),
        ("50%", "50"),
        ("$1,000.00", "1000"), ("2e3", "2000"), ("2E-1", "1/5"), ("1e999999999", ""), ("\\frac{1}{2}", "1/2"),
        ("so \\boxed{7}, not 8", "7"), ("\\boxed{\\dfrac{14}{3}}", "14/3"), ("9\n#### 42", "42"),
        ("#### 1\n#### $2", "2"),
        ("H2O", ""), ("none", ""), ("", ""), ("3/0", ""), ("7 and 3/0", "7"), ("1" * 101, ""), ("٣", ""), ("²", ""),
        ("1.2.3", "6/5"), ("007", "7"), ("the answer is (42)", "42"), ("42 km", "42"), ("42km", "42"),
        ("\\boxed{none} 3", ""),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert MATCHES["numeric"](text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), ("b", "B"), ("(C)", "C"), ("(c).", "C"), ("D.", "D"), ("B: because", "B"),
        ("B) because it is", "B"), ("The answer is B", "B"), ("the answer is (b)", "B"),
        ("Answer: C, since A is wrong", "C"), ("answer: **D**", "D"),
        ("The answer is a dog", ""), ("A man walks", ""), ("\\boxed{B}", "B"),
        ("\\boxed{\\text{(B)}}", "B"), ("Not (A) but (B)", "B"), ("", ""),
        ("The answer is A. No: the answer is C.", "C"), ("The answer is Bob", ""), ("The answer is A's", ""), ("٣", ""),
    ],
)  # fmt: skip
def test_the_letter_of_a_choice(text, letter):
    assert MATCHES["choice"](text) == letter


# One's own -----------------------------------------------------------------------------------------------------------

OWN = """
from types import SimpleNamespace
from jaxup.learning.problem import Problem

def judge(problem, text):
    said = {"nan": lambda: float("nan"), "none": lambda: None, "text": lambda: "1", "raise": lambda: 1 / 0}
    return said.get(text, lambda: text == problem.answer)()

def task(train, test, seed, shared=False):
    problems = [Problem(str(i), f"{i}?", answer=str(i)) for i in range(train + test)]
    return SimpleNamespace(train=problems[:train], test=problems[0 if shared else train:], verify=judge)

def shared(train, test, seed):
    return task(train, test, seed, shared=True)

def rows(train, test, seed):
    return SimpleNamespace(train=[{"prompt": "x"}], test=[], verify=judge)

def half(train, test, seed):
    return SimpleNamespace(train=[Problem("\\ud800", "x")], test=[], verify=judge)

def none(train, test, seed):
    return SimpleNamespace(train=[], test=[])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("raise SystemExit('no\\nwhere')")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("spec", ["own_tasks:task", "a.jsonl:own_tasks:judge"])
def test_a_task_of_ones_own(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", *({"prompt": f"{i}?", "answer": str(i)} for i in range(5)))
    task = open_task(spec, train=3, test=2, seed=0)
    problem = task.test[0]
    said = {text: task.verify(problem, text) for text in (problem.answer, "x", "none", "raise", "nan", "text")}
    assert said == {problem.answer: 1, "x": 0, "none": None, "raise": None, "nan": None, "text": None}
    assert task.failed == {f"{spec}: ZeroDivisionError": 1, f"{spec}: not a finite number": 2}
    assert (task.steps(problem, "none"), task.final(problem, " A  b")) == ([], "a b")
    assert task.steps(problem, problem.answer) == [1.0]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_tasks:shared", "3 problems to test on are trained on as well, such as '0'"),
        ("own_tasks:rows", "is no Problem(id, prompt, solution, answer) of texts; from jaxup.learning.problem import"),
        ("own_tasks:half", r"own_tasks:half: '\ud800' has half of a character (a lone surrogate)"),
        ("own_tasks:none", "what it gives has no function `verify`"),
        ("own_broken:x", "own_broken:x: importing it raises SystemExit: no"),
    ],
)
def test_a_task_of_ones_own_that_cannot_be(spec, message):
    with pytest.raises(UserError) as error:
        open_task(spec, train=3, test=2, seed=0)
    assert message in str(error.value)


def test_a_solution_gives_its_answer(tmp_path, capsys):
    rows = [{**ROW, "solution": "2 and 2 make #### 4"}, {"prompt": "3+3?", "answer": "6", "solution": "It is 7."}]
    path = write(tmp_path / "a.jsonl", *rows, {"prompt": "1+1?", "answer": "2"})
    task = open_task(f"{path}:numeric", train=-1, test=0, seed=0)
    assert (
        f"of 1 problems the solution does not give the answer; the first is that of {path}:2" in capsys.readouterr().err
    )
    assert {each.solution for each in task.train} == {"2 and 2 make #### 4", "It is 7.", "2"}


def test_an_answer_may_be_of_signs_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "(", "answer": ")"}, {"prompt": "2?3=6", "answer": "*"})
    task = open_task(path, train=2, test=0, seed=0)
    assert [task.verify(each, each.solution) for each in task.train] == [1, 1]
