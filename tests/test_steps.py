"""Vectors in the place of tokens, steps, blocks of the cache, and what stands beside a decoder.

`test_attention.py` has steps against their formula in float64.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from parity import SEQ, hf_model
from plain import load_params
from test_model import CONFIGS, GPT2, LLAMA, MIXED, WINDOWED, noisy, tokens_for

import jaxup
from jaxup.depth.apply import apply
from jaxup.depth.freeze import trainable
from jaxup.depth.plan import DepthPlan, Row
from jaxup.depth.result import result_config
from jaxup.depth.width import halved, narrow
from jaxup.errors import UserError
from jaxup.families import config_from_hf, config_to_hf
from jaxup.hub.reader import load_config
from jaxup.model.config import Beside, Compute, ModelConfig
from jaxup.model.decoder import KVCache, abstract, init
from jaxup.model.sharding import param_shardings, undivided
from jaxup.model.spec import STACK, count_params, depth_params, flatten, flops_per_token, spec, without_beside
from jaxup.training.lora import LoraConfig
from jaxup.training.optimizer import AdamW, make_optimizer
from jaxup.training.selection import TrainConfig, select
from jaxup.training.sharding import BATCH_AXES, MeshConfig, make_mesh

SCALED = dataclasses.replace(GPT2, embed_scale=3.0)
# Text of five, an image of four in one step, text of three, an image of four, one more.
KINDS_OF_STEPS = np.repeat(np.arange(10), [1, 1, 1, 1, 1, 4, 1, 1, 1, 4])
STEPS = np.append(KINDS_OF_STEPS, 10)[None].astype(np.int32)
assert STEPS.shape == (1, SEQ)


def but(*slow):
    """All configurations, of which these are run by the slow tests."""
    cases = [pytest.param(c, id=name, marks=[pytest.mark.slow] * (c in slow)) for name, c in CONFIGS.items()]
    return pytest.mark.parametrize("config", cases)


def vectors(config, seed=0, batch=2, seq=SEQ):
    return np.random.default_rng(seed).standard_normal((batch, seq, config.hidden_size), np.float32)


def mixed_input(config):
    """Tokens, and vectors where the positions are of an image."""
    inside = np.isin(STEPS, [5, 9])
    return np.where(inside, np.int32(-1), tokens_for(config)), vectors(config)


@functools.partial(jax.jit, static_argnums=(0, 1))
def hidden(config, compute, params, tokens, **inputs):
    return nnx.merge(abstract(config, compute)[0], params).hidden(tokens, **inputs)


# ---- vectors in the place of tokens


@pytest.mark.parametrize("config", [SCALED, pytest.param(MIXED, marks=pytest.mark.slow)], ids=["scaled", "mixed"])
def test_what_is_fed_as_a_vector_is_what_an_embedding_gives(config):
    """Not scaled, with learned positions added as to all: so the product of both is the token's, to the bit."""
    params, tokens = noisy(config), tokens_for(config)
    embedded = params["embed_tokens"][tokens] * config.embed_scale
    fed = np.where(np.arange(SEQ) % 3 == 0, np.int32(-1), tokens)
    want = hidden(config, Compute(), params, tokens)
    # What lies where a token is fed is not read, and neither are gradients harmed by it.
    given = jnp.where(fed[..., None] < 0, embedded, jnp.nan)
    np.testing.assert_array_equal(hidden(config, Compute(), params, fed, inputs_BSD=given), want)


# ---- steps


