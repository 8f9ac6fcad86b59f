"""What a model says of rows that are there: log-probabilities, entropies and values, for ratios, references and guides.

Shape suffixes: N rows, B batch, S positions of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxup.errors import UserError
from jaxup.learning.objective import VERDICT, read
from jaxup.model.attention import balanced
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params, abstract
from jaxup.training.loss import log_probs
from jaxup.training.sharding import local_rows, place_batch


class Scores(NamedTuple):
    logp: np.ndarray  # float32 [N, S]: of each target, at the temperature
    entropy: np.ndarray  # float32 [N, S], nats: of what it is one of
    values: np.ndarray | None  # float32 [N, S], of the head, before each target; a verdict's are from 0 to 1


def score(
    config: ModelConfig, params: Params, rows: Mapping[str, np.ndarray], *, compute: Compute, temperature: float,
    chunk: int, batch_size: int, mesh: Mesh | None = None, head: str = "", vocab_size: int = 0,
    order: np.ndarray | None = None,
) -> Scores:  # fmt: skip
    """Of all rows, on every process, in batches of `batch_size`, of which the last is filled up with zeros.

    Args:
      config, params: the whole model, whoever made it of what: what trains joined with what does not, or the model as
        it was at the start.
      rows: `tokens`, `targets` int32 [N, S], the same on every process; other fields are not read.
      temperature, vocab_size: those that the rows were drawn by; see `PolicyLoss`.
      chunk: positions whose logits exist at once.
      mesh: where the params lie, if on one.
      head: "value" or "verdict", if values are asked for.
      order: int [runs], which layer runs when: another model in the same params.
    """
    count, length = rows["tokens"].shape
    if batch_size < 1:
        raise UserError("must be at least 1", at=f"batch_size={batch_size}")
    run = _program(config, compute, temperature, chunk, head, vocab_size, mesh)
    given = None if order is None else np.asarray(order, np.int32)
    parts = []
    for start in range(0, count, batch_size):
        batch = {name: rows[name][start : start + batch_size] for name in ("tokens", "targets")}
        missing = batch_size - len(batch["tokens"])
        batch = {name: np.pad(a, ((0, missing), (0, 0))) for name, a in batch.items()}
        if mesh is None:
            found = run(params, batch, given)
        else:
            own = local_rows(batch_size, mesh)
            with jax.set_mesh(mesh):
                found = run(params, place_batch({n: a[own] for n, a in batch.items()}, batch_size, mesh), given)
        parts.append(found)  # the next is dispatched before this one is waited for
    back = np.arange(length)
    if mesh is not None and mesh.shape["context"] > 1:
        back = np.argsort(balanced(length, mesh.shape["context"]))
    joined = [
        np.concatenate([np.asarray(part[i]) for part in parts] or [np.zeros((0, length), np.float32)])[:count, back]
        for i in range(3 if head else 2)
    ]
    return Scores(joined[0], joined[1], joined[2] if head else None)


@functools.lru_cache(maxsize=16)
def _program(
    config: ModelConfig, compute: Compute, temperature: float, chunk: int, head: str, vocab_size: int, mesh: Mesh | None
) -> Callable[..., Any]:
    graphdef, _ = abstract(config, compute)

    def run(params, batch, order):
        decoder = nnx.merge(graphdef, params)
        x_BSD = decoder.hidden(batch["tokens"], positions_BS=batch.get("positions"), order=order)
        kernel_DV = decoder.head_kernel()
        kernel_DV = kernel_DV[:, :vocab_size] if vocab_size else kernel_DV
        how: Any = {"chunk": chunk, "temperature": temperature, "batch_axes": compute.rows_over}
        found = log_probs(x_BSD, kernel_DV, batch["targets"], **how)
        if not head:
            return found
        values_BS = read(decoder.beside, head, x_BSD)
        return *found, jax.nn.sigmoid(values_BS) if head == VERDICT else values_BS.astype(jnp.float32)

    return jax.jit(run, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))
