"""`jaxup.build`: plans carried out on files, against a naive loop over arrays, and what may go wrong on the way."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import textwrap
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import safetensors.numpy
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from passthrough import passthrough
from plain import load_params
from test_vocabulary import tokenizer

import jaxup.build
import jaxup.plan
from jaxup.building import copying
from jaxup.building.vocabulary import Vocabulary
from jaxup.building.work import build, carry_out, prepare
from jaxup.depth import picture
from jaxup.depth.apply import apply
from jaxup.depth.arithmetic import rescale
from jaxup.depth.plan import ENDS, ZEROED, DepthPlan, Row
from jaxup.depth.result import result_config
from jaxup.errors import UserError
from jaxup.families import FAMILIES, config_from_hf
from jaxup.families.layouts import expected_tensors, from_file
from jaxup.files import manifest, shards
from jaxup.hub.reader import load_config, open_checkpoint
from jaxup.model.decoder import init
from jaxup.model.spec import flatten, spec
from jaxup.recipes.open import Model, Recipe, open_recipe

SIZES = {
    "llama": {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2,
              "num_key_value_heads": 1, "max_position_embeddings": 16},
    "gpt2": {"vocab_size": 13, "n_embd": 8, "n_head": 2, "n_positions": 16},
}  # fmt: skip
SIZES["qwen2"] = SIZES["llama"]
SIZES["gemma"] = SIZES["llama"] | {"head_dim": 6}
SLOW = pytest.mark.slow
LAYERS = {"gpt2": "n_layer", **dict.fromkeys(("llama", "qwen2", "gemma"), "num_hidden_layers")}


def make(directory, model_type="llama", layers=4, *, seed=0, tied=False, dtype="bfloat16", shard=10**9, **more):
    """A model of random values, written by safetensors' own writer."""
    hf = {"model_type": model_type, **SIZES[model_type], LAYERS[model_type]: layers, "tie_word_embeddings": tied,
          "eos_token_id": 1, "torch_dtype": dtype, **more}  # fmt: skip
    if model_type == "qwen2" and "layer_types" not in hf:
        kinds = ["full_attention", "sliding_attention"]
        hf |= {"use_sliding_window": True, "sliding_window": 3,
               "layer_types": [kinds[(i + seed) % 3 > 0] for i in range(layers)]}  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf))
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    rng, arrays = np.random.default_rng(seed), {}
    table = spec(config_from_hf(hf))
    for tensor in expected_tensors(FAMILIES[model_type].rows(table), table):
        # GPT-2's own files leave the prefix out.
        name = tensor.name.removeprefix("transformer.") if seed % 2 else tensor.name
        arrays[name] = rng.normal(0, 1, tensor.shape).astype(shards.DTYPES[dtype])
    names, files = list(arrays), []
    while names:
        taken, size = [], 0
        while names and (not taken or size + arrays[names[0]].nbytes <= shard):
            taken.append(names.pop(0))
            size += arrays[taken[-1]].nbytes
        files.append(taken)
    if len(files) == 1:
        safetensors.numpy.save_file(arrays, directory / "model.safetensors")
        return directory
    index = {}
    for i, taken in enumerate(files):
        file = f"model-{i}.safetensors"
        safetensors.numpy.save_file({name: arrays[name] for name in taken}, directory / file)
        index |= dict.fromkeys(taken, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def recipe_of(plan, paths, base=None):
    models = {
        name: Model(str(path), None, json.loads((Path(path) / "config.json").read_text()), load_config(path))
        for name, path in paths.items()
    }
    return Recipe(plan, models, base or plan.rows[0].source, None, None, None, "a\nrecipe", "recipe.yml", ())


def simple(layers, rows, name="m", **ends):
    """A plan of one source: rows are layers, or (layer, scales)."""
    seen, made = set(), []
    for row in rows:
        layer, scales = row if isinstance(row, tuple) else (row, ())
        made.append(Row(name, layer, "copy" if layer in seen or scales == ZEROED else "original", scales))
        seen.add(layer)
    return DepthPlan(tuple(made), *(name,) * 4, sources=((name, layers),), **ends)


def weights(directory):
    return {
        name: array
        for file in sorted(Path(directory).glob("*.safetensors"))
        for name, array in safetensors.numpy.load_file(file).items()
    }


def naive(plan, paths):
    """The result's params: a loop over layers and leaves of arrays in memory, with no file in sight."""
    sources = {name: flatten(load_params(path, load_config(path))) for name, path in paths.items()}
    config = result_config(plan, {name: load_config(path) for name, path in paths.items()})
    tied = {name: load_config(path).tie_embeddings for name, path in paths.items()}
    result = {}
    for path in spec(config):
        inside = path.removeprefix("blocks.")
        if inside != path:
            layers = [
                rescale(sources[row.source][path][row.layer], row.factors(inside), plan.dtype, plan.out_dtype)
                for row in plan.rows
            ]
            result[path] = np.stack(layers)
            continue
        name = getattr(plan, path.split(".")[0])
        array = sources[name]["embed_tokens"].T if path == "lm_head.kernel" and tied[name] else sources[name][path]
        result[path] = rescale(array, plan.factors(path), plan.dtype, plan.out_dtype)
    return result


def check(plan, paths, out, **options):
    """Builds, and compares with the loop: every bit of every tensor, and config.json."""
    build(recipe_of(plan, paths), out, **options)
    config = result_config(plan, {name: load_config(path) for name, path in paths.items()})
    assert load_config(out) == config
    expected, tensors = naive(plan, paths), weights(out)
    family = FAMILIES[json.loads((out / "config.json").read_text())["model_type"]]
    for tensor in expected_tensors(family.rows(spec(config)), spec(config)):
        array = tensors.pop(tensor.name)
        for path, part in zip(tensor.paths, from_file(tensor, array), strict=True):
            want = expected[path] if tensor.layer is None else expected[path][tensor.layer]
            assert part.dtype == want.dtype, path
            assert part.tobytes() == want.tobytes(), (path, tensor.layer)
    assert not tensors
    manifest.check_manifest(out, [file.name for file in out.iterdir() if file.name != manifest.NAME])
    return config


# ---- any plan

_FILTERS = st.sampled_from(["", "*", "o_proj", "q_proj", "v_proj.bias", "mlp", "kernel", "bias", "layernorm", "norm"])
_FACTOR = st.sampled_from([0.0, 0.5, 1.0, -1.0, 1.1, 3.0])
_SCALES = st.one_of(
    st.just(()),
    st.just(ZEROED),
    st.lists(
        st.tuples(_FILTERS, st.one_of(_FACTOR, st.lists(_FACTOR, min_size=1, max_size=3).map(tuple))),
        max_size=3,
        unique_by=lambda pair: pair[0],
    ).map(tuple),
)
_END_SCALES = st.lists(
    st.tuples(st.sampled_from(["embed", "embed_tokens", "norm", "lm_head", "*"]), _FACTOR),
    max_size=2,
    unique_by=lambda pair: pair[0],
).map(tuple)
_DTYPES = st.sampled_from([None, None, None, "float32", "bfloat16", "float16"])


@st.composite
def cases(draw):
    """Models and a plan on them: (models as `make` takes them, plan)."""
    model_type = draw(st.sampled_from(["llama", "qwen2", "gpt2", "gemma"]))
    models = {
        name: {
            "model_type": model_type, "layers": draw(st.integers(1, 4)), "seed": i, "tied": draw(st.booleans()),
            "dtype": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
            "shard": draw(st.sampled_from([10**9, 1500])),
        }
        for i, name in enumerate(draw(st.sampled_from(["a", "ab"])))
    }  # fmt: skip
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        name = draw(st.sampled_from(sorted(models)))
        layer = draw(st.integers(0, models[name]["layers"] - 1))
        rows.append(Row(name, layer, draw(st.sampled_from(["original", "copy"])), draw(_SCALES)))
    ends = [draw(st.sampled_from(sorted(models))) for _ in ENDS]
    sources = tuple((name, model["layers"]) for name, model in models.items())
    plan = DepthPlan(tuple(rows), *ends, sources, draw(_END_SCALES), draw(_DTYPES), draw(_DTYPES))
    return models, plan


def check_case(tmp_path_factory, case, sparse):
    models, plan = case
    root = tmp_path_factory.mktemp("any")
    try:
        paths = {name: make(root / name, **model) for name, model in models.items()}
        # Sources of several dtypes: each tensor keeps its own, while a stack has one. They are compared where a
        # plan gives all one.
        if len({model["dtype"] for model in models.values()}) > 1 and plan.dtype is None:
            plan = dataclasses.replace(plan, dtype="bfloat16")
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")  # of overflow
            patch.setattr(picture, "png", lambda plan, title: b"")  # which takes longer than all the rest
            patch.setattr(os, "fsync", lambda fd: None)
            check(plan, paths, root / "out", sparse=sparse, max_shard_size=4000)
    finally:
        shutil.rmtree(root)


@settings(max_examples=15, phases=[Phase.generate])
@given(cases(), st.booleans())
def test_any_plan_is_a_loop_over_layers(tmp_path_factory, case, sparse):
    check_case(tmp_path_factory, case, sparse)


@pytest.mark.slow
@settings(max_examples=400)
@given(cases(), st.booleans())
def test_many_plans_are_loops_over_layers(tmp_path_factory, case, sparse):
    check_case(tmp_path_factory, case, sparse)


RECIPES = [
    """
    slices:
    - sources: [{model: A, layer_range: [0, 3]}]
    - sources:
      - model: A
        layer_range: [1, 4]
        parameters:
          scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: [0.5, 0.25, 2.0]}, {value: 1.0}]
    - sources: [{model: B, layer_range: [2, 4]}]
    merge_method: passthrough
    """,
    """
    slices:
    - sources: [{model: B, layer_range: [0, 2]}]
    - sources: [{model: A, layer_range: [3, 4], parameters: {scale: {filter: self_attn, value: 1.3}}}]
    parameters: {scale: 0.9}
    merge_method: passthrough
    dtype: float32
    out_dtype: float16
    """,
]


@pytest.mark.parametrize("tied", [(False, False), (True, True), (False, True), (True, False)])
@pytest.mark.parametrize("text", RECIPES)
def test_mergekits_recipes(tmp_path, text, tied):
    """Against mergekit's semantics written down apart, tensor by tensor, by their names in the files."""
    paths = {name: make(tmp_path / name, seed=i, tied=tied[i]) for i, name in enumerate("AB")}
    (tmp_path / "recipe.yml").write_text(textwrap.dedent(text))
    recipe = open_recipe(str(tmp_path / "recipe.yml"), models={name: str(path) for name, path in paths.items()})
    build(recipe, tmp_path / "out")
    models = {name: {"tensors": weights(path), "layers": 4} for name, path in paths.items()}
    expected, found = passthrough(yaml.safe_load(text), models), weights(tmp_path / "out")
    head = expected.get("lm_head.weight")
    if head is not None and "lm_head.weight" not in found:
        # Tied: the head is the embedding.
        assert np.array_equal(expected.pop("lm_head.weight"), found["model.embed_tokens.weight"])
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name].dtype == want.dtype
        np.testing.assert_array_equal(found[name], want)  # -0.0 is 0.0
    assert ("lm_head.weight" in found) == (not load_config(tmp_path / "out").tie_embeddings)


