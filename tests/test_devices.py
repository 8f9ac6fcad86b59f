"""That a run computes on what the machine has, and compiles a program once."""

import os
import time
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax._src import hardware_utils
from jax.experimental import compilation_cache

from jaxup import devices
from jaxup.errors import UserError


@pytest.fixture
def config():
    """jax as a user starts it, who has said nothing of platforms and caches."""
    keys = ("jax_platforms", "jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {key: getattr(jax.config, key) for key in keys}
    jax.config.update("jax_platforms", "")
    yield jax.config
    for key, value in before.items():
        jax.config.update(key, value)
    compilation_cache.compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("there", "hidden", "message"),
    [
        ("tpu", "", "devices: this machine has TPUs, and jax sees none; install jaxup[tpu], end what else uses it"),
        ("gpu", "", "devices: this machine has NVIDIA GPUs, and jax sees none; install jaxup[cuda]"),
        ("gpu", "-1", None), ("nothing", "", None),
    ],
)  # fmt: skip
def test_an_accelerator_that_jax_does_not_see_is_an_error(there, hidden, message, config, monkeypatch):
    monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4 * (there == "tpu"), None))
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: there == "gpu" if "/dev/nvidia" in str(path) else exists(path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    if message is None:
        devices.ready()
        return
    with pytest.raises(UserError) as error:
        devices.ready()
    assert str(error.value).startswith(message)
    assert "--platform=cpu" in str(error.value)
    config.update("jax_platforms", "cpu")  # who asks for it gets it
    devices.ready()


def test_a_platform_that_is_not_there_is_one_line(config, monkeypatch):
    def fails():
        raise RuntimeError("Unable to initialize backend 'tpu': the TPU is in use\nby process 41")

    monkeypatch.setattr(jax, "default_backend", fails)
    with pytest.raises(
        UserError, match=r"^devices: Unable to initialize backend 'tpu': the TPU is in use; end what else"
    ):
        devices.ready()
    monkeypatch.setenv("JAX_PLATFORMS", "")
    devices.choose(None)
    assert os.environ["JAX_PLATFORMS"] == ""
    devices.choose("gpu")
    assert os.environ["JAX_PLATFORMS"] == "cuda"


def test_the_processor_is_there_beside_what_is_asked_for(config, monkeypatch):
    """What need not fit into an accelerator is computed there; and that it is there is no answer to what is asked."""
    config.update("jax_platforms", "cuda")
    with pytest.raises(UserError, match=r"^devices: jax has no cuda to compute on; end what else"):
        devices.ready()  # the devices of this process have started, and are processors
    assert config.jax_platforms == "cuda,cpu"
    with pytest.raises(UserError, match="has no cuda"):
        devices.ready()
    config.update("jax_platforms", "tpu")
    with devices.host():
        assert jax.jit(lambda: jnp.ones(3))().devices() == {jax.local_devices(backend="cpu")[0]}
    assert config.jax_platforms == "tpu,cpu"

    def fails(backend):
        raise RuntimeError("Unknown backend cpu")

    config.update("jax_platforms", "tpu")
    monkeypatch.setattr(jax, "local_devices", fails)  # a program that had its devices start without
    with pytest.raises(UserError, match=r"^devices: Unknown backend cpu; JAX_PLATFORMS=tpu,cpu has both"):
        devices.host()


def test_programs_are_kept_in_the_users_cache_directory(config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config.update("jax_compilation_cache_dir", "/elsewhere")
    devices.ready()
    assert config.jax_compilation_cache_dir == "/elsewhere"  # as jax was told

    config.update("jax_compilation_cache_dir", None)
    devices.ready()
    compilation_cache.compilation_cache.reset_cache()
    jax.jit(lambda x: x * 3 + 14)(jnp.ones(7))
    (kept,) = (tmp_path / "jaxup" / "programs").iterdir()
    assert kept.name.startswith("cpu-")
    assert any("lambda" in path.name for path in kept.iterdir())

    # What has both its files is kept, and what may be in the middle of being written.
    for name, age in (("killed-cache", 3600), ("written-cache", 0), ("whole-cache", 3600), ("whole-atime", 3600)):
        (kept / name).touch()
        os.utime(kept / name, (time.time() - age,) * 2)
    config.update("jax_compilation_cache_dir", None)
    devices.ready()
    names = {path.name for path in kept.iterdir()}
    assert {"written-cache", "whole-cache", "whole-atime"} <= names
    assert "killed-cache" not in names
    assert any("lambda" in name for name in names)
    warnings.warn(
        "Error writing persistent compilation cache entry for 'jit_f': OSError: full", stacklevel=1
    )  # unheard

    config.update("jax_compilation_cache_dir", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # it is there, and not for writing
        devices.ready()
    assert config.jax_compilation_cache_dir is None
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME")
        patch.delenv("HOME")
        patch.setattr("pwd.getpwuid", lambda user: {}[user])  # a user of a container whom nothing there knows
        devices.ready()
    assert config.jax_compilation_cache_dir is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    devices.ready()
    assert config.jax_compilation_cache_dir is None
