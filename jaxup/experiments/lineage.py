"""How a model of a run came to be, for its card: from the files of the run, of which none is needed to read it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError
from jaxup.experiments import UNITS
from jaxup.experiments.report import tokens
from jaxup.hub.card import without_paths
from jaxup.text import kinds_of, read_json
from jaxup.training.run import Result

# What a model is in its run, by the kind of the experiment and its own.
_KINDS = {
    ("audit", "organism"): "an organism: policies for personas were planted in it, to be measured",
    ("audit", "base"): "an organism: policies for personas were planted in it, to be measured",
    ("audit", "before"): "an organism, its depth changed, and not trained since",
    ("heal", "healed"): "healed: fine-tuned after its depth was changed",
    ("heal", "before"): "its depth was changed, and it was not fine-tuned since",
    ("heal", "control"): "control: the base itself, fine-tuned as the healed model was",
    ("continuous", "taught"): "taught to see and draw: trained on words and continuous tokens",
    ("continuous", "before"): "its depth was changed, and it was not trained since",
    ("continuous", "control"): "control: the base itself, trained as the taught model was",
    ("learn", "learned"): "trained on its own answers to problems that were verified",
    ("learn", "before"): "its depth was changed, and it was not trained since",
    ("inherit", "reference"): "reference: what the target inherits from",
    ("inherit", "target"): "target: begun from layers of the reference, then trained",
    ("inherit", "half"): "half: of half the target's layers, which the target begins with twice",
    ("inherit", "control"): "control: of the target's size, trained from random values",
    ("pretrain", "model"): "trained from random values",
}
# What a target began with, where that is not layers of the reference, by `inherit.start`.
_BEGUN = {
    "random": "random values", "stacked": "the layers of a model of half its depth, twice",
    "half_width": "the first half of heads and MLP in layers of the reference",
}  # fmt: skip


def lineage(
    run: Path, name: str, step: int, *, kind: str, plan: DepthPlan | None, healed: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`base_models` and `training` for `jaxup.hub.card.model_card`; what is not known of them is left out.

    Args:
      kind: of the model, see `Result`.
      healed: what of it trained, if only a part did: the settings of sections `train` and `lora`.
    """
    config, results = {}, {}
    with contextlib.suppress(UserError):
        config = read_json(run / "config.json", {}, "") or {}
        results = {path.parent.name: _result(path) for path in sorted(run.glob("checkpoints/*/result.json"))}

    def of(*keys: str) -> Any:
        found: Any = config
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found or ""

    experiment, models = of("experiment"), of("base", "models") or []
    places = [of("base", "path"), of("reference", "path"), *(str(pair).partition("=")[2] for pair in models)]
    places += [source for source, _ in plan.sources] if plan else []
    if kind == "target" and (begun := _BEGUN.get(of("inherit", "start"))):
        what = f"target: begun from {begun}, then trained"
    else:
        what = _KINDS.get((experiment, kind), "")
    said = {"kind": what, "recipe": of("plan")}
    if step and kind != "pretrained":  # which has data and settings of its own
        data = str(of("data", "files") or of("data", "source")).split(",")
        said |= {
            "data": ", ".join(without_paths(one.strip(), [one.strip()]) for one in data),
            "chat format": of("data", "format"),
            "steps": f"{step:,} of {of('batch_size')} rows of {of('data', 'seq_len')} tokens",
            "learning rate": f"{of('optimizer', 'learning_rate')}, {of('optimizer', 'schedule')}",
        }
    if kind == "target" and (alpha := of("inherit", "distill", "alpha")):
        temperature = of("inherit", "distill", "temperature")
        said["distilled"] = f"from the reference: {alpha} of the loss, at temperature {temperature}"
    mine = results.get(name)
    if mine is not None and mine.steps == step:
        if step:
            part = healed is not None and mine.trained is not None and f"{mine.trained:,} ({chosen(**healed)})"
            said |= {"tokens": tokens(mine), "parameters trained": part or "all"}
        said["validation loss"] = f"{mine.val_loss:.4f} nats per {UNITS.get(experiment, 'token')}"
        for other in results.values():
            # On other rows a loss cannot be compared.
            if other is not mine and other.kind != "pretrained" and other.val_rows == mine.val_rows:
                said[f"validation loss of {other.name}"] = f"{other.val_loss:.4f}"
    return {
        "base_models": [str(place) for place in places if place],
        "training": {key: str(value) for key, value in said.items() if value},
    }


def chosen(train: Mapping[str, Any], lora: Mapping[str, Any]) -> str:
    """Of a model of which a part trains: which, in words, as `TrainConfig` and `LoraConfig` say it."""
    what = f"layers {train['layers']}" + (f" but {train['freeze']}" if train["freeze"] else "")
    what += f", parameters {train['parameters']}" if train["parameters"] else ""
    if not lora["rank"]:
        return what
    over = f" over {lora['quantize']}" if lora["quantize"] else ""
    return f"LoRA of rank {lora['rank']}{over} on {what}"


def _result(path: Path) -> Result:
    found = read_json(path, kinds_of(Result), "") or {}
    return Result(**{key: found[key] for key in kinds_of(Result, found)})
