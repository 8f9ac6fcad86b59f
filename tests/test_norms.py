"""Where blocks normalise: against a plain forward pass in float64, and its finite differences."""

import dataclasses
import functools
import itertools
import json
import re
import warnings

import jax
import numpy as np
import pytest
from parity import loss_and_grad, relative, tokens_for
from scipy.special import logsumexp

import jaxup
from jaxup.build import main as build
from jaxup.depth import recipes
from jaxup.depth.apply import apply
from jaxup.depth.result import result_config
from jaxup.errors import UserError
from jaxup.experiments.cells import configured
from jaxup.experiments.common import new_model
from jaxup.experiments.config import load
from jaxup.export import main as export
from jaxup.families import config_from_hf, config_to_hf, edited_hf
from jaxup.hub.save import write_model
from jaxup.hub.writer import save
from jaxup.lens.measures import late_share, measures, said
from jaxup.model.config import INITIAL, Compute, LayerKind, ModelConfig
from jaxup.model.decoder import Decoder
from jaxup.model.spec import PART_OF, count_params, flatten, spec, unflatten
from jaxup.train import main as train

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "max_positions": 40,
}  # fmt: skip
llama = functools.partial(ModelConfig.llama, **SIZES)
CONFIGS = {
    "pre": llama(), "post": llama(placement="post"), "peri": llama(placement="peri"), "lns": llama(placement="lns"),
    "mix": llama(placement="mix", alpha=0.3),
}  # fmt: skip
# Of the two ways of a block and the two norms more; "pre" is what the other tests are about.
BLOCKS = {
    "post": CONFIGS["post"], "peri": CONFIGS["peri"],
    "each": dataclasses.replace(CONFIGS["mix"], kinds=(*CONFIGS["mix"].kinds[:2], LayerKind(norm_factor=0.6))),
}  # fmt: skip


def noisy(config):
    """Params whose every leaf matters."""
    rng, leaves = np.random.default_rng(0), {}
    for path, param in spec(config).items():
        values = 0.3 * rng.standard_normal(param.shape, dtype=np.float32)
        leaves[path] = values + 1 if path.endswith("scale") else values
    return leaves


def plain(config, leaves, tokens_BS):
    """(logits, the stream before each layer and after the last): the formulas as they stand on paper."""
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

    x = p["embed_tokens"][tokens_BS]
    states = [x]
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
        states.append(x)
    return norm("norm", x) @ p["lm_head.kernel"], states


def plain_loss(config, leaves, tokens):
    logits, targets = plain(config, leaves, tokens)[0][:, :-1], tokens[:, 1:, None]
    return np.mean(logsumexp(logits, -1) - np.take_along_axis(logits, targets, -1)[..., 0])


@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS)
def test_a_block_is_what_float64_says_and_so_is_its_gradient(config):
    """Logits of order one, some hundred roundings of 6e-8 deep. The slope along a random direction of each parameter,
    whose norm is 1, is within as many roundings of the largest gradient."""
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
    assert llama(placement="mix", alpha=0.15) == CONFIGS["pre"]  # round(0.45) layers
    assert llama(placement="mix", alpha=1.0) == CONFIGS["post"]
    kinds = CONFIGS["mix"].kinds_of_layers
    assert [kind.placement for kind in kinds] == ["post", "pre", "pre"]
    assert CONFIGS["lns"].columns() == {"norm_factor": (1.0, 2**-0.5, 3**-0.5)}
    assert not any(CONFIGS[name].columns() for name in ("pre", "post", "peri"))
    for config in CONFIGS.values():
        assert ModelConfig.from_dict(dataclasses.asdict(config)) == config
    norms = SIZES["num_layers"] * 2 * SIZES["hidden_size"]
    assert count_params(CONFIGS["peri"]) == count_params(CONFIGS["pre"]) + norms
    assert {PART_OF[path] for path in spec(CONFIGS["peri"]).keys() - spec(CONFIGS["pre"])} == {"norms"}


