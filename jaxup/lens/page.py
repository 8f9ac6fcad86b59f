"""Differences as one page that needs nothing else: no network, no build; without JavaScript it is a table."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxup.depth.draw import CHARACTERS
from jaxup.depth.picture import COLORS, ON
from jaxup.lens.heatmap import FENCE, LABELS, MAP, SCALES, labels, letters
from jaxup.text import escaped

if TYPE_CHECKING:
    from jaxup.lens.differences import Differences

_DIGITS = 6


def page(found: Differences) -> str:
    """The HTML. Names in it are data: scripts and styles other than the page's own do not run."""
    template = files("jaxup.lens").joinpath("page.html").read_text("utf-8")
    own = {tag: _hash(template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]) for tag in ("style", "script")}
    allowed = "; ".join(f"{tag}-src {digest}" for tag, digest in own.items())
    names = [escaped(name) for name in found.models]
    parts = {
        "csp": f"default-src 'none'; base-uri 'none'; form-action 'none'; {allowed}",
        "title": escape(f"What became of {names[0]}: {', '.join(names[1:])}"),
        "table": "".join(_tables(found)), "data": _json(found),
    }  # fmt: skip
    return re.sub(r"\{(csp|title|table|data)\}", lambda place: parts[place[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(found: Differences) -> str:
    """Within a script element: nothing in it can end that."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    about = {
        **{name: [escaped(text) for text in getattr(found, name)] for name in ("models", "modules", "notes")},
        "pairs": found.pairs, "origins": [(o.layer, o.role, escaped(o.source)) for o in found.origins],
        "labels": labels(found.origins),
        "letters": {escaped(source): letter for source, letter in letters(found.origins).items()},
        "values": {metric: _plain(values.tolist()) for metric, values in found.values.items()},
        "ends": {metric: {end: _plain(of.tolist()) for end, of in ends.items()} for metric, ends in found.ends.items()},
        "metrics": {metric: LABELS[metric] for metric in found.values}, "scales": SCALES, "fence": FENCE,
        "roles": {role: (meaning, COLORS[role], ON[role]) for role, (meaning, _) in CHARACTERS.items()},
        "colors": [to_hex(color) for color in colormaps[MAP](np.linspace(0, 1, 65))],
    }  # fmt: skip
    return json.dumps(about, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def _plain(values: Any) -> Any:
    """Nested lists, in which NaN is null; few digits, since a page has many numbers."""
    if isinstance(values, list):
        return [_plain(each) for each in values]
    return None if math.isnan(values) else "inf" if math.isinf(values) else float(f"{values:.{_DIGITS}g}")


def _tables(found: Differences) -> Iterator[str]:
    """The first metric of all pairs."""
    metric, values = next(iter(found.values.items()))
    for pair, (a, b) in enumerate(found.pairs):
        yield f"<table><caption>{_cell(LABELS[metric])}: {_cell(found.models[a])} → {_cell(found.models[b])}</caption>"
        yield f"<tr><th>layer{''.join(f'<th scope=col>{_cell(module)}' for module in found.modules)}"
        for row, label in reversed(list(enumerate(labels(found.origins)))):
            cells = "".join("<td>" if math.isnan(v) else f"<td>{v:.3g}" for v in values[pair, row])
            yield f"<tr><th scope=row>{label} {found.origins[row].role}{cells}"
        yield "</table>"


def _cell(text: str) -> str:
    return escape(escaped(text))
