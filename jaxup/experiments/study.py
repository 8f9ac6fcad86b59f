"""A study: its cells, each with each seed a run in a directory of its own, one after the other in one process.

So programs of one shape are compiled once, and what several runs train alike is trained once (`training/in_common.py`).
Any number of processes may work on a study, here or on machines that share its directory: each takes the next run that
nobody has, which the lock of its directory says, and goes on with what one that died has left. Whoever finds all of
them finished writes what came of it. Where a rule stops poor runs, those of a group go in rounds (`rounds.py`).

STUDY/config.json  cells/CELL-SEED/  shared/MODEL-KEY/  STUDY.md  study.json  plots/
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.errors import NonFinite, UserError, within
from jaxup.experiments import UNITS, kind_of, resuming
from jaxup.experiments.cells import also, configured, seeds
from jaxup.experiments.outcomes import Outcome, read_outcome
from jaxup.experiments.report import made_by
from jaxup.experiments.rounds import limits, pauses
from jaxup.experiments.run import CELLS, open_data, prepared, run_one
from jaxup.experiments.shown import as_text, as_yaml
from jaxup.experiments.stopping import DIVERGED, Rule, decide
from jaxup.experiments.study_report import write_study
from jaxup.progress import Waiting, clock, say, tell
from jaxup.text import read_json, remote
from jaxup.together import told
from jaxup.training import rundir
from jaxup.training.in_common import key
from jaxup.training.processes import Processes
from jaxup.training.run import Paused, Stage

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SHARED = "shared"
_ENDED = "ended.json"  # of a run that does not come to its end: why
_PAUSED = "paused.json"  # of a run that waits for others: after which step
_AGAIN = "delete it to have the run go on"


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of the study."""

    cell: str
    seed: int
    config: ConfigDict
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    def ended(self) -> str:
        """Why it does not go to its end; "" if nothing keeps it from that."""
        found = read_json(self.directory / _ENDED, {"why": str}, _AGAIN)
        return found["why"] if found else ""

    def done(self) -> bool:
        return bool(self.ended() or resuming.finished(self.directory, self.config))

    def reached(self) -> int:
        """The step after which it paused last."""
        found = read_json(self.directory / _PAUSED, {"step": int}, "delete it")
        return found["step"] if found else 0

    def outcome(self, scored: str = "") -> Outcome:
        """What is known of it; `scored`: the model that its result is of, if it is not finished."""
        if not (self.directory / "config.json").exists():
            return Outcome.to_come(self.cell, self.seed, self.config.batch_size)
        scored = resuming.scored(self.directory) or scored
        return read_outcome(self.directory, scored, cell=self.cell, seed=self.seed, stopped=self.ended())


def carry_out(
    config: ConfigDict, workdir: Path, title: str, processes: Processes, command: str, *, dry: str | None
) -> None:
    """The study in `workdir`, or what is left of it; `dry` and `command` as of `run_experiment`."""
    runs = planned(config, workdir)
    changed = told(lambda: _look(config, workdir, runs), "look at the study")
    left = [run for run in runs if not told(run.done, "look at the runs")]
    if not left and dry is None and told(lambda: not changed and _reported(config, workdir, runs), "look at the study"):
        tell(f"all {len(runs)} runs finished before: {workdir / 'STUDY.md'}")
        return
    rule = Rule.of(config.study)
    cost = Cost(runs, left)
    _check_looks(rule, left, cost)
    if dry is not None:
        _show(config, workdir, runs, left, cost, dry, changed)
        return
    told(lambda: _begin(config, workdir, title, command, changed), "begin the study")
    _work(workdir, title, processes, command, runs, cost, rule)
    told(lambda: _report(config, workdir, title, runs, cost, rule), "write what came of the study")
    tell(f"all {len(runs)} runs are finished: {workdir / 'STUDY.md'}")


def _check_looks(rule: Rule, left: Sequence[Planned], cost: Cost) -> None:
    """UserError if nothing is logged of a run when the rule first looks: then none of its group would ever stop."""
    for run in left:
        looks, interval = pauses(rule), run.config.log.interval
        if looks and interval > (first := math.ceil(looks[0] * (steps := cost.steps(run)))):
            what = f"cell {run.cell!r} has {steps} steps, and study.stop={rule.stop} first looks after {first}"
            raise UserError(what, at=f"log.interval={interval}", hint=f"--config.log.interval={first}")


def planned(config: ConfigDict, workdir: Path) -> list[Planned]:
    """All runs in their order: each cell with the first seed, then with the next one."""
    found = []
    for seed in seeds(config):
        for cell in config.study.cells:
            directory = workdir / CELLS / f"{cell}-{seed}"
            found.append(Planned(cell, seed, configured(config, cell, seed), directory))
    return found


