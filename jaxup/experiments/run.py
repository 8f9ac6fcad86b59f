"""Everything between a resolved configuration and a finished run directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxup.errors import UserError
from jaxup.experiments.config import section
from jaxup.processes import Processes, gather, told
from jaxup.progress import tell

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def run_experiment(config: ConfigDict, workdir: Path, title: str) -> None:
    """Carries the experiment out in `workdir`, or goes on with what was begun there.

    What cannot work is a UserError before anything is written. Stopped: by a signal, with the state saved.
    """
    if re.match("[a-z][a-z0-9+.-]+:/", str(workdir)):
        hint = "mount the bucket, or choose a shared disk; data.store and the models it begins from may lie there"
        raise UserError(f"--workdir={workdir}: a run directory must be a directory of this machine", hint=hint)
    if config.processes.timeout <= 0:
        raise UserError(f"processes.timeout must be positive, not {config.processes.timeout:g}")
    with Processes(config.processes.timeout) as processes:
        processes.join()
        import jax
        import yaml

        from jaxup.experiments import kind_of
        from jaxup.experiments.common import read_settings
        from jaxup.training import rundir
        from jaxup.training.loop import Run
        from jaxup.training.metrics import MetricsLog, check_trackers
        from jaxup.training.sharding import MeshConfig, check_batch, make_mesh

        kind = kind_of(config)
        settings = read_settings(config)
        told(lambda: rundir.check_directory(workdir, config.to_dict()), "look at the run directory")
        mesh = make_mesh(section(MeshConfig, config.mesh))
        check_batch("batch_size", settings.batch_size, mesh, settings.step.accumulation)
        check_batch("eval.batch_size", settings.eval_batch_size, mesh)
        check_trackers(tuple(config.log.trackers))
        experiment = kind(config, settings, mesh)
        writes = jax.process_index() == 0
        # One process makes the tokens if they are not there; the others find them made.
        told(lambda: experiment.open_data(str(workdir.parent / "data")), "make the data")
        if not writes:
            experiment.open_data(str(workdir.parent / "data"))
        _check_same({"configuration": config.to_json(sort_keys=True), **experiment.inputs})

        if writes:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--workdir={workdir}: cannot be made: {error.strerror}") from None
        with rundir.writer_lock(workdir) if writes else contextlib.nullcontext():
            if writes:
                rundir.begin(workdir, config.to_dict(), experiment.inputs)
                resolved = json.loads(json.dumps(config.to_dict()))
                print(yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None), flush=True)
                print(experiment.report(), end="", flush=True)
                devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {dict(mesh.shape)}"
                steps = f"{experiment.steps:,} steps"
                tell(f"devices: {devices}; {experiment.data}; {steps}; run directory: {workdir}")
            trackers = tuple(config.log.trackers) if writes else ()
            log = MetricsLog(workdir / "metrics.jsonl", trackers, name=title, config=config.to_dict())
            run = Run(workdir, settings, mesh, experiment.data, log, processes, experiment.sample)
            experiment.carry_out(run, title)
        if writes:
            tell(f"finished: {workdir / 'SUMMARY.md'}")


def _check_same(what: Mapping[str, str]) -> None:
    """UserError if the processes do not agree on what they are about to train, and on."""
    digests = {name: hashlib.blake2b(value.encode(), digest_size=8).hexdigest() for name, value in what.items()}
    first, *others = gather(digests, "ready to train")
    for rank, other in enumerate(others, 1):
        if differing := [name for name in first if other.get(name) != first[name]]:
            raise UserError(f"process {rank} has {' and '.join(f'another {n}' for n in differing)} than process 0")
