"""What the instructions of a plan cost: FLOPs of products, and bytes that go to and from HBM."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from jaxup.targets.hlo import KINDS, Array, Computation, Instruction, Module, arrays

# They name, order or place what is there, or what they cost is that of what they run.
_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "async-update", "domain",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float
    times: int
    hidden: bool  # it goes on beside others: a prefetch


def costs(module: Module) -> Iterator[Cost]:
    """Of the instructions of one step that cost anything, collectives aside."""
    for name, times in module.executed().items():
        for i in module.computations[name].values():
            if i.opcode in _FREE or i.opcode.endswith("-done") or i.opcode.removesuffix("-start") in KINDS:
                continue
            if (
                "async-collective" in i.name
                or "AllocateBuffer" in i.rest
                or any("all-reduce-scatter" in c for c in i.called)
            ):
                continue
            flops, moved = _flops(module, name, i), _traffic(module, name, i)
            if flops or moved:
                yield Cost(flops, moved, times, i.opcode.endswith("-start"))


# ---- FLOPs


def _flops(module: Module, computation: str, i: Instruction) -> float:
    operands = module.operands(computation, i)
    if i.opcode == "fusion":
        inside = (_flops(module, c, each) for c in i.called for each in module.computations[c].values())
        return sum(inside, 0.0)
    if i.opcode == "dot":
        contracted = math.prod(operands[0][0].shape[d] for d in i.numbers("lhs_contracting_dims"))
        return 2.0 * arrays(i.type)[0].size * contracted
    if i.opcode == "convolution":
        return _convolution(i, operands[0][0], operands[1][0], arrays(i.type)[0])
    if i.opcode == "custom-call":
        return _kernel(i, operands)
    return 0.0


def _convolution(i: Instruction, lhs: Array, rhs: Array, out: Array) -> float:
    """Products on TPUs are convolutions, whose windows stand for axes of a batch, contracted or free ones.

    Counted is what is multiplied: not what a window adds in zeros. XLA's HandleConvolution counts the same.
    """
    labels = i.attribute(r"dim_labels=(\w+->\w+)")
    left, right, result = re.split("_|->", labels)
    spatial = [label for label in result if label.isdigit()]
    window = {
        key: value.split("x") for key, value in re.findall(r"(\w+)=([\d_x\-]+)", i.attribute(r"window=\{([^}]*)\}"))
    }
    count = out.shape[result.index("b")] * out.shape[result.index("f")] * rhs.shape[right.index("i")]
    for n, label in enumerate(spatial):
        setting = lambda key, default: window.get(key, [default] * len(spatial))[n]  # noqa: B023, E731
        size, stride = rhs.shape[right.index(label)], int(setting("stride", "1"))
        pad, dilate = int(setting("pad", "0_0").split("_")[0]), int(setting("lhs_dilate", "1"))
        spread, last = int(setting("rhs_dilate", "1")), (lhs.shape[left.index(label)] - 1) * dilate
        pairs = 0
        for at in range(out.shape[result.index(label)]):
            low = at * stride - pad  # places of the window are low, low + spread, ...
            if spread == 1:
                pairs += max(0, min(last, low + size - 1) // dilate - (max(0, low) - 1) // dilate)
            else:
                places = range(low, low + size * spread, spread)
                pairs += sum(0 <= place <= last and place % dilate == 0 for place in places)
        count *= pairs
    return 2.0 * count / int(i.attribute(r"batch_group_count=(\d+)") or 1)


def _kernel(i: Instruction, operands: list[tuple[Array, ...]]) -> float:
    """A kernel says what it does, or is flash attention, of which half is computed: q, k and v of [..., seq, size]."""
    if said := i.attribute(r'"flops":"?(\d+)'):
        return float(said)
    q = [a for operand in operands for a in operand if len(a.shape) >= 3 and a.kind in ("bf16", "f32")]
    if "tpu_custom_call" not in i.rest or len(q) < 3:
        return 0.0
    # Logits and values; backward both again, for each of the three, but where one kernel is of queries alone.
    name = i.name + i.attribute(r'op_name="([^"]*)"')
    products = 5 if "dkv" in name else 3 if "dq" in name else 2
    return 2.0 * products * q[0].size * q[1].shape[-2] / 2


# ---- bytes


def _traffic(module: Module, computation: str, i: Instruction) -> float:
    """Bytes of HBM read and written. Of a stack of which a layer is read or written, it is that layer."""
    written = _hbm(arrays(i.type))
    read = [_hbm(operand) for operand in module.operands(computation, i)]
    if i.opcode == "copy-start":  # its type has the source as well
        return _hbm(arrays(i.type)[:1]) + read[0]
    if i.opcode == "async-start":
        return 0.0
    if i.opcode in _SLICES:
        return 2 * written
    if i.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if i.opcode == "fusion":
        for called in i.called:
            body = module.computations[called]
            for place, operand in enumerate(read):
                uses = list(_uses(module, body, _parameter(body, place))) if operand else []
                if uses and all(use.opcode in _SLICES for _, use, _ in uses):
                    read[place] = min(operand, sum(a.bytes for _, use, _ in uses for a in arrays(use.type)))
                elif uses and all(
                    use.opcode == "dynamic-update-slice" and use.operands[0] == name for _, use, name in uses
                ):
                    updated = sum(a.bytes for within, use, _ in uses for a in arrays(within[use.operands[1]].type))
                    written, read[place] = max(0.0, written - operand) + updated, 0.0
    return written + sum(read)


def _parameter(body: Computation, place: int) -> str:
    return next((i.name for i in body.values() if i.opcode == "parameter" and i.rest == str(place)), "")


def _uses(module: Module, body: Computation, name: str) -> Iterator[tuple[Computation, Instruction, str]]:
    """What reads a value, where, and by which name: also through another view of it, and in what is fused therein."""
    for i in body.values():
        if name not in i.operands:
            continue
        if i.opcode == "bitcast":
            yield from _uses(module, body, i.name)
        elif i.opcode == "fusion":
            within = module.computations[i.called[0]]
            for place, operand in enumerate(i.operands):
                if operand == name:
                    yield from _uses(module, within, _parameter(within, place))
        else:
            yield body, i, name


def _hbm(found: tuple[Array, ...]) -> float:
    return sum((a.bytes for a in found if a.in_hbm), 0.0)
