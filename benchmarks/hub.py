"""Loading and saving a model: jaxup against transformers; and what each process of several reads.

    python benchmarks/hub.py                    # makes a LLaMA of 2.2 GB in bfloat16 in a temporary directory
    python benchmarks/hub.py --scale 0.1        # a tenth of it

Contestants take turns, each time in a process of its own, `--rounds` times; figures are medians.
The files are in the page cache for both. transformers maps a file and returns before it is read:
its load is timed until it returns, and until a byte of every page has been touched, which is when
the weights are in memory, as jaxup's are when it returns. jaxup flushes what it saves to the disk
and transformers does not: saves are timed until the call returns, and with an `os.sync` after it.
Before each, another process touches more memory than a contestant will: a virtual machine may take
seconds to be given memory that it has not used for a while. The plain copy (`numpy.fromfile`, and
writing that to a file) is what a program at least does that does not map the files, as jaxup cannot:
its layers are stacked, and its matrices transposed.
Memory is the largest resident set during the work over what it was before (after imports and a
first small computation), as a ratio to the model's bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS = 32000, 2048, 5632, 22, 32, 4  # TinyLlama 1.1B


def make(path: str, scale: float) -> None:
    """A model written by transformers, in shards of 1 GB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=max(1, round(LAYERS * scale)),
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(path, max_shard_size="1GB")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def time_jaxup(path: str, out: str) -> dict[str, float]:
    import jax

    import jaxup

    jax.jit(lambda x: x + 1)(1.0).block_until_ready()
    before, began = resident(), time.perf_counter()
    model = jaxup.load(path)
    seconds = time.perf_counter() - began
    result = {"load": seconds, "load_memory": peak() - before, "loaded": seconds}
    began = time.perf_counter()
    jaxup.save(model, out)
    result["save"] = time.perf_counter() - began
    os.sync()
    return result | {"saved": time.perf_counter() - began, "save_memory": peak() - before}


def time_transformers(path: str, out: str) -> dict[str, float]:
    import torch
    from transformers import LlamaForCausalLM

    before, began = resident(), time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(path, dtype="auto")
    result = {"load": time.perf_counter() - began}
    for parameter in model.parameters():
        parameter.data.view(-1).view(torch.int16)[::2048].sum()  # an element of every page
    result |= {"loaded": time.perf_counter() - began, "load_memory": peak() - before}
    began = time.perf_counter()
    model.save_pretrained(out)
    result["save"] = time.perf_counter() - began
    os.sync()
    return result | {"saved": time.perf_counter() - began, "save_memory": peak() - before}


def time_copy(path: str, out: str) -> dict[str, float]:
    import numpy as np

    before, began = resident(), time.perf_counter()
    arrays = [np.fromfile(file, np.uint8) for file in sorted(Path(path).glob("*.safetensors"))]
    result = {"load": time.perf_counter() - began, "load_memory": peak() - before}
    result["loaded"] = result["load"]
    os.mkdir(out)
    began = time.perf_counter()
    for i, array in enumerate(arrays):
        array.tofile(f"{out}/{i}")
    result["save"] = time.perf_counter() - began
    os.sync()
    return result | {"saved": time.perf_counter() - began, "save_memory": peak() - before}


def touch(size: int) -> None:
    code = f"import numpy; numpy.empty({size}, 'uint8').fill(1)"
    subprocess.run([sys.executable, "-c", code], check=True)


def count_bytes(path: str) -> dict[str, float]:
    """One of several processes: what it read from files, what it keeps, and what its memory did meanwhile."""
    import jax

    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    )
    from jax.sharding import AxisType

    from jaxup import load

    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    jax.jit(lambda x: x + 1)(1.0).block_until_ready()
    read = lambda: int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])  # noqa: E731
    before, memory = read(), resident()
    model = load(path, mesh=mesh)
    after = read()
    kept = sum(shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
    return {"read": after - before, "kept": kept, "memory": peak() - memory}


def worker(*args: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", *args], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "JAX_PLATFORMS": "cpu", **environment},
    )  # fmt: skip


def finish(process: subprocess.Popen) -> dict[str, float]:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a worker ended with {process.returncode}")
    return json.loads(out.splitlines()[-1])


def run_processes(path: str, processes: int = 2, devices: int = 4) -> list[dict[str, float]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
    }
    running = [worker("bytes", path, "", **environment, JAX_PROCESS_ID=str(rank)) for rank in range(processes)]
    return [finish(process) for process in running]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 22 layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        kind, path, out = a.worker
        call = {"jaxup": time_jaxup, "transformers": time_transformers, "copy": time_copy}.get(kind)
        print(json.dumps(call(path, out) if call else count_bytes(path) if kind == "bytes" else make(path, float(out))))
        return

    with tempfile.TemporaryDirectory(prefix="jaxup-hub-") as root:
        path, out = f"{root}/model", f"{root}/out"
        finish(worker("make", path, str(a.scale)))
        size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        rounds: dict[str, list[dict[str, float]]] = {"jaxup": [], "transformers": [], "copy": []}
        for _ in range(a.rounds):
            for name, results in rounds.items():
                touch(4 * size)
                results.append(finish(worker(name, path, out)))
                shutil.rmtree(out)
        median = {
            name: {key: statistics.median(r[key] for r in results) for key in results[0]}
            for name, results in rounds.items()
        }
        print(f"model: {size / 1e9:.2f} GB, {a.rounds} rounds, {os.cpu_count()} cores\n")
        print("| | jaxup | transformers | plain copy | to transformers | to the copy |\n|---|---:|---:|---:|---:|---:|")
        for key, label, unit in (
            ("load", "load: call returns, s", 1), ("loaded", "load: weights in memory, s", 1),
            ("save", "save: call returns, s", 1), ("saved", "save: and synced, s", 1),
            ("load_memory", "load: peak memory / model", size), ("save_memory", "load and save: peak / model", size),
        ):  # fmt: skip
            ours, theirs, copy = (median[name][key] / unit for name in rounds)
            print(f"| {label} | {ours:.2f} | {theirs:.2f} | {copy:.2f} | {ours / theirs:.2f} | {ours / copy:.2f} |")
        print("\n2 processes x 4 devices, fsdp 8:")
        for rank, r in enumerate(run_processes(path)):
            print(
                f"process {rank}: read {r['read'] / 1e6:.1f} MB for {r['kept'] / 1e6:.1f} MB kept "
                f"({r['read'] / r['kept']:.3f}), peak memory {r['memory'] / r['kept']:.2f} of what it keeps"
            )


if __name__ == "__main__":
    main()
