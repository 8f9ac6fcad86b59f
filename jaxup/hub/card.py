"""The model card: README.md with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import yaml
from huggingface_hub import metadata_load

from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError
from jaxup.files.names import in_run
from jaxup.hub.directory import CARD
from jaxup.model.config import ModelConfig
from jaxup.model.spec import count_params
from jaxup.progress import printable
from jaxup.text import backticks, read_json

_HUB_ID = re.compile(r"(?!.*\.\.)\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+", re.ASCII)  # a download of huggingface_hub
_PATH = re.compile(r"(?<![\w.:/~<-])(~[\w.-]*)?/[^\s,:;()'\"\[\]=@*]+")  # an absolute one, among other words


def model_card(
    config: ModelConfig, *, title: str, dtype: str, source: str, plan: DepthPlan | None = None,
    base_models: Iterable[str] = (), picture: str | None = None, training: Mapping[str, str] = MappingProxyType({}),
    native: bool = False,
) -> str:  # fmt: skip
    """README.md: what the model is, its sizes, how it was trained, and where every layer came from.

    `source` is the model or run that it was made from, in words; without a `plan` its layers are the
    source's. `base_models` are the places of those that it was made from: `base_model` are the Hub ids that they
    are or name. `picture` is a file beside the card. `training` is a table of what was done since, if anything was;
    then it is a fine-tune of its base models. What is `native` transformers cannot load. Of directories of this machine
    only their names are shown.
    """
    places = list(dict.fromkeys(base_models))
    front: dict[str, object] = {
        "library_name": "jaxup" if native else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxup"],
    }
    if bases := list(dict.fromkeys(hub_id for place in places for hub_id in _hub_ids(place))):
        front["base_model"] = bases
        if training:
            front["base_model_relation"] = "finetune"
    source = without_paths(source, places)
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
    if (norms := config.placement_words()) != "pre":
        rows.append(("norms", norms))
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "",
        f"# {_code(title)}", "",
        f"Made with jaxup from {_code(source)}.", "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
        "## Layers", "",
    ]  # fmt: skip
    if training:
        said = {key: _code(without_paths(value, places)).replace("|", r"\|") for key, value in training.items()}
        table = [f"| {key} | {value} |" for key, value in said.items()]
        lines[-2:-2] = ["## Training", "", "| | |", "|---|---|", *table, ""]
    if plan is None:
        lines.append(f"Layers as in {_code(source)}.")
    else:
        text = printable(_without_paths(plan, places).describe())
        fence = backticks(text)
        lines.append(f"{fence}text\n{text}\n{fence}")
    if picture is not None:
        lines += ["", f"![Each layer of the result, and the layer it was made from]({picture})"]
    return "\n".join(lines) + "\n"


def without_paths(text: str, places: Iterable[str] = ()) -> str:
    """With the names of directories in the stead of absolute paths, and of those `places` that are of this machine."""
    for place in sorted(places, key=len, reverse=True):
        if "/" in place and os.path.lexists(os.path.expanduser(place)):
            text = text.replace(place, _last(place))
    return _PATH.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    """What a directory is known by: the Hub id of a download, RUN/export, or its own name."""
    if cached := _CACHED.search(path):
        return "/".join(cached.groups())
    parts = path.rstrip("/").split("/")
    return "/".join(parts[-2:]).lstrip("/") if parts[-1] == "export" else parts[-1] or path


def _without_paths(plan: DepthPlan, places: Iterable[str]) -> DepthPlan:
    names: dict[str, str] = {}
    for name, _ in plan.sources:
        short = without_paths(name, places)
        again = sum(other.partition(" (")[0] == short for other in names.values())
        names[name] = f"{short} ({again + 1})" if again else short  # two directories of one name are two models
    return plan.renamed(names)


def _hub_ids(place: str) -> list[str]:
    """The Hub ids that say what a model is: its own, else what its files name as what it was made from."""
    root = Path(os.path.expanduser(place))
    with contextlib.suppress(UserError):  # a run that was taken away, say
        root = in_run(place) or root
    if not root.is_dir():
        return [place] if _HUB_ID.fullmatch(place) else []
    if cached := _CACHED.search(str(root.absolute())):
        return ["/".join(cached.groups())]
    named: object = None
    with contextlib.suppress(UserError):
        named = (read_json(root / "config.json", {}, "") or {}).get("_name_or_path")
    if not (isinstance(named, str) and _HUB_ID.fullmatch(named)):
        named, card = None, root / CARD
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            if card.is_file() and card.stat().st_size < 2**20:
                front = metadata_load(card)
                named = front.get("base_model") if isinstance(front, dict) else None
    several = named if isinstance(named, list) else [named]
    return [name for name in several if isinstance(name, str) and _HUB_ID.fullmatch(name)]


def _code(text: str) -> str:
    """On one line, between more backticks than it holds in a row: nothing in it is markdown or HTML."""
    text = " ".join(printable(text).split())[:200] or "?"
    fence = backticks(text, 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"
