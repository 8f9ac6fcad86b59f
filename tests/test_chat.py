"""Chat data -> packed rows: against plain loops over `Format.encode`, resuming, what is refused and what is said."""

import ast
import collections
import dataclasses
import functools
import itertools
import json
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import tree
from test_packing import problems, realistic

from jaxup.data import chat_formats, docstrings, rendering, store
from jaxup.data import prepare as prepare_module
from jaxup.data import rows as rows_module
from jaxup.data import tokenizer as tokenizer_module
from jaxup.data.chat_formats import Encoded, Format, open_format
from jaxup.data.chat_templates import TEMPLATES
from jaxup.data.config import DataConfig
from jaxup.data.layouts import parse
from jaxup.data.open import open_data
from jaxup.data.packing import pack
from jaxup.data.rows import BEGINS, BEST_FIT, CONCATENATED, ONE, PADDING, Rows, assemble, flagged
from jaxup.data.tokenizer import train_bpe
from jaxup.errors import UserError

COUNT = 100  # conversations of the file that most tests read
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()  # noqa: SIM905


@functools.cache
def tokenizer(template=None):
    made = train_bpe([" ".join(WORDS)] * 3, 330)
    made.chat_template = template
    return made


def dialogue(rng, number, rounds=2, words=12):
    said = [(role, " ".join(rng.choices(WORDS, k=rng.randint(1, words))))
            for _ in range(rng.randint(1, rounds)) for role in ("user", "assistant")]  # fmt: skip
    said[0] = ("user", f"{number} {said[0][1]}")
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(count, seed=0):
    rng = random.Random(seed)
    return [dialogue(rng, i) for i in range(count)]


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        files=write(tmp_path / "a.jsonl", rows_of(COUNT)),
        layout="",
        format="metharme",
        seq_len=128,
        val_files="",
        val_fraction=0.2,
        on_bad="error",
        packing=BEST_FIT,
        store="",
        seed=0,
    )


@pytest.fixture
def opened(tmp_path):
    """opened(config, **changes) under a root of its own."""

    def open_changed(config, root="root", **changes):
        return open_data(dataclasses.replace(config, **changes), tokenizer=tokenizer(), root=str(tmp_path / root))

    return open_changed


def encoded(rows, name="metharme", layout="messages", tok=None):
    """The ids and the mask of each, one after the other."""
    format = open_format(name, tok or tokenizer())
    return [format.encode(parse(row, layout)) for row in rows]


def walk(batch):
    """(ids, weights of their targets) of each segment, by a walk over the places of a batch; checks all else."""
    found = []
    fields = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    assert {name: array.dtype.name for name, array in batch.items()} == {
        name: "float32" if name == "loss_weights" else "int32" for name in fields
    }
    for row in zip(*(batch[name].tolist() for name in fields)):
        last, ended = 0, False
        for place, (token, target, weight, segment, position) in enumerate(zip(*row)):
            if segment == 0:
                assert (token, target, weight, position) == (0, 0, 0, 0)
                ended = True
                continue
            assert not ended, "a token after padding"
            if segment != last:
                assert (segment, position) == (last + 1, 0)
                found.append(([], []))
            last = segment
            ids, weights = found[-1]
            assert position == len(ids)
            ids.append(token)
            more = place + 1 < len(row[0]) and row[3][place + 1] == segment
            assert target == (row[0][place + 1] if more else 0)
            assert weight in ((0, 1) if more else (0,))
            weights.append(weight)
    return [(tuple(ids), tuple(weights)) for ids, weights in found]


def as_walked(examples):
    return [(tuple(e.ids.tolist()), (*e.trained[1:].astype(float).tolist(), 0.0)) for e in examples]


def everything(rows):
    return walk(rows.batch(np.arange(len(rows))))


# Rows


class InMemory(Rows):
    def __init__(self, ids, marks):
        self.ids, self.marks, self.seq_len, self.isolate = ids, marks, ids.shape[1], True

    def read(self, indices):
        return self.ids[indices].astype(np.int32), self.marks[indices]


def packed_in_memory(examples, capacity):
    """Examples, (ids, trained), as rows in the order `pack` opens them."""
    lengths = np.array([len(ids) for ids, _ in examples])
    packing = pack(lengths, capacity)
    tokens = np.concatenate([flagged(Encoded(np.array(ids), np.array(trained))) for ids, trained in examples])
    return packing, InMemory(*assemble(packing, tokens, np.cumsum(lengths) - lengths, np.arange(packing.num_rows)))


