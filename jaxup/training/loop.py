"""The loop: trains one model to its last step, or to a signal, and leaves a checkpoint and a result.

How a model's state is decided, first match wins:
  1. `checkpoints/MODEL/result.json` is there: the model is finished, its result is read.
  2. `checkpoints/MODEL/STEP` is there: training goes on from the newest.
  3. Otherwise from what `initialise` gives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxup.data.batches import Batches
from jaxup.depth.plan import DepthPlan
from jaxup.errors import NonFinite, UserError
from jaxup.model.attention import described
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params, abstract, init
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import count_params
from jaxup.progress import Progress
from jaxup.together import told
from jaxup.training.checkpoint import Checkpoints
from jaxup.training.compiling import compiler_options, fitting_step, memory
from jaxup.training.corrections import Corrections, record
from jaxup.training.meter import Meter
from jaxup.training.objective import TEXT, Objective
from jaxup.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, updates_made
from jaxup.training.partition import Partition, digest
from jaxup.training.run import (
    Part,
    Paused,
    Result,
    Rounds,
    Run,
    Update,
    check_digest,
    describe_model,
    read_result,
    write_result,
)
from jaxup.training.selection import EVERYTHING, Selection
from jaxup.training.sharding import local_rows, place_batch, state_shardings
from jaxup.training.step import StepConfig, TrainState, make_eval_step, make_train_step, skip_step


class Program(NamedTuple):
    """What is compiled to train a model."""

    train_step: Any  # jitted, as all of these are
    cut_into: Callable[[int], Any]  # number of micro-batches -> such a step
    skip_step: Callable[[TrainState], TrainState]
    eval_step: Any
    init_state: Callable[[Params], TrainState]
    frozen: Callable[..., tuple[Params, ...]]  # all params -> those that do not train, if there are any
    join: Callable[..., Params]  # (what trains, what is frozen) -> all params
    abstract_state: TrainState


def random_params(run: Run, model: ModelConfig) -> Params:
    """Fresh float32 parameters, a pure function of the run's seed and the model, laid out on the mesh."""
    return _initialiser(model, run.mesh)(as_argument(run.settings.seed))


def as_argument(seed: int) -> np.int32:
    """Of a program that is the same for all seeds: what `jax.random.key` takes of the number."""
    return np.int64(seed).astype(np.int32)


@functools.lru_cache(maxsize=8)
def _initialiser(model: ModelConfig, mesh: Mesh) -> Callable[[np.int32], Params]:
    return jax.jit(functools.partial(init, model), out_shardings=param_shardings(model, mesh))


def load_trained(
    run: Run, result: Result, model: ModelConfig, selection: Selection = EVERYTHING, *, step: int | None = None
) -> Params:
    """The parameters of a finished model of this run that trained: their averages, where such are kept.

    `step`: one of an earlier checkpoint that stays; the model need not be finished then.
    """
    shardings = selection.shardings(param_shardings(model, run.mesh), run.mesh)
    with _last_of(run, result, step) as checkpoints:
        wanted = laid_out(selection.trained(abstract(model)[1]), shardings)
        return checkpoints.restore_params(result.steps if step is None else step, wanted)


def restore_trained(run: Run, result: Result, model: ModelConfig) -> TrainState:
    """The last state of such a model, of which everything trained."""
    program = make_program(model, run.settings.update, run.mesh, EVERYTHING)
    with _last_of(run, result) as checkpoints:
        return checkpoints.restore(result.steps, program.abstract_state)


@contextlib.contextmanager
def _last_of(run: Run, result: Result, step: int | None = None) -> Iterator[Checkpoints]:
    directory = run.directory / "checkpoints" / result.name
    with Checkpoints(directory, keep=run.settings.keep_checkpoints) as checkpoints:
        if step is None and checkpoints.latest != result.steps:
            raise _gone(directory, result.steps, checkpoints.latest)
        yield checkpoints


def _gone(directory: Path, steps: int, latest: int | None) -> UserError:
    there = "; there is none" if latest is None else f"; that of step {latest} is there"
    return UserError(
        f"{directory}: finished at step {steps}, and that checkpoint is gone{there}: "
        "delete result.json beside it to train on from what there is"
    )


