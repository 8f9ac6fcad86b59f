"""Pictures of a run: how its models trained, and how good they are by their layers. A role has one colour in all."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxup.depth.picture import BLUE, GREEN, PURPLE, RED, SKY
from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError
from jaxup.lens import heatmap
from jaxup.lens.alignment import Origin, origins_of
from jaxup.lens.differences import diff
from jaxup.progress import say
from jaxup.text import write_atomically
from jaxup.training.run import Result
from jaxup.training.sound import steps_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By the kind of a model, see `Result`. As in the picture of a plan, blue is what was there, and green what is not
# taken from it.
COLORS = {
    "reference": BLUE, "base": BLUE, "pretrained": BLUE, "target": RED, "healed": RED, "taught": RED, "learned": RED,
    "control": GREEN, "before": SKY, "half": SKY, "merged": PURPLE, "model": RED, "organism": RED,
}  # fmt: skip
_PRETRAINED = ("base", "before")  # kinds that a run begins with: what it trains starts as good as they are
_MARKERS = "osD^v"
LARGE = 500_000_000  # parameters
_MOMENTS = 120  # of a run, at most, of which gradients are drawn


def write(
    directory: Path, title: str, results: Sequence[Result], records: Sequence[dict[str, Any]], unit: str, *,
    made: Result, plan: DepthPlan | None,
) -> None:  # fmt: skip
    """The PNG files in `directory`/plots: of the lines of metrics.jsonl; losses are nats per `unit`.

    `made` is the model that the run is for, and `plan` what its layers are, if they are another's.
    """
    figures = {
        "validation_loss": validation(title, results, records, unit),
        "training": training(title, results, records, unit),
        "gradients": gradients(made, records, plan),
        # What inherits nothing began nowhere.
        "difference": difference(directory, results, made) if not plan or any(row.parts for row in plan.rows) else None,
        "loss_by_layers": by_layers(title, results, unit),
    }
    (directory / "plots").mkdir(exist_ok=True)
    for name, figure in figures.items():
        if figure is not None:
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=140)
            write_atomically(directory / "plots" / f"{name}.png", drawn.getvalue())


def validation(title: str, results: Sequence[Result], records: Sequence[dict[str, Any]], unit: str) -> Figure:
    """Validation loss against steps. What has not trained, and what the others are compared with, are levels."""
    reference = results[0]
    figure, (axes,) = _figure(title)
    shown = [r.val_loss for r in results]
    looks = _looks(results)
    for index, result in enumerate(results):
        # Where there are several losses of a step, the last one is that of the rows the result is of. One that grows
        # then has one of each depth.
        losses = {
            (r["step"], r.get("layers", 0)): r["val_loss"]
            for r in records
            if r["model"] == result.name and math.isfinite(r.get("val_loss") or math.nan)
        }
        points = [(step, loss) for (step, _), loss in sorted(losses.items())]
        for (_, layers), (step, more) in itertools.pairwise(sorted(losses)):
            if layers != more:
                axes.axvline(step, color="#999999", linestyle=":", linewidth=1)
                axes.annotate(
                    f"{more} layers", (step, 0), xytext=(3, 4), xycoords=("data", "axes fraction"),
                    textcoords="offset points", fontsize=8,
                )  # fmt: skip
        if (result is reference and len(results) > 1) or not result.steps:
            # Levels that are the same take turns.
            dashes = (index * 5.0, (5.0, 5.0)) if not result.steps else (0, (2.0, 2.0))
            label = None if result.steps else _label(result)
            axes.axhline(result.val_loss, color=COLORS[result.kind], linestyle=dashes, linewidth=1.2, label=label)
        if result.steps and points:
            axes.plot(*zip(*points), label=_label(result), markersize=4, **looks[index])
        # The loss of an untrained model, ln(vocabulary), would flatten everything else.
        shown += [loss for step, loss in points if reference.kind in _PRETRAINED or step >= 0.1 * result.steps]
    margin = 0.06 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(xlabel="steps", ylabel=f"validation loss (nats per {unit})")
    axes.legend(frameon=False)
    return figure


def training(title: str, results: Sequence[Result], records: Sequence[dict[str, Any]], unit: str) -> Figure | None:
    """Loss, gradient norm and learning rate of the steps; None if nothing trained."""
    trained = [(result, look) for result, look in zip(results, _looks(results)) if result.steps]
    if not trained:
        return None
    figure, (loss, norm, rate) = _figure(title, heights=(3, 2, 1))
    seen: list[float] = []
    norms: list[float] = []
    for result, look in trained:
        look = look | {"marker": ""}
        for axes, key, raw in ((loss, "loss", True), (norm, "gradient_norm", True), (rate, "learning_rate", False)):
            points = _points(records, result, key)
            if not points:
                continue
            steps, values = map(np.asarray, zip(*points))
            label = _name(result) if axes is loss else None
            smooth = _smoothed(values) if raw else values
            if raw:
                axes.plot(steps, values, color=look["color"], linewidth=0.8, alpha=0.3)
            axes.plot(steps, smooth, label=label, **look)
            seen += [v for step, v in zip(steps, smooth) if axes is loss and step >= 0.1 * result.steps]
            norms += [v for v in values if axes is norm]
    if seen:
        margin = 0.15 * (max(seen) - min(seen)) or 0.1
        loss.set_ylim(min(seen) - margin, max(seen) + margin)
    loss.set_ylabel(f"training loss\n(nats per {unit})")
    norm.set(ylabel="gradient norm", yscale="log" if norms and max(norms) > 10 * min(norms) > 0 else "linear")
    rate.set(ylabel="learning rate", xlabel="steps", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    loss.legend(frameon=False)
    return figure


def gradients(made: Result, records: Sequence[dict[str, Any]], plan: DepthPlan | None) -> Figure | None:
    """The gradient norm of each layer over the steps; None for less than two steps. Of many neighbours the mean."""
    norms = {
        r["step"]: found
        for r in records
        if r["model"] == made.name and len(found := r.get("gradient_norm_layers", ())) == made.layers
    }
    if len(norms) < 2:
        return None
    moments = np.array_split(np.array(list(norms)), min(_MOMENTS, len(norms)))
    values = np.stack([np.mean([norms[step] for step in steps], axis=0) for steps in moments], axis=1)
    every = math.ceil(len(moments) / 12)
    columns = ["" if i % every else f"step {steps[0]:,}" for i, steps in enumerate(moments)]
    origins = origins_of(plan.rows) if plan else (Origin(None, "n", ""),) * made.layers
    return heatmap.draw(
        values[None], [made.name], columns, origins, "gradient norm of each layer", "log",
        column=4.5 / len(moments),
    )  # fmt: skip


def difference(directory: Path, results: Sequence[Result], made: Result) -> Figure | None:
    """How far each module of the model is from where it began; None if that is nowhere, or not among the run's
    checkpoints.

    A large one is not worth the memory at this place: `jaxup diff` does it.
    """
    start = next((r for r in results if r.kind == "before"), results[0])
    if start is made or not steps_in(directory / "checkpoints" / start.name):
        return None
    pair = [f"{directory}@{r.name}/{r.steps}" for r in (start, made)]
    # What several processes have all of them have to read.
    if jax.process_count() > 1 or made.params > LARGE:
        say(f"the difference of {made.name} to {start.name} is not drawn here; `jaxup diff {' '.join(pair)}` draws it")
        return None
    try:
        found = diff(*pair, as_built=True)
    except UserError as error:
        say(f"the difference of {made.name} to {start.name} is not drawn: {error}")
        return None
    return heatmap.differences(dataclasses.replace(found, models=(start.name, made.name)))


def by_layers(title: str, results: Sequence[Result], unit: str) -> Figure | None:
    """Final validation loss against layers, if there are targets of several sizes."""
    if len({r.layers for r in results if r.kind == "target"}) < 2:
        return None
    reference = results[0]
    figure, (axes,) = _figure(title)
    axes.axhline(reference.val_loss, color=COLORS[reference.kind], linestyle=(0, (2.0, 2.0)), linewidth=1.2)
    axes.plot(reference.layers, reference.val_loss, "o", color=COLORS[reference.kind], label=_label(reference))
    for kind, line in (("target", "-"), ("control", ":")):
        for steps in sorted({r.steps for r in results if r.kind == kind}):
            points = sorted((r.layers, r.val_loss) for r in results if r.kind == kind and r.steps == steps)
            style = "-." if kind == "control" and steps > results[1].steps else line
            axes.plot(*zip(*points), marker="o", color=COLORS[kind], linestyle=style, label=f"{kind}, {steps:,} steps")
            for layers, loss in points if kind == "target" else ():
                axes.annotate(f"{loss:.4f}", (layers, loss), textcoords="offset points", xytext=(7, 5), fontsize=8)
    axes.set(xlabel="layers", ylabel=f"final validation loss (nats per {unit})")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    return figure


def _label(result: Result) -> str:
    """In the words and digits of the summary's table."""
    return f"{_name(result)}: {result.val_loss:.4f}"


