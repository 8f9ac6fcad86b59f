"""Everything between a resolved configuration and a finished run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxup
from jaxup.devices import ready
from jaxup.errors import UserError
from jaxup.experiments import resuming
from jaxup.experiments.config import get, section
from jaxup.experiments.shown import as_yaml
from jaxup.files.bucket import place
from jaxup.progress import say, tell
from jaxup.text import remote
from jaxup.together import gather, service, told
from jaxup.training import places
from jaxup.training.processes import Processes

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from jaxup.experiments.common import Experiment
    from jaxup.training.corrections import Corrections
    from jaxup.training.run import Settings

CELLS, STUDY = "cells", "config.json"  # of a study: where its runs are, and what says that it is one
_GATHERING = 1800.0  # seconds in which all processes come to a preflight; after a preemption 300 were too few


def run_experiment(
    config: ConfigDict, workdir: Path, title: str, corrections: Corrections | None = None, command: str = "", *,
    dry: str | None = None, preflight: bool = False,
) -> None:  # fmt: skip
    """Carries the experiment out in `workdir`, or goes on with what was begun there.

    `corrections` are for the model whose training goes on; `command` is what was typed, for the summary. With `dry`,
    the experiment file with its variants if one was given, it only says what it would do, and writes nothing there;
    with `preflight` only whether it can begin, on all machines.

    What cannot work is a UserError before anything is written. Stopped: by a signal, with the state saved.
    """
    if re.match("[a-z][a-z0-9+.-]+:/", str(workdir)) and not (remote(workdir) and len(workdir.parts) > 2):
        what = "a run directory is one of this machine, or gs://BUCKET/RUN"
        raise UserError(what, at=f"--workdir={workdir}", hint="mount other buckets; data.store may lie there")
    if not config.processes.timeout > 0:  # nor NaN
        raise UserError(f"processes.timeout must be positive, not {config.processes.timeout:g}")
    timeout, cells = config.processes.timeout, bool("study" in config and config.study.cells)
    if cells and (corrections or preflight):
        at, hint = str(corrections or "--preflight"), f"give it with --resume={workdir}/cells/RUN"
        raise UserError("goes with one run, and this is a study of several", at=at, hint=hint)
    with Processes(max(timeout, _GATHERING) if preflight else timeout) as processes:
        if cells and places.apart():
            _take_share()
        else:
            processes.join()
        if service() is not None:
            given = {"--workdir": str(workdir), "corrections": str(corrections or ""), "--dry-run": dry is not None}
            given["--preflight"] = preflight
            _check_same({**_code(), **given, **config.to_dict()})
        ready()
        if cells:
            from jaxup.experiments.study import carry_out

            carry_out(config, workdir, title, processes, command, dry=dry)
        else:
            run_one(config, workdir, title, processes, corrections, command, dry=dry, preflight=preflight)


def run_one(
    config: ConfigDict, workdir: Path, title: str, processes: Processes, corrections: Corrections | None = None,
    command: str = "", *, dry: str | None = None, preflight: bool = False, common: Path | None = None,
    pauses: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """One configuration in one directory, by processes that have joined; see `run_experiment`.

    Of a run of a study, which holds the directory's lock, `common` is where what its runs have in common is, and
    `pauses` the step of a model after which it raises `Paused`.
    """
    import jax

    from jaxup.experiments.common import read_settings
    from jaxup.training import rundir
    from jaxup.training.metrics import MetricsLog
    from jaxup.training.run import Run

    settings = read_settings(config)
    changed = told(lambda: resuming.check_config(workdir, config), "look at the run directory")
    if done := told(lambda: resuming.finished(workdir, config), "look at the run directory"):
        if corrections:
            raise UserError(f"{corrections}: the run is finished", at=str(workdir))
        if jax.process_index() == 0:
            print("\n".join([*done, f"finished before: {workdir / 'SUMMARY.md'}"]), flush=True)
        return
    experiment, mesh = prepared(config, settings, workdir)
    if preflight:
        from jaxup.experiments.preflight import show as show_machines

        show_machines(mesh, {"--workdir": workdir, **_stores(config, workdir)})
        return
    experiment.exported = told(lambda: resuming.exported(workdir, config), "look at the run directory")
    writes = jax.process_index() == 0
    open_data(experiment, _data(workdir))

    if dry is not None:
        from jaxup.experiments.dry_run import show

        told(lambda: resuming.check_inputs(workdir, config, experiment.inputs), "look at the run directory")
        show(experiment, workdir, mesh, config, dry, [*changed, *([str(corrections)] if corrections else [])])
        return
    if writes:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be made: {error.strerror}") from None
    with rundir.writer_lock(workdir) if writes and common is None else contextlib.nullcontext():
        if writes:
            resuming.begin(workdir, config, experiment.inputs, title, command)
            for line in changed:
                print(f"changed under the run: {line}", flush=True)
            if common is None:  # else the study has said it
                print(as_yaml(config), flush=True)
                print(experiment.report(), end="", flush=True)
            devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {dict(mesh.shape)}"
            steps = f"{experiment.steps:,} steps"
            tell(f"devices: {devices}; {experiment.data}; {steps}; run directory: {workdir}")
        trackers = tuple(config.log.trackers) if writes else ()
        asked = [corrections] if corrections else []
        with contextlib.closing(MetricsLog(workdir / "metrics.jsonl", trackers, config.to_dict())) as log:
            run = Run(
                workdir, settings, mesh, experiment.data, log, processes, experiment.sample, asked, pauses=pauses or {}
            )  # fmt: skip
            if any(stage.fresh for stage in experiment.stages()):
                run = dataclasses.replace(run, common=common)
            experiment.carry_out(run, title)
        if asked:
            say(f"{corrections}: no model was left to train")
    if writes:
        tell(f"finished: {workdir / 'SUMMARY.md'}")


def prepared(config: ConfigDict, settings: Settings, workdir: Path) -> tuple[Experiment, Mesh]:
    """What a run is to do, its data not opened yet, and on what; UserError for what cannot work."""
    from jaxup.experiments import kind_of
    from jaxup.training.sharding import MeshConfig, check_batch, make_mesh
    from jaxup.training.trackers import check_trackers

    kind = kind_of(config)
    _stores(config, workdir)
    mesh = make_mesh(section(MeshConfig, config.mesh))
    check_batch("batch_size", settings.batch_size, mesh, settings.step.accumulation)
    check_batch("eval.batch_size", settings.eval_batch_size, mesh)
    check_trackers(tuple(config.log.trackers), workdir)
    return kind(config, settings, mesh), mesh


def open_data(experiment: Experiment, root: Path) -> None:
    """Of all processes one makes the tokens if they are not there; the others find them made."""
    import jax

    told(lambda: experiment.open_data(str(root)), "make the data")
    if jax.process_index() != 0:
        experiment.open_data(str(root))
    _check_same(experiment.inputs)


def _data(workdir: Path) -> Path:
    """Beside the run; of a run of a study beside that."""
    above = workdir.parent
    return (above.parent if above.name == CELLS and (above.parent / STUDY).is_file() else workdir).parent / "data"


def _take_share() -> None:
    """Of the devices of this machine, where several processes are each to have runs of their own."""
    if (gpus := places.share()) is not None:
        import jax

        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", ",".join(map(str, gpus)))


def _stores(config: ConfigDict, workdir: Path) -> dict[str, Path]:
    """Where tokens lie; UserError if that is in the run's directory, in which no run could begin then."""
    directory, stores = Path(str(workdir)).absolute(), dict[str, Path]()
    for key in ("data.store", "pretrain.data.store", "text.store"):
        store = str(get(config, key) or _data(workdir))
        if directory in ((path := Path(store).expanduser().absolute()), *path.parents):
            raise UserError("lies in the run's directory", at=f"{key}={path}", hint="choose another --workdir")
        if get(config, key) is not None and place(store) not in stores.values():
            stores[f"--config.{key}"] = place(store)
    return stores


def _check_same(what: Mapping[str, Any]) -> None:
    """UserError, in all processes, if they do not agree on what they are about to train, on what, and by which code."""
    mine = json.loads(json.dumps(what))
    first = told(lambda: mine, "say what it trains")

    def line(key: str, then: Any, now: Any) -> str:
        then, now = map(repr, (then, now))
        return f"{key} is {now}, not {then}" if len(then + now) < 100 else f"{key} is another"

    lines = [line(*differing) for differing in resuming.differences(first, mine)]
    for rank, differing in enumerate(gather(lines, "ready to train")):
        if differing:
            more = f" (and {len(differing) - 3} more)" * (len(differing) > 3)
            hint = "start all with the same command, files and code"
            raise UserError(f"process {rank} differs from process 0: {'; '.join(differing[:3])}{more}", hint=hint)


def _code() -> dict[str, str]:
    """What computes: versions, and of this package, which may be a working copy, its source."""
    import jax
    import jaxlib

    source = hashlib.blake2b(digest_size=4)
    for path in sorted(Path(jaxup.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    versions = {"jaxup": f"{jaxup.__version__} of {source.hexdigest()}", "jax": jax.__version__}
    return versions | {"jaxlib": jaxlib.__version__}
