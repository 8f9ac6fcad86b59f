"""Building a model from a recipe: jaxup against mergekit and a plain copy of the same files.

    python benchmarks/build.py                                  # in a temporary directory
    python benchmarks/build.py --scratch /mnt/disk --mergekit /path/to/mergekit-yaml

The model is a LLaMA of 24 layers, 2.9 GB in bfloat16, of random values; the recipe is layers 0-17,
twice layers 8-17 with o_proj and down_proj zeroed, and layers 18-23: 44 layers, 5.1 GB. Contestants
take turns for `--rounds`, each in a process of its own, start-up included, with the source in the
page cache; figures are medians. The copy is a loop of read and write through one buffer, over the
files that `jaxup --no-sparse` has built: what has to be done at least. jaxup flushes what it writes
to the disk before it names it, and hashes it. So all are timed twice: until the process ends, in
which jaxup does not flush, and with what it takes until all is on the disk.
Before each, another process touches more memory than a contestant will use: a virtual machine may
take seconds to be given memory that it has not used for a while.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLICE = """  - sources:
    - model: {model}
      layer_range: [{0}, {1}]
"""
ZEROED = """      parameters:
        scale:
        - {filter: o_proj, value: 0.0}
        - {filter: down_proj, value: 0.0}
        - value: 1.0
