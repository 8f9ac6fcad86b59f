"""Where each tensor of a plan's result comes from: a source's bytes, zeros, products, or new values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxup.depth.plan import ENDS, DepthPlan
from jaxup.families import Family
from jaxup.families.layouts import Tensor, expected_tensors
from jaxup.files.header import TensorInfo
from jaxup.files.shards import DTYPES, Stored
from jaxup.hub.reader import Checkpoint, dtype_of
from jaxup.model.config import ModelConfig
from jaxup.model.shapes import param_shapes


class Origin(NamedTuple):
    """What makes the bytes of a tensor; equal origins make equal bytes."""

    source: str | None  # the model, and the tensor of its files, that it is made from; None: of none
    info: TensorInfo | None
    factors: tuple[tuple[float, ...], ...]  # of each param that the tensor holds; see `arithmetic.rescale`
    before: np.dtype  # what is scaled has this dtype
    after: np.dtype  # and this in the end
    rows: str | None = None  # "embed_tokens" or "lm_head": rows are gathered, as a vocabulary has it
    new: Tensor | None = None  # the tensor of the result itself, where newly initialised values are in it
    noise: float = 0.0  # the share of new values, if it is not all of them

    @property
    def is_zero(self) -> bool:
        return self.info is None and self.new is None

    @property
    def is_copy(self) -> bool:
        """Whether it is a source's bytes as they are."""
        plain = self.info is not None and self.rows is None and self.new is None and not any(self.factors)
        return plain and dtype_of(self.info) == self.before == self.after


def tensor_origins(
    plan: DepthPlan, config: ModelConfig, family: Family, exported: ModelConfig,
    checkpoints: Mapping[str, Checkpoint], gathered: frozenset[str] = frozenset(),
) -> Iterator[tuple[Stored, Origin]]:  # fmt: skip
    """The result's tensors in the order of the family's table.

    `config` is the result's and `exported` what the family makes of it: biases it always has are
    zeros. `gathered` are those of "embed_tokens" and "lm_head" whose rows a vocabulary rearranges.
    """
    stored = {
        name: {(tensor.paths, tensor.layer): info for tensor, info in checkpoint.tensors}
        for name, checkpoint in checkpoints.items()
    }
    some = dtype_of(next(iter(checkpoints.values())).tensors[0][1])
    tied = {name: checkpoint.config.tie_embeddings for name, checkpoint in checkpoints.items()}
    ends = {end: (end, getattr(plan, end)) for end in ENDS} | {"lm_head": plan.head(tied)}
    known = param_shapes(config)

    for tensor in expected_tensors(family.tensors, param_shapes(exported)):
        noise, rows, paths = 0.0, None, tensor.paths
        if tensor.layer is None:
            end = tensor.paths[0].split(".")[0]
            (part, name), layer = ends[end], None
            if part != end:  # the head of a tied model is its embedding
                paths = (part,)
            factors = tuple(plan.factors(path) for path in tensor.paths)
            rows = end if end in gathered and name is not None else None
        else:
            row = plan.rows[tensor.layer]
            inside = [path.removeprefix("blocks.") for path in tensor.paths]
            name, layer = (row.source if row.inherits(inside[0]) else None), row.layer
            factors = tuple(map(row.factors, inside))
            noise = row.noise if name is not None and inside[0].endswith(".kernel") else 0.0
        info = None if name is None else stored[name].get((paths, layer))
        if plan.dtype:
            before = DTYPES[plan.dtype]
        elif name is not None:
            before = dtype_of(info) if info else some
        else:
            before = np.dtype(np.float32) if layer is None else _stack_dtype(plan, inside[0], tensor, stored)
        after = DTYPES[plan.out_dtype] if plan.out_dtype else before
        # A parameter that is scaled by zero is not read.
        zero = all(f == (0.0,) for f in factors) or not set(tensor.paths) & set(known)
        if zero:
            origin = Origin(None, None, (), after, after)
        elif name is None:
            origin = Origin(None, None, factors, before, after, new=tensor)
        else:
            origin = Origin(name, info, factors, before, after, rows, tensor if noise else None, noise)
        yield Stored(tensor, after), origin


def _stack_dtype(
    plan: DepthPlan, inside: str, tensor: Tensor, stored: Mapping[str, Mapping[Any, TensorInfo]]
) -> np.dtype:
    """The dtype of new layers: that of the sources' own, as in a stack; float32 holds several."""
    sources = {row.source for row in plan.rows if row.inherits(inside)}
    found = {dtype_of(info) for name in sources for (paths, _), info in stored[name].items() if paths == tensor.paths}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)
