"""Pretraining: a LLaMA from random values.

    python -m jaxup.train --config=pretrain.py

The default is small enough for two CPU cores, where it takes about three minutes.

Variants, after a colon and separated by commas:

    smoke         the same path in half a minute, for CI
    pod           24 layers of 1,024, 370 million parameters, on 31 billion tokens of OpenWebText
    layers=N      of the model (default: 6, smoke 4, pod 24)
    seed=N        of initialisation and batches
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama


def get_config(arg: str = "") -> ConfigDict:
    v = variants(arg, size=("quick", "smoke", "pod"), layers=0, seed=0)
    small, smoke = v["size"] != "pod", v["size"] == "smoke"

    c = defaults("pretrain", small=small)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.steps = 20 if smoke else 300 if small else 60_000
    c.batch_size = 16 if small else 512

    width, mlp, heads = (96, 256, 4) if small else (1024, 2816, 16)
    c.model = llama(
        num_layers=v["layers"] or (4 if smoke else 6 if small else 24), hidden_size=width, intermediate_size=mlp,
        num_heads=heads, num_kv_heads=heads // 2, max_positions=128 if small else 1024,
        vocab_size=0 if small else 50304,  # 0 = the tokenizer's, rounded up to a multiple of 64
    )  # fmt: skip

    c.data.source = "python" if small else "openwebtext"
    c.data.tokenizer = ("bpe:512" if smoke else "bpe:1024") if small else "gpt2"
    c.data.seq_len = c.model.max_positions
    c.data.val_fraction = 0.05 if small else 0.0005

    c.optimizer.learning_rate = 2e-3 if small else 1e-3
    c.optimizer.end_learning_rate = c.optimizer.learning_rate / 10
    c.optimizer.warmup_steps = 5 if smoke else 30 if small else 2000
    c.eval.interval = c.checkpoint.interval = 10 if smoke else 60 if small else 1000
    if smoke:
        c.eval.rows = 32
    return c
