"""What a decoder of words and continuous tokens learns: a layout, a head, and what joins them to the decoder.

Beside the decoder stand a connector (two linear layers, from values to what is fed), learned vectors and places, and
the head. Of a clip drawn set by set (NOVA, arXiv 2412.14169) there is a second, small decoder as well: the first one
says what a frame is to be, the second fills it in.

Shape suffixes: B batch, S positions of a row, M values that a row predicts, N tokens of an image or a frame, F frames,
C channels, D hidden of the decoder, E hidden of the second one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxup.continuous.examples import Example
from jaxup.continuous.heads import Flow, Head, Iterative, noise
from jaxup.continuous.layouts import VECTORS, Frames, Layout, Scales
from jaxup.continuous.nets import dense, linear
from jaxup.continuous.stages import Stages
from jaxup.errors import UserError
from jaxup.model.attention import context_size
from jaxup.model.config import Beside, Compute, ModelConfig
from jaxup.model.decoder import Decoder, Params, abstract
from jaxup.model.spec import flops_per_token, spec
from jaxup.training.loss import cross_entropy
from jaxup.training.objective import Batch, Objective, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Objective):
    """The loss is `text` times the mean cross-entropy of words plus `values` times the mean loss of values, each mean
    over the whole batch.

    Args:
      layout, head: see there.
      text, values: weights; what has the weight 0 is not computed.
      jump: of a flow in stages; see `jaxup.continuous.stages`.
      spatial: the second decoder; it has one token, which stands where a value is to be drawn.
      shift: whether the second decoder is told of a frame by a scale and a shift of what it is told of the first one,
        as NOVA does lest errors add up, or by what the first decoder says of it.
      rank: of the matrices that scale and shift are made by.
    """

    layout: Layout
    head: Head
    text: float = 1.0
    values: float = 1.0
    jump: str = "corrected"
    spatial: ModelConfig | None = None
    shift: bool = True
    rank: int = 24

    def __post_init__(self):
        layout, head = self.layout, self.head
        at = f"layout {layout.name!r}"
        if head.channels != layout.channels:
            raise UserError(f"the head has {head.channels} channels, the tokens {layout.channels}", at=at)
        if min(self.text, self.values) < 0 or not 0 < self.text + self.values < float("inf"):
            raise UserError(f"text={self.text} and values={self.values} are no weights of losses")
        whole = isinstance(layout, Scales) or (isinstance(layout, Frames) and not layout.sets)
        if getattr(getattr(head, "net", None), "joint", False) and not whole:
            what = "the net 'decoder' of the head sees whole maps, and here a part of one is drawn at once"
            raise UserError(what, at=at, hint="net 'mlp', or layout 'scales'")
        if isinstance(layout, Frames) and layout.sets != (self.spatial is not None):
            what = "sets=True needs a second decoder" if layout.sets else "a second decoder needs sets=True"
            raise UserError(what, at=at)
        if self.spatial is not None:
            if not isinstance(layout, Frames):
                raise UserError("a second decoder goes with layout 'frames'", at=at)
            if self.spatial.vocab_size != 1 or not self.spatial.tie_embeddings or self.spatial.beside:
                raise UserError("the second decoder has one token, tied embeddings and nothing beside it", at=at)
            if self.spatial.positions == "learned" and self.spatial.max_positions < layout.places:
                what = f"the second decoder has learned {self.spatial.max_positions} positions"
                raise UserError(f"{what}, and a frame has {layout.places} tokens", at=at)
        if isinstance(head, Flow) and head.stages > 1:
            if not isinstance(layout, Scales):
                raise UserError(f"a flow of {head.stages} stages goes with layout 'scales'", at=at, hint="stages=1")
            grids = tuple((side, side) for side in layout.scales)
            if self.stages is None or self.stages.grids != grids:
                what = f"a flow of {head.stages} stages wants as many scales, each twice the one before"
                raise UserError(f"{what}, not {layout.scales}", at=at)

    @functools.cached_property
    def stages(self) -> Stages | None:
        """Those of a flow that goes from scale to scale, if the head is one."""
        if not (isinstance(self.head, Flow) and self.head.stages > 1):
            return None
        return Stages(grid=(self.layout.rows, self.layout.columns), count=self.head.stages, jump=self.jump)

    @functools.cached_property
    def maps(self) -> np.ndarray:
        """int32 [M]: the map, or the frame, that each value is of."""
        sizes = [span.stop - span.start for span in self.spans]
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    @property
    def spans(self) -> tuple[slice, ...]:
        """Where the values that are drawn at one step of the decoder are among the M: of a map, or of a frame."""
        if isinstance(self.layout, Scales):
            return self.layout.spans
        N = self.layout.places if isinstance(self.layout, Frames) else self.layout.count
        return tuple(slice(start, start + N) for start in range(0, self.layout.count, N))

    def check(self, model: ModelConfig, examples: Sequence[Example], at: str = "example") -> None:
        """UserError for examples that do not fit, and for a base that has no room for them."""
        if model.positions == "learned" and self.layout.length > model.max_positions:
            what = f"rows of {self.layout.length} positions, and the base has learned {model.max_positions}"
            raise UserError(what, hint="shorter prompts, fewer tokens an image, or a base with rotary positions")
        self.layout.check(examples, at)

    # ---- parameters

    def beside(self, model: ModelConfig) -> tuple[Beside, ...]:
        """What stands beside a decoder of this configuration."""
        width, layout, own = model.hidden_size, self.layout, self.spatial
        # What is fed begins as large as what the decoder is fed of words.
        size = (model.embed_std or model.init_std) * model.embed_scale
        table = [
            *_connector("connector", layout.channels, width, size),
            Beside("vectors", (VECTORS, width), ("", "embed"), std=size),
            Beside("places", (layout.places, width), ("", "embed"), std=size),
        ]
        if own is not None:
            size = (own.embed_std or own.init_std) * own.embed_scale
            table += [
                *_connector("between.connector", layout.channels, own.hidden_size, size),
                Beside("between.places", (layout.places, own.hidden_size), ("", "embed"), std=size),
                *dense("between.indicator", width, own.hidden_size, std=size / width**0.5),
                *(Beside(f"spatial.{path}", p.shape, p.axes, p.fill, p.std, p.inputs) for path, p in spec(own).items()),
            ]
            if self.shift:
                # Zeros at the end: a frame is told of as the first one until something else is learned.
                table += [
                    *dense("between.narrow", width, self.rank),
                    *dense("between.wide", self.rank, 2 * width, std=0.0),
                ]
        heads = self.head.table(width if own is None else own.hidden_size)
        return (*table, *(dataclasses.replace(param, path=f"head.{param.path}") for param in heads))

    def inputs(
        self,
        beside: Params,
        dtype: Any,
        *,
        values_BMC: Float[Array, "batch predicted channels"],
        fed_BS: Int[Array, "batch seq"],
        vectors_BS: Int[Array, "batch seq"],
        places_BS: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq hidden"]:
        """What the decoder is fed where there are no words: see `Layout.pack`."""
        x_BSD = _taken(_connected(beside["connector"], self.seen(values_BMC), dtype), fed_BS)
        for table, index_BS in ((beside["vectors"], vectors_BS), (beside["places"], places_BS)):
            rows_BSD = table.astype(dtype)[jnp.maximum(index_BS, 0)]
            x_BSD = x_BSD + jnp.where(index_BS[..., None] >= 0, rows_BSD, jnp.zeros((), dtype))
        return x_BSD

    def seen(self, values: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Values as they are fed: of a head that draws directions, at length 1."""
        if not self.head.unit:
            return values
        return values / jnp.maximum(jnp.linalg.norm(values, axis=-1, keepdims=True), 1e-6)

    # ---- training

    def weighed(self, batch: Batch) -> tuple[Batch, Array]:
        """The loss is divided already, by what the two means are over: each row knows by what."""
        rows = batch["tokens"].shape[0]
        losses = (("of_text", self.text, "loss_weights"), ("of_values", self.values, "value_weights"))
        each = {
            name: jnp.full(rows, weight / jnp.maximum(jnp.sum(batch[counted]), 1), jnp.float32)
            for name, weight, counted in losses
        }
        return batch | each, jnp.float32(1)

    def sums(
        self, decoder: Decoder, hidden: Callable[..., Array], batch: Batch, how: Mapping[str, Any], *teacher: Params
    ) -> tuple[Array, Sums]:
        if context_size() > 1:
            raise UserError("rows with continuous tokens are not split over devices", at="mesh", hint="no axis context")
        beside, dtype = decoder.beside, jnp.dtype(decoder.compute.dtype)
        key_B = jax.vmap(jax.random.key)(batch["noise"])
        fed, starts = self._chained(batch, key_B)
        inputs_BSD = self.inputs(
            beside, dtype, values_BMC=fed, fed_BS=batch["fed"], vectors_BS=batch["vectors"], places_BS=batch["places"]
        )
        z_BSD = hidden(batch["tokens"], inputs_BSD=inputs_BSD, steps_BS=batch.get("steps"))
        loss, sums = jnp.float32(0), {}
        if self.text:
            targets = batch["targets"], batch["loss_weights"]
            text, plain = cross_entropy(z_BSD, decoder.head_kernel(), *targets, **how)
            loss += text * _first(batch, "of_text")
            sums["text"] = (plain, jnp.sum(batch["loss_weights"]))
        if self.values:
            values = self._values(beside, decoder.compute, _taken(z_BSD, batch["spots"]), batch, key_B, starts)
            loss += values * _first(batch, "of_values")
            sums["values"] = (values, jnp.sum(batch["value_weights"]))
        return loss, sums

    def mean(self, sums: Mapping[str, tuple[float, float]]) -> float:
        """As the loss, over all rows."""
        weights = {"text": self.text, "values": self.values}
        return sum(weights[name] * total / max(count, 1) for name, (total, count) in sums.items())

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of one position of a row, forward and backward; as if all rows had an image."""
        layout, own, width = self.layout, self.spatial, model.hidden_size
        total = seq_len * flops_per_token(model, seq_len)
        if not self.text:
            total -= 6.0 * seq_len * width * model.vocab_size
        total += 6.0 * layout.predicted * width * (width + layout.channels)
        if own is not None:
            # All see all, and no token is looked up or told of.
            total += layout.predicted * flops_per_token(own, 2 * layout.places)
            total += 6.0 * layout.predicted * own.hidden_size * (own.hidden_size + layout.channels + width)
            width = own.hidden_size
        for span in self.spans if self.values else ():
            tokens = span.stop - span.start
            total += 3.0 * getattr(self.head, "draws", 1) * tokens * self.head.flops(width, tokens)
        return total / seq_len

    def head_flops(self, model: ModelConfig, head_steps: int) -> float:
        """Of the head alone, to draw an image or a clip in so many steps of each map or token, without guidance."""
        width = model.hidden_size if self.spatial is None else self.spatial.hidden_size
        sizes = [span.stop - span.start for span in self.spans]
        steps = head_steps if isinstance(self.head, Iterative) else 1
        return steps * sum(tokens * self.head.flops(width, tokens) for tokens in sizes)

    def _chained(self, batch: Batch, key_B: Key[Array, " batch"]) -> tuple[Array, Any]:
        """(what is fed, start and end of each stage of a flow in stages): noise goes on from stage to stage."""
        if self.stages is None:
            return batch["values"], None
        image_BNC = batch["value_targets"][:, self.spans[-1]]
        pairs = self.stages.chain(image_BNC, white(self, key_B))
        fed = [jnp.zeros_like(pairs[0][0])]
        fed += [self.stages.up(end, stage) for stage, (_, end) in enumerate(pairs[:-1])]
        return jnp.concatenate(fed, axis=1), tuple(jnp.concatenate(each, axis=1) for each in zip(*pairs))

    def _values(
        self, beside: Params, compute: Compute, z_BMD: Array, batch: Batch, key_B: Array, chained: Any
    ) -> Array:
        targets, weights = batch["value_targets"], batch["value_weights"]
        start, how = None, {}
        if chained is not None:
            start, targets = chained
            how = {"stage": jnp.broadcast_to(self.maps[None], weights.shape)}
        if len(self.spans) > 1:
            how["map_BS"] = jnp.broadcast_to(self.maps[None], weights.shape)
        if self.spatial is not None:
            B, (F, N, C) = len(z_BMD), self.layout.shape
            z_BFND = z_BMD.reshape(B, F, N, -1)
            told = self.told(beside, z_BFND, z_BFND[:, :1])
            masked = weights.reshape(B * F, N) > 0
            z_BMD = self.filled(
                beside, compute, told.reshape(B * F, N, -1), targets.reshape(B * F, N, C), masked
            ).reshape(B, F * N, -1)
        return self.head.loss(beside["head"], z_BMD, targets, weights, key_B, start_BSC=start, **how)

    # ---- the second decoder

    def told(
        self, beside: Params, z_BFND: Float[Array, "batch frames tokens hidden"],
        anchor_B1ND: Float[Array, "batch 1 tokens hidden"], first: Any = None,
    ) -> Float[Array, "batch frames tokens hidden"]:  # fmt: skip
        """What the second decoder is told of frames, by what the first says of each and of the clip's first frame.

        `first`: whether the frames are the clip's first one, of which it is told as it is; None: only frame 0 is.
        """
        if not self.shift:
            return z_BFND
        B, F, N, D = z_BFND.shape
        between, flat = beside["between"], jax.nn.silu(z_BFND).reshape(B, F * N, D)
        scale, shift = jnp.split(
            linear(between["wide"], linear(between["narrow"], flat)).reshape(B, F, N, 2 * D), 2, -1
        )
        is_first = jnp.asarray(np.arange(F) == 0 if first is None else first).reshape(1, -1, 1, 1)
        return jnp.where(is_first, z_BFND, (1 + scale) * anchor_B1ND + shift)

    def filled(
        self, beside: Params, compute: Compute, told_BND: Float[Array, "rows tokens hidden"],
        values_BNC: Float[Array, "rows tokens channels"], masked_BN: Array,
    ) -> Float[Array, "rows tokens hidden2"]:  # fmt: skip
        """What the second decoder says of each token of frames, of which those that are masked are not told."""
        own, between, dtype = beside["spatial"], beside["between"], jnp.dtype(compute.dtype)
        graphdef, _ = abstract(cast(ModelConfig, self.spatial), compute)
        x_BNE = _connected(between["connector"], self.seen(values_BNC), dtype)
        x_BNE = jnp.where(masked_BN[..., None], own["embed_tokens"].astype(dtype)[None], x_BNE)
        x_BNE = x_BNE + between["places"].astype(dtype)[None] + linear(between["indicator"], told_BND.astype(dtype))
        zeros = jnp.zeros(masked_BN.shape, jnp.int32)
        return nnx.merge(graphdef, own).hidden(zeros - 1, inputs_BSD=x_BNE, steps_BS=zeros)


def white(task: Task, key_B: Key[Array, " batch"]) -> list[Array]:
    """White noise for each map of a flow in stages."""
    channels = task.layout.channels
    return [noise(key_B, span.stop - span.start, channels, 1 + stage) for stage, span in enumerate(task.spans)]


def _connector(path: str, channels: int, width: int, size: float) -> tuple[Beside, ...]:
    return (*dense(f"{path}.up", channels, width), *dense(f"{path}.down", width, width, std=size / width**0.5))


def _connected(params: Params, values_BMC: Array, dtype: Any) -> Array:
    return linear(params["down"], jax.nn.gelu(linear(params["up"], values_BMC.astype(dtype)), approximate=False))


def _taken(rows_BMD: Array, index_BS: Array) -> Array:
    """Rows by their index; zeros for -1."""
    taken = jnp.take_along_axis(rows_BMD, jnp.maximum(index_BS, 0)[..., None], axis=1)
    return jnp.where(index_BS[..., None] >= 0, taken, jnp.zeros((), taken.dtype))


def _first(batch: Batch, name: str) -> Any:
    """What `Task.weighed` told each row; where a model is evaluated nothing is divided."""
    return batch[name][0] if name in batch else 1.0
