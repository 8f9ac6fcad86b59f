"""config.json in both directions: transformers' defaults, real models, every refusal."""

import dataclasses
import importlib
import inspect
import json
import logging
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxup.errors import UserError
from jaxup.families import FAMILIES, config_from_hf, config_to_hf, edited_hf, kept_keys, with_family_biases
from jaxup.families.windows import LAYER_TYPES
from jaxup.model.config import LayerKind, ModelConfig, RopeScaling, depth_scaled
from jaxup.model.spec import count_params

GPT2 = ModelConfig.gpt2(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, max_positions=32, bias=True)
LLAMA = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    max_positions=32, norm="rmsnorm", norm_eps=1e-6, positions="rope", rope_theta=500.0, activation="silu",
    gated_mlp=True, tie_embeddings=False,
)  # fmt: skip
WINDOWED = dataclasses.replace(LLAMA, kinds=(LayerKind(window=3),))
MIXED = dataclasses.replace(WINDOWED, kinds=(LayerKind(), LayerKind(window=3)))
GEMMA = dataclasses.replace(LLAMA, activation="gelu_tanh", norm_offset=1.0, embed_scale=4.0)
BIASES = ("norm_bias", "qkv_bias", "o_bias", "mlp_bias")
BIASLESS = dataclasses.replace(GPT2, **dict.fromkeys(BIASES, False))
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_positions=8, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling(
    kind="yarn", factor=4.0, original_max_positions=8, beta_fast=32.0, beta_slow=1.0, truncate=True,
    attention_factor=1.1386294361119891,  # 1 + log(4) / 10
)  # fmt: skip

# model, and the family an export takes unless told otherwise
CONFIGS = {
    "gpt2": (GPT2, "gpt2"),
    "gpt2-biasless": (BIASLESS, "gpt2"),
    "gpt2-untied-scaled": (dataclasses.replace(GPT2, tie_embeddings=False, kinds=depth_scaled(2)), "gpt2"),
    "llama": (LLAMA, "llama"),
    "llama-biases": (dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True), "llama"),
    "llama-o-bias": (dataclasses.replace(LLAMA, o_bias=True), "llama"),
    "llama-linear": (dataclasses.replace(LLAMA, rope_scaling=RopeScaling(kind="linear", factor=2.5)), "llama"),
    "llama-llama3": (dataclasses.replace(LLAMA, rope_scaling=LLAMA3), "llama"),
    "llama-yarn": (dataclasses.replace(LLAMA, rope_scaling=YARN), "llama"),
    "mistral": (WINDOWED, "mistral"),
    "mistral-odd-heads": (dataclasses.replace(LLAMA, num_heads=3, num_kv_heads=1), "mistral"),
    "qwen2": (dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True), "qwen2"),
    "qwen2-windows": (dataclasses.replace(WINDOWED, qkv_bias=True), "qwen2"),
    "qwen2-mixed": (dataclasses.replace(MIXED, qkv_bias=True), "qwen2"),
    "qwen2-mixed-biasless": (MIXED, "qwen2"),
    "qwen2-odd-heads": (dataclasses.replace(LLAMA, num_heads=3, num_kv_heads=1, qkv_bias=True), "qwen2"),
    "qwen3": (dataclasses.replace(LLAMA, qk_norm=True), "qwen3"),
    "qwen3-window-first": (
        dataclasses.replace(MIXED, qk_norm=True, kinds=MIXED.kinds[::-1], rope_scaling=YARN),
        "qwen3",
    ),
    "qwen3-q-bias": (dataclasses.replace(WINDOWED, qk_norm=True, qkv_bias=True), "qwen3"),
    "gemma": (dataclasses.replace(GEMMA, tie_embeddings=True), "gemma"),
    "gemma-o-bias": (dataclasses.replace(GEMMA, o_bias=True, rope_scaling=LLAMA3), "gemma"),
}
configs = pytest.mark.parametrize(("config", "model_type"), CONFIGS.values(), ids=CONFIGS)


def exported(config, **options):
    return json.loads(json.dumps(config_to_hf(config, dtype="float32", eos_token_id=1, bos_token_id=0, **options)))


