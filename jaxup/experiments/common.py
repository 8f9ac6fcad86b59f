"""What all kinds of experiments share: their settings, what they measure, and what they leave behind."""

from __future__ import annotations

import abc
import dataclasses
import functools
import gc
import inspect
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from jaxup.data.config import DataConfig
from jaxup.data.open import Data, no_data, open_data
from jaxup.data.rows import BEST_FIT, CONCATENATED, ONE
from jaxup.data.store import META, Store
from jaxup.data.tokenizer import bpe_vocab_size
from jaxup.depth.apply import apply
from jaxup.depth.plan import DepthPlan
from jaxup.depth.width import narrow
from jaxup.errors import UserError, suggest
from jaxup.experiments import pictures, report, resuming
from jaxup.experiments.config import section
from jaxup.experiments.defaults import text_data
from jaxup.experiments.lineage import lineage
from jaxup.hub.save import write_model
from jaxup.model import sampling
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params, init
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import count_params
from jaxup.progress import printable, say
from jaxup.together import told
from jaxup.training.in_common import in_common
from jaxup.training.loop import as_argument, evaluate, random_params, train_model
from jaxup.training.objective import TEXT, Objective
from jaxup.training.optimizer import OptimizerConfig, learning_rate
from jaxup.training.run import Result, Run, Settings, Stage, check_digest, describe_model, read_result, write_result
from jaxup.training.sharding import BATCH_AXES, check_heads, check_host_memory, check_length
from jaxup.training.step import StepConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict


