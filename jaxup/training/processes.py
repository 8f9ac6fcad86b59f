"""A run of one process or of many: how they join, stop and leave together.

A thread of each, apart from the main one, says once a second how far its process is and looks at what the others say,
so that nothing the main thread waits in can hide the end of another. See `jaxup.together` for what they speak over.
"""

from __future__ import annotations

import _thread
import contextlib
import faulthandler
import itertools
import json
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from jaxup import progress, together
from jaxup.errors import NonFinite, Stopped
from jaxup.progress import say
from jaxup.together import exit_code, gather, identity, line_of, lives, names, service
from jaxup.training import joining, places
from jaxup.training.joining import LOST, End, Meeting, died, initialize

_SILENT = 5  # seconds without a word of its thread after which a process is suspected
_GRACE = 5  # seconds that the main thread has to leave in order, once it is to
_LONG = 10  # times the time limit is what is no training step may take, such as to compile, load and save
_START = 60  # seconds that the start of all may take at least, however short the time limit of a step is

_runs = itertools.count()


class Processes:
    """Context of a run: signals ask instead of ending the process, and what ends one process ends all.

    `join` lets the other processes in, if the environment speaks of any. Where there are several the context is not
    left with an exception: it is printed, and the process ends with its exit code.

    SIGTERM or SIGINT raises Stopped in the main thread at once, unless `deferred`: then `should_stop` says True, in all
    processes at the same call of it. A second SIGINT insists. Where the main thread does not come to it, in a compiler
    for instance, the process ends after `_GRACE` seconds.

    Args:
      timeout: seconds without progress after which several processes give up; see `_overdue`.
    """

    def __init__(self, timeout: float):
        self.signum: int | None = None
        self.deferred = False  # there is something to save, and the main thread asks `should_stop` again and again
        self._timeout, self._place = timeout, f"jaxup/run/{next(_runs)}/"
        self._meeting: Meeting | None = None  # of several, until they have joined
        self._service: Any = None  # once they have
        self._rank, self._count = 0, 1
        self._several, self._joining = False, False  # which the environment says; `_service` is there once it is so
        self._closed, self._leaving = False, 0  # the exit code that it leaves with, once it does
        self._signalled: float | None = None  # when a signal came that the thread has not dealt with yet
        self._again = False  # what the handler raised was swallowed
        self._handled = ""  # what the handler made of it: "raised" or "deferred"
        self._ending: tuple[float, End] | None = None  # the main thread has time until then
        # The agreement on where to stop: positions are counted by calls of `should_stop`.
        self._agreeing = threading.Condition()
        self._position = 0
        self._asked: int | None = None  # the signal for which positions are frozen until all are known
        self._stop_at: int | None = None
        # Progress of this process, and what process 0 knows of the others.
        self._stepping, self._long = False, 0
        self._seen, self._since = (0, 0), time.monotonic()
        self._heard: dict[int, tuple[str, float]] = {}  # what each said last, and since when
        self._silent: dict[int, str] = {}  # ranks of which nothing was heard for a while, and their identities
        self._first = ""  # the identity of process 0, of whose silence only the others can tell
        self._answered = 0.0  # when the service last did

    # ---- the main thread

    def __enter__(self) -> Processes:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        # Signals are seen through a pipe: their handlers wait until the main thread is back in Python.
        self._pipe, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._previous_wake = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="jaxup processes", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._several:
            try:
                if error is None:
                    gather(None, "done")
                # A status of XLA, a barrier of Orbax: what was to be read or written when it came is not at fault.
                text = f"{error} {getattr(error, '__context__', '')}"
                if not isinstance(error, Stopped) and re.search(r"\b[A-Z_]{5,}: |[Bb]arrier", text):
                    self._await_cause()
            except BaseException as later:  # a signal, or the end of another process, while waiting for it
                error = later
            if error is not None:
                self._leave(error)
        self._closed = True
        self._wake_up()
        self._thread.join()
        signal.set_wakeup_fd(self._previous_wake)
        sys.unraisablehook = self._previous_hook
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._pipe)
        os.close(self._wake)

    def join(self) -> None:
        """Joins the other processes of a pod or cluster; UserError if they do not come, or the environment is wrong."""
        here = places.place()
        if here is None:
            return
        # What the service has to say of the ends of others is said here, in a line.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        self._several, limit = True, max(self._timeout, _START)
        before = sys.modules.get("jax")
        if 1 < here.total <= joining.MANY and not (before and before.distributed.is_initialized()):
            self._meeting = Meeting(here, self._wake_up)
            self._wake_up()
            self._meeting.come(limit)
            with self._undisturbed():
                import jax
            self._meeting.wait(limit)
        with self._undisturbed():  # whom this process has not met and not joined it cannot tell of a signal
            import jax

            if not jax.distributed.is_initialized():
                initialize(here, self._lost, limit)
            self._several = service() is not None
            if self._several:
                (self._rank, self._count), self._service = together.here(), service()
                if self._rank == 0:
                    self._service.key_value_set(f"{self._place}now/first", identity(), True)
                if self._meeting is not None:
                    self._meeting.leave()
                self._wake_up()

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Signals, and the ends of others, wait until the end of the block: importing a library does not bear them."""
        self._joining = True
        try:
            yield
        finally:
            self._joining = False
        if self._ending is not None:
            raise Stopped(self._ending[1].line, self._ending[1].code)
        if self.signum is not None:
            raise Stopped(f"stopped by {signal.Signals(self.signum).name}", 128 + self.signum)

    def should_stop(self) -> bool:
        """Whether a signal asked to leave here. Of several processes all call this, and all get the same answer."""
        if self._service is None:
            return self.signum is not None
        with self._agreeing:
            # Whoever goes on before all positions are known might pass the place where the others stop.
            while self._asked is not None and self._stop_at is None:
                self._agreeing.wait(1)
            self._position += 1
            return self._stop_at is not None and self._position >= self._stop_at

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around what sets `deferred` when there is something to save, and has saved it at the end."""
        try:
            yield
        finally:
            self.deferred = False

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Around training steps: from the first on, which is compiled, each has to come within the time limit."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    @contextlib.contextmanager
    def long_work(self) -> Iterator[None]:
        """Around what may take much longer than a training step does, in between: evaluating, saving."""
        self._long += 1
        try:
            yield
        finally:
            self._long -= 1
            progress.reports += 1

    def stopped(self, message: str) -> Stopped:
        """What to raise when `should_stop` said so."""
        return Stopped(message, 128 + (self.signum or self._asked or signal.SIGTERM))

    def _wake_up(self) -> None:
        os.write(self._wake, b"\0")

    def _swallowed(self, args: Any) -> None:
        """What is raised in a destructor or a callback of the garbage collector goes no further: once more, then."""
        if isinstance(args.exc_value, Stopped):
            self._again = True
            self._wake_up()
        else:
            self._previous_hook(args)

    def _handle(self, signum: int, frame: object) -> None:
        if self._leaving:
            return
        again = self.signum is not None
        ending = None if again else self._ending
        if ending is None:  # it is a signal, and not the thread that interrupts
            self.signum = signum
        if self._joining:
            return
        if ending is not None:
            raise Stopped(ending[1].line, ending[1].code)
        # What it interrupts may leave coroutines of Orbax behind.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        if not self.deferred or (again and signum == signal.SIGINT):
            self._handled = "raised"
            raise Stopped(f"stopped by {signal.Signals(signum).name}", 128 + signum)
        self._handled = "deferred"
        if not again:
            say(f"{signal.Signals(signum).name}: saving, then leaving")

    def _await_cause(self) -> None:
        """A collective fails when another process has ended; which, and why, is known a little later."""
        deadline = time.monotonic() + _SILENT + 2
        while time.monotonic() < deadline:
            if self._ending is not None:
                raise Stopped(self._ending[1].line, self._ending[1].code)
            if self._silent:
                if (end := self._fate()).stalled:
                    self._give_up(end)
                raise Stopped(end.line, LOST)
            time.sleep(0.1)

    def _leave(self, error: BaseException) -> None:
        """Ends the process, telling the others: they need not wait for it."""
        code, line = exit_code(error), line_of(error)
        self._leaving, self._joining = code, False
        if hasattr(error, "exit_code") or isinstance(error, KeyboardInterrupt):
            say(line)
        else:
            traceback.print_exception(error)
        agreed = isinstance(error, NonFinite) or (isinstance(error, Stopped) and self._stop_at is not None)
        self._say_end(End(code, line, agreed))
        # The meeting and the service end with process 0, which is therefore the last to leave.
        deadline = time.monotonic() + (60 if agreed else _GRACE + 3)
        while self._meeting is not None and self._meeting.absent and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._service is not None and self._rank == 0:
            with contextlib.suppress(_errors()):
                while len(self._service.key_value_dir_get(f"{self._place}now/end")) < self._count:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.05)
        self._exit(code)

    # ---- the thread

    def _watch(self) -> None:
        while not self._closed:
            pending = self._signalled is not None or self._ending is not None or self._asked is not None
            wait = (0.05 if pending else 1.0) if self._service is not None or pending else None
            sockets: list[Any] = self._meeting.sockets if self._meeting is not None else []
            readable = select.select([self._pipe, *sockets], [], [], wait)[0]
            if self._pipe in readable:
                came = [number for number in os.read(self._pipe, 64) if number in (signal.SIGTERM, signal.SIGINT)]
                if came and self._ending is None:
                    self._signalled, self._signal = time.monotonic(), came[-1]
            if self._again:
                time.sleep(0.05)  # the main thread is out of there by then, or else comes here again
                self._again = False
                _thread.interrupt_main(signal.SIGTERM if self.signum is None else signal.Signals(self.signum))
            if self._signalled is not None:
                self._own_signal(time.monotonic() - self._signalled)
            if self._meeting is not None and (ended := self._meeting.turn(readable)):
                self._follow(*ended)
            if self._service is not None:
                self._talk()
            if self._ending is not None and time.monotonic() > self._ending[0]:
                self._say_end(self._ending[1])
                self._exit(self._leaving or self._ending[1].code, "" if self._leaving else self._ending[1].line)
        faulthandler.cancel_dump_traceback_later()

    def _own_signal(self, seconds: float) -> None:
        """Makes known what the handler decided, or decides if the main thread does not come to it."""
        if not self._handled and seconds < (2 * _GRACE if self._joining else _GRACE):
            return
        if self._handled == "deferred" or (not self._handled and self.deferred):
            if self._service is not None:
                with contextlib.suppress(_errors()):
                    self._service.key_value_set(f"{self._place}now/ask/{self._rank}", str(self._signal), True)
        elif not self._leaving:
            end = End(128 + self._signal, f"stopped by {signal.Signals(self._signal).name}")
            self._say_end(end)
            if self._several or not self._handled:  # the others leave, and the service with them
                self._ending = (time.monotonic() + (_GRACE if self._handled else 0), end)
        self._signalled = None

    def _talk(self) -> None:
        # Should this thread, too, come to a stand.
        faulthandler.dump_traceback_later(self._limit() + 5, exit=True, file=2)
        try:
            self._say_beat()
            now = dict(self._service.key_value_dir_get(f"{self._place}now"))
            self._agree(next((int(word) for key, word in now.items() if "/ask/" in key), None))
            if self._rank == 0:
                self._listen()
            else:
                silent = json.loads(now.get(f"{self._place}now/silent", "{}"))
                self._silent = {int(rank): who for rank, who in silent.items()}
                self._first = now.get(f"{self._place}now/first", "")
        except _errors():
            return  # process 0 is gone, and the service with it: `_lost` is called
        self._answered = time.monotonic()
        ends = [(int(key.rpartition("/")[2]), End(**json.loads(word))) for key, word in now.items() if "/end/" in key]
        for rank, end in ends:
            if end.stalled:
                self._give_up(end)
            if rank != self._rank and not end.agreed:
                self._follow(rank, end)

    def _follow(self, rank: int, end: End | None) -> None:
        """Leaves as another process has; it died where it said nothing."""
        if self._ending is None and not self._leaving:
            end = end or died([rank])
            if not re.match(r"process(es)? \d", end.line):  # else it follows another as well
                end = end._replace(line=f"process {rank}: {end.line}")
            self._ending = (time.monotonic() + _GRACE, end)
            _thread.interrupt_main(signal.SIGTERM)

    def _agree(self, asked: int | None) -> None:
        """Once a process is asked to stop: where, which is beyond where any of them is."""
        if asked is None or self._stop_at is not None:
            return
        with self._agreeing:
            if self._asked is None and self.signum is None:
                say(f"{signal.Signals(asked).name} to another process: saving, then leaving")
            self._asked = asked
        self._service.key_value_set(f"{self._place}at/{self._rank}", str(self._position), True)
        known = self._service.key_value_dir_get(f"{self._place}at")
        if len(known) == self._count:
            with self._agreeing:
                self._stop_at = 1 + max(int(word) for _, word in known)
                self._agreeing.notify_all()

    def _say_beat(self) -> None:
        word = json.dumps([time.monotonic(), self._position, together.waits, self._overdue(), identity()])
        self._service.key_value_set(f"{self._place}beat/{self._rank}", word, True)

    def _overdue(self) -> bool:
        """Whether this process had to make progress by now: to end a step within the time limit, or within ten times
        as long what is none, or to report something done in it (`jaxup.progress`)."""
        seen = (progress.reports, self._position)
        if seen != self._seen or together.waits:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since > self._limit()

    def _limit(self) -> float:
        return self._timeout * (1 if self._stepping and self.deferred and not self._long else _LONG)

    def _listen(self) -> None:
        """Process 0 notes who is silent, and finds out who keeps the others waiting.

        Those behind all others do. If each of them is overdue there is no more to wait for.
        """
        now, beats = time.monotonic(), {rank: "" for rank in range(self._count)}
        for key, word in self._service.key_value_dir_get(f"{self._place}beat"):
            beats[int(key.rpartition("/")[2])] = word
        for rank, word in beats.items():
            if word != self._heard.get(rank, ("-", now))[0]:
                self._heard[rank] = (word, now)
        ages = {rank: now - since for rank, (_, since) in self._heard.items()}
        said = {rank: json.loads(word) for rank, word in beats.items() if word}
        silent = {rank: said[rank][4] if rank in said else "" for rank, age in ages.items() if age > _SILENT}
        if silent != self._silent:
            self._silent = silent
            self._service.key_value_set(f"{self._place}now/silent", json.dumps(silent), True)
        working = {rank: position for rank, (_, position, waits, *_) in said.items() if not waits}
        last = [rank for rank, position in working.items() if position == min(working.values())]
        if last and all(said[rank][3] or ages[rank] > self._timeout for rank in last):
            who = names(last) if len(last) < self._count else "all processes"
            line = f"{who} made no progress for longer than processes.timeout={self._timeout:g} s"
            end = End(LOST, line, stalled=True)
            self._say_end(end)
            time.sleep(2)  # the others read it
            self._give_up(end)

    def _say_end(self, end: End) -> None:
        if self._meeting is not None:
            self._meeting.say_end(end)
        if self._service is not None:
            with contextlib.suppress(_errors()):
                self._service.key_value_set(f"{self._place}now/end/{self._rank}", json.dumps(end._asdict()), True)

    def _lost(self, *_: object) -> None:
        """The service says that a process is dead, or does not answer; returns if it does: this is something else."""
        if self._ending is not None and not self._leaving:
            self._exit(self._ending[1].code, self._ending[1].line)
        asked = time.monotonic()
        time.sleep(2)
        if self._closed:
            self._exit(0)
        if self._answered < asked + 1:
            end = self._fate()
            if end.stalled and not self._leaving:
                self._give_up(end)
            self._exit(self._leaving or LOST, "" if self._leaving else end.line)

    def _fate(self) -> End:
        """Of those that are silent, or of process 0 and with it the service."""
        silent = self._silent or {0: self._first}
        if stopped := [rank for rank, who in silent.items() if lives(who)]:
            return End(LOST, f"{names(stopped)} still there, and not running: stopped by a signal?", stalled=True)
        return died(list(silent))

    def _give_up(self, end: End) -> None:
        faulthandler.dump_traceback(file=2)
        self._exit(end.code, end.line)

    def _exit(self, code: int, line: str = "") -> None:
        """Ends the process, whatever its main thread is in."""
        if line:
            os.write(2, f"jaxup: {line}\n".encode())
        os._exit(code)


def _errors() -> type[Exception]:
    import jax

    return jax.errors.JaxRuntimeError
