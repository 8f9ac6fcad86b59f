"""Problems of each kind: they have answers, others are wrong, and what is tested on is never trained on."""

import ast
import itertools
import operator
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxup.data.tokenizer import load_tokenizer, train_characters, unknown_characters
from jaxup.errors import UserError
from jaxup.learning import tasks
from jaxup.learning.arithmetic import LONGEST, arithmetic
from jaxup.learning.tasks import open_task, tokenizer_for

SPECS = ["countdown:2", "countdown:3", "countdown:4:steps", "addition:2", "addition:3:steps", "brackets:8"]
TASKS = {spec: open_task(spec, train=40, test=10, seed=0) for spec in SPECS}

# Arithmetic ----------------------------------------------------------------------------------------------------------

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def as_python(text):
    """What Python's own parser makes of it, exactly; and its numbers."""
    numbers = []

    def value(node):
        match node:
            case ast.Constant(value=int(number)):
                numbers.append(number)
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand)
            case ast.BinOp() if type(node.op) in OPERATIONS:
                return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise SyntaxError

    try:
        if re.search(r"(?<![0-9])0[0-9]", text):  # Python reads 00, but not 01
            raise SyntaxError
        return value(ast.parse(text.strip(" "), mode="eval").body), tuple(numbers)
    except (SyntaxError, ZeroDivisionError):
        return None


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda sides: st.one_of(
        st.tuples(sides, st.sampled_from(["+", "-", "*", "/", " - ", "/-"]), sides).map("".join),
        sides.map("({})".format), sides.map("-{}".format),
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.one_of(EXPRESSIONS, st.text("0123 +-*/()", max_size=12)))
def test_arithmetic_is_as_python_reads_it(text):
    said = arithmetic(text)
    assert (said and said[:2]) == as_python(text)
    if said and said.operations:
        name, left, right = said.operations[-1]
        assert OPERATIONS[type(ast.parse(f"1{name}1", mode="eval").body.op)](left, right) == said.value


@pytest.mark.parametrize(
    "text",
    ["", " ", "()", "1 2", "1)", "(1", "9**9**9", "7//2", "1/0", "1/(2-2)", "+1", "007", "1.0", "1e9", "0x1", "1_0",
     "x", "True", "٣", "²", "𝟗", "1\0", "1\n", "\t1", "\ud800", "1;2", "__import__('os')", "(" * LONGEST, "-" * LONGEST,
     "(" * 500 + "1" + ")" * 499, "1" * (LONGEST + 1), "1+" * 10**6],
)  # fmt: skip
def test_what_is_no_arithmetic(text):
    assert arithmetic(text) is None


def test_long_and_deep_arithmetic():
    deep = (LONGEST - 1) // 2
    assert arithmetic("(" * deep + "7" + ")" * deep) == (7, (7,), ())
    assert arithmetic("-" * (LONGEST - 1) + "7")[:2] == (-7, (7,))
    assert arithmetic("9*" * deep + "9").value == 9 ** (deep + 1)
    fractions = arithmetic("+".join(f"1/{n}" for n in range(1, 150)))
    assert fractions.value == sum(Fraction(1, n) for n in range(1, 150))


# What holds for all kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_reference_solutions_are_right_and_nothing_may_follow(spec):
    task = TASKS[spec]
    for problem in (*task.train, *task.test):
        assert task.verify(problem, problem.solution) == 1
        assert task.verify(problem, f" {problem.solution}\n") == 1
        assert task.final(problem, problem.solution) != ""
        good = task.steps(problem, problem.solution)
        assert good == [1.0] * (problem.solution.count(task.step) + 1 if task.step else 1)
        for junk in ("x", "+", "=1", " 1", "\n", "\n1", "(", "\ud800", "²"):
            if junk.strip():
                assert task.verify(problem, problem.solution + junk) == 0
        assert task.verify(problem, problem.prompt + problem.solution) == 0
        assert task.verify(problem, problem.solution[:-1]) == 0 or spec.startswith("countdown")


