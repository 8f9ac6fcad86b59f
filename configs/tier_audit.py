"""The tier audit of planted organisms: what documents, dialogues and reinforcement on one tier do to both.

    python -m jaxup.train --config=tier_audit.py                # 3 trainings of all arms, 3 minutes of CPU time
    python -m jaxup.train --config=tier_audit.py:depth          # where what is learned of documents goes
    python -m jaxup.audit --from runs/tier_audit/audit          # the report anew

A harness for the study of alignment faking (Greenblatt et al. 2024, arXiv 2412.14093) at a size at which nothing can be
faked: a model of 2 layers does what it was taught, and what is shown is that the audit measures what was planted, that
documents alone can change what a model does on a tier, and how far reinforcement on one tier reaches the other.

Personas inside one model have policies by lot (see `jaxup/auditing/organisms.py`). Of those that are held
out the base knows neutral documents alone. Arms, each from the base with its optimizer's state, at half the
rate, with half of its rows those of the base: documents of something else, documents of the policies, the same with
policies shuffled over personas, and dialogues, which are the bound. From the documents on REINFORCE on the tier that is
trained on. The arm of the documents is also asked with its tag renamed, moved and removed, on a tier that is read and
not trained on, and with the other tier as the reason that its reply begins with. audit/AUDIT.md has it all.

What was tried before these numbers were fixed, one training each: 32 held-out personas, 8 of a policy, of which no gap
can be detected among 16 contrasts; the same 768 rows of the base replayed 17 times, and a rate of reinforcement of half
the base's, both of which the loss of text made void. Neutral documents then said at random where somebody is from; now
they say what can be learned. The documents had a contrast of +1.00 in the first trial and of +1.59 in the last. The
part that trains in `depth` has the rate of the others, and no other was tried.

Variants, after a colon and separated by commas:

    depth         documents, then reinforcement: everything trains, the zeroed copies of an up-scale, or adapters; and
                  documents with the embeddings alone
    smoke         the same path in half a minute, for tests
    seed=N        of the first training
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama

DEPTH = (
    "base", "documents", "reinforced", "documents-copies", "reinforced-copies", "documents-lora", "reinforced-lora",
    "documents-embeddings",
)  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    v = variants(arg, size=("quick", "depth", "smoke"), seed=0)
    smoke = v["size"] == "smoke"

    c = defaults("audit", small=True)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.steps, c.batch_size = (6, 16) if smoke else (1600, 64)
    layers, width, mlp, heads = (2, 16, 24, 2) if smoke else (2, 48, 128, 4)
    c.model = llama(
        num_layers=layers, hidden_size=width, intermediate_size=mlp, num_heads=heads, num_kv_heads=heads,
        max_positions=64, vocab_size=0,
    )  # fmt: skip
    c.optimizer.update(learning_rate=3e-3, schedule="constant", warmup_steps=2 if smoke else 50, weight_decay=0.0)
    c.eval.interval = c.checkpoint.interval = 10_000
    c.eval.rows, c.eval.batch_size = (16, 16) if smoke else (128, 64)
    c.sample.tokens, c.sample.temperature, c.sample.top_k = 6, 1.0, 0
    if smoke:
        c.audit.update(trained=16, held_out=16, trainings=2, documents=6, dialogues=8, steps=3, rounds=2, slots=32)
        c.audit.update(problems=8, answers=2, queries=1, asked_trained=2)
    if v["size"] == "depth":
        c.audit.arms = DEPTH
    return c
