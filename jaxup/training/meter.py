"""What a step reports: taken note of, and refused where it is not finite."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxup.data.batches import Batches
from jaxup.errors import NonFinite
from jaxup.training.corrections import RATE, SKIP
from jaxup.training.metrics import MetricsLog, peak_flops


class Meter:
    """Reads a step's metrics, logs them, and measures speed between evaluations and saves.

    Args:
      interval: steps between two lines of the log.
      batch_tokens: of a step, in all processes; without padding, of which no speed is made.
      flops_per_token: of the whole step; None where nobody can say.
      said: what each line says besides.
    """

    def __init__(
        self, log: MetricsLog, name: str, *, steps: int, interval: int, batch_tokens: int, val_rows: int,
        flops_per_token: float | None, **said: Any,
    ):  # fmt: skip
        self._said = said
        self._log_file, self._name, self._steps, self._interval = log, name, steps, interval
        self._batch_tokens, self._val_rows = batch_tokens, val_rows
        self._flops_per_token, self._peak = flops_per_token, peak_flops()
        self.checked = 0  # the last step that was read
        self.detail, self._validation = "", ""
        self.restart()

    def restart(self) -> None:
        self._since, self._tokens = time.monotonic(), 0

    def check(self, pending: tuple[int, dict[str, jax.Array] | None] | None, batches: Batches) -> None:
        """Waits for that step and takes note of it; raises if it was not finite."""
        if pending is None or pending[0] <= self.checked:
            return
        step, metrics = pending[0], jax.device_get(pending[1])
        self.checked = step
        if metrics is None:
            self._write(step, skipped=True)
            return
        if metrics["halted"]:
            # The guarded step kept the state it was given.
            raise NonFinite(self._refusal(step, metrics, batches.rows_of(step - 1)), step - 1)
        self._tokens += self._batch_tokens
        skipped = bool(metrics.get("skipped", False))
        if step % self._interval == 0 or step in (1, self._steps) or skipped:
            self._log(step, metrics, **({"skipped": True} if skipped else {}))

    def _refusal(self, step: int, metrics: dict[str, Any], rows: np.ndarray) -> str:
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        what = f"loss {loss} and gradient norm {norm} are not finite"
        if np.isfinite(loss) and np.isfinite(norm):
            rate = metrics["learning_rate"]
            what = f"the update is not finite (loss {loss}, gradient norm {norm}, learning rate {rate:g})"
        shown = ", ".join(map(str, rows[:8])) + ", ..." * (len(rows) > 8)
        saved = f" and step {step - 1} is saved" if step > 1 else ""
        return (
            f"{self._name}: step {step}: {what}; the update was not made{saved} "
            f"(rows {shown}); to go on, resume with {SKIP}={step}, which leaves this batch out, or with "
            f"{RATE}={step}:RATE, another learning rate from there on"
        )

    def _log(self, step: int, metrics: dict[str, Any], **more: Any) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = self._tokens / seconds
        flops = None if self._flops_per_token is None else rate * self._flops_per_token / jax.device_count()
        self.detail = f"loss {metrics['loss']:.3f}{self._validation} {rate:,.0f} tokens/s"
        self.restart()
        self._write(
            step,
            loss=float(metrics["loss"]),
            gradient_norm=float(metrics["gradient_norm"]),
            gradient_norm_layers=[float(f"{n:.5g}") for n in metrics["gradient_norm_layers"]],
            learning_rate=float(metrics["learning_rate"]),
            tokens_per_second=round(rate, 1),
            loss_tokens=int(metrics["loss_tokens"]),
            **{key: metrics[key].item() for key in ("gradient_square_micro", "micro_rows") if key in metrics},
            **{f"loss_{name}": float(mean) for name, mean in metrics.get("means", {}).items()},
            tflops_per_device=None if flops is None else float(f"{flops / 1e12:.4g}"),
            mfu=None if flops is None or self._peak is None else float(f"{flops / self._peak:.4g}"),
            **more,
        )

    def log_validation(self, step: int, loss: float, means: Mapping[str, float], ema: float) -> None:
        """`means`: what the loss is made of, if it is of several. `ema`: the decay of what was evaluated, or 0."""
        self._validation = f" val {loss:.3f}"
        named = {f"val_{name}": value for name, value in means.items()}
        self._write(step, val_loss=loss, val_rows=self._val_rows, **named, **({"ema": ema} if ema else {}))

    def _write(self, step: int, **values: Any) -> None:
        if jax.process_index() == 0:
            self._log_file.write(self._name, step, **self._said, **values)