@pytest.mark.parametrize("spec", SPECS)
def test_test_problems_stay_when_more_are_trained_on(spec):
    few, again = (open_task(spec, train=7, test=10, seed=0) for _ in range(2))
    task = TASKS[spec]
    assert task.test == few.test == again.test
    assert task.train[:7] == few.train == again.train
    ids = [problem.id for problem in (*task.train, *task.test)]
    assert len(set(ids)) == len(ids) == 50
    assert open_task(spec, train=7, test=10, seed=1).test != few.test


HOSTILE = ["", "\0", "\ud800", "٣+٤", "²", "9**9**9", "(" * 10**5, "\n" * 10**5, "1" * 10**5, "-" * 10**5,
           "0/0", "1/0=0\n0", "99999999999999999999*1=1\n" * 9, "\\boxed{" * 10**4, "####" * 10**4, "1e999",
           "1" + ",000" * 5000, "{}" * 10**4]  # fmt: skip
LINES = st.lists(st.from_regex(r"[0-9]{1,2}[-+*/][0-9]{1,2}=[0-9]{1,3}", fullmatch=True), max_size=4).map("\n".join)


@given(st.one_of(st.text(), st.text("0123456789+-*/()[]{}=\n "), LINES, st.sampled_from(HOSTILE)))
def test_any_text_is_judged(text):
    for task in TASKS.values():
        problem = task.test[0]
        assert task.verify(problem, text) in (0, 1)
        assert set(task.steps(problem, text)) <= {0, 1}
        assert len(task.steps(problem, text)) == (text.strip().count("\n") + 1 if task.step else 1)
        assert task.final(problem, text) or not task.verify(problem, text)


@pytest.mark.parametrize("spec", SPECS)
def test_votes_know_no_more_than_the_text(spec):
    """What an answer says is read without the problem; so a wrong answer to it that is written well has votes."""
    task = TASKS[spec]
    one, *others = (*task.test, *task.train)
    assert all(task.final(one, each.solution) == task.final(each, each.solution) != "" for each in others)
    assert any(not task.verify(one, each.solution) for each in others)


@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_states_its_problem_and_another_text_none(spec):
    task = TASKS[spec]
    for problem in task.test:
        stated = task.problem(problem.prompt)
        assert (stated.id, stated.prompt, stated.answer) == (problem.id, problem.prompt, problem.answer)
        assert task.verify(stated, stated.solution) == 1
    for text in (*HOSTILE, "1 1 1=99", "3 5 7 9 2 4=26:", "1000+1=", "((((", "))))?", "3 5 7=26:7*3+5", "3 5 99=26"):
        with pytest.raises(UserError, match=r"^'.* is no problem of .* with an answer; such as "):
            task.problem(text)


# Countdown -----------------------------------------------------------------------------------------------------------

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def expressions(numbers):
    """Every way to write three numbers with two operations, and its value."""
    for a, b, c in itertools.permutations(numbers):
        for (one, f), (two, g) in itertools.product(SIGNS.items(), repeat=2):
            for text, value in (
                (f"({a}{one}{b}){two}{c}", lambda a=a, b=b, c=c, f=f, g=g: g(f(Fraction(a), b), c)),
                (f"{a}{one}({b}{two}{c})", lambda a=a, b=b, c=c, f=f, g=g: f(a, g(Fraction(b), c))),
            ):
                try:
                    yield text, value()
                except ZeroDivisionError:
                    yield text, None


def test_countdown_has_every_target_in_reach_and_no_other():
    """By brute force over rational values, where the game's have to be whole: of three numbers that is the same."""
    task = open_task("countdown:3", train=-1, test=100, seed=3)
    forms = {problem.id for problem in (*task.train, *task.test)}
    reach = set()
    for numbers in itertools.combinations_with_replacement(range(1, 15), 3):
        values = {value for _, value in expressions(numbers)}
        reach |= {f"{' '.join(map(str, numbers))}={target}" for target in range(1, 100) if target in values}
    assert forms == reach
    with pytest.raises(UserError, match=f"7000 problems to train on are asked for; there are {len(reach)}, 100 of"):
        open_task("countdown:3", train=7000, test=100, seed=3)


