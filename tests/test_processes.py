"""Several processes on one machine: the same global batch, the same losses, one stop for all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_train import arguments, corpus, losses  # noqa: F401

pytestmark = pytest.mark.slow


def spawn_two(*args):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {
        **os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
    }  # fmt: skip
    return [
        subprocess.Popen([sys.executable, "-m", "jaxup.train", *args], text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, env={**environment, "JAX_PROCESS_ID": str(rank)})
        for rank in range(2)
    ]  # fmt: skip


def test_two_processes_train_what_one_does(corpus, tmp_path):  # noqa: F811
    one = subprocess.run([sys.executable, "-m", "jaxup.train", *arguments(corpus, tmp_path / "one")],
                         env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)  # fmt: skip
    assert one.returncode == 0, one.stderr
    processes = spawn_two(*arguments(corpus, tmp_path / "two", "--config.mesh.fsdp=2"))
    for process in processes:
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
    single, double = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [(r["model"], r["step"]) for r in single] == [(r["model"], r["step"]) for r in double]
    for a, b in zip(single, double, strict=True):
        for key in a.keys() & {"loss", "val_loss"}:
            # Sums in another order: float32 rounding, carried through eight updates.
            assert a[key] == pytest.approx(b[key], rel=1e-5)


def test_a_signal_to_one_stops_both_at_the_same_step(corpus, tmp_path):  # noqa: F811
    more = ["--config.steps=100000", "--config.checkpoint.interval=100000", "--config.eval.interval=100000"]
    processes = spawn_two(*arguments(corpus, tmp_path / "run", *more))
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [143, 143], ends
    steps = {re.search(r"saved at step (\d+)", err).group(1) for _, err in ends}
    assert len(steps) == 1
    assert (tmp_path / "run" / "checkpoints" / "reference" / steps.pop()).is_dir()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 100000
