"""Adapters against qwix on unstacked blocks, against the plain decoder with merged kernels, and against the papers."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec
from test_model import GPT2, LLAMA, MIXED, forward, noisy, tokens_for
from test_partition import deep, plan_of

from jaxup.depth.freeze import trainable
from jaxup.errors import UserError
from jaxup.model.config import Compute
from jaxup.model.decoder import abstract, column_arrays
from jaxup.model.layers import Block, Linear
from jaxup.model.spec import flatten
from jaxup.training.lora import Adapters, LoraConfig
from jaxup.training.sharding import BATCH_AXES, MeshConfig, make_mesh, place_batch
from jaxup.training.step import StepConfig, TrainState, make_train_step

qwix = pytest.importorskip("qwix")

RANK, ALPHA = 2, 5.0
NF4 = np.array([  # QLoRA (arXiv 2305.14314), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def make(config, roles, select, *, quantize="", tile_size=0, compute=Compute(), seed=0):  # noqa: B008 frozen
    config = deep(config, len(roles))
    masks = trainable(plan_of(roles), abstract(config)[1], **select)
    lora = LoraConfig(rank=RANK, alpha=ALPHA, quantize=quantize, tile_size=tile_size)
    return config, Adapters(config, compute, masks, lora, seed)


def split(adapters, params):
    """`adapters.split`, as one program: each operation by itself is one too."""
    return jax.jit(adapters.split)(params)


def learned(trained, seed=7):
    """Adapters that add something: B is not zero any more."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + 0.1 * rng.standard_normal(a.shape, dtype=np.float32)), trained
    )


def logits(adapters, trained, frozen, tokens):
    decoder, x_BSD = adapters.hidden(trained, frozen, tokens)
    return x_BSD @ decoder.head_kernel()


def added(trained, adapters):
    """path of a kernel -> (its layers, s * A @ B of each in float64)."""
    flat = traverse_util.flatten_dict(trained)
    return {
        path[:-1]: (
            adapters.rows(".".join(path)), ALPHA / RANK * np.float64(a) @ np.float64(flat[*path[:-1], "kernel_lora_b"])
        )
        for path, a in flat.items() if path[-1] == "kernel_lora_a"
    }  # fmt: skip


def merged(trained, adapters, params):
    """`params` with every adapter added by NumPy."""
    flat = {path: np.float64(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}
    for path, (rows, delta) in added(trained, adapters).items():
        kernel = flat[*path, "kernel"]
        kernel[rows] += delta.reshape(len(rows), *kernel.shape[1:])
    return traverse_util.unflatten_dict({path: np.float32(leaf) for path, leaf in flat.items()})


def dequantised(frozen, params):
    """What is frozen as plain arrays, each layer by `qwix.dequantize`."""

    def plain(leaf, like):
        if not isinstance(leaf, qwix.QArray):
            return leaf
        rows = [qwix.dequantize(jax.tree.map(lambda a, i=i: a[i], leaf)) for i in range(like.shape[0])]
        return jnp.stack(rows).reshape(like.shape)

    def every(frozen):
        return jax.tree.map(plain, frozen, params, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray))

    return jax.jit(every)(frozen)


