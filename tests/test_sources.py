"""Text from every kind of source, its split, its fingerprint; tokenizers loaded and trained."""

import gzip
import json
import os
import random
import re
import sys
from pathlib import Path

import processes
import pytest

from jaxup.data import sources
from jaxup.data.mixture import documents, open_mixture
from jaxup.data.readers import Row
from jaxup.data.sources import Corpus, find_files
from jaxup.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe
from jaxup.errors import UserError

WORDS = "alpha beta gamma delta epsilon zeta eta theta def return import self lambda".split()  # noqa: SIM905
ODD = "tabs\tand  spaces\r\nnew lines\n\n, ümläut, 世界, 🎉, don't, <|endoftext|>, \u00a0end "


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"document {i}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for i in range(count)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def opened(spec, val_fraction=0.25, seed=0):
    return open_mixture([(str(spec), 1)], layout="text", seed=0, corpus=Corpus(val_fraction, seed))


def both(mixture):
    return list(documents(mixture, "train")), list(documents(mixture, "validation"))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe([*texts(50), ODD], 400).save_pretrained(path)
    return str(path)


# Sources


def test_python_source_is_real_and_its_splits_are_disjoint():
    source = opened("python", val_fraction=0.1)
    assert all(file.drawn for file in source.files)
    train, validation = both(source)
    # Not quite none: the library has files that are copies of another.
    assert sum(map(len, set(train) & set(validation))) < 1000
    assert sum(map(len, train)) > 4e6
    assert sum(map(len, validation)) > 1e5
    assert any("class ArgumentParser" in text for text in train + validation)
    assert source.fingerprint == opened("python", val_fraction=0.5).fingerprint


def test_text_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    path = tmp_path / "long.txt"
    text = "".join(f"line {i} {'x' * (i % 70)}\r\n" for i in range(20000))
    path.write_bytes(text.encode() + b"\xff undecodable")
    train, validation = both(opened(path))
    pieces = sorted(train + validation, key=lambda piece: int(piece.split()[1]))
    assert "".join(pieces) == text + "\ufffd undecodable"
    assert len(pieces) > 5
    assert all(piece.endswith("\r\n") and len(piece) < 70000 for piece in pieces[:-1])


def test_of_few_texts_the_end_of_each_piece_is_held_out(tmp_path):
    """A draw would leave a book, or some chapters, without validation."""
    for name, lines in {"a": 900, "b": 40, "c": 1}.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} " + "word " * 30 + "\n" for i in range(lines)))
    train, validation = both(opened(tmp_path, val_fraction=0.05))
    assert len(train) == len(validation) == 3 + 1 + 1
    for head, tail in zip(train, validation):
        assert 0.05 <= len(tail) / len(head + tail) <= 0.1
    whole = "".join(head + tail for head, tail in zip(train, validation))
    assert whole == "".join((tmp_path / f"{name}.txt").read_text() for name in "abc")
    for i in range(200):  # of many a draw takes whole ones
        (tmp_path / f"{i}.txt").write_text(f"{i} some text\n")
    train, validation = both(opened(tmp_path, val_fraction=0.05))
    assert all(text.endswith(" some text\n") or text[0] in "abc" for text in validation)


def test_a_very_long_line_is_still_cut(tmp_path):
    (tmp_path / "line.txt").write_text("ab" * 500_000)
    train, validation = both(opened(tmp_path / "line.txt"))
    assert sum(map(len, train + validation)) == 10**6
    assert max(map(len, train + validation)) <= 2 * 64 * 1024


def test_directory_of_mixed_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = texts(120)
    (tmp_path / "deep").mkdir()
    write_jsonl(tmp_path / "deep" / "a.jsonl", documents[:50])
    pq.write_table(pa.table({"text": [*documents[50:110], None], "n": range(61)}), tmp_path / "b.parquet")
    for i, text in enumerate(documents[110:]):
        (tmp_path / f"c{i}.md").write_text(text)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\0\1")
    source = opened(tmp_path)
    train, validation = both(source)
    assert sorted(train + validation) == sorted(documents)
    assert train
    assert validation
    assert both(opened(tmp_path)) == (train, validation)
    assert both(opened(tmp_path, seed=7)) == (train, validation)
    before = source.fingerprint
    (tmp_path / "c0.md").write_text("other")
    assert opened(tmp_path).fingerprint != before == source.fingerprint


