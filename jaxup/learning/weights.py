"""What samples are worth to learning: advantages of their rewards, in float64 on the host, and the methods by name.

Shape suffixes: P problems, G samples of each, B rows, S positions of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxup.errors import UserError, suggest

NORMALISERS = ("sequence", "tokens", "length")
RATIOS = ("none", "token", "sequence", "product")
SCALES = ("none", "group", "batch")

Rewards = Float[np.ndarray, "problems samples"]
Texts = Sequence[Sequence[str]]  # of each problem its answers
Scored = Bool[np.ndarray, "problems samples"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way to learn, as data: `jaxup.learning.objective.PolicyLoss` says what its losses are.

    Of numbers that a method has no use for the value is 0.
    """

    kind: str = "policy"  # or preference, verdict
    advantage: str = ""  # a name in ADVANTAGES; "": by another way, as `gae` or `pairs`
    normaliser: str = "tokens"
    ratio: str = "none"
    clip_low: float = 0.0
    clip_high: float = 0.0
    clip_dual: float = 0.0
    beta: float = 0.0
    # Advantages are divided by the standard deviation, plus `eps`, of the rewards of a group or of the batch; those of
    # tokens (`gae`) by their own in the batch, less their mean.
    scale: str = "none"
    eps: float = 0.0
    cap: int = 0  # answers kept of one problem, at most
    margin: float = 0.0  # two answers are a pair if their rewards are further apart
    gamma: float = 0.0
    lam: float = 0.0
    value: float = 0.0
    value_clip: float = 0.0

    def __post_init__(self):
        for name, known in (("normaliser", NORMALISERS), ("ratio", RATIOS), ("scale", SCALES)):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"is not one of {', '.join(known)}", at=f"{name}={value}")
        if self.advantage and self.advantage not in ADVANTAGES:
            raise UserError(f"not known{suggest(self.advantage, ADVANTAGES)}", at=f"advantage={self.advantage}")
        if self.scale == "group" and not self.advantage:
            raise UserError("tokens have no group", at="scale=group", hint="scale=batch, or none")
        if self.scale != "none" and self.eps <= 0:
            raise UserError("must be above 0 where advantages are divided by a deviation", at=f"eps={self.eps:g}")
        if self.advantage == "leave_one_out" and self.scale != "none":
            # One right answer of G: the others' deviation is 0.
            what = "a leave-one-out baseline is not divided by a deviation, which may be 0"
            raise UserError(what, at=f"scale={self.scale}", hint="scale=none, or advantage=group")

    @property
    def by_token(self) -> bool:
        """Whether each token has an advantage of its own, by `gae`."""
        return self.kind == "policy" and not self.advantage

    @property
    def positive(self) -> bool:
        """Whether it learns from what it keeps alone, so that an answer of weight 0 need not be a row."""
        return self.advantage in ("ones", "kept")


# ---- advantages of groups


def advantages(
    method: Method, rewards_PG: Rewards, scored_PG: Scored, texts: Texts
) -> Float[np.ndarray, "problems samples"]:
    """float64 [P, G]: what each sample weighs. Those that are not scored weigh 0, and nothing else depends on them."""
    rewards_PG = np.where(scored_PG, rewards_PG, 0.0).astype(np.float64)
    if not np.isfinite(rewards_PG).all():
        raise UserError("a reward that counts as scored is not finite")
    found = ADVANTAGES[method.advantage](method, rewards_PG, scored_PG, texts)
    return np.where(scored_PG, found, 0.0)


def ones(method: Method, rewards_PG: Rewards, scored_PG: Scored, texts: Texts) -> np.ndarray:
    """Cloning: each answer weighs the same."""
    return np.ones(rewards_PG.shape)