def check_round_trip(config, **options):
    """Returns the config.json, which is `config` but for biases, to readers of either spelling."""
    hf = exported(config, **options)
    back = config_from_hf(hf)
    assert dataclasses.replace(back, **{b: getattr(config, b) for b in BIASES}) == config
    assert all(getattr(back, b) >= getattr(config, b) for b in BIASES)
    assert config_from_hf(exported(back, model_type=hf["model_type"])) == back
    assert config_from_hf({k: v for k, v in hf.items() if k not in ("rope_parameters", "dtype")}) == back
    assert config_from_hf({k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}) == back
    return hf


@configs
def test_config_round_trip(config, model_type):
    hf = check_round_trip(config)
    assert hf["model_type"] == model_type
    family, back = with_family_biases(config)
    assert (family, back) == (FAMILIES[model_type], config_from_hf(hf))


@configs
def test_transformers_reads_an_exported_config_as_the_same_model(config, model_type, torch):
    from transformers import AutoConfig

    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        theirs = AutoConfig.for_model(**exported(config))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not heard
    assert config_from_hf(json.loads(theirs.to_json_string(use_diff=False))) == with_family_biases(config)[1]


def test_an_export_keeps_the_family_it_came_from_if_that_can_express_it():
    assert exported(LLAMA)["model_type"] == "llama"
    assert exported(LLAMA, model_type="mistral")["sliding_window"] is None
    assert exported(LLAMA, model_type="qwen2")["model_type"] == "qwen2"
    assert with_family_biases(LLAMA, "qwen2")[1] == dataclasses.replace(LLAMA, qkv_bias=True)
    assert exported(WINDOWED, model_type="llama")["model_type"] == "mistral"
    assert exported(GPT2, model_type="llama")["model_type"] == "gpt2"


numbers = st.floats(1e-3, 1e6)
scalings = st.none() | st.one_of(
    st.builds(RopeScaling, kind=st.just("linear"), factor=numbers),
    st.builds(RopeScaling, kind=st.just("llama3"), factor=numbers, original_max_positions=st.integers(1, 99),
              low_freq_factor=st.floats(0.1, 1), high_freq_factor=st.floats(2, 9)),
    st.builds(RopeScaling, kind=st.just("yarn"), factor=numbers, original_max_positions=st.integers(1, 99),
              beta_fast=numbers, beta_slow=numbers, attention_factor=numbers, truncate=st.booleans()),
)  # fmt: skip


@settings(max_examples=50)
@given(st.data())
def test_random_configs_round_trip(data):
    def draw(**strategies):
        return {name: data.draw(strategy, label=name) for name, strategy in strategies.items()}

    kv_heads, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    fields = draw(
        num_heads=st.integers(1, 3).map(lambda n: n * kv_heads), head_dim=st.integers(1, 9).map(lambda n: 2 * n),
        vocab_size=st.integers(1, 999), hidden_size=st.integers(1, 99), intermediate_size=st.integers(1, 99),
        max_positions=st.integers(1, 99), norm_eps=numbers, rope_theta=st.floats(1.5, 1e8), rope_scaling=scalings,
        activation=st.sampled_from(["gelu", "gelu_tanh", "silu", "relu"]), tie_embeddings=st.booleans(),
        qkv_bias=st.booleans(), qk_norm=st.booleans(), init_std=numbers,
    )  # fmt: skip
    window = LayerKind(window=data.draw(st.none() | st.integers(1, 99)))
    fields["kinds"] = tuple(data.draw(st.lists(st.sampled_from([LayerKind(), window]), min_size=depth, max_size=depth)))
    config = dataclasses.replace(LLAMA, num_kv_heads=kv_heads, num_layers=depth, **fields)
    check_round_trip(config, model_type=data.draw(st.sampled_from([None, *FAMILIES])))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(model_type, torch):
    from transformers import AutoConfig

    documented = json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    assert config_from_hf({"model_type": model_type}) == config_from_hf(documented)