def abstract_params(model: ModelConfig, mesh: Mesh) -> Params:
    """The params tree as ShapeDtypeStructs with their shardings."""
    return laid_out(abstract(model)[1], param_shardings(model, mesh))


def laid_out(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with these shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


@functools.lru_cache(maxsize=32)  # a target and its control are one program, compiled once; so are runs of a study
def make_program(
    model: ModelConfig, update: Update, mesh: Mesh, selection: Selection, objective: Objective = TEXT
) -> Program:
    """Of any learning rate and number of steps. The params of the objective's teacher are the steps' last argument."""
    partition = selection.partition
    optimizer = make_optimizer(update.optimizer, selection.rates)
    replicated = NamedSharding(mesh, PartitionSpec())
    whole = param_shardings(model, mesh)

    def split(params: Params) -> tuple[Params, ...]:
        return (params,) if partition is None else partition.split(params)

    def init_state(params: Params) -> TrainState:
        trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), split(params)[0])
        state = TrainState(trained, optimizer.init(trained), jnp.int32(0), jnp.bool_(False))
        # Copies: the step takes the memory of both for what it makes of them.
        ema = jax.tree.map(jnp.copy, trained) if update.step.ema else None
        return state._replace(spikes=update.step.spikes(), ema=ema)

    params, *frozen = (whole,) if partition is None else partition.shardings(mesh)
    abstract_state = jax.eval_shape(init_state, abstract(model)[1])
    moments = state_shardings(optimizer, abstract_state.opt_state, params, mesh)
    shardings = jax.tree.map(lambda _: replicated, abstract_state)._replace(params=params, opt_state=moments)
    shardings = shardings._replace(ema=params if update.step.ema else None)

    @functools.cache  # a step is compiled once for all runs, also where each looks for the number that fits
    def cut_into(count: int) -> Any:
        step = dataclasses.replace(update.step, accumulation=count)
        return jax.jit(
            make_train_step(model, update.compute, optimizer, step, partition, objective),
            donate_argnums=0,
            out_shardings=(shardings, replicated),
            compiler_options=compiler_options(mesh),
        )

    return Program(
        train_step=cut_into(update.step.accumulation),
        cut_into=cut_into,
        skip_step=jax.jit(skip_step, donate_argnums=0, out_shardings=shardings),
        eval_step=_eval_step(model, update.compute, update.step, mesh, partition, objective.evaluated),
        init_state=jax.jit(init_state, out_shardings=shardings),
        frozen=jax.jit(lambda params: split(params)[1:], out_shardings=tuple(frozen)),
        join=jax.jit(
            lambda params, *frozen: params if partition is None else partition.join(params, *frozen),
            out_shardings=whole,
        ),
        abstract_state=laid_out(abstract_state, shardings),
    )


@functools.lru_cache(maxsize=32)
def _schedule(
    config: OptimizerConfig, steps: int, peaks: tuple[tuple[int, float], ...], mesh: Mesh
) -> Callable[[jax.Array], jax.Array]:
    """(updates made) -> learning rate of the next one, on the mesh: a scalar that no process has to send there.

    A program of its own, which is a few scalars, so that the step is none for each rate.
    """
    rate = learning_rate(config, steps, peaks)
    out = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda count: jnp.asarray(rate(count), jnp.float32), out_shardings=out)


def evaluate(run: Run, name: str, model: ModelConfig, params: Params, objective: Objective = TEXT) -> float:
    """The loss over the fixed validation rows, of text the mean cross-entropy in nats; NonFinite if it is none."""
    with jax.set_mesh(run.mesh):
        try:
            eval_step = _eval_step(model, run.settings.compute, run.settings.step, run.mesh, None, objective)
            return _evaluate(run, name, eval_step, (params,), objective)[0]
        except _StopNow:
            raise run.processes.stopped("stopped while evaluating; the same command resumes") from None


@functools.lru_cache(maxsize=8)
def _eval_step(
    model: ModelConfig, compute: Compute, step: StepConfig, mesh: Mesh, partition: Partition | None,
    objective: Objective,
) -> Callable:  # fmt: skip
    eval_step = make_eval_step(model, compute, step, partition, objective)
    out = NamedSharding(mesh, PartitionSpec())
    return jax.jit(eval_step, out_shardings=out, compiler_options=compiler_options(mesh))


