"""mergekit recipes, against a plain implementation of what mergekit does (tests/passthrough.py).

That implementation is itself compared with mergekit by tests/oracles/mergekit_passthrough.py.
"""

import time

import numpy as np
import processes
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from passthrough import passthrough

from jaxup.depth import marked_yaml
from jaxup.depth.arithmetic import rescale
from jaxup.depth.plan import END_PATHS, ZEROED, DepthPlan, Row
from jaxup.errors import UserError
from jaxup.recipes import mergekit

LLAMA = {path: f"model.layers.{{layer}}.{path.removeprefix('blocks.').rpartition('.')[0]}.weight" for path in (
    "blocks.input_layernorm.scale", "blocks.self_attn.q_proj.kernel", "blocks.self_attn.k_proj.kernel",
    "blocks.self_attn.v_proj.kernel", "blocks.self_attn.o_proj.kernel", "blocks.post_attention_layernorm.scale",
    "blocks.mlp.gate_proj.kernel", "blocks.mlp.up_proj.kernel", "blocks.mlp.down_proj.kernel",
)} | {"embed_tokens": "model.embed_tokens.weight", "norm.scale": "model.norm.weight",
      "lm_head.kernel": "lm_head.weight"}  # fmt: skip
TIED = {path: name for path, name in LLAMA.items() if path != "lm_head.kernel"}
H = "transformer.h.{layer}."
GPT2 = {
    "embed_tokens": "transformer.wte.weight", "embed_positions": "transformer.wpe.weight",
    **{f"blocks.self_attn.{x}_proj.{ours}": f"{H}attn.c_attn.{theirs}" for x in "qkv"
       for ours, theirs in (("kernel", "weight"), ("bias", "bias"))},
    "blocks.self_attn.o_proj.kernel": f"{H}attn.c_proj.weight", "blocks.self_attn.o_proj.bias": f"{H}attn.c_proj.bias",
    "blocks.mlp.up_proj.kernel": f"{H}mlp.c_fc.weight", "blocks.mlp.down_proj.kernel": f"{H}mlp.c_proj.weight",
    "blocks.mlp.down_proj.bias": f"{H}mlp.c_proj.bias", "blocks.input_layernorm.scale": f"{H}ln_1.weight",
    "blocks.input_layernorm.bias": f"{H}ln_1.bias", "blocks.post_attention_layernorm.scale": f"{H}ln_2.weight",
    "blocks.post_attention_layernorm.bias": f"{H}ln_2.bias", "norm.scale": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
}  # fmt: skip
MODELS = {
    "org/a": mergekit.Source(6, LLAMA),
    "org/b": mergekit.Source(4, LLAMA),
    "org/tied": mergekit.Source(5, TIED),
    "org/deep": mergekit.Source(56, LLAMA),
    "org/deep@v1.0": mergekit.Source(56, LLAMA),
    "gpt2": mergekit.Source(4, GPT2),
    "odd +name": mergekit.Source(2, LLAMA),
}


def describe(model):
    if model not in MODELS:
        raise UserError(f"{model}: no such model")
    return MODELS[model]


def load(text):
    if "merge_method" not in text:
        text = f"merge_method: passthrough\n{text}"
    return mergekit.load(text, describe, "r.yaml")


def one(model, layers, rest=""):
    return f"- sources: [{{model: {model}, layer_range: {layers}{rest}}}]\n"


def refused(message, function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


# ---- against the plain implementation


def tensors(name, dtype=np.float32):
    """A file of the model with one number for each tensor, and its names by (path, layer)."""
    source = MODELS[name]
    rng = np.random.default_rng(sorted(MODELS).index(name))
    where = {}
    for path, file_name in source.names.items():
        for layer in range(source.num_layers) if "{layer}" in file_name else (None,):
            where[path, layer] = file_name.replace("{layer}", str(layer))
    return {n: rng.normal(size=1).astype(dtype) for n in dict.fromkeys(where.values())}, where


def carry_out(plan, files):
    """The plan's tensors, by (path, layer) of the result."""
    out = {}
    for source, sink, path, factors in (
        *(((row.source, row.layer), i, f"blocks.{path}", row.factors(path)) for i, row in enumerate(plan.rows)
          for path in (p.removeprefix("blocks.") for p, _ in files[row.source][1] if p.startswith("blocks."))),
        *(((plan.embed_tokens if "embed" in path else plan.norm, None), None, path, plan.factors(path))
          for path in END_PATHS),
    ):  # fmt: skip
        arrays, where = files[source[0]]
        if (path, source[1]) in where:
            array = arrays[where[path, source[1]]]
            out[path, sink] = rescale(array, factors, plan.dtype, plan.out_dtype)
    return out


def assert_same(recipe, plan):
    files = {name: tensors(name, np.float16 if name == "org/b" else np.float32) for name in MODELS}
    want = passthrough(recipe, {n: {"tensors": files[n][0], "layers": MODELS[n].num_layers} for n in MODELS})
    got = carry_out(plan, files)
    names = MODELS[plan.rows[0].source].names
    assert {names[path].replace("{layer}", str(layer)) for path, layer in got} == set(want)
    for (path, layer), array in got.items():
        expected = want[names[path].replace("{layer}", str(layer))]
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array + np.float32(0), expected + np.float32(0))  # bar the sign of zero