# What transformers 5 makes of a rope dict: whatever it adds or prefers must change nothing for us.
ROPES = {
    "none": {},
    "theta": {"rope_theta": 77.0},
    "theta inside": {"rope_parameters": {"rope_theta": 77.0}},
    "linear, v4": {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2}},
    "linear, theta in one place": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7},
    "llama3, v4": {
        "rope_theta": 77.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
    },
    "llama3, original absent": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn, original absent": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, original at the top": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16
    },
    "yarn, no factor": {
        "rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    },
    "yarn, mscale": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
                         "mscale_all_dim": 1.3, "beta_fast": 8, "beta_slow": 0.5, "truncate": False},
    },
    "yarn, mscale alone": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0}},
    "yarn, attention_factor": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "mscale": 0.7, "beta_fast": None,
                         "mscale_all_dim": 1.0},
    },
    "yarn, shrinking": {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
    "both": {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
             "rope_parameters": {"type": "linear", "rope_type": "linear", "rope_theta": 7, "factor": 2}},
    "empty": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 7.0}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*rope_scaling.*:FutureWarning")
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rotary_frequencies_equal_those_of_transformers(rope, torch):
    import numpy as np
    from transformers import AutoConfig
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    from jaxup.model.layers import rotary_frequencies

    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=40, max_position_embeddings=64)
    theirs = Qwen2RotaryEmbedding(AutoConfig.for_model("qwen2", **sizes, **json.loads(json.dumps(rope))))
    config = config_from_hf({"model_type": "qwen2", **sizes, **rope})
    frequencies, factor = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-5)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"sliding_window": 7}, {"use_sliding_window": True}, {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 7},
        {"use_sliding_window": True, "max_window_layers": 99},
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": [*LAYER_TYPES, *LAYER_TYPES]},
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"] * 4},
        {"use_sliding_window": False, "sliding_window": 5, "layer_types": ["full_attention"] * 4},
    ],
)  # fmt: skip
def test_windows_of_layers_equal_those_of_transformers(keys, torch):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model("qwen3", num_hidden_layers=4, **keys)
    ours = config_from_hf({"model_type": "qwen3", "num_hidden_layers": 4, **keys})
    expected = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    assert [kind.window for kind in ours.kinds_of_layers] == expected


# ---- config.json of published models, and their numbers of parameters

