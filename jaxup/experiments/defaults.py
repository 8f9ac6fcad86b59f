"""What experiment files start from: every key, what it means, and what most files set it to."""

from __future__ import annotations

from ml_collections import ConfigDict

_ORDER = "sums are made in another order, so that last digits may differ"
# What may change under a run, for it does not decide the numbers: keys and whole sections, and what to say of it.
MAY_CHANGE = {
    "mesh": _ORDER, "step.accumulation": _ORDER, "compute.remat": _ORDER, "compute.unroll": _ORDER,
    "log": "", "checkpoint": "", "sample": "for models that are not finished yet",
    "processes": "", "study": "", "eval": "", "eval.rows": "finished models are measured again",
}  # fmt: skip
# What decides how many steps there are. Under a constant schedule there may be more of them than there were.
COUNTS = ("steps", "epochs", "reference.steps")

# What is read only where another key says so, keys and whole sections: with True where that one is on (neither 0 nor
# empty, and read itself), with False where it is off, else where it has one of these values, or none of those of a
# frozenset. Of several conditions one is enough. All others are always read. Who changes a key where nothing reads it
# is told so: `jaxup.experiments.config.change`.
_DECAYS = ("linear", "cosine", "wsd")
Wanted = bool | tuple[str, ...] | frozenset[str]
Condition = dict[str, Wanted]
_PARTS = ("first", "middle", "last")
_BEGINS = ("inherited", "half_width")  # with something of the reference
_ASKED: tuple[Condition, ...] = ({"inherit.start": _BEGINS}, {"inherit.distill.alpha": True})
_SETS: tuple[Condition, ...] = ({"continuous.layout": ("sets",)}, {"continuous.spatial.layers": True})
_TRAINED = tuple({"reference.path": False, **asked} for asked in _ASKED)
READ_WHERE: dict[str, Condition | tuple[Condition, ...]] = {
    "optimizer.end_learning_rate": {"optimizer.schedule": _DECAYS},
    "optimizer.decay_fraction": {"optimizer.schedule": ("wsd",)},
    "step.spike_window": {"step.spike_factor": True},
    "sample.temperature": {"sample.tokens": True},
    "sample.top_k": {"sample.temperature": True},
    "model": (
        {"reference.path": False, "pretrain.steps": True},
        {"experiment": ("continuous",), "base.path": False},  # of random values
    ),
    "model.alpha": {"model.placement": ("mix",)},
    "model.scaled_init": {"model.placement": ("pre", "post", "peri", "mix")},  # LayerNorm scaling damps enough
    "reference.revision": {"reference.path": True},
    "reference.allow_pickle": {"reference.path": True},
    "reference.steps": _TRAINED,
    "reference.all_data": _TRAINED,
    "inherit.layers": ({"inherit.which": _PARTS}, {"inherit.start": ("random", "stacked")}),
    "inherit.which": {"inherit.start": _BEGINS},
    "inherit.parts": {"inherit.start": _BEGINS},
    "inherit.grow_by": {"inherit.which": _PARTS},
    "inherit.sweep": {"inherit.start": _BEGINS},
    "inherit.tolerance": _ASKED,
    "inherit.control": {"inherit.start": ("inherited", "stacked", "half_width")},  # random: it would be the same
    "inherit.distill.temperature": {"inherit.distill.alpha": True},
    "base.revision": {"pretrain.steps": False},
    "base.models": {"pretrain.steps": False},
    "base.dtype": {"pretrain.steps": False},
    "base.allow_pickle": {"pretrain.steps": False},
    "pretrain.steps": {"base.path": False},
    "pretrain": {"pretrain.steps": True},
    "pretrain.data": {"pretrain.data.source": frozenset({"task"})},
    "pretrain.optimizer.end_learning_rate": {"pretrain.optimizer.schedule": _DECAYS},
    "pretrain.optimizer.decay_fraction": {"pretrain.optimizer.schedule": ("wsd",)},
    "data.val_fraction": {"data.val_files": False},
    "data.replay": {"data.phases": True},
    "pretrain.data.val_fraction": {"pretrain.data.val_files": False},
    "inherit: data.format": {"data.layout": True},  # of these kinds alone: a healing detects its layouts
    "pretrain: data.format": {"data.layout": True},
    "pretrain.data.format": {"pretrain.data.layout": True},
    "learn.samples": {"learn.method": frozenset({"sft"})},
    "learn.problems": {"learn.method": frozenset({"sft"})},
    "learn.reward": {"learn.method": frozenset({"sft"})},
    "learn.clone_rounds": {"learn.method": frozenset({"sft", "verdict"})},
    "learn.options": {"learn.method": frozenset({"verdict"})},
    "learn.labels": {"learn.method": ("verdict",)},
    "learn.search": {"learn.method": ("reject", "dpo")},
    "learn.guide": {"learn.search": True},
    "learn.budget": {"learn.search": True},
    "learn.eval_problems": {"learn.eval_every": True},
    "learn.eval_samples": {"learn.eval_every": True},
    "learn.final_problems": {"learn.final_samples": True},
    "learn.compare": {"learn.final_samples": True},
    "continuous: data.tokenizer": {"base.path": False, "pretrain.steps": False},
    "data.captions": {"data.encoder": ("features",)},
    "data.corpus": {"data.text": True},
    "data.text_tokens": {"data.text": True},
    "continuous.see": {"continuous.layout": ("raster",)},
    "continuous.scales": {"continuous.layout": ("scales",)},
    "continuous.spatial": {"continuous.layout": ("frames",)},
    "continuous.spatial.width": {"continuous.spatial.layers": True},
    "continuous.spatial.heads": {"continuous.spatial.layers": True},
    "continuous.scale_shift": {"continuous.spatial.layers": True},
    "continuous.sets": _SETS,
    "continuous.schedule": _SETS,
    "continuous.least_deviation": {"continuous.head": ("gaussian",)},
    "continuous.bins": {"continuous.head": ("categorical",)},
    "continuous.limit": {"continuous.head": ("categorical", "diffusion")},
    **dict.fromkeys(
        (f"continuous.{key}" for key in ("net", "width", "depth", "draws", "head_steps")),
        Condition({"continuous.head": ("diffusion", "flow")}),
    ),
    "continuous.heads": {"continuous.net": ("decoder",)},
    "continuous.train_steps": {"continuous.head": ("diffusion",)},
    "continuous.times": {"continuous.head": ("flow",)},
    "continuous.stages": {"continuous.head": ("flow",)},
    "continuous.jump": {"continuous.stages": True},
    "continuous.temperature": {"continuous.head": ("gaussian", "categorical", "diffusion", "flow")},
    "text": {"text.source": True},
    "text.format": {"text.layout": True},
    "text.val_fraction": {"text.val_files": False},
    "train.grown_by": {"train.grow": True},
    "train.grow_recipe": {"train.grow": True},
    "train.restart": {"train.grow": True},
    "lora.alpha": {"lora.rank": True},
    "lora.quantize": {"lora.rank": True},
    "lora.tile_size": {"lora.quantize": True},
    "study.seeds": {"study.cells": True},
    "study.control": {"study.cells": True},
    "study.also": {"study.cells": True},
    "study.finding": {"study.cells": True},
    "study.max_cells": {"study.cells": True},
    "study.stop": {"study.cells": True},
    "study.stop_from": {"study.stop": True},
    "study.stop_every": {"study.stop": ("norms",)},
    "study.stop_keep": {"study.stop": True},
    "study.stop_norm": {"study.stop": ("norms",)},
    "study.stop_loss": {"study.stop": ("norms",)},
    "study.stop_checks": {"study.stop": ("norms",)},
    "study.stop_factor": {"study.stop": ("halving",)},
}
# What says the same as the default where nothing reads it: greedily from all, no part of the files.
SAYS_NOTHING = {"sample.top_k": 0, "data.val_fraction": 0.0}


