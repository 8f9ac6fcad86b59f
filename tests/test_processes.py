"""Several processes on one machine: the same global batch, the same losses, one stop for all."""

import contextlib
import errno
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import sys
import threading
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import safetensors.numpy
from damage import stop_early
from flax import traverse_util
from runs import HEAL, arguments, losses, metrics
from test_heal import COPIES, runs  # noqa: F401

from jaxup import together
from jaxup.errors import NoRoom, Stopped, UserError
from jaxup.experiments import run
from jaxup.hub.writer import save
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import abstract
from jaxup.model.spec import flatten
from jaxup.together import told
from jaxup.train import main
from jaxup.training import checkpoint, loop
from jaxup.training.joining import LOST, End, Meeting
from jaxup.training.places import Place
from jaxup.training.processes import Processes


def check_losses(one, two):
    single, double = losses(one), losses(two)
    assert [(r["model"], r["step"]) for r in single] == [(r["model"], r["step"]) for r in double]
    for a, b in zip(single, double, strict=True):
        for key in a.keys() & {"loss", "val_loss"}:
            # Sums in another order: float32 rounding, carried through at most ten updates.
            assert a[key] == pytest.approx(b[key], rel=1e-5)


@pytest.mark.slow
def test_two_processes_finish_what_one_began(finished, corpus, tmp_path):
    """As if it had stopped at the target's newest checkpoint but one: they go on there, and train the control anew."""
    shutil.copytree(finished[0].parent, tmp_path / "runs")
    workdir = tmp_path / "runs" / "whole"
    stop_early(workdir)
    out, _ = processes.run_two("-m", "jaxup.train", *arguments(corpus, workdir), devices=1)
    assert "target_2: resumes at step 6 of 8" in out.stdout
    check_losses(finished[0], workdir)
    assert (workdir / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_train_what_one_does(finished, corpus, tmp_path):
    processes.run_two("-m", "jaxup.train", *arguments(corpus, tmp_path / "two", "--config.mesh.fsdp=2"))
    check_losses(finished[0], tmp_path / "two")


@pytest.mark.slow
def test_two_processes_heal_what_one_does(runs, tmp_path):  # noqa: F811
    """Copies alone train; what is frozen is split over both processes, and so is its digest."""
    data = [f"--config.data.files={runs / 'chats.jsonl'}", f"--config.pretrain.data.source={runs / 'corpus'}"]
    command = ("-m", "jaxup.train", *HEAL, *COPIES, *data)
    command = (*command, "--config.steps=6", "--config.epochs=0")
    processes.run(*command, f"--workdir={tmp_path / 'one'}")
    processes.run_two(*command, f"--workdir={tmp_path / 'two'}", "--config.mesh.data=1", "--config.mesh.fsdp=4")
    check_losses(tmp_path / "one", tmp_path / "two")
    first, second = (safetensors.numpy.load_file(tmp_path / d / "export" / "model.safetensors") for d in ("one", "two"))
    assert first.keys() == second.keys()


def test_a_signal_to_one_stops_both_at_a_step_from_which_one_goes_on(finished, corpus, tmp_path, monkeypatch):
    """The processes hold the same rows, each the half of every matrix: neither can save without the other."""
    shutil.copytree(finished[0].parent / "data", tmp_path / "data")
    never = ("steps", "checkpoint.interval", "eval.interval")
    more = [*(f"--config.{key}=100000" for key in never), "--config.model.num_layers=2", "--config.mesh.tensor=2"]
    command = arguments(corpus, tmp_path / "run", *more)
    log = tmp_path / "run" / "metrics.jsonl"
    with processes.two_started("-m", "jaxup.train", *command, devices=1) as both:
        processes.wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 5, *both)
        both[1].send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=processes.LIMIT) for process in both]
    assert [process.returncode for process in both] == [143, 143], ends
    (step,) = {int(re.search(r"saved at step (\d+)", err).group(1)) for _, err in ends}
    assert (tmp_path / "run" / "checkpoints" / "reference" / str(step)).is_dir()

    write = loop.Meter._write

    def write_and_stop(self, at, **values):
        write(self, at, **values)
        if at == step + 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Meter, "_write", write_and_stop)
    with pytest.raises(Stopped, match=r"reference: saved at step") as stopped:
        main(["train", *command])
    assert stopped.value.exit_code == 143
    steps = [r["step"] for r in metrics(tmp_path / "run") if "loss" in r]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > step