@pytest.mark.parametrize("model_type", ["gpt2", pytest.param("llama", marks=SLOW), pytest.param("gemma", marks=SLOW)])
def test_it_is_what_apply_makes(tmp_path, model_type):
    """Also with what is newly initialised: that of `init` with seed 0, as `jaxup.load` has it."""
    path = make(tmp_path / "m", model_type, dtype="float32")
    rows = (
        Row("m", 0),
        Row("m", 1, "copy", (("q_proj", (0.5, 3.0)), ("o_proj", 0.0))),
        Row("m", 1, "new", (("mlp", 0.5),), ()),
        Row("m", 2, "copy", parts=("attention",)),
        Row("m", 3, "copy", noise=0.25),
    )
    plan = DepthPlan(rows, "m", "m", None, "m", (("m", 4),))
    build(recipe_of(plan, {"m": path}), tmp_path / "out")
    config = load_config(tmp_path / "out")
    params = load_params(path, load_config(path))
    fresh = jax.jit(init, static_argnums=(0, 1))(config, 0)
    expected = flatten(jax.jit(apply, static_argnums=0)(plan, {"m": params}, fresh))
    found = flatten(load_params(tmp_path / "out", config))
    assert found.keys() == expected.keys()
    for leaf, want in expected.items():
        # Two programs may draw what differs by a unit in the last place of float32.
        np.testing.assert_allclose(found[leaf], np.asarray(want), rtol=1e-6, atol=1e-7)
    for layer in (0, 1):
        for leaf in (leaf for leaf in expected if leaf.startswith("blocks.")):
            assert found[leaf][layer].tobytes() == np.asarray(expected[leaf][layer]).tobytes()