def _evaluate(
    run: Run, name: str, eval_step: Callable, params: tuple[Params, ...], objective: Objective, step: int | None = None
) -> tuple[float, dict[str, float]]:
    """(the loss, the means that it is made of by name).

    `params`: what trains and what is frozen, if anything is. `step`: of training, which has made them.
    """
    size, rows = run.settings.eval_batch_size, run.settings.eval_rows
    sums, ahead = dict[str, np.ndarray](), dict[str, Any]()
    finite = -1  # batches before the first whose loss is none
    with run.processes.long_work():
        for batch in run.data.validation_batches(batch_size=size, max_rows=rows, part=local_rows(size, run.mesh)):
            placed = place_batch(batch, size, run.mesh)
            # Added in float64 on the host: a large validation set is more than float32 can count. One batch late: the
            # device already works on the next one.
            ahead, before = eval_step(params[0], placed, *params[1:]), ahead
            sums = _added(sums, before)
            finite += all(np.isfinite(total) for total, _ in sums.values())
            if run.processes.should_stop():
                raise _StopNow
        sums = _added(sums, ahead)
    loss, first = float(objective.mean({name: (total, count) for name, (total, count) in sums.items()})), size * finite
    if math.isfinite(loss):
        return loss, {name: float(total / count) for name, (total, count) in sums.items() if count}
    where, saved = ("", "") if step is None else (f" step {step}:", f"; step {step} is saved" * (step > 0))
    fewer = f"; --config.eval.rows={first} measures on those before" if first else ""
    raise NonFinite(
        f"{name}:{where} validation loss {loss} is not finite, from row {first} of validation on, while the weights "
        f"are{saved}{fewer}", step or 0,
    )  # fmt: skip


def _added(sums: dict[str, np.ndarray], more: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(pair, np.float64) + sums.get(name, np.zeros(2)) for name, pair in jax.device_get(more).items()
    } or sums


class _StopNow(Exception):
    """A signal came; the state is whole and can be saved."""


