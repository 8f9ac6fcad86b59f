"""What a finished run leaves for people: SUMMARY.md and pictures of its validation losses."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.text import backticks, write_atomically
from jaxup.training.run import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PRETRAINED = ("base", "before")  # kinds that a run begins with: what it trains starts as good as they are


def write_summary(
    directory: Path, title: str, results: Sequence[Result], plan: str, notes: Sequence[str], *, plan_title: str
) -> str:
    """Writes and returns SUMMARY.md; the first result is what the others are compared with."""
    reference = results[0]
    lines = [f"# {title}", "", *notes, ""]
    lines += [f"| model | layers | parameters | steps | tokens | validation loss | to the {reference.name} |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for r in results:
        more = "" if r is reference else f"{r.val_loss - reference.val_loss:+.4f}"
        again = "" if r.epochs is None or r.epochs <= 1 else f" × {r.epochs:.3g}"
        counts = f"{r.layers} | {r.params:,} | {r.steps:,} | {r.tokens:,}{again}"
        lines.append(f"| {r.name} | {counts} | {r.val_loss:.4f} | {more} |")
    for path in sorted((directory / "plots").glob("*.png"), reverse=True):  # validation_loss before loss_by_layers
        lines += ["", f"![{path.stem.replace('_', ' ')}](plots/{path.name})"]
    lines += ["", "How each model began:", ""]
    lines += [f"- **{r.name}**: {r.origin}" + (f"; {r.corrected}" if r.corrected else "") for r in results]
    lines += ["", f"## {plan_title}", "", "```", plan.strip(), "```", "", "## Samples", ""]
    for r in results:
        fence = backticks(r.sample)
        lines += [f"**{r.name}**", "", f"{fence}text", r.sample.rstrip(), fence, ""]
    text = "\n".join(lines)
    write_atomically(directory / "SUMMARY.md", text)
    return text


def plot_validation(directory: Path, title: str, results: Sequence[Result], records: Sequence[dict[str, Any]]) -> Path:
    """Draws validation loss against steps, all models in one picture; returns the PNG's path."""
    reference, pretrained = results[0], results[0].kind in _PRETRAINED
    figure, axes = _figure(reference)
    low = high = reference.val_loss
    last = max([r.steps for r in results] + [1])
    for index, result in enumerate(results):
        # Where there are several losses of a step, the last one is that of the rows the result is of.
        mine = [r for r in records if r["model"] == result.name and math.isfinite(r.get("val_loss", math.nan))]
        points = sorted({r["step"]: r["val_loss"] for r in mine}.items())
        if not points:
            continue
        label = f"{result.name} ({result.layers} layers): {result.val_loss:.3f}"
        line = ":" if result.kind == "control" else "-"
        axes.plot(*zip(*points), label=label, color=f"C{index}", marker=".", linewidth=1.8, linestyle=line)
        # The untrained models' loss at step 0, ln(vocabulary), would flatten everything else.
        shown = [loss for step, loss in points if pretrained or step >= 0.1 * result.steps]
        low, high = min([low, *shown]), max([high, *shown])
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, last * 1.02)
    axes.annotate(
        f"{reference.name}, {reference.val_loss:.3f}", (last if pretrained else last * 0.01, reference.val_loss),
        textcoords="offset points", xytext=(0, -11), fontsize=8, color="0.4", ha="right" if pretrained else "left",
    )  # fmt: skip
    axes.set(xlabel="steps", ylabel="validation loss (nats per token)", title=title)
    return _saved(figure, directory / "plots" / "validation_loss.png")


def plot_layers(directory: Path, title: str, results: Sequence[Result]) -> Path | None:
    """Draws final validation loss against layers, if there are targets of several sizes; returns the PNG's path."""
    if len({r.layers for r in results if r.kind == "target"}) < 2:
        return None
    reference = results[0]
    kinds = {"target": ("inherited", "C1", "-"), "control": ("control, from random", "C2", ":")}
    figure, axes = _figure(reference)
    label = f"reference ({reference.layers} layers): {reference.val_loss:.3f}"
    axes.plot(reference.layers, reference.val_loss, "o", color="C0", label=label)
    for kind, (label, color, line) in kinds.items():
        for steps in sorted({r.steps for r in results if r.kind == kind}):
            points = sorted((r.layers, r.val_loss) for r in results if r.kind == kind and r.steps == steps)
            longer = "" if steps == results[1].steps else f", {steps:,} steps"
            axes.plot(*zip(*points), marker="o", color=color, linestyle=line, label=label + longer)
            if kind == "target":
                for layers, loss in points:
                    axes.annotate(f"{loss:.3f}", (layers, loss), textcoords="offset points", xytext=(7, 5),
                                  fontsize=8, color="0.3")  # fmt: skip
    axes.set(xlabel="layers", ylabel="final validation loss (nats per token)", title=title)
    axes.locator_params(axis="x", integer=True)
    axes.margins(y=0.12)
    return _saved(figure, directory / "plots" / "loss_by_layers.png")


def _figure(reference: Result) -> tuple[Figure, Axes]:
    """With a line where the reference is. Without pyplot, whose figures and backend are a notebook's own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(reference.val_loss, color="0.6", linestyle="--", linewidth=1)
    return figure, axes


def _saved(figure: Figure, path: Path) -> Path:
    (axes,) = figure.axes
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=140)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, drawn.getvalue())
    return path
