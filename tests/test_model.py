"""The decoder against itself run in other ways, and its loss; see test_parity for torch."""

import contextlib
import dataclasses
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.interpreters.partial_eval import dce_jaxpr
from parity import SEQ, loss_and_grad, relative, tokens_for
from scipy.special import logsumexp

from jaxup.depth.apply import apply
from jaxup.depth.plan import ZEROED, DepthPlan, Row
from jaxup.depth.result import result_config
from jaxup.errors import UserError
from jaxup.model.attention import attention, choose
from jaxup.model.config import Compute, LayerKind, ModelConfig, RopeScaling, depth_scaled
from jaxup.model.decoder import KVCache, abstract, init
from jaxup.model.spec import count_params, flatten, spec
from jaxup.training.loss import cross_entropy, distillation


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(config, compute, params, tokens, segment_ids=None):
    graphdef, _ = abstract(config, compute)
    return nnx.merge(graphdef, params)(tokens, segment_ids_BS=segment_ids)


def noisy(config, seed=0):
    """Params whose every leaf matters: biases are not zero, norms are not one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = 0.1 * rng.standard_normal(leaf.shape, dtype=np.float32)
        return jnp.asarray(values + 1 if path[-1].key == "scale" else values)

    return jax.tree_util.tree_map_with_path(draw, abstract(config)[1])


GPT2 = ModelConfig.gpt2(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, max_positions=300, bias=True)
LLAMA = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
    max_positions=300, norm="rmsnorm", norm_eps=1e-6, positions="rope", rope_theta=1e4, activation="silu",
    gated_mlp=True, tie_embeddings=False,
)  # fmt: skip
WINDOWED = dataclasses.replace(LLAMA, kinds=(LayerKind(window=4),))
MIXED = dataclasses.replace(
    LLAMA, qk_norm=True, qkv_bias=True,
    kinds=(LayerKind(placement="post"), LayerKind(window=4, norm_factor=0.7), LayerKind()),
    rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_max_positions=8, low_freq_factor=1.0,
                             high_freq_factor=4.0),
)  # fmt: skip
CONFIGS = {"gpt2": GPT2, "windowed": WINDOWED, "mixed": MIXED}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Where a window is no more than a part of the programs of "mixed".
configs_apart = pytest.mark.parametrize(
    "config", [pytest.param(c, id=name, marks=[pytest.mark.slow] * (c == WINDOWED)) for name, c in CONFIGS.items()]
)


@configs
def test_cached_decoding_equals_the_full_forward(config):
    params, tokens = noisy(config), tokens_for(config)
    graphdef, _ = abstract(config)
    full = forward(config, Compute(), params, tokens)
    decode = jax.jit(lambda params, tokens, cache: nnx.merge(graphdef, params).decode(tokens, cache))
    cache = KVCache.empty(config, 2, SEQ + 3, jnp.float32)
    pieces = []
    for part in np.split(tokens, [7, *range(8, SEQ)], axis=1):  # a prompt of 7, then one by one
        logits, cache = decode(params, part, cache)
        pieces.append(logits)
    assert int(cache.length) == SEQ
    np.testing.assert_allclose(jnp.stack(pieces, axis=1), full[:, 6:], atol=1e-5)


def test_what_the_cache_or_the_positions_cannot_hold_is_refused_and_not_clamped():
    config = dataclasses.replace(GPT2, max_positions=8)
    model, order = nnx.merge(abstract(config)[0], noisy(config)), jnp.array([0, 1, 0])
    tokens = jnp.asarray(tokens_for(config))[:, :9]
    with pytest.raises(UserError, match="9 tokens, and the model has learned 8 positions"):
        model(tokens)
    for inputs, message in (
        ({"tokens_BS": np.array([[3, 50]])}, "token 50 is not there: the model has tokens 0-49"),
        ({"tokens_BS": jnp.array([[3, -100]])}, "token -100 is not there"),
        ({"tokens_BS": np.array([[3]]), "positions_BS": np.array([[8]])}, "position 8 is not there"),
        ({"tokens_BS": np.array([[3]]), "order": np.array([0, -1, 2])}, "layer 2 is not there: .* layers 0-1$"),
    ):
        with pytest.raises(UserError, match=message):
            model(**inputs)
    beyond = jax.jit(model)(tokens, positions_BS=jnp.arange(9, dtype=jnp.int32)[None])
    assert jnp.isnan(beyond[:, 8]).all()
    cache = KVCache.empty(config, 2, 16, jnp.float32)
    with pytest.raises(UserError, match="9 tokens, and the model has learned 8 positions"):
        model.decode(tokens, cache)
    with pytest.raises(UserError, match="the cache is for 2 runs of a layer, not 3"):
        model.decode(tokens[:, :4], cache, order=order)
    model.decode(tokens[:, :4], cache, order=jnp.array([1, -1, 0]))
    _, full = jax.jit(model.decode)(tokens[:, :4], KVCache.empty(config, 2, 4, jnp.float32))
    with pytest.raises(UserError, match="the cache holds 4 tokens, and 4 are in it: no room for 1 more"):
        model.decode(tokens[:, 4:5], full)
    assert jnp.isnan(jax.jit(model.decode)(tokens[:, 4:5], full)[0]).all()


@pytest.mark.parametrize(
    ("capability", "asked", "given", "chosen"),
    [
        ("8.0", "auto", {}, "cudnn"),
        ("9.0", "auto", {"packed": True}, "cudnn"),
        ("9.0", "auto", {"packed": True, "seq_len": 4095}, "blocked"),  # its bias wants an even length
        ("9.0", "auto", {"head_dim": 100}, "cudnn"),  # OpenLLaMA-3B
        ("8.0", "auto", {"head_dim": 256}, "blocked"),  # Gemma
        ("9.0", "auto", {"head_dim": 256}, "cudnn"),
        ("9.0", "auto", {"dtype": "float32"}, "blocked"),
        ("9.0", "auto", {"seq_len": None}, "xla"),  # decoding
        ("9.0", "cudnn", {"seq_len": None}, "xla"),
        ("9.0", "blocked", {}, "blocked"),
        ("9.0", "xla", {}, "xla"),
        ("7.5", "auto", {}, "blocked"),
        ("gfx942", "auto", {}, "blocked"),
        (None, "auto", {}, "blocked"),
        (None, "cudnn", {}, "cudnn"),
        # What the program is for decides, and not what compiles it.
        (None, "auto", {"mesh": "tpu"}, "splash"),
        ("9.0", "auto", {"mesh": "tpu", "dtype": "float32", "head_dim": 100, "packed": True}, "splash"),
        (None, "auto", {"mesh": "tpu", "seq_len": None}, "xla"),
        (None, "blocked", {"mesh": "tpu"}, "blocked"),
        ("tpu", "auto", {}, "blocked"),  # a kernel that no mesh splits runs on one device only
        ("9.0", "auto", {"mesh": "cpu"}, "blocked"),
        ("9.0", "auto", {"mesh": "gpu"}, "cudnn"),
        (None, "splash", {}, "splash"),
        (None, "splash", {"stepwise": True}, "blocked"),  # its masks are constants
        (None, "auto", {"mesh": "tpu", "stepwise": True}, "blocked"),
        ("9.0", "auto", {"stepwise": True}, "cudnn"),
        ("9.0", "auto", {"stepwise": True, "seq_len": 4095}, "blocked"),
    ],
)
def test_which_attention_runs(capability, asked, given, chosen, monkeypatch):
    if capability:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu" if capability == "tpu" else "gpu")
        devices = [types.SimpleNamespace(compute_capability=capability)]
        monkeypatch.setattr(jax, "local_devices", lambda backend: devices)
    usual = {"dtype": "bfloat16", "seq_len": 4096, "head_dim": 128, "packed": False, "mesh": None}
    platform = (asking := usual | given).pop("mesh")
    device = platform and jax.sharding.AbstractDevice("TPU v6 lite", 1, platform)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh) if platform else contextlib.nullcontext():
        assert choose(asked, **asking) == chosen


@pytest.fixture
def cudnn(monkeypatch):
    """Programs with its kernel can be traced, not run."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_is_flash_attention", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("attention", "head_dim", "remat", "times"),
    [
        ("cudnn", 6, "dots", 1), ("cudnn", 6, "context", 1), ("cudnn", 6, "full", 2),
        ("splash", 128, "dots", 1), ("splash", 64, "dots", 2), ("splash", 64, "context", 1), ("splash", 128, "full", 2),
        ("splash", 64, "offload", 2),
    ],
)  # fmt: skip
def test_what_rematerialisation_keeps_of_the_kernel_of_attention(attention, head_dim, remat, times, cudnn):
    config = dataclasses.replace(LLAMA, head_dim=head_dim)
    compute = Compute(dtype="bfloat16", attention=attention, remat=remat)
    traced = jax.make_jaxpr(lambda params, tokens: loss_and_grad(config, compute, params, tokens))
    program = traced(noisy(config), tokens_for(config)).jaxpr
    program = str(dce_jaxpr(program, [True] * len(program.outvars))[0])  # as XLA, without what nothing reads
    forward, backward = {
        "cudnn": ("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"),
        "splash": ("name=splash_mha_fwd", "name=splash_mha_dkv"),
    }[attention]
    assert program.count(forward) == times
    assert program.count(backward) == 1
    # What the layers keep in the memory of the host: the input of each.
    kept = set(re.findall(r"\w+<host>\[3,[\d,]+\]", program))
    assert len(kept) == (remat == "offload"), kept


