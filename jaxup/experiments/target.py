"""What a run would take on TPUs that are not here: its programs compiled for a topology, and read before they are code.

Nothing is written, and neither data nor weights are needed: of a model that is inherited from, its config.json.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.errors import UserError
from jaxup.experiments.config import SHIPPED
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

    @property
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
        """At most."""
        useful = self.plan.facts["flops"] / self.topology.count
        return useful / self.topology.chip.flops / self.bound.seconds


def show(config: ConfigDict, target: str, spec: str, file: str = "") -> None:
    """Prints it. UserError for what the run would refuse, and, once all is said, for what does not fit.

    Args:
      target: a topology, as v5p:4x4x4.
      spec: the experiment file and its variants.
      file: where the figures go as JSON; "" = nowhere.
    """
    topology = chips.parse(target)
    stood_in = stand_in(config)
    for line in stood_in:
        say(line)
    found = []
    for name in PROGRAMS:
        found.append(one := plan(config, topology, name))
        if one is found[0]:
            tell(f"{spec} on {topology}: {topology.count} chips, mesh {_mesh(one)}\n")
        tell("\n".join(_program(one)) + "\n")
    tell("\n".join(_assumed(topology)))
    if file:
        Path(file).write_text(json.dumps([one.as_json() for one in found], indent=2) + "\n")
    if too_large := [one for one in found if not one.fits]:
        need = max(one.peak for one in too_large)
        what = f"{too_large[0].plan.facts['stage']} takes {_gib(need)} GiB a chip, which has {_gib(topology.chip.room)}"
        raise UserError(what, at=f"--target={target}", hint=_remedy(too_large[0]))


def stand_in(config: ConfigDict) -> list[str]:
    """Puts what is enough to compile in the place of what is not at hand; what to say of it.

    The config.json of models that shipped files name comes along, for a machine without the network.
    """
    said = []
    for section, key in (("base", "path"), ("reference", "path")):
        name = config[section][key] if section in config else ""
        published = [place / "published" / name.replace("/", "--") for place in SHIPPED]
        if found := [place for place in published if name and place.is_dir() and not Path(name).exists()]:
            said.append(f"{section}.{key}={name}: compiled from its sizes as they were published")
            config[section][key], config[section]["revision"] = str(found[0]), ""
    if "files" in config.data and not config.data.files:
        config.data.files = "data.jsonl"  # is not opened
    if "reference" in config and config.reference.path and not config.data.tokenizer:
        config.data.tokenizer = "ids:2"
    return said


def plan(config: ConfigDict, topology: Topology, name: str) -> Compiled:
    """One of PROGRAMS; UserError where libtpu is missing, and for what the run would refuse."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu", at=f"--target={topology}", hint="install jaxup[tpu]")
    with tempfile.TemporaryDirectory(prefix="jaxup-target-") as directory:
        given = (config.to_dict(), topology, name, directory)
        found = compiled("jaxup.experiments.lowered", given, Path(directory), topology.generation)
    return Compiled(name, topology, found)


# ---- what is printed


def _mesh(one: Compiled) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in one.plan.facts["mesh"].items())


def _program(one: Compiled) -> list[str]:
    facts, memory, bound = one.plan.facts, one.plan.memory, one.bound
    tokens, training = facts["rows"] * facts["seq_len"], one.name == "train_step"
    how = f"{facts['rows']} rows of {facts['seq_len']:,}" if one.name != "decode" else "one row, with its cache"
    if training:
        how += f" in {facts['accumulation']} micro-batches, remat {facts['remat']}"
    lines = [
        f"{PROGRAMS[one.name]} of {facts['stage']}, {facts['layers']} layers, {facts['parameters']:,} parameters: {how}"
    ]
    held = dict(facts["memory"])
    held["batch, padding" if held else "parameters, cache"] = memory.arguments + facts["beside"] - sum(held.values())
    held["gradients, activations" if training else "activations"] = memory.temporary + memory.outputs + memory.constants
    held[f"peak, of {_gib(one.topology.chip.room)} GiB" + ("" if one.fits else ": IT DOES NOT FIT")] = one.peak
    lines += [f"  {size / 2**30:9.3f} GiB  {name}" for name, size in held.items()]
    useful = facts["flops"] / one.topology.count
    again = f", {_si(useful)}FLOP of them without computing again" * training
    lines.append(f"  {_si(bound.flops):>9}FLOP of products{again}")
    lines.append(f"  {_si(bound.bytes):>9}B to and from HBM")
    for (kind, axes, hidden), size in sorted(bound.received.items(), key=lambda item: -item[1]):
        if size > 1e6:
            lines.append(f"  {_si(size):>9}B received by {kind} over {axes}{', while computing' * hidden}")
    parts = " + ".join(f"{seconds:.3g} {name}" for name, seconds in bound.parts.items() if seconds)
    least = f"{bound.seconds:7.4g} s at least ({parts}); {bound.limit} limit"
    rate = f"at most {tokens / bound.seconds:,.0f} tokens/s" + (f", MFU {one.mfu:.0%}" if one.name != "decode" else "")
    return [*lines, f"  {least}", f"  {rate}; planned in {one.plan.seconds:.0f} s of CPU, without generating code"]


def _assumed(topology: Topology) -> list[str]:
    chip = topology.chip
    rings = "rings" if all(topology.wrap) else "lines" if not any(topology.wrap) else "rings and lines"
    return [
        f"assumed of a {topology.generation}: {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e12:.3g} TB/s of HBM"
        f", {topology.ingress / 1e9:.0f} GB/s received over all links, which are {rings}; no step reaches them"
    ]


def _si(amount: float) -> str:
    """With the prefix of its unit: 11.35 P."""
    thousands = max(0, min(5, int(math.log10(max(amount, 1.0)) // 3)))
    return f"{amount / 1000**thousands:.4g} {' kMGTP'[thousands].strip()}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _remedy(one: Compiled) -> str:
    """What would make it fit, as far as can be told from here."""
    facts, memory, room = one.plan.facts, one.plan.memory, one.topology.chip.room
    mesh, larger = facts["mesh"], one.topology.larger()
    split = mesh["data"] * mesh["fsdp"]
    wanted = []
    if one.name == "train_step" and memory.arguments < room:
        rows = facts["rows"] // split // facts["accumulation"]
        times = math.ceil(memory.temporary / (room - memory.arguments))
        more = next((n for n in range(max(2, times), rows + 1) if rows % n == 0), 0)
        if more:
            wanted.append(f"step.accumulation={facts['accumulation'] * more}")
        if facts["remat"] != "full":
            wanted.append("compute.remat=full")
    if mesh["data"] > 1:
        wanted.append("mesh.data=1 with mesh.fsdp=-1")
    if larger is not None:
        wanted.append(f"more chips: --target={larger}")
    return f"less takes {', '.join(wanted[:-1])}{' or ' * (len(wanted) > 1)}{wanted[-1]}" if wanted else "a larger chip"
