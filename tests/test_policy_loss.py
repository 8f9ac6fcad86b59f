"""Objectives of sampled answers: TRL's losses and gradients, closed forms, and all strings of a tiny vocabulary."""

import dataclasses
import functools
import importlib.util
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import log_softmax

from jaxup.errors import UserError
from jaxup.learning.objective import PolicyLoss, PreferenceLoss, VerdictLoss, head, objective
from jaxup.learning.scoring import score
from jaxup.learning.weights import METHODS
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import abstract, init
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import flops_per_token
from jaxup.training.loss import log_probs
from jaxup.training.objective import TEXT
from jaxup.training.sharding import BATCH_AXES, MeshConfig, batch_sharding, make_mesh, place_batch
from jaxup.training.step import StepConfig, TrainState, make_train_step

ORACLE = os.path.join(os.path.dirname(__file__), "oracles", "trl_losses.py")
HOW = {"chunk": 4, "z_loss": 0.0, "batch_axes": ()}
SAMPLING = {"temperature": 1.0, "normaliser": "tokens"}


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


# ---- log-probabilities in chunks


def example(rows=2, length=9, width=8, vocab=33, seed=0):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((rows, length, width)), rng.standard_normal((width, vocab))
    return x, kernel, rng.integers(0, vocab, (rows, length), dtype=np.int32), rng.standard_normal((rows, length))


def by_hand(x, kernel, targets, cotangents, temperature):
    """(log-probabilities, entropies, dx, dkernel) in float64."""
    logp = log_softmax(x @ kernel / temperature, axis=-1)
    dlogits = cotangents[..., None] * (np.eye(kernel.shape[1])[targets] - np.exp(logp)) / temperature
    taken = np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    return taken, -(np.exp(logp) * logp).sum(-1), dlogits @ kernel.T, np.einsum("bsd,bsv->dv", x, dlogits)


@functools.partial(jax.jit, static_argnames=("chunk", "temperature", "batch_axes"))
def differentiated(x, kernel, targets, cotangents, **how):
    found, back = jax.vjp(lambda x, kernel: log_probs(x, kernel, targets, **how), x, kernel)
    return *found, *back((cotangents, jnp.ones_like(cotangents)))


@pytest.mark.parametrize(("chunk", "temperature"), [(4, 0.7), (9, 1.0), (100, 1.6)])
def test_log_probabilities_are_those_of_float64(chunk, temperature):
    """Cotangents have both signs; what flows into the entropy is nothing."""
    inputs = example()
    want = by_hand(*inputs, temperature)
    x, kernel, targets, cotangents = inputs
    given = jnp.float32(x), jnp.float32(kernel), targets, jnp.float32(cotangents)
    got = differentiated(*given, chunk=chunk, temperature=temperature)
    for one, exact in zip(got, want, strict=True):
        assert one.dtype == jnp.float32
        assert relative(one, exact) < 2e-6  # sums of 8 and of 33 numbers of float32


def test_log_probabilities_of_bfloat16_are_summed_in_float32():
    x, kernel, targets, cotangents = example()
    x = jnp.bfloat16(x)
    got = differentiated(x, jnp.float32(kernel), targets, jnp.float32(cotangents), chunk=4, temperature=0.7)
    low = np.float64(jnp.bfloat16(kernel))
    want = by_hand(np.float64(x), low, targets, cotangents, 0.7)
    assert [a.dtype.name for a in got] == ["float32", "float32", "bfloat16", "float32"]
    for one, exact in zip(got[:2], want[:2], strict=True):  # of what is rounded before
        assert relative(one, exact) < 2e-6
    for one, exact in zip(got[2:], want[2:], strict=True):  # dlogits are rounded to 8 bits
        assert relative(np.float64(one), exact) < 2**-8


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "context": 2}])
def test_log_probabilities_on_a_mesh(sizes):
    x, kernel, targets, cotangents = example(rows=8, length=12, width=16, vocab=64)
    given = np.float32(x), np.float32(kernel), targets, np.float32(cotangents)
    want = differentiated(*given, chunk=3, temperature=0.7)
    mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | sizes))
    rows = batch_sharding(mesh)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(given, (rows, split, rows, rows))
        got = differentiated(*placed, chunk=3, temperature=0.7, batch_axes=BATCH_AXES)
    # Each position is computed as on one device; the kernel's gradient is summed in another order.
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# ---- objectives on given hidden states


