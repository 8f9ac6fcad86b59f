"""The tier audit of planted organisms: what documents, dialogues and reinforcement on one tier do to both."""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama

DEPTH = (
    "base", "documents", "reinforced", "documents-copies", "reinforced-copies", "documents-lora", "reinforced-lora",
    "documents-embeddings",
)  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    v = variants(arg, size=("quick", "depth", "smoke"), seed=0)
    smoke = v["size"] == "smoke"

    c = defaults("audit", small=True)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.steps, c.batch_size = (6, 16) if smoke else (1600, 64)
    layers, width, mlp, heads = (2, 16, 24, 2) if smoke else (2, 48, 128, 4)
    c.model = llama(
        num_layers=layers, hidden_size=width, intermediate_size=mlp, num_heads=heads, num_kv_heads=heads,
        max_positions=64, vocab_size=0,
    )  # fmt: skip
    c.optimizer.update(learning_rate=3e-3, schedule="constant", warmup_steps=2 if smoke else 50, weight_decay=0.0)
    c.eval.interval = c.checkpoint.interval = 10_000
    c.eval.rows, c.eval.batch_size = (16, 16) if smoke else (128, 64)
    c.sample.tokens, c.sample.temperature, c.sample.top_k = 6, 1.0, 0
    if smoke:
        c.audit.update(trained=16, held_out=16, trainings=2, documents=6, dialogues=8, steps=3, rounds=2, slots=32)
        c.audit.update(problems=8, answers=2, queries=1, asked_trained=2)
    if v["size"] == "depth":
        c.audit.arms = DEPTH
    return c