@pytest.mark.parametrize("given", ["segment_ids_BS", "steps_BS"])
def test_packed_rows_keep_no_mask_and_no_logits_for_the_backward_pass_of_the_kernel(given, cudnn):
    compute, tokens = Compute(dtype="bfloat16", attention="cudnn"), tokens_for(LLAMA)[:, :12]
    graphdef, _ = abstract(LLAMA, compute)

    def total(params, tokens):
        return jnp.sum(nnx.merge(graphdef, params).hidden(tokens, **{given: tokens}).astype(jnp.float32))

    program = str(jax.make_jaxpr(jax.grad(total))(noisy(LLAMA), tokens))
    assert program.count("dot_product_attention_fwd_wrapper") == program.count("dot_product_attention_bwd_wrapper") == 1
    assert "bf16[2,1,12,12]" in program  # the mask that the kernel is given
    assert "[3,2,1,12,12]" not in program
    assert not re.search(r"f32\[[\d,]+,12,12\]", program)


@configs_apart
def test_an_order_of_layers_runs_as_the_model_built_by_its_plan(config):
    """One program for all orders; windows and divisors of attention go with the layer, as its weights do."""
    if config == GPT2:
        config = dataclasses.replace(config, num_layers=3, kinds=depth_scaled(3))
    params, tokens = noisy(config), tokens_for(config)
    graphdef, _ = abstract(config)
    run = jax.jit(lambda params, tokens, order: nnx.merge(graphdef, params)(tokens, order=order))
    for layers in ((0, 1, 1, 2), (2, 1, 0, 1), (2, 0)):
        zeroed = Row("m", 1, "copy", ZEROED)
        rows = [Row("m", layer) for layer in layers]
        plan = DepthPlan((*rows[:1], zeroed, *rows[1:], zeroed), *["m"] * 4, (("m", 3),))
        order = plan.order() + (-1,) * (6 - plan.num_layers)
        assert order[1] == -1
        logits = run(params, tokens, np.array(order, np.int32))
        unzeroed = dataclasses.replace(plan, rows=tuple(rows))
        built = jax.jit(apply, static_argnums=0)(unzeroed, {"m": params})
        want = forward(result_config(unzeroed, {"m": config}), Compute(), built, tokens)
        # The same operations on the same numbers; XLA may fuse them otherwise.
        np.testing.assert_allclose(logits, want, atol=1e-6)
        if len(layers) == 2:
            step = jax.jit(lambda p, t, cache, order: nnx.merge(graphdef, p).decode(t, cache, order=order))
            cache = KVCache.empty(config, 2, SEQ, jnp.float32, layers=2)
            for part in np.split(tokens, [SEQ - 1], axis=1):
                last, cache = step(params, part, cache, np.array([2, -1, 0], np.int32))
            np.testing.assert_allclose(last, want[:, -1], atol=1e-5)
    assert run._cache_size() == 1
    assert np.isnan(run(params, tokens, np.array([0, 1, 2, 3, -1, -1], np.int32))).all()


