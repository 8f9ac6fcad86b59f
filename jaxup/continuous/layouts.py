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
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

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
            "loss_weights": np.zeros((B, S), np.float32), "steps": np.zeros((B, S), np.int32),
            "values": np.zeros((B, M, C), np.float32), "fed": none(), "vectors": none(), "places": none(),
            "spots": np.zeros((B, M), np.int32), "value_targets": np.zeros((B, M, C), np.float32),
            "value_weights": np.zeros((B, M), np.float32), "noise": np.asarray(draws_B, np.uint32),
        }  # fmt: skip
        for index, (example, draw) in enumerate(zip(examples, batch["noise"], strict=True)):
            row = _Row({name: array[index] for name, array in batch.items() if name != "noise"})
            # Raw numbers of Philox are the same in every version of numpy.
            raw = np.random.Philox(key=int(draw)).random_raw(2 + 2 * self.count)
            uniform = (raw >> np.uint64(11)) * 2.0**-53
            if example.kind == "text":
                row.text(example.prompt)
                row.text(example.answer, learned=True)
            else:
                values = np.asarray(example.values, np.float32).reshape(self.count, C)
                self._lay(row, example, values, hidden=bool(uniform[0] < self.drop), uniform=uniform[1:])
            row.pad()
        return batch

    @abc.abstractmethod
    def _lay(self, row: _Row, example: Example, values: np.ndarray, *, hidden: bool, uniform: np.ndarray) -> None:
        """An example with values [count, C] into its row, whose prompt is `hidden`; `uniform` are [1 + 2 * count]."""


class _Row:
    """The arrays of one row of a batch as it is written, from left to right."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays, self.at, self.step = arrays, 0, 0

    def _next(self, count: int, *, together: bool = False) -> slice:
        span = slice(self.at, self.at + count)
        self.arrays["steps"][span] = self.step if together else self.step + np.arange(count)
        self.at, self.step = span.stop, self.step + (1 if together else count)
        return span

    def text(self, ids: np.ndarray, *, learned: bool = False, hidden: bool = False) -> None:
        """Tokens; if `learned`, each is the target of the position before it, which the first of a row has not."""
        ids = np.asarray(ids, np.int32)
        span, first = self._next(len(ids)), int(self.at == len(ids))
        self.arrays["tokens"][span] = -1 if hidden else ids
        if hidden:
            self.arrays["vectors"][span] = NULL
        if learned and len(ids):
            before = slice(span.start - 1 + first, span.stop - 1)
            self.arrays["targets"][before], self.arrays["loss_weights"][before] = ids[first:], 1

    def vector(self, which: int, count: int = 1, *, together: bool = False) -> slice:
        """Learned vectors."""
        span = self._next(count, together=together)
        self.arrays["tokens"][span], self.arrays["vectors"][span] = -1, which
        return span

    def values(self, fed: np.ndarray, *, together: bool) -> slice:
        """Values by their index; those of -1 are MASK."""
        span = self._next(len(fed), together=together)
        self.arrays["tokens"][span], self.arrays["fed"][span] = -1, fed
        self.arrays["vectors"][span] = np.where(fed < 0, MASK, -1)
        return span

    def predict(self, spots: slice, targets: np.ndarray, weights: Any = 1.0, first: int = 0) -> None:
        """These positions predict these values, which are those from `first` on of the row."""
        span = slice(first, first + len(targets))
        self.arrays["spots"][span] = np.arange(spots.start, spots.stop)
        self.arrays["value_targets"][span], self.arrays["value_weights"][span] = targets, weights

    def pad(self) -> None:
        self._next(len(self.arrays["steps"]) - self.at)


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

    def pack(self, examples: Sequence[Example], draws_B: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        batch = super().pack(examples, draws_B)
        del batch["steps"]
        return batch

    def _lay(self, row, example, values, *, hidden, uniform):
        if example.kind == "draw":
            row.text(example.prompt, hidden=hidden)
        begin = row.vector(BEGIN)
        span = row.values(np.arange(self.count), together=False)
        row.arrays["places"][span] = np.arange(self.count)
        row.vector(END)
        row.arrays["values"][:] = values
        predicted = example.kind == "draw" or self.see
        row.predict(slice(begin.start, span.stop - 1), values, float(predicted))
        if example.kind == "tell":
            row.text(example.prompt)
        row.text(example.answer, learned=True)


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

    @property
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

    def _lay(self, row, example, values, *, hidden, uniform):
        row.text(example.prompt, hidden=hidden)
        coarser = None
        for side, span in zip(self.scales, self.spans):
            own = down(values, side)
            if coarser is None:
                where = row.vector(BEGIN, side * side, together=True)
            else:
                where = row.values(np.arange(span.start, span.stop), together=True)
                row.arrays["values"][span] = up(coarser, side)
            row.arrays["places"][where] = np.arange(span.start, span.stop)
            row.predict(where, own, first=span.start)
            coarser = own


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

    def _lay(self, row, example, values, *, hidden, uniform):
        row.text(example.prompt, hidden=hidden)
        row.arrays["values"][:] = values
        N = self.places
        for frame in range(self.frames):
            own = slice(frame * N, (frame + 1) * N)
            if frame:
                where = row.values(np.arange(own.start - N, own.start), together=True)
            else:
                where = row.vector(FIRST, N, together=True)
            row.arrays["places"][where] = np.arange(N)
            weights = _masked(uniform[frame * (N + 1) :], N) if self.sets else 1.0
            row.predict(where, values[own], weights, first=own.start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sets(Layout):
    """All values at one step, some of them fed, the others predicted (MAR, arXiv 2406.11838); of a clip all frames."""

    name: ClassVar[str] = "sets"

    def _lay(self, row, example, values, *, hidden, uniform):
        row.text(example.prompt, hidden=hidden)
        row.arrays["values"][:] = values
        mask = _masked(uniform, self.count)
        where = row.values(np.where(mask, -1, np.arange(self.count)), together=True)
        row.arrays["places"][where] = np.arange(self.count)
        row.predict(where, values, mask)


LAYOUTS: Mapping[str, type[Layout]] = {layout.name: layout for layout in (Raster, Scales, Frames, Sets)}


def down(values: np.ndarray, side: int) -> np.ndarray:
    """Values [n * n, C] of a square map as one of `side * side`: the means of its blocks."""
    each = round(len(values) ** 0.5) // side
    return values.reshape(side, each, side, each, -1).mean((1, 3)).reshape(side * side, -1)


def up(values: Any, side: int) -> Any:
    """Values [..., n * n, C] of a square map as one of `side * side`, each repeated in a block."""
    *batch, count, channels = values.shape
    small = round(count**0.5)
    blocks = values.reshape(*batch, small, 1, small, 1, channels)
    each = side // small
    return (blocks.repeat(each, axis=-4).repeat(each, axis=-2)).reshape(*batch, side * side, channels)


def _masked(uniform: np.ndarray, count: int) -> np.ndarray:
    return masked(float(uniform[0]), np.argsort(uniform[1 : 1 + count], kind="stable"))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
