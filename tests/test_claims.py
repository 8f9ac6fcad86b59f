"""Claims on healed up-scaled models: intervals against SciPy, and verdicts on changes that are known."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import scipy.stats

from jaxup.errors import UserError
from jaxup.lens.alignment import Origin
from jaxup.lens.bootstrap import interval
from jaxup.lens.claims import HOLDS, NOT, OPEN, claims
from jaxup.lens.differences import Differences
from jaxup.lens.ratios import ratio

command = importlib.import_module("jaxup.diff")  # the package has the function of that name
MODULES = ("input_layernorm", "q_proj", "o_proj", "down_proj")
SILENT = [2, 3]
# upscale(base, 2:10, copies=2) of 12 layers: two slices of eight
ORIGINS = [
    *((layer, "=") for layer in range(10)), *((layer, "z") for layer in [*range(2, 10)] * 2), (10, "="), (11, "="),
]  # fmt: skip
COPIES = np.array([role == "z" for _, role in ORIGINS])


def healed(seed, copies=(1, 1, 1, 1), top=1.0, first=1.0, second=1.0, noise=0.02, size=1.0):
    """Of a run: copies change so many times as much by module, the top of a slice so many times as its bottom."""
    rng = np.random.default_rng(seed)
    change = 1e-3 * np.exp(rng.normal(0, noise, (3, len(ORIGINS), len(MODULES))))
    change[:, COPIES] *= np.array(copies) * np.tile(np.geomspace(1, top, 8), 2)[:, None]
    change[:, :2] *= first
    change[1] *= second
    sizes = np.full(change.shape, 0.02 * size)
    relative = 1.3 * change / sizes
    relative[np.ix_([0, 2], COPIES, [column in SILENT for column in range(len(MODULES))])] = np.inf  # from zero
    values = {"mean_abs": change, "rms": 1.3 * change, "relative": relative}
    origins = tuple(Origin(layer, role, "base") for layer, role in ORIGINS)
    names = tuple(f"runs/{seed}@{name}" for name in ("before", "healed/10", "healed/20"))
    return Differences(names, ((0, 1), (1, 2), (0, 2)), MODULES, origins, values, {"mean_abs": {}}, ())


def verdicts(found, claim, of=""):
    return {(r.of, r.measure): r.verdict for r in found.results if r.claim == claim and of in r.of}


def test_an_interval_of_one_run_is_that_of_scipy():
    rng = np.random.default_rng(1)
    both = rng.lognormal(0, 0.5, (24, 2)) * [2, 1]
    found = interval([[both]], ratio, draws=20_000)
    theirs = scipy.stats.bootstrap(
        (both[:, 0], both[:, 1]), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True,
        method="percentile", n_resamples=20_000, rng=np.random.default_rng(2),
    )  # fmt: skip
    # The standard error of a 2.5% quantile of n draws is about sqrt(p (1 - p) / n) / density, here 2% of the standard
    # deviation of the draws; five of two of these.
    # Sums of 24 numbers that are added in another order: a rounding each.
    assert found.value == pytest.approx(both[:, 0].sum() / both[:, 1].sum(), rel=48 * 2**-53)
    assert found[1:] == pytest.approx(theirs.confidence_interval, abs=0.15 * theirs.standard_error)
    assert interval([[both]], ratio, draws=20_000) == found
    least = interval([[both[:4]]], ratio)
    assert np.isnan(least[1:]).all()
    assert least.value == both[:4, 0].sum() / both[:4, 1].sum()


def test_an_interval_of_several_runs_is_that_of_drawing_them():
    """Plainly: runs, and of each that was drawn its units anew, groups apart, without what is not finite."""
    rng = np.random.default_rng(3)
    runs = [[rng.lognormal(level, 0.3, (4, 2)), rng.lognormal(level, 0.3, (6, 2))] for level in (0.0, 0.5, 2.0)]
    runs[1][1][2, 0] = np.nan
    kept = [[group[np.isfinite(group).all(1)] for group in groups] for groups in runs]
    drawn = []
    for _ in range(4000):
        groups = [group for run in rng.integers(3, size=3) for group in kept[run]]
        sums = sum(group[rng.integers(len(group), size=len(group))].sum(0) for group in groups)
        drawn.append(sums[0] / sums[1])
    found = interval(runs, ratio, draws=4000)
    assert found[1:] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.25 * np.std(drawn))


def test_verdicts_both_ways():
    more = claims([healed(seed, (2, 2, 0.25, 2), top=3, first=20, noise=0.05) for seed in range(3)])
    assert {*verdicts(more, "copies").values()} == {HOLDS}
    assert {*verdicts(more, "o_proj").values()} == {HOLDS}
    assert {*verdicts(more, "gradient", "copies").values()} == {HOLDS}
    assert {*verdicts(more, "gradient", "originals").values()} == {NOT}
    assert {*verdicts(more, "first_layers").values()} == {HOLDS}
    assert {*verdicts(more, "epochs").values()} == {HOLDS}
    ratios = {(r.claim, r.of): r for r in more.results if r.measure == "mean_abs"}
    grown = np.geomspace(1, 3, 8).mean()
    for key, wanted in {
        ("copies", "q_proj"): 2 * grown,
        ("gradient", "copies, layers 10-17: q_proj"): 3,
        ("gradient", "copies, layers 18-25: down_proj"): 3,
        ("epochs", "q_proj"): 1,
        ("o_proj", "o_proj"): 0.125,
    }.items():
        assert ratios[key].low < wanted < ratios[key].high, key
        assert ratios[key].ratio == pytest.approx(wanted, rel=0.1)

    less = claims([healed(seed, (0.5, 0.5, 2, 0.5), second=0.4, noise=0.05) for seed in range(3)])
    for claim in ("copies", "o_proj", "gradient", "first_layers", "epochs"):
        assert {*verdicts(less, claim).values()} == {NOT}, claim
    same = claims([healed(seed, noise=0.3) for seed in range(3)])
    assert {*verdicts(same, "copies").values()} == {OPEN}


def test_both_measures_of_what_was_zeroed_agree_where_norms_do():
    """A zeroed part has no norm to be relative to: it has that of its original."""
    found = claims([healed(0, (2, 2, 2, 2), size=3.0)])
    for claim in ("copies", "gradient"):
        of = {}
        for result in found.results:
            if result.claim == claim:
                of.setdefault(result.of, []).append(result[3:6])
        assert all(a == pytest.approx(b, rel=1e-9) for a, b in of.values())


def test_what_did_not_train_is_left_out():
    runs = [healed(seed, (2, 2, 2, 2)) for seed in range(2)]
    for run in runs:
        for values in run.values.values():
            values[:, ~COPIES] = 0
            values[:, :, 1] = np.nan
    found = claims(runs)
    assert {*verdicts(found, "copies").values()} == {OPEN}
    assert not any("q_proj" in result.of for result in found.results)
    assert "runs/0@healed/20: did not train, and left out: layers 0-9, 26-27" in found.notes
    relative = verdicts(found, "epochs")
    assert relative["input_layernorm", "mean_abs"] == HOLDS
    assert relative["o_proj", "relative"] == OPEN  # of what size it would be nothing says
    text = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert text["results"][0]["ratio"] is None
    assert text["claims"].keys() == {"copies", "gradient", "first_layers", "epochs", "o_proj"}


def test_controls_stand_beside_the_runs():
    control = dataclasses.replace(
        healed(7, first=5), models=("runs/7@before", "runs/7@control"), pairs=((0, 1),),
        values={metric: values[2:] for metric, values in healed(7, first=5).values.items()},
    )  # fmt: skip
    found = claims([healed(0)], [control])
    assert {*verdicts(found, "first_layers", "control").values()} == {HOLDS}
    assert {of for of, _ in verdicts(found, "first_layers")} == {*MODULES, *(f"control: {name}" for name in MODULES)}


def test_differences_that_were_kept_are_read(tmp_path, capsys):
    for seed in range(2):
        named = dataclasses.replace(healed(seed), models=("a`b|<i>\x1b[31m", "x", "y"))
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "differences.json").write_text(named.to_json())
    command.main(["diff", "--claims", *(str(tmp_path / str(seed)) for seed in range(2)), f"--out={tmp_path / 'out'}"])
    said, text = capsys.readouterr().out, (tmp_path / "out" / "CLAIMS.md").read_text()
    assert text in said
    assert "- `` a`b|<i>\\x1b[31m `` -> `x` -> `y`" in text
    assert "- mean abs. difference: holds in 4 of 4" in text
    assert len(json.loads((tmp_path / "out" / "claims.json").read_text())["models"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(origins=tuple(Origin(row, "=", "base") for row in range(28))), "none of its layers is a copy"),
        (dict(models=("base", "grown", "healed"), values={k: v for k, v in
              healed(0).values.items() if k == "mean_abs"}), "no rms"),
        (dict(values={k: np.where(np.isinf(v), 1, v) for k, v in healed(0).values.items()}),
         "nothing was trained from runs/0@before to runs/0@healed/10; the model before healing, RUN@before, comes"),
        (dict(pairs=((0, 1), (1, 2), (1, 0))), "not differences of two models or more"),
    ],
)  # fmt: skip
def test_what_says_nothing_of_copies(change, message):
    with pytest.raises(UserError, match=message):
        claims([dataclasses.replace(healed(0), **change)])
    with pytest.raises(UserError, match="its layers are not those of the first run"):
        claims([healed(0), dataclasses.replace(healed(0), origins=healed(0).origins[::-1])])


def test_what_is_no_run_of_healing(finished, tmp_path):
    for words, message in (
        ([str(tmp_path)], f"{tmp_path}: neither a run nor a directory with differences.json"),
        ([str(finished[0])], f"{finished[0]}: no run of healing that is finished"),
        ([str(tmp_path), "--rank"], "--claims goes with --out only"),
    ):
        with pytest.raises(UserError) as error:
            command.main(["diff", "--claims", *words])
        assert message in str(error.value)
    with pytest.raises(UserError, match="at least one run"):
        claims([])
