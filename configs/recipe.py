"""Fine-tune a model on chats, in a grid of runs: "Unveiling the Secret Recipe" (Pareja et al. 2024), arXiv 2412.13337.

    python -m jaxup.train --config=recipe.py:quick                       # batch x learning rate, here
    python -m jaxup.train --config=recipe.py --config.base.path=org/Name-7B \\
        --config.data.files=knowledge.jsonl,foundational.jsonl,skills.jsonl      # the paper's grid, for a pod

Nothing of the model's depth changes: the plan is empty. Which runs there are is the section `study`; each is one of
kind `heal`, and all have the same base, data and number of samples.

Studies, after a colon and with commas:

    grid                   (default) batches x learning rates, constant and without warmup. The paper's: 128, 3840 and
                           7680 samples; 1e-6, 5e-6, 2e-5, 3e-5, 4e-5, 6e-5, 8e-5, 1e-4
    schedule               constant against warmup and linear decay, each at three learning rates
    phases                 all data mixed against phases, one for each entry of data.files: knowledge, then foundational
                           skills, then others, each with a replay of those before; and against the split by difficulty:
                           the shorter half of the answers, then the longer one and 1% of the first
    methods                the paper's three recipes: `stacked`, the middle batch, constant, all mixed (LAB's settings);
                           `phased`, the same in phases; `tulu`, the small batch with warmup and linear decay

and, with any of these,

    quick                  a LLaMA of 4 layers, trained here first on Python's standard library, is fine-tuned on what
                           its docstrings say (knowledge), questions about them with short answers (foundational) and
                           functions to write (skills); 3 seeds, each with a base of its own
    smoke                  the same path with next to no data, for tests
    seeds=N                how many seeds there are (default 1; quick: 3)
    epochs=N               (default 2; quick: 1)
    lr=F                   learning rate of all but the grid (default 2e-5; quick: 1e-3)

Default sizes are packed rows of 4,096 tokens: a sample has about 546, so 16, 512 and 1,024 rows a step hold 128, 3840
and 7680 of them. They have not been run: they need accelerators and a model.

What the paper found, for models of 3 to 7 billion parameters: (i) larger batches with lower learning rates score
better; Granite 7B has MTBench 6.83 with 7680 samples and 6.41 with 128, and its best rate is 2e-5, Mistral's 1e-6;
(ii) among runs at the same step, lower gradient norms and higher losses early on go with better final models, so that
poor ones can be stopped; (iii) a constant rate without warmup loses nothing; (iv) all data mixed is as good as phases,
or better. No absolute threshold is published, and both signals are partly mechanical: a large batch has a smaller
gradient by averaging, and a low rate a higher loss for lack of progress. So compare at the same number of samples, and
within one batch size first; between them with what `step.noise_scale` logs (on in quick), which needs a number of
micro-batches, `step.accumulation`, for all cells. Of LLaMA 3B, in percent but for MTBench:

    method    MMLU   ARC   GSM8K   MTBench
    stacked   57     78    51      5.00
    phased    53     75    45      4.30
    tulu      55     74    49      4.97

The quick grid, three seeds, on 2 cores of an AMD EPYC, Python 3.11, jax 0.10.2 (36 runs, about 24 minutes of processor
time). Mean validation loss in nats per loss token; spreads are .001 to .015, at 1.6e-2 .06 to .28:

    rows a step   steps   2.5e-4   1e-3    4e-3    1.6e-2
    4             156     3.764    3.691   3.856   4.862
    16             39     3.862    3.748   3.772   5.088
    32             20     3.923    3.801   3.812   5.408

So (i) is not seen here: the small batch is the better one, at its best rate. It takes eight times as many steps of the
same samples, and few steps are what a quick run lacks. Nor is (ii), among runs of one batch size and seed: Spearman's
correlation of the early gradient norm with the loss at the end is .24 (95% -.33 to .60, after 20%; as published it
would be above 0), and that of the early training loss .91 (.50 to 1.00), where it would have to be below 0: who is
worse early ends worse, by rates that are too high or too low. `norms` would have stopped nobody.

`--config.study.stop=norms` stops poor runs as (ii) suggests, and `halving` by validation loss, which is what the
former has to be compared with.
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import variants
from jaxup.experiments.defaults import defaults, llama


def get_config(arg: str = "") -> ConfigDict:
    v = variants(
        arg, size=("default", "quick", "smoke"), study=("grid", "schedule", "phases", "methods"), seeds=0, epochs=0,
        lr=0.0,
    )  # fmt: skip
    smoke, small = v["size"] == "smoke", v["size"] != "default"
    batches, rates = (16, 512, 1024), (1e-6, 5e-6, 2e-5, 3e-5, 4e-5, 6e-5, 8e-5, 1e-4)
    rate, decay = v["lr"] or 2e-5, {"optimizer.schedule": "linear", "optimizer.warmup_steps": 100}
    if small:
        batches, rates = (4, 16, 32), (2.5e-4, 1e-3, 4e-3, 1.6e-2)
        rate, decay["optimizer.warmup_steps"] = v["lr"] or 1e-3, 4
    if smoke:
        batches, rates = batches[:2], rates[1:3]

    c = defaults("heal", small=small)
    c.epochs = v["epochs"] or (1 if small else 2)
    c.batch_size = batches[1]
    c.optimizer.update(learning_rate=rate, schedule="constant", weight_decay=0.0)
    c.study.seeds = tuple(range(v["seeds"] or (3 if v["size"] == "quick" else 1)))
    match v["study"]:
        case "grid":
            c.study.axes = f"batch_size: {_words(batches)}; optimizer.learning_rate: {_words(rates)}"
        case "schedule":
            c.study.cells = {"constant": {}, "decay": decay}
            c.study.axes = f"optimizer.learning_rate: {_words((rate / 4, rate, rate * 4))}"
        case "phases":
            c.study.cells = {"stacked": {}, "phased": {"data.phases": "files"},
                             "difficulty": {"data.phases": "difficulty"}}  # fmt: skip
        case "methods":
            c.study.cells = {"stacked": {}, "phased": {"data.phases": "files"},
                             "tulu": {"batch_size": batches[0], **decay}}  # fmt: skip

    c.model = llama(
        num_layers=4, hidden_size=64, intermediate_size=176, num_heads=4, num_kv_heads=2, max_positions=256,
        vocab_size=0,
    )  # fmt: skip
    if small:
        c.step.update(accumulation=2, noise_scale=True)
        c.compute.unroll = 1  # each batch size is compiled anew, and few steps follow
        c.pretrain.steps = 10 if smoke else 300
        c.pretrain.data.tokenizer = "bpe:512" if smoke else "bpe:1024"
        c.pretrain.optimizer.update(learning_rate=3e-3, end_learning_rate=3e-4, warmup_steps=5 if smoke else 30)
        c.pretrain.optimizer.weight_decay = 0.0
        count = 60 if smoke else 500
        c.data.files = f"docstrings:knowledge:{count},docstrings:{2 * count},docstrings:code:{count}"
        c.data.format = "metharme"
        c.data.seq_len = 256
        c.data.val_fraction = 0.1
        c.eval.rows = 16 if smoke else 64
        c.eval.batch_size = 16
    else:
        c.step.loss_chunk = 512

    c.eval.interval = 50
    c.log.interval = 1  # of which poor runs are told
    c.checkpoint.interval = 1000 if small else 25
    c.checkpoint.keep = 1
    c.sample.prompt = "What does `os.path.join(a, *p)` do?" if small else "What is the depth of a model?"
    c.sample.tokens = 40 if small else 200
    c.sample.temperature, c.sample.top_k = 0.0, 0
    return c


def _words(values: tuple[float, ...]) -> str:
    return " ".join(map(str, values))
