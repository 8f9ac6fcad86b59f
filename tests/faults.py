"""A campaign of faults: commands are killed, stopped, starved of disk and fed damage, and must lose nothing.

    python tests/faults.py                          # every fault, 50 times each; an hour on two cores
    python tests/faults.py kill flip --times 10
    python tests/faults.py --seed 100               # other moments, files and bits

Every trial runs a real command, in a process forked from one that has done the imports. It is right if the command
ends as its undisturbed twin did, byte for byte, or if it says in one line which file is wrong and changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # what conftest does for pytest
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
    }  # fmt: skip

import damage
import processes
import runs

from jaxup import errors

LIMIT = 600  # seconds: a command that takes longer hangs
ABSENT = 90  # seconds: how long the others may wait for a process that has not come yet, or does not say a word
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["jax", "optax", "orbax.checkpoint.v1", "tensorstore", "transformers", "matplotlib.figure", "jaxup.experiments.run",
     "jaxup.experiments.heal", "jaxup.experiments.inherit", "jaxup.building.work", "jaxup.hub.text_generation"]
)  # fmt: skip


def _command(arguments: list[str], folder: str, limits: dict[int, int]) -> None:
    import resource

    from jaxup.__main__ import cli

    os.chdir(folder)
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    sys.argv = ["jaxup", *arguments]
    cli()


class Started:
    """`jaxup ARGUMENTS` in `folder`; what it prints is added to the file `log` there."""

    def __init__(self, arguments: list[str], folder: Path, limits: dict[int, int] | None = None):
        self.log = folder / "log"
        self._from = self.log.stat().st_size if self.log.exists() else 0
        self.process = FORKED.Process(target=_command, args=(arguments, str(folder), limits or {}))
        self.process.start()

    def wait(self, seconds: float = LIMIT) -> int | None:
        """Its exit code (negative: the signal that ended it), or None while it runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def end(self) -> int:
        """Its exit code; one that hangs is killed."""
        if self.wait() is None:
            self.process.kill()
            self.process.join()
            return 124
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.log.read_bytes()[self._from :].decode(errors="replace") if self.log.exists() else ""


class Job(NamedTuple):
    """A command that makes something, and what it has made in its folder, by name."""

    arguments: list[str]
    made: Callable[[Path], dict[str, str]]


def digests(directory: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in damage.files(directory, skip)
    }


def trained(folder: Path) -> dict[str, str]:
    """The export, the tokens, every logged loss and every result of a run, without what depends on time."""
    run = folder / "run"
    found = {f"export/{name}": value for name, value in digests(run / "export", ("README.md",)).items()}
    found |= {f"data/{name}": value for name, value in digests(folder / "data", ("lock", ".lock")).items()}
    found["metrics.jsonl"] = json.dumps(runs.losses(run))
    for path in sorted((run / "checkpoints").glob("*/result.json")):
        found[path.parent.name] = json.dumps({**json.loads(path.read_text()), "seconds": 0})
    return found


GENERATE = ["generate", "model", "--prompt", "def", "--greedy", "--max-tokens", "8"]


def written(folder: Path) -> dict[str, str]:
    """What generate wrote: all but how long it took."""
    lines = (folder / "log").read_text().splitlines()
    return {"text": "\n".join(line for line in lines if not line.startswith("load:") and " tokens/s" not in line)}


