"""Growth while a model trains, against its controls: fixed depth, restarts, and a shorter run of the same FLOPs.

A model of two layers that gets four after 40% of its steps and six after 80% takes 64% of the FLOPs of one that has
six from the start. Whether that is worth it shows a model of six layers that trains for 64% of the steps, too, and by a
schedule of its own (`shorter`): in a public comparison of growth inside a run it was better than what grew.

    python -m jaxup.train --config=grow.py

What the cells are: `fixed` has six layers for all steps. `zeroed`, `copied` and `random` grow, with the optimizer's
moments, the schedule and the data going on; the new layers are zeroed copies (each after its layer), plain copies (as
well) or random. `restart` grows by zeroed copies, and at each growth begins with a fresh optimizer and a schedule of
its own, as Inheritune does. `shorter` is `fixed` for as many steps as take the FLOPs of what grows.

Validation loss in nats per token of held-out files of Python's standard library, on 2 cores of an AMD EPYC, Python
3.11, jax 0.10.2 (18 runs, 4 minutes of processor time):

    seed   fixed   zeroed   copied   random   restart   shorter (102 of 160 steps)
    0      4.111   4.056    4.082    4.062    4.198     4.503
    1      4.180   4.044    4.072    4.036    4.164     4.634
    2      4.059   4.028    4.060    4.034    4.166     4.500

So here growth is worth it: what grows is level with `fixed` (zeroed -0.074, t interval -0.211 to 0.063), which takes
1.6 times as many FLOPs, and about half a nat better than `shorter`, which takes the same; the public comparison is not
reproduced. But the run is short: a deep model makes little of its first steps. At twice the learning rate (4e-3, with
10 steps of warmup) it is stuck at 4.94 in the end, while `zeroed` reaches 3.88 and `random` 3.88 (seed 0).

Variants, after a colon and separated by commas:

    smoke         a model of one layer that gets two and three, for twelve steps and with one seed
    pod           LLaMA of 24 layers and 370 million parameters that begins with 6, on OpenWebText
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import load, variants
from jaxup.model.config import ModelConfig
from jaxup.model.spec import flops_per_token

DEPTHS = {"quick": "2@0,4@0.4,6@0.8", "smoke": "1@0,2@0.4,3@0.8", "pod": "6@0,12@0.4,24@0.8"}


def get_config(arg: str = "") -> ConfigDict:
    size = variants(arg, size=tuple(DEPTHS))["size"]
    grow = DEPTHS[size]
    c = load(f"pretrain.py:{size}", shipped=True)
    depths = [(int(layers), float(share)) for layers, _, share in (part.partition("@") for part in grow.split(","))]
    c.model.num_layers = depths[-1][0]
    if size != "pod":
        c.model.update(hidden_size=64, intermediate_size=176, vocab_size=512)
        c.steps, c.batch_size, c.data.seq_len, c.data.tokenizer = 12 if size == "smoke" else 160, 8, 64, "bpe:512"
        c.optimizer.learning_rate = 2e-3
        c.optimizer.warmup_steps = 2 if size == "smoke" else 20
        c.eval.interval = c.checkpoint.interval = 6 if size == "smoke" else 40
        c.log.interval = 1 if size == "smoke" else 5
        c.sample.tokens = 0
    c.optimizer.schedule = "wsd"  # a growth while the rate has decayed gets little of it

    model = ModelConfig.llama(**{key: value for key, value in c.model.to_dict().items() if key != "family"})
    flops = {n: flops_per_token(model.with_layers(range(n)), c.data.seq_len) for n, _ in depths}
    ends = [*(share for _, share in depths[1:]), 1.0]
    grown = sum((end - share) * flops[n] for (n, share), end in zip(depths, ends, strict=True))
    c.study.cells = {
        "fixed": {},
        **{by: {"train.grow": grow, "train.grown_by": by} for by in ("zeroed", "copied", "random")},
        "restart": {"train.grow": grow, "train.restart": True},
        "shorter": {"steps": round(c.steps * grown / flops[model.num_layers])},
    }
    c.study.seeds = (0,) if size == "smoke" else (0, 1, 2)
    c.study.control = "fixed"
    return c