def loss_and_gradients(loss, x, kernel, batch, beside=None):
    """(what is minimised, dx, dkernel, what is reported) of `loss`, where `x` is what the head is applied to."""
    batch = {name: np.asarray(a, np.int32 if "targets" in name else np.float32) for name, a in batch.items()}
    return _graded(loss, kernel.shape, beside is not None)(jnp.float32(x), jnp.float32(kernel), batch, beside or {})


@functools.cache
def _graded(loss_of, shape, with_head):
    width, vocab = shape
    config = ModelConfig.llama(
        vocab_size=vocab, hidden_size=width, intermediate_size=width, num_layers=1, num_heads=1, num_kv_heads=1,
        max_positions=16, tie_embeddings=False,
    )  # fmt: skip
    graphdef, shapes = abstract(config)

    def loss(x, kernel, batch, beside):
        params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes) | {"lm_head": {"kernel": kernel}}
        decoder = nnx.merge(graphdef, params)
        if with_head:
            decoder.beside = nnx.data(jax.tree.map(nnx.Param, beside))
        batch, count = loss_of.weighed(batch)
        hidden = lambda tokens, **where: x.reshape(*tokens.shape, -1)  # noqa: E731
        total, named = loss_of.sums(decoder, hidden, batch, HOW)
        return total / count, {name: one / of for name, (one, of) in named.items()}

    return jax.jit(jax.value_and_grad(loss, (0, 1, 3), has_aux=True))


def rows(mask, targets, **fields):
    shape = np.shape(mask)
    return {"tokens": np.zeros(shape, np.int32), "targets": targets, "loss_weights": mask} | {
        name: np.broadcast_to(a if np.ndim(a) == 2 or np.ndim(a) == 0 else np.asarray(a)[:, None], shape)
        for name, a in fields.items()
    }


# ---- TRL


