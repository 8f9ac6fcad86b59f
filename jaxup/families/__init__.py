"""Which transformers models this project can express, as one table per family.

A table is used in both directions, so that an import and an export cannot disagree: `keys` relates
config.json to `ModelConfig`, `tensors` relates the names and layouts of tensors to the params tree.
A key or tensor that no row mentions is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxup.errors import UserError, suggest
from jaxup.families import keys
from jaxup.families.keys import GPT2_SIZES, LLAMA_SIZES, ROPE, UNIFORM, WINDOWS, Rule, parsed, short, suggest_key
from jaxup.families.layouts import TensorRow
from jaxup.model.config import ModelConfig


class Key(NamedTuple):
    """A key of config.json that decides what the model computes."""

    name: str
    fields: tuple[str, ...]  # of ModelConfig; all get the value
    default: Any  # what transformers takes when the key is absent
    parse: Callable[[Any], Any]  # the value, or ValueError saying what is accepted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    rules: tuple[Rule, ...]  # applied after the keys, in this order
    fixed: dict[str, tuple[Any, ...]]  # other keys that change the function: the values accepted
    requires: dict[str, Any]  # the fields of ModelConfig that nothing in config.json decides
    obstacle: Callable[[ModelConfig], str | None]  # what the sizes must be, if they are not
    has_bias: dict[str, bool] = dataclasses.field(default_factory=dict)  # transformers always has these
    tensors: tuple[TensorRow, ...]
    ignored_tensors: tuple[str, ...]  # constant buffers that old versions saved
    optional_prefix: str = ""  # may be absent from the names of a file


# ---- the families

# Keys of any config.json that do not change the logits of a causal model in evaluation.
_IGNORED = frozenset(
    """
    model_type architectures transformers_version dtype torch_dtype use_cache tokenizer_class name_or_path
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id prefix
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript
    use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_decoder tie_encoder_decoder cross_attention_hidden_size
    finetuning_task task_specific_params problem_type id2label label2id num_labels
    attn_pdrop embd_pdrop resid_pdrop attention_dropout hidden_dropout summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout summary_hidden_size
    n_ctx n_special predict_special_tokens reorder_and_upcast_attn pretraining_tp gradient_checkpointing
    attn_implementation max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
    """.split()  # noqa: SIM905
)

# Keys of any config.json that would change the function, with the values that do not.
_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "auto_map": (None,),  # code of the repository's own, which is never run
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
}


def _norm(path: str, name: str, *, bias: bool = False) -> tuple[TensorRow, ...]:
    rows = (TensorRow(f"{name}.weight", (f"{path}.scale",), "flat"),)
    return (*rows, TensorRow(f"{name}.bias", (f"{path}.bias",), "flat")) if bias else rows


def _projection(name: str, layout, *modules: str, inputs: int = 1) -> tuple[TensorRow, ...]:
    return (
        TensorRow(f"{name}.weight", tuple(f"{m}.kernel" for m in modules), layout, inputs),
        TensorRow(f"{name}.bias", tuple(f"{m}.bias" for m in modules), "flat"),
    )


_HEAD = TensorRow("lm_head.weight", ("lm_head.kernel",), "linear")
_ATTN, _MLP = "blocks.self_attn", "blocks.mlp"

_GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys=(
        Key("vocab_size", ("vocab_size",), 50257, keys.size),
        Key("n_positions", ("max_positions",), 1024, keys.size),
        Key("n_embd", ("hidden_size",), 768, keys.size),
        Key("n_layer", ("num_layers",), 12, keys.layers),
        Key("n_head", ("num_heads", "num_kv_heads"), 12, keys.size),
        Key("n_inner", ("intermediate_size",), None, keys.optional_size),  # null: 4 * n_embd
        Key("activation_function", ("activation",), "gelu_new", keys.activation),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5, keys.positive),
        Key("initializer_range", ("init_std",), 0.02, keys.positive),
        Key("scale_attn_by_inverse_layer_idx", ("depth_scaled_attention",), False, keys.boolean),
        Key("tie_word_embeddings", ("tie_embeddings",), True, keys.boolean),
    ),
    rules=(GPT2_SIZES,),
    fixed={**_FIXED, "scale_attn_weights": (True,), "layer_types": (None,)},
    requires={"norm": "layernorm", "positions": "learned", "rope_theta": None, "gated_mlp": False, "qk_norm": False,
              "sliding_window": None},
    obstacle=lambda c: None if c.num_kv_heads == c.num_heads == c.hidden_size / c.head_dim else (
        "num_kv_heads=num_heads=hidden_size/head_dim"),
    has_bias=dict.fromkeys(("norm_bias", "qkv_bias", "o_bias", "mlp_bias"), True),
    tensors=(
        TensorRow("transformer.wte.weight", ("embed_tokens",), "same"),
        TensorRow("transformer.wpe.weight", ("embed_positions",), "same"),
        *_norm("blocks.input_layernorm", "transformer.h.{layer}.ln_1", bias=True),
        *_projection("transformer.h.{layer}.attn.c_attn", "conv1d", *(f"{_ATTN}.{x}_proj" for x in "qkv")),
        *_projection("transformer.h.{layer}.attn.c_proj", "conv1d", f"{_ATTN}.o_proj", inputs=2),
        *_norm("blocks.post_attention_layernorm", "transformer.h.{layer}.ln_2", bias=True),
        *_projection("transformer.h.{layer}.mlp.c_fc", "conv1d", f"{_MLP}.up_proj"),
        *_projection("transformer.h.{layer}.mlp.c_proj", "conv1d", f"{_MLP}.down_proj"),
        *_norm("norm", "transformer.ln_f", bias=True),
        _HEAD,
    ),
    ignored_tensors=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
    optional_prefix="transformer.",
)  # fmt: skip


def _llama_keys(
    *, vocab_size: int = 32000, kv_heads, head_dim=None, intermediate_size: int, max_positions: int
) -> tuple[Key, ...]:
    return (
        Key("vocab_size", ("vocab_size",), vocab_size, keys.size),
        Key("hidden_size", ("hidden_size",), 4096, keys.size),
        Key("intermediate_size", ("intermediate_size",), intermediate_size, keys.size),
        Key("num_hidden_layers", ("num_layers",), 32, keys.layers),
        Key("num_attention_heads", ("num_heads",), 32, keys.size),
        Key("num_key_value_heads", ("num_kv_heads",), kv_heads, keys.optional_size),  # null: as many as heads
        Key("head_dim", ("head_dim",), head_dim, keys.optional_size),  # null: hidden_size // heads
        Key("max_position_embeddings", ("max_positions",), max_positions, keys.size),
        Key("hidden_act", ("activation",), "silu", keys.activation),
        Key("rms_norm_eps", ("norm_eps",), 1e-6, keys.positive),
        Key("initializer_range", ("init_std",), 0.02, keys.positive),
        Key("tie_word_embeddings", ("tie_embeddings",), False, keys.boolean),
    )


_ROTARY = {**_FIXED, "partial_rotary_factor": (None, 1.0, 1)}
_NO_BIASES = {"attention_bias": (False, None), "mlp_bias": (False, None)}
_RMS_NORM = {"norm": "rmsnorm", "norm_bias": False, "positions": "rope", "gated_mlp": True,
             "depth_scaled_attention": False}  # fmt: skip

_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(
        *_llama_keys(kv_heads=None, intermediate_size=11008, max_positions=2048),
        Key("attention_bias", ("qkv_bias", "o_bias"), False, keys.boolean),
        Key("mlp_bias", ("mlp_bias",), False, keys.boolean),
    ),
    rules=(LLAMA_SIZES, ROPE, UNIFORM),
    fixed={**_ROTARY, "sliding_window": (None,)},
    requires={**_RMS_NORM, "qk_norm": False, "sliding_window": None},
    # transformers 5 refuses to load what is not
    obstacle=lambda c: "hidden_size to be a multiple of num_heads" if c.hidden_size % c.num_heads else None,
    tensors=(
        TensorRow("model.embed_tokens.weight", ("embed_tokens",), "same"),
        *_norm("blocks.input_layernorm", "model.layers.{layer}.input_layernorm"),
        *(row for x in "qkv" for row in
          _projection(f"model.layers.{{layer}}.self_attn.{x}_proj", "linear", f"{_ATTN}.{x}_proj")),
        *_projection("model.layers.{layer}.self_attn.o_proj", "linear", f"{_ATTN}.o_proj", inputs=2),
        *_norm(f"{_ATTN}.q_norm", "model.layers.{layer}.self_attn.q_norm"),
        *_norm(f"{_ATTN}.k_norm", "model.layers.{layer}.self_attn.k_norm"),
        *_norm("blocks.post_attention_layernorm", "model.layers.{layer}.post_attention_layernorm"),
        *(row for x in ("gate", "up", "down") for row in
          _projection(f"model.layers.{{layer}}.mlp.{x}_proj", "linear", f"{_MLP}.{x}_proj")),
        *_norm("norm", "model.norm"),
        _HEAD,
    ),
    ignored_tensors=("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)  # fmt: skip

_MISTRAL = dataclasses.replace(
    _LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=(
        *_llama_keys(kv_heads=8, intermediate_size=14336, max_positions=131072),
        Key("sliding_window", ("sliding_window",), 4096, keys.optional_size),
    ),
    fixed={**_ROTARY, **_NO_BIASES},
    requires={**_RMS_NORM, "qk_norm": False, "qkv_bias": False, "o_bias": False, "mlp_bias": False,
              "layer_types": None},
    obstacle=lambda c: None,
)  # fmt: skip

_QWEN2 = dataclasses.replace(
    _MISTRAL,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=_llama_keys(vocab_size=151936, kv_heads=32, intermediate_size=22016, max_positions=32768),
    rules=(LLAMA_SIZES, ROPE, WINDOWS),
    fixed={**_ROTARY, "use_mrope": (False,)},
    requires={**_RMS_NORM, "qk_norm": False, "o_bias": False, "mlp_bias": False},
    has_bias={"qkv_bias": True},
)

_QWEN3 = dataclasses.replace(
    _QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(
        *_llama_keys(vocab_size=151936, kv_heads=32, head_dim=128, intermediate_size=22016, max_positions=32768),
        Key("attention_bias", ("qkv_bias", "o_bias"), False, keys.boolean),
    ),
    fixed=_ROTARY,
    requires={**_RMS_NORM, "qk_norm": True, "mlp_bias": False},
    has_bias={},
)

# In the order in which an export prefers them.
FAMILIES = {family.model_type: family for family in (_GPT2, _LLAMA, _MISTRAL, _QWEN2, _QWEN3)}

# Ten times the largest model known: a hostile file is refused before anything is allocated for it.
_MAX_PARAMS = 2**44


# ---- config.json <-> ModelConfig


def family_of_hf(hf: Mapping[str, Any]) -> Family:
    """The family that a config.json names; UserError if none is known by that name."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type={short(model_type)} is not supported{suggest(str(model_type), FAMILIES)}")
    return FAMILIES[model_type]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that computes what transformers computes for this config.json.

    Absent keys take transformers' defaults. UserError names the key that no ModelConfig can
    represent, or that is unknown; keys starting with "_" are transformers' private notes.
    """
    family = family_of_hf(hf)
    known = {key.name for key in family.keys} | {name for rule in family.rules for name in rule.names}
    known |= set(family.fixed) | _IGNORED
    for name, value in hf.items():
        if name not in known and not name.startswith("_"):
            raise UserError(f"unknown key {short(name)} of a {family.model_type} model{suggest_key(name, known)}")
        # `==` alone would let 0 pass for False.
        accepted = family.fixed.get(name)
        if accepted is not None and not any(value == a and type(value) is type(a) for a in accepted):
            raise UserError(f"{name}={short(value)} is not supported, only {short(accepted[0])}")
    fields: dict[str, Any] = {**family.requires, **family.has_bias}
    for key in family.keys:
        fields |= dict.fromkeys(key.fields, parsed(key.name, hf.get(key.name, key.default), key.parse))
    for rule in family.rules:
        fields |= rule.read(hf, fields)
    config = ModelConfig(**fields)
    if (total := _kernel_params(config)) > _MAX_PARAMS:
        raise UserError(f"the sizes make a model of {total:.1e} parameters, more than {_MAX_PARAMS:.1e}")
    return config


def config_to_hf(
    config: ModelConfig,
    *,
    dtype: str,
    eos_token_id: int | list[int] | None,
    bos_token_id: int | None,
    model_type: str | None = None,
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read as the same function; `dtype` is that of the tensors.

    The family is `model_type` if it can express the model, else the first that can, preferring one
    that adds nothing. A bias that the family always has, or has together with another, appears
    although the model has none: `with_family_biases` gives the model as transformers will see it,
    and the export writes zeros. UserError if no family can express the model.
    """
    family, _ = with_family_biases(config, model_type)
    token_ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    # transformers 4 reads `torch_dtype`, 5 `dtype`; neither minds the other.
    return _keys_of(family, config) | {"dtype": dtype, "torch_dtype": dtype, **token_ids, "use_cache": True}


