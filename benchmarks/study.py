"""A study beside the same runs one by one, and a grid whose poor runs stop early beside the whole of it.

    python benchmarks/study.py

1. Six trainings, three learning rates with two seeds, as six commands one after the other, and as one study. Aim: the
   study takes at most 0.8 of their wall time.
2. Six learning rates with two seeds to their ends, and with `study.stop=halving`. Aim: at most 0.6 of the wall time.
   What that costs is the regret: how much worse the best run that is left is than the best of all, beside how far
   seeds are apart.

Each command begins with an empty directory of compiled programs, so that none has those of another: on a machine where
they stay, single runs of one shape share them, too, and `--keep-programs` has it so within each side. Wall time is that
of the commands, CPU time theirs and their children's; compiling is tracing, lowering and XLA, as jax logs it. More
than eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

RATES, SEEDS = ("5e-4", "1e-3", "2e-3"), (0, 1)
GRID = ("1e-4", "3e-4", "1e-3", "2e-3", "4e-3", "8e-3")
HALVING = ("study.stop=halving", "study.stop_from=0.2", "study.stop_keep=1")
AIMS = {"study / single runs": 0.8, "stopped early / to the end": 0.6}
_COMPILING = re.compile(r"Finished (tracing|jaxpr|XLA).*? in ([\d.]+) sec")


@dataclasses.dataclass
class Cost:
    """Of one or several commands."""

    wall: float = 0.0
    cpu: float = 0.0
    compiling: float = 0.0  # seconds of wall time
    programs: int = 0  # compiled
    steps: int = 0  # programs of a step of training among them

    def __add__(self, other: Cost) -> Cost:
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in both))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pretrain.py:smoke")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--keep-programs", action="store_true", help="commands of one side share compiled programs")
    return parser.parse_args()


def train(a: argparse.Namespace, workdir: Path, programs: Path, *more: str) -> Cost:
    """Carries out one command."""
    # Rules look at what is logged: at any step, whatever number of them there is.
    store = workdir.parent / "store"
    settings = (f"steps={a.steps}", f"batch_size={a.batch_size}", "log.interval=1", f"data.store={store}")
    command = [sys.executable, "-m", "jaxup.train", f"--config={a.config}", f"--workdir={workdir}"]
    cache = tempfile.mkdtemp(dir=programs) if not a.keep_programs else str(programs)
    env = os.environ | {"JAX_LOG_COMPILES": "1", "JAX_COMPILATION_CACHE_DIR": cache}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [*command, *(f"--config.{s}" for s in (*settings, *more))], env=env, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        raise SystemExit(f"{workdir.name} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    compiling = sum(float(seconds) for _, seconds in _COMPILING.findall(ended.stderr))
    lines = re.findall(r"Finished XLA compilation of (\S+) in", ended.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, compiling, len(lines), lines.count("jit(train_step)"))


def axes(rates: Sequence[str]) -> tuple[str, str]:
    seeds = ",".join(map(str, SEEDS))
    return f"study.axes=optimizer.learning_rate: {' '.join(rates)}", f"study.seeds={seeds}"


def loss(run: Path) -> float:
    return json.loads((run / "checkpoints" / "model" / "result.json").read_text())["val_loss"]


def cell(study: Path, rate: str, seed: int) -> Path:
    return study / "cells" / f"learning_rate={float(rate)}-{seed}"


def compare(title: str, costs: dict[str, Cost]) -> float:
    """A table of the two, and the ratio of their wall times."""
    (first, a), (second, b) = costs.items()
    print(
        f"\n## {title}\n\n| | wall, s | CPU, s | compiling, s | programs | of them steps |\n|---|--:|--:|--:|--:|--:|"
    )
    for name, c in costs.items():
        print(f"| {name} | {c.wall:.1f} | {c.cpu:.1f} | {c.compiling:.1f} | {c.programs} | {c.steps} |")
    ratios = [y / x if x else float("nan") for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)]
    print(f"| {second} / {first} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)
    return ratios[0]


def sharing(a: argparse.Namespace, root: Path) -> float:
    directories = [tempfile.mkdtemp(dir=root, prefix="programs-") for _ in range(2)]
    single, runs = Cost(), {}
    for rate, seed in itertools.product(RATES, SEEDS):
        runs[rate, seed] = root / f"single-{rate}-{seed}"
        single += train(a, runs[rate, seed], Path(directories[0]), f"optimizer.learning_rate={rate}", f"seed={seed}")
    study = root / "study"
    together = train(a, study, Path(directories[1]), *axes(RATES))
    ratio = compare(f"{len(runs)} runs of {a.steps} steps", {"single runs": single, "study": together})
    same = [loss(run) == loss(cell(study, *key)) for key, run in runs.items()]
    print(f"\nlosses that are the same to the bit: {sum(same)} of {len(same)}")
    return ratio


def stopping(a: argparse.Namespace, root: Path) -> float:
    costs = {}
    for name, more in (("to the end", ()), ("stopped early", HALVING)):
        programs = Path(tempfile.mkdtemp(dir=root, prefix="programs-"))
        costs[name] = train(a, root / name.replace(" ", "-"), programs, *axes(GRID), *more)
    ratio = compare(f"{len(GRID) * len(SEEDS)} runs of {a.steps} steps, {', '.join(HALVING)}", costs)
    whole, early = (root / name.replace(" ", "-") for name in costs)
    ends = {key: loss(cell(whole, *key)) for key in itertools.product(GRID, SEEDS)}
    stopped = {key for key in ends if (cell(early, *key) / "ended.json").exists()}
    for seed in SEEDS:
        of_seed = {rate: value for (rate, of), value in ends.items() if of == seed}
        left = {rate: value for rate, value in of_seed.items() if (rate, seed) not in stopped}
        best, kept = (min(some, key=some.__getitem__) for some in (of_seed, left))
        print(
            f"\nseed {seed}: {len(of_seed) - len(left)} of {len(of_seed)} runs stopped, the best of all "
            f"{'was one of them' if best not in left else 'was not'}: learning rate {best}, {of_seed[best]:.4f} nats; "
            f"left {kept}, {of_seed[kept]:.4f}; regret {of_seed[kept] - of_seed[best]:.4f}"
        )
    spread = statistics.median(statistics.stdev(ends[rate, seed] for seed in SEEDS) for rate in GRID)
    print(f"\nseeds of one learning rate are apart by a standard deviation of {spread:.4f} nats (median over rates)")
    return ratio


def main() -> None:
    a = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        # Reads and packs the text, which is nobody's to pay for.
        train(a, root / "first", Path(tempfile.mkdtemp(dir=root)), "optimizer.warmup_steps=0", "steps=1")
        print(f"{a.config}, {os.cpu_count()} cores; each command begins without compiled programs", flush=True)
        if a.keep_programs:
            print("but for those of the commands before it on its side", flush=True)
        ratios = dict(zip(AIMS, (sharing(a, root), stopping(a, root)), strict=True))
    print()
    for name, ratio in ratios.items():
        met = "met" if ratio <= AIMS[name] else "NOT met"
        print(f"{name}: {ratio:.2f} of the wall time; aim at most {AIMS[name]}: {met}")


if __name__ == "__main__":
    main()
