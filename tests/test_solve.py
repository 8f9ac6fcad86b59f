"""`jaxup solve` and `jaxup passk`, of a tiny model of characters."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

import jaxup
from jaxup import passk, solve
from jaxup.errors import UserError
from jaxup.learning import statistics
from jaxup.learning.tasks import open_task, tokenizer_for
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Decoder, init

TASK = ["--task=brackets:4"]  # where no model is read
SMALL = ["--max-tokens=6", "--slots=8", "--problems=3"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Of three problems with answers so short that one who writes any letter is right now and then."""
    file = tmp_path_factory.mktemp("task") / "letters.jsonl"
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in (("a:", "a"), ("b:", "b"), ("ab:", "b"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def model(task, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models") / "small")
    tokenizer = tokenizer_for(open_task(task, train=0, test=3, seed=0))
    config = ModelConfig.llama(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
        max_positions=32,
    )  # fmt: skip
    jaxup.save(Decoder(config, jax.jit(init, static_argnums=0)(config, 0)), path)
    tokenizer.save_pretrained(path)
    return path


def call(command, *arguments):
    command.main([command.__name__, *map(str, arguments)])


def test_solve_prints_and_writes_what_was_found(model, task, tmp_path, capsys):
    out = tmp_path / "found.jsonl"
    call(solve, model, "--task", task, "--guide=verifier", "--budget=120", "--out", out, "--show-tree=2", *SMALL)
    shown, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    opened = open_task(task, train=0, test=3, seed=0)
    assert [row["id"] for row in rows] == [problem.id for problem in opened.test]
    solved = sum(row["right"] for row in rows)
    assert solved > 0
    for problem, row in zip(opened.test, rows):
        assert row["right"] == row["score"] == opened.verify(problem, row["answer"])
        assert row["right"] == max(opened.verify(problem, each["text"]) for each in row["answers"])
        assert 0 < row["tokens"] <= 120
        assert row["answer"] in shown
    used = sum(row["tokens"] for row in rows)
    assert f"solved {solved:.0f} of 3: best_of by verifier, 120 tokens each at most, {used} used" in shown
    assert len(re.findall(r"^\[\d\] (?:right|wrong)  ", shown, re.M)) == 3
    assert len(re.findall(r"^[├└]─ .*done\]$", shown, re.M)) >= len(rows[1]["answers"])
    assert re.search(r"^[\d,]+ tokens drawn in [\d.]+ s, [\d,]+ tokens/s$", err, re.M)
    call(solve, model, "--task", task, "--guide=verifier", "--budget=120", *SMALL)
    assert shown.startswith(capsys.readouterr().out.partition("\nsolved")[0])  # the same seed


def test_solve_a_problem_of_ones_own(model, capsys):
    call(solve, model, "--prompt=ab:a", "--search=mcts:2", "--budget=40", *SMALL)
    out, _ = capsys.readouterr()
    assert out.startswith("[1] ab:a  ")
    assert "1 answered: mcts:2 by logp, 40 tokens each at most" in out
    call(solve, model, "--prompt=ab:a", "--answer=bb", "--search=majority:3", "--budget=40", *SMALL)
    out, _ = capsys.readouterr()
    assert re.search(r"^\[1\] wrong  ab:a  .*of 3 say so", out)
    assert "solved 0 of 1: majority:3, " in out
    template = "{prompt}{answer}{prompt}"
    call(solve, model, "--prompt=ab:a", "--search=revise", "--budget=20", "--template", template, *SMALL)
    assert "1 answered: revise by logp, 20 tokens each at most, 20 used" in capsys.readouterr().out
    call(solve, model, "--prompt=ab:x", "--search=revise:2", "--budget=20", "--template={answer}?{prompt}", *SMALL)
    _, err = capsys.readouterr()
    assert "1 of 1 prompts have characters that its tokenizer does not know" in err
    assert "its tokenizer does not know all characters of the template; --template is another" in err


def test_passk_is_resumed_and_says_what_its_samples_say(model, task, tmp_path, capsys):
    out = tmp_path / "out"
    how = ["--task", task, "--out", out, "--guide=verifier", "--guide=noisy:0.9:0.3", *SMALL]
    call(passk, model, "-n", 6, *how)
    first, _ = capsys.readouterr()
    lines = (out / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["id"], row["sample"]) for row in rows] == [
        (problem.id, i) for problem in open_task(task, train=0, test=3, seed=0).test for i in range(6)
    ]
    right = np.array([row["right"] for row in rows]).reshape(3, 6)
    assert 0 < right.sum() < 18
    for k in (1, 2, 4, 6):
        expected = 100 * statistics.pass_at_k(6, right.sum(1).astype(int), k).mean()
        # The verifier's best of k is pass@k.
        assert re.search(rf"^\| {k} \| {expected:.1f} \[.*\| {expected:.1f} \[[^|]*\| [^|]*\|$", first, re.M)
    page = (out / "PASSK.md").read_text()
    assert first.rstrip("\n") in page
    with Image.open(out / "passk.png") as image:
        assert image.size == (1120, 700)

    call(passk, model, "-n", 6, *how)
    again, err = capsys.readouterr()
    assert again == first
    assert "tokens drawn" not in err
    assert (out / "samples.jsonl").read_text().splitlines() == lines

    # What was not written to its end is drawn again, and is what it was; more samples are added.
    (out / "samples.jsonl").write_text("\n".join(lines)[:-10])
    call(passk, model, "-n", 7, *how)
    _, err = capsys.readouterr()
    assert "line 18 was not written to its end" in err
    assert "17 samples are there, 4 are missing" in err
    again = (out / "samples.jsonl").read_text().splitlines()
    assert again[:17] == lines[:17]
    assert lines[17] in again
    assert len(again) == 21

    for flag, what in (("--temperature=0.5", "temperature=1.0, not 0.5"), ("--task-seed=1", "task_seed=0, not 1")):
        with pytest.raises(UserError, match=re.escape(f"{out}: its samples are of {what}")):
            call(passk, model, *how, flag)
    (out / "samples.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(UserError, match=r"samples.jsonl: line 1: damaged: id must be str"):
        call(passk, model, *how)


def test_what_passk_draws_is_what_a_search_draws(model, task, tmp_path, capsys):
    call(passk, model, "--task", task, "-n", 3, "--out", tmp_path / "out", *SMALL)
    call(solve, model, "--task", task, "--search=best_of:3", "--out", tmp_path / "found.jsonl", *SMALL)
    samples = [json.loads(line)["text"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for number, line in enumerate((tmp_path / "found.jsonl").read_text().splitlines()):
        assert {each["text"] for each in json.loads(line)["answers"]} == set(samples[3 * number : 3 * number + 3])


@pytest.mark.parametrize(
    ("message", "command", "flags"),
    [
        ("what is to be solved? give --task or --prompt; --task countdown:3:steps", solve, []),
        ("what is to be solved?", solve, [*TASK, "--prompt=a"]),
        ("--answer goes with --prompt", solve, [*TASK, "--answer=a"]),
        ("--task: task: unknown task 'bracket:4'; did you mean 'brackets'?", solve, ["--task=bracket:4"]),
        ("--search: unknown search 'bem'; did you mean 'beam'?", solve, [*TASK, "--search=bem"]),
        ("--search: search beam: it goes over steps", solve, [*TASK, "--search=beam"]),
        ("--guide: unknown guide 'verify'; did you mean 'verifier'?", solve, [*TASK, "--guide=verify"]),
        ("--guide=rollouts:2: it asks what is right", solve, ["--prompt=a", "--guide=rollouts:2"]),
        ("--budget: a budget of 5 tokens is smaller than one answer of up to 6", solve, [*TASK, "--budget=5"]),
        ("--template goes with --search=revise", solve, [*TASK, "--template={answer}"]),
        ("--show-tree: there is no problem 4", solve, [*TASK, "--show-tree=4"]),
        ("--problems must be at least 1, not 0", solve, [*TASK, "--problems=0"]),
        ("--max-tokens must be at least 1, not 0", solve, [*TASK, "--max-tokens=0"]),
        ("-n must be at least 1, not 0", passk, [*TASK, "-n", "0"]),
        ("whose problems? give --task", passk, []),
        ("--guide=rollouts:2: it draws samples of its own; jaxup solve", passk, [*TASK, "--guide=rollouts:2"]),
        ("--guide=consistency: the majority is it", passk, [*TASK, "--guide=consistency"]),
        ("greedily all samples are the same", passk, [*TASK, "--greedy"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(message, command, flags, model, tmp_path):
    with pytest.raises(UserError) as error:
        call(command, model, "--out", tmp_path / "out", *SMALL, *flags)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_prompts_and_models_that_cannot_be(model, task, tmp_path, capsys):
    with pytest.raises(UserError, match="a prompt of 40 tokens, and a text has 32 with its answer"):
        call(solve, model, "--prompt", "a" * 40, *SMALL)
    call(solve, model, "--prompt", "a" * 30, "--budget=6", *SMALL)
    assert "prompts of up to 30 tokens: their answers end before 6 tokens" in capsys.readouterr().err
    for command in (solve, passk):
        with pytest.raises(UserError, match=r"no such|not a|is neither|does not"):
            call(command, str(tmp_path / "none"), "--task", task, "--out", tmp_path / "out", *SMALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="other: there is something else; name another directory"):
        call(passk, model, "--task", task, "--out", tmp_path / "other", *SMALL)
    with pytest.raises(UserError, match="it exists"):
        call(solve, model, "--task", task, "--out", tmp_path / "other" / "file", *SMALL)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "other"]
