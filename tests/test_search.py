"""Searches with a policy that is a table: against brute force, closed forms, and budgets of every size."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxup.errors import UserError
from jaxup.learning import guides, search
from jaxup.learning.guides import open_guide
from jaxup.learning.problem import Problem, Written
from jaxup.learning.search import open_method, run
from jaxup.learning.tasks import open_task
from jaxup.learning.tree import Budget, Search, drive, shown

LETTERS = ("a,", "b,", "")  # a step each; the third ends the answer
METHODS = ["best_of", "best_of:5", "vote", "majority", "greedy:3", "beam:6:2", "dvts:4:2", "mcts:2", "revise"]
GUIDES = ["verifier", "noisy:0.8:0.3", "logp", "consistency", "rollouts:2", "steps", "length:0.7:0.9:0.2"]


class Table:
    """Writes steps of one letter: each drawn with the probabilities of `table`, by what the problem and answer are."""

    def __init__(self, table=lambda prompt, answer: (0.4, 0.3, 0.3)):
        self.table, self.calls, self.asked = table, 0, []

    def prefix(self, problem):
        return tuple(10 + byte for byte in problem.prompt.encode())

    def write(self, asks):
        self.calls += 1
        self.asked += asks
        return [self.one(ask) for ask in asks]

    def one(self, ask):
        prompt = bytes(t - 10 for t in ask.prefix if t >= 10).decode()
        answer = [t for t in ask.prefix if t < 3]
        tokens, logp, draw = [], [], np.random.default_rng(ask.key)
        stopped = ended = False
        while len(tokens) < ask.max_tokens and not stopped and not ended:
            p = np.array(self.table(prompt, "".join(LETTERS[t][:1] for t in answer + tokens)))
            token = int(draw.choice(3, p=p))
            tokens.append(token)
            logp.append(math.log(max(p[token], 1e-9)))
            ended, stopped = token == 2, bool(ask.until) and token < 2
        text = "".join(LETTERS[t] for t in tokens)
        logp = np.array(logp, np.float32)
        return Written(np.array(tokens, np.int32), logp, np.zeros_like(logp), text, ended, stopped)


class Spelling:
    """The answer is right that is the problem's, letter by letter."""

    name, step, train = "spelling", ",", ()

    def __init__(self, *answers):
        self.test = [Problem(f"{number}", f"{number}:", answer=answer) for number, answer in enumerate(answers)]

    def verify(self, problem, text):
        return float(text == problem.answer)

    def steps(self, problem, text):
        right = zip(text.split(","), problem.answer.split(","))
        return [float(all(a == b for a, b in itertools.islice(zip(text.split(","), problem.answer.split(",")), i + 1)))
                for i, _ in enumerate(right)][: text.count(",")]  # fmt: skip

    def final(self, problem, text):
        return text.replace(",", "")


TASK = Spelling("a,b,b,", "b,a,", "a,a,a,b,", "b,")
OF = {"budget": 60, "max_tokens": 6, "seed": 3}


def found(method, guide, task=TASK, writer=None, problems=None, **changes):
    guide = open_guide(guide) if isinstance(guide, str) else guide
    method = open_method(method) if isinstance(method, str) else method
    return run(writer or Table(), task, problems or task.test, method, guide, **{**OF, **changes})


def told(results):
    return [(f.problem.id, f.answers, f.tokens, list(shown(f.root))) for f in results]


# ---- what holds for all


