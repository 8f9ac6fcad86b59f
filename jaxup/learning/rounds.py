"""Rounds of learning: sample -> score -> weigh -> fit.

What a round sampled is a pure function of (seed, round, problem, sample) and of the model at its beginning. It is in a
file before anything is fitted to it, so that a training goes on within a round as if it had never stopped.

Shape suffixes: P problems, G samples of each, N all of them, problem by problem, S positions of a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxup.data.batches import Batches
from jaxup.errors import UserError, first_line
from jaxup.learning.data import Rows, along, rows
from jaxup.learning.guides import Guide
from jaxup.learning.problem import Ask, Problem, Task, Writer, Written
from jaxup.learning.rewards import Reward, Score
from jaxup.learning.search import open_method, run
from jaxup.learning.statistics import auc
from jaxup.learning.verifier import checked, label_rows, read_rows
from jaxup.learning.weights import Method, advantages, gae, pairs, spread, terminal, whitened
from jaxup.text import write_atomically

_ARRAYS = ("numbers", "tokens", "text", "token_counts", "text_counts", "ended", "rewards", "right")
# What is known of each token of an answer: of the distribution that it was drawn from, and maybe what the model was at
# the start and a head of values say.
LOGP, ENTROPY, REFERENCE, VALUES = "logp", "entropy", "reference", "values"
PAID = "paid"  # of its answer's reward, where steps are paid
# Of a verifier: what it is to say where a token is read (NaN: nothing), and what it says.
LABELS, VERDICTS = "labels", "verdicts"

# (prefix, tokens of an answer, lengths of its text) -> the tokens with which so many characters are written.
Places = Callable[[Sequence[int], np.ndarray, Sequence[int]], list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """What a policy wrote for P problems, G answers to each, and what they are worth."""

    numbers_P: np.ndarray  # int64: which problems of the task
    tokens: list[np.ndarray]  # N, int32, with the one that ended each
    known: dict[str, list[np.ndarray]]  # N, float32: a number for each token, by name
    texts: list[str]
    ended_N: np.ndarray  # bool
    rewards_N: np.ndarray  # float64; NaN: cannot be said
    right_N: np.ndarray  # float64, by the task's own verifier; NaN: cannot be said
    facts: dict[str, Any]  # what is said of the round, of JSON

    @property
    def count(self) -> int:
        """G."""
        return len(self.texts) // len(self.numbers_P)

    def grouped(self, values: Any) -> Any:
        """[N] -> [P, G]; of a list a list of lists."""
        if isinstance(values, np.ndarray):
            return values.reshape(-1, self.count)
        return [values[start : start + self.count] for start in range(0, len(values), self.count)]

    def rows(self, prompts: Sequence[Sequence[int]], seq_len: int) -> dict[str, np.ndarray]:
        """tokens, targets, loss_weights [N, S]; `prompts`: of each of the P problems its tokens."""
        return rows(self._each(prompts), self.tokens, seq_len)

    def along(self, name: str, prompts: Sequence[Sequence[int]], seq_len: int) -> np.ndarray:
        """float32 [N, S]: what is known of each token, where it is the target."""
        return along(self._each(prompts), self.known[name], seq_len)

    def learn(self, name: str, found_NS: np.ndarray, prompts: Sequence[Sequence[int]]) -> None:
        """The inverse of `along`."""
        begins = [len(prompt) - 1 for prompt in self._each(prompts)]
        self.known[name] = [row[at : at + len(t)] for row, at, t in zip(found_NS, begins, self.tokens, strict=True)]

    def read(self, prompts: Sequence[Sequence[int]], seq_len: int) -> dict[str, np.ndarray]:
        """As `rows`, but the last token is read as well."""
        return read_rows(self._each(prompts), self.tokens, seq_len)

    def judged(self, prompts: Sequence[Sequence[int]], seq_len: int) -> dict[str, np.ndarray]:
        """Rows with `labels` where there are some."""
        return label_rows(self._each(prompts), self.tokens, self.known[LABELS], seq_len)

    def last(self, name: str) -> np.ndarray:
        """float64 [N]: what is known of the last token of each."""
        return np.array([of[-1] for of in self.known[name]], np.float64)

    def _each(self, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        return [prompt for prompt in prompts for _ in range(self.count)]

    def save(self, path: Path) -> None:
        """Whoever finds the file finds it whole."""
        said = [text.encode() for text in self.texts]
        arrays = {
            "numbers": self.numbers_P, "tokens": joined(self.tokens, np.int32),
            "text": np.frombuffer(b"".join(said), np.uint8), "token_counts": np.array([*map(len, self.tokens)]),
            "text_counts": np.array([*map(len, said)]), "ended": self.ended_N, "rewards": self.rewards_N,
            "right": self.right_N, "facts": np.array(json.dumps(self.facts)),
        }  # fmt: skip
        arrays |= {f"known_{name}": joined(values, np.float32) for name, values in self.known.items()}
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **arrays)
        write_atomically(path, file.getvalue())

    @classmethod
    def load(cls, path: Path) -> Samples:
        """UserError for a file that is damaged."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            missing = next((name for name in (*_ARRAYS, "facts") if name not in found), None)
            count = len(found["ended"]) if missing is None else 0
            if missing or count == 0 or count % max(1, len(found["numbers"])):
                raise ValueError(f"{missing or 'what it holds of some samples'} is missing")
            parts = lambda name, by: _split(found[name], found[by], count)  # noqa: E731
            texts = [part.tobytes().decode() for part in parts("text", "text_counts")]
            known = {name[6:]: parts(name, "token_counts") for name in found if name.startswith("known_")}
            tokens, facts = parts("tokens", "token_counts"), json.loads(str(found["facts"]))
            if {len(found["rewards"]), len(found["right"])} != {count} or not {LOGP, ENTROPY} <= known.keys():
                raise ValueError("its arrays do not fit together")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            hint = "delete it and the run's later checkpoints to sample that round again"
            raise UserError(f"damaged: {first_line(error)}", at=str(path), hint=hint) from None
        return cls(
            numbers_P=found["numbers"], tokens=tokens, known=known, texts=texts, ended_N=found["ended"],
            rewards_N=found["rewards"], right_N=found["right"], facts=facts,
        )  # fmt: skip