numbers = st.sampled_from([0, 0.0, 1, 1.0, 0.5, -1.7, 1 / 3, "1e-3", 3]) | st.floats(-4, 4)
gradients = st.lists(numbers, min_size=1, max_size=5)
filters = st.sampled_from(["o_proj", "down_proj", "mlp", "weight", "", "*", None, "layernorm", "model.", "norm",
                           "layers.1.", "self_attn.q_proj.weight", "embed_tokens", "proj", "lm_head"])  # fmt: skip
conditions = st.fixed_dictionaries({"value": numbers | gradients}, optional={"filter": filters})
scales = numbers | gradients | conditions | st.lists(conditions, min_size=1, max_size=4)


@st.composite
def recipes(draw):
    def scaled(holder):
        if draw(st.integers(0, 2)) == 0:
            holder["parameters"] = {"scale": draw(scales)}
        return holder

    models = draw(st.sampled_from([["org/a"], ["org/a", "org/b"], ["org/tied"]]))
    model = st.sampled_from(models).flatmap(lambda m: st.sampled_from([m, {"model": {"path": m}}]))
    slices = []
    for _ in range(draw(st.integers(1, 4))):
        name = draw(model)
        layers = MODELS[name if isinstance(name, str) else name["model"]["path"]].num_layers
        first = draw(st.integers(0, layers))
        slices.append(
            scaled({"sources": [scaled({"model": name, "layer_range": [first, draw(st.integers(first, layers))]})]})
        )
    shape = draw(st.sampled_from(["slices", "modules", "models"]))
    if shape == "models":
        recipe = {"models": [scaled({"model": models[0]})]}
    else:
        slices.append({"sources": [{"model": models[-1], "layer_range": [1, 3]}]})
        recipe = {"slices": slices} if shape == "slices" else {"modules": {"default": scaled({"slices": slices})}}
    recipe |= {
        key: dtype for key in ("dtype", "out_dtype") if (dtype := draw(st.sampled_from([None, None, "float16"])))
    }
    return scaled({"merge_method": "passthrough", **recipe})


@settings(max_examples=80)
@given(recipes(), st.booleans())
def test_a_recipe_means_what_it_means_to_mergekit(recipe, flow):
    text = yaml.safe_dump(recipe, default_flow_style=flow)
    try:
        merge = mergekit.load(text, describe, "r.yaml")
    except UserError as error:
        if "is in no name of a tensor that it applies to" not in str(error):
            raise
        return  # mergekit ignores such a filter
    assert_same(recipe, merge.plan)
    for note in merge.notes:
        assert note.startswith("r.yaml:")
    # What is read is written again, and read back.
    again = mergekit.load(mergekit.dump(merge.plan, base=merge.base, names=MODELS[merge.base].names), describe, "again")
    assert_equal(again.plan, merge.plan)
    assert again.base == merge.base


def assert_equal(a, b):
    """Up to the spelling of scales, for the parameters that the models have, and the sources' order."""

    def plain(plan):
        rows = [(r.source, r.layer, r.role, *(r.factors(p.removeprefix("blocks.")) for p in LLAMA if "blocks" in p))
                for r in plan.rows]  # fmt: skip
        ends = [plan.factors(path) for path in MODELS[plan.rows[0].source].names if "blocks" not in path]
        return rows, ends, plan.embed_tokens, plan.embed_positions, plan.norm, plan.lm_head, plan.dtype, plan.out_dtype

    assert plain(a) == plain(b)


