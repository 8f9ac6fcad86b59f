"""Layouts, in NumPy alone: what is fed where, at which step, and what it is to predict."""

import numpy as np
import pytest

from jaxup.continuous.examples import Example
from jaxup.continuous.layouts import (
    BEGIN,
    END,
    FIRST,
    LAYOUTS,
    MASK,
    NULL,
    Frames,
    Raster,
    Scales,
    Sets,
    down,
    uniforms,
    up,
)
from jaxup.continuous.sets import masked, sizes
from jaxup.errors import UserError

GRID = {"rows": 4, "columns": 4, "channels": 3, "length": 80}
MADE = {
    "raster": Raster(**GRID),
    "see": Raster(**GRID, see=True),
    "scales": Scales(**GRID, scales=(1, 2, 4)),
    "frames": Frames(**GRID, frames=3),
    "frames-sets": Frames(**GRID, frames=3, sets=True),
    "sets": Sets(**GRID),
    "sets-clip": Sets(**GRID, frames=3),
}


def example(layout, kind="draw", *, seed=0, prompt=(5, 6, 7), answer=()):
    values = np.random.default_rng(seed).normal(size=layout.shape).astype(np.float32)
    ids = {name: np.asarray(given, np.int32) for name, given in (("prompt", prompt), ("answer", answer))}
    return Example(kind=kind, values=None if kind == "text" else values, **ids)


def steps_of(batch):
    return batch.get("steps", np.arange(batch["tokens"].shape[1])[None].repeat(len(batch["tokens"]), 0))


def fed(batch):
    """What stands at each position, [B, S, ...], as one array."""
    values = np.take_along_axis(batch["values"], np.maximum(batch["fed"], 0)[..., None], 1)
    values = np.where(batch["fed"][..., None] >= 0, values, 0)
    return np.concatenate([batch[name][..., None] for name in ("tokens", "vectors", "places")] + [values], -1)


@pytest.mark.parametrize("name", MADE)
def test_no_input_up_to_a_step_depends_on_what_that_step_predicts(name):
    """Each token changed by itself; of a pyramid so that the coarser maps, which are fed before, stay what they are."""
    layout = MADE[name]
    kinds = ["draw", "tell"] if layout.tells else ["draw"]
    for kind in kinds:
        own = example(layout, kind, answer=(8, 9) if layout.tells else ())
        one = layout.pack([own], [7])
        for token in range(layout.count):
            changed = own.values.copy().reshape(layout.count, -1)
            changed[token] += 1
            if name == "scales":  # its neighbour in the block makes up for it
                changed[token ^ 1] -= 1
            other = Example(kind=kind, prompt=own.prompt, values=changed.reshape(layout.shape), answer=own.answer)
            two = layout.pack([other], [7])
            differs = (one["value_targets"] != two["value_targets"]).any(-1) & (one["value_weights"] > 0)
            steps_S = steps_of(one)[0]
            # What is fed and not predicted may stand anywhere.
            before = steps_S <= steps_S[one["spots"][differs]].min(initial=steps_S.max()) if differs.any() else []
            np.testing.assert_array_equal(fed(one)[0][before], fed(two)[0][before])
            for field in ("tokens", "spots", "value_weights", "targets", "loss_weights"):
                np.testing.assert_array_equal(one[field], two[field])


def test_a_coarser_map_is_fed_to_the_next_and_no_earlier():
    layout = MADE["scales"]
    own = example(layout)
    values = own.values.reshape(2, 2, 2, 2, -1).copy()
    values[0, :, 0] += 1  # one block up and another down: the one map of all stays
    values[1, :, 1] -= 1
    other = Example(kind="draw", prompt=own.prompt, values=values.reshape(layout.shape), answer=own.answer)
    (one,), (two,) = (fed(layout.pack([each], [7])) for each in (own, other))
    changed = np.flatnonzero((np.abs(one - two) > 1e-6).any(-1))
    assert changed.min() >= 3 + 1 + 4
    assert changed.max() < 3 + 1 + 4 + 16


