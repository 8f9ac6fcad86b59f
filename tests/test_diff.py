"""Models compared tensor by tensor, against plain NumPy and SciPy in float64."""

import importlib
import json
import math
import os
import shutil
import warnings

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import scipy.spatial.distance
from hypothesis import Phase, given, settings
from test_build import cases, make, simple, weights

from jaxup.building.work import build
from jaxup.depth import picture
from jaxup.depth.plan import ZEROED
from jaxup.errors import UserError
from jaxup.lens.differences import Differences, diff
from jaxup.lens.metrics import METRICS
from jaxup.lens.page import page
from jaxup.lens.sides import Part
from jaxup.lens.streaming import Tensor, compared

command = importlib.import_module("jaxup.diff")  # the package has the function of that name
RNG = np.random.default_rng(0)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def part(array, turned=False):
    array = array.reshape(len(array), -1)
    return Part(*array.shape, turned, array.itemsize, lambda rows: array[rows])


def of_pair(a, b, rank=False):
    scaled = ((), None, None)
    tensors = {"it": Tensor((part(a), b if isinstance(b, Part) else part(b)), (scaled, scaled))}
    ((_, found),) = compared(tensors, [(0, 1)], rank=rank, remote=False, progress=False)
    return found[0, 1]


def plainly(a, b):
    """The metrics of two float arrays, of the values that are finite in both."""
    a, b = (array.astype(np.float64).reshape(-1) for array in (a, b))
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if not a.size:
        return dict.fromkeys(METRICS, math.nan)
    d = b - a
    norm = np.linalg.norm(d)
    return {
        "mean_abs": np.mean(abs(d)), "rms": np.sqrt(np.mean(d**2)), "largest": abs(d).max(),
        "changed": np.mean(a != b), "relative": 0.0 if not norm else norm / np.linalg.norm(a) if a.any() else math.inf,
        "cosine": 0.0 if not norm else scipy.spatial.distance.cosine(a, b) if a.any() and b.any() else math.nan,
    }  # fmt: skip


def pairs_of_arrays():
    x = RNG.normal(0, 0.02, (300, 257))
    y = x + RNG.normal(0, 1e-3, x.shape)
    some = RNG.random(x.shape)
    yield "near", x, y
    yield "far", x, RNG.normal(0, 3, x.shape)
    yield "same", x, x
    yield "zero", np.zeros_like(x), y
    yield "zeroed", x, np.zeros_like(x)
    yield "nothing", np.zeros_like(x), -np.zeros_like(x)
    yield "opposite", x, -x
    yield "scaled", x, 1.5 * x
    yield "few changed", x, np.where(some < 0.01, y, x)
    yield "half zero", np.where(some < 0.5, 0, x), np.where(some < 0.4, -0.0, y)
    yield "tiny beside huge", x, 1e-6 * x
    yield "denormal", 1e-40 * x / 0.02, 1e-40 * y / 0.02
    yield "huge", 1e37 * x / 0.02, -1e37 * y / 0.02
    yield "one layer is huge", np.where(some < 1e-4, 1e30, x), y
    yield "not finite", np.where(some < 1e-3, np.nan, x), np.where(some > 1 - 1e-3, np.inf, y)
    yield "a vector", x[0], y[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "a", "b"), [pytest.param(*case, id=case[0]) for case in pairs_of_arrays()])
def test_metrics_are_those_of_float64(name, a, b, dtype):
    with np.errstate(over="ignore"):
        a, b = a.astype(DTYPES[dtype]), b.astype(np.float32).astype(DTYPES[dtype])
    found, wanted = of_pair(a, b), plainly(a, b)
    assert found.metrics.keys() == set(METRICS)
    # Sums of float32 in runs of 8192: 1e-6 in each, at random, and here no more than ten runs. The distance by angle is
    # that of |d|^2 without what is due to the lengths, which may be nearly all of it.
    for metric in METRICS:
        least = 3e-6 * wanted["relative"] ** 2 if metric == "cosine" and np.isfinite(wanted["relative"]) else 1e-14
        assert found.metrics[metric] == pytest.approx(wanted[metric], rel=3e-6, abs=least, nan_ok=True), metric
    assert found.not_finite == tuple(int((~np.isfinite(x.astype(np.float32))).sum()) for x in (a, b))


