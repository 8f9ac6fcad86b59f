"""TPUs and the slices that there are of them, by the names that `--target` takes: `v5p:4x4x4`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re

from jaxup.errors import UserError, suggest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Of one generation; as cloud.google.com/tpu/docs has it, but for `room`, which the compiler says."""

    flops: float  # a second, of products of bfloat16
    bandwidth: float  # bytes of HBM a second
    room: int  # bytes of HBM that programs may use
    link: float  # bytes a second one way over one of its links to other chips
    axes: int  # of the torus or mesh that slices are cut from
    longest: int  # an axis
    most: int  # chips of a slice


_GIB = 2**30
CHIPS = {
    "v4": Chip(flops=275e12, bandwidth=1.228e12, room=int(30.75 * _GIB), link=45e9, axes=3, longest=16, most=4096),
    "v5e": Chip(flops=197e12, bandwidth=0.819e12, room=int(15.75 * _GIB), link=45e9, axes=2, longest=16, most=256),
    "v5p": Chip(flops=459e12, bandwidth=2.765e12, room=int(95.74 * _GIB), link=90e9, axes=3, longest=24, most=6144),
    "v6e": Chip(flops=918e12, bandwidth=1.64e12, room=int(31.25 * _GIB), link=90e9, axes=2, longest=16, most=256),
}
# Smaller than what is joined by wrapped links: part of a host, hosts, and what is cut out of a cube of 64.
_SMALL: dict[int, list[tuple[int, ...]]] = {
    2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
    3: [(1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)],
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: chips of a generation along each of its axes."""

    generation: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes are rings. Whole cubes of 4 x 4 x 4 are joined to rings, and of the flat ones only a side of 16.

        The compiler has to be told so. Without rings it gathers by other, worse programs than a pod runs.
        """
        if self.chip.axes == 3:
            return (all(n % 4 == 0 for n in self.shape),) * 3
        return tuple(n == 16 for n in self.shape)

    @property
    def ingress(self) -> float:
        """Bytes a second that a chip receives over all of its links: two on each ring, one on each line."""
        links = sum(2 if ring else 1 for n, ring in zip(self.shape, self.wrap, strict=True) if n > 1)
        return self.chip.link * links

    def larger(self) -> Topology | None:
        """The next one that has at least twice as many chips."""
        found = [t for t in _slices(self.generation) if t.count >= 2 * self.count]
        return min(found, key=lambda t: (t.count, max(t.shape)), default=None)


@functools.cache
def _slices(generation: str) -> list[Topology]:
    chip = CHIPS[generation]
    shapes = list(_SMALL[chip.axes])
    if chip.axes == 3:
        sides = range(4, chip.longest + 1, 4)
        cubes = itertools.combinations_with_replacement(sides, 3)
        shapes += [shape for shape in cubes if math.prod(shape) <= chip.most]
    return [Topology(generation, shape) for shape in shapes]


def ascending(text: str) -> list[Topology]:
    """The slices that `auto`, or `auto:v5e,v6e`, is a choice of, one for each number of chips, by that and by memory.

    Of v4 and v5p those of whole hosts: no fewer chips are let. UserError for a generation that there is not.
    """
    generations = [_known(name, f"--target={text}") for name in text.lower().partition(":")[2].split(",") if name]
    by_count: dict[tuple[int, int, str], Topology] = {}
    for generation in dict.fromkeys(generations or CHIPS):
        for t in sorted(_slices(generation), key=lambda t: max(t.shape)):
            if t.chip.axes == 2 or t.count >= 4:
                by_count.setdefault((t.count, t.chip.room, generation), t)
    return [by_count[key] for key in sorted(by_count)]


def _known(generation: str, at: str) -> str:
    if generation not in CHIPS:
        raise UserError(f"no TPU {generation!r}{suggest(generation, CHIPS)}", at=at, hint="such as v5p:4x4x4, auto:v5p")
    return generation


def parse(text: str) -> Topology:
    """`v5p:4x4x4`; UserError, with the nearest that there is, for any that there is not."""
    generation, _, sizes = text.lower().partition(":")
    at = f"--target={text}"
    _known(generation, at)
    known = _slices(generation)
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", sizes):
        what = "chips along each axis belong after the colon" if not sizes else f"{sizes!r} is no shape"
        raise UserError(what, at=at, hint=f"such as {known[3]}, {known[-3]}, or auto:{generation}")
    asked = tuple(map(int, sizes.split("x")))
    found = [t for t in known if sorted(t.shape) == sorted(asked)]
    if not found:
        # By its number of chips; of several, the one whose axes are most alike.
        distance = lambda t: abs(math.log(t.count / math.prod(asked)))  # noqa: E731
        nearest = min(known, key=lambda t: (distance(t), sum(abs(a - b) for a, b in zip(t.shape, sorted(asked)))))
        raise UserError(f"there is no such slice of {generation}", at=at, hint=f"the nearest is {nearest}")
    return found[0]