def test_what_is_told_takes_one_turn(monkeypatch):
    """In process 0: the others have no part in what it asks itself meanwhile."""
    said = {}
    service = SimpleNamespace(key_value_set=said.__setitem__)
    monkeypatch.setattr(together, "service", lambda: service)
    assert told(lambda: {"a": [told(lambda: 1, "count"), 2]}, "list") == {"a": [1, 2]}

    def read():
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        told(lambda: told(read, "read"), "look")
    first, second = said
    assert int(second.rpartition("/")[2]) == int(first.rpartition("/")[2]) + 1
    assert [json.loads(word) for word in said.values()] == [{"value": {"a": [1, 2]}}, {"error": "damaged", "code": 2}]


def test_processes_agree_on_what_they_train(monkeypatch):
    """Of two that do not the same is said in both, with the keys that differ."""
    mine = {"jax": "0.10.2", "steps": 8, "plan": "long " * 50, "mesh": {"data": 1, "fsdp": 2}, "eval": {"rows": 1}}
    first = {**mine, "steps": 9, "plan": "other " * 50, "mesh": {"data": 1, "fsdp": 4}}

    def check(first, *others):
        monkeypatch.setattr(run, "told", lambda make, what: first)
        monkeypatch.setattr(run, "gather", lambda value, what: [[], *others, value])
        run._check_same(mine)

    check(mine)
    for others, line in [
        ([], "process 1 differs from process 0: mesh.fsdp is 2, not 4; plan is another; steps is 8, not 9; start all"),
        ([["a is 1, not 2"] * 5], "process 1 differs from process 0: a is 1, not 2; a is 1, not 2; a is 1, not 2 (and"),
    ]:
        with pytest.raises(UserError, match=re.escape(line)):
            check(first, *others)


DIFFERENT = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import sys
import jaxup
from jaxup.errors import entry_point
from jaxup.train import main
if os.environ["JAX_PROCESS_ID"] == "1":
    exec(sys.argv.pop(1))
else:
    sys.argv.pop(1)
entry_point(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        ("sys.argv.append('--config.steps=9')", [], "process 1 differs from process 0: steps is 9, not 8; start all"),
        ("jaxup.__version__ = '0.0.9'", [], "process 1 differs from process 0: jaxup is '0.0.9 of "),
        ("sys.argv.append('--skip-step=3')", [], "process 0: corrections is 'step 3 left out', not ''; start"),
        (
            "",
            ["--config.mesh.tensor=3"],
            "mesh: data x fsdp x context x tensor = 1 x 1 x 1 x 3 is not the 2 devices here",
        ),
        ("", ["--config.mesh.tensor=2", "--config.model.num_heads=1"], "1 attention heads do not divide over mesh"),
        ("", ["--platform=tpu"], "devices: "),
    ],
)
def test_what_cannot_be_is_one_line_and_ends_both(change, more, said, corpus, tmp_path):
    command = arguments(corpus, tmp_path / "runs" / "run", *more)
    with processes.two_started("-c", DIFFERENT, change, *command, devices=1) as both:
        ends = [process.communicate(timeout=processes.LIMIT) for process in both]
    assert [process.returncode for process in both] == [2, 2], ends
    for _, err in ends:
        (line,) = err.splitlines()
        assert said in line
    assert not (tmp_path / "runs" / "run").exists()


def test_a_signal_is_no_fault_of_what_is_restored():
    with pytest.raises(Stopped), checkpoint.restoring("run/checkpoints/healed/9", "remove it"):
        raise Stopped("stopped by SIGTERM", 143)


def test_who_is_stopped_knows_why(monkeypatch):
    left = []
    monkeypatch.setattr(Processes, "_leave", lambda self, error: left.append(error))
    monkeypatch.setattr(Processes, "_await_cause", lambda self: pytest.fail("waits for what others say"))
    stopped = Stopped("stopped by SIGTERM", 143)
    stopped.__context__ = RuntimeError("DEADLINE_EXCEEDED: the value is not there yet")  # a wait of `together.told`
    several = Processes(60.0)
    several._several = True
    with pytest.raises(Stopped), several:
        raise stopped
    assert [error.exit_code for error in left] == [143]


