"""What is read of a run for the statistics of a study."""

import json
import math
import shutil

import numpy as np
import pytest
from runs import metrics, result

from jaxup.errors import UserError
from jaxup.experiments.measures import keep_tasks
from jaxup.experiments.outcomes import read_outcome
from jaxup.model.config import ModelConfig
from jaxup.model.spec import flops_per_token
from jaxup.training.run import Run


@pytest.fixture
def run(finished, tmp_path):
    """The small files of a finished run."""
    whole, _ = finished
    for path in [*whole.glob("*.json*"), *whole.glob("checkpoints/*/*.json")]:
        (at := tmp_path / "run" / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, at)
    return tmp_path / "run"


def model_of(run, name):
    return ModelConfig.from_dict(json.loads((run / "checkpoints" / name / "model.json").read_text())["model"])


def test_an_outcome_is_what_the_run_wrote_down(run):
    found, stored = read_outcome(run, "target_2", cell="two"), result(run, "target_2")
    (run / "measures.json").write_text(json.dumps({"format": 2, "angular_distance": [0.5, 0.25]}))
    place = object.__new__(Run)  # of which nothing else is read
    vars(place).update(directory=run)
    keep_tasks(place, {"judged": 0.75, "distance": np.float32(2), "diversity": math.inf})
    assert (found.name, found.group, found.finished) == ("two-0", "batch size 8, seed 0", True)
    assert (found.score, found.seconds) == (stored["val_loss"], stored["seconds"])
    assert (found.steps, found.planned, found.tokens) == (8, 8, 8 * 8 * 32)
    assert found.flops == found.tokens * flops_per_token(model_of(run, "target_2"), 32)
    steps = {record["model"]: result(run, record["model"])["steps"] for record in metrics(run)}
    assert len(steps) > 2
    assert {name: tokens for name, (tokens, _) in found.costs.items()} == {
        f"run/{name}": count * 8 * 32 for name, count in steps.items()
    }
    assert found.costs["run/target_2"] == (found.tokens, found.flops)
    # Rows that are no text say their length, and an objective what it takes; of older runs the configuration does.
    path = run / "checkpoints/target_2/model.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"seq_len": 10, "flops_per_token": 7}))
    other = read_outcome(run, "target_2", cell="two")
    assert (other.tokens, other.flops) == (8 * 8 * 10, 8 * 8 * 10 * 7)
    path.write_text(json.dumps({key: about[key] for key in about if key not in ("seq_len", "flops_per_token")}))
    (run / "checkpoints/reference/common.json").write_text('{"of": "reference-1f"}')
    assert "reference-1f" in read_outcome(run, "target_2", cell="two").costs
    mine = [record for record in metrics(run) if record["model"] == "target_2"]
    assert found.curve == tuple((r["step"], r["val_loss"]) for r in mine if "val_loss" in r)
    assert found.samples_N.tolist() == [8 * r["step"] for r in mine if "loss" in r]
    assert found.norm_N.tolist() == [r["gradient_norm"] for r in mine if "loss" in r]
    assert np.isnan(found.micro_N).all()
    again = read_outcome(run, "target_2", cell="two")
    assert (again.tokens, again.flops) == (found.tokens, found.flops)
    assert again.measures["angular_distance"].tolist() == [0.5, 0.25]
    assert again.tasks == {"judged": 0.75, "distance": 2.0, "diversity": pytest.approx(math.nan, nan_ok=True)}
    assert found.tasks == {}


def test_a_run_that_goes_on(run):
    """As far as it is; a model that grows has cost less before it had all its layers."""
    (run / "checkpoints/target_2/result.json").unlink()
    lines = [json.dumps(r) for r in metrics(run) if r["model"] != "target_2" or r["step"] <= 5]
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["model"] == "target_2" and "loss" in record:
            record |= {"gradient_square_micro": 4.0, "micro_rows": 2}
            record["gradient_norm_layers"] = record["gradient_norm_layers"][: 1 if record["step"] <= 3 else 2]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"torn')
    found = read_outcome(run, "target_2", cell="two", seed=3, group="all", stopped="a sentence")
    assert (found.name, found.group, found.stopped, found.finished) == ("two-3", "all", "a sentence", False)
    assert math.isnan(found.score)
    assert (found.steps, found.planned, found.micro_rows) == (5, 8, 2)
    assert found.micro_N.tolist() == [4.0] * 5
    model = model_of(run, "target_2")
    small = flops_per_token(model.with_layers([0]), 32)
    large = flops_per_token(model, 32)
    assert found.flops == 8 * 32 * (3 * small + 2 * large)
    assert found.flops_N.tolist() == [
        8 * 32 * f for f in (small, 2 * small, 3 * small, 3 * small + large, found.flops / 256)
    ]
    last = [r for r in records if r["model"] == records[-1]["model"]]
    assert read_outcome(run, "", cell="two").loss_N.tolist() == [r["loss"] for r in last if "loss" in r]
    nothing = read_outcome(run, "target_9", cell="nine")
    assert (nothing.steps, nothing.planned, nothing.curve, nothing.loss_N.size) == (0, 8, (), 0)


@pytest.mark.parametrize(
    ("file", "text", "at", "what"),
    [
        ("config.json", '{"format": 2}', "config.json", "seed is missing"),
        ("config.json", None, "run", "no run there"),
        ("metrics.jsonl", '{"model": "a", "step": 1, "loss": "low"}\n', "metrics.jsonl:1", "loss must be"),
        ("metrics.jsonl", '{"model": "a"\n', "metrics.jsonl:1", "not valid JSON"),
        ("checkpoints/target_2/result.json", "{}", "checkpoints/target_2/result.json", "name is missing"),
        ("checkpoints/target_2/model.json", '{"model": {}}', "checkpoints/target_2/model.json", "is missing"),
        ("measures.json", '{"deletion_loss": "low"}', "measures.json", "deletion_loss must be"),
        ("tasks.json", '{"judged": [1]}', "tasks.json", "judged must be"),
    ],
)
def test_a_damaged_file_is_named(run, file, text, at, what):
    (run / file).unlink(missing_ok=True) if text is None else (run / file).write_text(text)
    with pytest.raises(UserError) as refused:
        read_outcome(run, "target_2", cell="two")
    line = str(refused.value)
    assert line.startswith(f"{run / at}: " if at != "run" else f"{run}: ")
    assert what in line
    assert "\n" not in line
