"""What each layer of a model does: against models that are made without it, NumPy, jax.grad, and transformers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_chat_cases import tokenizer

import jaxup
from jaxup.depth.recipes import drop
from jaxup.errors import UserError
from jaxup.lens.probe import AXES, probe
from jaxup.lens.probe_attention import lazy, ranks
from jaxup.lens.probe_layers import Layers, run_passes
from jaxup.lens.probe_plans import to_inherit
from jaxup.lens.probe_text import read_ids
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Decoder
from jaxup.model.spec import count_params, flatten, spec, unflatten
from jaxup.probe import main

CONFIG = ModelConfig.llama(
    vocab_size=261, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, num_kv_heads=1, max_positions=64
)
LAYERS = CONFIG.num_layers
# Of the mean of some hundred losses: each is the difference of numbers of order ten, some tens of roundings of 6e-8.
CLOSE = {"rtol": 0, "atol": 1e-5}


@functools.cache
def model():
    """Far from what is initialised: layers matter, and each another way."""
    normal = np.random.default_rng(0).normal
    leaves = {
        path: normal(1.0 if "norm" in path else 0.0, 0.15, p.shape).astype(np.float32)
        for path, p in spec(CONFIG).items()
    }
    return Decoder(CONFIG, jax.tree.map(jnp.asarray, unflatten(leaves)))


@functools.cache
def rows():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 25), dtype=np.int32)


@functools.cache
def found():
    return probe(model(), rows(), batch_size=2, drop=[1, 2])


@jax.jit
def loss(model, rows):
    logits = jax.nn.log_softmax(model(rows[:, :-1]))
    return -jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1).mean()


def loss_of(plan):
    return float(loss(jaxup.apply_plan(plan, model()), rows()))


def scaled(layer, filter):
    """The model with what a filter finds in a layer multiplied by 0."""
    plan = jaxup.identity("model", LAYERS)
    row = dataclasses.replace(plan.rows[layer], scales=((filter, 0.0),))
    return dataclasses.replace(plan, rows=(*plan.rows[:layer], row, *plan.rows[layer + 1 :]))


def test_skips_are_the_losses_of_models_made_without():
    v = found().values
    np.testing.assert_allclose(v["loss"], loss_of(jaxup.identity("model", LAYERS)), **CLOSE)
    for layer in range(LAYERS):
        for part, name in (("o_proj", "skip_attention"), ("down_proj", "skip_mlp")):
            np.testing.assert_allclose(v[name][layer], loss_of(scaled(layer, part)), **CLOSE)
        for count in range(1, LAYERS - layer + 1):
            without = [*range(layer, layer + count)]
            if count == LAYERS:
                assert v["skip_run"][0, LAYERS] == v["logit_lens"][0]
                continue
            made = loss_of(jaxup.drop("model", LAYERS, without))
            np.testing.assert_allclose(v["skip_run"][layer, count], made, **CLOSE)
            assert abs(made - v["loss"]) > 100 * CLOSE["atol"]  # or all would agree
        assert np.isnan(v["skip_run"][layer, LAYERS - layer + 1 :]).all()
    assert (v["skip_layer"] == v["skip_run"][:, 1]).all()
    assert (v["skip_run"][:, 0] == v["loss"]).all()


def test_suggestions_are_plans_with_their_losses():
    v = found().values
    names = [suggestion.name for suggestion in found().suggestions]
    kinds = ("shortgpt", "deeper_layers", "least_loss", "deepest")
    assert names == [*(f"{kind}_{count}" for count in (1, 2) for kind in kinds), f"inherit_{to_inherit(v)[0]}"]
    for suggestion in found().suggestions:
        np.testing.assert_allclose(suggestion.measured, loss_of(suggestion.plan), **CLOSE)
    plans = {s.name: s.plan for s in found().suggestions}
    assert plans["shortgpt_2"] == drop("model", LAYERS, np.argsort(v["block_influence"])[:2].tolist())
    first = int(np.nanargmin(v["angular_distance"][:, 2]))
    assert plans["deeper_layers_2"] == jaxup.drop("model", LAYERS, range(first, first + 2))
    assert plans["deepest_2"] == jaxup.drop("model", LAYERS, [0, 1])
    least = min((s for s in found().suggestions if s.name.endswith("_2")), key=lambda s: s.measured)
    assert abs(least.measured - np.nanmin(v["skip_run"][:, 2])) < CLOSE["atol"] or least.name == "shortgpt_2"
    alone = v["skip_layer"][[0, 1]] - v["loss"]
    deepest = next(s for s in found().suggestions if s.name == "deepest_2")
    assert deepest.predicted == pytest.approx(v["loss"] + alone.sum())


def test_gradient_norms_are_those_of_jax_grad():
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(model(), rows().reshape(2, 2, -1))  # of each batch
    squares = [
        np.square(np.asarray(leaf, np.float64)).reshape(2, LAYERS, -1).sum(-1)
        for path, leaf in flatten(grads.params).items() if path.startswith("blocks.")
    ]  # fmt: skip
    np.testing.assert_allclose(found().values["gradient_norm"], np.sqrt(sum(squares)).mean(0), rtol=1e-5)


def test_what_is_seen_between_layers_is_that_of_transformers(torch, hf_model, tmp_path):
    """Hidden states, attention, and what final norm and head make of each depth."""
    sizes = {"vocab_size": 261, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    theirs = hf_model("llama", **sizes, num_key_value_heads=1)  # the programs of CONFIG
    theirs.save_pretrained(tmp_path / "model")
    tokens = np.random.default_rng(1).integers(0, 261, (2, 25), dtype=np.int32)
    v = probe(tmp_path / "model", tokens).values
    outputs = []
    for layer in theirs.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        made = theirs(ids[:, :-1], output_attentions=True, output_hidden_states=True)
        states = [made.hidden_states[0], *(out[0] if isinstance(out, tuple) else out for out in outputs)]
        lens = [
            torch.nn.functional.cross_entropy(theirs.lm_head(theirs.model.norm(x)).flatten(0, 1), ids[:, 1:].flatten())
            for x in states
        ]
    np.testing.assert_allclose(v["logit_lens"], lens, **CLOSE)
    x = np.stack([state.numpy() for state in states]).astype(np.float64)
    np.testing.assert_allclose(v["residual_norm"], np.linalg.norm(x, axis=-1).mean((1, 2)), rtol=1e-5)
    u = x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(v["block_influence"], 1 - (u[1:] * u[:-1]).sum(-1).mean((1, 2)), rtol=1e-4)
    for layer in range(LAYERS):
        for count in range(LAYERS + 1 - layer):
            cosines = np.clip((u[layer, :, -1] * u[layer + count, :, -1]).sum(-1), -1, 1)
            expected = np.arccos(cosines).mean() / np.pi
            np.testing.assert_allclose(v["angular_distance"][layer, count], expected, rtol=1e-4, atol=1e-7)
    for layer, weights in enumerate(made.attentions):  # [rows, heads, queries, keys]
        singular = np.linalg.svd(weights.numpy().astype(np.float64), compute_uv=False) ** 2
        rank = 1 + (singular.cumsum(-1) / singular.sum(-1, keepdims=True) < 0.9).sum(-1)
        assert (v["attention_rank"][layer] == rank.mean(0)).all()


def test_rank_and_mass_by_hand():
    first = np.zeros((7, 7))
    first[:, 0] = 1  # all look at the first token
    uniform = np.tril(np.ones((7, 7))) / np.arange(1, 8)[:, None]
    singular = np.linalg.svd(uniform, compute_uv=False) ** 2
    by_hand = 1 + int((singular.cumsum() / singular.sum() < 0.9).sum())
    rank, mass = ranks(np.stack([first, np.eye(7), uniform]))
    assert rank.tolist() == [1, 7, by_hand]  # of seven equal ones six have 86%
    assert mass[:2].tolist() == [1, 7]
    assert 1 < by_hand < mass[2] < 7


def test_a_head_that_looks_at_the_first_token_has_rank_one():
    leaves = {path: np.array(leaf) for path, leaf in flatten(model().params).items()}
    q, k = (leaves[f"blocks.self_attn.{name}_proj.kernel"] for name in "qk")  # [layers, hidden, heads, head_dim]
    # Only the first token has feature 0, of which alone keys are made; the first head's queries all look for it, in
    # the pair of dimensions that positions turn least.
    k[0] = q[0, :, 0] = 0
    k[0, 0, 0, 3] = q[0, 1, 0, 3] = 10
    x = np.zeros((2, 24, 16), np.float32)
    x[:, 0, 0] = x[:, :, 1] = 1
    x[:, :, 2:] = np.random.default_rng(0).normal(size=(2, 24, 14))
    rank, mass = Layers(model().with_params(unflatten(leaves))).attention([x, x])
    assert rank[0, 0] == mass[0, 0] == 1
    assert rank[0, 1] > 1


def test_lazy_layers_decide_what_to_inherit():
    rank = np.array([[4.0, 1], [1, 1.2], [3, 1], [1, 1.4], [1, 1]])
    assert lazy(rank).tolist() == [False, True, False, True, True]
    assert to_inherit({"attention_rank": rank}) == (3, "Inheritune: the layers before the last ones that are lazy, 3-4")
    for none in (rank[:3], rank[3:]):  # not at the end, or all
        assert to_inherit({"attention_rank": none})[0] == 1


def test_passes_are_a_sixth_of_the_cube():
    assert run_passes(24, 24) == (24**3 - 24) // 6
    assert run_passes(24, 1) == 24 * 23 // 2
    assert found().about["layer_passes"] > 2 * (3 + run_passes(3, 3) + 2 * 3)  # two batches, and the suggestions


def test_drop_by_what_was_found():
    least = int(found().values["block_influence"].argmin())
    assert found().drop(layers=2) == jaxup.drop("model", LAYERS, least)
    ends, each = found().about["params"]
    assert found().drop(params=ends + 2.5 * each) == found().drop(layers=2)
    assert ends + LAYERS * each == count_params(CONFIG)
    assert found().drop(layers=1, by="loss") == next(s for s in found().suggestions if s.name == "least_loss_2").plan
    assert found().drop(layers=3).order() == (0, 1, 2)
    with pytest.raises(UserError, match="by='los' is no criterion; did you mean 'loss'"):
        found().drop(layers=2, by="los")
    with pytest.raises(UserError, match="drop: what is left is said in one way: layers=24 or params=6e9"):
        found().drop()


# ---- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("probe")
    jaxup.save(model(), directory / "model")
    tokenizer().save_pretrained(directory / "model")
    (directory / "text.txt").write_text("What is said twice is not said better. " * 20)
    (directory / "short.txt").write_text("Too short.")
    return directory


@pytest.mark.slow
def test_the_command_writes_what_it_found(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    main(["probe", "model", "--data=text.txt", "--out=found", "--seq-len=24", "--rows=5", "--batch-size=2", "--drop=1"])
    said = capsys.readouterr().out
    text = (place / "found" / "PROBE.md").read_text()
    sentence = text.splitlines()[2]
    assert sentence.startswith("Layer ")
    assert sentence in said
    assert "of 5 rows the last 1 are left out" in text
    about = json.loads((place / "found" / "probe.json").read_text())
    assert (about["model"], about["about"]["data"], about["about"]["rows"]) == ("model", "text.txt", 4)
    assert {name: tuple(value["axes"]) for name, value in about["values"].items()} == AXES
    for picture in ("angular_distance", "skip_run", "skip", "attention", "logit_lens", "norms"):
        with Image.open(place / "found" / f"{picture}.png") as drawn:
            assert drawn.size == (1120, 700)
    ids = read_ids("text.txt", tokenizer(), 97, least=25)
    cut = np.lib.stride_tricks.sliding_window_view(ids, 25)[::24]
    for suggestion in about["suggestions"][::4]:  # the plan finds the model by its name, and makes what was measured
        made = jaxup.load(jaxup.open_plan(place / "found" / "plans" / f"{suggestion['name']}.yaml"))
        assert made.config.num_layers == suggestion["layers"]
        np.testing.assert_allclose(float(loss(made, cut)), suggestion["measured"], **CLOSE)
    command = next(line for line in text.splitlines() if line.startswith("python -m jaxup.build found/plans/"))
    assert command.split()[3] in {f"found/plans/{s['name']}.yaml" for s in about["suggestions"]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("modle --out=x", "modle: no such file or directory; did you mean 'model'?"),
        ("model --out=x --data=no.txt", "data: no such file or directory: no.txt"),
        ("model --out=x --data=short.txt", "data: short.txt: its text has 11 tokens, and a row takes 513; give more"),
        ("model --out=model", "model: exists already"),
        ("model --out=model --force", "model: holds none of probe.json"),
        ("model --out=a/b", "a/b: its parent is not a directory"),
        ("model --out=x --rows=0", "--rows: must be at least 1, not 0"),
        ("model --out=x --data=text.txt --seq-len=24 --drop=3", "drop=3: the model has 3 layers"),
    ],
)
def test_what_cannot_be_is_one_line(args, message, place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UserError) as error:
        main(["probe", *args.split()])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not (place / "x").exists()


@pytest.mark.slow
def test_from_python():
    with pytest.raises(UserError, match=r"^data: it has token 261, and the model 261$"):
        probe(model(), np.full((1, 9), 261))
    leaves = flatten(model().params)
    lost = unflatten(leaves | {"norm.scale": leaves["norm.scale"] * jnp.nan})
    with pytest.raises(UserError, match="the loss of the model on this text is nan; are all of its weights finite"):
        probe(model().with_params(lost), rows(), batch_size=2)
    with pytest.raises(UserError, match="no tokenizer; give one"):
        probe(model())
    assert jaxup.probe is probe
    html = dataclasses.replace(found(), model="<script>`</script>")._repr_html_()
    assert "<script>" not in html
    assert "block influence" in html
    assert len(read_ids("python", tokenizer(), 999, least=999)) == 999  # a text that is always there
