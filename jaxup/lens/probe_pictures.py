"""What a probe found, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxup.depth.picture import BLUE, GREEN, ORANGE, PURPLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_LINEAR = 0.01  # up to here scales are linear, and beyond it logarithmic


def pictures(values: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Name of a file -> PNG. Layer 0 is at the left."""
    figures = {
        "angular_distance": _heatmap(values["angular_distance"], "angular distance d(l, n)"),
        "skip_run": _heatmap(values["skip_run"] - values["loss"], "what the loss rises by without n layers (nats)"),
        "skip": _skips(values), "attention": _attention(values), "logit_lens": _lens(values), "norms": _norms(values),
    }  # fmt: skip
    drawn = {}
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, dpi=140)
        drawn[name] = file.getvalue()
    return drawn


def _heatmap(table: np.ndarray, title: str) -> Figure:
    """[layer, run], runs of 1 and more from the bottom up. The colours are logarithmic: the first layers, which cost a
    hundred times what others do, do not hide them."""
    from matplotlib.colors import SymLogNorm

    figure, axes = _figure(title, "first layer l")
    shown = np.ma.masked_invalid(table[:, 1:].T)
    image = axes.imshow(
        shown, origin="lower", aspect="auto", cmap="viridis", norm=SymLogNorm(_LINEAR), interpolation="nearest",
        extent=(-0.5, len(table) - 0.5, 0.5, shown.shape[0] + 0.5),
    )  # fmt: skip
    axes.grid(False)
    axes.set_ylabel("layers n")
    axes.locator_params(axis="y", integer=True)
    figure.colorbar(image, ax=axes)
    return figure


def _skips(values: Mapping[str, np.ndarray]) -> Figure:
    figure, axes = _figure("what the loss rises by without it", "layer")
    for (key, label), color, marker in zip(
        (("skip_layer", "layer"), ("skip_attention", "its attention"), ("skip_mlp", "its MLP")),
        (BLUE, ORANGE, GREEN), "osD",
    ):  # fmt: skip
        axes.plot(values[key] - values["loss"], color=color, marker=marker, markersize=4, label=label)
    axes.set_ylabel("nats a token")
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.legend(framealpha=0.9)
    return figure


def _attention(values: Mapping[str, np.ndarray]) -> Figure:
    figure, axes = _figure("rank and mass of attention (90%)", "layer")
    rank, mass = values["attention_rank"], values["attention_mass"]
    layers = np.repeat(np.arange(len(rank))[:, None], rank.shape[1], 1)
    axes.scatter(layers, rank, color=BLUE, s=10, alpha=0.3, label="rank of a head")
    axes.plot(rank.max(1), color=BLUE, label="largest rank")
    axes.plot(mass.mean(1), color=ORANGE, linestyle="--", label="mean mass")
    axes.set(ylim=(0, None))
    axes.legend(framealpha=0.9)
    return figure


def _lens(values: Mapping[str, np.ndarray]) -> Figure:
    figure, axes = _figure("loss of norm and head after so many layers", "layers")
    axes.plot(values["logit_lens"], color=BLUE, marker="o", markersize=4)
    axes.set_ylabel("nats a token")
    return figure


def _norms(values: Mapping[str, np.ndarray]) -> Figure:
    figure, axes = _figure("norms", "layer")
    for (key, label), color, line in zip(
        (("residual_norm", "hidden states before it"), ("attention_norm", "what attention adds"),
         ("mlp_norm", "what the MLP adds"), ("gradient_norm", "gradient of its parameters")),
        (BLUE, ORANGE, GREEN, PURPLE), ("-", "--", "-.", ":"),
    ):  # fmt: skip
        axes.plot(values[key], color=color, linestyle=line, label=label)
    axes.set_yscale("log")
    axes.legend(framealpha=0.9)
    return figure


def _figure(title: str, xlabel: str) -> tuple[Figure, Axes]:
    """Without pyplot, whose figures and backend are a notebook's own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel)
    axes.grid(alpha=0.25)
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.02)
    return figure, axes