def kept(method: Method, rewards_PG: Rewards, scored_PG: Scored, texts: Texts) -> np.ndarray:
    """Rejection sampling: 1 for answers of a reward above 0, each text once, the first `cap` of a problem (0: all).

    Without a cap easy problems, whose answers are mostly right, would be most of what is learned.
    """
    weights_PG = np.zeros(rewards_PG.shape)
    for p, answers in enumerate(texts):
        seen: dict[str, int] = {}
        for g, text in enumerate(answers):
            if scored_PG[p, g] and rewards_PG[p, g] > 0:
                seen.setdefault(text, g)
        weights_PG[p, [*seen.values()][: method.cap or None]] = 1
    return weights_PG


def plain(method: Method, rewards_PG: Rewards, scored_PG: Scored, texts: Texts) -> np.ndarray:
    """REINFORCE without a baseline: the reward."""
    return rewards_PG / _deviation(method, rewards_PG, scored_PG)


def batch(method: Method, rewards_PG: Rewards, scored_PG: Scored, texts: Texts) -> np.ndarray:
    """REINFORCE: the reward less the mean of the batch."""
    mean = rewards_PG.sum() / max(scored_PG.sum(), 1)
    return (rewards_PG - mean) / _deviation(method, rewards_PG, scored_PG)


def leave_one_out(method: Method, rewards_PG: Rewards, scored_PG: Scored, texts: Texts) -> np.ndarray:
    """RLOO (arXiv 2402.14740): less the mean of the problem's other samples; 0 where there is none."""
    others_P1 = scored_PG.sum(axis=1, keepdims=True) - 1
    others = (rewards_PG.sum(axis=1, keepdims=True) - rewards_PG) / np.maximum(others_P1, 1)
    return np.where(others_P1 > 0, rewards_PG - others, 0.0)


def group(method: Method, rewards_PG: Rewards, scored_PG: Scored, texts: Texts) -> np.ndarray:
    """GRPO (arXiv 2402.03300): less the mean of the problem's samples, over their deviation (of n - 1, as TRL's) if
    `scale` is group; without it Dr. GRPO (arXiv 2503.20783)."""
    centred_PG = rewards_PG - _mean(rewards_PG, scored_PG)
    # To the bit 0 where all are equal, whatever their mean is rounded to.
    spread_P1 = spread(rewards_PG, scored_PG)[:, None]
    return np.where(spread_P1, centred_PG, 0.0) / _deviation(method, rewards_PG, scored_PG)


ADVANTAGES: dict[str, Callable[..., np.ndarray]] = {
    function.__name__: function for function in (ones, kept, plain, batch, leave_one_out, group)
}

# As their papers or TRL have them. DAPO is grpo with normaliser=tokens, clip_high=0.28, beta=0; GSPO ratio=sequence.
METHODS: dict[str, Method] = {
    "sft": Method(advantage="ones"),
    "reject": Method(advantage="kept", cap=4),
    "reinforce": Method(advantage="batch"),
    "rloo": Method(advantage="leave_one_out", normaliser="sequence", ratio="product", clip_low=0.2, clip_high=0.2),
    "grpo": Method(
        advantage="group",
        normaliser="sequence",
        ratio="token",
        clip_low=0.2,
        clip_high=0.2,
        beta=0.04,
        scale="group",
        eps=1e-4,
    ),
    "drgrpo": Method(advantage="group", normaliser="length", ratio="token", clip_low=0.2, clip_high=0.2),
    "ppo": Method(
        ratio="token",
        clip_low=0.2,
        clip_high=0.2,
        gamma=1.0,
        lam=0.95,
        value=0.1,
        value_clip=0.2,
        scale="batch",
        eps=1e-8,
    ),
    "dpo": Method(kind="preference", beta=0.1),
    "verdict": Method(kind="verdict"),
}


def spread(rewards_PG: Rewards, scored_PG: Scored) -> Bool[np.ndarray, " problems"]:
    """Whether the samples of a problem differ in reward: of others no baseline of the group learns anything."""
    least = np.where(scored_PG, rewards_PG, np.inf).min(axis=1)
    return np.where(scored_PG, rewards_PG, -np.inf).max(axis=1) > least