EVERY = {"parameters": "kernel"}
COPIES = {"layers": "copies", "parameters": "o_proj|down_proj"}
# Rows between others are in test_partition as well, and which they are in a test below.
INTERLEAVED = "copies' projections, interleaved"
CASES = {
    "all kernels, of which there are biases": (GPT2, "0z", EVERY, {"compute": Compute(remat="full")}),
    INTERLEAVED: (MIXED, "0z0zz", COPIES, {"compute": Compute(remat="dots")}),
    "nf4": (LLAMA, "0z0", COPIES, {"quantize": "nf4", "tile_size": 8}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == INTERLEAVED)) for case in CASES]
)
def test_function_and_gradients_are_those_of_merged_kernels(case):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, with dL/dW of the plain decoder."""
    config, roles, select, options = CASES[case]
    config, adapters = make(config, roles, select, **options)
    params, tokens = noisy(config), jnp.asarray(tokens_for(config))
    trained, frozen = split(adapters, params)
    trained = learned(trained)
    full = merged(trained, adapters, dequantised(frozen, params))
    # One rounding of the sum, one of each summand.
    close = functools.partial(np.testing.assert_allclose, rtol=3e-7, atol=3e-7)
    jax.tree.map(close, jax.jit(adapters.join)(trained, frozen), full)
    graphdef, _ = abstract(config)

    def whole(params):
        out = nnx.merge(graphdef, params)(tokens)
        return jnp.sum(jnp.sin(out)), out

    def parts(trained, frozen):
        out = logits(adapters, trained, frozen, tokens)
        return jnp.sum(jnp.sin(out)), out

    (_, want), kernel_grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(full)
    (_, got), grads = jax.jit(jax.value_and_grad(parts, has_aux=True))(trained, frozen)
    # float32 sums in another order, through all layers.
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.max(jnp.abs(want))))
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    flat, grads = traverse_util.flatten_dict(trained), traverse_util.flatten_dict(grads)
    kernel_grads = traverse_util.flatten_dict(kernel_grads)
    for path in added(trained, adapters):
        a, b = (np.float64(flat[*path, f"kernel_lora_{name}"]) for name in "ab")
        g = np.float64(kernel_grads[*path, "kernel"])[adapters.rows(".".join((*path, "kernel_lora_a")))]
        g = ALPHA / RANK * g.reshape(len(a), a.shape[1], b.shape[2])
        for name, want in (("a", g @ b.swapaxes(1, 2)), ("b", a.swapaxes(1, 2) @ g)):
            np.testing.assert_allclose(grads[*path, f"kernel_lora_{name}"], want, atol=2e-5 * np.max(np.abs(want)))


class Flat(nnx.Module):
    """A Linear of ours as flax's, which qwix knows: one axis in, one out."""

    def __init__(self, ours):
        inputs, outputs = math.prod(ours.kernel.shape[: ours.inputs]), math.prod(ours.outputs)
        self.axes, self.outputs = ours.inputs, ours.outputs
        self.linear = nnx.Linear(inputs, outputs, use_bias=ours.bias is not None, rngs=nnx.Rngs(0))
        self.linear.kernel.set_value(ours.kernel[...].reshape(inputs, outputs))
        if ours.bias is not None:
            self.linear.bias.set_value(ours.bias[...].reshape(outputs))

    def __call__(self, x):
        batch = x.shape[: x.ndim - self.axes]
        return self.linear(x.reshape(*batch, -1)).reshape(*batch, *self.outputs)


def qwix_block(config, params, layer, kernels, options, x_BSD, inputs):
    """Layer `layer` as a module of its own after `qwix.apply_lora_to_model`, with A, B of the named kernels."""
    leaves = flatten({"blocks": params["blocks"]})
    block = Block(config, Compute(), {path: leaf[layer] for path, leaf in leaves.items()})
    for _, owner in list(nnx.iter_modules(block)):
        for name, child in list(vars(owner).items()):
            if isinstance(child, Linear):
                setattr(owner, name, Flat(child))
    quantise = {"weight_qtype": options.get("quantize") or None, "tile_size": options.get("tile_size") or None}
    rules = [
        qwix.LoraRule(module_path=f"{'/'.join(path[1:])}/linear", rank=RANK, alpha=ALPHA, **quantise)
        for path in kernels
    ]
    if quantise["weight_qtype"]:
        rules.append(qwix.QuantizationRule(module_path=".*/linear", **quantise))
    block = qwix.apply_lora_to_model(block, qwix.LoraProvider(rules), x_BSD, rngs=nnx.Rngs(0), **inputs)
    for path, pair in kernels.items():
        linear = functools.reduce(getattr, path[1:], block).linear
        for name, value in zip("ab", pair):
            param = getattr(linear, f"kernel_lora_{name}")
            assert param.shape == value.shape
            param.set_value(value)
    return block


