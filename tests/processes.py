"""Processes that tests start: a Python with this package, so many CPU devices, and an end whatever happens."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxup

TESTS = Path(__file__).parent
LIMIT = 1800  # seconds: it ends what hangs, however slow the machine


@contextlib.contextmanager
def started(*arguments, devices=1, cwd=None, **environment) -> Iterator[subprocess.Popen]:
    """`python ARGUMENTS`; at the end it is killed, and with it all that it has started."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    path = f"{Path(jaxup.__file__).parents[1]}:{TESTS}"
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path, **environment}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(*arguments, check=True, **options) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` to its end. With `check` that end must be a good one."""
    with started(*arguments, **options) as process:
        out, err = process.communicate(timeout=LIMIT)
    assert not check or process.returncode == 0, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def explicit(port: int, total: int, rank: int) -> dict[str, str]:
    """What the processes of one job find in their environment, here and by the launchers below."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    return dict(zip(names, (f"127.0.0.1:{port}", str(total), str(rank)), strict=True))


def slurm(port: int, total: int, rank: int) -> dict[str, str]:
    count, which = str(total), str(rank)
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": count, "SLURM_PROCID": which,
        "SLURM_LOCALID": which, "SLURM_STEP_TASKS_PER_NODE": count, "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


def open_mpi(port: int, total: int, rank: int) -> dict[str, str]:
    sizes = {f"OMPI_COMM_WORLD_{name}SIZE": str(total) for name in ("", "LOCAL_")}
    ranks = {f"OMPI_COMM_WORLD_{name}RANK": str(rank) for name in ("", "LOCAL_")}
    return {**sizes, **ranks, "JAX_COORDINATOR_PORT": str(port)}


@contextlib.contextmanager
def several_started(
    total, *arguments, devices=2, cwd=None, launcher=explicit, **environment
) -> Iterator[list[subprocess.Popen]]:
    """The processes of one job, which find each other as those on a pod do."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with contextlib.ExitStack() as stack:
        ranks = [{**launcher(port, total, rank), **environment} for rank in range(total)]
        yield [stack.enter_context(started(*arguments, devices=devices, cwd=cwd, **rank)) for rank in ranks]


two_started = functools.partial(several_started, 2)


def run_two(*arguments, **options) -> list[subprocess.CompletedProcess]:
    """Both to their good ends."""
    with two_started(*arguments, **options) as processes:
        ends = [process.communicate(timeout=LIMIT) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    return [subprocess.CompletedProcess(p.args, 0, *end) for p, end in zip(processes, ends, strict=True)]


def wait_until(happened: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Returns when it has happened, and fails when a process ends before it."""
    deadline = time.monotonic() + LIMIT
    while not happened():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