def test_a_copy_is_normalised_where_its_layer_is_and_by_its_factor():
    config, kinds = BLOCKS["each"], BLOCKS["each"].kinds
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
    doubled = recipes.interleave("m", 3, range(1, 3))
    message = r"plan: layer 2 .* layer 1 of 'm' normalises after the sum \(post\), and N\(x\) is not x; a plain copy"
    with pytest.raises(UserError, match=message):
        result_config(doubled, {"m": CONFIGS["post"]})
    result_config(doubled, {"m": CONFIGS["mix"]})  # of which layer 0 is the only one
    with pytest.raises(UserError, match="plan: layer 1 "):
        result_config(recipes.interleave("m", 3, range(1)), {"m": CONFIGS["mix"]})
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
        squares[name] = np.mean(np.square(plain(config, leaves, tokens_for(config))[1][1:]), axis=(1, 2, 3))
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
    assert spec(llama())["blocks.mlp.down_proj.kernel"].std == 0.02 / 6**0.5
    assert [llama(placement=name).scaled_init for name in ("lns", "peri", "post")] == [False, True, True]
    plan = recipes.inherit("a", 3, 2)
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
        ([{"placement": "peri"}] * 2 + [{}], "'peri' have norms that others lack: all are, or none"),
    ],
)
def test_what_no_model_is(kinds, message):
    fields = dataclasses.asdict(llama())
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict({**fields, "kinds": kinds})


# ---- what each layer is good for


def without(config, leaves, layers):
    """The model without these layers, and its params."""
    kept = [layer for layer in range(config.num_layers) if layer not in layers]
    return config.with_layers(kept), {p: leaf[kept] if p.startswith("blocks.") else leaf for p, leaf in leaves.items()}


def test_measures_are_what_float64_says():
    """Of layers normalised in each way; gradients are those of the whole model, whose program is another test's."""
    config = BLOCKS["each"]
    leaves, tokens = noisy(config), tokens_for(config)
    start = {path: leaf * 0.9 for path, leaf in leaves.items()}
    model = Decoder(config, unflatten(leaves))
    found = measures(model, tokens[:, :-1], tokens[:, 1:], unflatten(start))
    assert {name: values.shape for name, values in found.items()} == dict.fromkeys(
        ("angular_distance", "deletion_loss", "tail_deletion_loss", "gradient_norm", "gradient_norm_start"), (3,)
    )
    whole = plain_loss(config, leaves, tokens)
    for layer in range(3):
        lost = plain_loss(*without(config, leaves, [layer]), tokens) - whole
        np.testing.assert_allclose(found["deletion_loss"][layer], lost, atol=2e-5)
        if layer:
            lost = plain_loss(*without(config, leaves, range(layer, 3)), tokens) - whole
            np.testing.assert_allclose(found["tail_deletion_loss"][layer], lost, atol=2e-5)
    last = [
        x[:, -1] / np.linalg.norm(x[:, -1], axis=-1, keepdims=True) for x in plain(config, leaves, tokens[:, :-1])[1]
    ]
    angles = [np.mean(np.arccos(np.sum(a * b, -1))) / np.pi for a, b in itertools.pairwise(last)]
    np.testing.assert_allclose(found["angular_distance"], angles, atol=1e-5)
    for name, params in (("gradient_norm", leaves), ("gradient_norm_start", start)):
        grads = flatten(loss_and_grad(config, Compute(), unflatten(params), tokens)[1])
        squares = sum(np.square(g).reshape(3, -1).sum(1) for path, g in grads.items() if path.startswith("blocks."))
        np.testing.assert_allclose(found[name], np.sqrt(squares), rtol=1e-4)


def test_the_share_of_the_second_half():
    assert late_share(np.array([3.0, 1.0, 1.0, -9.0])) == 0.2
    assert late_share(np.array([2.0, 7.0, 2.0])) == 2 / 11  # the middle one is of the first
    assert np.isnan(late_share(np.array([-1.0, 0.0])))
    found = {"deletion_loss": np.array([3.0, 1.0, 1.0, -1.0]), "tail_deletion_loss": np.arange(4.0)}
    assert said(found, 8) == (
        "Layers, on 8 validation rows: without one of them the loss is +1.0000 nats higher on average, 20% of it for "
        "those of the second half; without the last 1 +3.0000. `measures.json` has each layer's."
    )
    assert "half" not in said({**found, "deletion_loss": -np.ones(4)}, 8)


# ---- configurations