@given(problems(max_size=20), st.randoms(use_true_random=False))
def test_a_batch_is_the_plain_loop(problem, rng):
    lengths, capacity = problem
    examples = [
        ([rng.randint(0, 2**29 - 1) for _ in range(n)], [rng.random() < 0.5 for _ in range(n)]) for n in lengths
    ]
    packing, rows = packed_in_memory(examples, capacity)
    for row in range(packing.num_rows):
        members = sorted((packing.offset[i], i) for i in range(len(lengths)) if packing.row[i] == row)
        mine = [examples[i] for _, i in members]
        batch = rows.batch(np.array([row, row]))
        expected = [(tuple(ids), (*map(float, trained[1:]), 0.0)) for ids, trained in mine]
        assert walk(batch) == expected * 2
        got = [(e.ids.tolist(), e.trained.tolist()) for e in rows.examples(row)]
        assert got == mine


def test_by_hand():
    _, rows = packed_in_memory([([5, 6, 7], [True, True, True]), ([8, 9], [False, True])], 6)
    batch = {name: array.tolist() for name, array in rows.batch(np.array([0])).items()}
    assert batch == {
        "tokens": [[5, 6, 7, 8, 9, 0]],
        "targets": [[6, 7, 0, 9, 0, 0]],
        "loss_weights": [[1, 1, 0, 1, 0, 0]],
        "segment_ids": [[1, 1, 1, 2, 2, 0]],
        "positions": [[0, 1, 2, 0, 1, 0]],
    }
    assert rows.marks.tolist() == [[BEGINS | 1, 1, 1, BEGINS, 1, PADDING]]


def test_no_label_crosses_a_border():
    lengths = realistic(200)
    # The tokens of example i are all i + 1.
    _, rows = packed_in_memory([([i + 1] * n, [True] * n) for i, n in enumerate(lengths.tolist())], 4096)
    batch = rows.batch(np.arange(len(rows.ids)))
    weighed = batch["loss_weights"] > 0
    assert (batch["targets"] == batch["tokens"])[weighed].all()
    assert weighed.sum() == (lengths - 1).sum()
    assert (batch["tokens"] > 0).sum() == lengths.sum()


# Stores


@pytest.mark.parametrize("packing", [BEST_FIT, ONE])
def test_rows_hold_every_conversation_once(config, opened, monkeypatch, packing):
    monkeypatch.setattr(tokenizer_module, "BATCH_TEXTS", 17)
    monkeypatch.setattr(store, "SHARD_ROWS", 5)
    untrained = {"segments": [{"label": True, "text": "<|endoftext|>"}, {"label": False, "text": "x"}]}
    other = write(Path(config.files).with_name("b.jsonl"), [untrained] * 3)
    data = opened(config, files=f"{config.files}*2,{other}", seq_len=64, packing=packing)
    examples = encoded(rows_of(COUNT)) * 2
    fitting = [e for e in examples if len(e.ids) <= 64]
    assert 0.25 < len(fitting) / len(examples) < 0.9, "the test has lost its point"
    train, validation = everything(data.train), everything(data.validation)
    assert collections.Counter(train + validation) == collections.Counter(as_walked(fitting))
    # Both copies of each conversation lie on the same side.
    assert not set(train) & set(validation)
    assert 0.1 < len(validation) / len(fitting) < 0.3
    assert (len(data.train), len(data.validation)) == (
        (len(train), len(validation))
        if packing == ONE
        else tuple(pack(np.array([len(ids) for ids, _ in side]), 64).num_rows for side in (train, validation))
    )
    counts = data.statistics
    assert (counts["rows"], counts["bad"], counts["refused"], counts["shared"]) == (COUNT + 3, 0, 0, 0)
    for split, side, rows in (("train", train, data.train), ("validation", validation, data.validation)):
        of = counts[split]
        tokens = sum(len(ids) for ids, _ in side)
        assert (of["examples"], of["tokens"], of["rows"]) == (len(side), tokens, len(rows))
        assert of["loss_tokens"] == sum(sum(weights) for _, weights in side)
        assert of["efficiency"] == tokens / (64 * len(rows))
    assert sum(counts[split]["too_long"] for split in ("train", "validation")) == len(examples) - len(fitting)
    assert sum(counts[split]["untrained"] for split in ("train", "validation")) == 3
    with pytest.raises(IndexError):
        data.train.batch(np.array([len(data.train)]))