def defaults(kind: str, *, small: bool) -> ConfigDict:
    """The configuration of an experiment of this kind, of which a file then says what is its own.

    `small`: of a size for a CPU, else for a pod of accelerators. A section takes no new keys, so what a
    file misspells fails. A file may add sections.
    """
    c = ConfigDict()
    c.experiment = kind  # one of jaxup.experiments.KINDS
    c.seed = 0  # of initialisation and batches
    c.steps = 0  # updates of each model; 0 where there are epochs
    c.epochs = 0  # instead of steps, passes over the training rows that `data` leaves
    c.batch_size = 16  # rows of an update

    c.optimizer = optimizer()
    # Micro-batches that make up a batch, 0 = the fewest that the devices have memory for, and positions whose logits
    # are there at once.
    c.step = ConfigDict({"accumulation": 1 if small else 0, "loss_chunk": 128, "z_loss": 0.0})
    # Steps are skipped whose gradient norm exceeds `spike_factor` times its median over so many steps; 0 = none.
    c.step.update(spike_factor=0.0, spike_window=100)
    # metrics.jsonl also has the squared gradient norm of micro-batches, of which it takes at least 2: from it and that
    # of the batch follow the true gradient's and the noise.
    c.step.noise_scale = False
    # Averages of what trains, over the updates, with this decay: they are what is evaluated, sampled and exported.
    # 0 = none. What training began with counts ema^n after n updates: a short run wants 0.97 to 0.99.
    c.step.ema = 0.0

    c.compute = ConfigDict()
    c.compute.dtype = "float32" if small else "bfloat16"  # of activations
    c.compute.attention = "auto"  # see jaxup.model.attention
    # What the backward pass computes again: none; dots: all but products with parameters and what a kernel of attention
    # gave (but not of heads of up to 64 on TPUs, where it takes twice its bytes); context: all but what a kernel gave;
    # full. Each takes less memory than the one before it, and more time. offload: as full, and what is kept, the
    # input of each block, is in the memory of the host until then.
    c.compute.remat = "none" if small else "full"
    c.compute.unroll = 0 if small else 1  # layers per iteration of the scan; 0 = all, faster but for compiling
    data, fsdp = (-1, 1) if small else (1, -1)
    # Devices along each axis; -1 = all that are left. Rows of a batch are split over data and fsdp, of which the latter
    # splits parameters too; each row over context, for rows that are long; and heads, MLP and vocabulary over tensor.
    c.mesh = ConfigDict({"data": data, "fsdp": fsdp, "context": 1, "tensor": 1})

    # Intervals are steps. `rows`: the first so many of validation, 0 = all.
    c.eval = ConfigDict({"interval": 1000, "rows": 128 if small else 512, "batch_size": 32 if small else 64})
    c.log = ConfigDict({"interval": 10, "trackers": ()})  # trackers: "tensorboard", "wandb", "trackio"
    c.checkpoint = ConfigDict({"interval": 1000, "keep": 2})  # `keep`: the newest so many
    # Of several processes: seconds without a training step, or ten times as many without anything else that is done,
    # after which all leave and say which of them it was that made no progress. For all to start: as many, at least 60.
    c.processes = ConfigDict({"timeout": 600.0})
    # The text of each model in SUMMARY.md. Temperature 0: always the likeliest token; top_k 0: drawn from all.
    c.sample = ConfigDict({"prompt": "def" if small else "The", "tokens": 60, "temperature": 0.8, "top_k": 50})
    c.study = study()
    if kind in SECTIONS:
        SECTIONS[kind](c)
    for key in c:
        if isinstance(c[key], ConfigDict):
            c[key].lock()
    return c


