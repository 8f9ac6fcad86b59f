"""What a run would take on TPUs that are not here: its programs compiled for a topology, and read before they are code.

Nothing is written, and neither data nor weights are needed: of a model that is inherited from, its config.json.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import math
import operator
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.errors import UserError
from jaxup.experiments.config import SHIPPED, change
from jaxup.progress import say, tell
from jaxup.targets import chips
from jaxup.targets.chips import Topology
from jaxup.targets.dump import Plan, compiled
from jaxup.targets.roofline import Roofline, roofline

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PROGRAMS = {
    "train_step": "a step of training", "eval_step": "a batch of the evaluation", "decode": "a token of the sample",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program of the run, as planned for the topology."""

    name: str
    topology: Topology
    plan: Plan

    @functools.cached_property
    def bound(self) -> Roofline:
        return roofline(self.plan, self.topology)

    @property
    def peak(self) -> int:
        """Bytes of a chip while it runs, with what lies there that it does not touch: evaluating, the optimizer."""
        return self.plan.memory.total + self.plan.facts["beside"]

    @property
    def fits(self) -> bool:
        return self.peak <= self.topology.chip.room

    def as_json(self) -> dict[str, Any]:
        """For scripts: bytes, FLOPs and seconds of one chip and one step."""
        facts, bound, memory = self.plan.facts, self.bound, self.plan.memory
        tokens = facts["rows"] * facts["seq_len"]
        received = [
            {"kind": kind, "axes": axes, "hidden": hidden, "bytes": size}
            for (kind, axes, hidden), size in bound.received.items()
        ]
        return {
            **facts, "program": self.name, "target": str(self.topology), "chips": self.topology.count,
            "memory": {**facts["memory"], **dataclasses.asdict(memory), "peak": self.peak, "fits": self.fits},
            "chip": dataclasses.asdict(self.topology.chip), "ingress": self.topology.ingress,
            "flops": bound.flops, "useful_flops": facts["flops"] / self.topology.count, "hbm_bytes": bound.bytes,
            "received": received, "seconds": bound.parts, "bound": bound.seconds, "limit": bound.limit,
            "tokens_per_second": tokens / bound.seconds, "mfu": self.mfu, "planned_in": self.plan.seconds,
        }  # fmt: skip

    @property
    def mfu(self) -> float:
        """At most; as if everything trained."""
        useful = self.plan.facts["flops"] / self.topology.count
        return useful / self.topology.chip.flops / self.bound.seconds


def show(
    config: ConfigDict, target: str, spec: str, file: str = "", given: Sequence[tuple[str, str]] = (), *,
    whole: bool = False,
) -> None:  # fmt: skip
    """Prints it. UserError for what the run would refuse, and, once all is said, for what does not fit.

    Args:
      target: a topology, as v5p:4x4x4, or `auto`, or `auto:v5p`.
      spec: the experiment file and its variants.
      file: where the figures go as JSON; "" = nowhere.
      given: what the command line changes of it, which `auto` leaves as it is.
      whole: programs are compiled to their code, unless they do not fit.
    """
    if target.lower().partition(":")[0] == "auto":
        from jaxup.experiments.proposal import propose

        figures = propose(config, target, spec, given)
        if file:
            Path(file).write_text(json.dumps(figures, indent=2) + "\n")
        return
    topology = chips.parse(target)
    stand_in(config)
    found = told(spec, (plan(config, topology, name, whole) for name in PROGRAMS))
    if file:
        Path(file).write_text(json.dumps([one.as_json() for one in found], indent=2) + "\n")
    if too_large := [one for one in found if not one.fits]:
        need = max(one.peak for one in too_large)
        what = f"{too_large[0].plan.facts['stage']} takes {gib(need)} GiB a chip, which has {gib(topology.chip.room)}"
        raise UserError(what, at=f"--target={target}", hint=_remedy(config, too_large[0]))


def told(spec: str, programs: Iterable[Compiled]) -> list[Compiled]:
    """Prints each as soon as it is there, and what is assumed of the chips."""
    found: list[Compiled] = []
    for one in programs:
        if not found:
            count = one.topology.count
            tell(f"{spec} on {one.topology}: {count} chip{'s' * (count > 1)}, mesh {shape(one.plan.facts['mesh'])}\n")
        found.append(one)
        tell("\n".join(_program(one)) + "\n")
    tell("\n".join(_assumed(found[0].topology)))
    return found


