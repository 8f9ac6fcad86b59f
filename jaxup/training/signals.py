"""SIGTERM and Ctrl-C: the first asks, so that the loop can save; a second Ctrl-C insists."""

from __future__ import annotations

import signal

from jaxup.errors import Stopped
from jaxup.progress import say


class StopRequest:
    """Context in which SIGTERM and SIGINT set `signum` instead of ending the process."""

    def __init__(self):
        self.signum: int | None = None
        self.deferred = False  # so long there is nothing to save, and a signal raises Stopped at once

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        return 128 + (self.signum or signal.SIGTERM)

    def _handle(self, signum: int, frame: object) -> None:
        again, self.signum = self.signum is not None, signum
        if not self.deferred or (again and signum == signal.SIGINT):
            raise Stopped(f"stopped by {signal.Signals(signum).name}", self.exit_code)
        if not again:
            say(f"{signal.Signals(signum).name}: saving, then leaving")