@pytest.mark.parametrize("method", METHODS)
@given(budget=st.integers(5, 90), guide=st.sampled_from(GUIDES), seed=st.integers(0, 2**31 - 1))
def test_no_budget_is_exceeded_and_each_finds_an_answer(method, budget, guide, seed):
    class Counting(Table):
        def write(self, asks):
            written = super().write(asks)
            self.most = max(getattr(self, "most", 0), sum(ask.max_tokens for ask in asks) + self.counted)
            self.counted += sum(len(w.tokens) for w in written)
            return written

        counted = 0

    writer = Counting()
    (one,) = found(method, guide, writer=writer, problems=TASK.test[:1], budget=budget, max_tokens=5, seed=seed)
    assert one.tokens == writer.counted <= budget
    assert writer.most <= budget  # whatever had been drawn
    assert one.samples
    assert all(len(node.tokens) <= 5 for node in one.samples)
    assert len(one.answers) >= 1
    scores = [answer.score for answer in one.answers]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert all(node.tokens[-1] == 2 or len(node.tokens) == 5 for node in one.samples)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guide", ["rollouts:2", "consistency", "steps"])
def test_what_is_found_does_not_depend_on_other_problems(method, guide):
    together = told(found(method, guide))
    assert together == told(
        [*found(method, guide, problems=TASK.test[:1]), *found(method, guide, problems=TASK.test[1:])]
    )
    assert together == list(reversed(told(found(method, guide, problems=TASK.test[::-1]))))
    assert together == told(found(method, guide))
    assert together != told(found(method, guide, seed=4))


def test_all_that_problems_ask_at_a_time_is_one_call():
    writer, single = Table(), Table()
    found("mcts:2", "steps", writer=writer)
    calls = []
    for problem in TASK.test:
        single.calls = 0
        found("mcts:2", "steps", writer=single, problems=[problem])
        calls.append(single.calls)
    assert writer.calls == max(calls) < sum(calls)
    assert len(writer.asked) == len(single.asked)


@pytest.mark.parametrize("method", ["best_of", "mcts:2", "dvts:4:2", "revise"])
def test_no_two_draws_have_the_same_key(method):
    writer = Table()
    found(method, "rollouts:3", writer=writer, budget=200)
    keys = [ask.key for ask in writer.asked]
    again = [ask for ask in writer.asked if keys.count(ask.key) > 1]
    assert again == []
    assert all(0 <= number < 2**31 for key in keys for number in key)


# ---- the methods


class Worth(Spelling):
    """Every answer and beginning has a value of its own; the best leaf is not below the best first step."""

    def __init__(self, depth, seed):
        super().__init__("")
        rng = np.random.default_rng(seed)
        self.depth = depth
        texts = ["".join(p) for n in range(1, depth + 1) for p in itertools.product(("a,", "b,"), repeat=n)]
        self.values = dict(zip(texts, rng.permutation(len(texts)) / (2 * len(texts))))

    def steps(self, problem, text):
        return [self.values[text]]

    @property
    def leaves(self):
        return {text: value for text, value in self.values.items() if text.count(",") == self.depth}


class Letters(Table):
    """Two letters in turn, so that 2 draws are all that can follow."""

    def one(self, ask):
        tokens = [(ask.key[-1] if i == 0 else 0) % 2 for i in range(1 if ask.until else ask.max_tokens)]
        text, zeros = "".join(LETTERS[t] for t in tokens), np.zeros(len(tokens), np.float32)
        return Written(np.array(tokens, np.int32), zeros, zeros, text, False, bool(ask.until))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["beam:32:2", "mcts:2"])
def test_with_budget_for_all_of_a_tree_the_best_leaf_is_found(method, seed):
    task = Worth(4, seed)
    (one,) = found(method, "steps", task=task, writer=Letters(), budget=2000, max_tokens=4)
    best = max(task.leaves, key=task.leaves.get)
    assert one.answers[0].text == best
    assert one.answers[0].score == task.leaves[best]
    assert {node.text for node in one.samples} == set(task.leaves)


@pytest.mark.parametrize("method", ["greedy:2", "beam:2:2", "dvts:2:2"])
def test_one_beam_is_greedy_in_the_guide(method):
    for seed in range(5):
        task, text = Worth(4, seed), ""
        for _ in range(4):
            text = max((text + "a,", text + "b,"), key=task.values.get)
        (one,) = found(method, "steps", task=task, writer=Letters(), budget=9, max_tokens=4)
        # Two candidates for each of four steps; with one more token what ends a beam is always there.
        assert {node.text for node in one.samples} == {text[:-2] + "a,", text[:-2] + "b,"}
        assert one.answers[0].text == text