@pytest.mark.parametrize(
    ("phases", "packing"),
    [
        ("files", BEST_FIT),
        ("difficulty", ONE),
        pytest.param("files", ONE, marks=pytest.mark.slow),
        pytest.param("difficulty", BEST_FIT, marks=pytest.mark.slow),
    ],
)
def test_rows_of_phases_are_those_of_all_mixed(config, opened, monkeypatch, phases, packing):
    monkeypatch.setattr(store, "SHARD_ROWS", 5)
    rows, of = rows_of(COUNT), [slice(30), slice(30, None)]
    files = [write(Path(config.files).with_name(name), rows[part]) for name, part in zip(("b.jsonl", "a.jsonl"), of)]
    config = dataclasses.replace(config, files=",".join(files), packing=packing)
    mixed, data = opened(config), opened(config, phases=phases, replay=0.25, passes=3)
    assert mixed.phases is None
    assert collections.Counter(everything(data.train)) == collections.Counter(everything(mixed.train))
    assert everything(data.validation) == everything(mixed.validation)
    border, count = data.phases.rows[0], len(data.train)
    first, second = (walk(data.train.batch(np.arange(*ends))) for ends in ((0, border), (border, count)))
    assert data.phases.examples == (len(first), len(second))
    if phases == "files":
        assert data.phases.names == tuple(files)
        for walked, part in zip((first, second), of):
            assert not collections.Counter(walked) - collections.Counter(as_walked(encoded(rows[part])))
    else:
        least, most = (sorted(sum(weights) for _, weights in walked) for walked in (first, second))
        assert least[-1] <= most[0]
        assert 0 <= len(least) - len(most) <= 1
        assert data.phases.names[0] == f"{least[0]:g} to {least[-1]:g} tokens trained on"
    assert data.epoch_rows == count + round(border / 4)
    assert list(itertools.islice(data.ends(), 2)) == [3 * border, 3 * data.epoch_rows]
    # Found again, and neither taken for the other.
    assert opened(config, phases=phases).phases.rows == data.phases.rows
    with pytest.raises(UserError, match=f"was made with phases={phases}, not None"):
        opened(config, store=data.store)
    with pytest.raises(UserError, match=f"was made with phases=None, not {phases}"):
        opened(config, store=mixed.store, phases=phases)
    # One from before there were phases says nothing of them.
    held = store.Store(mixed.store)
    meta = held.read_json(store.META)
    del meta["phases"]
    held.write_json(store.META, meta)
    assert opened(config).store == mixed.store


def test_long_rows_are_not_kept_together(config, opened):
    """pack() numbers rows longest first; validation is cut short, so its first rows must be like the others."""

    def longest(rows):
        return rows.batch(np.arange(len(rows)))["positions"].max(axis=1)

    lengths = longest(opened(config).train)
    opening = np.sort(lengths)[::-1]  # as pack() has them
    index = np.arange(len(lengths))
    assert np.corrcoef(opening, index)[0, 1] < -0.9
    # By chance the correlation has the deviation 1/sqrt(31) = 0.18; four of them.
    assert len(lengths) >= 32
    assert abs(np.corrcoef(lengths, index)[0, 1]) < 0.72
    assert not np.array_equal(lengths, np.resize(longest(opened(config, seed=1).train), len(lengths)))


