"""Plans, recipes and apply, against a naive implementation that loops over rows."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxup.depth.apply import apply
from jaxup.depth.compose import compose
from jaxup.depth.plan import ALL_PARTS, ENDS, PARTS, DepthPlan, Row
from jaxup.depth.recipes import identity, inherit
from jaxup.errors import UserError
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import abstract
from jaxup.model.spec import PART_OF

PATHS = (
    ("input_layernorm", "scale"), ("self_attn", "q_proj", "kernel"), ("self_attn", "o_proj", "kernel"),
    ("self_attn", "o_proj", "bias"), ("mlp", "up_proj", "kernel"), ("mlp", "down_proj", "kernel"),
    ("post_attention_layernorm", "scale"),
)  # fmt: skip
ZERO = (("o_proj", 0.0), ("down_proj", 0.0))


def tree(num_layers, dtype=np.float32, seed=0, width=3):
    rng = np.random.default_rng(seed)
    params = {"blocks": {}, "norm": {"scale": rng.normal(size=width).astype(dtype)}}
    params["embed_tokens"] = rng.normal(size=(5, width)).astype(dtype)
    params["embed_positions"] = rng.normal(size=(4, width)).astype(dtype)
    params["lm_head"] = {"kernel": rng.normal(size=(width, 5)).astype(dtype)}
    for path in PATHS:
        node = params["blocks"]
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = rng.normal(size=(num_layers, width, *[2] * (path[-1] == "kernel"))).astype(dtype)
    return params


def at(params, path):
    for key in path:
        params = params[key]
    return params


def naive(plan, sources, init):
    """What `apply` should do, one layer of one leaf at a time."""
    out = {}
    for path in PATHS:
        layers = []
        for i, row in enumerate(plan.rows):
            inherited = PART_OF[".".join(("blocks", *path))] in row.parts
            value = at(sources[row.source] if inherited else init, ("blocks", *path))[row.layer if inherited else i]
            for name, scale in row.scales:
                if name in ".".join(path):
                    value = scaled(value, scale)
                    break
            layers.append(value)
        out[("blocks", *path)] = np.stack(layers)
    for end in ENDS:
        name = getattr(plan, end)
        value = (init if name is None else sources[name])[end]
        for key, leaf in value.items() if isinstance(value, dict) else [(None, value)]:
            path = (end, key) if key else (end,)
            scales = [scale for name, scale in plan.scales if name in ".".join(path)]
            out[path] = scaled(leaf, scales[0]) if scales else leaf
    return out


def scaled(value, factors):
    for factor in factors if isinstance(factors, tuple) else (factors,):
        if factor == 0:
            return np.zeros_like(value)
        if factor != 1:
            value = (value.astype(np.float32) * np.float32(factor)).astype(value.dtype)
    return value


def assert_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


names = st.text(min_size=1, max_size=8) | st.sampled_from(["model", "null", "12", "yes", "a: b", "#", "0x1", "é\n"])
filters = st.sampled_from(["o_proj", "down_proj", "kernel", "bias", "mlp.", "", "self_attn", "nothing"])
values = st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.7, 1e-3, (0.7, -1.3)]) | st.floats(0.01, 4) | st.floats(-4, -0.01)


@st.composite
def plans(draw, names=names, filters=filters, values=values, max_rows=8, sources=None, whole=False):
    sources = sources or draw(st.dictionaries(names, st.integers(1, 6), min_size=1, max_size=3))
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        source = draw(st.sampled_from(sorted(sources)))
        parts = PARTS if whole else draw(st.sampled_from([PARTS, PARTS, (), ("mlp",), ("norms", "attention")]))
        role = draw(st.sampled_from(["original", "copy"])) if parts else "new"
        scales = tuple(draw(st.dictionaries(filters, values, max_size=3)).items())
        first = draw(st.integers(0, sources[source] - 1))
        stop = draw(st.integers(first + 1, sources[source]))
        rows += [Row(source, layer, role, scales, parts) for layer in range(first, stop)]
    ends = {end: draw(st.sampled_from(sorted(sources)) if whole else st.none() | st.sampled_from(sorted(sources)))
            for end in ENDS}  # fmt: skip
    of_ends = st.sampled_from(["embed", "norm", "lm_head", "embed_tokens", "", "kernel"])
    scales = tuple(draw(st.dictionaries(of_ends, values, max_size=2)).items())
    return DepthPlan(tuple(rows), **ends, sources=tuple(sources.items()), scales=scales)


compiled_apply = jax.jit(apply, static_argnums=0)  # else each operation is a program of its own


@settings(max_examples=8)
@given(plans(st.sampled_from("abc"), max_rows=3), st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]))
def test_apply_is_a_loop_over_rows(plan, dtype):
    sources = {name: tree(n, dtype, seed) for seed, (name, n) in enumerate(plan.sources)}
    fresh = tree(plan.num_layers, dtype, 99)
    got, want = compiled_apply(plan, sources, fresh), naive(plan, sources, fresh)
    assert len(jax.tree.leaves(got)) == len(want)
    for path, value in want.items():
        assert_bits(at(got, path), value)


finite = st.floats(allow_nan=False, allow_infinity=False)
chains = finite | st.lists(finite, min_size=1, max_size=3).map(tuple)
dtypes = st.sampled_from([None, "float32", "bfloat16", "float16"])


@settings(max_examples=60)
@given(plans(filters=st.text(max_size=5) | filters, values=chains), st.floats(0, 1), dtypes, dtypes)
def test_yaml_round_trip(plan, noise, dtype, out_dtype):
    rows = (row if row.scales or row.layer % 2 else dataclasses.replace(row, noise=noise) for row in plan.rows)
    plan = dataclasses.replace(plan, rows=tuple(rows), dtype=dtype, out_dtype=out_dtype)
    again = DepthPlan.from_yaml(plan.to_yaml())
    assert again == plan
    assert hash(again) == hash(plan)
    assert len(plan.strip()) == plan.num_layers
    assert plan.strip() in str(plan)


UPSCALE = DepthPlan(
    (*[Row("base", i) for i in range(4)], *[Row("base", i, "copy", ZERO) for i in (2, 3)], Row("base", 4)),
    "base", None, "base", "base", (("base", 6),),
)  # fmt: skip


def test_yaml_is_what_a_person_would_write():
    assert UPSCALE.to_yaml() == (
        "# A depth plan. Ranges of layers are half open: [0, 6] is layers 0 to 5.\n"
        "sources: {base: 6}\n"
        "rows:\n"
        "- source: base\n"
        "  layers: [0, 4]\n"
        "- source: base\n"
        "  layers: [2, 4]\n"
        "  role: copy\n"
        "  scales: {o_proj: 0.0, down_proj: 0.0}\n"
        "- source: base\n"
        "  layers: [4, 5]\n"
        "embed_tokens: base\n"
        "embed_positions: null\n"
        "norm: base\n"
        "lm_head: base\n"
    )
    by_hand = UPSCALE.to_yaml().replace("[4, 5]", "4").replace("down_proj: 0.0", "down_proj: 0e0")
    assert DepthPlan.from_yaml(by_hand) == UPSCALE
    rows = (Row("m", 0, noise=0.25), Row("m", 1, "copy", (("mlp", (0.5, 0.1)), ("q_proj", 2.0))))
    ends = {"scales": (("norm", 0.5),), "dtype": "float32", "out_dtype": "bfloat16"}
    assert DepthPlan(rows, *["m"] * 4, (("m", 2),), **ends).to_yaml().split("rows:\n")[1] == (
        "- source: m\n"
        "  layers: [0, 1]\n"
        "  noise: 0.25\n"
        "- source: m\n"
        "  layers: [1, 2]\n"
        "  role: copy\n"
        "  scales:\n"
        "    mlp: [0.5, 0.1]\n"
        "    q_proj: 2.0\n"
        "embed_tokens: m\n"
        "embed_positions: m\n"
        "norm: m\n"
        "lm_head: m\n"
        "scales: {norm: 0.5}\n"
        "dtype: float32\n"
        "out_dtype: bfloat16\n"
    )


def test_describe():
    assert str(UPSCALE) == UPSCALE.describe()
    assert UPSCALE.describe() == (
        "7 layers from 'base' (6)\n"
        "====zz=\n"
        "= original  z zeroed copy\n"
        "  result  layers  role      scales\n"
        "  0-3     0-3     original\n"
        "  4-5     2-3     copy      o_proj x 0, down_proj x 0\n"
        "  6       4       original\n"
        "embed_tokens, norm, lm_head: from 'base'\n"
        "embed_positions: newly initialised\n"
        "2 of 7 layers add nothing to the residual stream as they are\n"
        "source layer 5 is never used\n"
        "source layers 2-3 are used 2 times\n"
        "the order goes back in the source: 3 -> 2 at layer 4"
    )
    rows = (Row("a", 0, "copy"), Row("a", 0, "new", parts=()), Row("a", 0, "copy", parts=("mlp",)))
    assert DepthPlan(rows, *["a"] * 4, (("a", 1),)).strip() == "Xnp"
    assert not Row("a", 0, "copy", (("o_proj", 0.0),)).zeroed  # the mlp still speaks


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[2, 4]", "[6, 4]", "plan:7:11: layers [6, 4] is empty: ranges are half open"),
        ("[2, 4]", "[2, 2]", "did you mean [2, 3]?"),
        ("[2, 4]", "[2, 999999999999]", "plan:7:11: layers [2, 999999999999] of 'base', which has 6 layers"),
        ("[2, 4]", "[-1, 4]", "plan:7:11: layers [-1, 4] of 'base'"),
        ("[2, 4]", "[a, 4]", "plan:7:11: layers must be [first, last + 1], not ['a', 4]"),
        ("[2, 4]", "[2, 3.0]", "plan:7:11: layers must be"),
        ("[2, 4]", "[2, " + "9" * 5000 + "]", "plan:7:15: a number of 5000 characters"),
        ("role:", "rloe:", "plan:8:3: unknown key 'rloe'; did you mean 'role'?"),
        ("role: copy", "role: cpoy", "plan:6:3: unknown role 'cpoy'; did you mean 'copy'?"),
        ("role: copy", "role: [copy]", "must be text"),
        ("role: copy", "parts: [mpl]", "did you mean 'mlp'?"),
        ("role: copy", "parts: mlp", "plan:8:10: parts must be a list"),
        ("role: copy", "layers: [2, 4]", "plan:8:3: 'layers' is given twice; first in line 7"),
        ("role: copy", "role: new", "plan:6:3: a layer of role 'new' inherits nothing"),
        ("role: copy", "noise: 2", "plan:6:3: noise=2.0 is not a share"),
        ("role: copy", "noise: much", "plan:8:10: noise must be a number"),
        ("role: copy", "noise: 0.5", "plan:6:3: a layer has scales or noise"),
        ("o_proj: 0.0", "o_proj: yes", "plan:9:20: a scale must be a number, not true"),
        ("o_proj: 0.0", "o_proj: .nan", "plan:9:20: a scale must be a finite number"),
        ("o_proj: 0.0", "o_proj: [0.5, [1]]", "plan:9:26: a scale must be a number, not [1]"),
        ("o_proj: 0.0", "o_proj: []", "plan:9:20: a scale must be a number, not []"),
        ("o_proj: 0.0", "3: 0.0", "plan:9:12: a scale's filter must be text, not 3"),
        ("{o_proj: 0.0, down_proj: 0.0}", "0", "plan:9:11: scales must be a mapping"),
        ("- source: base", "- source: bse", "plan:4:11: unknown source 'bse'; did you mean 'base'?"),
        ("base: 6", "base: six", "plan:2:11: sources are NAME: NUMBER OF LAYERS, not 'base': 'six'"),
        ("base: 6", "base: 0", "cannot have 0 layers"),
        ("base: 6", "base: 2024-13-45", "plan:2:11: sources are NAME: NUMBER OF LAYERS, not 'base': '2024-13-45'"),
        ("{base: 6}", "6", "plan:2:10: sources must be a mapping"),
        ("[4, 5]", "[4, 6]\ndtype: bf16", "plan:12:8: unknown dtype 'bf16'; did you mean 'bfloat16'?"),
        ("[4, 5]", "[4, 6]\nscales: {norm: x}", "plan:12:16: a scale must be a number"),
        ("norm: base\n", "", "plan:2:1: 'norm' is missing"),
        ("norm: base", "norm: bse", "plan:14:7: norm must be a source's name or null, not 'bse'; did you mean 'base'?"),
        ("norm: base", "norm: 3", "norm must be a source"),
        ("norm: base", "norm: {", "<stream end>' (while parsing a flow mapping from line 14)"),
        ("norm: base", "norm: !!python/object:os.system x", "plan:14:7: the tag"),
        ("norm: base", "norm: " + "[" * 5000, "plan:14:56: nested more than 50 deep"),
    ],
)
def test_yaml_refusals(old, new, message):
    text = UPSCALE.to_yaml()
    assert old in text
    refused(message, DepthPlan.from_yaml, text.replace(old, new))
    refused(message.replace("plan:", "dir/p.yaml:"), DepthPlan.from_yaml, text.replace(old, new), "dir/p.yaml")


def test_yaml_of_too_many_layers():
    text = UPSCALE.to_yaml().replace("base: 6", "base: 999999999999").replace("[4, 5]", "[4, 999999999999]")
    refused("plan:11:11: with layers [4, 999999999999] the plan has more than 10000 layers", DepthPlan.from_yaml, text)


@pytest.mark.parametrize("text", ["", "[]", "rows", "null", "\x00", "a: &a [*a]"])
def test_not_a_plan(text):
    refused("plan:1:", DepthPlan.from_yaml, text)


def refused(message, function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_plan_refusals():
    make = partial(DepthPlan, embed_tokens="m", embed_positions="m", norm="m", lm_head="m", sources=(("m", 12),))
    message = "plan: row 1 takes layer 12 of 'm', which has layers 0-11"
    refused(message, make, (Row("m", 0), Row("m", 12)))
    refused("layer -1", make, (Row("m", -1),))
    refused("unknown source 'n'", make, (Row("n", 0),))
    refused("no rows", make, ())
    refused("given twice", Row, "m", 0, "copy", (("a", 0.0), ("a", 1.0)))
    refused("same name", DepthPlan, (Row("m", 0),), *["m"] * 4, (("m", 1), ("m", 2)))


def test_inherit_layers():
    layers = lambda *args, **kwargs: [row.layer for row in inherit("m", 12, *args, **kwargs).rows]  # noqa: E731
    assert layers(3) == [0, 1, 2]
    assert layers(3, which="last") == [9, 10, 11]
    assert layers([4, 2, 11]) == [4, 2, 11]
    assert layers(4, every=3) == layers(every=3) == [0, 3, 6, 9]
    assert layers(2, every=3, which="last") == [8, 11]
    assert [layers(n, which="middle") for n in (2, 3, 12)] == [[5, 6], [4, 5, 6], [*range(12)]]
    assert layers(2, every=3, which="middle") == [3, 6]
    assert layers(range(2, 9), every=3) == [2, 5, 8]
    assert layers([7, range(2, 5)]) == [7, 2, 3, 4]
    assert layers(range(0, 12, 5)) == [0, 5, 10]
    assert inherit("m", 12, 12) == inherit("m", 12) == identity("m", 12)
    assert inherit("m", 3, [0, 0, 1]).strip() == "=X="
    plan = inherit("m", 12, 2, parts=("mlp", "norm"))
    assert plan.strip() == "pp"
    assert plan.rows[0].parts == ("mlp",)
    assert [getattr(plan, end) for end in ENDS] == [None, None, "m", None]
    assert inherit("m", 12, 2, parts=ENDS).strip() == "nn"


def test_inherit_refusals():
    refused("inherit: 14 layers asked of 'reference', which has 12", inherit, "reference", 12, 14)
    refused("inherit: 5 layers asked of 'm', which has 12, 4 of them with every=3", inherit, "m", 12, 5, every=3)
    refused("every=0", inherit, "m", 12, 5, every=0)
    refused("did you mean 3:4?", inherit, "m", 12, range(3, 3))
    refused("at least one", inherit, "m", 12, 0)
    refused("did you mean 'attention'?", inherit, "m", 12, 2, parts=("atention",))
    refused("layer -1", inherit, "m", 12, [0, -1])
    refused("layer 12", inherit, "m", 12, [12])
    refused("empty", inherit, "m", 12, [])
    refused("which", inherit, "m", 12, 2, which="centre")
    refused("which", inherit, "m", 12, [2], which="last")
    refused("which", inherit, "m", 12, [2], which="middle")


def test_apply_refusals():
    plan, params = identity("m", 3), tree(3)
    refused("did you mean 'model1'?", apply, identity("model2", 3), {"model1": params})
    refused("of 'm' has 4 layers, but the plan says 3", apply, plan, {"m": tree(4)})
    refused("of init has 2 layers, but the plan says 3", apply, plan, {"m": params}, tree(2))
    message = "apply: blocks.input_layernorm.scale has shape [3, 3] in 'm' and [3, 4] in init"
    refused(message, apply, plan, {"m": params}, tree(3, width=4))
    refused("no init is given", apply, inherit("m", 3, 2, parts=("mlp", *ENDS)), {"m": params})
    refused("embed_tokens is to be newly initialised", apply, inherit("m", 3, 2, parts=PARTS), {"m": params})
    tied = {key: value for key, value in params.items() if key != "lm_head"}
    refused("lm_head is in init only", apply, plan, {"m": tied}, params)
    two = DepthPlan((Row("a", 0),), "a", "a", "a", "b", (("a", 3), ("b", 3)))
    assert_bits(apply(two, {"a": params, "b": tied})["lm_head"]["kernel"], np.ascontiguousarray(tied["embed_tokens"].T))
    assert "lm_head" in apply(two, {"a": tied, "b": params})
    refused("in 'a' and", apply, two, {"a": params, "b": tree(3, width=4)})
    refused("knows nothing", apply, plan, {"m": params | {"adapter": np.ones(2)}})


def test_scales_touch_only_what_they_must():
    odd = np.array([[-1.0, np.inf, np.nan], [1e-45, -0.0, np.nan]], np.float32)
    params = tree(2)
    params["blocks"]["self_attn"]["o_proj"]["bias"] = odd
    plan = DepthPlan((Row("m", 0, "copy", ZERO), Row("m", 1)), *["m"] * 4, (("m", 2),))
    got = apply(plan, {"m": params})["blocks"]["self_attn"]["o_proj"]["bias"]
    assert_bits(got, np.stack([np.zeros(3, np.float32), odd[1]]))


def test_mixed_dtypes_round_nothing_inherited():
    two = DepthPlan((Row("a", 0), Row("b", 0), Row("b", 1, "new", parts=())), *"abab", (("a", 2), ("b", 2)))
    a, b = tree(2, jnp.bfloat16), tree(2, jnp.float32)
    leaf = apply(two, {"a": a, "b": b}, tree(3))["blocks"]["mlp"]["up_proj"]["kernel"]
    assert leaf.dtype == jnp.float32
    only = apply(inherit("a", 2, 2, parts=("mlp", *ENDS)), {"a": a}, tree(2))
    assert only["blocks"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16


def test_transforms():
    params, plan = tree(6), UPSCALE
    fresh = tree(7, seed=1)
    eager = apply(plan, {"base": params}, fresh)
    jax.tree.map(assert_bits, eager, compiled_apply(plan, {"base": params}, fresh))
    shapes = jax.eval_shape(partial(apply, plan), {"base": params}, fresh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), eager)
    batch = jax.tree.map(lambda x: np.stack([x, 2 * x]), {"base": params})
    mapped = jax.jit(jax.vmap(partial(apply, plan), in_axes=(0, None)))(batch, fresh)
    jax.tree.map(lambda x, y: assert_bits(x[0], y), mapped["blocks"], eager["blocks"])

    # A layer used twice gets the gradients of both uses, one used as a zeroed copy only of one.
    loss = lambda params: sum(jnp.sum(x) for x in jax.tree.leaves(apply(plan, {"base": params}, fresh)["blocks"]))  # noqa: E731
    blocks = jax.jit(jax.grad(loss))(params)["blocks"]
    np.testing.assert_array_equal(blocks["mlp"]["up_proj"]["kernel"][:, 0, 0], [1, 1, 2, 2, 1, 0])
    np.testing.assert_array_equal(blocks["mlp"]["down_proj"]["kernel"][:, 0, 0], [1, 1, 1, 1, 1, 0])


def test_optimizer_state():
    params = jax.tree.map(jnp.asarray, tree(3))
    adam = optax.adam(1e-3)
    _, state = jax.jit(lambda params: adam.update(params, adam.init(params), params))(params)
    mu = apply(inherit("m", 3, 2), {"m": state[0].mu})
    jax.tree.map(assert_bits, mu["blocks"], jax.tree.map(lambda x: x[:2], state[0].mu["blocks"]))


def config(num_layers, kind):
    if kind == "gpt2":
        return ModelConfig.gpt2(
            vocab_size=17, hidden_size=8, num_layers=num_layers, num_heads=2, max_positions=8, bias=True
        )
    return ModelConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_layers=num_layers, num_heads=2, num_kv_heads=1,
        head_dim=4, max_positions=8, norm="rmsnorm", norm_eps=1e-6, positions="rope", rope_theta=1e4,
        activation="silu", gated_mlp=True, tie_embeddings=False, init_std=0.5,
    )  # fmt: skip


def drawn(num_layers, kind, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract(config(num_layers, kind))[1]
    )


def run(params, num_layers, kind):
    model = nnx.merge(abstract(config(num_layers, kind))[0], params)
    with jax.numpy_rank_promotion("allow"):  # what is tested here is the plan, not the model's code
        return nnx.jit(lambda model, tokens: model(tokens))(model, jnp.arange(8, dtype=jnp.int32)[None])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_zeroed_copies_leave_the_function_unchanged(kind):
    params = drawn(4, kind)
    rows = [*[Row("m", i) for i in range(3)], *[Row("m", i, "copy", ZERO) for i in (1, 2, 1)], Row("m", 3)]
    plan = DepthPlan(tuple(rows), *["m"] * 4, (("m", 4),))
    assert plan.strip() == "===zzz="
    np.testing.assert_allclose(
        run(compiled_apply(plan, {"m": params}), 7, kind), run(params, 4, kind), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_inherited_layers_are_the_truncated_model(kind):
    params = drawn(4, kind)
    small = compiled_apply(inherit("m", 4, 2), {"m": params})
    truncated = params | {"blocks": jax.tree.map(lambda x: x[:2], params["blocks"])}
    np.testing.assert_array_equal(run(small, 2, kind), run(truncated, 2, kind))
    # The inherited parts come from the reference, the others from what is fresh.
    fresh = drawn(2, kind, 1)
    part = compiled_apply(inherit("m", 4, 2, parts=("attention", "embed_tokens")), {"m": params}, fresh)
    assert jax.tree.structure(part) == jax.tree.structure(fresh)
    jax.tree.map(assert_bits, part["blocks"]["self_attn"], truncated["blocks"]["self_attn"])
    jax.tree.map(assert_bits, part["blocks"]["mlp"], fresh["blocks"]["mlp"])
    jax.tree.map(assert_bits, part["norm"], fresh["norm"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharding_is_kept(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    params, fresh = tree(6, width=8), tree(7, seed=1, width=8)
    want = apply(UPSCALE, {"base": params}, fresh)

    def spec(a):
        return NamedSharding(mesh, PartitionSpec(None, "x", "y") if a.ndim == 3 else PartitionSpec())

    put = lambda tree: jax.tree.map(lambda a: jax.device_put(a, spec(a)), tree)  # noqa: E731
    for function in (apply, compiled_apply):
        got = function(UPSCALE, {"base": put(params)}, put(fresh))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_bits(a, b)
            assert a.sharding.is_equivalent_to(spec(a), a.ndim), (a.shape, a.sharding)


def test_plans_need_no_jax():
    code = "import sys, jaxup.depth.recipes as r; r.identity('m', 2).to_yaml(); assert 'jax' not in sys.modules"
    processes.run("-c", code)
    assert set(ALL_PARTS) == {*PARTS, *ENDS}


@settings(max_examples=60)
@given(st.data())
def test_a_plan_on_the_result_of_a_plan_is_a_plan_on_the_originals(data):
    """Bit for bit in numpy's arithmetic: products rounded to bfloat16 twice are not rounded once."""
    inner = data.draw(plans(st.sampled_from("ab"), max_rows=3, whole=True))
    others = {"m": inner.num_layers} | ({"a": dict(inner.sources)["a"]} if "a" in dict(inner.sources) else {})
    outer = data.draw(plans(sources=others, max_rows=3, whole=True))
    originals = {name: tree(n, jnp.bfloat16, seed) for seed, (name, n) in enumerate(inner.sources)}
    assume(outer.embed_tokens == outer.lm_head)
    both = compose(outer, {"m": inner})
    middle = {"m": unflat(naive(inner, originals, None)), **originals}
    want, got = naive(outer, middle, None), naive(both, originals, None)
    assert want.keys() == got.keys()
    for path, value in want.items():
        # Zeroed and then scaled by a negative number is -0 one after the other, and 0 at once.
        assert got[path].dtype == value.dtype
        np.testing.assert_array_equal(got[path], value)
    assert DepthPlan.from_yaml(both.to_yaml()) == both