DOTS, FULL, OFFLOAD = Compute(remat="dots", unroll=2), Compute(remat="full", unroll=99), Compute(remat="offload")
HERE = ("mixed", DOTS), ("mixed", FULL), ("gpt2", OFFLOAD)  # each once among the default tests


@pytest.mark.parametrize(
    ("name", "compute"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] * (each not in HERE), id="-".join((each[0], each[1].remat)))
        for each in [*itertools.product(CONFIGS, (DOTS, FULL)), ("gpt2", OFFLOAD)]
    ],
)
def test_rematerialisation_and_unrolling_do_not_change_gradients(name, compute):
    config = CONFIGS[name]
    params, tokens = noisy(config), tokens_for(config)
    (loss, _), grads = loss_and_grad(config, Compute(), params, tokens)
    scale = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    (other_loss, _), other = loss_and_grad(config, compute, params, tokens)
    assert abs(loss - other_loss) < 1e-6
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / scale, other, grads)
    assert max(jax.tree.leaves(errors)) < 1e-6


@pytest.mark.parametrize("window", [None, 1024])
def test_long_rows_have_no_logits_of_all_positions_at_once(window):
    """Of an up-scaled model's packed rows of 4,096 tokens, forward and backward, as the compiler planned it."""
    seq, heads = 4096, 8
    shape = lambda *sizes: jax.ShapeDtypeStruct((1, seq, *sizes), jnp.bfloat16)  # noqa: E731
    ids = jax.ShapeDtypeStruct((1, seq), jnp.int32)

    def total(q, k, v, ids):
        return attention(q, k, v, window=window, segment_ids=ids).astype(jnp.float32).sum()

    step = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape(heads, 16), shape(2, 16), shape(2, 16), ids).compile()
    assert step.memory_analysis().temp_size_in_bytes < heads * seq**2 * 4 / 4


