"""Checkpoints of one model's training state, by Orbax (v1), each with the digests of its files; see `sound.py`."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxup.errors import NoRoom, UserError, first_line, storage_error
from jaxup.files import manifest
from jaxup.files.bucket import remove
from jaxup.model.decoder import Params
from jaxup.text import remote
from jaxup.together import told
from jaxup.training.sound import DIGESTS, set_aside, steps_in
from jaxup.training.step import TrainState

_STRAGGLERS = 30.0  # seconds for the reads and writes that go on when one of them has failed


class Checkpoints:
    """`directory/STEP/`, the newest `keep` of them and those of `always`; written in the background, atomically.

    What a killed writer left behind is removed on opening, and what is damaged set aside: UserError if there are
    steps and none can be restored. Restoring gives the arrays bit for bit, laid out over whatever mesh the abstract
    state names.
    """

    def __init__(
        self, directory: Path, *, keep: int, always: Collection[int] = (),
        advice: str = "remove it to go on from the one before",
    ):  # fmt: skip
        self._directory, self._advice = directory.absolute(), advice  # what to do about a damaged one
        self._keep, self._always = keep, frozenset(always)
        self._writes = jax.process_index() == 0
        self._saving: Future[None] | None = None
        with writing(self._directory):
            # The step of the newest one; None if there is none.
            self.latest: int | None = told(lambda: set_aside(self._directory), "look for sound checkpoints")
        self._open = contextlib.ExitStack()
        self._open.enter_context(quietly())
        self._pool = self._open.enter_context(ThreadPoolExecutor(1))
        self._open.callback(self._wait)  # for the write in flight

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: Any) -> None:
        with writing(self._directory):
            self._open.__exit__(*error)

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing `state`; returns once the arrays are copied, so the state may be donated."""
        if step != self.latest:
            self._save(step, _tree(state))

    def save_params(self, step: int, params: Params) -> None:
        """Writes params alone, which `restore_params` reads; returns when they are written."""
        self._save(step, {"params": params})
        with writing(self._directory):
            self._wait()

    def _save(self, step: int, tree: dict[str, Any]) -> None:
        context = ocp.Context()
        # Copies of an array on several devices are written in slices, one by each. Cutting a small one takes longer.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
        with writing(self._directory):
            self._wait()
            with context:
                written = ocp.save_async(self._directory / str(step), tree)
            self._saving, self.latest = self._pool.submit(self._finish, step, written), step

    def _finish(self, step: int, written: Any) -> None:
        """Waits until it is written, adds its digests, and only then removes what it takes the place of."""
        written.result()
        if self._writes:
            manifest.write_manifest(self._directory / str(step), name=DIGESTS, kind="sums")
            for older in steps_in(self._directory)[: -self._keep]:
                if older not in self._always:
                    remove(self._directory / str(older))

    def _wait(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        tree = self._load(step, _tree(abstract_state))
        if abstract_state.ema is not None:
            tree |= {"ema": tree["params"], "params": tree.pop("trained")}
        return TrainState(**tree, halted=jax.numpy.bool_(False))

    def restore_params(self, step: int, abstract_params: Params) -> Params:
        """Reads the parameters only, not the optimizer's state: the averages, where such are kept."""
        with partial_load():
            return self._load(step, {"params": abstract_params})["params"]

    def _load(self, step: int, tree: dict[str, Any]) -> dict[str, Any]:
        with restoring(f"{self._directory}/{step}", self._advice):
            return ocp.load(self._directory / str(step), tree)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns what a disk says while checkpoints are written into a UserError; those that are there stay."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        refused = storage_error(error, str(directory))
        # TensorStore raises ValueError, for mistakes of ours too; what a bucket answers begins with its kind.
        answered = remote(directory) and re.match("[A-Z_]+: ", str(error))
        if isinstance(error, OSError) or isinstance(refused, NoRoom) or answered:
            raise refused from None
        raise


class _Stragglers(logging.Filter):
    """When one array cannot be read or written Orbax leaves the others to go on, and their ends would be reported one
    by one, at length, by an event loop that is closed already. Hushed, nobody hears of them."""

    def __init__(self) -> None:
        super().__init__()
        self._hushed, self._lock = 0, threading.Lock()

    def hush(self) -> None:
        with self._lock:
            self._hushed += 1
            logging.getLogger("asyncio").addFilter(self)
            if sys.unraisablehook != self._unraisable:
                self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable

    def unhush(self) -> None:
        with self._lock:
            self._hushed -= 1
            if not self._hushed:
                logging.getLogger("asyncio").removeFilter(self)
                if sys.unraisablehook == self._unraisable:
                    sys.unraisablehook = self._hook

    def filter(self, record: logging.LogRecord) -> bool:
        return False

    def _unraisable(self, args: Any) -> None:
        if "Event loop is closed" not in str(args.exc_value):
            self._hook(args)


_stragglers = _Stragglers()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Orbax reports its internals at INFO, its own deprecations at WARNING, and at ERROR, with a stack from each of
    its threads, what it raises in the end. After an error there is silence for a while: there is no telling when the
    last of the stragglers comes."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    _stragglers.hush()
    try:
        yield
    except BaseException:
        later = threading.Timer(_STRAGGLERS, _stragglers.unhush)
        later.daemon = True
        later.start()
        raise
    else:
        _stragglers.unhush()
    finally:
        logger.setLevel(level)


def partial_load() -> ocp.Context:
    """Where what is loaded may be a part of what is stored."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context


@contextlib.contextmanager
def restoring(checkpoint: str, advice: str) -> Iterator[None]:
    """Turns whatever Orbax raises (there are many kinds) on a damaged or foreign checkpoint into a UserError."""
    try:
        yield
    except Exception as error:
        if "://" in checkpoint:
            advice = f"if that is the network, give the same command again; else {advice}"
        raise UserError(f"{checkpoint}: cannot restore this checkpoint: {first_line(error)[:300]}; {advice}") from None


def _tree(state: TrainState) -> dict[str, Any]:
    # `halted` is not stored: a halted state is never saved.
    # Whoever reads a checkpoint for the model alone finds in "params" what that is; training goes on with "trained".
    tree = {"params": state.averaged, "opt_state": state.opt_state, "step": state.step}
    more = {"trained": None if state.ema is None else state.params, "spikes": state.spikes}
    return tree | {name: part for name, part in more.items() if part is not None}
