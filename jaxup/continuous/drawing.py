"""Images and clips drawn by what a `Task` has trained, and words after an image: by a cache of keys and values.

Each layout has its own way through the same two functions: what is fed next, and what is drawn from what the decoder
then says. A whole drawing is one program.

Shape suffixes: B rows that are drawn, R rows of the decoder (with guidance as many again, without their prompts),
P positions of prompts, S all positions, N tokens of an image or a frame, C channels, D hidden, K sets.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxup.continuous.layouts import BEGIN, END, FIRST, MASK, NULL, Frames, Raster, Scales, Sets, up
from jaxup.continuous.sets import sizes
from jaxup.continuous.task import Task, white
from jaxup.errors import UserError
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Decoder, KVCache, Params, abstract, check_numbers

# Prompts are padded to a multiple of it: lengths nearby share their programs.
_BUCKET = 16


def draw(
    decoder: Decoder, task: Task, prompts: Sequence[Sequence[int]] | Sequence[np.ndarray], *, seed: int,
    head_steps: int, temperature: float, guidance: float, sets: int = 1, schedule: str = "nova", cached: bool = True,
    batch: int = 64,
) -> np.ndarray:  # fmt: skip
    """float32 [B, N, C], of clips [B, F, N, C]: an image for each prompt.

    A row depends on its prompt, its index, `seed` and the other keywords, and not on the other rows, up to the rounding
    of the padding that they bring; at most `batch` are drawn at once.

    Args:
      head_steps, temperature: of the head, whose steps are those of each token or map; see `Head.sample`.
      guidance: how far what is drawn is moved from what would be drawn without a prompt (Ho & Salimans, arXiv
        2207.12598); 1 = not. Of sets it grows with the share that is drawn, from 1 to this, as MAR's does.
      sets, schedule: of layouts that draw tokens in sets; see `jaxup.continuous.sets`.
      cached: whether keys and values are kept; if not, all positions are computed anew at each step.

    UserError for tokens or positions that the model does not have, for numbers that mean nothing, and for guidance of a
    model that has never drawn without a prompt.
    """
    layout = task.layout
    if not math.isfinite(guidance) or not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(
            f"guidance={guidance} and temperature={temperature} must be finite, and temperature not negative"
        )
    if head_steps < 1:
        raise UserError(f"head_steps={head_steps} must be at least 1")
    if guidance != 1 and not layout.drop:
        what = f"guidance={guidance} needs a model that has learned to draw without its prompt as well"
        raise UserError(what, hint="train with drop=0.1, or guidance=1")
    in_sets = isinstance(layout, Sets) or task.spatial is not None
    tokens = layout.count if isinstance(layout, Sets) else layout.rows * layout.columns
    schedules = sizes(tokens, sets, schedule) if in_sets else ()
    config, params = decoder.config, decoder.params
    program = _drawing(config, _compute(decoder), _mesh(params), task, head_steps, schedules, guidance != 1, cached)
    drawn = []
    for rows, tokens_BP, first_B in _chunks(config, prompts, layout.image, batch):
        given = np.uint32(seed), rows, np.float32(temperature), np.float32(guidance)
        drawn.append(program(params, tokens_BP, first_B, *given))
    return _rows(drawn, len(prompts)).reshape(len(prompts), *layout.shape)


def tell(
    decoder: Decoder, task: Task, values_BNC: np.ndarray, prompts: Sequence[Sequence[int]] | Sequence[np.ndarray], *,
    max_tokens: int, eos_ids: Collection[int] = (), vocab_size: int | None = None, batch: int = 64,
) -> list[list[int]]:  # fmt: skip
    """The likeliest tokens after each image and its prompt, at most `max_tokens`, up to the first of `eos_ids`.

    Token ids from `vocab_size` on (a table padded beyond its tokenizer) are never taken. UserError as of `draw`.
    """
    layout, config = task.layout, decoder.config
    if not layout.tells:
        raise UserError(f"layout {layout.name!r} draws and cannot tell of an image", hint="layout 'raster' can")
    if np.shape(values_BNC) != (wanted := (len(prompts), *layout.shape)):
        raise UserError(f"values of shape {[*np.shape(values_BNC)]} for {len(prompts)} prompts: {[*wanted]} would do")
    values = np.asarray(values_BNC, np.float32).reshape(len(prompts), layout.count, layout.channels)
    if not np.isfinite(values).all():
        raise UserError(f"the values of image {np.argwhere(~np.isfinite(values))[0][0]} are not all finite")
    params = decoder.params
    program = _telling(config, _compute(decoder), _mesh(params), task, max_tokens, vocab_size)
    told = []
    for rows, tokens_BP, first_B in _chunks(config, prompts, layout.image + max_tokens, batch):
        told.append(program(params, tokens_BP, first_B, values[rows]))
    texts = _rows(told, len(prompts)).tolist()
    ends = [next((i for i, token in enumerate(text) if token in eos_ids), len(text)) for text in texts]
    return [text[:end] for text, end in zip(texts, ends)]


def _compute(decoder: Decoder) -> Compute:
    return dataclasses.replace(decoder.compute, batch_axes=())


def _mesh(params: Params) -> Mesh | None:
    """That the parameters lie on, if they do: all of its processes then read what is drawn."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def _jitted(run: Callable[..., Array], mesh: Mesh | None) -> Callable[..., Array]:
    return jax.jit(run, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _chunks(config: ModelConfig, prompts: Any, new: int, batch: int) -> Any:
    """(numbers of rows, their prompts padded on the left, by how much), all but the first of one shape.

    The last chunk repeats its last row.
    """
    longest = max(map(len, prompts), default=0)
    if not len(prompts):
        raise UserError("no prompts: nothing to draw or tell")
    if config.positions == "learned" and longest + new > config.max_positions:
        what = f"a prompt of {longest} tokens and {new} positions after it"
        raise UserError(f"{what} exceed the model's {config.max_positions} positions")
    tokens_BP = np.zeros((len(prompts), max(-(-longest // _BUCKET), 1) * _BUCKET), np.int32)
    for row, prompt in zip(tokens_BP, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    check_numbers("token", tokens_BP, config.vocab_size)
    first_B = tokens_BP.shape[1] - np.asarray([len(prompt) for prompt in prompts], np.int32)
    for start in range(0, len(prompts), batch):
        rows = np.minimum(np.arange(start, start + min(batch, len(prompts))), len(prompts) - 1)
        yield rows, tokens_BP[rows], first_B[rows]


def _rows(chunks: Sequence[Array], count: int) -> np.ndarray:
    return np.concatenate([np.asarray(chunk) for chunk in chunks])[:count]


class _Steps:
    """A decoder that is fed block after block, after prompts that are padded on the left.

    The state is a cache; without one, it is all that has been fed, and how many positions that is.
    """

    def __init__(self, decoder: Decoder, task: Task, tokens_RP: Array, first_R: Array, new: int, cached: bool):
        self.decoder, self.task, self.cached = decoder, task, cached
        self.tokens_RP, self.first_R, self.new = tokens_RP, first_R, new
        self.dtype, self.beside = jnp.dtype(decoder.compute.dtype), decoder.beside
        self.rows = len(tokens_RP)

    def inputs(self, count: int, *, values: Any = None, fed: Any = -1, vector: Any = -1, places: Any = None) -> Array:
        """[R, count, D]: values [R, count, C] where `fed`, vectors elsewhere; places from the given one on."""
        shape = (self.rows, count)
        given = jnp.zeros((*shape, self.task.layout.channels), jnp.float32) if values is None else values
        index = jnp.arange(count, dtype=jnp.int32)[None]
        # All values are fed where their places are.
        fed_RS = jnp.where(jnp.broadcast_to(fed, shape) >= 0, index, -1)
        return self.task.inputs(
            self.beside, self.dtype, values_BMC=given, fed_BS=fed_RS,
            vectors_BS=jnp.broadcast_to(jnp.asarray(vector, jnp.int32), shape),
            places_BS=jnp.full(shape, -1, jnp.int32) if places is None else jnp.broadcast_to(index + places, shape),
        )  # fmt: skip

    def begun(self) -> Any:
        """The state after the prompts."""
        P = self.tokens_RP.shape[1]
        x_RPD = self.inputs(P, vector=jnp.where(self.tokens_RP < 0, NULL, -1))
        if not self.cached:
            return jnp.pad(x_RPD, ((0, 0), (0, self.new), (0, 0))), jnp.int32(P)
        cache = KVCache.empty(self.decoder.config, self.rows, P + self.new, self.dtype)
        return self._block(x_RPD, cache, self.tokens_RP, together=False)[1]

    def feed(self, state: Any, x_RSD: Array) -> tuple[Array, Any]:
        """(what the decoder says at each position of the next step, the state)."""
        count = x_RSD.shape[1]
        if self.cached:
            return self._block(x_RSD, state, jnp.full((self.rows, count), -1, jnp.int32), together=True)
        fed_RSD, at = state
        fed_RSD = jax.lax.dynamic_update_slice_in_dim(fed_RSD, x_RSD, at, axis=1)
        S, P = fed_RSD.shape[1], self.tokens_RP.shape[1]
        index = jnp.arange(S, dtype=jnp.int32)[None]
        # What is not fed yet is a step of its own after this one, as is each token of the prompt before it.
        steps_1S = self._blocks(count, index, P)
        z_RSD = self.decoder.hidden(
            jnp.pad(self.tokens_RP, ((0, 0), (0, self.new)), constant_values=-1), inputs_BSD=fed_RSD,
            steps_BS=jnp.broadcast_to(steps_1S, (self.rows, S)),
            positions_BS=jnp.maximum(index - self.first_R[:, None], 0),
            segment_ids_BS=(index >= self.first_R[:, None]).astype(jnp.int32),
        )  # fmt: skip
        return jax.lax.dynamic_slice_in_dim(z_RSD, at, count, axis=1), (fed_RSD, at + count)

    def _blocks(self, count: int, index: Array, P: int) -> Array:
        if isinstance(self.task.layout, Raster):
            return index
        ends = jnp.asarray([span.stop for span in self.task.spans], jnp.int32)
        return jnp.where(index < P, index, P + jnp.searchsorted(ends, index - P, side="right").astype(jnp.int32))

    def _block(self, x_RSD: Array, cache: KVCache, tokens_RS: Array, *, together: bool) -> tuple[Array, KVCache]:
        return self.decoder.decode_block(tokens_RS, cache, inputs_BSD=x_RSD, first_B=self.first_R, together=together)


@functools.lru_cache(maxsize=8)
def _drawing(
    config: ModelConfig, compute: Compute, mesh: Mesh | None, task: Task, head_steps: int, schedule: tuple[int, ...],
    guided: bool, cached: bool,
) -> Callable[..., Array]:  # fmt: skip
    graphdef, _ = abstract(config, compute)
    layout, head = task.layout, task.head

    def run(params, tokens_BP, first_B, seed, rows_B, temperature, guidance):
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)
        both = (lambda x: jnp.concatenate([x, x])) if guided else (lambda x: x)
        tokens_RP = jnp.concatenate([tokens_BP, jnp.full_like(tokens_BP, -1)]) if guided else tokens_BP
        steps = _Steps(nnx.merge(graphdef, params), task, tokens_RP, both(first_B), layout.image, cached)
        B = len(tokens_BP)

        def keys(number):
            return jax.vmap(jax.random.fold_in, (0, None))(key_B, number)

        def sample(z_RSD, key_B, share=1.0, **how):
            weight = 1 + (guidance - 1) * share if guided else 1
            return head.sample(
                steps.beside.get("head", {}),
                z_RSD,
                key_B,
                steps=head_steps,
                temperature=temperature,
                guidance=weight,
                **how,
            )

        def by_sets(say, key_B, N):
            """Tokens [B, N, C], drawn set by set in a random order; `say(values_RNC, masked_RN)` is what is said."""
            order_BN = jax.vmap(lambda key: jax.random.permutation(jax.random.fold_in(key, 0), N))(key_B)
            largest, ends = max(schedule), np.cumsum(schedule)
            order_BN = jnp.pad(order_BN, ((0, 0), (0, largest)), constant_values=N)

            def one(carry, step):
                values_BNC, masked_BN = carry
                number, begin, size = step
                z_RND = say(both(values_BNC), both(masked_BN))
                index_BK = jax.lax.dynamic_slice_in_dim(order_BN, begin, largest, axis=1)
                # As many are drawn of each set as the largest has; those too many are written nowhere.
                index_BK = jnp.where(jnp.arange(largest)[None] < size, index_BK, N)
                z_RKD = jnp.take_along_axis(z_RND, both(jnp.minimum(index_BK, N - 1))[..., None], axis=1)
                own_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, number)
                x_BKC = sample(z_RKD, own_B, share=(begin + size) / N)
                rows_B1 = jnp.arange(B)[:, None]
                values_BNC = values_BNC.at[rows_B1, index_BK].set(x_BKC, mode="drop")
                return (values_BNC, masked_BN.at[rows_B1, index_BK].set(False, mode="drop")), None

            sets = (jnp.arange(1, len(schedule) + 1), jnp.asarray(ends - schedule), jnp.asarray(schedule))
            nothing = (jnp.zeros((B, N, layout.channels), jnp.float32), jnp.ones((B, N), bool))
            return jax.lax.scan(one, nothing, sets)[0][0]

        return _WAYS[type(layout)](task, steps, sample, by_sets, keys, both, temperature)

    return _jitted(run, mesh)


def _raster(task, steps, sample, by_sets, keys, both, temperature):
    def one(carry, number):
        state, x_R1D = carry
        z_R1D, state = steps.feed(state, x_R1D)
        value_B1C = sample(z_R1D, keys(number))
        return (state, steps.inputs(1, values=both(value_B1C), fed=0, places=number)), value_B1C[:, 0]

    first = (steps.begun(), steps.inputs(1, vector=BEGIN))
    return jnp.moveaxis(jax.lax.scan(one, first, jnp.arange(task.layout.count))[1], 0, 1)


def _scales(task, steps, sample, by_sets, keys, both, temperature):
    layout, stages, state = task.layout, task.stages, steps.begun()
    drawn_BNC, fed = None, {"vector": BEGIN}
    noise = [] if stages is None else white(task, keys(len(layout.scales)))
    for number, (side, span) in enumerate(zip(layout.scales, task.spans)):
        z_RSD, state = steps.feed(state, steps.inputs(side * side, places=span.start, **fed))
        how: dict[str, Any] = {}
        if stages is not None:
            how["stage"] = number
            if number:
                how["start_BSC"] = stages.jumped(drawn_BNC, temperature * noise[number], number - 1)
        drawn_BNC = sample(z_RSD, keys(number), **how)
        if number + 1 < len(layout.scales):
            fed = {"values": both(up(drawn_BNC, layout.scales[number + 1])), "fed": 0}
    return drawn_BNC


def _frames(task, steps, sample, by_sets, keys, both, temperature):
    layout, N, compute = task.layout, task.layout.places, steps.decoder.compute
    begin_RND = steps.inputs(N, vector=FIRST, places=0)

    def one(carry, frame):
        state, values_BNC, anchor_RND = carry
        x_RND = steps.inputs(N, values=both(values_BNC), fed=0, places=0)
        z_RND, state = steps.feed(state, jnp.where(frame == 0, begin_RND, x_RND))
        anchor_RND = jnp.where(frame == 0, z_RND, anchor_RND)
        if task.spatial is None:
            values_BNC = sample(z_RND, keys(frame))
        else:
            told = task.told(steps.beside, z_RND[:, None], anchor_RND[:, None], first=(frame == 0)[None])[:, 0]
            say = functools.partial(task.filled, steps.beside, compute, told)
            values_BNC = by_sets(say, keys(frame), N)
        return (state, values_BNC, anchor_RND), values_BNC

    B = len(keys(0))
    nothing = jnp.zeros((B, N, layout.channels), jnp.float32)
    frames = jax.lax.scan(one, (steps.begun(), nothing, jnp.zeros_like(begin_RND)), jnp.arange(layout.frames))[1]
    return jnp.moveaxis(frames, 0, 1).reshape(B, layout.count, layout.channels)


def _sets(task, steps, sample, by_sets, keys, both, temperature):
    begun, N = steps.begun(), task.layout.count

    def say(values_RNC, masked_RN):
        # From the prompts on each time: what is fed changes.
        fed, vector = jnp.where(masked_RN, -1, 0), jnp.where(masked_RN, MASK, -1)
        return steps.feed(begun, steps.inputs(N, values=values_RNC, fed=fed, vector=vector, places=0))[0]

    return by_sets(say, keys(0), N)


_WAYS: dict[type, Callable[..., Float[Array, "batch count channels"]]] = {
    Raster: _raster, Scales: _scales, Frames: _frames, Sets: _sets,
}  # fmt: skip


@functools.lru_cache(maxsize=8)
def _telling(
    config: ModelConfig, compute: Compute, mesh: Mesh | None, task: Task, max_tokens: int, vocab_size: int | None
) -> Callable[..., Array]:
    graphdef, _ = abstract(config, compute)
    N = task.layout.count

    def run(params, tokens_BP, first_B, values_BNC):
        decoder = nnx.merge(graphdef, params)
        B, P = tokens_BP.shape
        # The image is before the prompt, which is padded on the left: so each row's is where its padding ends.
        index = jnp.arange(N + 2 + P, dtype=jnp.int32)[None]
        place_BS = index - first_B[:, None]
        image = (place_BS >= 0) & (place_BS < N + 2)
        fed_BS = jnp.where(image & (place_BS > 0) & (place_BS <= N), place_BS - 1, -1)
        vectors_BS = jnp.where(place_BS == 0, BEGIN, jnp.where(place_BS == N + 1, END, -1))
        x_BSD = task.inputs(
            decoder.beside, jnp.dtype(compute.dtype), values_BMC=values_BNC, fed_BS=fed_BS, vectors_BS=vectors_BS,
            places_BS=fed_BS,
        )  # fmt: skip
        words_BS = jnp.pad(tokens_BP, ((0, 0), (N + 2, 0)))
        cache = KVCache.empty(config, B, N + 2 + P + max_tokens, jnp.dtype(compute.dtype))
        z_BSD, cache = decoder.decode_block(
            jnp.where(image, -1, words_BS), cache, inputs_BSD=x_BSD, first_B=first_B, together=False
        )

        def likeliest(logits_BV):
            return jnp.argmax(logits_BV[:, :vocab_size], axis=-1).astype(jnp.int32)

        def one(carry, _):
            token_B, cache = carry
            logits_BV, cache = decoder.decode(token_B[:, None], cache, first_B)
            return (likeliest(logits_BV), cache), token_B

        first = (likeliest(decoder.logits(z_BSD[:, -1])), cache)
        return jnp.moveaxis(jax.lax.scan(one, first, None, length=max_tokens)[1], 0, 1)

    return _jitted(run, mesh)
