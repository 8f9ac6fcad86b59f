"""How far long work is: on a terminal, and line by line."""

import io
import sys

import pytest

from jaxup import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the bars see."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def train(clock):
    """A minute of compiling, then two seconds for each of 20 steps; two models of as much work follow."""
    with progress.Progress("a (model 1 of 3)", total=20, unit="steps", later=40.0) as bar:
        bar.doing("compiling")
        clock[0] = 60.0
        for step in range(1, 21):
            bar.update(step, f"loss {step}")
            clock[0] += 2
        bar.update(20, "validation loss 1.5000")


def test_lines(clock, capsys):
    train(clock)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["a (model 1 of 3): compiling", "a (model 1 of 3): 1/20 steps in 1:00  loss 1"]
    # The rate is that of the steps, without the minute before them.
    assert lines[2] == "a (model 1 of 3): 6/20 steps, 0.5/s, 0:28 left, of all about 1:48  loss 6"
    assert lines[-1] == "a (model 1 of 3): 20/20 steps in 1:40  validation loss 1.5000"
    assert sum("20/20" in line for line in lines) == 1


def test_the_last_words_on_a_terminal(clock, monkeypatch):
    for width, bar in ((200, True), (60, False)):
        clock[0] = 0.0
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "stderr", Terminal())
        train(clock)
        last = [line for line in sys.stderr.getvalue().splitlines() if line.strip("\x1b[?25hlK ")][-1]
        assert "a (model 1 of 3): 20/20 steps in 1:40  validation loss" in last
        assert ("━" in last) == bar
