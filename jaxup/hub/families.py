"""Which transformers models this project can express, as one table per family.

A table is used in both directions, so that an import and an export cannot disagree: `keys` relates
config.json to `ModelConfig`, `tensors` relates the names and layouts of tensors to the params tree.
A key or tensor that no row mentions is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxup.errors import UserError, suggest
from jaxup.hub.layouts import TensorRow
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
    fixed: dict[str, tuple[Any, ...]]  # other keys that change the function: values accepted, first written
    requires: dict[str, Any]  # the fields of ModelConfig that no key decides
    has_bias: dict[str, bool] = dataclasses.field(default_factory=dict)  # transformers always has these
    tensors: tuple[TensorRow, ...]
    ignored_tensors: tuple[str, ...]  # constant buffers that old versions saved
    optional_prefix: str = ""  # may be absent from the names of a file


# ---- values of config.json

# Far above any model, and low enough that a hostile file cannot make the shapes overflow.
_MAX_SIZE, _MAX_LAYERS = 2**24, 10_000


def _size(value, largest: int = _MAX_SIZE):
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"an integer from 1 to {largest}")
    return value


def _layers(value):
    return _size(value, _MAX_LAYERS)


def _optional_size(value):
    return None if value is None else _size(value)


def _positive(value):
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError("a positive number")
    return float(value)


def _bool(value):
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


# Several of transformers' names are one function. The first name of each is the one written.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu": "gelu", "gelu_python": "gelu",
    "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip


def _activation(value):
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise ValueError(f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


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
    "layer_types": (None,),
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
        Key("vocab_size", ("vocab_size",), 50257, _size),
        Key("n_positions", ("max_positions",), 1024, _size),
        Key("n_embd", ("hidden_size",), 768, _size),
        Key("n_layer", ("num_layers",), 12, _layers),
        Key("n_head", ("num_heads", "num_kv_heads"), 12, _size),
        Key("n_inner", ("intermediate_size",), None, _optional_size),  # null: 4 * n_embd
        Key("activation_function", ("activation",), "gelu_new", _activation),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5, _positive),
        Key("initializer_range", ("init_std",), 0.02, _positive),
        Key("scale_attn_by_inverse_layer_idx", ("depth_scaled_attention",), False, _bool),
        Key("tie_word_embeddings", ("tie_embeddings",), True, _bool),
    ),
    fixed={**_FIXED, "scale_attn_weights": (True,)},
    requires={"norm": "layernorm", "positions": "learned", "rope_theta": None, "gated_mlp": False,
              "sliding_window": None},
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


def _llama_keys(*, kv_heads, intermediate_size: int, max_positions: int) -> tuple[Key, ...]:
    return (
        Key("vocab_size", ("vocab_size",), 32000, _size),
        Key("hidden_size", ("hidden_size",), 4096, _size),
        Key("intermediate_size", ("intermediate_size",), intermediate_size, _size),
        Key("num_hidden_layers", ("num_layers",), 32, _layers),
        Key("num_attention_heads", ("num_heads",), 32, _size),
        Key("num_key_value_heads", ("num_kv_heads",), kv_heads, _optional_size),  # null: as many as heads
        Key("head_dim", ("head_dim",), None, _optional_size),  # null: hidden_size // heads
        Key("max_position_embeddings", ("max_positions",), max_positions, _size),
        Key("hidden_act", ("activation",), "silu", _activation),
        Key("rms_norm_eps", ("norm_eps",), 1e-6, _positive),
        Key("initializer_range", ("init_std",), 0.02, _positive),
        Key("rope_theta", ("rope_theta",), 10000.0, _positive),
        Key("tie_word_embeddings", ("tie_embeddings",), False, _bool),
    )


_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(
        *_llama_keys(kv_heads=None, intermediate_size=11008, max_positions=2048),
        Key("attention_bias", ("qkv_bias", "o_bias"), False, _bool),
        Key("mlp_bias", ("mlp_bias",), False, _bool),
    ),
    fixed={**_FIXED, "sliding_window": (None,), "partial_rotary_factor": (None, 1.0)},
    requires={"norm": "rmsnorm", "norm_bias": False, "positions": "rope", "gated_mlp": True,
              "sliding_window": None, "depth_scaled_attention": False},
    tensors=(
        TensorRow("model.embed_tokens.weight", ("embed_tokens",), "same"),
        *_norm("blocks.input_layernorm", "model.layers.{layer}.input_layernorm"),
        *(row for x in "qkv" for row in
          _projection(f"model.layers.{{layer}}.self_attn.{x}_proj", "linear", f"{_ATTN}.{x}_proj")),
        *_projection("model.layers.{layer}.self_attn.o_proj", "linear", f"{_ATTN}.o_proj", inputs=2),
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
        Key("sliding_window", ("sliding_window",), 4096, _optional_size),
    ),
    fixed={**_FIXED, "attention_bias": (False, None), "mlp_bias": (False, None), "partial_rotary_factor": (None, 1.0)},
    requires={k: v for k, v in _LLAMA.requires.items() if k != "sliding_window"}
    | {"qkv_bias": False, "o_bias": False, "mlp_bias": False},
)

# In the order in which an export prefers them.
FAMILIES = {family.model_type: family for family in (_GPT2, _LLAMA, _MISTRAL)}


# ---- config.json <-> ModelConfig


def family_of_hf(hf: Mapping[str, Any]) -> Family:
    """The family that a config.json names; UserError if none is known by that name."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type={_short(model_type)} is not supported{suggest(str(model_type), FAMILIES)}")
    return FAMILIES[model_type]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that computes what transformers computes for this config.json.

    Absent keys take transformers' defaults. UserError names the key that no ModelConfig can
    represent, or that is unknown; keys starting with "_" are transformers' private notes.
    """
    family = family_of_hf(hf)
    known = {key.name for key in family.keys} | set(family.fixed) | _IGNORED
    if rope := "rope_theta" in known:
        known |= {"rope_scaling", "rope_parameters"}
    for name, value in hf.items():
        if name not in known and not name.startswith("_"):
            raise UserError(f"unknown key {_short(name)} of a {family.model_type} model{suggest_key(name, known)}")
        # `==` alone would let 0 pass for False.
        accepted = family.fixed.get(name)
        if accepted is not None and not any(value == a and type(value) is type(a) for a in accepted):
            raise UserError(f"{name}={_short(value)} is not supported, only {_short(accepted[0])}")
    values = {**hf, "rope_theta": _rope_theta(hf)} if rope else hf
    fields: dict[str, Any] = {**family.requires, **family.has_bias}
    for key in family.keys:
        value = values.get(key.name, key.default)
        try:
            parsed = key.parse(value)
        except ValueError as error:
            raise UserError(f"{key.name}={_short(value)} is not supported, only {error}") from None
        fields |= dict.fromkeys(key.fields, parsed)

    hidden, heads = fields["hidden_size"], fields["num_heads"]
    if family is _GPT2:
        if hidden % heads:
            raise UserError(f"n_embd={hidden} is not a multiple of n_head={heads}")
        fields["head_dim"] = hidden // heads
        fields["intermediate_size"] = fields["intermediate_size"] or 4 * hidden
    else:
        fields["head_dim"] = fields["head_dim"] or hidden // heads
        fields["num_kv_heads"] = fields["num_kv_heads"] or heads
    return ModelConfig(**fields)


def config_to_hf(
    config: ModelConfig, *, dtype: str, eos_token_id: int | list[int] | None, bos_token_id: int | None
) -> dict[str, Any]:
    """A config.json that transformers reads as the same function; `dtype` is that of the tensors.

    A bias that the family always has, or has together with another, appears in it although the
    model has none: `with_family_biases` gives the model as transformers will see it, and the export
    writes zeros. UserError if no family can express the model.
    """
    family = _family_for(config)
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key in family.keys:
        values = [getattr(config, field) for field in key.fields]
        # Several fields under one key are either equal counts or biases that come together.
        hf[key.name] = any(values) if key.parse is _bool else values[0]
        if key.parse is _activation:
            hf[key.name] = next(name for name, ours in _ACTIVATIONS.items() if ours == values[0])
    if family is _GPT2:
        hf["scale_attn_weights"] = True
    else:
        # transformers 4 reads `rope_theta`, transformers 5 `rope_parameters`.
        hf["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return hf | {"dtype": dtype, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "use_cache": True}


def with_family_biases(config: ModelConfig) -> tuple[Family, ModelConfig]:
    """The family that `config` is exported as, and the config that the export reads back as."""
    hf = config_to_hf(config, dtype="float32", eos_token_id=None, bos_token_id=None)
    return FAMILIES[hf["model_type"]], config_from_hf(hf)


def _family_for(config: ModelConfig) -> Family:
    whole_heads = config.num_heads * config.head_dim == config.hidden_size
    obstacles = []
    for family in FAMILIES.values():
        needs = [f"{f}={v!r}" for f, v in family.requires.items() if getattr(config, f) != v]
        if family is _GPT2 and not (whole_heads and config.num_kv_heads == config.num_heads):
            needs.append("num_kv_heads=num_heads=hidden_size/head_dim")
        if family is _LLAMA and config.hidden_size % config.num_heads:
            needs.append("hidden_size to be a multiple of num_heads")  # transformers 5 refuses to load it
        if not needs:
            return family
        obstacles.append(f"{family.model_type} needs {', '.join(needs)}")
    raise UserError(f"model: no transformers family computes this: {'; '.join(obstacles)}")


def _rope_theta(hf: Mapping[str, Any]) -> Any:
    """The one theta that transformers 4's and 5's spellings agree on."""
    found = {"rope_theta": hf["rope_theta"]} if "rope_theta" in hf else {}
    for name in ("rope_scaling", "rope_parameters"):
        value = hf.get(name)
        if value is None:
            continue
        if not isinstance(value, dict) or set(value) - {"rope_type", "type", "rope_theta"}:
            raise UserError(f"{name}={_short(value)} is not supported, only rope_type 'default' with a rope_theta")
        kinds = [value[k] for k in ("rope_type", "type") if k in value]
        if any(kind != "default" for kind in kinds):
            raise UserError(f"{name}={_short(value)} is not supported, only rope_type 'default'")
        if "rope_theta" in value:
            found[f"{name}.rope_theta"] = value["rope_theta"]
    (first, theta), *others = found.items() or [("", 10000.0)]
    for name, other in others:
        if other != theta:
            raise UserError(f"{first}={_short(theta)} contradicts {name}={_short(other)}")
    return theta


def suggest_key(name: str, known) -> str:
    """A suggestion only if one is near: the list of all known keys would fill a screen."""
    near = suggest(name[:100], sorted(known))
    return near if near.startswith("; did you mean") else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
