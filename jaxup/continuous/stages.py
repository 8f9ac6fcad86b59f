"""A flow in stages of growing resolution: each goes part of the way from noise to an image.

E-CAR (arXiv 2412.14170) turns the token maps of an autoregressive decoder into images so; the mathematics is Pyramid
Flow's (arXiv 2410.05954), which has the same construction. All but the last stage see fewer tokens, so that they are
cheap. Everything here works on NumPy's arrays and on jax's alike: the host packs examples with the code that samples.

Shape suffixes: N tokens of a map (row after row), C channels of a token, H rows and W columns of blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from jaxup.errors import UserError, suggest

JUMPS = ("corrected", "plain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """`count` maps of an image, each with twice the rows and columns of the one before; the last is `grid`.

    Stage k begins at a * noise + (1 - a) * Up(Down_{k-1}(image)) and ends at b * noise + (1 - b) * Down_k(image);
    `levels` has a and b. Between stages the map is upsampled, by which four tokens get the same noise. The jump makes
    it white again: A * Up(end) + B * n', where n' has in each block of four the variances 1 and the covariances -1/3.
    That has more noise than the end had, so that the next stage begins above the level at which the last one ended:
    three run from 1 to 2/3, from .8 to 1/3 and from .5 to 0.

    One stage is a plain flow, from noise to the image. `jump="plain"` only upsamples, in training as in sampling: noise
    is drawn for the smallest map, and never again.
    """

    grid: tuple[int, int]  # rows and columns of tokens
    count: int
    jump: str

    def __post_init__(self):
        if self.jump not in JUMPS:
            raise UserError(f"unknown {self.jump!r}{suggest(self.jump, JUMPS)}", at="stages.jump")
        if self.count < 1:
            raise UserError("must be at least 1", at=f"stages={self.count}")
        factor = 2 ** (self.count - 1)
        if not all(side > 0 and side % factor == 0 for side in self.grid):
            rows, columns = self.grid
            raise UserError(
                f"a grid of {rows}x{columns} tokens cannot be halved {self.count - 1} times", at=f"stages={self.count}",
                hint=f"rows and columns must be multiples of {factor}",
            )  # fmt: skip

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each map, the smallest first."""
        rows, columns = self.grid
        return tuple((rows >> k, columns >> k) for k in reversed(range(self.count)))

    @functools.cached_property
    def levels(self) -> tuple[tuple[float, float], ...]:
        """The share of noise at the start and at the end of each stage."""
        ends = [(self.count - 1 - k) / self.count for k in range(self.count)]
        starts = [1.0]
        for end in ends[:-1]:
            starts.append(end if self.jump == "plain" else 2 * end / (1 + end))
        return tuple(zip(starts, ends))

    @property
    def cost(self) -> float:
        """What steps of equal number in each stage cost, of what as many cost at the last one, if a token costs the
        same everywhere: .4375 with three."""
        return sum(math.prod(grid) for grid in self.grids) / (self.count * math.prod(self.grid))

    def down(self, image_NC: Any, stage: int) -> Any:
        """[..., N, C] of the whole grid -> the map of this stage: means of blocks."""
        rows, columns = self.grids[stage]
        factor = self.grid[0] // rows
        *batch, _, channels = image_NC.shape
        blocks = image_NC.reshape(*batch, rows, factor, columns, factor, channels)
        return blocks.mean(axis=(-4, -2)).reshape(*batch, rows * columns, channels)

    def up(self, map_NC: Any, stage: int) -> Any:
        """[..., N, C] of this stage -> the map of the next: each token four times."""
        rows, columns = self.grids[stage]
        *batch, _, channels = map_NC.shape
        xp = map_NC.__array_namespace__()
        blocks = xp.broadcast_to(
            map_NC.reshape(*batch, rows, 1, columns, 1, channels), (*batch, rows, 2, columns, 2, channels)
        )
        return blocks.reshape(*batch, 4 * rows * columns, channels)

    def jumped(self, end_NC: Any, white_NC: Any, stage: int) -> Any:
        """The start of the stage after this one, from this one's end and white noise of the next one's shape."""
        if self.jump == "plain":
            return self.up(end_NC, stage)
        # A and B of Pyramid Flow, where s is the share of the image before the jump. A block of white noise without
        # its mean has the variances 3/4 and the covariances -1/4.
        s = 1 - self.levels[stage][1]
        a = 1 / (2 - s)
        b = math.sqrt(3) * a * (1 - s)
        rows, columns = self.grids[stage]
        *batch, _, channels = white_NC.shape
        blocks = white_NC.reshape(*batch, rows, 2, columns, 2, channels)
        fix_NC = (blocks - blocks.mean(axis=(-4, -2), keepdims=True)).reshape(white_NC.shape)
        return a * self.up(end_NC, stage) + b * math.sqrt(4 / 3) * fix_NC

    def chain(self, image_NC: Any, white: Sequence[Any]) -> list[tuple[Any, Any]]:
        """(start, end) of each stage, [..., N, C] of its grid, for an image and white noise of each map's shape.

        Noise goes on from stage to stage as it does when an image is drawn, where each stage begins with the jump from
        the end of the one before: so a decoder that is fed the upsampled end, as scale k + 1 is, sees beside each start
        what it will see then, and not an end with other noise.
        """
        pairs: list[tuple[Any, Any]] = []
        start_NC = noise_NC = white[0]
        for stage, (level, end) in enumerate(self.levels):
            if stage:
                before = self.levels[stage - 1][1]
                start_NC = self.jumped(pairs[-1][1], white[stage], stage - 1)
                # The jump is linear: of an end that is noise alone it gives the noise of the start.
                noise_NC = self.jumped(before * noise_NC, white[stage], stage - 1) / level
            pairs.append((start_NC, end * noise_NC + (1 - end) * self.down(image_NC, stage)))
        return pairs
