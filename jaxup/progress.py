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
            say(f"waiting for {what}" + (f", {clock(seconds)} so far" if seconds > 1 else ""))
            self._next = max(10.0, 3 * seconds)


class Progress:
    """`with Progress("train", total=100, unit="steps") as p: p.update(step, "loss 3.2")`.

    On a terminal a bar on stderr; elsewhere (a log file, CI, a pod) a line every `interval` seconds, so that a log
    stays readable; nothing at all unless `shown`. `total=None` when the amount of work is not known. `later`: what
    follows this work, in its units. The last detail stays: it is the result.
    """

    def __init__(
        self, label: str, *, total: int | None, unit: str, start: int = 0, interval: float = 10.0, shown: bool = True,
        later: float = 0.0,
    ):  # fmt: skip
        self.label, self.total, self.unit, self.interval, self.shown = printable(label), total, unit, interval, shown
        self.done = self._start = start
        self._later, self._detail = later, ""
        self._bar: Bar | None = None
        # The clock of the rate starts with the first that is done: until then programs are compiled, files opened.
        self._first: tuple[int, float] | None = None
        self._said: tuple[int, str] | None = None  # in the last line

    def __enter__(self) -> Progress:
        self._began = self._printed = time.monotonic()
        if self.shown and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            # In a narrow terminal the text stays, up to its end, and the bar goes.
            text = progress.TextColumn("{task.description}", markup=False)
            columns = progress.BarColumn(bar_width=20), text, progress.TimeElapsedColumn()
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done)
        return self

    def doing(self, what: str) -> None:
        """Says at once what has to be done before anything is."""
        if self._bar:
            self._bar.update(self._task, description=f"{self.label}: {what}")
        elif self.shown:
            print(f"{self.label}: {what}", file=sys.stderr, flush=True)

    def update(self, done: int, detail: str = "") -> None:
        global reports
        reports += 1
        self.done, self._detail, now = done, printable(detail), time.monotonic()
        if self._first is None and done > self._start:
            self._first = done, now
        if self._bar:
            self._bar.update(self._task, completed=done, description=self._text(now))
        elif self.shown and now - self._printed >= self.interval:
            self._line(now)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self.shown and kind is None and self._said != (self.done, self._detail):
            self._line(time.monotonic())

    def _line(self, now: float) -> None:
        self._printed, self._said = now, (self.done, self._detail)
        print(self._text(now), file=sys.stderr, flush=True)

    def _text(self, now: float) -> str:
        text = f"{self.label}: {self.done:,}" + (f"/{self.total:,}" if self.total else "") + f" {self.unit}"
        if self._first is None or not self.total or not self._first[0] < self.done < self.total:
            text += f" in {clock(now - self._began)}"
        else:
            rate, left = (self.done - self._first[0]) / max(now - self._first[1], 1e-9), self.total - self.done
            text += f", {rate:.3g}/s, {clock(left / rate)} left"
            text += f", of all about {clock((left + self._later) / rate)}" if self._later else ""
        return text + (f"  {self._detail}" if self._detail else "")


def clock(seconds: float) -> str:
    """ "1:02:03", or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