def test_chats_fill_their_rows(tmp_path, config, opened):
    # Of a token each, but for those that the format adds.
    rows = [{"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "!" * n}]}
            for i, n in enumerate((realistic(400) - 40).clip(1).tolist())]  # fmt: skip
    data = opened(config, files=write(tmp_path / "long.jsonl", rows), seq_len=4096, val_fraction=0.05)
    assert data.statistics["train"]["efficiency"] >= 0.97
    assert data.statistics["train"]["examples"] > 360


def test_steps_go_on_in_the_middle_of_an_epoch(config, opened):
    data = opened(config)
    count = len(data.train)
    steps = -(-2 * count // 6)
    batches = data.batches(batch_size=6, seed=7)
    straight = [batches(step) for step in range(steps)]
    rows = np.concatenate([batches.rows_of(step) for step in range(steps)])
    for epoch in range(2):
        np.testing.assert_array_equal(np.sort(rows[epoch * count : (epoch + 1) * count]), np.arange(count))
    assert count % 6, "an epoch should end within a batch"
    again = opened(config).batches(batch_size=6, seed=7)
    for step in range(count // 12, steps):
        np.testing.assert_array_equal(again.rows_of(step), batches.rows_of(step))
        whole, halves = straight[step], [again(step, half) for half in (slice(0, 3), slice(3, 6))]
        for name, array in whole.items():
            np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))
    assert data.train_rows == count


def test_validation_batches_have_one_shape(config, opened):
    data = opened(config)
    batches = list(data.validation_batches(batch_size=3, max_rows=0))
    count = len(data.validation)
    assert count % 3
    assert {batch["tokens"].shape for batch in batches} == {(3, 128)}
    assert sum(batch["loss_weights"].sum() for batch in batches) == data.statistics["validation"]["loss_tokens"]
    first = next(data.validation_batches(batch_size=4, max_rows=3, part=slice(2, 4)))
    np.testing.assert_array_equal(first["tokens"][0], data.validation.batch(np.array([2]))["tokens"][0])
    assert first["loss_weights"][1].sum() == 0


def test_a_complete_store_is_opened_without_tokenising(config, opened, monkeypatch, capsys):
    first = opened(config)
    monkeypatch.setattr(prepare_module, "_tokenised", None)
    monkeypatch.setattr(chat_formats.Format, "render", None)
    capsys.readouterr()
    again = opened(config)
    assert capsys.readouterr().err == ""
    assert (again.store, again.statistics, again.layouts) == (first.store, first.statistics, first.layouts)
    assert everything(again.train) == everything(first.train)
    assert str(again) == str(first)
    assert sorted(os.listdir(first.store)) == ["lock", "meta.json", "tokenizer", "train", "validation"]


def test_stores_are_named_after_what_decides_their_rows(tmp_path, config, opened):
    config, own = dataclasses.replace(config, seq_len=256), tokenizer(TEMPLATES["metharme"])
    changes = [{}, {"seed": 1}, {"seq_len": 100}, {"packing": ONE}, {"val_fraction": 0.3}, {"format": "alpaca"},
               {"files": f"{config.files}*2"}, {"val_files": config.files}]  # fmt: skip
    names = [opened(config, **change).store for change in changes]
    config = dataclasses.replace(config, format="")
    names += [open_data(config, tokenizer=tok, root=str(tmp_path / "root")).store
              for tok in (own, tokenizer(TEMPLATES["alpaca"]))]  # fmt: skip
    assert len(set(names)) == len(names), names
    (tmp_path / "b").mkdir()
    os.rename(config.files, tmp_path / "b" / "a.jsonl")
    moved = dataclasses.replace(config, files=str(tmp_path / "b" / "a.jsonl"))
    assert open_data(moved, tokenizer=own, root=str(tmp_path / "root")).store == names[-2]


class Killed(Exception):
    """Stands for kill -9: nothing in the code catches it."""


def kill_at(monkeypatch, owner, name, call):
    original, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_a_killed_preparation_goes_on(tmp_path, config, opened, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "BATCH_TEXTS", 10)
    straight = opened(config, store=str(tmp_path / "straight"))
    broken = dataclasses.replace(config, store=str(tmp_path / "broken"))
    progress, scratch = tmp_path / "broken" / "progress.json", tmp_path / "broken" / "scratch" / "tokens.bin"

    def killed(owner, name, call):
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, call)
            with pytest.raises(Killed):
                opened(broken)
        assert not (tmp_path / "broken" / "meta.json").exists()
        return json.loads(progress.read_text())["read"]

    assert killed(store.Store, "save_tokenizer", 1) == 0
    assert killed(rows_module.Scratch, "append", 1) == 0
    assert killed(rows_module.Scratch, "append", 4) == 30
    # Between the tokens of a batch and its record: they are cut off again.
    before = scratch.stat().st_size
    assert killed(store.Store, "write_json", 3) == 40
    assert scratch.stat().st_size > before
    scratch.write_bytes(scratch.read_bytes() + b"torn")
    assert killed(rows_module.Scratch, "append", 2) == 50
    with pytest.raises(UserError, match="seq_len=128, not 64"):
        opened(broken, seq_len=64)
    # While rows are written.
    assert killed(rows_module, "assemble", 2) == 100
    assert killed(store.Store, "finish", 1) == 100
    with monkeypatch.context() as patch:
        patch.setattr(Format, "tokenize", None)
        resumed = opened(broken)
    assert tree(resumed.store) == tree(straight.store)