def train_model(
    run: Run, name: str, model: ModelConfig, *, steps: int, origin: str, initialise: Callable[[], Params | TrainState],
    kind: str | None = None, plan: DepthPlan | None = None, selection: Selection = EVERYTHING,
    milestones: frozenset[int] = frozenset(), about: dict[str, Any] | None = None,
    objective: Objective = TEXT, teacher: Callable[[], Params] | None = None, part: Part | None = None,
    rounds: Rounds | None = None,
) -> Result:  # fmt: skip
    """Trains to `steps` updates and returns the result; raises Stopped after saving on a signal, and Paused.

    What was begun goes on, bit for bit as if it had never stopped. Checkpoints hold what trains; the rest
    is what `initialise` gives, each time the same. After the steps in `milestones` the model is evaluated
    and a checkpoint stays. `about` goes into model.json. The default of `kind` is the name. `teacher` gives the
    params of the objective's, if it has one, each time the same. With a `part` it goes on from the state at its first
    step, which `initialise` gives, and `steps` are those of the whole until its end. `rounds` make the batches, and not
    the run's data.
    """
    whole = part or Part(curve=name, first=0, seconds=0.0, schedule=(0, steps))
    directory, kind = run.directory / "checkpoints" / name, kind or name
    if jax.process_index() == 0:
        cost = {"seq_len": run.data.seq_len, "flops_per_token": objective.flops(model, run.data.seq_len)}
        describe_model(directory, run, kind, model, plan, **cost, **(about or {}))
    stored = read_result(directory)
    if stored is not None and stored.steps >= steps and stored.holds(run):
        print(f"{name}: finished before, validation loss {stored.val_loss:.4f}", flush=True)
        return stored

    began = time.monotonic() - whole.seconds
    keep = run.settings.keep_checkpoints
    # Once there is something to save a signal waits until it is on disk.
    with (
        run.processes.saving(),
        jax.set_mesh(run.mesh),
        Checkpoints(directory, keep=keep, always=milestones) as checkpoints,
    ):
        latest = checkpoints.latest
        start = whole.first if latest is None else latest
        if stored is not None and start < stored.steps:
            raise _gone(directory, stored.steps, latest)
        if start > steps:
            raise UserError(
                f"{directory}: step {start} is done, and {steps} are asked for", hint="give at least as many"
            )
        if run.pauses.get(whole.curve, steps) <= start < steps:
            raise Paused(whole.curve, start)
        asked = run.asked.pop() if run.asked else Corrections()
        place = directory.with_name(whole.curve)
        end = sum(whole.schedule)  # of all that one correction may be for
        kept = told(lambda: dataclasses.asdict(record(place, asked, done=start, steps=end)), "read corrections")
        corrections = Corrections(tuple(kept["skip"]), tuple((step, rate) for step, rate in kept["rates"]))
        begin, length = whole.schedule
        peaks = tuple((step - begin, rate) for step, rate in corrections.rates)
        schedule = _schedule(run.settings.optimizer, length, peaks, run.mesh)
        hits = make_program.cache_info().hits
        program = make_program(model, run.settings.update, run.mesh, selection, objective)
        compiles = make_program.cache_info().hits == hits
        which, later = run.place(name, steps)
        label = f"{name} (model {which})" if which else name
        attention = described(
            run.settings.compute.attention, dtype=run.settings.compute.dtype, seq_len=run.data.seq_len,
            head_dim=model.head_dim, packed=run.data.packed, stepwise=run.data.stepwise,
        )  # fmt: skip
        trained = None
        if selection.partition is not None:
            trained = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
        if latest is not None:
            print(f"{name}: resumes at step {start} of {steps} ({origin}); attention: {attention}", flush=True)
            frozen = () if trained is None else program.frozen(initialise())
            state = checkpoints.restore(start, program.abstract_state)
        else:
            some = "" if trained is None else f", of which {trained:,} train"
            size = f"{model.num_layers} layers, {count_params(model):,} parameters{some}"
            size += f", averaged with decay {run.settings.step.ema:g}" if run.settings.step.ema else ""
            print(f"{label}: {origin}; {size}; attention: {attention}", flush=True)
            given = initialise()
            if isinstance(given, TrainState):
                state, frozen = given, ()
            else:
                state, frozen = program.init_state(given), program.frozen(given)
            del given
        before = check_digest(directory, frozen) if frozen else None
        with Progress(label, total=steps, unit="steps", start=start, later=later) as progress:
            if compiles and start < steps:
                progress.doing("compiling")
            state, val_loss = _train(
                run, name, model, steps, program, schedule, state, frozen, start, checkpoints, milestones,
                corrections.skip, progress, objective, (teacher(),) if teacher else (), part,
                rounds,
            )  # fmt: skip
        if frozen and digest(frozen) != before:
            raise RuntimeError(f"{name}: parameters that do not train have changed: a fault of memory or device")
        sample = run.sample(model, program.join(state.averaged, *frozen))
    if run.processes.should_stop():
        raise run.processes.stopped(f"{name}: saved at step {steps} of {steps}; the same command resumes")
    seen = steps * run.settings.batch_size
    result = Result(
        name=name, kind=kind, origin=origin, layers=model.num_layers, params=count_params(model), steps=steps,
        tokens=run.data.tokens_of(min(seen, run.data.train_rows)), epochs=seen / run.data.epoch_rows, val_loss=val_loss,
        seconds=round(time.monotonic() - began, 1), sample=sample, trained=trained, val_rows=run.val_rows,
        corrected=", ".join(filter(None, [str(corrections), _skipped(state)])),
    )  # fmt: skip
    run.log.flush()
    write_result(directory, result)
    return result


def _skipped(state: TrainState) -> str:
    count = 0 if state.spikes is None else int(state.spikes.skipped)
    return f"{count} step{'s' * (count > 1)} with a spike of the gradient skipped" if count else ""