@pytest.mark.parametrize(
    ("config", "roles", "select", "options"),
    [
        (LLAMA, "00", EVERY, {}),
        (GPT2, "0z", COPIES, {}),
        (LLAMA, "z", COPIES, {"quantize": "nf4", "tile_size": 8}),
        pytest.param(MIXED, "0", EVERY, {"quantize": "int8"}, marks=pytest.mark.slow),
    ],
    ids=["llama", "gpt2", "nf4", "int8"],
)
def test_equals_qwix_on_unstacked_blocks(config, roles, select, options):
    config, adapters = make(config, roles, select, **options)
    params, tokens = noisy(config), jnp.asarray(tokens_for(config))
    trained, frozen = split(adapters, params)
    trained = learned(trained)
    flat = traverse_util.flatten_dict(trained)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def run(layer, x_BSD):
        kernels = {
            path: [flat[*path, f"kernel_lora_{name}"][list(rows).index(layer)] for name in "ab"]
            for path, (rows, _) in added(trained, adapters).items()
            if layer in rows
        }
        kind = {name: column[layer] for name, column in column_arrays(config).items()}
        inputs = {"layer": jnp.int32(layer), "kind": kind, "positions_BS": positions, "segment_ids_BS": None}
        block = qwix_block(config, params, layer, kernels, options, x_BSD, inputs)
        o_proj = block.self_attn.o_proj.linear.kernel
        return block(x_BSD, **inputs)[0], (o_proj.array.qvalue[...], o_proj.array.scale[...]) if options else ()

    x_BSD = params["embed_tokens"][tokens]
    if "embed_positions" in params:
        x_BSD = x_BSD + params["embed_positions"][positions]
    # qwix finds a kernel that it has quantised only outside of jit.
    run = run if options else jax.jit(run, static_argnums=0)
    for layer in range(config.num_layers):
        x_BSD, stored = run(layer, x_BSD)
        if options:
            ours = frozen["blocks"]["self_attn"]["o_proj"]["kernel"]
            np.testing.assert_array_equal(ours.qvalue[layer].astype(jnp.int32), stored[0].astype(jnp.int32))
            np.testing.assert_array_equal(ours.scale[layer], stored[1])
    decoder = nnx.merge(abstract(config)[0], params)
    want = decoder.norm(x_BSD) @ decoder.head_kernel()
    got = jax.jit(functools.partial(logits, adapters))(trained, frozen, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.max(jnp.abs(want))))


def test_training_begins_at_the_base_model():
    config, adapters = make(LLAMA, "0z0", {})
    params, tokens = noisy(config), jnp.asarray(tokens_for(config))
    trained, frozen = split(adapters, params)
    jax.tree.map(np.testing.assert_array_equal, frozen, params)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(adapters.join)(trained, frozen), params)
    got = jax.jit(functools.partial(logits, adapters))(trained, frozen, tokens)
    want = forward(config, Compute(), params, tokens)
    # Adding zero changes nothing; the compiler may sum a product in another order.
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_only_chosen_kernels_of_chosen_layers_have_adapters():
    config, adapters = make(LLAMA, "0z0zz", {"layers": "copies", "parameters": "o_proj|down_proj|norm"})
    trained, _ = split(adapters, noisy(config))
    shapes = {".".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(trained).items()}
    o_inputs, D, F = config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size
    assert shapes == {
        "blocks.self_attn.o_proj.kernel_lora_a": (3, o_inputs, RANK),
        "blocks.self_attn.o_proj.kernel_lora_b": (3, RANK, D),
        "blocks.mlp.down_proj.kernel_lora_a": (3, F, RANK),
        "blocks.mlp.down_proj.kernel_lora_b": (3, RANK, D),
    }
    assert adapters.rows("blocks.self_attn.o_proj.kernel_lora_b").tolist() == [1, 3, 4]