@but(GPT2, WINDOWED)
def test_what_comes_later_has_no_gradient_and_all_of_a_step_has_one(config):
    """Steps in any order, and two segments."""
    params = noisy(config)
    steps = np.random.default_rng(1).integers(0, 5, (2, SEQ), dtype=np.int32)
    segments = np.stack([np.arange(SEQ) // 9, 0 * np.arange(SEQ)]).astype(np.int32)

    @jax.jit
    def reach(inputs, steps, segments):
        """[query, B, key]: how much what comes out of each query depends on what each key was fed."""

        def out(inputs):
            tokens = jnp.full(inputs.shape[:2], -1)
            return hidden(config, Compute(), params, tokens, inputs_BSD=inputs, steps_BS=steps, segment_ids_BS=segments)

        z_BSD, back = jax.vjp(out, inputs)
        one = lambda query: back(z_BSD * (jnp.arange(SEQ) == query)[None, :, None])[0]  # noqa: E731
        return jnp.abs(jax.lax.map(one, jnp.arange(SEQ))).sum(axis=-1)

    found = np.moveaxis(np.asarray(reach(vectors(config), steps, segments)), 0, 1)
    seen = (steps[:, None, :] <= steps[:, :, None]) & (segments[:, None, :] == segments[:, :, None])
    assert (found[~seen] == 0).all()
    if config == WINDOWED:  # three layers of three keys on either side see nine
        far = np.abs(np.arange(SEQ)[:, None] - np.arange(SEQ)) > 9
        assert (found[:, far] == 0).all()
        seen &= np.abs(np.arange(SEQ)[:, None] - np.arange(SEQ)) < 4
    assert (found[seen] > 0).all()


@pytest.mark.parametrize("config", [pytest.param(GPT2, marks=pytest.mark.slow), MIXED], ids=["gpt2", "mixed"])
def test_steps_that_rise_from_token_to_token_are_the_causal_model(config):
    params, tokens = noisy(config), tokens_for(config)
    rising = 3 * np.arange(SEQ, dtype=np.int32)[None] - 7
    graphdef, _ = abstract(config)

    def program(steps):
        return str(jax.make_jaxpr(lambda p, t: nnx.merge(graphdef, p).hidden(t, steps_BS=steps))(params, tokens))

    assert program(rising) == program(jnp.asarray(rising)) == program(None) != program(rising // 4)
    # Where they are not known it is another program, of the same bits.
    found = hidden(config, Compute(), params, tokens, steps_BS=rising)
    np.testing.assert_array_equal(found, hidden(config, Compute(), params, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt2", "mistral", "qwen3", "gemma"])
def test_one_step_is_a_bidirectional_transformer(case, torch, tmp_path):
    """transformers' own, in float64, given a mask that hides nothing but what a window does."""
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    far = np.abs(np.arange(SEQ)[:, None] - np.arange(SEQ)) >= (config.windows[0] or SEQ)
    mask = torch.zeros((2, 1, SEQ, SEQ), dtype=torch.float64).masked_fill(torch.tensor(far), -1e30)
    tokens = tokens_for(config)
    with torch.no_grad():
        want = theirs.double()(torch.tensor(tokens, dtype=torch.long), attention_mask=mask).logits.numpy()
    params = load_params(tmp_path, config)
    ours = jax.jit(lambda params, steps: nnx.merge(abstract(config)[0], params)(jnp.asarray(tokens), steps_BS=steps))
    found = ours(params, np.zeros((1, SEQ), np.int32))
    np.testing.assert_allclose(found, want, atol=1e-4)


@pytest.mark.slow
def test_a_mesh_changes_neither_vectors_nor_steps():
    params, (tokens, given) = noisy(LLAMA), mixed_input(LLAMA)
    rows = [np.repeat(x, 2, axis=0) for x in (tokens, given)]
    want = hidden(LLAMA, Compute(), params, rows[0], inputs_BSD=rows[1], steps_BS=STEPS)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(LLAMA, mesh))
        compute = Compute(batch_axes=BATCH_AXES)
        found = hidden(LLAMA, compute, placed, rows[0], inputs_BSD=rows[1], steps_BS=STEPS)
    np.testing.assert_allclose(found, want, atol=1e-5)


# ---- blocks of the cache


@but(WINDOWED)
def test_decoding_in_blocks_is_one_pass_by_steps(config):
    """Rows whose texts are of several lengths, padded on the left: each is what it is alone."""
    params, (tokens, given) = noisy(config), mixed_input(config)
    graphdef, _ = abstract(config)
    first = np.array([0, 3], np.int32)  # of the second row three are padding
    segments = (np.arange(SEQ) >= first[:, None]).astype(np.int32)
    positions = np.maximum(np.arange(SEQ, dtype=np.int32) - first[:, None], 0)
    how = {"inputs_BSD": given, "steps_BS": STEPS, "segment_ids_BS": segments, "positions_BS": positions}
    want = hidden(config, Compute(), params, tokens, **how)

    @functools.partial(jax.jit, static_argnames="together")
    def step(tokens, inputs, cache, together):
        model = nnx.merge(graphdef, params)
        return model.decode_block(tokens, cache, inputs_BSD=inputs, first_B=first, together=together)

    cache, found = KVCache.empty(config, 2, SEQ + 2, jnp.float32), []
    for block in np.split(np.arange(16), [4, 5, 9, 10, 11, 12]):
        together = len(block) == 4 and bool(block[0])  # the images
        z, cache = step(tokens[:, block], given[:, block], cache, together)
        found.append(z)
    assert int(cache.length) == 16
    np.testing.assert_allclose(np.concatenate(found, 1)[0], want[0, :16], atol=1e-5)
    np.testing.assert_allclose(np.concatenate(found, 1)[1, 3:], want[1, 3:16], atol=1e-5)


# ---- what is refused


def test_inputs_that_do_not_fit_are_refused_in_one_line():
    model, tokens = nnx.merge(abstract(GPT2)[0], noisy(GPT2)), np.array([[3, -1]], np.int32)
    with pytest.raises(UserError, match=r"^token -1 is not there: .*0-49; -1 is for what inputs_BSD feeds$"):
        model(tokens)
    with pytest.raises(UserError, match=r"^token -2 is not there"):
        model(tokens - 1, inputs_BSD=vectors(GPT2, batch=1, seq=2))
    with pytest.raises(UserError, match=r"^inputs of shape \[1, 2, 3\] are no vectors of the model: \[1, 2, 16\]"):
        model(tokens, inputs_BSD=np.zeros((1, 2, 3), np.float32))
    compute = Compute(batch_axes=BATCH_AXES)
    split = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=2), jax.devices()[:2])
    with jax.set_mesh(split), pytest.raises(UserError, match=r"^mesh\.context=2: steps do not go together with a mesh"):
        hidden(LLAMA, compute, noisy(LLAMA), tokens_for(LLAMA, seq=16), steps_BS=STEPS[:, :16])


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ([("a.b", (2,), ("",)), ("a", (2,), ("",))], "'a.b' is there twice, or lies in another"),
        ([("a", (2,), ("",)), ("a", (3,), ("",))], "'a' is there twice"),
        ([("a..b", (2,), ("",))], "'a..b': a path is names"),
        ([("a", (), ())], r"shape=\(\) must be of positive integers"),
        ([("a", (2, 0), ("", ""))], r"shape=\(2, 0\) must be"),
        ([("a", (2, 2), ("embed",))], r"axes=\('embed',\) and inputs=0 do not go with"),
        ([("a", (2, 2), ("embed", "embed"))], "names one twice; \"\" is an axis"),
        ([("a", (2,), ("",), 0.0, float("nan"))], "std=nan must be finite"),
    ],
)  # fmt: skip
def test_parameters_beside_that_cannot_be_are_refused(beside, message):
    with pytest.raises(UserError, match=f"^model: .*{message}"):
        dataclasses.replace(GPT2, beside=tuple(Beside(*each) for each in beside))