def test_transformers_computes_what_the_arrays_say(tmp_path, torch):
    from transformers import AutoModelForCausalLM

    path = make(tmp_path / "m", "qwen2", dtype="float32", seed=1)
    plan = simple(4, [0, 1, (1, (("o_proj", 0.5),)), (2, ZEROED), 3])
    build(recipe_of(plan, {"m": path}), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # The same from the source's own layers: run them in order, scaled by hand.
    source = AutoModelForCausalLM.from_pretrained(path)
    kinds = [source.config.layer_types[row.layer] for row in plan.rows]
    assert model.config.layer_types == kinds
    assert len(set(kinds)) == 2
    state, theirs = source.state_dict(), {}
    for name, value in state.items():
        if ".layers." not in name:
            theirs[name] = value
    for i, row in enumerate(plan.rows):
        for name, value in state.items():
            if name.startswith(f"model.layers.{row.layer}."):
                factor = {2: 0.5 if "o_proj" in name else 1.0,
                          3: 0.0 if "o_proj" in name or "down_proj" in name else 1.0}.get(i, 1.0)  # fmt: skip
                theirs[name.replace(f".{row.layer}.", f".{i}.", 1)] = value * factor
    expected = type(source)(model.config).eval()
    expected.load_state_dict(theirs)
    tokens = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


# ---- config.json and what else is there


def test_config_keeps_all_but_what_must_change(tmp_path):
    extra = {
        "max_length": 7,
        "_name_or_path": "x",
        "bos_token_id": 3,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
    }
    path = make(tmp_path / "m", tied=True, **extra)
    build(recipe_of(simple(4, [0, 1, 1]), {"m": path}), tmp_path / "out")
    before, after = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "out"))
    assert after == before | {"num_hidden_layers": 3}
    plan = simple(4, [0, 1, 1], out_dtype="float16")
    build(recipe_of(plan, {"m": path}), tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == after | {"torch_dtype": "float16"}


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "layer_types": None}, [3, 0, 1, 2]),
        # Beyond layer 5 it would be windowed, although no layer of the source is.
        ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 5, "layer_types": None}, [0, 1, 2] * 3),
        ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "layer_types": None}, [0, 1] * 3),
        ({"layer_types": ["full_attention"] * 4}, [0, 1] * 3),
    ],
)
def test_layers_keep_their_windows(tmp_path, more, rows):
    path = make(tmp_path / "m", "qwen2", **more)
    source, config = load_config(path), check(simple(4, rows), {"m": path}, tmp_path / "out")
    assert config == source.with_layers(rows)


