"""Where blocks normalise: against a plain forward pass in float64, and its finite differences."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from parity import loss_and_grad, relative, tokens_for
from scipy.special import logsumexp

from jaxup.depth import recipes
from jaxup.depth.apply import apply
from jaxup.depth.result import result_config
from jaxup.errors import UserError
from jaxup.model.config import INITIAL, Compute, LayerKind, ModelConfig
from jaxup.model.decoder import Decoder
from jaxup.model.spec import PART_OF, count_params, flatten, spec, unflatten

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
    "max_positions": 40,
}  # fmt: skip
llama = functools.partial(ModelConfig.llama, **SIZES)
CONFIGS = {
    "pre": llama(), "post": llama(placement="post"), "peri": llama(placement="peri"), "lns": llama(placement="lns"),
    "mix": llama(placement="mix", alpha=0.3),
}  # fmt: skip
placements = pytest.mark.parametrize("name", CONFIGS)


def noisy(config):
    """Params whose every leaf matters."""
    rng, leaves = np.random.default_rng(0), {}
    for path, param in spec(config).items():
        values = 0.3 * rng.standard_normal(param.shape, dtype=np.float32)
        leaves[path] = values + 1 if path.endswith("scale") else values
    return leaves


def plain(config, leaves, tokens_BS):
    """(logits, the stream's mean square after each layer): the formulas as they stand on paper."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}
    seq, half = tokens_BS.shape[1], config.head_dim // 2
    angle_SH = np.arange(seq)[:, None] * config.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle_SH)[None, :, None], np.sin(angle_SH)[None, :, None]

    def norm(path, x, layer=None):
        scale = p[f"{path}.scale"] if layer is None else p[f"blocks.{path}.scale"][layer]
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * scale

    def turned(x):
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(x, layer):
        of = {name: p[f"blocks.self_attn.{name}_proj.kernel"][layer] for name in "qkvo"}
        q, k, v = (np.einsum("bsd,dnh->bsnh", x, of[name]) for name in "qkv")
        groups = config.num_heads // config.num_kv_heads
        k, v = np.repeat(turned(k), groups, 2), np.repeat(v, groups, 2)
        scores = np.einsum("bsnh,btnh->bnst", turned(q), k) / np.sqrt(config.head_dim)
        scores = np.where(np.tril(np.ones((seq, seq), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bnst,btnh,nhd->bsd", weights, v, of["o"])

    def mlp(x, layer):
        gate, up, down = (p[f"blocks.mlp.{name}_proj.kernel"][layer] for name in ("gate", "up", "down"))
        return ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down

    x, squares = p["embed_tokens"][tokens_BS], []
    for layer, kind in enumerate(config.kinds_of_layers):
        for f, before, after in (
            (attention, "input_layernorm", "attention_output_layernorm"),
            (mlp, "post_attention_layernorm", "feedforward_output_layernorm"),
        ):
            if kind.placement == "post":
                x = norm(before, x + f(x, layer), layer)
            elif kind.placement == "peri":
                x = x + norm(after, f(norm(before, x, layer), layer), layer)
            else:
                x = x + f(norm(before, x, layer) * kind.norm_factor, layer)
        squares.append(np.mean(x**2))
    return norm("norm", x) @ p["lm_head.kernel"], np.array(squares)


def plain_loss(config, leaves, tokens):
    logits, targets = plain(config, leaves, tokens)[0][:, :-1], tokens[:, 1:, None]
    return np.mean(logsumexp(logits, -1) - np.take_along_axis(logits, targets, -1)[..., 0])


@placements
def test_a_block_is_what_float64_says_and_so_is_its_gradient(name):
    """Logits of order one, some hundred roundings of 6e-8 deep. The slope along a random direction of each parameter,
    whose norm is 1, is within as many roundings of the largest gradient."""
    config = CONFIGS[name]
    leaves, tokens = noisy(config), tokens_for(config)
    (loss, logits), grads = loss_and_grad(config, Compute(), unflatten(leaves), tokens)
    assert relative(logits, plain(config, leaves, tokens)[0]) < 1e-5
    np.testing.assert_allclose(loss, plain_loss(config, leaves, tokens), rtol=1e-5)
    rng, grads, step = np.random.default_rng(1), flatten(grads), 1e-5
    largest = max(np.linalg.norm(grad) for grad in grads.values())
    for path, grad in grads.items():
        direction = rng.standard_normal(grad.shape)
        direction *= step / np.linalg.norm(direction)
        there, back = (
            plain_loss(config, leaves | {path: leaves[path].astype(np.float64) + sign * direction}, tokens)
            for sign in (1, -1)
        )
        slope = (there - back) / (2 * step)
        np.testing.assert_allclose(np.sum(grad * direction / step), slope, atol=2e-5 * largest, err_msg=path)


def test_what_is_alike_is_the_same_model():
    assert llama(placement="mix", alpha=0.1) == CONFIGS["pre"]  # round(0.4) layers
    assert llama(placement="mix", alpha=1.0) == CONFIGS["post"]
    kinds = CONFIGS["mix"].kinds_of_layers
    assert [kind.placement for kind in kinds] == ["post", "pre", "pre", "pre"]
    assert CONFIGS["lns"].columns() == {"norm_factor": (1.0, 2**-0.5, 3**-0.5, 0.5)}
    assert not any(CONFIGS[name].columns() for name in ("pre", "post", "peri"))
    for config in CONFIGS.values():
        assert ModelConfig.from_dict(dataclasses.asdict(config)) == config
    norms = SIZES["num_layers"] * 2 * SIZES["hidden_size"]
    assert count_params(CONFIGS["peri"]) == count_params(CONFIGS["pre"]) + norms
    assert {PART_OF[path] for path in spec(CONFIGS["peri"]).keys() - spec(CONFIGS["pre"])} == {"norms"}


def test_a_copy_is_normalised_where_its_layer_is_and_by_its_factor():
    kinds = (*CONFIGS["mix"].kinds[:2], LayerKind(norm_factor=0.5))
    config = dataclasses.replace(llama(), num_layers=3, kinds=kinds)
    plan, tokens = recipes.inherit("m", 3, [0, 0, 2, 1, 2]), tokens_for(config)
    made = result_config(plan, {"m": config})
    assert made.kinds == tuple(kinds[layer] for layer in (0, 0, 2, 1, 2))
    leaves = noisy(config)
    of = flatten(jax.jit(apply, static_argnums=0)(plan, {"m": unflatten(leaves)}))
    run = jax.jit(lambda params, tokens, order: Decoder(config, params)(tokens, order=order))
    ran = run(unflatten(leaves), tokens, np.array(plan.order(), np.int32))
    assert relative(ran, plain(made, of, tokens)[0]) < 1e-5


def test_only_what_adds_to_the_stream_can_add_nothing():
    """Zeroed copies of layers that normalise after the sum are refused; under peri N(0) = 0 but for a bias."""
    doubled = recipes.interleave("m", 4, range(1, 3))
    message = r"plan: layer 2 .* layer 1 of 'm' normalises after the sum \(post\), and N\(x\) is not x; a plain copy"
    with pytest.raises(UserError, match=message):
        result_config(doubled, {"m": CONFIGS["post"]})
    result_config(doubled, {"m": CONFIGS["mix"]})  # of which layer 0 is the only one
    with pytest.raises(UserError, match="plan: layer 1 "):
        result_config(recipes.interleave("m", 4, range(1)), {"m": CONFIGS["mix"]})
    biased = dataclasses.replace(CONFIGS["peri"], norm="layernorm", norm_bias=True)
    with pytest.raises(UserError, match=r"layer 1 of 'm' adds the bias of its output norms \(peri\)"):
        result_config(doubled, {"m": biased})
    run = jax.jit(lambda params, tokens: Decoder(CONFIGS["peri"], params)(tokens))
    leaves, tokens = noisy(CONFIGS["peri"]), tokens_for(CONFIGS["peri"])
    for path in ("blocks.self_attn.o_proj.kernel", "blocks.mlp.down_proj.kernel"):
        leaves[path][1:] = 0
    silent = run(unflatten(leaves), tokens)
    for path in leaves:
        if path.startswith("blocks.") and "proj" in path and path.split(".")[2][0] not in "od":
            leaves[path][1:] *= 2
    np.testing.assert_array_equal(run(unflatten(leaves), tokens), silent)
    first = CONFIGS["peri"].with_layers([0])
    of = {path: leaf[:1] if path.startswith("blocks.") else leaf for path, leaf in leaves.items()}
    assert relative(silent, plain(first, of, tokens)[0]) < 1e-5


def test_the_stream_grows_with_depth_as_it_is_normalised():
    """At first, with branches of about unit variance: pre linearly, lns by 1 / (l + 1), and post not at all."""
    shape, squares = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_layers": 24}, {}
    for name in ("pre", "lns", "post"):
        config, rng = (
            ModelConfig.llama(**shape, placement=name, init_std=0.15, scaled_init=False),
            np.random.default_rng(0),
        )
        leaves = {path: p.fill + p.std * rng.standard_normal(p.shape) for path, p in spec(config).items()}
        squares[name] = plain(config, leaves, tokens_for(config))[1]
    pre, lns, post = squares.values()
    np.testing.assert_allclose(np.diff(pre)[8:].mean(), np.diff(pre)[:8].mean(), rtol=0.5)
    assert pre[23] > 1.7 * pre[11]
    assert np.diff(lns)[12:].mean() < 0.3 * np.diff(lns)[:6].mean()
    np.testing.assert_allclose(post, 1, rtol=1e-4)  # but for the norm's epsilon


def test_first_values_are_asked_for():
    config = llama(init_std=0.03, scaled_init=False, embed_std=0.632)
    std = {path: param.std for path, param in spec(config).items() if param.std}
    assert std.pop("embed_tokens") == 0.632
    assert set(std.values()) == {0.03}
    assert spec(llama())["blocks.mlp.down_proj.kernel"].std == 0.02 / 8**0.5
    assert [llama(placement=name).scaled_init for name in ("lns", "peri", "post")] == [False, True, True]
    plan = recipes.inherit("a", 4, 2)
    assert all(getattr(result_config(plan, {"a": config}), name) == getattr(config, name) for name in INITIAL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"placement": "sandwich"}, r"placement='sandwich' is not one of \('pre', 'post', 'peri', 'mix', 'lns'\)"),
        ({"placement": "prae"}, "did you mean 'pre'"),
        ({"placement": "mix", "alpha": 1.5}, "alpha=1.5 is not a share of the layers"),
    ],
)
def test_what_no_llama_is(given, message):
    with pytest.raises(UserError, match=message):
        llama(**given)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([{"placement": "output"}], "placement='output' is not one of"),
        ([{"norm_factor": 0.0}], "norm_factor must be a positive number"),
        ([{"norm_factor": 0.5, "placement": "post"}], "norm_factor=0.5 goes with placement='pre', not 'post'"),
        ([{"placement": "peri"}] * 3 + [{}], "'peri' have norms that others lack: all are, or none"),
    ],
)
def test_what_no_model_is(kinds, message):
    fields = dataclasses.asdict(llama())
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict({**fields, "kinds": kinds})