def test_a_filter_on_gpt2():
    recipe = (
        "slices: [{sources: [{model: gpt2, layer_range: [0, 4], parameters: {scale: {filter: c_proj, value: 0}}}]}]"
    )
    plan = load(f"{recipe}\nparameters: {{scale: [{{filter: c_attn, value: [1, 4]}}, {{filter: wpe, value: 2}}]}}").plan
    assert plan.strip() == "zzzz"
    assert plan.rows[1].factors("self_attn.k_proj.bias") == (2.0,)
    assert plan.rows[0].scales == ZEROED
    assert plan.scales == (("embed_positions", 2.0),)
    assert {row.factors("mlp.up_proj.kernel") for row in plan.rows} == {()}
    again = mergekit.dump(plan, names=GPT2)
    assert "c_proj" in again
    assert load(again).plan == plan
    split = DepthPlan((Row("gpt2", 0, scales=(("q_proj", 2.0),)),), *["gpt2"] * 4, (("gpt2", 4),))
    refused("parts of one tensor, attn.c_attn.weight, are scaled differently", mergekit.dump, split, names=GPT2)


# ---- recipes as people write them

MISTRAL = "org/deep"
ZERO = """    parameters:
      scale:
      - filter: o_proj
        value: 0.0
      - filter: down_proj
        value: 0.0
      - value: 1.0
"""
TUNGUSKA = "merge_method: passthrough\nslices:\n" + "".join(
    f"- sources:\n  - layer_range: {layers}\n    model: {MISTRAL}\n{ZERO * zero}"
    for layers, zero in (("[0, 41]", 0), ("[19, 41]", 1), ("[19, 41]", 1), ("[41, 55]", 0))
)
AS_WRITTEN = "merge_method: passthrough\nslices:\n" + "".join(
    f"- sources:\n  - layer_range: {layers}\n    model: {MISTRAL}\n{ZERO * zero}"
    for layers, zero in (("[0, 18]", 0), ("[19, 19]", 0), ("[19, 19]", 1), ("[19, 19]", 1), ("[20, 20]", 0),
                         ("[20, 20]", 1), ("[20, 20]", 1), ("[41, 55]", 0))
)  # fmt: skip


def test_tunguska():
    merge = load(TUNGUSKA)
    rows = [(i, ()) for i in range(41)] + [(i, ZEROED) for _ in range(2) for i in range(19, 41)]
    rows += [(i, ()) for i in range(41, 55)]
    assert [(row.layer, row.scales) for row in merge.plan.rows] == rows
    assert merge.plan.strip() == "=" * 41 + "z" * 44 + "=" * 14
    assert merge == mergekit.Merge(merge.plan, MISTRAL, None, None, None, ())
    assert (merge.plan.scales, merge.plan.dtype, merge.plan.sources) == ((), None, ((MISTRAL, 56),))
    assert mergekit.dump(merge.plan) == yaml.safe_dump(
        yaml.safe_load(TUNGUSKA.replace("      - value: 1.0\n", "")), sort_keys=False, default_flow_style=None
    )


def test_ranges_written_as_if_they_were_closed():
    merge = load(AS_WRITTEN)
    assert merge.plan.num_layers == 18 + 14
    assert merge.notes == (
        "r.yaml:7:18: [19, 19] empty: ranges are half open; did you mean [0, 19], [19, 20] (3 times), "
        "[20, 21] (3 times), [41, 56] throughout? (also 10:18, 20:18, [20, 20] at 30:18, 2 more)",
    )
    middle = load("slices:\n" + one("org/a", "[0, 5]") + one("org/a", "[5, 5]") + one("org/a", "[5, 6]"))
    assert middle.notes == ("r.yaml:4:41: [5, 5] empty: ranges are half open; did you mean [5, 6]?",)
    seams = "slices:\n" + one("org/a", "[0, 1]") + one("org/a", "[2, 3]") + one("org/a", "[4, 5]")
    assert load(seams).notes == (
        "r.yaml:3:41: layers 1, 3, 5 are left out: ranges are half open; "
        "did you mean [0, 2], [2, 4], [4, 6] throughout?",
    )
    assert load(seams.replace("[4, 5]", "[4, 6]")).notes == ()  # layers left out on purpose