def test_no_model_directory_has_what_is_beside(tmp_path):
    model = nnx.merge(abstract(WITH)[0], fresh(WITH))
    for native in (None, True):
        with pytest.raises(UserError, match=r"beside\.connector\.kernel is no parameter .* ModelConfig\.alone\(\)"):
            jaxup.save(model, tmp_path / "out", native=native)
    assert not (tmp_path / "out").exists()
    ids = {"eos_token_id": None, "bos_token_id": None}
    hf = config_to_hf(LLAMA, dtype="float32", model_type="jaxup", **ids)
    assert config_from_hf(hf) == LLAMA
    hf["jaxup"] |= json.loads(json.dumps({"beside": [dataclasses.asdict(each) for each in WITH.beside]}))
    with pytest.raises(UserError, match=r"^jaxup: beside: .* is no part of a model directory"):
        config_from_hf(hf)
    assert config_from_hf(config_to_hf(WITH.alone(), dtype="float32", **ids)) == LLAMA


# ---- what stands beside


WITH = dataclasses.replace(
    LLAMA,
    beside=(
        Beside("connector.kernel", (5, 16), ("", "embed"), std=0.1, inputs=1),
        Beside("head.bias", (5,), ("",), fill=0.5),
        # As of a second decoder, whose layers are none of the first.
        Beside("spatial.blocks.mlp.kernel", (2, 16, 3), ("layers", "embed", "mlp"), std=0.1, inputs=1),
    ),
)


