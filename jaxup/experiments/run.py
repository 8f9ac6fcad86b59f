"""Everything between a resolved configuration and a finished run directory."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxup.errors import UserError
from jaxup.experiments.config import section

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def run_experiment(config: ConfigDict, workdir: Path, title: str) -> None:
    """Carries the experiment out in `workdir`, or goes on with what was begun there.

    What cannot work is a UserError before anything is written. Stopped: by a signal, with the state saved.
    """
    start_processes()
    import jax
    import yaml
    from jax.experimental import multihost_utils

    from jaxup.experiments import kind_of
    from jaxup.experiments.common import read_settings
    from jaxup.training import rundir
    from jaxup.training.loop import Run
    from jaxup.training.metrics import MetricsLog, check_trackers
    from jaxup.training.sharding import MeshConfig, check_batch, make_mesh
    from jaxup.training.signals import StopRequest

    with StopRequest() as stop:
        kind = kind_of(config)
        settings = read_settings(config)
        rundir.check_directory(workdir, config.to_dict())
        mesh = make_mesh(section(MeshConfig, config.mesh))
        check_batch("batch_size", settings.batch_size, mesh, settings.step.accumulation)
        check_batch("eval.batch_size", settings.eval_batch_size, mesh)
        check_trackers(tuple(config.log.trackers))
        experiment = kind(config, settings, mesh)
        # One process makes the tokens if they are not there; the others find them made.
        for turn in range(2):
            if (jax.process_index() > 0) == turn:
                experiment.open_data(str(workdir.parent / "data"))
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"data {turn}")

        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be made: {error.strerror}") from None
        writes = jax.process_index() == 0
        with rundir.writer_lock(workdir) if writes else contextlib.nullcontext():
            if writes:
                rundir.begin(workdir, config.to_dict(), experiment.inputs)
                resolved = json.loads(json.dumps(config.to_dict()))
                print(yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None), flush=True)
                print(experiment.report(), end="", flush=True)
                devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {dict(mesh.shape)}"
                steps = f"{experiment.steps:,} steps"
                print(f"devices: {devices}; {experiment.data}; {steps}; run directory: {workdir}", flush=True)
            trackers = tuple(config.log.trackers) if writes else ()
            log = MetricsLog(workdir / "metrics.jsonl", trackers, name=title, config=config.to_dict())
            run = Run(workdir, settings, mesh, experiment.data, log, stop, experiment.sample)
            experiment.carry_out(run, title)
        if writes:
            print(f"finished: {workdir / 'SUMMARY.md'}", flush=True)


def start_processes() -> None:
    """Joins the other processes of a pod or cluster, if the environment speaks of any."""
    import jax

    if jax.distributed.is_initialized():
        return
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        count, index = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=10)
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize(heartbeat_timeout_seconds=10)