class Cost:
    """What runs take, by what each cell is to train: their models are looked at before the first of them begins.

    UserError for what cannot work in any of them.
    """

    def __init__(self, runs: Sequence[Planned], left: Sequence[Planned]):
        self.runs, self.left = runs, left
        self.stages: dict[str, list[Stage]] = {}
        self.scored: dict[str, str] = {}  # by cell
        for run in left:
            if run.cell in self.stages:
                continue
            from jaxup.experiments.common import read_settings

            with within(f"cell {run.cell!r}"):
                experiment, _ = prepared(run.config, read_settings(run.config), run.directory)
                open_data(experiment, run.directory.parents[2] / "data")
            self.stages[run.cell], self.scored[run.cell] = experiment.stages(), experiment.scored

    def steps(self, run: Planned) -> int:
        """Of the model that the run's result is of."""
        return next(stage.steps for stage in self.stages[run.cell] if stage.name == self.scored[run.cell])

    def of(self, runs: Sequence[Planned]) -> tuple[int, int, float, int]:
        """Steps, tokens, FLOPs, and how many trainings are spared since several runs have them in common."""
        steps, tokens, flops, spared, seen = 0, 0, 0.0, 0, set[str]()
        for run in runs:
            for stage in self.stages.get(run.cell, ()):
                if stage.fresh:
                    settings = dataclasses.replace(stage.settings, seed=run.seed)
                    known = f"{stage.name}-{key(stage.model, stage.steps, stage.data, settings)}"
                    if known in seen:
                        spared += 1
                        continue
                    seen.add(known)
                steps += stage.own_steps
                tokens += stage.data.tokens_of(stage.own_steps * stage.settings.batch_size)
                flops += stage.own_steps * stage.flops
        return steps, tokens, flops, spared


def _look(config: ConfigDict, workdir: Path, runs: Sequence[Planned]) -> list[str]:
    """What of the study has changed since it began; UserError if that, or a run that is there, is another one."""
    changed = resuming.check_config(workdir, config)
    for run in runs:
        resuming.check_config(run.directory, run.config)
    return changed


def _reported(config: ConfigDict, workdir: Path, runs: Sequence[Planned]) -> bool:
    """Whether what came of these runs has been written, compared with the same control."""
    kinds = {"runs": list[str], "control": str, "also": list[str] | None, "finding": list[str] | None}
    return read_json(workdir / "finished.json", kinds, "delete it") == _mark(config, runs)


def _mark(config: ConfigDict, runs: Sequence[Planned]) -> dict[str, Any]:
    mark = {"runs": [run.name for run in runs], "control": _control(config)}
    return mark | {key: [*config.study[key]] for key in ("also", "finding") if config.study[key]}


def _control(config: ConfigDict) -> str:
    return config.study.control or next(iter(config.study.cells))


def _begin(config: ConfigDict, workdir: Path, title: str, command: str, changed: Sequence[str]) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be made: {error.strerror}") from None
    with rundir.writer_lock(workdir, _patiently("begin the study")):
        resuming.begin(workdir, config, {}, title, command)
    for line in changed:
        print(f"changed in the study: {line}", flush=True)
    print(as_yaml(config), flush=True)


def _work(
    workdir: Path, title: str, processes: Processes, command: str, runs: Sequence[Planned], cost: Cost, rule: Rule
) -> None:  # fmt: skip
    """Takes what nobody has, until all are finished or stopped."""
    began, waiting = time.monotonic(), Waiting()
    mine: list[Planned] = []
    left = list(cost.left)
    while left:
        taken, going = "", None
        for run in list(left):
            if told(run.done, "look at the runs"):
                left.remove(run)
                continue
            going = going or told(lambda: _going(runs, cost, rule), "look how far the runs are")
            if run.name not in going:  # others of its group come first, or it was stopped
                continue
            with _taken(run.directory) as holder:
                if holder:
                    taken = f"{run.name}, by {holder}"
                    continue
                if not told(run.done, "look at the runs"):  # else it has been finished meanwhile
                    later = "" if rule.stop else _later(cost, mine, left, time.monotonic() - began)
                    later += "".join(f"; until step {step}" for step in going[run.name].values())
                    tell(f"run {len(runs) - len(left) + 1} of {len(runs)}: cell {run.cell}, seed {run.seed}{later}")
                    _carry_out(run, workdir, title, processes, command, going[run.name])
                    mine.append(run)
                    going = None
                if told(run.done, "look at the runs"):
                    left.remove(run)
                waiting = Waiting()
        if taken:
            waiting.on(taken)
            time.sleep(10.0 if remote(workdir) else 1.0)


def _carry_out(
    run: Planned, workdir: Path, title: str, processes: Processes, command: str, pauses: dict[str, int]
) -> None:
    try:
        run_one(
            run.config, run.directory, f"{title} {run.name}", processes, command=command, common=workdir / SHARED,
            pauses=pauses,
        )  # fmt: skip
    except Paused as error:
        step = error.step
        told(lambda: rundir.write_json(run.directory / _PAUSED, {"step": step}), "write where a run paused")
    except NonFinite as error:  # that it diverges is what came of it, and the others go on
        say(f"{run.name}: {error}")
        why = f"{DIVERGED}: {error}"
        told(lambda: rundir.write_json(run.directory / _ENDED, {"why": why}), "write why a run ended")