@functools.cache
def oracle():
    spec = importlib.util.spec_from_file_location("trl_losses", ORACLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with open(module.RECORDED) as f:
        return module, json.load(f)


LOW, HIGH = 0.2, 0.28
CLIP = {"clip_low": LOW, "clip_high": HIGH, "temperature": 0.7}
GRPO = {"normaliser": "sequence", "ratio": "token"} | CLIP
OURS = {
    "grpo": GRPO,
    "bnpo": GRPO | {"normaliser": "tokens"},
    "dapo": GRPO | {"normaliser": "tokens"},
    "dr_grpo": GRPO | {"normaliser": "length", "max_tokens": 8},
    "grpo with a KL": GRPO | {"beta": 0.3},
    "dapo with a KL and two-sided clipping": GRPO | {"normaliser": "tokens", "beta": 0.3, "clip_dual": 1.4},
    "gspo": GRPO | {"ratio": "sequence"},
    "rloo": GRPO | {"ratio": "product"},
}


@pytest.mark.parametrize("case", OURS)
def test_policy_losses_are_trls(case):
    """Loss, gradients and what is reported; TRL's are of float64."""
    record = oracle()[1]
    inputs, want = (
        {name: np.array(a) for name, a in part.items()} for part in (record["inputs"], record["losses"][case])
    )
    batch = rows(
        inputs["mask"], inputs["targets"], advantages=inputs["advantages"], old_logp=inputs["old"],
        reference_logp=inputs["reference"],
    )  # fmt: skip
    (loss, means), (dx, dkernel, _) = loss_and_gradients(PolicyLoss(**OURS[case]), inputs["x"], inputs["kernel"], batch)
    # 14 tokens, of each a logsumexp and an exponential: a few roundings of 6e-8, and sums with both signs.
    assert abs(loss - want["loss"]) < 1e-6
    assert relative(dx, want["x"]) < 2e-6
    assert relative(dkernel, want["kernel"]) < 2e-6
    assert relative(means["entropy"], want["entropy"]) < 1e-6
    if "kl" in want:
        assert relative(means["kl"], want["kl"]) < 2e-6
    if OURS[case]["ratio"] == "token":
        assert relative(means["clipped"], want["clip_ratio/region_mean"]) < 1e-6
        assert means["clipped"] > 0


def test_dpo_is_trls():
    record = oracle()[1]
    inputs, want = (
        {name: np.array(a) for name, a in part.items()} for part in (record["inputs"], record["losses"]["dpo"])
    )
    first, second = ({name: a[half] for name, a in inputs.items() if np.ndim(a) > 1 and name != "kernel"}
                     for half in (slice(0, 2), slice(2, 4)))  # fmt: skip
    batch = rows(first["mask"], first["targets"]) | {
        "rejected_tokens": np.zeros(second["mask"].shape, np.int32), "rejected_targets": second["targets"],
        "rejected_weights": second["mask"], "reference_chosen": (first["mask"] * first["reference"]).sum(1),
        "reference_rejected": (second["mask"] * second["reference"]).sum(1),
    }  # fmt: skip
    x = np.stack([first["x"], second["x"]], axis=1).reshape(inputs["x"].shape)
    (loss, means), (dx, dkernel, _) = loss_and_gradients(
        PreferenceLoss(beta=0.4, temperature=1.0), x, inputs["kernel"], batch
    )
    wanted = want["x"].reshape(2, 2, *want["x"].shape[1:]).swapaxes(0, 1).reshape(dx.shape)
    assert abs(loss - want["loss"]) < 2e-6
    assert abs(means["margin"] - want["rewards/margins"]) < 2e-6
    assert means["accuracy"] == want["rewards/accuracies"]
    assert relative(dx, wanted) < 2e-6
    assert relative(dkernel, want["kernel"]) < 2e-6


def test_trl_gives_what_is_recorded():
    pytest.importorskip("trl")
    module, record = oracle()
    assert module.make_inputs() == record["inputs"]
    for name, case in module.CASES.items():
        found = module.trl_loss(*case, record["inputs"])
        assert found.keys() == record["losses"][name].keys()
        for key, value in found.items():
            np.testing.assert_allclose(value, record["losses"][name][key], rtol=1e-6, atol=1e-9)


# ---- closed forms


def some(seed=0):
    """x, kernel, targets, float64 log-probabilities, and a mask of answers of several lengths."""
    x, kernel, targets, advantages = example(rows=4, length=6, width=4, vocab=7, seed=seed)
    mask = np.arange(6)[None] < np.array([6, 3, 1, 4])[:, None]
    return x, kernel, targets, by_hand(x, kernel, targets, advantages, 1.0)[0], mask, advantages


def test_the_gradient_is_zero_where_the_ratio_is_beyond_the_clip_and_only_there():
    x, kernel, targets, logp, _, _ = some()
    ratios = np.resize([0.3, 0.79, 0.81, 1.0, 1.27, 1.29, 2.9, 3.1], (4, 6))
    A = np.resize([1.0, -1.0, 0.0, 2.0, -2.0], (4, 6))
    batch = rows(np.ones((4, 6)), targets, advantages=A, old_logp=logp - np.log(ratios))
    for dual in (0.0, 3.0):
        loss = PolicyLoss(ratio="token", clip_low=LOW, clip_high=HIGH, clip_dual=dual, **SAMPLING)
        (_, means), (dx, _, _) = loss_and_gradients(loss, x, kernel, batch)
        clipped = ((A > 0) & (ratios > 1 + HIGH)) | ((A < 0) & (ratios < 1 - LOW))
        constant = clipped | ((A < 0) & (dual > 0) & (ratios > dual)) | (A == 0)
        np.testing.assert_array_equal(np.all(dx == 0, axis=-1), constant)
        np.testing.assert_allclose(means["clipped"], clipped.mean(), rtol=1e-6)
        want = by_hand(x, kernel, targets, np.where(constant, 0, -A * ratios) / A.size, 1.0)[2]
        assert relative(dx, want) < 1e-5  # the ratio is of log-probabilities of 1e-7 of about 4


def test_a_ratio_that_overflows_beyond_the_clip_has_no_part_in_the_gradient():
    x, kernel, targets, logp, mask, _ = some()
    batch = rows(mask, targets, advantages=np.ones(4), old_logp=np.where(mask, logp - 200, np.nan))
    loss = PolicyLoss(ratio="token", clip_high=HIGH, **SAMPLING)
    (value, _), (dx, _, _) = loss_and_gradients(loss, x, kernel, batch)
    np.testing.assert_allclose(value, -1 - HIGH, rtol=1e-6)
    assert not np.any(dx)


@pytest.mark.parametrize("ratio", ["token", "sequence", "product"])
def test_where_the_policy_drew_them_the_gradient_is_reinforces(ratio):
    x, kernel, targets, logp, mask, _ = some()
    batch = rows(mask, targets, advantages=[1.0, -0.4, 0.7, -2.0], old_logp=logp)
    plain = {"normaliser": "length", "max_tokens": 1} if ratio == "product" else {"normaliser": "sequence"}
    surrogate = PolicyLoss(normaliser="sequence", ratio=ratio, clip_low=LOW, clip_high=HIGH, temperature=1.0)
    (value, means), (dx, dkernel, _) = loss_and_gradients(surrogate, x, kernel, batch)
    _, (want, want_kernel, _) = loss_and_gradients(PolicyLoss(ratio="none", temperature=1.0, **plain), x, kernel, batch)
    # Its value is the mean advantage, whatever is learned; ratios are 1 but for the rounding of log-probabilities.
    np.testing.assert_allclose(value, 0.7 / 4, atol=1e-5)
    np.testing.assert_allclose([means["ratio"], means["clipped"], means["kl_old"]], [1, 0, 0], atol=1e-5)
    assert relative(dx, want) < 1e-5
    assert relative(dkernel, want_kernel) < 1e-5


def test_normalisers_by_hand_and_that_they_agree_where_all_answers_have_the_greatest_length():
    x, kernel, targets, logp, mask, _ = some()
    A = np.array([1.0, -0.4, 0.7, -2.0])

    def values(mask):
        batch = rows(mask, targets, advantages=A)
        losses = (
            PolicyLoss(normaliser=name, ratio="none", temperature=1.0, max_tokens=6 * (name == "length"))
            for name in ("sequence", "tokens", "length")
        )
        return [loss_and_gradients(loss, x, kernel, batch)[0][0] for loss in losses]

    each = -A * (mask * logp).sum(1)
    lengths = mask.sum(1)
    want = [(each / lengths).mean(), each.sum() / lengths.sum(), each.sum() / 24]
    np.testing.assert_allclose(values(mask), want, rtol=1e-5)
    np.testing.assert_allclose(values(np.ones((4, 6))), [(-A[:, None] * logp).mean()] * 3, rtol=1e-5)
    # A row without an answer, with which a batch is filled up, does not count.
    filled = mask & (np.arange(4) != 2)[:, None]
    want = (each / lengths)[[0, 1, 3]].mean()
    np.testing.assert_allclose(values(filled)[0], want, rtol=1e-5)


# ---- expectations over all strings of two of three tokens


def strings(seed=1):
    """x [9, 2, D] of all strings, as a policy sees them: the second position depends on the first token."""
    rng = np.random.default_rng(seed)
    targets = np.array([(a, b) for a in range(3) for b in range(3)], np.int32)
    states, kernel = rng.standard_normal((4, 4)), rng.standard_normal((4, 3))
    return np.stack([np.broadcast_to(states[0], (9, 4)), states[1 + targets[:, 0]]], axis=1), kernel, targets


def tokens_logp(x, kernel, targets):
    return np.take_along_axis(log_softmax(x @ kernel, axis=-1), targets[..., None], -1)[..., 0]


def test_the_expected_kl_estimate_is_the_kl():
    x, kernel, targets = strings()
    logp = tokens_logp(x, kernel, targets)
    reference = tokens_logp(x, np.random.default_rng(2).standard_normal(kernel.shape), targets)
    chance = np.exp(logp.sum(1))
    assert abs(chance.sum() - 1) < 1e-12
    batch = rows(np.broadcast_to(chance[:, None], (9, 2)), targets, advantages=0.0, reference_logp=reference)
    loss = PolicyLoss(ratio="none", beta=1.0, **SAMPLING)
    (value, means), _ = loss_and_gradients(loss, x, kernel, batch)
    want = (chance * (logp - reference).sum(1)).sum()
    np.testing.assert_allclose([2 * value, 2 * means["kl"]], [want, want], rtol=1e-5)
    (_, means), (dx, _, _) = loss_and_gradients(loss, x, kernel, batch | {"reference_logp": logp})
    assert 0 <= means["kl"] < 1e-12  # exp(d) - d - 1 of d = 1e-7
    assert np.abs(dx).max() < 1e-6


def test_the_expected_gradient_of_reinforce_is_that_of_the_expected_reward():
    """Finite differences in float64; a baseline changes nothing."""
    x, kernel, targets = strings()
    rewards = np.random.default_rng(3).standard_normal(9)

    def expected(kernel):
        return (np.exp(tokens_logp(x, kernel, targets).sum(1)) * rewards).sum()

    h, want = 1e-5, np.zeros(kernel.shape)
    for index in np.ndindex(*kernel.shape):
        change = np.zeros(kernel.shape)
        change[index] = h
        want[index] = (expected(kernel + change) - expected(kernel - change)) / (2 * h)
    chance = np.exp(tokens_logp(x, kernel, targets).sum(1))
    for baseline in (0.0, expected(kernel), 2.0):
        batch = rows(np.broadcast_to(chance[:, None], (9, 2)), targets, advantages=rewards - baseline)
        _, (_, dkernel, _) = loss_and_gradients(PolicyLoss(ratio="none", **SAMPLING), x, kernel, batch)
        assert relative(-2 * dkernel, want) < 1e-5  # over tokens, of which a string has two


def test_dpo_where_the_policy_is_the_reference():
    x, kernel, targets, logp, mask, _ = some()
    sums = (mask * logp).sum(1)
    batch = rows(mask[::2], targets[::2]) | {
        "rejected_tokens": np.zeros((2, 6), np.int32), "rejected_targets": targets[1::2],
        "rejected_weights": mask[1::2], "reference_chosen": sums[::2], "reference_rejected": sums[1::2],
    }  # fmt: skip
    (loss, means), (dx, _, _) = loss_and_gradients(PreferenceLoss(beta=0.4, temperature=1.0), x, kernel, batch)
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
    assert abs(means["margin"]) < 1e-6
    sign = np.array([1, -1, 1, -1])[:, None]
    want = by_hand(x, kernel, targets, -0.4 / 2 * sign * mask / 2, 1.0)[2]
    assert relative(dx, want) < 1e-5


# ---- heads


def beside(path, width=4, seed=5):
    rng = np.random.default_rng(seed)
    kernel, bias = rng.standard_normal((width, 1), np.float32), rng.standard_normal(1, np.float32)
    return {path: {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}


def test_the_value_loss_of_ppo_by_hand():
    x, kernel, targets, logp, mask, returns = some()
    own = beside("value")
    values = (x @ np.float64(own["value"]["kernel"]))[..., 0] + float(own["value"]["bias"][0])
    old = values + np.random.default_rng(6).standard_normal(values.shape)
    batch = rows(mask, targets, advantages=0.0, old_logp=logp, returns=returns, old_values=old)
    near = np.clip(values, old - 0.5, old + 0.5)
    want = (mask * np.maximum((values - returns) ** 2, (near - returns) ** 2)).sum() / 2 / mask.sum()
    loss = PolicyLoss(ratio="token", value=0.3, value_clip=0.5, **SAMPLING)
    (total, means), (_, _, dhead) = loss_and_gradients(loss, x, kernel, batch, own)
    np.testing.assert_allclose([total, means["value"]], [0.3 * want, want], rtol=1e-5)
    # Where the clipped one is the larger, and is a constant, there is no gradient.
    counts = mask & ~(((near - returns) ** 2 > (values - returns) ** 2) & (near != values))
    want = 0.3 * (counts * (values - returns)).sum() / mask.sum()
    np.testing.assert_allclose(dhead["value"]["bias"][0], want, rtol=1e-5)


def test_verdicts_have_pytorchs_binary_cross_entropy(torch):
    x, kernel, targets, _, mask, _ = some()
    own, labels = beside("verdict"), np.random.default_rng(7).random((4, 6)).round(1)
    given = [torch.tensor(np.array(a, np.float64), requires_grad=True) for a in (x, own["verdict"]["kernel"])]
    logits = (given[0] @ given[1])[..., 0] + float(own["verdict"]["bias"][0])
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(labels), reduction="none")
    want = (each * torch.tensor(mask)).sum() / mask.sum()
    want.backward()
    batch = rows(mask, targets, labels=labels)
    (loss, means), (dx, dkernel, dhead) = loss_and_gradients(VerdictLoss(), x, kernel, batch, own)
    np.testing.assert_allclose([loss, means["verdict"]], [want.item()] * 2, rtol=1e-6)
    right = ((logits.detach().numpy() > 0) == (labels > 0.5))[mask].mean()
    np.testing.assert_allclose(means["accuracy"], right, rtol=1e-6)
    assert relative(dx, given[0].grad.numpy()) < 1e-5
    assert relative(dhead["verdict"]["kernel"], given[1].grad.numpy()) < 1e-5
    assert not np.any(dkernel)


# ---- steps of training

MODEL = ModelConfig.gpt2(vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, max_positions=16, bias=True)
WITH_HEADS = dataclasses.replace(MODEL, beside=head("value", MODEL) + head("verdict", MODEL))
ROWS, SEQ = 8, 12


@functools.cache
def params(config=WITH_HEADS, seed=0):
    """Heads are not 0, as they are at first."""
    tree = jax.jit(init, static_argnums=(0, 1))(config, seed)
    if "beside" in tree:
        tree["beside"] = beside("value", 16) | beside("verdict", 16)
    return jax.device_get(tree)


def sampled(seed=0):
    """Answers of several lengths, and one row that fills the batch up."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, (ROWS, SEQ + 1)).astype(np.int32)
    place = np.arange(SEQ)[None]
    mask = (place >= rng.integers(1, 4, (ROWS, 1))) & (place < rng.integers(4, SEQ, (ROWS, 1)))
    mask[3] = False
    names = ("advantages", "old_logp", "reference_logp", "returns", "old_values")
    fields = {name: rng.standard_normal((ROWS, SEQ), np.float32) - 3 * (name.endswith("logp")) for name in names}
    fields |= {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.float32(mask)}
    other = np.roll(tokens, 1, axis=1)
    fields |= {"rejected_tokens": other[:, :-1], "rejected_targets": other[:, 1:], "rejected_weights": np.float32(mask)}
    fields |= {name: rng.standard_normal(ROWS, np.float32) for name in ("reference_chosen", "reference_rejected")}
    return fields | {"labels": rng.random((ROWS, SEQ), np.float32)}


def stepped(loss, batch, *, accumulation=1, mesh=None, config=WITH_HEADS):
    """(the gradient, by which one step of plain descent moves the params, metrics)."""
    compute = Compute(batch_axes=BATCH_AXES) if mesh else Compute()
    step = StepConfig(accumulation=accumulation, loss_chunk=5, z_loss=0.0)
    step = jax.jit(make_train_step(config, compute, optax.sgd(1.0), step, objective=loss))
    start = params(config)
    if mesh is None:
        state = TrainState(start, optax.sgd(1.0).init(start), jnp.int32(0), jnp.bool_(False))
        state, metrics = step(state, batch, np.float32(1))
    else:
        with jax.set_mesh(mesh):
            placed = jax.device_put(start, param_shardings(config, mesh))
            state = TrainState(placed, optax.sgd(1.0).init(placed), jnp.int32(0), jnp.bool_(False))
            state, metrics = step(state, place_batch(batch, ROWS, mesh), np.float32(1))
    return jax.tree.map(np.subtract, start, jax.device_get(state.params)), jax.device_get(metrics)


def test_supervised_learning_is_the_cross_entropy_to_the_bit():
    batch = sampled() | {"advantages": np.ones((ROWS, SEQ), np.float32)}
    loss = objective(METHODS["sft"], temperature=1.0, max_tokens=0)
    (ours, told), (text, known) = (stepped(each, batch, accumulation=2, config=MODEL) for each in (loss, TEXT))
    jax.tree.map(np.testing.assert_array_equal, ours, text)
    np.testing.assert_allclose(told["loss"], known["loss"], rtol=1e-6)
    assert loss.evaluated == TEXT


GRPO_STEP = PolicyLoss(
    normaliser="sequence", ratio="sequence", clip_low=LOW, clip_high=HIGH, temperature=0.7, beta=0.3, value=0.2
)


@pytest.mark.parametrize(
    "loss",
    [GRPO_STEP, PreferenceLoss(beta=0.3, temperature=1.0), pytest.param(VerdictLoss(), marks=pytest.mark.slow)],
    ids=lambda loss: type(loss).__name__,
)
def test_micro_batches_and_devices_change_nothing(loss):
    """Of two devices and two micro-batches on each, one has a row that counts for nothing."""
    (whole, one), (cut, many) = (
        stepped(loss, sampled()),
        stepped(
            loss, sampled(), accumulation=2, mesh=make_mesh(MeshConfig(data=1, fsdp=2, tensor=1), jax.devices()[:2])
        ),
    )
    assert max(np.abs(a).max() for a in jax.tree.leaves(whole["blocks"])) > 1e-3
    # A parameter of about 0.02 to 1 less its gradient: sums in another order, and a subtraction.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-7), whole, cut)
    for name in one["means"]:
        np.testing.assert_allclose(one["means"][name], many["means"][name], rtol=1e-5, atol=1e-6)
    assert one["loss_tokens"] == sampled()["loss_weights"].sum()


def test_a_z_loss_is_refused():
    step = make_train_step(
        WITH_HEADS,
        Compute(),
        optax.sgd(1.0),
        StepConfig(accumulation=1, loss_chunk=5, z_loss=1e-4),
        objective=GRPO_STEP,
    )
    state = TrainState(params(), optax.sgd(1.0).init(params()), jnp.int32(0), jnp.bool_(False))
    with pytest.raises(UserError, match=r"^step\.z_loss: is a part of the cross-entropy alone; 0"):
        jax.eval_shape(step, state, sampled(), np.float32(1))


def test_flops():
    plain = flops_per_token(WITH_HEADS, SEQ)
    assert GRPO_STEP.flops(WITH_HEADS, SEQ) == plain
    assert PreferenceLoss(beta=1.0, temperature=1.0).flops(WITH_HEADS, SEQ) == 2 * plain
    # A head of one number in the place of one of 32.
    assert VerdictLoss().flops(WITH_HEADS, SEQ) == plain - 6 * 16 * 31


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normaliser": "token"}, r"^normaliser=token: is not one of sequence, tokens, length$"),
        ({"ratio": "none"}, r"^ratio=none: there is no ratio to clip; clip_low=0"),
        ({"temperature": 0.0}, r"^temperature=0: must be a positive number"),
        ({"clip_low": 1.0}, r"^clip_low=1: a ratio is never below 0"),
        ({"clip_dual": 1.1}, r"^clip_dual=1\.1: must be above 1 \+ clip_high"),
        ({"beta": math.nan}, r"^beta=nan: must be a number from 0"),
        ({"normaliser": "length"}, r"^max_tokens=0: goes with normaliser=length"),
        ({"max_tokens": 5}, r"^max_tokens=5: goes with normaliser=length"),
    ],
)
def test_what_is_no_loss_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        PolicyLoss(**{"normaliser": "tokens", "ratio": "token", "temperature": 1.0, "clip_high": 0.2} | changed)


def test_each_method_has_an_objective():
    losses = {name: objective(method, temperature=0.8, max_tokens=9, vocab_size=30) for name, method in METHODS.items()}
    assert losses["verdict"] == VerdictLoss()
    assert losses["dpo"] == PreferenceLoss(beta=0.1, temperature=0.8, vocab_size=30)
    assert losses["drgrpo"].max_tokens == 9
    # Cloning is the cross-entropy of text, whatever is sampled.
    drawn = {name: (loss.temperature, loss.vocab_size) for name, loss in losses.items() if isinstance(loss, PolicyLoss)}
    cloned = {"sft", "reject"}
    assert {name for name, how in drawn.items() if how == (1.0, 0)} == cloned
    assert {how for name, how in drawn.items() if name not in cloned} == {(0.8, 30)}


# ---- scores of rows

SCORING = {"compute": Compute(), "temperature": 0.7, "chunk": 5, "batch_size": 3}


def wanted(order=None, vocab=32):
    """Of the rows of `sampled`, by the decoder's logits."""
    batch = sampled()
    decoder = nnx.merge(abstract(WITH_HEADS)[0], jax.tree.map(jnp.asarray, params()))
    x = jax.jit(lambda tokens: decoder.hidden(tokens, order=order))(batch["tokens"])
    logp = log_softmax(np.float64(x) @ np.float64(decoder.head_kernel())[:, :vocab] / 0.7, axis=-1)
    values = {
        path: (np.float64(x) @ np.float64(each["kernel"]))[..., 0] + float(each["bias"][0])
        for path, each in params()["beside"].items()
    }
    targets = np.minimum(batch["targets"], vocab - 1)
    return targets, np.take_along_axis(logp, targets[..., None], -1)[..., 0], -(np.exp(logp) * logp).sum(-1), values


@pytest.mark.parametrize(("order", "vocab", "named"), [(None, 32, "value"), ([0, 1, 0, 1], 20, "verdict")])
def test_scores_are_those_of_the_model(order, vocab, named):
    """In batches of 3, of which the last is filled up; by an order of layers, and among a part of the vocabulary."""
    order = None if order is None else np.array(order, np.int32)
    targets, logp, entropy, values = wanted(order, vocab)
    given = {"tokens": sampled()["tokens"], "targets": targets}
    found = score(WITH_HEADS, params(), given, head=named, vocab_size=vocab % 32, order=order, **SCORING)
    assert found.logp.dtype == np.float32
    value = values[named] if named == "value" else 1 / (1 + np.exp(-values[named]))
    for got, want in ((found.logp, logp), (found.entropy, entropy), (found.values, value)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # x is of float32


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "context": 2}])
def test_scores_on_a_mesh_are_those_of_one_device(sizes):
    """Also where sequences are split, whose positions lie in another order."""
    given = {name: sampled()[name] for name in ("tokens", "targets")}
    alone = score(WITH_HEADS, params(), given, head="value", **SCORING)
    mesh = make_mesh(MeshConfig(**{"data": 1, "tensor": 1} | sizes), jax.devices()[:4])
    placed = jax.device_put(params(), param_shardings(WITH_HEADS, mesh))
    how = SCORING | {"compute": Compute(batch_axes=BATCH_AXES), "batch_size": 8}
    split = score(WITH_HEADS, placed, given, head="value", mesh=mesh, **how)
    for one, other in zip(alone, split, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


def test_the_ratio_of_scores_is_one_where_nothing_was_learned():
    """What rows are scored by is what they are trained by."""
    batch = sampled()
    old = score(WITH_HEADS, params(), batch, **SCORING).logp
    loss = PolicyLoss(normaliser="tokens", ratio="token", clip_low=LOW, clip_high=HIGH, temperature=0.7)
    _, metrics = stepped(loss, batch | {"old_logp": old})
    np.testing.assert_allclose(
        [metrics["means"][name] for name in ("ratio", "clipped", "kl_old")], [1, 0, 0], atol=1e-6
    )