def test_the_shipped_configuration():
    c = load("mix_ln.py:study")
    assert list(c.study.cells) == ["pre", "post", "mix", "lns", "peri"]
    made = configured(c, "mix", 1)
    assert new_model(made.model, 500).placement_words() == "3 of 12 layers post, the others pre"
    assert made.to_dict() == load("mix_ln.py:mix,seed=1").to_dict()
    for size, count in {"71M": 70_578_688, "130M": 134_105_856, "250M": 247_370_496, "1B": 1_339_082_752}.items():
        assert count_params(new_model(load(f"mix_ln.py:{size}").model)) == count


@pytest.mark.parametrize(
    ("spec", "given", "said"),
    [
        ("mix_ln.py", {"alpha": "0.5"}, "model.alpha=0.5: goes with model.placement=mix"),
        ("mix_ln.py:lns", {"scaled_init": "true"}, "model.scaled_init=True: goes with model.placement=pre or post or "),
        ("inherit_llama.py", {"placement": "post"}, "model.placement=post: nothing reads it where reference.path="),
    ],
)
def test_what_nothing_reads(spec, given, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        load(spec, [(f"model.{key}", value) for key, value in given.items()])


@pytest.mark.slow
def test_a_run_keeps_measures_and_a_native_export(corpus, tmp_path, capsys):
    how = ["--config.data.tokenizer=bpe:300", "--config.data.val_fraction=0.3", f"--config.data.source={corpus}"]
    train(["train", "--config=mix_ln.py:smoke,mix,alpha=0.5", *how, f"--workdir={tmp_path / 'run'}"])
    out = capsys.readouterr()
    assert "norms: 2 of 4 layers post, the others pre\n" in out.out
    assert "in jaxup's own format: no transformers family computes this: all need x + F(N(x)) in every layer" in out.err
    found = json.loads((tmp_path / "run" / "measures.json").read_text())
    assert all(len(values) == 4 and np.isfinite(values).all() for values in found.values())
    assert "Layers, on 32 validation rows: " in (tmp_path / "run" / "SUMMARY.md").read_text()
    (tmp_path / "run" / "measures.json").unlink()
    train(["train", f"--resume={tmp_path / 'run'}"])
    assert json.loads((tmp_path / "run" / "measures.json").read_text()) == found
    model = jaxup.load(tmp_path / "run")
    assert [kind.placement for kind in model.config.kinds] == ["post", "post", "pre", "pre"]
    assert len(jaxup.generate(model, ["the cat"], max_tokens=5)) == 1
    export(["export", f"{tmp_path / 'run'}@model/10", str(tmp_path / "half")])
    assert jaxup.load(tmp_path / "half").config == model.config


# ---- files


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Models in the format of this project's own."""
    root = tmp_path_factory.mktemp("native")
    for name in ("peri", "lns", "mix"):
        jaxup.save(Decoder(CONFIGS[name], unflatten(noisy(CONFIGS[name]))), root / name, native=True)
    return root


@pytest.mark.parametrize("name", ["peri", "lns", "mix"])
def test_the_native_format_keeps_all_that_a_model_is(name, directories, tmp_path):
    model, leaves = jaxup.load(directories / name), noisy(CONFIGS[name])
    assert model.config == CONFIGS[name]
    assert flatten(model.params).keys() == leaves.keys()
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(leaf, leaves[path])
    jaxup.save(model, tmp_path / "again")  # of the family that it came from
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (directories / name / file).read_bytes()
    card = (tmp_path / "again" / "README.md").read_text()
    assert "library_name: jaxup" in card
    assert ("| norms | 1 of 3 layers post, the others pre |" in card) == (name == "mix")


def test_layernorm_scaling_is_a_llama_with_other_weights(directories, tmp_path, capsys):
    """The product of two float32 numbers is what the model multiplies by, so that not a bit of it differs."""
    config, leaves = CONFIGS["lns"], noisy(CONFIGS["lns"])
    save(tmp_path / "out", config, unflatten(leaves))
    assert "a llama model knows no factors of norms: they are folded into the norms' weights" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    found = jaxup.load(tmp_path / "out")
    assert found.config == dataclasses.replace(CONFIGS["pre"], scaled_init=True)
    jaxup.save(jaxup.load(directories / "lns"), tmp_path / "again", native=False)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    factors = np.array([kind.norm_factor for kind in config.kinds], np.float32)[:, None]
    for path, leaf in flatten(found.params).items():
        scaled = path.startswith("blocks.") and path.endswith("layernorm.scale")
        np.testing.assert_array_equal(leaf, leaves[path] * factors if scaled else leaves[path])
    tokens = tokens_for(config)
    run = jax.jit(lambda model: model(tokens))
    assert relative(run(found), run(jaxup.load(directories / "lns"))) < 1e-6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("post", "all of its layers are N(x + F(x)) (post)"),
        ("mix", "1 of 3 of its layers are N(x + F(x)) (post)"),
        ("peri", "all of its layers are x + N(F(N(x))) (peri)"),
    ],
)
def test_what_transformers_cannot_say_is_refused_by_its_name(name, said, tmp_path, capsys):
    model = Decoder(CONFIGS[name], unflatten(noisy(CONFIGS[name])))
    with pytest.raises(UserError) as error:
        jaxup.save(model, tmp_path / "out")
    assert str(error.value) == (
        f"model: no transformers family computes this: all need x + F(N(x)) in every layer, and {said}; "
        "jaxup.save(model, out, native=True) writes what jaxup.load reads"
    )
    assert not (tmp_path / "out").exists()
    write_model(tmp_path / "of a run", model.config, model.params, title="", source="", falls_back=True)
    said = f"no transformers family computes this: all need x + F(N(x)) in every layer, and {said}\n"
    assert f"of a run: in jaxup's own format: {said}" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=re.escape("a llama model cannot be what the plan makes: it needs x + F(N(x)) ")
    ):
        edited_hf(config_to_hf(llama(), dtype="float32", eos_token_id=None, bos_token_id=None), CONFIGS[name],
                  dtype="float32")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(kinds=[{"placement": "sideways"}]), "placement='sideways' is not one of"),
        (lambda c: c["kinds"][0].update(placing="post"), "unknown 'placing'"),
        (lambda c: c["kinds"][0].update(norm_factor="1"), "kinds must be"),
        (lambda c: c.pop("kinds"), "kinds must be"),
        (lambda c: c.pop("norm"), "norm is missing"),
        (lambda c: c.update(normal="rmsnorm"), "unknown 'normal'"),
        (lambda c: c.update(num_layers=4), "3 layer kinds for 4 layers"),
        (lambda c: c.update(hidden_size=2**40), "hidden_size=1099511627776 is not supported, only an integer from 0"),
        (lambda c: c.update(norm_eps=1e300), "norm_eps=1e+300 is not supported, only a positive number"),
        (lambda c: c.update(norm_eps=0.0), "norm_eps=0.0 is not supported, only a positive number"),
        (lambda c: c.update(norm_offset=-1.0), "norm_offset=-1.0 is not supported, only a positive number"),
        (lambda c: c.update(tie_embeddings=1), "tie_embeddings must be bool"),
        (lambda c: c.update(rope_scaling={"kind": "linear", "factor": 2.0, "more": 1}), "unknown 'more'"),
    ],
)
def test_a_native_config_is_not_trusted(change, said, directories):
    hf = json.loads((directories / "mix" / "config.json").read_text())
    change(hf["jaxup"])
    with pytest.raises(UserError) as error:
        config_from_hf(hf)
    assert str(error.value).startswith("jaxup: ")
    assert said in str(error.value)
    for broken in (None, [], "pre"):
        with pytest.raises(UserError, match=r"jaxup: .* is not the description of a model"):
            config_from_hf({**hf, "jaxup": broken})


def test_a_build_of_native_models_stays_native_and_exact(directories, tmp_path, capsys):
    """Layers keep the factors that they had, wherever they come to stand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no tokenizer
        build(["build", f"interleave({directories / 'lns'}, 1:2)", str(tmp_path / "out"), "--verify"])
    assert capsys.readouterr().out.count("0, bit for bit") == 2
    config = jaxup.load(tmp_path / "out").config
    assert config.kinds == tuple(CONFIGS["lns"].kinds[layer] for layer in (0, 1, 1, 2))
    with pytest.raises(UserError, match=r"layer 1 has nothing to add, .* normalises after the sum \(post\)"):
        build(["build", f"interleave({directories / 'mix'}, 0:1)", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()
