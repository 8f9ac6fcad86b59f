"""`metrics.jsonl`, and the peak speed that MFU is a share of."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax

from jaxup.errors import UserError
from jaxup.text import misfit, parse_json, remote, write_atomically
from jaxup.training.trackers import Trackers

# Dense bf16 FLOP/s of one device as JAX counts devices, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


def peak_flops() -> float | None:
    """Of one device here, or None where no data sheet says (a CPU): then there is no MFU to report."""
    kind = jax.devices()[0].device_kind
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


_WAIT = 60.0  # seconds that lines may wait to be written into a bucket


class MetricsLog:
    """Appends one JSON object a line; every line has `model` and `step`.

    Steps that a killed run logged after its last checkpoint are taken again, so `rewind` drops
    their lines first: the file is always that of an uninterrupted run, in order.

    In a bucket nothing can be appended. There lines wait for `flush`, which writes the file anew: before each
    checkpoint, whose steps are not taken again, and every `_WAIT` seconds. Trackers are told what is in the file.
    """

    def __init__(self, path: Path, trackers: tuple[str, ...] = (), config: dict[str, Any] | None = None):
        self._path, self._late, self._flushed = path, list[dict[str, Any]](), time.monotonic()
        self._trackers = Trackers(trackers, path.parent, config or {})

    def read(self) -> list[dict[str, Any]]:
        self.flush()
        # What follows the last line end is torn: it was written when the run was killed.
        *lines, _ = self._path.read_bytes().split(b"\n") if self._path.is_file() else [b""]
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = parse_json(line, "damaged", constants=True)
                if wrong := misfit(record, {"model": str, "step": int}):
                    raise UserError(f"damaged: {wrong}")
            except UserError as error:
                hint = "delete the line to go on: the curve has no point there then"
                raise UserError(error.what, at=f"{self._path}:{number}", hint=hint) from None
            records.append(record)
        return records

    def rewind(self, model: str, step: int, **what: Any) -> None:
        """Begins to log `model` after `step`: forgets what was logged of it after that, of lines that say `what`."""
        records = self.read()
        again = [r["step"] > step and r == {**r, "model": model, **what} for r in records]
        kept = [r for r, taken_again in zip(records, again) if not taken_again]
        of_model = [r for r in kept if r["model"] == model]
        self._trackers.begin(model, of_model, list(itertools.compress(records, again)))
        if self._path.exists():
            write_atomically(self._path, "".join(json.dumps(r) + "\n" for r in kept))

    def write(self, model: str, step: int, **values: Any) -> None:
        self._late.append({"model": model, "step": step, **values})
        if not remote(self._path) or time.monotonic() - self._flushed > _WAIT:
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        late, self._late, self._flushed = self._late, [], time.monotonic()
        if not late:
            return
        lines = "".join(json.dumps(record) + "\n" for record in late)
        if remote(self._path):
            there = self._path.read_bytes() if self._path.is_file() else b""
            self._path.write_bytes(there + lines.encode())
        else:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(lines)
        for record in late:
            self._trackers.tell(record)

    def close(self) -> None:
        """Ends what trackers have open. What waits to be written is of steps that will be taken again."""
        self._trackers.close()