def test_the_base_gives_config_and_files(tmp_path):
    """Another base than the source of the layers: its family, its token ids and its tokenizer."""
    a = make(tmp_path / "a", "llama", rms_norm_eps=1e-6)
    b = make(tmp_path / "b", "llama", layers=2, rms_norm_eps=1e-6, bos_token_id=5, rope_theta=500.0)
    (b / "tokenizer.json").write_text("{}")
    (b / "modeling.py").write_text("raise SystemExit")
    plan = simple(4, [0, 3], name="a")
    build(recipe_of(plan, {"a": a, "b": b}, base="b"), tmp_path / "out")
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["bos_token_id"] == 5
    assert hf["rope_theta"] == 10_000  # layers that were trained with it
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "README.md", "plan.png",
        "jaxup_plan.yaml", "jaxup_manifest.json",
    }  # fmt: skip
    text = (tmp_path / "out" / "jaxup_plan.yaml").read_text()
    assert DepthPlan.from_yaml(text) == plan
    assert "# recipe" in text
    assert str(a) in text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "plan.png" in card
    assert "never used" in card
    assert "= original" in card


def test_sources_that_are_far_or_pickled(tmp_path, torch):
    """Through a key-value store, and as pytorch_model.bin: the same bytes."""
    path = make(tmp_path / "m", shard=1500)
    plan = simple(4, [0, 1, 1, (2, ZEROED), (3, (("mlp", 0.5),))])
    here = recipe_of(plan, {"m": path})
    build(here, tmp_path / "out")
    far = dataclasses.replace(here, models={"m": dataclasses.replace(here.models["m"], path=f"file://{path}")})
    build(far, tmp_path / "far")
    tensors = {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for name, array in weights(path).items()
    }
    for file in path.glob("model*"):
        file.unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    refused(lambda: build(here, tmp_path / "pickled"), "--allow-pickle")
    build(here, tmp_path / "pickled", allow_pickle=True)
    want = weights(tmp_path / "out")
    for out in ("far", "pickled"):
        found = weights(tmp_path / out)
        assert found.keys() == want.keys()
        assert all(found[name].tobytes() == want[name].tobytes() for name in want)


