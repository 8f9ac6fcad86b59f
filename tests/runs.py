"""Tiny training runs: how one is started, and what it leaves behind.

Their layers are in a loop, as those of large models are: that compiles sooner than each by itself.
"""

import bisect
import contextlib
import itertools
import json
import random

import jax
import pytest

GPT2 = [
    "--config=inherit_gpt2.py:smoke", "--config.steps=8", "--config.batch_size=8", "--config.model.num_layers=4",
    "--config.model.hidden_size=16", "--config.model.num_heads=2", "--config.model.max_positions=32",
    "--config.data.seq_len=32", "--config.data.tokenizer=bpe:300", "--config.data.val_fraction=0.3",
    "--config.inherit.tolerance=100.0", "--config.eval.interval=4", "--config.eval.rows=8",
    "--config.eval.batch_size=8", "--config.checkpoint.interval=2", "--config.log.interval=1",
    "--config.optimizer.warmup_steps=2", "--config.sample.tokens=8", "--config.compute.unroll=1",
]  # fmt: skip

HEAL = [
    "--config=heal.py:smoke",
    "--config.model.hidden_size=16", "--config.model.intermediate_size=24", "--config.model.num_heads=2",
    "--config.model.num_kv_heads=1", "--config.model.num_layers=3", "--config.plan=upscale(base, 1:3, copies=1)",
    "--config.pretrain.steps=4", "--config.pretrain.batch_size=8", "--config.pretrain.data.seq_len=32",
    "--config.pretrain.data.tokenizer=bpe:300", "--config.pretrain.data.val_fraction=0.3",
    "--config.pretrain.optimizer.warmup_steps=2", "--config.data.seq_len=64", "--config.data.val_fraction=0.2",
    "--config.batch_size=8", "--config.eval.interval=4", "--config.eval.rows=8", "--config.eval.batch_size=8",
    "--config.checkpoint.interval=3", "--config.log.interval=1", "--config.sample.tokens=4",
    "--config.step.accumulation=0", "--config.compute.unroll=1",
]  # fmt: skip

PRETRAIN = [
    "--config=pretrain.py:smoke", "--config.model.hidden_size=16", "--config.model.intermediate_size=24",
    "--config.model.num_heads=2", "--config.model.num_kv_heads=1", "--config.model.num_layers=3",
    "--config.model.max_positions=32", "--config.data.seq_len=32", "--config.data.tokenizer=bpe:300",
    "--config.data.val_fraction=0.3", "--config.steps=12", "--config.batch_size=8",
    "--config.optimizer.warmup_steps=2", "--config.eval.interval=4", "--config.eval.rows=16",
    "--config.eval.batch_size=8", "--config.checkpoint.interval=4", "--config.log.interval=1",
    "--config.sample.tokens=0", "--config.compute.unroll=1",
]  # fmt: skip


def arguments(corpus, workdir, *more):
    """Of `jaxup.train`: a reference of four layers, a target that inherits two, and its control."""
    return [*beside(GPT2, more), f"--config.data.source={corpus}", f"--workdir={workdir}", *more]


def beside(arguments, more):
    """Of these arguments those that something reads beside `more`: a reference that is given is not made here."""
    made = ("--config.model.", "--config.reference.steps")
    given = any(argument.startswith("--config.reference.path=") for argument in more)
    return [argument for argument in arguments if not (given and argument.startswith(made))]


WORDS = """
the start of user and end to assistant in is that it for was on are as with they at be this from have or by one had
not but what all were when we there can an your which their said if do will each about how up out them then she many
some so these would other into has more her two like him see time could no make than first been its who now people my
made over did down only way find use may water long little very after words called just where most know get through
back much before go good new write our used me man too any day same right look think also around another came come
work three word must because does part even place well such here take why things help put years different away again
off went old number sure yes self model layer return import tokens step
"""


@contextlib.contextmanager
def devices(count):
    """Runs in this process have so many of the devices that are there."""
    here = jax.local_devices()[:count]  # jax.devices may be patched already
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: count)
        patch.setattr(jax, "devices", lambda: here)
        yield


def write_corpus(directory):
    """A hundred kilobytes that are the same whatever else changes: sentences of words as rare as in a language."""
    draw = random.Random(0).random  # what alone is the same in all versions of Python
    words = WORDS.split()
    heap = list(itertools.accumulate(1 / (n + 20) for n in range(len(words))))  # Zipf's law

    def sentence():
        chosen = [words[bisect.bisect(heap, draw() * heap[-1])] for _ in range(4 + int(draw() * 12))]
        return " ".join(chosen).capitalize() + (".\n" if draw() < 0.3 else ". ")

    for number in range(16):
        (directory / f"text_{number:02}.txt").write_text("".join(sentence() for _ in range(160)))


def write_chats(path):
    """Two hundred short conversations about sums."""
    with open(path, "w") as file:
        for a in range(20):
            for b in range(10):
                turns = [("user", f"{a} + {b}?"), ("assistant", f"{a + b}"), ("user", "sure?"), ("assistant", "yes")]
                messages = [{"role": role, "content": text} for role, text in turns[: 2 + 2 * (b % 2)]]
                file.write(json.dumps({"messages": messages}) + "\n")


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """Everything in metrics.jsonl that does not depend on how fast the machine was."""
    timed = {"tokens_per_second", "tflops_per_device", "mfu"}
    return [{k: v for k, v in r.items() if k not in timed} for r in metrics(workdir)]


def result(workdir, name):
    return json.loads((workdir / "checkpoints" / name / "result.json").read_text())
