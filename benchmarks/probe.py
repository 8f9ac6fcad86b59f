"""The loss without each layer, and without each run of layers: what it takes `jaxup.probe`, and a plain loop.

    python benchmarks/probe.py
    python benchmarks/probe.py --layers 24 --hidden 1024 --heads 16 --seq 512

The loop runs the model whole for each run that is left out, from the embedding on, through the decoder's `order`: it
passes over what is skipped as well, and all its orders share a program. `jaxup.probe` keeps the hidden states before
each layer. Both compute the same losses, which is checked, of the same batch; the first call of each is not timed, and
they take turns. A layer pass is a batch that goes forward through a layer.
"""

from __future__ import annotations

import argparse
import statistics
import time


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxup.lens.probe_layers import Layers
    from jaxup.model.config import ModelConfig
    from jaxup.model.decoder import Decoder, init

    config = ModelConfig.llama(
        vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=8 * a.hidden // 3 // 8 * 8, num_layers=a.layers,
        num_heads=a.heads, num_kv_heads=a.heads, max_positions=a.seq,
    )  # fmt: skip
    model = Decoder(config, jax.jit(init, static_argnums=0)(config, 0))
    rows = np.random.default_rng(0).integers(0, a.vocab, (a.batch, a.seq + 1), np.int32)
    tokens, targets = rows[:, :-1], rows[:, 1:]

    def shared(longest: int):
        layers = Layers(model)
        found = layers.run_losses(layers.states(tokens)[0], targets, longest)
        wanted = {run: found[run] for run in runs(longest)}
        return jax.block_until_ready(wanted), layers.passes

    def plain(longest: int):
        layers = Layers(model)
        found = {
            (first, count): layers.order_loss(
                tokens, targets, [*range(first), *range(first + count, a.layers)]
            ) for first, count in runs(longest)
        }  # fmt: skip
        return jax.block_until_ready(found), layers.passes

    def runs(longest: int):
        return [(l, n) for l in range(a.layers) for n in range(1, min(longest, a.layers - l) + 1)]  # noqa: E741

    print(f"{a.layers} layers of {a.hidden}, {a.batch} rows of {a.seq}, {jax.devices()[0].device_kind}")
    for what, longest in (("each layer", 1), ("all runs", a.layers)):
        seconds: dict[str, list[float]] = {"probe": [], "loop": []}
        for timed in range(a.rounds + 1):
            for name, measure in (("probe", shared), ("loop", plain)):
                began = time.monotonic()
                found, passes = measure(longest)
                if timed:
                    seconds[name].append(time.monotonic() - began)
                if name == "probe":
                    ours, of_ours = found, passes
        for run, loss in found.items():
            assert jnp.abs(loss - ours[run]) < 1e-4, run
        mine, theirs = statistics.median(seconds["probe"]), statistics.median(seconds["loop"])
        print(
            f"{what}, {len(found)} losses: {of_ours:,} layer passes in {mine:.2f} s, the loop {passes:,} in "
            f"{theirs:.2f} s: {of_ours / passes:.2f} of the passes, {mine / theirs:.2f} of the time"
        )
    print(f"N^3 / 6 = {a.layers**3 // 6:,}")


if __name__ == "__main__":
    main()
