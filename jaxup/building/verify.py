"""Runs a built model beside what it was built from, on the same tokens: `python -m jaxup.build --verify`.

Layer by layer: a model need not fit into memory, only its largest layer. In float32 on the CPU.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxup import devices
from jaxup.depth.arithmetic import rescale
from jaxup.depth.materials import Bill
from jaxup.errors import UserError
from jaxup.families.layouts import Tensor, from_file
from jaxup.files.header import TensorInfo
from jaxup.hub.reader import Checkpoint, open_checkpoint
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Decoder, abstract
from jaxup.model.spec import STACK, flatten, spec, unflatten
from jaxup.progress import Progress

_BATCH, _SEQ = 2, 32

Leaves = dict[str, np.ndarray]  # by path


def verify(
    bill: Bill, sources: Mapping[str, Checkpoint], out: str | Path, *, own_vocabulary: bool = False,
    progress: bool = False,
) -> str:  # fmt: skip
    """What a comparison of logits says of the model in `out`, one line each; UserError if it is not the plan's.

    It is run beside the bill carried out in memory, where not a bit may differ, and beside each source,
    from which a zeroed up-scale that drops nothing does not differ either. What is new, or has noise, is
    taken from `out`, and so are embedding and head if they follow a vocabulary of the result's own.
    """
    result = _whole(open_checkpoint(out))
    planned = _planned(bill, sources, result, own_vocabulary)
    models = {"the plan in memory": planned} | {repr(name): _whole(source) for name, source in sources.items()}
    smallest = min(model.config.vocab_size for model in (result, *models.values()))
    length = min(_SEQ, *(model.config.max_positions for model in (result, *models.values())))
    tokens_BS = np.random.default_rng(0).integers(0, smallest, (_BATCH, length), np.int32)
    total = sum(model.config.num_layers for model in (result, *models.values()))
    with devices.host():
        done = itertools.count(1)
        with Progress("verify", total=total, unit="layers", shown=progress) as bar:
            advance = lambda: bar.update(next(done))  # noqa: E731
            ours_BSV = _logits(result, tokens_BS, advance)
            theirs = {name: _logits(model, tokens_BS, advance) for name, model in models.items()}
    lines = [f"verify: logits of {tokens_BS.size} random tokens in float32, the largest difference from"]
    for name, logits_BSV in theirs.items():
        same = np.array_equal(ours_BSV, logits_BSV, equal_nan=True)
        if name == "the plan in memory" and not same:
            raise UserError(f"verify: the result is not what the plan makes: {_difference(ours_BSV, logits_BSV)}")
        lines.append(f"  {name}: {'0, bit for bit' if same else _difference(ours_BSV, logits_BSV)}")
    return "\n".join(lines)


def _difference(a_BSV: np.ndarray, b_BSV: np.ndarray) -> str:
    if a_BSV.shape != b_BSV.shape:
        return f"not compared: vocabularies of {a_BSV.shape[-1]:,} and {b_BSV.shape[-1]:,} tokens"
    if not (np.isfinite(a_BSV).all() and np.isfinite(b_BSV).all()):
        return "NaN or infinity in the logits"
    agree = int(np.sum(a_BSV.argmax(-1) == b_BSV.argmax(-1)))
    largest, size = np.max(np.abs(a_BSV - b_BSV)), np.max(np.abs(b_BSV))
    return f"{largest:.3g} of {size:.3g}; the likeliest token is the same for {agree} of {a_BSV[..., 0].size}"


# ---- models read piece by piece


class _Model(NamedTuple):
    """What running a model needs, read when it is asked for."""

    config: ModelConfig
    leaf: Callable[[str, int | None], np.ndarray]  # (path, layer) -> float32, without the axis of layers


def _whole(checkpoint: Checkpoint) -> _Model:
    """A model as it is."""
    leaf = _reader(checkpoint)
    return _Model(checkpoint.config, lambda path, layer: leaf(path, layer).astype(np.float32))


def _planned(bill: Bill, sources: Mapping[str, Checkpoint], result: _Model, own_vocabulary: bool) -> _Model:
    """What the materials come to; what the sources do not have is the result's."""
    readers = {name: _reader(checkpoint) for name, checkpoint in sources.items()}

    def leaf(path: str, layer: int | None) -> np.ndarray:
        made = bill[path][layer or 0] if path in bill else None  # None: a bias that the family always has
        reordered = own_vocabulary and path in ("embed_tokens", "lm_head.kernel")
        if made is None or made.source is None or made.noise or reordered:
            return result.leaf(path, layer)
        array = readers[made.source](made.path, made.layer)
        array = array if made.path.startswith(STACK) or made.path == path else array.T
        return rescale(array, made.factors, made.before, made.after).astype(np.float32)

    return _Model(result.config, leaf)


def _reader(checkpoint: Checkpoint) -> Callable[[str, int | None], np.ndarray]:
    """(path, layer) -> the parameter as it is stored; the tensor read last is kept, which may hold several."""
    where = {(path, tensor.layer): (tensor, info) for tensor, info in checkpoint.tensors for path in tensor.paths}

    @functools.lru_cache(maxsize=1)
    def parts(tensor: Tensor, info: TensorInfo) -> list[np.ndarray]:
        return from_file(tensor, checkpoint.read(info))

    def leaf(path: str, layer: int | None) -> np.ndarray:
        tensor, info = where[path, layer]
        return parts(tensor, info)[tensor.paths.index(path)]

    return leaf


# ---- running them


def _logits(model: _Model, tokens_BS: np.ndarray, advance: Callable[[], Any]) -> np.ndarray:
    """The Decoder's own steps, with the parameters of one of them in memory."""
    config, table = model.config, spec(model.config)

    def leaves(*parts: str) -> Leaves:
        return {path: model.leaf(path, None) for path, param in table.items() if param.part in parts}

    embedding = leaves("embed_tokens", "embed_positions")
    x_BSD = _embed(config.with_layers([0]))(embedding, tokens_BS)
    for layer in range(config.num_layers):
        block = {path: model.leaf(path, layer)[None] for path, param in table.items() if param.stacked}
        # One program for all layers of a kind, of whichever model.
        x_BSD = _block(config.with_layers([layer]))(block, x_BSD)
        advance()
    head = {"embed_tokens": embedding["embed_tokens"]} if config.tie_embeddings else leaves("lm_head")
    return np.asarray(_head(config.with_layers([0]))(leaves("norm") | head, x_BSD))


def _program(run: Callable[[Decoder, jax.Array], jax.Array]) -> Callable[[ModelConfig], Callable[..., jax.Array]]:
    """config -> a compiled (leaves, x) -> run(a Decoder that has these leaves, and of the others the shapes, x)."""

    @functools.cache
    def compiled(config: ModelConfig) -> Callable[..., jax.Array]:
        shapes, compute = flatten(abstract(config)[1]), Compute(attention="xla")
        return jax.jit(lambda leaves, x: run(Decoder(config, unflatten(shapes | leaves), compute), x))

    return compiled


def _positions(x: jax.Array) -> jax.Array:
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]


_embed = _program(lambda decoder, tokens_BS: decoder.embed(tokens_BS, _positions(tokens_BS)))
_block = _program(lambda decoder, x_BSD: decoder.run(x_BSD, _positions(x_BSD))[0])
_head = _program(lambda decoder, x_BSD: decoder.logits(decoder.norm(x_BSD)))
