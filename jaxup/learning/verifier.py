"""A learned verifier: a model with the head "verdict" beside it, which says of a text whether it is right.

It says so where the last token of the text is read: of a whole answer, its end included, and of one that ends with a
step. There it is taught, too: by the reward of the answer (Cobbe et al. 2021, arXiv 2110.14168), and after each step by
what answers that go on from there are worth on average (Wang et al. 2023, arXiv 2312.08935).

Shape suffixes: N texts, S positions of a row.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxup.data.tokenizer import load_tokenizer, tokenizer_hash
from jaxup.errors import UserError
from jaxup.files.names import split_run
from jaxup.learning.data import along, rows
from jaxup.learning.objective import VALUE, VERDICT
from jaxup.learning.rewards import Reward
from jaxup.learning.scoring import score
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params
from jaxup.training.rundir import TOKENIZER
from jaxup.training.stored import MADE, choose, parse, restore

LABELS = ("outcome", "rollouts:K")
_BATCH, _CHUNK = 64, 128  # texts that are scored at once, and positions whose logits exist at once


# ---- what it learns from


def rollouts_of(labels: str, reward: Reward, step: str) -> int:
    """K of the labels `rollouts:K`, 0 of `outcome`.

    Raises:
      UserError: they are neither, or are of steps that the task has not; a reward that may be no label from 0 to 1.
    """
    number = labels.partition(":")[2]
    if labels != "outcome" and not re.fullmatch("rollouts:[1-9][0-9]{0,3}", labels):
        raise UserError("is not one of " + ", ".join(LABELS), at=f"labels={labels}")
    if number and not step:
        what = "an answer to this task is one step"
        raise UserError(what, at=f"labels={labels}", hint="outcome, or a task such as countdown:3:steps")
    wide = [term.name for term in reward.terms if term.kind in ("length", "shaped") or term.weight < 0]
    if wide or math.fsum(term.weight for term in reward.terms) > 1:
        what = f"labels are from 0 to 1, and what it says may be {'other numbers' if wide else 'more'}"
        raise UserError(what, at="reward", hint="outcome, or noisy:TPR:FPR")
    return int(number or 0)


def checked(rewards_N: np.ndarray) -> np.ndarray:
    """Rewards as labels; NaN where nothing can be said."""
    outside = rewards_N[(rewards_N < 0) | (rewards_N > 1)]
    if len(outside):
        raise UserError(f"a label of {outside[0]:g}, and they are from 0 to 1", at="learn.reward")
    return rewards_N


def read_rows(prompts: Sequence[Sequence[int]], answers: Sequence[Any], seq_len: int) -> dict[str, np.ndarray]:
    """As `jaxup.learning.data.rows`, but the last token is read as well: a row has a position more.

    What is said of token i of an answer stands at position len(prompt) + i.
    """
    return rows(prompts, [[*answer, 0] for answer in answers], seq_len)


def label_rows(
    prompts: Sequence[Sequence[int]], answers: Sequence[Any], labels: Sequence[np.ndarray], seq_len: int
) -> dict[str, np.ndarray]:
    """Rows with `labels` and `loss_weights` float32 [N, S]: a label for each token of each answer, NaN for none."""
    found_NS = along(prompts, [np.concatenate([[np.nan], of]) for of in labels], seq_len)
    begin_N1 = np.array([len(prompt) for prompt in prompts])[:, None]
    known_NS = np.isfinite(found_NS) & (np.arange(seq_len) >= begin_N1)
    known_NS &= np.arange(seq_len) < begin_N1 + np.array([len(of) for of in labels])[:, None]
    about = {"labels": np.where(known_NS, found_NS, 0).astype(np.float32), "loss_weights": known_NS.astype(np.float32)}
    return read_rows(prompts, answers, seq_len) | about


# ---- what it says


class Verifier:
    """What it says of texts: how likely each is right.

    Args:
      config, params: with the head.
      chunk: positions whose logits exist at once.
      batch_size: texts that are scored at once.
      seq_len: of rows; 0 = as long as the longest text, rounded up to a power of two, so that few programs are made.
      mesh: where the params lie, if on one.
    """

    def __init__(
        self, config: ModelConfig, params: Params, *, compute: Compute, chunk: int, batch_size: int, seq_len: int = 0,
        mesh: Mesh | None = None,
    ):  # fmt: skip
        self._config, self._params, self._seq_len = config, params, seq_len
        self._how: dict[str, Any] = {"compute": compute, "chunk": chunk, "batch_size": batch_size, "mesh": mesh}

    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """float64 [N] from 0 to 1, of tokens of prompts and what was written after them; UserError for one that is
        longer than the model."""
        longest, most = max(map(len, texts), default=1), self._config.max_positions
        if longest > most:
            raise UserError(f"a text of {longest} tokens, and the verifier has {most} positions")
        seq_len = self._seq_len or min(most, max(16, 1 << (longest - 1).bit_length()))
        read = read_rows([text[:1] for text in texts], [text[1:] for text in texts], seq_len)
        found = score(self._config, self._params, read, temperature=1.0, head=VERDICT, **self._how)
        assert found.values is not None
        return found.values[np.arange(len(texts)), [len(text) - 1 for text in texts]].astype(np.float64)


class Learned:
    """The verifier of a run, which is read when it is asked first.

    Raises:
      UserError: there is no such run or model, or it has no head that judges.
    """

    def __init__(self, source: str):
        if (found := split_run(source)) is None:
            raise UserError("there is no run of that name")
        self._run, named = found
        self._model = choose(self._run, *(parse(named) if named else (None, None)))
        name, _, stored = self._model
        judges = any(beside.path.partition(".")[0] == VERDICT for beside in stored.model.beside)
        if not judges or stored.kind not in MADE:  # before it trained its head says the same of all
            raise UserError(f"its model {name} is no verifier", hint="a run of learn.method=verdict trains one")
        if not (self._run / TOKENIZER).is_dir():
            raise UserError("its tokenizer is gone")
        self.tokenizer = tokenizer_hash(load_tokenizer(str(self._run / TOKENIZER)))

    @functools.cached_property
    def _verifier(self) -> Verifier:
        params = jax.tree.map(jnp.asarray, restore(self._run, *self._model))  # once, not at each call
        return Verifier(self._model[2].model, params, compute=Compute(), chunk=_CHUNK, batch_size=_BATCH)

    def __call__(self, texts: Sequence[tuple[int, ...]]) -> list[float]:
        return self._verifier(texts).tolist()


def left_out(model: ModelConfig) -> str:
    """What an export says, which has the decoder alone; "" of a model with something else beside it, or nothing."""
    heads = {beside.path.partition(".")[0] for beside in model.beside}
    if not heads or heads - {VALUE, VERDICT}:
        return ""
    reads = ", where the guide learned:RUN reads it" if VERDICT in heads else ""
    return f"the export is the decoder alone: its head {min(heads)!r} stays in the run's checkpoints{reads}"