"""


def make(directory: Path, layers: int) -> None:
    """A model in shards of 1 GB; its values are pieces of one block of random ones, none above 2."""
    from jaxup.families import config_from_hf, family_of_hf
    from jaxup.families.layouts import expected_tensors
    from jaxup.files import shards
    from jaxup.model.spec import spec

    hf = {**LLAMA, "num_hidden_layers": layers}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf))
    table = spec(config_from_hf(hf))
    tensors = expected_tensors(family_of_hf(hf).rows(table), table)
    stored = [shards.Stored(tensor, shards.DTYPES["bfloat16"]) for tensor in tensors]
    files = shards.split(stored, 10**9)
    (directory / "model.safetensors.index.json").write_bytes(shards.index(files))
    rng = np.random.default_rng(0)
    block = rng.integers(0, 2**16, 2**27, np.uint16) & np.uint16(0xBFFF)
    for file, held in files.items():
        with open(directory / file, "wb") as opened:
            opened.write(shards.header(held))
            for tensor in held:
                count = tensor.nbytes // 2
                start = int(rng.integers(0, block.size - count))
                opened.write(block[start : start + count])


def recipe(model: Path, layers: int) -> str:
    third, last = layers // 3, 3 * layers // 4
    parts = [(0, last, ""), (third, last, ZEROED), (third, last, ZEROED), (last, layers, "")]
    slices = "".join(SLICE.format(a, b, model=model) + more for a, b, more in parts)
    return f"slices:\n{slices}merge_method: passthrough\n"


def plain_copy(source: str, out: str) -> None:
    os.mkdir(out)
    buffer = memoryview(bytearray(2**20))
    for name in sorted(os.listdir(source)):
        with open(f"{source}/{name}", "rb", buffering=0) as a, open(f"{out}/{name}", "wb", buffering=0) as b:
            while count := a.readinto(buffer):
                b.write(buffer[:count])


def worker(kind: str, *args: str) -> None:
    if kind == "copy":
        plain_copy(*args)
    elif kind == "compare":
        print(len(differing(*map(Path, args))))
    elif kind == "make":
        make(Path(args[0]), int(args[1]))
    else:
        if kind == "unflushed":
            os.fsync = lambda fd: None
        from jaxup import build

        build.main(["build", *args])


def run(command: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak resident bytes of a process, and seconds until all is on the disk."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said.read().decode()[-2000:]}")
    result = {"wall": time.perf_counter() - began}
    os.sync()
    result["synced"] = time.perf_counter() - began
    return result | {"cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}


def ours(kind: str, *args: Any) -> list[str]:
    return [sys.executable, __file__, "--worker", kind, *map(str, args)]


def touch(size: int) -> None:
    code = f"import numpy; numpy.empty({size}, 'uint8').fill(1)"
    subprocess.run([sys.executable, "-c", code], check=True)


def warm(directory: Path) -> None:
    buffer = memoryview(bytearray(2**24))
    for path in directory.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def differing(a: Path, b: Path) -> list[str]:
    """Tensors that are not in both, or not equal; -0.0 and 0.0 are."""
    import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)
    from safetensors import safe_open

    def tensors(directory: Path) -> dict[str, Path]:
        found = {}
        for path in directory.glob("*.safetensors"):
            with safe_open(path, "np") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    ours, theirs = tensors(a), tensors(b)
    different = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        with safe_open(ours[name], "np") as x, safe_open(theirs[name], "np") as y:
            if not np.array_equal(x.get_tensor(name), y.get_tensor(name)):
                different.append(name)
    return different


def size_of(directory: Path) -> tuple[int, int]:
    """Bytes of the files, and bytes that they take on the disk."""
    found = [path.stat() for path in directory.iterdir()]
    return sum(s.st_size for s in found), sum(512 * s.st_blocks for s in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", help="where the files are made (default: a temporary directory)")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), metavar="PATH", help="mergekit-yaml")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(*a.worker)
        return
    if a.scratch:
        Path(a.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="jaxup-build-", dir=a.scratch) as scratch:
        compare(Path(scratch), a)


def compare(root: Path, a: argparse.Namespace) -> None:
    model, dense, out, file = root / "model", root / "dense", root / "out", root / "recipe.yml"
    run(ours("make", model, a.layers))
    file.write_text(recipe(model, a.layers))
    run(ours("flushed", file, dense, "--no-sparse"))
    size, _ = size_of(dense)
    contestants = {
        "copy": ours("copy", dense, out),
        "jaxup --no-sparse": ours("flushed", file, out, "--no-sparse"),
        "jaxup --no-sparse, not flushed": ours("unflushed", file, out, "--no-sparse"),
        "jaxup": ours("flushed", file, out),
        "jaxup, not flushed": ours("unflushed", file, out),
    }
    if a.mergekit:
        contestants["mergekit"] = [a.mergekit, str(file), str(out)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    space, different = {}, {}
    for turn in range(a.rounds):
        for name, command in contestants.items():
            warm(dense if name == "copy" else model)
            touch(int(1.3 * size))
            found[name].append(run(command))
            if turn == 0:
                space[name] = size_of(out)[1]
                # In a process of its own: what this one has touched would be counted as its children's memory.
                said = subprocess.run(ours("compare", out, dense), check=True, capture_output=True, text=True)
                different[name] = int(said.stdout)
            shutil.rmtree(out)
    median = {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]} for name, results in found.items()
    }
    copy = median["copy"]
    print(f"result: {size / 1e9:.2f} GB, {a.rounds} rounds, {os.cpu_count()} cores\n")
    print(
        "| | wall, s | on disk, s | CPU, s | peak MB | GB on disk | wall / copy | on disk / copy | differing tensors |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, m in median.items():
        print(
            f"| {name} | {m['wall']:.2f} | {m['synced']:.2f} | {m['cpu']:.2f} | {m['memory'] / 1e6:.0f} "
            f"| {space[name] / 1e9:.2f} | {m['wall'] / copy['wall']:.2f} | {m['synced'] / copy['synced']:.2f} "
            f"| {different[name]} |"
        )
    shutil.rmtree(model)
    shutil.rmtree(dense)
    run(ours("make", model, 2 * a.layers))
    file.write_text(recipe(model, 2 * a.layers))
    twice = run(ours("flushed", file, out))
    print(f"\njaxup, a model of twice the layers: {size_of(out)[0] / 1e9:.2f} GB, peak {twice['memory'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
