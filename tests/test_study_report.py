"""What a study says: STUDY.md, its numbers and pictures."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats
from outcomes import outcome
from test_stopping import RULE, grid

from jaxup.experiments import study_pictures
from jaxup.experiments.comparison import difference, summarise
from jaxup.experiments.study_report import write_study


def study(count, seeds=3, **more):
    """Cells of which each is .1 worse than the one before, and the third is as good as the second, the control."""
    means = [2.9, 3.0, 3.0, *np.arange(3.1, 9, 0.1)][:count]
    noise = np.random.default_rng(0).normal(0, 0.01, (seeds, count))
    noise[:, 2:3] = [[0.02], [-0.02], [0.001]][:seeds]
    return [
        outcome(f"cell_{i}", seed, mean + seed + noise[seed, i], **more)
        for seed in range(seeds) for i, mean in enumerate(means)
    ]  # fmt: skip


def written(directory, outcomes, control="cell_1", **more):
    text = write_study(directory, "A study", outcomes, control, ["how"], **more)
    assert (directory / "STUDY.md").read_text() == text
    return text, json.loads((directory / "study.json").read_text())


def test_the_finding_comes_first(tmp_path):
    text, numbers = written(tmp_path, study(4))
    lines = text.splitlines()
    assert lines[0] == "# A study"
    by_cell = {cell.name: cell for cell in summarise(study(4))}
    first, control = by_cell["cell_0"], by_cell["cell_1"]
    less, more = (difference(study(4), name, "cell_1").mean for name in ("cell_0", "cell_3"))
    assert lines[2] == (
        f"`cell_0` has the lowest mean validation loss: {first.mean:.4f} nats per token, with a standard deviation of "
        f"{first.spread:.4f} over 3 seeds. Of the cells compared with the control `cell_1` ({control.mean:.4f}), seed "
        f"by seed: `cell_0` ({less:+.4f}) has a lower loss than it; `cell_3` ({more:+.4f}) has a higher loss than it; "
        "no difference to it is shown for `cell_2`."
    )
    assert lines[4] == "how"
    row = next(line for line in lines if line.startswith("| `cell_2`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    found = difference(study(4), "cell_2", "cell_1")
    assert cells[1:4] == ["3", f"{summarise(study(4))[2].mean:.4f}", f"{summarise(study(4))[2].spread:.4f}"]
    assert cells[4:8] == [
        f"{found.mean:+.4f}", f"[{found.bootstrap.low:+.4f}, {found.bootstrap.high:+.4f}]",
        f"[{found.student.low:+.4f}, {found.student.high:+.4f}]", "no difference",
    ]  # fmt: skip
    assert "`--config.study.seeds=0,1,2,3,4,5`" in text
    assert [d["verdict"] for d in numbers["differences"]] == ["better", "no difference", "worse"]
    assert numbers["runs"][0]["curve"] == [list(point) for point in study(4)[0].curve]
    assert numbers["cost"] == {"tokens": 12 * 100 * 8 * 32, "flops": 1.2e10}
    assert "at equal FLOPs" not in text
    assert "12 runs took 307,200 tokens and 1.2e+10 FLOPs" in text
    assert "comparisons at 95%" not in text
    assert "Is it right" not in text


def test_the_order_of_runs_changes_nothing(tmp_path):
    """But that of equal cells: a study that was killed and went on has the same table."""
    text, _ = written(tmp_path, study(5))
    assert written(tmp_path, study(5)[::-1])[0] == text


def test_one_seed_tells_no_difference(tmp_path):
    text, numbers = written(tmp_path, study(3, seeds=1))
    least = difference(study(3, seeds=1), "cell_0", "cell_1").mean
    assert f"`cell_0` is {-least:.4f} below it." in text.splitlines()[2]
    assert "One seed: by how much another one's numbers differ is not measured" in text.splitlines()[2]
    assert {d["verdict"] for d in numbers["differences"]} == {"one seed"}
    assert numbers["differences"][0]["student"]["low"] is None


def test_what_did_not_come_to_its_end(tmp_path):
    outcomes = study(6)
    gone = {"score": math.nan, "steps": 20, "flops": 2e8, "curve": ((0, 9.0), (20, 5.0))}
    for index, why in ((0, "its norm | was high"), (1, "diverged: loss nan"), (3, "")):
        outcomes[index] = dataclasses.replace(outcomes[index], stopped=why, **gone)
    text, _ = written(tmp_path, outcomes, rule=RULE)
    assert "## What diverged\n\n- `cell_1-0` at step 20 of 100: diverged: loss nan\n" in text
    assert "## What was stopped\n\n- `cell_0-0` at step 20 of 100: its norm \\| was high\n" in text
    assert "That saved 8e+08 FLOPs, 4% of what all runs would have taken." in text
    assert "## What is not at its end\n\n- `cell_3-0`: step 20 of 100\n" in text
    assert "Not tested here" in text
    assert "Left out, since only the cell or only the control came to its end: `cell_2` (seed 0)" in text
    assert "Of 5 comparisons at 95% about 0.3 are said to differ" in text
    nothing, _ = written(tmp_path, [dataclasses.replace(o, stopped="poor") for o in outcomes])
    assert nothing.splitlines()[2] == "No run came to its end: there is nothing to compare."
    control = [dataclasses.replace(o, stopped="poor") if o.cell == "cell_1" else o for o in outcomes]
    assert "The control `cell_1` did not come to its end" in written(tmp_path, control)[0]


def test_a_seed_fewer_is_not_the_best(tmp_path):
    outcomes = [o for o in study(3) if o.cell != "cell_0" or o.seed == 0]
    assert not written(tmp_path, outcomes)[0].splitlines()[2].startswith("`cell_0`")


@pytest.mark.parametrize(
    ("sign", "noise", "said"),
    [
        (1.0, 0.01, "Here the same is found within groups, at each moment."),
        (-0.5, 0.01, "is not reproduced: within groups a signal goes the other way."),
        (1.0, 3.0, "is not reproduced: within groups the interval of its correlation holds 0 for gradient norm"),
    ],
)
def test_whether_the_published_indicator_is_reproduced(tmp_path, sign, noise, said):
    text, numbers = written(tmp_path, grid(sign=sign, noise=noise), control="rate 0", rule=RULE)
    assert said in text
    assert "| gradient norm | within groups | " in text
    assert "| norms | 15 of 24 | " in text or sign < 0 or noise > 1
    assert numbers["stopping"]["prunings"][2]["rule"] == "random"


def test_what_is_drawn(tmp_path):
    measures = {"deletion_loss": np.array([1.0, 0.1, 0.01]), "one": np.ones(1), "../odd": np.ones(3)}
    changes = {f"cell_{i}": {"batch_size": (8, 16)[i // 3], "rate": (1e-3, 2e-3, 1e-2)[i % 3]} for i in range(6)}
    written(tmp_path, study(6, measures=measures), changes=changes)
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    names = {"validation_loss", "differences", "grid", "layers_deletion_loss", "layers_.._odd"}
    assert drawn == {f"{name}.png" for name in names}
    assert {path.read_bytes()[:4] for path in (tmp_path / "plots").iterdir()} == {b"\x89PNG"}

    cells = summarise(study(6))
    axes = study_pictures.grid("", cells, changes, "token").axes[0]
    assert axes.images[0].get_array().tolist() == [[c.mean for c in cells[:3]], [c.mean for c in cells[3:]]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.002", "0.01"]
    assert study_pictures.grid("", cells[:5], changes, "token") is None
    assert study_pictures.grid("", cells, {}, "token") is None

    many = summarise(study(30))
    looks = study_pictures._looks(many, "cell_1")
    assert [name for name, look in looks.items() if look.shown] == ["cell_0", "cell_2", "cell_3", "cell_1"]
    figure = study_pictures.over_tokens("", study(30), many, looks, "token")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][-1] == "26 others"
    assert study_pictures.forest("", [difference(study(2, seeds=1), "cell_0", "none")], "none", "token") is None


def test_tasks_are_compared_as_losses_are(tmp_path):
    """Seed by seed, each with a table of its own; what has no value is named and left out of both cells."""
    judged = {"cell_0": [0.5, 0.6, 0.7], "cell_1": [0.2, 0.31, 0.4], "cell_2": [0.2, math.nan, 0.41]}
    outcomes = [
        dataclasses.replace(o, tasks={"judged": judged[o.cell][o.seed], **({"far": 12.5} if o.seed else {})})
        for o in study(3)
    ]
    text, numbers = written(tmp_path, outcomes)
    section = text[text.index("## `judged`") : text.index("## `far`")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "cell_" in line]
    table = {row[0]: row[1:] for row in rows if row[0].startswith("`cell_")}
    values = np.subtract(judged["cell_0"], judged["cell_1"])
    low, high = scipy.stats.t.interval(0.95, 2, values.mean(), scipy.stats.sem(values))
    assert table["`cell_0`"] == [
        "3", "0.6", "0.1", f"{values.mean():+.4g}", f"[{values.min():+.4g}, {values.max():+.4g}]",
        f"[{low:+.4g}, {high:+.4g}]", "higher",
    ]  # fmt: skip
    assert table["`cell_1`"][3:] == ["control", "", "", ""]
    assert table["`cell_2`"][0] == "2"
    assert table["`cell_2`"][-1] == "no difference (2 pairs)"
    assert "Without a value, and left out: `cell_2-1`." in section
    assert "Without a value, and left out: `cell_0-0`, `cell_1-0`, `cell_2-0`." in text
    assert numbers["tasks"]["judged"]["cells"][0]["values"] == judged["cell_0"]
    assert [d["verdict"] for d in numbers["tasks"]["judged"]["differences"]] == ["higher", "no difference"]
    assert [d["verdict"] for d in numbers["tasks"]["far"]["differences"]] == ["no difference"] * 2
    assert numbers["runs"][0]["tasks"] == {"judged": 0.5}
    assert "judged" not in written(tmp_path, study(3))[0]
    led = written(tmp_path, outcomes, of=["judged", "near"])[0].splitlines()[2]
    assert "`judged`: `cell_0` 0.6, `cell_2` 0.305, `cell_1` 0.3033." in led
    higher = f"Than the control `cell_1`, seed by seed: higher `cell_0` ({values.mean():+.3g}); no difference shown for"
    assert f"{higher} `cell_2`." in led
    assert "No run says what it reaches on `near`." in led
    assert "lowest mean validation loss" not in led


def test_other_pairs_than_those_with_the_control_are_compared_too(tmp_path):
    outcomes = [dataclasses.replace(o, tasks={"judged": o.score / 10}) for o in study(4)]
    text, numbers = written(tmp_path, outcomes, also=[("cell_3", "cell_0")])
    section = text[text.index("## Other pairs of cells") : text.index("## What it cost")]
    rows = [line for line in section.splitlines() if "cell_3" in line]
    assert ["validation loss" in rows[0], "judged" in rows[1], len(rows)] == [True, True, 2]
    for pair, task in zip(numbers["also"], ("", "judged"), strict=True):
        direct = difference(outcomes, "cell_3", "cell_0", task)
        assert (pair["task"], pair["less"], pair["cell"]) == (task, "cell_0", "cell_3")
        assert pair["values"] == [*direct.values]
        assert pair["verdict"] == direct.verdict
    assert "Other pairs" not in written(tmp_path, outcomes)[0]
