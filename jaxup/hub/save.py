"""`jaxup.save`: a Decoder as a Hugging Face model directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax

from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError
from jaxup.families import NATIVE, with_family_biases
from jaxup.files.bucket import place
from jaxup.files.names import split_revision
from jaxup.hub import writer
from jaxup.hub.card import model_card
from jaxup.hub.directory import CARD, PLAN, carried_files
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Decoder, Params
from jaxup.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save(
    model: Decoder,
    out: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
    native: bool | None = None,
    progress: bool = False,
) -> None:
    """Writes the directory `out`, which transformers and `jaxup.load` read; if it is `native` the latter alone.

    A model that `jaxup.load` gave takes its tokenizer, chat template, generation config and special
    token ids along, and stays of its family. If its arrays span processes, every process calls this.
    One tensor at a time is taken off the devices.

    Args:
      model: its params may have any sharding.
      tokenizer: or a directory or Hub id that holds one; replaces that which the model came with.
      dtype: of the tensors: "float32", "bfloat16" or "float16". None keeps what each has.
      max_shard_size: of a file: bytes, or such as "5GB" (10^9) or "2GiB" (2^30).
      force: replaces `out` if it is empty or holds a model.
      native: True: in the format of this project's own, which has all that a `ModelConfig` says. Where layers are
        normalised otherwise than x + F(N(x)), nothing else has. False: in one of transformers; the factors of
        LayerNorm scaling are then folded into the norms' weights. None: as the model came, else as with False.
      progress: show it on stderr.

    Raises:
      UserError: and `out` is as it was: it exists, no transformers family computes the model, a
        value is NaN or infinite or too large for `dtype`, or the disk is too small.
    """
    origin = model.origin
    if isinstance(tokenizer, str | os.PathLike):
        from jaxup.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(os.fspath(tokenizer))
    inherited: dict[str, Any] = {"source": "a model made in Python"}
    if origin is not None:
        names = [origin.path, *(name for name, _ in (origin.plan.sources if origin.plan else ()))]
        inherited = {
            "source": origin.path, "plan": origin.plan, "model_type": origin.model_type,
            "base_models": [split_revision(name)[0] for name in dict.fromkeys(names)],
            "carried": carried_files(origin.path, origin.revision) if tokenizer is None else None,
            "hf_extra": {name: list(i) if isinstance(i, tuple) else i for name, i in origin.token_ids},
        }  # fmt: skip
    came = inherited.pop("model_type", None)
    if native is not None and native != (came == NATIVE.model_type):
        came = NATIVE.model_type if native else None
    write_model(
        out, model.config, model.params, title=Path(out).name, dtype=dtype, model_type=came,
        tokenizer=tokenizer, force=force, max_shard_size=max_shard_size, progress=progress, **inherited,
    )  # fmt: skip


def write_model(
    out: str | os.PathLike, config: ModelConfig, params: Params, *, title: str, source: str,
    plan: DepthPlan | None = None, base_models: Iterable[str] = (), training: Mapping[str, str] = MappingProxyType({}),
    dtype: str | None = None, falls_back: bool = False, model_type: str | None = None,
    extra_files: Mapping[str, str | bytes] = MappingProxyType({}), **how: Any,
) -> None:  # fmt: skip
    """`writer.save` with a card, of which see `model_card` for the arguments, and with the plan.

    `falls_back`: what no family of transformers computes is written in the format of this project's own, which is said.
    """
    if falls_back and model_type != NATIVE.model_type:
        try:
            with_family_biases(config)
        except UserError as error:
            model_type = NATIVE.model_type
            if jax.process_index() == 0:
                say(f"{out}: in jaxup's own format: {error.what.removeprefix('model: ')}")
    card = model_card(
        config, title=title, dtype=dtype or writer.main_dtype(params), plan=plan, source=source,
        base_models=base_models, training=training, native=model_type == NATIVE.model_type,
    )  # fmt: skip
    extra = {CARD: card, **({} if plan is None else {PLAN: plan.to_yaml()}), **extra_files}
    writer.save(place(os.fspath(out)), config, params, dtype=dtype, model_type=model_type, extra_files=extra, **how)