def test_what_is_silenced_for_orbax_is_not_for_good(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    monkeypatch.setattr(checkpoint, "_stragglers", mine := checkpoint._Stragglers())
    monkeypatch.setattr(checkpoint, "_STRAGGLERS", 1.0)
    absl, asyncio = (logging.getLogger(name) for name in ("absl", "asyncio"))
    state = lambda: (absl.level, mine in asyncio.filters, sys.unraisablehook)  # noqa: E731
    before = state()

    def late():
        """As TensorStore's threads say that something ended after the loop in which it was waited for."""
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))

    with checkpoint.Checkpoints(tmp_path / "run", keep=1):
        assert state()[:2] == (logging.CRITICAL, True)
        late()
    assert state() == before
    for error in (OSError(errno.ENOSPC, "No space left on device"), Stopped("stopped by SIGTERM", 143)):
        run = checkpoint.Checkpoints(tmp_path / "run", keep=1)
        with pytest.raises((NoRoom, Stopped)), run, checkpoint.writing(tmp_path):
            raise error
        assert state()[:2] == (before[0], True)
        late()
    refused = pytest.raises(UserError, match="cannot restore this checkpoint: no such array; remove it")
    with refused, checkpoint.quietly(), checkpoint.restoring("run", "remove it"):
        raise ValueError("no such array")
    processes.wait_until(lambda: state() == before)
    assert heard == []
    late()
    assert len(heard) == 1


FAULT = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # as the command does, before it imports jax
import hashlib, signal, sys, threading, time
from jaxup.errors import UserError, entry_point
from jaxup.train import main
from jaxup.training import checkpoint, loop
rank, place, fault = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)
check, train, load = loop.Meter.check, loop._train, checkpoint.Checkpoints._load
def provoke():
    if os.environ["JAX_PROCESS_ID"] == rank:
        exec(fault)
def late(self, *args):
    check(self, *args)
    if place == "step" and self.checked == 5:
        provoke()
def before(*args):
    if place == "loop":
        provoke()
    return train(*args)
def reading(self, *args):
    if place == "restore":
        provoke()
    return load(self, *args)
loop.Meter.check, loop._train, checkpoint.Checkpoints._load = late, before, reading
entry_point(main)
"""
IN_C = "threading.Timer(1, os.kill, (os.getpid(), 15)).start(); hashlib.pbkdf2_hmac('md5', b'', b'', 2**31 - 1)"
STALLED = "made no progress for longer than processes.timeout=5 s"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "place", "fault", "codes", "said"),
    [
        (1, "step", 'raise UserError("rows are damaged")', (2, 2), ("process 1: rows are damaged", "rows are damaged")),
        (0, "step", 'raise KeyError("a bug")', (1, 1), ("KeyError: 'a bug'", "process 0: KeyError: 'a bug'")),
        (1, "step", "os.kill(os.getpid(), signal.SIGKILL)", (5, -9), ("process 1 died, or cannot be reached", "")),
        (0, "step", "os.kill(os.getpid(), signal.SIGKILL)", (-9, 5), ("", "process 0 died, or cannot be reached")),
        (1, "step", "os.kill(os.getpid(), signal.SIGSTOP)", (5, None), ("process 1 still there, and not running", "")),
        (0, "step", "os.kill(os.getpid(), signal.SIGSTOP)", (None, 5), ("", "process 0 still there, and not running")),
        (1, "step", "time.sleep(1000)", (5, 5), (f"process 1 {STALLED}",) * 2),
        (0, "step", "time.sleep(1000)", (5, 5), (f"process 0 {STALLED}",) * 2),
        # What was being read is not at fault.
        (1, "restore", "os.kill(os.getpid(), signal.SIGKILL)", (5, -9), ("process 1 died, or cannot be reached", "")),
        # The main thread is in C, where no handler of Python's is called.
        (1, "loop", IN_C, (143, 143), ("process 1: stopped by SIGTERM", "stopped by SIGTERM")),
        (0, "loop", "os.kill(os.getpid(), signal.SIGTERM)", (143, 143),
         ("stopped by SIGTERM", "process 0: stopped by SIGTERM")),
        # Another process has time: nobody is waited for in a step.
        (1, "loop", "time.sleep(20)", (0, 0), ("", "")),
    ],
)  # fmt: skip
def test_what_ends_one_ends_both(rank, place, fault, codes, said, corpus, tmp_path):
    timeout = 60 if "SIG" in fault else 5
    more = [f"--config.processes.timeout={timeout}", "--config.inherit.control=0"]
    command = arguments(corpus, tmp_path / "run", *more)
    with processes.two_started("-c", FAULT, str(rank), place, fault, *command, devices=1) as both:
        if None in codes:  # it stays as it is
            stopped = codes.index(None)
            both[1 - stopped].wait(processes.LIMIT)
            both[stopped].send_signal(signal.SIGKILL)
            codes = tuple(-signal.SIGKILL if code is None else code for code in codes)
        ends = [process.communicate(timeout=processes.LIMIT) for process in both]
    assert tuple(process.returncode for process in both) == codes, ends
    for text, (_, err) in zip(said, ends, strict=True):
        assert text in err
        assert "Check failure stack trace" not in err
        if "died" in text:
            assert err.splitlines()[-1].startswith(f"jaxup: {text}")
        assert ("most recent call first" in err) == ("progress" in text or "running" in text)


class Met:
    """One process of a meeting, in a thread of this one."""

    def __init__(self, port, rank, total):
        self._pipe, self._wake = os.pipe()
        self.end = None
        self.meeting = Meeting(Place(f"127.0.0.1:{port}", total, rank), lambda: os.write(self._wake, b"."))
        self._stop = False
        self._thread = threading.Thread(target=self._turn, daemon=True)
        self._thread.start()

    def _turn(self):
        while not self._stop:
            readable = select.select([self._pipe, *self.meeting.sockets], [], [], 0.02)[0]
            if self._pipe in readable:
                os.read(self._pipe, 64)
            end = self.meeting.turn(readable)
            self.end = self.end or end

    def pause(self):
        self._stop = True
        self._thread.join()

    def die(self):
        """As when a process ends: its connections close."""
        self.pause()
        for peer in self.meeting.sockets:
            peer.close()


@pytest.fixture
def meet():
    """meet(total, *ranks): these ranks of so many, and all that have come."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = []

    def begin(total, *ranks):
        came = [Met(port, rank, total) for rank in ranks]
        began.extend(came)
        for one in came:
            one.meeting.come(10.0)
        return came

    yield begin
    for one in began:
        one.die()