def test_a_vocabulary_gathers_rows(tmp_path):
    path = make(tmp_path / "m", tied=False)
    rows = np.array([3, 4, 5, -1, 0, -1, -1, 12, 1, 1, 2, 4, 6, 8, -1])
    vocabulary = Vocabulary(
        size=15, rows={"embed_tokens": rows, "lm_head": rows[::-1]}, files={"tokenizer.json": b"{}"},
        token_ids={"eos_token_id": 14},
    )  # fmt: skip
    plan = simple(4, [0, 1], scales=(("lm_head", 0.5),))
    build(recipe_of(plan, {"m": path}), tmp_path / "out", vocabulary=vocabulary)
    before, after = weights(path), weights(tmp_path / "out")
    for name, wanted, factor in (("model.embed_tokens", rows, 1.0), ("lm_head", rows[::-1], 0.5)):
        for i, row in enumerate(wanted):
            want = before[f"{name}.weight"][row] * np.float32(factor) if row >= 0 else np.zeros(8)
            np.testing.assert_array_equal(after[f"{name}.weight"][i].astype(np.float32), want.astype(np.float32))
    assert load_config(tmp_path / "out").vocab_size == 15
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 14
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_what_becomes_of_a_vocabulary_is_said(tmp_path, capsys, monkeypatch):
    """By plan, a dry run and build alike; and plan counts what is built."""
    monkeypatch.chdir(tmp_path)
    for name, words in (("a", ["<s>", "</s>", "sun", "moon\x1b[2J"]), ("b", ["</s>", "<s>", "rain", "sun"])):
        make(tmp_path / name, seed=len(words), eos_token_id=words.index("</s>"))
        tokenizer(tmp_path / name, words)
    recipe = "merge_method: passthrough\nbase_model: a\ntokenizer_source: SOURCE\nslices:\n" + "".join(
        f"- sources: [{{model: {name}, layer_range: [0, 2]}}]\n" for name in "ab"
    )
    (tmp_path / "r.yaml").write_text(recipe.replace("SOURCE", "b"))
    notes = [
        "embedding of 'a': 13 rows become 4, as the tokenizer has tokens",
        r"embedding of 'a': 10 rows cut ('moon\x1b[2J', 9 of no token)",
        "embedding of 'a': 3 rows moved ('</s>', '<s>', 'sun')",
        "embedding of 'a': 1 row of zeros ('rain')",
        "head of 'b': 13 rows become 4, as the tokenizer has tokens",
        "head of 'b': 9 rows cut (9 of no token)",
        "config.json: eos_token_id 1 becomes 0",
    ]
    jaxup.plan.main(["plan", "r.yaml"])
    planned = capsys.readouterr().out
    assert all(f"note: {note}\n" in planned for note in notes)
    for flags in (["--dry-run"], []):
        main("r.yaml", "out", *flags)
        said = capsys.readouterr().out
        assert all(f"\n{note}\n" in said for note in notes)
    built = weights(tmp_path / "out").values()
    assert load_config(tmp_path / "out").vocab_size == 4
    assert re.search(rf"result .* {sum(array.size for array in built):,} parameters", planned)
    with pytest.warns(UserWarning, match="of 'a'|of 'b'|_token_id") as caught:
        build("r.yaml", tmp_path / "again")
    assert set(notes) <= {str(warning.message) for warning in caught}
    # What only the tokenizers know is not taken for known.
    for file in tmp_path.glob("?/*token*"):
        file.unlink()
    jaxup.plan.main(["plan", "r.yaml"])
    assert "the tokenizer of 'a', which has none; sizes are those of 13 rows" in capsys.readouterr().out
    # And what a build refuses is refused.
    tokenizer(tmp_path / "a", ["<s>", "</s>", "sun", *map(str, range(20))])
    (tmp_path / "r.yaml").write_text(recipe.replace("SOURCE", "base"))
    with pytest.warns(UserWarning, match="b: no tokenizer"):
        refused(lambda: jaxup.plan.main(["plan", "r.yaml"]), "tokens beyond its vocab_size=13")


