"""What a finished run says to people: SUMMARY.md, which begins with what was found."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxup import __version__
from jaxup.progress import clock, printable
from jaxup.text import backticks, write_atomically
from jaxup.training.run import Result

_PACKAGES = ("jax", "flax", "optax", "transformers")
ONE_SEED = "One seed: by how much another one's numbers differ is not measured."
_PLOTS = ("samples", "validation_loss", "loss_by_layers", "training", "gradients", "difference", "plan")


def inherited(results: Sequence[Result], unit: str, *, sweep: bool) -> str:
    """What inheriting gave, in words: the target against the reference and the controls, of those that there are."""
    by_kind, targets = {r.kind: r for r in results}, [r for r in results if r.kind == "target"]
    reference, behind = by_kind.get("reference"), by_kind.get("half", by_kind.get("reference"))
    target = min(targets, key=lambda r: r.val_loss) if sweep else targets[-1]
    which = f"the {_sized(target)} target"
    if sweep and len(targets) > 1:
        sizes = ", ".join(str(r.layers) for r in targets)
        which = f"of targets of {sizes} layers the best is that of {target.layers}: it"
    elif len(targets) > 1:
        which += f", grown from {targets[0].layers},"
    against = []
    if reference:
        against.append(f"{_than(target, reference)} the {_sized(reference)} reference ({reference.val_loss:.4f})")
    for control in (r for r in results if r.kind == "control" and r.layers == target.layers):
        steps = "" if control.steps == target.steps else f" and trained for {control.steps:,} steps"
        if steps and behind and control.steps == target.steps + behind.steps:
            steps += f", as many as the {behind.kind} and the target together"
        began = f"a control of its size that began from random values{steps}"
        against.append(f"{_than(target, control)} {began} ({control.val_loss:.4f})")
    text = f"{which[0].upper()}{which[1:]} reaches {target.val_loss:.4f} nats per {unit} of validation "
    text += f"in {target.steps:,} steps{': ' * bool(against)}{', '.join(against)}."
    if behind and behind.steps:
        text += f" It has the {behind.kind}'s {behind.steps:,} steps of training behind it, too."
    return f"{text} {ONE_SEED}"


def healed(results: Sequence[Result], unit: str) -> str:
    """What healing gave, in words: against the model before it, the base and the control, if there are any."""
    by_kind = {r.kind: r for r in results}
    before, after = by_kind["before"], by_kind["healed"]
    more = worse_by(after, before)
    verb = "lowered" if more < 0 else "raised" if more else "left"
    span = f"from {before.val_loss:.4f} to" if more else "at"
    text = f"Healing {verb} the validation loss of the {_sized(after)} model {span} {after.val_loss:.4f} "
    text += f"nats per {unit} in {after.steps:,} steps"
    if merged := by_kind.get("merged"):
        text += f" (with its adapters merged, as exported: {merged.val_loss:.4f})"
    if base := by_kind.get("base"):
        text += f"; its {_sized(base)} base has {base.val_loss:.4f}"
    if control := by_kind.get("control"):
        last = merged or after
        text += f"; the control, which is the base trained on the same batches, reaches {control.val_loss:.4f}, "
        text += f"and the healed model is {_than(last, control)} it"
    return f"{text}. {ONE_SEED}"


def trained(results: Sequence[Result], unit: str) -> str:
    """What training a model from random values gave, in words."""
    *smaller, model = results
    text = f"The {_sized(model)} model reaches {model.val_loss:.4f} nats per {unit} of validation in {model.steps:,} "
    steps = (b - a for a, b in itertools.pairwise([0, *(r.steps for r in smaller)]))
    fewer = [f"{n:,} with {r.layers} layer{'s' * (r.layers > 1)}" for r, n in zip(smaller, steps)]
    grown = f", of them {' and '.join(fewer)}" if fewer else ""
    return f"{text}steps from random values{grown}. {ONE_SEED}"


def _sized(result: Result) -> str:
    return f"{result.layers}-layer"


def worse_by(result: Result, other: Result) -> float:
    """By how much its loss is higher: of the digits that are shown, so that the sum comes out."""
    return round(round(result.val_loss, 4) - round(other.val_loss, 4), 4)


def _than(result: Result, other: Result) -> str:
    more = worse_by(result, other)
    return f"{abs(more):.4f} {'below' if more < 0 else 'above'}" if more else "level with"


def made_by(starts: Sequence[dict[str, Any]]) -> list[str]:
    """The commands that the run was started with, the versions, and how long it took; of `starts` see `resuming`."""
    lines, now = [], time.time()
    if commands := [printable(command) for command in dict.fromkeys(start["command"] for start in starts) if command]:
        fence = backticks("".join(commands))
        lines += [f"{fence}bash", *commands, fence, ""]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    took = "" if not starts else f" Wall time {clock(now - starts[0]['time'])}"
    if len(starts) > 1:
        last = clock(now - starts[-1]["time"])
        took += f" from the first of {len(starts)} starts, the pauses between them included; the last took {last}"
    who = f"jaxup {__version__}, {', '.join(versions)}, Python {platform.python_version()}; {devices}."
    return [*lines, who + took + "." * bool(took)]


def write_summary(
    directory: Path, title: str, results: Sequence[Result], plan: str, notes: Sequence[str], *, finding: str,
    how: Sequence[str], plan_title: str,
) -> str:  # fmt: skip
    """Writes and returns SUMMARY.md; the first result is what the others are compared with."""
    reference = results[0]
    lines = [f"# {title}", "", finding, "", *how, "", *notes, ""]
    lines += [f"| model | layers | parameters | steps | tokens | validation loss | to the {reference.name} |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for r in results:
        more = "" if r is reference else f"{worse_by(r, reference):+.4f}"
        counts = f"{r.layers} | {r.params:,} | {r.steps:,} | {tokens(r)}"
        lines.append(f"| {r.name} | {counts} | {r.val_loss:.4f} | {more} |")
    for name in _PLOTS:
        if (directory / "plots" / f"{name}.png").exists():
            lines += ["", f"![{name.replace('_', ' ')}](plots/{name}.png)"]
    lines += ["", "How each model began:", ""]
    lines += [f"- **{r.name}**: {r.origin}" + (f"; {r.corrected}" if r.corrected else "") for r in results]
    if plan:
        lines += ["", f"## {plan_title}", "", "```", plan.strip(), "```"]
    lines += ["", "## Samples", ""]
    for r in results:
        fence = backticks(r.sample)
        lines += [f"**{r.name}**", "", f"{fence}text", r.sample.rstrip(), fence, ""]
    text = "\n".join(lines)
    write_atomically(directory / "SUMMARY.md", text)
    return text


def tokens(result: Result) -> str:
    """That it was trained on, and how often if it was more than once."""
    again = "" if result.epochs is None or result.epochs <= 1 else f" × {result.epochs:.3g}"
    return f"{result.tokens:,}{again}"