@functools.cache
def fresh(config, seed=0):
    return jax.jit(init, static_argnums=0)(config, seed)


def test_the_table_has_what_is_beside_and_the_decoder_is_what_it_was():
    assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(WITH)))) == WITH
    assert WITH.alone() == LLAMA == ModelConfig.from_dict(dataclasses.asdict(LLAMA))
    added = 5 * 16 + 5 + 2 * 16 * 3
    assert count_params(WITH) == count_params(LLAMA) + added
    assert depth_params(WITH) == (depth_params(LLAMA)[0] + added, depth_params(LLAMA)[1])
    assert flops_per_token(WITH, 8) == flops_per_token(LLAMA, 8)
    assert not spec(WITH)["beside.spatial.blocks.mlp.kernel"].stacked
    params, own = fresh(WITH), fresh(LLAMA)
    jax.tree.map(np.testing.assert_array_equal, without_beside(params), own)
    kernel = params["beside"]["spatial"]["blocks"]["mlp"]["kernel"]
    assert kernel.shape == (2, 16, 3)
    assert 0.05 < kernel.std() < 0.15
    assert len(np.unique(kernel)) == kernel.size
    assert (params["beside"]["head"]["bias"] == 0.5).all()

    model = nnx.merge(abstract(WITH)[0], params)
    assert model.beside["connector"]["kernel"] is params["beside"]["connector"]["kernel"]
    assert jax.tree.structure(model.params) == jax.tree.structure(params)
    assert nnx.merge(abstract(LLAMA)[0], own).beside == {}
    changed = model.with_params(jax.tree.map(jnp.zeros_like, params)).beside
    assert type(changed["head"]) is dict
    assert not changed["head"]["bias"].any()

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = flatten(param_shardings(WITH, mesh))
    assert shardings["beside.connector.kernel"].spec == PartitionSpec(None, ("fsdp",))
    # Three do not divide over two: they are whole, and nothing is said of the decoder's own.
    assert shardings["beside.spatial.blocks.mlp.kernel"].spec == PartitionSpec(None, ("fsdp",), None)
    assert undivided(WITH, mesh) == {}


PLAN = DepthPlan((Row("m", 0), Row("m", 1), Row("m", 1, "copy"), Row("m", 2)), *["m"] * 4, (("m", LLAMA.num_layers),))


@jax.jit
def deepen(sources, init=None):
    return apply(PLAN, sources, init)


@functools.cache
def deepened():
    """With a copy of layer 1, and what is beside of the source though there are new values."""
    return deepen({"m": fresh(WITH)}, fresh(dataclasses.replace(WITH, num_layers=4), 1))


