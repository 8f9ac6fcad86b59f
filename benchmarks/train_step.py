"""Tokens per second of one training step: jaxup against transformers' GPT-2 under torch AdamW.

    python benchmarks/train_step.py                # CPU or GPU, whichever JAX and torch see
    python benchmarks/train_step.py --layers 12 --hidden 768 --heads 12 --vocab 50304 --seq 1024

The same shapes, the same global batch and the same work (forward, backward, clip by global norm,
AdamW) in one run. The contestants take turns, `--rounds` times, so that a machine whose speed
drifts slows them all alike; the figure is the median over all timed steps. On a GPU both compute in
bf16 with flash attention (torch: autocast and SDPA). jaxup may split the batch into micro-batches
(`--accumulation`), as its configurations do: on CPU the smaller working set is faster.

Each contestant runs in a process of its own, pinned to nothing, so that neither's threads or
allocator disturb the other; only one works at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--accumulation", type=int, default=8, help="jaxup's micro-batches a step")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--unroll", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per round")
    parser.add_argument("--contestants", default="jaxup,eager,compile")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def jaxup_step(a: argparse.Namespace):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxup.model.config import Compute, ModelConfig
    from jaxup.model.decoder import init
    from jaxup.model.spec import flops_per_token
    from jaxup.training.metrics import peak_flops
    from jaxup.training.optimizer import AdamW, make_optimizer
    from jaxup.training.step import StepConfig, TrainState, make_train_step

    gpu = jax.default_backend() == "gpu"
    dtype = a.dtype if a.dtype != "auto" else ("bfloat16" if gpu else "float32")
    model = ModelConfig.gpt2(
        vocab_size=a.vocab, hidden_size=a.hidden, num_layers=a.layers, num_heads=a.heads, max_positions=a.seq, bias=True
    )
    optimizer = make_optimizer(AdamW(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0))
    compute = Compute(dtype=dtype, attention=a.attention, remat=a.remat, unroll=a.unroll)
    config = StepConfig(accumulation=a.accumulation, loss_chunk=128 if not gpu else 512, z_loss=0.0)
    train_step = jax.jit(make_train_step(model, compute, optimizer, config), donate_argnums=0)
    params = init(model, 0)
    rate = jnp.float32(1e-3)
    state = TrainState(params, optimizer.init(params), jnp.int32(0), jnp.bool_(False))
    tokens = np.random.default_rng(0).integers(0, a.vocab, (a.batch, a.seq + 1)).astype(np.int32)
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "loss_weights": jnp.ones((a.batch, a.seq), jnp.float32),
    }

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch, rate)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    facts = {"device": jax.devices()[0].device_kind, "dtype": dtype, "peak": peak_flops(),
             "flops_per_token": flops_per_token(model, a.seq)}  # fmt: skip
    return step, facts


def torch_step(a: argparse.Namespace, compiled: bool):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = a.dtype if a.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=a.vocab, n_positions=a.seq, n_embd=a.hidden, n_layer=a.layers, n_head=a.heads, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True if device == "cuda" else None
    )
    run = torch.compile(model) if compiled else model
    tokens = torch.randint(0, a.vocab, (a.batch, a.seq), device=device)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step, {"device": device, "dtype": dtype}


def worker(a: argparse.Namespace) -> None:
    """Compiles, warms up, then times a round of steps for each line on stdin."""
    step, facts = jaxup_step(a) if a.worker == "jaxup" else torch_step(a, a.worker == "compile")
    began = time.perf_counter()
    for _ in range(3):
        step()
    print(json.dumps({**facts, "warmup": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(a.steps):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        print(json.dumps(times), flush=True)


def main() -> None:
    a = arguments()
    if a.worker:
        return worker(a)
    names = a.contestants.split(",")
    workers, facts = {}, {}
    for name in names:  # one after the other: compiling is not to be timed against anything
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts[name] = json.loads(workers[name].stdout.readline())
    times = {name: [] for name in names}
    for _ in range(a.rounds):
        for name in names:
            workers[name].stdin.write("\n")
            workers[name].stdin.flush()
            times[name] += json.loads(workers[name].stdout.readline())
    for process in workers.values():
        process.stdin.close()
        process.wait()

    tokens = a.batch * a.seq
    print(f"GPT-2: {a.layers} layers, hidden {a.hidden}, {a.heads} heads, vocab {a.vocab}; {a.batch} x {a.seq} tokens")
    rates = {name: tokens / statistics.median(times[name]) for name in names}
    for name in names:
        spread = f"{tokens / max(times[name]):,.0f}-{tokens / min(times[name]):,.0f}"
        print(
            f"{name:8} {rates[name]:>10,.0f} tokens/s ({spread}), {facts[name]['dtype']} on {facts[name]['device']}, "
            f"warm-up {facts[name]['warmup']:.0f} s"
        )
    if "jaxup" in names:
        flops = rates["jaxup"] * facts["jaxup"]["flops_per_token"]
        peak = facts["jaxup"]["peak"]
        print(
            f"jaxup: {flops / 1e12:.3g} TFLOP/s"
            + (f", MFU {flops / peak:.1%} (causal attention at half)" if peak else "")
        )
        for name in names:
            if name != "jaxup":
                print(f"ratio jaxup / {name}: {rates['jaxup'] / rates[name]:.2f}")


if __name__ == "__main__":
    main()
