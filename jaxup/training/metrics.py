"""`metrics.jsonl`, optional trackers, and the peak speed that MFU is a share of."""

from __future__ import annotations

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxup.errors import UserError, suggest
from jaxup.text import misfit, parse_json, remote, write_atomically

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
    checkpoint, whose steps are not taken again, and every `_WAIT` seconds.
    """

    def __init__(self, path: Path, trackers: tuple[str, ...] = (), *, name: str = "", config: dict | None = None):
        self._path, self._late, self._flushed = path, "", time.monotonic()
        self._trackers = [_TRACKERS[t](path.parent, name, config or {}) for t in trackers]

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

    def rewind(self, model: str, step: int) -> None:
        """Forgets what was logged of `model` after `step`."""
        kept = [r for r in self.read() if r["model"] != model or r["step"] <= step]
        if self._path.exists():
            write_atomically(self._path, "".join(json.dumps(r) + "\n" for r in kept))

    def write(self, model: str, step: int, **values: Any) -> None:
        self._late += json.dumps({"model": model, "step": step, **values}) + "\n"
        if not remote(self._path) or time.monotonic() - self._flushed > _WAIT:
            self.flush()
        for track in self._trackers:
            track({f"{model}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}, step)

    def flush(self) -> None:
        """Writes what waits."""
        late, self._late, self._flushed = self._late, "", time.monotonic()
        if not late:
            return
        if remote(self._path):
            there = self._path.read_bytes() if self._path.is_file() else b""
            self._path.write_bytes(there + late.encode())
        else:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(late)


def check_trackers(trackers: tuple[str, ...], directory: Path) -> None:
    """UserError for a tracker that is unknown or not installed, or cannot write to `directory`."""
    for name in trackers:
        if name not in _TRACKERS:
            raise UserError(f"log.trackers: unknown {name!r}{suggest(name, _TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f'log.trackers: {name} is not installed; pip install "jaxup[track]"')
        if name == "tensorboard" and remote(directory):
            what = "tensorboard writes to a directory of this machine only"
            raise UserError(what, at="log.trackers", hint="metrics.jsonl has all of it, and wandb may be asked")


Tracker = Callable[[dict[str, float], int], None]  # of values by name, and the step


def _tensorboard(directory: Path, name: str, config: dict) -> Tracker:
    from tensorboard.summary import Writer

    writer = Writer(os.fspath(directory / "tensorboard"))

    def track(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return track


def _wandb(directory: Path, name: str, config: dict) -> Tracker:
    import wandb

    # One run there for each directory here, whatever the names: its id is made once, and kept.
    kept = directory / "wandb_id"
    if not kept.exists():
        write_atomically(kept, uuid.uuid4().hex)
    run = wandb.init(
        project="jaxup",
        name=name,
        dir=None if remote(directory) else directory,
        config=config,
        id=kept.read_text(encoding="utf-8"),
        resume="allow",
    )

    def track(values: dict[str, float], step: int) -> None:
        # Each model of a run has steps of its own, so the step is a value, not W&B's counter.
        run.log({**values, "step": step})

    return track


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
