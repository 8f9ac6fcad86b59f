"""Inheritune as an experiment file describes it: a reference, targets from its layers, controls."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import jax

from jaxup import experiment
from jaxup.data.documents import DataConfig, open_data
from jaxup.errors import UserError
from jaxup.hub.reader import load_config
from jaxup.jobs.common import make_sampler, new_model, tokenizer_of
from jaxup.text import write_atomically
from jaxup.training import report
from jaxup.training.inherit import InheritConfig, Outcome, Reference, check, run_inherit
from jaxup.training.loop import Run, Settings, abstract_params, load_trained
from jaxup.training.optimizer import learning_rate

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict


class InheritJob:
    """See `jaxup.jobs.common.Job`."""

    def __init__(self, config: ConfigDict, settings: Settings, mesh: Mesh):
        self._config, self._settings, self._mesh = config, settings, mesh
        self._inherit = experiment.section(InheritConfig, config.inherit)
        if config.reference.steps < 0:
            raise UserError(f"reference.steps must be at least 0, not {config.reference.steps}")
        learning_rate(settings.optimizer, config.reference.steps or settings.optimizer.warmup_steps)
        model = self._read_model()
        check(self._inherit, model)
        path = config.reference.path
        own = config.data.tokenizer or not path
        self._data_config = experiment.section(
            DataConfig, config.data,
            **({"tokenizer_files": config.data.tokenizer} if own else tokenizer_of(path, config.reference.revision)),
        )  # fmt: skip
        if model.positions == "learned" and model.max_positions < config.data.seq_len:
            raise UserError(f"data.seq_len={config.data.seq_len} exceeds the model's {model.max_positions} positions")

    def open_data(self, root: str) -> None:
        config = self._config
        self.data = open_data(self._data_config, root=root)
        self._model = self._read_model(self.data.vocab_size)
        if self._model.vocab_size < self.data.vocab_size:
            tokens = self.data.vocab_size
            raise UserError(f"data: the tokenizer has {tokens} tokens, the model only {self._model.vocab_size}")
        self.steps = config.steps or math.ceil(config.epochs * self.data.train_rows / self._settings.batch_size)
        learning_rate(self._settings.optimizer, self.steps)  # refuses a warmup that does not fit
        self.inputs = {"data": os.path.basename(self.data.store)}
        prompt = self.data.tokenizer(config.sample.prompt, add_special_tokens=False)["input_ids"]
        self.sample = make_sampler(config, self.data, prompt)

    def report(self) -> str:
        return ""

    def carry_out(self, run: Run, title: str) -> None:
        r = self._config.reference
        reference = Reference(
            pretrained=self._load_pretrained if r.path else None,
            name=r.path + (f" at {r.revision}" if r.revision else ""), steps=r.steps, all_data=r.all_data,
        )  # fmt: skip
        finish(run, title, run_inherit(run, self._inherit, self._model, self.steps, reference=reference))

    def _read_model(self, tokens: int = 1) -> Any:
        """The reference's ModelConfig: of the model at `reference.path`, else of the `model` section."""
        reference = self._config.reference
        if reference.path:
            return load_config(reference.path, revision=reference.revision or None)
        return new_model(self._config.model, tokens)

    def _load_pretrained(self) -> Any:
        """The reference's params as float32 master weights, each device's part read straight onto it."""
        from flax import nnx

        from jaxup.hub.load import load

        r = self._config.reference
        model = load(
            r.path, dtype="float32", mesh=self._mesh, revision=r.revision or None, strict=True,
            allow_pickle=r.allow_pickle, progress=True,
        )  # fmt: skip
        return nnx.to_pure_dict(nnx.state(model))


def finish(run: Run, title: str, outcome: Outcome) -> None:
    """SUMMARY.md, the plot, the plan and the export of the final target."""
    from jaxup.hub import writer
    from jaxup.hub.card import model_card
    from jaxup.hub.directory import PLAN

    params = load_trained(run, outcome.target.name, abstract_params(outcome.target_model, run.mesh))
    plan, reference = outcome.plan.to_yaml(), outcome.results[0]
    card = model_card(
        outcome.target_model, title=title, dtype="float32", plan=outcome.plan,
        source=reference.origin if reference.steps == 0 else "a reference trained in the same run",
    )  # fmt: skip
    writer.save(
        run.directory / "export", outcome.target_model, params, tokenizer=run.data.tokenizer, card=card,
        extra_files={PLAN: plan}, force=True,
    )  # fmt: skip
    if jax.process_index() != 0:
        return
    write_atomically(run.directory / "plan.yaml", plan)
    report.plot_validation(run.directory, title, outcome.results, run.log.read())
    if len({r.layers for r in outcome.results[1:]}) > 1:
        report.plot_layers(run.directory, title, outcome.results)
    notes = [
        f"{run.data}; seed {run.settings.seed}; {jax.device_count()} x {jax.devices()[0].device_kind}. "
        "Losses are nats per token over the same validation rows."
    ]
    print(report.write_summary(run.directory, title, outcome.results, str(outcome.plan), notes))
