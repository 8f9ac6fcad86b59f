"""A model that is taught to see and draw, from end to end: trained, measured, exported, loaded and asked."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import runs
from PIL import Image

import jaxup
from jaxup import train
from jaxup.continuous import files
from jaxup.continuous.drawing import draw
from jaxup.continuous.pairs import PairsConfig, open_pairs
from jaxup.errors import UserError
from jaxup.experiments.cells import configured
from jaxup.experiments.common import read_settings
from jaxup.experiments.config import load as load_config
from jaxup.experiments.continuous import Continuous
from jaxup.generate import main as generate
from jaxup.generate import parse_args
from jaxup.hub.load import load
from jaxup.training.sharding import MeshConfig, make_mesh

pytest.importorskip("sklearn")
TINY = [
    "--config=metamorph.py:smoke", "--config.pretrain.steps=0", "--config.model.hidden_size=16",
    "--config.model.intermediate_size=24", "--config.model.num_heads=2", "--config.model.num_kv_heads=1",
    "--config.steps=4", "--config.batch_size=8", "--config.optimizer.warmup_steps=2", "--config.eval.interval=4",
    "--config.eval.rows=16", "--config.eval.batch_size=8", "--config.log.interval=1", "--config.sample.tokens=2",
    "--config.compute.unroll=1", "--config.data.tokenizer=bpe:300", "--config.data.encoder=patches:4",
    "--config.continuous.drawn=12", "--config.data.pairs=10", "--config.data.tell=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    directory = tmp_path_factory.mktemp("continuous") / "run"
    with runs.devices(1):
        train.main(["train", *TINY, f"--workdir={directory}"])
    return directory


@pytest.mark.slow
def test_a_run_leaves_a_language_model_and_what_is_beside_it(taught, tmp_path):
    tasks = json.loads((taught / "tasks.json").read_text())
    assert {"judged", "judged_shuffled", "diversity", "told", "draw_seconds"} <= tasks.keys()
    assert {"cosine", "cosine_shuffled", "val_text", "val_values"} <= tasks.keys()
    assert tasks["diversity"] == 0  # a cosine head knows no noise
    summary = (taught / "SUMMARY.md").read_text()
    assert "drawn pictures that the judge takes for what was asked" in summary
    assert (taught / "plots" / "samples.png").is_file()
    model, alone = jaxup.load(taught / "export"), load(taught / "export")
    assert not alone.config.beside
    assert model.config.alone() == alone.config
    assert {"connector", "head", "vectors", "places"} == model.beside.keys()
    np.testing.assert_array_equal(model.params["embed_tokens"], alone.params["embed_tokens"])
    side = files.read(taught / "export")
    how = {**side.drawing, "seed": 0}
    first, again = (draw(each, side.task, [[1, 2]], **how) for each in (model, jaxup.load(taught)))
    np.testing.assert_array_equal(first, again)
    assert model.task == side.task
    # Epochs of few examples may be shorter than a step, and are no milestones where steps are given.
    assert sorted(path.name for path in (taught / "checkpoints" / "taught").iterdir() if path.name.isdigit()) == ["4"]
    # Which few pictures are drawn the seed of the run says.
    few = PairsConfig(source="digits", encoder="patches:4", pairs=10, tell=10, balance=True)
    own, other = (open_pairs(dataclasses.replace(few, seed=seed), "bpe:300", tmp_path).digest for seed in (0, 1))
    assert json.loads((taught / "inputs.json").read_text())["data"] == own != other


@pytest.mark.slow
def test_pictures_are_drawn_and_asked_of_by_the_command(taught, tmp_path, capsys):
    out = tmp_path / "grid.png"
    generate(["generate", str(taught), "--image", "draw 7", "--image", "draw 3", f"--out={out}"])
    with Image.open(out) as sheet:
        assert sheet.size == (4 + 2 * (48 + 4), 4 + 15 + 48 + 4)  # each below what was asked for
    generate(["generate", f"{taught}@taught", "--image", "draw 7", f"--out={tmp_path / 'values.npy'}"])
    assert np.load(tmp_path / "values.npy").shape == (1, 4, 16)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "digit.png")
    capsys.readouterr()
    asked = ["--prompt", "which digit?", "--max-tokens", "2"]
    generate(["generate", str(taught), f"--image-in={tmp_path / 'digit.png'}", *asked])
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "draw 7"], "--out=grid.png"),
        (["--image", "draw 7", "--out=x.jpg"], "a .png of the pictures, or a .npy"),
        (["--image", "draw 7", "--out=x.png", "--prompt", "a"], "--prompt goes with text"),
        (["--guidance=2", "--prompt", "a"], "--guidance goes with --image"),
        (["--image-in=x.png"], "--image-in goes with --prompt"),
        (["--image-in=x.png", "--prompt", "a", "--temperature=1"], "--temperature"),
        (["--image", "draw 7", "--out=x.png", "--sets=0"], "--sets must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        parse_args(["generate", "model", *flags])
    assert message in str(error.value)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (files.ARRAYS, _cut, "damaged"),
        (files.ENCODER, _cut, "not an encoder"),
        (files.DESCRIPTION, lambda p: p.write_text(p.read_text().replace('"format": 1', '"format": 9')), "format 9"),
        (files.DESCRIPTION, lambda p: p.write_text(p.read_text().replace("Cosine", "Sine")), "unknown 'Sine'"),
        (files.DESCRIPTION, lambda p: p.write_text(p.read_text().replace('"rows": 2', '"rows": 4')), "the task needs"),
        (files.ARRAYS, lambda path: path.unlink(), "is not"),
    ],
)
def test_what_is_damaged_beside_a_model_is_one_line(taught, tmp_path, file, damage, message):
    copy = shutil.copytree(taught / "export", tmp_path / "model")
    damage(copy / file)
    with pytest.raises(UserError, match="manifest" if (copy / file).exists() else message):
        jaxup.load(copy)
    (copy / "jaxup_manifest.json").unlink()
    with pytest.raises(UserError) as error:
        jaxup.load(copy)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.continuous.layout=rastre"], "did you mean 'raster'"),
        (["--config.continuous.layout=sets", "--config.data.tell=5"], "data.tell=5"),
        (["--config.data.encoder=patches:3"], "do not divide"),
        (["--config.data.seq_len=5"], "data.seq_len=5"),
        (["--config.data.shape=3x3x4"], "data.shape=3x3x4"),
    ],
)
def test_what_cannot_be_taught_is_one_line_and_writes_nothing(overrides, message, tmp_path):
    with pytest.raises(UserError) as error:
        train.main(["train", *TINY, *overrides, f"--workdir={tmp_path / 'run'}"])
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_stages_and_one_flow_draw_in_as_many_steps():
    """What the cells of ecar.py have in common, and what they do not."""
    config = load_config("ecar.py", [("data.shape", "4x4x4"), ("data.seq_len", "32")])
    mesh, tasks, flops = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1)), {}, {}
    for cell in config.study.cells:
        made = configured(config, cell, 0)
        job = Continuous(made, read_settings(made), mesh)
        job.without_data()
        stage = next(stage for stage in job.stages() if stage.steps)
        assert stage.steps == config.steps
        assert made.continuous.stages * made.continuous.head_steps == 24
        tasks[cell], flops[cell] = (task := stage.objective), task.head_flops(stage.model, made.continuous.head_steps)
    assert tasks["single"].stages is None
    assert [start for start, _ in tasks["staged"].stages.levels] == pytest.approx([1, 0.8, 0.5])
    assert [start for start, _ in tasks["plain"].stages.levels] == pytest.approx([1, 2 / 3, 1 / 3])
    # 7/16 if a token costs the same everywhere; of attention, a token of a smaller map has less.
    assert 0.42 < flops["staged"] / flops["single"] < 0.4375
    assert flops["staged"] == flops["plain"] > flops["tokens"]


@pytest.mark.slow
def test_an_image_scale_by_scale_from_end_to_end(tmp_path):
    with runs.devices(1):
        train.main(["train", "--config=ecar.py:smoke", f"--workdir={tmp_path / 'run'}"])
    tasks = json.loads((tmp_path / "run" / "tasks.json").read_text())
    assert {"judged", "judged_shuffled", "frechet", "head_flops", "draw_seconds"} <= tasks.keys()
    assert (tmp_path / "run" / "plots" / "samples.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["head=flow,upscaled", "head=diffusion,lora"])
def test_a_base_that_is_trained_here_keeps_its_text(variant, tmp_path):
    with runs.devices(1):
        train.main(["train", f"--config=metamorph.py:smoke,{variant}", f"--workdir={tmp_path / 'run'}"])
    tasks = json.loads((tmp_path / "run" / "tasks.json").read_text())
    assert {"text_before", "text_after"} <= tasks.keys()
    assert tasks["diversity"] > 0
    assert jax.tree.leaves(jaxup.load(tmp_path / "run").beside)
