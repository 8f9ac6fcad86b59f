"""What the digests of a checkpoint cost beside writing it.

    python benchmarks/checkpoint.py                                      # 512 MB in a temporary directory
    python benchmarks/checkpoint.py --megabytes 4096 --scratch /mnt/disk

The state is random float32: parameters and two moments. Each round saves it and waits; what is timed is how long the
training loop is held up by `save`, when the step is committed, and when its digests are there, which are made in the
background. CPU seconds are those of the process. Figures are medians of `--rounds`, without a first one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxup.files import manifest
from jaxup.training.checkpoint import Checkpoints
from jaxup.training.sound import DIGESTS
from jaxup.training.step import TrainState


def state(megabytes: int, step: int) -> TrainState:
    rng, rows = np.random.default_rng(step), megabytes * 10**6 // (3 * 4 * 4096)
    trees = [{f"layer{i}": jax.numpy.asarray(rng.standard_normal((rows, 1024), np.float32)) for i in range(4)}
             for _ in range(3)]  # fmt: skip
    return TrainState(trees[0], tuple(trees[1:]), jax.numpy.int32(step), jax.numpy.bool_(False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", help="where the files are made (default: a temporary directory)")
    a = parser.parse_args()
    found: list[dict[str, tuple[float, float]]] = []
    original = manifest.write_manifest

    def timed(directory: Path, **how: Any) -> None:
        committed["wall"], committed["cpu"] = time.perf_counter(), time.process_time()
        original(directory, **how)

    manifest.write_manifest = timed  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="jaxup-checkpoint-", dir=a.scratch) as scratch:
        size = 0
        for turn in range(a.rounds + 1):
            this, committed = state(a.megabytes, turn), dict[str, float]()
            jax.block_until_ready(this)
            with Checkpoints(Path(scratch, str(turn)), keep=1) as checkpoints:
                began, cpu = time.perf_counter(), time.process_time()
                checkpoints.save(turn + 1, this)
                held = time.perf_counter() - began, time.process_time() - cpu
            done, done_cpu = time.perf_counter(), time.process_time()
            found.append({
                "the loop is held up": held,
                "committed": (committed["wall"] - began, committed["cpu"] - cpu),
                "digests": (done - committed["wall"], done_cpu - committed["cpu"]),
            })  # fmt: skip
            step = Path(scratch, str(turn), str(turn + 1))
            size = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
            assert (step / DIGESTS).exists()
    median = {key: [statistics.median(f[key][i] for f in found[1:]) for i in range(2)] for key in found[0]}
    print(f"{size / 1e6:,.0f} MB on disk, {a.rounds} rounds\n\n| | wall, s | CPU, s |\n|---|---:|---:|")
    for key, (wall, cpu) in median.items():
        print(f"| {key} | {wall:.3f} | {cpu:.3f} |")
    wall, cpu = (median["digests"][i] / median["committed"][i] for i in range(2))
    print(f"\ndigests / save: {wall:.1%} of the wall time, {cpu:.1%} of the CPU time")


if __name__ == "__main__":
    main()
