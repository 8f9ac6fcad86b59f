"""Token rows -> batches: the store's bytes, resuming, what is refused, and the batch's purity."""

import dataclasses
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import processes
import pytest
from damage import full_at
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import ODD, opened, texts, tokenizer_dir, write_jsonl  # noqa: F401

from jaxup.data import sources, store
from jaxup.data import tokenizer as tokenizer_module
from jaxup.data.batches import Batches, validation_batches
from jaxup.data.config import DataConfig
from jaxup.data.mixture import Mixture, documents
from jaxup.data.open import open_data
from jaxup.data.phases import Phases
from jaxup.data.prepare import _nothing_read
from jaxup.data.rows import CONCATENATED, Rows, unmarked
from jaxup.data.tokenizer import load_tokenizer, train_bpe
from jaxup.errors import NoRoom, UserError
from jaxup.experiments.common import open_text
from jaxup.experiments.defaults import text_data


def read_meta(data):
    return json.loads(Path(data.store, "meta.json").read_text())


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", [*texts(300), ODD])


@pytest.fixture
def config(corpus, tokenizer_dir):  # noqa: F811
    return DataConfig(
        files=corpus,
        packing=CONCATENATED,
        tokenizer=tokenizer_dir,
        seq_len=16,
        val_fraction=0.2,
        fraction=1.0,
        tokens=0,
        isolate_documents=False,
        store="",
        seed=0,
    )


def stream_rows(source, tokenizer, split, seq_len):
    """The rows of a split, computed the plain way."""
    stream = []
    for text in documents(source, split):
        stream += tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
    return np.array([stream[i : i + seq_len + 1] for i in range(0, len(stream) - seq_len, seq_len)])


# Stores


def test_store_rows_equal_the_plain_computation(tmp_path, config, monkeypatch, capsys):
    monkeypatch.setattr(store, "SHARD_ROWS", 64)
    monkeypatch.setattr(tokenizer_module, "BATCH_TEXTS", 7)
    data = open_data(config, root=str(tmp_path))
    source, tokenizer = opened(config.files, 0.2), load_tokenizer(config.tokenizer)
    for split, rows in (("train", data.train), ("validation", data.validation)):
        expected = stream_rows(source, tokenizer, split, 16)
        got = rows.read(np.arange(len(rows)))[0]
        assert got.dtype == np.int32
        assert len(rows) > 64 * (split == "train")
        assert rows.num_tokens == 16 * len(rows)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(got[1:, 0], got[:-1, -1])
        picked = np.array([3, 0, len(rows) - 1, 3])
        np.testing.assert_array_equal(rows.read(picked)[0], got[picked])
        assert rows.read(picked[:0])[0].shape == (0, 17)
        with pytest.raises(IndexError):
            rows.read(np.array([len(rows)]))
    assert (data.vocab_size, data.eos_id, data.seq_len) == (len(tokenizer), tokenizer.eos_token_id, 16)
    meta = read_meta(data)
    assert meta["dtype"] == "uint16"
    assert meta["statistics"]["train"]["rows"] == len(data.train)
    assert sorted(os.listdir(data.store)) == ["lock", "meta.json", "tokenizer", "train", "validation"]
    assert "train tokens" in capsys.readouterr().err
    again = open_data(config, root=str(tmp_path))
    assert again.store == data.store
    assert len(again.train) == len(data.train)
    assert capsys.readouterr().err == "", "a complete store was prepared again"


def test_text_that_spells_the_special_token_stays_text(tmp_path, config):
    path = write_jsonl(tmp_path / "odd.jsonl", [ODD] * 60)
    data = open_data(dataclasses.replace(config, files=path), root=str(tmp_path))
    rows, _ = data.train.read(np.arange(40))
    tokens = np.concatenate([rows[0], rows[1:, 1:].ravel()])
    first = tokens[: int(np.argmax(tokens == data.eos_id))]
    assert data.tokenizer.decode(first) == ODD


def test_documents_are_not_lost_between_rows(tmp_path, config):
    data = open_data(config, root=str(tmp_path))
    rows = data.train.read(np.arange(len(data.train)))[0]
    text = data.tokenizer.decode(np.concatenate([rows[0], rows[1:, 1:].ravel()]))
    whole = "<|endoftext|>".join(documents(opened(config.files, 0.2), "train"))
    assert whole.startswith(text[: len(text) - 20])
    assert len(text) > 10000