@pytest.mark.parametrize("name", MADE)
def test_a_row_is_prompt_then_blocks_and_padding_that_nothing_sees(name):
    layout = MADE[name]
    batch = layout.pack([example(layout), example(layout, "text", answer=(3, 4))], [1, 2])
    steps = steps_of(batch)
    assert np.diff(steps, axis=1).min() >= 0
    drawing, text = batch["tokens"]
    assert drawing[:3].tolist() == [5, 6, 7]
    assert (drawing[3 : 3 + layout.image] == -1).all()
    assert (drawing[3 + layout.image :] == 0).all()
    assert (np.diff(steps[0, 3 + layout.image - 1 :]) == 1).all()
    sizes_of_steps = np.unique(steps[0, 3 : 3 + layout.image], return_counts=True)[1].tolist()
    assert sizes_of_steps == {
        "raster": [1] * 18, "see": [1] * 18, "scales": [1, 4, 16], "frames": [16] * 3, "frames-sets": [16] * 3,
        "sets": [16], "sets-clip": [48],
    }[name]  # fmt: skip
    assert text[:5].tolist() == [5, 6, 7, 3, 4]
    assert batch["value_weights"][1].max() == 0
    assert batch["targets"][1, 2:4].tolist() == [3, 4]
    assert np.flatnonzero(batch["loss_weights"][1]).tolist() == [2, 3]
    assert batch["loss_weights"][0].sum() == 0
    assert {k: v.dtype for k, v in batch.items()} == {
        k: np.dtype({"noise": np.uint32}.get(k, np.int32 if v.dtype.kind == "i" else np.float32))
        for k, v in batch.items()
    }


def test_raster_in_words():
    layout = Raster(rows=1, columns=2, channels=1, length=9)
    values = np.asarray([[0.5], [0.25]], np.float32)
    ids = {"prompt": np.asarray([5, 6], np.int32), "answer": np.asarray([8, 9], np.int32)}
    draw, tell = (Example(kind=kind, values=values, **ids) for kind in ("draw", "tell"))
    batch = layout.pack([draw, tell], [0, 0])
    assert batch["tokens"].tolist() == [[5, 6, -1, -1, -1, -1, 8, 9, 0], [-1, -1, -1, -1, 5, 6, 8, 9, 0]]
    assert batch["vectors"][0].tolist() == [-1, -1, BEGIN, -1, -1, END, -1, -1, -1]
    assert batch["fed"].tolist() == [[-1, -1, -1, 0, 1, -1, -1, -1, -1], [-1, 0, 1, -1, -1, -1, -1, -1, -1]]
    assert batch["spots"].tolist() == [[2, 3], [0, 1]]
    assert batch["value_targets"][..., 0].tolist() == [[0.5, 0.25]] * 2
    assert batch["value_weights"].tolist() == [[1, 1], [0, 0]]
    assert batch["targets"].tolist() == [[0, 0, 0, 0, 0, 8, 9, 0, 0]] * 2
    assert batch["loss_weights"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 0, 0]] * 2
    seen = Raster(rows=1, columns=2, channels=1, length=9, see=True).pack([draw, tell], [0, 0])
    assert seen["value_weights"].tolist() == [[1, 1], [1, 1]]


def test_frames_are_fed_the_frame_before():
    layout = MADE["frames"]
    own = example(layout)
    batch = layout.pack([own], [0])
    assert (batch["vectors"][0, 3:19] == FIRST).all()
    assert (batch["vectors"][0, 19:51] == -1).all()
    np.testing.assert_array_equal(fed(batch)[0, 19:51, 3:], own.values[:2].reshape(32, 3))
    np.testing.assert_array_equal(batch["value_targets"][0], own.values.reshape(48, 3))
    assert batch["places"][0, 3:51].tolist() == list(range(16)) * 3


def test_sets_mask_what_they_predict_by_the_row_s_own_draw():
    layout = MADE["sets"]
    examples = [example(layout, seed=seed) for seed in range(3)]
    batch = layout.pack(examples, [11, 12, 11])
    hidden = batch["vectors"][:, 3:19] == MASK
    np.testing.assert_array_equal(hidden, batch["value_weights"] > 0)
    np.testing.assert_array_equal(batch["fed"][:, 3:19] < 0, hidden)
    assert (hidden[0] == hidden[2]).all()
    assert (hidden[0] != hidden[1]).any()
    alone = layout.pack(examples[1:2], [12])
    assert all((batch[name][1] == alone[name][0]).all() for name in batch)


def test_prompts_are_hidden_as_often_as_is_asked():
    layout = Sets(rows=1, columns=1, channels=1, length=4, drop=0.25)
    batch = layout.pack([example(layout)] * 400, np.arange(400))
    hidden = (batch["vectors"][:, :3] == NULL).all(1)
    # 400 draws of .25: a deviation of 8.7 around 100.
    assert 65 < hidden.sum() < 135
    assert ((batch["tokens"][:, :3] == -1).all(1) == hidden).all()


