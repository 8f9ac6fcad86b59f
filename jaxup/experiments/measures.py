"""What a run keeps of each layer of its model, measures.json, and of what its model can do, tasks.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx

from jaxup.errors import UserError
from jaxup.experiments.outcomes import MEASURES, TASKS
from jaxup.lens.measures import measures, said
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params, abstract
from jaxup.text import write_atomically
from jaxup.training.run import Run


def check(rows: int) -> None:
    if rows < 0:
        raise UserError(f"measure.rows must be at least 0, not {rows}")
    if rows and jax.process_count() > 1:
        raise UserError("layers are measured where one process has the model", at=f"measure.rows={rows}",
                        hint="jaxup probe takes the run's export")  # fmt: skip


def measured(run: Run, rows: int, model: ModelConfig, params: Params, start: Callable[[], Params] | None) -> list[str]:
    """Writes {name: [L]} of the first so many validation rows that are full; and says what is in it.

    `start` gives the params before training. A finished run is measured again where the file is gone.
    """
    batch = run.data.validation.batch(np.arange(min(rows, len(run.data.validation))))
    full = batch["loss_weights"].all(axis=1)
    tokens_BS, targets_BS = (batch[name][full].astype(np.int32) for name in ("tokens", "targets"))
    if not len(tokens_BS):
        write_atomically(run.directory / MEASURES, "{}\n")
        return [f"No row of validation is full: measure.rows={rows} has nothing to measure on."]
    decoder = nnx.merge(abstract(model)[0], params)
    found = measures(decoder, tokens_BS, targets_BS, None if start is None else start())
    lists = {name: values.tolist() for name, values in found.items()}
    write_atomically(run.directory / MEASURES, json.dumps(lists) + "\n")
    return [said(found, len(tokens_BS))]


def keep_tasks(run: Run, tasks: Mapping[str, float]) -> None:
    """Writes what the run's model reaches on tasks, by name; NaN where there was nothing to measure. A study compares
    its cells by each."""
    if jax.process_index() == 0:
        values = {name: float(value) if math.isfinite(value) else None for name, value in tasks.items()}
        write_atomically(run.directory / TASKS, json.dumps(values) + "\n")