def test_a_signal_does_not_wait_for_what_templates_make(config, tmp_path):
    slow = "{% for a in range(1000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}"
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    tok = tokenizer("{% if messages[0].content[:2] != '0 ' %}" + slow + "{% endif %}" + turns)

    def stop(*_):
        raise Killed

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 3)  # it is not through with the first batch for a minute
    try:
        with pytest.raises(Killed):
            open_data(dataclasses.replace(config, format=""), tokenizer=tok, root=str(tmp_path))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rendering.renderer._process is None


def test_lost_scratch_files_are_made_again(tmp_path, config, opened, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "BATCH_TEXTS", 10)
    straight = opened(config, store=str(tmp_path / "straight"))
    with monkeypatch.context() as patch:
        kill_at(patch, rows_module.Scratch, "append", 4)
        with pytest.raises(Killed):
            opened(config, store=str(tmp_path / "broken"))
    scratch = tmp_path / "broken" / "scratch" / "tokens.bin"
    scratch.write_bytes(scratch.read_bytes()[:-1])
    assert tree(opened(config, store=str(tmp_path / "broken")).store) == tree(straight.store)


def test_a_second_preparation_waits_for_the_first(tmp_path, config, opened, capsys):
    with ThreadPoolExecutor() as pool:
        with store.Store(str(tmp_path / "store")).lock():
            second = pool.submit(opened, config, store=str(tmp_path / "store"))
            while "which prepares" not in capsys.readouterr().err:
                assert not second.done()
        second.result()


def test_object_stores_take_the_same_path(config):
    remote = open_data(config, tokenizer=tokenizer(), root="memory://bucket/chats")
    assert remote.store.startswith("memory://bucket/chats/a-metharme-")
    walked = collections.Counter(everything(remote.train) + everything(remote.validation))
    assert walked == collections.Counter(as_walked(encoded(rows_of(COUNT))))
    assert open_data(config, tokenizer=tokenizer(), root="memory://bucket/chats").store == remote.store


def test_a_named_complete_store_outlives_its_files(tmp_path, config, opened, capsys):
    config = dataclasses.replace(config, store=str(tmp_path / "store"))
    data = opened(config)
    with pytest.raises(UserError, match=r"data\.store: .*chat_format=metharme, not alpaca; choose another"):
        opened(config, format="alpaca")
    os.remove(config.files)
    capsys.readouterr()
    again = opened(config)
    assert (again.layouts, again.statistics) == (data.layouts, data.statistics)
    assert "store unchecked: data.files: no such file" in capsys.readouterr().err
    with pytest.raises(UserError, match="seq_len=128, not 64"):
        opened(config, seq_len=64)
    with pytest.raises(UserError, match="no such file"):
        opened(config, files=config.files + "l")


def test_stores_of_text_and_of_chats_are_told_apart(tmp_path, config, opened):
    text = tmp_path / "corpus.jsonl"
    write(text, [{"text": " ".join(WORDS) * 9}] * 20)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = DataConfig(
        files=str(text), tokenizer=str(tmp_path / "tokenizer"), packing=CONCATENATED, seq_len=16, val_fraction=0.2,
        store=str(tmp_path / "text"),
    )  # fmt: skip
    open_data(data, root="")
    opened(config, store=str(tmp_path / "chat"))
    with pytest.raises(UserError, match=r"/text was made with .*; packing=concatenated, not best_fit; .*; choose an"):
        opened(config, store=str(tmp_path / "text"))
    for change in ({}, {"files": str(tmp_path / "gone.jsonl")}):
        with pytest.raises(UserError, match=r"/chat was made with .*packing=best_fit, not concatenated|no such file"):
            open_data(dataclasses.replace(data, store=str(tmp_path / "chat"), **change), root="")


# Splits of their own, bad rows