def test_fingerprint_of_a_big_file_sees_blocks_of_it_and_when_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE_HASH_BYTES", 10)
    monkeypatch.setattr(sources, "HASHED_BYTES", 8)
    path, seen, content = tmp_path / "a.txt", set(), bytearray(b"a" * 10000)
    for changed in (slice(0), slice(0, 1), slice(9999, None), slice(5000, 5160), slice(6666, 6826)):
        content[changed] = b"b" * len(content[changed])  # the blocks begin 158 or 159 bytes apart
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        seen.add(opened(path).fingerprint)
    path.write_bytes(bytes(content) + b"a")
    os.utime(path, ns=(1, 1))
    seen.add(opened(path).fingerprint)
    os.utime(path, ns=(1, 2))  # of what lies between the blocks nothing else tells
    seen.add(opened(path).fingerprint)
    assert len(seen) == 7


def test_datasets_saved_to_disk(tmp_path):
    import datasets

    documents = texts(40)
    whole = datasets.Dataset.from_dict({"text": documents})
    whole.save_to_disk(tmp_path / "one")
    listing = sorted(os.listdir(tmp_path / "one"))
    source = opened(tmp_path / "one")
    train, validation = both(source)
    assert len(validation) == 10
    assert sorted(train + validation) == sorted(documents)
    expected = whole.train_test_split(test_size=0.25, seed=0, shuffle=True)
    # The same documents as nanoGPT holds out, each part in the order of the dataset.
    assert sorted(validation) == sorted(expected["test"]["text"])
    assert [text for text in documents if text not in validation] == train
    assert all(file.drawn and file.seeded for file in source.files)
    assert both(opened(tmp_path / "one", seed=1))[1] != validation
    assert sorted(os.listdir(tmp_path / "one")) == listing, "the user's directory was written to"
    assert source.fingerprint == opened(tmp_path / "one").fingerprint
    assert int(source.fingerprint, 16)

    parts = {"train": whole.select(range(30)), "validation": whole.select(range(30, 40))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    source = opened(tmp_path / "two")
    assert both(source) == (documents[:30], documents[30:])
    assert not any(file.drawn or file.seeded for file in source.files)

    datasets.Dataset.from_dict({"content": documents}).save_to_disk(tmp_path / "three")
    with pytest.raises(UserError, match=r"its columns are of no layout: .*'content'"):
        opened(tmp_path / "three")


def test_hub_dataset_by_name_and_config(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config):
        calls.append((name, config))
        if name == "nobody/nothing":
            raise datasets.exceptions.DatasetNotFoundError("gone\nfor good")
        if name == "broken":
            raise ConnectionError("no network\nat all")
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts(8)})})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = opened("user/corpus:small")
    assert calls == [("user/corpus", "small")]
    assert [len(part) for part in both(source)] == [6, 2]
    with pytest.raises(UserError, match=r"^no such file .*: nobody/nothing, and no such dataset.*hub$"):
        opened("nobody/nothing")
    with pytest.raises(UserError, match=r"cannot be loaded: ConnectionError: no network$"):
        opened("broken")


def test_hub_dataset_whose_script_is_no_longer_run(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    def load_dataset(name, config):
        raise RuntimeError("Dataset scripts are no longer supported, but found corpus.py")

    def snapshot_download(name, *, repo_type, allow_patterns):
        assert (name, repo_type, "*.jsonl" in allow_patterns) == ("user/corpus", "dataset", True)
        return str(tmp_path)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"user/corpus: no text found"):
        opened("user/corpus")
    write_jsonl(tmp_path / "a_sample.jsonl", texts(30))
    source = opened("user/corpus")
    train, validation = both(source)
    assert sorted(train + validation) == sorted(texts(30))
    with pytest.raises(UserError, match="scripts are no longer supported"):
        opened("user/corpus:part")  # which files a part is made of, only the script knows


@pytest.mark.parametrize(
    "spec", ["./nothing", "/no/where", "~/no-such-thing-here", "corpus.txt", "gs://b/x", "a b", ""]
)
def test_missing_path_never_asks_the_hub(spec):
    with pytest.raises(UserError) as error:
        opened(spec)
    assert str(error.value) == f"no such file or directory: {spec}"