class World:
    """A place with a model, text and chats; what each job makes of them undisturbed, and how long it takes.

    With a finished run, that is taken, and nothing is trained: the jobs are those that read it.
    """

    def __init__(self, root: Path, run: Path | None = None):
        self.root, self._count = root, 0
        (root / "corpus").mkdir()
        runs.write_corpus(root / "corpus")
        (root / "large").mkdir()
        for path in (root / "corpus").iterdir():
            (root / "large" / path.name).write_text(path.read_text() * 60)
        runs.write_chats(root / "chats.jsonl")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
        self.model = root / "train" / "run" / "export"
        train = runs.arguments(root / "corpus", "run", "--config.model.max_positions=128")
        heal = [
            *runs.HEAL, "--config.pretrain.steps=0", f"--config.base.path={self.model}", "--config.steps=6",
            "--config.epochs=0", "--config.plan=upscale(base, 1:2, copies=1)", "--config.data.format=chatml",
            f"--config.data.files={root / 'chats.jsonl'}", "--config.step.accumulation=2",
            "--config.data.seq_len=128", "--config.heal.control=False", "--workdir=run",
        ]  # fmt: skip
        tokens = [*runs.arguments(root / "large", "run"), "--config.steps=2", "--config.inherit.control=0"]
        jobs = {
            "train": Job(["train", *train], trained),
            "heal": Job(["train", *heal], trained),
            "prepare": Job(["train", *tokens], trained),
            "build": Job(["build", f"interleave({self.model}, 1:2, copies=2)", "out"], lambda f: digests(f / "out")),
            "export": Job(["export", str(self.root / "train" / "run"), "out"], lambda f: digests(f / "out")),
            "generate": Job([*GENERATE[:1], str(self.model), *GENERATE[2:]], written),
        }
        if run is not None:
            shutil.copytree(run, root / "train" / "run")
            jobs = {name: jobs[name] for name in ("build", "export", "generate")}
        self.jobs, self.made, self.seconds = jobs, {}, {}
        for name, job in jobs.items():
            folder = root / name
            folder.mkdir()
            for twin in (folder, self.fresh()):  # the second finds its programs compiled, as the trials do
                began = time.monotonic()
                command = Started(job.arguments, twin)
                if command.end():
                    raise SystemExit(f"{name}, undisturbed: {command.said[-3000:]}")
                self.seconds[name], made = time.monotonic() - began, job.made(twin)
                if self.made.setdefault(name, made) != made:
                    raise SystemExit(f"{name}, undisturbed, twice: {differing(self.made[name], made)} differ")
            print(f"{name}: {self.seconds[name]:.1f} s undisturbed", flush=True)

    def fresh(self, like: Path | None = None) -> Path:
        """A folder for a trial, empty or a copy."""
        self._count += 1
        folder = self.root / f"trial{self._count}-{random.getrandbits(32):x}"
        if like is None:
            folder.mkdir()
        else:
            shutil.copytree(like, folder, symlinks=True)
        return folder


def differing(one: dict[str, str], other: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)))


def leftovers(folder: Path) -> str:
    """What killed writers leave behind and the next start should have removed."""
    marks = ("tmp", "partial", "staging")
    found = [p for p in folder.rglob("*") if any(m in p.name for m in marks) or p.suffix == ".damaged"]
    return ", ".join(str(p.relative_to(folder)) for p in found)


# A trial returns what became of it: a word for what is right ("resumed", "noticed"), or "WRONG: ..." in words.


DONE = "exists already"  # what build and export say if they were done when the signal came


def finish(world: World, name: str, folder: Path) -> str:
    """Runs the job to its end, which must be that of its undisturbed twin."""
    command = Started(world.jobs[name].arguments, folder)
    code = command.end()
    if code and not (code == 2 and DONE in command.said):
        return f"WRONG: {name}: exit {code}: {command.said[-400:]}"
    if differ := differing(world.made[name], world.jobs[name].made(folder)):
        return f"WRONG: {name}: other bytes than undisturbed: {differ}"
    return f"WRONG: {name}: left behind: {left}" if (left := leftovers(folder)) else ""


def interrupt(world: World, rng: random.Random, signum: int) -> str:
    name = rng.choice([name for name in world.jobs if name != "generate"])
    folder, hits = world.fresh(), 0
    for _ in range(rng.randint(1, 3)):
        command = Started(world.jobs[name].arguments, folder)
        code = command.wait(rng.uniform(0, 1.1) * world.seconds[name])
        if code is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(command.process.pid, signum)
        began, code = time.monotonic(), command.end()
        took = time.monotonic() - began
        if code == 2 and DONE in command.said:
            break
        # Until the handler of signals is there, and after it is gone, a signal ends a process that has nothing to save.
        if code not in (0, -signum, 128 + signum) or "Traceback" in command.said:
            return f"WRONG: {name}: exit {code} after {took:.0f} s: {command.said[-400:]}"
        hits += code != 0
    return finish(world, name, folder) or f"{name}: " + ("stopped, resumed" if hits else "not hit")


def kill(world: World, rng: random.Random) -> str:
    """kill -9 at up to three random moments, then the same command until it ends."""
    return interrupt(world, rng, signal.SIGKILL)


def term(world: World, rng: random.Random) -> str:
    """SIGTERM at up to three random moments: exit 143, and the same command goes on."""
    return interrupt(world, rng, signal.SIGTERM)


def unfinished(world: World) -> Path:
    folder = world.fresh(world.root / "train")
    damage.stop_early(folder / "run")
    return folder