def stand_in(config: ConfigDict) -> None:
    """Puts what is enough to compile in the place of what is not at hand, and says of which model.

    The config.json of models that shipped files name comes along, for a machine without the network.
    """
    for section, key in (("base", "path"), ("reference", "path")):
        name = config[section][key] if section in config else ""
        published = [place / "published" / name.replace("/", "--") for place in SHIPPED]
        if found := [place for place in published if name and place.is_dir() and not Path(name).exists()]:
            say(f"{section}.{key}={name}: compiled from its sizes as they were published")
            config[section][key], config[section]["revision"] = str(found[0]), ""
    if "files" in config.data and not config.data.files:
        config.data.files = "data.jsonl"  # is not opened
    if "reference" in config and config.reference.path and not config.data.tokenizer:
        config.data.tokenizer = "ids:2"


def plan(config: ConfigDict, topology: Topology, name: str, whole: bool = False) -> Compiled:
    """One of PROGRAMS, of training in the fewest micro-batches that fit if the configuration leaves that open.

    UserError where libtpu is missing, and for what the run would refuse.
    """
    found = _plan(config, topology, name, whole)
    while config.step.accumulation == 0 and name == "train_step" and not found.fits:
        facts = found.plan.facts
        now, least = facts["accumulation"], found.plan.memory.least(facts["accumulation"], topology.chip.room)
        more = next((n for n in facts["micro_batches"] if n > now and n >= least), None)
        if more is None:
            break
        finer = copy.deepcopy(config)
        finer.step.accumulation = more
        found = _plan(finer, topology, name, whole)
    return found


def needs_compiler(target: object) -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu", at=f"--target={target}", hint="install jaxup[tpu]")


def _plan(config: ConfigDict, topology: Topology, name: str, whole: bool) -> Compiled:
    needs_compiler(topology)
    with tempfile.TemporaryDirectory(prefix="jaxup-target-") as directory:
        given = (config.to_dict(), topology, name, directory)
        found = compiled("jaxup.experiments.lowered", given, Path(directory), topology.generation, whole=whole)
    return Compiled(name, topology, found)


# ---- what is printed