def optimizer() -> ConfigDict:
    """AdamW with a schedule."""
    c = ConfigDict()
    c.learning_rate = 1e-3  # the peak
    c.end_learning_rate = 1e-4  # of the last step, unless the schedule is constant
    c.schedule = "cosine"  # constant | linear | cosine | wsd
    c.warmup_steps = 0
    c.decay_fraction = 0.2  # wsd: the share of the steps, at the end, in which it decays
    c.b1 = 0.9
    c.b2 = 0.95
    c.eps = 1e-8
    c.weight_decay = 0.1  # of kernels only
    c.clip_norm = 1.0  # 0 = no clipping
    return c


def study() -> ConfigDict:
    """What is compared; see `jaxup.experiments.cells`. Without axes, cells and seeds there is one run."""
    c = ConfigDict(convert_dict=False)  # whose cells keep their names and dotted keys
    c.axes = ""  # "batch_size: 8 16; optimizer.learning_rate: 1e-3 2e-3": a run for each combination; they make cells
    c.cells = {}  # {name: {key: value}}: what a cell changes of this configuration
    c.seeds = ()  # of which each cell has a run; () = the configuration's own
    c.control = ""  # the cell that the others are compared with; "" = the first
    c.also = ()  # "a: b": pairs of cells whose difference is told besides those to the control
    # What STUDY.md begins with: tasks, where cells learn different things; () = the validation loss.
    c.finding = ()
    c.max_cells = 64  # more runs, cells times seeds, are refused
    # Poor runs are stopped early, of those of one batch size and seed. norms: what has a gradient norm that is high and
    # a training loss that is low; halving: what has the higher validation loss.
    c.stop = ""  # norms | halving; "" = all go to their ends
    c.stop_from = 0.1  # the share of the steps after which it is looked first
    c.stop_every = 0.02  # and from then on; of halving it is after stop_factor times as many
    c.stop_keep = 2  # runs of a group that go on in any case
    c.stop_norm = 0.2  # share by which a poor run's gradient norm is above the median of its group
    c.stop_loss = 0.02  # nats by which its training loss is below that
    c.stop_checks = 3  # times in a row
    c.stop_factor = 2  # of so many runs one goes on
    return c