def test_validation_files_are_all_of_validation(tmp_path, config, opened):
    shared, own = rows_of(COUNT)[:7], rows_of(30, seed=1)
    data = opened(config, val_files=write(tmp_path / "v.jsonl", shared + own), val_fraction=0.0)
    assert collections.Counter(everything(data.train)) == collections.Counter(as_walked(encoded(rows_of(COUNT))))
    assert collections.Counter(everything(data.validation)) == collections.Counter(as_walked(encoded(shared + own)))
    assert data.statistics["shared"] == 7
    assert "7 of validation also in training" in data.report()


BAD_ROWS = [{"messages": []}, {"messages": [{"role": "user", "content": "U"}]}]


def test_bad_rows_are_skipped_and_counted(tmp_path, config, opened, capsys):
    files = write(tmp_path / "bad.jsonl", rows_of(30) + BAD_ROWS)
    data = opened(config, files=files, on_bad="skip")
    assert (data.statistics["rows"], data.statistics["bad"]) == (32, 2)
    walked = collections.Counter(everything(data.train) + everything(data.validation))
    assert walked == collections.Counter(as_walked(encoded(rows_of(30))))
    said = capsys.readouterr().err
    assert f"jaxup: warning: {files}: 2 bad rows skipped; the first: {files}:31: row 31 is not messages" in said
    assert ".py" not in said
    assert "32 rows; 2 bad, skipped" in data.report()


REFUSES = "{% for m in messages %}{% if 'beta' in m['content'] %}{{ raise_exception('no beta') }}{% endif %}" + (
    TEMPLATES["metharme"].split("{% for message in messages %}")[1].replace("message[", "m[")
)


def test_what_a_template_refuses_is_skipped_and_counted(tmp_path, config, capsys):
    tok = tokenizer(REFUSES)
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
            for text in (*WORDS, *(f"{word} 2" for word in WORDS))]  # fmt: skip
    config = dataclasses.replace(config, files=write(tmp_path / "t.jsonl", rows), format="", val_fraction=0.5)
    with pytest.raises(UserError, match=r"data\.format: .*/t\.jsonl:2: .*no beta; choose"):
        open_data(config, tokenizer=tok, root=str(tmp_path / "root"))
    assert os.listdir(tmp_path / "root") == []
    data = open_data(dataclasses.replace(config, on_bad="skip"), tokenizer=tok, root=str(tmp_path / "root"))
    assert data.statistics["refused"] == 2
    assert sum(data.statistics[split]["examples"] for split in ("train", "validation")) == 22
    assert "jaxup: warning: 2 examples skipped; the first: data.format: " in capsys.readouterr().err


