"""The decoder: embeddings, stacked blocks run by `lax.scan`, final norm, head.

Every leaf under `blocks` has the layer on axis 0, so depth is an index; see `jaxup.depth`.

Shape suffixes: L layers, R runs of a layer, B batch, S sequence, T cache length, K key/value heads, H head_dim,
D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxup.errors import UserError
from jaxup.model.attention import is_kernel, seq_axis
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.layers import Block, Linear, Norm, param
from jaxup.model.sharding import splits
from jaxup.model.spec import BESIDE, STACK, Param, flatten, spec, unflatten
from jaxup.model.stack import SplitStack, Step
from jaxup.text import size

Params = dict[str, Any]  # nested dict of arrays: the pure form of a Decoder's nnx state


class KVCache(NamedTuple):
    """Keys and values of the tokens decoded so far, for all layers."""

    k_LBKTH: Array
    v_LBKTH: Array
    length: Array  # int32: how many positions are filled, of all rows as a scalar or of each [B]

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, length: int, dtype: DTypeLike, *, layers: int | None = None
    ) -> KVCache:
        """For `layers` runs of a layer: as many as an order has, by default as the model has."""
        shape = (layers or config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))


class Decoder(nnx.Module):
    """A causal language model of any family `ModelConfig` describes, with the parameters that `spec` lists.

    Calling it on int32 tokens [batch, seq] gives logits [batch, seq, vocab] in the compute dtype; of packed
    rows, `positions_BS` and `segment_ids_BS` say where each token stands and what it belongs to.

    `order`, int32 [runs], says which layer runs when: [0, 1, 2, 1, 2, 3] runs layers 1 and 2 twice, and
    -1 runs nothing. It is an argument of the compiled function: all orders of one length share a program,
    and no weight is copied. Running the order `plan.order()` gives what the model that `plan` makes gives.

    Where a token is -1 the position is fed its row of `inputs_BSD`, as it is, in the place of an embedding. With
    `steps_BS` a token sees those of its own step and of lower ones: all in one step see each other. Steps that rise
    from token to token, where their numbers are known, are the causal model, as are none.

    UserError for tokens, learned positions and layers that the model lacks. Under `jit`, where their numbers
    are not known, such positions and layers make the output NaN, and such a token is taken for another.
    """

    origin: Any = None  # where the params came from: set by whoever loads them
    task: Any = None  # what it was taught beside words, `jaxup.continuous.task.Task`: likewise

    def __init__(self, config: ModelConfig, params: Params, compute: Compute | None = None):
        """`params` is a tree such as `init` gives, of arrays or of ShapeDtypeStructs."""
        self.config, self.compute = config, compute or Compute()
        leaves = flatten(params)
        self.embed_tokens = nnx.Param(leaves["embed_tokens"])
        self.embed_positions = param(leaves, "embed_positions")
        self.blocks = Block(config, self.compute, leaves)
        self.norm = Norm(config, leaves, "norm")
        self.lm_head = None if config.tie_embeddings else Linear(config, leaves, "lm_head")
        if config.beside:
            self.beside = nnx.data(unflatten({b.path: nnx.Param(leaves[BESIDE + b.path]) for b in config.beside}))

    def __repr__(self) -> str:
        """Depth, sizes, parameters, and where they came from: in a line, for people."""
        c, leaves = self.config, jax.tree.leaves(self.params)
        heads = f"{c.num_heads}" if c.num_heads == c.num_kv_heads else f"{c.num_heads}/{c.num_kv_heads}"
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        dtypes = " and ".join(dict.fromkeys(leaf.dtype.name for leaf in leaves))
        plan = getattr(self.origin, "plan", None)
        return (
            f"<Decoder {c.num_layers} layers of {c.hidden_size}, {heads} heads, {c.vocab_size:,} tokens: "
            f"{sum(leaf.size for leaf in leaves):,} parameters, {size(nbytes)} in {dtypes}"
            + (f", by {plan!r}>" if plan else ">")
        )

    @property
    def params(self) -> Params:
        """All of its parameters as a pure tree; leaves under "blocks" are [layers, ...]. No copy."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    @property
    def beside(self) -> Params:
        """The arrays of `ModelConfig.beside`, as a pure tree by their paths. No copy."""
        return self.params.get("beside", {})

    @beside.setter
    def beside(self, variables: Any) -> None:
        vars(self)["beside"] = variables  # where nnx finds it

    def with_params(self, params: Params) -> Decoder:
        """The same model with these params in the place of its own: those that training made of them, say."""
        return nnx.merge(nnx.split(self)[0], params)

    def __call__(
        self, tokens_BS: Int[Array | np.ndarray, "batch seq"], **inputs: Any
    ) -> Float[Array, "batch seq vocab"]:
        """Logits; `inputs` are those of `hidden`."""
        return self.logits(self.hidden(tokens_BS, **inputs))

    def hidden(
        self,
        tokens_BS: Int[Array | np.ndarray, "batch seq"],
        *,
        inputs_BSD: Float[Array | np.ndarray, "batch seq width"] | None = None,
        steps_BS: Int[Array | np.ndarray, "#batch seq"] | None = None,
        positions_BS: Int[Array | np.ndarray, "#batch seq"] | None = None,
        segment_ids_BS: Int[Array | np.ndarray, "batch seq"] | None = None,
        order: Int[Array | np.ndarray, " runs"] | None = None,
        stack: SplitStack | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """What the head is applied to: the final norm's output. A `stack` takes the place of the blocks."""
        if positions_BS is None:
            self._check_positions(tokens_BS.shape[1])
            positions_BS = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None]
        if steps_BS is not None and not seq_axis(self.compute.rows_over):
            known = _known(steps_BS)
            steps_BS = None if known is not None and (np.diff(known) > 0).all() else jnp.asarray(steps_BS)
        x_BSD = self.embed(tokens_BS, positions_BS, inputs_BSD)
        how: Any = {"segment_ids_BS": segment_ids_BS, "steps_BS": steps_BS, "order": order, "stack": stack}
        return self.norm(self.run(x_BSD, positions_BS, **how)[0])

    def decode(
        self,
        tokens_BS: Int[Array | np.ndarray, "batch seq"],
        cache: KVCache,
        first_B: Int[Array | np.ndarray, " batch"] | None = None,
        order: Int[Array | np.ndarray, " runs"] | None = None,
    ) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """Logits after the last of the next `seq` tokens, and the cache with these tokens added: by `decode_block`."""
        x_BSD, cache = self.decode_block(tokens_BS, cache, first_B=first_B, order=order, together=False)
        return self.logits(x_BSD[:, -1]), cache

    def decode_block(
        self,
        tokens_BS: Int[Array | np.ndarray, "batch seq"],
        cache: KVCache,
        *,
        together: bool,
        inputs_BSD: Float[Array | np.ndarray, "batch seq width"] | None = None,
        first_B: Int[Array | np.ndarray, " batch"] | None = None,
        order: Int[Array | np.ndarray, " runs"] | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache]:
        """What the head is applied to at each of the next `seq` tokens, and the cache with these tokens added.

        All of them see what is in the cache; of each other those before them or, `together`, all: a step of `hidden`.
        Rows of several lengths are padded on the left, so that they end together; `first_B` is how
        many slots of each are padding. Or each row has a length of its own, and its tokens go on from there: a slot
        beyond its length is not seen, whatever lies there. Tokens and runs for which the cache has no room are an
        error; their output is NaN under `jit`, where it is not known how full the cache is.
        """
        layers, _, _, room, _ = cache.k_LBKTH.shape
        runs = self.config.num_layers if order is None else (jnp.asarray(order) >= 0).sum()  # -1 needs no place
        new, fits = tokens_BS.shape[1], (runs <= layers) & (cache.length + tokens_BS.shape[1] <= room)
        filled = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length.max())
        if not isinstance(runs, jax.core.Tracer) and runs > layers:
            raise UserError(f"the cache is for {layers} runs of a layer, not {runs}", hint="KVCache.empty(layers=...)")
        if filled + new > room:
            raise UserError(f"the cache holds {room} tokens, and {filled} are in it: no room for {new} more")
        if first_B is None:
            self._check_positions(filled + new)
        positions_BS = jnp.reshape(cache.length, (-1, 1)) + jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None]
        if first_B is not None:
            positions_BS = jnp.maximum(positions_BS - first_B[:, None], 0)
        x_BSD = self.embed(tokens_BS, positions_BS, inputs_BSD)
        x_BSD, (k, v) = self.run(x_BSD, positions_BS, cache=cache, first_B=first_B, order=order, together=together)
        if isinstance(fits, jax.core.Tracer):
            x_BSD = jnp.where(jnp.reshape(fits, (-1, 1, 1)), x_BSD, jnp.nan)
        return self.norm(x_BSD), KVCache(k, v, cache.length + tokens_BS.shape[1])

    def _check_positions(self, count: int) -> None:
        if self.embed_positions is not None and count > self.config.max_positions:
            raise UserError(f"{count} tokens, and the model has learned {self.config.max_positions} positions")

    # ---- what these consist of

    def embed(
        self,
        tokens_BS: Int[Array | np.ndarray, "batch seq"],
        positions_BS: Int[Array | np.ndarray, "#batch seq"],
        inputs_BSD: Float[Array | np.ndarray, "batch seq width"] | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """What the first block is applied to."""
        if inputs_BSD is not None and inputs_BSD.shape != (shape := (*tokens_BS.shape, self.config.hidden_size)):
            raise UserError(f"inputs of shape {[*inputs_BSD.shape]} are no vectors of the model: {[*shape]} would be")
        # Indexing alone would take the last token in the place of one that is not there.
        check_numbers("token", tokens_BS, self.config.vocab_size, first=0 if inputs_BSD is None else -1)
        if self.embed_positions is not None:
            check_numbers("position", positions_BS, self.config.max_positions)
        dtype, given_BSD = jnp.dtype(self.compute.dtype), None
        if inputs_BSD is not None:
            given_BSD = jnp.where(jnp.asarray(tokens_BS)[..., None] < 0, inputs_BSD, 0).astype(dtype)
        axes = self.compute.rows_over
        seq = seq_axis(axes)
        split = jax.lax.with_sharding_constraint
        table = splits("embed", self.config.hidden_size, jax.sharding.get_abstract_mesh()) if axes else ()
        if table:
            rows = PartitionSpec(tuple(axis for axis in axes if axis not in table))
            tokens_BS, positions_BS = (x if x.shape[0] == 1 else split(x, rows) for x in (tokens_BS, positions_BS))
        # The cast is after the look-up: of the rows that are read, not of the whole table.
        x_BSD = self.embed_tokens[...][tokens_BS if given_BSD is None else jnp.maximum(tokens_BS, 0)].astype(dtype)
        if self.config.embed_scale != 1:
            x_BSD = x_BSD * jnp.asarray(self.config.embed_scale, dtype)
        if given_BSD is not None:
            x_BSD = jnp.where(jnp.asarray(tokens_BS)[..., None] < 0, jnp.zeros((), dtype), x_BSD)
        if self.embed_positions is not None:
            # A position that was not learned makes NaN, where indexing alone would take the last.
            learned_BSD = self.embed_positions[...].at[positions_BS].get(mode="fill", fill_value=jnp.nan)
            x_BSD = x_BSD + learned_BSD.astype(dtype)
        if axes:
            # The table is split along hidden, over axes that split tokens as well. So each device looks up what it has
            # of hidden, for the tokens of all along these, before it has its own tokens whole: not told so, XLA may
            # look all up on every device, sum the table's gradient, whole, over all of them, and leave the activations
            # split along hidden. One axis at a time: it finds no way to both at once.
            for hidden in dict.fromkeys((table, tuple(axis for axis in table if axis != seq), ())):
                others = tuple(axis for axis in axes if axis not in hidden)
                x_BSD = split(x_BSD, PartitionSpec(others, None if seq in hidden else seq, hidden))
        # These lie as the batch does, and so are added where the look-up has come to lie so too.
        return x_BSD if given_BSD is None else x_BSD + given_BSD

    def logits(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """The head applied to the final norm's output."""
        return x @ self.head_kernel().astype(x.dtype)

    def head_kernel(self) -> Float[Array, "hidden vocab"]:
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def run(
        self,
        x_BSD: Float[Array, "batch seq hidden"],
        positions_BS: Int[Array | np.ndarray, "#batch seq"],
        *,
        segment_ids_BS: Int[Array | np.ndarray, "batch seq"] | None = None,
        steps_BS: Int[Array | np.ndarray, "#batch seq"] | None = None,
        cache: KVCache | None = None,
        first_B: Int[Array | np.ndarray, " batch"] | None = None,
        together: bool = False,
        order: Int[Array | np.ndarray, " runs"] | None = None,
        stack: SplitStack | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], Any]:
        """The blocks applied one after the other; and, with a `cache`, its (k, v) with theirs."""
        start = 0 if cache is None else cache.length
        num_layers, columns = self.config.num_layers, column_arrays(self.config)

        def body(carry, layer):
            x_BSD, kv = carry
            block, index, kind = layer
            if self.compute.remat == "offload":
                x_BSD = checkpoint_name(x_BSD, _INPUT)
            return block(
                x_BSD, layer=index, kind=kind, positions_BS=positions_BS, segment_ids_BS=segment_ids_BS,
                steps_BS=steps_BS, cache=kv, start=start, first_B=first_B, together=together,
            ), None  # fmt: skip

        def ordered(carry, run):
            """As `body`, with the layer looked up; the layers that ran before decide its place in the cache."""
            layer, index = run
            pick = functools.partial(jax.lax.dynamic_index_in_dim, index=jnp.maximum(layer, 0), keepdims=False)

            def execute(carry):
                # The look-up is what scan does with the stack too: XLA reads the layer where it lies.
                block, kind = jax.tree.map(pick, (self.blocks, columns))
                (x_BSD, kv), _ = body(carry, (block, index, kind))
                return jnp.where(layer < num_layers, x_BSD, jnp.nan), kv

            return jax.lax.cond(layer >= 0, execute, lambda carry: carry, carry), None

        policy = _REMAT.get(self.compute.remat)
        if stack is not None:
            if order is not None:
                raise ValueError("a stack's layers run in their own order")
            carry = stack.scan(body, (x_BSD, None), self.blocks, columns, policy=policy, unroll=self.compute.unroll)
            return carry[0], None
        step: Step = body
        runs: Any = (self.blocks, jnp.arange(num_layers), columns)
        length = num_layers
        if order is not None:
            check_numbers("layer", order, num_layers, first=-1)
            order = jnp.asarray(order, jnp.int32)
            step, runs, length = ordered, (order, jnp.cumsum(order >= 0) - 1), order.shape[0]
        unroll = min(self.compute.unroll, length) or length
        if policy is not None:
            # Only where no loop is left could XLA take the first computation's values for the second's.
            step = jax.checkpoint(step, policy=policy, prevent_cse=unroll == length)
        # Carried, not scanned over: XLA writes to a carry in place, where each step would copy the cache.
        kv = None if cache is None else (cache.k_LBKTH, cache.v_LBKTH)
        return jax.lax.scan(step, (x_BSD, kv), runs, unroll=unroll)[0]


def check_numbers(what: str, numbers: Array | np.ndarray, count: int, first: int = 0) -> None:
    """UserError for numbers that are not from `first` to `count` - 1, if they are known in this process."""
    known = _known(numbers)
    if known is not None and (wrong := known[(known < first) | (known >= count)]).size:
        hint = "-1 is for what inputs_BSD feeds" if what == "token" and wrong[0] == -1 else ""
        raise UserError(f"{what} {wrong[0]} is not there: the model has {what}s 0-{count - 1}", hint=hint)


def _known(numbers: Array | np.ndarray) -> np.ndarray | None:
    """None if these are not known in this process."""
    unknown = isinstance(numbers, jax.core.Tracer) or not getattr(numbers, "is_fully_addressable", True)
    return None if unknown else np.asarray(numbers)


_is_product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable  # with a parameter, which has no batch
_INPUT = "input of a block"
# What the backward pass finds kept, besides each block's input; all else it computes again.
_REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(_is_product, functools.partial(is_kernel, narrow=False)),
    "context": is_kernel,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def column_arrays(config: ModelConfig) -> dict[str, Array]:
    """`ModelConfig.columns`, as arrays [L]."""
    return {name: jnp.asarray(column) for name, column in config.columns().items()}


@functools.lru_cache(maxsize=64)
def _graphdef(config: ModelConfig, compute: Compute | None) -> Any:
    return nnx.split(Decoder(config, _shapes(config), compute))[0]


def _shapes(config: ModelConfig) -> Params:
    return unflatten({path: jax.ShapeDtypeStruct(param.shape, jnp.float32) for path, param in spec(config).items()})


def abstract(config: ModelConfig, compute: Compute | None = None) -> tuple[Any, Params]:
    """(graphdef, params as float32 ShapeDtypeStructs) of a Decoder, without allocating or tracing anything."""
    return _graphdef(config, compute), _shapes(config)


def init(config: ModelConfig, seed: int | Array) -> Params:
    """Freshly initialised float32 params; a pure function of (config, seed), usable under jit."""
    if not isinstance(seed, jax.Array) or not jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key(seed)
    table, leaves = spec(config), {}
    stacked = [path for path, entry in table.items() if entry.std and entry.stacked]
    drawn = list(dict.fromkeys(STACK if path in stacked else path for path, entry in table.items() if entry.std))
    # All keys at once: each call is a loop of the compiled program, and loops take long to compile.
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold(seed, jnp.arange(len(drawn)))
    if stacked:
        keys_L = jax.random.split(keys[drawn.index(STACK)], config.num_layers)
        keys_LN = jax.vmap(fold, (0, None))(keys_L, jnp.arange(len(stacked)))

    def normal(entry: Param, key: Array) -> Array:
        return entry.std * jax.random.normal(key, entry.each, jnp.float32)

    for path, entry in table.items():
        if not entry.std:
            leaves[path] = jnp.full(entry.shape, entry.fill)
        elif entry.stacked:
            leaves[path] = jax.vmap(normal, (None, 0))(entry, keys_LN[:, stacked.index(path)])
        else:
            leaves[path] = normal(entry, keys[drawn.index(path)])
    return unflatten(leaves)