def test_compose_refusals():
    plan = UPSCALE
    on = partial(compose, inherit("m", 7, 3))
    refused("'m' has 6 layers, but the plan on it says 7", on, {"m": identity("base", 6)})
    assert on({"m": plan}).strip() == "==="
    assert compose(inherit("m", 7, 7), {"m": plan}) == plan
    fresh = inherit("base", 6, 7 * [1], parts=("mlp", *ENDS))
    twice = DepthPlan((Row("m", 3), Row("m", 3, "copy")), *["m"] * 4, (("m", 7),))
    refused("layer 3 of 'm' is newly initialised, and used several times", compose, twice, {"m": fresh})
    assert on({"m": fresh}).strip() == "ppp"
    head = DepthPlan((Row("m", 0),), "n", "n", "n", "m", (("m", 7), ("n", 2)))
    refused("the head of 'm'", compose, head, {"m": dataclasses.replace(plan, scales=(("lm_head", 2.0),))})
    other = dataclasses.replace(identity("base", 7), sources=(("base", 7),))
    refused(
        "'base' has 6 layers in one plan and 7",
        compose,
        dataclasses.replace(other, sources=(("m", 7), ("base", 7))),
        {"m": plan},
    )
    noisy = DepthPlan((Row("base", 0, noise=0.5),) * 7, *["base"] * 4, (("base", 6),))
    refused("layer 0 has noise", compose, dataclasses.replace(twice, rows=(Row("m", 3, "copy", ZERO),)), {"m": noisy})
    half = dataclasses.replace(plan, dtype="float16")
    assert on({"m": half}).dtype == "float16"
    refused("no single plan rounds", compose, dataclasses.replace(inherit("m", 7, 3), dtype="bfloat16"), {"m": half})
    assert compose(dataclasses.replace(inherit("m", 7, 3), out_dtype="bfloat16"), {"m": half}).out_dtype == "bfloat16"


def unflat(leaves):
    params = {}
    for path, leaf in leaves.items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params