def test_a_is_drawn_by_seed_kernel_and_layer():
    """He-uniform (He et al. 2015): variance 2 / fan_in, nothing above sqrt(6 / fan_in)."""
    config = dataclasses.replace(LLAMA, hidden_size=64)
    _, some = make(config, "0z0z", COPIES)
    config, every = make(config, "0z0z", EVERY)
    params = abstract(config)[1]
    drawn_by = [some, every, make(config, "0z0z", EVERY, seed=1)[1]]
    drawn = jax.jit(lambda: [adapters.split(params)[0] for adapters in drawn_by])()
    some, every, other = (traverse_util.flatten_dict(tree, sep=".") for tree in drawn)
    name = "blocks.self_attn.o_proj.kernel_lora_a"
    np.testing.assert_array_equal(some[name], every[name][np.array([1, 3])])
    values = np.concatenate([a.ravel() for n, a in every.items() if n.endswith("q_proj.kernel_lora_a")])
    bound = math.sqrt(6 / 64)
    assert 0.95 * bound < np.max(np.abs(values)) < bound
    assert abs(np.mean(values**2) * 64 / 2 - 1) < 0.2
    drawn = [row.ravel()[:8] for n, a in (every | {f"{n}'": a for n, a in other.items()}).items() if "lora_a" in n
             for row in a]  # fmt: skip
    assert len({row.tobytes() for row in drawn}) == len(drawn) == 2 * 7 * 4


@pytest.mark.parametrize("tile_size", [16, 0])
def test_nf4_takes_four_bits_and_rounds_to_the_nearest_of_the_papers_levels(tile_size):
    config = dataclasses.replace(LLAMA, hidden_size=64, intermediate_size=128, num_heads=4, head_dim=16)
    config, adapters = make(config, "0z0", COPIES, quantize="nf4", tile_size=tile_size)
    params = noisy(config)
    _, frozen = split(adapters, params)
    unchanged, plain = (traverse_util.flatten_dict(tree) for tree in (frozen, dequantised(frozen, params)))
    seen = 0
    for path, leaf in traverse_util.flatten_dict(params).items():
        if path[0] != "blocks" or path[-1] != "kernel":
            np.testing.assert_array_equal(unchanged[path], leaf)
            continue
        stored, seen = unchanged[path], seen + 1
        inputs = {"o_proj": 2}.get(path[-2], 1)
        kernel = np.float64(leaf).reshape(3, math.prod(leaf.shape[1 : 1 + inputs]), -1)
        assert stored.qvalue.dtype == jnp.uint4
        assert stored.qvalue.shape == kernel.shape
        tiles = kernel.reshape(3, -1, tile_size or kernel.shape[1], kernel.shape[2])
        scale = np.max(np.abs(tiles), axis=2, keepdims=True)
        np.testing.assert_array_equal(stored.scale, np.squeeze(scale, 2))
        got = np.float64(plain[path]).reshape(tiles.shape)
        distances = np.abs(tiles[..., None] - NF4 * scale[..., None])
        # At least as near as any level, but for the rounding of float32; never off by more than half a gap.
        np.testing.assert_array_less(np.abs(got - tiles), np.min(distances, axis=-1) + 1e-7 * scale)
        assert np.all(np.abs(got - tiles) <= (np.max(np.diff(NF4)) / 2 + 1e-7) * scale)
        levels = NF4[np.asarray(stored.qvalue.astype(jnp.int32))].reshape(tiles.shape) * scale
        np.testing.assert_allclose(got, levels, rtol=3e-7)
    assert seen == 7


