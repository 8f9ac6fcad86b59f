"""What each layer of a model does, on text: `jaxup.probe`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxup.depth import recipes
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import depth_within
from jaxup.errors import UserError
from jaxup.files.staging import staged_directory
from jaxup.hub.load import load
from jaxup.lens.probe_layers import Layers, angles, run_passes
from jaxup.lens.probe_plans import Suggestion, choose, predicted, proposals
from jaxup.lens.probe_report import report
from jaxup.lens.probe_text import as_rows, read_ids, tokenizer_of
from jaxup.model.decoder import Decoder
from jaxup.model.spec import depth_params
from jaxup.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "probe.json"
FORMAT = 1
SEQ_LEN, ROWS, BATCH = 512, 16, 4
# "layer" is one of L layers, "depth" 0 to L layers that have run, "run" 0 to L layers one after the other.
AXES: dict[str, tuple[str, ...]] = {
    "loss": (), "block_influence": ("layer",), "angular_distance": ("layer", "run"), "skip_layer": ("layer",),
    "skip_attention": ("layer",), "skip_mlp": ("layer",), "skip_run": ("layer", "run"), "logit_lens": ("depth",),
    "attention_rank": ("layer", "head"), "attention_mass": ("layer", "head"), "residual_norm": ("depth",),
    "attention_norm": ("layer",), "mlp_norm": ("layer",), "gradient_norm": ("layer",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Probe:
    """What each layer of a model does to the tokens of a text. Losses are nats a token, before any training.

    Attributes:
      model: its place, which is what the plans call it.
      about: layers, params (of what is no layer, of a layer), data, rows, seq_len, layer_passes.
      values: float64 arrays, whose axes are AXES; NaN where there is nothing.
        loss: of the whole model.
        block_influence: 1 - E[cos(x_l, x_l+1)] over all tokens (ShortGPT).
        angular_distance[l, n]: arccos(cos(x_l, x_l+n)) / pi at the last token of a row (Deeper Layers).
        skip_layer, skip_attention, skip_mlp: the loss without the layer, its attention or its MLP.
        skip_run[l, n]: the loss without the n layers from l on.
        logit_lens: the loss of final norm and head applied after so many layers.
        attention_rank, attention_mass: Inheritune's, of the first 100 tokens of a row, means over rows.
        residual_norm: mean norm of the hidden states after so many layers.
        attention_norm, mlp_norm: of what they add to them.
        gradient_norm: of a batch's mean loss by all parameters of the layer, the mean over batches.
      suggestions: plans, with predicted and measured losses.
      notes: what the reader should know.
    """

    model: str
    about: dict[str, Any]
    values: dict[str, np.ndarray]
    suggestions: tuple[Suggestion, ...]
    notes: tuple[str, ...]

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The names of each array's axes."""
        return AXES

    def drop(
        self, *, layers: int | None = None, params: int | float | None = None, by: str = "block_influence"
    ) -> DepthPlan:
        """The plan of a model of so many layers, or of at most so many parameters: without those that do least.

        `by` is "block_influence", "angular_distance" or "loss", of a run of layers. UserError for more than there is.
        """
        if (layers is None) == (params is None):
            raise UserError("what is left is said in one way: layers=24 or params=6e9", at="drop")
        count = self.about["layers"]
        left = depth_within(count, layers=layers, params=params, sizes=self.about["params"], source=self.model)
        kept = sorted({*range(count)} - {*choose(by, self.values, count - left)})
        return recipes.inherit(self.model, count, kept)

    def save(self, out: str | os.PathLike, *, force: bool = False) -> None:
        """Makes the directory `out`: probe.json, PROBE.md, pictures, and plans/NAME.yaml for each suggestion."""
        from jaxup.lens.probe_pictures import pictures

        with staged_directory(Path(out), force=force, marks=(FILE,)) as directory:
            (directory / FILE).write_text(self.to_json())
            (directory / "PROBE.md").write_text(report(self, str(out)))
            for name, drawn in pictures(self.values).items():
                (directory / f"{name}.png").write_bytes(drawn)
            (directory / "plans").mkdir()
            for suggestion in self.suggestions:
                (directory / "plans" / f"{suggestion.name}.yaml").write_text(suggestion.plan.to_yaml())

    def to_json(self) -> str:
        """NaN is null; what is no ASCII is escaped."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(each) for each in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        suggestions = [
            {"name": s.name, "why": s.why, "layers": s.plan.num_layers, "predicted": plain(s.predicted),
             "measured": plain(s.measured), "plan": s.plan.to_yaml()} for s in self.suggestions
        ]  # fmt: skip
        values = {name: {"axes": AXES[name], "values": plain(v.tolist())} for name, v in self.values.items()}
        about = {"format": FORMAT, "model": self.model, "about": self.about, "values": values}
        return json.dumps(about | {"suggestions": suggestions, "notes": self.notes}) + "\n"

    def __str__(self) -> str:
        return report(self, None)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def probe(
    model: str | os.PathLike | Decoder, data: str | np.ndarray = "python", *,
    tokenizer: PreTrainedTokenizerBase | None = None, name: str = "", source: str = "", rows: int = ROWS,
    seq_len: int | None = None, batch_size: int = BATCH, longest_run: int | None = None, drop: Sequence[int] = (),
    progress: bool = False,
) -> Probe:  # fmt: skip
    """Runs a model on text and says what each of its layers does; see `Probe`.

    Args:
      model: a directory, Hub id or URL, which is loaded, or a loaded one.
      data: what a training's `data.source` may be; or token ids, int [tokens] or [rows, seq_len + 1].
      tokenizer: None: that which the model came with.
      name, source: what plans call the model, by default its place; and what the text is called.
      rows, seq_len: how much text; by default rows of 512 tokens, or as many as the model has positions.
      batch_size: rows that are computed at once.
      longest_run: of layers that are skipped together; None: as long as there are.
      drop: how many layers the suggestions are to be without; by default an eighth, a quarter and a half of them.
      progress: show it on stderr.

    Raises:
      UserError: no such model or text, too little text, tokens or layers that the model lacks.
    """
    given = {"rows": rows, "batch_size": batch_size, "seq_len": seq_len, "longest_run": longest_run}
    for what, number in given.items():
        if number is not None and number < 1:
            raise UserError("must be at least 1", at=f"{what}={number}")
    if isinstance(data, str) and tokenizer is None:
        tokenizer = tokenizer_of(model)
    if isinstance(data, str):
        assert tokenizer is not None
        length = seq_len or SEQ_LEN
        source, data = source or data, read_ids(data, tokenizer, rows * length + 1, least=length + 1)
    else:
        source = source or "tokens"
    if not isinstance(model, Decoder):
        name = name or str(model)
        model = load(model, dtype="float32", progress=progress)
    config = model.config
    if config.positions == "learned" and seq_len is not None and seq_len > config.max_positions:
        raise UserError(f"the model has learned {config.max_positions} positions", at=f"seq_len={seq_len}")
    data = np.asarray(data)
    if data.ndim == 1:
        data = as_rows(data, min(seq_len or SEQ_LEN, config.max_positions), rows)
    if data.ndim != 2 or data.shape[1] < 2 or not len(data):
        raise UserError(f"ids of the shape {[*data.shape]} are no rows of two tokens or more", at="data")
    if not (data.min() >= 0 and (most := data.max()) < config.vocab_size):
        raise UserError(f"it has token {most}, and the model {config.vocab_size:,}", at="data")
    counts = sorted(set(drop)) or sorted({config.num_layers // part for part in (8, 4, 2)} - {0})
    for count in counts:
        if not 0 < count < config.num_layers:
            raise UserError(f"the model has {config.num_layers} layers", at=f"drop={count}")
    origin = getattr(model.origin, "path", "model")
    return _probed(model, name or origin, source, data.astype(np.int32), batch_size, longest_run, counts, progress)


def _probed(
    model: Decoder, name: str, source: str, rows: np.ndarray, batch_size: int, longest: int | None,
    counts: Sequence[int], progress: bool,
) -> Probe:  # fmt: skip
    count, notes = model.config.num_layers, list[str]()
    longest, batch_size = min(longest or count, count), min(batch_size, len(rows))
    if rest := len(rows) % batch_size:  # batches of one shape share their programs, and all weigh the same
        notes.append(f"of {len(rows)} rows the last {rest} are left out: batches have {batch_size}")
        rows = rows[: len(rows) - rest]
    batches = [(part[:, :-1], part[:, 1:]) for part in np.split(rows, len(rows) // batch_size)]
    each = count + run_passes(count, longest) + count * (count - 1)
    total = len(batches) * (each + (4 * len(counts) + 1) * count)  # plans are shorter, but not known yet
    with Progress("probe", total=total, unit="layer passes", shown=progress) as bar:
        layers = Layers(model, bar.update)
        found = [_batch(layers, *batch, longest) for batch in batches]
        values = {key: np.asarray(np.mean([one[key] for one in found], axis=0)) for key in found[0]}
        values["angular_distance"] = angles(np.concatenate([one.pop("last") for one in found], axis=1))
        del values["last"]
        suggestions = []
        for title, why, plan in proposals(name, count, values, counts) if count > 1 else ():
            losses = [layers.order_loss(*batch, plan.order()) for batch in batches]
            measured = float(np.mean(losses, dtype=np.float64))
            suggestions.append(Suggestion(title, why, plan, predicted(values, plan), measured))
    about = {
        "layers": count, "params": depth_params(model.config), "data": source, "rows": len(rows),
        "seq_len": rows.shape[1] - 1, "layer_passes": layers.passes,
    }  # fmt: skip
    return Probe(name, about, {key: values[key] for key in AXES}, tuple(suggestions), tuple(notes))


def _batch(layers: Layers, tokens_BS: np.ndarray, targets_BS: np.ndarray, longest: int) -> dict[str, Any]:
    """Everything of one batch; its hidden states are kept no longer."""
    count = layers.num_layers
    states, seen = layers.states(tokens_BS)
    runs = layers.run_losses(states, targets_BS, longest)
    skip_run = np.full((count, count + 1), np.nan)
    for (first, length), loss in runs.items():
        if first < count:
            skip_run[first, length] = loss
    if not np.isfinite(whole := runs[count, 0]):
        raise UserError(f"the loss of the model on this text is {float(whole)}", hint="are all of its weights finite?")
    skip_run[:, 0] = whole
    rank, mass = layers.attention(states)
    without = {
        f"skip_{part}": [
            layers.loss(getattr(one, f"without_{part}"), range(at + 1, count), targets_BS)
            for at, one in enumerate(seen)
        ]
        for part in ("attention", "mlp")
    }
    last = np.stack([np.asarray(x_BSD[:, -1], np.float32) for x_BSD in states])
    of = {
        "loss": whole, "logit_lens": [runs[first, count - first] for first in range(count + 1)], "last": last,
        "skip_run": skip_run, "skip_layer": skip_run[:, 1], **without, "attention_rank": rank, "attention_mass": mass,
        "block_influence": [one.influence for one in seen],
        "residual_norm": [*(one.norm for one in seen), layers.norm(states[-1])],
        "attention_norm": [one.attention_norm for one in seen], "mlp_norm": [one.mlp_norm for one in seen],
        "gradient_norm": layers.gradient_norms(states, targets_BS),
    }  # fmt: skip
    return {key: np.asarray(value, np.float64) for key, value in of.items()}
