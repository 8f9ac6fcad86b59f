"""`jaxup.explain`: the plan of a model inferred from its bytes, against the plan that made it."""

import importlib
import json
import os
import re
import shutil
import textwrap
import warnings

import numpy as np
import processes
import pytest
import safetensors.numpy
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_build import _END_SCALES, _FACTOR, _FILTERS, RECIPES, SLOW, make, simple, weights

import jaxup
import jaxup.export
from jaxup.building.work import build
from jaxup.depth import picture, recipes
from jaxup.depth.plan import BLOCK_PATHS, ENDS, ZEROED, DepthPlan, Row
from jaxup.errors import UserError
from jaxup.families import FAMILIES, config_from_hf
from jaxup.families.layouts import expected_tensors
from jaxup.files import shards
from jaxup.lens.explain import explain
from jaxup.model.spec import spec
from jaxup.recipes.line import parse
from jaxup.recipes.open import open_recipe


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(picture, "png", lambda plan, title: b"")  # takes longer than all the rest
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def meaning(plan):
    """A plan by what it does to the layers, whatever the words."""
    rows = [(row.source, row.layer, row.role, row.parts, row.noise, row.zeroed) for row in plan.rows]
    factors = [[np.prod(row.factors(path), dtype=np.float32) for path in BLOCK_PATHS] for row in plan.rows]
    return rows, factors


