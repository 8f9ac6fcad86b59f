"""Search and learning: a model of any depth learns from its own answers to problems that can be verified.

Rounds of sample -> score -> weigh -> fit (see `jaxup/learning`), with one optimizer and one schedule over all of them.
What of the model trains `train` and `lora` say, as in healing. ROUNDS.md has a row for each round; in the end the model
as it began and as it became answers the test problems (see `learned.py`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxup.data.chat_formats import end_ids
from jaxup.data.store import default_path
from jaxup.data.tokenizer import tokenizer_hash, unknown_characters
from jaxup.errors import UserError, suggest, within
from jaxup.experiments import answered, learned, paired
from jaxup.experiments.on_base import OnBase
from jaxup.hub.text_generation import encode
from jaxup.learning.data import Rows, TaskData, no_task_data, solved, task_data
from jaxup.learning.guides import open_guide
from jaxup.learning.objective import VALUE, VERDICT, head, objective
from jaxup.learning.policy import Policy
from jaxup.learning.rewards import open_reward
from jaxup.learning.rounds import Samples, template
from jaxup.learning.search import open_method
from jaxup.learning.tasks import open_task, tokenizer_for
from jaxup.learning.verifier import Verifier, left_out, rollouts_of
from jaxup.learning.weights import METHODS, Method
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params, init
from jaxup.model.sharding import param_shardings
from jaxup.progress import say, tell
from jaxup.training.loop import as_argument, load_trained, train_model
from jaxup.training.objective import Objective
from jaxup.training.run import Part, Result, Run
from jaxup.training.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNED, TASK, CHARACTERS = "learned", "task", "chars"
_LEAST = {
    "updates": 1, "problems": 1, "samples": 1, "max_tokens": 0, "clone_rounds": 0, "slots": 1, "top_k": 0,
    "budget": 1, "eval_every": 0, "eval_problems": 1, "eval_samples": 1, "final_problems": 0, "final_samples": 0,
}  # fmt: skip


class Learn(OnBase):
    sections = ("base", "pretrain", "data", "learn", "train", "lora", "export")
    scored = made = LEARNED
    control = ""  # a cell of a study is one
    data: TaskData

    def _read_sections(self) -> None:
        c, learn = self._config, self._config.learn
        if c.epochs:
            raise UserError("rounds have steps", at=f"epochs={c.epochs}", hint="give steps")
        for key, least in _LEAST.items():
            if learn[key] < least:
                raise UserError(f"must be at least {least}", at=f"learn.{key}={learn[key]}")
        if c.steps % learn.updates:
            what = f"rounds of {learn.updates} steps do not make {c.steps}"
            raise UserError(what, at="learn.updates", hint=f"steps={-(-c.steps // learn.updates) * learn.updates}")
        if learn.clone_rounds * learn.updates > c.steps:
            what = f"so many rounds of {learn.updates} steps are more than steps={c.steps}"
            raise UserError(what, at=f"learn.clone_rounds={learn.clone_rounds}")
        with within("learn."):
            self._method = read_method(learn.method, learn.options)
        self._check_sampling()
        if c.step.z_loss:
            raise UserError("weights of both signs have no z-loss", at=f"step.z_loss={c.step.z_loss}", hint="0")

    def _check_sampling(self) -> None:
        learn, method = self._config.learn, self._method
        if not 0 < learn.temperature < math.inf:
            raise UserError("must be a positive number", at=f"learn.temperature={learn.temperature}")
        if not 0 < learn.top_p <= 1:
            raise UserError("must be above 0, and at most 1", at=f"learn.top_p={learn.top_p}")
        limited = [f"learn.{key}={learn[key]}" for key, all_ in (("top_k", 0), ("top_p", 1.0)) if learn[key] != all_]
        if limited and not method.positive and method.kind == "policy":
            what = f"{learn.method} weighs the probabilities that the trainer computes, which are of all tokens"
            raise UserError(what, at=limited[0], hint=f"{limited[0].partition('=')[0]}={0 if 'k' in limited[0] else 1}")
        if learn.samples < 2 and (method.advantage in ("group", "leave_one_out") or method.kind == "preference"):
            what = f"{learn.method} compares the answers to a problem with each other"
            raise UserError(what, at=f"learn.samples={learn.samples}", hint="at least 2")
        if self._judges and learn.clone_rounds:
            what = "a verifier judges answers of the model as it begins, and clones none"
            raise UserError(what, at=f"learn.clone_rounds={learn.clone_rounds}", hint="0")

    def _check_search(self) -> None:
        """UserError for one that does not go with the task; nothing is said of what nothing reads."""
        learn = self._config.learn
        for key, spec in (("search", learn.search), ("compare", "beam" if learn.compare else "")):
            if not spec:
                continue
            if open_method(spec).steps and not self._task.step:
                what = f"it goes over steps, and an answer to {learn.task} is one step"
                raise UserError(what, at=f"{key}={learn[key]}", hint="such as task=countdown:3:steps")
        self._guide = open_guide(learn.guide) if learn.search and open_method(learn.search).guided else None
        self._rollouts = rollouts_of(learn.labels, self._reward, self._task.step) if self._judges else 0

    # ---- data

    def open_data(self, root: str) -> None:
        c, learn = self._config, self._config.learn
        with within("learn."):
            seed = self._settings.seed if learn.seed < 0 else learn.seed
            self._task = open_task(learn.task, train=learn.train, test=learn.test, seed=seed)
            self._reward = open_reward(learn.reward, self._task)
            self._check_search()
        self._check_problems()
        method = self._method
        if method.kind == "policy" and method.ratio == "none" and not method.positive and learn.updates > 1:
            say(f"learn.updates={learn.updates}: {learn.method} weighs no answer by how likely it has become, so of "
                "each round all steps but the first are off-policy")  # fmt: skip
        tokenizer = self._open_base(root)
        assert tokenizer is not None
        if self._guide is not None:
            with within("learn."):
                self._guide.check(tokenizer)
        data = self._text if isinstance(self._text, TaskData) else self._task_data(tokenizer, self._model.vocab_size)
        self._tokens = learn.max_tokens or data.longest[1]  # of an answer
        self._check_length(data)
        if learn.search and learn.budget < self._tokens:
            what = f"smaller than one answer of up to {self._tokens} tokens"
            raise UserError(what, at=f"learn.budget={learn.budget}")
        self._set_objective(min(data.vocab_size, self._model.vocab_size))
        rounds = 0 if self._method.advantage == "ones" else c.steps // learn.updates - learn.clone_rounds
        rows = Rows(template(self._method, data.train.fields))
        self.data = dataclasses.replace(data, train=rows, sampled=rounds * learn.problems * learn.samples)
        self._count_steps()
        prompt = c.sample.prompt or self._task.test[0].prompt
        self.sample = self._sampler(self._prompt(tokenizer, prompt), self._ends)
        self._vocabulary = self._vocabulary_files()
        self.inputs = self._read_inputs()

    def _check_problems(self) -> None:
        learn, task = self._config.learn, self._task
        if not task.train or not task.test:
            raise UserError("no problems to learn from" if not task.train else "no test problems", at="learn.task")
        if both := {problem.id for problem in task.train} & {problem.id for problem in task.test}:
            what = f"{len(both)} test problems are among those of training, such as {min(both)[:60]!r}"
            raise UserError(what, at=f"learn.task={learn.task}")
        if learn.problems > len(task.train) and self._method.advantage != "ones":
            what = f"a round asks so many different problems, and there are {len(task.train)}"
            raise UserError(what, at=f"learn.problems={learn.problems}")

    def _open_text(self, root: str) -> Any:
        c = self._config.pretrain.data
        if c.source != TASK:
            return super()._open_text(root)
        if c.tokenizer != CHARACTERS:
            what = "a base that learns solutions alone has characters for tokens"
            raise UserError(what, at=f"pretrain.data.tokenizer={c.tokenizer}", hint=CHARACTERS)
        tokenizer = tokenizer_for(self._task)
        return self._task_data(tokenizer, len(tokenizer))

    def _task_data(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TaskData:
        c, learn = self._config, self._config.learn
        self._ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        if learn.chat:
            if not tokenizer.chat_template:
                raise UserError("the base has no chat template", at="learn.chat=True")
            self._ends = tuple(end_ids(None, tokenizer))
        if not self._ends:
            raise UserError("its tokenizer has no token that ends a text, so no answer would end", at="base.path")
        problems = [*self._task.train, *self._task.test]
        self._prompts = {each.id: self._prompt(tokenizer, each.prompt) for each in problems}
        if unknown := unknown_characters(tokenizer, [f"{each.prompt}{solved(each)}" for each in problems]):
            say(f"learn.task={learn.task}: the tokenizer has no token for {unknown[:20]!r}, and so has the model none")
        seed = self._settings.seed if learn.seed < 0 else learn.seed
        what = (learn.task, learn.train, learn.test, seed, learn.chat, c.data.seq_len, learn.max_tokens)
        name = default_path("", LEARNED, decides=[*what, tokenizer_hash(tokenizer)])
        return task_data(
            self._task, tokenizer, prompts=self._prompts, end=self._ends[0], seq_len=c.data.seq_len,
            answer=learn.max_tokens, vocab_size=min(vocab_size, len(tokenizer)), store=name.lstrip("/"),
            read=self._judges,
        )  # fmt: skip

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        return list(encode(tokenizer, [{"role": "user", "content": text}] if self._config.learn.chat else text))

    def _check_length(self, data: TaskData) -> None:
        """UserError for a prompt and an answer that are longer than the model, or than a row."""
        prompt, most = data.longest[0], self._model.max_positions
        if prompt + self._tokens > most:
            what = f"a prompt of {prompt} tokens and an answer of {self._tokens} exceed the model's {most} positions"
            raise UserError(
                what, at="learn.max_tokens", hint=f"at most {most - prompt} fit" if prompt < most else "none fits"
            )
        spare = not self._judges  # the last token is no input
        if prompt + self._tokens > data.seq_len + spare:
            what = f"a prompt of {prompt} tokens and an answer of {self._tokens} are longer than a row"
            raise UserError(what, at=f"data.seq_len={data.seq_len}", hint=f"{prompt + self._tokens - spare}, or 0")

    def _set_objective(self, known: int) -> None:
        """And the model with what stands beside it."""
        how = {"temperature": self._config.learn.temperature, "max_tokens": self._tokens}
        how["vocab_size"] = known if known < self._model.vocab_size else 0
        with within("learn.options"):
            self._goal, self._cloning = (objective(method, **how) for method in (self._method, METHODS["sft"]))
        self._known, self._model = known, self._with_own(self._model)

    def without_data(self) -> None:
        c, learn = self._config, self._config.learn
        if not c.data.seq_len:
            raise UserError("without data it is not known how long a row is; give data.seq_len", at="data.seq_len=0")
        self._base_without_data()
        self._tokens = learn.max_tokens or c.data.seq_len
        self._set_objective(self._model.vocab_size)
        data = no_task_data(c.data.seq_len)
        self.data = dataclasses.replace(data, train=Rows(template(self._method, data.train.fields)))
        self._assume_steps()

    def _no_text(self) -> Any:
        c = self._config
        if c.pretrain.data.source != TASK:
            return super()._no_text()
        if not c.model.vocab_size:
            raise UserError("model.vocab_size=0 is that of the tokenizer, and without data there is none; give it")
        return no_task_data(c.data.seq_len)

    # ---- what of the models is the kind's own

    @property
    def _judges(self) -> bool:
        """It trains a verifier."""
        return self._method.kind == "verdict"

    @property
    def _objective(self) -> Objective:
        return self._goal

    def _with_own(self, model: ModelConfig) -> ModelConfig:
        own = VERDICT if self._judges else VALUE if self._method.value else ""
        return dataclasses.replace(model, beside=head(own, model)) if own else model

    def _given_own(self, model: ModelConfig, params: Params) -> Params:
        whole = self._with_own(model)
        if not whole.beside:
            return params
        shardings = param_shardings(whole, self._mesh)["beside"]
        made = jax.jit(lambda seed: init(whole, seed)["beside"], out_shardings=shardings)
        return {**params, "beside": made(as_argument(self._settings.seed))}

    # ---- the run

    compared = staticmethod(paired.compared)

    def report(self) -> str:
        return "\n".join([str(self._plan), "", f"{self.data}", self.data.example(False), ""])

    def carry_out(self, run: Run, title: str) -> None:
        if jax.process_index() == 0:
            self._keep_tokenizer(run)
            (run.directory / learned.ROUNDS).mkdir(exist_ok=True)
        super().carry_out(run, title)

    def _milestones(self) -> frozenset[int]:
        """The ends of the rounds after which the model is tried, and of cloning."""
        learn = self._config.learn
        ends = range(0, self.steps + 1, learn.updates * learn.eval_every) if learn.eval_every else ()
        return frozenset({*ends, learn.clone_rounds * learn.updates, self.steps} - {0})

    def _policy(self, params: Params) -> Policy:
        learn = self._config.learn
        return Policy(
            self._model, params, self.data.tokenizer, ends=self._ends, temperature=learn.temperature,
            top_k=learn.top_k, top_p=learn.top_p, vocab_size=self._known, slots=learn.slots,
            length=self.data.longest[0] + self._tokens, chat=learn.chat, dtype=self._settings.compute.dtype,
        )  # fmt: skip

    def _fit(self, run: Run, **how: Any) -> Result:
        learn, model, initialise = self._config.learn, self._model, how["initialise"]
        clone = learn.clone_rounds * learn.updates
        how["plan"] = self._plan
        rounds = functools.partial(
            learned.Learning, run, self.data, self._task, self._reward, learn, self._method, model, self._policy,
            prompts=self._prompts, max_tokens=self._tokens, vocab_size=self._known, guide=self._guide,
            rollouts=self._rollouts,
        )  # fmt: skip
        only, start, order = self._method.advantage == "ones", None, None
        if clone and not only:
            # The first steps of the same training, by another objective.
            part = Part(curve=LEARNED, first=0, seconds=0.0, schedule=(0, self.steps))
            cloning = rounds(start=None, order=None)
            cloned = train_model(
                run, LEARNED, model, steps=clone, objective=self._cloning, part=part, rounds=cloning, **how
            )
            cloning.finish()
        if not only and (self._method.beta or self._method.kind != "policy" or learn.eval_every):
            if not clone and not self._judges:
                order = how["selection"].order_before(model, self._plan)
            if order is None:
                start = initialise() if not clone else self._cloned(run, cloned, how["selection"], initialise)
            if jax.process_index() == 0:
                kept = "a copy of its parameters" if order is None else "its own layers, without those that train"
                tell(f"the model at the start, which others are compared with: {kept}")
        learning = rounds(start=start, order=order)
        goal = self._goal
        result = train_model(run, LEARNED, model, steps=self.steps, objective=goal, rounds=learning, **how)
        learning.finish()
        return result

    def _cloned(self, run: Run, result: Result, selection: Selection, initialise: Callable[[], Params]) -> Params:
        """The model before it begins to learn from its own answers."""
        clone = self._config.learn.clone_rounds * self._config.learn.updates
        trained = load_trained(run, result, self._model, selection, step=clone)
        with jax.set_mesh(run.mesh):
            merge = jax.jit(selection.merge, out_shardings=param_shardings(self._model, run.mesh))
            return merge(trained, initialise())

    def _measured(self, run: Run, params: Params, before: Callable[[], Params]) -> list[str]:
        self._found = answered.measured(
            run, self._task, self._config.learn, self._policy, params, before, max_tokens=self._tokens,
            judge=self._judge(run, params) if self._judges else None,
        )  # fmt: skip
        return answered.table(self._found)

    def _judge(self, run: Run, params: Params) -> Callable[[Samples], np.ndarray]:
        """What the verifier says of whole answers to test problems."""
        s = run.settings
        verifier = Verifier(
            self._model, params, compute=s.compute, chunk=s.step.loss_chunk, batch_size=s.eval_batch_size,
            seq_len=self.data.seq_len, mesh=run.mesh,
        )  # fmt: skip

        def judge(samples: Samples) -> np.ndarray:
            prompts = [self._prompts[self._task.test[number].id] for number in samples.numbers_P]
            groups = zip(prompts, samples.grouped(samples.tokens), strict=True)
            return verifier([[*prompt, *answer.tolist()] for prompt, answers in groups for answer in answers])

        return judge

    def _beside_files(self, params: Params) -> dict[str, Any]:
        if self._model.beside and jax.process_index() == 0:
            say(left_out(self._model))
        return {}

    def _finding(self, results: Sequence[Result], unit: str) -> str:
        return answered.said(results, self._found, self._config.learn.method)


def read_method(name: str, options: str) -> Method:
    """The method of that name with what is written of it, "beta=0.1,clip_high=0.28"; UserError for what it has not."""
    if name not in METHODS:
        raise UserError(f"unknown {name!r}{suggest(name, METHODS)}", at="method")
    if options and METHODS[name].kind == "verdict":
        raise UserError("a verdict has no settings", at=f"options={options}")
    fields = {field.name: field for field in dataclasses.fields(Method)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in options.split(","))):
        key, given, text = (part.strip() for part in item.partition("="))
        if key not in fields or not given:
            raise UserError(f"{item!r}: a method has no such setting{suggest(key, fields)}", at="options")
        like: Any = fields[key].default
        kind = type(like)
        try:
            values[key] = text if isinstance(like, str) else kind(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError):
            raise UserError(f"{item!r}: must be a number", at="options") from None
    with within("options"):
        return dataclasses.replace(METHODS[name], **values)
