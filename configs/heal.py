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
model.

Variants, after a colon and separated by commas:

    quick, smoke           a LLaMA of 6 layers is trained here on Python's standard library, up-scaled
                           to 10, and healed on questions and answers made of its docstrings; a
                           control, the base, is trained on the same batches; smoke is for tests
    lr=F                   learning rate (default 2e-5; quick: 1e-3)
    epochs=N               (default 2)
    steps=N                stop after so many steps, whatever the epochs (as an override: with epochs=0)
    layers=WHAT            what trains: all, copies, originals, new, or layers such as 9:12+20
    freeze=WHAT            what of it does not: originals, 0:9, ...
    parameters=REGEX       only what has such a path: o_proj|down_proj
    lora, qlora            adapters on what trains, merged into the export; qlora: while training the
                           blocks are stored in 4 bits (NF4)
    rank=N                 of the adapters (default 64; quick: 16); alpha is twice that
    control=1              also the base itself, trained on the same batches (quick: unless control=0)
    seed=N                 of initialisation, split and batches

`--config.train.rates.originals=0.1` multiplies the learning rate of a role: copies, originals, new,
and ends (embedding, final norm, head). A rate of 0 is not freezing: that is `freeze`, and free.
"""

from ml_collections import ConfigDict

from jaxup.errors import UserError
from jaxup.experiment import variants


def get_config(arg: str = "") -> ConfigDict:
    v = variants(
        arg,
        size=("default", "quick", "smoke"),
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
    if v["lora"] and v["qlora"]:
        raise UserError("variants lora and qlora: choose one")
    adapters = v["lora"] or v["qlora"]
    if v["rank"] and not adapters:
        raise UserError(f"variant rank={v['rank']}: goes with lora or qlora")
    small, smoke = v["size"] != "default", v["size"] == "smoke"

    c = ConfigDict()
    c.seed = v["seed"]
    c.steps = v["steps"]
    c.epochs = 0 if v["steps"] else v["epochs"] or 2
    c.batch_size = 16 if small else 512

    c.base = ConfigDict()
    c.base.path = ""  # directory, Hub id or URL of the model
    c.base.revision = ""
    c.base.models = ()  # NAME=DIR for the models that a plan file names
    c.base.dtype = ""  # of the parameters that do not train, and of the export; "" = as stored
    c.base.allow_pickle = False
    c.plan = "upscale(base, 2:4, copies=2)" if small else ""

    # A base that is trained here, if no path is given.
    c.pretrain = ConfigDict()
    c.pretrain.steps = 20 if smoke else 400 if small else 0
    c.pretrain.batch_size = 16
    c.pretrain.data = ConfigDict()
    c.pretrain.data.source = "python"
    c.pretrain.data.tokenizer = "bpe:512" if smoke else "bpe:2048"
    c.pretrain.data.seq_len = 128
    c.pretrain.data.val_fraction = 0.05
    c.pretrain.data.seed = 2357
    c.pretrain.data.fraction = 1.0
    c.pretrain.data.tokens = 0
    c.pretrain.data.isolate_documents = False
    c.pretrain.data.store = ""
    c.pretrain.optimizer = optimizer(2e-3, schedule="cosine", warmup_steps=5 if smoke else 30)
    c.model = ConfigDict()
    c.model.family = "llama"
    c.model.num_layers = 4 if smoke else 6
    c.model.hidden_size = 96
    c.model.intermediate_size = 256
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.max_positions = 256
    c.model.vocab_size = 0  # the tokenizer's, rounded up to a multiple of 64
    c.model.norm_eps = 1e-6
    c.model.rope_theta = 10_000.0
    c.model.tie_embeddings = False

    c.data = ConfigDict()
    c.data.files = ("docstrings:400" if smoke else "docstrings") if small else ""  # "a.jsonl*2,b.parquet*0.5"
    c.data.layout = ""  # messages, sharegpt, ...; "" = detected for each file
    c.data.format = "metharme" if small else ""  # "" = the tokenizer's own chat template
    c.data.seq_len = 128 if smoke else 256 if small else 4096
    c.data.val_files = ""  # "" = a part of the files
    c.data.val_fraction = 0.1 if small else 0.01
    c.data.on_bad = "error"  # or "skip"
    c.data.packing = True
    c.data.store = ""
    c.data.seed = 2357

    c.heal = ConfigDict()
    c.heal.control = small if v["control"] < 0 else bool(v["control"])
    c.train = ConfigDict()
    c.train.layers = v["layers"].replace("+", ",")
    c.train.parameters = v["parameters"]
    c.train.freeze = v["freeze"].replace("+", ",")
    c.train.rates = ConfigDict({"copies": 1.0, "originals": 1.0, "new": 1.0, "ends": 1.0})
    c.lora = ConfigDict()
    c.lora.rank = (v["rank"] or (16 if small else 64)) if adapters else 0  # 0 = no adapters
    c.lora.alpha = 0.0  # 0 = twice the rank
    c.lora.quantize = "nf4" if v["qlora"] else ""
    c.lora.tile_size = 32 if small else 64  # values that share a scale

    c.optimizer = optimizer(v["lr"] or (1e-3 if small else 2e-5), schedule="constant", warmup_steps=0)
    c.step = ConfigDict()
    c.step.accumulation = 1 if small else 16
    c.step.loss_chunk = 128 if small else 512
    c.step.z_loss = 0.0
    c.compute = ConfigDict()
    c.compute.dtype = "float32" if small else "bfloat16"
    c.compute.attention = "auto"
    c.compute.remat = "none" if small else "full"
    c.compute.unroll = 0 if small else 1
    c.mesh = ConfigDict()
    c.mesh.data = -1 if small else 1
    c.mesh.fsdp = 1 if small else -1
    c.mesh.tensor = 1

    c.eval = ConfigDict()
    c.eval.interval = 8 if smoke else 25 if small else 10
    c.eval.rows = 32 if smoke else 128 if small else 512
    c.eval.batch_size = 32 if small else 64
    c.log = ConfigDict()
    c.log.interval = 10 if small else 1
    c.log.trackers = ()  # "tensorboard", "wandb"
    c.checkpoint = ConfigDict()
    c.checkpoint.interval = 8 if smoke else 50 if small else 25
    c.checkpoint.keep = 1  # besides those of the ends of epochs
    c.export = ConfigDict()
    c.export.dtype = ""  # "" = that of the base
    c.sample = ConfigDict()
    c.sample.prompt = "What does `os.path.join(a, *p)` do?" if small else "What is the depth of a model?"
    c.sample.tokens = 60 if small else 200
    c.sample.temperature = 0.0
    c.sample.top_k = 0
    return c


def optimizer(learning_rate: float, *, schedule: str, warmup_steps: int) -> ConfigDict:
    c = ConfigDict()
    c.learning_rate = learning_rate
    c.end_learning_rate = learning_rate / 10
    c.schedule = schedule
    c.warmup_steps = warmup_steps
    c.decay_fraction = 0.2
    c.b1 = 0.9
    c.b2 = 0.95
    c.eps = 1e-8
    c.weight_decay = 0.0
    c.clip_norm = 1.0
    return c
