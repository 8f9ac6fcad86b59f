"""Where blocks normalise: Mix-LN, LayerNorm scaling, Peri-LN and Post-LN beside Pre-LN, from random values.

    python -m jaxup.train --config=mix_ln.py:mix         # one of them, at a size for two CPU cores
    python -m jaxup.train --config=mix_ln.py:study       # all five with three seeds, side by side
    python -m jaxup.train --config=mix_ln.py:130M,mix    # one of the paper's sizes, for a pod

Mix-LN (arXiv 2412.13795) normalises the first quarter of the layers after the sum and the others before the branch,
so that those in the depth of the model, which Pre-LN hardly uses, have larger gradients. LayerNorm scaling (arXiv
2502.05795) divides what the norms of layer l give by sqrt(l + 1), counted from 0. Both are for training from random
values: a trained layer that is normalised elsewhere is another function.

The sizes are LLaMAs. All: 512 rows of 256 tokens a step, a vocabulary of 32,000, Adam with .9 and .999, no weight
decay and no clipping, norms with an epsilon of 1e-6, a cosine to a tenth. Published perplexities on C4:

          hidden  MLP    heads  layers  steps    warmup  rate   post    pre     mix     lns
    71M   512     1,368  8      12      10,000   1,000   1e-3   35.18   34.77   33.12
    130M  768     2,048  12     12      20,000   2,000   1e-3   26.95   26.78   26.07   25.76 (pre there 26.73)
    250M  768     2,560  16     24      40,000   4,000   1e-3   1,409   21.92   21.39   20.35 (21.92)
    1B    2,048   5,461  32     24      100,000  1,000   5e-4   1,412   18.65   18.18   15.71 (17.02)

Those of lns are of its own paper, with its own Pre-LN in parentheses. The two do not compare: the code of Mix-LN draws
embeddings with a standard deviation of sqrt(2 / 5) = .632, as here, that of LayerNorm scaling with .02 as everything
else (`embed=0.02`), and the steps at 1B differ. Treat Mix-LN as fragile: a later paper saw it diverge at 350M and 1B.
At 1B, alpha 0, .167, .25, .33, .417 and .5 gave 18.65, 18.34, 18.18, 18.41, 18.55 and 18.86. Here no initialisation is
scaled by depth, whatever the placement, so that nothing else differs. None of these sizes has been run here: they need
a pod, C4 and a tokenizer of 32,000 tokens, which `--config.data.source=...` and `--config.data.tokenizer=...` replace.

Measured at the size for here, at the one rate: validation loss after 300 steps in nats a token, three seeds (9 runs, 9
minutes of processor time), and how much of the loss without one of the layers is of the second half of them
(`measures.json`), by seed:

            mean    spread   to pre (95% t interval)   second half
    pre     3.429   .059                               54%, 80%, 43%
    mix     3.435   .053     +.006 [-.036, .049]       61%, 72%, 71%
    post    4.103   1.089    +.674 [-1.9, 3.2]         85%, 88%, 100%

So no difference between Mix-LN and Pre-LN is shown, and no curse of depth: under Pre-LN the second half has its share.
Post-LN is worse by .01 and .15 with two seeds, and stuck at 5.4 with the third. With embeddings from .02 (seed 0):

    pre 4.90, 8%     post 3.27, 78%    mix 3.27, 85%    lns 3.59, 0%    peri 5.25, 2%

What embeddings begin with decides more here than where blocks normalise: from .02 pre and peri hardly learn, and nearly
all is the first layer's. 300 steps, 12 layers of 64 and one rate are little: a rate that suits each placement has to be
looked for (`rate=`), and lns and peri have not been run with three seeds.

Variants, after a colon and separated by commas:

    pre, post, mix, lns, peri    where blocks normalise (default: pre)
    smoke, 71M, 130M, 250M, 1B   sizes (default: 12 layers of 64, for two CPU cores); smoke is for tests
    study                        all five placements and seeds 0, 1 and 2, compared with pre
    alpha=X                      of mix: the share of the layers that are post (default: .25)
    embed=X                      standard deviation of the embedding's first values (default: .632)
    rate=X                       the peak of the learning rate
    seed=N                       of initialisation and batches
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama

# Hidden size, MLP, heads, layers, steps, warmup, learning rate.
SIZES = {
    "quick": (64, 172, 4, 12, 300, 30, 3e-3), "smoke": (16, 24, 2, 4, 20, 5, 3e-3),
    "71M": (512, 1368, 8, 12, 10_000, 1000, 1e-3), "130M": (768, 2048, 12, 12, 20_000, 2000, 1e-3),
    "250M": (768, 2560, 16, 24, 40_000, 4000, 1e-3), "1B": (2048, 5461, 32, 24, 100_000, 1000, 5e-4),
}  # fmt: skip
PLACEMENTS = ("pre", "post", "mix", "lns", "peri")


def get_config(arg: str = "") -> ConfigDict:
    v = variants(arg, size=tuple(SIZES), placement=PLACEMENTS, study=False, alpha=0.25, embed=0.632, rate=0.0, seed=0)
    small, smoke = v["size"] in ("quick", "smoke"), v["size"] == "smoke"
    hidden, mlp, heads, layers, steps, warmup, rate = SIZES[v["size"]]

    c = defaults("pretrain", small=small)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed, c.steps, c.batch_size = v["seed"], steps, 16 if small else 512
    c.model = llama(
        num_layers=layers, hidden_size=hidden, intermediate_size=mlp, num_heads=heads, num_kv_heads=heads,
        max_positions=64 if small else 256, vocab_size=0 if small else 32_000,
        placement=v["placement"], alpha=v["alpha"], embed_std=v["embed"], scaled_init=False,
    )  # fmt: skip
    c.data.source = "python" if small else "allenai/c4"
    c.data.tokenizer = "bpe:512" if small else "openlm-research/open_llama_3b"
    c.data.seq_len = c.model.max_positions
    c.data.val_fraction = 0.05 if small else 0.0005

    c.optimizer.update(b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=0.0, warmup_steps=warmup)
    c.optimizer.learning_rate = v["rate"] or rate
    c.optimizer.end_learning_rate = c.optimizer.learning_rate / 10
    c.eval.interval = c.checkpoint.interval = 10 if smoke else 100 if small else 1000
    c.measure.rows = 32 if small else 128
    if small:
        c.sample.tokens = 0
    if smoke:
        c.eval.rows = 32
    if v["study"]:
        c.study.axes = f"variant: {' '.join(PLACEMENTS)}"
        c.study.seeds = (0, 1, 2)
        c.study.control = "pre"
    return c