def test_models_that_do_not_fit_are_refused(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", rms_norm_eps=0.5)
    plan = dataclasses.replace(simple(4, [0], name="a"), lm_head="b", sources=(("a", 4), ("b", 4)))
    refused(lambda: build(recipe_of(plan, {"a": a, "b": b}), tmp_path / "out"), "norm_eps", "'a'", "'b'")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_head_that_is_said_to_be_tied_must_be(tmp_path):
    path = make(tmp_path / "m", tied=True)
    arrays = weights(path)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    build(recipe_of(simple(4, [0]), {"m": path}), tmp_path / "same")
    assert "lm_head.weight" not in weights(tmp_path / "same")
    bare = {name.removeprefix("model."): array for name, array in arrays.items() if "embed_tokens" not in name}
    safetensors.numpy.save_file(bare, path / "model.safetensors")
    build(recipe_of(simple(4, [0]), {"m": path}), tmp_path / "head", verify=True)
    same = weights(tmp_path / "same")
    assert same.keys() == weights(tmp_path / "head").keys()
    assert all(array.tobytes() == same[name].tobytes() for name, array in weights(tmp_path / "head").items())
    arrays["lm_head.weight"][5] += 1
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    refused(lambda: build(recipe_of(simple(4, [0]), {"m": path}), tmp_path / "out"), "lm_head.weight differs")


def test_overflow_is_said(tmp_path):
    path = make(tmp_path / "m", dtype="float16")
    plan = simple(4, [0, (1, (("mlp.up_proj", 1e5),))])
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.up_proj\.weight: finite values are too large"):
        build(recipe_of(plan, {"m": path}), tmp_path / "out")


# ---- the disk


def blocks(directory):
    return sum(512 * file.stat().st_blocks for file in directory.glob("*.safetensors"))


def large(path, layers=4):
    """A few MB, so that blocks of the file system do not matter."""
    return make(path, layers=layers, hidden_size=128, intermediate_size=512, num_attention_heads=4)


def test_zeros_take_no_space_unless_asked(tmp_path):
    path = large(tmp_path / "m")
    plan = simple(4, [0, 1, 2, 3, *[(i, ZEROED) for i in (1, 2)] * 3])
    recipe = recipe_of(plan, {"m": path})
    built, dense = build(recipe, tmp_path / "out"), build(recipe, tmp_path / "dense", sparse=False)
    zero = 6 * 2 * (128 * 128 + 128 * 512)
    assert built.zero_bytes == dense.zero_bytes == zero
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size == sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))
    assert blocks(tmp_path / "dense") >= size
    # Two blocks at the ends of each tensor.
    assert blocks(tmp_path / "out") <= size - zero + 2 * 4096 * 12
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "dense")
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_file_systems_without_allocation(tmp_path, monkeypatch):
    path = large(tmp_path / "m")

    monkeypatch.setattr(copying, "_allocate", lambda fd, begin, end: False)
    check(simple(4, [0, (1, ZEROED)]), {"m": path}, tmp_path / "out", sparse=False)
    assert blocks(tmp_path / "out") >= sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


def test_tensors_larger_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 1000)
    monkeypatch.setattr(copying, "_CHUNK", 300)
    path = make(tmp_path / "m", "gpt2", n_embd=16)
    plan = simple(4, [0, (1, ZEROED), (2, (("k_proj", 0.5), ("q_proj", 0.0))), 2, 2], dtype="float32")
    check(plan, {"m": path}, tmp_path / "out")
    check(simple(4, [0, 0, (1, ZEROED)]), {"m": path}, tmp_path / "plain")
    check(simple(3, [2, 1]), {"m": tmp_path / "plain"}, tmp_path / "again")


def test_no_more_is_in_memory_than_a_few_chunks(tmp_path):
    """50 MB of tensors, 90 MB built: the process grows by less than half of it after its imports."""
    path = make(tmp_path / "m", hidden_size=512, intermediate_size=2048, num_attention_heads=4, layers=7)
    plan = simple(7, [0, 1, 2, (3, (("o_proj", 0.5), ("down_proj", 0.0))), 3, 3, 4, 5, 6, 6, 6, 5])
    recipe = f"""
        import pickle, sys
        from jaxup.building import work
        recipe = pickle.loads({__import__("pickle").dumps(recipe_of(plan, {"m": path}))!r})
        # Not ru_maxrss, which is at least that of the process that started this one.
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
        before = peak()
        work.build(recipe, {str(tmp_path / "out")!r})
        assert "jax" not in sys.modules
        print(before, peak())
    """
    done = processes.run("-c", textwrap.dedent(recipe))
    before, after = map(int, done.stdout.split())
    assert sum(file.stat().st_size for file in path.iterdir()) > 45e6
    assert after < 150e6
    assert after - before < 25e6


# ---- what goes wrong


def refused(call, *said):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for text in said:
        assert text in message, message
    return message


