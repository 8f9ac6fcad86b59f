"""What holds for all tests: eight CPU devices, no network, shapes and types checked at run time; what they share."""

import atexit
import contextlib
import fcntl
import gc
import importlib
import importlib.metadata
import os
import shutil
import sys
import tempfile

# Before jax is imported: it reads them once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The programs of the tests are tiny: compiling them takes far longer than running them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0" if os.environ["JAX_PLATFORMS"] == "cpu" else "",
        "--xla_llvm_disable_expensive_passes=true" if os.environ["JAX_PLATFORMS"] == "cpu" else "",
        "--xla_cpu_parallel_codegen_split_count=1",  # the other processor has tests of its own
        # They go through MLIR, which takes four times as long. Newer versions know no other way, and end at a flag
        # that they do not know.
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
    ]
).strip()
os.environ["HF_HUB_OFFLINE"] = "1"

# What one process has compiled no other compiles again. Workers and the processes of tests inherit the environment of
# the first process, which made the directory and removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxup-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nobody reads what line an operation came from

import hypothesis
import pytest
import typed

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("gate", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)

typed.install("jaxup")

import gcs  # noqa: E402
import jax  # noqa: E402
import processes  # noqa: E402
import runs  # noqa: E402

from jaxup.experiments import pictures  # noqa: E402
from jaxup.files.bucket import place  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """The tests that everyone runs try the same examples each time; those that search, with `-m slow`, new ones."""
    hypothesis.settings.load_profile("gate" if "not slow" in config.getoption("markexpr") else "search")


# What takes longest begins first: else a worker is left alone with it in the end.
LONGEST = [
    f"test_{name}.py"
    for name in (
        "heal", "train", "step", "resuming", "lora", "model", "study", "load", "inherit_llama", "parity", "generate",
        "chat", "experiment", "build", "task", "processes", "data", "learn", "policy_loss", "sampler", "partition",
        "scripts", "pretrain", "steps", "heads",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """The garbage collector need not look through all modules again and again, nor at each trace of a program."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make) -> the directory that `make(directory)` fills: by the worker that asks first, for all."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)

    def made(name, make):
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{name}.made").exists():
                shutil.rmtree(root / name, ignore_errors=True)
                (root / name).mkdir()
                make(root / name)
                (root / f"{name}.made").touch()
        return root / name

    return made


@pytest.fixture(scope="session")
def corpus(made_once):
    return made_once("corpus", runs.write_corpus)


@pytest.fixture(scope="session")
def finished(made_once, corpus):
    """An uninterrupted run of `runs.arguments`, in a process of its own with one device, and what it printed.

    It is not for writing into.
    """

    def make(directory):
        # A relative path, as by default.
        done = processes.run("-m", "jaxup.train", *runs.arguments(corpus, "whole"), cwd=directory)
        (directory / "stdout").write_text(done.stdout)

    directory = made_once("runs", make)
    return directory / "whole", (directory / "stdout").read_text()


@pytest.fixture(scope="session", autouse=True)
def drawing():
    """`with drawing():` runs in this process draw what they do but for the picture that compares whole models.

    Without it they draw nothing; `finished` has all pictures, and test_report.
    """
    with pytest.MonkeyPatch.context() as patch:
        write = pictures.write
        patch.setattr(pictures, "LARGE", -1)
        patch.setattr(pictures, "write", lambda *_, **__: None)

        @contextlib.contextmanager
        def drawn():
            with pytest.MonkeyPatch.context() as back:
                back.setattr(pictures, "write", write)
                yield

        yield drawn


@pytest.fixture(scope="module")
def one_device():
    """For runs that are about other things: programs for eight devices take twice as long to compile."""
    with runs.devices(1):
        yield


@pytest.fixture(scope="session")
def objects():
    """Those of a server of buckets that TensorStore asks, in this process and in those that it starts."""
    with gcs.bucket() as held, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", held.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        yield held


@pytest.fixture
def here(objects):
    """An empty directory in a bucket."""
    objects.clear()
    return place("gs://bucket/here")


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