def test_diverse_trees_do_not_compete():
    """Of two trees each keeps its own best, where two beams may both come from one."""
    task = Worth(3, 0)
    task.values |= {"a,": 0.4, "b,": 0.1, "a,a,": 0.5, "a,b,": 0.45, "b,a,": 0.2, "b,b,": 0.15}
    task.values |= dict.fromkeys(task.leaves, 0.1)

    class Apart(Letters):  # the first tree's samples begin with a, the second's with b
        def one(self, ask):
            if len(ask.prefix) > 2:
                return super().one(ask)
            letter = ask.key[-1] % 2
            return Written(np.array([letter], np.int32), np.zeros(1, np.float32), np.zeros(1, np.float32),
                           LETTERS[letter], False, True)  # fmt: skip

    texts = {}
    for method in ("beam:4:2", "dvts:4:2"):
        (one,) = found(method, "steps", task=task, writer=Apart(), budget=14, max_tokens=3)
        texts[method] = {node.text[:2] for node in one.samples}
    assert texts == {"beam:4:2": {"a,"}, "dvts:4:2": {"a,", "b,"}}


def test_puct_is_alphazeros():
    tree = search.Node(visits=7)
    tree.children = [search.Node(count=3, visits=4, total=2.0), search.Node(count=1, visits=2, total=1.5)]
    rate = math.log((7 + 19652 + 1) / 19652) + 1.25
    assert search.puct(tree, tree.children[0]) == pytest.approx(0.5 + rate * 0.75 * math.sqrt(7) / 5)
    assert search.puct(tree, tree.children[1]) == pytest.approx(0.75 + rate * 0.25 * math.sqrt(7) / 3)


def test_values_are_backed_up_as_means():
    (one,) = found("mcts:2", "steps", task=Worth(6, 0), writer=Letters(), budget=60, max_tokens=6)
    checked = 0
    for node in one.root.walk():
        below = [n for n in node.walk() if n is not one.root]
        if all(n.count == 1 for n in below):
            assert node.visits == len(below)
            assert node.mean == pytest.approx(np.mean([n.value for n in below]))
            checked += len(below) > 2
    assert checked > 3


def test_the_best_of_n_by_the_verdict_solves_what_pass_at_n_says():
    """Exactly: a problem is solved if and only if one of its samples is right."""
    problems = [Problem(f"{i}", f"{i}:", answer="a,b,") for i in range(300)]
    results = found("best_of:4", "verifier", problems=problems, budget=100)
    right = [f.answers[0].score == 1 for f in results]
    assert right == [any(node.text == "a,b," for node in f.samples) for f in results]
    p = 0.4 * 0.3 * 0.3
    assert np.mean(right) == pytest.approx(1 - (1 - p) ** 4, abs=4 * math.sqrt(0.13 * 0.87 / 300))
    # It ends with the first that is right, though it is not asked one by one.
    assert found("best_of", "verifier", problems=problems[:50]) != found("best_of:40", "logp", problems=problems[:50])


def test_a_revision_that_outgrows_the_model_ends_its_problem(capsys):
    class Short(Table):
        def prefix(self, problem):
            if len(problem.prompt) > 20:
                raise UserError("a prompt of too many tokens")
            return super().prefix(problem)

    assert [len(one.samples) for one in found("revise", "logp", writer=Short())] == [1] * 4
    assert "of 4 of 4 problems the revised prompt outgrew the model" in capsys.readouterr().err


