"""The stages of a flow: what the jump makes of noise, and what training sees against what drawing sees.

Everything in a chain is linear, so that laws are compared as matrices: a chain of the unit vectors of one of its inputs
has that input's part of the whole.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxup.continuous.stages import Stages
from jaxup.errors import UserError

GRIDS = [((4, 4), 2), ((8, 8), 3), ((8, 16), 4), ((4, 12), 3)]


def corrected(grid, count):
    return Stages(grid=grid, count=count, jump="corrected")


def tokens(stages):
    return [math.prod(grid) for grid in stages.grids]


def parts(stages):
    """(of the image [N, N], of all noise [sum of tokens, N]) in each start and end, for float64 unit vectors."""
    sizes = tokens(stages)
    borders = [0, *itertools.accumulate(sizes)]
    units = np.eye(borders[-1])[..., None]
    image, none = np.eye(sizes[-1])[..., None], [np.zeros((sizes[-1], size, 1)) for size in sizes]
    noise = [units[:, first:last] for first, last in itertools.pairwise(borders)]
    of_image = stages.chain(image, none)
    of_noise = stages.chain(np.zeros((borders[-1], sizes[-1], 1)), noise)
    return [[a[..., 0] for a in (*x, *n)] for x, n in zip(of_image, of_noise)]


def test_levels():
    assert np.allclose(corrected((8, 8), 3).levels, [(1, 2 / 3), (0.8, 1 / 3), (0.5, 0)], atol=1e-15)
    for grid, count in GRIDS:
        levels = corrected(grid, count).levels
        for (_, end), (start, _) in itertools.pairwise(levels):
            s = 1 - end
            assert math.isclose(1 - start, s / (2 - s), rel_tol=1e-14)
        assert (levels[0][0], levels[-1][1]) == (1, 0)
    plain = Stages(grid=(8, 8), count=3, jump="plain").levels
    assert [start for start, _ in plain[1:]] == [end for _, end in plain[:-1]]


def test_cost_of_equal_steps():
    assert corrected((8, 8), 3).cost == (1 + 4 + 16) / 48 == 0.4375
    assert corrected((4, 4), 1).cost == 1


@pytest.mark.parametrize(("grid", "count"), GRIDS)
def test_a_jump_makes_white_noise_of_upsampled_noise(grid, count):
    stages = corrected(grid, count)
    for stage, (small, large) in enumerate(itertools.pairwise(tokens(stages))):
        end, start = stages.levels[stage][1], stages.levels[stage + 1][0]
        old = stages.jumped(end * np.eye(small)[..., None], np.zeros((small, large, 1)), stage)[..., 0]
        new = stages.jumped(np.zeros((large, small, 1)), np.eye(large)[..., None], stage)[..., 0]
        assert np.allclose(old.T @ old + new.T @ new, start**2 * np.eye(large), atol=1e-12)
        # Of n' alone: variances 1, covariances -1/3 with the three others of a block, and none else.
        s = 1 - end
        fixing = new.T @ new / (3 * ((1 - s) / (2 - s)) ** 2)
        assert np.allclose(np.diag(fixing), 1)
        row = np.sort(fixing[0])
        assert np.allclose(row[:3], -1 / 3)
        assert np.allclose(row[3:-1], 0, atol=1e-12)


@pytest.mark.parametrize(("grid", "count"), GRIDS)
def test_training_has_the_law_of_drawing(grid, count):
    """Each stage by itself is a flow from its start's law to its end's, with the noise that they share; and each start
    is the jump from the end before it, which the decoder is fed."""
    stages = corrected(grid, count)
    image = np.eye(math.prod(grid))[..., None]
    for stage, ((start_x, end_x, start_n, end_n), (a, b)) in enumerate(zip(parts(stages), stages.levels)):
        one = np.eye(end_x.shape[1])
        assert np.allclose(start_n.T @ start_n, a * a * one, atol=1e-12)
        assert np.allclose(end_n.T @ end_n, b * b * one, atol=1e-12)
        assert np.allclose(start_n.T @ end_n, a * b * one, atol=1e-12)
        assert np.allclose(end_x, (1 - b) * stages.down(image, stage)[..., 0], atol=1e-12)
        before = stages.up(stages.down(image, stage - 1), stage - 1)[..., 0] if stage else 0
        assert np.allclose(start_x, (1 - a) * before, atol=1e-12)

    random = np.random.default_rng(0)
    white = [random.normal(size=(3, size, 2)) for size in tokens(stages)]
    pairs = stages.chain(random.normal(size=(3, math.prod(grid), 2)), white)
    for stage, ((_, end), (start, _)) in enumerate(itertools.pairwise(pairs)):
        assert np.array_equal(start, stages.jumped(end, white[stage + 1], stage))


def test_without_the_correction_maps_are_only_upsampled():
    stages, random = Stages(grid=(4, 8), count=3, jump="plain"), np.random.default_rng(0)
    white = [random.normal(size=(size, 2)) for size in tokens(stages)]
    image = random.normal(size=(32, 2))
    pairs = stages.chain(image, white)
    for stage, ((_, end), (start, _)) in enumerate(itertools.pairwise(pairs)):
        assert np.array_equal(start, stages.up(end, stage))
    assert np.array_equal(pairs[-1][1], image)
    # The same noise all the way, each number of it copied.
    of_noise = stages.chain(np.zeros_like(image), white)[1][1] / stages.levels[1][1]
    assert np.allclose(of_noise, stages.up(white[0], 0), atol=1e-15)


def test_one_stage_is_a_plain_flow():
    random = np.random.default_rng(0)
    image, white = random.normal(size=(2, 2, 16, 3)).astype(np.float32)
    ((start, end),) = corrected((4, 4), 1).chain(image, [white])
    assert np.array_equal(start, white)
    assert np.array_equal(end, image)
    assert start.dtype == end.dtype == np.float32


def test_down_and_up_are_means_and_copies_of_blocks():
    stages = corrected((4, 8), 3)
    image = np.random.default_rng(0).normal(size=(4, 8, 2))
    means = image.reshape(2, 2, 4, 2, 2).mean((1, 3)).reshape(8, 2)
    assert np.allclose(stages.down(image.reshape(32, 2), 1), means)
    assert np.array_equal(stages.up(means, 1), np.repeat(np.repeat(means.reshape(2, 4, 2), 2, 0), 2, 1).reshape(32, 2))


def test_jax_computes_what_numpy_computes():
    stages, random = corrected((8, 8), 3), np.random.default_rng(0)
    image = random.normal(size=(2, 64, 3)).astype(np.float32)
    white = [random.normal(size=(2, size, 3)).astype(np.float32) for size in tokens(stages)]
    ours = jax.jit(stages.chain)(jnp.asarray(image), [*map(jnp.asarray, white)])
    # Some ten roundings of numbers of up to 4.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-6), ours, stages.chain(image, white))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": (6, 8)}, "stages=3: a grid of 6x8 tokens cannot be halved 2 times; rows and columns must be"),
        ({"grid": (0, 8)}, "a grid of 0x8 tokens"),
        ({"count": 0}, "stages=0: must be at least 1"),
        ({"jump": "corected"}, "stages.jump: unknown 'corected'; did you mean 'corrected'?"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(UserError) as error:
        Stages(**{"grid": (8, 8), "count": 3, "jump": "corrected", **fields})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
