"""What a model's training was told to do otherwise from some step on: to go on where it could not.

It is kept beside the model's checkpoints, so that it is the same each time the run resumes. Steps count from 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

from jaxup.errors import UserError
from jaxup.text import read_json
from jaxup.training.rundir import write_json

NAME = "corrections.json"
SKIP, RATE = "--skip-step", "--rate-from"  # the flags


@dataclasses.dataclass(frozen=True)
class Corrections:
    skip: tuple[int, ...] = ()  # steps whose batch is left out: no update is made
    rates: tuple[tuple[int, float], ...] = ()  # (step, rate): from there on the schedule has its peak at `rate`

    def __bool__(self) -> bool:
        return bool(self.skip or self.rates)

    def __str__(self) -> str:
        said = [f"step {step} left out" for step in self.skip]
        return ", ".join(
            [*said, *(f"from step {step} on a rate with its peak at {rate:g}" for step, rate in self.rates)]
        )


def parse(skip: Iterable[str], rates: Iterable[str]) -> Corrections:
    """Of the flags `--skip-step N` and `--rate-from N:RATE`, each given any number of times."""
    pairs = []
    for text in rates:
        step, colon, rate = text.partition(":")
        try:
            pairs.append((_step(RATE, step), float(rate)))
        except ValueError:
            raise UserError("expected N:RATE, such as 57:1e-4", at=f"{RATE}={text}") from None
        if not (colon and 0 <= pairs[-1][1] < math.inf):
            raise UserError("the rate must be a number and not negative", at=f"{RATE}={text}")
    return Corrections(tuple(_step(SKIP, text) for text in skip), tuple(pairs))


def _step(flag: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise UserError("the number of a step is at least 1", at=f"{flag}={text}")
    return int(text)


def read(directory: Path) -> Corrections:
    """Those of the model whose checkpoints are in `directory`."""
    hint = "bring it back from a copy: it says which steps were left out"
    stored = read_json(directory / NAME, {"skip": list[int], "rates": list[list[float]]}, hint)
    if stored is None:
        return Corrections()
    if any(len(pair) != 2 for pair in stored["rates"]):
        raise UserError("damaged: rates are pairs of a step and a rate", at=str(directory / NAME), hint=hint)
    return Corrections(tuple(stored["skip"]), tuple((int(step), rate) for step, rate in stored["rates"]))


def record(directory: Path, asked: Corrections, *, done: int, steps: int) -> Corrections:
    """Those of the model with what is asked of it now; one of several processes writes it down.

    UserError if that begins at one of the `done` steps, or after the last; what was recorded before may be asked again.
    """
    kept = read(directory)
    new = [(SKIP, step) for step in asked.skip if step not in kept.skip]
    new += [(RATE, step) for step, rate in asked.rates if (step, rate) not in kept.rates]
    for flag, step in new:
        if step <= done:
            what = f"{done} of {steps} steps are done, and it is one of them"
            raise UserError(what, at=f"{flag}={step}", hint="give a later one")
        if step > steps:
            raise UserError(f"of {steps} steps", at=f"{flag}={step}")
    rates = dict(kept.rates) | dict(asked.rates)
    found = Corrections(tuple(sorted({*kept.skip, *asked.skip})), tuple(sorted(rates.items())))
    import jax  # the command's flags need none of it

    if asked and jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / NAME, dataclasses.asdict(found))
    return found