def test_random_numbers_of_a_draw_are_those_of_splitmix64():
    """From the seed 0, as its authors' code prints them."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert uniforms(np.zeros(1, np.uint32), 3).tolist() == [[(each >> 11) / 2**53 for each in expected]]
    of_many = uniforms(np.asarray([7, 0, 2**32 - 1], np.uint32), 2)
    assert of_many[1].tolist() == uniforms(np.zeros(1, np.uint32), 2)[0].tolist()
    assert len(set(of_many.ravel().tolist())) == 6


def test_rows_of_text_alone_are_a_batch_of_any_layout():
    for layout in MADE.values():
        batch = layout.pack([example(layout, "text", answer=(3, 4))], [1])
        assert batch["tokens"][0, :5].tolist() == [5, 6, 7, 3, 4]
        assert not batch["value_weights"].any()


def test_schedules_of_sets():
    assert sizes(64, 8, "nova") == (1, 4, 6, 8, 9, 12, 12, 12)
    assert sizes(64, 8, "mar") == (2, 3, 6, 8, 10, 11, 12, 12)
    for schedule in ("nova", "mar"):
        assert sizes(64, 1, schedule) == (64,)
        for count in (1, 2, 3, 16, 64):
            for sets in range(1, count + 1):
                found = sizes(count, sets, schedule)
                assert sum(found) == count
                assert min(found) >= 1
                assert len(found) <= sets
    assert sizes(64, 64, "mar")[:2] == (1, 1)  # one by one while the cosine is flat


def test_masked_share():
    order = np.arange(1000)
    shares = [masked(u, order).mean() for u in np.linspace(0, 1, 201)]
    assert shares[0] == 0.7
    assert shares[-1] == 1
    # The mean of a normal around 1, deviation .25, between .7 and 1: 1 - .25 * (phi(0) - phi(1.2)) / (1/2 - Phi(-1.2)).
    assert abs(np.mean(shares) - 0.8670) < 0.002
    assert masked(0.0, np.arange(1)).all()


def test_down_is_the_mean_of_blocks_and_up_repeats():
    values = np.arange(16.0).reshape(16, 1)
    assert down(values, 2)[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert down(values, 1)[:, 0].tolist() == [7.5]
    assert up(down(values, 2), 4)[:, 0].tolist() == [2.5, 2.5, 4.5, 4.5] * 2 + [10.5, 10.5, 12.5, 12.5] * 2


def changed(**fields):
    layout = fields.pop("layout", MADE["raster"])
    own = example(layout)
    given = {name: getattr(own, name) for name in ("kind", "prompt", "values", "answer")}
    return layout, Example(**given | fields)


NAN = np.where(np.arange(48).reshape(16, 3) == 21, np.nan, 0).astype(np.float32)


@pytest.mark.parametrize(("fields", "message"), [
    ({"values": NAN}, "example 1: its values are not all finite; token 7 is the first such one"),
    ({"values": np.zeros((16, 4), np.float32)}, "its values are 16 x 4, and the layout is of 16 x 3"),
    ({"values": np.zeros((9, 3), np.float32)}, "its values are 9 x 3, and the layout is of 16 x 3"),
    ({"values": None}, "it is of kind 'draw' and has no values"),
    ({"kind": "text"}, "it is of kind 'text' and has values"),
    ({"prompt": np.zeros(63, np.int32)}, "it takes 81 positions, and a row has 80"),
    ({"layout": MADE["sets"], "kind": "tell"}, "layout 'sets' draws and cannot tell of an image; layout 'raster' can"),
    ({"layout": MADE["frames"], "answer": np.ones(1, np.int32)}, "layout 'frames' has no text after an image"),
])  # fmt: skip
def test_examples_that_do_not_fit(fields, message):
    layout, wrong = changed(**fields)
    with pytest.raises(UserError) as error:
        layout.check([example(layout), wrong])
    assert message in str(error.value)
    assert str(error.value).startswith("example 1: ")


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Scales(**GRID, scales=(1, 2)), "scales=(1, 2) must end in the side of the grid, a square; it is 4 x"),
    (lambda: Scales(**GRID, scales=(3, 4)), "scales: scales=(3, 4): 4 is no larger multiple of 3"),
    (lambda: Scales(**GRID, scales=(2, 2, 4)), "2 is no larger multiple of 2"),
    (lambda: Scales(**GRID | {"columns": 8}, scales=(1, 4)), "it is 4 x 8"),
    (lambda: Scales(**GRID, scales=(4,), frames=2), "a clip has no scales"),
    (lambda: Frames(**GRID), "frames: frames=0: images have no frames; layout 'sets' draws images"),
    (lambda: Sets(**GRID, drop=1.0), "sets: drop=1.0 is no share of the prompts"),
    (lambda: Raster(**GRID | {"channels": 0}), "raster: channels=0 must be a positive integer"),
    (lambda: sizes(4, 5, "mar"), "sets=5 is no number of sets for 4 tokens; from 1 to 4"),
    (lambda: sizes(4, 2, "novo"), "schedule='novo' is not one of ('nova', 'mar'); did you mean 'nova'?"),
])  # fmt: skip
def test_layouts_that_cannot_be(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


def test_the_registry_has_all():
    assert {layout.name for layout in MADE.values()} == set(LAYOUTS)