MISTRAL_7B = dict(
    architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096,
    initializer_range=0.02, intermediate_size=14336, max_position_embeddings=32768, model_type="mistral",
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
    sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.34.0.dev0",
    use_cache=True, vocab_size=32000,
)  # fmt: skip
LLAMA_31 = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
    eos_token_id=128001, hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
    max_position_embeddings=131072, mlp_bias=False, model_type="llama", num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
                      rope_type="llama3"),
    rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.43.0.dev0",
    use_cache=True, vocab_size=128256,
)  # fmt: skip
QWEN2_7B = dict(
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
    hidden_act="silu", hidden_size=3584, initializer_range=0.02, intermediate_size=18944,
    max_position_embeddings=131072, max_window_layers=28, model_type="qwen2", num_attention_heads=28,
    num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.37.2", use_cache=True,
    use_sliding_window=False, vocab_size=152064,
)  # fmt: skip
PUBLISHED = {
    "gpt2": (
        dict(
            activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=50256,
            embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-05, model_type="gpt2",
            n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024, resid_pdrop=0.1,
            summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index",
            summary_use_proj=True, task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
            vocab_size=50257,
        ),
        124_439_808,
        dict(head_dim=64, intermediate_size=3072, tie_embeddings=True, qkv_bias=True),
    ),
    "Llama-2-7b-hf": (
        dict(
            _name_or_path="meta-llama/Llama-2-7b-hf", architectures=["LlamaForCausalLM"], bos_token_id=1,
            eos_token_id=2, hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=11008,
            max_position_embeddings=4096, model_type="llama", num_attention_heads=32, num_hidden_layers=32,
            num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None,
            tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0.dev0", use_cache=True,
            vocab_size=32000,
        ),
        6_738_415_616,
        dict(rope_theta=10_000.0, num_kv_heads=32, head_dim=128, qkv_bias=False, norm_eps=1e-5),
    ),
    "Llama-3.1-8B": (
        LLAMA_31,
        8_030_261_248,
        dict(rope_theta=5e5, num_kv_heads=8, rope_scaling=dataclasses.replace(LLAMA3, original_max_positions=8192)),
    ),
    "Llama-3.2-1B": (
        LLAMA_31 | dict(
            head_dim=64, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True,
            rope_scaling=LLAMA_31["rope_scaling"] | {"factor": 32.0}, transformers_version="4.45.0.dev0",
        ),
        1_235_814_400,
        dict(tie_embeddings=True, rope_scaling=dataclasses.replace(LLAMA3, factor=32.0, original_max_positions=8192)),
    ),
    "open_llama_3b": (
        dict(
            architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=3200,
            initializer_range=0.02, intermediate_size=8640, max_position_embeddings=2048, model_type="llama",
            num_attention_heads=32, num_hidden_layers=26, pad_token_id=0, rms_norm_eps=1e-06,
            tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.30.0.dev0", use_cache=True,
            vocab_size=32000,
        ),
        3_426_473_600,
        dict(head_dim=100, num_kv_heads=32),
    ),
    "Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096, dict(windows=(4096,), rope_theta=1e4)),
    "Mistral-7B-v0.3": (
        MISTRAL_7B | dict(attention_dropout=0.0, rope_theta=1000000.0, sliding_window=None, vocab_size=32768),
        7_248_023_552,
        dict(windows=(None,), rope_theta=1e6),
    ),
    "Mistral-Nemo-Instruct-2407": (
        MISTRAL_7B | dict(
            attention_dropout=0.0, head_dim=128, hidden_size=5120, max_position_embeddings=1024000,
            num_hidden_layers=40, rope_theta=1000000.0, sliding_window=None, vocab_size=131072,
        ),
        12_247_782_400,
        dict(head_dim=128, num_heads=32),
    ),
    "Mistral-Small-Instruct-2409": (
        MISTRAL_7B | dict(
            attention_dropout=0.0, head_dim=128, hidden_size=6144, intermediate_size=16384, num_attention_heads=48,
            num_hidden_layers=56, rope_theta=1000000.0, sliding_window=None, vocab_size=32768,
        ),
        22_247_282_688,
        dict(head_dim=128, num_heads=48),
    ),
    "Qwen2-7B": (QWEN2_7B, 7_615_616_512, dict(windows=(None,), qkv_bias=True, o_bias=False, head_dim=128)),
    "Qwen2.5-0.5B": (
        QWEN2_7B | dict(
            hidden_size=896, intermediate_size=4864, max_position_embeddings=32768, max_window_layers=24,
            num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, sliding_window=32768,
            tie_word_embeddings=True, use_mrope=False, vocab_size=151936,
        ),
        494_032_768,
        dict(head_dim=64, tie_embeddings=True, max_positions=32768),
    ),
    "Qwen3-0.6B": (
        dict(
            architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
            eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=1024, initializer_range=0.02,
            intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, model_type="qwen3",
            num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06,
            rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
            torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True, use_sliding_window=False,
            vocab_size=151936,
        ),
        596_049_920,
        dict(qk_norm=True, qkv_bias=False, head_dim=128, num_heads=16),
    ),
    "Gemma-2B": (
        dict(
            architectures=["GemmaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=2,
            eos_token_id=1, head_dim=256, hidden_act="gelu", hidden_activation=None, hidden_size=2048,
            initializer_range=0.02, intermediate_size=16384, max_position_embeddings=8192, model_type="gemma",
            num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1, pad_token_id=0, rms_norm_eps=1e-06,
            rope_scaling=None, rope_theta=10000.0, torch_dtype="bfloat16", transformers_version="4.38.0.dev0",
            use_cache=True, vocab_size=256000,
        ),
        2_506_172_416,
        dict(activation="gelu_tanh", norm_offset=1.0, embed_scale=2048**0.5, tie_embeddings=True, head_dim=256),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    hf, params, fields = PUBLISHED[name]
    config = config_from_hf(hf)
    assert count_params(config) == params
    assert {field: getattr(config, field) for field in fields} == fields
    again = exported(config, model_type=hf["model_type"])
    assert again["model_type"] == hf["model_type"]
    assert config_from_hf(again) == config


# ---- refusals

ROPE = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "change", "words"),
    [
        ("gtp2", {}, "did you mean 'gpt2'"),
        ("bert", {}, "gpt2, llama, mistral, qwen2, qwen3"),
        (["x\n"], {}, "model_type"),
        ("gpt2", {"activation_function": "gelu_10"}, "activation_function"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"add_cross_attention": 0}, "add_cross_attention"),
        ("gpt2", {"n_head": 7}, "n_head"),
        ("gpt2", {"n_layers": 7}, "did you mean 'n_layer'"),
        ("gpt2", {"n_layer": 10**9}, "n_layer"),
        ("gpt2", {"n_layer": True}, "n_layer"),
        ("gpt2", {"n_embd": 2**63}, "n_embd"),
        ("gpt2", {"vocab_size": "5"}, "vocab_size"),
        ("gpt2", {"layer_norm_epsilon": -1}, "layer_norm_epsilon"),
        ("gpt2", {"tie_word_embeddings": None}, "tie_word_embeddings"),
        ("gpt2", {"rope_theta": 1.0}, "rope_theta"),
        ("gpt2", {"layer_types": ["full_attention"] * 12}, "layer_types"),
        ("gpt2", {"n_Layer": 7}, "'n_Layer' & did you mean 'n_layer'"),
        ("gpt2", {"hidden_size": 7}, "hidden_size"),
        ("llama", {"per_layer_config": {}}, "per_layer_config"),
        ("llama", {"rms_norm_epsilon": 1e-5}, "did you mean 'rms_norm_eps'"),
        ("llama", {"rope_thetas": 1e6}, "did you mean 'rope_theta'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling & llama3 & low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling & linear & factor"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling & dynamic & yarn"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "proportional"),
        ("llama", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type"),
        ("llama", {"rope_scaling": {**ROPE, "type": "linear"}}, "rope_scaling.type & contradicts & .rope_type"),
        ("llama", {"rope_scaling": {**ROPE, "betafast": 3}}, "rope_scaling & betafast & did you mean 'beta_fast'"),
        ("llama", {"rope_scaling": {**ROPE, "low_freq_factor": 3}}, "low_freq_factor & yarn"),
        ("llama", {"rope_scaling": {**ROPE, "truncate": None}}, "rope_scaling.truncate"),
        ("llama", {"rope_scaling": {**ROPE, "factor": True}}, "rope_scaling.factor"),
        ("llama", {"rope_scaling": {**ROPE, "beta_fast": 1e308}}, "rope_scaling.beta_fast"),
        ("llama", {"rope_scaling": {**ROPE, "mscale": "1"}}, "rope_scaling.mscale"),
        ("llama", {"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor & 0.5"),
        ("llama", {"rope_scaling": {**ROPE, "rope_theta": 1}}, "rope_theta"),
        ("llama", {"rope_scaling": {**ROPE, "original_max_position_embeddings": 0}}, "original_max_position"),
        ("llama", {"rope_scaling": {**ROPE, "original_max_position_embeddings": 8},
                   "original_max_position_embeddings": 9}, "original_max_position_embeddings=9 & contradicts"),
        ("llama", {"rope_scaling": ROPE, "rope_parameters": {**ROPE, "factor": 5.0}},
         "rope_scaling & contradicts & rope_parameters"),
        ("llama", {"rope_scaling": ROPE, "rope_parameters": {**ROPE, "rope_theta": 5.0}},
         "rope_scaling & contradicts & rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 2}}, "rope_parameters & factor"),
        ("llama", {"rope_parameters": [], "rope_theta": 1.0}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta=6.0 & contradicts"),
        ("llama", {"rope_theta": "x" * 5000}, "rope_theta"),
        ("llama", {"rope_theta": None}, "rope_theta"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act"),
        ("llama", {"num_key_value_heads": 5}, "num_kv_heads"),
        ("llama", {"head_dim": 7}, "head_dim"),
        ("llama", {"sliding_window": 5}, "sliding_window"),
        ("llama", {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ("llama", {"layer_types": ["full_attention"] * 31}, "layer_types & 32"),
        ("llama", {"auto_map": {"AutoModel": "evil.py"}}, "auto_map"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"layer_types": ["full_attention"] * 32}, "layer_types"),
        ("qwen2", {"attention_bias": False}, "attention_bias"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": [["full_attention"]] * 32}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "layer_types & use_sliding_window"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"] * 31 + ["linear_attention"]}, "layer_types"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope"),
        ("qwen3", {"num_key_value_heads": 0}, "num_key_value_heads"),
        ("gemma2", {}, "did you mean 'gemma'"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act & gelu_pytorch_tanh"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_represented_are_refused(model_type, change, words):
    with pytest.raises(UserError) as caught:
        config_from_hf({"model_type": model_type, **change})
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 500
    for word in words.split(" & "):
        assert word in message, message


@pytest.mark.parametrize(
    ("model_type", "kept"),
    [
        ("gpt2", {"output_past": True, "utterly new": 1}),
        (
            "llama",
            {"max_sequence_length": 2048, "unsloth_version": "2026.1", "unsloth_fixed": True, "pad_token": "</s>"},
        ),
        ("qwen2", {"freq": [1, 2], "_private": {}}),
    ],
)
def test_keys_that_nothing_reads_are_kept(model_type, kept):
    base = {"model_type": model_type, **kept}
    config = config_from_hf(base)
    assert config == config_from_hf({"model_type": model_type})
    assert kept_keys(base) == [name for name in kept if not name.startswith("_")]
    shallow = config.with_layers([0, 1])
    assert kept.items() <= edited_hf(base, shallow, dtype="float32")[0].items()


def test_what_transformers_reads_of_a_config_is_known():
    """Of any key that changes a function transformers' code has the name: declared, or read by some way of its own."""
    from transformers import CONFIG_MAPPING, cache_utils, configuration_utils, masking_utils, modeling_rope_utils

    def reads(source):
        names = r"\bconfig\.([a-z]\w*)", r"config,\s*[\"'](\w+)", r"(?:pop|get|setdefault)\(\s*[\"'](\w+)"
        return {name for pattern in names for name in re.findall(pattern, source)}

    shared = set(dir(configuration_utils.PreTrainedConfig))
    for module in (cache_utils, configuration_utils, masking_utils, modeling_rope_utils):
        shared |= reads(inspect.getsource(module))
    for name in FAMILIES:
        cls = CONFIG_MAPPING[name]
        declared = {*(field.name for field in dataclasses.fields(cls)), *cls.attribute_map, *cls.attribute_map.values()}
        modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        read = declared | shared | reads(inspect.getsource(modeling)) | reads(inspect.getsource(inspect.getmodule(cls)))
        for key in sorted(key for key in read if not key.startswith("_")):
            if key != "model_type" and key in kept_keys({"model_type": name, key: None}):
                with pytest.raises(UserError, match="unknown key"):
                    pytest.fail(f"{key} is kept: {config_from_hf({'model_type': name, key: None})}")


def test_hostile_sizes_are_refused_at_once():
    huge = {"hidden_size": 2**24, "intermediate_size": 2**24, "num_hidden_layers": 10_000, "vocab_size": 2**24}
    types = {"layer_types": ["full_attention"] * 1_000_000}
    tracemalloc.start()
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        for change in (huge, huge | types, types, {"num_attention_heads": 2**24, "head_dim": 2**24}):
            with pytest.raises(UserError):
                config_from_hf({"model_type": model_type, **change})
    with pytest.raises(UserError, match="parameters"):
        config_from_hf({"model_type": "gpt2", "n_embd": 12 * 2**20, "n_positions": 2**24})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_accepted_spellings():
    assert config_from_hf({"model_type": "llama", "rope_theta": 7}).rope_theta == 7.0
    both = {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_scaling": None}
    assert config_from_hf({"model_type": "llama", "_private": 1, **both}).rope_theta == 7.0
    assert config_from_hf({"model_type": "llama", "num_attention_heads": 8}).num_kv_heads == 8
    assert config_from_hf({"model_type": "gpt2", "n_inner": 5, "reorder_and_upcast_attn": True}).intermediate_size == 5
    assert config_from_hf({"model_type": "mistral", "sliding_window": None}).windows == (None,)
    same = {"layer_types": ["sliding_attention"] * 32, "partial_rotary_factor": 1.0}
    assert config_from_hf({"model_type": "mistral", **same}) == config_from_hf({"model_type": "mistral"})
    assert config_from_hf({"model_type": "llama", "layer_types": ["full_attention"] * 32}).kinds == (LayerKind(),)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_bias": True}, {"kinds": depth_scaled(2)}, {"norm": "layernorm"}, {"gated_mlp": False},
        {"kinds": WINDOWED.kinds, "mlp_bias": True}, {"num_heads": 6, "o_bias": True},
        {"qk_norm": True, "mlp_bias": True}, {"kinds": MIXED.kinds, "o_bias": True},
        {"kinds": (LayerKind(window=4), LayerKind(window=5))},
    ],
)  # fmt: skip
def test_models_that_no_family_computes_are_not_exported(change):
    with pytest.raises(UserError, match="no transformers family"):
        exported(dataclasses.replace(LLAMA, **change))
