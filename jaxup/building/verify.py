"""Runs a built model beside what it was built from, on the same tokens: `python -m jaxup.build --verify`.

Layer by layer: a model need not fit into memory, only its largest layer. In float32 on the CPU.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from jaxup.depth.arithmetic import rescale
from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError
from jaxup.families.layouts import from_file
from jaxup.hub.reader import Checkpoint, open_checkpoint
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.layers import Block, block_norm
from jaxup.progress import Progress

_BATCH, _SEQ = 2, 32

Leaves = dict[str, np.ndarray]  # by dotted path; of one block without its layer axis


class _Model(NamedTuple):
    """What running a model needs, read when it is asked for."""

    config: ModelConfig
    leaf: Callable[[str], np.ndarray]  # path of what is no block
    block: Callable[[int], Leaves]  # layer -> paths inside the block


def verify(
    plan: DepthPlan, sources: Mapping[str, Checkpoint], out: str | Path, *, own_vocabulary: bool = False,
    progress: bool = False,
) -> str:  # fmt: skip
    """What a comparison of logits says of the model in `out`, one line each; UserError if it is not the plan's.

    It is run beside the plan carried out in memory, where not a bit may differ, and beside each
    source whole, from which a zeroed up-scale that drops nothing does not differ either. What the
    plan initialises, or mixes noise into, is taken from `out`, and so are embedding and head if they
    follow a vocabulary of the result's own.
    """
    built = open_checkpoint(out)
    result = _whole(built)
    planned = _planned(plan, sources, result, own_vocabulary)
    models = {"the plan in memory": planned} | {repr(name): _whole(sources[name]) for name, _ in plan.sources}
    smallest = min(model.config.vocab_size for model in (result, *models.values()))
    length = min(_SEQ, *(model.config.max_positions for model in (result, *models.values())))
    tokens_BS = np.random.default_rng(0).integers(0, smallest, (_BATCH, length), np.int32)
    total = sum(model.config.num_layers for model in (result, *models.values()))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        done = itertools.count(1)
        with Progress("verify", total=total, unit="layers") if progress else contextlib.nullcontext() as bar:
            advance = lambda: bar and bar.update(next(done))  # noqa: E731
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
    largest = np.max(np.abs(a_BSV - b_BSV))
    size = np.max(np.abs(b_BSV))
    return f"{largest:.3g} of {size:.3g}; the likeliest token is the same for {agree} of {a_BSV[..., 0].size}"


# ---- models read piece by piece


def _whole(checkpoint: Checkpoint) -> _Model:
    """A model as it is."""
    ends, blocks = _index(checkpoint)

    def leaf(path: str) -> np.ndarray:
        return _parts(checkpoint, ends[path])[path].astype(np.float32)

    def block(layer: int) -> Leaves:
        tensors = blocks[layer]
        leaves = {path: part for pair in tensors for path, part in _parts(checkpoint, pair).items()}
        return {path.removeprefix("blocks."): leaf.astype(np.float32) for path, leaf in leaves.items()}

    return _Model(checkpoint.config, leaf, block)


def _planned(plan: DepthPlan, sources: Mapping[str, Checkpoint], result: _Model, own_vocabulary: bool) -> _Model:
    """What the plan makes of the sources; what they do not have is the result's."""
    indexed = {name: _index(checkpoint) for name, checkpoint in sources.items()}
    tied = {name: checkpoint.config.tie_embeddings for name, checkpoint in sources.items()}

    def cast(array: np.ndarray, factors: tuple[float, ...]) -> np.ndarray:
        return rescale(array, factors, plan.dtype, plan.out_dtype).astype(np.float32)

    def leaf(path: str) -> np.ndarray:
        end = path.split(".")[0]
        origin = plan.head(tied) if end == "lm_head" else (end, getattr(plan, end))
        if origin is None or origin[1] is None or (own_vocabulary and end in ("embed_tokens", "lm_head")):
            return result.leaf(path)
        part, name = origin
        there = path if part == end else part
        array = _parts(sources[name], indexed[name][0][there])[there]
        return cast(array.T if part != end else array, plan.factors(path))

    def block(layer: int) -> Leaves:
        row = plan.rows[layer]
        leaves = result.block(layer)
        for pair in indexed[row.source][1][row.layer]:
            for path, part in _parts(sources[row.source], pair).items():
                inside = path.removeprefix("blocks.")
                if row.inherits(inside) and not (row.noise and inside.endswith(".kernel")):
                    leaves[inside] = cast(part, row.factors(inside))
        return leaves

    return _Model(result.config, leaf, block)


def _index(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[list[Any]]]:
    """(what is no block by path, what is a block by layer), as pairs of `Checkpoint.tensors`."""
    ends: dict[str, Any] = {}
    blocks: list[list[Any]] = [[] for _ in range(checkpoint.config.num_layers)]
    for tensor, info in checkpoint.tensors:
        if tensor.layer is None:
            ends |= dict.fromkeys(tensor.paths, (tensor, info))
        else:
            blocks[tensor.layer].append((tensor, info))
    return ends, blocks


def _parts(checkpoint: Checkpoint, pair: Any) -> Leaves:
    tensor, info = pair
    return dict(zip(tensor.paths, from_file(tensor, checkpoint.read(info)), strict=True))


# ---- running them


def _logits(model: _Model, tokens_BS: np.ndarray, advance: Callable[[], Any]) -> np.ndarray:
    config = model.config
    embedding = model.leaf("embed_tokens")
    x_BSD = embedding[tokens_BS]
    if config.positions == "learned":
        x_BSD = x_BSD + model.leaf("embed_positions")[: tokens_BS.shape[1]][None]
    # One program for all models that differ in depth only.
    step = _block(config.with_layers([0]) if config.layer_types is None else config)
    for layer in range(config.num_layers):
        block = traverse_util.unflatten_dict(model.block(layer), sep=".")
        x_BSD = step(block, x_BSD, np.int32(layer), np.bool_(config.window_of(layer) is None))
        advance()
    norm = {name: model.leaf(f"norm.{name}") for name in (["scale", "bias"] if config.norm_bias else ["scale"])}
    head = embedding.T if config.tie_embeddings else model.leaf("lm_head.kernel")
    return np.asarray(_head(config.with_layers([0]))(norm, x_BSD, head))


@functools.cache
def _block(config: ModelConfig) -> Callable[..., jax.Array]:
    graphdef = nnx.split(nnx.eval_shape(lambda: Block(config, Compute(attention="xla"), rngs=nnx.Rngs(params=0))))[0]

    @jax.jit
    def step(params: Any, x_BSD: jax.Array, layer: jax.Array, full: jax.Array) -> jax.Array:
        positions_BS = jnp.arange(x_BSD.shape[1], dtype=jnp.int32)[None]
        block = nnx.merge(graphdef, params)
        return block(x_BSD, layer=layer, full=full, positions_BS=positions_BS, segment_ids_BS=None)[0]

    return step


@functools.cache
def _head(config: ModelConfig) -> Callable[..., jax.Array]:
    graphdef = nnx.split(nnx.eval_shape(lambda: block_norm(config)))[0]
    return jax.jit(lambda norm, x_BSD, head_DV: nnx.merge(graphdef, norm)(x_BSD) @ head_DV)
