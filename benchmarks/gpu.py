"""One GPU: tokens per second, MFU and memory of jaxup's training step beside torch's, on models of their real size.

    python benchmarks/gpu.py                                # LLaMA of 1.1B at 4,096 tokens, GPT-2 medium at 1,024
    python benchmarks/gpu.py --models gpt2 --jaxup 16:none,16:dots --torch 16 --rounds 3
    python benchmarks/gpu.py --profile OUT                  # and where the time of jaxup's best goes
    python benchmarks/gpu.py --models attention             # one layer's attention, packed, by each implementation
    python benchmarks/gpu.py --quick                        # tiny models, on a CPU too: does it still run?

A step is the same work for both: `--rows` rows of the same random tokens, the loss of every token, forward,
backward, clip by global norm, AdamW; parameters, gradients and moments in float32, computed in bfloat16.
jaxup's is the step that it trains with. torch's is transformers' model and its loss under torch.compile
and autocast, with SDPA's flash or cuDNN kernel (nothing slower is allowed) and fused AdamW. `bf16` among
its settings makes it compute without autocast on bfloat16 parameters and moments, which is less work and less exact:
it is shown, and not compared.

A setting is MICRO:REMAT[:MORE]: rows of a micro-batch; what the backward pass computes again (none, dots or
full; torch: none, or full for gradient checkpointing); and layers in an iteration of jaxup's scan (0 = all),
or torch.compile's mode, `eager` for none, or `bf16`.

Each setting is tried in a process of its own, which has the GPU for itself, jaxup and torch in turn; what
does not fit is said. Then the best of each take turns, `--rounds` times. Times are of `--steps` steps without
a stop between; memory is the highest that each allocator gave out. MFU counts 6 FLOPs for each weight of a
matrix product and token, and causal attention at half (`jaxup.model.spec.flops_per_token`), whatever is
computed again; its peak is the data sheet's for dense bfloat16.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from heal import RATE, machine, optimizer, versions

# rows of a step, tokens of a row, and the settings that are tried
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"layers": 22, "hidden": 2048, "heads": 32, "kv_heads": 4, "mlp": 5632, "vocab": 32000, "rows": 16,
              "seq": 4096, "jaxup": "8:none:0,8:dots:0,4:none:0", "torch": "4:none,8:full"},
    "gpt2": {"layers": 24, "hidden": 1024, "heads": 16, "vocab": 50304, "rows": 64, "seq": 1024,
             "jaxup": "32:none:0,16:none:0,32:dots:0", "torch": "16:none,32:none"},
}  # fmt: skip
QUICK = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "mlp": 96, "vocab": 256, "rows": 4, "seq": 64,
         "jaxup": "2:none,2:dots", "torch": "2:none:eager,2:full:eager"}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=int, help="of a step")
    parser.add_argument("--seq", type=int)
    parser.add_argument("--jaxup", help="settings, commas between them; '' = none")
    parser.add_argument("--torch")
    parser.add_argument("--attention", default="auto", help="see jaxup.model.attention")
    parser.add_argument("--loss-chunk", type=int, default=1024, help="jaxup's step.loss_chunk")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="timed together")
    parser.add_argument("--windows", type=int, default=3, help="of so many steps, in each process")
    parser.add_argument("--profile", type=Path, metavar="OUT", help="the trace of two steps of jaxup's best")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that a process may take")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.device = None
    return a


def shape(a: argparse.Namespace, name: str) -> dict[str, Any]:
    given = {key: value for key in ("rows", "seq", "jaxup", "torch") if (value := getattr(a, key)) is not None}
    return SHAPES[name] | (QUICK if a.quick else {}) | given


def model_config(name: str, s: dict[str, Any]):
    from jaxup.model.config import ModelConfig

    sizes = {"vocab_size": s["vocab"], "hidden_size": s["hidden"], "num_layers": s["layers"], "num_heads": s["heads"],
             "max_positions": s["seq"]}  # fmt: skip
    if name == "gpt2":
        return ModelConfig.gpt2(**sizes, bias=True)
    return ModelConfig.llama(**sizes, intermediate_size=s["mlp"], num_kv_heads=s["kv_heads"])


def tokens(s: dict[str, Any]):
    """int32 [rows, seq + 1]"""
    import numpy as np

    return np.random.default_rng(0).integers(0, s["vocab"], (s["rows"], s["seq"] + 1)).astype(np.int32)


# ---- the contestants: each gives (what takes so many steps and returns the last loss, what is known of it)

Steps = Callable[[int], float]


def jaxup_steps(a: argparse.Namespace, name: str, micro: int, remat: str, more: str) -> tuple[Steps, Callable]:
    import jax
    import jax.numpy as jnp

    from jaxup.model.config import Compute
    from jaxup.model.decoder import init
    from jaxup.training.metrics import peak_flops
    from jaxup.training.step import StepConfig, TrainState, make_train_step

    s = shape(a, name)
    model = model_config(name, s)
    compute = Compute(dtype="bfloat16", attention=a.attention, remat=remat, unroll=int(more or 1))
    config = StepConfig(accumulation=s["rows"] // micro, loss_chunk=a.loss_chunk, z_loss=0.0)

    def initial() -> TrainState:
        params = init(model, 0)
        return TrainState(params, optimizer().init(params), jnp.int32(0), jnp.bool_(False))

    state, given = jax.jit(initial)(), tokens(s)
    batch = jax.device_put({"tokens": given[:, :-1], "targets": given[:, 1:]})
    batch["loss_weights"] = jnp.ones((s["rows"], s["seq"]), jnp.float32)
    step = jax.jit(make_train_step(model, compute, optimizer(), config), donate_argnums=0)
    step = step.lower(state, batch, RATE).compile()

    def steps(count: int) -> float:
        nonlocal state
        for _ in range(count):
            state, metrics = step(state, batch, RATE)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    def facts() -> dict[str, Any]:
        used = jax.devices()[0].memory_stats() or {}
        return {"device": jax.devices()[0].device_kind, "peak": peak_flops(), "memory": used.get("peak_bytes_in_use"),
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                "program": step.as_text() if a.profile else ""}  # fmt: skip

    return steps, facts


def torch_steps(a: argparse.Namespace, name: str, micro: int, remat: str, more: str) -> tuple[Steps, Callable]:
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    s, cuda = shape(a, name), torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.set_float32_matmul_precision("high")
    # Under torch.compile transformers' "sdpa" makes a mask, which fast kernels do not take; this is causal without.
    transformers.AttentionInterface.register("causal", sdpa_attention_forward)
    common = {"vocab_size": s["vocab"], "use_cache": False, "attn_implementation": "causal", "bos_token_id": None,
              "eos_token_id": None}  # fmt: skip
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_positions=s["seq"], n_embd=s["hidden"], n_layer=s["layers"], n_head=s["heads"], resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, **common,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            hidden_size=s["hidden"], intermediate_size=s["mlp"], num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"], max_position_embeddings=s["seq"],
            tie_word_embeddings=False, **common,
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    if more == "bf16":
        model = model.to(torch.bfloat16)
    if remat == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adamw = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=cuda)
    given = torch.from_numpy(tokens(s)).long().to(device)
    parts = s["rows"] // micro

    def loss_of(given):
        logits = model(input_ids=given[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), given[:, 1:].flatten()) / parts

    if more != "eager":
        loss_of = torch.compile(loss_of, mode=None if more in ("", "bf16") else more)

    def steps(count: int) -> float:
        fast = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]) if cuda else None
        with fast or contextlib.nullcontext():
            for _ in range(count):
                adamw.zero_grad(set_to_none=True)
                total = 0.0
                for part in given.split(micro):
                    with torch.autocast(device, torch.bfloat16, enabled=more != "bf16"):
                        loss = loss_of(part)
                    loss.backward()
                    total += loss.detach()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                adamw.step()
        if cuda:
            torch.cuda.synchronize()
        return float(total)

    def facts() -> dict[str, Any]:
        return {"device": torch.cuda.get_device_name() if cuda else "cpu",
                "memory": torch.cuda.max_memory_allocated() if cuda else None,
                "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip

    return steps, facts


def worker(a: argparse.Namespace) -> None:
    """Says in one line what it measured, or why it did not."""
    # Only the answer goes to the parent: libraries print as well.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if a.worker == "attention":
        return print(json.dumps(attention(a)), file=out, flush=True)
    side, name, setting, *traced = a.worker.split(" ")
    micro, remat, more = [*setting.split(":"), "", ""][:3]
    began = time.perf_counter()
    try:
        steps, facts = (jaxup_steps if side == "jaxup" else torch_steps)(a, name, int(micro), remat or "none", more)
        losses = [steps(1), steps(2)]
        warm, times = time.perf_counter() - began, []
        for _ in range(a.windows):
            began = time.perf_counter()
            losses.append(steps(a.steps))
            times.append((time.perf_counter() - began) / a.steps)
        said = facts() | {"times": times, "losses": losses, "warm": warm}
        program = said.pop("program", "")
        if traced:
            profile(a.profile, steps, program)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        lacking = re.search("out of memory|RESOURCE_EXHAUSTED", text, re.IGNORECASE)
        said = {"refused": "does not fit" if lacking else text[:600]}
    print(json.dumps(said), file=out, flush=True)


def attention(a: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one layer's attention, forward and backward, and its temporaries, for packed rows."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxup.model.attention import attention

    B, S, N, K, H = (1, 256, 4, 2, 16) if a.quick else (4, a.seq or 4096, 32, 8, 128)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(key, (B, S, n, H), jnp.bfloat16) for key, n in zip(keys, (N, K, K, N)))
    borders = np.random.default_rng(0).random((B, S)) < 1 / 300
    ids = np.cumsum(borders, axis=1, dtype=np.int32)

    def offsets(q, k, v, ids):
        """The kernel's own packing, through what JAX has for itself; heads as many as it counts right."""
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        most = int(ids.max()) + 1
        starts = np.full((B, most + 1), -1, np.int32)
        lengths = np.full((B, most), -1, np.int32)
        for row, each in enumerate(np.asarray(ids)):
            count = np.bincount(each)
            lengths[row, : len(count)] = count
            starts[row, : len(count) + 1] = np.cumsum([0, *count])
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        return dot_product_attention(
            q, k, v, q_seqlen=jnp.asarray(lengths), kv_seqlen=jnp.asarray(lengths), q_offsets=jnp.asarray(starts),
            kv_offsets=jnp.asarray(starts), mask_type=MaskType.PADDING_CAUSAL,
        )  # fmt: skip

    ours = lambda name, ids: lambda q, k, v: attention(q, k, v, segment_ids=ids, implementation=name)  # noqa: E731
    found, reference = {}, None
    for name, function in {
        "blocked, packed": ours("blocked", ids), "cudnn, packed": ours("cudnn", ids),
        "cudnn by offsets": lambda q, k, v: offsets(q, k, v, ids), "cudnn, not packed": ours("cudnn", None),
        "xla, packed": ours("xla", ids),
    }.items():  # fmt: skip
        try:
            total = lambda q, k, v, function=function: jnp.vdot(function(q, k, v), weights).astype(jnp.float32)  # noqa: E731
            step = jax.jit(jax.grad(total, (0, 1, 2))).lower(q * H**-0.5, k, v).compile()
            grads = jax.block_until_ready(step(q * H**-0.5, k, v))
            began = time.perf_counter()
            for _ in range(10):
                out = step(q * H**-0.5, k, v)
            jax.block_until_ready(out)
            spent = (time.perf_counter() - began) * 100
            reference = reference or grads
            off = [float(jnp.linalg.norm((x - y).astype(jnp.float32)) / jnp.linalg.norm(y.astype(jnp.float32)))
                   for x, y in zip(grads, reference)]  # fmt: skip
            memory = step.memory_analysis().temp_size_in_bytes / 2**20
            found[name] = f"{spent:.2f} ms, {memory:,.0f} MiB, gradients {max(off):.1e} from the first"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