def test_processes_meet_before_they_join(meet):
    zero, one, two = met = meet(3, 0, 1, 2)
    waiting = [threading.Thread(target=m.meeting.wait, args=(10.0,)) for m in met]
    for thread in waiting[:2]:
        thread.start()
    waiting[0].join(0.2)
    assert waiting[0].is_alive()  # for the last
    waiting[2].start()
    for thread in waiting:
        thread.join()
    with socket.create_server(("127.0.0.1", int(zero.meeting._address.rpartition(":")[2]))):
        pass  # the service can begin where the door was
    one.meeting.leave()
    processes.wait_until(lambda: not one.meeting.sockets)
    one.die()
    two.die()
    processes.wait_until(lambda: zero.end is not None)
    assert zero.end == (2, None)  # the other has left in order


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_who_dies_before_it_has_joined_is_known_at_once(meet, dead):
    met = meet(3, 0, 1, 2)
    met.pop(dead).die()
    processes.wait_until(lambda: all(m.end is not None for m in met))
    assert [m.end for m in met] == [(dead, None)] * 2


def test_who_ends_before_it_has_joined_says_why(meet):
    end = End(143, "stopped by SIGTERM")
    zero, one = meet(3, 0, 1)
    one.meeting.say_end(end)
    processes.wait_until(lambda: zero.end is not None)
    assert zero.meeting.absent == [2]
    (two,) = meet(3, 2)  # comes later, and is told
    processes.wait_until(lambda: two.end is not None)
    assert (zero.end, two.end, one.end) == ((1, end), (1, end), None)


def test_who_has_said_why_it_ends_has_not_died(meet):
    end = End(143, "stopped by SIGTERM")
    zero, one, two = meet(3, 0, 1, 2)
    processes.wait_until(lambda: zero.meeting.absent == [])
    two.pause()  # what it is told it reads in one
    one.meeting.say_end(end)
    processes.wait_until(lambda: zero.end is not None)
    one.die()
    processes.wait_until(lambda: len(zero.meeting.sockets) == 2)  # the door, and the one that is left
    assert two.meeting.turn(two.meeting.sockets) == (1, end)


@pytest.mark.parametrize(
    ("total", "rank", "said"),
    [(2, 1, "two processes of this run have JAX_PROCESS_ID=1"), (3, 2, "JAX_NUM_PROCESSES=2, and 3 for another")],
)
def test_who_is_one_too_many_ends_the_meeting(meet, total, rank, said):
    met = meet(2, 0, 1) + meet(total, rank)
    processes.wait_until(lambda: all(m.end is not None for m in met))
    for m in met:
        assert m.end[0] == 0
        assert m.end[1].code == 2
        assert m.end[1].line.startswith(said)