def test_anchors_repeated_keys_and_merges():
    text = """
const_tag: &MODEL org/deep
const_tag: &FACTOR 0.7071067812
zero: &zero
  parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}]}
name: up
slices:
- sources: [{model: *MODEL, layer_range: [0, 2]}]
- sources: [{<<: *zero, model: *MODEL, layer_range: &r [1, 2]}]
- sources:
  - <<: [*zero, {layer_range: [9, 9], model: org/deep@v1.0}]
    layer_range: *r
    parameters: {scale: *FACTOR}
remark: 3
x-notes: {anything: [1]}
"""
    merge = load(text)
    assert [(r.source, r.layer, r.role) for r in merge.plan.rows] == [
        ("org/deep", 0, "original"),
        ("org/deep", 1, "original"),
        ("org/deep", 1, "copy"),
        ("org/deep@v1.0", 1, "original"),
    ]
    assert merge.plan.rows[3].scales == (("", 0.7071067812),)
    assert merge.plan.factors("norm.scale") == merge.plan.factors("lm_head.kernel") == (0.7071067812,)
    assert merge.plan.factors("embed_tokens") == ()
    assert merge.notes[0] == "r.yaml:4:1: 'const_tag' is given twice; the last one counts"
    assert merge.notes[1].startswith(
        "r.yaml:15:1: 'remark' means nothing to passthrough and is ignored (also 'x-notes'"
    )
    assert "r.yaml:1:1: no base_model among 2 models: config and tokenizer are those of the first" in merge.notes[2]


def test_gradients_and_scopes():
    text = """
parameters: {scale: [{filter: mlp, value: 0.1}, {filter: lm_head, value: 9}]}
modules:
  default:
    parameters: {scale: {filter: layernorm, value: 2}}
    slices:
    - sources: [{model: org/a, layer_range: [0, 3], parameters: {scale: [{filter: q_proj, value: [0, 0.5, 1e-1]}]}}]
      parameters: {scale: {filter: embed, value: 3}}
    - sources: [{model: {model: {path: org/a}}, layer_range: [3, 6]}]
      parameters: {scale: [1, 2]}
"""
    plan = load(text).plan
    assert [row.factors("self_attn.q_proj.kernel") for row in plan.rows] == [(0.0,), (0.5,), (0.1,), (), (1.5,), (2.0,)]
    assert [row.factors("mlp.up_proj.kernel") for row in plan.rows] == [(0.1,)] * 3 + [(), (1.5,), (2.0,)]
    assert [row.factors("input_layernorm.scale") for row in plan.rows] == [(2.0,)] * 3 + [(), (1.5,), (2.0,)]
    assert [plan.factors(path) for path in ("embed_tokens", "norm.scale", "lm_head.kernel")] == [(3.0,), (), ()]
    numbered = load("slices:\n" + one("org/a", "[0, 4]", ", parameters: {scale: {filter: layers.2., value: 3}}")).plan
    assert [row.factors("mlp.up_proj.kernel") for row in numbered.rows] == [(), (), (3.0,), ()]
    single = load("slices:\n" + one("org/a", "[2, 3]", ", parameters: {scale: [0.25, 0.75]}")).plan
    assert (single.rows[0].scales, single.factors("norm.scale")) == (
        (("", 0.75),),
        (0.25,),
    )  # t is 1, and 0 at the ends


def test_ends_from_empty_slices():
    text = "slices:\n" + one("org/b", "[0, 0]", ", parameters: {scale: 0.5}") + one("org/a", "[0, 6]")
    merge = load(text + one("org/b", "[4, 4]") + "base_model: org/a\n")
    plan = merge.plan
    assert (plan.embed_tokens, plan.norm, plan.lm_head, merge.base) == ("org/b", "org/b", "org/b", "org/a")
    assert (plan.scales, plan.num_layers, plan.sources) == ((("embed_tokens", 0.5),), 6, (("org/b", 4), ("org/a", 6)))
    assert merge.notes == (
        "r.yaml:3:41: a slice of no layers: gives only the embedding, of 'org/b' "
        "(also a slice of no layers: gives only the final norm and head, of 'org/b' at 5:41)",
    )
    assert load(mergekit.dump(plan, base="org/a")).plan == plan
    # The head of a tied model beside another's embedding is scaled as a head, if at all.
    text = "slices:\n" + one("org/b", "[0, 2]") + one("org/tied", "[2, 4]")
    head = load(text + "parameters: {scale: {filter: lm_head, value: 2}}").plan
    assert head.factors("lm_head.kernel") == (2.0,)


