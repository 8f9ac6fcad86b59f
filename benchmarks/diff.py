"""Comparing two models: jaxup against the usual script and against reading their bytes once.

    python benchmarks/diff.py                         # two models of 3 GiB in a temporary directory
    python benchmarks/diff.py --gib 0.5 --scratch /mnt/disk

The models are LLaMAs of random values in bfloat16, the second the first with a change of 1%. Contestants take turns
for `--rounds`, each in a process of its own, start-up included; figures are medians. "read" is a loop of read through
one buffer over all files of both models: what has to be done at least. "torch" is the usual script: both models loaded
by safetensors as dictionaries of tensors, and a loop over their names that takes the same metrics in float32. The
files are in the page cache; with --cold they are dropped from it before each turn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def make(directories: list[Path], gib: float) -> None:
    """Two models side by side, in shards of 1 GB; their values are pieces of one block of random ones."""
    from jaxup.families import config_from_hf, family_of_hf
    from jaxup.families.layouts import expected_tensors
    from jaxup.files import shards
    from jaxup.model.spec import count_params, spec

    sizes = [2 * count_params(config_from_hf({**LLAMA, "num_hidden_layers": layers})) for layers in (1, 2)]
    layers = max(1, round((gib * 2**30 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    hf = {**LLAMA, "num_hidden_layers": layers}
    table = spec(config_from_hf(hf))
    tensors = expected_tensors(family_of_hf(hf).rows(table), table)
    stored = [shards.Stored(tensor, shards.DTYPES["bfloat16"]) for tensor in tensors]
    rng = np.random.default_rng(0)
    before = rng.standard_normal(2**26, np.float32) * np.float32(0.02)
    after = before + rng.standard_normal(2**26, np.float32) * np.float32(0.0002)
    for directory, values in zip(directories, (before, after), strict=True):
        block, draw = values.astype(shards.DTYPES["bfloat16"]).view(np.uint16), np.random.default_rng(1)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(hf))
        files = shards.split(stored, 10**9)
        (directory / "model.safetensors.index.json").write_bytes(shards.index(files))
        for file, held in files.items():
            with open(directory / file, "wb") as opened:
                opened.write(shards.header(held))
                for tensor in held:
                    left = tensor.nbytes // 2
                    while left:
                        count = min(left, block.size // 2)
                        start = int(draw.integers(0, block.size - count))
                        opened.write(block[start : start + count])
                        left -= count


def read(*models: str) -> None:
    buffer = memoryview(bytearray(2**23))
    for model in models:
        for path in sorted(Path(model).glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def usual(*models: str) -> None:
    import torch
    from safetensors.torch import load_file

    def load(model: str) -> dict[str, torch.Tensor]:
        return {k: v for path in sorted(Path(model).glob("*.safetensors")) for k, v in load_file(path).items()}

    a, b = map(load, models)
    found = {}
    for name in a:
        x, y = a[name].float(), b[name].float()
        d = y - x
        cosine = 1 - torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)
        found[name] = [
            d.abs().mean(), d.norm() / x.norm(), d.square().mean().sqrt(), cosine, d.abs().max(),
            (d != 0).float().mean(),
        ]  # fmt: skip
    print(len(found))


def worker(kind: str, *args: str) -> None:
    if kind == "read":
        read(*args)
    elif kind == "torch":
        usual(*args)
    else:
        importlib.import_module("jaxup.diff").main(["diff", *args])


def run(kind: str, models: list[Path]) -> dict[str, float]:
    """Seconds, CPU seconds and peak resident bytes of a process."""
    command = [sys.executable, __file__, "--worker", kind, *map(str, models)]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{kind} ended with {process.returncode}: {said.read().decode()[-2000:]}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}


def drop(models: list[Path]) -> None:
    """Their files from the page cache."""
    for path in (path for model in models for path in model.glob("*.safetensors")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", help="where the models are made (default: a temporary directory)")
    parser.add_argument("--gib", type=float, default=3.0, help="of each model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(*a.worker)
        return
    with tempfile.TemporaryDirectory(prefix="jaxup-diff-", dir=a.scratch) as scratch:
        models = [Path(scratch, name) for name in ("before", "after")]
        # In a process of its own: what this one has touched would be counted as its children's memory.
        subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import "
                        f"diff, pathlib; diff.make([pathlib.Path(p) for p in {list(map(str, models))!r}], {a.gib})"],
                       check=True)  # fmt: skip
        size = sum(path.stat().st_size for model in models for path in model.iterdir())
        found: dict[str, list[dict[str, float]]] = {"read": [], "jaxup diff": [], "torch": []}
        for _ in range(a.rounds):
            for name, results in found.items():
                if a.cold:
                    drop(models)
                results.append(run(name.split()[0], models))
    median = {name: {key: statistics.median(r[key] for r in all) for key in all[0]} for name, all in found.items()}
    least = median["read"]
    print(f"two models, together {size / 1e9:.2f} GB, {a.rounds} rounds, {os.cpu_count()} cores, "
          f"{'from the disk' if a.cold else 'in the page cache'}\n")  # fmt: skip
    print("| | wall, s | CPU, s | peak MB | wall / read | peak / jaxup |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, m in median.items():
        wall, memory = m["wall"] / least["wall"], m["memory"] / median["jaxup diff"]["memory"]
        print(f"| {name} | {m['wall']:.2f} | {m['cpu']:.2f} | {m['memory'] / 1e6:.0f} | {wall:.2f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
