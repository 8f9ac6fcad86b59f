"""Train models as an experiment file describes: `python -m jaxup.train --config=inherit_gpt2.py`.

The same command again resumes the run in its directory, or does nothing if it is finished. Exit
codes: 0 done, 2 a mistake in the command, configuration or data, 3 a non-finite gradient,
130 or 143 stopped by Ctrl-C or SIGTERM, with the state saved.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
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
    from jaxup.training.inherit import InheritConfig, Reference, check, run_inherit
    from jaxup.training.loop import Run
    from jaxup.training.metrics import MetricsLog, check_trackers
    from jaxup.training.optimizer import learning_rate
    from jaxup.training.sharding import MeshConfig, check_batch, make_mesh
    from jaxup.training.signals import StopRequest

    start_processes()
    import jax
    import yaml
    from jax.experimental import multihost_utils

    with StopRequest() as stop:
        # Everything that can be wrong is looked at before anything is written.
        settings = read_settings(config)
        inherit = experiment.section(InheritConfig, config.inherit)
        rundir.check_directory(workdir, config.to_dict())
        mesh = make_mesh(experiment.section(MeshConfig, config.mesh))
        check_batch("batch_size", settings.batch_size, mesh, settings.step.accumulation)
        check_batch("eval.batch_size", settings.eval_batch_size, mesh)
        check_trackers(tuple(config.log.trackers))
        model = read_model(config)
        check(inherit, model)
        data_config = experiment.section(DataConfig, config.data, **find_tokenizer(config))
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
        steps = config.steps or math.ceil(config.epochs * data.train_rows / settings.batch_size)
        learning_rate(settings.optimizer, steps)  # refuses a warmup that does not fit

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
                      f"{steps:,} steps; run directory: {workdir}", flush=True)  # fmt: skip
            trackers = tuple(config.log.trackers) if writes else ()
            log = MetricsLog(workdir / "metrics.jsonl", trackers, name=title, config=config.to_dict())
            run = Run(workdir, settings, mesh, data, log, stop, make_sampler(config, data))
            reference = Reference(
                pretrained=(lambda: load_pretrained(config, mesh)) if config.reference.path else None,
                name=config.reference.path + (f" at {config.reference.revision}" if config.reference.revision else ""),
                steps=config.reference.steps, all_data=config.reference.all_data,
            )  # fmt: skip
            finish(run, title, run_inherit(run, inherit, model, steps, reference=reference))


def finish(run: Any, title: str, outcome: Any) -> None:
    """SUMMARY.md, the plot, the plan and the export of the final target."""
    import jax

    from jaxup.hub import writer
    from jaxup.hub.card import model_card
    from jaxup.hub.directory import PLAN
    from jaxup.training import report
    from jaxup.training.loop import load_trained
    from jaxup.training.rundir import write_atomically

    params = load_trained(run, outcome.target.name, outcome.target_model)
    plan, reference = outcome.plan.to_yaml(), outcome.results[0]
    card = model_card(
        outcome.target_model, title=title, dtype="float32", plan=outcome.plan,
        source=reference.origin if reference.steps == 0 else "a reference trained in the same run",
    )  # fmt: skip
    writer.save(
        run.directory / "export", outcome.target_model, params, tokenizer=run.data.tokenizer, card=card,
        extra_files={PLAN: plan}, force=True,
    )  # fmt: skip
    if jax.process_index() != 0:
        return
    write_atomically(run.directory / "plan.yaml", plan)
    report.plot_validation(run.directory, title, outcome.results, run.log.read())
    if len({r.layers for r in outcome.results[1:]}) > 1:
        report.plot_layers(run.directory, title, outcome.results)
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


def read_settings(config: ConfigDict) -> Any:
    from jaxup.model.config import Compute
    from jaxup.training.loop import Settings
    from jaxup.training.optimizer import OptimizerConfig, learning_rate
    from jaxup.training.step import StepConfig

    section = experiment.section
    optimizer = section(OptimizerConfig, config.optimizer)
    if (config.steps > 0) == (config.epochs > 0) or min(config.steps, config.epochs) < 0:
        raise UserError(f"steps={config.steps}, epochs={config.epochs}: one of them must be positive, the other 0")
    if config.reference.steps < 0:
        raise UserError(f"reference.steps must be at least 0, not {config.reference.steps}")
    for steps in (config.steps, config.reference.steps):
        # Refuses an unknown schedule or a warmup that does not fit; how many steps epochs are, the data will say.
        learning_rate(optimizer, steps or optimizer.warmup_steps)
    for key in ("eval.interval", "log.interval", "checkpoint.interval", "checkpoint.keep"):
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
    return settings


def read_model(config: ConfigDict, tokens: int = 1) -> Any:
    """The reference's ModelConfig: of the model at `reference.path`, else of the `model` section.

    `model.family` names the constructor that takes the section's other keys. vocab_size 0 there
    means that of the tokenizer, `tokens`, rounded up to a multiple of 64.
    """
    from jaxup.hub.reader import load_config
    from jaxup.model.config import ModelConfig

    if config.reference.path:
        return load_config(config.reference.path, revision=config.reference.revision or None)
    families = {"gpt2": ModelConfig.gpt2, "llama": ModelConfig.llama}
    values = config.model.to_dict()
    family = values.pop("family")
    if family not in families:
        raise UserError(f"model.family: unknown {family!r}{suggest(family, families)}")
    known = inspect.signature(families[family]).parameters
    for key in values.keys() - known:
        raise UserError(f"model.{key}: a {family} model has no such setting{suggest(key, known)}")
    for key in [name for name, parameter in known.items() if parameter.default is parameter.empty]:
        if key not in values:
            raise UserError(f"model.{key}: a {family} model needs it, and this experiment does not set it")
    values["vocab_size"] = values["vocab_size"] or -(-tokens // 64) * 64
    return families[family](**values)


def load_pretrained(config: ConfigDict, mesh: Any) -> Any:
    """The reference's params as float32 master weights, each device's part read straight onto it."""
    from flax import nnx

    from jaxup.hub.load import load

    r = config.reference
    model = load(
        r.path, dtype="float32", mesh=mesh, revision=r.revision or None, strict=True, allow_pickle=r.allow_pickle,
        progress=True,
    )  # fmt: skip
    return nnx.to_pure_dict(nnx.state(model))


def find_tokenizer(config: ConfigDict) -> dict[str, str]:
    """The two settings of DataConfig that name the tokenizer: `data.tokenizer`, or what a reference brings."""
    from jaxup.hub.directory import tokenizer_directory

    path = config.reference.path
    if config.data.tokenizer or not path:
        return {"tokenizer": config.data.tokenizer, "tokenizer_files": config.data.tokenizer}
    return {
        "tokenizer": path,
        "tokenizer_files": str(tokenizer_directory(path, revision=config.reference.revision or None)),
    }


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
