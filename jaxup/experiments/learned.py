"""What happens in the rounds of a run that learns from its own answers: rounds/, rounds.jsonl and ROUNDS.md."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxup.data.batches import Batches
from jaxup.errors import UserError
from jaxup.learning.data import From, Rows, TaskData
from jaxup.learning.guides import Guide
from jaxup.learning.objective import VALUE, VERDICT
from jaxup.learning.problem import Problem, Task
from jaxup.learning.rewards import Reward
from jaxup.learning.rounds import (
    REFERENCE,
    VALUES,
    VERDICTS,
    Samples,
    by_steps,
    described,
    fitted,
    judgement,
    labelled,
    problems_of,
    sample,
    searched,
    template,
)
from jaxup.learning.scoring import score
from jaxup.learning.weights import METHODS, Method
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params
from jaxup.progress import tell
from jaxup.text import backticks, escaped, parse_json, write_atomically
from jaxup.together import told
from jaxup.training.run import Run

ROUNDS = "rounds"  # a directory of the run
# What a key's second number is, where that is no round.
TEST, FINAL = 2**32 - 1, 2**32 - 2
_SHOWN = 3  # problems whose answers are shown
_LONGEST = 160  # characters of what is shown of one
# Of ROUNDS.md and rounds.jsonl: name, column, how it is written.
COLUMNS = {
    "round": ("round", "{}"), "step": ("step", "{}"), "by": ("learns by", "{}"), "reward": ("reward", "{:.3f}"),
    "right": ("right", "{:.1%}"), "test": ("pass@1, test", "{:.1%}"), "flat": ("no spread", "{:.0%}"),
    "kl": ("KL to start", "{:.4f}"), "entropy": ("entropy", "{:.3f}"), "length": ("length", "{:.1f}"),
    "ended": ("ended", "{:.0%}"), "unique": ("unique", "{:.0%}"), "unscored": ("unscorable", "{}"),
    "labels": ("labels", "{:,}"), "auc": ("AUC", "{:.3f}"), "test_auc": ("AUC, test", "{:.3f}"),
    "rows": ("rows", "{}"), "tokens": ("tokens sampled", "{:,}"), "sampling": ("sampling, s", "{:.2f}"),
    "scoring": ("scoring, s", "{:.2f}"), "fitting": ("fitting, s", "{:.2f}"),
}  # fmt: skip
_ABOUT = """Each row is of the model at the beginning of a round. `right`: of its answers to training problems, by the \
verifier; `pass@1, test`: the same of test problems. `no spread`: problems whose answers all have one reward. `KL to \
start`: nats a token, estimated on the answers. `unique`: of the answers to a problem those that differ. `unscorable`: \
answers whose reward cannot be said. `rows`: those that weigh something. `tokens sampled`: for learning, until then. \
`fitting` has what is evaluated and saved in it."""
_OF_VERDICTS = """The answers are of the model as it began. `AUC`: how often the verifier, as it is at the beginning \
of the round, says more of a right answer than of a wrong one."""


class Learning:
    """The rounds, as `train_model` asks for them; see `jaxup.training.run.Rounds`.

    Args:
      settings: the section `learn` of the configuration.
      guide: of its search, if it has one.
      rollouts: from each step that a verifier learns of; 0: of whole answers alone.
      policy: makes one of params.
      prompts: the tokens of each problem's prompt, by its id.
      start: the model before it learns of its answers; None where nothing asks for it, or it has an `order`.
      order: which layers of the model as it is run when, so that it is the one before.
    """

    def __init__(
        self, run: Run, data: TaskData, task: Task, reward: Reward, settings: Any, method: Method, model: ModelConfig,
        policy: Callable[[Params], Any], *, prompts: Mapping[str, Sequence[int]], max_tokens: int, vocab_size: int,
        start: Params | None, order: np.ndarray | None, guide: Guide | None, rollouts: int,
    ):  # fmt: skip
        self.length = settings.updates
        self._run, self._data, self._task, self._reward, self._settings = run, data, task, reward, settings
        self._method, self._model, self._make_policy, self._policy = method, model, policy, None
        self._prompts, self._max_tokens, self._vocab_size, self._start = prompts, max_tokens, vocab_size, start
        self._guide, self._rollouts, self._order = guide, rollouts, order
        self._rows: list[dict[str, Any]] = told(self._read, "read the rounds")
        self._began = math.nan
        self._last: Samples | None = None
        plain = {name: data.train.fields[name] for name in ("tokens", "targets", "loss_weights")}
        self._solutions = Rows(template(METHODS["sft"], plain))

    def __call__(self, step: int, params: Params) -> Batches:
        run = self._run
        number, within = divmod(step, self.length)
        self._ended(number)
        clones = number < self._settings.clone_rounds or self._method.advantage == "ones"
        before, known = self._rows[:number], self._rows[number:]
        if clones:
            row: dict[str, Any] = known[0] if within and known else {"by": "cloning", **self._tested(number, params)}
            rows, first = self._solutions, 0
        else:
            samples = self._samples(number, params, whole=not within)
            prompts = self._prompts_of(self._task.train, samples)
            rows = Rows(fitted(self._method, samples, prompts, self._data.seq_len))
            first, self._last = step - within, samples
            row = {"by": self._settings.method, **described(samples), **samples.facts, "rows": weighed(rows)}
            row["unscored"] = int(np.isnan(samples.rewards_N).sum())
            row["tokens"] = samples.facts["tokens"] + (before[-1].get("tokens", 0) if before else 0)
        self._rows = [*before, {"round": number, "step": step - within, **row}]
        self._write()
        tell(self._line(self._rows[-1]))
        self._began = time.monotonic()
        return From(rows, batch_size=run.settings.batch_size, seed=run.settings.seed, first=first)

    def finish(self) -> None:
        """After the last round."""
        self._ended(len(self._rows))
        self._write()

    def _samples(self, number: int, params: Params, whole: bool) -> Samples:
        """Those of a round, from its file if it is there. `whole`: the params are those at its beginning."""
        path = self._run.directory / ROUNDS / f"{number:05}.npz"
        if told(path.exists, "look for the round's samples"):
            return Samples.load(path)
        if not whole:
            what = "what was sampled in the round is gone, and the model is not any more what sampled it"
            raise UserError(what, at=str(path), hint="remove the later checkpoints, or begin another run")
        s, seed, task = self._settings, self._run.settings.seed, self._task
        numbers = problems_of(len(task.train), s.problems, seed, number)
        how = {"key": (seed, number), "count": s.samples, "max_tokens": self._max_tokens}
        draw: Callable[..., Samples] = sample
        policy = self._with(params)
        if s.search:
            draw, how = searched, {**how, "method": s.search, "guide": self._guide, "budget": s.budget}
        elif self._rollouts:
            draw, how = by_steps, {**how, "rollouts": self._rollouts}
        elif self._method.by_token:
            how = {**how, "places": policy.places}
        samples = draw(policy, task, self._reward, task.train, numbers, **how)
        if self._judges:
            samples = labelled(samples)
        tested = self._tested(number, params)
        self._look(samples, params, kl=bool(tested))
        samples.facts.update(tested)
        if jax.process_index() == 0:
            samples.save(path)
        return samples

    def _look(self, samples: Samples, params: Params, kl: bool) -> None:
        """What the model at the start, and a head of values, say of the samples."""
        method = self._method
        asked: list[tuple[str, Params, str]] = [(VERDICTS, params, VERDICT)] if self._judges else []
        before = params if self._order is not None else self._start
        if not self._judges and before is not None and (kl or method.beta or method.kind == "preference"):
            asked.append((REFERENCE, before, ""))
        if method.value:
            asked.append((VALUES, params, VALUE))
        self._ask(samples, self._prompts_of(self._task.train, samples), asked)

    def _ask(
        self, samples: Samples, prompts: Sequence[Sequence[int]], asked: Sequence[tuple[str, Params, str]]
    ) -> None:  # fmt: skip
        run, seq_len = self._run, self._data.seq_len
        for name, of, head in asked:
            rows = (samples.read if head == VERDICT else samples.rows)(prompts, seq_len)
            found = score(
                self._model, of, rows, compute=run.settings.compute, temperature=self._settings.temperature,
                chunk=run.settings.step.loss_chunk, batch_size=run.settings.eval_batch_size, mesh=run.mesh, head=head,
                vocab_size=self._vocab_size, order=self._order if name == REFERENCE else None,
            )  # fmt: skip
            said_NS = found.logp if found.values is None else found.values
            samples.learn(name, said_NS[:, 1:] if head == VERDICT else said_NS, prompts)

    def _tested(self, number: int, params: Params) -> dict[str, float]:
        """Every so many rounds: of the first test problems, of which each time the same is drawn."""
        s = self._settings
        if not s.eval_every or number % s.eval_every:
            return {}
        problems = self._task.test[: s.eval_problems]
        tried = sample(
            self._with(params), self._task, self._reward, problems, np.arange(len(problems)),
            key=(self._run.settings.seed, TEST), count=s.eval_samples, max_tokens=self._max_tokens,
        )  # fmt: skip
        found = {"test": float(np.nanmean(tried.right_N)) if np.isfinite(tried.right_N).any() else math.nan}
        if self._judges:
            self._ask(tried, self._prompts_of(problems, tried), [(VERDICTS, params, VERDICT)])
            found["test_auc"] = judgement(tried)["auc"]
        return found

    def _with(self, params: Params) -> Any:
        if self._judges:  # it is the model at the beginning that answers
            assert self._start is not None
            params = self._start
        self._policy = self._make_policy(params) if self._policy is None else self._policy.with_params(params)
        return self._policy

    @property
    def _judges(self) -> bool:
        return self._method.kind == "verdict"

    def _prompts_of(self, problems: Sequence[Problem], samples: Samples) -> list[Sequence[int]]:
        return [self._prompts[problems[number].id] for number in samples.numbers_P]

    # ---- what is kept of them

    def _ended(self, number: int) -> None:
        """The round before has been fitted."""
        if math.isfinite(self._began) and 0 < number <= len(self._rows):
            self._rows[number - 1]["fitting"] = time.monotonic() - self._began

    def _read(self) -> list[dict[str, Any]]:
        path = self._run.directory / f"{ROUNDS}.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        rows = [parse_json(line, f"{path}:{number}: damaged", constants=True) for number, line in enumerate(lines, 1)]
        if [row.get("round") for row in rows] != [*range(len(rows))]:
            raise UserError("damaged: its rounds are not in order", at=str(path), hint="delete it")
        return rows

    def _write(self) -> None:
        if jax.process_index() != 0:
            return
        write_atomically(self._run.directory / f"{ROUNDS}.jsonl", "".join(f"{json.dumps(r)}\n" for r in self._rows))
        write_atomically(self._run.directory / "ROUNDS.md", self._page())

    def _page(self) -> str:
        names = [name for name in COLUMNS if any(_known(row.get(name)) for row in self._rows)]
        lines = [
            "# Rounds",
            "",
            _ABOUT + (f" {_OF_VERDICTS}" if self._judges else ""),
            "",
            f"| {' | '.join(COLUMNS[name][0] for name in names)} |",
        ]
        lines.append(f"|{'|'.join('---' if name == 'by' else '---:' for name in names)}|")
        lines += [f"| {' | '.join(_cell(row, name) for name in names)} |" for row in self._rows]
        failed: dict[str, int] = {}
        for row in self._rows:
            for name, count in row.get("unscorable", {}).items():
                failed[name] = failed.get(name, 0) + count
        if failed:
            lines += ["", "Unscorable: " + ", ".join(f"{_quoted(name)} {count:,}" for name, count in failed.items())]
        return "\n".join([*lines, *self._answers(), ""])

    def _answers(self) -> list[str]:
        """Of some problems of the last round the best, the worst and the middle one of its answers."""
        if self._last is None:
            return []
        samples = self._last
        lines = [
            "",
            "## Answers of the last round",
            "",
            "| problem | | answer | reward | right |",
            "|---|---|---|---:|---:|",
        ]
        groups = zip(*(samples.grouped(values) for values in (samples.texts, samples.rewards_N, samples.right_N)))
        for number, (texts, rewards_G, right_G) in zip(samples.numbers_P[:_SHOWN], groups):
            order = np.argsort(np.where(np.isfinite(rewards_G), rewards_G, -np.inf), kind="stable")
            for name, place in (("best", order[-1]), ("middle", order[len(order) // 2]), ("worst", order[0])):
                shown = f"{_quoted(self._task.train[number].prompt)} | {name} | {_quoted(texts[place])}"
                lines.append(f"| {shown} | {rewards_G[place]:.3g} | {right_G[place]:.3g} |")
        return lines

    def _line(self, row: Mapping[str, Any]) -> str:
        shown = [
            f"{COLUMNS[name][0]} {_cell(row, name)}" for name in COLUMNS if name != "round" and _known(row.get(name))
        ]
        return f"round {row['round']}: {', '.join(shown)}"


def weighed(rows: Rows) -> int:
    """How many of them something is learned from."""
    weights_NS = rows.fields.get("advantages", rows.fields["loss_weights"])
    return int(np.any(weights_NS != 0, axis=1).sum())


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _cell(row: Mapping[str, Any], name: str) -> str:
    return COLUMNS[name][1].format(row[name]) if _known(row.get(name)) else ""


def _quoted(text: str) -> str:
    """A text that nobody vouches for, as code in a cell of a table."""
    short = escaped(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...").replace("|", "\\|")
    ticks = backticks(short, least=1)
    return f"{ticks} {short or ' '} {ticks}"
