"""The names of the package, and how plans and models show themselves."""

import ast
import base64
import functools
import html.parser
import importlib
import importlib.resources
import io
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from flax import nnx
from PIL import Image

import jaxup
from jaxup.depth.plan import Row
from jaxup.errors import UserError
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Decoder, abstract, init
from jaxup.model.spec import depth_params, flatten

ROOT = Path(jaxup.__file__).parent
CONFIG = ModelConfig.llama(
    vocab_size=41, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2, max_positions=32
)

initial = functools.cache(jax.jit(init, static_argnums=0))  # step by step it is many programs


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    jaxup.save(Decoder(CONFIG, initial(CONFIG, 0)), path)
    return path


def params(model):
    return flatten(model.params)


def assert_same(a, b):
    a, b = params(a), params(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path])


def refused(message, function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- the names


def test_a_type_checker_knows_the_names_that_there_are():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxup")
        for alias in node.names
    }
    assert sorted([*typed, "__version__"]) == sorted(jaxup.__all__) == dir(jaxup)
    for name, (module, attribute) in typed.items():
        assert getattr(jaxup, name) is getattr(importlib.import_module(module), attribute), name
    assert (importlib.resources.files("jaxup") / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'laod'; did you mean 'load'"):
        jaxup.laod  # noqa: B018


@pytest.mark.parametrize("before", ["", "import jaxup.generate; ", "jaxup.generate; import jaxup.generate; "])
def test_generate_is_the_function_whatever_is_imported(before):
    code = (
        f"import importlib, jaxup; {before}from jaxup import generate;"
        "assert callable(generate) and generate is jaxup.generate;"
        "assert importlib.import_module('jaxup.generate').main and generate is jaxup.generate;"
        "import jaxup.plan; assert jaxup.plan.main"
    )
    assert processes.run("-c", code).stderr == ""


# ---- from a recipe to a model


def test_a_plan_knows_where_its_models_are(directory, tmp_path):
    line = f"upscale({directory}, 1:3)"
    plan = jaxup.open_plan(line)
    assert plan == jaxup.upscale(str(directory), 3, range(1, 3))
    named = jaxup.open_plan("upscale(base, 1:3)", models={"base": str(directory)})
    assert named == plan
    (tmp_path / "plan.yaml").write_text(jaxup.upscale("base", 3, range(1, 3)).to_yaml())
    assert jaxup.open_plan(tmp_path / "plan.yaml", models={"base": str(directory)}) == plan
    two = jaxup.open_plan("concat(a, b)", models={"a": str(directory), "b": str(directory)})
    assert two.sources == ((str(directory), 3),)
    assert two.num_layers == 6

    model = jaxup.load(plan)
    assert_same(model, jaxup.load(directory, plan=plan))
    grown = jax.jit(jaxup.apply_plan, static_argnums=0)(plan, {str(directory): jaxup.load(directory).params})
    for path, leaf in flatten(grown).items():
        np.testing.assert_array_equal(leaf, params(model)[path])
    base = jaxup.load(directory)
    for sources in (base, {str(directory): base}):
        made = jax.jit(jaxup.apply_plan, static_argnums=0)(plan, sources)
        assert_same(made, model)
        assert (made.config, made.compute, made.origin) == (model.config, model.compute, model.origin)
    assert_same(base.with_params(made.params), made)
    assert jaxup.apply_plan(jaxup.drop(made, [0]), made).origin.plan == jaxup.drop(plan, [0])
    two = jaxup.concat(plan, jaxup.identity("b", 3))
    refused("apply: the plan has 2 sources; give a mapping", jaxup.apply_plan, two, base)
    refused("apply: some sources are models and some are params", jaxup.apply_plan, plan,
            {str(directory): base, "b": params(base)})  # fmt: skip
    for recipe, out in ((line, "line"), (plan, "plan"), (tmp_path / "plan.yaml", "file")):
        models = {"base": str(directory)} if out == "file" else None
        jaxup.build_model(recipe if out == "plan" else str(recipe), tmp_path / out, models=models)
        assert_same(jaxup.load(tmp_path / out), model)


def test_recipes_know_the_depth_of_a_model(directory):
    place, plan = str(directory), jaxup.open_plan(f"upscale({directory}, 1:3)")
    model = jaxup.load(directory)
    for source in (place, directory, model, f"identity({place})", jaxup.identity(place, 3)):
        for layers in ("1:3", slice(1, None), range(1, 3), ["1:3"], [slice(1, 3)]):
            assert jaxup.upscale(source, layers) == plan
    assert (
        jaxup.upscale(place, 3, "1:") == jaxup.upscale(place, copies=1, layers="1:3") == jaxup.open_plan(plan) == plan
    )
    assert len(plan) == plan.num_layers == 5
    assert jaxup.identity(place) == jaxup.identity(model) == jaxup.identity(place, 3)
    assert jaxup.stack(place, 2) == jaxup.stack(place, 3, 2) == jaxup.stack(place, 3, times=2)
    assert jaxup.inherit(directory, 2) == jaxup.inherit(place, layers=2) == jaxup.inherit(place, 3, 2)
    assert jaxup.inherit(place, 3, every=2) == jaxup.inherit(model, every=2)
    for made in (plan, f"upscale({place}, 1:3)"):
        assert jaxup.drop(made, 4) == jaxup.open_plan(f"drop(upscale({place}, 1:3), 4)")
    ends, each = depth_params(CONFIG)
    for source in (place, model, plan):  # as many layers as that allows, and the last of them
        depth = len(jaxup.identity(source))
        fewer = jaxup.drop(source, params=ends + 2.5 * each)
        assert fewer == jaxup.drop(source, layers=2)
        assert fewer == jaxup.drop(source, range(1, depth - 1))
    assert jaxup.open_plan(f"drop(upscale({directory}, 1:3), params={ends + 2 * each})") == fewer
    refused(f"params=2e+09 are more than the {ends + 3 * each:,} of", jaxup.drop, place, params=2e9)
    refused(f"with a single layer '{place}' has {ends + each:,}", jaxup.drop, place, params=each)
    assert jaxup.drop(jaxup.load(plan), 4).sources == (("model", 5),)  # its layers, in no files
    assert jaxup.drop(Decoder(CONFIG, initial(CONFIG, 0)), 2) == jaxup.drop("model", 3, 2)
    with pytest.warns(UserWarning, match=r"^drop: \[0, 2\] is layers 0 and 2 only; a range is 0:2$"):
        assert len(jaxup.drop(place, [0, 2])) == 1
    assert jaxup.concat(place, model, plan) == jaxup.concat(*[jaxup.identity(place, 3)] * 2, plan)
    for function in (jaxup.drop, jaxup.stack):
        assert "directory, Hub id or URL" in function.__doc__


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda place: jaxup.inherit(place, 2), "inherit: '{}' has 3 layers, not 2; layers=2 says how many of them"),
        (lambda _: jaxup.upscale("base", "1:3"), "upscale: base is not at hand: no such directory"),
        (lambda _: jaxup.upscale("base", "1:3"), "; of a model that is not, give the number of layers after its name"),
        (lambda _: jaxup.upscale(3, "1:3"), "upscale: a model comes here, by its place, loaded or as a plan, not int"),
        (lambda place: jaxup.upscale(place, "19-40"),
            "upscale: '19-40' is no range of layers: layers 19 to 40 are written 19:41"),
        (lambda place: jaxup.upscale(place, "x"), "upscale: 'x' is no range of layers: one is written 8:24"),
        (lambda place: jaxup.upscale(place, slice(0, 3, 2)), "upscale: 0:3:2 has a step"),
        (lambda place: jaxup.upscale(jaxup.stack(place, 2), "5:8"), "upscale: 5:8 is too far: 'plan' has layers 0-5"),
        (lambda place: jaxup.load(f"upscale({place}, 1:3)"), "; a recipe is opened by jaxup.open_plan"),
        (lambda place: jaxup.open_plan(jaxup.identity(place, 4)), "plan: source '{}' has 4 layers here, but 3 in"),
    ],
)  # fmt: skip
def test_recipes_on_what_is_no_model(directory, call, message):
    refused(message.format(directory), call, str(directory))


