"""One jitted training step, and its evaluation twin: pure state in, pure state out.

Shape suffixes: A accumulation steps, B batch, S sequence, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from jaxup.errors import UserError
from jaxup.model.attention import choose
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params, abstract
from jaxup.model.sharding import RULES
from jaxup.model.spec import STACK, flatten
from jaxup.training.objective import TEXT, Batch, Objective, Sums
from jaxup.training.partition import Partition


class Spikes(NamedTuple):
    """What tells a spike of the gradient from its usual size."""

    norms_W: jax.Array  # float32: gradient norms of the last W steps, each in the place step % W; -1 = none yet
    skipped: jax.Array  # int32: steps skipped so far


class TrainState(NamedTuple):
    params: Params  # float32 master weights of what trains
    opt_state: optax.OptState
    step: jax.Array  # int32: updates done or skipped
    # A step whose loss, gradient or update is not finite changes nothing, and neither does any after it,
    # so that the host, which looks at metrics one step late, still finds the state before it.
    halted: jax.Array  # bool
    spikes: Spikes | None = None  # if steps with a spike are skipped
    ema: Params | None = None  # float32 averages of the params over the updates, if they are to be kept

    @property
    def averaged(self) -> Params:
        """What is evaluated, sampled and exported: the averages, or the params themselves."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    # Micro-batches a step; the gradient does not depend on it. 0 = the fewest that the devices have memory for.
    accumulation: int
    loss_chunk: int  # positions whose logits exist at once
    z_loss: float
    # A step is skipped whose gradient norm exceeds `spike_factor` times the median of the last `spike_window` steps,
    # the skipped ones among them: what lasts becomes the usual. 0 = none; nor is one before the window is full.
    spike_factor: float = 0.0
    spike_window: int = 1
    # The step also says how large the gradients of its micro-batches are, from which follows how much of the gradient
    # is noise (McCandlish et al. 2018, arXiv 1812.06162).
    noise_scale: bool = False
    # After each update that is made, averages := ema * averages + (1 - ema) * params: at first they are what training
    # began with, of which ema^n is left after n updates. 0 = none are kept.
    ema: float = 0.0

    def __post_init__(self):
        if not 0 <= self.ema < 1:
            raise UserError("must be a decay from 0, which is no average, to below 1", at=f"step.ema={self.ema}")
        if 0 < self.spike_factor <= 1:
            raise UserError("must be above 1, or 0 to skip none", at=f"step.spike_factor={self.spike_factor}")

    def spikes(self) -> Spikes | None:
        """Those of a state at its beginning."""
        return Spikes(jnp.full(self.spike_window, -1.0, jnp.float32), jnp.int32(0)) if self.spike_factor else None


