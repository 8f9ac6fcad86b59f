"""Runs in a bucket: the same as on a disk, through TensorStore and Orbax, with a server of our own (`gcs.py`). A run
that breaks off there and goes on is in `test_resuming.py`."""

import contextlib
import json
import os
import signal
import threading

import gcs
import processes
import pytest
from runs import arguments, losses, metrics, result

from jaxup import train, verify
from jaxup.errors import UserError
from jaxup.files import bucket, lock
from jaxup.files.bucket import place
from jaxup.files.staging import staged_directory
from jaxup.generate import main as write_text
from jaxup.together import identity
from jaxup.training.metrics import MetricsLog
from jaxup.training.rundir import writer_lock

# A path


def test_a_path_in_a_bucket_is_one(here, objects):
    (here / "a.txt").write_text("0123456789")
    (here / "b" / "c" / "d.json").write_bytes(b"{}")
    (here / "b" / "e.json").touch()
    (here.parent / "here2").write_text("beside it")
    objects.put("bucket/here/", b"")  # as the console makes empty folders
    objects.put("bucket/here/empty/", b"")
    assert str(here / "b") == os.fspath(here / "b") == "gs://bucket/here/b"
    assert (here / "b" / "c").parent.name == "b"
    assert [path.name for path in here.iterdir()] == ["a.txt", "b"]
    assert [str(path) for path in here.glob("*/*.json")] == ["gs://bucket/here/b/e.json"]
    assert [str(path) for path in here.glob("b/*/d*")] == ["gs://bucket/here/b/c/d.json"]
    assert [path.name for path in here.glob("*")] == ["a.txt", "b"]
    assert (here.is_dir(), here.is_file(), here.exists()) == (True, False, True)
    assert ((here / "a.txt").is_dir(), (here / "a.txt").is_file()) == (False, True)
    assert not (here / "a").exists()
    assert (here / "a.txt").read(2, 5) == b"234"
    assert [(here / "a.txt").has_size(size) for size in (0, 1, 9, 10, 11, 12)] == [
        size == 10 for size in (0, 1, 9, 10, 11, 12)
    ]
    assert (here / "b" / "e.json").has_size(0)
    assert not (here / "nothing").has_size(0)
    with pytest.raises(FileNotFoundError):
        (here / "nothing").read_text()
    (here / "b").rename(here / "f")
    assert here.below() == ["a.txt", "f/c/d.json", "f/e.json"]
    (here / "f").rmtree()
    (here / "f").rmtree()
    assert here.below() == ["a.txt"]
    here.rmtree()
    assert [*objects] == ["bucket/here2"]


def test_what_names_no_bucket_is_one_line():
    for text in ("gs://", "gs:///run"):
        with pytest.raises(UserError, match=rf"\A{text}: names no bucket; such as gs://BUCKET/RUN\Z"):
            place(text)


def test_a_store_that_does_not_answer_is_one_line(here, objects, monkeypatch):
    monkeypatch.setattr("jaxup.files.bucket._LOOK", 0.01)
    monkeypatch.setattr("jaxup.files.bucket._PATIENCE", 0.01)
    monkeypatch.setattr(objects, "seconds", 2.0)
    bucket._opened.cache_clear()
    with pytest.raises(UserError, match=r"\A[^\n]*config.json: cannot be read: no answer in time\Z"):
        train.main(["train", "--resume=gs://bucket/here"])


# Its lock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_SILENCE", 2.0)


def test_one_holds_the_lock_at_a_time(here, objects, quick):
    with writer_lock(here):
        for _ in range(2):
            in_use = rf"in use by process {os.getpid()} on .* since .*; wait for it or"
            with pytest.raises(UserError, match=in_use), writer_lock(here):
                pass
    assert not objects
    with writer_lock(here):
        pass


def test_the_lock_of_a_process_that_is_gone_is_taken(here, quick, capsys):
    (here / ".lock").write_text(f"one that was killed\n{identity()[:-1]}x\n0\n")
    with writer_lock(here):
        assert str(os.getpid()) in (here / ".lock").read_text()
    assert capsys.readouterr().err == ""


def test_one_of_another_machine_is_gone_if_it_gives_no_sign_of_life(here, quick, capsys):
    (here / ".lock").write_text("process 7 on another\nanother/boot/space 7 7\n0\n")
    with writer_lock(here):
        pass
    said = "here/.lock: process 7 on another: waits 2 s for a sign of life (if it is gone, delete that object)"
    assert said in capsys.readouterr().err

    (here / ".lock").write_text("process 7 on another\nanother/boot/space 7 7\n0\n")
    done = threading.Event()

    def live():
        while not done.wait(0.2):
            (here / ".lock").write_text("process 7 on another\nanother/boot/space 7 7\n0\n")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 7 on another; wait for it"), writer_lock(here):
            pass
    finally:
        done.set()
        thread.join()


def test_who_was_taken_for_gone_ends(here, quick, monkeypatch, capsys):
    ended = threading.Event()

    def end(code):
        assert code == 5
        ended.set()
        raise OSError("so that the thread goes on")

    monkeypatch.setattr(lock.os, "_exit", end)
    with writer_lock(here):
        (here / ".lock").write_text("another")
        assert ended.wait(10)
    assert "another goes on with the run" in capsys.readouterr().err
    assert (here / ".lock").read_text() == "another"


# What is written into it


