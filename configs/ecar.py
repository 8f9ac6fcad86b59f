"""Draw digits scale by scale, each scale a stage of one flow: E-CAR's multistage flow against a plain one.

    python -m jaxup.train --config=ecar.py          # a study: four cells, three seeds
    python -m jaxup.train --config=ecar.py:one
    python -m jaxup.generate runs/ecar-one --image "draw 7" --out grid.png

After E-CAR (Yuan et al. 2024, arXiv 2412.14170): a decoder says of maps of growing size what is on them, all tokens of
a map at once, and a flow turns each map into a picture that the next one goes on from: noise to 2/3, .8 to 1/3, .5 to
0. The first stages have few tokens, so that they are cheap. The decoder has random values here; the pictures are
scikit-learn's digits in patches of 2 x 2 pixels, so that the maps have 1, 4 and 16 tokens.

What the cells are: `staged` is the above, with 8 steps of the head for each map; `single` has one flow, from noise to
the 16 tokens in 24 steps; `plain` has stages between which a map is only upsampled, with no noise for its new tokens;
`tokens` has stages whose net sees each token by itself, as MAR's does, and not the whole map. All are trained for 500
steps of 32 pictures, of which one costs FLOPS_TRAIN.

@RESULTS@

Variants, after a colon and separated by commas:

    one           one run of `staged`
    smoke         the same path as `one` in half a minute, for tests
    paper         256 x 256 pixels, for a pod; see below
    seed=N        of initialisation and batches

Published is of `paper` that E-CAR is as good as DiT at 256 x 256 with a tenth of the FLOPs and in a fifth of the time.
There is no code; the number of stages, the sizes of both nets and the recipe are not confirmed. So the decoder is that
of VAR's smallest (16 layers of 1,024; arXiv 2404.02905), with its optimizer (AdamW, .9 and .95, 1e-4 for 256 pictures,
decay .05, 200 epochs of ImageNet in batches of 768; warm-up, schedule and guidance from memory), the flow's net is a
DiT-B (12 layers of 768, without its modulation), and there are three stages, of 4 x 4, 8 x 8 and 16 x 16 tokens of 16
channels, which is what FlowAR (arXiv 2412.15205) and MAR have of a VAE: `jaxup.features --vae` stores what one of
diffusers makes, with captions beside. Compiled for v5e:4x4 (`--target=v5e:4x4`): 310 million parameters, whole on each
chip, in 3 micro-batches 13.6 of 15.75 GiB, and at least .34 s a step, 49% MFU: 31 hours in all. None of it has been
run.
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
        c.study.finding = ("judged", "frechet")
    return c