def make_train_step(
    model: ModelConfig, compute: Compute, optimizer: optax.GradientTransformation, config: StepConfig,
    partition: Partition | None = None, objective: Objective = TEXT,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """(state, batch, learning rate) -> (state, metrics): the function to jit with the state donated.

    The learning rate is a float32 scalar. With a `partition` the params of the state are only what trains, and the
    other half is a fourth argument. Where the objective has a teacher its params are the last one.

    Norms in the metrics are those before clipping. With `noise_scale`, `gradient_square_micro` is the mean over the
    micro-batches, of `micro_rows` rows each, of |g|^2, where g is the gradient of the mean loss over its own loss
    tokens. Where each device sums over its own rows these are micro-batches of a device.

    The gradient is that of the mean loss over the *whole* batch, of text over its loss tokens: sums over micro-batches
    are divided once, so accumulation, padding and mesh do not change what is optimised. Where the objective reports
    several means, the metrics have them as `means`.

    Where the model computes in bfloat16, a kernel's gradient is summed over the devices in bfloat16, and over the
    micro-batches in float32, as then over the devices of `_summed_once`; the head's is float32 throughout, and so are
    the master weights and moments.
    """
    if config.noise_scale and not objective.by_token:
        what = "measures micro-batches, and of these the loss has no mean by itself"
        raise UserError(what, at="step.noise_scale=True")
    loss_sums = _make_loss(model, compute, config, partition, objective)

    def reported(*given: Any) -> tuple[jax.Array, tuple[jax.Array, Sums]]:
        loss, sums = loss_sums(*given)
        return loss, (objective.plain(loss, sums), sums if len(sums) > 1 else {})

    gradient = jax.value_and_grad(reported, has_aux=True)
    update = optax.with_extra_args_support(optimizer).update

    def accumulated(several: Any, params: Params, batch: Batch, *frozen: Params) -> Any:
        """Sums over the micro-batches; the third, if asked for, is of the squared norms of their mean gradients.

        `several`: the shapes of what is reported beside the loss.
        """
        scalars = (jnp.float32(0), (jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), several)))
        zeros: Any = scalars, jax.tree.map(jnp.zeros_like, params)
        if config.noise_scale:
            zeros = *zeros, jnp.float32(0)

        def body(total, micro_batch):
            micro: tuple[Any, ...] = gradient(params, micro_batch, *frozen)
            if config.noise_scale:
                tokens = jnp.maximum(jnp.sum(micro_batch["loss_weights"]), 1)
                micro = *micro, jnp.square(gradient_norms(micro[1], partition)[0] / tokens)
            return jax.tree.map(jnp.add, total, micro), None

        return jax.lax.scan(body, zeros, _micro_batches(batch, config.accumulation))[0]

    def train_step(
        state: TrainState, batch: Batch, learning_rate: jax.Array, *frozen: Params
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss_tokens = jnp.sum(batch["loss_weights"])
        batch, count = objective.weighed(batch)
        sums: Callable[..., Any] = gradient  # also of 0 micro-batches, where nothing says what fits
        if config.accumulation > 1:
            several = {} if objective.by_token else jax.eval_shape(reported, state.params, batch, *frozen)[1][1]
            sums = functools.partial(accumulated, several)
        micro_batches, sizes = config.accumulation, jax.sharding.get_abstract_mesh().shape
        if config.accumulation > 1 and (axes := _summed_once(model, compute, batch, config.accumulation)):
            whole = PartitionSpec()
            micro_batches *= math.prod(sizes[axis] for axis in axes)  # each device has its own
            sums = jax.shard_map(
                lambda *given, summed=sums: jax.lax.psum(summed(*given), axes), check_vma=False,
                in_specs=(whole, PartitionSpec(axes), *[whole] * len(frozen)), out_specs=whole,
                axis_names={*axes} if any(sizes[axis] > 1 for axis in sizes if axis not in axes) else {*sizes},
            )  # fmt: skip
        (loss, (plain, named)), grads, *squares = sums(state.params, batch, *frozen)
        scale = 1 / jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g * scale, grads)

        norm, layer_norms_L = gradient_norms(grads, partition)
        updates, opt_state = update(grads, state.opt_state, state.params, learning_rate=learning_rate)
        new = state._replace(
            params=optax.apply_updates(state.params, updates), opt_state=opt_state, step=state.step + 1
        )
        if state.ema is not None:
            mixed = lambda mean, leaf: config.ema * mean + (1 - config.ema) * leaf  # noqa: E731
            new = new._replace(ema=jax.tree.map(mixed, state.ema, new.params))
        if state.spikes is not None:
            norms_W, skipped = state.spikes
            spike = jnp.all(norms_W >= 0) & (norm > config.spike_factor * jnp.median(norms_W))
            new = _where(spike, skip_step(state), new)
            norms_W = norms_W.at[state.step % config.spike_window].set(norm)
            new = new._replace(spikes=Spikes(norms_W, skipped + spike))
        # An update may be infinite where loss and gradient are not, by the learning rate.
        finite = [norm, loss, *jax.tree.leaves(new.params)]
        halted = state.halted | ~jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in finite]))
        new = _where(halted, state, new)._replace(halted=halted)
        metrics = {
            "loss": plain * scale,
            "loss_with_z": loss * scale,
            "gradient_norm": norm,
            "gradient_norm_layers": layer_norms_L,
            "learning_rate": learning_rate,
            "loss_tokens": loss_tokens,
            "halted": halted,
        }
        if named:
            metrics["means"] = {name: total / jnp.where(of > 0, of, 1) for name, (total, of) in named.items()}
        for square in squares:
            metrics["gradient_square_micro"] = square / micro_batches
            metrics["micro_rows"] = jnp.int32(len(batch["tokens"]) // micro_batches)
        if state.spikes is not None:
            metrics["skipped"] = spike & ~halted
        return new, metrics

    return train_step


def _summed_once(model: ModelConfig, compute: Compute, batch: Batch, accumulation: int) -> tuple[str, ...]:
    """Axes of the mesh along which each device adds up the gradients of its own rows, until they are summed after the
    last micro-batch; XLA by itself sums them in each.

    They are those that split rows and no parameter. There are none where what XLA has to split by itself beside them is
    more than it can: an embedding along both of its axes, cuDNN's kernel, which it splits by a call of its own, or the
    masks of splash's for parts of sequences; nor where all of its sums in the compute dtype are no more bytes than the
    one in float32.
    """
    sizes = {axis: size for axis, size in jax.sharding.get_abstract_mesh().shape.items() if size > 1}
    axes = tuple(axis for axis in compute.rows_over if axis in sizes and axis not in sum(RULES.values(), ()))
    kernel = choose(
        compute.attention, dtype=compute.dtype, seq_len=batch["tokens"].shape[1], head_dim=model.head_dim,
        packed="segment_ids" in batch, stepwise="steps" in batch,
    )  # fmt: skip
    others, itemsize = len(sizes) - len(axes), jnp.dtype(compute.dtype).itemsize
    beside = kernel == "cudnn" or (kernel == "splash" and "context" in sizes)
    return () if others and (accumulation * itemsize <= 4 or others > 1 or beside) else axes


def _where(condition: jax.Array, then: TrainState, otherwise: TrainState) -> TrainState:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then, otherwise)