def sample(
    writer: Writer, task: Task, reward: Reward, problems: Sequence[Problem], numbers_P: np.ndarray, *,
    key: tuple[int, ...], count: int, max_tokens: int, places: Places | None = None,
) -> Samples:  # fmt: skip
    """`count` answers to each of the `problems` with these numbers, scored.

    `key`: numbers that decide what is drawn, beside those of the problem and the sample. `places`: as `Policy.places`,
    if it is to be known at which token each step is paid, where a reward is of steps.
    """
    began = time.monotonic()
    asks = [
        Ask(prefix, (*key, int(number), index), max_tokens)
        for number in numbers_P
        for prefix in [tuple(writer.prefix(problems[number]))]
        for index in range(count)
    ]
    written = writer.write(asks)
    known = {LOGP: [each.logp for each in written], ENTROPY: [each.entropy for each in written]}

    def pay(index: int, score: Score) -> np.ndarray:
        assert places is not None
        tokens, text = written[index].tokens, written[index].text
        return paid(score, len(tokens), text, task.step, lambda ends: places(asks[index].prefix, tokens, ends))

    return _scored(
        task, reward, problems, numbers_P, [each.tokens for each in written], [each.text for each in written],
        np.array([each.ended for each in written]), known, tokens_drawn=sum(len(each.tokens) for each in written),
        began=began, pay=None if places is None else pay,
    )  # fmt: skip


def paid(
    score: Score, count: int, text: str, step: str, places: Callable[[Sequence[int]], Sequence[int]]
) -> np.ndarray:
    """float32 [count]: what an answer of so many tokens is paid at each.

    A step is paid at the token with which what ends it is written, and the last one at the last token, as is what has
    no place in the text. The sum is the score's value; 0 where that cannot be said. `places`: for lengths of the text,
    the tokens with which so many characters are written.
    """
    paid_T, given = np.zeros(count, np.float32), score.steps or [score.value or 0.0]
    if count:
        begins = len(text) - len(text.lstrip())  # what is before the first step is of none
        ends = [begins + found.end() for found in re.finditer(re.escape(step), text[begins:])] if step else []
        at = list(places(ends[: len(given) - 1]))
        np.add.at(paid_T, [*at, *[count - 1] * (len(given) - len(at))], given)
    return paid_T