def test_tokenizer_dtype_and_models():
    text = "slices:\n" + one("org/a", "[0, 6]")
    merge = load(text + "tokenizer_source: union\nchat_template: chatml\ndtype: torch.bfloat16\nout_dtype: FP16\n")
    assert merge[2:] == ("union", None, "chatml", ())
    assert (merge.plan.dtype, merge.plan.out_dtype) == ("bfloat16", "float16")
    merge = load(
        text + "tokenizer: {source: {model: org/b}, pad_to_multiple_of: 64, tokens: {}}\nbase_model: org/tied\n"
    )
    assert merge[1:5] == ("org/tied", "org/b", 64, None)
    assert [name for name, _ in merge.plan.sources] == ["org/a", "org/tied", "org/b"]
    assert load(text + "tokenizer: {}").tokenizer == "union"  # mergekit's default
    assert load(text + "tokenizer: {pad_to_multiple_of: 8}").tokenizer == "union"
    asked = []
    text = f"{text}{one('org/a', '[0, 1]') * 2}{one('{path: org/deep, revision: v1.0}', '[0, 6]')}"
    mergekit.load(f"merge_method: passthrough\n{text}", lambda name: asked.append(name) or describe(name), "r.yaml")
    assert asked == ["org/a", "org/deep@v1.0"]
    whole = load("models: [{model: org/a, parameters: {scale: [0, 1]}}]").plan
    assert [row.factors("mlp.up_proj.kernel") for row in whole.rows] == [(0.0,), (0.2,), (0.4,), (0.6,), (0.8,), ()]
    odd = load("slices:\n" + one("{model: {path: odd +name}}", "[0, 2]")).plan
    assert load(mergekit.dump(odd)).plan == odd


# ---- mistakes

