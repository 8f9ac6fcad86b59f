"""What a finished run says: the first sentence of its summary, how it was made, and what its pictures show."""

import dataclasses
import re
import time

import numpy as np
from runs import metrics, result

from jaxup.depth.plan import DepthPlan
from jaxup.experiments import pictures, report
from jaxup.lens import heatmap
from jaxup.lens.differences import diff
from jaxup.training.run import Result, read_result


def test_a_summary_begins_with_what_was_found(finished):
    workdir, _ = finished
    _, _, finding, _, _, command, _, _, how, *_ = (workdir / "SUMMARY.md").read_text().splitlines()
    loss = {name: round(result(workdir, name)["val_loss"], 4) for name in ("reference", "target_2", "control")}
    by = {name: loss["target_2"] - other for name, other in loss.items()}
    than = {name: f"{abs(more):.4f} {'below' if more < 0 else 'above'}" for name, more in by.items()}
    assert finding == (
        f"The 2-layer target reaches {loss['target_2']:.4f} nats per token of validation in 8 steps: "
        f"{than['reference']} the 4-layer reference ({loss['reference']:.4f}), "
        f"{than['control']} a control of its size that began from random values ({loss['control']:.4f}). "
        "It has the reference's 8 steps of training behind it, too. "
        "One seed: by how much another one's numbers differ is not measured."
    )
    assert command.startswith("python -m jaxup.train --config=inherit_gpt2.py:smoke --config.steps=8 ")
    assert re.fullmatch(r"jaxup [\d.]+, jax \S+, flax .*, Python 3\S+; 1 x cpu. Wall time \d+:\d\d.", how)


def test_the_words_of_a_finding():
    model = dict(origin="", params=1, tokens=1, seconds=1.0, sample="")

    def results(*rows):
        keys = ("name", "kind", "layers", "steps", "val_loss")
        return [Result(**dict(zip(keys, (kind + str(n), kind, *row))), **model) for n, (kind, *row) in enumerate(rows)]

    reference, first, last = ("reference", 6, 0, 3.0), ("target", 2, 9, 3.2), ("target", 4, 9, 3.00004)
    controls = ("control", 4, 9, 3.4), ("control", 4, 18, 2.9), ("control", 2, 9, 3.5)
    grown = report.inherited(results(reference, first, last, *controls), "token", sweep=False)
    assert grown.startswith(
        "The 4-layer target, grown from 2, reaches 3.0000 nats per token of validation in 9 steps: "
        "level with the 6-layer reference (3.0000), 0.4000 below a control of its size that began from random values "
        "(3.4000), 0.1000 above a control of its size that began from random values and trained for 18 steps (2.9000)."
    )
    behind = report.inherited(results(("reference", 6, 9, 3.0), last, *controls), "token", sweep=False)
    assert "trained for 18 steps, as many as the reference and the target together (2.9000). It has the ref" in behind
    alone = report.inherited(results(last), "token", sweep=False)
    assert alone.startswith("The 4-layer target reaches 3.0000 nats per token of validation in 9 steps. One seed")
    assert "behind it" not in grown, "a reference from elsewhere was trained for nobody knows how long"
    best = report.inherited(results(reference, last, first), "token", sweep=True)
    assert best.startswith("Of targets of 4, 2 layers the best is that of 4: it reaches 3.0000 nats")
    base, before, merged = ("base", 4, 0, 2.0), ("before", 6, 0, 2.5), ("merged", 6, 0, 1.75)
    alone = report.healed(results(before, ("healed", 6, 9, 2.50001)), "loss token")
    assert alone.startswith(
        "Healing left the validation loss of the 6-layer model at 2.5000 nats per loss token in 9 steps. One seed"
    )
    told = report.healed(results(base, before, ("healed", 6, 9, 1.7), merged, ("control", 4, 9, 1.5)), "loss token")
    assert told.startswith(
        "Healing lowered the validation loss of the 6-layer model from 2.5000 to 1.7000 nats per loss token in 9 steps "
        "(with its adapters merged, as exported: 1.7500); its 4-layer base has 2.0000; the control, which is the base "
        "trained on the same batches, reaches 1.5000, and the healed model is 0.2500 above it. One seed"
    )


def test_the_time_of_a_run_that_was_started_more_than_once():
    starts = [{"time": time.time() - 3700, "command": "a `x`"}, {"time": time.time() - 61, "command": "a `x`"}]
    *command, _, how = report.made_by(starts)
    assert command == ["```bash", "a `x`", "```"]
    assert how.endswith(" Wall time 1:01:40 from the first of 2 starts, the pauses between them included; "
                        "the last took 1:01.")  # fmt: skip
    assert "Wall time" not in "".join(report.made_by([])), "nothing says when a run of an earlier version began"