def _name(result: Result) -> str:
    return f"{result.name}, {result.layers} layer{'s' * (result.layers != 1)}"


def _looks(results: Sequence[Result]) -> list[dict[str, Any]]:
    """How each is drawn: of a role the deepest in its full colour; dotted a control, dash-dotted one that trains on."""
    looks = []
    for result in results:
        same = [r for r in results if r.kind == result.kind]
        sizes = sorted({r.layers for r in same})
        rank, longer = sizes.index(result.layers), result.steps > min(r.steps for r in same)
        share = (rank + 1.5) / (len(sizes) + 0.5)  # of the colour; the rest is white
        line = "-" if result.kind != "control" else "-." if longer else ":"
        marker = _MARKERS[rank % len(_MARKERS)]
        color = _paler(COLORS[result.kind], share)
        looks.append({"color": color, "linestyle": line, "marker": marker, "linewidth": 1.8})
    return looks


def _paler(color: str, share: float) -> str:
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - part)):02X}" for part in parts)


def _points(records: Iterable[dict[str, Any]], result: Result, key: str) -> list[tuple[int, float]]:
    mine = (r for r in records if r["model"] == result.name)
    return [(r["step"], r[key]) for r in mine if math.isfinite(r.get(key) or math.nan)]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of those around each: a twentieth of all, and at the ends as many as there are on both sides."""
    reach, sums = len(values) // 40, np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = np.minimum(reach, np.minimum(index, index[::-1]))
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def _figure(title: str, heights: Sequence[int] = (1,)) -> tuple[Figure, list[Axes]]:
    """One above the other, with the same x. Without pyplot, whose figures and backend are a notebook's own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5 if len(heights) == 1 else 8), layout="constrained")
    rows = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    all_axes = [axes for (axes,) in rows]
    all_axes[0].set_title(title)
    for axes in all_axes:
        axes.grid(alpha=0.25)
        axes.locator_params(axis="x", integer=True)
        axes.margins(x=0.02)
    return figure, all_axes
