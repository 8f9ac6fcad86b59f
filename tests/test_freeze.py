"""What trains, and that nothing else changes by a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxup.depth.freeze import only, trainable
from jaxup.depth.plan import ZEROED, DepthPlan, Row
from jaxup.errors import UserError

PLAN = DepthPlan(
    (Row("m", 0), Row("m", 1), Row("m", 1, "copy", ZEROED), Row("m", 1, "copy"), Row("m", 2, "new", parts=())),
    "m", None, "m", "m", (("m", 3),),
)  # fmt: skip


def params(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    blocks = {"self_attn": {"o_proj": {"kernel": draw(5, 2, 3), "bias": draw(5, 3)}},
              "mlp": {"up_proj": {"kernel": draw(5, 3, 4)}, "down_proj": {"kernel": draw(5, 4, 3)}}}  # fmt: skip
    return {"blocks": blocks, "embed_tokens": draw(7, 3), "norm": {"scale": draw(3)}}


@pytest.mark.parametrize(
    ("layers", "rows", "ends"),
    [("all", [0, 1, 2, 3, 4], True), ("copies", [2, 3], False), ("originals", [0, 1], True), ("new", [4], False),
     ("1:3, 4", [1, 2, 4], False), ([0, 3], [0, 3], False)],
)  # fmt: skip
@pytest.mark.parametrize("parameters", ["", "o_proj|down_proj"])
def test_masks(layers, rows, ends, parameters):
    masks = trainable(PLAN, params(), layers=layers, parameters=parameters)
    for path, mask in jax.tree_util.tree_leaves_with_path(masks):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        named = not parameters or "o_proj" in name or "down_proj" in name
        if name.startswith("blocks."):
            assert mask.shape[0] == 5
            assert np.flatnonzero(mask).tolist() == (rows if named else [])
        else:
            assert mask.shape == ()
            assert mask == (ends and named)


def test_frozen_parameters_keep_every_bit():
    before = params()
    before["blocks"]["mlp"]["up_proj"]["kernel"][0, 0] = -0.0
    masks = trainable(PLAN, before, layers="copies", parameters="proj.kernel")
    optimizer = optax.chain(optax.adamw(1e-2, weight_decay=0.1), only(masks))
    free = optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def step(params, state, other, other_state):
        grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
        updates, state = optimizer.update(grads, state, params)
        others, other_state = free.update(grads, other_state, params)
        return optax.apply_updates(params, updates), state, optax.apply_updates(params, others), other_state

    after, state, other, other_state = before, optimizer.init(before), before, free.init(before)
    for _ in range(3):
        after, state, other, other_state = step(after, state, other, other_state)

    def check(mask, old, new, unfrozen):
        old, new, unfrozen, mask = (np.broadcast_to(a, old.shape) for a in (old, new, unfrozen, mask))
        np.testing.assert_array_equal(new[~mask].view(np.uint32), old[~mask].view(np.uint32))
        np.testing.assert_array_equal(new[mask], unfrozen[mask])
        assert (new[mask] != old[mask]).all()

    jax.tree.map(check, masks, before, after, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layers": "copeis"}, "did you mean 'copies'?"), ({"layers": "3:6"}, "layers 0:5, half open"),
     ({"layers": "3:3"}, "half open"), ({"layers": [-1]}, "no layer"),
     ({"parameters": "("}, "not a regular expression"),
     ({"parameters": "o_prj"}, "no parameter's path contains 'o_prj'")],
)  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(UserError, match="freeze: ") as error:
        trainable(PLAN, params(), **options)
    assert message in str(error.value)
    none = DepthPlan((Row("m", 0),), *["m"] * 4, (("m", 1),))
    with pytest.raises(UserError, match="no layers are copies"):
        trainable(none, params(), layers="copies")
