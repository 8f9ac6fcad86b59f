"""What runs of a study all train is trained once: references, bases and controls that begin with random values.

Such a model depends on nothing but what `key` takes in. It is trained in a directory beside the runs, by whichever of
them needs it first, and each then has a copy of its own, with what was logged of it: a run is whole without the study.
On a disk a copy is links to the same files, which nothing ever changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from jaxup.data.batches import TrainingData
from jaxup.files import bucket
from jaxup.files.bucket import Bucket, remove
from jaxup.model.config import ModelConfig
from jaxup.progress import Waiting
from jaxup.together import told
from jaxup.training import rundir
from jaxup.training.metrics import MetricsLog
from jaxup.training.run import Result, Run, Settings, write_result
from jaxup.training.sound import steps_in

_TAKEN = "common.json"  # beside a copy: what it is of


def key(model: ModelConfig, steps: int, data: TrainingData, settings: Settings) -> str:
    """A digest of what decides the numbers of a model that begins with random values, and when they are logged."""
    free = ("log_interval", "checkpoint_interval", "keep_checkpoints")
    what = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    what |= {"model": dataclasses.asdict(model), "steps": steps, "rows": data.train_rows, "length": data.seq_len}
    what["data"] = str(bucket.place(data.store).absolute())
    return hashlib.blake2b(json.dumps(what, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()


def in_common(run: Run, name: str, model: ModelConfig, steps: int, train: Callable[[Run], Result]) -> Result:
    """`train(run)`, where a run of the study that `run` is of has not done so before.

    What was begun in the run itself goes on there.
    """
    own = run.directory / "checkpoints" / name
    if run.common is None or not told(lambda: _lacks(own), f"look for {name}"):
        return train(run)
    points = hashlib.blake2b(json.dumps(sorted(run.evaluated)).encode(), digest_size=2).hexdigest()
    place = run.common / f"{name}-{key(model, steps, run.data, run.settings)}{points}"
    with contextlib.ExitStack() as stack:
        told(lambda: _take(stack, place, name), f"begin with {name}")
        log = stack.enter_context(contextlib.closing(MetricsLog(place / "metrics.jsonl")))
        result = train(dataclasses.replace(run, directory=place, log=log))
        told(lambda: _copy(run, place, own, log, result), f"copy {name}")
    return result


def _lacks(own: Path) -> bool:
    """Whether the run has neither finished the model nor begun it, but by a copy that is not whole."""
    return not (own / "result.json").exists() and ((own / _TAKEN).exists() or not steps_in(own))


def _take(stack: contextlib.ExitStack, place: Path, name: str) -> None:
    """Waits for whoever trains it now."""
    waiting = Waiting()

    def busy(holder: str) -> None:
        waiting.on(f"{name}, which several runs have in common, by {holder}")
        time.sleep(0.5)

    place.mkdir(parents=True, exist_ok=True)
    stack.enter_context(rundir.writer_lock(place, busy))
    rundir.clean(place)


def _copy(run: Run, place: Path, own: Path, log: MetricsLog, result: Result) -> None:
    """The result comes last: without it the next start copies again."""
    made = place / "checkpoints" / result.name
    own.mkdir(parents=True, exist_ok=True)
    rundir.write_json(own / _TAKEN, {"of": place.name})
    target = own / str(result.steps)
    remove(target)
    if isinstance(made, Bucket):
        # Those that say that the others are there come last.
        for file in sorted((made / target.name).below(), key=lambda file: ("/" not in file, file)):
            (target / file).write_bytes((made / target.name / file).read_bytes())
    else:
        unfinished = own / f".{target.name}.copy"
        remove(unfinished)
        shutil.copytree(made / target.name, unfinished, copy_function=_link)
        unfinished.rename(target)
    (own / "model.json").write_bytes((made / "model.json").read_bytes())
    run.log.rewind(result.name, -1)
    for record in log.read():
        run.log.write(**record)
    run.log.flush()
    write_result(own, result)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system can
        shutil.copy2(source, target)
