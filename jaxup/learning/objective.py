"""What a model is trained for on answers that were sampled: policies, preferences, and verdicts on answers.

Shape suffixes: B batch, S sequence, D hidden, T all rows of pairs (2 * B).

A row is a prompt and one answer, padded on the right: `tokens`, `targets` int32 [B, S] and `loss_weights` float32
[B, S], 1 where the target is a token of the answer, the one that ends it included, and else 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxup.errors import UserError
from jaxup.learning.weights import NORMALISERS, RATIOS, Method
from jaxup.model.config import Beside, ModelConfig
from jaxup.model.decoder import Decoder, Params
from jaxup.training.loss import log_probs
from jaxup.training.objective import TEXT, Batch, Objective, Sums, placed

VALUE, VERDICT = "value", "verdict"  # heads beside a model: what is to come is worth, and whether an answer is right


def head(path: str, model: ModelConfig) -> tuple[Beside, ...]:
    """What `ModelConfig.beside` has of a head that gives one number at each position, 0 at first."""
    return (
        Beside(f"{path}.kernel", (model.hidden_size, 1), ("embed", ""), inputs=1),
        Beside(f"{path}.bias", (1,), ("",)),
    )


def read(beside: Params, path: str, x_BSD: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq"]:
    """What that head says, in float32: a value, or of a verdict the logit."""
    if path not in beside:
        raise UserError(f"no head {path!r} stands beside the model", hint=f"head({path!r}, config) describes one")
    kernel_D, bias = beside[path]["kernel"][:, 0], beside[path]["bias"][0]
    return jnp.sum(x_BSD.astype(jnp.float32) * kernel_D.astype(jnp.float32)[None, None], axis=-1) + bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss(Objective):
    """Weighted log-likelihood of sampled answers, in all of its forms. To minimise is the sum over tokens of

        w * (-A * f + beta * (exp(d) - d - 1)),    d = log reference - log pi

    over what `normaliser` says. A is `advantages` [B, S], and f is log pi where `ratio` is "none" (cloning, REINFORCE),
    else rho = pi / old after PPO's clipping (Schulman et al., arXiv 1707.06347): where A > 0 at most 1 + clip_high,
    where A < 0 at least 1 - clip_low and at most `clip_dual` (Ye et al., arXiv 1912.09729). rho is that of each token,
    of the "sequence" as the geometric mean of its tokens' (GSPO, arXiv 2507.18071), or the "product" of them (RLOO,
    arXiv 2402.14740). The last term is the k3 estimator of KL(pi || reference), as in GRPO (arXiv 2402.03300).

    Normalisers, all of the whole batch: "sequence": the mean over answers of the mean over tokens (GRPO; of a product
    that is the mean over answers); "tokens": over all tokens (DAPO, arXiv 2503.14476); "length": over answers times
    `max_tokens`, whatever their lengths (Dr. GRPO, arXiv 2503.20783). An answer whose advantage is 0 counts.

    With `value`, that many times the loss of the head "value" is added, half the squared distance to `returns` [B, S];
    with `value_clip` the larger one of that and of the same where the value is within so much of `old_values` (PPO).

    Fields of a batch: `advantages`; `old_logp` unless the ratio is "none"; `reference_logp` if beta > 0; `returns` and
    `old_values` with a value. All float32 [B, S], log-probabilities at `temperature`, that of sampling, over the first
    `vocab_size` tokens (0: all).
    """

    normaliser: str
    ratio: str
    temperature: float
    clip_low: float = 0.0  # 0: not clipped there
    clip_high: float = 0.0
    clip_dual: float = 0.0
    beta: float = 0.0
    max_tokens: int = 0
    value: float = 0.0
    value_clip: float = 0.0
    vocab_size: int = 0

    def __post_init__(self):
        for name, known in (("normaliser", NORMALISERS), ("ratio", RATIOS)):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"is not one of {', '.join(known)}", at=f"{name}={value}")
        if not 0 < self.temperature < math.inf:
            raise UserError("must be a positive number: that of sampling", at=f"temperature={self.temperature:g}")
        for name in ("clip_low", "clip_high", "clip_dual", "beta", "value", "value_clip"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError("must be a number from 0", at=f"{name}={value:g}")
        if self.clip_low >= 1:
            raise UserError("a ratio is never below 0: must be below 1", at=f"clip_low={self.clip_low:g}")
        if self.clip_dual and self.clip_dual <= 1 + self.clip_high:
            raise UserError("must be above 1 + clip_high, or 0", at=f"clip_dual={self.clip_dual:g}")
        if self.ratio == "none" and (self.clip_low or self.clip_high or self.clip_dual):
            raise UserError("there is no ratio to clip", at="ratio=none", hint="clip_low=0, clip_high=0, clip_dual=0")
        if (self.normaliser == "length") != (self.max_tokens > 0):
            raise UserError("goes with normaliser=length, and that with it", at=f"max_tokens={self.max_tokens}")

    @property
    def evaluated(self) -> Objective:
        """The cross-entropy of solutions."""
        return TEXT

    def counted(self, batch: Batch) -> jax.Array:
        """What the loss is divided by, of these rows. Those without an answer do not count."""
        if self.normaliser == "tokens":
            return jnp.sum(batch["loss_weights"])
        answers = jnp.sum(jnp.any(batch["loss_weights"] > 0, axis=1)).astype(jnp.float32)
        return answers * self.max_tokens if self.normaliser == "length" else answers

    def weighed(self, batch: Batch) -> tuple[Batch, jax.Array]:
        """Each row knows its own length, so a mean of means needs no more than how many rows the batch has."""
        return batch, self.counted(batch)

    def sums(
        self, decoder: Decoder, hidden: Callable[..., jax.Array], batch: Batch, how: Mapping[str, Any], *teacher: Params
    ) -> tuple[jax.Array, Sums]:
        x_BSD = hidden(batch["tokens"], **placed(batch))
        logp_BS, entropy_BS = _logp(self, decoder, x_BSD, batch["targets"], how)
        mask_BS = batch["loss_weights"]
        tokens_B1 = jnp.maximum(jnp.sum(mask_BS, axis=1, keepdims=True), 1)
        each_BS = mask_BS / tokens_B1 if self.normaliser == "sequence" else mask_BS
        tokens, counted = jnp.sum(mask_BS), self.counted(batch)
        mean = lambda a_BS: (jnp.sum(mask_BS * a_BS), tokens)  # noqa: E731

        A_BS = batch["advantages"]
        named = {"entropy": mean(entropy_BS)}
        if self.ratio == "none":
            policy = -jnp.sum(each_BS * A_BS * logp_BS)
        else:
            # Masked before it is exponentiated: what stands in the padding may be anything.
            log_BS = jnp.where(mask_BS > 0, logp_BS - batch["old_logp"], 0)
            named["kl_old"] = mean(_k3(-log_BS))
            if self.ratio != "token":
                log_B1 = jnp.sum(mask_BS * log_BS, axis=1, keepdims=True)
                log_BS = jnp.broadcast_to(log_B1 / tokens_B1 if self.ratio == "sequence" else log_B1, mask_BS.shape)
            bounded_BS, clipped_BS = self._clipped(log_BS, A_BS)
            policy = -jnp.sum(each_BS * A_BS * jnp.exp(bounded_BS))
            named |= {"ratio": mean(jnp.exp(log_BS)), "clipped": mean(clipped_BS)}
        loss = policy
        named["policy"] = policy, counted
        if self.beta:
            kl_BS = _k3(jnp.where(mask_BS > 0, batch["reference_logp"] - logp_BS, 0))
            loss += self.beta * jnp.sum(each_BS * kl_BS)
            named["kl"] = mean(kl_BS)
        if self.value:
            value = jnp.sum(each_BS * self._of_value(read(decoder.beside, VALUE, x_BSD), batch))
            loss += self.value * value
            named["value"] = value, counted
        return loss, jax.lax.stop_gradient(named)

    def _clipped(self, log_BS: jax.Array, A_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(log rho where min(rho * A, clip(rho) * A) takes it, and a constant beyond; 1 where PPO's clip is beyond).

        In logarithms: what overflows beyond the bound has no part in the gradient, and 0 * inf would.
        """
        up, down = A_BS > 0, A_BS < 0
        highest, dual = (
            math.log(x) if x else math.inf for x in (self.clip_high and 1 + self.clip_high, self.clip_dual)
        )
        lowest = math.log1p(-self.clip_low) if self.clip_low else -math.inf
        above_BS, below_BS = up & (log_BS > highest), down & (log_BS < lowest)
        bounded_BS = jnp.where(above_BS, highest, jnp.where(below_BS, lowest, log_BS))
        bounded_BS = jnp.where(down & (log_BS > dual), dual, bounded_BS)
        # An answer that is worth nothing has no gradient, however far it is from where it was drawn.
        return jnp.where(up | down, bounded_BS, 0), (above_BS | below_BS).astype(jnp.float32)

    def _of_value(self, value_BS: jax.Array, batch: Batch) -> jax.Array:
        loss_BS = jnp.square(value_BS - batch["returns"])
        if self.value_clip:
            old_BS = batch["old_values"]
            near_BS = old_BS + jnp.clip(value_BS - old_BS, -self.value_clip, self.value_clip)
            loss_BS = jnp.maximum(loss_BS, jnp.square(near_BS - batch["returns"]))
        return loss_BS / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Objective):
    """DPO (Rafailov et al., arXiv 2305.18290): the mean over pairs of -log sigmoid(beta * margin), where the margin is
    log(pi / reference) of the chosen answer less that of the rejected one, each summed over its tokens.

    A pair is one row: the chosen answer by the plain names, the other as `rejected_tokens`, `rejected_targets` and
    `rejected_weights` [B, S], and what the reference says of both, `reference_chosen` and `reference_rejected` float32
    [B], of the distribution that `PolicyLoss` speaks of. Reported are the loss, beta * margin and the share of pairs
    whose margin is above 0.
    """

    beta: float
    temperature: float
    vocab_size: int = 0

    def __post_init__(self):
        for name in ("beta", "temperature"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise UserError("must be a positive number", at=f"{name}={value:g}")

    @property
    def evaluated(self) -> Objective:
        return TEXT

    def weighed(self, batch: Batch) -> tuple[Batch, jax.Array]:
        return batch, jnp.sum(_pairs(batch))

    def sums(
        self, decoder: Decoder, hidden: Callable[..., jax.Array], batch: Batch, how: Mapping[str, Any], *teacher: Params
    ) -> tuple[jax.Array, Sums]:
        # The two answers of a pair lie side by side, so that each device has both, and are rows of one pass.
        two = lambda a, b: jnp.stack([batch[a], batch[b]], axis=1).reshape(-1, batch[a].shape[1])  # noqa: E731
        where = {name: a if a is None else jnp.repeat(a, 2, axis=0) for name, a in placed(batch).items()}
        x_TSD = hidden(two("tokens", "rejected_tokens"), **where)
        logp_TS, _ = _logp(self, decoder, x_TSD, two("targets", "rejected_targets"), how)
        weights_TS = two("loss_weights", "rejected_weights")
        logp_B2 = jnp.sum(weights_TS * logp_TS, axis=1).reshape(-1, 2)
        margin_B = logp_B2[:, 0] - batch["reference_chosen"] - logp_B2[:, 1] + batch["reference_rejected"]
        pairs_B, margin_B = _pairs(batch), self.beta * margin_B
        loss = -jnp.sum(pairs_B * jax.nn.log_sigmoid(margin_B))
        reported = {"preference": -jax.nn.log_sigmoid(margin_B), "margin": margin_B, "accuracy": margin_B > 0}
        count = jnp.sum(pairs_B)
        return loss, {name: (jnp.sum(pairs_B * jax.lax.stop_gradient(a)), count) for name, a in reported.items()}

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return 2 * super().flops(model, seq_len)


@dataclasses.dataclass(frozen=True)
class VerdictLoss(Objective):
    """The binary cross-entropy of the head "verdict" with `labels` [B, S] from 0 to 1, which may be shares of rollouts,
    where `loss_weights` are: after a whole answer, or after each of its steps. Reported are it and the share of
    verdicts on the label's side of 1/2."""

    @property
    def evaluated(self) -> Objective:
        """The cross-entropy of solutions: how far what it writes has drifted. Verdicts need answers that were drawn."""
        return TEXT

    def sums(
        self, decoder: Decoder, hidden: Callable[..., jax.Array], batch: Batch, how: Mapping[str, Any], *teacher: Params
    ) -> tuple[jax.Array, Sums]:
        logit_BS = read(decoder.beside, VERDICT, hidden(batch["tokens"], **placed(batch)))
        weights_BS, labels_BS = batch["loss_weights"], batch["labels"]
        loss = jnp.sum(weights_BS * (jax.nn.softplus(logit_BS) - labels_BS * logit_BS))
        right, count = jnp.sum(weights_BS * ((logit_BS > 0) == (labels_BS > 0.5))), jnp.sum(weights_BS)
        return loss, {"verdict": (loss, count), "accuracy": (right, count)}

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """No token is told of."""
        return super().flops(model, seq_len) - 6.0 * model.hidden_size * (model.vocab_size - 1)


def objective(method: Method, *, temperature: float, max_tokens: int, vocab_size: int = 0) -> Objective:
    """What trains by a method, which takes of these what it needs: they are those of sampling.

    What is cloned was not drawn at a temperature, or is learned as if it were not: that is the cross-entropy of text.
    """
    if method.positive and method.ratio == "none" and not method.beta:
        temperature, vocab_size = 1.0, 0
    if method.kind == "verdict":
        return VerdictLoss()
    if method.kind == "preference":
        return PreferenceLoss(beta=method.beta, temperature=temperature, vocab_size=vocab_size)
    return PolicyLoss(
        normaliser=method.normaliser, ratio=method.ratio, temperature=temperature, clip_low=method.clip_low,
        clip_high=method.clip_high, clip_dual=method.clip_dual, beta=method.beta, value=method.value,
        value_clip=method.value_clip, vocab_size=vocab_size,
        max_tokens=max_tokens if method.normaliser == "length" else 0,
    )  # fmt: skip


def _logp(loss: Any, decoder: Decoder, x_BSD: jax.Array, targets_BS: jax.Array, how: Mapping[str, Any]) -> Any:
    """`log_probs` by the arguments that a step gives. A z-loss has no sense beside weights of both signs."""
    how = dict(how)
    if how.pop("z_loss"):
        raise UserError("is a part of the cross-entropy alone", at="step.z_loss", hint="0")
    kernel_DV = decoder.head_kernel()
    kernel_DV = kernel_DV[:, : loss.vocab_size] if loss.vocab_size else kernel_DV
    return log_probs(x_BSD, kernel_DV, targets_BS, temperature=loss.temperature, **how)


def _k3(d: jax.Array) -> jax.Array:
    return jnp.expm1(d) - d


def _pairs(batch: Batch) -> jax.Array:
    """float32 [B]: 1 for a row that has a pair, 0 where a batch is filled up."""
    return jnp.any(batch["loss_weights"] > 0, axis=1).astype(jnp.float32)
