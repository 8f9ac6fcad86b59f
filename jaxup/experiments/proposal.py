"""The smallest slice of TPUs that a run fits on, and how it is cut there: `--target=auto`.

What a run keeps between steps, spread over all chips, says from how many on it can fit. From there slices are tried
in ascending order. On each the step that takes least comes first: where that does not fit, nothing does. Where it fits,
each policy of rematerialisation is compiled in the fewest micro-batches that it fits in, and the least bound on time
is proposed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxup import devices
from jaxup.errors import UserError
from jaxup.experiments.config import change, get, section
from jaxup.experiments.target import PROGRAMS, Compiled, gib, mesh_sizes, needs_compiler, plan, shape, stand_in, told
from jaxup.progress import say, tell
from jaxup.targets import chips
from jaxup.targets.chips import Topology

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Policies by the time they take; each takes less memory than the one before it. A further group is for slices on which
# none of the first fits.
REMAT: tuple[tuple[str, ...], ...] = (("dots", "context", "full"), ("offload",))


@dataclasses.dataclass(frozen=True)
class Tried:
    """A step of training as it was compiled, or why it was not."""

    topology: Topology
    changes: dict[str, str]  # of the configuration
    config: ConfigDict  # with them
    found: Compiled | UserError

    @property
    def fits(self) -> bool:
        return isinstance(self.found, Compiled) and self.found.fits

    def as_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {"target": str(self.topology), "chips": self.topology.count, "changes": self.changes}
        if isinstance(self.found, UserError):
            return {**said, "refused": str(self.found)}
        seconds = self.found.bound.seconds
        figures = {"bound": seconds, "chip_seconds": seconds * self.topology.count}
        return {**said, "peak": self.found.peak, "fits": self.fits, **figures}

    def cells(self) -> tuple[str, ...]:
        c, mesh = self.config, mesh_sizes(dict(self.config.mesh), self.topology.count)
        how = (str(self.topology), _split(mesh), str(c.step.accumulation), c.compute.remat)
        if isinstance(self.found, UserError):
            return (*how, "refused", "", "", "")
        seconds, room = self.found.bound.seconds, gib(self.topology.chip.room)
        times = (f"{seconds:.3g}", f"{seconds * self.topology.count:,.4g}") if self.fits else ("too large", "")
        return (*how, gib(self.found.peak), room, *times)


def propose(config: ConfigDict, target: str, spec: str, given: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Prints the programs on the smallest slice, what was tried, and the command; gives the figures for scripts.

    Args: as of `jaxup.experiments.target.show`. What is `given` of mesh, micro-batches and rematerialisation stays.

    UserError for what a run would refuse on any slice, and where nothing fits.
    """
    slices = chips.ascending(target)
    needs_compiler(target)
    stand_in(config)
    search = Search(config, {key for key, _ in given})
    for topology in slices:
        if (best := search.on(topology)) is None:
            continue
        assert isinstance(best.found, Compiled)
        say(f"compiling what else a run does on {topology}")
        beside = [plan(best.config, topology, name) for name in PROGRAMS if name != "train_step"]
        if lacking := [one for one in beside if not one.fits]:
            say(f"{topology}: {PROGRAMS[lacking[0].name]} takes {gib(lacking[0].peak)} GiB a chip, and does not fit")
            continue
        found = told(spec, [best.found, *beside])
        tell(f"\n{_table(search.tried)}\n")
        changes = [*given, *best.changes.items()]
        flags = [f"--config={spec}", *(f"--config.{key}={value}" for key, value in changes)]
        command = shlex.join(["python", "-m", "jaxup.train", *flags])
        tell(f"the smallest that fits is {topology}, on which this runs, and with --target={topology} says the above:")
        tell(f"  {command}")
        return {
            "target": str(topology), "changes": best.changes, "command": command,
            "programs": [one.as_json() for one in found], "tried": [one.as_json() for one in search.tried],
        }  # fmt: skip
    if search.tried:
        tell(_table(search.tried))
    raise search.nothing(target)


