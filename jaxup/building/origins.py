"""Where the bytes of each tensor of a plan's result come from: the bill of materials, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxup.depth.materials import Bill
from jaxup.families.family import Family
from jaxup.families.layouts import Tensor, expected_tensors
from jaxup.files.header import TensorInfo
from jaxup.files.shards import DTYPES, Stored
from jaxup.hub.reader import Checkpoint, dtype_of
from jaxup.model.config import ModelConfig
from jaxup.model.spec import spec


class Found(NamedTuple):
    """A tensor in the files of one of the models."""

    source: str
    info: TensorInfo


class Origin(NamedTuple):
    """What makes the bytes of a tensor; equal origins make equal bytes."""

    found: Found | None  # what it is made from; None: of nothing that is there
    factors: tuple[tuple[float, ...], ...]  # of each param that the tensor holds; see `arithmetic.rescale`
    before: np.dtype  # what is scaled has this dtype
    after: np.dtype  # and this in the end
    rows: str | None = None  # "embed_tokens" or "lm_head": rows are gathered, as a vocabulary has it
    new: Tensor | None = None  # the tensor of the result itself, where newly initialised values are in it
    noise: float = 0.0  # the share of new values, if it is not all of them

    @property
    def is_zero(self) -> bool:
        return self.found is None and self.new is None

    @property
    def copied(self) -> Found | None:
        """The tensor whose bytes it has as they are, if there is one."""
        if self.found is None or self.rows is not None or self.new is not None or any(self.factors):
            return None
        return self.found if dtype_of(self.found.info) == self.before == self.after else None


def tensor_origins(
    bill: Bill, family: Family, exported: ModelConfig, checkpoints: Mapping[str, Checkpoint],
    gathered: frozenset[str] = frozenset(),
) -> Iterator[tuple[Stored, Origin]]:  # fmt: skip
    """The result's tensors in the order of the family's table.

    `exported` is what the family makes of the result's config: biases it always has are zeros.
    `gathered` are those of "embed_tokens" and "lm_head" whose rows a vocabulary rearranges.
    """
    stored = {
        name: {(tensor.paths, tensor.layer): info for tensor, info in checkpoint.tensors}
        for name, checkpoint in checkpoints.items()
    }
    some = np.dtype(next(iter(bill.values()))[0].after)
    for tensor in expected_tensors(family.rows(spec(exported)), spec(exported)):
        # All of one tensor are of one part: they come from one place.
        made = [bill[path][tensor.layer or 0] for path in tensor.paths if path in bill]
        if all(material.is_zero for material in made):
            after = DTYPES[made[0].after] if made else some
            yield Stored(tensor, after), Origin(None, (), after, after)
            continue
        first, before, after = made[0], DTYPES[made[0].before], DTYPES[made[0].after]
        factors = tuple(material.factors for material in made)
        if first.source is None:
            yield Stored(tensor, after), Origin(None, factors, before, after, new=tensor)
            continue
        info = stored[first.source][tuple(material.path for material in made), first.layer]
        end = tensor.paths[0].split(".")[0]
        yield Stored(tensor, after), Origin(
            Found(first.source, info), factors, before, after, end if end in gathered else None,
            tensor if first.noise else None, first.noise,
        )  # fmt: skip
