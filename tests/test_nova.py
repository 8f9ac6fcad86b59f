"""Clips frame by frame, and textures in more and fewer sets: what a run of configs/nova.py leaves."""

import io
import itertools
import json

import numpy as np
import pytest
import runs
from PIL import Image

from jaxup import train
from jaxup.continuous.judge import valid_textures
from jaxup.continuous.sets import SCHEDULES, drawn_together, sizes
from jaxup.continuous.showing import sheet
from jaxup.experiments.config import load

pytest.importorskip("sklearn")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_how_likely_two_tokens_are_drawn_together(schedule):
    for count, sets in ((16, 1), (16, 4), (16, 16), (5, 3), (1, 1)):
        numbers = np.repeat(range(len(each := sizes(count, sets, schedule))), each)
        together = [a == b for a, b in itertools.combinations(numbers, 2)]
        assert drawn_together(count, sets, schedule) == pytest.approx(np.mean(together) if together else 0)
    assert drawn_together(16, 1, schedule) == 1


def test_what_heeds_all_that_is_drawn_before_is_as_valid_as_is_said():
    """A model of textures that is exact, of which only the tokens of one set do not know of each other."""
    rng, count, sets = np.random.default_rng(0), 2000, 4
    order = rng.permuted(np.tile(np.arange(16), (count, 1)), axis=1)
    drawn = np.full((count, 16), -1)
    rows = np.arange(count)[:, None]
    for start, size in zip(np.cumsum((0, *sizes(16, sets, "nova"))), sizes(16, sets, "nova")):
        now = order[:, start : start + size]
        neighbours = drawn[rows, now ^ 1]
        drawn[rows, now] = np.where(neighbours >= 0, 1 - neighbours, rng.integers(0, 2, now.shape))
    pictures = (255 * drawn).reshape(count, 4, 4).repeat(2, 1).repeat(2, 2).astype(np.uint8)
    # Even if all pairs of a picture went together, the deviation of their mean would be .0075: four of them.
    assert abs(valid_textures(pictures)[0] - (1 - drawn_together(16, sets, "nova") / 2)) < 0.03


@pytest.mark.parametrize("colours", [(), (3,)])
def test_a_sheet_has_what_was_asked_for_a_real_picture_and_what_was_drawn(colours):
    rng = np.random.default_rng(0)
    real, drawn = (rng.integers(0, 200, (2, count, 16, 16, *colours)).astype(np.uint8) for count in (1, 3))
    shown = np.asarray(Image.open(io.BytesIO(sheet(["draw 7", "draw a longer one"], real, drawn))))
    assert shown.shape[0] == 20 + 2 * 64 + 2
    for row in range(2):
        top = 20 + row * 66
        np.testing.assert_array_equal(shown[top : top + 64, -64:], drawn[row, 2].repeat(4, 0).repeat(4, 1))
        left = shown.shape[1] - (3 * 64 + 2 * 2) - 14 - 64
        np.testing.assert_array_equal(shown[top : top + 64, left : left + 64], real[row, 0].repeat(4, 0).repeat(4, 1))
        assert (shown[top : top + 64, :left] < 100).any()  # words


def test_the_study_compares_at_one_depth():
    c = load("nova.py")
    cells = c.study.cells
    assert cells["nova"] == {}
    assert cells["unscaled"] == {"continuous.scale_shift": False}
    alone = cells["spatial"]
    assert alone["model.num_layers"] == c.model.num_layers + c.continuous.spatial.layers
    # As many tokens are drawn one after the other.
    assert alone["continuous.sets"] == 8 * c.continuous.sets


def _taught(variant, directory, *more):
    small = ["--config.eval.rows=8", "--config.eval.batch_size=8", "--config.continuous.drawn=12", *more]
    with runs.devices(1):
        train.main(["train", f"--config=nova.py:smoke,{variant}", f"--workdir={directory}", *small])
    return json.loads((directory / "tasks.json").read_text())


@pytest.mark.slow
def test_textures_are_drawn_in_more_and_fewer_sets(tmp_path):
    tasks = _taught("xor", tmp_path / "run")
    best = [tasks[f"valid_pairs_in_{sets}_at_best"] for sets in (1, 2, 4, 8, 16)]
    assert best[0] == 0.5
    assert best == sorted(best)
    assert all(0 <= tasks[f"valid_pairs_in_{sets}"] <= 1 for sets in (1, 2, 4, 8, 16))
    assert "drawn in 1 set |" in (tmp_path / "run" / "SUMMARY.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["", "head=diffusion"])
def test_clips_are_drawn_and_their_late_frames_measured(arm, tmp_path):
    tasks = _taught(arm, tmp_path / "run")
    late = np.mean([tasks[f"position_error_{frame}"] for frame in range(4, 8)])
    assert tasks["position_error_late"] == pytest.approx(late)
    assert tasks["position_error_late_shuffled"] > 0
    assert (tmp_path / "run" / "plots" / "samples.png").is_file()