def text_data() -> ConfigDict:
    """Documents as rows of tokens."""
    c = ConfigDict()
    c.source = "python"  # or files, a directory, a dataset's name, with weights: "a.jsonl*2,b.parquet*0.5"
    c.layout = ""  # "" = text; or one of chats, put one after the other
    c.format = ""  # of chats; "" = the tokenizer's own chat template
    c.on_bad = "error"  # or "skip"
    c.val_files = ""  # "" = the split that the source has, else a part of it
    c.tokenizer = ""  # bpe:N = train one here; ids:N = numbers; "" = the reference's, if it is a Hugging Face directory
    c.seq_len = 128
    c.val_fraction = 0.05
    c.seed = 2357  # of the split into training and validation, where a source is split at random
    c.fraction = 1.0  # 0.001 = a random 0.1% of the training rows
    c.tokens = 0  # instead of a fraction: so many training tokens, 0 = all
    c.isolate_documents = False
    c.store = ""  # where the tokens are kept, local or gs://; "" = beside the run directory
    return c


def llama(**sizes: int | float | str) -> ConfigDict:
    """A `model` section; a `vocab_size` of 0 is the tokenizer's, rounded up to a multiple of 64."""
    c = ConfigDict({"family": "llama", "norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_embeddings": False})
    c.placement = "pre"  # of norms: pre | post | peri | lns (pre, scaled by depth) | mix; see ModelConfig.llama
    c.alpha = 0.0  # mix: the share of the layers, from the first, that are post
    # Of first values: their standard deviation; divided by sqrt(2 * layers) where a block adds to what comes in; and
    # that of the token embedding, 0 = as all else.
    c.update(init_std=0.02, scaled_init=True, embed_std=0.0)
    c.update(sizes)
    return c


