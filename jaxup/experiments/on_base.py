"""Experiments on a base: a model of another depth is made of it, and all of that or a part is trained.

1. Take the base, or pretrain one. Build the model by its plan; keep it in the run as `before`.
2. Measure both: an up-scaled model whose copies are zeroed computes what its base does.
3. Train what is selected. A checkpoint stays from the end of each epoch, or of each phase.
4. Train the base itself for the same steps on the same batches: what the plan gives beyond training.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax

from jaxup.building.vocabulary import with_template
from jaxup.continuous.files import DESCRIPTION as TAUGHT_BY
from jaxup.data.open import no_data
from jaxup.data.tokenizer import bpe_vocab_size, load_tokenizer
from jaxup.depth import picture
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import identity
from jaxup.depth.result import result_config
from jaxup.errors import UserError, suggest, within
from jaxup.experiments import UNITS
from jaxup.experiments.common import (
    Experiment,
    build,
    corpus,
    measured,
    new_model,
    on_course,
    open_text,
    train_fresh,
    unchanged,
)
from jaxup.experiments.config import get, section
from jaxup.experiments.lineage import chosen
from jaxup.families import native_only, with_family_biases
from jaxup.files.shards import DTYPES as SAVED
from jaxup.hub.directory import TOKEN_IDS, carried_files, tokenizer_directory
from jaxup.hub.load import DTYPES as LOADED
from jaxup.hub.load import load
from jaxup.hub.reader import open_checkpoint, stored_dtypes
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import flatten, unflatten, without_beside
from jaxup.progress import say, tell
from jaxup.recipes import line as recipe_line
from jaxup.recipes.open import Recipe, open_recipe, parse_places
from jaxup.text import parse_json, read_json, write_atomically
from jaxup.together import told
from jaxup.training.checkpoint import Checkpoints
from jaxup.training.loop import abstract_params, load_trained, random_params, train_model
from jaxup.training.lora import LoraConfig
from jaxup.training.objective import TEXT, Objective
from jaxup.training.optimizer import OptimizerConfig, learning_rate
from jaxup.training.run import Dtypes, Result, Run, Settings, Stage, check_digest, describe_model, read_result
from jaxup.training.rundir import TOKENIZER
from jaxup.training.selection import Selection, TrainConfig, select
from jaxup.training.sharding import check_batch, check_length

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict
    from transformers import PreTrainedTokenizerBase

# The models of a run by name, which is their kind too; `made` is the one more, which trains.
BASE, PRETRAINED, BEFORE, MERGED, CONTROL = "base", "pretrained", "before", "merged", "control"


class OnBase(Experiment):
    made: ClassVar[str]
    control: ClassVar[str]  # the key that says whether there is one
    may_be_random: ClassVar[bool] = False  # a base, if neither a path is given nor steps to train one
    data: Any  # what experiments ask of a `Data`
    _vocabulary: dict[str, Any]  # what an export has of it
    _ends: tuple[int, ...]  # tokens that end a text

    def __init__(self, config: ConfigDict, settings: Settings, mesh: Mesh):
        super().__init__(config, settings, mesh)
        self._check_steps()
        self._train = section(TrainConfig, config.train)
        self._lora = section(LoraConfig, {**config.lora, "alpha": config.lora.alpha or 2.0 * config.lora.rank})
        self._read_sections()
        for key, dtype, known in (("base", config.base.dtype, LOADED), ("export", config.export.dtype, SAVED)):
            if dtype and dtype not in known:
                raise UserError(f"{key}.dtype={dtype!r}: not known{suggest(dtype, known)}")
        own = not config.base.path and (config.pretrain.steps or self.may_be_random)
        self._recipe = None if own else self._open_recipe()
        # Where the models of the recipe are, and what says whether they still are what they were.
        self._places: dict[str, str] = {}
        self._watched: dict[str, Callable[[], None]] = {}
        self._loaded = False  # the base, in this process
        self._dtype = config.base.dtype or "float32"
        self._text: Any = None  # that a base is trained on here
        if self._recipe is None:
            self._plan = self._own_plan()
            self._models = {BASE: new_model(config.model)}
            if config.pretrain.steps:
                self._pretrain = self._pretraining()
        else:
            self._plan = self._recipe.plan
            self._models = self._recipe.configs
        model = result_config(self._plan, self._models)
        if not native_only(model):  # what no family can say could not be exported in the end
            with_family_biases(model)
        self._check_model(model)
        self._select(model, self._plan)
        if self._wants_control and len(self._models) > 1:
            raise UserError(f"{self.control}: the plan takes from {len(self._models)} models; there is no one base")

    def _pretraining(self) -> Settings:
        """Those by which a base is trained here."""
        c = self._config.pretrain
        with within("pretrain."):
            optimizer = section(OptimizerConfig, c.optimizer)
            learning_rate(optimizer, c.steps)
            check_length("data.seq_len", c.data.seq_len, self._mesh)
        return dataclasses.replace(self._settings, batch_size=c.batch_size, optimizer=optimizer)

    def _read_sections(self) -> None:
        """Those of the kind's own, as far as nothing has to be opened for it."""

    @property
    def _wants_control(self) -> bool:
        return bool(get(self._config, self.control))

    # ---- what of the models is the kind's own

    @property
    def _objective(self) -> Objective:
        """What they train for, once the data is opened."""
        return TEXT

    def _with_own(self, model: ModelConfig) -> ModelConfig:
        """The model with what stands beside it."""
        return model

    def _given_own(self, model: ModelConfig, params: Params) -> Params:
        """Params of a `model` that has nothing beside it, with first values of what does stand there."""
        return params

    # ---- the plan and the models

    def _own_plan(self) -> DepthPlan:
        """Of a base that is trained here."""
        layers, line = self._config.model.num_layers, self._config.plan or f"identity({BASE})"
        if not recipe_line.is_line(line):
            raise UserError(f"plan={line!r}: for a base that is trained here, one line such as 'upscale(base, 2:6)'")

        def count(name: str) -> int:
            if name != BASE:
                raise UserError(f"{name!r}: the one model there is, trained here, is called {BASE!r}", at="plan")
            return layers

        return recipe_line.parse(line).plan(count)

    def _open_recipe(self) -> Recipe:
        c = self._config
        line = c.plan or f"identity({BASE})"
        if not c.base.path and recipe_line.is_line(line) and BASE in recipe_line.parse(line).models:
            raise UserError(f"name the model that the plan, {line}, calls {BASE}", at="base.path")
        flag = "--config.base.models="
        with within("plan"):
            recipe = open_recipe(
                line, models=parse_places(c.base.models, flag), default=c.base.path or None,
                revision=c.base.revision or None, flag=flag,
            )  # fmt: skip
        if recipe.tokenizer not in (None, "base") or recipe.chat_template is not None:
            what = "tokenizer_source and chat_template are carried out by `jaxup build`"
            hint = "give what it makes as base.path, and the format as data.format"
            raise UserError(what, at=("plan", recipe.name), hint=hint)
        if c.base.path not in ("", *(model.path for model in recipe.models.values())):
            what = "the plan takes nothing from it: base.models says where its models are"
            raise UserError(what, at=f"base.path={c.base.path}")
        for note in recipe.notes:
            tell(f"plan: {note}")
        return recipe

    @property
    def _origin(self) -> str:
        if self._recipe is None:
            steps = self._config.pretrain.steps
            return f"a model trained here for {steps} steps" if steps else f"random, seed {self._settings.seed}"
        return ", ".join(f"{m.path}{f' at {m.revision}' if m.revision else ''}" for m in self._recipe.models.values())

    def _select(self, model: ModelConfig, plan: DepthPlan, train: TrainConfig | None = None) -> Selection:
        s = self._settings
        return select(model, plan, train or self._train, self._lora, compute=s.compute, seed=s.seed)

    # ---- data

    def _open_text(self, root: str) -> Any:
        """What a base is trained on here."""
        with within("pretrain."):
            return open_text(corpus(self._config.pretrain.data), root=root)

    def _no_text(self) -> Any:
        """Its shapes."""
        return no_data(corpus(self._config.pretrain.data))

    def _open_base(self, root: str) -> PreTrainedTokenizerBase | None:
        """The base, as far as it is known before it is loaded or trained; its tokenizer, which one with random values
        has not."""
        c = self._config
        if self._recipe is None and not c.pretrain.steps:
            self._model = result_config(self._plan, self._models)
            return None
        if self._recipe is None:
            check_batch("pretrain.batch_size", c.pretrain.batch_size, self._mesh, self._settings.step.accumulation)
            self._text = self._open_text(root)
            tokenizer = self._text.tokenizer
            self._models = {BASE: new_model(c.model, self._text.vocab_size)}
        else:
            main = self._recipe.models[self._recipe.base]
            tokenizer = load_tokenizer(str(tokenizer_directory(main.path, revision=main.revision)))
            for name, model in self._recipe.models.items():
                # By the headers of its files it is known what cannot be loaded.
                opened = open_checkpoint(model.path, revision=model.revision, allow_pickle=c.base.allow_pickle)
                if opened.hf != model.hf:
                    raise UserError("config.json has been replaced while the run was going on", at=model.path)
                if opened.storage.exists(TAUGHT_BY) and jax.process_index() == 0:
                    say(f"{model.path}: the language model alone is taken, without what it sees and draws by")
                self._places[name], self._watched[name] = opened.storage.place, opened.watch()
                self._dtype = c.base.dtype or stored_dtypes({name: opened})(name, "embed_tokens", None)
        self._model = result_config(self._plan, self._models)
        return tokenizer

    def _read_inputs(self) -> dict[str, str | int]:
        """What `inputs` holds, once the data is opened and its steps are counted."""
        stores = [os.path.basename(data.store) for data in (self.data, self._text) if data is not None]
        found: dict[str, str | int] = {"plan": self._plan.to_yaml(), "data": " and ".join(stores), "steps": self.steps}
        if self.data.phases is not None:  # more epochs would put other rows into the steps that are done
            found["order of phases"] = str(self.data.phases)
        return found

    def _base_without_data(self) -> None:
        c = self._config
        if self._recipe is None and c.pretrain.steps:
            self._text = self._no_text()
            self._models = {BASE: new_model(c.model, bpe_vocab_size(c.pretrain.data.tokenizer))}
        elif self._recipe is not None:
            hf = self._recipe.models[self._recipe.base].hf
            self._dtype = c.base.dtype or hf.get("dtype") or hf.get("torch_dtype") or self._dtype
        self._model = result_config(self._plan, self._models)

    def report(self) -> str:
        length, positions = self.data.seq_len, self._model.max_positions
        longer = [f"data: rows of {length} tokens, and the base was made for {positions}"] * (length > positions)
        phases = self.data.phases.schedule(self._settings.batch_size, self.steps) if self.data.phases else []
        said = [self.data.report(), *phases, self.data.example(sys.stdout.isatty())]
        return "\n".join([str(self._plan), *longer, "", *said, ""])

    # ---- the run

    def stages(self, *, most: bool = False) -> list[Stage]:
        alone, plan = next(iter(self._models.values())), self._plan
        base = self._with_own(alone)
        stage = functools.partial(Stage, data=self.data, settings=self._settings, objective=self._objective)
        found, whole = [], identity(plan.rows[0].source, base.num_layers)
        if self._text is not None:
            steps = self._config.pretrain.steps
            found.append(
                Stage(name=PRETRAINED, model=alone, steps=steps, data=self._text, settings=self._pretrain, fresh=True)
            )
        if len(self._models) == 1 and plan.rows != whole.rows:
            found.append(stage(name=BASE, model=base))
        selection = self._select(self._model, plan)
        found.append(stage(name=BEFORE, model=self._model))
        found.append(stage(name=self.made, model=self._model, steps=self.steps, selection=selection, dtype=self._dtype))
        if self._wants_control:
            everything = dataclasses.replace(self._train, layers="all", freeze="", rates={})
            all_of_it = self._select(base, whole, everything)
            found.append(stage(name=CONTROL, model=base, steps=self.steps, selection=all_of_it, dtype=self._dtype))
        if self._lora.rank:  # as exported: merged, and where blocks were quantised, not any more
            found.append(stage(name=MERGED, model=self._model))
        return found

    def carry_out(self, run: Run, title: str) -> None:
        """What is finished is not done again."""
        plan, model, objective = self._plan, self._model, self._objective.evaluated
        if jax.process_index() == 0:
            write_atomically(run.directory / "plan.yaml", plan.to_yaml())
            (run.directory / "plots").mkdir(exist_ok=True)
            (run.directory / "plots" / "plan.png").write_bytes(picture.png(plan, title))
        stages = self.stages()
        run, of = on_course(run, stages), {stage.name: stage for stage in stages}
        source = self._base(run)
        origin = f"{self._config.plan or 'identity'} of {self._origin}"
        ends = self._milestones()
        results, control, base = [], None, None
        if source is not None:
            alone = next(iter(self._models.values()))
            base_model = self._with_own(alone)
            given = lambda: self._given_own(alone, source())  # noqa: E731
            base = functools.partial(unchanged, run, BASE, base_model, given)
            if BASE in of:
                results.append(measured(run, BASE, base_model, origin=self._origin, params=base, objective=objective))
        before = functools.partial(self._before, run, base)
        results.append(measured(run, BEFORE, model, origin=origin, params=before, objective=objective))
        selection = of[self.made].selection
        part = {"train": dataclasses.asdict(self._train), "lora": dataclasses.asdict(self._lora)}
        about = {"before": BEFORE, **part, "seed": self._settings.seed}
        made = self._fit(run, origin=origin, initialise=before, selection=selection, milestones=ends, about=about)
        results.append(made)
        if base is not None and CONTROL in of:
            control = train_model(
                dataclasses.replace(run, evaluated=ends), CONTROL, base_model, steps=self.steps, initialise=base,
                origin=f"{self._origin}, trained on the same batches", selection=of[CONTROL].selection,
                objective=self._objective,
            )  # fmt: skip
        trained = load_trained(run, made, model, selection)
        with jax.set_mesh(run.mesh):
            params = jax.jit(selection.merge, out_shardings=param_shardings(model, run.mesh))(trained, before())
        if MERGED in of:
            merged = f"{self.made} at step {made.steps}, its adapters merged into {BEFORE}"
            results.append(measured(run, MERGED, model, origin=merged, params=lambda: params, objective=objective))
        results += [] if control is None else [control]
        export = {"dtype": self._config.export.dtype or None, "source": self._origin}
        notes = ["", self._what_trained(made), *self._measured(run, params, before)]
        self._finish(
            run, title, results, model.alone(), without_beside(params), plan, made=made, healed=part,
            plan_title="The plan", loss_of=UNITS[self._config.experiment], finding=self._finding, notes=notes,
            export=export | self._vocabulary | self._beside_files(params),
        )  # fmt: skip

    def _fit(self, run: Run, **how: Any) -> Result:
        """Trains what was made; `how` as of `train_model`."""
        model, plan, objective = self._model, self._plan, self._objective
        return train_model(run, self.made, model, steps=self.steps, plan=plan, objective=objective, **how)

    def _milestones(self) -> frozenset[int]:
        """The steps after which a checkpoint stays: at the end of each epoch or phase."""
        ended = (-(-rows // self._settings.batch_size) for rows in self.data.ends())
        return frozenset(itertools.takewhile(lambda n: n <= self.steps, ended))

    def _measured(self, run: Run, params: Params, before: Callable[[], Params]) -> list[str]:
        """Of the model that was made, and of what it was `before`, what is no loss: lines for the summary."""
        return []

    def _beside_files(self, params: Params) -> dict[str, Any]:
        """What an export has of what stands beside the model."""
        return {}

    @abc.abstractmethod
    def _finding(self, results: Sequence[Result], unit: str) -> str:
        """What the results are, in words."""

    def _base(self, run: Run) -> Callable[[], Params] | None:
        """How to get the model that the plan begins from; None if it takes from several."""
        if self._recipe is not None:
            return functools.partial(self._load, None) if len(self._models) == 1 else None
        if self._text is None:
            return functools.partial(random_params, run, self._models[BASE])
        model, run = self._models[BASE], dataclasses.replace(run, data=self._text, settings=self._pretrain)
        result = train_fresh(run, PRETRAINED, model, steps=self._config.pretrain.steps)
        return functools.partial(load_trained, run, result, model)

    def _load(self, plan: DepthPlan | None) -> Params:
        """The base, or the plan's result, each device's part read straight onto it."""
        c, (first, *_) = self._config.base, self._places.values()
        model = load(
            self._places if plan else first, plan=plan, mesh=self._mesh, dtype=c.dtype or None, strict=True,
            allow_pickle=c.allow_pickle, progress=True,
        )  # fmt: skip
        for check in self._watched.values():
            check()
        self._loaded |= plan is None
        return model.params

    def _before(self, run: Run, base: Callable[[], Params] | None) -> Params:
        """The model before training, from the run if it is there, else built and put there."""
        directory = run.directory / "checkpoints" / BEFORE
        advice, alone = f"remove {directory} to have it built again", self._model.alone()
        with jax.set_mesh(run.mesh), Checkpoints(directory, keep=1, advice=advice) as checkpoints:
            if checkpoints.latest is not None:
                kinds = {"dtypes": Dtypes | None}
                about = told(lambda: read_json(directory / "model.json", kinds, advice), "read model.json") or {}
                if (dtypes := about.get("dtypes")) is None:
                    raise UserError(f"gone or damaged; {advice}", at=f"{directory}/model.json")
                wanted = flatten(abstract_params(self._model, run.mesh))
                return checkpoints.restore_params(
                    0, unflatten({path: leaf.update(dtype=dtypes[path]) for path, leaf in wanted.items()})
                )
            if self._recipe is None and base is not None:
                params = build(run, self._plan, alone, lambda: without_beside(base()))
            else:
                if base is not None and not self._loaded and read_result(directory.parent / BASE) is not None:
                    base()  # an earlier start has measured it: is it the same?
                params = self._load(self._plan)
            params = self._given_own(alone, params)
            if self._recipe is not None and self._plan == identity(self._plan.rows[0].source, self._plan.num_layers):
                check_digest(directory.parent / BASE, params)  # which the control begins from
            if jax.process_index() == 0:
                dtypes = {path: leaf.dtype.name for path, leaf in flatten(params).items()}
                describe_model(directory, run, BEFORE, self._model, self._plan, dtypes=dtypes)
            checkpoints.save_params(0, params)
            return params

    # ---- what it leaves

    def _keep_tokenizer(self, run: Run) -> None:
        """For the run's models, before there is an export, where no store of tokens has it."""
        (run.directory / TOKENIZER).mkdir(exist_ok=True)
        for name, content in self._vocabulary["carried"].items():
            (run.directory / TOKENIZER / name).parent.mkdir(exist_ok=True)
            write_atomically(run.directory / TOKENIZER / name, content)

    def _what_trained(self, made: Result) -> str:
        if made.trained is None:
            return "Everything trained."
        frozen = "all others" if self._lora.rank else f"the other {made.params - made.trained:,}"
        which = chosen(dataclasses.asdict(self._train), dataclasses.asdict(self._lora))
        return (
            f"{made.trained:,} parameters trained ({which}). Every bit of {frozen} is as it was before: "
            "so says a digest of them, taken before the first step and after the last."
        )

    def _vocabulary_files(self, template: str | None = None) -> dict[str, Any]:
        """The tokenizer's files, with a chat template if there is one, config.json's token ids, and the family's
        name."""
        tokenizer = self.data.tokenizer
        if self._recipe is None:
            with tempfile.TemporaryDirectory() as directory:
                tokenizer.save_pretrained(directory)
                files, model_type = carried_files(directory), None
            ids = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
        else:
            main = self._recipe.models[self._recipe.base]
            files, model_type = carried_files(main.path, main.revision), main.hf["model_type"]
            ids = {name: main.hf[name] for name in TOKEN_IDS if name in main.hf}
        if template:
            files = with_template(files, template)
        # Generation has to stop where the format ends a turn.
        settings = parse_json(files.get("generation_config.json", b"{}"), "generation_config.json")
        known = settings.get("eos_token_id")
        ends = dict.fromkeys([*(known if isinstance(known, list) else [] if known is None else [known]), *self._ends])
        settings = {"bos_token_id": tokenizer.bos_token_id, **settings, "eos_token_id": list(ends)}
        files["generation_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
        return {"carried": files, "hf_extra": ids, "model_type": model_type}