def spoil(world: World, rng: random.Random, kinds: tuple[str, ...]) -> str:
    """One file of a checkpoint, a token store or an exported model is damaged; then what reads it runs."""
    what = rng.choice([*(["checkpoint", "store"] if "train" in world.jobs else []), "build", "generate", "verify"])
    seed = rng.getrandbits(32)
    if what in ("checkpoint", "store"):
        folder = unfinished(world)
        place = folder / "run" / "checkpoints" / "target_2"
        if what == "store":
            place = next(p for p in (folder / "data").iterdir() if p.is_dir())
        done = damage.damage(place, seed, kinds, skip=("lock", ".lock", "model.json"))
        arguments = world.jobs["train"].arguments

        def harmless() -> bool:
            return trained(folder) == world.made["train"]

    else:
        folder = world.fresh()
        shutil.copytree(world.model, folder / "model")
        done = damage.damage(folder / "model", seed, kinds)
        arguments = {
            "build": ["build", f"interleave({folder / 'model'}, 1:2, copies=2)", "out"],
            "generate": GENERATE,
            "verify": ["verify", "model"],
        }[what]
        names = (
            "README.md",
            "jaxup_manifest.json",
            "jaxup_plan.yaml",
            "plan.png",
        )  # they name the directory of the model

        def harmless() -> bool:
            if what == "build":
                return digests(folder / "out", names) == digests(world.root / "build" / "out", names)
            return what == "generate" and written(folder) == world.made["generate"]

    command = Started(arguments, folder)
    code, said = command.end(), command.said
    if "Traceback" in said or code not in (0, 2):
        return f"WRONG: {what}: {done}: exit {code}: {said[-400:]}"
    if code or (what == "verify" and "no digest" in said):
        return f"{what}: noticed"
    if not harmless():
        return f"WRONG: {what}: {done}: exit 0: {said[-400:]}"
    return f"{what}: " + ("noticed, the one before taken" if " is taken" in said else "harmless")


def flip(world: World, rng: random.Random) -> str:
    """One bit of one file."""
    return spoil(world, rng, ("flip",))


def spoiled(world: World, rng: random.Random) -> str:
    """A file is truncated, deleted, zeroed in part, replaced by another, or one too many."""
    return spoil(world, rng, tuple(kind for kind in damage.KINDS if kind != "flip"))


def disk(world: World, rng: random.Random) -> str:
    """The disk is full at some byte: one line; with room again the same command ends as if nothing had been."""
    name = rng.choice([name for name in world.jobs if name != "generate"])
    folder = world.fresh()
    mount = ["mount", "-t", "tmpfs", "-o"]
    size = sum(p.stat().st_size for p in damage.files(world.root / name))
    if subprocess.run([*mount, f"size={max(8192, int(rng.uniform(0.02, 1.1) * size))}", "tmpfs", folder]).returncode:
        return "not tried: mounting a tmpfs needs root"
    try:
        command = Started(world.jobs[name].arguments, folder)
        code, said = command.end(), command.said
        if "Traceback" in said or code not in (0, FULL):
            return f"WRONG: {name}: exit {code}: {said[-400:]}"
        subprocess.run([*mount, f"remount,size={4 * size}", "tmpfs", folder], check=True)
        return finish(world, name, folder) or f"{name}: " + ("one line, went on" if code else "fitted")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False)


FULL = errors.NoRoom.exit_code


CONTENTS: dict[str, Callable[[Path], object]] = {
    "a list": lambda p: p.write_text("[]"),
    "null": lambda p: p.write_text("null"),
    "numbers for texts": lambda p: p.write_text('{"model_type": 7, "format": "x", "rows": -1, "parts": 3, "step": {}}'),
    "deep": lambda p: p.write_text("[" * 100_000),
    "not UTF-8": lambda p: p.write_bytes(b'{"\xff\xfe": "\x80"}'),
    "escapes": lambda p: p.write_text('{"\\u001b[31m": "\\u001b]0;x\\u0007", "model_type": "\\u001b[2J"}'),
    "huge": lambda p: os.truncate(p, 3 << 30),
    "a pipe": lambda p: (p.unlink(), os.mkfifo(p)),
    "a link that leaves": lambda p: (p.unlink(), p.symlink_to("/etc/hostname")),
    "a directory": lambda p: (p.unlink(), p.mkdir()),
    "empty": lambda p: p.write_bytes(b""),
}


def hostile(world: World, rng: random.Random) -> str:
    """A small file of a run, a store or a model is something else altogether."""
    what = rng.choice([*(["resume", "export"] if "train" in world.jobs else []), "build", "generate"])
    if what in ("resume", "export"):
        folder, export = unfinished(world), ["export", "run", "out", "--model", "target_2"]
        arguments = world.jobs["train"].arguments if what == "resume" else export
    else:
        folder = world.fresh()
        shutil.copytree(world.model, folder / "model")
        arguments = {"build": ["build", "interleave(./model, 1:2, copies=2)", "out"], "generate": GENERATE}[what]
    small = [p for p in damage.files(folder, ("lock", ".lock")) if p.suffix in (".json", ".jsonl", ".yaml", ".jinja")]
    path, content = rng.choice(small), rng.choice(list(CONTENTS))
    CONTENTS[content](path)
    command = Started(arguments, folder)
    began = time.monotonic()
    code, said = command.end(), command.said
    took = time.monotonic() - began
    case = f"{what}: {path.relative_to(folder)} is {content}"
    if "Traceback" in said or code not in (0, 2) or "\x1b" in said or took > 120:
        return f"WRONG: {case}: exit {code} after {took:.0f} s: {said[-400:]!r}"
    return f"{what}: " + ("refused" if code else "not read, or made again")


