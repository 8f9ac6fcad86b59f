"""What long work says meanwhile: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


reports = 0  # how often anything in this process was said to have got on: whoever counts them sees that it lives


def printable(text: object, keep: str = "\n") -> str:
    """As text, with a blank for what could move the cursor of a terminal, or turn the direction of what follows.

    Names, messages and texts of files, models and libraries go through this on their way to a terminal.
    """
    return "".join(c if c.isprintable() or c in keep else " " for c in str(text))


def say(message: object) -> None:
    """A line of the program's own on stderr, which is there at once; none where stderr is a file on a full disk."""
    with contextlib.suppress(OSError):
        print(f"jaxup: {printable(message)}", file=sys.stderr, flush=True)


def tell(message: object = "") -> None:
    """A line of what the program is for, on stdout, which is there at once."""
    print(printable(message), flush=True)


class Waiting:
    """Says for what this process waits: after `first` seconds, and then ever more rarely."""

    def __init__(self, first: float = 10.0):
        self._began, self._next = time.monotonic(), first

    def on(self, what: str) -> None:
        global reports
        reports += 1
        seconds = time.monotonic() - self._began
        if seconds >= self._next:
            say(f"waiting for {what}" + (f", {_clock(seconds)} so far" if seconds > 1 else ""))
            self._next = max(10.0, 3 * seconds)


class Progress:
    """`with Progress("train", total=100, unit="steps") as p: p.update(step, "loss 3.2")`.

    On a terminal a bar on stderr; elsewhere (a log file, CI, a pod) a line every `interval` seconds, so that a log
    stays readable; nothing at all unless `shown`. `total=None` when the amount of work is not known.
    """

    def __init__(
        self, label: str, *, total: int | None, unit: str, start: int = 0, interval: float = 10.0, shown: bool = True
    ):
        self.label, self.total, self.unit, self.interval, self.shown = printable(label), total, unit, interval, shown
        self.done = self.first = start
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._began = self._printed = time.monotonic()
        if self.shown and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(bar_width=30),
                progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[detail]}"),
                progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.first, detail="")
        return self

    def update(self, done: int, detail: str = "") -> None:
        global reports
        reports += 1
        self.done, detail = done, printable(detail)
        if self._bar:
            self._bar.update(self._task, completed=done, detail=detail)
        elif self.shown and time.monotonic() - self._printed >= self.interval:
            self._line(detail)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self.shown and kind is None:
            self._line("")

    def _line(self, detail: str) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._began
        rate = (self.done - self.first) / max(seconds, 1e-9)
        text = f"{self.label}: {self.done:,}" + (f"/{self.total:,}" if self.total else "") + f" {self.unit}"
        if self.total and rate and self.done < self.total:
            text += f", {rate:.3g}/s, {_clock((self.total - self.done) / rate)} left"
        else:
            text += f" in {_clock(seconds)}"
        print(text + (f"  {detail}" if detail else ""), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