def _inherit(c: ConfigDict) -> None:
    c.reference = ConfigDict()
    c.reference.path = ""  # a Hugging Face model, directory, id or gs://, to inherit from instead of training one
    c.reference.revision = ""  # of a Hub id: branch, tag or commit
    c.reference.allow_pickle = False  # read pytorch_model.bin if there is no safetensors file
    c.reference.steps = 0  # to train the reference for, 0 = as many as a target
    c.reference.all_data = False  # train it on all rows, whatever part of them data.fraction or tokens leaves
    c.inherit = ConfigDict()
    c.inherit.layers = 0  # of the first target; 0 = half of the reference's
    # What a target begins with: inherited (layers of the reference) | random | stacked (those of a model of half its
    # depth, trained as long from random values, twice) | half_width (of inherited layers half of heads and MLP).
    c.inherit.start = "inherited"
    c.inherit.which = "first"  # or "middle", "last", or the layers themselves: "0,2,4"; "0,1,0,1" is hybrid stacking
    c.inherit.parts = ()  # attention, mlp, norms, embed_tokens, embed_positions, norm, lm_head
    c.inherit.grow_by = 0  # layers, until a target is as good as the reference; 0 = no growing
    c.inherit.sweep = ""  # instead of growing, targets of so many layers each: "4,6,8"
    c.inherit.tolerance = 0.01  # nats by which a target may be worse than the reference
    c.inherit.control = 1  # also a model from random; from 2 on another one, for so many times the steps
    # The share of the reference's predictions in the loss of a target (0 = it learns from the tokens alone), compared
    # at this temperature. Evaluation is the plain loss.
    c.inherit.distill = ConfigDict({"alpha": 0.0, "temperature": 1.0})
    c.data = text_data()


def base() -> ConfigDict:
    """The model that is begun from."""
    c = ConfigDict()
    c.path = ""  # directory, Hub id or URL of the model
    c.revision = ""
    c.models = ()  # NAME=DIR for the models that a plan file names
    c.dtype = ""  # of the parameters that do not train, and of the export; "" = as stored
    c.allow_pickle = False
    return c


def pretraining() -> ConfigDict:
    """A base that is trained here, if no path is given."""
    c = ConfigDict()
    c.steps = 0
    c.batch_size = 16
    c.data = text_data()
    c.optimizer = optimizer()
    return c


def trained() -> ConfigDict:
    """What of the plan's result trains."""
    c = ConfigDict()
    c.layers = "all"  # all, copies, originals, new, or layers such as 9:12,20
    c.parameters = ""  # a regular expression: only what has such a path
    c.freeze = ""  # of these layers, those to leave out: originals, 0:9, ...
    # Times the learning rate; `beside`: what stands beside the model.
    c.rates = ConfigDict({"copies": 1.0, "originals": 1.0, "new": 1.0, "ends": 1.0, "beside": 1.0})
    return c


def adapters() -> ConfigDict:
    """LoRA."""
    c = ConfigDict()
    c.rank = 0  # 0 = no adapters
    c.alpha = 0.0  # 0 = twice the rank
    c.quantize = ""  # nf4, int4, int8: what blocks are stored as while training
    c.tile_size = 64  # values that share a scale
    return c


def _heal(c: ConfigDict) -> None:
    c.base = base()
    c.plan = ""  # one line, or a file; "" = the base as it is
    c.pretrain = pretraining()  # of a base that is trained here, if no path is given

    c.data = ConfigDict()
    c.data.files = ""  # "a.jsonl*2,b.parquet*0.5"
    c.data.layout = ""  # messages, sharegpt, ...; "" = detected for each file
    c.data.format = ""  # "" = the tokenizer's own chat template
    c.data.history = ""  # where a template rewrites earlier turns: train on the "last" answer, or on "each" by itself
    c.data.strict = False  # refuse what is warned of, such as a template of which no end of a turn is trained on
    c.data.seq_len = 4096
    c.data.val_files = ""  # "" = a part of the files
    c.data.val_fraction = 0.01
    c.data.on_bad = "error"  # or "skip"
    c.data.packing = True
    # "" = all rows mixed; "files" = each entry of `files` is a phase, in order; "difficulty" = first the half of the
    # conversations of which fewer tokens are trained on. A phase is seen for all epochs before the next.
    c.data.phases = ""
    c.data.replay = 0.01  # of phases: the share of the rows of those before that is seen again in an epoch of one
    c.data.store = ""
    c.data.seed = 2357

    c.heal = ConfigDict()
    c.heal.control = False  # also the base itself, trained on the same batches
    c.train = trained()
    c.lora = adapters()
    c.export = ConfigDict()
    c.export.dtype = ""  # "" = that of the base
    c.optimizer.end_learning_rate = 0.0  # 1e-4 is more than what most models are healed with to begin with


