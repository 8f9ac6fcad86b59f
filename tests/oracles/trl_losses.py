"""What TRL's losses of policies and of preferences are, on a few numbers: writes `trl_losses.json` beside itself.

    python tests/oracles/trl_losses.py

The losses are TRL's own methods, called without their trainers. What TRL would ask a model for is given to it: the
log-probabilities of `softmax(x @ kernel / temperature)`, in float64.
"""

import collections
import json
import os
import types

import numpy as np

RECORDED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trl_losses.json")
B, S, D, V, MAX_TOKENS, TEMPERATURE = 4, 6, 4, 7, 8, 0.7

# By name: whose loss, and TRL's settings of it.
CASES = {
    "grpo": ("grpo", {"loss_type": "grpo"}),
    "bnpo": ("grpo", {"loss_type": "bnpo"}),
    "dapo": ("grpo", {"loss_type": "dapo"}),
    "dr_grpo": ("grpo", {"loss_type": "dr_grpo"}),
    "grpo with a KL": ("grpo", {"loss_type": "grpo", "beta": 0.3}),
    "dapo with a KL and two-sided clipping": ("grpo", {"loss_type": "dapo", "beta": 0.3, "delta": 1.4}),
    "gspo": ("grpo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "rloo": ("rloo", {}),
    "dpo": ("dpo", {"beta": 0.4}),
}
EPSILON = 0.2, 0.28  # of the clipping, below and above


def make_inputs():
    """Numbers of few digits. Old log-probabilities are near the new ones, so that some are clipped and some are not."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(B, S, D)).round(2), rng.normal(size=(D, V)).round(2)
    targets = rng.integers(0, V, (B, S))
    mask = np.arange(S)[None] < np.array([6, 3, 1, 4])[:, None]
    near = lambda scale: (logp(x, kernel, targets) + scale * rng.normal(size=(B, S))).round(3)  # noqa: E731
    return {
        "x": x.tolist(), "kernel": kernel.tolist(), "targets": targets.tolist(), "mask": mask.astype(int).tolist(),
        "old": near(0.6).tolist(), "reference": near(0.5).tolist(), "advantages": [1.5, -0.8, 0.0, -1.1],
    }  # fmt: skip


def logp(x, kernel, targets):
    logits = x @ kernel / TEMPERATURE
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def trl_loss(trainer, settings, inputs):
    """Loss, its gradients with respect to x and kernel, and what TRL reports."""
    import torch
    import trl

    given = {name: torch.tensor(np.array(value)) for name, value in inputs.items()}
    x, kernel = (given[name].requires_grad_() for name in ("x", "kernel"))
    dpo = trainer == "dpo"  # at temperature 1; its first half of the rows is chosen, the other rejected
    logits = (x @ kernel / (1 if dpo else TEMPERATURE)).log_softmax(-1)
    logps = logits.gather(-1, given["targets"][..., None])[..., 0]
    entropy = -(logits.exp() * logits).sum(-1)
    metrics = collections.defaultdict(list)
    accelerator = types.SimpleNamespace(
        reduce=lambda value, reduction: value, gather=lambda value: value, gather_for_metrics=lambda value: value,
        num_processes=1, device="cpu",
    )  # fmt: skip
    stub = types.SimpleNamespace(
        accelerator=accelerator, model=types.SimpleNamespace(training=True), _metrics={"train": metrics},
        aux_loss_enabled=False, beta=0.0, epsilon_low=EPSILON[0], epsilon_high=EPSILON[1], top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", use_vllm=False, _entropy_bonus_enabled=False,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS, args=types.SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1, gradient_checkpointing_kwargs=None
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        # of DPO
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid"],
        loss_weights=[1.0], _total_train_tokens=0, _tp_size=1, use_weighting=False,
    )  # fmt: skip
    for name, value in settings.items():
        setattr(stub.args if name == "delta" else stub, name, value)
    mask, masked = given["mask"], lambda a: (a * given["mask"]).sum(1)
    if dpo:
        # TRL's model gives 0 where there is no label; and the first token of a row has no log-probability.
        padded = torch.cat([torch.zeros(B, 1, dtype=mask.dtype), mask], dim=1)
        chosen, rejected = masked(given["reference"]).chunk(2)
        fields = {"input_ids": padded, "attention_mask": padded, "completion_mask": padded}
        fields |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        told = types.SimpleNamespace(log_probs=logps * mask, entropy=entropy, mean_logits=logps, is_top1=mask > 0)
        loss = trl.DPOTrainer._compute_loss(stub, lambda **_: told, fields, False)
    else:
        nothing = torch.zeros((B, 0), dtype=torch.int64)
        fields = {
            "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": given["targets"], "completion_mask": mask,
            "advantages": given["advantages"], "old_per_token_logps": given["old"], "old_logps": masked(given["old"]),
            "ref_per_token_logps": given["reference"], "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        cls = trl.GRPOTrainer if trainer == "grpo" else trl.RLOOTrainer
        loss = cls._compute_loss(stub, None, fields)
    loss.backward()
    found = {"loss": loss.item(), "x": x.grad.tolist(), "kernel": kernel.grad.tolist()}
    kept = ("kl", "entropy", "clip_ratio/region_mean", "rewards/margins", "rewards/accuracies")
    return found | {name: metrics[name][0] for name in kept if name in metrics}


def rounded(value):
    """To 9 digits, of which float32 has 7."""
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.9g}")


def main():
    import torch
    import trl

    inputs = make_inputs()
    found = {
        name: {key: rounded(value) for key, value in trl_loss(*case, inputs).items()} for name, case in CASES.items()
    }
    record = {"trl": trl.__version__, "torch": torch.__version__, "inputs": inputs, "losses": found}
    with open(RECORDED, "w") as f:
        json.dump(record, f)
        f.write("\n")


if __name__ == "__main__":
    main()
