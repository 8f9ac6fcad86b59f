"""Healing an up-scaled model: speed beside TRL's SFTTrainer, and what training the copies alone saves.

    python benchmarks/heal.py                                   # what JAX and torch see: CPU or GPU
    python benchmarks/heal.py --quick                           # all of it in two minutes: does it still run?
    python benchmarks/heal.py --parts memory --layers 32 --hidden 4096 --plan "upscale(base, 8:24, copies=2)"

speed: one step (forward, backward, clip, AdamW) of the same LLaMA from the same weights on the same
conversations, which are tokenised beforehand, as often as `--rounds` times `--steps`. A batch is
`--batch` rows:

    jaxup packed          several conversations a row, each a segment of its own, [batch, seq]
    jaxup padded          one conversation a row, [batch, seq]
    trl padded            one conversation a row, padded to the longest of the batch
    trl packed            SFTTrainer(packing=True): rows end to end in one of batch x seq. That is made for
                          flash attention; without it, attention is over all of it under a mask
    trl packed by row     the same a row at a time, with gradient accumulation

jaxup splits the batch into `--accumulation` micro-batches: on CPU the smaller working set is faster.
Each runs in a process of its own, on the same cores; they take turns, so that a machine whose speed
drifts slows them all alike. Before anything is timed each computes the loss of the same held-out
conversations, and those that are padded, which train on the same batches, do so again after the
warm-up: what differs is left out. Figures are medians over rounds, in tokens of conversations (padding is none).

memory: bytes of one compiled step of the up-scaled model, for full training and parts of it; nothing
is run. Temporaries are XLA's, gradients and activations among them.

backward: the share of the backward pass that training only the copies saves,
1 - (copies - forward) / (full - forward), in time and in FLOPs, for copies that all lie high in the
model (nothing flows back below the first) and for copies that begin at its bottom.

TRL is optional (pip install trl accelerate), and so is qwix (pip install 'jaxup[lora]').
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

QUICK = {"layers": 3, "hidden": 48, "batch": 4, "seq": 128, "rounds": 2, "steps": 1, "warmup": 1, "vocab": 512,
         "files": "docstrings:300", "accumulation": 2, "unroll": 1, "plan": "upscale(base, 1:3)",
         "high": "upscale(base, 2:3)", "low": "interleave(base, [0])"}  # fmt: skip
CONTESTANTS = ("jaxup packed", "jaxup padded", "trl padded", "trl packed", "trl packed by row")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of losses near log(vocab): sums in another order
FULL = "everything"
RATE = np.float32(1e-4)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="speed,memory,backward")
    parser.add_argument("--quick", action="store_true", help="small sizes, unless they are given")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4, help="half as many KV heads")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--files", default="docstrings", help="chats, as config.data.files of configs/heal.py")
    parser.add_argument("--plan", default="upscale(base, 2:4, copies=2)", help="of the memory part")
    parser.add_argument("--high", default="upscale(base, 3:6)", help="backward: a plan whose copies lie high")
    parser.add_argument("--low", default="interleave(base, [0, 2, 4])", help="one of which they lie low")
    parser.add_argument("--lora", type=int, default=8, help="rank of the adapters in the memory part")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of activations")
    parser.add_argument("--stored", choices=["float32", "bfloat16"], default="float32", help="of what does not train")
    parser.add_argument("--remat", choices=["none", "full"], default="none", help="TRL's gradient checkpointing too")
    parser.add_argument("--accumulation", type=int, default=8, help="speed: jaxup's micro-batches a step")
    parser.add_argument("--unroll", type=int, default=0, help="see jaxup.model.config.Compute")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores for each contestant")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first round")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


# ---- the model, the step and the data, of all parts


def model_config(a: argparse.Namespace):
    from jaxup.model.config import ModelConfig

    return ModelConfig.llama(
        vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=64 * round(a.hidden / 24), num_layers=a.layers,
        num_heads=a.heads, num_kv_heads=max(1, a.heads // 2), max_positions=a.seq,
    )  # fmt: skip


def optimizer():
    from jaxup.training.optimizer import AdamW, make_optimizer

    return make_optimizer(AdamW(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0))


def compute_and_step(a: argparse.Namespace, unroll: int):
    from jaxup.model.config import Compute
    from jaxup.training.step import StepConfig

    compute = Compute(dtype=a.dtype, remat=a.remat, unroll=unroll)
    return compute, StepConfig(accumulation=1, loss_chunk=128, z_loss=0.0)


def initial(params, *, partition=None):
    """(the state that trains, what is frozen), as the loop begins."""
    import jax
    import jax.numpy as jnp

    from jaxup.training.step import TrainState

    trained, *frozen = (params,) if partition is None else partition.split(params)
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    return TrainState(trained, optimizer().init(trained), jnp.int32(0), jnp.bool_(False)), *frozen


def prepare(a: argparse.Namespace) -> None:
    """The stores `packed` and `padded` of the same conversations, and `model` with its tokenizer."""
    import numpy as np

    from jaxup.data.config import DataConfig
    from jaxup.data.docstrings import write_docstrings
    from jaxup.data.open import open_data
    from jaxup.data.rows import BEST_FIT, ONE
    from jaxup.data.tokenizer import train_bpe
    from jaxup.hub import writer
    from jaxup.model.decoder import init

    root = str(a.scratch)
    lines = Path(write_docstrings("docstrings", root, seed=0)).read_text().splitlines()
    tokenizer = train_bpe((m["content"] for line in lines for m in json.loads(line)["messages"]), a.vocab)
    for name in ("packed", "padded"):
        config = DataConfig(
            files=a.files, format="metharme", seq_len=a.seq, val_fraction=0.02, on_bad="skip",
            packing=BEST_FIT if name == "packed" else ONE, store=f"{root}/{name}",
        )  # fmt: skip
        open_data(config, tokenizer=tokenizer, root=root)
    writer.save(a.scratch / "model", model_config(a), init(model_config(a), 0), tokenizer=tokenizer)
    padded, packed = (rows_of(a, name, "train") for name in ("padded", "packed"))
    lengths = [len(padded.examples(row)[0].ids) for row in range(min(1000, len(padded)))]
    print(
        f"{a.files}: {len(padded):,} conversations in {len(packed):,} packed rows; tokens (10%, 50%, 90%, longest): "
        + ", ".join(f"{q:.0f}" for q in np.quantile(lengths, [0.1, 0.5, 0.9, 1]))
    )


def rows_of(a: argparse.Namespace, name: str, split: str):
    from jaxup.data.rows import open_rows
    from jaxup.data.store import META, Store

    store = Store(f"{a.scratch}/{name}")
    train, validation = open_rows(store, store.read_json(META), isolate=True, eos=-1)
    return train if split == "train" else validation


# ---- speed


def answer(out: Any, **said: Any) -> bool:
    """To the parent; False when it wants no more."""
    print(json.dumps(said), file=out, flush=True)
    return bool(sys.stdin.readline())


def jaxup_contestant(a: argparse.Namespace, out: Any) -> None:
    import jax

    from jaxup.data.batches import Batches, validation_batches
    from jaxup.model.decoder import init
    from jaxup.training.step import make_eval_step, make_train_step

    name, model, (compute, config) = a.worker.split()[1], model_config(a), compute_and_step(a, a.unroll)
    config = dataclasses.replace(config, accumulation=a.accumulation)
    train_step = jax.jit(make_train_step(model, compute, optimizer(), config), donate_argnums=0)
    eval_step = jax.jit(make_eval_step(model, compute, config))
    batches = Batches(rows_of(a, name, "train"), batch_size=a.batch, seed=0)
    (state,), at = initial(init(model, 0)), 0

    def validation_loss() -> float:
        held_out = validation_batches(rows_of(a, name, "validation"), batch_size=a.batch, max_rows=0)
        sums = [jax.device_get(eval_step(state.params, batch)["text"]) for batch in held_out]
        return float(sum(s[0] for s in sums) / sum(s[1] for s in sums))

    def steps(count: int) -> dict[str, float]:
        """Of so many steps, reading the batches included."""
        nonlocal state, at
        held, began = [], time.perf_counter()
        for _ in range(count):
            batch = batches(at)
            state, metrics = train_step(state, batch, RATE)
            jax.block_until_ready((state, metrics))
            held.append(batch)
            at += 1
        return {
            "seconds": time.perf_counter() - began,
            "content": sum(int((b["segment_ids"] > 0).sum()) for b in held),
            "loss": sum(int(b["loss_weights"].sum()) for b in held),
            "positions": sum(b["tokens"].size for b in held),
        }

    before = validation_loss()
    steps(a.warmup)
    more = answer(
        out, before=before, after=validation_loss(), threads=len(os.sched_getaffinity(0)),
        device=jax.devices()[0].device_kind,
    )  # fmt: skip
    while more:
        more = answer(out, **steps(a.steps))


def trl_contestant(a: argparse.Namespace, out: Any) -> None:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from jaxup.data.batches import Batches

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    gpu, packing, by_row = torch.cuda.is_available(), "packed" in a.worker, "by row" in a.worker
    counts = dict.fromkeys(("content", "loss", "positions"), 0)

    class Counting(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            positions = inputs["input_ids"].numel()
            counts["positions"] += positions
            counts["content"] += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else positions
            counts["loss"] += int((inputs["labels"][:, 1:] != -100).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Turns(TrainerCallback):
        """Times what lies between ends of steps: the next batch, forward, backward, clip and AdamW."""

        def on_step_end(self, args, state, control, **kwargs):
            nonlocal began
            if gpu:
                torch.cuda.synchronize()
            if state.global_step < a.warmup or (state.global_step - a.warmup) % a.steps:
                return
            said = {**counts, "seconds": time.perf_counter() - began}
            if state.global_step == a.warmup:
                said = {"before": before, "after": validation_loss(),
                        "threads": torch.get_num_threads(), "device": "cuda" if gpu else "cpu"}  # fmt: skip
            control.should_training_stop = not answer(out, **said)
            counts.update(dict.fromkeys(counts, 0))
            began = time.perf_counter()

    # In the order of jaxup's first epoch.
    padded = rows_of(a, "padded", "train")
    batches = Batches(padded, batch_size=a.batch, seed=0)
    order = np.concatenate([batches.rows_of(step) for step in range(-(-len(padded) // a.batch))])[: len(padded)]
    chats = [padded.examples(row)[0] for row in order]
    data = Dataset.from_dict({
        "input_ids": [chat.ids.tolist() for chat in chats],
        "assistant_masks": [chat.trained.astype(int).tolist() for chat in chats],
    })  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(a.scratch / "model", dtype=torch.float32, attn_implementation="sdpa")
    trainer = Counting(
        model, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(a.scratch / "model"),
        args=SFTConfig(
            output_dir=str(a.scratch / a.worker), max_length=a.seq, packing=packing,
            per_device_train_batch_size=1 if by_row else a.batch,
            gradient_accumulation_steps=a.batch if by_row else 1,
            max_steps=a.warmup + a.steps * (a.rounds + 1),
            # What is padded sees jaxup's batches; packed rows lie longest conversation first.
            train_sampling_strategy="random" if packing else "sequential",
            learning_rate=1e-4, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8,
            weight_decay=0.0, max_grad_norm=1.0, bf16=a.dtype == "bfloat16", gradient_checkpointing=a.remat == "full",
            use_cpu=not gpu, dataloader_pin_memory=gpu, logging_strategy="no", save_strategy="no", report_to="none",
            disable_tqdm=True,
        ),
    )  # fmt: skip

    def validation_loss() -> float:
        """Of the same conversations, in batches as the trainer's own."""
        held_out, sums = rows_of(a, "packed" if packing else "padded", "validation"), np.zeros(2)
        size = 1 if by_row else a.batch
        for start in range(0, len(held_out), size):
            rows = [held_out.examples(row) for row in range(start, min(start + size, len(held_out)))]
            examples = [
                {
                    "input_ids": np.concatenate([chat.ids for chat in row]),
                    "labels": np.concatenate([np.where(chat.trained, chat.ids, -100) for chat in row]),
                    "seq_lengths": [len(chat.ids) for chat in row],
                }
                for row in rows
            ]
            count = sum(int(chat.trained[1:].sum()) for row in rows for chat in row)
            with torch.no_grad():
                inputs = trainer._prepare_inputs(trainer.data_collator(examples))
                sums += np.array([float(trainer.compute_loss(trainer.model, inputs)) * count, count])
        return float(sums[0] / sums[1])

    before, began = validation_loss(), time.perf_counter()
    trainer.add_callback(Turns())
    trainer.train()