# ---- where the time goes


def profile(directory: Path, steps: Steps, program: str) -> None:
    """Writes a trace of two steps, and `kernels.txt`: what they spent their time on."""
    import jax

    with jax.profiler.trace(str(directory)):
        steps(2)
    newest = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(newest)).planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    lines = [line for plane in gpus or planes for line in plane.lines if not gpus or line.name.startswith("Stream")]
    events = [
        (event.name, dict(event.stats).get("hlo_op", ""), event.start_ns, event.duration_ns)
        for line in lines for event in line.events
    ]  # fmt: skip
    if not gpus:  # of a CPU only what says which operation it is
        events = [event for event in events if event[1]]
    named = re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = .*op_name=\"([^\"]+)\"", program, re.MULTILINE)
    (directory / "kernels.txt").write_text(table(events, dict(named), 2))


KINDS = {  # of a kernel, by what its name or that of its operation has
    "attention": "fmha|sdpa|flash|attention", "product": "gemm|nvjet|cutlass|xmma|cublas|dot",
    "copy": "memcpy|copy|transpose", "reduction": "reduce", "memset": "memset",
}  # fmt: skip


def table(events: Iterable[tuple[str, str, float, float]], named: dict[str, str], steps: int, rows: int = 40) -> str:
    """Milliseconds a step: of each kind of kernel, and of the costliest ones with what of the model they compute.

    `events` are (kernel, its operation, start, duration in ns); `named` is what an operation comes from. What differs
    in a number alone, as the same operation of each layer does, is one line.
    """
    kinds, each, busy, end = collections.Counter(), {}, 0.0, 0.0
    events = sorted(events, key=lambda event: event[2])
    for kernel, op, start, duration in events:
        kind = next((k for k, words in KINDS.items() if re.search(words, f"{kernel} {op}", re.IGNORECASE)), "fusion")
        kinds[kind] += duration
        source = "/".join(named.get(op, "").split("/")[-5:])
        name = re.sub(r"[._]\d+$", "", kernel)[:60]
        entry = each.setdefault((name, re.sub(r"[._]\d+$", "", op), source), [0, 0.0, kind])
        entry[0], entry[1] = entry[0] + 1, entry[1] + duration
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    whole = end - events[0][2] if events else 0.0
    scale = 1e-6 / steps
    out = [f"a step: {whole * scale:.1f} ms, of which {busy * scale:.1f} ms something runs\n"]
    out += [f"{kind:10} {t * scale:9.2f} ms {t / whole:6.1%}" for kind, t in kinds.most_common()]
    out.append("\n       ms   share  calls  kind       operation: kernel: from")
    for (kernel, op, source), (count, t, kind) in sorted(each.items(), key=lambda item: -item[1][1])[:rows]:
        out.append(f"{t * scale:9.2f} {t / whole:7.1%} {count / steps:6g}  {kind:10} {op}: {kernel}: {source[-110:]}")
    return "\n".join(out) + "\n"