class Interrupted(Exception):
    """Stands for kill -9: nothing in the code catches it."""


def interrupted(*_):
    raise Interrupted


def interrupt_after(monkeypatch, count):
    """The documents of a source end in `Interrupted` after `count` of them, over all splits."""
    original, seen = Mixture.__iter__, [0]

    def examples(self):
        for example in original(self):
            seen[0] += 1
            if seen[0] > count:
                raise Interrupted
            yield example

    monkeypatch.setattr(Mixture, "__iter__", examples)


def tree(path):
    files = [os.path.join(d, name) for d, _, names in os.walk(path) for name in names if name != "lock"]
    return {os.path.relpath(file, path): Path(file).read_bytes() for file in files}


@pytest.mark.parametrize(
    ("spec", "counts"),
    # Of 301 examples / those that the vocabulary is trained on before.
    [("directory", (3, 100, 170, 220)), ("bpe:300", (20, 401, 170, 220))],
)
def test_resuming_gives_the_same_bytes(tmp_path, config, monkeypatch, spec, counts):
    monkeypatch.setattr(store, "SHARD_ROWS", 8)
    monkeypatch.setattr(tokenizer_module, "BATCH_TEXTS", 3)
    if spec != "directory":
        config = dataclasses.replace(config, tokenizer=spec)
    straight = open_data(dataclasses.replace(config, store=str(tmp_path / "straight")), root="")
    broken = dataclasses.replace(config, store=str(tmp_path / "broken"))
    progress, reached = tmp_path / "broken" / "progress.json", []
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_tokenizer", interrupted)
        with pytest.raises(Interrupted):
            open_data(broken, root="")
    for count in counts:
        with monkeypatch.context() as patch:
            interrupt_after(patch, count)
            with pytest.raises(Interrupted):
                open_data(broken, root="")
        sink = json.loads(progress.read_text())["sink"] if progress.exists() else {}
        reached.append(sum(sink.get("rows", {}).values()))
    assert reached == sorted(reached), reached
    assert reached[-1] > reached[-2] > 100, reached
    with pytest.raises(UserError, match="seq_len=16, not 8"):
        open_data(dataclasses.replace(broken, seq_len=8), root="")
    # Killed between the write of a shard and its record: the rows are there, the record is older.
    record = store.Store(broken.store).read_json("progress.json")
    store.Store(broken.store).write_json("progress.json", record | _nothing_read())
    resumed = open_data(broken, root="")
    assert tree(straight.store) == tree(resumed.store)


@pytest.mark.parametrize("size", [0, 500, 2**13, 2**15])
def test_a_full_disk_is_one_line_and_with_room_the_same_tokens_are_made(tmp_path, config, monkeypatch, size):
    monkeypatch.setattr(tokenizer_module, "BATCH_TEXTS", 3)
    straight = open_data(dataclasses.replace(config, store=str(tmp_path / "straight")), root="")
    assert max(map(len, tree(straight.store).values())) > size
    broken = dataclasses.replace(config, store=str(tmp_path / "broken"))
    with full_at(size), pytest.raises(NoRoom, match=r"\A[^\n]*store: [^\n]*File too large; with room again[^\n]*\Z"):
        open_data(broken, root="")
    assert tree(open_data(broken, root="").store) == tree(straight.store)