def contestant(a: argparse.Namespace) -> None:
    # Only answers go to the parent: libraries print as well.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if a.worker.startswith("jaxup"):
        return jaxup_contestant(a, out)
    try:
        trl_contestant(a, out)
    except ImportError as error:
        answer(out, refused=f"{error}; pip install trl accelerate")
    except Exception as error:
        answer(out, refused=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def speed(a: argparse.Namespace) -> None:
    print("\n## Speed\n", flush=True)
    call(a, "prepare")
    with open(a.scratch / "log", "w+") as log:
        rounds = compete(a, log)
    rates = {
        name: {key: statistics.median(r[key] / r["seconds"] for r in each) for key in each[0]}
        for name, each in rounds.items()
    }
    first = next(iter(rates), None)
    print(f"\n| | tokens/s | lowest-highest | loss tokens/s | positions/s | padding | ms/step | {first} / it |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, r in rates.items():
        each = [x["content"] / x["seconds"] for x in rounds[name]]
        print(
            f"| {name} | {r['content']:,.0f} | {min(each):,.0f}-{max(each):,.0f} | {r['loss']:,.0f} "
            f"| {r['positions']:,.0f} | {1 - r['content'] / r['positions']:.0%} "
            f"| {1000 * statistics.median(x['seconds'] for x in rounds[name]) / a.steps:,.0f} "
            f"| {rates[first]['content'] / r['content']:.2f} |"
        )


def compete(a: argparse.Namespace, log: IO[str]) -> dict[str, list[dict[str, float]]]:
    """What each contestant said of each round."""
    pipe = subprocess.PIPE
    workers = {
        name: subprocess.Popen(command(a, name), stdin=pipe, stdout=pipe, stderr=log, text=True)
        for name in a.contestants.split(",")
    }
    # They compile and warm up side by side; nothing is timed before all have.
    facts = {name: hear(worker, log) for name, worker in workers.items()}
    rounds = {name: [] for name in workers if same(a, name, facts)}
    for _ in range(a.rounds):
        for name, each in rounds.items():
            workers[name].stdin.write("\n")
            workers[name].stdin.flush()
            each.append(hear(workers[name], log))
            if "refused" in each[-1]:
                raise SystemExit(f"{name}: {each[-1]['refused']}")
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return rounds


def hear(worker: subprocess.Popen, log: IO[str]) -> dict[str, Any]:
    if line := worker.stdout.readline():
        return json.loads(line)
    log.seek(0)
    raise SystemExit(f"{worker.args[-1]} ended with {worker.wait()}: {log.read()[-3000:]}")


def same(a: argparse.Namespace, name: str, facts: dict[str, dict[str, Any]]) -> bool:
    """Prints what is known of a contestant; False if it does not run, or computes another loss than the first."""
    f = facts[name]
    if "refused" in f:
        print(f"{name}: left out: {f['refused']}")
        return False
    off = [f["before"] - next(other["before"] for other in facts.values() if "before" in other)]
    line = f"{name}: {f['device']}, {f['threads']} threads, loss {f['before']:.6f} "
    line += f"({off[0]:+.1e}), after {a.warmup} steps {f['after']:.6f}"
    if name == "trl padded" and "after" in facts.get("jaxup padded", {}):
        off.append(f["after"] - facts["jaxup padded"]["after"])
        line += f" ({off[-1]:+.1e} from jaxup padded, on the same batches)"
    equal = max(map(abs, off)) <= TOLERANCE[a.dtype]
    print(line if equal else f"{line}: left out: its loss is another", flush=True)
    return equal


# ---- what the copies alone need


def scaled(a: argparse.Namespace, line: str):
    """(the plan of a line, the model that it makes)."""
    from jaxup.depth.result import result_config
    from jaxup.recipes import line as recipe_line

    plan = recipe_line.parse(line).plan(a.layers)
    return plan, result_config(plan, {"base": model_config(a)})


def selected(a: argparse.Namespace, plan, model, compute, layers: str, parameters: str = "", rank: int = 0, kind=""):
    """The `partition` of jaxup.training.step; None: everything trains."""
    from jaxup.training.lora import LoraConfig
    from jaxup.training.selection import TrainConfig, select

    tile = next(size for size in (64, 32, 16, 8, 4, 2, 1) if a.hidden % size == 0)
    train = TrainConfig(layers=layers, parameters=parameters, freeze="", rates={})
    lora = LoraConfig(rank=rank, alpha=2.0 * rank, quantize=kind, tile_size=tile)
    return select(model, plan, train, lora, compute=compute, seed=0).partition


def abstract_batch(a: argparse.Namespace):
    import jax
    import jax.numpy as jnp

    fields = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32)
    return {k: jax.ShapeDtypeStruct((a.batch, a.seq), d) for k, d in (fields | {"loss_weights": jnp.float32}).items()}


def memory(a: argparse.Namespace) -> None:
    import jax

    from jaxup.model.decoder import abstract
    from jaxup.model.spec import count_params
    from jaxup.training.step import make_train_step

    plan, model = scaled(a, a.plan)
    compute, config = compute_and_step(a, unroll=1)  # as models that need the memory are run
    batch = abstract_batch(a)
    stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, a.stored), abstract(model)[1])
    nbytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    parts = {FULL: ("all",), "copies": ("copies",), "copies, o_proj|down_proj": ("copies", "o_proj|down_proj")}
    if importlib.util.find_spec("qwix"):
        for kind in ("", "nf4"):
            parts[f"copies, {'Q' * bool(kind)}LoRA of rank {a.lora}"] = ("copies", "", a.lora, kind)
    print(f"\n## Memory: {a.plan}, {model.num_layers} layers, {count_params(model):,} parameters\n")
    print(f"MB; {a.batch} x {a.seq} tokens, remat {a.remat}, what does not train in {a.stored}\n")
    print("| trains | parameters | state | of full | frozen | gradients | temporaries | of full | all | of full |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    full = None
    for name, part in parts.items():
        partition = selected(a, plan, model, compute, *part)
        state, *frozen = jax.eval_shape(functools.partial(initial, partition=partition), stored)
        step = jax.jit(make_train_step(model, compute, optimizer(), config, partition), donate_argnums=0)
        found = step.lower(state, batch, RATE, *frozen).compile().memory_analysis()
        if found is None:
            print(f"{jax.default_backend()} does not say what memory a program needs")
            return
        # What the arguments really take: XLA packs some dtypes, and does not take what is not used.
        other = found.argument_size_in_bytes - nbytes(state) - nbytes(batch)
        everything = (
            found.argument_size_in_bytes + found.temp_size_in_bytes
            + found.output_size_in_bytes - found.alias_size_in_bytes
        )  # fmt: skip
        row = (nbytes(state), found.temp_size_in_bytes, everything)
        full = full or row
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        (state_mb, temp_mb, all_mb), of = (x / 1e6 for x in row), [x / y for x, y in zip(row, full, strict=True)]
        print(
            f"| {name.replace('|', chr(92) + '|')} | {count:,} | {state_mb:,.1f} | {of[0]:.2f} | {other / 1e6:,.1f} "
            f"| {nbytes(state.params) / 1e6:,.1f} | {temp_mb:,.1f} | {of[1]:.2f} | {all_mb:,.1f} | {of[2]:.2f} |",
            flush=True,
        )
    if not importlib.util.find_spec("qwix"):
        print("LoRA: left out: qwix is not installed; pip install 'jaxup[lora]'")


def backward(a: argparse.Namespace) -> None:
    import jax

    print("\n## Backward: what training only the copies saves of it\n")
    print("| plan | of | forward | everything | copies | copies / everything | saved |")
    print("|---|---|---:|---:|---:|---:|---:|")
    batch = {k: jax.numpy.ones(leaf.shape, leaf.dtype) for k, leaf in abstract_batch(a).items()}
    for line in (a.high, a.low):
        flops, calls = {}, {}
        for name in ("forward", FULL, "copies"):
            flops[name], calls[name] = program(a, line, name, batch)
        times = {name: [] for name in calls}
        for turn in range(a.rounds + 1):
            for name, step in calls.items():
                for _ in range(a.steps):
                    began = time.perf_counter()
                    step()
                    times[name] += [time.perf_counter() - began] if turn else []  # the first turn is the warm-up
        medians = {name: 1e3 * statistics.median(t) for name, t in times.items()}
        for what, m in (("ms", medians), ("GFLOP", flops)):
            saved = 1 - (m["copies"] - m["forward"]) / (m[FULL] - m["forward"])
            print(
                f"| {line} | {what} | " + " | ".join(f"{m[name]:,.4g}" for name in calls)
                + f" | {m['copies'] / m[FULL]:.2f} | {saved:.0%} |", flush=True,
            )  # fmt: skip


def program(a: argparse.Namespace, line: str, name: str, batch: dict[str, Any]) -> tuple[float, Callable[[], None]]:
    """(GFLOPs, what runs it once): the forward pass, or a step that trains everything or the copies."""
    from unittest import mock

    import jax

    from jaxup.depth.apply import apply
    from jaxup.model.decoder import init
    from jaxup.training.step import make_eval_step, make_train_step

    (plan, model), forward = scaled(a, line), name == "forward"
    compute, config = compute_and_step(a, a.unroll)
    partition = selected(a, plan, model, compute, "copies") if name == "copies" else None
    params = apply(plan, {"base": init(model_config(a), 0)})
    state, *frozen = initial(jax.tree.map(jax.numpy.copy, params), partition=partition)
    given = frozen if forward else [RATE, *frozen]
    state = state.params if forward else state

    def make(compute):
        if forward:
            return make_eval_step(model, compute, config)
        return make_train_step(model, compute, optimizer(), config, partition)

    # XLA counts the body of a loop once, so its FLOPs are those of the same program without loops, not compiled.
    with mock.patch.object(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True)):
        unrolled = make(dataclasses.replace(compute, unroll=0))
        flops = jax.jit(unrolled).lower(state, batch, *given).cost_analysis()["flops"]
    call = jax.jit(make(compute), donate_argnums=() if forward else 0)

    def once() -> None:
        nonlocal state
        result = jax.block_until_ready(call(state, batch, *given))
        state = state if forward else result[0]

    return flops / 1e9, once