def with_family_biases(config: ModelConfig, model_type: str | None = None) -> tuple[Family, ModelConfig]:
    """The family that `config` is exported as, and the config that the export reads back as."""
    able, obstacles = [], []
    for family in FAMILIES.values():
        needs = [f"{f}={v!r}" for f, v in family.requires.items() if getattr(config, f) != v]
        needs += filter(None, [family.obstacle(config)])
        if needs:
            obstacles.append(f"{family.model_type} needs {', '.join(needs)}")
        else:
            able.append((family, config_from_hf(_keys_of(family, config))))
    if not able:
        raise UserError(f"model: no transformers family computes this: {'; '.join(obstacles)}")
    # The sort is stable: among equals the order of FAMILIES holds.
    return sorted(able, key=lambda pair: (pair[0].model_type != model_type, pair[1] != config))[0]


def _keys_of(family: Family, config: ModelConfig) -> dict[str, Any]:
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key in family.keys:
        values = [getattr(config, field) for field in key.fields]
        # Several fields under one key are either equal counts or biases that come together.
        hf[key.name] = any(values) if key.parse is keys.boolean else values[0]
        if key.parse is keys.activation:
            hf[key.name] = next(name for name, ours in keys.ACTIVATIONS.items() if ours == values[0])
    for rule in family.rules:
        hf |= rule.write(config)
    return hf


def _kernel_params(config: ModelConfig) -> int:
    c = config
    attention = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
    mlp = (3 if c.gated_mlp else 2) * c.hidden_size * c.intermediate_size
    positions = c.max_positions if c.positions == "learned" else 0
    return c.num_layers * (attention + mlp) + c.hidden_size * (2 * c.vocab_size + positions)