GOOD = "merge_method: passthrough\nslices:\n- sources:\n  - model: org/a\n    layer_range: [0, 4]\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[0, 4]", "[6, 4]", "5:18: layer_range [6, 4] goes backwards; did you mean [4, 6]?"),
        ("[0, 4]", "[0, 7]", "5:18: layer_range [0, 7] is out of range: 'org/a' has 6 layers, 0 to 5; did you"),
        ("[0, 4]", "[7, 7]", "is out of range"),
        ("[0, 4]", "[0, 9223372036854775808]", "is out of range"),
        ("[0, 4]", "[-1, 4]", "5:18: layer_range [-1, 4] is negative"),
        ("[0, 4]", "[0.0, 4]", "5:18: layer_range must be two whole numbers, [first, last + 1], not [0.0, 4]"),
        ("[0, 4]", "[no, 4]", "not [false, 4]"),
        ("[0, 4]", "[0, 2, 4]", "two whole numbers"),
        ("[0, 4]", "0-4", "not '0-4'; did you mean [0, 4]?"),
        ("[0, 4]", "[3, 3]", "5:18: [3, 3] is empty, as is every slice: ranges are half open; did you mean [3, 4]?"),
        ("    layer_range: [0, 4]\n", "", "4:5: 'layer_range' is missing"),
        ("layer_range", "layer_rnage", "5:5: unknown key 'layer_rnage'; did you mean 'layer_range'?"),
        ("layer_range: ", "scale: 0\n    layer_range: ", "5:5: 'scale' belongs under 'parameters'"),
        ("layer_range: ", "dtype: float32\n    layer_range: ", "5:5: 'dtype' belongs at the top of the recipe"),
        ("layer_range: ", "model: org/b\n    layer_range: ", "5:5: 'model' is given twice; first in line 4"),
        ("- sources:\n  - model: org/a\n  ", "- model: org/a\n", "3:3: 'model' belongs in the list under 'sources'"),
        ("passthrough", "linear", "1:15: merge_method 'linear': only passthrough"),
        ("merge_method: passthrough\n", "a: b\n", "1:1: 'merge_method' is missing"),
        ("slices", "slicse", "2:1: unknown key 'slicse'; did you mean 'slices'?"),
        ("slices", "models", "'sources' belongs in the list under 'slices'"),
        ("[0, 4]", "[0, 4]\nmodels: [{model: org/b}]", "1:1: slices and models: give one of them"),
        ("[0, 4]", "[0, 4]\n  - {model: org/b, layer_range: [0, 4]}", "4:3: a slice of a passthrough has one source"),
        ("org/a", "org/c", "4:12: org/c: no such model"),
        ("org/a", "org/a+lora", "4:12: 'org/a+lora': adapters are not supported; merge it into 'org/a' first"),
        ("org/a", "{model: org/a, lora: x}", "4:27: 'lora' is not supported; merge the adapter"),
        ("org/a", "7", "4:12: a model must be text or {path, revision}, not 7"),
        ("org/a", "a@b@c", "4:12: 'a@b@c' is not a model's path, nor path@revision"),
        ("org/a", "{path: [a]}", "4:19: a model's path must be text, not ['a']"),
        ("org/a", "{revision: main}", "4:12: 'path' is missing"),
        ("org/a", "{pth: org/a}", "4:13: unknown key 'pth'; did you mean 'path'?"),
        ("[0, 4]", "[0, 4]\ndtype: bfloat61", "6:8: unknown dtype 'bfloat61'; did you mean 'bfloat16'?"),
        ("[0, 4]", "[0, 4]\nout_dtype: float64", "6:12: unknown out_dtype 'float64'"),
        ("[0, 4]", "[0, 4]\ntorch_dtype: float32", "6:1: unknown key 'torch_dtype'; did you mean 'dtype'?"),
        ("[0, 4]", "[0, 4]\ntokenizer_source: base\ntokenizer: {source: base}", "7:12: 'tokenizer' and"),
        ("[0, 4]", "[0, 4]\ntokenizer: {tokens: {a: b}}", "6:13: 'tokens', which picks embeddings"),
        ("[0, 4]", "[0, 4]\ntokenizer: {pad_to_multiple_of: 1.5}", "6:33: pad_to_multiple_of must be"),
        ("[0, 4]", "[0, 4]\ntokenizer_source: org/c", "6:19: org/c: no such model"),
        ("[0, 4]", "[0, 4]\nchat_template: [a]", "6:16: chat_template must be text"),
        ("[0, 4]", "[0, 4]\nbase_model: org/c", "6:13: org/c: no such model"),
        ("slices:", "slices: {}\nx:", "2:1: 'slices' is empty"),
        ("slices:", "modules: {text: 1}\nx: &x", "2:11: module 'text'"),
        ("slices:", "models: [{model: org/a}, {model: org/b}]\nx: &x", "2:26: passthrough takes one of 'models'"),
        ("slices:", "base_model: org/b\nmodels: [{model: org/a}]\nx: &x", "2:13: with 'models'"),
        ("slices:", "models: [{model: org/a, layer_range: [0, 2]}]\nx: &x", "'layer_range' belongs in the list"),
        (GOOD, "[]", "1:1: a recipe must be a mapping of keys to values, not []"),
    ],
)
def test_refusals(old, new, message):
    assert old in GOOD
    message = f"r.yaml:{message}" if message[0].isdigit() else message
    refused(message, mergekit.load, GOOD.replace(old, new), describe, "r.yaml")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (".nan", "6:25: a scale (a number, a list of them, or a list of {filter, value}) must be a finite number"),
        ("[1, .inf]", "6:29: a scale"),
        ("yes", "must be a number, not true"),
        ("half", "must be a number, not 'half'"),
        ("", "must be a number, not nothing"),
        ("[]", "6:25: the list of a scale is empty"),
        ("1e999", "must be a finite number"),
        ("0x" + "f" * 99, "6:25: a number of 101 characters"),
        ("{filter: o_proj}", "6:25: 'value' is missing"),
        ("{filter: o_proj, vlaue: 0}", "6:42: unknown key 'vlaue'; did you mean 'value'?"),
        ("[{filter: o_proj, value: 0}, 1]", "6:54: an entry of scale beside others must be a mapping"),
        ("{filter: 19, value: 0}", "6:34: a filter must be text, not 19"),
        ("{filter: up_porj, value: 0}", "6:34: the filter 'up_porj' is in no name of a tensor that it applies to; "
                                        "did you mean 'up_proj'?"),
        ("{filter: O_PROJ, value: 0}", "did you mean 'o_proj'?"),
        ("{filter: layers.6., value: 0}", "6:34: the filter 'layers.6.' is in no name"),  # of layers 0 to 5
        ("{filter: mlp.up_porj.weight, value: 0}", "did you mean 'mlp.up_proj.weight'?"),
        ("[" + "{filter: o_proj, value: 1}, " * 65 + "]", "6:25: 65 filters; at most 64"),
    ],
)  # fmt: skip
def test_refused_scales(scale, message):
    message = f"r.yaml:{message}" if message[0].isdigit() else message
    refused(message, load, f"{GOOD}    parameters: {{scale: {scale}}}\n")


