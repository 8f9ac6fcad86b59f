"""How the processes of a run find each other, before the coordination service of JAX knows of them.

The service says nothing until all have come to it: those that are there would wait for one that died on its way. So
each holds a connection to process 0 from its first moment on, before anything that takes long is imported. The end of a
process closes its connection, and process 0 tells the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jaxup.errors import Stopped, UserError, first_line
from jaxup.progress import Waiting
from jaxup.together import names
from jaxup.training.places import ADDRESS, Place

LOST = 5  # the exit code for a process that died or makes no progress
_LONGEST = 2**16  # bytes of a word: who sends more is none of us
MANY = 500  # processes, for whose connections `select` and the usual limit of open files do
_HEARTBEAT = 10  # seconds without a sign of life after which the service takes a process for dead


class End(NamedTuple):
    """What a process says when it leaves before the end of the run."""

    code: int
    line: str
    agreed: bool = False  # all leave, at the same point
    stalled: bool = False  # said of all: stacks are to be dumped


def died(ranks: list[int]) -> End:
    line = f"{names(ranks)} died, or cannot be reached any more"
    return End(LOST, f"{line}; the same command resumes from the newest checkpoint")


class Meeting:
    """The connections of this process until all have joined: to process 0, or from it to all others.

    One thread calls `turn` whenever there is something to read in `sockets`, or `wake` was called; the rest is for the
    main thread. A word is a line of JSON, `[KIND, VALUE]`. The door of process 0 has the address of the service, and
    is closed before that begins.
    """

    def __init__(self, here: Place, wake: Callable[[], None]):
        (self._address, self._total, self._rank, _, self._names), self._wake = here, wake
        self._others: dict[socket.socket, int | None] = {}  # who is there, None until it has said so
        self._begun: dict[socket.socket, bytes] = {}  # a word of which the end has not come yet
        self._ready: set[int] = set()
        self._door: socket.socket | None = None
        self._go, self._joined = threading.Event(), False
        self._ended: tuple[int, End | None] | None = None
        host, _, port = self._address.rpartition(":")
        self._at = (host.strip("[]"), int(port))
        if self._rank == 0:
            bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
            both = not bound and socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both or ":" in bound else socket.AF_INET
            try:
                self._door = socket.create_server((bound, int(port)), family=family, dualstack_ipv6=both, backlog=MANY)
            except (OSError, OverflowError) as error:
                what = getattr(error, "strerror", None) or error
                at, hint = f"{self._address} ({self._names[0]})", "JAX_COORDINATOR_PORT chooses another"
                raise UserError(
                    f"process 0 cannot listen at {at}: {what}", hint="" if self._names[0] == ADDRESS else hint
                ) from None

    @property
    def sockets(self) -> list[socket.socket]:
        return [*self._others, *([self._door] if self._door else [])]

    def come(self, limit: float) -> None:
        """Says to process 0 that this one is there; UserError if that does not answer within `limit` seconds."""
        until, waiting = time.monotonic() + limit, Waiting()
        while self._rank:
            with contextlib.suppress(OSError):
                peer = socket.create_connection(self._at, timeout=1)
                if peer.getsockname() != peer.getpeername():  # else it met itself, by the port it was given
                    self._keep(peer, 0)
                    self._say([peer], "come", [self._rank, self._total])
                    self._wake()
                    return
                peer.close()
            if time.monotonic() > until:
                raise self._missed([0], limit)
            waiting.on("process 0 to start")
            time.sleep(0.1)

    def wait(self, limit: float) -> None:
        """Returns when all are ready to join, as this one is; UserError if one does not come, Stopped if it stands."""
        self._ready.add(self._rank)
        self._say([*self._others], "ready", None)
        self._wake()
        # Process 0 knows more, and is to say it first.
        until, waiting = time.monotonic() + limit + (10 if self._rank else 0), Waiting()
        while not self._go.wait(0.05):
            if time.monotonic() > until:
                if absent := self.absent:
                    raise self._missed(absent, limit)
                behind = sorted(set(range(self._total)) - self._ready) if self._rank == 0 else [0]
                raise Stopped(f"{names(behind)} started, and made no progress for {limit:g} s", LOST)
            waiting.on(f"{names(absent)} to start" if (absent := self.absent) else "the other processes to start")

    @property
    def absent(self) -> list[int]:
        """Who has not come yet, as process 0 knows."""
        return sorted(set(range(1, self._total)) - {*self._others.values()}) if self._door else []

    def _missed(self, ranks: list[int], limit: float) -> UserError:
        hint = f"start them all within {limit:g} s, each with a number of its own"
        return UserError(f"{names(ranks)} did not come to {self._address} ({self._names[0]})", hint=hint)

    def say_end(self, end: End) -> None:
        self._ended = (self._rank, end)
        self._say([*self._others], "end", self._ended)

    def leave(self) -> None:
        """All have joined, and the service tells what happens from now on."""
        self._joined = True
        self._wake()

    def turn(self, readable: Iterable[Any]) -> tuple[int, End | None] | None:
        """Takes in what has come, and as process 0 tells the others. If a process has ended: which, and what it said,
        None where it died."""
        ended: tuple[int, End | None] | None = None
        for peer in {*readable} & {*self.sockets}:
            if peer is self._door:
                with contextlib.suppress(OSError):
                    self._keep(self._door.accept()[0], None)
                continue
            try:
                more = peer.recv(_LONGEST)
                *lines, rest = (self._begun[peer] + more).split(b"\n")
                if not more or len(rest) > _LONGEST:
                    raise ConnectionError
                self._begun[peer] = rest
                for line in lines:
                    kind, value = json.loads(line)
                    said = self._take(peer, kind, value)
                    ended = ended or said
            except (OSError, ValueError, TypeError, RecursionError):
                if (rank := self._others.get(peer)) is not None:
                    ended = ended or (rank, None)
                self._drop(peer)
        if ended and self._rank == 0 and self._ended is None:  # that it then closes its connection is no death
            self._ended = ended
            self._say([peer for peer, rank in self._others.items() if rank != ended[0]], "end", ended)
        if self._door and len(self._ready) == self._total:
            self._door.close()
            self._door = None
            self._say([*self._others], "go", None)
            self._go.set()
        if self._joined:
            self._say([*self._others], "joined", None)
            for peer in [*self._others]:
                self._drop(peer)
        return ended

    def _take(self, peer: socket.socket, kind: str, value: Any) -> tuple[int, End | None] | None:
        rank = self._others.get(peer)
        if kind == "come" and self._rank == 0 and rank is None:
            rank, count = map(int, value)
            if count != self._total:
                return 0, End(2, f"{self._names[1]}={self._total}, and {count} for another process of this run")
            if rank in (0, *self._others.values()):
                return 0, End(2, f"two processes of this run have {self._names[2]}={rank}")
            self._others[peer] = rank
            if self._ended:
                self._say([peer], "end", self._ended)
        elif rank is None:
            raise ConnectionError
        elif kind == "ready":
            self._ready.add(rank)
        elif kind == "go":
            self._go.set()
        elif kind == "joined":
            self._drop(peer)
        elif kind == "end":
            who, end = value
            return int(who), end and End(*end)
        return None

    def _keep(self, peer: socket.socket, rank: int | None) -> None:
        peer.settimeout(5)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that is gone does not say so
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._begun[peer], self._others[peer] = b"", rank

    def _drop(self, peer: socket.socket) -> None:
        self._others.pop(peer, None)
        self._begun.pop(peer, None)
        peer.close()

    def _say(self, peers: list[socket.socket], kind: str, value: Any) -> None:
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sendall(json.dumps([kind, value]).encode() + b"\n")


def initialize(here: Place, lost: Callable[..., None], limit: float) -> None:
    """Joins the service; `lost` is called when that says that another process is dead, or does not answer."""
    import jax

    known: dict[str, Any] = {}
    if here.address:
        known = dict(coordinator_address=here.address, num_processes=here.total, process_id=here.rank)
        known |= {"local_device_ids": here.devices, "cluster_detection_method": "deactivate"}
    jax.config.update("jax_enable_preemption_service", False)  # it would take the signals
    with _ends_by(lost):
        try:
            jax.distributed.initialize(
                **known, initialization_timeout=int(min(limit, 86_400)), shutdown_timeout_seconds=30,
                heartbeat_timeout_seconds=_HEARTBEAT,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            at = f" at {here.address}" if here.address else f": {first_line(error)}"
            hint = f"start them all within {limit:g} s, each with a number of its own"
            raise UserError(f"the processes of this run did not find each other{at}", hint=hint) from None


@contextlib.contextmanager
def _ends_by(lost: Callable[..., None]) -> Iterator[None]:
    """Has `lost` called, instead of a C++ stack printed, when the service says that another process is dead.

    jax.distributed.initialize has no argument for it, though its client has. And the client of jaxlib 0.10 cannot make
    a Python object of what it calls that function with, so that C++ terminates: which calls it as well.
    """
    from jaxlib import _jax

    global _terminate
    handler = ctypes.CFUNCTYPE(None)
    make = _jax.get_distributed_runtime_client

    def terminate() -> None:
        lost()
        previous()

    _terminate = handler(terminate)
    with contextlib.suppress(OSError, AttributeError):  # another C++ library: then it is a stack
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        set_terminate.restype = handler
        previous = set_terminate(_terminate)
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=lost)
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make


_terminate: Any = None  # C++ keeps no reference to it
