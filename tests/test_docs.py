"""The pages for those who come from elsewhere run from top to bottom, and their tables are those of the code."""

import ast
import functools
import operator
import re
import runpy

import pages
import pytest
import test_build
from test_chat_cases import tokenizer

from jaxup.data.layouts import LAYOUTS
from jaxup.errors import ELSEWHERE, NEEDLESS
from jaxup.experiments.config import load, meant


def rows(page, heading):
    """The cells of each row of the table whose head begins so."""
    table = (pages.DOCS / page).read_text().partition(f"| {heading} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("page", ["gallery", "from_mergekit", "from_trl", "from_inheritune", "lens", "search"])
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` does with the directory that one is in
    if page != "gallery":
        test_build.make(tmp_path / "base", layers=32)
        tokenizer().save_pretrained(tmp_path / "base")
    pages.run(page, tmp_path)
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == ({path.name for path in (pages.DOCS / "gallery").iterdir()} if page == "gallery" else set())


def test_flags_of_mergekit():
    said = {row[0]: row[1].removeprefix("leave it out: ") for row in rows("from_mergekit.md", "`mergekit-yaml`")[1:]}
    of_generation = {"do_sample"}
    ours = {f"`--{flag.replace('_', '-')}`": why for flag, why in NEEDLESS.items() if flag not in of_generation}
    assert said == ours


def test_keys_of_sft_config_and_axolotl():
    said = {word: row[1].strip("`") for row in rows("from_trl.md", "in SFTConfig or axolotl's YAML")
            for word in re.findall(r"`(\w+)`", row[0])}  # fmt: skip
    config = load("heal.py")
    assert {word: meant(word, config=config) for word in said} == {
        word: f"; did you mean --config.{key}?" for word, key in said.items()
    }
    nano = {
        word for row in rows("from_inheritune.md", "`train_inheritune.py`") for word in re.findall(r"`(\w+) =", row[0])
    }
    of_commands = {"max_shard_size", "max_tokens", "dtype", "tokenizer", "workdir", "resume"}
    ours = {word for word, ours in ELSEWHERE.items() if not ("float" in ours or ours in of_commands)}
    assert said.keys() == ours - (nano - said.keys())


@pytest.mark.parametrize(
    ("script", "file"),
    [("train_inheritune.py", "inherit_gpt2.py:large,depth_scaled"), ("Training/train.py", "inherit_llama.py:code")],
)
def test_settings_of_the_released_code(script, file):
    """What is said to be the value here is; where it is that of the script, the script's word is told the key."""
    config = load(file)
    for there, here, _ in rows("from_inheritune.md", f"`{script}`"):
        theirs = re.findall(r"`(\w+) = ([^`]+)`", there)
        ours = [(key, ast.literal_eval(value)) for key, value in re.findall(r"`([\w.]+)=([^`]+)`", here)]
        assert len(ours) >= len(theirs)
        for key, value in ours:
            assert functools.reduce(operator.getitem, key.split("."), config) == value, key
        for (word, value), (key, own) in zip(theirs, ours):
            if word in ELSEWHERE:
                assert meant(word, config=config) == f"; did you mean --config.{key}?"
                assert ast.literal_eval(value) == own or word in ("eval_iters", "gradient_accumulation_steps")


def test_layouts():
    assert [row[0].strip("`") for row in rows("from_trl.md", "layout")] == [*LAYOUTS]


def test_hours_are_those_of_the_table_that_was_compiled():
    table = runpy.run_path(pages.DOCS.parent / "benchmarks" / "machines.py")["table"]()
    assert table in (pages.DOCS / "machines.md").read_text(), "run benchmarks/machines.py"
