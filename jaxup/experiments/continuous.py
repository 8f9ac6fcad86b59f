"""Words and continuous tokens: a model of any depth is taught to see and to draw.

A layout says where continuous tokens stand in a row and which of them are predicted together, a head which distribution
is predicted (see `jaxup/continuous`). What that needs stands beside the model and trains with it, from first values of
its own; of the model itself trains what `train` and `lora` say, as in healing. What the export holds is a language
model still, with the rest in files beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxup.continuous import files
from jaxup.continuous.data import KINDS, PairData, PairRows
from jaxup.continuous.examples import Example
from jaxup.continuous.heads import HEADS
from jaxup.continuous.layouts import LAYOUTS, Layout
from jaxup.continuous.nets import NETS
from jaxup.continuous.pairs import Examples, PairsConfig, open_pairs
from jaxup.continuous.task import Task
from jaxup.data.open import Data, open_data
from jaxup.data.tokenizer import bpe_vocab_size
from jaxup.depth.result import result_config
from jaxup.errors import UserError, suggest, within
from jaxup.experiments import drawn
from jaxup.experiments.common import corpus, new_model
from jaxup.experiments.config import section
from jaxup.experiments.on_base import BASE, OnBase
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params, init
from jaxup.model.sharding import param_shardings
from jaxup.text import write_atomically
from jaxup.training.loop import as_argument
from jaxup.training.run import Result, Run
from jaxup.training.sharding import check_length

T = TypeVar("T")
TAUGHT = "taught"
# What of section `data` is none of PairsConfig's.
_OWN = ("seq_len", "shape", "store", "tokenizer")


class Continuous(OnBase):
    sections = ("base", "pretrain", "data", "continuous", "text", "train", "lora", "export")
    scored = made = TAUGHT
    control = "continuous.control"
    may_be_random = True
    data: PairData
    _task: Task
    _texts: Data | None = None  # on which the loss of text is measured

    def _read_sections(self) -> None:
        c = self._config
        for key, known in (("layout", LAYOUTS), ("head", HEADS), ("net", NETS)):
            if (value := c.continuous[key]) not in known:
                raise UserError(f"unknown {value!r}{suggest(value, known)}", at=f"continuous.{key}")
        if not c.base.path and not c.pretrain.steps and "model" not in c:
            what = "no base: give base.path, or a section `model` for one that is trained here or has random values"
            raise UserError(what, at="base.path")
        if c.text.tokenizer:
            raise UserError("the text is read by the tokenizer of the base", at=f"text.tokenizer={c.text.tokenizer}")
        if c.data.tell > 0 and not LAYOUTS[c.continuous.layout].tells:
            what = f"layout {c.continuous.layout!r} draws and cannot tell of a picture"
            raise UserError(what, at=f"data.tell={c.data.tell}", hint="continuous.layout=raster can")
        for key, least in (("drawn", 0), ("stages", 0), ("head_steps", 1), ("sets", 1), ("guidance", 0)):
            if not least <= c.continuous[key] < math.inf:
                raise UserError(f"must be at least {least}", at=f"continuous.{key}={c.continuous[key]}")

    # ---- data

    def open_data(self, root: str) -> None:
        c = self._config
        tokenizer = self._open_base(root)
        with within("data."):
            pairs = open_pairs(self._pairs_config(), tokenizer or c.data.tokenizer, Path(c.data.store or root))
        tokenizer = pairs.tokenizer
        if self._recipe is None and not c.pretrain.steps:
            self._models = {BASE: new_model(c.model, len(tokenizer))}
            self._model = result_config(self._plan, self._models)
        kinds = [kind for kind in KINDS if kind != "tell" or LAYOUTS[c.continuous.layout].tells]
        train, validation = (
            mixed([each.of(kind).chosen for kind in kinds]) for each in (pairs.train, pairs.validation)
        )
        if c.data.shape and c.data.shape != (shape := _shape(pairs.frames, pairs.grid, pairs.channels)):
            raise UserError(f"the examples are {shape}", at=f"data.shape={c.data.shape}")
        layout = self._layout(pairs.frames, pairs.grid, pairs.channels, pairs.longest)
        self._said = any(kind != "draw" for kind, _ in (*train, *validation))
        self._set_task(layout)
        self._pairs = pairs
        self.data = PairData(
            pairs=pairs, layout=layout, train=PairRows(Examples(pairs, train), layout),
            validation=PairRows(Examples(pairs, validation), layout), tokenizer=tokenizer, vocab_size=len(tokenizer),
            store="" if self._text is None else self._text.store,
        )  # fmt: skip
        self._count_steps()
        self._texts = self._text
        if c.text.source:
            with within("text."):
                self._texts = open_data(
                    corpus(c.text), tokenizer=tokenizer, root=root, vocab_size=self._model.vocab_size
                )
        self._ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.sample = self._sampler(tokenizer(c.sample.prompt)["input_ids"], self._ends)
        self._vocabulary = self._vocabulary_files()
        self.inputs = {"plan": self._plan.to_yaml(), "data": pairs.digest, "steps": self.steps}
        for name, data in (("pretrain.data", self._text), ("text", self._texts)):
            if data is not None:
                self.inputs[name] = Path(data.store).name

    def without_data(self) -> None:
        c = self._config
        self._base_without_data()
        if self._recipe is None and not c.pretrain.steps:
            self._models = {BASE: new_model(c.model, bpe_vocab_size(c.data.tokenizer) or 1)}
            self._model = result_config(self._plan, self._models)
        found = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)x(\d+)", c.data.shape)
        if not found or not c.data.seq_len:
            what = "without data it is not known what there is to draw, nor how long a row is"
            raise UserError(what, hint="give data.shape, such as 8x8x1152, and data.seq_len")
        frames, rows, columns, channels = (int(number or 0) for number in found.groups())
        layout = self._layout(frames, (rows, columns), channels, (1, 0))
        self._said = layout.tells
        self._set_task(layout)
        nothing = np.zeros(0, np.int32)
        example = Example(kind="draw", prompt=nothing, values=np.zeros(layout.shape, np.float32), answer=nothing)
        tokenizer: Any = None
        one = PairRows([example], layout)
        self.data = PairData(
            pairs=None, layout=layout, train=one, validation=one, tokenizer=tokenizer, vocab_size=1, store=""
        )  # fmt: skip
        self._assume_steps()

    def _pairs_config(self) -> PairsConfig:
        c = self._config.data
        values = {key: value for key, value in c.items() if key not in _OWN}
        if not LAYOUTS[self._config.continuous.layout].tells:
            values["tell"] = 0
        if c.seed < 0:
            values["seed"] = self._settings.seed
        return section(PairsConfig, values)

    def report(self) -> str:
        return "\n".join([str(self._plan), "", self.data.report(), ""])

    # ---- the task

    def _layout(
        self, frames: int, grid: tuple[int, int], channels: int, longest: tuple[int, int]
    ) -> Layout:  # fmt: skip
        """That of rows that hold a prompt and an answer of so many tokens."""
        c, (rows, columns) = self._config.continuous, grid
        kind = LAYOUTS[c.layout]
        given = {
            "rows": rows, "columns": columns, "channels": channels, "frames": frames, "drop": c.drop, "see": c.see,
            "scales": self._scales(rows), "sets": c.spatial.layers > 0,
        }  # fmt: skip
        known = {field.name for field in dataclasses.fields(kind)}
        with within("continuous."):
            layout = kind(length=1, **{name: value for name, value in given.items() if name in known})
        needed, seq_len = sum(longest) + layout.image, self._config.data.seq_len
        if seq_len and seq_len < needed:
            what = f"a prompt of {longest[0]} tokens, {layout.image} of an image and {longest[1]} of an answer"
            raise UserError(f"{what} need {needed}", at=f"data.seq_len={seq_len}", hint="0 is as many as are needed")
        return dataclasses.replace(layout, length=seq_len or needed)

    def _scales(self, side: int) -> tuple[int, ...]:
        c = self._config.continuous
        try:
            if c.scales:
                return tuple(map(int, c.scales.split(",")))
        except ValueError:
            raise UserError(f"{c.scales!r}: sides of maps", at="continuous.scales", hint="such as 1,2,4") from None
        found = [side]
        while found[0] % 2 == 0 and len(found) != c.stages:
            found.insert(0, found[0] // 2)
        return tuple(found if found[0] == 1 or c.stages else [1, *found])

    def _set_task(self, layout: Layout) -> None:
        """And the model with what stands beside it; UserError for a base that has no room for the rows."""
        c, model = self._config.continuous, self._model
        nets, heads = ({**c, "stages": max(1, c.stages), "channels": layout.channels} for _ in range(2))
        net, head, spatial = NETS[c.net], HEADS[c.head], None
        with within("continuous."):
            heads["net"] = net(**{field.name: nets[field.name] for field in dataclasses.fields(net)})
            if c.layout == "frames" and (layers := c.spatial.layers):
                spatial = ModelConfig.llama(
                    vocab_size=1, hidden_size=c.spatial.width, intermediate_size=-(-8 * c.spatial.width // 3),
                    num_layers=layers, num_heads=c.spatial.heads, num_kv_heads=c.spatial.heads,
                    max_positions=layout.rows * layout.columns, tie_embeddings=True,
                )  # fmt: skip
            self._task = Task(
                layout=layout, head=head(**{field.name: heads[field.name] for field in dataclasses.fields(head)}),
                text=float(self._said), values=c.weight, jump=c.jump, spatial=spatial, shift=c.scale_shift,
            )  # fmt: skip
        self._task.check(model, ())
        check_length("data.seq_len", layout.length, self._mesh)
        self._model = self._with_own(model)

    @property
    def _objective(self) -> Task:
        return self._task

    @functools.cached_property
    def _side(self) -> files.Side:
        c = self._config.continuous
        length = self.data.length() if self._task.head.unit else 1.0
        return files.Side(self._task, self._pairs.encoder, {key: c[key] for key in files.DRAWING}, length)

    def _with_own(self, model: ModelConfig) -> ModelConfig:
        return dataclasses.replace(model, beside=self._task.beside(model))

    def _given_own(self, model: ModelConfig, params: Params) -> Params:
        whole = self._with_own(model)
        make = jax.jit(
            lambda seed: init(whole, seed)["beside"], out_shardings=param_shardings(whole, self._mesh)["beside"]
        )
        return {**params, "beside": make(as_argument(self._settings.seed))}

    # ---- the run

    def carry_out(self, run: Run, title: str) -> None:
        if jax.process_index() == 0:  # for the run's models, before there is an export
            for name, content in files.contents(self._side, None).items():
                write_atomically(run.directory / name, content)
            self._keep_tokenizer(run)
        super().carry_out(run, title)

    def _milestones(self) -> frozenset[int]:
        # Few pairs are seen many times: of steps that are given each might be an epoch's end.
        return super()._milestones() if self._config.epochs else frozenset()

    def _measured(self, run: Run, params: Params, before: Callable[[], Params]) -> list[str]:
        self._found = drawn.measured(
            run, self._side, self._pairs, self.data.validation.examples, TAUGHT, self._model, params, before,
            texts=self._texts, count=self._config.continuous.drawn, ends=self._ends,
            textures=self._config.data.source == "xor",
        )  # fmt: skip
        return drawn.table(self._found)

    def _beside_files(self, params: Params) -> dict[str, Any]:
        return {"extra_files": files.contents(self._side, params["beside"])}

    def _finding(self, results: Sequence[Result], unit: str) -> str:
        return drawn.said(results, TAUGHT, self._found)


def mixed(parts: Sequence[Sequence[T]]) -> list[T]:
    """All of them, so that what is first of the result has of each part as large a share as the whole has."""
    placed = [((index + 0.5) / len(part), one) for part in parts for index, one in enumerate(part)]
    return [one for _, one in sorted(placed, key=lambda each: each[0])]


def _shape(frames: int, grid: tuple[int, int], channels: int) -> str:
    return "x".join(map(str, [*([frames] if frames else []), *grid, channels]))