def test_what_does_not_belong_to_a_meeting_is_not_heard(meet):
    (zero,) = meet(2, 0)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"[" * 10**5 + b"\n", b'["end", [1, [0, "x"]]]\n', b'["come", [7, "x"]]\n'):
        with socket.create_connection(zero.meeting._at) as stranger:
            stranger.settimeout(10)
            with contextlib.suppress(ConnectionError):
                stranger.sendall(said)
                assert stranger.recv(1) == b""
    assert zero.end is None
    assert zero.meeting.absent == [1]


def test_who_does_not_come_is_named(meet):
    (zero,) = meet(3, 0)
    with pytest.raises(UserError, match=r"\Aprocesses 1, 2 did not come to 127.0.0.1:\d+ [^\n]*start them all within"):
        zero.meeting.wait(0.1)
    meet(3, 1, 2)
    with pytest.raises(Stopped, match=r"processes 1, 2 started, and made no progress for 0.1 s") as stopped:
        zero.meeting.wait(0.1)
    assert stopped.value.exit_code == LOST
    with pytest.raises(UserError, match=r"process 0 did not come to 127.0.0.1:1 "):
        Meeting(Place("127.0.0.1:1", 2, 1), lambda: None).come(0.0)
    with pytest.raises(
        UserError, match=r"process 0 cannot listen at 127.0.0.1:\d+ \(JAX_COORDINATOR_ADDRESS\): Address already in use"
    ):
        Meeting(Place(zero.meeting._address, 2, 0), lambda: None)


LOAD = """
import json, os, sys
import jax, numpy as np
from jax.sharding import AxisType
jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], 2, int(os.environ["JAX_PROCESS_ID"]))
from flax import nnx
from jaxup import UserError, load
from jaxup.model.spec import flatten
from jaxup.train import main
from jaxup.training import checkpoint, loop
from jaxup.hub.reader import load_config
from plain import load_params
good, bad = sys.argv[1:]
mesh = jax.make_mesh((2, 4), ("tensor", "fsdp"), axis_types=(AxisType.Auto,) * 2)
load(good, mesh=mesh)  # compiles, and imports what is imported late
read = lambda: int(open("/proc/self/io").read().split("rchar: ")[1].split()[0])
before = read()
model = load(good, mesh=mesh)
after = read()
expected = flatten(load_params(good, load_config(good)))
leaves = flatten(nnx.to_pure_dict(nnx.state(model)))
for path, leaf in leaves.items():
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[path][shard.index], err_msg=path)
kept = sum(shard.data.nbytes for leaf in leaves.values() for shard in leaf.addressable_shards)
try:
    load(bad, mesh=mesh, strict=True)
    refused = ""
except UserError as error:
    refused = str(error)
print(json.dumps({"read": after - before, "kept": kept, "refused": refused}))
"""


@pytest.mark.slow
def test_each_of_two_processes_reads_its_share(tmp_path):
    rng = np.random.default_rng(0)
    config = ModelConfig.llama(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_layers=3, num_heads=8, num_kv_heads=2,
        max_positions=64,
    )  # fmt: skip
    leaves = {p: rng.standard_normal(a.shape, dtype=np.float32) for p, a in flatten(abstract(config)[1]).items()}
    save(tmp_path / "good", config, traverse_util.unflatten_dict(leaves, sep="."))
    shutil.copytree(tmp_path / "good", tmp_path / "bad", ignore=shutil.ignore_patterns("jaxup_manifest.json"))
    # One number, in a row that only one of the two reads: both must refuse, or the other waits for ever.
    tensors = safetensors.numpy.load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = np.nan
    safetensors.numpy.save_file(tensors, tmp_path / "bad" / "model.safetensors")
    for process in processes.run_two("-c", LOAD, tmp_path / "good", tmp_path / "bad", devices=4):
        result = json.loads(process.stdout.splitlines()[-1])
        # What it keeps and a twentieth: headers, config, and the vectors, which all read.
        assert result["read"] <= 1.05 * result["kept"], result
        assert "model.layers.1.mlp.up_proj.weight" in result["refused"]


def test_a_signal_in_a_destructor_is_not_lost():
    class Old:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            list(range(1000))  # the handler runs in here, and what it raises goes no further than this method

    def work():
        old = Old()
        del old
        for _ in range(10**7):
            pass
        raise AssertionError("nothing stopped it")

    with Processes(60.0), pytest.raises(Stopped, match="stopped by SIGTERM"):
        work()