def test_lines_of_the_log_are_there_once_flushed(here):
    log = MetricsLog(here / "metrics.jsonl")
    for step in range(3):
        log.write("m", step, loss=1.0)
    assert not here.exists()
    log.flush()
    log.write("m", 3, loss=2.0)
    assert [line["step"] for line in metrics(here)] == [0, 1, 2]
    log.rewind("m", 1)
    assert [line["step"] for line in metrics(here)] == [line["step"] for line in log.read()] == [0, 1]


def test_a_directory_is_replaced_as_a_whole(here, objects, monkeypatch):
    def write(names, **how):
        with staged_directory(here, **{"force": True, "marks": ("manifest", "model", "index"), **how}) as staging:
            for name in names:
                (staging / name).write_text(" ".join(names))

    write(["config.json", "manifest", "model", "card"])
    with pytest.raises(UserError, match="exists already"):
        write(["manifest"], force=False)
    # Stopped anywhere, it is no model, and may be replaced.
    put, left = gcs.Objects.put, 0

    def fail(self, name, data):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError
        return put(self, name, data)

    names = ["config.json", "manifest", "index", "model-1", "model-2"]
    monkeypatch.setattr("jaxup.files.bucket._PATIENCE", 0.3)
    for count in range(4):
        left = count
        monkeypatch.setattr(gcs.Objects, "put", fail)
        with pytest.raises(UserError, match=r"\Ags://bucket/here: [^\n]*\Z"):
            write(names)
        assert not (here / "config.json").exists()
        assert here.below()
    monkeypatch.undo()
    write(names)
    assert here.below() == sorted(names)
    assert {data.data.decode() for data in objects.values()} == {" ".join(names)}
    objects.clear()
    (here / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds none of manifest, model, index"):
        write(names)


def test_damaged_checkpoints_are_set_aside_and_unfinished_ones_removed(here, objects, capsys):
    import jax.numpy as jnp

    from jaxup.training.checkpoint import Checkpoints
    from jaxup.training.step import TrainState

    def save(*steps, **how):
        with Checkpoints(here, **{"keep": 2, **how}) as checkpoints:
            begun = checkpoints.latest
            if begun is not None:
                abstract = TrainState({"a": jnp.zeros(7)}, (), jnp.int32(0), jnp.bool_(False))
                assert checkpoints.restore(begun, abstract).params["a"].tolist() == [begun] * 7
            for step in steps:
                state = TrainState({"a": jnp.full(7, 1.0 * step)}, (), jnp.int32(step), jnp.bool_(False))
                checkpoints.save(step, state)
        return begun, sorted(path.name for path in here.iterdir())

    def remove(*ends):
        for name in [name for name in objects if name.endswith(ends)]:
            del objects[name]

    assert save(2, 4, 6, 8, always=[2]) == (None, ["2", "6", "8"])
    name = next(name for name in objects if "/8/state/d/" in name)
    objects.put(name, objects[name].data[:-1] + b"x")
    assert save(7, always=[2]) == (6, ["2", "6", "7", "8.damaged"])
    assert "here/8: state/d/" in (err := capsys.readouterr().err)
    assert "is not what was written" in err
    assert err.count("\n") == 1
    remove("/7/commit_success.txt", "/7/jaxup_digests.json")  # killed while it was saved
    assert save(8, 9) == (6, ["8", "8.damaged", "9"])
    assert capsys.readouterr().err == ""
    remove("/9/commit_success.txt")
    assert save() == (8, ["8", "8.damaged", "9.damaged"])
    remove("/8/jaxup_digests.json")  # killed right after it was saved
    assert save() == (8, ["8", "8.damaged", "9.damaged"])
    remove("/8/state/_METADATA", "/8/commit_success.txt")
    assert save() == (None, ["8.damaged", "9.damaged"])


# Runs


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_numbers(finished, here, corpus):
    """At any moment, with a save under way among them, and a second start meanwhile."""
    command = ("-m", "jaxup.train", *arguments(corpus, here))
    kills = 0
    # A directory is there as soon as the first object in it is.
    for name in (
        "config.json",
        "checkpoints/reference",
        "checkpoints/target_2",
        "checkpoints/target_2/4",
        "checkpoints/control",
    ):
        with processes.started(*command) as process, contextlib.suppress(AssertionError):
            processes.wait_until((here / name).exists, process)
            if not kills:
                process.send_signal(signal.SIGSTOP)  # or it would be done before the other has begun
                second = processes.run(*command, check=False)
                assert (second.returncode, "in use by process" in second.stderr) == (2, True), second.stderr
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 4
    processes.run(*command)
    assert losses(here) == losses(finished[0])
    for name in ("reference", "target_2", "control"):
        for key in ("val_loss", "sample", "steps"):
            assert result(here, name)[key] == result(finished[0], name)[key]
    for name in ("export/model.safetensors", "plan.yaml"):
        assert (here / name).read_bytes() == (finished[0] / name).read_bytes()
    write_text(["generate", str(here), "--prompt", "def f", "--max-tokens", "2"])


@pytest.mark.slow
def test_two_processes_share_a_run_in_a_bucket(here, corpus, tmp_path):
    processes.run_two("-m", "jaxup.train", *arguments(corpus, tmp_path / "run"))
    command = ("-m", "jaxup.train", *arguments(corpus, here))
    with processes.two_started(*command) as both:
        processes.wait_until((here / "checkpoints" / "target_2" / "4").is_dir, *both)
        both[1].send_signal(signal.SIGKILL)
        assert both[0].wait(60) == 5
    processes.run_two(*command)
    assert losses(here) == losses(tmp_path / "run")
    verify.main(["verify", str(here)])
    assert json.loads((here / "finished.json").read_text())["models"] == ["reference", "target_2", "control"]