def test_what_is_drawn(finished, monkeypatch, capsys):
    """The curves have the same steps, a role its colour, and the words are those of the summary."""
    workdir, _ = finished
    results = [read_result(workdir / "checkpoints" / name) for name in ("reference", "target_2", "control")]
    figure = pictures.validation("title", results, metrics(workdir), "token")
    (axes,) = figure.axes
    curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert [list(line.get_xdata()) for line in curves] == [[0, 4, 8]] * 3
    assert [line.get_color() for line in curves] == [
        pictures.COLORS[kind] for kind in ("reference", "target", "control")
    ]
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    summary = (workdir / "SUMMARY.md").read_text()
    for said, r in zip(words, results, strict=True):
        assert said == f"{r.name}, {r.layers} layers: {r.val_loss:.4f}"
        assert re.search(rf"^\| {r.name} \| {r.layers} \| .* \| {r.val_loss:.4f} \|", summary, re.M)
    assert axes.get_ylabel() == "validation loss (nats per token)"
    assert all(axes.get_ylim()[0] < line.get_ydata()[-1] < axes.get_ylim()[1] for line in curves)

    records = [r for r in metrics(workdir) if r["model"] == "target_2" and "loss" in r]
    panels = pictures.training("title", results, metrics(workdir), "token").axes
    for axes, key in zip(panels, ("loss", "gradient_norm", "learning_rate"), strict=True):
        drawn = [list(line.get_ydata()) for line in axes.lines if line.get_color() == pictures.COLORS["target"]]
        assert drawn[0] == [r[key] for r in records]
    plan = DepthPlan.from_yaml((workdir / "plan.yaml").read_text())
    gradients = pictures.gradients(results[1], records, plan).axes[0].images[0].get_array()
    norms = np.array([r["gradient_norm_layers"] for r in records]).T[None]
    np.testing.assert_array_equal(gradients, heatmap.shades(norms, "log").shade[0])
    assert pictures.difference(workdir, results, results[1]) is None
    assert "is not drawn here; `jaxup diff" in capsys.readouterr().err
    monkeypatch.setattr(pictures, "LARGE", 10**6)
    figure = pictures.difference(workdir, results, results[1])
    assert "reference\n→ target_2" in [text.get_text() for text in figure.texts]
    changed = figure.axes[0].images[0].get_array()
    found = diff(f"{workdir}@reference", f"{workdir}@target_2")
    np.testing.assert_array_equal(changed, heatmap.shades(found.values["mean_abs"], "robust").shade[0])
    assert np.ptp(changed) == 1
    assert pictures.difference(workdir, [dataclasses.replace(results[0], name="elsewhere")], results[1]) is None
    assert pictures.gradients(results[1], records[:1], plan) is None
    assert pictures.by_layers("title", results, "token") is None
    assert pictures.training("title", [dataclasses.replace(results[0], steps=0)], [], "token") is None


def test_roles_that_several_models_have():
    """Its deepest has the full colour, and no two look the same; a longer control has another line."""
    sizes = [("target", 2, 9), ("target", 4, 9), ("control", 2, 9), ("control", 4, 9), ("control", 4, 18)]
    model = dict(origin="", params=1, tokens=1, seconds=1.0, sample="", val_loss=1.0)
    results = [Result(name=f"{n}", kind=k, layers=layers, steps=s, **model) for n, (k, layers, s) in enumerate(sizes)]
    records = [{"model": r.name, "step": step, "val_loss": 1.0} for r in results for step in (0, 9, r.steps)]
    base = dataclasses.replace(results[0], name="base", kind="base", steps=0)
    (axes,) = pictures.validation("title", [base, *results], records, "token").axes
    level, *lines = axes.lines
    assert (level.get_color(), level.get_label()) == (pictures.COLORS["base"], "base, 2 layers: 1.0000")
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 5
    full = pictures.COLORS["target"], pictures.COLORS["control"]
    assert [line.get_color() in full for line in lines] == [False, True, False, True, True]
    smoothed = pictures._smoothed(np.arange(100.0) + (-1.0) ** np.arange(100))
    assert np.abs(smoothed - np.arange(100))[2:-2].max() < 0.5
    np.testing.assert_allclose(pictures._smoothed(np.array([3.0])), [3.0])
