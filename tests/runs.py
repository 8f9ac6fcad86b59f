"""Tiny training runs: how one is started, and what it leaves behind."""

import json
from pathlib import Path

import jaxup

GPT2 = [
    "--config=inherit_gpt2.py:smoke", "--config.steps=8", "--config.batch_size=8", "--config.model.num_layers=4",
    "--config.model.hidden_size=16", "--config.model.num_heads=2", "--config.model.max_positions=32",
    "--config.data.seq_len=32", "--config.data.tokenizer=bpe:300", "--config.data.val_fraction=0.3",
    "--config.inherit.tolerance=100.0", "--config.eval.interval=4", "--config.eval.rows=8",
    "--config.eval.batch_size=8", "--config.checkpoint.interval=2", "--config.log.interval=1",
    "--config.optimizer.warmup_steps=2", "--config.sample.tokens=8",
]  # fmt: skip


def arguments(corpus, workdir, *more):
    """Of `jaxup.train`: a reference of four layers, a target that inherits two, and its control."""
    return [*GPT2, f"--config.data.source={corpus}", f"--workdir={workdir}", *more]


def write_corpus(directory):
    """A few kilobytes of this project's own text."""
    for file in sorted((Path(jaxup.__file__).parent / "training").glob("*.py")):
        (directory / file.with_suffix(".txt").name).write_text(file.read_text())


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """Everything in metrics.jsonl that does not depend on how fast the machine was."""
    timed = {"tokens_per_second", "tflops_per_device", "mfu"}
    return [{k: v for k, v in r.items() if k not in timed} for r in metrics(workdir)]


def result(workdir, name):
    return json.loads((workdir / "checkpoints" / name / "result.json").read_text())
