"""Train models as an experiment file describes: `python -m jaxup.train --config=inherit_gpt2.py`.

The same command again resumes the run in its directory, or does nothing if it is finished. Exit
codes: 0 done, 2 a mistake in the command, configuration or data, 3 a non-finite gradient,
130 or 143 stopped by Ctrl-C or SIGTERM, with the state saved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxup import experiment
from jaxup.errors import Parser, UserError, entry_point, suggest

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = Parser(
        prog="python -m jaxup.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]",
                        help="experiment file, looked for here and in configs/; variants after a colon")  # fmt: skip
    parser.add_argument("--config.KEY", dest="_", metavar="VALUE",
                        help="override one value, for example --config.optimizer.learning_rate=3e-4")  # fmt: skip
    parser.add_argument("--workdir", metavar="DIR", help="run directory (default: runs/FILE-VARIANT)")
    args, rest = parser.parse_known_args(argv[1:])
    overrides, rest = [], list(rest)
    while rest:
        flag, given, text = rest.pop(0).partition("=")
        if not flag.startswith("--config."):
            raise UserError(f"unknown argument {flag!r}{suggest(flag, ['--config', '--workdir', '--help'])}")
        if not given:
            if not rest:
                raise UserError(f"{flag}: needs a value")
            text = rest.pop(0)
        overrides.append((flag.removeprefix("--config."), text))
    return args, overrides


def main(argv: list[str]) -> None:
    args, overrides = parse_args(argv)
    config = experiment.load(args.config, overrides)
    name, _, variant = args.config.partition(":")
    title = "-".join(filter(None, [Path(name).stem, variant.replace(",", "-").replace("/", "-")]))
    train(config, Path(args.workdir or Path("runs") / title).expanduser(), title)


def train(config: ConfigDict, workdir: Path, title: str) -> None:
    """Everything between a resolved configuration and a finished run directory."""
    start_processes()
    import jax
    import yaml
    from jax.experimental import multihost_utils

    from jaxup.jobs.common import read_settings
    from jaxup.training import rundir
    from jaxup.training.loop import Run
    from jaxup.training.metrics import MetricsLog, check_trackers
    from jaxup.training.sharding import MeshConfig, check_batch, make_mesh
    from jaxup.training.signals import StopRequest

    with StopRequest() as stop:
        # Everything that can be wrong is looked at before anything is written.
        settings = read_settings(config)
        rundir.check_directory(workdir, config.to_dict())
        mesh = make_mesh(experiment.section(MeshConfig, config.mesh))
        check_batch("batch_size", settings.batch_size, mesh, settings.step.accumulation)
        check_batch("eval.batch_size", settings.eval_batch_size, mesh)
        check_trackers(tuple(config.log.trackers))
        job = job_of(config)(config, settings, mesh)
        # One process makes the tokens if they are not there; the others find them made.
        for turn in range(2):
            if (jax.process_index() > 0) == turn:
                job.open_data(str(workdir.parent / "data"))
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"data {turn}")

        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be made: {error.strerror}") from None
        writes = jax.process_index() == 0
        with rundir.writer_lock(workdir) if writes else contextlib.nullcontext():
            if writes:
                rundir.check_directory(workdir, config.to_dict())
                rundir.check_inputs(workdir, job.inputs, write=False)
                resolved = json.dumps(config.to_dict(), indent=1)
                rundir.write_atomically(workdir / "config.json", resolved + "\n")
                rundir.check_inputs(workdir, job.inputs, write=True)
                print(yaml.safe_dump(json.loads(resolved), sort_keys=False, default_flow_style=None), flush=True)
                print(job.report(), end="", flush=True)
                devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {dict(mesh.shape)}"
                print(f"devices: {devices}; {job.data}; {job.steps:,} steps; run directory: {workdir}", flush=True)
            trackers = tuple(config.log.trackers) if writes else ()
            log = MetricsLog(workdir / "metrics.jsonl", trackers, name=title, config=config.to_dict())
            job.carry_out(Run(workdir, settings, mesh, job.data, log, stop, job.sample), title)
        if writes:
            print(f"finished: {workdir / 'SUMMARY.md'}", flush=True)


def job_of(config: ConfigDict) -> type:
    """The kind of experiment that the configuration has a section of."""
    if "heal" in config:
        from jaxup.jobs.heal import HealJob

        return HealJob
    from jaxup.jobs.inherit import InheritJob

    return InheritJob


def start_processes() -> None:
    """Joins the other processes of a pod or cluster, if the environment speaks of any."""
    import jax

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not jax.distributed.is_initialized():
        jax.distributed.initialize(
            address,
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
            heartbeat_timeout_seconds=10,
        )
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") and not jax.distributed.is_initialized():
        jax.distributed.initialize(heartbeat_timeout_seconds=10)


def cli() -> None:
    entry_point(main)


if __name__ == "__main__":
    cli()
