"""The least time that a plan can take on chips of some speed, and what limits it.

An instruction takes at least as long as its products at the chip's peak, and as its bytes of HBM at its bandwidth.
What is received from other chips comes on top unless computation goes on meanwhile, and everything as if links were
never shared. No step reaches it: a matrix unit is seldom more than four fifths full.
"""

from __future__ import annotations

import collections
import dataclasses

from jaxup.targets.chips import Topology
from jaxup.targets.cost import costs
from jaxup.targets.dump import Plan
from jaxup.targets.hlo import collectives


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one step, on one chip."""

    flops: float  # of products, with those that are computed again
    bytes: float  # of HBM
    received: dict[tuple[str, str, bool], float]  # bytes by kind, axes of the mesh, and whether they are hidden
    parts: dict[str, float]  # seconds, whose sum is the bound

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


PRODUCTS, MEMORY, LINKS = "products", "HBM", "links between chips"


def roofline(plan: Plan, topology: Topology) -> Roofline:
    chip = topology.chip
    flops = bytes = 0.0
    parts = dict.fromkeys((PRODUCTS, MEMORY, LINKS), 0.0)
    for cost in costs(plan.module):
        flops, bytes = flops + cost.flops * cost.times, bytes + cost.bytes * cost.times
        computing, moving = cost.flops / chip.flops * cost.times, cost.bytes / chip.bandwidth * cost.times
        if not cost.hidden:
            parts[PRODUCTS if computing >= moving else MEMORY] += max(computing, moving)
    # Prefetches go on beside all else, as far as the bandwidth is not used.
    parts[MEMORY] += max(0.0, bytes / chip.bandwidth - parts[PRODUCTS] - parts[MEMORY])
    received: dict[tuple[str, str, bool], float] = collections.defaultdict(float)
    for c in collectives(plan.module, plan.facts["mesh"]):
        received[c.kind, " x ".join(c.axes), c.hidden] += c.bytes * c.times
    if topology.count > 1:
        together = sum(parts.values())
        hidden = sum(size for (_, _, hidden), size in received.items() if hidden) / topology.ingress
        waited = sum(size for (_, _, hidden), size in received.items() if not hidden) / topology.ingress
        parts[LINKS] = waited + max(0.0, hidden - together)
    return Roofline(flops, bytes, dict(received), parts)
