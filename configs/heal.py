"""Heal a model of another depth on chat data: any Hugging Face model, any plan, any data.

    python -m jaxup.train --config=heal.py --config.base.path=org/Name-7B \\
        --config.plan="upscale(base, 8:24, copies=2)" --config.data.files=chats.jsonl
    python -m jaxup.train --config=heal.py:quick            # the whole path here, in a few minutes

Without a plan the model itself is fine-tuned. A plan is one line, in which `base` is the model at
`base.path`, or a mergekit or plan file, whose models are found by their names or with
`--config.base.models=NAME=DIR,...`.

The recipe is that of "Unveiling the Secret Recipe" (Pareja et al. 2024, arXiv 2412.13337), who
fine-tuned models of 3 to 7 billion parameters on grids of batches (128, 3840, 7680 samples) and
learning rates (1e-6 to 1e-4):

- a large batch with a low learning rate scored best. 512 packed rows of 4,096 tokens hold 3,840
  samples, their middle size, of 546 tokens each. 2e-5 was best for Granite, 1e-6 for Mistral
  (`:lr=1e-6`);
- a constant rate without warmup lost nothing against warmup and decay, and leaves every step
  comparable: a run can be made longer, and its curve be read, without knowing where it ends;
- all data mixed did as well as phases;
- AdamW with betas 0.9 and 0.95, no weight decay, gradients clipped at 1; the loss is a mean over
  the loss tokens of the whole batch, however it is split into micro-batches;
- conversations longer than a row are dropped, not cut.

It does not speak of zeroed copies, which begin with o_proj and down_proj at 0 and may want another
rate: see configs/heal_tunguska.py. This default has not been run: it needs an accelerator and a
model. For Mistral-7B-v0.1 and solar(base, 8) it was compiled (`--target=v6e:4x4`, docs/pods.md): a
step takes 23.8 of the 31.3 GiB of each of 16 chips, and at least 16.6 seconds.

Variants, after a colon and separated by commas:

    quick, smoke           a LLaMA of 6 layers is trained here on Python's standard library, up-scaled
                           to 10, and healed on questions and answers made of its docstrings; a
                           control, the base, is trained on the same batches; smoke is for tests
    lr=F                   learning rate (default 2e-5; quick: 1e-3)
    epochs=N               (default 2)
    steps=N                so many steps instead of epochs (as an override: with epochs=0)
    layers=WHAT            what trains: all, copies, originals, new, or layers such as 9:12+20
    freeze=WHAT            what of it does not: originals, 0:9, ...
    parameters=REGEX       only what has such a path: o_proj|down_proj
    lora, qlora            adapters on what trains, merged into the export; qlora: while training the
                           blocks are stored in 4 bits (NF4)
    rank=N                 of the adapters (default 64; quick: 16); alpha is twice that
    small                  for one's own model and some hundred chats, on one GPU or a CPU: 16 rows of
                           512 tokens a step, in float32 (`--config.compute.dtype=bfloat16` on a GPU)
    control=1              also the base itself, trained on the same batches (quick: unless control=0)
    seed=N                 of initialisation, split and batches

`--config.train.rates.originals=0.1` multiplies the learning rate of a role: copies, originals, new,
and ends (embedding, final norm, head). A rate of 0 is not freezing: that is `freeze`, and free.
"""

from ml_collections import ConfigDict

from jaxup.errors import UserError
from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama


def get_config(arg: str = "") -> ConfigDict:
    v = variants(
        arg,
        size=("default", "small", "quick", "smoke"),
        lr=0.0,
        epochs=0,
        steps=0,
        layers="all",
        freeze="",
        parameters="",
        lora=False,
        qlora=False,
        rank=0,
        control=-1,  # -1 = 1 with quick and smoke, else 0
        seed=0,
    )
    for one, other in (("lora", "qlora"), ("steps", "epochs")):
        if v[one] and v[other]:
            raise UserError(f"variants {one} and {other}: choose one")
    adapters = v["lora"] or v["qlora"]
    if v["rank"] and not adapters:
        raise UserError(f"variant rank={v['rank']}: goes with lora or qlora")
    own, smoke = v["size"] == "small", v["size"] == "smoke"
    small = smoke or v["size"] == "quick"

    c = defaults("heal", small=small or own)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.steps = v["steps"]
    c.epochs = 0 if v["steps"] else v["epochs"] or 2
    c.batch_size = 16 if small or own else 512
    c.plan = "upscale(base, 2:4, copies=2)" if small else ""

    c.model = llama(
        num_layers=4 if smoke else 6, hidden_size=96, intermediate_size=256, num_heads=4, num_kv_heads=2,
        max_positions=256, vocab_size=0,
    )  # fmt: skip

    if small:
        c.pretrain.steps = 20 if smoke else 400
        c.pretrain.data.tokenizer = "bpe:512" if smoke else "bpe:2048"
        c.pretrain.optimizer.update(learning_rate=2e-3, end_learning_rate=2e-4, warmup_steps=5 if smoke else 30)
        c.pretrain.optimizer.weight_decay = 0.0
        c.data.files = "docstrings:400" if smoke else "docstrings"
        c.data.format = "metharme"
        c.data.seq_len = 128 if smoke else 256
        c.data.val_fraction = 0.1

    if own:
        c.data.seq_len = 512
    c.heal.control = small if v["control"] < 0 else bool(v["control"])
    c.train.layers = v["layers"].replace("+", ",")
    c.train.parameters = v["parameters"]
    c.train.freeze = v["freeze"].replace("+", ",")
    if adapters:
        c.lora.rank = v["rank"] or (16 if small else 64)
    if v["qlora"]:
        c.lora.quantize, c.lora.tile_size = "nf4", 32 if small else 64

    rate = v["lr"] or (1e-3 if small else 2e-5)
    c.optimizer.update(learning_rate=rate, schedule="constant", weight_decay=0.0)
    if not (small or own):
        c.step.loss_chunk = 512

    c.eval.interval = 8 if smoke else 25 if small else 10
    if smoke:
        c.eval.rows = 32
    c.log.interval = 10 if small else 1
    c.checkpoint.interval = 8 if smoke else 50 if small else 25
    c.checkpoint.keep = 1  # besides those of the ends of epochs
    c.sample.prompt = "What does `os.path.join(a, *p)` do?" if small else "What is the depth of a model?"
    c.sample.tokens = 60 if small else 200
    c.sample.temperature, c.sample.top_k = 0.0, 0
    return c
