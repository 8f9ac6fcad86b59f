"""Runs that answered the same problems, compared problem by problem; by hand."""

import json

import pytest

from jaxup.errors import UserError
from jaxup.experiments.paired import compared


def run(directory, before, after, problems=("a", "b")):
    directory.mkdir(parents=True)
    about = {"samples": 4, "problems": problems, "before": before, "after": after}
    (directory / "answers.json").write_text(json.dumps(about))
    return directory


def tables(lines):
    """Each as {name: the means of its cells, in percent}."""
    found = []
    for line in lines:
        if line.startswith("|---"):
            found.append({})
        elif line.startswith("| `"):
            name, *row = line.strip("| ").split(" | ")
            found[-1][name.strip("`")] = [float(cell.split("%")[0]) for cell in row]
    return found


def test_the_mean_over_seeds_is_compared_problem_by_problem(tmp_path):
    runs = {
        "control": [run(tmp_path / "c0", [0, 4], [1, 4]), run(tmp_path / "c1", [2, 4], [1, 4])],
        "grpo": [run(tmp_path / "g0", [0, 4], [3, 4]), run(tmp_path / "g1", [2, 4], [4, 4])],
    }
    reached, more_than_before, more_than_control = tables(compared(tmp_path, runs, "control"))
    # pass@1 and pass@4, the mean of two problems, and of each that of two seeds.
    assert reached == {"before": [62.5, 75.0], "control": [62.5, 100.0], "grpo": [93.8, 100.0]}
    assert more_than_before == {"control": [0.0, 25.0], "grpo": [31.2, 25.0]}
    assert more_than_control == {"grpo": [31.2, 0.0]}
    assert (tmp_path / "plots" / "pass_at_k.png").stat().st_size > 0


def test_cells_that_begin_with_different_models(tmp_path):
    runs = {"control": [run(tmp_path / "c", [0, 4], [1, 4])], "half": [run(tmp_path / "h", [0, 0], [0, 2])]}
    reached, more_than_before, _ = tables(compared(tmp_path, runs, "control"))
    assert reached["control, before"] == [50.0, 50.0]
    assert reached["half, before"] == [0.0, 0.0]
    assert more_than_before == {"control": [12.5, 50.0], "half": [25.0, 50.0]}


def test_what_cannot_be_paired(tmp_path):
    one, other = run(tmp_path / "a", [0, 1], [1, 1]), run(tmp_path / "b", [0, 1], [1, 1], problems=("a", "c"))
    assert compared(tmp_path, {"control": [one]}, "control") == []  # nothing to compare it with
    assert compared(tmp_path, {"control": [one], "none": [tmp_path]}, "control") == []  # no answers
    assert "not paired" in compared(tmp_path, {"control": [one], "grpo": [other]}, "control")[-1]
    short = run(tmp_path / "short", [0], [1, 1])
    with pytest.raises(UserError, match=r"answers\.json: damaged: not a number for each problem"):
        compared(tmp_path, {"control": [one], "grpo": [short]}, "control")