class Search:
    """Slices on which a run may fit, in ascending order, and all that was compiled for them."""

    def __init__(self, config: ConfigDict, given: set[str]):
        """`given`: the keys that stay as they are. UserError for what a run would refuse anywhere."""
        devices.choose("cpu")  # shapes are all that is asked of it
        import jax

        from jaxup.experiments.lowered import stage_of
        from jaxup.training.sharding import MeshConfig, make_mesh
        from jaxup.training.trial import needed

        self._config, self._given = config, given
        one = make_mesh(section(MeshConfig, dict.fromkeys(config.mesh, 1)), jax.devices("cpu")[:1])
        stage = stage_of(config, one)
        self._name, self._heads = stage.name, stage.model.num_heads
        self.state = needed(stage, one)  # bytes that are there between steps, on all chips together
        self.tried: list[Tried] = []
        self._least: dict[str, float] = {}  # chips that it may fit on, by what was compiled for their generation
        self._compiled = functools.cache(self._try)

    def on(self, topology: Topology) -> Tried | None:
        """What takes least time of all that fits there; None: nothing does."""
        count, room, generation = topology.count, topology.chip.room, topology.generation
        meshes = list(self._meshes(topology))
        if not meshes or self.state > count * room or count < self._least.get(generation, 0):
            return None
        groups = ((self._config.compute.remat,),) if "compute.remat" in self._given else REMAT
        for remat in groups:
            least = self._compiled(topology, meshes[-1], remat[-1], self._cuts(meshes[-1])[-1])
            if least.fits:
                break
        if not least.fits:
            if isinstance(least.found, Compiled):  # what is split gets smaller by no more than it is split
                self._least[generation] = count * least.found.peak / room
            return None
        fits = [least]
        for mesh in meshes:
            for policy in remat:
                fits += (found := self._fewest(topology, mesh, policy))
                if found and found[0].config.step.accumulation == 1:
                    break  # the others compute more
        return min(fits, key=_seconds)

    def nothing(self, target: str) -> UserError:
        """Why there is no proposal."""
        compiled = [one.found for one in self.tried if isinstance(one.found, Compiled)]
        refused = [one.found for one in self.tried if isinstance(one.found, UserError)]
        hint = "adapters (lora.rank), a shorter data.seq_len and less that trains take less"
        if compiled:
            nearest = min(compiled, key=lambda one: one.peak / one.topology.chip.room)
            what = f"{self._name} fits on no slice: on {nearest.topology} it takes {gib(nearest.peak)} GiB of each chip"
            return UserError(f"{what}, which has {gib(nearest.topology.chip.room)}", at=f"--target={target}", hint=hint)
        if refused:
            return refused[0]
        what = f"{self._name} keeps {gib(self.state)} GiB between steps: no slice that its rows divide over has as much"
        return UserError(what, at=f"--target={target}", hint=hint)

    def _meshes(self, topology: Topology) -> Iterator[tuple[tuple[str, int], ...]]:
        """Sizes of the axes; the last of them takes least memory."""
        c, count, room = self._config, topology.count, topology.chip.room
        if any(key.startswith("mesh.") for key in self._given):
            ways = [mesh_sizes(dict(c.mesh), count)]
        else:
            split = math.gcd(c.batch_size, count)
            # Where rows do not divide over all chips, several share the heads of a row, or have parts of it.
            rest = ("tensor", "context") if split < count else ("tensor",)
            ways = [dict.fromkeys(c.mesh, 1) | {"fsdp": split, axis: count // split} for axis in rest]
            if split > 1 and self.state <= ways[0]["tensor"] * room / 2:  # there is more than the state
                ways.insert(0, ways[0] | {"fsdp": 1, "data": split})
        for sizes in ways:
            rows = sizes["data"] * sizes["fsdp"]
            evaluated = 0 if "eval.batch_size" not in self._given else c.eval.batch_size % rows
            parts = 2 * sizes["context"] if sizes["context"] > 1 else 1  # of a row: two on each chip
            whole = evaluated == c.batch_size % rows == self._heads % sizes["tensor"] == c.data.seq_len % parts == 0
            if whole and math.prod(sizes.values()) == count:
                yield tuple(sizes.items())

    def _cuts(self, mesh: tuple[tuple[str, int], ...]) -> list[int]:
        """Numbers of micro-batches, ascending."""
        if "step.accumulation" in self._given and self._config.step.accumulation:
            return [self._config.step.accumulation]
        rows = self._config.batch_size // (dict(mesh)["data"] * dict(mesh)["fsdp"])
        return [count for count in range(1, rows + 1) if rows % count == 0]

    def _fewest(self, topology: Topology, mesh: tuple[tuple[str, int], ...], remat: str) -> list[Tried]:
        """In the fewest micro-batches that fit; none if none do."""
        least = 0.0
        for count in self._cuts(mesh):
            if count >= least:
                tried = self._compiled(topology, mesh, remat, count)
                if tried.fits:
                    return [tried]
                if isinstance(tried.found, UserError):
                    break
                least = tried.found.plan.memory.least(count, topology.chip.room)
        return []

    def _try(self, topology: Topology, mesh: tuple[tuple[str, int], ...], remat: str, count: int) -> Tried:
        wanted: dict[str, Any] = {
            f"mesh.{axis}": size for axis, size in mesh if not any(key[:5] == "mesh." for key in self._given)
        }
        wanted |= {"step.accumulation": count, "compute.remat": remat}
        rows, evaluated = dict(mesh)["data"] * dict(mesh)["fsdp"], self._config.eval.batch_size
        if evaluated % rows:
            wanted["eval.batch_size"] = -(-evaluated // rows) * rows
        # What the file says already need not be named.
        changes = {
            key: str(value) for key, value in wanted.items()
            if key not in self._given and value != get(self._config, key)
        }  # fmt: skip
        config = copy.deepcopy(self._config)
        change(config, changes.items(), None)
        say(f"trying {topology}, {_split(dict(mesh))}, {count} micro-batch{'es' * (count > 1)}, remat {remat}")
        found: Compiled | UserError
        try:
            found = plan(config, topology, "train_step")
        except UserError as error:
            if any(isinstance(one.found, UserError) and one.found.what == error.what for one in self.tried):
                raise  # it is not for this slice that it is refused
            say(error)
            found = error
        self.tried.append(Tried(topology, changes, config, found))
        return self.tried[-1]


def _split(mesh: Mapping[str, int]) -> str:
    return shape({axis: size for axis, size in mesh.items() if size > 1}) or "one chip"


def _seconds(tried: Tried) -> float:
    assert isinstance(tried.found, Compiled)
    return tried.found.bound.seconds


def _table(tried: Sequence[Tried]) -> str:
    heads = ("slice", "mesh", "micro-batches", "remat", "peak GiB", "of", "s a step", "chip-seconds")
    rows = [heads, *(one.cells() for one in tried)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
