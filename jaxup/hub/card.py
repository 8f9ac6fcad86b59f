"""The model card: README.md with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterable

import yaml

from jaxup.depth.plan import DepthPlan
from jaxup.files.names import is_place
from jaxup.model.config import ModelConfig
from jaxup.model.spec import count_params
from jaxup.progress import printable
from jaxup.text import backticks


def model_card(
    config: ModelConfig, *, title: str, dtype: str, source: str, plan: DepthPlan | None = None,
    base_models: Iterable[str] = (), picture: str | None = None,
) -> str:  # fmt: skip
    """README.md: what the model is, its sizes, and where every layer came from.

    `source` is the model or run that it was made from, in words; without a `plan` its layers are the
    source's. Of `base_models` only Hub ids are kept, of which nothing on this machine is one. `picture`
    is a file beside the card.
    """
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["jaxup"]}
    hub = [name for name in base_models if re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII)]
    if bases := [name for name in hub if not is_place(name)]:
        front["base_model"] = bases
    gated = f"{config.activation}, gated" if config.gated_mlp else config.activation
    rows = [
        ("layers", str(config.num_layers)),
        ("parameters", f"{count_params(config):,}"),
        ("dtype", dtype),
        ("hidden size", f"{config.hidden_size:,}"),
        ("MLP size", f"{config.intermediate_size:,} ({gated})"),
        ("heads", f"{config.num_heads} of {config.head_dim}, {config.num_kv_heads} for keys and values"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("positions", f"{config.max_positions:,} ({config.positions})"),
    ]
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "",
        f"# {_code(title)}", "",
        f"Made with jaxup from {_code(source)}.", "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
        "## Layers", "",
    ]  # fmt: skip
    if plan is None:
        lines.append(f"Layers as in {_code(source)}.")
    else:
        text = printable(plan.describe())
        fence = backticks(text)
        lines.append(f"{fence}text\n{text}\n{fence}")
    if picture is not None:
        lines += ["", f"![Each layer of the result, and the layer it was made from]({picture})"]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """On one line, between more backticks than it holds in a row: nothing in it is markdown or HTML."""
    text = " ".join(printable(text).split())[:200] or "?"
    fence = backticks(text, 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"
