"""What the jobs read from a configuration in the same way."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol

from jaxup import experiment
from jaxup.errors import UserError, suggest

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from jaxup.training.loop import Run, Settings


class Job(Protocol):
    """One kind of experiment, from its configuration on. What cannot work is refused before anything is written."""

    data: Any  # TokenData or ChatData, once opened; its str() is one line
    steps: int  # likewise
    inputs: dict[str, str]  # likewise: what must be the same when the run resumes, and is not in the configuration

    def __init__(self, config: ConfigDict, settings: Settings, mesh: Mesh): ...

    def open_data(self, root: str) -> None:
        """Makes the data that is not there yet, under the directory `root`."""

    def report(self) -> str:
        """What to say of the data before training."""

    def carry_out(self, run: Run, title: str) -> None:
        """Trains, and leaves export, plots and SUMMARY.md in the run's directory."""


def read_settings(config: ConfigDict) -> Settings:
    from jaxup.model.config import Compute
    from jaxup.training.loop import Settings
    from jaxup.training.optimizer import OptimizerConfig, learning_rate
    from jaxup.training.step import StepConfig

    section = experiment.section
    optimizer = section(OptimizerConfig, config.optimizer)
    if (config.steps > 0) == (config.epochs > 0) or min(config.steps, config.epochs) < 0:
        raise UserError(f"steps={config.steps}, epochs={config.epochs}: one of them must be positive, the other 0")
    step = section(StepConfig, config.step)
    for key, value in (("step.accumulation", step.accumulation), ("step.loss_chunk", step.loss_chunk)):
        if value < 1:
            raise UserError(f"{key} must be at least 1, not {value}")
    if config.eval.rows < 0:
        raise UserError(f"eval.rows must be at least 0, not {config.eval.rows}; 0 = all")
    # Refuses an unknown schedule or a warmup that does not fit; how many steps epochs are, the data will say.
    learning_rate(optimizer, config.steps or optimizer.warmup_steps)
    for key in ("eval.interval", "log.interval", "checkpoint.interval", "checkpoint.keep"):
        node = config
        for part in key.split("."):
            node = node[part]
        if node < 1:
            raise UserError(f"{key} must be at least 1, not {node}")
    return Settings(
        seed=config.seed, batch_size=config.batch_size, optimizer=optimizer, step=step,
        compute=section(Compute, config.compute), eval_interval=config.eval.interval, eval_rows=config.eval.rows,
        eval_batch_size=config.eval.batch_size, log_interval=config.log.interval,
        checkpoint_interval=config.checkpoint.interval, keep_checkpoints=config.checkpoint.keep,
    )  # fmt: skip


def new_model(section: ConfigDict, tokens: int = 1) -> Any:
    """The ModelConfig of a `model` section.

    `model.family` names the constructor that takes the section's other keys. vocab_size 0 there
    means that of the tokenizer, `tokens`, rounded up to a multiple of 64.
    """
    from jaxup.model.config import ModelConfig

    families = {"gpt2": ModelConfig.gpt2, "llama": ModelConfig.llama}
    values = section.to_dict()
    family = values.pop("family")
    if family not in families:
        raise UserError(f"model.family: unknown {family!r}{suggest(family, families)}")
    known = inspect.signature(families[family]).parameters
    for key in values.keys() - known:
        raise UserError(f"model.{key}: a {family} model has no such setting{suggest(key, known)}")
    for key in [name for name, parameter in known.items() if parameter.default is parameter.empty]:
        if key not in values:
            raise UserError(f"model.{key}: a {family} model needs it, and this experiment does not set it")
    values["vocab_size"] = values["vocab_size"] or -(-tokens // 64) * 64
    return families[family](**values)


def tokenizer_of(path: str, revision: str) -> dict[str, str]:
    """The two settings of DataConfig that name the tokenizer a model brings along."""
    from jaxup.hub.directory import tokenizer_directory

    return {"tokenizer": path, "tokenizer_files": str(tokenizer_directory(path, revision=revision or None))}


def make_sampler(config: ConfigDict, data: Any, prompt: list[int], ends: tuple[int, ...] = ()):
    """A function from a model to a short text by it after the prompt, up to one of `ends`; pure, given the seed."""
    import numpy as np

    from jaxup.text import printable

    def sample(model, params) -> str:
        from jaxup.model.sampling import generate

        count = min(config.sample.tokens, model.max_positions - len(prompt))
        steps = generate(
            model, params, np.asarray([prompt], np.int32), max_tokens=count, temperature=config.sample.temperature,
            top_k=config.sample.top_k, seed=config.seed, vocab_size=data.vocab_size, eos_ids=ends,
        )  # fmt: skip
        # A model's tokenizer and template are not to be trusted with a terminal.
        return printable(data.tokenizer.decode([*prompt, *(int(t[0]) for t in steps if t[0] >= 0)]))

    return sample