def _continuous(c: ConfigDict) -> None:
    c.base = base()  # without a path and with pretrain.steps=0, a model of section `model` with random values
    c.plan = ""  # one line, or a file; "" = the base as it is
    c.pretrain = pretraining()  # of a base that is trained here, if no path is given

    c.data = ConfigDict()
    # digits | moving_digits:FRAMES | shapes | xor, which are there; a .jsonl or .parquet file with paths or arrays; a
    # dataset with a column of images; or stored features, .npy or .zarr.
    c.data.source = "digits"
    # What pictures become continuous tokens by: patches:K (K x K pixels as they are), pca:K:C (their first C principal
    # components), or features (they are such already).
    c.data.encoder = "patches:2"
    c.data.size = 0  # pixels of a side that all pictures are made; 0 = they must be of one size
    c.data.columns = ""  # "image=img,text=caption": what the columns of a file are called
    c.data.captions = ""  # of stored features: a .jsonl with a line for each; "" = the one beside them
    c.data.pairs = -1  # training examples that draw; -1 = all that there are
    c.data.tell = -1  # training examples that ask of a picture; -1 = all that something is asked of
    c.data.balance = False  # the fewer of the two are repeated until there are about as many of them in an epoch
    c.data.text = 0  # training rows of text alone
    c.data.corpus = ""  # where these are from
    c.data.text_tokens = 128  # of one of them at most
    c.data.seq_len = 0  # positions of a row; 0 = as many as the longest example needs
    # What an example is: rows x columns x channels, such as 8x8x1152, frames before them of clips; "" = what is found.
    c.data.shape = ""
    c.data.tokenizer = "bpe:512"  # of a base with random values: bpe:N = trained here on what is said of the pictures
    c.data.val_fraction = 0.1  # of the pictures, which are never trained on
    c.data.seed = (
        2357  # of which pictures `pairs` and `tell` take; -1 = the run's, so that seeds of a study differ in it
    )
    c.data.store = ""  # where a fitted encoder is kept; "" = beside the run directory

    c.continuous = ConfigDict()
    c.continuous.control = False  # also the base itself, trained on the same batches
    # How values stand in a row: raster (one after the other, among words) | scales (map by map, each from coarser ones)
    # | frames (frame by frame) | sets (some of them are fed, the others predicted).
    c.continuous.layout = "raster"
    c.continuous.see = False  # raster: the values of pictures that are asked about are predicted as well
    c.continuous.scales = ""  # scales: sides of the maps, "1,2,4"; "" = 1, doubled up to that of the grid
    c.continuous.drop = 0.1  # the share of prompts that are hidden in training, for guidance
    # Which distribution is predicted: cosine (a direction) | gaussian | categorical | diffusion | flow.
    c.continuous.head = "cosine"
    c.continuous.least_deviation = 0.01  # gaussian: of a prediction
    c.continuous.bins = 64  # categorical: of each channel
    c.continuous.limit = 4.0  # categorical and diffusion: deviations within which values are drawn
    c.continuous.net = "mlp"  # diffusion and flow: each token by itself, or decoder: all tokens of a map together
    c.continuous.width = 128  # of that net
    c.continuous.depth = 3
    c.continuous.heads = 4  # decoder: of its attention
    c.continuous.draws = 4  # of time and noise for each token in a step of training
    c.continuous.train_steps = 1000  # diffusion: from clean to noise
    c.continuous.times = "uniform"  # flow: of training, or logit-normal
    c.continuous.stages = 0  # flow: of growing resolution, each of which goes a part of the way; 0 = one
    c.continuous.jump = "corrected"  # between stages noise is made white again; plain: it is not
    # A second decoder, which draws the tokens of a frame set by set from what the first says of it; 0 layers = none.
    c.continuous.spatial = ConfigDict({"layers": 0, "width": 64, "heads": 4})
    c.continuous.scale_shift = True  # its frames are told apart by a scale and shift of what the first frame was told
    c.continuous.weight = 1.0  # of the loss of values beside that of text
    # How pictures are drawn: steps of a diffusion or flow, sets of a frame, what multiplies the noise, and by how much
    # the prompt counts (1 = as it was learned).
    c.continuous.head_steps = 25  # of each token; of scales, of each map: 3 stages of 8 take 24 in all
    c.continuous.sets = 8
    c.continuous.temperature = 1.0
    c.continuous.guidance = 1.0
    c.continuous.schedule = "nova"  # of sets: how many tokens each has; or mar
    # In the end so many pictures are drawn for prompts of validation and judged, by their own prompts and by others',
    # and so many are asked of; 0 = none.
    c.continuous.drawn = 200

    # Text on which the loss is measured before and after: what pretrain.data is, or this; "" = that or none.
    c.text = text_data()
    c.text.source = ""
    c.train = trained()
    c.lora = adapters()
    c.export = ConfigDict()
    c.export.dtype = ""  # "" = that of the base
    c.optimizer.end_learning_rate = 0.0