# ---- processes


def command(a: argparse.Namespace, worker: str) -> list[str]:
    return [sys.executable, __file__, *sys.argv[1:], "--scratch", str(a.scratch), "--worker", worker]


def call(a: argparse.Namespace, worker: str) -> None:
    """Carries it out in a process of its own; what it says on stderr is shown if it fails."""
    ended = subprocess.run(command(a, worker), stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{worker} ended with {ended.returncode}: {ended.stderr[-3000:]}")


def machine() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> str:
    names = ("jax", "flax", "qwix", "torch", "transformers", "trl", "accelerate")
    found = [(name, importlib.metadata.version(name)) for name in names if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {version}" for name, version in [("Python", platform.python_version()), *found])


def main() -> None:
    a = arguments()
    # Processes inherit the cores; XLA, Eigen and OpenMP make as many threads as there are.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    # Libraries that are asked for nothing shall not ask the network; several processes share a GPU.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    parts = {"prepare": prepare, "memory": memory, "backward": backward}
    if a.worker in parts:
        return parts[a.worker](a)
    if a.worker:
        return contestant(a)
    print(f"{machine()}, {a.threads} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions()}")
    print(
        f"LLaMA of {a.layers} layers, hidden {a.hidden}, {a.heads} heads, vocabulary {a.vocab}; batches of "
        f"{a.batch} rows of {a.seq}; {a.dtype}, AdamW; {a.rounds} rounds of {a.steps} steps",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="jaxup-heal-") as scratch:
        a.scratch = Path(scratch)
        for part in a.parts.split(","):
            speed(a) if part == "speed" else call(a, part)


if __name__ == "__main__":
    main()