def searched(
    writer: Writer, task: Task, reward: Reward, problems: Sequence[Problem], numbers_P: np.ndarray, *,
    key: tuple[int, ...], count: int, max_tokens: int, method: str, guide: Guide | None, budget: int,
) -> Samples:  # fmt: skip
    """As `sample`, but the answers are the `count` that a search values most, each found within `budget` tokens a
    problem. Of fewer answers some are there again. What the tokens' distributions were is not known."""
    began = time.monotonic()
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest()) >> 1
    found = run(
        writer, task, [problems[number] for number in numbers_P], open_method(method), guide,
        budget=budget, max_tokens=max_tokens, seed=seed,
    )  # fmt: skip
    nodes = []
    for each in found:
        ranked = sorted(each.samples, key=lambda node: 0.0 if math.isnan(node.value) else -node.value)
        distinct = list({node.text: node for node in reversed(ranked)}.values())[::-1]
        nodes += [distinct[place % len(distinct)] for place in range(count)]
    tokens = [np.array(node.tokens, np.int32) for node in nodes]
    unknown = [np.full(len(each), np.nan, np.float32) for each in tokens]
    return _scored(
        task, reward, problems, numbers_P, tokens, [node.text for node in nodes],
        np.array([len(node.tokens) < max_tokens for node in nodes]), {LOGP: unknown, ENTROPY: unknown},
        tokens_drawn=sum(each.tokens for each in found), began=began,
    )  # fmt: skip


def by_steps(
    writer: Writer, task: Task, reward: Reward, problems: Sequence[Problem], numbers_P: np.ndarray, *,
    key: tuple[int, ...], count: int, max_tokens: int, rollouts: int,
) -> Samples:  # fmt: skip
    """As `sample`, with labels: of each step but the last the mean reward of so many answers that go on from it."""
    began = time.monotonic()
    asked = [(number, (*key, int(number), index)) for number in numbers_P for index in range(count)]
    prefixes = [tuple(writer.prefix(problems[number])) for number, _ in asked]
    parts: list[list[Written]] = [[] for _ in asked]
    tokens: list[tuple[int, ...]] = [() for _ in asked]
    ends: list[tuple[int, int, str]] = []  # which answer, how many of its tokens, and its text so far
    going = list(range(len(asked)))
    while going:
        # By the same key as a whole answer: what is drawn depends on it and on the position.
        wrote = writer.write(
            [Ask(prefixes[n] + tokens[n], asked[n][1], max_tokens - len(tokens[n]), task.step) for n in going]
        )
        for n, step in zip(going, wrote, strict=True):
            parts[n].append(step)
            tokens[n] += tuple(map(int, step.tokens))
        going = [n for n in going if parts[n][-1].stopped and len(tokens[n]) < max_tokens]
        ends += [(n, len(tokens[n]), "".join(step.text for step in parts[n])) for n in going]
    rolled = writer.write(
        [
            Ask(prefixes[n] + tokens[n][:end], (*asked[n][1], end, number), max_tokens - end)
            for n, end, _ in ends
            for number in range(rollouts)
        ]
    )
    known = {
        LOGP: [np.concatenate([step.logp for step in of]) for of in parts],
        ENTROPY: [np.concatenate([step.entropy for step in of]) for of in parts],
        LABELS: [np.full(len(of), np.nan, np.float32) for of in tokens],
    }
    values = iter(rolled)
    for n, end, text in ends:
        texts = [text + next(values).text for _ in range(rollouts)]
        said = [score.value for score in reward.score(problems[asked[n][0]], texts) if score.value is not None]
        if said:
            known[LABELS][n][end - 1] = checked(np.array(said)).mean()
    return _scored(
        task, reward, problems, numbers_P, [np.array(of, np.int32) for of in tokens],
        ["".join(step.text for step in of) for of in parts], np.array([of[-1].ended for of in parts]), known,
        tokens_drawn=sum(map(len, tokens)) + sum(len(each.tokens) for each in rolled), began=began,
    )  # fmt: skip