@configs_apart
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_no_gradient_from_later_tokens_other_segments_or_beyond_the_window(config, implementation):
    """The gradient of each position's logits by each position's embedding: what can see what."""
    seq = 9
    segments = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2], np.int32)
    # A token per position, so that row s of the embedding is position s.
    tokens, ids = jnp.arange(seq)[None], jnp.asarray(segments[None])
    # Untied, or the embedding would also act through the head.
    config = dataclasses.replace(config, tie_embeddings=False).with_layers([1])
    graphdef, _ = abstract(config, Compute(attention=implementation))
    params = noisy(config)

    @jax.jit
    def influence(params):
        def logits(embedding):
            model = nnx.merge(graphdef, params | {"embed_tokens": embedding})
            return jnp.sum(jnp.sin(model(tokens, segment_ids_BS=ids)[0]), axis=-1)

        return jnp.linalg.norm(jax.jacrev(logits)(params["embed_tokens"])[:, :seq], axis=-1)

    t, s = np.arange(seq)[:, None], np.arange(seq)[None]
    visible = (s <= t) & (segments[:, None] == segments[None])
    if config.windows[0]:
        visible &= t - s < config.windows[0]
    np.testing.assert_array_equal(np.asarray(influence(params)) > 0, visible)


@configs_apart
def test_packed_segments_give_the_logits_of_each_alone(config):
    params, tokens = noisy(config), tokens_for(config, batch=1)
    segments = (np.arange(SEQ)[None] >= 8).astype(np.int32)
    graphdef, _ = abstract(config)
    positions = np.concatenate([np.arange(8), np.arange(SEQ - 8)])[None].astype(np.int32)
    packed = jax.jit(
        lambda params, tokens, positions, ids: nnx.merge(graphdef, params)(
            tokens, positions_BS=positions, segment_ids_BS=ids
        )
    )(params, tokens, positions, segments)
    alone = [forward(config, Compute(), params, part) for part in (tokens[:, :8], tokens[:, 8:])]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=1e-5)