def test_a_store_of_other_tokens_is_refused(tmp_path, config):
    config = dataclasses.replace(config, store=str(tmp_path / "store"))
    open_data(config, root="")
    other_source = write_jsonl(tmp_path / "other.jsonl", texts(200, seed=1))
    other_tokenizer = tmp_path / "other-tokenizer"
    train_bpe(texts(50), 300).save_pretrained(other_tokenizer)
    for change, message in [
        ({"seq_len": 32}, "seq_len=16, not 32"),
        ({"val_fraction": 0.5}, "val_fraction=0.2, not 0.5"),
        ({"files": other_source}, r"source=.*corpus.jsonl \(\w{8}\), not .*other.jsonl \(\w{8}\)"),
        ({"tokenizer": str(other_tokenizer)}, r"tokenizer=.* \(\w{8}\), not .*other-tokenizer \(\w{8}\)"),
        ({"tokenizer": "bpe:300"}, r"tokenizer=.*, not bpe:300"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            open_data(dataclasses.replace(config, **change), root="")
        text = str(error.value)
        assert "\n" not in text
        assert config.store in text
        assert "choose another data.store or delete it" in text
    open_data(dataclasses.replace(config, seed=5, fraction=0.5, isolate_documents=True), root="")


def test_default_stores_are_named_after_what_decides_the_tokens(tmp_path, config):
    config = dataclasses.replace(config, tokenizer="bpe:300")
    names = {os.path.basename(open_data(config, root=str(tmp_path)).store)}
    for change in ({"seq_len": 8}, {"val_fraction": 0.3}, {"tokenizer": "bpe:280"}):
        names.add(os.path.basename(open_data(dataclasses.replace(config, **change), root=str(tmp_path)).store))
    assert len(names) == 4, names
    assert all(name.startswith("corpus-bpe") for name in names), names
    for change in ({"seed": 3}, {"fraction": 0.1}, {"isolate_documents": True}):
        names.add(os.path.basename(open_data(dataclasses.replace(config, **change), root=str(tmp_path)).store))
    assert len(names) == 4


def test_a_named_complete_store_outlives_its_source(tmp_path, config, capsys):
    config = dataclasses.replace(config, tokenizer="bpe:300", store=str(tmp_path / "store"))
    data = open_data(config, root="")
    os.remove(config.files)
    again = open_data(config, root="")
    assert len(again.train) == len(data.train)
    assert "unchecked" in capsys.readouterr().err
    with pytest.raises(UserError, match="seq_len=16, not 8"):
        open_data(dataclasses.replace(config, seq_len=8), root="")
    with pytest.raises(UserError, match="no such file or directory"):
        open_data(dataclasses.replace(config, store=str(tmp_path / "other")), root="")


def test_object_stores_take_the_same_path(config):
    config = dataclasses.replace(config, tokenizer="bpe:300")
    remote = open_data(config, root="memory://bucket/data")
    assert remote.store.startswith("memory://bucket/data/corpus-bpe300-")
    assert open_data(dataclasses.replace(config, store=remote.store), root="").vocab_size == remote.vocab_size
    assert remote.train.read(np.array([1, 0]))[0].shape == (2, 17)
    with pytest.raises(UserError, match="unsupported URL scheme"):
        open_data(dataclasses.replace(config, store="ftp://x/y"), root="")


def test_a_second_preparation_waits_for_the_first(tmp_path, config, capsys):
    config = dataclasses.replace(config, store=str(tmp_path / "store"))
    with ThreadPoolExecutor() as pool:
        with store.Store(config.store).lock():
            second = pool.submit(open_data, config, root="")
            said = ""
            while not said.endswith("\n"):  # all of the line
                said += capsys.readouterr().err
                assert not second.done()
            assert f"waiting for process {os.getpid()} on " in said
            assert said.endswith(f", which prepares {config.store}\n")
        second.result()
    with store.Store(config.store).lock():  # a complete store needs no lock
        open_data(config, root="")


def test_bad_settings_and_places_write_nothing(tmp_path, config):
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "thesis.tex").write_text("do not touch")
    (tmp_path / "file").write_text("x")
    for change, message in [
        ({"seq_len": 0}, "data.seq_len=0"),
        ({"fraction": 0.0}, "data.fraction=0.0"),
        ({"tokens": -1}, "data.tokens=-1"),
        ({"tokens": 64, "fraction": 0.5}, "data.tokens=64 and data.fraction=0.5: give one"),
        ({"store": str(tmp_path / "mine")}, "not empty and not a token store"),
        ({"store": str(tmp_path / "file" / "x")}, "data.store: .*/file/x: "),
        ({"seq_len": 10**6, "store": str(tmp_path / "short")}, "train split has .* tokens, data.seq_len=1000000"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            open_data(dataclasses.replace(config, **change), root=str(tmp_path / "root"))
        assert "\n" not in str(error.value)
    assert tree(tmp_path / "mine") == {"train/thesis.tex": b"do not touch"}
    assert tree(tmp_path / "short") == {}
    assert not (tmp_path / "root").exists()
    open_data(dataclasses.replace(config, store=str(tmp_path / "short")), root="")


def test_a_damaged_store_is_noticed(tmp_path, config):
    data = open_data(config, root=str(tmp_path))
    (shard,) = [f for f in tree(data.store) if f.startswith("validation/ids/c/")]
    content = bytearray(tree(data.store)[shard])
    content[5] ^= 1
    Path(data.store, shard).write_bytes(content)
    # The row's own checksum, where the store is too large for all of it to be looked at when it is opened.
    with pytest.raises(UserError, match="/validation: "):
        data.validation.read(np.arange(len(data.validation)))
    with pytest.raises(UserError, match=f"/{shard} is not what was written"):
        open_data(config, root=str(tmp_path))
    Path(data.store, "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"meta\.json is not what this version"):
        open_data(config, root=str(tmp_path))


def test_nanogpt_tokens(tmp_path, config, monkeypatch, capsys):
    monkeypatch.setattr(sources, "TOKEN_SLICE", 100)
    monkeypatch.setattr(store, "SHARD_ROWS", 4)
    rng = np.random.default_rng(0)
    streams = {"train": rng.integers(0, 257, 1234), "val": rng.integers(0, 257, 161)}
    (tmp_path / "bins").mkdir()
    for name, stream in streams.items():
        stream.astype(np.uint16).tofile(tmp_path / "bins" / f"{name}.bin")
    config = dataclasses.replace(config, files=str(tmp_path / "bins"))
    data = open_data(config, root=str(tmp_path))
    for rows, stream in ((data.train, streams["train"]), (data.validation, streams["val"])):
        expected = [stream[i : i + 17] for i in range(0, len(stream) - 16, 16)]
        np.testing.assert_array_equal(rows.read(np.arange(len(rows)))[0], expected)
    again = open_text(dataclasses.replace(config, val_fraction=0.3, seed=text_data().seed), root=str(tmp_path))
    assert again.store == data.store
    assert f"data.val_fraction=0.3: nothing reads it; {config.files} has a split" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds tokens; name the tokenizer"):
        open_data(dataclasses.replace(config, tokenizer="bpe:300"), root=str(tmp_path))
    # Of no tokenizer but the numbers themselves.
    for spec, eos in (("ids:257", None), ("ids:257:4", 4)):
        plain = open_data(dataclasses.replace(config, tokenizer=spec), root=str(tmp_path))
        np.testing.assert_array_equal(plain.train.read(np.arange(9))[0], data.train.read(np.arange(9))[0])
        assert (plain.vocab_size, plain.eos_id) == (257, eos)
        assert plain.tokenizer.decode([3, 41, 256]) == "3 41 256"
        assert plain.tokenizer("3, 4 and 41 256 44")["input_ids"] == [3, 4, 41, 256, 44]
    for spec, isolate, message in (
        ("ids:257", True, "ids:257 has no end-of-sequence token"), ("ids:100", False, "token 2[0-9]+ is outside"),
        ("ids:257:257", False, "ids:50257:50256"), ("ids:", False, "write ids:N for"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            open_data(dataclasses.replace(config, tokenizer=spec, isolate_documents=isolate), root=str(tmp_path))
    text = str(tmp_path / "text.txt")
    Path(text).write_text("some text")
    with pytest.raises(UserError, match="ids:257 is for files of tokens, not for"):
        open_data(dataclasses.replace(config, tokenizer="ids:257", files=text), root=str(tmp_path))
    np.full(100, 60000, np.uint16).tofile(tmp_path / "bins" / "val.bin")
    with pytest.raises(UserError, match=r"token 60000 is outside the vocabulary of .*, which has"):
        open_data(config, root=str(tmp_path))
    (tmp_path / "bins" / "val.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="size of 3 bytes is odd"):
        open_data(config, root=str(tmp_path))


def test_a_corpus_of_chats_keeps_its_masks(tmp_path, config):
    rows = [{"prompt": f"question {n}: ", "completion": f"answer {n}"} for n in range(80)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = open_data(dataclasses.replace(config, files=str(path), layout="prompt_completion"), root=str(tmp_path))
    batch = data.train.batch(np.arange(len(data.train)))
    shown = data.tokenizer.decode(batch["targets"][batch["loss_weights"] > 0])
    told = [row["completion"] for row in rows if f"{row['completion']}<" in shown]
    assert shown.replace("<|endoftext|>", "").startswith("".join(told)[: len(shown) // 2])
    assert "question" not in shown
    assert data.statistics["train"]["loss_tokens"] < data.statistics["train"]["tokens"]
    apart = dataclasses.replace(config, files=str(path), layout="prompt_completion", isolate_documents=True)
    batch = open_data(apart, root=str(tmp_path)).train.batch(np.arange(len(data.train)))
    begins = np.diff(batch["segment_ids"], axis=1) > 0
    assert (batch["positions"][:, 1:][begins] == 0).all()
    assert begins.sum() > 20


def test_files_for_the_validation_of_a_corpus(tmp_path, config):
    held = write_jsonl(tmp_path / "held.jsonl", texts(40, seed=3))
    mixed = dataclasses.replace(config, files=f"{config.files}*2", val_files=held)
    data = open_data(mixed, root=str(tmp_path))
    assert data.statistics["train"]["examples"] == 2 * 301
    assert data.statistics["validation"]["examples"] == 40
    assert open_data(dataclasses.replace(mixed, val_fraction=0.7), root=str(tmp_path)).store == data.store


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_bad_rows_of_a_corpus(tmp_path, config, on_bad, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(Path(config.files).read_text() + '{"text": 3}\n{"text": ""}\n')
    config = dataclasses.replace(config, files=str(path), on_bad=on_bad)
    if on_bad == "error":
        with pytest.raises(UserError, match=r'data\.source: .*bad\.jsonl:302: row 302 is not text: "text" is a number'):
            open_data(config, root=str(tmp_path))
        return
    data = open_data(config, root=str(tmp_path))
    assert (data.statistics["rows"], data.statistics["bad"]) == (302, 1)
    assert "1 bad rows skipped" in capsys.readouterr().err


def test_a_token_that_the_model_has_not_is_refused_where_it_occurs(tmp_path, config):
    tokenizer = load_tokenizer(config.tokenizer)
    size = len(tokenizer)
    open_data(config, root=str(tmp_path), vocab_size=size)
    tokenizer.add_tokens(["delta"])
    tokenizer.save_pretrained(tmp_path / "more")
    more = dataclasses.replace(config, tokenizer=str(tmp_path / "more"))
    with pytest.raises(UserError, match=rf"tokenizer: .*corpus.jsonl:\d+: 'delta' is token {size}, and the model has"):
        open_data(more, root=str(tmp_path), vocab_size=size)
    data = open_data(more, root=str(tmp_path))
    with pytest.raises(UserError, match=rf"rows of {data.store}: 'delta' is token {size}"):
        open_data(more, root=str(tmp_path), vocab_size=size)
    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.add_tokens(["nowhere in the data"])
    tokenizer.save_pretrained(tmp_path / "unused")
    open_data(dataclasses.replace(config, tokenizer=str(tmp_path / "unused")), root=str(tmp_path), vocab_size=size)


def test_big_vocabularies_are_stored_as_uint32(tmp_path, config):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate(["end", "and", *(f"word{i}" for i in range(66000))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="end"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="end").save_pretrained(tmp_path / "big")
    path = write_jsonl(tmp_path / "words.jsonl", [f"word{i} and word{65999 - i}" for i in range(64)])
    data = open_data(dataclasses.replace(config, files=path, tokenizer=str(tmp_path / "big")), root=str(tmp_path))
    assert read_meta(data)["dtype"] == "uint32"
    tokens = data.train.read(np.arange(len(data.train)))[0]
    assert tokens.max() > 2**16
    assert "word65" in data.tokenizer.decode(tokens[0])


def test_tokenizer_without_eos_is_refused(tmp_path, config):
    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no-eos")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        open_data(dataclasses.replace(config, tokenizer=str(tmp_path / "no-eos")), root=str(tmp_path / "root"))


# Batches


class FakeRows(Rows):
    """Rows whose content is known: row r holds r * seq_len + [0 .. seq_len]."""

    def __init__(self, count, isolate_eos=None, seq_len=4):
        self.count, self.isolate, self.eos, self.seq_len, self.reads = (
            count, isolate_eos is not None, -1 if isolate_eos is None else isolate_eos, seq_len, [],
        )  # fmt: skip

    def __len__(self):
        return self.count

    def read(self, indices):
        self.reads.append(np.array(indices))
        ids = (np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len + 1)).astype(np.int32)
        return ids, unmarked(ids, self.eos)


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**63), st.floats(0.0, 1.0))
def test_every_epoch_visits_each_row_once(count, batch_size, seed, part):
    used = max(1, round(part * count))
    batches = Batches(FakeRows(count), batch_size=batch_size, seed=seed, num_rows=used)
    epochs = 3
    steps = -(-epochs * batches.num_rows // batch_size)
    rows = np.concatenate([batches.rows_of(step) for step in range(steps)])
    assert rows.dtype == np.int64
    first = np.sort(rows[: batches.num_rows])
    assert len(set(first)) == batches.num_rows == used
    for epoch in range(epochs):
        part = rows[epoch * batches.num_rows : (epoch + 1) * batches.num_rows]
        np.testing.assert_array_equal(np.sort(part), first)
    # Pure: another object, asked in another order, gives the same.
    other = Batches(FakeRows(count), batch_size=batch_size, seed=seed, num_rows=used)
    for step in reversed(range(steps)):
        np.testing.assert_array_equal(other.rows_of(step), rows[step * batch_size : (step + 1) * batch_size])


def test_the_order_is_what_it_has_always_been():
    """A change here would silently alter every resumed run."""
    assert Batches(FakeRows(10), batch_size=12, seed=1).rows_of(0).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4, 0, 6]


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(0, 1), st.integers(1, 3), st.integers(1, 50),
    st.integers(0, 2**63),
)  # fmt: skip
def test_phases_follow_each_other_and_lose_nothing(counts, replay, passes, batch_size, seed):
    count = sum(counts)
    names = tuple(map(str, counts))
    phases = Phases(names=names, examples=tuple(counts), rows=tuple(counts), replay=replay, passes=passes)
    batches = Batches(FakeRows(count, 21), batch_size=batch_size, seed=seed, phases=phases)
    length, phase = sum(phases.lengths()), np.repeat(np.arange(len(counts)), counts)
    steps, whole = -(-2 * length // batch_size), []
    rows = np.concatenate([batches.rows_of(step) for step in range(steps)])
    ends = list(itertools.islice(phases.ends(), 2 * len(counts)))
    for begin, end, at in zip([0, *ends], ends, [*range(len(counts))] * 2):
        seen = rows[begin:end]
        own, before = seen[phase[seen] == at], seen[phase[seen] < at]
        # All rows of the phase in each pass, no others but of those before; of these so many, none twice in a pass.
        np.testing.assert_array_equal(np.sort(own), np.repeat(np.flatnonzero(phase == at), passes))
        assert len(before) == passes * round(replay * sum(counts[:at])) == len(seen) - len(own)
        assert all(len(set(part)) == len(part) for part in np.split(seen, passes))
        whole.append(own)
    # The union is that of all mixed, in as many epochs.
    np.testing.assert_array_equal(np.sort(np.concatenate(whole)), np.repeat(np.arange(count), 2 * passes))
    # Pure: another object, asked in another order and for parts, gives the same.
    again = Batches(FakeRows(count, 21), batch_size=batch_size, seed=seed, phases=phases)
    for step in reversed(range(min(steps, 20))):
        np.testing.assert_array_equal(again.rows_of(step), rows[step * batch_size : (step + 1) * batch_size])
        parts = [again(step, part)["tokens"] for part in (slice(batch_size // 2), slice(batch_size // 2, None))]
        np.testing.assert_array_equal(batches(step)["tokens"], np.concatenate(parts))


def test_the_order_of_phases_is_what_it_has_always_been():
    phases = Phases(names=("a", "b"), examples=(9, 8), rows=(4, 3), replay=0.5, passes=2)
    batches = Batches(FakeRows(7), batch_size=19, seed=1, phases=phases)
    order = [3, 2, 0, 1, 0, 3, 2, 1, *(0, 6, 4, 5, 2), *(2, 6, 3, 5, 4), 3]  # the last is of the next round
    assert batches.rows_of(0).tolist() == order
    assert phases.schedule(batch_size=3, steps=5) == [
        "  phase 1 of 2, a: 9 conversations in 4 rows, 2 times; steps 1 to 3",
        "  phase 2 of 2, b: 8 conversations in 3 rows and 2 rows of those before again, 2 times; steps 3 to 5",
    ]
    assert phases.schedule(batch_size=3, steps=2)[1].endswith(", 2 times; not in 2 steps")


def test_epochs_and_seeds_differ():
    batches = Batches(FakeRows(50), batch_size=50, seed=1)
    assert not np.array_equal(batches.rows_of(0), batches.rows_of(1))
    assert not np.array_equal(batches.rows_of(0), Batches(FakeRows(50), batch_size=50, seed=2).rows_of(0))


def test_subsets_are_fixed_nested_and_depend_on_the_seed():
    def subset(num_rows, seed=0, batch_size=7):
        batches = Batches(FakeRows(1000), batch_size=batch_size, seed=seed, num_rows=num_rows)
        return {int(r) for step in range(1 + num_rows // batch_size) for r in batches.rows_of(step)}

    assert len(subset(100)) == 100
    assert subset(100) == subset(100, batch_size=13) != subset(100, seed=1)
    assert subset(10) < subset(100)


def test_fractions_and_tokens_choose_whole_rows(tmp_path, config):
    whole = open_data(config, root=str(tmp_path))
    rows = len(whole.train)

    def used(**change):
        data = open_data(dataclasses.replace(config, **change), root=str(tmp_path))
        assert data.batches(batch_size=4, seed=1).num_rows == data.train_rows
        assert ("of them used" in str(data)) == (data.train_rows < rows)
        return data.train_rows

    assert used() == used(tokens=16 * rows) == used(fraction=1.0) == rows
    assert used(fraction=0.5) == round(rows / 2)
    assert used(fraction=1e-9) == used(tokens=1) == 1
    assert used(tokens=16 * 20) == used(tokens=16 * 20 + 7) == 20
    half = open_data(dataclasses.replace(config, tokens=16 * 20), root=str(tmp_path))
    assert half.whole().train_rows == rows
    with pytest.raises(UserError, match=rf"data.tokens={16 * rows + 16:,}: .* holds {16 * rows:,} training") as error:
        used(tokens=16 * rows + 16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_their_share_of_the_same_batch(processes):
    whole = Batches(FakeRows(30, 21), batch_size=8, seed=3)
    for step in (0, 3, 11):
        expected, share, parts = whole(step), 8 // processes, []
        for process in range(processes):
            rows = FakeRows(30, 21)
            batches = Batches(rows, batch_size=8, seed=3)
            parts.append(batches(step, slice(process * share, (process + 1) * share)))
            assert [len(read) for read in rows.reads] == [share]
        assert set(expected) == {"tokens", "targets", "loss_weights", "segment_ids", "positions"}
        for key, value in expected.items():
            np.testing.assert_array_equal(value, np.concatenate([part[key] for part in parts]))


def test_fields_without_isolation():
    batch = Batches(FakeRows(9), batch_size=4, seed=0)(0)
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "tokens": (np.int32, (4, 4)),
        "targets": (np.int32, (4, 4)),
        "loss_weights": (np.float32, (4, 4)),
    }
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    assert batch["loss_weights"].all()


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=1, max_size=5))
def test_isolation_against_a_naive_loop(rows):
    table = np.array(rows, np.int32)
    fake = FakeRows(len(rows), 0, seq_len=7)
    fake.read = lambda indices: (table[indices], unmarked(table[indices], 0))
    (batch,) = validation_batches(fake, batch_size=len(rows), max_rows=0)
    for row, ids, positions, weights in zip(
        rows, batch["segment_ids"].tolist(), batch["positions"].tolist(), batch["loss_weights"].tolist()
    ):
        segment, position = 1, 0
        for i, token in enumerate(row[:-1]):
            assert (ids[i], positions[i], weights[i]) == (segment, position, 0.0 if token == 0 else 1.0)
            position += 1
            if token == 0:
                segment, position = segment + 1, 0
    assert {value.dtype for key, value in batch.items() if key != "loss_weights"} == {np.dtype(np.int32)}


def test_validation_batches_are_padded_to_one_shape():
    rows, apart = FakeRows(10), FakeRows(10, 2)
    batches = list(validation_batches(rows, batch_size=4, max_rows=0))
    assert [b["tokens"].shape for b in batches] == [(4, 4)] * 3
    assert sum(float(b["loss_weights"].sum()) for b in batches) == 40
    np.testing.assert_array_equal(np.concatenate([b["tokens"][:, 0] for b in batches])[:10], 4 * np.arange(10))
    assert batches[-1]["loss_weights"][2:].max() == 0
    assert len(list(validation_batches(rows, batch_size=4, max_rows=3))) == 1
    halves = [list(validation_batches(apart, batch_size=4, max_rows=9, part=p)) for p in np.s_[:2, 2:]]
    for whole, *parts in zip(validation_batches(apart, batch_size=4, max_rows=9), *halves):
        for key in whole:
            np.testing.assert_array_equal(whole[key], np.concatenate([part[key] for part in parts]))


def test_importing_is_light():
    code = (
        "import sys, jaxup.data.open; "
        "print([m for m in ('jax', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    assert processes.run("-c", code).stdout.strip() == "[]"


# ---- what is drawn anew each time


class DrawnRows(FakeRows):
    draws = True

    def batch(self, indices, draws):
        one = np.ones((len(indices), 3), np.float32)
        return {"row": indices, "noise": draws, "loss_weights": one, "value_weights": one.copy(), "values": one.copy()}


def test_a_row_is_drawn_by_its_place_in_the_run_alone():
    """In epochs, in parts of a batch that each process reads, whatever the size of the batch; each time another."""
    rows, steps = DrawnRows(10), 50

    def noise(batch_size, seed=1, part=slice(None)):
        batches = Batches(rows, batch_size=batch_size, seed=seed)
        found = [batches(step, part)["noise"] for step in range(steps * 4 // batch_size)]
        return np.stack(found)

    whole = noise(4)
    assert whole.dtype == np.uint32
    np.testing.assert_array_equal(np.concatenate([noise(4, part=slice(0, 2)), noise(4, part=slice(2, 4))], 1), whole)
    np.testing.assert_array_equal(noise(8).ravel(), whole.ravel())
    assert noise(4, part=slice(2, 2)).shape == (steps, 0)
    assert len(np.unique(whole)) == whole.size
    assert not np.isin(noise(4, seed=2), whole).any()
    # Of 200 uniform numbers the mean is within four of its deviations, and each bit is set in half of them.
    assert abs(whole.mean() / 2**32 - 0.5) < 4 / (12 * whole.size) ** 0.5
    bits = np.unpackbits(whole.ravel().view(np.uint8).reshape(-1, 4), axis=1).mean(0)
    assert np.abs(bits - 0.5).max() < 4 * 0.5 / whole.size**0.5
    assert not hasattr(FakeRows(1), "draws")


def test_rows_of_validation_are_drawn_by_their_numbers():
    """The same at each evaluation, in batches of any size; what fills up a batch does not count."""
    rows = DrawnRows(10)
    several = list(validation_batches(rows, batch_size=4, max_rows=0))
    (one,) = validation_batches(rows, batch_size=10, max_rows=0)
    noise = np.concatenate([batch["noise"] for batch in several])
    np.testing.assert_array_equal(noise[:10], one["noise"])
    assert len(np.unique(noise)) == 10
    parts = [next(validation_batches(rows, batch_size=4, max_rows=0, part=part)) for part in (slice(0, 2), slice(2, 4))]
    np.testing.assert_array_equal(np.concatenate([part["noise"] for part in parts]), several[0]["noise"])
    assert not np.isin(Batches(rows, batch_size=10, seed=0)(0)["noise"], one["noise"]).any()
    for name, held in (("loss_weights", 2), ("value_weights", 2), ("values", 4)):
        assert several[-1][name].sum() == 3 * held
