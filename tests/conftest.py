"""What holds for all tests: eight CPU devices, no network, shapes and types checked at run time."""

import importlib
import os
import sys

# Before jax is imported: it reads them once.
# The programs of the tests are tiny: compiling them takes far longer than running them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest

jaxtyping.install_import_hook("jaxup", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def torch():
    """The oracle. Its CPU builds exist for Python 3.11 only: elsewhere its tests are skipped."""
    if sys.version_info >= (3, 12):
        return pytest.importorskip("torch")
    return importlib.import_module("torch")


@pytest.fixture(scope="session")
def hf_model(torch):
    """make(model_type, seed=0, **config) -> a small transformers model with far from trivial weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": dict(vocab_size=61, n_embd=24, n_layer=3, n_head=3, n_positions=64),
        "llama": dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
                      num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=64),
    }  # fmt: skip
    sizes["mistral"] = sizes["llama"] | {"sliding_window": 5}
    ids = {"bos_token_id": 0, "eos_token_id": 1}

    def make(model_type, seed=0, **config):
        torch.manual_seed(seed)
        hf = AutoConfig.for_model(model_type, **{**sizes[model_type], **ids, **config})
        hf._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(hf).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                # Norms around one and not at one; biases not at zero: a mix-up must show.
                p.normal_(1.0 if "ln_" in name or "norm" in name else 0.0, 0.15)
        return model

    return make
