"""`jaxup.plan` and the opening of recipes: what is said, what is refused, and what is written."""

import json
import os
import sys

import processes
import pytest

from jaxup import plan as entry
from jaxup.depth import recipes
from jaxup.depth.plan import DepthPlan, Row
from jaxup.errors import UserError
from jaxup.files.names import split_revision
from jaxup.recipes import open as hub_recipe
from jaxup.recipes.open import open_recipe

MISTRAL = {  # Mistral-Small-Instruct-2409
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_hidden_layers": 56, "hidden_size": 6144,
    "intermediate_size": 16384, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 32768, "rope_theta": 1e6, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

TUNGUSKA = """
merge_method: passthrough
slices:
- sources: [{model: org/Mistral-Small, layer_range: [0, 41]}]
- &zeroed
  sources:
  - layer_range: [19, 41]
    model: org/Mistral-Small
    parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]}
- *zeroed
- sources: [{model: org/Mistral-Small, layer_range: [41, 55]}]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, a model in it: `mistral`."""
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "mistral")
    return tmp_path


def model(path, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MISTRAL | changes))
    return str(path)


def say(capsys, *args):
    entry.main(["plan", *args])
    return capsys.readouterr().out


def refused(message, function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- opening


def test_the_three_forms_of_a_recipe(here):
    line = open_recipe("upscale(inherit(mistral, 55), 19:41, copies=2)")
    (here / "merge.yaml").write_text(TUNGUSKA)
    merge = open_recipe("merge.yaml", models={"org/Mistral-Small": "mistral"})
    (here / "plan.yaml").write_text(line.plan.to_yaml())
    plan = open_recipe("plan.yaml")
    assert line.plan == plan.plan
    assert [(row.layer, row.zeroed, row.role) for row in line.plan.rows] == [
        (row.layer, row.zeroed, row.role) for row in merge.plan.rows
    ]
    assert (line.base, plan.base, merge.base) == ("mistral", "mistral", "org/Mistral-Small")
    assert merge.models["org/Mistral-Small"] == line.models["mistral"]
    assert merge.models["org/Mistral-Small"].hf == MISTRAL
    assert (line.name, line.text) == ("upscale(inherit(mistral, 55), 19:41, copies=2)",) * 2
    assert (merge.name, merge.text, merge.notes) == ("merge.yaml", TUNGUSKA, ())
    assert merge.tokenizer is merge.chat_template is merge.pad_to_multiple_of is None


def test_every_parameter_has_the_name_of_its_tensor(here):
    names = hub_recipe.described(open_recipe("identity(mistral)").models["mistral"]).names
    assert names["blocks.mlp.down_proj.kernel"] == "model.layers.{layer}.mlp.down_proj.weight"
    assert names["norm.scale"] == "model.norm.weight"
    assert names["lm_head.kernel"] == "lm_head.weight"
    assert "blocks.self_attn.q_proj.bias" not in names
    tied = model(here / "tied", tie_word_embeddings=True)
    assert "lm_head.kernel" not in hub_recipe.described(open_recipe(f"identity({tied})").models[tied]).names


def test_places(here):
    assert open_recipe("identity(org/a)", models={"org/a": "mistral"}).models["org/a"].path == "mistral"
    # A revision in the recipe means nothing to a directory that stands for the model.
    for key in ("org/a", "org/a@v2"):
        assert open_recipe("identity(org/a@v2)", models={key: "mistral"}).models["org/a@v2"].revision is None
    model(here / "an@odd name")
    assert open_recipe("identity('./an@odd name')").models["./an@odd name"].path == "./an@odd name"
    stand_in = open_recipe("identity(org/a@v2)", config_from="mistral").models["org/a@v2"]
    assert (stand_in.stand_in, stand_in.path) == (True, "mistral")
    assert not open_recipe("identity(mistral)", config_from="nowhere").models["mistral"].stand_in
    refused("revision=v2: a revision goes with a hub id", open_recipe, "identity(mistral)", revision="v2")
    refused("--model b: the recipe has no such model", open_recipe, "identity(mistral)", models={"b": "mistral"})
    refused("is for 'org/b'", open_recipe, "identity(org/a)", models={"org/b": "mistral"})
    assert split_revision("org/a@v2") == ("org/a", "v2")
    assert split_revision("gs://bucket/a@v2") == ("gs://bucket/a@v2", None)


def test_what_is_no_recipe(here):
    refused("mistral: a directory, not a recipe; did you mean 'identity(mistral)'?", open_recipe, "mistral")
    refused("did you mean 'identity(\"a, b\")'?", open_recipe, model(here / "a, b").removeprefix(f"{here}/"))
    (here / "recipe.yaml").write_text(TUNGUSKA)
    refused("recpe.yaml: no such file; did you mean 'recipe.yaml'?", open_recipe, "recpe.yaml")
    refused("no such file; in one line a recipe is like", open_recipe, "nowhere/recipe.yaml")
    refused("the recipe is empty", open_recipe, "")
    refused("cannot be read", open_recipe, "a\0b")
    for content, message in (
        (b"\x89PNG\r\n", "x: not a text file (UTF-8): byte 0x89 at 0"),
        (b"rows: \0", "x: not a text file: a zero byte at 6"),
        (b"", "x:1:1: a recipe is a mapping with slices or rows, not nothing"),
        (b"- 3", "x:1:1: a recipe is a mapping"),
        (b"a: b", "x:1:1: neither a mergekit recipe (merge_method, slices) nor a plan (sources, rows)"),
        (b"merge_metod: passthrough", "unknown key 'merge_metod'; did you mean 'merge_method'?"),
        (b"a: [", "x:1:5: not YAML"),
        (b"rows: []", "'sources' is missing"),
        (b"x" * 3_000_000, "too many for a recipe"),
    ):
        (here / "x").write_bytes(content)
        refused(message, open_recipe, "x")
    os.mkfifo(here / "pipe")
    refused("pipe: not a regular file", open_recipe, "pipe")
    refused("; a model's recipe is 'identity(mistral)'", open_recipe, "mistral/config.json")
    refused("recipe:1:1: unknown recipe 'upscal'; did you mean 'upscale'?", open_recipe, "upscal(mistral, 1:2)")


def test_models_that_are_not_at_hand(here):
    hint = "give its place with --model NAME=DIR, or --config-from DIR to see the plan from a config.json alone"
    refused("org/nope is not at hand: no such directory", open_recipe, "identity(org/nope)")
    refused(hint, open_recipe, "identity(org/nope)")
    with pytest.raises(UserError) as error:
        open_recipe("identity(org/nope)", models={"org/b": "mistral"}, flag="--config.base.models=")
    assert error.value.what.endswith(" (what is given is for 'org/b')")
    assert error.value.hint == "give its place with --config.base.models=NAME=DIR"
    refused("./nope is not at hand: no such directory; ", open_recipe, "identity(./nope)")
    (here / "recipe.yaml").write_text(TUNGUSKA)
    refused("org/Mistral-Small is not at hand", open_recipe, "recipe.yaml")
    message = "recipe.yaml:4:21: --config-from nowhere: no such directory"
    refused(message, open_recipe, "recipe.yaml", config_from="./nowhere")
    # What is at hand and wrong is not called absent.
    (here / "empty").mkdir()
    refused("empty: no config.json; is it a model directory?", open_recipe, "identity(empty)")
    refused("model_type='nope' is not supported", open_recipe, f"identity({model(here / 'odd', model_type='nope')})")


def test_a_plan_for_another_depth_is_refused(here):
    (here / "plan.yaml").write_text(recipes.identity("mistral", 40).to_yaml())
    message = "plan.yaml:2:20: source 'mistral' has 40 layers here, but 56 in mistral: config.json"
    refused(message, open_recipe, "plan.yaml")


# ---- what is printed


def test_tunguska(here, capsys):
    (here / "tunguska.yaml").write_text(TUNGUSKA)
    text = say(capsys, "tunguska.yaml", "--config-from", "mistral")
    assert text.splitlines() == [
        "tunguska.yaml: 56 -> 99 layers",
        "",
        "99 layers from 'org/Mistral-Small' (56)",
        "=" * 41 + "z" * 44 + "=" * 14,
        "= original  z zeroed copy",
        "  result  layers  role      scales",
        "  0-40    0-40    original",
        "  41-62   19-40   copy      o_proj x 0, down_proj x 0",
        "  63-84   19-40   copy      o_proj x 0, down_proj x 0",
        "  85-98   41-54   original",
        "embed_tokens, embed_positions, norm, lm_head: from 'org/Mistral-Small'",
        "44 of 99 layers add nothing to the residual stream as they are",
        "source layer 55 is never used",
        "source layers 19-40 are used 3 times",
        "the order goes back in the source: 40 -> 19 at layer 41, 40 -> 19 at layer 63",
        "",
        # By hand: a block has 2 * 6144 * 128 * (48 + 8) + 3 * 6144 * 16384 + 2 * 6144 = 390,082,560 parameters;
        # embedding, head and norm have 2 * 32768 * 6144 + 6144.
        "org/Mistral-Small  56 layers  22,247,282,688 parameters  44.49 GB in bfloat16",
        "result             99 layers  39,020,832,768 parameters  78.04 GB in bfloat16",
        "",
        "'org/Mistral-Small' is not at hand: mistral's config.json stands in for its own",
        "config.json, tokenizer and other files: from 'org/Mistral-Small'",
    ]
    assert "156.08 GB in float32" in say(
        capsys, "tunguska.yaml", "--model", "org/Mistral-Small=mistral", "--dtype", "float32"
    )


def test_notes_come_with_their_places(here, capsys):
    (here / "recipe.yaml").write_text(TUNGUSKA.replace("[19, 41]", "[19, 19]"))
    args = ("recipe.yaml", "--config-from", "mistral")
    assert "\nnote: recipe.yaml:7:18: " in say(capsys, *args)
    note = "note: recipe:1:15: [8, 24] is layers 8 and 24 only; a range is 8:24"
    assert f"\n{note}\n" in say(capsys, "drop(mistral, [8, 24])")
    entry.main(["plan", *args, "--to-plan"])
    out, err = capsys.readouterr()
    assert err.startswith("jaxup: note: recipe.yaml:7:18: ")
    assert DepthPlan.from_yaml(out).num_layers == 55


def two(here, **changes):
    """A plan with layers of two models, the second's config changed."""
    model(here / "other", **changes)
    rows = (*[Row("mistral", i) for i in range(4)], *[Row("other", i) for i in range(2)])
    layers = changes.get("num_hidden_layers", 56)
    plan = DepthPlan(rows, "mistral", "mistral", "other", "other", (("mistral", 56), ("other", layers)))
    (here / "two.yaml").write_text(plan.to_yaml())


def test_models_that_differ(here, capsys):
    two(here, num_hidden_layers=40, eos_token_id=32000, max_position_embeddings=131072, torch_dtype="float32",
        tie_word_embeddings=True, transformers_version="5", initializer_range=0.02)  # fmt: skip
    text = say(capsys, "two.yaml")
    assert (
        text.splitlines()[-6:]
        == [
            "the head is the embedding of 'other', written as a head of its own",
            "config.json, tokenizer and other files: from 'mistral'",
            "the models differ: max_position_embeddings is 32768 in 'mistral', 131072 in 'other'; "
            "'mistral' is followed",
            "the models differ: dtype is 'bfloat16' in 'mistral', 'float32' in 'other'; tensors keep theirs",
            "the models differ: eos_token_id is 2 in 'mistral', 32000 in 'other'; 'mistral' is followed",
        ][-6:]
        or text.splitlines()[-5:]
    )
    block, matrix = 390_082_560, 32768 * 6144
    expected = 2 * (4 * block + matrix) + 4 * (2 * block + matrix + 6144)
    assert f"{expected / 1e9:.2f} GB in bfloat16 and float32" in text
    assert "source layers 4-55 of 'mistral' are never used" in text
    assert "the result has float16" in say(capsys, "two.yaml", "--dtype", "float16")


def test_models_that_do_not_go_together(here, capsys):
    """All of it is printed, and the first of it is the error."""
    two(here, hidden_size=5120, vocab_size=32770, rms_norm_eps=1e-6, rope_theta=1e4)
    refused("plan: vocab_size is 32768 in 'mistral' and 32770 in 'other'", entry.main, ["plan", "two.yaml"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the models do not go together")]
    assert [line.split(": ")[1].split(" is ")[0] for line in lines] == [
        "vocab_size", "hidden_size", "rms_norm_eps", "rope_theta"
    ]  # fmt: skip
    assert "hidden_size is 6144 in 'mistral', 5120 in 'other'" in lines[1]
    refused("vocab_size", entry.main, ["plan", "two.yaml", "--to-plan", "out.yaml"])
    assert not (here / "out.yaml").exists()


def test_another_tokenizer(here, capsys):
    model(here / "other", vocab_size=40000)
    recipe = """
merge_method: passthrough
tokenizer_source: union
slices:
- sources: [{model: mistral, layer_range: [0, 2]}]
- sources: [{model: other, layer_range: [2, 56]}]
"""
    (here / "recipe.yaml").write_text(recipe)
    text = say(capsys, "recipe.yaml")
    assert "tokenizer: the union of all models'; embedding and head get its rows" in text
    assert "do not go together" not in text
    assert "note: recipe.yaml: tokenizer_source needs the tokenizer of 'mistral', which has none; sizes are" in text
    text = say(capsys, "recipe.yaml", "--model", "mistral=org/far", "--config-from", "mistral")
    assert "the tokenizer of 'mistral', which is not at hand; sizes are those of 40,000 rows" in text


def test_color_is_for_terminals(here, capsys, monkeypatch):
    assert "\033" not in say(capsys, "expand(mistral, 4)")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = say(capsys, "expand(mistral, 4)")
    assert "\033[34m====\033[0m\033[35mz\033[0m" in text
    assert "\033[35mz\033[0m zeroed copy" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in say(capsys, "expand(mistral, 4)")


# ---- what is written


def test_conversions(here, capsys):
    line = "upscale(mistral, 19:41, copies=2)"
    plan = open_recipe(line).plan
    assert DepthPlan.from_yaml(say(capsys, line, "--to-plan")) == plan
    text = say(capsys, line, "--to-mergekit", "recipe.yaml", "--to-plan", "plan.yaml", "--png", "plan.png")
    assert text.endswith("wrote plan.png\nwrote recipe.yaml\nwrote plan.yaml\n")
    assert open_recipe("recipe.yaml").plan == plan
    assert open_recipe("plan.yaml").plan == plan
    assert (here / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(os.listdir(here)) == ["mistral", "plan.png", "plan.yaml", "recipe.yaml"]
    refused("cannot both be printed", say, capsys, line, "--to-plan", "--to-mergekit")


def test_nothing_is_overwritten_unasked(here, capsys):
    line = "identity(mistral)"
    say(capsys, line, "--png", "a.png")
    before = (here / "a.png").stat().st_mtime_ns
    say(capsys, line, "--png", "a.png")
    assert (here / "a.png").stat().st_mtime_ns != before
    (here / "recipe.yaml").write_text(TUNGUSKA)
    for flag in ("--png", "--to-plan", "--to-mergekit"):
        refused("recipe.yaml: exists already", say, capsys, line, flag, "recipe.yaml")
        refused("mistral: is a directory", say, capsys, line, flag, "mistral")
        refused("its directory does not exist", say, capsys, line, flag, "nowhere/x")
    assert (here / "recipe.yaml").read_text() == TUNGUSKA
    refused("a.png: exists already", say, capsys, line, "--to-plan", "a.png")
    refused("is to be written twice", say, capsys, line, "--to-plan", "b", "--png", "./b")
    refused("is not a regular file", say, capsys, line, "--png", "/dev/null", "--force")
    (here / "link.yaml").symlink_to("recipe.yaml")
    say(capsys, line, "--to-plan", "link.yaml", "--force")
    assert (here / "link.yaml").is_symlink()
    assert DepthPlan.from_yaml((here / "recipe.yaml").read_text()) == recipes.identity("mistral", 56)


def test_layers_that_move_under_attention_scaled_by_depth(here, capsys):
    gpt2 = {"model_type": "gpt2", "n_layer": 4, "n_embd": 8, "n_head": 2, "vocab_size": 9, "n_positions": 8}
    (here / "scaled").mkdir()
    (here / "scaled" / "config.json").write_text(json.dumps({**gpt2, "scale_attn_by_inverse_layer_idx": True}))
    refused("its layers divide by 1, 2, 2, 3, 4", say, capsys, "upscale(scaled, 1:2)")
    assert "result" in say(capsys, "inherit(scaled, 2)")


def test_flags(here, capsys):
    for pair in ("mistral", "=mistral", "a="):
        refused("must be NAME=DIR", say, capsys, "identity(a)", "--model", pair)
    refused("--model a: given twice", say, capsys, "identity(a)", "--model", "a=mistral", "--model", "a=b")
    assert "'a' is 'mistral'" in say(capsys, "identity(a)", "--model", "a=mistral")


def test_a_plan_is_shown_without_jax(here):
    """And the entry point itself is light: what is slow to import waits for a recipe."""
    code = (
        "import sys, jaxup.plan as p; light = {'numpy', 'yaml', 'PIL'} & set(sys.modules);"
        "p.main(['plan', 'expand(mistral, 4)', '--png', 'x.png']);"
        "assert not light and not {'jax', 'flax', 'transformers', 'matplotlib', 'rich', 'torch'} & set(sys.modules)"
    )
    processes.run("-c", code)
    result = processes.run("-m", "jaxup", "plan", "upscal(mistral, 1:2)", check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "jaxup: recipe:1:1: unknown recipe 'upscal'; did you mean 'upscale'?\n"
