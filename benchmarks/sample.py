"""Sampling: tokens a second of many samples of some prompts, beside transformers' `generate`.

    python benchmarks/sample.py
    python benchmarks/sample.py --hidden 64 --layers 6 --heads 4 --vocab 32 --length 40   # a model of 0.3M parameters
    python benchmarks/sample.py --quick                                                   # does it still run?

One LLaMA, with the same weights everywhere, draws `--samples` answers to each of `--prompts` prompts at temperature 1,
in float32 on CPU:

    jaxup             `Sampler`: a prompt is computed once for all of its samples
    jaxup, no sharing the same, where each sample has a prompt of its own, of the same length
    transformers      `generate(num_return_sequences=samples)`, the prompts padded on the left, `--batch` rows at a time

without an end, so that all answers have `--length` tokens, and with ends: so many tokens of the vocabulary end an
answer that half of all answers are over after `--length` / 4. They take turns, `--rounds` times; figures are medians
of the tokens that are in answers, a second, after one round that is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import numpy as np

QUICK = {"prompts": 4, "samples": 4, "length": 12, "hidden": 32, "layers": 2, "vocab": 64, "slots": 8, "rounds": 1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, unless they are given")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="of each prompt")
    parser.add_argument("--prompt-length", type=int, default=48, help="tokens of the longest; the shortest has half")
    parser.add_argument("--length", type=int, default=64, help="tokens of the longest answer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4, help="half as many KV heads")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=256, help="rows of the sampler")
    parser.add_argument("--batch", type=int, default=1024, help="rows of transformers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args, _ = parser.parse_known_args()
    if args.quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def contestants(a: argparse.Namespace, ends: frozenset[int]):
    """By name, what draws all answers and says how many tokens are in them."""
    import jax
    import torch
    from flax import nnx
    from transformers import LlamaForCausalLM

    import jaxup
    from jaxup.model.config import ModelConfig
    from jaxup.model.decoder import abstract, init
    from jaxup.model.sampling import Request, Sampler

    torch.set_num_threads(a.threads)
    room = a.prompt_length + a.length
    config = ModelConfig.llama(
        vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=3 * a.hidden, num_layers=a.layers,
        num_heads=a.heads, num_kv_heads=max(1, a.heads // 2), max_positions=room,
    )  # fmt: skip
    params = jax.jit(init, static_argnums=0)(config, 0)
    with tempfile.TemporaryDirectory() as directory:
        jaxup.save(nnx.merge(abstract(config)[0], params), f"{directory}/model")
        theirs = LlamaForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    lengths = rng.integers(a.prompt_length // 2, a.prompt_length + 1, a.prompts)
    prompts = [tuple(rng.integers(0, a.vocab, length).tolist()) for length in lengths]
    how = dict(slots=a.slots, length=room, temperature=1.0, top_k=0, top_p=1.0, vocab_size=a.vocab)
    sampler = Sampler(config, params, **how)

    own = {
        (i, s): tuple(rng.integers(0, a.vocab, len(p)).tolist())
        for i, p in enumerate(prompts)
        for s in range(a.samples)
    }

    def drawn(seed, prompt_of):
        return sum(len(drawn.tokens) for drawn in sampler([
            Request(prompt_of(i, s), (seed, i, s), a.length, ends) for i in range(a.prompts) for s in range(a.samples)
        ]))  # fmt: skip

    def generate(seed):
        torch.manual_seed(seed)
        each, count = max(1, a.batch // a.samples), 0
        for start in range(0, a.prompts, each):
            some = prompts[start : start + each]
            longest = max(map(len, some))
            tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in some])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some])
            with torch.inference_mode():
                out = theirs.generate(
                    tokens, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                    num_return_sequences=a.samples, max_new_tokens=a.length, pad_token_id=0 if not ends else min(ends),
                    eos_token_id=sorted(ends) or None,
                )[:, longest:]  # fmt: skip
            over = torch.isin(out, torch.tensor(sorted(ends), dtype=out.dtype))
            count += int((over.cumsum(1) - over.long() == 0).sum())  # up to the first end, and with it
        return count

    return {
        "jaxup": lambda seed: drawn(seed, lambda i, s: prompts[i]),
        "jaxup, no sharing": lambda seed: drawn(seed, lambda i, s: own[i, s]),
        f"transformers, {a.batch} rows": generate,
    }


def main() -> None:
    a = arguments()
    # An untrained model draws each token about as often: half of all answers are over after a quarter of their length.
    few = max(1, round(a.vocab * (1 - 0.5 ** (4 / a.length))))
    print(f"{a.layers} layers of {a.hidden}, {a.vocab} tokens; {a.prompts} x {a.samples} answers; {a.threads} threads")
    for what, ends in (("without an end", frozenset()), (f"{few} tokens end an answer", frozenset(range(few)))):
        draws = contestants(a, ends)
        speeds: dict[str, list[float]] = {name: [] for name in draws}
        tokens = 0
        for number in range(a.rounds + 1):
            for name, draw in draws.items():
                began = time.monotonic()
                tokens = draw(number)
                if number:  # the first makes programs
                    speeds[name].append(tokens / (time.monotonic() - began))
        medians = {name: statistics.median(each) for name, each in speeds.items()}
        theirs = list(medians.values())[-1]
        print(f"{what}: {tokens / a.prompts / a.samples:.1f} tokens an answer")
        for name, median in medians.items():
            spread = f"{min(speeds[name]):,.0f}-{max(speeds[name]):,.0f}"
            print(f"  {name:24} {median:10,.0f} tokens/s ({spread})  {median / theirs:5.2f} x transformers")


if __name__ == "__main__":
    main()