# ---- tokens


def terminal(rewards_B: Float[np.ndarray, " batch"], mask_BS: np.ndarray) -> Float[np.ndarray, "batch seq"]:
    """float64 [B, S]: the reward of an answer at its last token."""
    mask_BS = mask_BS > 0
    last_BS = mask_BS & (np.cumsum(mask_BS[:, ::-1], axis=1)[:, ::-1] == 1)
    return np.where(last_BS, rewards_B[:, None].astype(np.float64), 0.0)


def gae(
    rewards_BS: Float[np.ndarray, "batch seq"],
    values_BS: Float[np.ndarray, "batch seq"],
    mask_BS: np.ndarray,
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[np.ndarray, "batch seq"], Float[np.ndarray, "batch seq"]]:
    """(advantages, returns), float64 [B, S], 0 outside the mask: generalised advantage estimation (arXiv 1506.02438).

    Values are those before the token at their position is drawn. After the last token of the mask nothing is to come,
    also where an answer was cut off.
    """
    rewards, values = (np.asarray(a, np.float64) for a in (rewards_BS, values_BS))
    mask = np.asarray(mask_BS) > 0
    advantages = np.zeros(mask.shape)
    after, carried = np.zeros(len(mask)), np.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        carried = np.where(here, rewards[:, t] + gamma * after - values[:, t] + gamma * lam * carried, carried)
        after = np.where(here, values[:, t], after)
        advantages[:, t] = np.where(here, carried, 0.0)
    return advantages, np.where(mask, advantages + values, 0.0)


def whitened(
    advantages_BS: Float[np.ndarray, "batch seq"], mask_BS: np.ndarray, eps: float
) -> Float[np.ndarray, "batch seq"]:
    """Of mean 0 and deviation 1 over all tokens of the mask, as PPO has them."""
    mask = np.asarray(mask_BS) > 0
    if not mask.any():
        return np.zeros(mask.shape)
    inside = advantages_BS[mask]
    return np.where(mask, (advantages_BS - inside.mean()) / (inside.std() + eps), 0.0)


# ---- pairs


def pairs(scores_PG: Rewards, scored_PG: Scored, texts: Texts, margin: float) -> Int[np.ndarray, "pairs 3"]:
    """int [N, 3]: problem, the best of its answers and the worst, where they are more than `margin` apart.

    Of equal ones the first. A problem has one pair at most.
    """
    found = []
    for p, scored in enumerate(scored_PG):
        known = [int(g) for g in np.flatnonzero(scored)]
        if not known:
            continue
        best, worst = max(known, key=scores_PG[p].__getitem__), min(known, key=scores_PG[p].__getitem__)
        if scores_PG[p, best] - scores_PG[p, worst] > max(margin, 0.0) and texts[p][best] != texts[p][worst]:
            found.append((p, best, worst))
    return np.array(found, np.int64).reshape(-1, 3)


def _mean(rewards_PG: Rewards, scored_PG: Scored) -> np.ndarray:
    return rewards_PG.sum(axis=1, keepdims=True) / np.maximum(scored_PG.sum(axis=1, keepdims=True), 1)


def _deviation(method: Method, rewards_PG: Rewards, scored_PG: Scored) -> np.ndarray | float:
    """What advantages are divided by."""
    if method.scale == "none":
        return 1.0
    if method.scale == "batch":
        rewards_PG, scored_PG = rewards_PG.reshape(1, -1), scored_PG.reshape(1, -1)
    squares = np.where(scored_PG, rewards_PG - _mean(rewards_PG, scored_PG), 0.0) ** 2
    return (
        np.sqrt(squares.sum(axis=1, keepdims=True) / np.maximum(scored_PG.sum(axis=1, keepdims=True) - 1, 1))
        + method.eps
    )
