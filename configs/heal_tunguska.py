"""Tunguska-39B: Mistral-Small's middle layers twice more, zeroed, and healed; and what its write-up left open.

    python -m jaxup.train --config=heal_tunguska.py --config.data.files=chats.jsonl      # for a pod
    python -m jaxup.train --config=heal_tunguska.py:quick                                # here, in minutes

The experiment (BA-Zephyria-39b and its relatives): 56 layers become 99 by two copies of layers 19
to 40 in which o_proj and down_proj are zero, so that the function is the source's; then two epochs
of 600 MB of chat in Metharme's format, at the learning rate that served the model before it was
up-scaled. The recipe lost layer 55, by counting half-open ranges inclusively, and so does the
default; `whole` keeps it. Other settings were not published. Here they are those of
configs/heal.py but for a rate of 1e-5, that of Llama-3-15B-Instruct-zeroed, which was healed in the
same way. This default has not been run: it needs a pod, the model and data. It was compiled for one
(`--target=v5p:4x4x4`, docs/pods.md): of the 95.7 GiB of each of 64 chips a step takes 55.9, and it
lasts at least 25 seconds; with `freeze_originals` 32.4 and 17, with `lora` 55.0 and 22.

The write-up's questions, one variant each, which combine where that makes sense:

    one_duplicate          each layer once more instead of twice: 77 layers
    five_duplicates        five times more: 165 layers
    interleaved            each layer followed by its two copies, instead of all by all
    whole                  layer 55 is kept: 100 layers, and the function is unchanged
    lr=F                   another learning rate
    epochs=N               more epochs, or fewer
    lora                   adapters on what trains, instead of the weights themselves
    freeze_originals       only the copies train: the 56 layers, embedding and head keep every bit
    freeze_base=RANGES     no up-scaling: the base is trained but for these layers (19:41 or 0:8+48:56)
    undercook=N            stop after N steps

and, as in configs/heal.py, parameters=REGEX (o_proj|down_proj: only what was zeroed), qlora, rank=N,
control=1, seed=N, smoke, and

    quick                  the same on a LLaMA of 6 layers that is trained here first on Python's standard
                           library, of which layers 2 and 3 are copied twice (10 layers); the chat data are
                           questions and answers made of its docstrings. The control, the base trained
                           on the same batches, says what the added depth is worth

Measured once, on 2 cores of an AMD EPYC (Zen 3, 2.4 GHz), Python 3.11, jax 0.10.2, seed 0: seven
minutes for `:quick` (with tests running beside it for a while), six and a half for
`:quick,freeze_originals`, four and a half for `:quick,undercook=20`. Validation loss in nats
per loss token; base and up-scale begin at 5.345:

    variant            trains               steps   healed, 10 layers   control, 6 layers
                       everything           133     3.755               3.765
    freeze_originals   the copies           133     4.405               3.765
    undercook=20       everything            20     4.390               4.396

A quick model is far from trained out, and a hundredth of a nat is within noise: it shows that the
questions can be asked, not what they come to at 39B.
"""

from ml_collections import ConfigDict

from jaxup.errors import UserError
from jaxup.experiments.config import load, variants

COPIES = {"two_duplicates": 2, "one_duplicate": 1, "five_duplicates": 5}
PASSED_ON = ("size", "lr", "epochs", "lora", "qlora", "rank", "parameters", "control", "seed")


def get_config(arg: str = "") -> ConfigDict:
    v = variants(
        arg,
        size=("default", "quick", "smoke"),
        copies=tuple(COPIES),
        interleaved=False,
        whole=False,
        lr=0.0,
        epochs=0,
        lora=False,
        qlora=False,
        rank=0,
        freeze_originals=False,
        freeze_base="",
        undercook=0,
        parameters="",
        control=-1,
        seed=0,
    )
    small = v["size"] != "default"
    if v["freeze_base"]:
        for key in ("interleaved", "whole", "freeze_originals"):
            if v[key]:
                raise UserError(f"variant {key}: freeze_base trains the base, which is not up-scaled")
        if v["copies"] != "two_duplicates":
            raise UserError(f"variant {v['copies']}: freeze_base trains the base, which is not up-scaled")

    given = [f"{key}={v[key]}" for key in PASSED_ON if v[key] or key == "control"]
    given += [f"steps={v['undercook']}"] * bool(v["undercook"])
    c = load(f"heal.py:{','.join(given)}", shipped=True)

    layers = "2:4" if small else "19:41"
    base = "base" if small or v["whole"] else "inherit(base, 55)"
    recipe = "interleave" if v["interleaved"] else "upscale"
    c.plan = "" if v["freeze_base"] else f"{recipe}({base}, {layers}, copies={COPIES[v['copies']]})"
    c.train.layers = "copies" if v["freeze_originals"] else "all"
    c.train.freeze = v["freeze_base"].replace("+", ",")
    if not small:
        c.base.path = "mistralai/Mistral-Small-Instruct-2409"
        c.data.format = "metharme"
        c.data.seq_len = 8192
        c.batch_size = 256  # rows of twice the length of those in heal.py
        c.optimizer.learning_rate = v["lr"] or 1e-5
    return c
