"""Which transformers models this project can express: one file per family, and here the table of them.

Importing and exporting go through the same tables; see `jaxup.families.family`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxup.errors import UserError, suggest
from jaxup.families.family import Family, placed
from jaxup.families.gemma import GEMMA
from jaxup.families.gpt2 import GPT2
from jaxup.families.keys import parsed, short
from jaxup.families.llama import LLAMA
from jaxup.families.mistral import MISTRAL
from jaxup.families.native import NATIVE
from jaxup.families.qwen import QWEN2, QWEN3
from jaxup.families.unread import READ, misspelt, unread
from jaxup.families.windows import layer_types
from jaxup.model.config import ModelConfig
from jaxup.model.spec import BESIDE, count_params

# Those of transformers, in the order in which an export prefers them.
FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA)}
_READ = {**FAMILIES, NATIVE.model_type: NATIVE}

# Keys of any config.json that do not change the logits of a causal model in evaluation.
_IGNORED = frozenset(
    """
    model_type architectures transformers_version dtype torch_dtype use_cache tokenizer_class name_or_path
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id prefix
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript
    use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_decoder tie_encoder_decoder cross_attention_hidden_size
    finetuning_task task_specific_params problem_type id2label label2id num_labels
    attn_pdrop embd_pdrop resid_pdrop attention_dropout hidden_dropout summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout summary_last_dropout summary_hidden_size
    classifier_dropout
    n_ctx n_special predict_special_tokens reorder_and_upcast_attn pretraining_tp gradient_checkpointing
    attn_implementation max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
    """.split()  # noqa: SIM905
)

# transformers 5 reads the first, 4 the other; neither minds the other.
_DTYPES = ("dtype", "torch_dtype")

# Ten times the largest model known: a hostile file is refused before anything is allocated for it.
_MAX_PARAMS = 2**44


def family_of_hf(hf: Mapping[str, Any]) -> Family:
    """The family that a config.json names; UserError if none is known by that name."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READ:
        raise UserError(f"model_type={short(model_type)} is not supported{suggest(str(model_type), _READ)}")
    return _READ[model_type]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that computes what transformers computes for this config.json.

    Absent keys take transformers' defaults. UserError names the key that no ModelConfig can represent, that is
    unknown and read by transformers, or that is nearly one that decides something. `kept_keys` are passed over.
    """
    family = family_of_hf(hf)
    for name in kept_keys(hf):
        meant = misspelt(name, family.decisive)
        if meant or name in READ or any(name in other.decisive for other in _READ.values()):
            hint = f"did you mean {meant!r}?" if meant else ""
            raise UserError(f"unknown key {short(name)} of a {family.model_type} model", hint=hint)
    for name, value in hf.items():
        # `==` alone would let 0 pass for False.
        accepted = family.fixed.get(name)
        if accepted is not None and not any(value == a and type(value) is type(a) for a in accepted):
            raise UserError(f"{name}={short(value)} is not supported, only {short(accepted[0])}")
    fields: dict[str, Any] = {**family.fields, **family.has_bias}
    for key in family.keys:
        fields |= dict.fromkeys(key.fields, parsed(key.name, hf.get(key.name, key.default), key.parse))
    for rule in family.rules:
        fields |= rule.read(hf, fields)
    config = ModelConfig(**fields)
    if (total := count_params(config)) > _MAX_PARAMS:
        raise UserError(f"the sizes make a model of {total:.1e} parameters, more than {_MAX_PARAMS:.1e}")
    return config


def kept_keys(hf: Mapping[str, Any]) -> list[str]:
    """Of a config.json that can be represented, the keys that nothing reads; UserError as `family_of_hf`."""
    return unread(hf, family_of_hf(hf).decisive | _IGNORED)


def config_to_hf(
    config: ModelConfig,
    *,
    dtype: str,
    eos_token_id: int | list[int] | None,
    bos_token_id: int | None,
    model_type: str | None = None,
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read as the same function; `dtype` is that of the tensors.

    The family, and errors, are those of `with_family_biases`.
    """
    family, _ = with_family_biases(config, model_type)
    token_ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    return family.to_hf(config) | dict.fromkeys(_DTYPES, dtype) | token_ids | {"use_cache": True}


