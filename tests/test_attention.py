"""Each implementation of attention against its formula in float64; `test_gpu.py` and `test_tpu.py` have what is theirs.

`test_model.py` has which is chosen, and what models keep of it.
"""

import functools
import itertools

import exact
import jax
import numpy as np
import pytest

from jaxup.model.attention import attention

SEQ = 300


def check(implementation, *, heads, kv_heads, head_dim, seq=SEQ, window=None, segments=None, steps=None, batch_axes=()):
    """The value and the gradients; returns the value."""
    rng = np.random.default_rng(0)
    shapes = [(2, seq, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, cotangent = (rng.standard_normal(shape, np.float32) for shape in shapes)
    q *= np.float32(head_dim**-0.5)
    asked = {"window": window, "segment_ids": segments, "steps": steps}

    @jax.jit
    def run(q, k, v, cotangent, segments, steps):
        how = {"window": window, "segment_ids": segments, "steps": steps}
        how |= {"implementation": implementation, "batch_axes": batch_axes}
        out, back = jax.vjp(functools.partial(attention, **how), q, k, v)
        return out, *back(cotangent)

    found, want = run(q, k, v, cotangent, segments, steps), exact.attention(q, k, v, cotangent, **asked)
    # A sum of n products rounds n times, to within 2^-24 of the sum so far: a third of that squared on average, and the
    # square of the sum so far is half of the last. Independent, they add up to 2^-24 * sqrt(n / 6) of the sum. In a
    # gradient are two sums over a head, that of softmax and that of its derivative over the keys, and the last, over as
    # many queries as there are for a key; another 16 roundings are left for what is done to each logit alone.
    sums = 2 * head_dim + (2 + heads // kv_heads) * seq + 16
    bound = 2**-24 * np.sqrt(sums / 6)
    # With a window of one the gradients of q and k are zero: products of cotangent and value, less themselves.
    size = lambda x: np.linalg.norm(x) or np.linalg.norm(cotangent) * head_dim**0.5  # noqa: E731
    errors = [np.linalg.norm(np.float64(a) - b) / size(b) for a, b in zip(found, want, strict=True)]
    print(implementation, *(f"{error / bound:.2f}" for error in errors), f"{np.abs(found[0] - want[0]).max():.1e}")
    assert max(errors) < bound
    # Where a row has few keys, an element is as far off as a logit is; the worst of 10^5 is five times as far.
    np.testing.assert_allclose(found[0], want[0], atol=max(1e-6, 2e-7 * head_dim**0.5))
    return found[0]


WINDOWS = (None, 1, 5, 200)


@pytest.mark.parametrize(
    ("implementation", "block", "segmented", "window", "sizes"),
    [
        *(("blocked", 128, *case, (4, 2, 4)) for case in [(False, None), (True, 1), (True, 5), (False, 200)]),
        *(
            pytest.param("blocked", 128, *case, (4, 2, 4), marks=pytest.mark.slow)
            for case in [(True, None), (False, 1), (False, 5), (True, 200)]
        ),
        *(("blocked", 8, *case, (4, 2, 4)) for case in [(False, None), (True, 5)]),
        pytest.param("blocked", 8, True, 200, (4, 2, 4), marks=pytest.mark.slow),
        ("xla", 128, False, None, (4, 2, 4)),
        ("xla", 128, True, 5, (4, 2, 4)),
        *(
            pytest.param(implementation, block, *case, sizes, marks=pytest.mark.slow)
            for implementation, block in [("xla", 128), ("blocked", 128), ("blocked", 8)]
            for case in itertools.product([False, True], WINDOWS)
            for sizes in [(6, 1, 100), (3, 3, 128)]
        ),
    ],
)
def test_without_a_kernel(implementation, block, segmented, window, sizes, monkeypatch):
    """Three blocks, the last one short; and 38, which are loops."""
    monkeypatch.setattr("jaxup.model.attention._BLOCK", block)
    index = np.arange(SEQ, dtype=np.int32)
    segments = np.stack([index // 70, index // 256]) if segmented else None
    heads, kv_heads, head_dim = sizes
    check(implementation, heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=window, segments=segments)


@pytest.mark.parametrize(
    ("implementation", "block", "steps", "segmented", "window"),
    [
        ("blocked", 128, "images", True, 200),
        ("blocked", 8, "images", True, 5),
        ("xla", 128, "one", False, None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(["xla", "blocked"], [128, 8], ["images", "one"], [False, True], [None, 1, 70])
        ),
    ],
)
def test_by_steps(implementation, block, steps, segmented, window, monkeypatch):
    """Runs of one step between others, some of them before what is lower; and one step, which sees itself whole."""
    monkeypatch.setattr("jaxup.model.attention._BLOCK", block)
    index = np.arange(SEQ, dtype=np.int32)
    segments = np.stack([index // 70, index // 256]) if segmented else None
    of = {"one": 0 * index[None], "images": np.stack([np.where(index % 50 < 20, index // 50 * 50, index), -index // 9])}
    check(implementation, heads=4, kv_heads=2, head_dim=4, window=window, segments=segments, steps=of[steps])


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "segmented", "window"),
    [
        (100, 4, 2, True, 100),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [
            (64, 4, 4, False, None), (64, 4, 1, True, None), (128, 4, 2, True, None), (128, 4, 1, False, 70),
            (80, 6, 2, False, 1), (256, 4, 2, True, 130), (100, 8, 4, True, 1), (128, 4, 4, False, 1000),
        ]),
    ],
)  # fmt: skip
def test_the_kernel_for_tpus(head_dim, heads, kv_heads, segmented, window, monkeypatch):
    """Interpreted, each device with its rows and heads; two blocks, the last of which is not full."""
    monkeypatch.setattr("jaxup.model.attention._TPU_BLOCK", 128)
    monkeypatch.setattr("jaxup.model.attention._TPU_FUSED", 1 if head_dim == 128 else 2)
    seq, index = 200, np.arange(200, dtype=np.int32)
    segments = np.stack([1 + index // 70, index < 150]).astype(np.int32) if segmented else None
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "seq": seq}
    axes = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=axes, devices=jax.devices()[:4])):
        out = check("splash", **sizes, window=window, segments=segments, batch_axes=("data",))
    assert out.sharding.shard_shape(out.shape) == (1, seq, heads // 2 if kv_heads > 1 else heads, head_dim)