def labelled(samples: Samples) -> Samples:
    """With the reward of each answer as the label of its last token."""
    labels = samples.known.setdefault(LABELS, [np.full(len(of), np.nan, np.float32) for of in samples.tokens])
    for of, value in zip(labels, checked(samples.rewards_N), strict=True):
        of[-1] = value
    return samples


def _scored(
    task: Task, reward: Reward, problems: Sequence[Problem], numbers_P: np.ndarray, tokens: list[np.ndarray],
    texts: list[str], ended_N: np.ndarray, known: dict[str, list[np.ndarray]], *, tokens_drawn: int, began: float,
    pay: Callable[[int, Score], np.ndarray] | None = None,
) -> Samples:  # fmt: skip
    sampled, failed, count = time.monotonic(), Counter(reward.failed), len(texts) // len(numbers_P)
    asked = [(problems[number], texts[at * count : (at + 1) * count]) for at, number in enumerate(numbers_P)]
    scores = [score for problem, of in asked for score in reward.score(problem, of)]
    if pay and any(score.steps for score in scores):
        known[PAID] = [pay(index, score) for index, score in enumerate(scores)]
    right = [task.verify(problem, text) for problem, of in asked for text in of]
    facts = {
        "tokens": tokens_drawn, "sampling": sampled - began, "scoring": time.monotonic() - sampled,
        "unscorable": dict(Counter(reward.failed) - failed),
    }  # fmt: skip
    return Samples(
        numbers_P=np.asarray(numbers_P, np.int64), tokens=tokens, texts=texts, ended_N=ended_N, known=known,
        rewards_N=_numbers([score.value for score in scores]), right_N=_numbers(right), facts=facts,
    )  # fmt: skip


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def described(samples: Samples) -> dict[str, float]:
    """What is said of every round, by name; NaN where there is nothing to say it of."""
    scored_PG = np.isfinite(samples.grouped(samples.rewards_N))
    mean = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")  # noqa: E731
    unique = [len(set(texts)) / len(texts) for texts in samples.grouped(samples.texts)]
    return {
        "reward": mean(samples.rewards_N),
        "right": mean(samples.right_N),
        "flat": 1 - float(spread(samples.grouped(samples.rewards_N), scored_PG).mean()),
        "entropy": mean(joined(samples.known[ENTROPY], np.float32)),
        "kl": _kl(samples),
        "length": float(np.mean([*map(len, samples.tokens)])),
        "ended": float(samples.ended_N.mean()),
        "unique": float(np.mean(unique)),
        **(judgement(samples) if VERDICTS in samples.known else {}),
    }


def judgement(samples: Samples) -> dict[str, float]:
    """Of a verifier's answers to them: how well it tells right ones from others, and how many labels there are."""
    known_N = np.isfinite(samples.right_N)
    of = auc(samples.last(VERDICTS)[known_N], samples.right_N[known_N] >= 1)
    return {"auc": of, "labels": int(np.isfinite(joined(samples.known.get(LABELS, ()), np.float32)).sum())}


def problems_of(count: int, per_round: int, seed: int, round_: int) -> np.ndarray:
    """int64 [P]: the numbers of the problems of a round; all are asked before one is asked again."""
    return Batches(Rows({"tokens": np.arange(count)}), batch_size=per_round, seed=seed).rows_of(round_)