def test_dtypes_and_layouts_may_differ():
    a, b = RNG.normal(0, 1, (70, 90)).astype(ml_dtypes.bfloat16), RNG.normal(0, 1, (70, 90)).astype(np.float16)
    wanted = plainly(a, b)
    for found in (of_pair(a, b), of_pair(a, part(np.ascontiguousarray(b.T), turned=True))):
        assert found.metrics == pytest.approx(wanted, rel=3e-6)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_the_rank_of_a_change(shape):
    a = RNG.normal(0, 1, shape).astype(np.float32)
    b = (a + RNG.normal(0, 1, (shape[0], 5)) @ RNG.normal(0, 1, (5, shape[1]))).astype(np.float32)
    for x, y in ((a, b), (a, np.zeros_like(a)), (a, a)):
        squares = np.linalg.svd(x.astype(np.float64) - y)[1] ** 2
        wanted = 1 + int(np.argmax(np.cumsum(squares) >= 0.9 * squares.sum())) if squares.any() else 0
        assert of_pair(x, y, rank=True).metrics["rank"] == wanted
    assert of_pair(a, np.where(a > 2, np.nan, b), rank=True).metrics["rank"] > 0


# ---- models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of four layers; what zeroed copies make of it, and that "healed"; another base; others that do not fit."""
    root = tmp_path_factory.mktemp("models")
    make(root / "base", layers=4, dtype="float32")
    plan = simple(4, [0, 1, 2, (1, ZEROED), (2, ZEROED), 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "png", lambda plan, title: b"")
        build(plan.renamed({"m": str(root / "base")}), root / "before")
    shutil.copytree(root / "before", root / "healed")
    (root / "healed" / "jaxup_manifest.json").unlink()
    tensors = {
        name: array + np.float32(0.5 if ".3." in name else 0.25) for name, array in weights(root / "before").items()
    }
    for file in (root / "healed").glob("*.safetensors"):
        file.unlink()
    (root / "healed" / "model.safetensors.index.json").unlink(missing_ok=True)
    safetensors.numpy.save_file(tensors, root / "healed" / "model.safetensors")
    make(root / "other", layers=4, seed=2, dtype="float32")
    make(root / "wide", layers=4, hidden_size=16, dtype="float32")
    make(root / "gpt2", "gpt2", layers=2)
    make(root / "gpt2b", "gpt2", layers=2, seed=3)
    return root


def test_layers_are_compared_with_those_they_were_made_from(models):
    found = diff(models / "base", models / "before", models / "healed")
    assert found.pairs == ((0, 1), (1, 2), (0, 2))
    assert "".join(origin.role for origin in found.origins) == "===zz="
    assert [origin.layer for origin in found.origins] == [0, 1, 2, 1, 2, 3]
    assert {origin.source for origin in found.origins} == {str(models / "base")}
    mean, silent = found.values["mean_abs"], [found.modules.index(name) for name in ("o_proj", "down_proj")]
    rest = [i for i in range(len(found.modules)) if i not in silent]
    assert found.modules == ("input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "post_attention_layernorm",
                             "gate_proj", "up_proj", "down_proj")  # fmt: skip
    assert (mean[0][:, rest] == 0).all()
    assert (found.values["relative"][0][:, silent] == [[0, 0]] * 3 + [[1, 1]] * 2 + [[0, 0]]).all()
    for pair in (1, 2):
        np.testing.assert_allclose(mean[pair][:, rest], [[0.5 if row == 3 else 0.25] * 7 for row in range(6)], 1e-6)
    assert np.isinf(found.values["relative"][1, 3:5, silent]).all()  # from zero
    assert list(found.ends["mean_abs"]) == ["embed_tokens", "norm", "lm_head"]
    np.testing.assert_allclose(found.ends["mean_abs"]["lm_head"], [0, 0.25, 0.25], 1e-6)
    built = diff(models / "base", models / "healed", as_built=True)
    np.testing.assert_array_equal(built.values["mean_abs"][0], mean[1])


def check_case(tmp_path_factory, case):
    """What a plan leaves as it is has not changed; as built, nothing has."""
    of, plan = case
    root = tmp_path_factory.mktemp("any")
    paths = {name: str(make(root / name, **about)) for name, about in of.items()}
    plan = plan.renamed(paths)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # of overflow
        patch.setattr(picture, "png", lambda plan, title: b"")
        patch.setattr(os, "fsync", lambda fd: None)
        build(plan, root / "out")
        sides = [*paths.values(), root / "out"]
        literal, built = (diff(*sides, plan=plan, as_built=as_built) for as_built in (False, True))
    for index, pair in enumerate(literal.pairs):
        if pair[1] != len(sides) - 1:
            continue
        name = sides[pair[0]]
        for row, made in enumerate(plan.rows):
            for column, module in enumerate(literal.modules):
                path = f"{module.removesuffix('.bias')}.{'bias' if module.endswith('.bias') else 'kernel'}"
                change, since = (d.values["changed"][index, row, column] for d in (literal, built))
                assert np.isnan(change) == (made.source != name)
                if made.source == name:
                    assert since == 0
                    if not made.scales and plan.dtype is plan.out_dtype is None:
                        assert change == 0, path
        for end, found in built.ends["changed"].items():
            assert found[index] == 0 or np.isnan(found[index]), end
    shutil.rmtree(root)


@settings(max_examples=4, phases=[Phase.generate])
@given(cases())
def test_what_a_plan_leaves_as_it_is_has_not_changed(tmp_path_factory, case):
    check_case(tmp_path_factory, case)


@pytest.mark.slow
@settings(max_examples=100)
@given(cases())
def test_what_many_plans_leave_as_it_is_has_not_changed(tmp_path_factory, case):
    check_case(tmp_path_factory, case)


def test_fused_tensors_are_compared_by_their_parts(models):
    found = diff(models / "gpt2", models / "gpt2b")
    assert found.modules[2:8] == ("q_proj", "q_proj.bias", "k_proj", "k_proj.bias", "v_proj", "v_proj.bias")
    a, b = weights(models / "gpt2"), weights(models / "gpt2b")
    for layer in range(2):
        for i, name in enumerate("qkv"):
            for leaf, column in (("weight", f"{name}_proj"), ("bias", f"{name}_proj.bias")):
                both = [
                    next(array for name, array in tensors.items() if name.endswith(f"h.{layer}.attn.c_attn.{leaf}"))
                    for tensors in (a, b)
                ]
                wanted = plainly(*(array[..., 8 * i : 8 * i + 8] for array in both))
                for metric in METRICS:
                    value = found.values[metric][0, layer, found.modules.index(column)]
                    assert value == pytest.approx(wanted[metric], rel=3e-6)


def test_a_run_is_compared_where_it_lies(finished):
    run = finished[0]
    found = diff(f"{run}@reference", f"{run}@target_2", run)
    assert len(found.origins) == 2  # the plan of the target
    changed = found.values["changed"][1]  # from the checkpoint to its export, which has biases as well
    assert found.modules[1] == "input_layernorm.bias"
    assert (changed[:, [not name.endswith(".bias") for name in found.modules]] == 0).all()
    assert "qkv_bias is False in " in "".join(found.notes)
    assert (found.values["relative"][0][:, 0] > 0).all()


def test_numbers_are_kept(models, tmp_path, capsys):
    out = tmp_path / "out"
    command.main(["diff", *(str(models / name) for name in ("base", "healed")), "--rank", f"--out={out}"])
    said = capsys.readouterr().out
    assert "4 original, 2 zeroed copy" in said
    assert "copies  ratio" in said
    assert "rank" in said
    text = (out / "differences.json").read_text()
    found = Differences.from_json(text)
    assert found.to_json() == text
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    for damaged in (text.replace('"role": "z"', '"role": ["z"]'), text.replace('"models": [', '"models": [0, ', 1)):
        with pytest.raises(
            UserError, match=r"^differences\.json: not what jaxup\.diff writes: (origins|models) must be"
        ):
            Differences.from_json(damaged)
    assert found.values.keys() == {*METRICS, "rank"}
    assert f"<pre>note: layers are compared by the plan of {models}/healed" in found._repr_html_()
    assert '<img alt="mean |difference|' in found._repr_html_()
    assert {path.name for path in out.iterdir()} == {"differences.json", "index.html", "mean_abs.png", "relative.png"}
    assert (out / "index.html").read_text() == page(found)
    with pytest.raises(UserError, match="exists already"):
        found.save(out)


def test_without_a_plan_the_weights_say_what_came_from_what(models, tmp_path):
    shutil.copytree(models / "before", tmp_path / "bare", ignore=shutil.ignore_patterns("jaxup_*"))
    known, said = (diff(models / "base", directory) for directory in (models / "before", tmp_path / "bare"))
    assert said.notes[0] == f"layers are compared by what the weights of {tmp_path}/bare say"
    assert [origin[:2] for origin in said.origins] == [origin[:2] for origin in known.origins]
    for metric in METRICS:
        np.testing.assert_array_equal(said.values[metric], known.values[metric])


def test_values_that_are_not_finite_are_named(models, tmp_path):
    shutil.copytree(models / "other", tmp_path / "x\x1b[31m")
    tensors = weights(models / "other")
    tensors["model.layers.2.mlp.up_proj.weight"][0, :3] = np.nan, np.inf, 1
    safetensors.numpy.save_file(tensors, tmp_path / "x\x1b[31m" / "model.safetensors")
    found = diff(models / "base", tmp_path / "x\x1b[31m")
    assert "blocks.mlp.up_proj.kernel in layers 2: 2 values are not finite, and left out" in found.notes[-1]
    assert np.isfinite(found.values["relative"]).all()
    assert "\x1b" not in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base"], "two models are needed; see --help"),
        (["base", "nowhere"], "no such"),
        (["base", "wide"], "hidden_size is 8 in {0}/base, and 16 in {0}/wide; --common compares what both have"),
        (["base", "gpt2"], "{0}/base: intermediate_size is 12, and 32 in {0}/gpt2"),
        (["gpt2", "base", "--plan=upscale(m, 0:1)"], "has 4 layers, and the plan given makes 3 layers of 'm' (2)"),
        (["base", "before", "--plan=upscale(m, 0:1)"], "has 6 layers, and the plan given makes 5 layers of 'm' (4)"),
        (["base", "other", "--out={0}/base"], "{0}/base: exists already"),
        (["base", "other", "--out={0}/no/where"], "{0}/no/where: its parent is not a directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared(models, tmp_path, arguments, message):
    before = sorted(models.iterdir())
    given = [str(models / word) if word.isalnum() else word.format(models) for word in arguments]
    with pytest.raises(UserError) as error:
        command.main(["diff", *given])
    assert message.format(models) in str(error.value)
    assert sorted(models.iterdir()) == before


def test_what_both_have(models):
    found = diff(models / "base", models / "wide", common=True)
    assert np.isnan(found.values["mean_abs"]).all()
    assert "hidden_size is 8" in "".join(found.notes)
    wider = diff(models / "base", models / "other", common=True)
    assert np.isfinite(wider.values["mean_abs"]).all()
