"""Learn from one's own answers: policy initialisation, then rounds of sample -> score -> weigh -> fit.

    python -m jaxup.train --config=search_and_learn.py          # a study: four cells, three seeds
    python -m jaxup.train --config=search_and_learn.py:one      # GRPO alone
    python -m jaxup.train --config=search_and_learn.py:one --config.learn.method=rloo
    python -m jaxup.train --config=search_and_learn.py:one --config.base.path=MODEL --config.learn.task=FILE.jsonl

The roadmap to o1-like models (Zeng et al. 2024, arXiv 2412.14135) in small: a model of characters is taught solutions
of Countdown (three numbers and a target, such as `3 5 7=26:`), until it solves a quarter of unseen problems at first
try and nearly all in 64; then it learns from its own answers, which a verifier parses. ROUNDS.md of each run has a row
for each round.

What the cells are, each from the same base of its seed: `control` is more cloning of solutions, for 5/3 of the steps:
of the FLOPs of a step of GRPO, three fifths are of the step itself, one of sampling, one of what the base says of the
samples. `expert` is expert iteration: right answers are cloned, each once and four of a problem at most. `grpo` is GRPO
(arXiv 2402.03300), and `random` the same with rewards of heads or tails: it must not raise pass@1. The last three
sample 20,480 answers each.

Measured: three seeds, 300 test problems with 64 answers each; 10.4 minutes of processor time, 14.6 on the clock on two
busy cores. Per cent, in brackets 95% bootstrap intervals over problems, each with its mean over seeds:

               pass@1              pass@4              pass@16             pass@64
    before     27.0 [24.8, 29.3]   58.8 [55.5, 62.1]   84.4 [81.7, 87.0]   95.0 [93.0, 96.8]
    control    28.6 [26.2, 31.0]   59.9 [56.5, 63.2]   84.6 [81.9, 87.2]   95.0 [93.1, 96.7]
    expert     29.3 [26.3, 32.3]   53.3 [49.3, 57.3]   72.4 [68.7, 76.2]   85.4 [82.4, 88.3]
    grpo       32.3 [28.7, 35.9]   51.3 [46.9, 55.7]   67.2 [63.2, 71.4]   80.9 [77.3, 84.3]
    random     20.7 [18.7, 22.9]   43.0 [39.8, 46.2]   65.6 [62.1, 69.0]   81.0 [77.7, 84.0]

More than `control`, problem by problem, at pass@1 and pass@64: `expert` +.7 [-.9, 2.3] and -9.6 [-12.2, -7.1], `grpo`
+3.7 [1.7, 5.7] and -14.1 [-17.1, -11.2], `random` -7.9 [-9.5, -6.3] and -14.0 [-16.8, -11.6]. So GRPO raises pass@1 and
lowers pass@16 and pass@64, as arXiv 2504.13837 found; random rewards do not raise pass@1 but lower it, and lose as much
at 64; more cloning changes little. By t intervals, seed by seed, GRPO's +3.7 is not shown ([-.5, 7.9]); it is +3.0 [.2,
5.8] more than expert iteration. Of 645,120 answers two that counted as right had a special token in them, which is no
longer counted. Curves, and the best of N, are in docs/search.md.

These sizes were chosen after single runs had been looked at: 600 steps of cloning on 4,000 problems, after which GRPO
at a rate of 3e-4 was worse in 40 steps than its base (pass@1 28.4% to 25.4%, pass@64 94% to 78%); and those here, seed
0, 500 steps on 6,000 problems (pass@1 27.3%, pass@64 95.7%), where GRPO at 1e-4 came to 32.4% and 81.3% in 160. All
cells have that rate. The other methods were not tried before.

Variants, after a colon and separated by commas:

    one           one run of `grpo`
    search        one run of expert iteration on answers in steps, which are found by beams with Monte-Carlo values; in
                  the end beams and best-of-N at equal tokens
    depth         the base, its up-scale with zeroed copies, of which everything or the copies train, and its first
                  half: each is taught solutions for 20 rounds, then learns by GRPO from as many answers
    verifier      one run that trains a verifier on answers of the base, and the best of N by it; see below
    smoke         the same path as `one` in half a minute, for tests
    paper         sizes of DeepSeekMath's GRPO, for a pod; see below
    seed=N        of initialisation, batches and samples

`depth`, three seeds, 11.6 minutes of processor time; pass@1 and pass@64 after: base 32.9 and 81.3%, up-scale 33.5 and
79.7, its copies alone 30.9 and 89.4, half 17.5 and 71.6. So two more layers are worth nothing here (+.6 [-.1, 1.3] and
-1.7 [-3.4, .2] over problems), and where the copies alone train the model keeps more of what its base finds in 64
answers (+8.1 [5.9, 10.6]; seed by seed [1.7, 14.5]) for a little less at the first (-1.9 [-3.4, -.4]; [-5.5, 1.6]).

`verifier`, seed 0, learned in 160 steps of 20,480 answers, 31% of them right. Of 6,400 answers to 100 test problems,
24.8% right, its AUC is 0.594, and 0.537 within a problem. The best of N by it peaks and falls: 24.8, 30.1, 27.4 and
18.0% right for N = 1, 4, 16 and 64. By the task's verifier it is 24.8, 56.5, 83.1 and 96.0%; of 64 by one with a true
positive rate of .9 and a false one of .2 58.7%, and by the mean log-probability 37.0%. Of what it chooses of 64, 39%
was drawn once; so are 9% of all answers, of which 3% are right: what is rare misleads it. Two more runs, and no others:
with three times the steps and a cosine from 5e-4 the AUC is 0.655, but within a problem 0.539, and the best of 4 and of
64 30.0 and 17.0%; with a base that answers in steps, and labels of steps (`--config.learn.task=countdown:3:steps
--config.learn.labels=rollouts:4`), 0.621, 0.564, 29.6 and 16.0%. So it learns rather which problems are hard than which
answers are right. The first run takes 100 seconds of processor time.

Published of DeepSeekMath-RL 7B (arXiv 2402.03300): a rate of 1e-6, beta .04, 64 samples of each problem, answers of up
to 1,024 tokens, batches of 1,024, one update for each round of sampling; GSM8K 82.9 to 88.2%. Its value of the clip is
not stated; .2 is TRL's. `paper` has these sizes, for problems in a file of prompts and answers that are numbers. None
of it has been run.
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama

ROUNDS, UPDATES = 80, 2
STEPS = ROUNDS * UPDATES
CELLS = {
    "control": {"learn.method": "sft", "steps": STEPS * 5 // 3 // UPDATES * UPDATES},
    "expert": {"learn.method": "reject"},
    "grpo": {},
    "random": {"learn.reward": "random"},
}
# Of a base of four layers.
DEPTHS = {
    "base": {},
    "upscaled": {"plan": "upscale(base, 2:4, copies=1)"},
    "copies": {"plan": "upscale(base, 2:4, copies=1)", "train.layers": "copies"},
    "half": {"plan": "inherit(base, 2)"},
}


def get_config(arg: str = "") -> ConfigDict:
    v = variants(arg, size=("quick", "one", "search", "depth", "verifier", "smoke", "paper"), seed=0)
    if v["size"] == "paper":
        return _paper(v["seed"])
    smoke = v["size"] == "smoke"

    c = defaults("learn", small=True)  # jaxup/experiments/defaults.py has every key and its meaning
    c.seed = v["seed"]
    c.steps, c.batch_size = (8, 16) if smoke else (STEPS, 128)
    layers, width, mlp, heads = (2, 32, 64, 2) if smoke else (4, 64, 172, 4)
    c.model = llama(
        num_layers=layers, hidden_size=width, intermediate_size=mlp, num_heads=heads, num_kv_heads=heads,
        max_positions=64, vocab_size=0,
    )  # fmt: skip

    c.pretrain.steps, c.pretrain.batch_size = (20, 16) if smoke else (500, 128)
    c.pretrain.optimizer.update(learning_rate=3e-3, warmup_steps=5 if smoke else 30)
    c.learn.update(train=6000, test=300, updates=UPDATES)
    c.optimizer.update(learning_rate=1e-4, schedule="constant")
    c.eval.interval = c.checkpoint.interval = 1000
    c.eval.rows, c.eval.batch_size = (16, 16) if smoke else (300, 64)
    c.sample.tokens, c.sample.temperature, c.sample.top_k = 24, 1.0, 0
    if smoke:
        c.learn.update(train=200, test=20, problems=8, samples=4, clone_rounds=1)
        c.learn.update(eval_every=2, eval_problems=8, eval_samples=2, final_samples=8, slots=32)
    if v["size"] == "search":
        c.learn.update(task="countdown:3:steps", method="reject", search="beam", budget=512, compare=True)
        c.learn.final_problems = 100
    if v["size"] == "verifier":
        c.learn.update(method="verdict", problems=64, updates=4, final_problems=100)
        c.optimizer.learning_rate = 1e-3
    if v["size"] == "depth":
        c.learn.clone_rounds = 20
        c.steps = STEPS + 20 * UPDATES
    if v["size"] in ("quick", "depth"):
        c.study.cells, c.study.control = (CELLS, "control") if v["size"] == "quick" else (DEPTHS, "base")
        c.study.seeds, c.study.finding = (0, 1, 2), ("pass_1", "pass_64")
        c.study.also = ("grpo: expert", "grpo: random") if v["size"] == "quick" else ()
    return c


def _paper(seed: int) -> ConfigDict:
    c = defaults("learn", small=False)
    c.seed, c.steps, c.batch_size = seed, 1000, 1024
    c.base.path = "deepseek-ai/deepseek-math-7b-instruct"
    c.data.seq_len = 2048
    c.learn.update(task="PROBLEMS.jsonl:numeric", train=-1, test=-1, chat=True, max_tokens=1024, slots=512)
    c.learn.update(problems=16, samples=64, updates=1, eval_every=50, eval_problems=250, final_samples=16)
    c.optimizer.update(learning_rate=1e-6, schedule="constant")
    c.step.loss_chunk = 512
    c.eval.interval = c.checkpoint.interval = 50
    c.sample.tokens = 200
    return c
