"""Where the continuous tokens of an image stand in a row: which of them form a step, and what is fed where.

A *step* is what is computed at once: a position sees the positions of its own step and of those before it. A *value* is
one continuous token, float32 [C]. A prompt is a step for each of its tokens, as in any text; what follows it is a step
for each value (`Raster`), for each map of a pyramid (`Scales`), for each frame of a clip (`Frames`), or one for all
(`Sets`). Where no value is fed there is a learned vector instead. Nothing is added to the vocabulary.

Of every layout: no input at a step up to t depends on what is to be predicted at step t.

Shape suffixes: B batch, S positions of a row, M values that a row predicts, N tokens of an image or a frame, F frames,
C channels.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np

from jaxup.continuous.examples import Example, Kind
from jaxup.continuous.sets import masked
from jaxup.errors import UserError, nearest

# Learned vectors, by their rows in the table: before an image or in the place of its first map, after an image, in the
# place of a value to be predicted, in the place of the frame before the first, and in the place of a prompt that is not
# told.
BEGIN, END, MASK, FIRST, NULL = range(5)
VECTORS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout(abc.ABC):
    """How examples become rows of a batch; see the classes below.

    Args:
      rows, columns: of the grid that an image's tokens are in.
      channels: of a token.
      frames: of a clip; 0 = images.
      length: positions of a row; see `needs`.
      drop: the share of drawings whose prompt is hidden behind NULL, for guidance without a classifier.
    """

    rows: int
    columns: int
    channels: int
    length: int
    frames: int = 0
    drop: float = 0.0

    name: ClassVar[str]
    tells: ClassVar[bool] = False  # whether text may follow an image
    hides: ClassVar[bool] = False  # whether MASK stands where a value is to be predicted

    def __post_init__(self):
        for field in ("rows", "columns", "channels", "length"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} must be a positive integer", at=self.name)
        if self.frames < 0:
            raise UserError(f"frames={self.frames} is no number of frames", at=self.name)
        if not 0 <= self.drop < 1:
            raise UserError(f"drop={self.drop} is no share of the prompts, from 0 to below 1", at=self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an example's values: [N, C] or [F, N, C]."""
        return (*([self.frames] if self.frames else []), self.rows * self.columns, self.channels)

    @property
    def count(self) -> int:
        """Values of an image or of all frames of a clip."""
        return max(self.frames, 1) * self.rows * self.columns

    @property
    def predicted(self) -> int:
        """M: values that a row predicts."""
        return self.count

    @property
    def places(self) -> int:
        """How many places there are to tell values apart by."""
        return self.count

    @property
    def image(self) -> int:
        """Positions that an image or a clip takes, with what begins and ends it."""
        return self.predicted

    def needs(self, example: Example) -> int:
        """Positions that the example takes."""
        return len(example.prompt) + len(example.answer) + self.image * (example.kind != "text")

    def check(self, examples: Sequence[Example], at: str = "example") -> None:
        """UserError for the first example that does not go with the layout, by its index."""
        for index, example in enumerate(examples):
            if wrong := self._wrong(example):
                raise UserError(wrong, at=f"{at} {index}")

    def _wrong(self, example: Example) -> str:
        if example.kind not in (kinds := get_args(Kind)):
            return f"kind={example.kind!r} is not one of {kinds}{nearest(example.kind, kinds)}"
        if (example.kind == "text") != (example.values is None):
            return f"it is of kind {example.kind!r} and has {'values' if example.kind == 'text' else 'no values'}"
        if example.kind == "tell" and not self.tells:
            return f"layout {self.name!r} draws and cannot tell of an image; layout 'raster' can"
        if example.kind == "draw" and len(example.answer) and not self.tells:
            return f"layout {self.name!r} has no text after an image; layout 'raster' has"
        if example.values is not None:
            if (shape := np.shape(example.values)) != self.shape:
                return f"its values are {_shape(shape)}, and the layout is of {_shape(self.shape)}"
            if not np.isfinite(example.values).all():
                token = int(np.argwhere(~np.isfinite(example.values))[0][-2])
                return f"its values are not all finite; token {token} is the first such one"
        if (needed := self.needs(example)) > self.length:
            return f"it takes {needed} positions, and a row has {self.length}"
        return ""

    def pack(self, examples: Sequence[Example], draws_B: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The batch of these examples, a row each; a pure function of its arguments. `draws_B` are random uint32.

        Returns:
          tokens: int32 [B, S], -1 where something else is fed; targets int32 and loss_weights float32 [B, S] of text.
          steps: int32 [B, S], from 0; not there if each position is its own. Rows are padded at the end, in steps of
            their own, which nothing sees: so there are no segments.
          values: float32 [B, M, C], which are fed where `fed`, int32 [B, S], has their index; elsewhere it is -1.
          vectors, places: int32 [B, S], what else is fed: indices of learned vectors, added up; -1 = none.
          spots: int32 [B, M], the positions that predict value_targets, float32 [B, M, C], which count as
            value_weights, float32 [B, M].
          noise: uint32 [B], the draws, for what is drawn on the device.
        """
        B, S, M, C = len(examples), self.length, self.predicted, self.channels
        none = lambda: np.full((B, S), -1, np.int32)  # noqa: E731
        batch = {
            "tokens": np.zeros((B, S), np.int32), "targets": np.zeros((B, S), np.int32),
            "loss_weights": np.zeros((B, S), np.float32), "values": np.zeros((B, M, C), np.float32), "fed": none(),
            "vectors": none(), "places": none(), "spots": np.zeros((B, M), np.int32),
            "value_targets": np.zeros((B, M, C), np.float32), "value_weights": np.zeros((B, M), np.float32),
            "noise": np.asarray(draws_B, np.uint32),
        }  # fmt: skip
        uniform_BU = uniforms(batch["noise"], 1 + self._chances)
        for index, example in enumerate(examples):
            hidden = example.kind == "draw" and bool(uniform_BU[index, 0] < self.drop)
            self._write({name: batch[name][index] for name in _WORDS}, example, hidden)
        # Of images all rows at once: it is the calls that take the time.
        rows = np.asarray([index for index, example in enumerate(examples) if example.kind != "text"], np.int64)
        drawn = np.asarray([examples[row].kind == "draw" for row in rows], bool)[:, None]
        at = drawn * np.asarray([len(examples[row].prompt) for row in rows], np.int64)[:, None]
        block, own = self._block, (rows[:, None], at + np.arange(self.image))
        predicted = self._predicted(uniform_BU[rows, 1:])
        fed, vectors = block.fed[None], block.vectors[None]
        if self.hides:
            fed, vectors = np.where(predicted, -1, fed), np.where(predicted, MASK, vectors)
        batch["tokens"][own], batch["fed"][own], batch["vectors"][own] = -1, fed, vectors
        batch["places"][own], batch["spots"][rows] = block.places, at + block.spots
        batch["value_weights"][rows] = predicted & (drawn | getattr(self, "see", False))
        if rows.size:
            values = np.stack([np.reshape(examples[row].values, (self.count, C)) for row in rows], dtype=np.float32)
            batch["values"][rows], batch["value_targets"][rows] = self._maps(values)
        if block.steps is not None:
            index_S = np.arange(S, dtype=np.int32)
            batch["steps"] = np.repeat(index_S[None], B, axis=0)
            # After an image as many steps are missing as its positions are more than its steps.
            batch["steps"][rows] -= np.where(index_S < at + self.image, 0, self.image - 1 - block.steps[-1])
            batch["steps"][own] = at + block.steps
        return batch

    def _write(self, row: Mapping[str, np.ndarray], example: Example, hidden: bool) -> None:
        """The words of an example into its row: a prompt, before which or after which its image is, and an answer."""
        begin = self.image if example.kind == "tell" else 0
        end = len(example.prompt) + self.image * (example.kind != "text")
        prompt, answer = slice(begin, begin + len(example.prompt)), slice(end, end + len(example.answer))
        row["tokens"][prompt] = -1 if hidden else example.prompt
        if hidden:
            row["vectors"][prompt] = NULL
        if len(example.answer):
            row["tokens"][answer] = example.answer
            # Each is the target of the position before it, which the first of a row has not.
            first = int(end == 0)
            before = slice(end - 1 + first, answer.stop - 1)
            row["targets"][before], row["loss_weights"][before] = example.answer[first:], 1

    @property
    def stepwise(self) -> bool:
        """Whether some positions are one step."""
        return self._block.steps is not None

    @property
    @abc.abstractmethod
    def _block(self) -> _Block: ...

    @property
    def _chances(self) -> int:
        """U: how many random numbers it takes to choose what of a row is to be predicted."""
        return 0

    def _predicted(self, uniform_RU: np.ndarray) -> np.ndarray:
        """bool [R, M]: which values are to be predicted."""
        return np.ones((len(uniform_RU), self.predicted), bool)

    def _maps(self, values_RNC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[R, M, C]: what is fed of images, and what is predicted."""
        return values_RNC, values_RNC


_WORDS = ("tokens", "targets", "loss_weights", "vectors")  # what an example's words are written into


class _Block(NamedTuple):
    """The positions of an image or a clip, from its first on."""

    steps: np.ndarray | None  # from 0; None: each is its own
    fed: np.ndarray  # indices of values
    vectors: np.ndarray
    places: np.ndarray
    spots: np.ndarray  # which of them predict the M values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raster(Layout):
    """One value after the other, among words (MetaMorph, arXiv 2412.14164): BEGIN predicts the first value, each value
    the next, and END follows the last.

    Args:
      see: whether the values of an image that is asked about are predicted as well.
    """

    see: bool = False

    name: ClassVar[str] = "raster"
    tells: ClassVar[bool] = True

    @property
    def image(self) -> int:
        return self.count + 2

    @functools.cached_property
    def _block(self):
        value = np.arange(-1, self.count + 1)
        value[-1] = -1
        vectors = np.full(self.image, -1)
        vectors[[0, -1]] = BEGIN, END
        return _Block(None, fed=value, vectors=vectors, places=value, spots=np.arange(self.count))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales(Layout):
    """A pyramid of maps, each from all coarser ones (VAR, arXiv 2404.02905; E-CAR, arXiv 2412.14170).

    Args:
      scales: sides of the maps, which are squares. Each is a multiple of the one before, and the last is the grid.
    """

    scales: tuple[int, ...]

    name: ClassVar[str] = "scales"

    def __post_init__(self):
        super().__post_init__()
        if self.frames:
            raise UserError("a clip has no scales", at=self.name, hint="layout 'frames'")
        if not self.scales or self.scales[-1] != self.rows or self.rows != self.columns:
            raise UserError(
                f"scales={self.scales} must end in the side of the grid, a square; it is {self.rows} x {self.columns}",
                at=self.name,
            )
        for small, large in zip((1, *self.scales), self.scales):
            if small < 1 or large % small or (small == large and large > 1):
                raise UserError(f"scales={self.scales}: {large} is no larger multiple of {small}", at=self.name)

    @functools.cached_property
    def spans(self) -> tuple[slice, ...]:
        """Where the values of each map are among the M."""
        ends = np.cumsum([side * side for side in self.scales]).tolist()
        return tuple(slice(end - side * side, end) for side, end in zip(self.scales, ends))

    @property
    def predicted(self) -> int:
        return self.spans[-1].stop

    @property
    def places(self) -> int:
        return self.predicted

    @functools.cached_property
    def _block(self):
        index = np.arange(self.predicted)
        first = index < self.spans[0].stop
        steps = np.repeat(np.arange(len(self.scales)), [side * side for side in self.scales])
        return _Block(steps, np.where(first, -1, index), np.where(first, BEGIN, -1), places=index, spots=index)

    def _maps(self, values_RNC):
        maps = [down(values_RNC, side) for side in self.scales]
        fed = [up(coarser, side) for coarser, side in zip(maps, self.scales[1:])]
        return np.concatenate([np.zeros_like(maps[0]), *fed], axis=1), np.concatenate(maps, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames(Layout):
    """A clip frame by frame, each from all before it (NOVA, arXiv 2412.14169): what is fed is the frame before.

    Args:
      sets: whether a second decoder draws the tokens of a frame set by set: then those it is to predict are masked.
    """

    sets: bool = False

    name: ClassVar[str] = "frames"

    def __post_init__(self):
        super().__post_init__()
        if not self.frames:
            raise UserError("frames=0: images have no frames", at=self.name, hint="layout 'sets' draws images")

    @property
    def places(self) -> int:
        return self.rows * self.columns

    @functools.cached_property
    def _block(self):
        index, N = np.arange(self.count), self.places
        vectors = np.where(index < N, FIRST, -1)
        return _Block(index // N, fed=np.maximum(index - N, -1), vectors=vectors, places=index % N, spots=index)

    @property
    def _chances(self):
        return self.frames * (1 + self.places) if self.sets else 0

    def _predicted(self, uniform_RU):
        if not self.sets:
            return super()._predicted(uniform_RU)
        return _masked(uniform_RU, self.frames).reshape(len(uniform_RU), self.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sets(Layout):
    """All values at one step, some of them fed, the others predicted (MAR, arXiv 2406.11838); of a clip all frames."""

    name: ClassVar[str] = "sets"
    hides: ClassVar[bool] = True

    @functools.cached_property
    def _block(self):
        index = np.arange(self.count)
        return _Block(0 * index, fed=index, vectors=0 * index - 1, places=index, spots=index)

    @property
    def _chances(self):
        return 1 + self.count

    def _predicted(self, uniform_RU):
        return _masked(uniform_RU, 1)[:, 0]


LAYOUTS: Mapping[str, type[Layout]] = {layout.name: layout for layout in (Raster, Scales, Frames, Sets)}


def down(values: np.ndarray, side: int) -> np.ndarray:
    """Values [..., n * n, C] of a square map as one of `side * side`: the means of its blocks."""
    *batch, count, channels = values.shape
    each = round(count**0.5) // side
    blocks = values.reshape(*batch, side, each, side, each, channels)
    return values if each == 1 else blocks.mean(axis=(-4, -2)).reshape(*batch, side * side, channels)


def up(values: Any, side: int) -> Any:
    """Values [..., n * n, C] of a square map as one of `side * side`, each repeated in a block."""
    *batch, count, channels = values.shape
    small = round(count**0.5)
    blocks = values.reshape(*batch, small, 1, small, 1, channels)
    each = side // small
    return (blocks.repeat(each, axis=-4).repeat(each, axis=-2)).reshape(*batch, side * side, channels)


def uniforms(draws_B: np.ndarray, count: int) -> np.ndarray:
    """float64 [B, count] from 0 to 1, of each draw by itself: the n-th is SplitMix64's (Steele et al. 2014) after
    draw * 2^32 + n steps. numpy's generators begin anew for each draw, which takes longer than all else of a row."""
    x: Any = (draws_B.astype(np.uint64)[:, None] << np.uint64(32)) + np.arange(1, count + 1, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def _masked(uniform_RU: np.ndarray, images: int) -> np.ndarray:
    """bool [R, images, N]: of each image one number says how many of its values are masked, and N which."""
    uniform = uniform_RU.reshape(len(uniform_RU), images, uniform_RU.shape[1] // images)
    return masked(uniform[..., 0], np.argsort(uniform[..., 1:], axis=-1, kind="stable"))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
