"""PROBE.md: what was found in a sentence, the suggestions, and a row for each layer."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxup.depth.draw import ranges
from jaxup.lens.probe_attention import lazy
from jaxup.lens.probe_plans import Suggestion, dropped
from jaxup.text import backticks, escaped

if TYPE_CHECKING:
    from jaxup.lens.probe import Probe

_PLANS = ("criterion", "layers dropped", "left", "predicted", "measured", "costs")
_LAYERS = (
    "layer", "block influence", "skipped", "its attention", "its MLP", "rank", "mass", "norm", "gradient", "lens",
)  # fmt: skip
_MOST_ROWS = 64  # of layers; probe.json has all of them


def report(probe: Probe, out: str | None) -> str:
    """In Markdown; `out` is the directory whose plans the commands name, None if there is none yet."""
    about, loss = probe.about, float(probe.values["loss"])
    lines = [f"# {_code(probe.model)}", "", finding(probe), ""]
    lines += [
        f"Losses are nats a token, on {about['rows']} rows of {about['seq_len']} tokens of {_code(about['data'])}, and "
        f"nothing was trained. The whole model has {loss:.4f}.",
        *(f"\nNote: {escaped(note)}." for note in probe.notes),
        "", "## What may go", "",
        *_table(_PLANS, map(_row(loss), probe.suggestions)),
    ]  # fmt: skip
    if out is not None and probe.suggestions:
        best = _best(probe.suggestions)
        command = f"python -m jaxup.build {shlex.quote(f'{out}/plans/{best.name}.yaml')} OUT"
        lines += ["", "Predicted is the loss if what skipping each layer alone costs added up. Each row is a plan:", ""]
        lines += ["```bash", escaped(command), "```", "", "## What each layer does", ""]
    else:
        lines += ["", "## What each layer does", ""]
    lines += _table(_LAYERS, _layers(probe))
    if (left := about["layers"] - _MOST_ROWS) > 0:
        lines += ["", f"The last {left} are in probe.json."]
    lines += [
        "",
        "Skipped, its attention, its MLP: what the loss rises by without it. Rank: of the attention matrices of 100 "
        "tokens the largest of all heads, and mass the mean (Inheritune). Norm: of what comes out. Lens: the loss if "
        "final norm and head followed here.",
    ]
    return "\n".join(lines) + "\n"


def finding(probe: Probe) -> str:
    """The first sentence: what may go cheapest, and which layers are lazy."""
    v, loss = probe.values, float(probe.values["loss"])
    least = int(np.argmin(v["skip_layer"])), int(np.argmax(v["skip_layer"]))
    said = (
        f"Layer {least[0]} is missed least and layer {least[1]} most: without it the loss goes from {loss:.4f} to "
        f"{v['skip_layer'][least[0]]:.4f}, and to {v['skip_layer'][least[1]]:.4f}"
    )
    if probe.suggestions:
        best = _best(probe.suggestions)
        gone = dropped(best.plan)
        said += f"; without the {len(gone)} layers {ranges(gone)} it is {best.measured:.4f}"
    idle = np.flatnonzero(lazy(v["attention_rank"])).tolist()
    return escaped(f"{said}; {f'lazy are layers {ranges(idle)}' if idle else 'no layer is lazy'}.")


def _best(suggestions: Sequence[Suggestion]) -> Suggestion:
    """Of those that drop the middle number of layers, that with the least loss."""
    counts = sorted({len(dropped(s.plan)) for s in suggestions if not s.name.startswith("inherit_")})
    middle = counts[len(counts) // 2]
    return min((s for s in suggestions if len(dropped(s.plan)) == middle), key=lambda s: s.measured)


def _row(loss: float) -> Callable[[Suggestion], list[str]]:
    def row(s: Suggestion) -> list[str]:
        gone = ranges(dropped(s.plan)) or "none"
        numbers = [f"{s.predicted:.4f}", f"{s.measured:.4f}", f"{s.measured - loss:+.4f}"]
        return [f"{s.why} (`{s.name}`)", gone, str(s.plan.num_layers), *numbers]

    return row


def _layers(probe: Probe) -> Iterator[list[str]]:
    v, loss = probe.values, float(probe.values["loss"])
    for layer in range(min(probe.about["layers"], _MOST_ROWS)):
        costs = [v[f"skip_{part}"][layer] - loss for part in ("layer", "attention", "mlp")]
        yield [
            str(layer), _shown(v["block_influence"][layer]), *(f"{cost:+.4f}" for cost in costs),
            f"{v['attention_rank'][layer].max():.1f}", f"{v['attention_mass'][layer].mean():.1f}",
            _shown(v["residual_norm"][layer + 1]), _shown(v["gradient_norm"][layer]),
            f"{v['logit_lens'][layer + 1]:.4f}",
        ]  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _code(name: str) -> str:
    name = escaped(name)
    ticks = backticks(name, 1)
    return f"{ticks}{name}{ticks}"