@pytest.mark.parametrize("of", [pytest.param("everything", marks=pytest.mark.slow), "copies", "lora"])
def test_what_is_beside_trains_with_all_that_may_train_and_the_rest_keeps_every_bit(of):
    """Whatever layers and parameters are chosen; one update by its own rate."""
    params, deeper = deepened(), result_config(PLAN, {"m": WITH})
    chosen = {"layers": "all" if of == "everything" else "copies", "parameters": "" if of != "lora" else "o_proj"}
    lora = LoraConfig(rank=2 * (of == "lora"), alpha=4.0, quantize="", tile_size=0)
    train = TrainConfig(**chosen, freeze="", rates={"beside": 0.25})
    selection = select(deeper, PLAN, train, lora, compute=Compute(), seed=1)
    optimizer = make_optimizer(AdamW(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=0.0), selection.rates)
    partition = selection.partition
    tokens, given = map(jnp.asarray, mixed_input(LLAMA))

    def loss(trained, frozen):
        """The connector feeds, the head reads; and the second decoder has a part of it."""
        how = {"inputs_BSD": given[..., :5] @ trained["beside"]["connector"]["kernel"], "steps_BS": jnp.asarray(STEPS)}
        if partition is None:
            decoder = nnx.merge(abstract(deeper)[0], trained)
            z_BSD = decoder.hidden(tokens, **how)
        else:
            decoder, z_BSD = partition.hidden(trained, frozen, tokens, **how)
        beside = decoder.beside
        out = z_BSD @ beside["spatial"]["blocks"]["mlp"]["kernel"][1]
        return jnp.sum(jnp.sin(out)) + jnp.sum(beside["head"]["bias"] * z_BSD[0, 0, :5])

    @jax.jit
    def update(params):
        trained, frozen = (params, {}) if partition is None else partition.split(params)
        value, grads = jax.value_and_grad(loss)(trained, frozen)
        updates, _ = optimizer.update(grads, optimizer.init(trained), trained, learning_rate=jnp.float32(0.01))
        moved = jax.tree.map(jnp.add, trained, updates)
        return value, updates, selection.merge(moved, params)

    _, updates, merged = update(params)
    after, before = (flatten(jax.tree.map(np.asarray, tree)) for tree in (merged, params))
    beside = {path for path in before if path.startswith("beside.")}
    assert beside == {path for path in flatten(updates) if path.startswith("beside.")}
    for path in beside - {"beside.spatial.blocks.mlp.kernel"}:  # Adam's first update is the rate, times 1/4
        np.testing.assert_allclose(np.abs(flatten(updates)[path]), 0.0025, rtol=1e-3)
        assert (after[path] != before[path]).all()
    for path in before.keys() - beside:
        rows = slice(None) if of == "everything" else [0, 1, 3] if path.startswith(STACK) else slice(None)
        same = np.array_equal(after[path][rows], before[path][rows])
        assert same == (of != "everything" or path == "lm_head.kernel"), path  # which has no part in the loss
    moves = {path for path in before if not np.array_equal(after[path], before[path])}
    assert len(moves) > len(beside)


def test_masks_and_plans_leave_what_is_beside_to_itself():
    masks = trainable(PLAN, deepened(), layers="0:1", parameters="q_proj")
    assert {path for path, mask in flatten(masks).items() if mask.any()} == {
        "blocks.self_attn.q_proj.kernel", *(f"beside.{each.path}" for each in WITH.beside)
    }  # fmt: skip
    with pytest.raises(UserError, match="nothing would train"):  # of the decoder, which is what was chosen from
        trainable(PLAN, deepened(), parameters="connector")

    jax.tree.map(np.testing.assert_array_equal, deepened()["beside"], fresh(WITH)["beside"])
    other = fresh(dataclasses.replace(WITH, num_layers=4), 1)
    params = deepen({"m": without_beside(fresh(WITH))}, other)
    jax.tree.map(np.testing.assert_array_equal, params["beside"], other["beside"])
    small = narrow(jax.tree.map(np.asarray, fresh(WITH)), halved(WITH))
    jax.tree.map(np.testing.assert_array_equal, small["beside"], fresh(WITH)["beside"])
