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
steps of 32 pictures; that takes 1.28 times the FLOPs in stages (21 tokens a picture) as without (16).

Measured: three seeds, 165 drawings of each run for prompts of unseen pictures, on 2 cores that others used as well,
about 13 minutes of processor time in two starts. `judged` is the share that a classifier of real pictures takes for
what was asked (of unseen real ones it finds all; with shuffled prompts it is 8 to 9% in all cells, which is chance),
`Fréchet` the distance to unseen real pictures in its features; in brackets the 95% t intervals of the difference to
`staged`, seed by seed:

             judged                        Fréchet                     diversity   head, MFLOP   ms a picture
    staged   93.5%                         1.29                        .678        42.6          3.3
    single   94.5%   +1.0 [-4.7, 6.7]      1.18   -.11 [-.82, .60]     .725        98.0          6.3
    plain    41.0%   -52.5 [-91.8, -13.3]  30.9   +29.6 [17.1, 42.2]   .257        42.6          2.1
    tokens   92.9%   -.6 [-4.6, 3.4]       1.40   +.11 [-.52, .73]     .706        24.9          2.2

Again on two idle cores it took 7 minutes, 10 of processor time: judged 93.7% (stages), 94.9% (one flow), 36.6% (plain)
and 93.1% (tokens); what intervals leave out was the same, but for the Fréchet distance of `plain`, 36, whose seeds
differ so much that three do not show it.

So no difference of quality between stages and one flow is shown at this size, where three seeds would show one of about
6 points; the head takes .435 of the FLOPs (.4375 where a token costs the same in all maps). It took about half of the
time, but `plain`, which computes nearly the same as `staged`, was measured a third faster than it: so much is noise.
Real pictures of a prompt differ by .726, those of `single` as much, those of `staged` a little less. Without the jump's
correction pictures are much worse: all their noise is that of the first map, 4 numbers. That the net has to see the
whole map is not shown: single tokens do as well. Losses of cells with other stages or jumps are of other things, and
order nothing.

These sizes were chosen after others, of one seed each, had been looked at. With patches of 1 pixel, maps of 2, 4 and 8,
600 steps at a rate of 2e-3 and the same nets, stages were worse: judged 78.8%, one flow 94.5% (Fréchet 1.84 and 1.22);
a smaller one (width 48, 400 steps of 16) came to 17.6% in stages. Twelve such runs take more than the eight minutes
that this file may, and patches of 2 pixels have a fourth of the tokens; but whether stages are as good with more
tokens, or only later, these runs do not say.

Variants, after a colon and separated by commas:

    one           one run of `staged`
    smoke         the same path as `one` in half a minute, for tests
    paper         256 x 256 pixels, for a pod; see below
    seed=N        of initialisation and batches

Published is that E-CAR is as good as DiT at 256 x 256 with a tenth of the FLOPs and in a fifth of the time; no code is,
and the number of stages, the sizes of both nets and the recipe are not confirmed. So in `paper` the decoder is one of
16 layers of 1,024, as VAR's smallest (arXiv 2404.02905), and so is the optimizer (AdamW, .9 and .95, 1e-4 for 256
pictures, decay .05, 200 epochs of ImageNet in batches of 768); warm-up, guidance and EMA are a choice. The flow's net
has the size of a DiT-B (12 layers of 768), and there are three stages, of 4 x 4, 8 x 8 and 16 x 16 tokens of 16
channels, such as the VAE of MAR and FlowAR (arXiv 2412.15205) has: they are read as stored features.
`--target=v5e:4x4` says of 310 million parameters, whole on each chip: 13.6 of 15.75 GiB in 3 micro-batches, and at
least .34 s a step, 49% MFU, so 31 hours in all. None of it has been run.
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