def test_a_notebook_shows_the_line_of_the_caller_and_what_is_wrong():
    with pytest.raises(UserError) as error:
        jaxup.upscale("a", 4, "3:9")
    *lines, last = error.value._render_traceback_()
    assert lines[0].splitlines()[1].strip() == 'jaxup.upscale("a", 4, "3:9")'
    assert not [line for line in lines if f'File "{ROOT}/' in line]
    assert last == f"UserError: {error.value}"


def test_what_is_wrong_is_said_in_the_words_of_python(directory, tmp_path):
    message = "org/nope is not at hand: no such directory"
    refused(message, jaxup.open_plan, "identity(org/nope)")
    refused("; give its place with models: NAME=DIR", jaxup.open_plan, "identity(org/nope)")
    refused("models: b: the recipe has no such model", jaxup.open_plan, f"identity({directory})", models={"b": "x"})
    refused("recipe:1:1: unknown recipe 'upscal'; did you mean 'upscale'?", jaxup.open_plan, "upscal(m, 1:2)")
    refused("load: two plans", jaxup.load, jaxup.identity("m", 3), plan=jaxup.identity("m", 3))
    refused(f"plan: source {str(directory)!r} has 4 layers here, but 3 in", jaxup.build_model,
            jaxup.identity(str(directory), 4), tmp_path / "out")  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: passthrough\nchat_template: chatml\n"
        f"slices: [{{sources: [{{model: {directory}, layer_range: [0, 2]}}], note: 1}}]\n"
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        jaxup.open_plan(recipe)
    first, second = (str(warning.message) for warning in warned)
    assert "'note' means nothing to passthrough" in first
    assert second == "the plan does not hold what the recipe says of tokenizer and chat template"


