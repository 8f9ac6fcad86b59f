"""Runs that go on: with another configuration, beyond what stopped them, for longer; and those with nothing to do."""

import json
import re
import shutil

import numpy as np
import pytest
from runs import arguments, devices, losses, metrics, result

from jaxup import train, verify
from jaxup.data import open as open_module
from jaxup.data.batches import Batches
from jaxup.errors import NonFinite, UserError
from jaxup.experiments import inherit
from jaxup.export import main as write_model
from jaxup.training.corrections import Corrections, parse, record
from jaxup.training.metrics import MetricsLog

pytestmark = pytest.mark.usefixtures("one_device")


def run(*args):
    train.main(["train", *map(str, args)])


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A folder for runs of a target of one layer, from a model that lies in it."""
    folder = tmp_path_factory.mktemp("resuming")
    shutil.copytree(finished[0] / "export", folder / "model")
    return folder


@pytest.fixture(scope="module")
def command(folder, corpus):
    """command(name, *more): one target at a constant rate, and nothing else that trains."""
    given = [
        f"--config.reference.path={folder / 'model'}", "--config.data.tokenizer=", "--config.inherit.layers=1",
        "--config.optimizer.schedule=constant", "--config.inherit.control=0", "--config.eval.interval=8",
        "--config.sample.tokens=0",
    ]  # fmt: skip
    return lambda name, *more: arguments(corpus, folder / name, *given, *more)


@pytest.fixture(scope="module")
def whole(folder, command):
    run(*command("whole"))
    return folder / "whole"


def files(directory):
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in directory.rglob("*")}


def export(directory):
    return (directory / "export" / "model.safetensors").read_bytes()


# ---- nothing to do


def test_a_finished_run_repeated_touches_nothing(whole, command, monkeypatch, capsys):
    monkeypatch.setattr(inherit, "load", lambda *_, **__: pytest.fail("the reference is loaded again"))
    before = files(whole)
    other_mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.log.interval=5"]
    for again in (command("whole"), [f"--resume={whole}"], [f"--resume={whole}", *other_mesh]):
        with devices(8):
            run(*again)
        assert re.search(
            r"^target_1: finished before, .*\nfinished before: .*SUMMARY.md$", capsys.readouterr().out, re.M
        )
    assert files(whole) == before
    with pytest.raises(UserError, match=r"step 3 left out: the run is finished"):
        run(f"--resume={whole}", "--skip-step=3")


def test_what_is_missing_of_a_finished_run_is_made_again(whole, folder):
    shutil.copytree(whole, folder / "copy")
    shutil.rmtree(folder / "copy" / "export")
    run(f"--resume={folder / 'copy'}")
    assert export(folder / "copy") == export(whole)
    # Nothing else of it is: whose card was edited meanwhile keeps it.
    (folder / "copy" / "export" / "README.md").write_text("mine")
    before = files(folder / "copy" / "export")
    run(f"--resume={folder / 'copy'}", "--config.eval.rows=16")
    assert result(folder / "copy", "target_1")["val_rows"] == 16
    assert files(folder / "copy" / "export") == before


class Killed(BaseException):
    pass


def test_what_breaks_off_in_a_bucket_ends_with_the_same_bytes(whole, command, here, objects, monkeypatch, capsys):
    """And is a run there to all that asks for one."""
    write = MetricsLog.write

    def broken(self, model, step, **values):
        if step == 5:
            raise Killed
        write(self, model, step, **values)

    monkeypatch.setattr(MetricsLog, "write", broken)
    with pytest.raises(Killed):
        run(*command("none", f"--workdir={here}"))
    assert not (here / ".lock").exists()
    monkeypatch.undo()
    capsys.readouterr()
    run(f"--resume={here}")
    assert re.search(
        r"^target_1: resumes at step 4 of 8 .*; attention: blocked, 128 queries each$", capsys.readouterr().out, re.M
    )
    assert losses(here) == losses(whole)
    assert export(here) == export(whole)
    before = dict(objects)
    run(f"--resume={here}")
    assert "finished before: gs://bucket/here/SUMMARY.md" in capsys.readouterr().out
    assert objects == before

    verify.main(["verify", str(here)])
    assert "gs://bucket/here/export: compared with" in capsys.readouterr().out
    write_model(["export", str(here), "gs://bucket/out"])
    assert (here.parent / "out" / "model.safetensors").read_bytes() == export(whole)
    name = next(name for name in objects if "target_1/8/state/ocdbt.process_0/d/" in name)
    objects.put(name, objects[name].data[:100] + b"?" + objects[name].data[101:])
    with pytest.raises(UserError, match="1 of the files above is not what was written"):
        verify.main(["verify", str(here)])
    assert f"gs://{name}: is not what was written" in capsys.readouterr().out


# ---- another configuration


@pytest.mark.slow
def test_a_run_can_be_made_longer(whole, folder, command, capsys):
    """It ends as if there had been so many steps at once, but for the last digits, which the mesh decides."""
    run(*command("long", "--config.steps=12"))
    shutil.copytree(whole, folder / "longer")
    capsys.readouterr()
    with devices(8):
        run(
            f"--resume={folder / 'longer'}", "--config.steps=12", "--config.mesh.data=2", "--config.mesh.fsdp=2",
            "--config.mesh.context=2", "--config.checkpoint.keep=1", "--config.eval.rows=16", "--config.log.interval=2",
        )  # fmt: skip
    out = capsys.readouterr().out
    for line in (
        "steps was 8, now 12",
        "mesh.context was 1, now 2: sums are made in another order",
        "eval.rows was 8, now 16",
    ):
        assert f"changed under the run: {line}" in out
    assert "target_1: resumes at step 8 of 12" in out
    got, want = ({r["step"]: r["loss"] for r in losses(folder / name) if "loss" in r} for name in ("longer", "long"))
    assert list(got) == [*range(1, 9), 10, 12]
    assert [got[n] for n in range(1, 9)] == [want[n] for n in range(1, 9)]
    # float32 sums in another order, carried through four updates.
    assert [got[n] for n in (10, 12)] == pytest.approx([want[n] for n in (10, 12)], rel=1e-5)
    # Both models were measured on the same rows in the end, whatever those of before were.
    assert [result(folder / "longer", name)["val_rows"] for name in ("reference", "target_1")] == [16, 16]
    with devices(8), pytest.raises(UserError, match="steps was 12, now 8; there may be more"):
        run(f"--resume={folder / 'longer'}", "--config.steps=8")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.optimizer.b1=0.8"], "optimizer.b1 was 0.9, now 0.8"),
        (["--config.compute.dtype=bfloat16"], "compute.dtype was 'float32', now 'bfloat16'"),
        (["--config.optimizer.schedule=linear", "--config.steps=9"], "optimizer.schedule was 'constant', now 'linear'"),
        (["--config.steps=7"], "steps was 8, now 7; there may be more"),
        (["--config.optimizer.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["--workdir=elsewhere"], "--workdir=elsewhere: --resume="),
        (["--skip-step=x"], "--skip-step=x: the number of a step is at least 1"),
        (["--rate-from=3"], "--rate-from=3: expected N:RATE"),
        (["--rate-from=3:-1"], "--rate-from=3:-1: the rate must be a number and not negative"),
    ],
)
def test_what_decides_the_numbers_may_not_change(whole, more, message):
    before = files(whole)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        run(f"--resume={whole}", *more)
    assert "\n" not in str(error.value)
    assert {p.name for p, now in files(whole).items() if before.get(p) != now} <= {".lock"}


def test_a_key_that_is_newer_than_the_run_has_its_default(whole, folder, command):
    shutil.copytree(whole, folder / "older")
    path = folder / "older" / "config.json"
    config = json.loads(path.read_text())
    del config["step"]["spike_factor"], config["sample"], config["model"]["depth_scaled_attention"]
    path.write_text(json.dumps(config))
    run(*command("older"))
    run(f"--resume={folder / 'older'}")
    with pytest.raises(UserError, match=r"step.spike_factor was '\(absent\)', now 3.0"):
        run(f"--resume={folder / 'older'}", "--config.step.spike_factor=3")


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (None, "no run there"),
        ("modell", "no run there .*; did you mean '.*/model'"),
        ("model", "holds a model, not a run; --resume takes the dir"),
    ],
)
def test_there_must_be_a_run_to_resume(folder, there, message):
    with pytest.raises(UserError, match=message):
        run(f"--resume={folder / (there or 'nowhere')}")


def test_a_reference_that_was_replaced_is_refused(whole, folder, command):
    """As if killed after the reference was measured; then its weights change."""
    shutil.copytree(whole, folder / "replaced")
    shutil.rmtree(folder / "replaced" / "checkpoints" / "target_1")
    path, aside = folder / "model" / "model.safetensors", folder / "aside"
    path.rename(aside)
    data = bytearray(aside.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin:] = (np.frombuffer(data[begin:], np.float32) * np.float32(1.7)).tobytes()
    path.write_bytes(data)
    manifest = (folder / "model" / "jaxup_manifest.json").rename(folder / "manifest")
    try:
        with pytest.raises(UserError, match="not those the run began with"):
            run(f"--resume={folder / 'replaced'}")
    finally:
        aside.rename(path)
        manifest.rename(folder / "model" / "jaxup_manifest.json")


def test_what_a_killed_start_leaves_is_no_run_of_another(folder, command):
    (folder / "killed").mkdir()
    for name in (".lock", ".config.json.tmp"):
        (folder / "killed" / name).write_text("{")
    run(*command("killed"))
    assert not list((folder / "killed").rglob(".*.tmp"))


# ---- steps that are not finite


def test_a_batch_that_is_not_finite_is_left_out(folder, command, monkeypatch):
    """Interrupted by it, the run ends as one that knew of it from the beginning; so does what tells spikes."""
    spikes = ["--config.step.spike_factor=1.02", "--config.step.spike_window=2"]
    read = Batches.__call__

    def broken(self, step, share=slice(None)):
        batch = read(self, step, share)
        batch["loss_weights"][0, 0] *= np.nan if step == 3 else 1
        if step == 4:
            batch["targets"][:] = 7  # whatever came before: all gradients point one way
        return batch

    monkeypatch.setattr(Batches, "__call__", broken)
    with pytest.raises(NonFinite, match=r"target_1: step 4: loss nan .*rows \d+, .*--skip-step=4.*--rate-from=4:RATE"):
        run(*command("nan", *spikes))
    with pytest.raises(UserError, match="--skip-step=2: 3 of 8 steps are done"):
        run(f"--resume={folder / 'nan'}", "--skip-step=2")
    more = ["--skip-step=4", "--rate-from=6:1e-4"]
    run(f"--resume={folder / 'nan'}", *more)
    run(*command("known", *spikes), *more)
    assert losses(folder / "nan") == losses(folder / "known")
    assert export(folder / "nan") == export(folder / "known")
    rates = {r["step"]: r.get("learning_rate") for r in metrics(folder / "nan") if "loss" in r or "skipped" in r}
    assert [rates[n] for n in range(3, 9)] == pytest.approx([2e-3, None, 2e-3, 1e-4, 1e-4, 1e-4])
    spikes = [r["step"] for r in losses(folder / "nan") if "skipped" in r and "loss" in r]
    assert 5 in spikes  # the window holds steps from before the interruption
    said = f"step 4 left out, from step 6 on a rate with its peak at 0.0001, {len(spikes)} step"
    assert said in (folder / "nan" / "SUMMARY.md").read_text()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of a rate that float32 has not
def test_an_update_that_is_not_finite_is_not_made(folder, command):
    more = [
        "--config.optimizer.learning_rate=1e39",  # more than a float32 can be
        "--config.optimizer.warmup_steps=0",
        "--config.checkpoint.interval=1",
    ]
    with pytest.raises(NonFinite, match=r"step 1: the update is not finite .*, learning rate inf\); .* not made \("):
        run(*command("infinite", *more))
    assert not [p for p in (folder / "infinite" / "checkpoints" / "target_1").iterdir() if p.name.isdecimal()]


def test_a_validation_loss_that_is_none_ends_the_run(folder, command, monkeypatch):
    """Where weights and the loss of training are finite. The state is kept, and with fewer rows it goes on."""
    read, evaluations, sound = open_module.validation_batches, [], 0

    def spoilt(*args, **kwargs):
        evaluations.append(kwargs)
        for number, batch in enumerate(read(*args, **kwargs)):
            if number and len(evaluations) > sound:
                batch["loss_weights"][0, 0] = np.nan
            yield batch

    monkeypatch.setattr(open_module, "validation_batches", spoilt)
    rows = "--config.eval.rows=16"
    with pytest.raises(NonFinite, match=r"^reference: validation loss nan is not finite, from row 8 of validation on"):
        run(*command("unmeasured", rows))
    evaluations, sound = [], 2  # of the reference, and of the target before its first step
    wanted = r"target_1: step 8: validation loss nan .*; step 8 is saved; --config.eval.rows=8 measures on those before"
    for _ in range(2):  # the same again
        with pytest.raises(NonFinite, match=wanted) as error:
            run(*command("unmeasured", rows))
        assert error.value.exit_code == 3
    assert not list((folder / "unmeasured" / "checkpoints").glob("target_1/result.json"))
    assert [r for r in metrics(folder / "unmeasured") if not np.isfinite(r.get("val_loss", 0))] == []
    run(f"--resume={folder / 'unmeasured'}", "--config.eval.rows=8")
    assert np.isfinite(result(folder / "unmeasured", "target_1")["val_loss"])
    assert sum(r.get("step") == 8 and "loss" in r for r in metrics(folder / "unmeasured")) == 1


def test_corrections_are_kept(tmp_path):
    first = record(tmp_path, parse(["4", "2"], ["6:1e-3"]), done=1, steps=9)
    assert first == Corrections((2, 4), ((6, 1e-3),))
    assert record(tmp_path, Corrections(), done=9, steps=9) == first
    assert record(tmp_path, parse(["4"], ["6:1e-3"]), done=7, steps=9) == first  # the same again
    assert record(tmp_path, parse([], ["6:1e-5", "8:1"]), done=5, steps=9).rates == ((6, 1e-5), (8, 1.0))
    with pytest.raises(UserError, match="--rate-from=6: 7 of 9 steps are done"):
        record(tmp_path, parse([], ["6:2"]), done=7, steps=9)
    with pytest.raises(UserError, match="--skip-step=10: of 9 steps"):
        record(tmp_path, parse(["10"], []), done=7, steps=9)
