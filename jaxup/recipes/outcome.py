"""What a recipe comes to, as far as it can be known without reading a tensor: what is shown, built and verified."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxup.depth.materials import Bill, materials
from jaxup.depth.result import result_config
from jaxup.errors import within
from jaxup.families import edited_hf
from jaxup.model.config import ModelConfig
from jaxup.model.spec import spec
from jaxup.recipes.open import Recipe


class Outcome(NamedTuple):
    """The result of a recipe."""

    config: ModelConfig
    hf: dict[str, Any]  # its config.json
    exported: ModelConfig  # what that reads back as: with the biases that its family always has
    bill: Bill

    def nbytes(self) -> dict[str, int]:
        """Dtype -> bytes of all parameters that have it."""
        return {dtype: n * (4 if dtype == "float32" else 2) for dtype, n in _counts(self.config, self.bill).items()}


def outcome(
    recipe: Recipe, stored: Callable[[str | None, str, int | None], str], *, vocab_size: int | None = None
) -> Outcome:
    """Works it out.

    Args:
      stored: the dtypes of the models' tensors; see `jaxup.depth.materials`.
      vocab_size: of the result, where it has another tokenizer than its models.

    Raises:
      UserError: nothing can be built: the models do not fit each other, or the family of the base
        model cannot express the result. Names the fields and both values.
    """
    config = result_config(recipe.plan, recipe.configs, base=recipe.base, vocab_size=vocab_size)
    tied = {name: source.tie_embeddings for name, source in recipe.configs.items()}
    bill = materials(recipe.plan, spec(config), tied, stored)
    base, ((most, _),) = recipe.models[recipe.base], _counts(config, bill).most_common(1)
    with within(base.path):
        hf, exported = edited_hf(base.hf, config, dtype=most)
    return Outcome(config, hf, exported, bill)


def _counts(config: ModelConfig, bill: Bill) -> collections.Counter[str]:
    """Dtype -> number of parameters that have it."""
    table, counts = spec(config), collections.Counter[str]()
    for path, rows in bill.items():
        for made in rows:
            counts[made.after] += table[path].size // len(rows)
    return counts
