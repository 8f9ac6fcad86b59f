"""What processes of one run decide and know together, be they one or many.

They speak over the coordination service of `jax.distributed`, a store of small values that process 0 serves. None waits
for another in a collective of devices: those have time limits that nobody can set, and do not say who is missing.

What must be the same in all of them is decided by process 0 (`told`): two processes that look at the same file may see
different things, and then run different programs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from jaxup.errors import Stopped, UserError, first_line
from jaxup.progress import Waiting

T = TypeVar("T")

waits = False  # the main thread waits in here: no progress is then expected of it
_decides = False  # this is process 0, and it is in what it will tell
_turns = itertools.count()  # of `told` and `gather`: all processes come to them in the same order


def service() -> Any:
    """The client of the coordination service, or None where there is one process only."""
    from jax._src import distributed

    state = distributed.global_state
    return state.client if state.num_processes > 1 else None


def here() -> tuple[int, int]:
    """Which process this is, and of how many. Asking jax for its `process_index` would start the devices."""
    from jax._src import distributed

    return distributed.global_state.process_id, distributed.global_state.num_processes


def told(make: Callable[[], T], what: str) -> T:
    """What `make` gives process 0, in all processes: a value of JSON. `what` it does stands in messages: "read x".

    All processes call this, in the same order. If it raises, all do: the others what they are told of it. Inside of
    `make`, which process 0 alone calls, it is no more than a call.
    """
    import jax

    global _decides
    store = service()
    if store is None or _decides:
        return make()
    key = f"jaxup/told/{next(_turns)}"
    if here()[0] == 0:
        _decides = True
        try:
            word = json.dumps({"value": make()})
        except BaseException as error:
            word = json.dumps({"error": line_of(error), "code": exit_code(error)})
            raise
        finally:
            _decides = False
            store.key_value_set(key, word)
    else:
        with _waiting() as remind:
            while True:
                try:  # by the second, so that a signal is handled meanwhile
                    word = store.blocking_key_value_get(key, 1000)
                    break
                except jax.errors.JaxRuntimeError as error:
                    if not str(error).startswith("DEADLINE_EXCEEDED"):
                        raise
                remind(f"process 0 to {what}")
    answer = json.loads(word)
    if "error" in answer:
        raise UserError(answer["error"]) if answer["code"] == 2 else Stopped(answer["error"], answer["code"])
    return answer["value"]


def gather(value: Any, what: str) -> list[Any]:
    """The value, of JSON, that each process has, in all processes; returns when all are `what`: "ready to train"."""
    store = service()
    if store is None:
        return [value]
    place, (own, count) = f"jaxup/here/{next(_turns)}/", here()
    store.key_value_set(f"{place}{own}", json.dumps(value))

    def collect() -> list[Any]:
        with _waiting() as remind:
            while True:
                found = {int(key.rpartition("/")[2]): json.loads(word) for key, word in store.key_value_dir_get(place)}
                if not (missing := sorted(set(range(count)) - found.keys())):
                    return [found[rank] for rank in sorted(found)]
                remind(f"{names(missing)} to be {what}")
                time.sleep(0.05)

    return told(collect, f"find all {what}")


@contextlib.contextmanager
def _waiting() -> Iterator[Callable[[str], None]]:
    """A function that says every now and then for what this process waits."""
    global waits
    before, waits = waits, True
    try:
        yield Waiting().on
    finally:
        waits = before


def names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"process{'es' if len(ranks) > 1 else ''} {shown}"


def exit_code(error: BaseException) -> int:
    """The exit code that an exception calls for, as in `jaxup.errors.entry_point`."""
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


def line_of(error: BaseException) -> str:
    return str(error) if hasattr(error, "exit_code") else f"{type(error).__name__}: {first_line(error)}"


def identity() -> str:
    """Which process this is, for `lives`."""
    return f"{_machine()} {os.getpid()} {_began(os.getpid())}"


def lives(who: str) -> bool | None:
    """Whether the process of that `identity` is still there; None for one of another machine."""
    machine, _, process = who.partition(" ")
    number, _, began = process.partition(" ")
    if machine != _machine():
        return None
    return number.isdecimal() and _began(int(number)) == began


@functools.cache
def _machine() -> str:
    """This machine since it was started, and in it the container, whose numbers of processes are its own."""
    parts = [socket.gethostname().replace(" ", "_")]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def _began(process: int) -> str:
    """When a process began, which tells it from a later one of its number; "" if it has ended."""
    try:
        # Behind the name, in parentheses, which may hold anything.
        state, *others = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else others[18]  # ended, and not taken note of by whoever started it
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return ""
    try:  # no Linux: that it is there must do
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "there"
