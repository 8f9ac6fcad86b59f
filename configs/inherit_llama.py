"""Inheritune with little data: half the layers of OpenLLaMA-3B, eight epochs of a billion tokens.

Sanyal et al., arXiv 2404.08634, the low-data recipe (its first version, "Pre-training Small Base
LMs with Fewer Tokens"; appendix B of the second).

    python -m jaxup.train --config=inherit_llama.py            # the paper's recipe, for a pod
    python -m jaxup.train --config=inherit_llama.py:tiny       # the same path on two CPU cores

The target inherits the first 13 of 26 layers, the token embedding and the head, and is trained with
a fresh optimizer: 3e-4 with 1,000 steps of warmup and a cosine, weight decay 0.1, 64 rows of 2,048
tokens. 8 epochs of 1e9 tokens are 61,036 such steps; the paper's 64K would be 8.4 epochs, or 1.05e9
tokens. It does not give the betas, the end of the cosine or the clipping; here they are those of
its GPT-2 recipe. It compares with published models of the size: a control of the same size from
random initialisation is trained with `control=1`.

OpenLLaMA's weights are a pickle: `reference.allow_pickle` is set, which needs PyTorch
(`--config.reference.revision=refs/pr/N` reads safetensors where a pull request has them). The text
is RedPajama's sample; `--config.data.source=DIR` takes its .jsonl files, or others, from a
directory. This default has never been run: it needs an accelerator and the network. It was compiled
for TPUs (`--target=v5e:4x4`, docs/pods.md): a step takes 4.3 of the 15.8 GiB of each of 16 chips.

The tiny variant trains a reference of 6 layers for 240 steps, 491,520 tokens drawn from all of 4
million, and gives the targets 65,536 of them, five times over. Measured with `:tiny`, `:tiny,seed=1`
and `:tiny,seed=2` on 2 cores of an AMD EPYC (Zen 3, 2.4 GHz), Python 3.11, jax 0.10.2: 2 min 11 s
for one, from nothing. Validation loss in nats per token of held-out files of Python's standard
library:

    seed   reference, 6 layers   inherited, 3 of 6   control, 3 layers from random
    0      3.985                 3.864               4.385
    1      3.961                 3.824               4.434
    2      3.951                 3.841               4.374

and with `:tiny,sweep` targets of 1, 2, 3 and 4 layers reach 4.007, 3.932, 3.864 and 3.820. The target
beats the control, which sees the same little text, by 0.52 to 0.61 nats. It is also better than the
reference, which is far from trained out: the target starts from its layers and has 160 steps more.

Variants, after a colon and separated by commas:

    tiny, smoke        a small LLaMA, trained here on all of the text as the reference of targets
                       that get little of it; smoke is for tests
    sweep              one target after the other: 4, 6, 8, 10, 13, 16, 18 and 20 layers (the paper's
                       N), each from the reference; tiny: 1, 2, 3 and 4, smoke: 1 and 2. The last one
                       is exported
    layers=N           layers of the one target (default: half of the reference's)
    code               as the released code has it: a constant 3e-4 after warmup, weight decay 0.01,
                       betas 0.9 and 0.999, no clipping, blocks and head inherited but the token
                       embedding random (with tiny and smoke at their own learning rate)
    control=N          also a control of each target's size for the same steps, and from 2 on
                       another for N times as many (default: 0, with tiny and smoke 1 but for a sweep)
    seed=N             of initialisation, batches and the choice of rows

The paper names blocks, embedding and head as inherited, and the final norm not. It is one vector:
`--config.inherit.parts=attention,mlp,norms,embed_tokens,norm,lm_head` inherits it too.
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama

SWEEPS = {"default": "4,6,8,10,13,16,18,20", "tiny": "1,2,3,4", "smoke": "1,2"}


def get_config(arg: str = "") -> ConfigDict:
    v = variants(
        arg,
        size=("default", "tiny", "smoke"),
        layers=0,  # of the target; 0 = half of the reference's
        sweep=False,
        code=False,
        control=-1,  # -1 = 1 with tiny and smoke, but for a sweep; else 0, as in the paper
        seed=0,
    )
    small, smoke = v["size"] != "default", v["size"] == "smoke"

    c = defaults("inherit", small=small)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.epochs = (2 if smoke else 5) if small else 8
    c.batch_size = 16 if small else 64

    if small:
        c.reference.all_data = True
        c.reference.steps = 20 if smoke else 240
        c.model = llama(
            num_layers=4 if smoke else 6, hidden_size=96, intermediate_size=256, num_heads=4, num_kv_heads=2,
            max_positions=128, vocab_size=0,
        )  # fmt: skip
    else:
        c.reference.path = "openlm-research/open_llama_3b"
        c.reference.allow_pickle = True
        c.model = llama(
            num_layers=26, hidden_size=3200, intermediate_size=8640, num_heads=32, num_kv_heads=32,
            max_positions=2048, vocab_size=32000,
        )  # fmt: skip

    c.inherit.layers = v["layers"]
    c.inherit.parts = ("attention", "mlp", "norms", *(() if v["code"] else ("embed_tokens",)), "lm_head")
    c.inherit.sweep = SWEEPS[v["size"]] if v["sweep"] else ""
    c.inherit.control = int(small and not v["sweep"]) if v["control"] < 0 else v["control"]

    c.data.source = "python" if small else "togethercomputer/RedPajama-Data-1T-Sample"
    c.data.tokenizer = ("bpe:512" if smoke else "bpe:1024") if small else ""
    c.data.seq_len = c.model.max_positions
    c.data.val_fraction = 0.05 if small else 0.001
    c.data.tokens = (2**14 if smoke else 2**16) if small else 1_000_000_000  # that targets and controls get

    c.optimizer.learning_rate = 2e-3 if small else 3e-4
    c.optimizer.warmup_steps = 5 if smoke else 30 if small else 1000
    if v["code"]:
        c.optimizer.update(schedule="constant", b2=0.999, weight_decay=0.01, clip_norm=0.0)
    else:
        c.optimizer.end_learning_rate = c.optimizer.learning_rate / 10
    c.eval.interval = 8 if smoke else 32 if small else 1000
    c.checkpoint.interval = 8 if smoke else 64 if small else 1000
    if smoke:
        c.eval.rows = 32
    return c