def test_near_misses_of_python_are_recognised():
    with pytest.raises(UserError, match="no such file or directory: pyton; did you mean 'python'"):
        opened("pyton")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: row 2 is not JSON: Expecting value"),
        ('{"text": "a"}\n\n{"body": "b"}\n', r'bad\.jsonl:3: row 2 is not text: no "text"; its keys: \'body\''),
        ('{"text": 3}\n', r'bad\.jsonl:1: row 1 is not text: "text" is a number, not text'),
        ('["text"]\n', r"bad\.jsonl:1: row 1 is not text: it is a list, not an object"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        both(opened(tmp_path / "bad.jsonl"))
    assert "\n" not in str(error.value)


def test_sources_without_text(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("a single document")
    (tmp_path / "binary.txt").write_bytes(b"PK\0\0")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    for name in ("empty", "empty.txt"):
        with pytest.raises(UserError, match=rf"{name}: no text found"):
            opened(tmp_path / name)
    assert both(opened(tmp_path / "one.txt", val_fraction=1e-9)) == (["a single document"], [])
    with pytest.raises(UserError, match="not a text file"):
        both(opened(tmp_path / "binary.txt"))
    with pytest.raises(UserError, match="not a sound parquet file"):
        both(opened(tmp_path / "bad.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "jaxup\[data\]"'):
        both(opened(tmp_path / "bad.parquet"))


# Splits by name


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"), ("data/test-1.jsonl", "test"), ("validation/a.parquet", "validation"),
        ("my_dev_set.jsonl", "validation"), ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("train-00000-of-00003.parquet", "train"), ("eval.json.gz", "test"), ("latest.jsonl", ""),
        ("trained.jsonl", ""), ("contest.jsonl", ""), ("a.jsonl", ""), ("valid/train.jsonl", "train"),
    ],
)  # fmt: skip
def test_the_split_of_a_file_is_in_its_name(name, split):
    assert sources.split_of(name) == split


def in_directory(tmp_path, **files):
    for name, texts_of in files.items():
        write_jsonl(tmp_path / f"{name.replace('__', '-')}.jsonl", texts_of)
    return str(tmp_path)


def names(found):
    return [(Path(file.path).stem, file.side(Row(1, "", {}, "", 0.0))) for file in found]


def test_splits_of_a_directory(tmp_path, capsys):
    place = in_directory(tmp_path, train=["a"], test=["b"], validation=["c"], more=["d"])
    assert names(find_files(place)) == [("train", None)]
    said = capsys.readouterr().err
    assert "the split train is read; not" in said
    assert f"data.val_files={place}:validation evaluates on validation" in said
    assert all(name in said for name in ("test", "validation", "files of no split"))
    assert names(find_files(place, side="validation")) == [("validation", "validation")]
    assert names(find_files(f"{place}:test", side="validation")) == [("test", "validation")]
    assert names(find_files(f"{place}:test")) == [("test", None)]
    # A corpus is split in two by what there is.
    assert names(find_files(place, Corpus(0.1, 0))) == [("validation", "validation"), ("train", "train")]
    with pytest.raises(UserError, match=r'no split "tset"; did you mean .test.\?; its splits: test, train, validation'):
        find_files(f"{place}:tset")


def test_a_directory_without_a_split_called_train(tmp_path):
    place = in_directory(tmp_path, train_sft__00000__of__00001=["a"], test_sft__00000__of__00001=["b"])
    with pytest.raises(
        UserError, match=rf'no split "train"; its splits: test_sft, train_sft; name one, as in {place}:'
    ):
        find_files(place)
    assert names(find_files(f"{place}:train_sft")) == [("train_sft-00000-of-00001", None)]


def test_names_of_splits_among_other_text_say_nothing(tmp_path):
    place = in_directory(tmp_path, test=["a"] * 40)
    (tmp_path / "train.md").write_text("b")
    assert [Path(file.path).name for file in find_files(place, Corpus(0.5, 0))] == ["test.jsonl", "train.md"]
    assert all(file.drawn for file in find_files(place, Corpus(0.5, 0)))
    with pytest.raises(UserError, match=rf"its splits: test; name one, as in {place}:test"):
        find_files(place)


CARD = """---
license: mit
configs:
- config_name: {name}
  data_files:
  - split: train
    path: {train}
  - split: test
    path:
    - test-questions.jsonl
    - {more}
---
# A dataset
"""


@pytest.mark.parametrize(
    ("name", "train", "more"),
    [("default", "data/*.jsonl", "odd/**/c.jsonl"), ("en", "./data/b.jsonl", "odd/deep/c.jsonl")],
)
def test_the_splits_of_a_datasets_card(name, train, more, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    place = tmp_path / "place"
    for path in ("test-questions", "data/b", "data/deep/train", "odd/deep/c"):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(place / f"{path}.jsonl", [path])
    (place / "README.md").write_text(CARD.format(name=name, train=train, more=more))
    theirs = datasets.load_dataset(str(place), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "test"):
        read = [row.value["text"] for file in find_files(f"{place}:{split}") for row in file.rows()]
        assert sorted(read) == sorted(theirs[split]["text"])
    find_files(str(place))
    assert "the split train is read; not" in capsys.readouterr().err


@pytest.mark.parametrize(
    "card",
    ["no card", "---\nconfigs: 3\n---\n", "---\n- [\n---\n", "---\nconfigs:\n- data_files:\n  - x: 1\n---\n", "\xff"],
)
def test_a_card_that_says_nothing_of_files(card, tmp_path):
    place = in_directory(tmp_path, train=["a"], test=["b"])
    (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    assert names(find_files(place)) == [("train", None)]


# Compressed files


def compressed(content, suffix):
    if suffix == ".gz":
        return gzip.compress(content)
    import pyarrow as pa

    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_as_they_are_plain(tmp_path, suffix):
    documents = texts(300)
    write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in documents], indent=1))
    (tmp_path / "a.txt").write_bytes(ODD.encode())
    for name in ("a.jsonl", "a.json", "a.txt"):
        packed = tmp_path / f"{name}{suffix}"
        packed.write_bytes(compressed((tmp_path / name).read_bytes(), suffix))
        plain, (found,) = find_files(str(tmp_path / name), Corpus(0.1, 0)), find_files(str(packed), Corpus(0.1, 0))
        rows = list(found.rows())
        assert [row.value for row in rows] == [row.value for row in plain[0].rows()]
        assert [row.done for row in rows] == sorted(row.done for row in rows)
        assert 0 <= rows[0].done <= rows[-1].done <= 1
        content = packed.read_bytes()
        packed.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=rf"{re.escape(packed.name)}: not a sound {suffix.removeprefix('.')} file"):
            list(found.rows())


