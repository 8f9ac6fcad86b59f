"""`jaxup prepare`: a store by itself, which training finds, and what is shown of it."""

import json
from pathlib import Path

import pytest
from test_chat import rows_of, write
from test_data import tree

from jaxup import prepare
from jaxup.data.chat_templates import TEMPLATES
from jaxup.data.config import DataConfig
from jaxup.data.open import open_data
from jaxup.data.rows import BEST_FIT, CONCATENATED
from jaxup.data.tokenizer import load_tokenizer, train_bpe
from jaxup.errors import UserError


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    made = train_bpe(["alpha beta gamma delta epsilon zeta eta theta"] * 3, 300)
    made.chat_template = TEMPLATES["metharme"]
    made.save_pretrained(path)
    return str(path)


@pytest.fixture
def chats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "a.jsonl", rows_of(40))


def run(capsys, *args):
    prepare.main(["prepare", *map(str, args)])
    return capsys.readouterr().out


def test_training_finds_the_store_again(chats, tokenizer_dir, capsys):
    out = run(capsys, chats, "--tokenizer", tokenizer_dir, "--seq-len", 512, "--val-fraction", 0.2, "--show", 0)
    (store,) = (path for path in Path("runs/data").iterdir() if path.is_dir())
    assert f"chat data in {store.resolve()}" in out
    assert "a reply ends with: <|endoftext|>" in out
    assert "⟦" not in out
    before = tree(store)
    # As healing would, which has the tokenizer loaded.
    settings = {"packing": BEST_FIT, "seq_len": 512, "val_fraction": 0.2, "seed": 2357}
    data = open_data(DataConfig(files=chats, **settings), root="runs/data", tokenizer=load_tokenizer(tokenizer_dir))
    assert Path(data.store) == store.resolve()
    assert tree(store) == before


@pytest.mark.parametrize(("show", "count"), [("2", 2), ("all", 33)])
def test_examples_are_shown_with_what_is_trained_on(chats, tokenizer_dir, capsys, show, count):
    out = run(
        capsys,
        chats,
        "--tokenizer",
        tokenizer_dir,
        "--val-fraction",
        0.2,
        "--seq-len",
        512,
        "--show",
        show,
        "--out",
        "s",
    )
    shown = out.partition("between ⟦ ⟧: what is trained on\n")[2].strip().split("\n\n")
    if show == "all":
        count = json.loads(Path("s/meta.json").read_text())["statistics"]["train"]["examples"]
    assert len(shown) == count
    assert all(one.startswith("<|endoftext|><|user|>") and one.endswith("<|endoftext|>⟧") for one in shown)


def test_a_corpus_is_prepared_as_training_would(tmp_path, tokenizer_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = write(tmp_path / "t.jsonl", [{"text": f"alpha {n} beta gamma"} for n in range(60)])
    out = run(capsys, text, "--tokenizer", tokenizer_dir, "--packing", "concatenated", "--seq-len", 16,
              "--val-fraction", 0.2)  # fmt: skip
    assert "tokens, vocabulary" in out
    config = DataConfig(files=text, tokenizer=tokenizer_dir, packing=CONCATENATED, seq_len=16, val_fraction=0.2)
    assert open_data(config, root="runs/data").store in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gone.jsonl"], "data.files: no such file or directory: gone.jsonl"),
        (["{chats}", "--format", "chatlm"], "data.format='chatlm': not known; did you mean 'chatml'?"),
        (["{chats}", "--show", "some"], "--show=some: a number, or all"),
        (["{chats}", "--tokenizer", "bpe:300"], "--tokenizer=bpe:300: chats need one that is there"),
        (["python"], "data.files: python: the standard library is no chats; text is a corpus, for"),
        (["notes/a.txt"], "a.txt: chat data is .json, .jsonl, .parquet; text is a corpus, for"),
        (["notes"], "(looked for .json, .jsonl, .parquet); text is a corpus, for"),
        (["{chats}", "--tokenizer", "nowhere/at-all/x"], "no such directory: nowhere/at-all/x"),
        (["{chats}", "--seq-len", "2"], "examples are longer; the shortest needs data.seq_len="),
    ],
)
def test_mistakes_are_one_line(chats, tokenizer_dir, args, message):
    args = [arg.format(chats=chats) for arg in args]
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("a text")
    with pytest.raises(UserError) as error:
        prepare.main(["prepare", "--tokenizer", tokenizer_dir, *args])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not [path for path in Path("runs/data").glob("*") if path.is_dir()]
