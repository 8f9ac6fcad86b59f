"""What a run would do, said and not done: its configuration, models and data, and the memory and time it takes."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxup.data.open import Data
from jaxup.errors import UserError
from jaxup.experiments.common import Experiment
from jaxup.experiments.config import get, leaves, load
from jaxup.experiments.shown import as_text, as_yaml
from jaxup.model.decoder import abstract
from jaxup.model.spec import count_params
from jaxup.progress import clock, tell
from jaxup.together import told
from jaxup.training.run import Stage, read_result
from jaxup.training.sound import steps_in
from jaxup.training.trial import STEPS, Trial, measure_device, needed

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict


def show(
    experiment: Experiment, workdir: Path, mesh: Mesh, config: ConfigDict, spec: str, changed: Sequence[str]
) -> None:
    """Prints it; all processes of the run call this, and process 0 prints.

    Args:
      spec: the experiment file and its variants; "" if the run in `workdir` has the configuration.
      changed: of a run that is there, what would be changed under it.
    """
    stages, most = experiment.stages(), experiment.stages(most=True)
    left = {stage.name: _left(workdir, stage) for stage in most}
    there = told((workdir / "config.json").exists, "look at the run directory")
    place = "holds this run, and the same command goes on with it" if there else "would be made"
    _print([f"run directory {workdir}: {place}", *(f"  changed under the run: {line}" for line in changed)])
    _print(configuration(config, spec))
    _print(_models(stages, most, left))
    _print(_data(experiment, stages))
    if train := [stage for stage in most if stage.steps and left[stage.name]]:
        speed, room = told(lambda: measure_device(train[0].settings.compute.dtype), "measure the device")
        largest = max(train, key=lambda stage: (needed(stage, mesh), stage.flops))
        busiest = max([largest, *train], key=lambda stage: stage.flops)  # mostly the same
        trial = Trial(largest, mesh, speed, room)
        _print(_memory(trial, room))
        trials = [trial] if busiest is largest else [trial, Trial(busiest, mesh, speed, room)]
        _print(_time(trials, speed, stages, most, left))


def _print(lines: Sequence[str]) -> None:
    if jax.process_index() == 0:
        tell("\n".join(lines) + "\n")


def _left(workdir: Path, stage: Stage) -> int:
    """Steps, or 1 if it is measured only; 0: it is finished."""
    directory = workdir / "checkpoints" / stage.name
    if (result := read_result(directory)) is not None and result.steps >= stage.steps:
        return 0
    done = told(lambda: max(steps_in(directory), default=stage.first), "look for checkpoints")
    return max(0, stage.steps - done) if stage.steps else 1


def configuration(config: ConfigDict, spec: str) -> list[str]:
    """All of it, as the run prints it; what the command line changes comes first."""
    was = config
    with contextlib.suppress(UserError):  # what a file says may need what the command line does
        was = load(spec) if spec else config
    lines = [f"configuration of {spec or 'the run'}; --help says what its keys mean"]
    for key, value in leaves(config.to_dict()):
        if (old := get(was, key)) != value:
            lines.append(f"  {key}={as_text(value)}, in the file {as_text(old) or 'nothing'}")
    return lines + [f"  {line}" for line in as_yaml(config).splitlines()]


def _models(stages: Sequence[Stage], most: Sequence[Stage], left: Mapping[str, int]) -> list[str]:
    """A table; in the end those that are made only if others are not good enough."""
    known = {stage.name: stage.model for stage in stages}
    more = [stage for stage in most if known.get(stage.name) != stage.model]
    columns = ("", "layers", "parameters", "trained", "steps", "tokens a step", "tokens", "epochs", "PFLOP", "")
    rows = [columns, *(_row(stage, left[stage.name]) for stage in stages)]
    rows += [_row(stage, stage.own_steps if stage.name in known else left[stage.name]) for stage in more]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = []
    for name, *cells in rows:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        table.append(f"  {name:<{widths[0]}}  {'  '.join(aligned)}".rstrip())
    if more:
        table.insert(1 + len(stages), "  and up to these, as long as what was trained is not good enough:")
    return ["models of the run, in their order", *table]


def _row(stage: Stage, left: int) -> tuple[str, ...]:
    params = count_params(stage.model)
    sizes = (stage.name, str(stage.model.num_layers), f"{params:,}")
    if not stage.steps:
        return *sizes, "", "", "", "", "", "", "is measured" if left else "is measured already"
    trained = sum(leaf.size for leaf in jax.tree.leaves(stage.selection.trained(abstract(stage.model)[1])))
    data, batch = stage.data, stage.settings.batch_size
    steps = stage.own_steps
    seen, done = steps * batch, f"{steps - left:,} steps are done" if left < steps else ""
    return (
        *sizes, f"{trained:,}" if trained != params else "all", f"{steps:,}", f"{data.tokens_of(batch):,}",
        f"{data.tokens_of(min(seen, data.train_rows)):,}", f"{seen / data.epoch_rows:.3g}",
        f"{steps * stage.flops / 1e15:.3g}",
        done if left else "is finished",
    )  # fmt: skip


def _data(experiment: Experiment, stages: Sequence[Stage]) -> list[str]:
    """Where they are and how many, with an example; of chats, and what is no text, as the run says it."""
    color = sys.stdout.isatty()
    opened = {stage.data.store: stage.data for stage in stages}.values()
    texts = [data for data in opened if isinstance(data, Data) and data.format is None]
    lines = [f"  {text}\n{text.example(color)}" for text in texts]
    report = experiment.report().rstrip()  # begins with the plan
    return ["plan and data" if report else "data", *lines, *filter(None, [report])]


def _memory(trial: Trial, room: int) -> list[str]:
    lines = [f"memory of a device while {trial.stage.name} trains, which takes most"]
    parts = {**trial.memory, f"in all, of {room / 2**30:.1f} GiB here": sum(trial.memory.values())}
    lines += [f"  {bytes / 2**30:9.3f} GiB  {name}" for name, bytes in parts.items()]
    if trial.failed:
        lines.append(f"  it fails here: {trial.failed}")
    elif not trial.stage.settings.step.accumulation:
        lines.append(f"  with as few micro-batches a step as fit: {trial.micro_batches}")
    elif sum(trial.memory.values()) > room:
        lines.append(
            "  it does not fit; step.accumulation, compute.remat=full, and mesh.fsdp on more devices take less"
        )
    return lines


def _time(
    trials: Sequence[Trial], speed: float, stages: Sequence[Stage], most: Sequence[Stage], left: Mapping[str, int]
) -> list[str]:
    """Of what is left: of the models that were tried by their steps, and of others by the FLOPs of theirs."""
    tried, count = trials[-1], jax.device_count()
    where, tera = f"time on {count} x {jax.devices()[0].device_kind}", tried.stage.flops / 1e12
    if tried.seconds is None:
        pace, least = 1 / (speed * count), "at least"  # seconds that a FLOP takes
        lines = [
            f"{where}: a step of {tried.stage.name} has {tera:.3g} TFLOP; a product of matrices reaches "
            f"{speed / 1e12:.3g} TFLOP/s on each, and no step does"
        ]
    else:
        pace, least = tried.seconds / tried.stage.flops, "about"
        each = f"{tried.seconds:.3g} s each, {tera / tried.seconds / count:.3g} TFLOP/s a device"
        lines = [f"{where}, by {STEPS} steps of {tried.stage.name}: {each}; compiled in {tried.compiling:.0f} s"]
    measured = {(trial.stage.name, trial.stage.model): trial.seconds for trial in trials if trial.seconds is not None}

    def training(stage: Stage) -> float:
        """Seconds, with its evaluations, which are forward alone."""
        s, steps = stage.settings, left[stage.name] if stage.steps else 0
        step = measured.get((stage.name, stage.model), pace * stage.flops)
        batches = -(-min(s.eval_rows or math.inf, len(stage.data.validation)) // s.eval_batch_size)
        evaluation = step / 3 * batches * s.eval_batch_size / s.batch_size
        return step * steps + evaluation * (1 + steps // s.eval_interval) if left[stage.name] else 0.0

    def whole(stages: Sequence[Stage]) -> str:
        """A step, and the programs that evaluate, sample and initialise, which take about as long to compile."""
        train = [s for s in stages if s.steps and left[s.name]]
        programs = {(s.model, s.settings, s.steps, s.selection, s.objective) for s in train}
        compiling = 2 * tried.compiling * len(programs)
        return f"{clock(sum(map(training, stages)) + compiling)}, of which {clock(compiling)} to compile"

    lines += [f"  {clock(training(stage)):>9}  {stage.name}" for stage in stages if left[stage.name]]
    lines.append(f"  {least} {whole(stages)}; and what is saved, drawn and written")
    if len(most) > len(stages):
        lines.append(f"  up to {whole(most)}, if results ask for all there can be")
    return lines