def _going(runs: Sequence[Planned], cost: Cost, rule: Rule) -> dict[str, dict[str, int]]:
    """The runs that may go on now, each with where it pauses; before that those are stopped that the rule stops."""
    if not rule.stop:
        return {run.name: {} for run in runs}
    outcomes = [one.outcome(cost.scored.get(one.cell, "")) for one in runs]
    named, done = {one.name: one for one in runs}, {one.name for one in runs if one.done()}
    for stop in decide(outcomes, rule):
        stopped = named[f"{stop.cell}-{stop.seed}"]
        if stopped.name not in done:
            done.add(stopped.name)
            why = stop.why if stop.kind == DIVERGED else f"{stop.kind}: {stop.why}"
            rundir.write_json(stopped.directory / _ENDED, {"why": why, "step": stop.step})
            say(f"{stopped.name} stops after step {stop.step}: {why}")
    going = {one.name: one for one in runs if one.name not in done}
    planned = {name: cost.steps(one) for name, one in going.items()}
    until = limits(outcomes, planned, {name: one.reached() for name, one in going.items()}, done, rule)
    return {
        name: {cost.scored[going[name].cell]: step} if step < planned[name] else {}
        for name, step in until.items() if step
    }  # fmt: skip


def _report(
    config: ConfigDict, workdir: Path, title: str, runs: Sequence[Planned], cost: Cost, rule: Rule
) -> None:  # fmt: skip
    """Writes what came of it."""
    with rundir.writer_lock(workdir, _patiently("write what came of the study")):
        if not cost.left and _reported(config, workdir, runs):
            return
        outcomes = [run.outcome(cost.scored.get(run.cell, "")) for run in runs]
        control = _control(config)
        text = write_study(
            workdir, title, outcomes, control, made_by(resuming.starts(workdir)),
            unit=UNITS[config.experiment], rule=rule, changes=config.study.cells, also=also(config),
            of=tuple(config.study.finding), more=kind_of(config).compared(workdir, _finished(runs, outcomes), control),
        )  # fmt: skip
        print(text, flush=True)
        rundir.write_json(workdir / "finished.json", _mark(config, runs))


def _finished(runs: Sequence[Planned], outcomes: Sequence[Outcome]) -> dict[str, list[Path]]:
    """By cell, where the runs are that came to their ends."""
    found: dict[str, list[Path]] = {}
    for run, outcome in zip(runs, outcomes, strict=True):
        if outcome.finished:
            found.setdefault(run.cell, []).append(run.directory)
    return found


def _patiently(what: str) -> Callable[[str], None]:
    waiting = Waiting()

    def busy(holder: str) -> None:
        waiting.on(f"{holder} to {what}")
        time.sleep(0.2)

    return busy


@contextlib.contextmanager
def _taken(directory: Path) -> Iterator[str]:
    """Holds the run's lock in the block; says who has it, if another process does."""
    with contextlib.ExitStack() as stack:

        def take() -> str:
            directory.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(rundir.writer_lock(directory))
            except rundir.InUse as error:
                return error.holder
            return ""

        yield told(take, "take the next run")


def _later(cost: Cost, mine: Sequence[Planned], left: Sequence[Planned], seconds: float) -> str:
    """How long what is left takes by what this process has done."""
    done, whole = cost.of(mine)[2], cost.of([*mine, *left])[2]
    return f"; about {clock(seconds * (whole - done) / done)} left by this process alone" if done else ""


def _show(
    config: ConfigDict, workdir: Path, runs: Sequence[Planned], left: Sequence[Planned], cost: Cost, spec: str,
    changed: Sequence[str],
) -> None:  # fmt: skip
    """What the study would do."""
    from jaxup.experiments.dry_run import configuration

    there = told((workdir / "config.json").exists, "look at the study")
    place = "holds this study, and the same command goes on with it" if there else "would be made"
    lines = [f"study {workdir}: {place}", *(f"  changed in the study: {line}" for line in changed)]
    names = ", ".join(map(str, seeds(config)))
    lines += [f"{len(runs)} runs, {len(config.study.cells)} cells with seeds {names}; {len(left)} are left"]
    rows: list[tuple[str, ...]] = [("", "steps", "tokens", "FLOPs", "what differs")]
    for cell, changes in config.study.cells.items():
        said = " ".join(f"{key}={as_text(value)}" for key, value in changes.items()) or "nothing"
        mine = [run for run in left if run.cell == cell]
        steps, tokens, flops, _ = cost.of(mine[:1])
        sizes = (f"{steps:,}", f"{tokens:,}", f"{flops:.3g}") if mine else ("", "", "")
        rows.append((cell, *sizes, said if mine else f"{said} (finished)"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, *figures, said in rows:
        aligned = "  ".join(f"{figure:>{width}}" for figure, width in zip(figures, widths[1:], strict=True))
        lines.append(f"  {name:<{widths[0]}}  {aligned}  {said}".rstrip())
    steps, tokens, flops, spared = cost.of(left)
    alike = f"; {spared} trainings are spared, for several runs have them in common" if spared else ""
    lines.append(f"left to do: {steps:,} steps, {tokens:,} tokens, {flops:.3g} FLOPs{alike}")
    tell("\n".join([*lines, *configuration(config, spec)]))