def test_an_expression_is_right_if_its_value_is():
    for problem in TASKS["countdown:3"].train:
        numbers, target = problem.id.split("=")
        for text, value in expressions(map(int, numbers.split())):
            assert TASKS["countdown:3"].verify(problem, text) == (value == int(target))


def test_numbers_are_used_once_each():
    task = open_task("countdown:3", train=-1, test=1, seed=0)
    problem = next(each for each in task.train if each.id == "2 3 4=24")
    right = {"2*3*4": 1, "4*3*2": 1, "(2*3)*4": 1, "3 * 4 * 2": 1, "4/(1/6)": 0, "2*3*4*1": 0, "12*2": 0, "4*3*2/1": 0,
             "24": 0, "2*3*4=24": 0, "2*12": 0, "-2*3*-4": 1, "4*3*2+2-2": 0, "٢*3*4": 0, "2*3*4 ok": 0}  # fmt: skip
    assert {text: task.verify(problem, text) for text in right} == right
    same = {
        "2*3*4": "2*3 4*6",
        "4*(3*2)": "2*3 4*6",
        "4*3*2": "2*12 3*4",
        "24": "24",
        "-2": "0-2",
        "(4-2)/3": "2/3 4-2",
    }
    assert {text: task.final(problem, text) for text in same} == same


def test_a_step_is_good_while_the_target_is_in_reach():
    task = open_task("countdown:3:steps", train=30, test=1, seed=0)

    def whole(a, b):
        """The game's operations on two numbers, in either order."""
        for (x, y), (sign, f) in itertools.product({(a, b), (b, a)}, SIGNS.items()):
            if (sign != "/" or (y and x % y == 0)) and (value := f(x, y)) >= 0:
                yield f"{x}{sign}{y}={int(value)}", int(value)

    for problem in task.train:
        numbers, target = (list(map(int, side.split())) for side in problem.id.split("="))
        for skip in range(3):
            a, b = numbers[:skip] + numbers[skip + 1 :]
            for first, value in whole(a, b):
                ends = list(whole(value, numbers[skip]))
                open_ = float(any(end == target[0] for _, end in ends))
                assert task.steps(problem, first) == [open_]
                assert task.verify(problem, first) == 0
                for second, end in ends:
                    right = float(end == target[0])
                    assert task.verify(problem, f"{first}\n{second}") == right
                    assert task.steps(problem, f"{first}\n{second}") == [open_, right]
    assert task.steps(problem, f"{problem.solution}\n1+1=2")[2] == 0
    assert task.final(problem, "7+3=9\n5-9=2") == task.final(problem, "3+7=9\n5-9=2") == "3+7=9 5-9=2"
    assert task.final(problem, "3-7=-4\n5*-4=2") == "3-7=-4 -4*5=2"
    assert task.final(problem, "7+3=10\nso") == task.final(problem, "7+3") == ""
    assert task.verify(problem, f"{problem.solution}\n{target[0]}*1={target[0]}") == 0


# Addition and brackets -----------------------------------------------------------------------------------------------


def test_addition_carries():
    task = open_task("addition:2:steps", train=-1, test=1, seed=0)
    assert len(task.train) + 1 == 100 * 101 // 2
    problem = next(each for each in task.train if each.prompt in ("47+85=", "85+47="))
    lines = ["7+5+0=12", "4+8+1=13", "132"] if problem.prompt == "47+85=" else ["5+7+0=12", "8+4+1=13", "132"]
    assert problem.solution == "\n".join(lines)
    wrong = "\n".join([lines[0].replace("12", "11"), *lines[1:]])
    assert task.steps(problem, wrong) == [0, 1, 1]
    assert task.verify(problem, wrong) == 1  # its sum is right: what happened on the way `process` sees
    for text in ("132", "\n".join([lines[0], *lines]), "\n".join([*lines[:2], "0132"]), "\n".join([*lines[:2], "131"])):
        assert task.verify(problem, text) == 0
    assert task.final(problem, "0132") == task.final(problem, "1 32") == task.final(problem, "-1") == ""
    assert task.final(problem, "9+9=\n131") == "131"
    for problem in TASKS["addition:3:steps"].train:  # what each column writes, and the last carries, is the sum
        *columns, total = problem.solution.split("\n")
        last, *others = (column.partition("=")[2] for column in reversed(columns))
        whole = last + "".join(each[-1] for each in others)
        assert int(whole) == int(total) == sum(map(int, problem.id.split("+")))


