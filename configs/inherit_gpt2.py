"""Inheritune on GPT-2: train a reference, inherit its first layers, grow until the target matches it.

Sanyal et al., "Inheritune: Training Smaller Yet More Attentive Language Models", arXiv 2404.08634.

    python -m jaxup.train --config=inherit_gpt2.py

The default is small enough for two CPU cores and its effect is real. Measured with `:control=1` (and
`:control=1,seed=1`, `seed=2`) on 2 cores of an AMD EPYC (Zen 3, 2.4 GHz), Python 3.11, jax 0.10.2: 5 minutes
from nothing, the tokenizer's training included (seed 0, alone on the machine); the last column by itself.
Validation loss in nats per token of held-out files of Python's standard library:

    seed   reference, 6 layers   inherited, 3 of 6   control, 3 layers from random   control of twice the steps
    0      4.857                 4.342               4.772                           4.188
    1      4.907                 4.438               4.824                           4.207
    2      4.882                 4.388               4.797                           4.186

The inherited target beats the control of its steps by 0.39 to 0.43 nats; over the three seeds the targets
differ by 0.10 and the controls by 0.05. But it has the reference's training behind it, and a control that is
given as many steps as both together is better by 0.15 to 0.23 nats (95% t interval of the three pairs: 0.10 to
0.29). In the paper the two are about level (a model of half the layers in 200K steps 2.84, inherited 2.80 for
large; 2.62 and 2.64 for xl). So inheriting pays here where the reference is there anyway.

Variants, after a colon and separated by commas:

    baselines              not one run but a study: the paper's contestants, three seeds each, at a size of
                           its own, or with medium, large or xl, and smoke, at theirs. What each is:
                               random, random_2x       from random values, for the steps of a target and twice as many
                               stacked                 a model of half the layers is trained first, and taken twice
                               hybrid                  the reference's first layers, half as many, taken twice
                               half_width              all layers of the reference with the first half of heads and
                                                       MLP: as many parameters in blocks as half of its layers.
                                                       Not of xl, whose 25 heads have no half
                               distilled, _0.4         from random values, learning from the reference's predictions,
                                                       which have 0.6 or 0.4 of the loss. The paper says alpha = 0.6,
                                                       and its logs look as if that were the share of the tokens
                               first, middle, last     which layers are inherited; `first` is Inheritune
                               attn, mlp, no_norm      the first layers without their MLP, attention or norms
                               grown                   from half as many layers, by two, until as good as the reference
                               tokens=N                first, on so little text, of which the reference saw all
                           In the paper the reference trains for as many steps as a target. At the size for CPUs it
                           has twice as many: eight layers are worse than four after so few
                           Published for random, random_2x, half_width, stacked, hybrid and first:
                               medium (16 layers)  2.86  2.83  3.04  2.84  2.83  2.81
                               large (18 layers)   2.97  2.84  3.06  2.87  2.89  2.80
                               xl (24 layers)      2.69  2.62  2.77  2.65  2.64  2.64
                           and of medium for attn 2.84, mlp 2.85, no_norm 2.80
                           Measured here, means of three seeds in nats per token (20 minutes of processor time, of
                           which two cores take about half): the reference of 8 layers 4.905, and less that of `first`,
                           4.624, with 95% t intervals of the pairs:
                               half_width  -0.001 [-0.013, 0.010]     attn        0.077 [0.055, 0.099]
                               no_norm      0.000 [-0.001, 0.001]     stacked     0.177 [0.022, 0.331]
                               grown        0.021 [-0.005, 0.047]     random_2x   0.178 [0.063, 0.294]
                               mlp          0.029 [0.010, 0.049]      distilled   0.539 [0.460, 0.618]
                               hybrid       0.031 [0.020, 0.041]      _0.4        0.611 [0.516, 0.707]
                               middle       0.060 [0.039, 0.082]      random      0.755 [0.617, 0.893]
                               last         0.065 [0.035, 0.096]
                               tokens=65536 0.018 [0.006, 0.030], of 16384 0.242 [-0.031, 0.514]
                           That is the paper's order but for half the width, which is as good as half the depth here.
                           What inherits has the reference's 320 steps behind its 160; `random_2x` has 320

    smoke                  the same path in about a minute, for CI
    grow                   a reference trained five times as long as a target, which begins with one layer and
                           grows by two until it is as good; measured as above (1, 3, 5: layers of the target):
                               seed   reference, 6   1       3       5       control of the last target's size
                               0      4.394          4.489   4.415   4.333   5.461
                               1      4.453          4.502   4.422           5.618
                               2      4.428          4.483   4.406           5.500
    medium, large, xl      the paper's models, data and settings, for pods: 24, 36, 48 layers on
                           OpenWebText; published validation losses of reference, control of the
                           target's size and target: medium 2.81, 2.86, 2.81 (16 layers), large
                           2.85, 2.97, 2.80 (18 layers), xl 2.65, 2.69, 2.64 (24 layers)
                           Compiled for TPUs (`--target`, docs/pods.md): medium takes 13.0 of the
                           15.8 GiB of a chip of v5e:4x4, in two micro-batches; large, whose
                           parameters are split over all chips, 7.9, and xl 13.2
    ablation=attn          attention and norms are inherited, the MLP is not
    ablation=mlp           MLP and norms, not attention
    ablation=no_norm       attention and MLP, not the norms
    layers=N               layers of the first target (default: half of the reference's)
    control=0, 1, 2        no control, one trained for the steps of a target, and with 2 another for twice as many;
                           2 is the default where there is no other size, else 1
    depth_scaled           attention logits divided by layer + 1, as in the paper's released code
    seed=N                 of initialisation and batches

The target inherits the token and position embeddings, final norm and head too. The released code
leaves positions and final norm out: `--config.inherit.parts=attention,mlp,norms,embed_tokens,lm_head`.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults

# Section 4 of arXiv 2404.08634 and its released GPT-2 code.
# layers, hidden, heads, tokens per batch (rows of 1024), peak learning rate
PAPER = {"medium": (24, 1024, 16, 384, 3e-4), "large": (36, 1280, 20, 128, 2e-4), "xl": (48, 1600, 25, 128, 1.5e-4)}
STUDIED = (8, 64, 2, 16, 2e-3)  # of baselines on two CPU cores
EVERYTHING = ("attention", "mlp", "norms", "embed_tokens", "embed_positions", "norm", "lm_head")
ABLATIONS = {
    "none": EVERYTHING,
    "attn": tuple(p for p in EVERYTHING if p != "mlp"),
    "mlp": tuple(p for p in EVERYTHING if p != "attention"),
    "no_norm": tuple(p for p in EVERYTHING if p != "norms"),
}


def get_config(arg: str = "") -> ConfigDict:
    v = variants(
        arg,
        size=("default", "smoke", "grow", *PAPER),
        ablation=tuple(ABLATIONS),
        layers=0,  # of the first target; 0 = half of the reference's
        control=(-1, 0, 1, 2),  # 2: a second control trained for twice the steps, as in the paper; -1 = by the size
        baselines=False,
        depth_scaled=False,  # attention logits divided by layer + 1, as in the released code
        seed=0,
    )
    small, smoke, grow = v["size"] not in PAPER, v["size"] == "smoke", v["size"] == "grow"
    study = v["baselines"]
    default = STUDIED if study and not smoke else (4 if smoke else 6, 128, 2, 16, 2e-3)
    layers, hidden, heads, rows, peak = PAPER.get(v["size"], default)

    c = defaults("inherit", small=small)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.steps = 20 if smoke else 120 if grow else 160 if study and small else 300 if small else 100_000
    c.batch_size = rows

    c.model = ConfigDict()
    c.model.family = "gpt2"
    c.model.num_layers = layers
    c.model.hidden_size = hidden
    c.model.num_heads = heads
    c.model.max_positions = 128 if small else 1024
    c.model.vocab_size = 0 if small else 50304  # 0 = the tokenizer's, rounded up to a multiple of 64
    c.model.bias = False
    c.model.depth_scaled_attention = v["depth_scaled"]

    c.inherit.layers = v["layers"] or int(grow)
    c.inherit.parts = ABLATIONS[v["ablation"]]
    c.inherit.grow_by = 2
    c.inherit.control = v["control"] if v["control"] >= 0 else 2 if v["size"] == "default" else 1
    if grow:
        c.reference.steps = 5 * c.steps

    c.data.source = "python" if small else "openwebtext"
    c.data.tokenizer = ("bpe:512" if smoke else "bpe:2048") if small else "gpt2"
    c.data.seq_len = c.model.max_positions
    c.data.val_fraction = 0.05 if small else 0.0005

    c.optimizer.learning_rate = peak
    c.optimizer.end_learning_rate = peak / 10 if small else 1e-5
    c.optimizer.warmup_steps = 5 if smoke else 12 if grow else 30 if small else 2000
    if not small:
        c.compute.remat = "dots"
        c.mesh.data, c.mesh.fsdp = (-1, 1) if v["size"] == "medium" else (1, -1)  # each device has the whole of it
        c.eval.rows = 2400
    if smoke:
        c.eval.rows = 32
    c.eval.interval = c.checkpoint.interval = 10 if smoke else 60 if small else 1000
    if study:
        c.inherit.layers = target = v["layers"] or (16 if v["size"] == "medium" else layers // 2)
        c.inherit.grow_by = c.inherit.control = 0  # they are cells
        if small:
            c.model.max_positions = c.data.seq_len = 64
            c.data.tokenizer = "bpe:512" if smoke else "bpe:1024"
            c.reference.steps = 2 * c.steps  # in as many as a target so deep a model is worse than half of it
            c.eval.interval = c.checkpoint.interval = c.steps // 2
            c.sample.tokens = 0
        c.study.cells = contestants(c, layers, target, heads)
        c.study.control, c.study.seeds = "random", (0, 1, 2)
    return c


def contestants(c: ConfigDict, layers: int, target: int, heads: int) -> dict[str, dict[str, Any]]:
    """What each cell changes of the configuration, by name."""
    cells: dict[str, dict[str, Any]] = {
        "random": {"inherit.start": "random"},
        "random_2x": {"inherit.start": "random", "steps": 2 * c.steps},
        "stacked": {"inherit.start": "stacked"},
        "hybrid": {"inherit.which": ",".join(map(str, [*range(target // 2)] * 2))},
        "half_width": {"inherit.start": "half_width", "inherit.layers": layers},
        "distilled": {"inherit.start": "random", "inherit.distill.alpha": 0.6},
        "distilled_0.4": {"inherit.start": "random", "inherit.distill.alpha": 0.4},
        "first": {},
        "middle": {"inherit.which": "middle"},
        "last": {"inherit.which": "last"},
        **{name: {"inherit.parts": parts} for name, parts in ABLATIONS.items() if name != "none"},
        "grown": {"inherit.layers": target // 2, "inherit.grow_by": 2},
    }
    for tokens in (2**16, 2**14) if c.steps < 1000 else (10**9,):
        cells[f"tokens={tokens}"] = {"data.tokens": tokens, "reference.all_data": True}
    if heads % 2:
        del cells["half_width"]
    return cells
