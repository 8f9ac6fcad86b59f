"""The same numbers on any mesh and any number of processes: a table of what training gives on each.

    python tests/equality.py                        # five minutes on two cores

Each row trains the same tiny model, 50 steps in float32, by the real command: once from the beginning, and once from
the checkpoint that the run on one device has of the middle. Compared with that run are the losses, the bits of what is
restored (parameters and optimizer), and those of all rows of all batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and len(sys.argv) == 1:  # what conftest does for pytest
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
    }  # fmt: skip

import processes
import runs

STEPS, MIDDLE = 50, 25
AXES = ("data", "fsdp", "tensor", "context")
MESHES = ["8,1,1", "1,8,1", "2,2,2", "1,4,2", "2,1,4", "1,1,8", "4,1,1,2", "1,2,1,4", "1,1,1,8", "1,2,2,2"]
TINY = [
    f"--config.steps={STEPS}", f"--config.checkpoint.interval={MIDDLE}", "--config.reference.steps=2",
    "--config.inherit.control=0", "--config.inherit.layers=2", "--config.model.num_layers=4",
    "--config.model.hidden_size=32", "--config.model.num_heads=8", "--config.eval.interval=25",
    "--config.compute.dtype=float32", "--config.checkpoint.keep=3",
]  # fmt: skip


class Row(NamedTuple):
    """Of the table: what trained, and how far it is from the run on one device."""

    where: str
    loss: float  # the largest relative difference of a loss, of training or validation, in all steps
    resumed: float  # of those after the middle, when it went on from there
    state: bool  # the bits of what was restored are the same
    batches: bool  # and those of the batches


class Seen(NamedTuple):
    losses: dict[tuple[int, str], float]
    state: str  # a digest of what was restored, "" if nothing was
    rows: dict[tuple[int, int], str]  # (step, row of the global batch) -> a digest of all its fields


def watched(record: Path, arguments: list[str]) -> None:
    """`jaxup.train` with these arguments; what this process reads and restores is written to a file in `record`."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from jaxup.data.batches import Batches
    from jaxup.train import main
    from jaxup.training.checkpoint import Checkpoints

    call, restore, seen = Batches.__call__, Checkpoints.restore, {"state": "", "rows": []}

    def batch(self: Batches, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        fields = call(self, step, rows)
        if self.batch_size == 8:
            for number, one in enumerate(zip(*fields.values(), strict=True), rows.start or 0):
                digest = hashlib.sha256(b"".join(np.asarray(value).tobytes() for value in one)).hexdigest()
                seen["rows"].append([step, number, digest])
        return fields

    def restored(self: Checkpoints, step: int, abstract: Any) -> Any:
        state = restore(self, step, abstract)
        whole = hashlib.sha256()
        for leaf in jax.tree.leaves((state.params, state.opt_state, state.step)):
            alone = jax.process_count() == 1
            whole.update(np.asarray(leaf if alone else multihost_utils.process_allgather(leaf, tiled=True)).tobytes())
        seen["state"] = whole.hexdigest()
        return state

    Batches.__call__, Checkpoints.restore = batch, restored
    try:
        main(["train", *arguments])
    finally:
        Batches.__call__, Checkpoints.restore = call, restore
    record.mkdir(exist_ok=True)
    (record / f"{jax.process_index()}.json").write_text(json.dumps(seen))


def read(run: Path, record: Path) -> Seen:
    """What one run gave, in all its processes, which must agree where they have the same."""
    parts = [json.loads(path.read_text()) for path in sorted(record.iterdir())]
    rows: dict[tuple[int, int], str] = {}
    for part in parts:
        for step, row, digest in part["rows"]:
            assert rows.setdefault((step, row), digest) == digest, f"{record}: two of step {step}, row {row}"
    (state,) = {part["state"] for part in parts}
    losses = {
        (entry["step"], key): entry[key]
        for entry in runs.metrics(run) for key in ("loss", "val_loss") if entry["model"] == "target_2" and key in entry
    }  # fmt: skip
    return Seen(losses, state, rows)


def table(root: Path) -> list[Row]:
    """Trains everything below `root`, which is empty."""
    (root / "corpus").mkdir()
    runs.write_corpus(root / "corpus")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))

    def tasks(name: str, mesh: str, middle: Path | None) -> list[list[str]]:
        axes = [f"--config.mesh.{axis}={size}" for axis, size in zip(AXES, mesh.split(","))]
        made = [[str(root / f"{name}.new"), *runs.arguments(root / "corpus", root / name, *TINY, *axes)]]
        if middle is not None:
            shutil.copytree(middle, root / f"{name}-on")
            more = [str(root / f"{name}-on.new"), *runs.arguments(root / "corpus", root / f"{name}-on", *TINY, *axes)]
            made.append(more)
        return made

    def carried_out(work: list[list[str]], total: int, devices: int, launcher: Any = processes.explicit) -> None:
        command = (Path(__file__), json.dumps(work))
        with processes.several_started(total, *command, devices=devices, cwd=root, launcher=launcher) as them:
            ends = [process.communicate(timeout=processes.LIMIT) for process in them]
        assert not any(process.returncode for process in them), ends

    carried_out(tasks("one", "1,1,1", None), 1, 1)
    stopped = root / "stopped"  # as it was in the middle
    shutil.copytree(root / "one", stopped)
    target = stopped / "checkpoints" / "target_2"
    shutil.rmtree(target / str(STEPS))
    shutil.rmtree(stopped / "export")
    (target / "result.json").unlink()
    carried_out(tasks("one-again", "1,1,1", stopped)[1:], 1, 1)
    carried_out([task for mesh in MESHES for task in tasks(mesh, mesh, stopped)], 1, 8)
    carried_out(tasks("two", "1,8,1", stopped), 2, 4, processes.slurm)
    carried_out(tasks("four", "2,4,1", stopped), 4, 2, processes.open_mpi)
    names = {mesh: f"8 devices: {mesh}" for mesh in MESHES}
    names |= {"two": "2 processes of 4 devices: 1,8,1", "four": "4 processes of 2 devices: 2,4,1"}
    one, again = read(root / "one", root / "one.new"), read(root / "one-again-on", root / "one-again-on.new")

    def far(these: Seen, since: int) -> float:
        assert these.losses.keys() == one.losses.keys()
        return max(abs(these.losses[at] / value - 1) for at, value in one.losses.items() if at[0] > since)

    result = [Row("1 device", 0.0, far(again, MIDDLE), bool(again.state), again.rows.items() <= one.rows.items())]
    for name, where in names.items():
        new, on = read(root / name, root / f"{name}.new"), read(root / f"{name}-on", root / f"{name}-on.new")
        assert {step for step, _ in on.rows} == set(range(MIDDLE, STEPS))
        same = new.rows == one.rows and on.rows == again.rows
        result.append(Row(where, far(new, -1), far(on, MIDDLE), on.state == again.state, same))
    return result


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for record, *arguments in json.loads(sys.argv[1]):
            watched(Path(record), arguments)
        sys.exit()
    with tempfile.TemporaryDirectory(prefix="jaxup-equality-") as directory:
        print(f"| {', '.join(AXES)} | loss, 50 steps | resumed | restored state | batches |\n|---|--:|--:|---|---|")
        for row in table(Path(directory)):
            same = ["the same bits" if one else "OTHERS" for one in (row.state, row.batches)]
            print(f"| {row.where} | {row.loss:.1e} | {row.resumed:.1e} | {' | '.join(same)} |")