def test_a_majority_counts_wrong_arithmetic():
    """Two say the same with a wrong sum, one is right: the two have it, as a vote is no verifier."""

    class Says(Table):
        def one(self, ask):
            text = ("3*7=20\n20+6=26", "3*7=21\n5+21=26", "7*3=20\n6+20=26")[ask.key[-1]]
            token, zero = np.full(1, ask.key[-1], np.int32), np.zeros(1, np.float32)
            return Written(token, zero, zero, text, True, False)

    task = open_task("countdown:3:steps", train=0, test=1, seed=0)
    (one,) = found("majority:3", None, task, Says(), [Problem("3 5 7=26", "3 5 7=26:")])
    assert [(answer.votes, task.verify(one.problem, answer.text)) for answer in one.answers] == [(2, 0), (1, 1)]


def test_a_majority_of_many_is_the_likeliest_answer():
    table = Table(lambda prompt, answer: (0.55, 0.45, 0.0) if not answer else (0.0, 0.0, 1.0))
    results = found("majority:400", None, writer=table, budget=2400)
    for one in results:
        # .1 * 400 more votes, and their deviation is 20
        assert [answer.text for answer in one.answers] == ["a,", "b,"]
        assert one.answers[0].votes == sum(node.count for node in one.samples if node.text == "a,")
        assert sum(answer.score for answer in one.answers) == pytest.approx(1)
        assert math.isnan(one.samples[0].value)


def test_weighted_votes_add_up_values():
    table = Table(lambda prompt, answer: (0.6, 0.4, 0.0) if not answer else (0.0, 0.0, 1.0))
    prefers_b = guides.learned("b", lambda rows: [0.9 if 1 in row else 0.2 for row in rows])
    (one,) = found("vote:100", prefers_b, writer=table, problems=TASK.test[:1], budget=600)
    a, b = (sum(node.count for node in one.samples if node.text == text) for text in ("a,", "b,"))
    assert a > b
    assert [(r.text, r.votes) for r in one.answers] == [("b,", b), ("a,", a)]
    assert one.answers[0].score == pytest.approx(0.9 * b / (0.9 * b + 0.2 * a))


def test_a_revision_is_told_the_attempt_and_its_verdict():
    class Learning(Table):
        """Says b once it was told that a is wrong."""

        def one(self, ask):
            told = bytes(t - 10 for t in ask.prefix if t >= 10).decode()
            letter = 1 if "wrong" in told else 0
            zeros = np.zeros(2, np.float32)
            return Written(np.array([letter, 2], np.int32), zeros, zeros, LETTERS[letter], True, False)

    method = open_method("revise", revision="{prompt}{answer} {verdict} {score} {braces}{prompt}")
    writer = Learning()
    (one,) = found(method, "verifier", writer=writer, problems=TASK.test[3:])
    assert [node.text for node in one.samples] == ["a,", "b,"]
    assert (one.answers[0].text, one.answers[0].path, one.tokens) == ("b,", (1,), 4)
    prompts = ["".join(chr(t - 10) for t in ask.prefix) for ask in writer.asked]
    assert prompts == ["3:", "3:a, wrong 0.00 {braces}3:"]
    evil = Problem("x", "{answer}", answer="b,")
    assert search.revised("{prompt}|{answer}", evil, "{prompt}", 0.5) == "{answer}|{prompt}"


# ---- guides


def valued(guide, texts, task=TASK, problem=TASK.test[0], done=True):
    at = Search(task, problem, Table(), Budget(1000), 6, 0)
    nodes = [search.Node((i,), text, tuple(range(text.count(","))), -text.count(",") / 2, done)
             for i, text in enumerate(texts)]  # fmt: skip
    at.finished += nodes
    return drive(Table(), [open_guide(guide).value(at, nodes)])[0]


def test_what_guides_say():
    texts = ["a,b,b,", "a,b,", "b,", "b,"]
    assert valued("verifier", texts) == [1, 0, 0, 0]
    assert valued("verifier", texts, done=False) == [0.5] * 4
    assert valued("logp", texts) == pytest.approx([math.exp(-0.5)] * 4)
    assert valued("consistency", texts) == [0.25, 0.25, 0.5, 0.5]
    assert valued("steps", ["a,b,", "a,a,"]) == [1, 0]
    assert valued("steps:min", ["a,b,", "b,b,"]) == [1, 0]
    assert valued("length:0.75", texts) == pytest.approx([0.25 + 0.375, 0.25, 0.125, 0.125])
    assert valued("length:-1", texts) == pytest.approx([0.5, 4 / 6, 5 / 6, 5 / 6])


