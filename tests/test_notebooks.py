"""The notebooks do what they say, show what such a run showed, and install this version; containers are of it, too."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import processes
import pytest
from packaging.requirements import Requirement

import jaxup
import notebooks
from jaxup import train
from jaxup.experiments.config import load

ROOT = notebooks.NOTEBOOKS.parent
FILES = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
IMAGE = "python:3.11.13-slim-bookworm"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def cells(file, kind="code"):
    return [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def assert_all_well(file):
    """Every cell ran in its turn, none failed, and what is said is neither a warning nor of a machine's paths."""
    for number, cell in enumerate(cells(file), 1):
        assert cell["execution_count"] == number
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            if output["output_type"] == "stream":
                text = "".join(output["text"])
                assert not re.search(r"warning|(^|\s)/\w+/|Traceback", text, re.IGNORECASE), text
    assert "assert" in source(cells(file)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_a_notebook_runs(name, tmp_path):
    pytest.importorskip("nbclient")
    processes.run(notebooks.__file__, name, tmp_path)
    assert_all_well(tmp_path / f"{name}.ipynb")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_a_notebook_shows(file):
    assert_all_well(file)
    shown = [output.get("data", {}) for cell in cells(file) for output in cell["outputs"]]
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    assert 0 < sum(map(len, map("".join, pictures))) < 300_000


@pytest.mark.parametrize("name", ["heal", "inherit_gpt2"])
def test_an_accelerator_gets_settings_that_there_are(name):
    """The size that is not executed here: its keys and values are those of the experiment, on a TPU and on a GPU."""
    [cell] = [source(cell) for cell in cells(notebooks.NOTEBOOKS / f"{name}.ipynb") if "flags = [" in source(cell)]
    [branch] = [node for node in ast.parse(cell).body if isinstance(node, ast.If)]
    for platform, dtype in (("tpu", "bfloat16"), ("gpu", "float32")):
        scope = {"device": types.SimpleNamespace(platform=platform)}
        exec(ast.unparse(branch.orelse), scope)
        args, overrides = train.parse_args(["train", *scope["flags"]])
        config = load(args.config, overrides)
        assert config.compute.dtype == dtype
        [revision] = [value for key, value in overrides if key.endswith(".revision")]
        assert re.fullmatch("[0-9a-f]{40}", revision)


def test_what_a_notebook_installs():
    """One version of this repository, by the same lines in all, and the jax of the containers."""
    assert len(FILES) == 3
    [install] = {source(cells(file)[0]) for file in FILES}
    url = PROJECT["urls"]["Repository"]
    assert f'"git+{url}@v{jaxup.__version__}"' in install
    pinned = re.search(r"^jax(==\S+)$", (ROOT / "containers" / "constraints.txt").read_text(), re.MULTILINE)
    assert install.count(f"jax{pinned[1]}") == 1
    assert install.count(pinned[1]) == 2
    badges = re.findall(r"\((https://colab[^)]*\.ipynb)\)", (ROOT / "README.md").read_text())
    base = url.replace("https://github.com/", "https://colab.research.google.com/github/")
    assert sorted(badges) == [f"{base}/blob/v{jaxup.__version__}/notebooks/{file.name}" for file in FILES]


def test_pinned_versions_are_those_that_are_asked_for():
    lines = (ROOT / "containers" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["data"], *extras["lora"]]:
        wanted = Requirement(text)
        assert pins[wanted.name.lower().replace("_", "-")] in wanted.specifier, text


@pytest.mark.parametrize("kind", ["cpu", "cuda", "tpu"])
def test_a_container(kind):
    file = ROOT / "containers" / f"{kind}.Dockerfile"
    text = file.read_text()
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["1000"]
    assert {line.split()[1] for line in text.splitlines() if line.startswith("FROM ")} == {IMAGE}
    [extras] = re.findall(r"'\.\[(.*)\]'", text)
    assert {*extras.split(",")} <= {*PROJECT["optional-dependencies"]}
    # What is copied into it, and needed to install.
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {"jaxup", "configs", "containers/constraints.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / path).exists() for path in kept)
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, "--no-color", file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