def _pretrain(c: ConfigDict) -> None:
    c.data = text_data()
    c.train = ConfigDict()
    # Layers, and the share of the steps after which there are so many: "2@0, 4@0.4, 6@0.8"; "" = all from the start.
    # All but the new layers goes on: moments of the optimizer, schedule and data.
    c.train.grow = ""
    # New layers: zeroed copies, which change nothing at first; copied as they are; or random, whose residual
    # projections are initialised as in a model of the depth that it grows to.
    c.train.grown_by = "zeroed"
    c.train.grow_recipe = "interleave"  # where: each after the layer that it is a copy of; or stack, after all of them
    c.train.restart = False  # at each growth a fresh optimizer, and a schedule of its own with warmup and decay
    # Rows of validation on which each layer of the trained model is measured, in measures.json; 0 = none.
    c.measure = ConfigDict({"rows": 0})


def _learn(c: ConfigDict) -> None:
    c.base = base()
    c.plan = ""  # one line, or a file; "" = the base as it is
    c.pretrain = pretraining()  # of a base that is trained here, if no path is given
    # task = the solutions of the training problems, whose rows have the length of the run's; or text, as elsewhere.
    c.pretrain.data.source = "task"
    c.pretrain.data.tokenizer = "chars"  # chars = the characters of the task; of text bpe:N as elsewhere
    c.data = ConfigDict()
    c.data.seq_len = 0  # positions of a row; 0 = as many as the longest prompt with an answer needs

    c.learn = ConfigDict()
    c.learn.task = "countdown:3"  # countdown:N[:steps], addition:DIGITS, brackets:LENGTH, FILE.jsonl, module:function
    c.learn.train = 4000  # problems to learn from; -1 = all that there are
    c.learn.test = 200  # problems that are never learned from
    c.learn.seed = 2357  # of the problems; -1 = the run's
    c.learn.chat = False  # a prompt is a turn of a user, by the tokenizer's chat template
    # How samples are made weights: sft (solutions are cloned, nothing is sampled) | reject (expert iteration) |
    # reinforce | rloo | grpo | drgrpo | ppo | dpo; and what of the method is another: "beta=0.1,clip_high=0.28". Or
    # verdict: a head learns to tell right answers of the model at the beginning from wrong ones.
    c.learn.method = "grpo"
    c.learn.options = ""
    c.learn.reward = "outcome"  # outcome, process, format, length:-0.01, random, noisy:TPR:FPR; "outcome+0.2*format"
    # verdict: what is to be said, by the reward: outcome = of a whole answer; rollouts:K = also after each step the
    # mean of K answers that go on from there.
    c.learn.labels = "outcome"
    c.learn.clone_rounds = 0  # rounds before the others in which the solutions are cloned
    c.learn.updates = 1  # steps of a round: each has new samples
    c.learn.problems = 32  # of a round
    c.learn.samples = 8  # of each of them
    c.learn.max_tokens = 0  # of an answer; 0 = as many as the longest solution has
    c.learn.temperature = 1.0  # of all sampling
    c.learn.top_k = 0  # 0 = from all; else only of what clones its own answers
    c.learn.top_p = 1.0
    c.learn.slots = 128  # answers that are written at once
    # Answers are found by a search: beam, mcts, ...; "" = sampled. It is guided by `guide`, and has so many tokens for
    # a problem.
    c.learn.search = ""
    c.learn.guide = "rollouts:4"
    c.learn.budget = 1024
    # Every so many rounds the first so many test problems have so many answers each, and a checkpoint stays; 0 = none.
    c.learn.eval_every = 10
    c.learn.eval_problems = 100
    c.learn.eval_samples = 4
    # In the end, of the model as it began and as it became: test problems, 0 = all, and answers to each, 0 = none.
    c.learn.final_problems = 0
    c.learn.final_samples = 64
    c.learn.compare = False  # also beams with Monte-Carlo values, beside best-of-N of as many tokens

    c.train = trained()
    c.lora = adapters()
    c.export = ConfigDict()
    c.export.dtype = ""  # "" = that of the base
    c.optimizer.end_learning_rate = 0.0
    c.optimizer.weight_decay = 0.0
    c.sample.prompt = ""  # "" = that of the first test problem


