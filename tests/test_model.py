"""The decoder and its loss against torch, and against itself run in other ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from jaxup.hub.layouts import expected_tensors, flatten, to_file
from jaxup.hub.reader import load_config, load_params
from jaxup.model.attention import attention
from jaxup.model.config import Compute, ModelConfig, RopeScaling
from jaxup.model.decoder import KVCache, abstract, count_params, init, named_axes
from jaxup.training.loss import cross_entropy

SEQ = 17  # odd, longer than the sliding windows


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(config, compute, params, tokens, segment_ids=None):
    graphdef, _ = abstract(config, compute)
    return nnx.merge(graphdef, params)(tokens, segment_ids_BS=segment_ids)


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
@functools.partial(jax.value_and_grad, argnums=2, has_aux=True)
def loss_and_grad(config, compute, params, tokens, segment_ids=None, chunk=8):
    """((mean loss, logits), gradients), compiled as one."""
    graphdef, _ = abstract(config, compute)
    model = nnx.merge(graphdef, params)
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)
    hidden = model.hidden(tokens, segment_ids_BS=segment_ids)
    loss, _ = cross_entropy(hidden, model.head_kernel(), targets, weights, chunk=chunk, z_loss=0.0)
    return loss / weights.sum(), hidden @ model.head_kernel().astype(hidden.dtype)


def tokens_for(config, seed=0, batch=2, seq=SEQ):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, seq), dtype=np.int32)


def noisy(config, seed=0):
    """Params whose every leaf matters: biases are not zero, norms are not one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = 0.1 * rng.standard_normal(leaf.shape, dtype=np.float32)
        return jnp.asarray(values + 1 if path[-1].key == "scale" else values)

    return jax.tree_util.tree_map_with_path(draw, abstract(config)[1])


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)


def check_against_torch(torch, model, directory, record_property):
    model.save_pretrained(directory)
    config = load_config(directory)
    params = load_params(directory, config)
    tokens = tokens_for(config)

    batch = torch.tensor(tokens, dtype=torch.long)
    output = model(batch, labels=batch)
    output.loss.backward()
    (loss, logits), grads = loss_and_grad(config, Compute(), params, tokens)
    logits_error = np.abs(logits - output.logits.detach().numpy()).max()
    loss_error = abs(float(loss) - output.loss.item()) / output.loss.item()

    flat = flatten(jax.tree.map(np.asarray, grads))
    from jaxup.hub.families import FAMILIES

    table = FAMILIES[model.config.model_type].tensors
    ours = {
        t.name: to_file(t, [flat[p] if t.layer is None else flat[p][t.layer] for p in t.paths])
        for t in expected_tensors(table, {p: g.shape for p, g in flat.items()})
    }
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    # Adding a constant to all keys leaves softmax as it is: the gradient of a key bias is zero but
    # for rounding, and is measured against the whole model's instead of its own.
    scale = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in theirs.values()))
    grad_error = 0.0
    for name, g in theirs.items():
        error = np.linalg.norm(ours[name] - g) / (scale if "k_proj.bias" in name else np.linalg.norm(g))
        assert error < 1e-4, name
        grad_error = max(grad_error, error)
    record_property("errors", (float(logits_error), float(loss_error), float(grad_error)))
    print(f"PARITY {model.config.model_type} logits={logits_error:.1e} loss={loss_error:.1e} grads={grad_error:.1e}")
    assert np.abs(logits).max() > 0.3  # small logits would agree whatever the weights
    assert logits_error < 1e-4
    assert loss_error < 1e-4


CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 28, "layer_norm_epsilon": 1e-3}),
    "gpt2-depth-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    "gpt2-upcast": ("gpt2", {"reorder_and_upcast_attn": True, "activation_function": "gelu"}),
    "llama-mha": ("llama", {}),
    "llama-gqa-tied": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-mqa-wide-heads": ("llama", {"num_key_value_heads": 1, "head_dim": 10}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "mistral-window": ("mistral", {"num_key_value_heads": 1}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 6}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_torch(case, torch, hf_model, tmp_path, record_property):
    model_type, config = CASES[case]
    check_against_torch(torch, hf_model(model_type, **config), tmp_path, record_property)