def state(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_places_that_are_refused(tmp_path):
    path = make(tmp_path / "m")
    recipe = recipe_of(simple(4, [0, 1]), {"m": path})
    (tmp_path / "link").symlink_to(path)
    before = state(path)
    for place, said in (
        (path, "overlaps"), (path / "out", "overlaps"), (tmp_path, "overlaps"), (tmp_path / "link", "overlaps"),
        (tmp_path / "no" / "out", "parent"),
    ):  # fmt: skip
        refused(lambda place=place: build(recipe, place, force=True), said, str(place))
    build(recipe, tmp_path / "out")
    refused(lambda: build(recipe, tmp_path / "out"), "exists already", "--force")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    refused(lambda: build(recipe, tmp_path / "other", force=True), "will not be replaced")
    (tmp_path / "out" / "left.txt").write_text("old")
    build(recipe_of(simple(4, [3]), {"m": path}), tmp_path / "out", force=True)
    assert load_config(tmp_path / "out").num_layers == 1
    assert not (tmp_path / "out" / "left.txt").exists()
    assert state(path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "m", "other", "out"]


def test_too_small_a_disk_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    recipe = recipe_of(simple(4, [0, 1]), {"m": make(tmp_path / "m")})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    refused(lambda: build(recipe, tmp_path / "out"), "GB are free")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("call", ["pwrite", "fallocate"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, call):
    recipe = recipe_of(simple(4, [0, 1, (2, ZEROED)]), {"m": make(tmp_path / "m")})
    calls = []

    def full(fd, *rest):
        calls.append(rest)
        if len(calls) > 5 or call == "fallocate":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, *rest)

    write = os.pwrite
    monkeypatch.setattr(*((os, "pwrite") if call == "pwrite" else (copying, "_allocate")), full)
    refused(lambda: build(recipe, tmp_path / "out"), "No space left", str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_damaged_sources_are_refused(tmp_path, monkeypatch):
    path = make(tmp_path / "m", shard=1500)
    recipe = recipe_of(simple(4, [0, 1]), {"m": path})
    victim = sorted(path.glob("model-*"))[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    refused(lambda: build(recipe, tmp_path / "out"), victim.name, "truncated")
    victim.unlink()
    refused(lambda: build(recipe, tmp_path / "out"), victim.name, "missing")
    victim.write_bytes(whole)
    work = prepare(recipe)
    victim.write_bytes(whole[: len(whole) // 4])  # after it has been looked at
    refused(lambda: carry_out(work, tmp_path / "out", sparse=True, force=False, progress=False), "ends")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_flipped_bit_of_a_source_that_was_built_is_noticed(tmp_path):
    path = make(tmp_path / "m")
    build(recipe_of(simple(4, [0, 1, 2]), {"m": path}), tmp_path / "built")
    file = tmp_path / "built" / "model.safetensors"
    place = open_checkpoint(tmp_path / "built").tensors[5][1].offset + 3
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
    for scales in ((), (("", 0.5),)):
        plan = simple(3, [(0, scales), 1])
        refused(
            lambda plan=plan: build(recipe_of(plan, {"m": tmp_path / "built"}), tmp_path / "out"), file.name, "manifest"
        )
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_parts_covers_every_byte(tmp_path):
    path = make(tmp_path / "m", shard=1500)
    out = tmp_path / "out"
    build(recipe_of(simple(4, [0, 1, 1, (2, ZEROED), (3, ZEROED)]), {"m": path}), out, max_shard_size=4000)
    names = [file.name for file in out.iterdir() if file.name != manifest.NAME]
    manifest.check_manifest(out, names)
    rng = np.random.default_rng(0)
    for file in out.glob("*.safetensors"):
        whole = file.read_bytes()
        entry = json.loads((out / manifest.NAME).read_text())["files"][file.name]
        begin = 0
        for end, digest in entry["parts"]:
            assert hashlib.sha256(whole[begin:end]).hexdigest() == digest
            begin = end
        assert begin == entry["size"] == len(whole)
        places = rng.integers(0, len(whole), 30)
        for place in (*places, 0, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            refused(lambda file=file: manifest.check_manifest(out, [file.name]), file.name)
        swapped = whole[:-64] + whole[-32:] + whole[-64:-32]
        for damaged in (whole[:-1], whole + b"\0", swapped, b""):
            file.write_bytes(damaged)
            refused(lambda file=file: manifest.check_manifest(out, [file.name]), file.name)
        file.write_bytes(whole)
    manifest.check_manifest(out, names)


@pytest.mark.parametrize("parts", [[], [[10, "x"]], "no", [[5, ""], [5, ""]], [[-1, "x"]], [["a", "b"]], [3], None, {}])
def test_a_malformed_manifest_is_refused(tmp_path, parts):
    build(recipe_of(simple(2, [0]), {"m": make(tmp_path / "m", layers=2)}), tmp_path / "out")
    file = tmp_path / "out" / manifest.NAME
    content = json.loads(file.read_text())
    content["files"]["model.safetensors"]["parts"] = parts
    file.write_text(json.dumps(content))
    refused(lambda: manifest.check_manifest(tmp_path / "out", ["model.safetensors"]), "model.safetensors")
    refused(lambda: manifest.check_manifest(tmp_path / "out", ["config.json"]), "model.safetensors")
    assert [file for file, _ in manifest.faults(tmp_path / "out")] == [manifest.NAME]


# ---- the command


def main(*args):
    before = signal.getsignal(signal.SIGTERM)
    try:
        jaxup.build.main(["build", *map(str, args)])
    finally:
        signal.signal(signal.SIGTERM, before)


def plan_file(path, plan):
    path.write_text(plan.to_yaml())
    return path


def test_the_command(tmp_path, capsys):
    path = make(tmp_path / "m")
    plan = simple(4, [0, 1, (1, ZEROED)])
    file = plan_file(tmp_path / "plan.yaml", plan)
    main(file, tmp_path / "out", f"--model=m={path}", "--dry-run")
    refused(
        lambda: main(file, tmp_path / "no" / "out", f"--model=m={path}", "--dry-run"), "its parent is not a directory"
    )
    said = capsys.readouterr().out
    assert "3 layers" in said
    assert "zero: 2 tensors" in said
    assert not (tmp_path / "out").exists()
    main(file, tmp_path / "out", f"--model=m={path}")
    assert f"wrote {tmp_path / 'out'}: " in capsys.readouterr().out
    main(file, tmp_path / "half", f"--model=m={path}", "--dtype=float16", "--no-sparse")
    assert {str(array.dtype) for array in weights(tmp_path / "half").values()} == {"float16"}
    for name, array in weights(tmp_path / "out").items():
        np.testing.assert_array_equal(weights(tmp_path / "half")[name], array.astype(np.float16))
    refused(lambda: main(file, tmp_path / "out", f"--model=m={path}"), "exists already")
    refused(lambda: main(file, tmp_path / "new", "--model=m"), "NAME=DIR")
    refused(lambda: main(file, tmp_path / "new", f"--model=m={path}", "--max-shard-size=3 parsecs"), "max_shard_size")
    assert not (tmp_path / "new").exists()


def test_it_starts_without_jax():
    code = "import sys, jaxup.build as b, jaxup.building.work; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    processes.run("-c", code)


@contextlib.contextmanager
def slow_build(out, *args):
    """The command in a process of its own, that waits after each write so that it can be hit in the middle."""
    code = """
        import os, signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
        write = os.pwrite
        def pwrite(*args):
            time.sleep(0.05)
            return write(*args)
        os.pwrite = pwrite
        from jaxup import build, errors
        errors.entry_point(build.main)
    """
    with processes.started("-c", textwrap.dedent(code), args[0], out, *args[1:]) as process:
        processes.wait_until(lambda: list(out.parent.glob(f".{out.name}.jaxup-new-*/*.safetensors")), process)
        time.sleep(0.1)
        yield process


@pytest.mark.parametrize("over", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_terminated_interrupted_or_twice_at_once(tmp_path, over):
    path, out = make(tmp_path / "m"), tmp_path / "out"
    file = plan_file(tmp_path / "plan.yaml", simple(4, [0, 1, 2, 3]))
    args = (file, f"--model=m={path}", *(["--force"] if over else []))
    if over:
        build(recipe_of(simple(4, [2]), {"m": path}), out)
        before = state(out)

    def unchanged():
        assert state(out) == before if over else not out.exists()

    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with slow_build(out, *args) as process:
            process.send_signal(signum)
            _, said = process.communicate(timeout=processes.LIMIT)
        assert process.returncode == code, said
        assert "Traceback" not in said
        assert not list(tmp_path.glob(".*")), said
        unchanged()
    with slow_build(out, *args) as process:
        refused(lambda: build(recipe_of(simple(4, [0]), {"m": path}), out, force=over), f"process {process.pid} is wr")
    assert list(tmp_path.glob(".*"))
    unchanged()
    build(recipe_of(simple(4, [0]), {"m": path}), out, force=over)
    assert not list(tmp_path.glob(".*"))
    assert load_config(out).num_layers == 1


@pytest.mark.slow
def test_killed_at_any_time(tmp_path):
    """Wholly the old model or wholly the new one, and the next build cleans up."""
    path, out = large(tmp_path / "m"), tmp_path / "out"
    plans = [simple(4, [0, 1, 2, 3, (2, ZEROED), 3]), simple(4, [3, 2, 1, 0])]
    build(recipe_of(plans[0], {"m": path}), out)
    files = [plan_file(tmp_path / f"{i}.yaml", plan) for i, plan in enumerate(plans)]
    rng, depths = np.random.default_rng(0), []
    for turn in range(50):
        command = ("-m", "jaxup.build", files[turn % 2], out, f"--model=m={path}", "--force")
        with processes.started(*command) as process:
            time.sleep(rng.uniform(0.3, 0.9))
            process.kill()
            _, said = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
        # Between two renames the old one is aside; the next writer puts it back.
        if not out.exists():
            (aside,) = tmp_path.glob(".out.jaxup-old-*")
            aside.rename(out)
        manifest.check_manifest(out, [file.name for file in out.iterdir() if file.name != manifest.NAME])
        depths.append(load_config(out).num_layers)
    assert set(depths) == {4, 6}
    build(recipe_of(plans[1], {"m": path}), out, force=True)
    assert not list(tmp_path.glob(".*"))