def test_a_revision_goes_with_the_name_of_its_model():
    """Nothing is fetched here: what is not in the cache is named with its revision."""
    for use in (lambda: jaxup.load("org/nope@v2"), lambda: jaxup.load(jaxup.identity("org/nope@v2", 3))):
        refused("org/nope at v2: no such directory", use)
    plan = jaxup.identity("base", 3).renamed({"base": "org/nope@v2"})
    assert plan == jaxup.identity("org/nope@v2", 3)


# ---- how they show themselves


class Tags(html.parser.HTMLParser):
    """What a browser would make of a piece of HTML."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_plan_shows_its_strip_and_its_picture():
    tunguska = jaxup.upscale("org/Mistral-Small", 56, range(19, 41), copies=2)
    assert repr(tunguska) == f"<DepthPlan 56 -> 100 layers: {'=' * 41}{'z' * 44}{'=' * 15}>"
    assert str(tunguska) == tunguska.describe()
    assert repr(jaxup.stack("m", 80, 5)) == f"<DepthPlan 80 -> 400 layers: {'=' * 58}...{'X' * 58}>"
    assert repr(jaxup.concat(jaxup.identity("a", 2), jaxup.identity("b", 1))) == "<DepthPlan 2 + 1 -> 3 layers: ===>"
    drawn = tunguska._repr_png_()
    assert Image.open(io.BytesIO(drawn)).format == "PNG"
    shown = Tags(tunguska._repr_html_())
    assert [tag for tag, _ in shown.seen] == ["img", "details", "summary", "pre"]
    image = shown.seen[0][1]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == drawn
    assert image["alt"] == repr(tunguska)
    assert shown.text == f"in words{tunguska.describe()}"


def test_names_are_not_trusted_with_a_page():
    name = "</pre><script>alert('\"')</script>&amp;"
    plan = jaxup.identity(name, 2)
    assert name not in repr(plan)
    shown = Tags(plan._repr_html_())
    assert [tag for tag, _ in shown.seen] == ["img", "details", "summary", "pre"]
    assert shown.text.endswith(plan.describe())
    many = jaxup.DepthPlan((Row(name, 0),), *[name] * 4, ((name, 1), *((str(i), 1) for i in range(5000))))
    assert many._repr_png_() is None  # which has a picture of nothing
    assert [tag for tag, _ in Tags(many._repr_html_()).seen] == ["pre"]
    assert len(repr(many)) < 120


def test_a_decoder_shows_its_sizes_and_its_plan(directory):
    plan = jaxup.upscale(str(directory), 3, range(1, 3))
    model = jaxup.load(plan, dtype="bfloat16")
    count = sum(leaf.size for leaf in params(model).values())
    assert repr(model) == (
        f"<Decoder 5 layers of 16, 4/2 heads, 41 tokens: {count:,} parameters, {2 * count / 1000:.2f} KB in bfloat16, "
        f"by {plan!r}>"
    )
    graph, shapes = abstract(CONFIG)  # without values
    assert re.fullmatch(r"<Decoder 3 layers .* in float32>", repr(nnx.merge(graph, shapes)))
    seen = []
    jax.jit(lambda model, tokens: seen.append(repr(model)) or model(tokens))(model, jnp.zeros((1, 2), jnp.int32))
    assert seen[0].startswith("<Decoder 5 layers")