def recovered(plan, paths, root):
    """Builds the plan, explains the result, builds that: the same files to the bit, and the same plan."""
    names = {name: str(path) for name, path in paths.items()}
    plan = plan.renamed(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(plan, root / "out")
        found = explain(root / "out", against=list(names.values()))
        build(found.plan, root / "again")
    before, after = weights(root / "out"), weights(root / "again")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes(), name
    assert (root / "out" / "config.json").read_bytes() == (root / "again" / "config.json").read_bytes()
    return plan, found


@pytest.mark.parametrize("text", RECIPES)
def test_mergekits_recipes(tmp_path, text):
    paths = {name: make(tmp_path / name, seed=i, hidden_size=32) for i, name in enumerate("AB")}
    (tmp_path / "recipe.yml").write_text(textwrap.dedent(text))
    plan = open_recipe(str(tmp_path / "recipe.yml"), models={name: str(path) for name, path in paths.items()}).plan
    plan, found = recovered(plan, paths, tmp_path)
    assert meaning(found.plan) == meaning(plan)
    assert found.exact
    assert (found.plan.dtype, found.plan.out_dtype) == (plan.dtype, plan.out_dtype)


# Depths and orders as published; the weights are random, the width is 8.
PUBLISHED = {
    "SOLAR": (32, "solar(m, 8)"),
    "LLaMA Pro": (32, "expand(m, 4)"),
    "Llama-3-15B-Instruct-zeroed": (32, "upscale(m, 8:24, copies=2)"),
    "Tunguska": (56, "upscale(inherit(m, 55), 19:41, copies=2)"),
    "Tunguska, interleaved": (56, "interleave(m, 19:41, copies=2)"),
    "Theia": (40, None),
    "Stacking": (6, "stack(m, 4)"),
    "Inheritune": (26, "inherit(m, 13)"),
}


def theia():
    """NeMoria-21b: [0, 30], [16, 32] twice zeroed, [32, 40]: layers 30 and 31 survive as zeroed copies only."""
    silent = [(layer, ZEROED) for layer in range(16, 32)]
    return simple(40, [*range(30), *silent, *silent, *range(32, 40)])


ALIKE = {*PUBLISHED} - {"LLaMA Pro"}  # to what others test


@pytest.mark.parametrize("name", [pytest.param(name, marks=[SLOW] * (name in ALIKE)) for name in PUBLISHED])
def test_published_recipes(tmp_path, name):
    layers, line = PUBLISHED[name]
    path, other = make(tmp_path / "m", layers=layers), make(tmp_path / "other", layers=3, seed=1)
    plan = parse(line).plan(layers) if line else theia()
    build(plan.renamed({"m": str(path)}), tmp_path / "out")
    found = explain(tmp_path / "out", against=[other, path])
    assert found.plan == plan.renamed({"m": str(path)})
    assert found.exact
    assert not [note for note in found.notes if "alike" not in note]


def test_parts_noise_and_what_is_new(tmp_path):
    """What `init` draws is drawn again: with what it was mixed is known by its size."""
    path = make(tmp_path / "m", "gpt2", dtype="float32", n_embd=32)
    rows = (
        Row("m", 0),
        Row("m", 1, "copy", (("q_proj", (0.5, 3.0)), ("o_proj", 0.0))),
        Row("m", 2, "new", (("mlp.up_proj.kernel", 0.0),), ()),
        Row("m", 2, parts=("attention",)),
        Row("m", 3, parts=("mlp", "norms")),
        Row("m", 3, "copy", parts=("norms",)),
        Row("m", 3, "copy", noise=0.25),
        Row("m", 1, "original", (("", -0.3),)),
    )
    plan, found = recovered(DepthPlan(rows, "m", "m", None, "m", (("m", 4),)), {"m": path}, tmp_path)
    assert meaning(found.plan)[1] == meaning(plan)[1]
    assert [(row.layer, row.parts, row.noise) for row in found.plan.rows[3:]] == [
        (row.layer, row.parts, row.noise) for row in plan.rows[3:]
    ]
    assert [row.role for row in found.plan.rows][2] == "new"
    assert found.plan.norm is None
    assert found.notes[0].startswith("layer 2 matches nothing")


# ---- what was trained since


def changed(directory, out, change):
    """A model with other values: change(name, array in float32) -> array."""
    shutil.copytree(directory, out)
    (out / "jaxup_manifest.json").unlink(missing_ok=True)
    arrays = {name: change(name, array.astype(np.float32)).astype(array.dtype) for name, array in weights(out).items()}
    for file in out.glob("*.safetensors"):
        file.unlink()
    safetensors.numpy.save_file(arrays, out / "model.safetensors")
    return out


def test_what_was_trained_since(tmp_path):
    """Steps of 3% on everything; zeros grow to 5%, in directions of their own; a stranger is no origin."""
    path, stranger = (make(tmp_path / str(i), seed=i, hidden_size=48, layers=6) for i in (0, 1))
    plan = simple(6, [0, 1, 2, (1, ZEROED), (2, ZEROED), 3, 4, 4, 5]).renamed({"m": str(path)})
    build(plan, tmp_path / "built")
    rng = np.random.default_rng(3)
    trained = changed(
        tmp_path / "built", tmp_path / "out",
        lambda name, x: x + (0.03 if x.any() else 0.05) * rng.normal(0, 1, x.shape).astype(np.float32),
    )  # fmt: skip
    found = explain(trained, against=[stranger, path])
    assert found.plan == plan
    assert not found.exact
    for row, layer in zip(plan.rows, found.layers, strict=True):
        assert 0.025 < layer.changed < 0.035
        assert layer.similarity > 0.999
        assert (0.04 < layer.grown < 0.06) if row.zeroed else layer.grown == 0
    assert 0.025 < found.ends["lm_head"].changed < 0.035
    assert "3-4: changed by 3%, similarity 0.9995" in found.describe()
    assert re.search(r"what was zeroed has grown to [\d. to]+% of its origin's size", found.describe())


def test_a_layer_in_two_places_and_parts_of_two_layers(tmp_path):
    """What the sources have twice is taken in runs, and what no plan says is said."""
    path = make(tmp_path / "m", hidden_size=32, layers=6)
    build(simple(6, [0, 1, 2] * 2).renamed({"m": str(path)}), tmp_path / "twice")
    found = explain(path, against=[tmp_path / "twice"])
    assert [row.layer if row.parts else None for row in found.plan.rows] == [0, 1, 2, None, None, None]
    assert re.fullmatch(r"layers 3-5 match nothing \(the nearest has a cosine of 0.\d\d\): new", found.notes[0])
    assert "layers 0-2 may come from several that are alike" in found.notes[1]
    mixed = changed(path, tmp_path / "mixed", lambda name, x: x)
    arrays = weights(mixed)
    for name in list(arrays):
        if ".layers.2.mlp" in name:
            arrays[name] = arrays[name.replace(".2.", ".4.")]
    safetensors.numpy.save_file(arrays, mixed / "model.safetensors")
    said = explain(mixed, against=[path]).notes
    assert any(note.startswith("layer 2: its mlp is that of layer 4 of ") for note in said)


def test_more_tokens_and_what_is_not_finite(tmp_path):
    """Rows that were added are said, and so is NaN, which is nowhere but where it is."""
    path = make(tmp_path / "m", hidden_size=32)

    def change(name, x):
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            return np.concatenate([x, x[:2]])
        return np.where(x == x[0, 0], np.nan, x) if name.endswith("2.self_attn.q_proj.weight") else x

    out = changed(path, tmp_path / "out", change)
    (out / "config.json").write_text((path / "config.json").read_text().replace('"vocab_size": 13', '"vocab_size": 15'))
    found = explain(out, against=[path])
    assert found.plan == recipes.identity(str(path), 4)
    assert "NaN or infinity in self_attn.q_proj.kernel of layer 2" in found.notes
    assert "vocab_size is 15, and 13 in what the plan makes" in found.notes
    assert [layer.untouched for layer in found.layers] == [True, True, False, True]
    assert 0 < found.layers[2].changed < 0.1
    assert all(end.untouched for end in found.ends.values())


@pytest.mark.slow
def test_a_healed_model(tmp_path):
    """After an epoch of the healing of the shipped experiment, as small as tests have it."""
    run = tmp_path / "run"
    processes.run("-m", "jaxup.train", "--config=heal.py:smoke,epochs=1,control=0", f"--workdir={run}")
    jaxup.export.main(["export", f"{run}@pretrained", str(tmp_path / "base")])
    rng = np.random.default_rng(0)
    stranger = changed(
        tmp_path / "base", tmp_path / "stranger", lambda _, x: rng.permutation(x.ravel()).reshape(x.shape)
    )
    found = explain(run, against=[stranger, tmp_path / "base"])
    plan = DepthPlan.from_yaml((run / "export" / "jaxup_plan.yaml").read_text())
    assert found.plan == plan.renamed({name: str(tmp_path / "base") for name, _ in plan.sources})
    assert all(layer.changed for layer in found.layers)
    assert all(layer.grown > 0 for row, layer in zip(plan.rows, found.layers) if row.zeroed)


@pytest.mark.slow
def test_a_target_that_was_trained(finished, tmp_path):
    run, _ = finished
    jaxup.export.main(["export", f"{run}@reference", str(tmp_path / "reference")])
    found = explain(run, against=[tmp_path / "reference"])
    assert [(row.layer, row.parts) for row in found.plan.rows] == [
        (row.layer, row.parts) for row in DepthPlan.from_yaml((run / "export" / "jaxup_plan.yaml").read_text()).rows
    ]
    assert all(0.9 < layer.similarity < 1 for layer in found.layers)


# ---- how much is read, where to, and what is refused


def test_little_of_a_large_model_is_read(tmp_path):
    """3 GB of zeros, which take no space."""
    hf = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192,
          "num_hidden_layers": 22, "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False,
          "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(hf))
    table = spec(config_from_hf(hf))
    stored = [
        shards.Stored(t, shards.DTYPES["bfloat16"]) for t in expected_tensors(FAMILIES["llama"].rows(table), table)
    ]
    header = shards.header(stored)
    (tmp_path / "m" / "model.safetensors").write_bytes(header)
    os.truncate(tmp_path / "m" / "model.safetensors", len(header) + sum(each.nbytes for each in stored))
    ((read, total), *_) = explain(tmp_path / "m", against=[tmp_path / "m" / "."]).read.values()
    assert total == (tmp_path / "m" / "model.safetensors").stat().st_size > 2.8e9
    assert read < 0.01 * total


def test_from_a_bucket(tmp_path, here):
    path = make(tmp_path / "m", hidden_size=32)
    build(simple(4, [0, (0, ZEROED), 1, 2]).renamed({"m": str(path)}), tmp_path / "out")
    for file in ("config.json", "model.safetensors"):
        (here / "m" / file).write_bytes((path / file).read_bytes())
    assert explain(tmp_path / "out", against=[f"{here}/m"]).plan == simple(4, [0, (0, ZEROED), 1, 2]).renamed(
        {"m": "gs://bucket/here/m"}
    )


def test_the_command(tmp_path, capsys, monkeypatch):
    command = importlib.import_module("jaxup.explain")  # `jaxup.explain` is the function
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m")
    build("upscale(m, 1:3)", tmp_path / "out")
    command.main(["explain", "out", "--against", "m", "--out", "plan.yaml"])
    said = capsys.readouterr().out
    assert "===zz=" in said
    assert "nothing was trained since" in said
    assert re.search(r"^read: .* of 'out'|^read: .* of out", said, re.M)
    assert build("plan.yaml", tmp_path / "again", verify=True).report
    assert all(np.array_equal(x, weights(tmp_path / "again")[name]) for name, x in weights(tmp_path / "out").items())
    with pytest.raises(UserError, match=r"^\S*plan.yaml: exists already"):
        command.main(["explain", "out", "--against", "m", "--out", "plan.yaml"])
    with pytest.raises(UserError, match="arguments are required: --against"):
        command.main(["explain", "out"])
    found = jaxup.explain("out", against="m")
    found.save("kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["explain.json", "plan.yaml"]
    assert json.loads((tmp_path / "kept" / "explain.json").read_text())["layers"][3]["zeroed"]
    with pytest.raises(UserError, match="exists already"):
        found.save("kept")
    assert DepthPlan.from_yaml((tmp_path / "plan.yaml").read_text()) == found.plan
    assert "===zz=" in found._repr_html_()


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ([], "no models are given"),
        (["m", "m"], "m: given twice"),
        (["nothing-here"], "nothing-here: no such directory"),
        (["empty"], "empty: no config.json; is it a model directory?"),
        (["wide"], "wide: hidden_size is 16, and 8 in m: other shapes of tensors"),
        (["gpt2"], "gpt2: "),
    ],
)
def test_refusals(tmp_path, monkeypatch, against, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m")
    make(tmp_path / "wide", hidden_size=16)
    make(tmp_path / "gpt2", "gpt2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        explain("m", against=against)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- any plan


@st.composite
def cases(draw):
    model_type = draw(st.sampled_from(["llama", "qwen2", "gpt2", "gemma"]))
    dtype = draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    models = {
        name: {"model_type": model_type, "layers": draw(st.integers(1, 4)), "seed": i, "tied": draw(st.booleans()),
               "dtype": dtype}
        for i, name in enumerate(draw(st.sampled_from(["a", "ab"])))
    }  # fmt: skip
    scales = st.lists(st.tuples(_FILTERS, _FACTOR), max_size=3, unique_by=lambda pair: pair[0]).map(tuple)
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        name = draw(st.sampled_from(sorted(models)))
        layer = draw(st.integers(0, models[name]["layers"] - 1))
        rows.append(Row(name, layer, "original", draw(st.one_of(st.just(()), st.just(ZEROED), scales))))
    ends = [draw(st.sampled_from(sorted(models))) for _ in ENDS]
    dtypes = st.sampled_from([None, None, "float32", "bfloat16"])
    sources = tuple((name, model["layers"]) for name, model in models.items())
    return models, DepthPlan(tuple(rows), *ends, sources, draw(_END_SCALES), draw(dtypes), draw(dtypes))


def check_case(tmp_path_factory, case):
    models, plan = case
    root = tmp_path_factory.mktemp("any")
    sizes = {"hidden_size": 32} if next(iter(models.values()))["model_type"] != "gpt2" else {"n_embd": 32}
    try:
        paths = {name: make(root / name, **model, **sizes) for name, model in models.items()}
        plan, found = recovered(plan, paths, root)
        for row, was in zip(found.plan.rows, plan.rows, strict=True):
            if any(was.factors(path) != (0.0,) for path in BLOCK_PATHS if path.endswith("kernel")):
                assert (row.source, row.layer) == (was.source, was.layer)
    finally:
        shutil.rmtree(root)


@settings(max_examples=3, phases=[Phase.generate])
@given(cases())
def test_any_plan_is_found_again(tmp_path_factory, case):
    check_case(tmp_path_factory, case)


@pytest.mark.slow
@settings(max_examples=60)
@given(cases())
def test_many_plans_are_found_again(tmp_path_factory, case):
    check_case(tmp_path_factory, case)