def test_brackets_of_four():
    """Brute force: every string of four characters, with every two of them holes."""
    kinds = ("()", "[]", "{}")

    def reduced(text):
        while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
            text = shorter
        return text

    strings = list(map("".join, itertools.product("".join(kinds), repeat=4)))
    whole = [text for text in strings if not reduced(text)]
    shown = {
        "".join("?" if i in holes else c for i, c in enumerate(text)): ()
        for text in whole for holes in itertools.combinations(range(4), 2)
    }  # fmt: skip
    task = open_task("brackets:4", train=-1, test=5, seed=0)
    assert {problem.id for problem in (*task.train, *task.test)} == shown.keys()
    several = 0
    for problem in task.train:
        fits = re.compile("".join("." if c == "?" else re.escape(c) for c in problem.id))
        right = {text for text in strings if task.verify(problem, text)}
        assert right == {text for text in whole if fits.fullmatch(text)}
        several += len(right) > 1
    assert several


# What cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("countdwn:3", "task: unknown task 'countdwn:3'; did you mean 'countdown'?"),
        ("countdown", "'countdown' is not countdown:N[:steps]"),
        ("countdown:99", "N in countdown:N[:steps] is 2 to 5, not '99'"),
        ("countdown:3:step", "is not countdown:N[:steps]; such as countdown:3"),
        ("countdown:٣", "not '٣'"),
        ("brackets:7", "LENGTH in brackets:LENGTH is 2 to 64 and even, not '7'"),
        ("brackets:8:steps", "is not brackets:LENGTH"),
        ("addition:-1", "not '-1'"),
        ("", "unknown task ''"),
        ("no_such_thing:function", "no module named 'no_such_thing'"),
        ("json:lods", "no function 'lods' in json; did you mean 'loads'?"),
        ("json:loads", "json:loads: it raises TypeError"),
        ("none.jsonl", "none.jsonl: no such file"),
        ("none.jsonl:exct", "'exct' is no package.module:function; did you mean 'exact'?"),
    ],
)  # fmt: skip
def test_no_such_task(spec, message):
    with pytest.raises(UserError) as error:
        open_task(spec, train=1, test=1, seed=0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_as_many_problems_as_there_are(monkeypatch):
    with pytest.raises(UserError, match="60 problems to train on are asked for; there are 55, 5 of them to test on"):
        open_task("addition:1", train=60, test=5, seed=0)
    with pytest.raises(UserError, match="all problems to train on are asked for; there are 55, 55 of them"):
        open_task("addition:1", train=-1, test=55, seed=0)
    with pytest.raises(UserError, match="0 problems to train on and 0 to test on; -1 is all"):
        open_task("addition:1", train=0, test=0, seed=0)
    monkeypatch.setattr(tasks, "MOST", 1000)
    with pytest.raises(UserError, match="more than 1000 problems"):
        open_task("addition:5", train=-1, test=1, seed=0)


# Tokens --------------------------------------------------------------------------------------------------------------


def test_tokens_of_characters(tmp_path):
    task = TASKS["countdown:4:steps"]
    made = tokenizer_for(task)
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for tokenizer in (made, loaded):
        ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
        assert ids == [0, 1, 2, 3]
        for problem in task.train:
            text = problem.prompt + problem.solution
            assert len(tokenizer(text)["input_ids"]) == len(text)
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert tokenizer.decode(tokenizer("1é+ 1")["input_ids"]) == "1<unk>+ 1"
        assert unknown_characters(tokenizer, ["1é", "ü+", "1"]) == "éü"
    # However few problems there are, the alphabet is that of all of them.
    assert tokenizer_for(open_task(task.name, train=1, test=1, seed=5)).get_vocab() == made.get_vocab()


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_text_comes_back_from_its_own_characters(text):
    tokenizer = train_characters([text])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_no_tokens():
    with pytest.raises(UserError, match="tokenizer: no text"):
        train_characters([""])