# Tokenizers


def test_tokenizer_round_trips(tmp_path, tokenizer_dir):
    tokenizer = train_bpe([*texts(50), ODD], 400)
    assert 257 < len(tokenizer) <= 400
    assert tokenizer.eos_token == "<|endoftext|>"
    text = ODD + "never seen: \x00 żółć ∀x 𝔘"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer_hash(tokenizer) == tokenizer_hash(train_bpe([*texts(50), ODD], 400))
    assert tokenizer_hash(tokenizer) != tokenizer_hash(train_bpe([*texts(50), ODD], 300))
    loaded = load_tokenizer(tokenizer_dir)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    loaded(["a", "b c"], padding=False, truncation=True, max_length=3)  # leaves its traces in the backend
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    loaded.save_pretrained(tmp_path / "again")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "again"))) == tokenizer_hash(tokenizer)


def test_a_tokenizer_loads_without_pytorch_which_is_there_afterwards(tokenizer_dir, torch):
    """transformers has taken hold of it: what it took is the same PyTorch that others import."""
    code = f"""
import sys
from jaxup.data.tokenizer import load_tokenizer
assert load_tokenizer({tokenizer_dir!r})("def")["input_ids"]
assert "torch" not in sys.modules
import torch, transformers.modeling_rope_utils as user
assert user.torch.Tensor is torch.Tensor and sys.modules["torch"] is torch is not user.torch
"""
    processes.run("-c", code)


def test_tokenizers_that_will_not_load(tmp_path):
    (tmp_path / "empty").mkdir()
    code = tmp_path / "code"
    code.mkdir()
    (code / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    (code / "mine.py").write_text("raise SystemExit('code from a tokenizer directory was run')")
    for spec, message in {
        "bpe:abc": "write bpe:N",
        "bpe:100": "N >= 257",
        "bpe:512": "trained when a token store is made",
        "./nowhere": "no such directory: ./nowhere",
        str(tmp_path / "empty"): "no tokenizer",
        str(code): "cannot load",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(spec)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith("tokenizer: ")
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(["a"], 100)
