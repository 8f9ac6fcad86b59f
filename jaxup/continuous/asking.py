"""What `jaxup generate` does with a model that sees and draws: pictures to a file, and words of a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxup.continuous import files
from jaxup.continuous.drawing import draw, tell
from jaxup.continuous.files import Side
from jaxup.continuous.images import grid_png, read_picture
from jaxup.continuous.pairs import prompt_ids
from jaxup.errors import UserError, storage_error, within
from jaxup.files.names import in_run, split_run
from jaxup.model.decoder import Decoder
from jaxup.progress import tell as say
from jaxup.text import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def told_by(name: str, *, revision: str | None) -> Side:
    """What a model was taught by: of a directory, a run, or RUN@MODEL. UserError for one that was not."""
    found = split_run(name)
    if found is not None and found[1]:
        side = files.of_run(found[0]) if (found[0] / files.DESCRIPTION).is_file() else None
    else:
        side = files.read(in_run(name) or name, revision=revision)
    if side is None:
        hint = "`--config.experiment=continuous` teaches one" if found else ""
        raise UserError("this model was not taught to see or draw", at=name, hint=hint)
    return side


def _taught(load: Callable[[], Decoder]) -> Decoder:
    """UserError for one of a run's models that had nothing beside it yet."""
    decoder = load()
    if not decoder.beside:
        raise UserError("this model of the run was not taught to see or draw yet")
    return decoder


def draw_to(
    out: str, side: Side, tokenizer: PreTrainedTokenizerBase, load: Callable[[], Decoder], texts: Sequence[str],
    how: Mapping[str, Any], *, seed: int,
) -> None:  # fmt: skip
    """A picture for each text, as one PNG, or their continuous tokens as an array. What `how` has as None is as the
    model's own."""
    path, array = Path(out), out.lower().endswith(".npy")
    if not array and not side.encoder.decodes:
        raise UserError(
            "what this model draws is features, and no pictures", at=f"--out={out}", hint="a .npy holds them"
        )
    if not path.parent.is_dir():
        raise UserError(f"no such directory: {path.parent}", at=f"--out={out}")
    with within("--image"):
        prompts = [prompt_ids(tokenizer, text) for text in texts]
    options: Any = side.drawing | {key: value for key, value in how.items() if value is not None}
    values = draw(_taught(load), side.task, prompts, seed=seed, **options)
    if array:
        content = io.BytesIO()
        np.save(content, values)
        written = content.getvalue()
    else:
        columns = 1 if side.task.layout.frames else math.ceil(math.sqrt(len(texts)))
        written = grid_png(side.pictures(values), columns, texts)
    try:
        write_atomically(path, written)
    except OSError as error:
        raise storage_error(error, out) from None
    say(f"wrote {out}")


def tell_of(
    file: str, side: Side, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], load: Callable[[], Decoder],
    prompts: Sequence[str], *, max_tokens: int,
) -> list[str]:  # fmt: skip
    """What the model answers to each prompt about the picture, of the size that it was taught with."""
    layout = side.task.layout
    if not layout.tells:
        raise UserError(f"this model draws, and tells nothing of a picture: its layout is {layout.name!r}", at=file)
    encoder = side.encoder
    if not encoder.decodes or layout.frames:
        what = "clips" if layout.frames else "features, which `jaxup features` makes"
        raise UserError(f"this model sees {what}, and not a picture", at=file)
    with within(f"--image-in={file}"):
        size = encoder.grid[0] * encoder.patch, encoder.grid[1] * encoder.patch
        picture = read_picture(file, Path.cwd(), size=size)
        if encoder.colours == 1 and picture.ndim == 3:  # as Pillow weighs them
            picture = np.round(picture @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        elif encoder.colours == 3 and picture.ndim == 2:
            picture = np.stack([picture] * 3, -1)
    values = encoder.encode(picture)
    with within("--prompt"):
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    shown = np.stack([values] * len(ids))
    told = tell(
        _taught(load), side.task, shown, ids, max_tokens=max_tokens, eos_ids=tuple(ends), vocab_size=len(tokenizer)
    )  # fmt: skip
    return [str(tokenizer.decode(tokens)) for tokens in told]