def test_what_formats_warn_of_is_plain_lines(tmp_path, config, opened, capsys):
    rows = rows_of(40)
    rows[3]["messages"][0]["content"] += " <|endoftext|>"
    opened(config, files=write(tmp_path / "s.jsonl", rows), format="chatml")
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("jaxup: ", "tokenising", "packing", "digests")) for line in lines), lines
    assert "jaxup: warning: chat format chatml: not in the tokenizer, so plain text of several tokens: " in lines[0]
    assert any("spells '<|endoftext|>', which becomes that special token; said once" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": "gone.jsonl"}, "data.files: no such file or directory: gone.jsonl"),
        ({"files": ""}, "data.files: name the data"),
        ({"files": "a.jsonl*x"}, "data.files: a.jsonl*x: 'x' is no weight"),
        ({"files": "docstrings:x"}, "data.files: docstrings:x: write docstrings for all pairs, or docstrings:N"),
        ({"val_files": "gone.jsonl"}, "data.val_files: no such file or directory: gone.jsonl"),
        ({"layout": "sharegtp"}, "data.layout='sharegtp': not known; did you mean 'sharegpt'?"),
        ({"on_bad": "skp"}, "data.on_bad='skp': not known; did you mean 'skip'?"),
        ({"format": "alpacca"}, "data.format='alpacca': not known; did you mean 'alpaca'?"),
        ({"format": ""}, "data.format: {good}:1: the tokenizer has no chat template"),
        ({"seq_len": 1}, "data.seq_len=1: must be at least 2"),
        ({"seq_len": 9}, "train examples are longer; the shortest needs "),
        ({"val_fraction": 0.0}, "data.val_fraction=0.0: must lie between 0 and 1"),
        ({"val_fraction": 1e-9}, "data.val_fraction=1e-09: of 100 examples none is left for validation; "),
        ({"val_fraction": 1 - 1e-9}, "of 100 examples none is left for train; give more"),
        ({"files": "{bad}"}, "data.files: {bad}:31: row 31 is not messages: "),
        ({"files": "{bad}"}, "; the first of 2 bad of 32 rows"),
        ({"val_files": "{bad}"}, "data.val_files: {bad}:31: row 31 is not messages: "),
        ({"files": "{all_bad}", "on_bad": "skip", "layout": "messages"}, "no conversation found; the first of 2 bad"),
        ({"files": "{untrained}"}, "data.files: no token to train on in any of "),
        ({"phases": "file"}, "data.phases='file': not known; did you mean 'files'?"),
        ({"phases": "files"}, "data.phases='files': each entry of data.files is a phase, and {good} is one; name"),
        ({"phases": "files", "files": "{good},{untrained}"}, "none is left for the phase {untrained}; give more"),
        ({"phases": "difficulty", "fraction": 0.5}, "data.phases='difficulty': goes with all of the data"),
        ({"phases": "files", "packing": "concatenated"}, "data.phases='files': for chats"),
        ({"replay": 1.5}, "data.replay=1.5: must lie between 0 and 1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, config, opened, change, message):
    empty = {"segments": [{"label": True, "text": "<|endoftext|>"}, {"label": False, "text": "x"}]}
    known = {
        "good": config.files,
        "bad": write(tmp_path / "bad.jsonl", rows_of(30) + BAD_ROWS),
        "all_bad": write(tmp_path / "all_bad.jsonl", BAD_ROWS),
        "untrained": write(tmp_path / "untrained.jsonl", [empty] * 5),
    }
    change = {key: value.format(**known) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(UserError) as error:
        opened(config, root="other", **change)
    assert message.format(**known) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "other").exists() or os.listdir(tmp_path / "other") == []


def test_the_seq_len_that_is_asked_for_suffices(config, opened):
    with pytest.raises(UserError) as error:
        opened(config, seq_len=2, val_files=config.files)
    shortest = int(str(error.value).rpartition("=")[2])
    data = opened(config, seq_len=shortest, val_files=config.files)
    assert data.statistics["train"]["examples"] >= 1
    with pytest.raises(UserError, match="all 100 train examples are longer"):
        opened(config, seq_len=shortest - 1, val_files=config.files)


def test_foreign_directories_are_left_alone(tmp_path, config, opened):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match="mine is not empty and not a token store"):
        opened(config, store=str(tmp_path / "mine"))
    assert tree(tmp_path / "mine") == {"thesis.tex": b"do not touch"}


def test_a_tokenizer_without_eos_is_refused(tmp_path, config):
    tok = train_bpe(WORDS, 300)
    tok.eos_token = None
    with pytest.raises(UserError, match=r"data\.tokenizer: .* no end-of-sequence token"):
        open_data(dataclasses.replace(config, format="chatml"), tokenizer=tok, root=str(tmp_path))


# What the user sees, and what a model takes with it


def test_the_report_shows_what_is_trained_on(tmp_path, config, opened):
    row = {"instruction": "add", "input": "1 1", "output": "2"}
    files = write(tmp_path / "one.jsonl", [row] * 3)
    data = opened(config, files=files, val_files=config.files, format="alpaca", seq_len=256)
    how, _, example = data.example(False).partition("\n")
    assert how == "  an example; between ⟦ ⟧: what is trained on"
    assert set(data.examples(False)) == {example}
    assert example.startswith("<|endoftext|>Below is an instruction that describes a task, paired with an input that ")
    assert example.endswith("### Instruction:↵\nadd↵\n↵\n### Input:↵\n1 1↵\n↵\n### Response:↵\n⟦2<|endoftext|>⟧")
    report = data.report().splitlines()
    assert report[1:4] == [f"  {files}: alpaca", f"  {config.files}: messages", "  103 rows"]
    tokens = len(encoded([row], "alpaca", "alpaca")[0].ids)
    rows = 1 if 3 * tokens <= 256 else 3
    assert report[4] == (
        f"  train: 3 conversations, {3 * tokens:,} tokens, 6 with a loss; {rows} rows of 256, "
        f"{3 * tokens / (256 * rows):.1%} full; dropped: 0 longer than a row, 0 with nothing to train on"
    )
    assert "\x1b[" in data.example(True)
    assert "3 training and 100 validation conversations" in str(data)


def test_an_exported_model_gets_the_format(tmp_path, config, opened):
    data = opened(config)
    assert data.chat_template == TEMPLATES["metharme"]
    assert data.tokenizer.chat_template is None, "the caller's tokenizer was changed"
    assert (data.vocab_size, data.eos_id, data.seq_len) == (len(tokenizer()), tokenizer().eos_token_id, 128)
    kept = json.loads(Path(data.store, "meta.json").read_text())["tokenizer"]["hash"]
    assert store.Store(data.store).load_tokenizer(kept).chat_template == TEMPLATES["metharme"]
    own = tokenizer(TEMPLATES["alpaca"])
    data = open_data(dataclasses.replace(config, format="", seq_len=256), tokenizer=own, root=str(tmp_path))
    assert data.chat_template == TEMPLATES["alpaca"]


# Docstrings


MODULE = '''
"""A module's own docstring is no answer."""
def f(a, *, b=1):
    """Returns what
    is asked for.

    In detail
    and at length.
    """
def short(): """Too short."""
def _private(): """Of no concern to anybody."""
def bare(): pass
class C:
    """Holds whatever it is given."""
    async def m(self, x: int) -> int:
        """Waits until it is there."""
    def __init__(self): """Makes one of these things."""
if True:
    def hidden(): """Within a block, so left out."""
def f(a, *, b=1):
    """The same question once more, elsewhere."""
'''


def test_docstrings_are_questions_and_answers(tmp_path):
    (tmp_path / "m.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def f(:")
    files = [("p/m.py", tmp_path / "m.py"), ("p/broken.py", tmp_path / "broken.py"), ("_p.py", tmp_path / "m.py")]
    assert list(docstrings.question_answers(files)) == [
        ("What does `p.m.f(a, *, b=1)` do?", "Returns what is asked for."),
        ("What does `p.m.C.m(self, x: int)` do?", "Waits until it is there."),
        ("What is the class `p.m.C` for?", "Holds whatever it is given."),
    ]
    assert list(docstrings.question_answers(files, "knowledge")) == [
        ("What else is there to know of `p.m.f`?", "In detail and at length.")
    ]
    assert list(docstrings.question_answers(files, "code")) == [
        ("Write `f` of p.m. Returns what is asked for.", "def f(a, *, b=1):\n    pass"),
        ("Write `short` of p.m. Too short.", "def short():\n    pass"),
        ("Write `m` of p.m.C. Waits until it is there.", "async def m(self, x: int) -> int:\n    pass"),
        ("Write `f` of p.m. The same question once more, elsewhere.", "def f(a, *, b=1):\n    pass"),
    ]
    (package, *_) = docstrings.question_answers([("p/__init__.py", tmp_path / "m.py")])
    assert package[0] == "What does `p.f(a, *, b=1)` do?"


@pytest.fixture
def small_library(monkeypatch):
    """A part of the standard library."""
    files = [f for f in docstrings.library() if f[0] in ("shutil.py", "textwrap.py", "glob.py", "json/__init__.py")]
    monkeypatch.setattr(docstrings, "library", lambda: files)


def test_docstrings_are_chat_data(tmp_path, config, opened, small_library, monkeypatch):
    data = opened(config, files="docstrings", seq_len=512)
    rows = [json.loads(line) for line in Path(next(iter(data.layouts))).read_text().splitlines()]
    asked = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    copytree = next(question for question in asked if "shutil.copytree(src, dst, symlinks=False" in question)
    assert asked[copytree] == "Recursively copy a directory tree and return the destination directory."
    assert collections.Counter(everything(data.train) + everything(data.validation)) == collections.Counter(
        as_walked(encoded(rows))
    )
    paths = {docstrings.write_docstrings("docstrings:9", str(tmp_path), seed) for seed in (0, 0, 1)}
    drawn = [Path(path).read_text().splitlines() for path in paths]
    assert [len(lines) for lines in drawn] == [9, 9]
    assert drawn[0] != drawn[1]
    monkeypatch.setattr(ast, "parse", None)
    assert docstrings.write_docstrings("docstrings:9", str(tmp_path), 0) in paths
    assert opened(config, files="docstrings", seq_len=512).store == data.store


@pytest.mark.slow
def test_the_library_has_thousands_of_docstrings(tmp_path):
    path = docstrings.write_docstrings("docstrings", str(tmp_path), 0)
    assert len(Path(path).read_text().splitlines()) > 3000