def skip_step(state: TrainState) -> TrainState:
    """The state after a step that is left out: the schedule goes on, and nothing else changes."""
    schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    opt_state = jax.tree.map(
        lambda node: node._replace(count=node.count + 1) if schedule(node) else node, state.opt_state, is_leaf=schedule
    )
    return state._replace(opt_state=opt_state, step=state.step + 1)


def make_eval_step(
    model: ModelConfig, compute: Compute, config: StepConfig, partition: Partition | None = None,
    objective: Objective = TEXT,
) -> Callable[..., Sums]:  # fmt: skip
    """(params, batch) -> what the objective reports, of text the sum of cross-entropy in nats and the number of loss
    tokens; with a partition (trained, batch, frozen)."""
    loss_sums = _make_loss(model, compute, dataclasses.replace(config, z_loss=0.0), partition, objective)

    def eval_step(params: Params, batch: Batch, *frozen: Params) -> Sums:
        return loss_sums(params, batch, *frozen)[1]

    return eval_step


def gradient_norms(grads: Params, partition: Partition | None = None) -> tuple[jax.Array, jax.Array]:
    """(norm of everything, norm of each block [L]); 0 for what does not train."""
    rest, blocks_L = jnp.float32(0), jnp.float32(0) if partition is None else jnp.zeros(partition.num_layers)
    for path, g in flatten(grads).items():
        squares = jnp.square(g.astype(jnp.float32))
        if not path.startswith(STACK):
            rest += jnp.sum(squares)
            continue
        squares = jnp.sum(squares, axis=tuple(range(1, g.ndim)))
        blocks_L = blocks_L + squares if partition is None else blocks_L.at[partition.rows(path)].add(squares)
    return jnp.sqrt(jnp.sum(blocks_L) + rest), jnp.sqrt(blocks_L)


def _make_loss(
    model: ModelConfig, compute: Compute, config: StepConfig, partition: Partition | None, objective: Objective
) -> Callable[..., tuple[jax.Array, Sums]]:
    """(params, batch) -> `Objective.sums`; with a partition (trained, batch, frozen), and with a teacher its params
    after these."""
    graphdef, _ = abstract(model, compute)

    def loss_sums(params: Params, batch: Batch, *others: Params) -> tuple[jax.Array, Sums]:
        how = {"chunk": config.loss_chunk, "z_loss": config.z_loss, "batch_axes": compute.rows_over}
        if partition is None:
            decoder = nnx.merge(graphdef, params)
            return objective.sums(decoder, decoder.hidden, batch, how, *others)
        frozen, *teacher = others
        return objective.sums(*partition.decoder(params, frozen), batch, how, *teacher)

    return loss_sums


def _micro_batches(batch: Batch, accumulation: int) -> Batch:
    """[B, ...] -> [A, B / A, ...] by striding, so that each device's rows are split among all micro-batches."""
    return {k: jnp.swapaxes(v.reshape(-1, accumulation, *v.shape[1:]), 0, 1) for k, v in batch.items()}
