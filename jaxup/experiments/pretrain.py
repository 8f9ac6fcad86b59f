"""Pretraining: train one model on text, from random values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxup.experiments import report
from jaxup.experiments.common import OnText, corpus, new_model, on_course, train_fresh
from jaxup.model.config import ModelConfig
from jaxup.training.loop import load_trained
from jaxup.training.run import Run, Settings, Stage

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

MODEL = "model"


class Pretrain(OnText):
    sections = ("model", "data")

    def __init__(self, config: ConfigDict, settings: Settings, mesh: Mesh):
        super().__init__(config, settings, mesh)
        self._check_steps()
        self._data_config = corpus(config.data, tokenizer_files=config.data.tokenizer)
        self._vocab_size = config.model.vocab_size or None
        self._check_model(self._read_model())

    def _read_model(self, tokens: int = 1) -> ModelConfig:
        return new_model(self._config.model, tokens)

    def stages(self, *, most: bool = False) -> list[Stage]:
        return [Stage(name=MODEL, model=self._model, steps=self.steps, data=self.data, settings=self._settings)]

    def carry_out(self, run: Run, title: str) -> None:
        run, model = on_course(run, self.stages()), self._model
        made = train_fresh(run, MODEL, model, steps=self.steps)
        source = f"{MODEL} at step {made.steps} of the run {run.directory.resolve().name}"
        self._finish(
            run, title, [made], model, load_trained(run, made, model), None, made=made,
            loss_of="token",
            finding=report.trained,
            export={"tokenizer": self.data.tokenizer, "dtype": "float32", "source": source},
        )  # fmt: skip