def several(world: World, rng: random.Random) -> str:
    """One of 4 processes is killed, asked to stop or frozen at any moment: all leave, and the run goes on."""
    what, total = rng.choice(["kill", "term", "freeze"]), 4
    signum = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "freeze": signal.SIGSTOP}[what]
    rank = rng.randrange(total)
    folder, case = unfinished(world) if rng.random() < 0.5 else world.fresh(), f"{what} of {rank} of {total}"
    arguments = [*world.jobs["train"].arguments, "--config.processes.timeout=30"]
    with processes.several_started(total, "-m", "jaxup.__main__", *arguments, devices=1, cwd=folder) as them:
        with contextlib.suppress(subprocess.TimeoutExpired):
            them[rank].wait(rng.uniform(0.2, 5 + total * world.seconds["train"]))
        if any(process.poll() is not None for process in them):
            codes = [process.wait(LIMIT) for process in them]
            return f"WRONG: {case}: exit {codes} before" if any(codes) else f"{what}: had finished"
        them[rank].send_signal(signum)
        began, ends = time.monotonic(), {}
        for number, process in enumerate(them):
            if number != rank:
                try:
                    ends[number] = process.communicate(timeout=max(0, ABSENT + began - time.monotonic()))[1]
                except subprocess.TimeoutExpired:
                    return f"WRONG: {case}: process {number} has not left after {ABSENT} s"
        took, codes = time.monotonic() - began, [them[number].returncode for number in ends]
        if what == "term":
            codes.append(them[rank].wait(15))
    said = "".join(ends.values())
    # One that has come to its end knows of no other; one that was never there nobody can miss at once.
    right = {2, 5, -signum} if "did not come" in said else {0, 143 if what == "term" else 5}
    if not {*codes} <= right or "Traceback" in said:
        return f"WRONG: {case}: exit {codes}: {ends}"
    if what != "term" and any(them[number].returncode and f"process {rank} " not in ends[number] for number in ends):
        return f"WRONG: {case}: not named: {ends}"
    # Who has joined, and waits for one that is frozen, shows where.
    if what == "freeze" and not any(words in said for words in ("did not come", "made no progress for 60 s")):
        without = [number for number in ends if them[number].returncode and "call first" not in ends[number]]
        if without:
            return f"WRONG: {case}: no stacks of {without}: {ends}"
    if took > 15 and "did not come" not in said and what != "freeze":
        return f"WRONG: {case}: left after {took:.0f} s: {ends}"
    command = Started([*arguments], folder)
    if code := command.end():
        return f"WRONG: {case}: exit {code} afterwards: {command.said[-400:]}"
    within = "15 s" if took <= 15 else f"{ABSENT} s"
    return f"{what}: " + (f"all left within {within}, resumed" if any(codes) else "had finished")


FAULTS = {f.__name__: f for f in (kill, term, flip, spoiled, disk, hostile, several)}


def campaign(world: World, names: list[str], times: int, seed: int, at_once: int = 2) -> dict[str, Counter[str]]:
    """Tries each fault so many times and prints what goes wrong as it comes; the counts of what became of them."""

    def trial(name: str, number: int) -> str:
        outcome = FAULTS[name](world, random.Random(f"{name} {number}"))
        if outcome.startswith("WRONG"):
            print(f"{name} {number}: {outcome}", flush=True)
            return "WRONG"
        return outcome

    table = {}
    with ThreadPoolExecutor(at_once) as pool:
        for name in names:
            table[name] = Counter(pool.map(lambda number, name=name: trial(name, number), range(seed, seed + times)))
            right = sum(table[name].values()) - table[name]["WRONG"]
            print(f"{name}: {right} of {times} right: {dict(sorted(table[name].items()))}", flush=True)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)} (all)")
    parser.add_argument("--times", type=int, default=50, help="trials of each (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial (0)")
    parser.add_argument("--at-once", type=int, default=2, help="trials side by side (2)")
    args = parser.parse_args()
    if unknown := set(args.names) - FAULTS.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="jaxup-faults-") as root:
        world = World(Path(root))
        table = campaign(world, args.names or list(FAULTS), args.times, args.seed, args.at_once)
    print("\n| fault | tried | right | what became of them |\n|---|---:|---:|---|")
    for name, counts in table.items():
        wrong, tried = counts.pop("WRONG", 0), args.times
        became = "; ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
        print(f"| {name}: {str(FAULTS[name].__doc__).rstrip('.')} | {tried} | {tried - wrong} | {became} |")
    return any(counts["WRONG"] for counts in table.values())


if __name__ == "__main__":
    sys.exit(main())