def test_a_noisy_verdict_is_wrong_as_often_as_it_says_and_always_alike():
    texts = ["a," * n for n in range(1, 4001)]
    first = valued("noisy:0.9:0.25", texts)
    assert first == valued("noisy:0.9:0.25", texts)
    assert np.mean(first) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))

    class Right(Spelling):
        def verify(self, problem, text):
            return 1.0

    assert np.mean(valued("noisy:0.9:0.25", texts, Right())) == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 4000))
    assert valued("noisy:1:0", texts[:9]) == valued("verifier", texts[:9])


def test_rollouts_are_the_share_that_verifies():
    """Of the beginning a,b, the right answer follows with probability .3 * .3."""
    task = Spelling("a,b,b,")
    at = Search(task, task.test[0], Table(), Budget(10**6), 6, 0)
    node = search.Node((0,), "a,b,", (0, 1), 0.0, False, at.root.prompt, at.root)
    (value,) = drive(Table(), [open_guide("rollouts:3000").value(at, [node])])[0]
    assert value == pytest.approx(0.09, abs=4 * math.sqrt(0.09 * 0.91 / 3000))
    assert at.budget.used == sum(len(n.tokens) - 2 for n in at.finished)
    assert len(at.finished) == 3000


def test_what_is_learned_is_asked_once_for_all_problems():
    sizes = []

    def score(rows):
        sizes.append(len(rows))
        assert all(row[-1] < 3 and row[0] >= 10 for row in rows)
        return np.full(len(rows), 0.5)

    found("best_of:3", guides.learned("head", score))
    assert len(sizes) == 1
    with pytest.raises(UserError, match=r"guide head: a value of 1\.5"):
        found("best_of:3", guides.learned("head", lambda rows: [1.5] * len(rows)))


# ---- what cannot be


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("a budget of 5 tokens is smaller than one answer of up to 6", lambda: found("best_of", "logp", budget=5)),
        ("an answer of 0 tokens", lambda: found("best_of", "logp", max_tokens=0)),
        ("search best_of: it needs a guide", lambda: found("best_of", None)),
        ("unknown search 'beem'; did you mean 'beam'?", lambda: open_method("beem:3")),
        ("search beam:5:2: 5 candidates are no multiple of 2", lambda: open_method("beam:5:2")),
        ("search beam:4:0: its numbers are at least 1", lambda: open_method("beam:4:0")),
        ("search mcts:1:2: its numbers are wrong; mcts[:CHILDREN]", lambda: open_method("mcts:1:2")),
        ("search best_of:-1: its numbers are wrong", lambda: open_method("best_of:-1")),
        ("search revise: the earlier attempt is not in", lambda: open_method("revise", revision="{prompt}")),
        ("unknown guide 'verifer'; did you mean 'verifier'?", lambda: open_guide("verifer")),
        ("guide noisy:0.5: its numbers are wrong; noisy:TPR:FPR", lambda: open_guide("noisy:0.5")),
        ("guide noisy:2:0: its numbers are shares", lambda: open_guide("noisy:2:0")),
        ("guide noisy:nan:0: its numbers are wrong", lambda: open_guide("noisy:nan:0")),
        ("guide rollouts:0: a number of rollouts", lambda: open_guide("rollouts:0")),
        ("guide steps:mean: unknown way 'mean'; known: last", lambda: open_guide("steps:mean")),
    ],
)
def test_what_cannot_be_is_one_line(message, call):
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_steps_need_a_task_of_steps():
    task = Spelling("a,")
    task.step = ""
    with pytest.raises(UserError, match="search beam:2:2: it goes over steps, and an answer to this task is one step"):
        found("beam:2:2", "logp", task=task)