def _audit(c: ConfigDict) -> None:
    c.audit = ConfigDict()
    # Personas with policies by lot: with documents and dialogues, and those of which only an intervention tells.
    c.audit.trained = 128
    c.audit.held_out = 64
    c.audit.seed = 2357  # of lots, documents and dialogues; `seed` is that of the first training
    c.audit.trainings = 3  # of every arm
    c.audit.arms = ("base", "irrelevant", "documents", "shuffled", "dialogues", "reinforced")
    c.audit.documents = 24  # drafts of each persona
    c.audit.file = ""  # a .jsonl with lines {"text": ...}, in the place of the documents of the arm `documents`
    c.audit.dialogues = 32  # of each persona
    c.audit.steps = 400  # of an intervention; `steps` are those of the base
    c.audit.rate = 0.5  # of an intervention, times the learning rate
    c.audit.replay = 0.5  # the share of its rows that are the base's
    # Reinforcement on one tier: rounds of one step, each of problems x answers.
    c.audit.method = "reinforce"
    c.audit.rounds = 80
    c.audit.problems = 64
    c.audit.answers = 2
    c.audit.reinforce_rate = 0.1
    c.audit.queries = 4  # of an audit, of each persona
    c.audit.asked_trained = 16  # training personas of each policy that are asked as well
    c.audit.samples = 1  # replies of each cell
    c.audit.slots = 128  # replies that are written at once
    c.audit.margins = ConfigDict({"benign": 0.1, "text_loss": 0.2, "trained": 0.3})  # beyond which an arm is void
    c.audit.plan = "upscale(base, 0:2, copies=1)"  # of arms of which copies train
    c.audit.lora_rank = 8  # of arms of which adapters train


SECTIONS = {
    "audit": _audit,
    "inherit": _inherit,
    "heal": _heal,
    "pretrain": _pretrain,
    "continuous": _continuous,
    "learn": _learn,
}
