"""What is looked at on all machines before a run begins there."""

import re
import socket

import processes
import pytest
from runs import arguments

from jaxup import train
from jaxup.errors import UserError
from jaxup.experiments import preflight

pytestmark = pytest.mark.usefixtures("one_device")


def run(*args):
    train.main(["train", *map(str, args), "--preflight"])


def test_what_is_ready_is_said_and_nothing_is_left(corpus, tmp_path, capsys):
    run(*arguments(corpus, tmp_path / "runs" / "run"))
    said = capsys.readouterr().out
    assert re.match(r"preflight: 1 process of \d x cpu, mesh data 1, .*; jaxup [\d.]+, jax [\d.]+\n", said)
    assert f"preflight: all read and write --workdir={tmp_path / 'runs' / 'run'}\n" in said
    assert f"preflight: all read and write --config.data.store={tmp_path / 'runs' / 'data'}\n" in said
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_complete_is_only_read(finished, corpus, tmp_path, capsys):
    store = next((finished[0].parent / "data").iterdir())
    before = sorted(store.iterdir())
    run(*arguments(corpus, tmp_path / "run", f"--config.data.store={store}"))
    assert f"--config.data.store={store}" in capsys.readouterr().out
    assert sorted(store.iterdir()) == before


def test_what_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError,
        match=r"^preflight: --config.data.store=\S+/file/store: Not a directory; process 0 cannot write there$",
    ):
        run(*arguments(corpus, tmp_path / "run", f"--config.data.store={tmp_path / 'file' / 'store'}"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_machine_that_differs_is_named(tmp_path, monkeypatch, one_device):
    """As process 0 of two hears it: the other has fewer devices, and another disk."""
    more = {"host": "w-1", "devices": "3 x cpu", "wrong": ["does not see in --workdir=x what process 0 wrote there"]}
    monkeypatch.setattr(preflight, "gather", lambda mine, what: [mine, dict(more)])
    with pytest.raises(UserError, match=r"^preflight: process 1 \(w-1\) does not see in .* \(and 1 more\)$"):
        preflight.show(None, {"--workdir": tmp_path / "run"})
    more["wrong"] = []
    with pytest.raises(UserError, match=r"^preflight: process 1 \(w-1\) has 3 x cpu, and process 0 \d x cpu$"):
        preflight.show(None, {"--workdir": tmp_path / "run"})


@pytest.mark.slow
def test_two_processes_see_the_same_place_or_it_is_said(corpus, tmp_path):
    """The run directory of each is relative to where it was started: the same one, then two."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    command = arguments(corpus, "runs/run", "--preflight", "--config.mesh.data=-1")
    for directory, code in ((here, 0), (elsewhere, 2)):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        with (
            processes.started("-m", "jaxup.train", *command, cwd=here, **processes.explicit(port, 2, 0)) as one,
            processes.started("-m", "jaxup.train", *command, cwd=directory, **processes.explicit(port, 2, 1)) as two,
        ):
            (out, err), (_, other) = one.communicate(timeout=600), two.communicate(timeout=600)
            assert [one.returncode, two.returncode] == [code, code], (err, other)
        if code:
            assert "preflight: process 1 (" in err
            assert "does not see in --workdir=runs/run what process 0 wrote there" in err
        else:
            assert "preflight: 2 processes of 1 x cpu" in out
        assert list(here.rglob("*.tmp")) == list(elsewhere.rglob("*.tmp")) == []
