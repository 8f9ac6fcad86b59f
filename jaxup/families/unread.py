"""Keys of config.json that decide nothing here, and what transformers makes of them.

Models on the Hub have keys that nothing reads: of the programs that saved them (`unsloth_version`), of early
conversions (`max_sequence_length`), of abandoned code (`output_past` of GPT-2 XL). They change no function, and are
kept. What transformers would read is not among them, nor a misspelt key.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

# What a class of configurations in transformers 5 has or reads whatever the family, beside the keys of families here
# and those that are known to change nothing: a key of such a name may change what it computes. A test compares.
READ = frozenset(
    """
    allow_global_per_layer_attribute_access allow_is_causal_skip attention_chunk_size attention_factor attribute_map
    base_config_key base_model_ep_plan base_model_fsdp_plan base_model_pp_plan base_model_tp_plan beta_fast
    beta_slow cache_dir commit_message config_class convert_rope_params_to_dict default_config_fields
    default_rope_type default_theta dict_dtype_to_str embed_dim experts_implementation extra_config_files
    extra_files factor fget first_k_dense_replace force_download from_dict from_json_file from_pretrained
    get_config_class get_config_dict get_mtp_config get_text_config gguf_file ignore_keys_at_rope_validation
    init_kwargs inputs_embeds is_causal is_custom_code is_heterogeneous is_remote_code json kv_sharing_modes kwargs
    local_files_only long_factor mscale mscale_all_dim mtp_layer_types mtp_mlp_layer_types mtp_per_layer_config
    nested_rope_parameter_keys num_heads num_mtp_layers number_of_conv_states optional per_layer_attributes
    per_layer_config proxies push_to_hub register_for_auto_class repo_id return_unused_kwargs revision rope_type
    save_pretrained serialize_explicit_per_layer_config short_factor standardize_rope_params sub_config_name
    sub_configs sub_configs_defaults subfolder to_dict to_diff_dict to_json_file to_json_string token truncate
    trust_remote_code type update update_from_string use_return_dict validate validate_architecture
    validate_layer_type validate_output_attentions validate_rope validate_token_ids
    """.split()  # noqa: SIM905
)
_NEAR = 0.8  # of difflib's ratio: a slip of the keyboard, and not another word


def misspelt(name: str, decisive: Collection[str]) -> str | None:
    """The key among those that decide something that `name` was probably meant to be."""
    return next(iter(difflib.get_close_matches(name[:100].lower(), sorted(decisive), n=1, cutoff=_NEAR)), None)


def unread(hf: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """The keys of a config.json that are not `known`; those that begin with "_" are transformers' private notes."""
    return [name for name in hf if name not in known and not name.startswith("_")]
