"""Healing as an experiment file describes it: a base, a plan, chat data, what trains."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import tempfile
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from jaxup import experiment
from jaxup.building.vocabulary import with_template
from jaxup.data.chat import ChatConfig, check_config, check_files, open_chat
from jaxup.data.chat_formats import end_ids, prompt_ids
from jaxup.data.documents import DataConfig, open_data
from jaxup.data.tokenizer import load_tokenizer
from jaxup.depth import picture
from jaxup.depth.apply import apply
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import identity
from jaxup.depth.result import result_config
from jaxup.errors import UserError, suggest
from jaxup.families import with_family_biases
from jaxup.files.shards import DTYPES as SAVED
from jaxup.hub import writer
from jaxup.hub.card import model_card
from jaxup.hub.directory import PLAN, carried_files, tokenizer_directory
from jaxup.hub.load import DTYPES as LOADED
from jaxup.hub.load import load
from jaxup.hub.reader import open_checkpoint
from jaxup.jobs.common import make_sampler, new_model
from jaxup.model.decoder import Params, init
from jaxup.model.sharding import param_shardings
from jaxup.recipes import line as recipe_line
from jaxup.recipes.open import Recipe, open_recipe, parse_places
from jaxup.text import parse_json, write_atomically
from jaxup.training import report
from jaxup.training.heal import BASE, HEALED, Outcome, Source, TrainConfig, run_heal, select
from jaxup.training.loop import Result, Run, Settings, abstract_params, load_trained, random_params, train_model
from jaxup.training.lora import LoraConfig
from jaxup.training.optimizer import OptimizerConfig, learning_rate

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from jaxup.model.config import ModelConfig

PRETRAINED = "pretrained"  # a base that is trained in the run


class HealJob:
    """See `jaxup.jobs.common.Job`."""

    def __init__(self, config: ConfigDict, settings: Settings, mesh: Mesh):
        self._config, self._settings, self._mesh = config, settings, mesh
        self._train = experiment.section(TrainConfig, {**config.train, "rates": config.train.rates.to_dict()})
        alpha = config.lora.alpha or 2.0 * config.lora.rank
        self._lora = experiment.section(LoraConfig, {**config.lora, "alpha": alpha})
        if self._lora.quantize and not self._lora.rank:
            raise UserError(f"lora.quantize={self._lora.quantize}: goes with lora.rank; without adapters all trains")
        self._chat = experiment.section(ChatConfig, config.data)
        check_config(self._chat)
        for key, dtype, known in (("base", config.base.dtype, LOADED), ("export", config.export.dtype, SAVED)):
            if dtype and dtype not in known:
                raise UserError(f"{key}.dtype={dtype!r}: not known{suggest(dtype, known)}")
        self._is_new = not config.base.path and bool(config.pretrain.steps)
        if self._is_new:
            self._plan, self._recipe = self._own_plan(), None
            model = new_model(config.model)
            self._pretrain = dataclasses.replace(
                settings, batch_size=config.pretrain.batch_size,
                optimizer=experiment.section(OptimizerConfig, config.pretrain.optimizer),
            )  # fmt: skip
            learning_rate(self._pretrain.optimizer, config.pretrain.steps)
            self._models = {BASE: model}
        else:
            self._recipe = self._open_recipe()
            self._plan = self._recipe.plan
            self._models = {name: model.config for name, model in self._recipe.models.items()}
        model = result_config(self._plan, self._models)
        if model.positions == "learned" and model.max_positions < config.data.seq_len:
            raise UserError(f"data.seq_len={config.data.seq_len} exceeds the model's {model.max_positions} positions")
        with_family_biases(model)  # what no family can say could not be exported in the end
        self._select(model, self._plan)
        if config.heal.control and self._base_name is None:
            raise UserError(f"heal.control: the plan takes from {len(self._models)} models; there is no one base")

    # ---- the plan and the models

    def _own_plan(self) -> DepthPlan:
        layers, line = self._config.model.num_layers, self._config.plan or f"identity({BASE})"
        if not recipe_line.is_line(line):
            raise UserError(f"plan={line!r}: for a base that is trained here, one line such as 'upscale(base, 2:6)'")

        def count(name: str) -> int:
            if name != BASE:
                raise UserError(f"plan: {name!r}: the one model there is, trained here, is called {BASE!r}")
            return layers

        return recipe_line.parse(line).plan(count)

    def _open_recipe(self) -> Recipe:
        c = self._config
        line = c.plan or f"identity({BASE})"
        if not c.base.path and recipe_line.is_line(line) and BASE in recipe_line.parse(line).models:
            raise UserError(f"base.path: name the model that the plan, {line}, calls {BASE}")
        try:
            recipe = open_recipe(
                line, models=parse_places(c.base.models), default=c.base.path or None,
                revision=c.base.revision or None,
            )  # fmt: skip
        except UserError as error:  # which speaks of the depth tools' flags
            raise UserError("plan: " + _IN_FLAGS.sub("--config.base.models=", str(error))) from None
        if recipe.tokenizer not in (None, "base") or recipe.chat_template is not None:
            raise UserError(
                f"plan: {recipe.name}: tokenizer_source and chat_template are carried out by `python -m jaxup.build`; "
                "give what it makes as base.path, and the format as data.format"
            )
        if len({model.revision for model in recipe.models.values()}) > 1:
            raise UserError("plan: its models are at several revisions; give local directories")
        for note in recipe.notes:
            print(f"plan: {note}", flush=True)
        return recipe

    @cached_property
    def _base_name(self) -> str | None:
        """The one model of the plan, if it is one."""
        return next(iter(self._models)) if len(self._models) == 1 else None

    def _select(self, model: ModelConfig, plan: DepthPlan, train: TrainConfig | None = None) -> Any:
        compute, seed = self._settings.compute, self._settings.seed
        return select(model, plan, train or self._train, self._lora, compute=compute, seed=seed)

    # ---- data

    def open_data(self, root: str) -> None:
        c = self._config
        if self._is_new:
            check_files(self._chat, root)  # before a vocabulary is trained
            self._text = open_data(experiment.section(DataConfig, c.pretrain.data), root=root)
            tokenizer = self._text.tokenizer
            self._models = {BASE: new_model(c.model, self._text.vocab_size)}
        else:
            main = self._recipe.models[self._recipe.base]
            tokenizer = load_tokenizer(str(tokenizer_directory(main.path, revision=main.revision)))
            self._check_weights()
        self.data = open_chat(self._chat, tokenizer=tokenizer, root=root)
        self._model = result_config(self._plan, self._models)
        if self._model.vocab_size < self.data.vocab_size:
            tokens = self.data.vocab_size
            raise UserError(f"data: the tokenizer has {tokens} tokens, the model only {self._model.vocab_size}")
        per_epoch = self.data.train_rows / self._settings.batch_size
        self.steps = c.steps or math.ceil(c.epochs * per_epoch)
        learning_rate(self._settings.optimizer, self.steps)  # refuses a warmup that does not fit
        ends = range(1, math.ceil(self.steps / per_epoch) + 1)
        self._milestones = frozenset(n for n in (math.ceil(e * per_epoch) for e in ends) if n <= self.steps)
        tokenizer = self.data.tokenizer
        tokenizer.chat_template = self.data.chat_template or tokenizer.chat_template
        if tokenizer.chat_template:
            self._ends, prompt = end_ids(c.data.format or None, tokenizer), prompt_ids(tokenizer, c.sample.prompt)
        else:  # of plain text and segments
            self._ends, prompt = (tokenizer.eos_token_id,), tokenizer(c.sample.prompt)["input_ids"]
        self.sample = make_sampler(c, self.data, prompt, self._ends)
        self._vocabulary = self._vocabulary_files()
        stores = [self.data.store, *([self._text.store] if self._is_new else [])]
        self.inputs = {"plan": self._plan.to_yaml(), "data": " and ".join(os.path.basename(store) for store in stores)}

    def _check_weights(self) -> None:
        """Looks at the headers of all files, so that what cannot be loaded is known before anything is written."""
        for model in self._recipe.models.values():
            try:
                open_checkpoint(model.path, revision=model.revision, allow_pickle=self._config.base.allow_pickle)
            except UserError as error:
                raise UserError(str(error).replace("--allow-pickle", "--config.base.allow_pickle=true")) from None

    def report(self) -> str:
        notes = []
        if self.data.seq_len > self._model.max_positions:
            positions = self._model.max_positions
            notes.append(f"data: rows of {self.data.seq_len} tokens, and the base was made for {positions}")
        return "\n".join([str(self._plan), *notes, "", self.data.report(color=sys.stdout.isatty()), ""])

    # ---- the run

    def carry_out(self, run: Run, title: str) -> None:
        if jax.process_index() == 0:
            write_atomically(run.directory / "plan.yaml", self._plan.to_yaml())
        base = self._pretrain_base(run) if self._is_new else self._stored_base()
        before = Source(self._model, lambda: self._build(base), f"{self._config.plan or 'identity'} of {self._origin}")
        selection, control = self._select(self._model, self._plan), None
        if self._config.heal.control:
            everything = dataclasses.replace(self._train, layers="all", freeze="", rates={})
            control = self._select(base.model, identity(BASE, base.model.num_layers), everything)
        about = {"train": dataclasses.asdict(self._train), "lora": dataclasses.asdict(self._lora),
                 "seed": self._settings.seed}  # fmt: skip
        outcome = run_heal(
            run, self._plan, base, before, selection=selection, steps=self.steps, milestones=self._milestones,
            control=control, about=about,
        )  # fmt: skip
        self._finish(run, title, outcome)

    @property
    def _origin(self) -> str:
        if self._is_new:
            return f"a model trained here for {self._config.pretrain.steps} steps"
        return ", ".join(f"{m.path}{f' at {m.revision}' if m.revision else ''}" for m in self._recipe.models.values())

    def _pretrain_base(self, run: Run) -> Source:
        model, steps = self._models[BASE], self._config.pretrain.steps
        run = dataclasses.replace(run, data=self._text, settings=self._pretrain)
        train_model(
            run, PRETRAINED, model, steps=steps, origin=f"random, seed {run.settings.seed}",
            initialise=lambda: random_params(run, model),
        )  # fmt: skip
        return Source(model, lambda: load_trained(run, PRETRAINED, abstract_params(model, run.mesh)), self._origin)

    def _stored_base(self) -> Source | None:
        if self._base_name is None:
            return None
        return Source(self._models[self._base_name], lambda: self._load(None), self._origin)

    def _load(self, plan: DepthPlan | None) -> Params:
        """The base, or the plan's result, each device's part read straight onto it."""
        models, c = self._recipe.models, self._config.base
        paths = {name: model.path for name, model in models.items()}
        model = load(
            paths if plan else paths[self._base_name], plan=plan, mesh=self._mesh, dtype=c.dtype or None, strict=True,
            revision=next(iter(models.values())).revision, allow_pickle=c.allow_pickle, progress=True,
        )  # fmt: skip
        return nnx.to_pure_dict(nnx.state(model))

    def _build(self, base: Source | None) -> Params:
        if not self._is_new:
            return self._load(self._plan)
        seed = self._settings.seed
        make = lambda params: apply(self._plan, {BASE: params}, init(self._model, seed))  # noqa: E731
        return jax.jit(make, out_shardings=param_shardings(self._model, self._mesh))(base.params())

    # ---- what it leaves

    def _finish(self, run: Run, title: str, outcome: Outcome) -> None:
        """The export, the pictures and SUMMARY.md."""
        self._export(run, title, outcome.params)
        if jax.process_index() != 0:
            return
        report.plot_validation(run.directory, title, outcome.results, run.log.read(), pretrained=True)
        (run.directory / "plots" / "plan.png").write_bytes(picture.png(self._plan, title))
        notes = [
            f"{self.data}; seed {run.settings.seed}; {jax.device_count()} x {jax.devices()[0].device_kind}. "
            "Losses are nats per loss token over the same validation rows.",
            "",
            self._what_trained(next(r for r in outcome.results if r.name == HEALED)),
        ]
        print(report.write_summary(
            run.directory, title, outcome.results, str(self._plan), notes, plan_title="The plan"
        ))  # fmt: skip

    def _what_trained(self, healed: Result) -> str:
        if healed.trained is None:
            return "Everything trained."
        t, lora = self._train, self._lora
        chosen = f"layers {t.layers}"
        if t.freeze:
            chosen += f" but {t.freeze}"
        if t.parameters:
            chosen += f", parameters {t.parameters}"
        if lora.rank:
            kept = f" over {lora.quantize}" if lora.quantize else ""
            chosen = f"LoRA of rank {lora.rank}{kept} on {chosen}"
            frozen = "all others"
        else:
            frozen = f"the other {healed.params - healed.trained:,}"
        return (
            f"{healed.trained:,} parameters trained ({chosen}). Every bit of {frozen} is as it was before: "
            "so says a digest of them, taken before the first step and after the last."
        )

    def _export(self, run: Run, title: str, params: Params) -> None:
        files, ids, model_type = self._vocabulary
        dtype = self._config.export.dtype or None
        card = model_card(
            self._model, title=title, dtype=dtype or writer.main_dtype(params), plan=self._plan, source=self._origin,
            base_models=() if self._is_new else [m.path for m in self._recipe.models.values()],
        )  # fmt: skip
        writer.save(
            run.directory / "export", self._model, params, dtype=dtype, model_type=model_type, carried=files,
            hf_extra=ids, card=card, extra_files={PLAN: self._plan.to_yaml()}, force=True,
        )  # fmt: skip

    def _vocabulary_files(self) -> tuple[dict[str, bytes], dict[str, Any], str | None]:
        """The tokenizer's files with the chat template, config.json's token ids, and the family's name."""
        tokenizer = self.data.tokenizer
        if self._is_new:
            with tempfile.TemporaryDirectory() as directory:
                tokenizer.save_pretrained(directory)
                files, model_type = carried_files(directory), None
            ids = {name: getattr(tokenizer, name) for name in _TOKEN_IDS}
        else:
            main = self._recipe.models[self._recipe.base]
            files, model_type = carried_files(main.path, main.revision), main.hf["model_type"]
            ids = {name: main.hf[name] for name in _TOKEN_IDS if name in main.hf}
        if self._chat.format:
            files = with_template(files, self.data.chat_template)
        # Generation has to stop where the format ends a turn.
        settings = parse_json(files.get("generation_config.json", b"{}"), "generation_config.json")
        known = settings.get("eos_token_id")
        ends = dict.fromkeys([*(known if isinstance(known, list) else [] if known is None else [known]), *self._ends])
        settings = {"bos_token_id": tokenizer.bos_token_id, **settings, "eos_token_id": list(ends)}
        files["generation_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
        return files, ids, model_type


_IN_FLAGS = re.compile(r"--model (?:NAME=DIR, or --config-from DIR.*$)?")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