def fitted(
    method: Method, samples: Samples, prompts: Sequence[Sequence[int]], seq_len: int
) -> dict[str, np.ndarray]:  # fmt: skip
    """The rows that a model learns from, of what is known of the samples; `prompts`: of each of the P problems."""
    if method.kind == "verdict":
        return samples.judged(prompts, seq_len)
    plain = samples.rows(prompts, seq_len)
    rewards_PG = samples.grouped(samples.rewards_N)
    scored_PG, texts = np.isfinite(rewards_PG), samples.grouped(samples.texts)
    if method.kind == "preference":
        reference_NS = samples.along(REFERENCE, prompts, seq_len)
        return _as_pairs(plain, samples, reference_NS, pairs(rewards_PG, scored_PG, texts, method.margin))
    mask_NS = plain["loss_weights"]
    keep_N = np.ones(len(mask_NS), bool)
    if method.advantage:
        weights_N = advantages(method, rewards_PG, scored_PG, texts).reshape(-1)
        found = {"advantages": (weights_N[:, None] * mask_NS).astype(np.float32)}
        if method.positive and weights_N.any():
            keep_N = weights_N != 0
    else:
        values_NS, scored_N1 = samples.along(VALUES, prompts, seq_len), scored_PG.reshape(-1, 1)
        if PAID in samples.known:
            given_NS = samples.along(PAID, prompts, seq_len).astype(np.float64)
        else:
            given_NS = terminal(np.where(scored_N1[:, 0], samples.rewards_N, 0.0), mask_NS)
        gains_NS, returns_NS = gae(given_NS, values_NS, mask_NS, gamma=method.gamma, lam=method.lam)
        if method.scale == "batch":
            gains_NS = whitened(gains_NS, mask_NS * scored_N1, method.eps)
        found = {
            "advantages": np.where(scored_N1, gains_NS, 0).astype(np.float32), "old_values": values_NS,
            "returns": np.where(scored_N1, returns_NS, values_NS).astype(np.float32),
        }  # fmt: skip
    if method.ratio != "none":
        found["old_logp"] = samples.along(LOGP, prompts, seq_len)
    if method.beta:
        found["reference_logp"] = samples.along(REFERENCE, prompts, seq_len)
    return {name: array[keep_N] for name, array in (plain | found).items()}


def template(method: Method, plain: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of solutions with all fields that `fitted` gives: those of cloning, where `method` is that."""
    zeros, found = np.zeros_like(plain["loss_weights"]), dict(plain)
    if method.kind == "verdict":
        return {**plain, "labels": zeros}
    if method.kind == "preference":
        found |= {f"rejected_{name}": plain[name] for name in ("tokens", "targets")} | {"rejected_weights": zeros}
        return found | {name: zeros[:, 0] for name in ("reference_chosen", "reference_rejected")}
    found["advantages"] = plain["loss_weights"]
    asked = {"old_logp": method.ratio != "none", "reference_logp": method.beta > 0}
    asked |= dict.fromkeys(("returns", "old_values"), not method.advantage)
    return found | {name: zeros for name, needed in asked.items() if needed}


def _as_pairs(
    plain: Mapping[str, np.ndarray], samples: Samples, reference_NS: np.ndarray, pairs_M3: np.ndarray
) -> dict[str, np.ndarray]:
    """A row for each pair; without any, one that weighs nothing."""
    chosen_M, rejected_M = (pairs_M3[:, 0] * samples.count + pairs_M3[:, side] for side in (1, 2))
    nothing = not len(pairs_M3)
    if nothing:
        chosen_M = rejected_M = np.zeros(1, np.int64)
    found = {name: array[chosen_M] for name, array in plain.items()}
    for name, other in (("tokens", "tokens"), ("targets", "targets"), ("weights", "loss_weights")):
        found[f"rejected_{name}"] = plain[other][rejected_M]
    sums_N = (reference_NS * plain["loss_weights"]).sum(1, dtype=np.float64).astype(np.float32)
    found |= {"reference_chosen": sums_N[chosen_M], "reference_rejected": sums_N[rejected_M]}
    if nothing:
        found |= {name: np.zeros_like(found[name]) for name in ("loss_weights", "rejected_weights")}
    return found


def _kl(samples: Samples) -> float:
    """Nats a token from what the model was at the start, by the k3 estimator; NaN where that is not known."""
    if REFERENCE not in samples.known:
        return math.nan
    reference, logp = (joined(samples.known[name], np.float64) for name in (REFERENCE, LOGP))
    return float(np.mean(np.expm1(reference - logp) - (reference - logp)))


def joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    """One after the other."""
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def _split(values: np.ndarray, counts: np.ndarray, parts: int) -> list[np.ndarray]:
    if len(counts) != parts or counts.sum() != len(values) or counts.min() < 0:
        raise ValueError("its arrays do not fit together")
    return np.split(values, np.cumsum(counts)[:-1])
