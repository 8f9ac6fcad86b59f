"""Teach a language model to see and draw: digits as continuous tokens among words, one after the other.

    python -m jaxup.train --config=metamorph.py
    python -m jaxup.generate runs/metamorph --image "draw 7" --out grid.png
    python -m jaxup.generate runs/metamorph --image-in digit.png --prompt "which digit?"

After MetaMorph (Tong et al. 2024, arXiv 2412.14164): a decoder is fed continuous tokens through a small connector,
and predicts the next one by a small head; both kinds of pairs, pictures to be drawn and pictures that are asked about,
train it together. Here the base is a LLaMA that is trained on Python's standard library first, and the pictures are
scikit-learn's digits in patches of 2 x 2 pixels; `--config.base.path` and `--config.data.source` take others.

The loss of text is measured before and after: on what the base was trained on.

Variants, after a colon and separated by commas:

    smoke                 the same path in half a minute, for tests
    head=NAME             cosine (the default, the paper's: a direction), gaussian, categorical, diffusion, flow
    upscaled              of the base's layers the second half is there twice, the copies zeroed, and only copies train
    lora                  adapters train, merged into the export
    seed=N                of initialisation and batches
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama


def get_config(arg: str = "") -> ConfigDict:
    head = ("cosine", "gaussian", "categorical", "diffusion", "flow")
    v = variants(arg, size=("quick", "smoke"), head=head, how=("all", "upscaled", "lora"), seed=0)
    smoke, layers = v["size"] == "smoke", 2 if v["size"] == "smoke" else 4

    c = defaults("continuous", small=True)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.steps = 20 if smoke else 800
    c.batch_size = 32
    c.model = llama(
        num_layers=layers, hidden_size=32 if smoke else 96, intermediate_size=64 if smoke else 256,
        num_heads=4, num_kv_heads=2, max_positions=128, vocab_size=0,
    )  # fmt: skip

    c.pretrain.steps = 10 if smoke else 300
    c.pretrain.data.tokenizer = "bpe:512" if smoke else "bpe:1024"
    c.pretrain.optimizer.learning_rate, c.pretrain.optimizer.warmup_steps = 2e-3, 5 if smoke else 30
    if v["how"] == "upscaled":
        c.plan = f"upscale(base, {layers // 2}:{layers}, copies=1)"
        c.train.layers = "copies"
    if v["how"] == "lora":
        c.lora.rank = 8

    c.continuous.head = v["head"]
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 2e-3, 5 if smoke else 50
    c.eval.interval = c.checkpoint.interval = 10 if smoke else 200
    c.eval.rows = 64 if smoke else 330
    if smoke:
        c.continuous.drawn = 20
    return c
