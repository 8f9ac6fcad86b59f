"""What was written is damaged afterwards: every command that reads it says which file it is, and uses none of it."""

import shutil

import numpy as np
import pytest
from damage import damage

from jaxup.data.sources import SPLITS
from jaxup.data.store import META, Store
from jaxup.errors import UserError


@pytest.fixture(scope="module")
def stores(finished, made_once, tmp_path_factory):
    """The finished run's store of text, and one of chats, which are not for writing into."""

    def make(directory):
        from test_chat import rows_of, write

        from jaxup.data.chat import ChatConfig, open_chat

        store = Store(str(next((finished[0].parent / "data").iterdir())))
        tokenizer = store.load_tokenizer(store.complete_meta()["tokenizer"]["hash"])
        open_chat(
            ChatConfig(
                files=write(directory / "a.jsonl", rows_of(40)), layout="", format="chatml", seq_len=128, val_files="",
                val_fraction=0.2, on_bad="error", packing=True, store=str(directory / "chat"), seed=0,
            ),
            tokenizer=tokenizer, root="",
        )  # fmt: skip
        shutil.copytree(store.path, directory / "text")

    made = made_once("stores", make)
    return {kind: made / kind for kind in ("text", "chat")}


def read_store(path):
    """All of a store, as training and an export read it."""
    from jaxup.data.packed import open_packed

    store = Store(str(path))
    meta = store.complete_meta()
    if meta is None:
        raise UserError("not complete")
    for split in SPLITS:
        rows = open_packed(store, split, meta) if "kind" in meta else store.open_rows(split, meta)
        rows.batch(np.arange(len(rows)))
    store.load_tokenizer(meta["tokenizer"]["hash"])


def unnoticed(original, place, seeds, read):
    """What was done in the trials in which `read` of a damaged copy of `original` found nothing to say in one line."""
    found = []
    for seed in seeds:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original, place)
        done = damage(place, seed, skip=("lock",))
        if (said := refusal(read, place)) is None:
            found.append(done)
        assert "\n" not in (said or ""), (done, said)
    return found


def refusal(read, place):
    """What a UserError says, None if there is none."""
    try:
        read(place)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 325), marks=pytest.mark.slow)])
def test_any_damage_of_a_store_is_noticed(stores, tmp_path, kind, seeds):
    read_store(stores[kind])
    assert unnoticed(stores[kind], tmp_path / "store", seeds, read_store) == []


def test_of_a_large_store_names_sizes_and_beginnings_are_compared(stores, tmp_path, monkeypatch):
    from jaxup.data import integrity

    monkeypatch.setattr(integrity, "WHOLE", 0)
    read_store(stores["text"])
    kinds = ("truncate", "delete", "swap", "add")
    for seed in range(12):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(stores["text"], tmp_path / "store")
        done = damage(tmp_path / "store", seed, kinds, skip=("lock",))
        assert refusal(read_store, tmp_path / "store"), done


@pytest.mark.parametrize(
    "change",
    [
        {"splits": None}, {"splits": {}}, {"splits": {"train": {"rows": 10**12, "tokens": 5}}}, {"seq_len": "32"},
        {"seq_len": 0}, {"seq_len": -1}, {"seq_len": 10**9}, {"seq_len": 2**70}, {"dtype": "float99"}, {"dtype": 7},
        {"tokenizer": "x"}, {"tokenizer": {"spec": "x", "hash": "y"}}, {"source": None}, {"files": []}, {"files": {}},
        {"files": {"train/zarr.json": [1]}}, {"files": {"../../etc/passwd": [1, "", ""]}}, {"kind": []}, {"kind": "?"},
        {"kind": "chat"}, *({"splits": {of: {"rows": n, "tokens": 5} for of in SPLITS}} for n in (0, 10**12, True)),
    ],
    ids=str,
)  # fmt: skip
def test_a_store_whose_meta_lies_is_one_line(stores, tmp_path, change):
    shutil.copytree(stores["text"], tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    meta = store.read_json(META)
    store.write_json(META, meta | change)
    with pytest.raises(UserError, match=r"\A[^\n]*store[^\n]*\Z"):
        read_store(tmp_path / "store")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 10**5, '{"format": 2}', '{"format": 1, "seq_len": 16}', "\xff"]
)
def test_a_meta_that_is_none_is_one_line(stores, tmp_path, text):
    shutil.copytree(stores["text"], tmp_path / "store")
    (tmp_path / "store" / META).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"\A[^\n]*{META} is (not what|damaged)[^\n]*\Z"):
        read_store(tmp_path / "store")


def test_a_token_beyond_the_vocabulary_is_no_token(stores):
    store = Store(str(stores["text"]))
    meta = store.complete_meta()
    rows = store.open_rows("train", meta | {"tokenizer": meta["tokenizer"] | {"vocab_size": 40}})
    with pytest.raises(UserError, match=r"/train: it is damaged: token \d+ is not below the vocabulary's 40"):
        rows.batch(np.arange(len(rows)))


def test_rows_of_the_token_zero_are_stored(tmp_path):
    """An array's fill value too: what is not there is an error."""
    store = Store(str(tmp_path / "store"))
    array = store.create_array("train", width=5, dtype="uint16").resize(exclusive_max=[3, 5]).result()
    array[:3].write(np.zeros((3, 5), np.uint16)).result()
    meta = {"files": {"train/c/0/0": [30, "", ""]}}
    opened = store.open_array("train", meta, rows=3, width=5, dtype="uint16")
    assert not np.asarray(opened[:3].read().result()).any()