def test_misspelt_and_ignored_parameters():
    def with_parameters(text):
        return load(f"{GOOD}    parameters: {{{text}}}\n")

    refused("r.yaml:6:18: unknown key 'scael'; did you mean 'scale'?", with_parameters, "scael: 0")
    refused("r.yaml:6:18: 'filter' belongs in the list under 'scale'", with_parameters, "filter: o_proj, value: 0")
    assert with_parameters("weight: 0.3, density: 1").notes == (
        "r.yaml:6:18: 'weight' means nothing to passthrough and is ignored (also 'density' at 6:31)",
    )
    late = with_parameters("scale: [{value: 1}, {filter: o_proj, value: 0}]")
    assert late.plan.rows[0].scales == ()
    assert late.notes == ("r.yaml:6:38: 'o_proj' is never reached: an entry before it matches all that it does",)
    for filter in ("layers.5.", "s.4.mlp"):  # of the model, and not of its layers 0 to 3
        other = with_parameters(f"scale: [{{filter: o_proj, value: 0}}, {{filter: {filter}, value: 2}}]")
        assert other.plan.rows[0].scales == (("o_proj", 0.0),)
        assert other.notes == (
            f"r.yaml:6:63: {filter!r} is in no name of a tensor that it applies to: it does nothing",
        )
    rest = ", parameters: {scale: {filter: lm_head, value: 2}}"
    (note,) = load("slices:\n" + one("org/a", "[0, 2]", rest) + one("org/a", "[2, 6]")).notes
    assert "'lm_head' is in no name of a tensor that it applies to" in note
    own = load(GOOD.replace("- sources", "- base_model: org/b\n  residual_weight: 1\n  sources"))
    assert own.base == "org/a"
    assert own.notes == (
        "r.yaml:3:3: 'base_model' means nothing to passthrough and is ignored (also 'residual_weight' at 4:3)",
    )


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
MERGES = "a0: &a0 {b: 1, c: 2, d: 3}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], k{i}: 1}}\n" for i in range(1, 300)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{BOMB}slices: *a39\n", "an item of slices must be a mapping of keys to values, not a list"),
        (f"{BOMB}slices:\n{one('org/a', '*a39')}", "not a list"),
        (f"{MERGES}slices: *a299\n", "more than 20000 keys and values"),
        ("a: &a [*a]\n", "r.yaml:2:8: *a is inside of what it names, in line 2"),
        ("a: &a {<<: *a}\n", "*a is inside"),
        ("a: *b\n", "there is no anchor &b above"),
        ("a: &a 1\nb: &a 2\n", "r.yaml:3:4: the anchor &a is given twice; first in line 2"),
        ("a: {<<: 1}\n", "<< takes a mapping"),
        ("a: " + "[" * 100_000, "nested more than 50 deep"),
        ("".join(f"{' ' * i}a:\n" for i in range(700)), "nested more than 50 deep"),
        ("- " * 100_000, "not YAML"),
        ("slices:\n" + one("org/a", f"[0, {'9' * 100_000}]"), "r.yaml:3:45: a number of 100000 characters"),
        ("slices:\n" + one("org/a", "[0, 1" + ":1" * 50_000 + "]"), "a number of 100001 characters"),
        ("slices:\n" + one("2024-13-45", "[0, 1]"), "2024-13-45: no such model"),
        ("slices:\n\t- sources", "r.yaml:3:1: not YAML: a tab; YAML is indented with spaces"),
        ("a: \0", "r.yaml:2:4: not YAML: the character '\\x00' is not allowed"),
        ("a: b\n---\nb: c", "r.yaml:3:1: a second document"),
        ("? [a]\n: b", "a key must be text, not ['a']"),
        ('a: "\\ud800"', "r.yaml:2:4: half of a surrogate pair is not text"),
        ('a: "\\UFFFFFFFF"', "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "r.yaml:2:4: the tag"),
        ("a: !!bool perhaps", "'perhaps' cannot be read as bool"),
        ("- a\n" * 80_000, "320026 characters of YAML; at most 300000 are read"),
        ("a: [" + "b," * 100_000, "more than 20000 keys and values"),
        ("".join(f"k{i}: 1\n" for i in range(2000)), "r.yaml:1:1: 2001 keys, where"),
        (f"slices: [&s {{sources: [{{model: org/a, layer_range: [0, 6]}}]}}{', *s' * 1700}]", "more than 10000 layers"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_recipes_end_soon_and_in_one_line(text, message):
    start = time.process_time()
    refused(message, load, text)
    assert time.process_time() - start < 5  # under 2 s where annotations are not checked


def test_a_recipe_of_a_hundred_slices_is_read_fast():
    text = "slices:\n" + "".join(
        one(
            "org/deep",
            f"[{i % 56}, {i % 56 + 1}]",
            ", parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}",
        )
        for i in range(100)
    )
    load(text)
    start = time.process_time()
    assert load(text).plan.num_layers == 100
    assert time.process_time() - start < 1  # 0.1 s where annotations are not checked


# ---- what cannot be written


def test_what_passthrough_cannot_say():
    def plan(rows=None, ends=("a", "a", "b", "b"), **rest):
        return DepthPlan(tuple(rows or (Row("a", 0), Row("b", 1))), *ends, (("a", 4), ("b", 4)), **rest)

    for bad, message in (
        (plan([Row("a", 0), Row("a", 1, "new", parts=())]), "layer 1 is new"),
        (plan([Row("a", 0, parts=("mlp",))]), "layer 0 inherits only mlp"),
        (plan([Row("a", 0, noise=0.1)]), "layer 0 has noise mixed in"),
        (plan([Row("a", 0, scales=(("o_proj", (0.5, 0.3)),))]), "o_proj is scaled by 2 factors in turn"),
        (plan(scales=(("norm", (0.5, 0.3)),)), "norm is scaled by 2 factors in turn"),
        (plan(ends=(None, "a", "b", "b")), "embed_tokens is newly initialised"),
        (plan(ends=("a", "b", "b", "b")), "embed_positions is taken from 'b', embed_tokens from 'a'"),
        (plan(ends=("a", "a", "b", "a")), "lm_head is taken from 'a', norm from 'b'"),
    ):
        refused(f"plan: mergekit's passthrough cannot say it: {message}", mergekit.dump, bad)
    refused("the base model 'c' is none of the plan's sources", mergekit.dump, plan(), base="c")
    assert mergekit.dump(plan(ends=("b", "b", "b", "b"), dtype="bfloat16"), base="a") == (
        "merge_method: passthrough\n"
        "base_model: a\n"
        "slices:\n"
        "- sources:\n"
        "  - layer_range: [0, 0]\n"
        "    model: b\n"
        "- sources:\n"
        "  - layer_range: [0, 1]\n"
        "    model: a\n"
        "- sources:\n"
        "  - layer_range: [1, 2]\n"
        "    model: b\n"
        "dtype: bfloat16\n"
    )


def test_reading_needs_no_jax():
    code = "import sys, jaxup.recipes.mergekit; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    processes.run("-c", code)


def test_places():
    data = marked_yaml.load("a: [1, {b: 2}]\n'c d':   &x\n  e: null\nf: {<<: *x, g: 1e-3}\n", "n")
    assert data == {"a": [1, {"b": 2}], "c d": {"e": None}, "f": {"e": None, "g": "1e-3"}}
    assert (data.place, data.keys_at["c d"], data.values_at["a"][1:]) == (("n", 1, 1), ("n", 2, 1), (1, 4))
    assert data["a"].items_at == [("n", 1, 5), ("n", 1, 8)]
    assert data["a"][1].values_at["b"] == ("n", 1, 12)
    assert data["f"].keys_at["e"] == ("n", 3, 3)  # where it was written
    assert data.anchored == {"c d"}
    text = "x: 1\ny: [0x1F, 1_000, 1:30, .5, 1.5e+3, yes, ~, 2024-01-01, '1', !!str 2, !!float 3]\n"
    values = [31, 1000, 90, 0.5, 1500.0, True, None, "2024-01-01", "1", "2", 3.0]
    assert marked_yaml.load(text, "n")["y"] == values
