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
from typing import TYPE_CHECKING, Any

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
    from jaxup.data.batches import DataConfig, open_data
    from jaxup.training import rundir
    from jaxup.training.inherit import InheritConfig, check, run_inherit
    from jaxup.training.loop import Run
    from jaxup.training.metrics import MetricsLog, check_trackers
    from jaxup.training.sharding import MeshConfig, check_batch, make_mesh
    from jaxup.training.signals import StopRequest

    start_processes()
    import jax
    import yaml
    from jax.experimental import multihost_utils

    with StopRequest() as stop:
        # Everything that can be wrong is looked at before anything is written.
        settings, steps = read_settings(config)
        inherit = experiment.section(InheritConfig, config.inherit)
        rundir.check_directory(workdir, config.to_dict())
        mesh = make_mesh(experiment.section(MeshConfig, config.mesh))
        check_batch("batch_size", settings.batch_size, mesh, settings.step.accumulation)
        check_batch("eval.batch_size", settings.eval_batch_size, mesh)
        pretrained = config.reference.path
        # A reference that is given brings its tokenizer.
        data_config = experiment.section(DataConfig, config.data, tokenizer=config.data.tokenizer or pretrained)
        check_trackers(tuple(config.log.trackers))
        model = read_model(config)
        check(inherit, model)
        if model.positions == "learned" and model.max_positions < data_config.seq_len:
            raise UserError(f"data.seq_len={data_config.seq_len} exceeds the model's {model.max_positions} positions")
        # One process makes the tokens if they are not there; the others find them made.
        for turn in range(2):
            if (jax.process_index() > 0) == turn:
                data = open_data(data_config, root=str(workdir.parent / "data"))
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"data {turn}")
        model = read_model(config, data.vocab_size)
        if model.vocab_size < data.vocab_size:
            raise UserError(f"data: the tokenizer has {data.vocab_size} tokens, the model only {model.vocab_size}")

        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be made: {error.strerror}") from None
        writes = jax.process_index() == 0
        with rundir.writer_lock(workdir) if writes else contextlib.nullcontext():
            if writes:
                rundir.check_directory(workdir, config.to_dict())
                resolved = json.dumps(config.to_dict(), indent=1)
                rundir.write_atomically(workdir / "config.json", resolved + "\n")
                print(yaml.safe_dump(json.loads(resolved), sort_keys=False, default_flow_style=None), flush=True)
                print(f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}, {dict(mesh.shape)}; {data}; "
                      f"run directory: {workdir}", flush=True)  # fmt: skip
            trackers = tuple(config.log.trackers) if writes else ()
            log = MetricsLog(workdir / "metrics.jsonl", trackers, name=title, config=config.to_dict())
            run = Run(workdir, settings, mesh, data, log, stop, make_sampler(config, data))
            outcome = run_inherit(
                run, inherit, model, steps,
                pretrained=(lambda: load_pretrained(pretrained, model)) if pretrained else None,
                pretrained_name=pretrained,
            )  # fmt: skip
            finish(run, title, outcome)


def finish(run: Any, title: str, outcome: Any) -> None:
    """SUMMARY.md, the plot, the plan and the export of the final target."""
    import jax
    from jax.experimental import multihost_utils

    from jaxup.hub import writer
    from jaxup.training import report
    from jaxup.training.loop import load_trained
    from jaxup.training.rundir import write_atomically

    params = load_trained(run, outcome.target.name, outcome.target_model)
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() != 0:
        return
    plan = outcome.plan.to_yaml()
    write_atomically(run.directory / "plan.yaml", plan)
    writer.save(
        run.directory / "export", outcome.target_model, jax.device_get(params), tokenizer=run.data.tokenizer,
        extra_files={"jaxup_plan.yaml": plan}, force=True,
    )  # fmt: skip
    report.plot_validation(run.directory, title, outcome.results, run.log.read())
    notes = [
        f"{run.data}; seed {run.settings.seed}; {jax.device_count()} x {jax.devices()[0].device_kind}. "
        "Losses are nats per token over the same validation rows."
    ]
    print(report.write_summary(run.directory, title, outcome.results, str(outcome.plan), notes))
    print(f"finished: {run.directory / 'SUMMARY.md'}", flush=True)


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


def read_settings(config: ConfigDict) -> tuple[Any, int]:
    from jaxup.model.config import Compute
    from jaxup.training.loop import Settings
    from jaxup.training.optimizer import OptimizerConfig, learning_rate
    from jaxup.training.step import StepConfig

    section = experiment.section
    optimizer = section(OptimizerConfig, config.optimizer)
    learning_rate(optimizer, config.steps)  # refuses an unknown schedule or a warmup that does not fit
    for key in ("steps", "eval.interval", "log.interval", "checkpoint.interval", "checkpoint.keep"):
        node = config
        for part in key.split("."):
            node = node[part]
        if node < 1:
            raise UserError(f"{key} must be at least 1, not {node}")
    settings = Settings(
        seed=config.seed, batch_size=config.batch_size, optimizer=optimizer, step=section(StepConfig, config.step),
        compute=section(Compute, config.compute), eval_interval=config.eval.interval, eval_rows=config.eval.rows,
        eval_batch_size=config.eval.batch_size, log_interval=config.log.interval,
        checkpoint_interval=config.checkpoint.interval, keep_checkpoints=config.checkpoint.keep,
    )  # fmt: skip
    return settings, config.steps


def read_model(config: ConfigDict, tokens: int = 1) -> Any:
    """The reference's ModelConfig: of its directory, else of the `model` section.

    vocab_size 0 there means that of the tokenizer, `tokens`, rounded up to a multiple of 64.
    """
    from jaxup.hub import reader
    from jaxup.model.config import ModelConfig

    if config.reference.path:
        return reader.load_config(config.reference.path)
    values = config.model.to_dict()
    values["vocab_size"] = values["vocab_size"] or -(-tokens // 64) * 64
    return ModelConfig.gpt2(**values)


def load_pretrained(path: str, model: Any) -> Any:
    import numpy as np

    from jaxup.hub import reader

    return reader.load_params(path, model, dtype=np.float32)  # master weights


def make_sampler(config: ConfigDict, data: Any):
    """A function from a model to a short text by it, a pure function of the run's seed."""
    import numpy as np

    def sample(model, params) -> str:
        from jaxup.model.sampling import generate

        prompt = data.tokenizer(config.sample.prompt, add_special_tokens=False)["input_ids"]
        count = min(config.sample.tokens, model.max_positions - len(prompt))
        steps = generate(
            model, params, np.asarray([prompt], np.int32), max_tokens=count, temperature=config.sample.temperature,
            top_k=config.sample.top_k, seed=config.seed, vocab_size=data.vocab_size,
        )  # fmt: skip
        return data.tokenizer.decode([*prompt, *(int(t[0]) for t in steps)])

    return sample


def cli() -> None:
    entry_point(main)


if __name__ == "__main__":
    cli()
