"""Pairs of words and pictures as the data of a run: rows of a layout, of which batches are made."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jaxup.continuous.examples import Example, Kind
from jaxup.continuous.layouts import Layout
from jaxup.continuous.pairs import Examples, Pairs
from jaxup.data.batches import Batches, validation_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS: tuple[Kind, ...] = ("draw", "tell", "text")
_LOOKED_AT = 256  # examples, from which the mean length of all is estimated


class PairRows:
    """Examples as rows of a batch, each with a random number of its own."""

    draws = True

    def __init__(self, examples: Sequence[Example], layout: Layout):
        # Without data there is one example, for its shapes, and nobody asks which kinds there are.
        self.examples, self._layout = cast(Examples, examples), layout

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """int [B] row numbers and uint32 [B] -> what `Layout.pack` gives."""
        assert draws is not None
        return self._layout.pack([self.examples[int(index)] for index in indices], draws)

    def tokens(self) -> float:
        """Of a row, on average, without padding."""
        return float(np.mean([self._layout.needs(example) for example in self.some()]))

    def some(self) -> list[Example]:
        """From everywhere."""
        return [self.examples[index] for index in range(0, len(self), -(-len(self) // _LOOKED_AT) or 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairData:
    """What a run trains on. Its rows have the length of the layout.

    Args:
      pairs: None where there are no data but their shapes.
      store: a directory with the tokenizer, for the run's models; "" if there is none.
    """

    pairs: Pairs | None
    layout: Layout
    train: PairRows
    validation: PairRows
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    store: str

    phases = None  # rows are seen all mixed
    packed = False  # a row is one example

    def __str__(self) -> str:
        kinds: dict[Kind, str] = {"draw": "to draw", "tell": "to tell", "text": "of text"}

        def counted(examples: Examples) -> str:
            found = {said: examples.of(kind).chosen for kind, said in kinds.items()}
            counts = {said: (len(set(chosen)), len(chosen)) for said, chosen in found.items() if chosen}
            return ", ".join(
                f"{own:,} {said}" + f", each {rows // own} times an epoch" * (rows > own)
                for said, (own, rows) in counts.items()
            )

        rows, columns = self.layout.rows, self.layout.columns
        shape = f"{rows} x {columns} tokens of {self.layout.channels} channels"
        frames = f"{self.layout.frames} frames of " * bool(self.layout.frames)
        return (
            f"training: {counted(self.train.examples)}; validation, of unseen pictures: "
            f"{counted(self.validation.examples)}; {frames}{shape}, rows of {self.seq_len}"
        )

    @property
    def seq_len(self) -> int:
        return self.layout.length

    @property
    def stepwise(self) -> bool:
        return self.layout.stepwise

    @property
    def train_rows(self) -> int:
        return len(self.train)

    @property
    def epoch_rows(self) -> int:
        return len(self.train)

    @property
    def validation_tokens(self) -> int:
        return round(len(self.validation) * self.validation.tokens())

    def ends(self) -> Iterator[int]:
        """How many training rows were seen when each epoch is at its end, on and on."""
        return itertools.count(self.train_rows, self.train_rows)

    def tokens_of(self, rows: int) -> int:
        """Of so many training rows, on average: without padding."""
        return round(rows * self.train.tokens())

    def length(self) -> float:
        """Of a value, on average."""
        values = [example.values for example in self.train.some() if example.values is not None]
        return float(np.mean([np.linalg.norm(each, axis=-1).mean() for each in values])) if values else 1.0

    def batches(self, *, batch_size: int, seed: int) -> Batches:
        return Batches(self.train, batch_size=batch_size, seed=seed)

    def validation_batches(self, **how: Any) -> Iterator[dict[str, np.ndarray]]:
        """See the function of that name."""
        return validation_batches(self.validation, **how)

    def report(self) -> str:
        assert self.pairs is not None
        encoder = self.pairs.encoder
        lines = [f"pairs: {self}", f"  encoder {encoder.spec}, values of deviation {encoder.scale:.4g} made 1"]
        for kind in KINDS:
            if found := self.pairs.train.of(kind)[:1]:
                prompt, answer = (self.tokenizer.decode(ids) for ids in (found[0].prompt, found[0].answer))
                picture = "" if kind == "text" else " [picture]"
                said = f"{picture} {prompt} ->{answer}" if kind == "tell" else f" {prompt}{answer}{picture}"
                lines.append(f"  to {kind}, for example:{said}")
        return "\n".join(lines)
