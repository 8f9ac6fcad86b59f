"""Outcomes of runs that nobody ran."""

import numpy as np

from jaxup.experiments.outcomes import Outcome


def outcome(cell, seed=0, score=3.0, *, steps=100, batch_size=8, flops=1e9, curve=None, loss=1.0, norm=1.0, **more):
    """Of a run that logged each of its steps; `loss` and `norm` are of all steps, or of each."""
    at = np.arange(1, steps + 1)
    curve = ((0, score + 1), (steps, score)) if curve is None else curve
    loss, norm = (np.broadcast_to(np.asarray(values, float), steps) for values in (loss, norm))
    values = {
        "cell": cell, "seed": seed, "group": f"{batch_size} {seed}", "score": score, "steps": steps,
        "planned": steps, "batch_size": batch_size, "tokens": steps * batch_size * 32, "flops": flops,
        "seconds": 1.0, "curve": curve, "samples_N": at * batch_size, "flops_N": at / steps * flops, "loss_N": loss,
        "norm_N": norm,
    }  # fmt: skip
    values |= more
    return Outcome(**({"costs": {f"{cell}-{seed}/model": (values["tokens"], values["flops"])}} | values))
