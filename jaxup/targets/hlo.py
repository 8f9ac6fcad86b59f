"""Reading a compiler's plan: the text of a scheduled HLO module, as XLA writes it for TPUs and CPUs.

A program is computations, each a list of instructions; a loop has a computation as its body, and what runs in it runs
as often as the loop turns. https://openxla.org/xla/hlo_to_thunks has the language, XLA's hlo_parser.cc its grammar.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_BYTES = {"pred": 1.0, "bf16": 2.0, "s4": 0.5, "u4": 0.5, "token": 0.0}
_ARRAY = re.compile(r"\b(pred|bf16|[su]\d+|f\d+\w*)\[([\d,]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type."""

    kind: str
    shape: tuple[int, ...]
    in_hbm: bool = True  # else in a memory of the chip itself

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.size * (_BYTES.get(self.kind) or int(re.sub(r"\D.*", "", self.kind[1:])) / 8)


@functools.lru_cache(maxsize=1 << 16)
def arrays(text: str) -> tuple[Array, ...]:
    """Those of a type: of a tuple all."""
    return tuple(
        Array(kind, tuple(map(int, filter(None, shape.split(",")))), "S(" not in layout)
        for kind, shape, layout in _ARRAY.findall(text)
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # from its operands on

    @property
    def called(self) -> list[str]:
        """Computations that it runs; not those that only say how to combine two numbers, nor a loop's condition."""
        if self.opcode in (*KINDS, "reduce", "reduce-window", "scatter", "sort", "select-and-scatter"):
            return []
        names = [name for match in _CALLED.findall(self.rest) for name in match.split(",")]
        return [name.strip().lstrip("%") for name in names]

    def attribute(self, pattern: str) -> str:
        """What the group of the pattern matches, or nothing."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""

    def numbers(self, key: str) -> tuple[int, ...]:
        """An attribute such as dimensions={0,1}."""
        return tuple(map(int, filter(None, self.attribute(rf"\b{key}={{([\d,]*)}}").split(","))))


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: Mapping[str, Computation]
    entry: str

    def executed(self) -> dict[str, int]:
        """How often each scheduled computation runs; what is fused into one instruction is not among them."""
        times: dict[str, int] = {}

        def run(name: str, count: int) -> None:
            times[name] = times.get(name, 0) + count
            for i in self.computations[name].values():
                if i.opcode in ("while", "call", "conditional"):
                    for called in i.called:
                        run(called, count * (self._turns(i) if i.opcode == "while" else 1))

        run(self.entry, 1)
        return times

    def _turns(self, loop: Instruction) -> int:
        """How often the body runs: as the compiler notes, or else the number that its condition compares with."""
        if known := loop.attribute(r"known_trip_count\D{1,12}(\d+)"):
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        compared = {name for i in condition.values() if i.opcode == "compare" for name in i.operands}
        numbers = [i for i in condition.values() if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type)]
        limits = [i.rest for i in numbers if i.name in compared] or [i.rest for i in numbers]
        return max([int(limit) for limit in limits if limit.isdigit()], default=1)

    def operands(self, computation: str, instruction: Instruction) -> list[tuple[Array, ...]]:
        known = self.computations[computation]
        return [arrays(known[name].type) for name in instruction.operands if name in known]


def parse(text: str) -> Module:
    """ValueError for a text that is no module."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if found := _COMPUTATION.match(line):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif line == "}" or line.startswith("}, "):  # an attribute of a kernel has lines of its own, such as }}
            current = None
        elif found := _INSTRUCTION.match(line):
            kind, tail = _split_type(found[2])
            opcode, _, after = tail.partition("(")
            opcode = opcode.strip()
            inside = after[: _closing(after)]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            rest = inside if opcode in ("constant", "parameter") else after[_closing(after) :]
            current[found[1]] = Instruction(found[1], kind, opcode, operands, rest)
    if not entry:
        raise ValueError("no HLO module")
    return Module(computations, entry)


