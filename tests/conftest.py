"""What holds for all tests: eight CPU devices, no network, shapes and types checked at run time."""

import importlib
import importlib.metadata
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
        # They go through MLIR, which takes four times as long. Newer versions know no other way, and end at a flag
        # that they do not know.
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
    ]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jaxtyping
import pytest

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("jaxup", deadline=None)
hypothesis.settings.load_profile("jaxup")

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
    import parity

    torch.set_num_threads(1)  # tiny models: several threads only wait for each other
    return parity.hf_model
