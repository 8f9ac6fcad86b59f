"""What XLA writes of the programs that it compiles, and a process that compiles one until that is written.

Code generation comes last, takes nine tenths of the time, and changes nothing of memory, collectives and products.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxup.errors import UserError, first_line
from jaxup.progress import Waiting
from jaxup.targets.hlo import Module, parse

FACTS, REFUSED, LOG = "facts.json", "refused.json", "log.txt"
_HOST = 5  # the number of the host's memory, in XLA
_PLAN, _BUFFERS = "after_optimizations.txt", "buffer-assignment.txt"
# libtpu looks for the machine that it is on, and for who else uses its TPUs: there are none.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "2",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device's main memory, as the compiler assigned them."""

    arguments: int  # what the program is given; what it returns lies in the same place, where it is donated
    outputs: int  # what it returns elsewhere
    constants: int
    temporary: int  # all else, at the moment of its execution that needs most
    host: int = 0  # of the memory of the host that are put aside there meanwhile, which are none of the device's

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.constants + self.temporary

    def least(self, count: int, room: int | float) -> float:
        """Of a step in `count` micro-batches that does not fit: fewer of them than this do not fit either.

        What is there for a while gets smaller by no more than it is cut.
        """
        left = room - (self.total - self.temporary)
        return count * self.temporary / left if left > 0 else math.inf


def read_memory(text: str) -> Memory:
    """Of a buffer assignment, a text of XLA's."""
    sizes = dict.fromkeys(("arguments", "outputs", "constants", "temporary", "host"), 0)
    for size, rest in re.findall(r"^allocation \d+: size (\d+)(.*)", text, re.M):
        if re.search(rf"\bcolor {_HOST}\b", rest):
            sizes["host"] += int(size)
        if "thread-local" in rest or re.search(r"\bcolor [1-9]", rest):  # of one instruction, or on the chip itself
            continue
        kinds = {"parameter ": "arguments", "constant": "constants", "maybe-live-out": "outputs", "output": "outputs"}
        sizes[next((kind for word, kind in kinds.items() if word in rest), "temporary")] += int(size)
    return Memory(**sizes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a program before its code is."""

    memory: Memory
    module: Module
    facts: dict[str, Any]  # what whoever compiled it said of it
    seconds: float  # of processors, to come to it, or to its code
    whole: bool = False  # its code was made


def read_dump(directory: Path, facts: dict[str, Any], seconds: float = 0.0, whole: bool = False) -> Plan:
    """Of the one program whose dump is in `directory`."""
    (plan,), (buffers,) = (sorted(directory.glob(f"*{name}")) for name in (_PLAN, _BUFFERS))
    return Plan(read_memory(buffers.read_text()), parse(plan.read_text()), facts, seconds, whole)


def compiled(module: str, given: Any, directory: Path, generation: str, *, whole: bool = False) -> Plan:
    """Runs `python -m MODULE`, which reads `given` and has XLA dump a program, until the dump is there.

    With `whole` to its end: a kernel may need more of a chip's fast memory than there is, which its code shows.

    UserError for what it refuses, and for a compiler that fails, unless it is for want of memory and there is a plan.
    """
    environment = {**os.environ, **_ENVIRONMENT, "TPU_ACCELERATOR_TYPE": f"{generation}-8"}
    began, waiting = os.times(), Waiting()
    with open(directory / LOG, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
        )  # fmt: skip
        assert process.stdin is not None
        try:
            process.stdin.write(pickle.dumps(given))
            process.stdin.close()
            before = None
            while process.poll() is None:
                time.sleep(0.5)
                waiting.on("the compiler")
                if (now := _written(directory)) is not None and now == before and not whole:
                    break
                before = now
        finally:
            process.kill()
            process.wait()
    ended = os.times()
    seconds = sum(ended[2:4]) - sum(began[2:4])
    if (refused := directory / REFUSED).exists():
        said = json.loads(refused.read_text())
        raise UserError(said["what"], at=said["at"], hint=said["hint"])
    log_text, made = (directory / LOG).read_text(errors="replace"), process.returncode == 0
    if _written(directory) is None or (whole and not made and "RESOURCE_EXHAUSTED" not in log_text):
        raise UserError(f"the compiler fails: {_failure(log_text)}")
    return read_dump(directory, json.loads((directory / FACTS).read_text()), seconds, made)


def _written(directory: Path) -> tuple[int, ...] | None:
    """The sizes of what is waited for, once all of it is there."""
    found = [sorted(directory.glob(f"*{name}")) for name in (_PLAN, _BUFFERS, "memory-usage-report.txt")]
    return tuple(paths[0].stat().st_size for paths in found) if all(found) else None


def _failure(log: str) -> str:
    """The last line that says something, of a traceback its error."""
    lines = [line for line in log.splitlines() if re.match(r"[\w.]+(Error|Exception)(: |$)", line)] or log.splitlines()
    return first_line(Exception(lines[-1] if lines else "without a word"))