def _train(
    run: Run, name: str, model: ModelConfig, steps: int, program: Program,
    schedule: Callable[[jax.Array], jax.Array], state: TrainState, frozen: tuple[Params, ...], start: int,
    checkpoints: Checkpoints, milestones: frozenset[int], skip: tuple[int, ...], progress: Progress,
    objective: Objective, known: tuple[Params, ...], part: Part | None, rounds: Rounds | None,
) -> tuple[TrainState, float]:  # fmt: skip
    s, curve, first = run.settings, name, 0
    said: dict[str, int] = {}
    if part is not None:
        curve, first, said = part.curve, part.first, {"layers": model.num_layers}
    batches = run.data.batches(batch_size=s.batch_size, seed=s.seed)
    rounds = rounds if start < steps else None
    begins = lambda step: rounds is not None and (step == start or step % rounds.length == 0)  # noqa: E731

    def logged() -> list[tuple[int, float]]:
        run.log.rewind(curve, start, **said)
        return [
            (r["step"], r["val_loss"]) for r in run.log.read()
            if r == {**r, "model": curve, **said} and math.isfinite(r.get("val_loss", math.nan))
            and r.get("val_rows", run.val_rows) == run.val_rows
        ]  # fmt: skip

    losses = dict(told(logged, "read what was logged"))  # what is evaluated again is a program that all run
    meter = Meter(
        run.log, curve, steps=steps, interval=s.log_interval, batch_tokens=run.data.tokens_of(s.batch_size),
        val_rows=run.val_rows,
        # Where only a part trains, no formula says how much of the backward pass is left.
        flops_per_token=None if frozen else objective.flops(model, run.data.seq_len), **said,
    )  # fmt: skip
    step, pending, mine, compiled = start, None, local_rows(s.batch_size, run.mesh), False
    pause = run.pauses.get(curve)

    def read_batch(step: int) -> dict[str, jax.Array]:
        return place_batch(batches(step, mine), s.batch_size, run.mesh)

    def begin(step: int) -> Batches:
        assert rounds is not None
        with run.processes.long_work():
            return rounds(step, program.join(state.params, *frozen))

    with run.processes.steps(), ThreadPoolExecutor(1) as reader:
        batches = begin(step) if begins(step) else batches
        ahead = reader.submit(read_batch, step) if step < steps else None
        if ahead and not s.step.accumulation:
            inputs = state, ahead.result(), schedule(updates_made(state.opt_state)), *frozen, *known
            fitting = fitting_step(run, name, program.cut_into, inputs)
            program = program._replace(train_step=fitting)

        def save(step: int) -> None:
            run.log.flush()  # what was logged until then will not be logged again
            checkpoints.save(step, state)

        try:
            while True:
                here = step == steps or step in milestones
                looked_at = here or step in run.evaluated or step in (first, pause)
                if (step % s.eval_interval == 0 or looked_at) and step not in losses:
                    meter.check(pending, batches)
                    given = (state.averaged, *frozen), objective.evaluated
                    losses[step], means = _evaluate(run, name, program.eval_step, *given, step)
                    meter.log_validation(step, losses[step], means if len(means) > 1 else {}, s.step.ema)
                    meter.restart()
                if step and step != start and (step % s.checkpoint_interval == 0 or here or step == pause):
                    meter.check(pending, batches)
                    with run.processes.long_work():
                        save(step)
                    meter.restart()
                if step == steps:
                    progress.update(step, f"validation loss {losses[step]:.4f}")
                    return state, losses[step]
                if step == pause:
                    raise Paused(curve, step)
                if begins(step) and step != start:
                    meter.check(pending, batches)
                    batches = begin(step)
                    meter.restart()
                batch = (ahead or reader.submit(read_batch, step)).result()
                if step + 1 in skip:
                    state, metrics = program.skip_step(state), None
                else:
                    with jax.transfer_guard("disallow"), memory(s.step):
                        rate = schedule(updates_made(state.opt_state))
                        state, metrics = program.train_step(state, batch, rate, *frozen, *known)
                    if not compiled:  # the call has waited for that, which says nothing of the speed
                        meter.restart()
                        compiled = True
                step += 1
                run.processes.deferred = True  # from here on there is something to save
                ahead = reader.submit(read_batch, step) if step < steps and not begins(step) else None
                # Read one step late: the device already works on the next one.
                meter.check(pending, batches)
                pending = (step, metrics)
                progress.update(step, meter.detail)
                if run.processes.should_stop():
                    meter.check(pending, batches)
                    raise _StopNow
        except _StopNow:
            # Whatever raised it has looked at the last step: the state is a finite one.
            with run.processes.long_work():
                save(step)
            raise run.processes.stopped(f"{name}: saved at step {step} of {steps}; the same command resumes") from None
        except NonFinite as error:
            if error.kept > start:  # what it began from is there
                save(error.kept)
            raise