def _split_type(text: str) -> tuple[str, str]:
    """Before and after the end of a type, which is a word, or a tuple in parentheses."""
    end = _closing(text[1:]) + 2 if text.startswith("(") else text.index(" ")
    return text[:end], text[end:].strip()


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened before the text."""
    depth = 1
    for found in re.finditer("[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text)


# ---- collectives


@dataclasses.dataclass(frozen=True)
class Collective:
    """Of one step."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, over which it goes
    bytes: float  # that a chip receives, each time
    times: int
    hidden: bool  # computation goes on meanwhile


def collectives(module: Module, mesh: Mapping[str, int]) -> Iterator[Collective]:
    """`mesh`: devices along each axis, the last one fastest, as partitions are numbered."""
    for name, times in module.executed().items():
        for i in module.computations[name].values():
            if i.opcode.endswith("-done") or "collective-done" in i.name:
                continue
            inside = [called for called in i.called if i.opcode in ("fusion", "async-start")]
            begins = i.opcode == "async-start" or "async-collective-start" in i.name
            for computation, each in [(name, i), *((c, e) for c in inside for e in module.computations[c].values())]:
                kind = each.opcode.removesuffix("-start")
                if kind not in KINDS:
                    continue
                scatter = "all-reduce-scatter" in computation
                if each is not i and not begins and not scatter and kind != "all-reduce":
                    continue  # a piece of an asynchronous one, which was counted where it begins
                group = _group(each, math.prod(mesh.values()))
                sent = sum((a.bytes for operand in module.operands(computation, each) for a in operand), 0.0)
                n = len(group)
                received = {
                    "all-gather": sent * (n - 1), "reduce-scatter": sent * (n - 1) / n,
                    "all-to-all": sent * (n - 1) / n, "all-reduce": (1 if scatter else 2) * sent * (n - 1) / n,
                    "collective-permute": sent * (n > 1),
                }[kind]  # fmt: skip
                if received:
                    kind = "reduce-scatter" if scatter else kind
                    hidden = begins or each.opcode.endswith("-start")
                    yield Collective(kind, _axes(group, mesh), received, times, hidden)


def _group(i: Instruction, devices: int) -> list[int]:
    """The partitions of one of the groups that exchange something."""
    if pairs := i.attribute(r"source_target_pairs=\{\{([\d,]+)\}"):
        return sorted({int(n) for n in pairs.split(",")})
    if first := i.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return [int(n) for n in first.split(",")]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.rest):
        shape = [int(n) for n in found[3].split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else list(range(len(shape)))
        return [_number(k, shape, order) for k in range(int(found[2]))]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([\d,]+)\))? ?\{([^}]*)\}", i.rest):
        return _of_mesh(found[1], found[2] or "", found[3])
    return list(range(devices))


def _number(index: int, shape: Sequence[int], order: Sequence[int]) -> int:
    """Of range(prod(shape)) in this shape, transposed, the value at a flat index."""
    at = {}
    for axis in reversed(order):
        index, at[axis] = divmod(index, shape[axis])
    number = 0
    for axis, size in enumerate(shape):
        number = number * size + at[axis]
    return number


def _of_mesh(sizes: str, ids: str, over: str) -> list[int]:
    """mesh['a'=4,'b'=16] {'b', 'a':(2)2}: an axis, or a part of it that comes after so many and has so many."""
    axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", sizes)}
    numbers = [0]
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over):
        inner = math.prod(n for other, n in list(axes.items())[list(axes).index(name) + 1 :])
        count = int(size or axes[name])
        stride = inner * (axes[name] // (int(before or 1) * count))
        numbers = [number + k * stride for number in numbers for k in range(count)]
    table = [int(n) for n in ids.split(",")] if ids else None
    return [table[n] for n in numbers] if table else numbers


def _axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Along which a group's members differ."""
    found: list[str] = []
    for name in reversed(list(mesh)):
        if len({number % mesh[name] for number in group}) > 1:
            found.append(name)
        group = [number // mesh[name] for number in group]
    return tuple(reversed(found))