@settings(max_examples=4, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    kv_heads=st.integers(1, 2), groups=st.integers(1, 3), half_dim=st.integers(1, 5), layers=st.integers(1, 3),
    tied=st.booleans(), bias=st.booleans(), window=st.none() | st.integers(1, SEQ + 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_models_equal_torch(
    torch, hf_model, tmp_path_factory, record_property, kv_heads, groups, half_dim, layers, tied, bias, window, seed
):
    heads = kv_heads * groups
    config = dict(
        hidden_size=4 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=2 * half_dim,
        num_hidden_layers=layers, tie_word_embeddings=tied,
    )  # fmt: skip
    if window is None:
        config |= {"attention_bias": bias, "mlp_bias": not bias}
    else:
        config["sliding_window"] = window
    model = hf_model("llama" if window is None else "mistral", seed=seed, **config)
    check_against_torch(torch, model, tmp_path_factory.mktemp("model"), record_property)


def test_greedy_decoding_equals_torch(torch, hf_model, tmp_path):
    model = hf_model("gpt2")
    model.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    graphdef, _ = abstract(config)
    params = load_params(tmp_path, config)
    prompt = tokens_for(config, batch=1, seq=6)
    expected = model.generate(
        torch.tensor(prompt, dtype=torch.long), attention_mask=torch.ones(1, 6, dtype=torch.long),
        max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=1, eos_token_id=None,
    )  # fmt: skip
    decode = jax.jit(lambda params, tokens, cache: nnx.merge(graphdef, params).decode(tokens, cache))
    cache, tokens, out = KVCache.empty(config, 1, 40, jnp.float32), jnp.asarray(prompt), []
    for _ in range(32):
        logits, cache = decode(params, tokens, cache)
        tokens = jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)
        out.append(int(tokens[0, 0]))
    assert out == expected[0, 6:].tolist()


GPT2 = ModelConfig.gpt2(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, max_positions=300, bias=True)
LLAMA = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
    max_positions=300, norm="rmsnorm", norm_eps=1e-6, positions="rope", rope_theta=1e4, activation="silu",
    gated_mlp=True, tie_embeddings=False,
)  # fmt: skip
WINDOWED = dataclasses.replace(LLAMA, sliding_window=4)
MIXED = dataclasses.replace(
    WINDOWED, layer_types=("full_attention", "sliding_attention", "full_attention"), qk_norm=True, qkv_bias=True,
    rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_max_positions=8, low_freq_factor=1.0,
                             high_freq_factor=4.0),
)  # fmt: skip
CONFIGS = {"gpt2": GPT2, "windowed": WINDOWED, "mixed": MIXED}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


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


@configs
def test_rematerialisation_and_unrolling_do_not_change_gradients(config):
    params, tokens = noisy(config), tokens_for(config)
    (loss, _), grads = loss_and_grad(config, Compute(), params, tokens)
    scale = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    for compute in (Compute(remat="dots", unroll=2), Compute(remat="full", unroll=99)):
        (other_loss, _), other = loss_and_grad(config, compute, params, tokens)
        assert abs(loss - other_loss) < 1e-6
        errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / scale, other, grads)
        assert max(jax.tree.leaves(errors)) < 1e-6


@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize("segmented", [False, True])
def test_blocked_attention_equals_dense(window, segmented):
    seq = 300  # three blocks, the last one short
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, seq, n, 4)) for key, n in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.stack([jnp.arange(seq) // 70, jnp.arange(seq) // 256]) if segmented else None

    def run(implementation):
        def total(q, k, v):
            out = attention(q, k, v, window=window, segment_ids=segments, implementation=implementation)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)

    (_, dense), dense_grads = run("xla")
    (_, blocked), blocked_grads = run("blocked")
    np.testing.assert_allclose(blocked, dense, atol=1e-6)
    for a, b in zip(blocked_grads, dense_grads, strict=True):
        assert relative(a, b) < 1e-6


@configs
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
    if config.sliding_window:
        visible &= t - s < config.sliding_window
    np.testing.assert_array_equal(np.asarray(influence(params)) > 0, visible)


@configs
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


@configs
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


@configs
def test_the_tree_is_described_before_it_exists(config):
    shapes = jax.tree.map(lambda a: a.shape, abstract(config)[1])
    params = jax.jit(init, static_argnums=0)(config, 0)
    assert jax.tree.map(lambda a: a.shape, params) == shapes
    assert count_params(config) == sum(p.size for p in jax.tree.leaves(params))
    axes = flatten(named_axes(config))
    assert {k: len(v) for k, v in axes.items()} == {k: v.ndim for k, v in flatten(params).items()}
    assert not np.array_equal(params["embed_tokens"], jax.jit(init, static_argnums=0)(config, 1)["embed_tokens"])