@configs_apart
def test_bfloat16_stays_near_float32(config):
    """bfloat16 keeps 8 bits: one rounding is a relative 2^-9 = 0.2%, and some ten roundings lie
    between two points of the residual stream, per layer two; independent, they add up to
    0.002 * sqrt(20 * layers), 1.5% here. 5% leaves room for what attention amplifies.
    """
    params, tokens = noisy(config), tokens_for(config)
    exact = forward(config, Compute(), params, tokens)
    (_, low), grads = loss_and_grad(config, Compute(dtype="bfloat16"), params, tokens)
    assert low.dtype == jnp.bfloat16
    assert 0 < relative(low.astype(jnp.float32), exact) < 0.05
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("chunk", [1, 4, 5, 17, 100])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_equals_float64(chunk, z_loss):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, SEQ, 8)), rng.standard_normal((8, 33))
    targets = rng.integers(0, 33, (2, SEQ), dtype=np.int32)
    weights = (rng.random((2, SEQ)) * (rng.random((2, SEQ)) > 0.3)).astype(np.float32)
    logits = x @ kernel
    lse = logsumexp(logits, axis=-1)
    plain = (weights * (lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0])).sum()
    total = plain + z_loss * (weights * lse**2).sum()
    # By hand: d/dlogits = w * (softmax * (1 + 2 z lse) - onehot).
    dlogits = np.exp(logits - lse[..., None]) * (1 + 2 * z_loss * lse)[..., None] - np.eye(33)[targets]
    dlogits *= weights[..., None]
    expected = (dlogits @ kernel.T, np.einsum("bsd,bsv->dv", x, dlogits))

    def scaled(x, kernel):  # by 3, so that the cotangent is not one
        loss, plain = cross_entropy(x, kernel, jnp.asarray(targets), jnp.asarray(weights), chunk=chunk, z_loss=z_loss)
        return 3 * loss, (loss, plain)

    grads, (loss, got_plain) = jax.jit(jax.grad(scaled, (0, 1), has_aux=True))(jnp.float32(x), jnp.float32(kernel))
    assert abs(loss - total) < 1e-5 * total
    assert abs(got_plain - plain) < 1e-5 * plain
    for got, want in zip(grads, expected, strict=True):
        assert relative(got / 3, want) < 1e-5


@pytest.mark.parametrize(("alpha", "temperature", "chunk"), [(0.6, 1.0, 4), (0.3, 2.5, 17), (1.0, 0.5, 5)])
def test_distillation_is_torchs(alpha, temperature, chunk, torch):
    """Loss and gradients in float64 by `kl_div` and `cross_entropy`; the teacher is of another width."""
    rng = np.random.default_rng(0)
    x, kernel, y, known = (rng.standard_normal(shape) for shape in ((2, SEQ, 8), (8, 33), (2, SEQ, 12), (12, 33)))
    targets = rng.integers(0, 33, (2, SEQ), dtype=np.int32)
    weights = (rng.random((2, SEQ)) * (rng.random((2, SEQ)) > 0.3)).astype(np.float32)
    own = [torch.tensor(a, requires_grad=True) for a in (x, kernel)]
    logits, functional = own[0] @ own[1], torch.nn.functional
    soft = [a / temperature for a in (logits, torch.tensor(y @ known))]
    kl = functional.kl_div(soft[0].log_softmax(-1), soft[1].log_softmax(-1), reduction="none", log_target=True).sum(-1)
    hard = functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets.flatten()).long(), reduction="none")
    hard, weighed = hard.reshape(2, SEQ), torch.tensor(weights)
    z = (weighed * logits.logsumexp(-1) ** 2).sum()
    want = (weighed * (alpha * temperature**2 * kl + (1 - alpha) * hard)).sum() + 1e-2 * z
    want.backward()

    def scaled(*heads):  # by 3, so that the cotangent is not one
        loss, plain = distillation(
            *heads, jnp.asarray(targets), jnp.asarray(weights), alpha=alpha, temperature=temperature, chunk=chunk,
            z_loss=1e-2,
        )  # fmt: skip
        return 3 * loss, (loss, plain)

    graded = jax.jit(jax.grad(scaled, (0, 1, 2, 3), has_aux=True))
    grads, (loss, plain) = graded(*map(jnp.float32, (x, kernel, y, known)))
    assert abs(loss - want.item()) < 1e-5 * want.item()
    assert abs(plain - (weighed * hard).sum().item()) < 1e-5 * plain
    for got, tensor in zip(grads[:2], own, strict=True):
        assert relative(got / 3, tensor.grad.numpy()) < 1e-5
    assert not any(np.any(g) for g in grads[2:]), "nothing flows into the teacher"


@configs
def test_the_tree_is_described_before_it_exists(config):
    shapes = jax.tree.map(lambda a: a.shape, abstract(config)[1])
    params = jax.eval_shape(lambda: init(config, 0))
    assert jax.tree.map(lambda a: a.shape, params) == shapes
    assert {path: param.shape for path, param in spec(config).items()} == {
        path: leaf.shape for path, leaf in flatten(params).items()
    }
    assert count_params(config) == sum(p.size for p in jax.tree.leaves(params))
    assert {path: len(param.axes) for path, param in spec(config).items()} == {
        path: leaf.ndim for path, leaf in flatten(params).items()
    }
    first, second = (jax.jit(lambda seed: init(config, seed)["embed_tokens"])(seed) for seed in (0, 1))
    assert not np.array_equal(first, second)