@pytest.mark.parametrize(("quantize", "dtype"), [("int4", jnp.int4), ("int8", jnp.int8)])
def test_integers_take_their_bits_and_round_to_the_nearest_level(quantize, dtype):
    config, adapters = make(LLAMA, "0z", COPIES, quantize=quantize, tile_size=8)
    params = noisy(config)
    stored = split(adapters, params)[1]["blocks"]["mlp"]["down_proj"]["kernel"]
    assert stored.qvalue.dtype == dtype
    tiles = np.float64(params["blocks"]["mlp"]["down_proj"]["kernel"]).reshape(2, -1, 8, config.hidden_size)
    got = np.float64(dequantised({"k": stored}, {"k": np.zeros((2, 24, 16))})["k"]).reshape(tiles.shape)
    # The largest level is half a step below the largest value: both ends are rounded alike.
    step = np.max(np.abs(tiles), axis=2, keepdims=True) / (2 ** (jnp.iinfo(dtype).bits - 1) - 0.5)
    assert np.all(np.abs(got - tiles) <= step * (0.5 + 1e-5))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merging_keeps_every_bit_of_rows_without_adapters(dtype):
    config, adapters = make(LLAMA, "0z0z", COPIES)
    params = noisy(config)
    params = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf.astype(dtype).at[0].set(-0.0), params))(params)
    trained = learned(split(adapters, params)[0])
    after = jax.jit(adapters.merge)(trained, params)
    want = traverse_util.flatten_dict(merged(trained, adapters, params))
    bits = np.uint32 if dtype == jnp.float32 else np.uint16
    changed = added(trained, adapters)

    def check(path, old, new):
        path, old, new = tuple(key.key for key in path), np.asarray(old), np.asarray(new)
        rows = changed[path[:-1]][0] if path[-1] == "kernel" and path[:-1] in changed else []
        assert new.dtype == old.dtype
        kept = np.setdiff1d(np.arange(len(old)), rows)
        np.testing.assert_array_equal(new[kept].view(bits), old[kept].view(bits))
        # Rounded once, to the nearest.
        rtol = 1e-6 if dtype == jnp.float32 else 2**-8
        np.testing.assert_allclose(np.float32(new), want[path], rtol=rtol, atol=1e-7)
        assert not len(rows) or np.all(np.any(new[rows] != old[rows], axis=-1))

    jax.tree_util.tree_map_with_path(check, params, after)


def batch_of(config):
    tokens = np.tile(tokens_for(config), (4, 1))
    return {"tokens": tokens, "targets": tokens[:, ::-1], "loss_weights": np.ones(tokens.shape, np.float32)}


def test_steps_train_the_adapters_alone_and_compile_once():
    config, adapters = make(LLAMA, "0z0z", COPIES, quantize="nf4", tile_size=8)
    params, batch, optimizer = noisy(config), batch_of(config), optax.adam(0.02)
    trained, frozen = split(adapters, params)
    state = TrainState(trained, optimizer.init(trained), jnp.int32(0), jnp.bool_(False))
    options = StepConfig(accumulation=1, loss_chunk=17, z_loss=0.0)
    train_step = make_train_step(config, Compute(), optimizer, options, adapters)
    traces = []
    step = jax.jit(lambda *args: (traces.append(1), train_step(*args))[1], donate_argnums=0)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch, np.float32(0.02), frozen)
        losses.append(float(metrics["loss"]))
    assert len(traces) == 1
    assert losses[-1] < losses[0] - 0.05
    assert np.flatnonzero(metrics["gradient_norm_layers"]).tolist() == [1, 3]
    after = jax.jit(adapters.merge)(state.params, params)
    assert not np.array_equal(
        after["blocks"]["mlp"]["down_proj"]["kernel"][1], params["blocks"]["mlp"]["down_proj"]["kernel"][1]
    )


