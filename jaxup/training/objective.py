"""What a model is trained for: the loss that is minimised, and what is said of how good it is.

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxup.errors import UserError
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Decoder, Params, abstract
from jaxup.model.spec import flops_per_token
from jaxup.training.loss import cross_entropy, distillation

# Arrays [B, ...]; of text tokens, targets, loss_weights [B, S], and if packed segment_ids and positions.
Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]  # by name: (a sum, what it is a sum over); their ratio is a mean


class Objective(abc.ABC):
    """One way to train. It is hashable, and equal to another that computes the same: a part of a program's key."""

    # Whether it has one mean, of the loss weights alone, so that a part of a batch has one of its own.
    by_token: ClassVar[bool] = False

    @property
    def teacher(self) -> ModelConfig | None:
        """A model whose params `sums` is given as well; they are an argument of the step, and do not train."""
        return None

    @property
    def evaluated(self) -> Objective:
        """That by which models are evaluated that train by this one: it has no teacher."""
        return self

    def weighed(self, batch: Batch) -> tuple[Batch, jax.Array]:
        """(the batch, what its loss is divided by, if that is above 1), of the whole of it, before it is cut into
        micro-batches.

        What the loss has to know of the whole batch goes into weights here. Not asked where a model is evaluated.
        """
        return batch, jnp.sum(batch["loss_weights"])

    @abc.abstractmethod
    def sums(
        self, decoder: Decoder, hidden: Callable[..., jax.Array], batch: Batch, how: Mapping[str, Any], *teacher: Params
    ) -> tuple[jax.Array, Sums]:
        """(the sum to minimise, what is reported), over these rows: sums of micro-batches are added.

        Args:
          decoder: with its ends and what stands beside it; its blocks may not be there.
          hidden: `Decoder.hidden`, by whichever way its layers are run.
          how: the arguments by name of `jaxup.training.loss.cross_entropy`.
          teacher: the params of `self.teacher`, if there is one.
        """

    def plain(self, loss: jax.Array, sums: Sums) -> jax.Array:
        """What is logged as the loss of a step once it is divided: the loss, without what only guides the training."""
        return loss

    def mean(self, sums: Mapping[str, tuple[float, float]]) -> float:
        """The validation loss, of the sums over all validation rows."""
        ((total, count),) = sums.values()
        return total / count

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of one position of a row, forward and backward, as if everything trained."""
        return flops_per_token(model, seq_len)


@dataclasses.dataclass(frozen=True)
class Text(Objective):
    """The cross-entropy of the next token."""

    by_token = True

    def sums(
        self, decoder: Decoder, hidden: Callable[..., jax.Array], batch: Batch, how: Mapping[str, Any], *teacher: Params
    ) -> tuple[jax.Array, Sums]:
        x_BSD = hidden(batch["tokens"], **placed(batch))
        targets = batch["targets"], batch["loss_weights"]
        loss, plain = cross_entropy(x_BSD, decoder.head_kernel(), *targets, **how)
        return loss, {"text": (plain, jnp.sum(batch["loss_weights"]))}

    def plain(self, loss: jax.Array, sums: Sums) -> jax.Array:
        return sums["text"][0]


TEXT = Text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught(Text):
    """Text, and the predictions of a teacher beside the tokens; see `jaxup.training.loss.distillation`."""

    model: ModelConfig
    alpha: float  # its share of the loss
    temperature: float

    def __post_init__(self):
        if not 0 < self.alpha <= 1:
            raise UserError("must be a share from 0, which is no teacher, to 1", at=f"alpha={self.alpha}")
        if not 0 < self.temperature < float("inf"):
            raise UserError("must be a positive number", at=f"temperature={self.temperature}")

    def __str__(self) -> str:
        return f"alpha {self.alpha:g}, temperature {self.temperature:g}"

    @property
    def teacher(self) -> ModelConfig:
        return self.model

    @property
    def evaluated(self) -> Objective:
        return TEXT

    def sums(
        self, decoder: Decoder, hidden: Callable[..., jax.Array], batch: Batch, how: Mapping[str, Any], *teacher: Params
    ) -> tuple[jax.Array, Sums]:
        known = nnx.merge(abstract(self.model, decoder.compute)[0], *teacher)
        x_BSD, known_BSE = (run(batch["tokens"], **placed(batch)) for run in (hidden, known.hidden))
        loss, plain = distillation(
            x_BSD, decoder.head_kernel(), known_BSE, known.head_kernel(), batch["targets"], batch["loss_weights"],
            alpha=self.alpha, temperature=self.temperature, **how,
        )  # fmt: skip
        return loss, {"text": (plain, jnp.sum(batch["loss_weights"]))}

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of the teacher the forward pass, which is a third of what `flops_per_token` counts."""
        return super().flops(model, seq_len) + flops_per_token(self.model, seq_len) / 3


def placed(batch: Batch) -> dict[str, Any]:
    """Where the tokens of packed rows stand, and what they belong to."""
    return {"positions_BS": batch.get("positions"), "segment_ids_BS": batch.get("segment_ids")}
