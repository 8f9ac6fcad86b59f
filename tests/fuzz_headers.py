"""Feeds malformed safetensors files to the reader: `python tests/fuzz_headers.py 5000`.

Every file must be refused in one line, or hold exactly what the untouched file holds; none may take
a second or 200 MB. Prints the counts.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.numpy

from jaxup.errors import UserError
from jaxup.files.header import read_header
from jaxup.files.storage import Local

FILE = "model.safetensors"
VALUES = [-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 1.5, 1e400, None, True, "", "F32", [], {}, [0, 0], [2**62] * 3]


def mutate(rng: random.Random, header: dict, data: bytes) -> bytes:
    """A file that is wrong in one to three ways, most of them subtle."""
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([key for key in header if key != "__metadata__"] or ["x"])
        entry = header.get(name)
        kind = rng.randrange(9)
        if kind == 0 and isinstance(entry, dict):
            entry[rng.choice(["dtype", "shape", "data_offsets", "extra"])] = rng.choice(VALUES)
        elif kind == 1 and isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            entry["data_offsets"] = [o + rng.choice([-4, -1, 1, 4]) for o in entry["data_offsets"] if type(o) is int]
        elif kind == 2 and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
            entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][1:], [0]])
        elif kind == 3:
            header[name + rng.choice(["", "\0", "x" * 1000, "\ud800"])] = entry
        elif kind == 4:
            header.pop(name, None)
        elif kind == 5:
            header["__metadata__"] = rng.choice([*VALUES, {"format": 3}])
        elif kind == 6:
            data = rng.choice([data[:-1], data + b"\0", b"", data * 2])
        elif kind == 7 and isinstance(entry, dict):  # another tensor's bytes
            header["alias"] = dict(entry)
    text = json.dumps(header).encode()
    length = len(text)
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        position = rng.randrange(len(text))
        text = text[:position] + bytes([rng.choice(b'{}[]",:0 \xff\0')]) + text[position + rng.randint(0, 1) :]
    if rng.random() < 0.15:
        length = rng.choice([0, 1, length + 1, length - 1, 2**31, 2**63, 2**64 - 1])
    else:
        length = len(text)
    return length.to_bytes(8, "little") + text + data


def monsters() -> list[bytes]:
    """Files made to be slow or large."""
    flat = b",".join(b'"%d":{"dtype":"U8","shape":[],"data_offsets":[0,0]}' % i for i in range(60_000))
    empty = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(60_000))
    texts = [
        b"{" + flat + b"}", b"{" + empty + b"}", b"[" * 2**21, b'{"a":' * 2**19, b'{"a":' + b"9" * 2**21 + b"}",
        b'{"' + b"k" * 2**21 + b'":0}', b'{"a":"' + b"\\ud800" * 2**18 + b'"}', b" " * 2**21,
        b"{" + b" " * 2**21 + b"}",
        b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(200_000)) + b"}}",
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 2**20 + b'1],"data_offsets":[0,4]}}\0\0\0\0',
    ]  # fmt: skip
    return [len(text).to_bytes(8, "little") + text for text in texts]


def main(count: int) -> Counter:
    rng, results, slowest = random.Random(0), Counter(), 0.0
    tensors = {
        "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16),
        "c": np.arange(4, dtype=np.int64), "scalar": np.array(2.0, np.float32),
    }  # fmt: skip
    original = safetensors.numpy.save(tensors)
    end = 8 + int.from_bytes(original[:8], "little")
    with tempfile.TemporaryDirectory() as directory:
        storage = Local(directory)
        path = Path(directory, FILE)
        path.write_bytes(original)
        truth = read_header(storage, FILE)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        files = monsters() + [None] * count
        for content in files:
            if content is None:
                content = mutate(rng, json.loads(original[8:end]), original[end:])
            path.write_bytes(content)
            began, found, message = time.process_time(), {}, ""
            try:
                found = read_header(storage, FILE)
            except UserError as error:
                message = str(error)
            slowest = max(slowest, time.process_time() - began)
            assert slowest < 1, (slowest, content[:200])
            if message:
                assert len(message.splitlines()) == 1, message
                assert len(message) < 1000, message
                results["refused"] += 1
                continue
            # Accepted: then the official reader must agree on every byte.
            theirs = safetensors.numpy.load(content)
            assert found.keys() == theirs.keys()
            for name, info in found.items():
                assert theirs[name].tobytes() == content[info.offset : info.offset + theirs[name].nbytes], name
                assert tuple(info.shape) == theirs[name].shape, name
            results["unchanged" if found == truth else "well-formed"] += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, grown
    print(f"{len(files)} files: {dict(results)}; slowest {slowest:.2f} s, memory {grown:.0f} MB")
    return results


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