def test_mesh_does_not_change_the_gradients():
    """With A, B and what is quantised split as their kernels are."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config, single = make(GPT2, "0z", COPIES, quantize="nf4", tile_size=8)
    _, adapters = make(GPT2, "0z", COPIES, quantize="nf4", tile_size=8, compute=Compute(batch_axes=BATCH_AXES))
    params, batch = noisy(config), batch_of(config)

    def gradients(adapters, trained, frozen, batch):
        loss = lambda trained: jnp.mean(jnp.sin(logits(adapters, trained, frozen, batch["tokens"])))  # noqa: E731
        return jax.jit(jax.grad(loss))(trained)

    trained, frozen = split(single, params)
    want = gradients(single, learned(trained), frozen, jax.tree.map(jnp.asarray, batch))
    shardings = adapters.shardings(mesh)
    trained, frozen = jax.device_put((learned(trained), frozen), shardings)
    o_proj = trained["blocks"]["self_attn"]["o_proj"]
    assert o_proj["kernel_lora_a"].sharding.spec == PartitionSpec(None, "tensor", None)
    assert o_proj["kernel_lora_b"].sharding.spec == PartitionSpec(None, None, "fsdp")
    stored = frozen["blocks"]["self_attn"]["o_proj"]["kernel"]
    assert stored.qvalue.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    with jax.set_mesh(mesh):
        got = gradients(adapters, trained, frozen, place_batch(batch, 8, mesh))
    # float32 sums over devices, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(b))), got, want)


def test_dequantised_kernels_are_never_kept():
    """Temporary memory of a gradient that goes back through 24 quantised layers: less than they take in bfloat16."""
    config = dataclasses.replace(LLAMA, hidden_size=64, intermediate_size=512)
    config, adapters = make(config, "z" + 24 * "0", COPIES, quantize="nf4", tile_size=8)
    trained, frozen = jax.eval_shape(adapters.split, abstract(config)[1])

    def loss(trained, frozen, tokens):
        return jnp.sum(adapters.hidden(trained, frozen, tokens)[1])

    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(trained, frozen, tokens).compile().memory_analysis()
    # The gradients are of the adapters alone.
    assert memory.output_size_in_bytes < sum(4 * leaf.size for leaf in jax.tree.leaves(trained)) + 1000
    kernels = sum(leaf.size for leaf in jax.tree.leaves(frozen["blocks"]) if leaf.dtype == jnp.uint4)
    # Kept in float32 they would be four bytes each. XLA's CPU holds four bits in a byte, and copies those once.
    assert memory.temp_size_in_bytes < 2 * kernels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"lora.rank=0: adapters need a rank of at least 1"),
        ({"rank": 1000}, r"lora.rank=1000: more than the kernels themselves have, at most \d+$"),
        ({"alpha": 0.0}, r"lora.alpha=0.0: must be positive"),
        ({"alpha": float("nan")}, r"lora.alpha=nan: must be positive"),
        ({"quantize": "nf5"}, r"lora.quantize='nf5': unknown; did you mean 'nf4'\?"),
        ({"quantize": "nf4", "tile_size": 64}, r"lora.tile_size=64: does not divide the 16 rows of q_proj; 8 would"),
        ({"tile_size": -1}, r"lora.tile_size=-1: must be at least 0"),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_line(change, message):
    masks = trainable(plan_of("000"), abstract(LLAMA)[1])
    lora = LoraConfig(**{"rank": 2, "alpha": 1.0, "quantize": "", "tile_size": 0} | change)
    with pytest.raises(UserError, match=message) as error:
        Adapters(LLAMA, Compute(), masks, lora, 0)
    assert "\n" not in str(error.value)


def test_masks_without_a_kernel_are_refused():
    with pytest.raises(UserError, match="lora: no kernel of a block is among what is to train; adapters go to "):
        make(LLAMA, "000", {"parameters": "norm|lm_head"})


def test_without_qwix_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"lora: qwix is not installed; pip install 'jaxup\[lora\]'"):
        make(LLAMA, "000", {})