class Experiment(abc.ABC):
    """One kind of experiment, from its configuration on: made, then `open_data`, then `carry_out`.

    What cannot work is refused by the first two, before anything is written.
    """

    sections: ClassVar[tuple[str, ...]]  # that its configurations must have, besides those that all have
    data: Data  # once opened, as all that follows; its str() is one line
    _model: ModelConfig  # the largest that is trained or measured
    steps: int
    # What must be the same when the run resumes, and is not in the configuration; of "steps" there may be more.
    inputs: dict[str, str | int]
    sample: Callable[[ModelConfig, Params], str]  # a short text by a model
    scored: str = ""  # the model whose loss is the run's result, at the latest once it is trained
    exported: Sequence[str] = ()  # the models of the run when its export was made, if nothing of them trains any more

    def __init__(self, config: ConfigDict, settings: Settings, mesh: Mesh):
        self._config, self._settings, self._mesh = config, settings, mesh
        check_host_memory(settings.compute, mesh)

    @abc.abstractmethod
    def open_data(self, root: str) -> None:
        """Opens the data; makes what is not there yet under the directory `root`."""

    @abc.abstractmethod
    def without_data(self) -> None:
        """In the place of `open_data` where only the shapes of `stages` are asked for: nothing is read or made."""

    @abc.abstractmethod
    def stages(self, *, most: bool = False) -> list[Stage]:
        """The models of the run in their order, once the data is opened. Where results decide how many there are, those
        that are made in any case; with `most` all that there can be."""

    def report(self) -> str:
        """What to say of the data before training."""
        return ""

    @abc.abstractmethod
    def carry_out(self, run: Run, title: str) -> None:
        """Trains, and leaves export, plots and SUMMARY.md in the run's directory."""

    @classmethod
    def compared(cls, directory: Path, runs: Mapping[str, Sequence[Path]], control: str) -> list[str]:
        """Lines for the STUDY.md in `directory`, of what only this kind's runs leave: the directories of those of each
        cell that are finished."""
        return []

    def _check_steps(self) -> None:
        """Of what trains: what can be said before the data says how many steps epochs are."""
        steps, epochs = self._config.steps, self._config.epochs
        if (steps > 0) == (epochs > 0) or min(steps, epochs) < 0:
            hint = "" if min(steps, epochs) < 1 else f"for {steps} steps, --config.epochs=0"
            raise UserError(f"steps={steps}, epochs={epochs}: one of them must be positive, the other 0", hint=hint)
        if steps:
            learning_rate(self._settings.optimizer, steps)

    def _check_model(self, model: ModelConfig) -> None:
        """Refuses one that the rows or the mesh do not fit."""
        check_heads(model, self._mesh)
        seq_len = self._config.data.seq_len
        check_length("data.seq_len", seq_len, self._mesh)
        if model.positions == "learned" and model.max_positions < seq_len:
            raise UserError(f"data.seq_len={seq_len} exceeds the model's {model.max_positions} positions")

    def _count_steps(self) -> None:
        """Of the data just opened."""
        self.steps = self._config.steps or self._steps_of(self._config.epochs)
        if (whole := check_heads(self._model, self._mesh)) and jax.process_index() == 0:
            say(whole)
        self._say_little()
        learning_rate(self._settings.optimizer, self.steps)  # refuses a warmup that does not fit

    def _assume_steps(self) -> None:
        """Where epochs decide, and nobody knows of how much data: a program is the same for any number."""
        self.steps = self._config.steps or 10 * self._settings.optimizer.warmup_steps + 1000

    def _say_little(self) -> None:
        """Of data that are too few for what is asked of them."""
        batch, rows, tokens = self._settings.batch_size, self.data.train_rows, self.data.validation_tokens
        if jax.process_index() != 0:
            return
        if rows < batch:
            what = f"a step takes batch_size={batch} rows, and there are {rows} for training"
            say(f"{what}: {self.steps} steps see each {self.steps * batch / rows:.0f} times; take a smaller batch_size")
        if self._config.epochs and self.steps < _SHORT:
            what = f"epochs={self._config.epochs} of {rows} rows are {self.steps} steps, which change little"
            say(f"{what}; more epochs, or a smaller batch_size or data.seq_len, make more")
        if tokens < _FEW:
            what = f"the validation loss is of {tokens:,} tokens, and uncertain by a tenth or more"
            say(f"{what}; data.val_fraction or data.val_files give more")

    def _steps_of(self, epochs: int) -> int:
        """Updates until each training row was seen so often."""
        return -(-epochs * self.data.epoch_rows // self._settings.batch_size)

    def _sampler(self, prompt: list[int], ends: tuple[int, ...] = ()) -> Callable[[ModelConfig, Params], str]:
        """The text of a model after the prompt, up to one of `ends`; pure, given the seed."""
        c, data = self._config, self.data
        if not 0 < len(prompt) <= self._model.max_positions:
            what = f"{len(prompt)} tokens, and the model takes from 1 to {self._model.max_positions}"
            raise UserError(what, at="sample.prompt")
        if max(prompt) >= self._model.vocab_size:
            raise UserError(f"token {max(prompt)}, and the model has {self._model.vocab_size}", at="sample.prompt")
        known = min(data.vocab_size, self._model.vocab_size)

        def sample(model: ModelConfig, params: Params) -> str:
            count = min(c.sample.tokens, model.max_positions - len(prompt))
            steps = sampling.generate(
                model, params, np.asarray([prompt], np.int32), max_tokens=count, temperature=c.sample.temperature,
                top_k=c.sample.top_k, seed=c.seed, vocab_size=known, eos_ids=ends,
            )  # fmt: skip
            # A model's tokenizer and template are not to be trusted with a terminal.
            return printable(str(data.tokenizer.decode([*prompt, *(int(t[0]) for t in steps if t[0] >= 0)])))

        return sample

    def _finish(
        self, run: Run, title: str, results: Sequence[Result], model: ModelConfig, params: Params,
        plan: DepthPlan | None, *,
        made: Result, healed: Mapping[str, Any] | None = None, export: Mapping[str, Any], notes: Sequence[str] = (),
        plan_title: str = "", loss_of: str,
        finding: Callable[[Sequence[Result], str], str], pictured: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """The export of the run's final model, the pictures and SUMMARY.md; every process calls it.

        `made` is that model, with a plan if it was made of another; if only a part of it trained, `healed` says which,
        as `lineage` takes it. `finding` says what the results are, given them and `loss_of`, what a loss is the mean
        over. `pictured`: the models that the curves are of, if not all.
        """
        said = told(
            lambda: lineage(run.directory, made.name, made.steps, kind=made.kind, plan=plan, healed=healed),
            "read how the model came to be",
        )
        if [r.name for r in results] != self.exported:  # else it is of these, and perhaps somebody's by now
            write_model(
                run.directory / "export", model, params, title=title, plan=plan, force=True, falls_back=True, **said,
                **export,
            )  # fmt: skip
        if jax.process_index() != 0:
            return
        records = run.log.read()
        named = {record["model"] for record in records}  # not the smaller ones of a growth, which are on its curve
        drawn = [r for r in results if (r.name in named or not r.steps) and (not pictured or r.name in pictured)]
        pictures.write(run.directory, title, drawn, records, loss_of, made=made, plan=plan)
        how = report.made_by(resuming.starts(run.directory))
        losses = f"Losses are nats per {loss_of} over the same {run.val_rows:,} validation rows."
        if ema := run.settings.step.ema:
            losses += (
                f" What trained is evaluated, sampled and exported as averages of its parameters over the updates, with"
                f" a decay of {ema:g}."
            )
        notes = [f"{run.data}; seed {run.settings.seed}. {losses}", *notes]
        text = report.write_summary(
            run.directory, title, results, str(plan or ""), notes, finding=finding(results, loss_of), how=how,
            plan_title=plan_title,
        )  # fmt: skip
        print(text)
        resuming.finish(run.directory, self._config, [r.name for r in results], self.scored)


class OnText(Experiment):
    """One on rows of text: its models have one vocabulary."""

    _data_config: DataConfig
    _vocab_size: int | None  # None: that of the data

    @abc.abstractmethod
    def _read_model(self, tokens: int = 1) -> ModelConfig:
        """The largest of its models, with a vocabulary for so many tokens if it has none of its own."""

    def open_data(self, root: str) -> None:
        self.data = open_text(self._data_config, root=root, vocab_size=self._vocab_size)
        self._model = self._read_model(self.data.vocab_size)
        self._count_steps()
        self.inputs = {"data": os.path.basename(self.data.store), "steps": self.steps}
        prompt = self.data.tokenizer(self._config.sample.prompt, add_special_tokens=False)["input_ids"]
        self.sample = self._sampler(prompt)

    def report(self) -> str:
        norms = self._model.placement_words()
        return "" if norms == "pre" else f"norms: {norms}\n"

    def without_data(self) -> None:
        self.data, tokens = no_data(self._data_config), bpe_vocab_size(self._config.data.tokenizer)
        if not self._vocab_size and not tokens:
            raise UserError("model.vocab_size=0 is that of the tokenizer, and without data there is none; give it")
        self._model = self._read_model(tokens)
        self._assume_steps()


def open_text(config: DataConfig, *, root: str, vocab_size: int | None = None) -> Data:
    """See `open_data`; UserError also for a seed that splits nothing, which only the source can tell."""
    data = open_data(config, root=root, vocab_size=vocab_size)
    meta = Store(data.store).read_json(META) or {}
    if config.val_fraction != text_data().val_fraction and meta.get("val_fraction") is None and not config.val_files:
        say(f"data.val_fraction={config.val_fraction}: nothing reads it; {config.files} has a split for validation")
    if config.seed != text_data().seed and meta.get("seed") is None:
        what = f"nothing reads it: {config.files} is not split at random"
        raise UserError(what, at=f"data.seed={config.seed}", hint="files are split by their names")
    return data


def unchanged(run: Run, name: str, model: ModelConfig, load: Callable[[], Params]) -> Params:
    """A model from outside the run, each time the one that it was at first: files may change under a run."""
    directory = run.directory / "checkpoints" / name
    if jax.process_index() == 0:
        describe_model(directory, run, name, model, None)
    params = load()
    check_digest(directory, params)
    return params


def build(
    run: Run, plan: DepthPlan, model: ModelConfig, source: Callable[[], Params], wide: ModelConfig | None = None
) -> Params:
    """The plan applied to its one source's sharded parameters, under jit; what is not inherited is fresh.

    `wide` is what the plan makes where `model` is the first part of it along some axes.
    """
    built = _builder(plan, wide or model, model, run.mesh)(as_argument(run.settings.seed), source())
    gc.collect()  # flax's modules, which have cycles, would keep the source's arrays
    return built


@functools.lru_cache(maxsize=8)
def _builder(plan: DepthPlan, wide: ModelConfig, model: ModelConfig, mesh: Mesh) -> Callable[..., Params]:
    def made(seed: Any, params: Params) -> Params:
        ((name, _),) = plan.sources
        return narrow(apply(plan, {name: params}, init(wide, seed)), model)

    return jax.jit(made, out_shardings=param_shardings(model, mesh))


def measured(
    run: Run, name: str, model: ModelConfig, *, origin: str, params: Callable[[], Params], objective: Objective = TEXT
) -> Result:
    """What a model that is there reaches, and a sample of it; kept, so that resuming does not load it again."""
    directory = run.directory / "checkpoints" / name
    stored = read_result(directory)
    if stored is not None and stored.origin == origin and stored.holds(run):
        return stored
    loaded = params()
    result = Result(
        name=name, kind=name, origin=origin, layers=model.num_layers, params=count_params(model), steps=0, tokens=0,
        val_loss=evaluate(run, name, model, loaded, objective), seconds=0.0, sample=run.sample(model, loaded),
        val_rows=run.val_rows,
    )  # fmt: skip
    print(f"{name}: {origin}; validation loss {result.val_loss:.4f}", flush=True)
    write_result(directory, result)
    return result


def on_course(run: Run, stages: Sequence[Stage]) -> Run:
    """The run with what trains in it."""
    return dataclasses.replace(run, course={s.name: s.own_steps * s.flops for s in stages if s.steps})


def train_fresh(run: Run, name: str, model: ModelConfig, *, steps: int, kind: str | None = None) -> Result:
    """Trains a model from random initialisation, unless another run of the same study has trained it."""
    origin = f"random, seed {run.settings.seed}"

    def train(run: Run) -> Result:
        fresh = lambda: random_params(run, model)  # noqa: E731
        return train_model(run, name, model, kind=kind, steps=steps, origin=origin, initialise=fresh)

    return in_common(run, name, model, steps, train)


# The loss of a token varies by some 3 nats, and so the mean of n by 3 / sqrt(n).
_FEW = 1000
_SHORT = 10  # steps

_LEAST = {
    "step.accumulation": 0, "step.loss_chunk": 1, "step.z_loss": 0, "step.spike_factor": 0, "step.spike_window": 1,
    "eval.rows": 0, "eval.interval": 1, "log.interval": 1, "checkpoint.interval": 1, "checkpoint.keep": 1,
    "sample.tokens": 0, "sample.temperature": 0, "sample.top_k": 0,
}  # fmt: skip


def read_settings(config: ConfigDict) -> Settings:
    for key, least in _LEAST.items():
        value = functools.reduce(operator.getitem, key.split("."), config)
        if not least <= value < math.inf:  # nor NaN
            raise UserError(f"{key} must be at least {least}, not {value}", hint="0 = all" * (key == "eval.rows"))
    if config.step.noise_scale and config.step.accumulation < 2:
        what = f"step.accumulation={config.step.accumulation}: step.noise_scale measures micro-batches"
        raise UserError(what, hint="give at least 2")
    return Settings(
        seed=config.seed, batch_size=config.batch_size, optimizer=section(OptimizerConfig, config.optimizer),
        step=section(StepConfig, config.step), compute=section(Compute, config.compute, batch_axes=BATCH_AXES),
        eval_interval=config.eval.interval, eval_rows=config.eval.rows,
        eval_batch_size=config.eval.batch_size, log_interval=config.log.interval,
        checkpoint_interval=config.checkpoint.interval, keep_checkpoints=config.checkpoint.keep,
    )  # fmt: skip


def corpus(values: ConfigDict, **more: str) -> DataConfig:
    """Of a section with the keys of `defaults.text_data`."""
    keys = {key: value for key, value in values.items() if key != "source"}
    return section(DataConfig, keys, files=values.source, packing=CONCATENATED, **more)


def chats(values: ConfigDict, *, epochs: int) -> DataConfig:
    """Of a section with the keys of a healing's data. Each phase is gone through so often; once where steps count."""
    packing = BEST_FIT if values.packing else ONE
    return section(DataConfig, {**values, "packing": packing, "passes": epochs or 1})


def new_model(section: ConfigDict, tokens: int = 1) -> ModelConfig:
    """The ModelConfig of a `model` section.

    `model.family` names the constructor that takes the section's other keys. vocab_size 0 there
    means that of the tokenizer, `tokens`, rounded up to a multiple of 64.
    """
    families: dict[str, Callable[..., ModelConfig]] = {"gpt2": ModelConfig.gpt2, "llama": ModelConfig.llama}
    values = section.to_dict()
    family = values.pop("family")
    if family not in families:
        raise UserError(f"unknown {family!r}{suggest(family, families)}", at="model.family")
    known = inspect.signature(families[family]).parameters
    for key in values.keys() - known:
        raise UserError(f"a {family} model has no such setting{suggest(key, known)}", at=f"model.{key}")
    for key in [name for name, parameter in known.items() if parameter.default is parameter.empty]:
        if key not in values:
            raise UserError(f"a {family} model needs it, and this experiment does not set it", at=f"model.{key}")
    values["vocab_size"] = values["vocab_size"] or -(-tokens // 64) * 64
    return families[family](**values)