# ---- the parent


def measure(a: argparse.Namespace, side: str, name: str, setting: str, *, traced: bool = False) -> dict[str, Any]:
    """What a process of its own says; also printed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", f"{side} {name} {setting}" + " traced" * traced]
    # In a graph of CUDA's, kernels have no names.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer=" * traced
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=a.timeout,
                env=os.environ | {"XLA_FLAGS": flags.strip()},
            )  # fmt: skip
            said = json.loads(done.stdout) if done.stdout else {"refused": f"ended with {done.returncode}"}
        except subprocess.TimeoutExpired:
            said = {"refused": f"took more than {a.timeout:.0f} s"}
        if "refused" in said and said["refused"] != "does not fit":
            log.seek(0)
            said["refused"] += "\n" + log.read()[-1500:]
    line = f"{name} {side:5} {setting:16}"
    if "refused" in said:
        print(f"{line} {said['refused']}", flush=True)
        return said
    s = shape(a, name)
    said["rate"] = s["rows"] * s["seq"] / statistics.median(said["times"])
    losses = ", ".join(f"{loss:.3f}" for loss in said["losses"])
    print(
        f"{line} {figures(a, name, said)}; loss {losses}; "
        f"ready after {said['warm']:.0f} s, ended after {time.perf_counter() - began:.0f} s", flush=True,
    )  # fmt: skip
    return said


def figures(a: argparse.Namespace, name: str, said: dict[str, Any]) -> str:
    from jaxup.model.spec import flops_per_token

    a.device = said.get("peak") or a.device
    s = shape(a, name)
    flops = said["rate"] * flops_per_token(model_config(name, s), s["seq"])
    mfu = f" (MFU {flops / a.device:.1%})" if a.device else ""
    memory = f", {said['memory'] / 2**30:.1f} GiB" if said["memory"] else ""
    return f"{said['rate']:>9,.0f} tokens/s, {flops / 1e12:.3g} TFLOP/s{mfu}{memory}"


def compare(a: argparse.Namespace, name: str) -> None:
    from jaxup.model.spec import count_params

    s, model = shape(a, name), model_config(name, shape(a, name))
    print(
        f"\n## {name}: {model.num_layers} layers, hidden {model.hidden_size}, {count_params(model):,} parameters; "
        f"{s['rows']} x {s['seq']} tokens a step\n", flush=True,
    )  # fmt: skip
    turns: list[tuple[str, str]] = []
    each = [[(side, setting) for setting in s[side].split(",") if setting] for side in ("jaxup", "torch")]
    for index in range(max(map(len, each))):
        turns += [side[index] for side in each if index < len(side)]
    best: dict[str, tuple[float, str]] = {}
    for side, setting in turns:
        said = measure(a, side, name, setting)
        if "refused" in said:
            continue
        if said["parameters"] != count_params(model):
            raise SystemExit(f"{side} has {said['parameters']:,} parameters: another model")
        if not setting.endswith("bf16"):
            best[side] = max(best.get(side, (0.0, "")), (said["rate"], setting))
    rates: dict[str, list[float]] = {side: [] for side in best}
    print(flush=True)
    for _ in range(a.rounds if len(best) > 1 else 0):
        for side in rates:
            rates[side].append(measure(a, side, name, best[side][1]).get("rate", 0.0))
    if not a.rounds:
        rates = {side: [rate] for side, (rate, _) in best.items()}
    if all(rates.values()) and len(rates) > 1:
        ours, theirs = (statistics.median(rates[side]) for side in ("jaxup", "torch"))
        spread = ", ".join(f"{x / y:.3f}" for x, y in zip(rates["jaxup"], rates["torch"], strict=True) if y)
        print(f"\n{name}: jaxup / torch.compile: {ours / theirs:.2f} (rounds: {spread})", flush=True)
    if a.profile and "jaxup" in best:
        measure(a, "jaxup", name, best["jaxup"][1], traced=True)
        print((a.profile / "kernels.txt").read_text(), flush=True)


def main() -> None:
    a = arguments()
    if a.worker:
        return worker(a)
    # A process has the whole GPU. Each program is compiled once: the second time it is read.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if not a.quick:
        os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    print(f"{machine()}, {len(os.sched_getaffinity(0))} cores; {versions()}")
    with tempfile.TemporaryDirectory(prefix="jaxup-gpu-") as scratch:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/jax")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{scratch}/torch")
        for name in a.models.split(","):
            if name in SHAPES:
                compare(a, name)
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=a.timeout, check=True)
            print(
                "\n".join(f"attention, {key:18} {value}" for key, value in json.loads(done.stdout).items()), flush=True
            )


if __name__ == "__main__":
    main()
