"""Locks, on file systems that have them and on those that have not."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from jaxup import together
from jaxup.errors import UserError
from jaxup.files import lock
from jaxup.files.staging import staged_directory
from jaxup.training.rundir import writer_lock


@pytest.fixture(params=[0, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK])
def locks(request, monkeypatch):
    """Whether there are any."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", refuse)
    return not request.param


def refuse(holder):
    raise UserError(holder)


def test_one_holds_it_at_a_time(tmp_path, locks, capsys):
    with writer_lock(tmp_path):
        in_use = rf"in use by process {os.getpid()} on .* since .*; wait for it or"
        with pytest.raises(UserError, match=in_use), writer_lock(tmp_path):
            pass
        assert ("has no locks: .lock.held there says" in capsys.readouterr().err) == (not locks)
    with writer_lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == [".lock"]


def test_who_waits_gets_it_in_the_end(tmp_path, locks):
    """Though the one before removes the file, as the preparation of a store does that fails."""
    path, order = tmp_path / "lock", []
    asked = threading.Event()

    def wait(holder):
        asked.set()
        asked.wait(0.01)

    def second():
        with lock.hold(path, wait):
            order.append("second")

    thread = threading.Thread(target=second)
    with lock.hold(path, refuse):
        thread.start()
        assert asked.wait(60)
        order.append("first")
        path.unlink()
    thread.join()
    assert order == ["first", "second"]


def test_what_a_process_left_that_is_gone(tmp_path, locks):
    """On this machine it is taken over, at once; of another it is not known whether it is gone."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; from jaxup.files import lock; import os, pathlib; "
    code += f"lock._claim(pathlib.Path({str(tmp_path)!r}) / 'lock.held', f'process {{os.getpid()}}')"
    subprocess.run([sys.executable, "-c", code], check=True)
    held = tmp_path / "lock.held"
    text = held.read_text()
    with lock.hold(tmp_path / "lock", refuse):
        assert held.exists()
    if not locks:
        held.write_text(text.replace(together._machine(), "another/machine"))
        advice = r" \(if that is gone, delete .*lock\.held\)"
        with pytest.raises(UserError, match=r"process \d+" + advice), lock.hold(tmp_path / "lock", refuse):
            pass
        held.write_text("")  # its process was killed as it began to write
        with pytest.raises(UserError, match="another process" + advice), lock.hold(tmp_path / "lock", refuse):
            pass


def test_directories_are_staged(tmp_path, locks):
    (tmp_path / ".out.jaxup-new-999999999").mkdir()
    with staged_directory(tmp_path / "out", force=False, marks=()) as directory:
        writing = f"process {os.getpid()} is writing it"
        with pytest.raises(UserError, match=writing), staged_directory(tmp_path / "out", force=False, marks=()):
            pass
        (directory / "file").write_text("whole")
    assert os.listdir(tmp_path) == ["out"]