def with_family_biases(config: ModelConfig, model_type: str | None = None) -> tuple[Family, ModelConfig]:
    """The family that `config` is exported as, and the config that the export reads back as.

    The family is `model_type` if it can express the model, else the first that can, preferring one
    that adds nothing. A bias that the family always has, or has together with another, appears
    although the model has none, and the export writes zeros. Factors of norms are folded into their weights.
    UserError if no family can express it, unless `model_type` is that of NATIVE, which can; and for one with
    parameters beside the decoder's own, which no model directory has.
    """
    if config.beside:
        what = (
            f"model: {BESIDE}{config.beside[0].path} is no parameter of a decoder, and a model directory has no others"
        )
        raise UserError(what, hint="write ModelConfig.alone() and without_beside(params)")
    if model_type == NATIVE.model_type:
        return NATIVE, config
    if need := native_only(config):
        hint = "jaxup.save(model, out, native=True) writes what jaxup.load reads"
        raise UserError(f"model: no transformers family computes this: all need {need}", hint=hint)
    config = folded(config)
    able, obstacles = [], []
    for family in FAMILIES.values():
        if needs := ", ".join(family.obstacles(config)):
            obstacles.append(f"{family.model_type} needs {needs}")
        else:
            able.append((family, config_from_hf(family.to_hf(config))))
    if not able:
        raise UserError(f"model: no transformers family computes this: {'; '.join(obstacles)}")
    # The sort is stable: among equals the order of FAMILIES holds.
    plain = dataclasses.replace(
        config, scaled_init=True, embed_std=0.0
    )  # what no config.json has and none computes with
    return sorted(able, key=lambda pair: (pair[0].model_type != model_type, pair[1] != plain))[0]


def native_only(config: ModelConfig) -> str | None:
    """What all families of transformers need of where layers normalise and `config` has otherwise; None: nothing."""
    return next(placed(folded(config)), None)


def folded(config: ModelConfig) -> ModelConfig:
    """Of the same model with the factors of its norms in their weights."""
    kinds = tuple(dataclasses.replace(kind, norm_factor=1.0) for kind in config.kinds)
    return dataclasses.replace(config, kinds=kinds)


def edited_hf(base: Mapping[str, Any], config: ModelConfig, *, dtype: str) -> tuple[dict[str, Any], ModelConfig]:
    """The config.json of a model of another depth, or another vocabulary, of the family of `base`.

    Args:
      base: a config.json; what need not change for it to be `config` stays as it is written there.
      dtype: of the tensors.

    Returns:
      (config.json, the config that it reads back as: with the biases that the family always has).

    Raises:
      UserError: the family cannot say it. Names what it lacks, or the fields with both values.
    """
    family = family_of_hf(base)
    if needs := ", ".join(family.obstacles(config)):
        raise UserError(f"a {family.model_type} model cannot be what the plan makes: it needs {needs}")
    wanted = family.to_hf(config)
    before, exported, hf = config_from_hf(base), config_from_hf(wanted), dict(base)
    for key in family.keys:
        if any(getattr(before, field) != getattr(exported, field) for field in key.fields):
            hf[key.name] = wanted[key.name]
    hf |= dict.fromkeys([key for key in _DTYPES if key in hf] or _DTYPES, dtype)
    if isinstance(hf.get("layer_types"), list):
        hf["layer_types"] = layer_types(exported)
    for rule in family.rules:
        candidate = hf | {name: wanted[name] for name in rule.names if name in wanted}
        changed = any(getattr(before, field) != getattr(exported, field) for field in rule.fields)
        if changed or (_differences(candidate, exported) is None and _differences(hf, exported) is not None):
            hf = candidate
    if (differences := _differences(hf, exported)) is not None:
        raise UserError(f"config.json of a {family.model_type} model cannot say what the plan makes: {differences}")
    return hf, exported


def _differences(hf: Mapping[str, Any], config: ModelConfig) -> str | None:
    """What keeps a config.json from being `config`, None if nothing does."""
    try:
        read = config_from_hf(hf)
    except UserError as error:
        return str(error)
    pairs = ((field.name, getattr(config, field.name), getattr(read, field.name)) for field in dataclasses.fields(read))
    return ", ".join(f"{name} is {ours!r}, there {theirs!r}" for name, ours, theirs in pairs if ours != theirs) or None
