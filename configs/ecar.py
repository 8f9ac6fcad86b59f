"""Draw digits scale by scale, each scale a stage of one flow: the multistage flow of E-CAR against a plain one.

DOCSTRING
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama

HEAD_STEPS, STAGES = 24, 3
# What each cell of the study changes of the first, which is E-CAR's.
CELLS = {
    "staged": {},
    "single": {"continuous.stages": 1, "continuous.head_steps": HEAD_STEPS},
    "plain": {"continuous.jump": "plain"},
    "tokens": {"continuous.net": "mlp"},
}


def get_config(arg: str = "") -> ConfigDict:
    v = variants(arg, size=("quick", "smoke", "paper"), one=False, seed=0)
    paper, smoke = v["size"] == "paper", v["size"] == "smoke"

    c = defaults("continuous", small=not paper)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.steps = 333_600 if paper else 8 if smoke else 500
    c.batch_size = 768 if paper else 32
    layers, width, mlp, heads = (16, 1024, 2816, 16) if paper else (1, 32, 64, 4) if smoke else (2, 64, 172, 4)
    c.model = llama(
        num_layers=layers, hidden_size=width, intermediate_size=mlp, num_heads=heads, num_kv_heads=heads,
        max_positions=384 if paper else 128, vocab_size=0,
    )  # fmt: skip

    c.continuous.update(layout="scales", head="flow", net="decoder", stages=STAGES, head_steps=HEAD_STEPS // STAGES)
    c.continuous.update(draws=1, width=768 if paper else width, depth=12 if paper else layers, heads=12 if paper else 4)
    c.step.ema = 0.9999 if paper else 0.97
    if paper:
        c.data.update(source="imagenet/latents", encoder="features", shape="16x16x16", seq_len=384)
        c.data.update(tokenizer="bpe:8192", val_fraction=0.01)
        c.optimizer.update(learning_rate=3e-4, warmup_steps=1668, weight_decay=0.05)
        c.continuous.guidance = 1.5
        c.compute.remat = "dots"
        c.mesh.data, c.mesh.fsdp = -1, 1  # each device has the whole of it
    else:
        c.data.encoder = "patches:2"
        c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-3, 2 if smoke else 50
        c.eval.interval = c.checkpoint.interval = 4 if smoke else 250
        c.eval.rows = 32 if smoke else 165
        c.sample.tokens = 0
        if smoke:
            c.continuous.drawn = 20
    if v["size"] == "quick" and not v["one"]:
        c.study.cells, c.study.seeds, c.study.control = CELLS, (0, 1, 2), "staged"
    return c