def mesh_sizes(axes: Mapping[str, int], count: int) -> dict[str, int]:
    """Of a configuration's mesh, with what is left of so many chips in the place of -1."""
    left = max(1, count // math.prod(size for size in axes.values() if size > 0))
    return {axis: left if size == -1 else size for axis, size in axes.items()}


def shape(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def _program(one: Compiled) -> list[str]:
    facts, memory, bound = one.plan.facts, one.plan.memory, one.bound
    tokens, training = facts["rows"] * facts["seq_len"], one.name == "train_step"
    how = f"{facts['rows']} rows of {facts['seq_len']:,}" if one.name != "decode" else "one row, with its cache"
    if training:
        how += f" in {facts['accumulation']} micro-batches, remat {facts['remat']}"
    how += f"; attention: {facts['attention']}"
    lines = [
        f"{PROGRAMS[one.name]} of {facts['stage']}, {facts['layers']} layers, {facts['parameters']:,} parameters: {how}"
    ]
    held = dict(facts["memory"])
    held["batch, padding" if held else "parameters, cache"] = memory.arguments + facts["beside"] - sum(held.values())
    held["gradients, activations" if training else "activations"] = memory.temporary + memory.outputs + memory.constants
    held[f"peak, of {gib(one.topology.chip.room)} GiB" + ("" if one.fits else ": IT DOES NOT FIT")] = one.peak
    if memory.host:
        held["in the memory of the host"] = memory.host
    lines += [f"  {size / 2**30:9.3f} GiB  {name}" for name, size in held.items()]
    if bound.flops:
        useful = "{:.4g} {}".format(*_scaled(facts["flops"] / one.topology.count))
        counted = "if everything trained" if facts["partial"] else "without computing again"
        lines.append(_line(bound.flops, "FLOP", f"of products{f', {useful}FLOP {counted}' * training}"))
    lines.append(_line(bound.bytes, "B", "to and from HBM"))
    for (kind, axes, hidden), size in sorted(bound.received.items(), key=lambda item: -item[1]):
        if size > 1e6:
            lines.append(_line(size, "B", f"received by {kind} over {axes}{', while computing' * hidden}"))
    parts = " + ".join(f"{seconds:.3g} {name}" for name, seconds in bound.parts.items() if seconds)
    least = f"{bound.seconds:9.4g} s    at least ({parts}), limited by {bound.limit}"
    rate = f"at most {tokens / bound.seconds:,.0f} tokens/s"
    if one.name != "decode" and not facts["partial"]:
        rate += f", MFU {one.mfu:.0%}"
    seconds = f"{one.plan.seconds:.0f} s of CPU"
    took = f"compiled in {seconds}" if one.plan.whole else f"planned in {seconds}, without generating code"
    return [*lines, f"  {least}", f"  {'':9} {'':4} {rate}; {took}"]


def _assumed(topology: Topology) -> list[str]:
    chip = topology.chip
    assumed = [f"{chip.flops / 1e12:.0f} TFLOP/s", f"{chip.bandwidth / 1e12:.3g} TB/s of HBM"]
    if topology.count > 1:
        rings = "rings" if all(topology.wrap) else "lines" if not any(topology.wrap) else "rings and lines"
        assumed.append(f"{topology.ingress / 1e9:.0f} GB/s received over all links, which are {rings}")
    return [f"assumed of a {topology.generation}: {', '.join(assumed)}; no step reaches them"]


def _line(amount: float, unit: str, what: str) -> str:
    number, prefix = _scaled(amount)
    return f"  {number:9.4g} {prefix + unit:<4} {what}"


def _scaled(amount: float) -> tuple[float, str]:
    """As a number below 1,000, with the prefix of its unit."""
    thousands = max(0, min(5, int(math.log10(max(amount, 1.0)) // 3)))
    return amount / 1000**thousands, " kMGTP"[thousands].strip()


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


# ---- what would fit


def _remedy(config: ConfigDict, one: Compiled) -> str:
    """What makes it fit, found by compiling that: what costs least speed is tried first."""
    if one.name != "train_step":
        return "a smaller eval.batch_size, or more chips" if one.name == "eval_step" else "more chips"
    for changes, topology in _less(one, config.step.accumulation == 0):
        say("trying " + _words(changes, topology, one.topology))
        tried = copy.deepcopy(config)
        try:
            change(tried, changes.items(), None)
            found = plan(tried, topology, one.name)
        except UserError:  # what does not divide over more chips
            continue
        if found.fits:
            return f"it fits with {_words(changes, topology, one.topology)}, in {gib(found.peak)} GiB"
    return "nothing that was tried fits"


def _less(one: Compiled, fewest: bool) -> Iterator[tuple[dict[str, str], Topology]]:
    """What takes less: keys of the configuration, and a slice. `fewest`: micro-batches are tried in any case."""
    facts, memory, here, mesh = one.plan.facts, one.plan.memory, one.topology, one.plan.facts["mesh"]
    now, room = facts["accumulation"], one.topology.chip.room - one.plan.memory.arguments
    rows = facts["rows"] // (mesh["data"] * mesh["fsdp"])
    finer = [n for n in range(now + 1, rows + 1) if rows % n == 0 and not fewest]
    # Of what is there for a while the most part is of the rows of a micro-batch.
    likely = [n for n in finer if room > 0 and memory.temporary * now / n <= 1.2 * room]
    micro = [{"step.accumulation": str(n)} for n in dict.fromkeys([*likely[:2], *finer[-1:]])]
    full = [{"compute.remat": "full"}] if facts["remat"] not in ("full", "offload") else []
    split = [{"mesh.data": "1", "mesh.fsdp": "-1"}] if mesh["data"] > 1 else []
    alone = [*(micro if room > 0 else []), *full, *split]
    both = [{**a, **b} for a in split or [{}] for b in [*micro[-1:], *full]] if split else []
    everything: dict[str, str] = functools.reduce(operator.or_, [*split, *full, *micro[-1:]], {})
    for changes in [*alone, *both, *([everything] if everything not in [*alone, *both, {}] else [])]:
        yield changes, here
    larger = here.larger()
    for _ in range(2):
        if larger is not None:
            yield {}, larger
            larger = larger.larger()


def _words(changes: dict[str, str], topology: Topology, here: Topology) -> str:
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return " ".join([*flags, *([f"--target={topology}"] if topology != here else [])])
