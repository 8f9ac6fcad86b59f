"""Teach a language model to see and draw: digits as continuous tokens among words, one after the other.

    python -m jaxup.train --config=metamorph.py                             # a study: does seeing help drawing?
    python -m jaxup.train --config=metamorph.py:one
    python -m jaxup.generate runs/metamorph-one --image "draw 7" --out grid.png
    python -m jaxup.generate runs/metamorph-one --image-in digit.png --prompt "which digit?"

After MetaMorph (Tong et al. 2024, arXiv 2412.14164): a decoder is fed continuous tokens through a small connector,
and predicts the next one by a small head; both kinds of pairs, pictures to be drawn and pictures that are asked about,
train it together. Its claims are that questions about pictures help drawing where there are few pairs to draw by (FID
on COCO of 200,000 pairs alone 110, beside all questions 15), and that they help it more than pairs help answering.

Here the base is a LLaMA of 4 layers that is trained on Python's standard library first, and pictures are scikit-learn's
digits in 4 tokens of 4 x 4 pixels. The cells:

    draw          20 pairs ("draw 7", two of each digit) alone
    joint         the same pairs, and a question about each of the 1,632 pictures that may be seen
    joint_see     as joint, and the values of the pictures that are asked about are predicted as well
    tell          20 questions alone
    tell_joint    the same questions, and all 1,632 pairs
    joint_flow    as joint, with a head that draws by a flow instead of the paper's, which regresses a direction
    joint_copies  as joint, but the base is up-scaled by zeroed copies of its upper two layers, and only copies train
    joint_lora    as joint, but of the base only adapters train

What is compared with what: in the paper every pair is seen once, alone or not, so that training on fewer examples also
takes fewer steps, and what is bad may be bad for want of steps. Here both can be equal: all cells take 300 steps, and a
batch has 32 rows of what there is little of, with or without as many of the other kind beside them (`data.balance`).
The loss of each kind is a mean over its own rows, so what drawing adds to a gradient is of one size in `draw` and
`joint`, and a difference between them is what the questions add. What is not equal is compute: a step of `joint` takes
twice the FLOPs. In `joint_see` drawing has half the weight in the loss of values, the other half is that of pictures
asked about. Which 20 it is differs from seed to seed, so the intervals are of that as well.

The sizes were chosen before anything was compared: by the time there is, and so that a run on all pairs and questions
comes near to its end (after 200 steps the judge took 165 of 165 drawings for what was asked, and 80% of the questions
were answered). Nothing was tuned after the comparison.

Measured on 2 cores, Python 3.11, jax 0.10.2 (24 runs; 17 minutes of processor time on a machine that was busy with
others): means of three seeds. `cosine` is that of drawn values to unseen pictures of the class, 0.698 of these among
themselves; the judge finds the class of all unseen real pictures; unseen pictures are asked about; the loss of text
was 4.02 before. Shuffled: another prompt's pictures, another class, another picture than the one shown.

                  cosine  shuffled  judged  shuffled  told  shuffled  diversity  text after
    draw           0.724     0.521     93%        8%    0%        0%       0.00        4.50
    joint          0.733     0.533     89%        9%   97%        9%       0.00        9.50
    joint_see      0.743     0.528    100%        8%   96%        9%       0.00        8.99
    tell          -0.050    -0.059     10%        9%   44%       10%       0.00       12.63
    tell_joint     0.823     0.570    100%        8%   48%       13%       0.00        9.03
    joint_flow     0.696     0.510     97%        9%   98%        9%       0.42        8.96
    joint_copies   0.731     0.546     89%       10%   20%        3%       0.00        5.21
    joint_lora     0.734     0.530     96%        9%   25%        3%       0.00        5.39

With 95% t intervals of the differences seed by seed:

- Joint training against generation alone: no difference is shown. Cosine +0.010 [-0.010, +0.029], judged
  -0.038 [-0.204, +0.127], loss of unseen values +0.008 [-0.019, +0.035]. With the visual loss on pictures
  that are asked about as well (`joint_see`) that loss is lower, -0.065 [-0.103, -0.027]; of what is drawn freely
  no difference is shown, cosine +0.019 [-0.042, +0.081], judged +0.073 [-0.240, +0.386].
- The reverse: all pairs beside 20 questions add +0.042 [-0.012, +0.097] to the share that is answered. Questions
  add -0.081 more [-0.267, +0.105] to what is judged right than pairs add to what is answered: that understanding
  helps more is not shown, and the sign is the other one.
- Diversity: none of a cosine head, whose draws know no noise; of a flow 0.42, where real pictures have 0.73.
- Text: by training everything its loss goes from 4.02 to 9.50, with copies only to 5.21 and with adapters to
  5.39 (to `joint` -4.288 [-5.795, -2.781] and -4.106 [-5.905, -2.307]): both lose far less. No difference is shown of
  what they draw (cosine -0.003 [-0.024, +0.019] and +0.000 [-0.016, +0.016]), nor by three seeds of what they answer
  (-0.766 [-1.644, +0.112] and -0.721 [-1.791, +0.348]): of one seed 61% and 74%, of the others nothing.
- Shuffled prompts fall to chance, a tenth.

So neither ordering of the paper is reproduced at this size. It may be that a model of 261,000 parameters that has seen
no picture before has nothing that questions could unlock: which digit a picture shows does not say how it is drawn.

Variants, after a colon and separated by commas:

    one                   one run, of the cell `joint`
    smoke                 the same path in half a minute, for tests
    paper                 the published sizes and settings, for pods: LLaMA-3.1-8B, of which all trains, a picture
                          as 64 tokens of 1,152 channels, 1,536 rows a step at 6.93e-5, one epoch. `data.source` is what
                          `python -m jaxup.features google/siglip-so400m-patch14-384 PAIRS FEATURES --grid 8
                          --normalize` makes. The paper's rows of 4,096 hold conversations; one here has one picture and
                          446 tokens of words. Its warmup is 3% of the steps: 300 are that of 15 million examples.
                          Compiled (`--target`), not run: on v5p:4x4x4 a step takes 14.9 of the 95.7 GiB of each of 64
                          chips, and at least 1.64 s; the smallest slice of v5e and v6e that it fits on is v6e:2x4
                          (`mesh.fsdp=8`, 8 micro-batches), with 29.1 of 31.3 GiB and at least 7.97 s
    pairs=N               of what there is little (default: 20)
    seeds=N               of the study (default: 3)
    head=NAME             cosine (the default, the paper's), gaussian, categorical, diffusion, flow
    upscaled              as joint_copies
    lora                  as joint_lora; the adapters are merged into the export
    seed=N                of one run: of initialisation, batches, and which pictures there are few of
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama


def get_config(arg: str = "") -> ConfigDict:
    head = ("cosine", "gaussian", "categorical", "diffusion", "flow")
    v = variants(
        arg, size=("quick", "one", "smoke", "paper"), head=head, how=("all", "upscaled", "lora"), pairs=20, seeds=3,
        seed=0,
    )  # fmt: skip
    if v["size"] == "paper":
        return _paper(v["seed"])
    smoke, layers = v["size"] == "smoke", 2 if v["size"] == "smoke" else 4
    upscaled = {"plan": f"upscale(base, {layers // 2}:{layers}, copies=1)", "train.layers": "copies"}

    c = defaults("continuous", small=True)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.steps = 20 if smoke else 300
    c.batch_size = 64
    c.model = llama(
        num_layers=layers, hidden_size=32 if smoke else 64, intermediate_size=64 if smoke else 176,
        num_heads=4, num_kv_heads=2, max_positions=64, vocab_size=0,
    )  # fmt: skip

    c.pretrain.steps = 10 if smoke else 200
    c.pretrain.data.tokenizer, c.pretrain.data.seq_len = "bpe:512", 64
    c.pretrain.optimizer.learning_rate, c.pretrain.optimizer.warmup_steps = 2e-3, 5 if smoke else 20
    c.data.encoder = "patches:4"
    c.data.pairs, c.data.balance, c.data.seed = v["pairs"], True, -1
    c.continuous.head = v["head"]
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 2e-3, 5 if smoke else 30
    c.eval.interval = c.checkpoint.interval = 10 if smoke else 100
    c.eval.rows, c.eval.batch_size = (64, 32) if smoke else (330, 110)
    c.sample.tokens = 0
    if smoke:
        c.continuous.drawn = 20
    if v["how"] == "upscaled":
        c.plan, c.train.layers = upscaled["plan"], upscaled["train.layers"]
    if v["how"] == "lora":
        c.lora.rank = 8
    if v["size"] == "quick":
        alone = {"batch_size": c.batch_size // 2}  # as many rows of what there is few of
        c.study.cells = {
            "draw": {"data.tell": 0, **alone},
            "joint": {},
            "joint_see": {"continuous.see": True},
            "tell": {"data.pairs": 0, "data.tell": v["pairs"], **alone},
            "tell_joint": {"data.pairs": -1, "data.tell": v["pairs"]},
            "joint_flow": {"continuous.head": "flow"},
            "joint_copies": upscaled,
            "joint_lora": {"lora.rank": 8},
        }
        c.study.seeds = tuple(range(v["seeds"]))
        c.study.control = "draw"
        c.study.finding = ("cosine", "told")
        to_joint = ("see", "flow", "copies", "lora")
        c.study.also = ("tell_joint: tell", *(f"joint_{name}: joint" for name in to_joint))
    return c


def _paper(seed: int) -> ConfigDict:
    c = defaults("continuous", small=False)
    c.seed, c.epochs, c.batch_size = seed, 1, 1536
    c.base.path = "meta-llama/Llama-3.1-8B"
    c.data.source, c.data.encoder, c.data.shape, c.data.seq_len = "FEATURES", "features", "8x8x1152", 512
    c.continuous.head, c.continuous.drop, c.continuous.drawn = "cosine", 0.0, 0
    c.optimizer.update(learning_rate=6.93e-5, warmup_steps=300, weight_decay=0.0, b2=0.999)
    c.step.loss_chunk = 512
    c.sample.tokens = 200
    c.eval.interval = c.checkpoint.interval = 500
    return c
