"""What was written is damaged afterwards: every command that reads it says which file it is, and uses none of it."""

import dataclasses
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
import runs
from damage import KINDS, damage, full_at, read_only, stop_early

from jaxup.__main__ import main
from jaxup.building.work import build
from jaxup.data.sources import SPLITS
from jaxup.data.store import META, Store
from jaxup.depth import picture
from jaxup.depth.recipes import identity
from jaxup.errors import NoRoom, UserError


@pytest.fixture(scope="module")
def stores(finished, made_once, tmp_path_factory):
    """The finished run's store of text, and one of chats, which are not for writing into."""

    def make(directory):
        from test_chat import rows_of, write

        from jaxup.data.config import DataConfig
        from jaxup.data.open import open_data
        from jaxup.data.rows import BEST_FIT

        store = Store(str(next((finished[0].parent / "data").iterdir())))
        tokenizer = store.load_tokenizer(store.complete_meta()["tokenizer"]["hash"])
        open_data(
            DataConfig(
                files=write(directory / "a.jsonl", rows_of(40)), format="chatml", seq_len=128, val_fraction=0.2,
                packing=BEST_FIT, store=str(directory / "chat"),
            ),
            tokenizer=tokenizer, root="",
        )  # fmt: skip
        shutil.copytree(store.path, directory / "text")

    made = made_once("stores", make)
    return {kind: made / kind for kind in ("text", "chat")}


def read_store(path):
    """All of a store, as training and an export read it."""
    from jaxup.data.rows import open_rows

    store = Store(str(path))
    meta = store.complete_meta()
    if meta is None:
        raise UserError("not complete")
    for rows in open_rows(store, meta, isolate=True, eos=0):
        rows.batch(np.arange(len(rows)))
    store.load_tokenizer(meta["tokenizer"]["hash"])


def unnoticed(original, place, seeds, read, part="", **how):
    """What was done to `part` of a copy of `original` in the trials in which `read` of it then had nothing to say."""
    found = []
    for seed in seeds:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original, place)
        done = damage(place / part, seed, **{"skip": ("lock",), **how})
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
        {"statistics": None}, {"statistics": {}}, {"statistics": {"train": {"rows": 10**12}}}, {"seq_len": "32"},
        {"seq_len": 0}, {"seq_len": -1}, {"seq_len": 10**9}, {"seq_len": 2**70}, {"dtype": "float99"}, {"dtype": 7},
        {"tokenizer": "x"}, {"tokenizer": {"spec": "x", "hash": "y"}}, {"source": None}, {"files": []}, {"files": {}},
        {"files": {"train/ids/zarr.json": [1]}}, {"files": {"../../etc/passwd": [1, "", ""]}}, {"packing": []},
        {"packing": "?"}, {"packing": "best_fit"}, {"marked": 1}, {"marked": True}, {"layouts": 3}, {"seed": "x"},
        *({"rows": n} for n in (0, 10**12, True)),
    ],
    ids=str,
)  # fmt: skip
def test_a_store_whose_meta_lies_is_one_line(stores, tmp_path, change):
    shutil.copytree(stores["text"], tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    meta = store.read_json(META)
    if "rows" in change:
        change = {"statistics": meta["statistics"] | {of: meta["statistics"][of] | change for of in SPLITS}}
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
    from jaxup.data.rows import open_rows

    store = Store(str(stores["text"]))
    meta = store.complete_meta()
    small = meta | {"tokenizer": meta["tokenizer"] | {"vocab_size": 40}}
    rows, _ = open_rows(store, small, isolate=False, eos=0)
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


# Checkpoints


def test_any_damage_of_a_checkpoint_is_noticed(finished, tmp_path):
    from jaxup.training.sound import newest_sound

    def read(directory):
        step, faults = newest_sound(directory)
        assert (step, [*faults]) in ((8, []), (6, [8]))
        if faults:
            raise UserError(faults[8])

    directory = finished[0] / "checkpoints" / "target_2"
    read(directory)
    assert unnoticed(directory, tmp_path / "run", range(60), read, "8") == []


@pytest.fixture
def saved(tmp_path):
    """saved(*steps, keep=2): checkpoints of these steps, the step in all of their arrays, and what is there then."""
    import jax.numpy as jnp

    from jaxup.training.checkpoint import Checkpoints
    from jaxup.training.step import TrainState

    def save(*steps, **how):
        with Checkpoints(tmp_path / "m", **{"keep": 2, **how}) as checkpoints:
            begun = checkpoints.latest
            if begun is not None:
                abstract = TrainState({"a": jnp.zeros(7)}, (), jnp.int32(0), jnp.bool_(False))
                assert checkpoints.restore(begun, abstract).params["a"].tolist() == [begun] * 7
            for step in steps:
                checkpoints.save(
                    step, TrainState({"a": jnp.full(7, 1.0 * step)}, (), jnp.int32(step), jnp.bool_(False))
                )
        return begun, sorted(path.name for path in (tmp_path / "m").iterdir())

    return save


def test_a_damaged_step_is_set_aside_and_pushes_none_out(saved, tmp_path, capsys):
    assert saved(2, 4, 6, 8, always=[2]) == (None, ["2", "6", "8"])
    damage(tmp_path / "m" / "8" / "state" / "d", 0, ["flip"])
    (tmp_path / "m" / "9").mkdir()
    begun = saved(7, always=[2])
    assert begun == (6, ["2", "6", "7", "8.damaged", "9.damaged"])
    assert "m/8: state/d/" in (err := capsys.readouterr().err)
    assert "is not what was written" in err
    assert err.count("\n") == 2
    assert saved(8, 10) == (7, ["10", "8", "8.damaged", "9.damaged"])
    assert saved() == (10, ["10", "8", "8.damaged", "9.damaged"])


def test_a_step_without_digests_is_taken_for_want_of_another(saved, tmp_path, capsys):
    """It was saved by a process killed before its digests, or by an earlier version."""
    saved(4, 6, 8)
    for step in (6, 8):
        (tmp_path / "m" / str(step) / "jaxup_digests.json").unlink()
    assert saved() == (8, ["6", "8"])
    assert "m/8: it has no digests" in capsys.readouterr().err
    assert saved(9, 10, keep=3) == (8, ["10", "8", "9"])
    (tmp_path / "m" / "10" / "jaxup_digests.json").unlink()
    assert saved() == (9, ["8", "9"])


def test_where_nothing_is_sound_nothing_begins(saved, tmp_path):
    saved(4, 6)
    for step in (4, 6):
        damage(tmp_path / "m" / str(step), 1, ["delete"])
        (tmp_path / "m" / str(step) / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"\A[^\n]*no checkpoint here can be restored: of step 6, [^\n]*\Z"):
        saved()
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["4", "6"]


def test_a_full_disk_leaves_the_steps_that_are_there(tmp_path):
    from jaxup.training.checkpoint import Checkpoints
    from jaxup.training.step import TrainState

    values = np.random.default_rng(0).standard_normal(2**18, np.float32)
    state = TrainState({"a": jax.numpy.asarray(values)}, (), jax.numpy.int32(0), jax.numpy.bool_(False))

    def save(step):
        with Checkpoints(tmp_path / "m", keep=2) as checkpoints:
            newest = checkpoints.latest
            checkpoints.save(step, state)
        return newest

    assert save(2) is None
    with full_at(2**16), pytest.raises(NoRoom, match=r"\A[^\n]*/m: File too large; with room again[^\n]*\Z"):
        save(4)
    assert (save(4), save(6)) == (2, 4)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["4", "6"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--workdir={out}"], ["train", "--workdir={here}/half"], ["train", "--resume={here}/half"],
        ["train", "--workdir=elsewhere", "--config.data.store={here}/store", "--config.data.seq_len=16"],
        ["build", "identity({here}/whole/export)", "{out}"], ["export", "{here}/whole", "{out}"],
        ["plan", "identity({here}/whole/export)", "--png={out}.png"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)  # fmt: skip
def test_where_nothing_can_be_written_is_one_line(finished, corpus, tmp_path, monkeypatch, arguments):
    here = tmp_path / "here"
    shutil.copytree(finished[0].parent, here)
    shutil.copytree(here / "whole", here / "half")
    stop_early(here / "half")
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    monkeypatch.chdir(tmp_path)
    name, *rest = [argument.format(here=here, out=here / "out") for argument in arguments]
    if name == "train" and not rest[0].startswith("--resume"):
        rest = [*runs.arguments(corpus, here / "whole")[:-1], *rest]
    with read_only(here), pytest.raises(UserError, match=rf"\A[^\n]*{here}[^\n]*: Read-only file system[^\n]*\Z"):
        main(["jaxup", name, *rest])
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


# jaxup verify


def test_verify_names_every_damaged_file(finished, tmp_path, capsys):
    from jaxup import verify

    shutil.copytree(finished[0], tmp_path / "run")
    store = next((finished[0].parent / "data").iterdir())
    verify.main(["verify", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert said.count(": compared with jaxup_digests.json\n") == len([*tmp_path.glob("run/checkpoints/*/*/state")])
    for line in ("run: no digests of SUMMARY.md, config.json,", "run/export: compared with", f"{store}: comp"):
        assert line in said
    run, damaged = tmp_path / "run", {}
    for part, seed in (("checkpoints/target_2/6", 0), ("checkpoints/reference/8", 1), ("export", 2)):
        done = damage(run / part, seed, ["flip"], skip=("jaxup_manifest.json",))
        damaged[f"{run}/{part}/{done.split(' of ')[-1].removesuffix(' flipped')}"] = done
    (run / "export" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="3 of the files above are not what was written"):
        verify.main(["verify", str(run)])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": is not what was written")[0] for line in said if "is not what" in line] == [*sorted(damaged)]
    assert f"{run}/export/notes.txt: no digest" in said
    shutil.copytree(store, tmp_path / "store")
    damage(tmp_path / "store", 3, ["delete"])
    with pytest.raises(UserError, match="1 of the files above is not what was written"):
        verify.main(["verify", str(tmp_path / "store")])
    for nothing in (tmp_path / "gone", finished[0] / "plots"):
        with pytest.raises(UserError, match=r"no such directory|neither a run"):
            verify.main(["verify", str(nothing)])


# Models


@pytest.fixture
def exported(finished, tmp_path):
    """A model directory that `export` has written, and one as earlier versions wrote them: with a digest a file."""
    from jaxup.files.manifest import write_manifest

    for name in ("parts", "whole"):
        shutil.copytree(finished[0] / "export", tmp_path / name)
    write_manifest(tmp_path / "whole")
    return tmp_path


def the_same(directory, **how):
    """The plan that takes all of a model as it is."""
    layers = json.loads((directory / "config.json").read_text())["n_layer"]
    return dataclasses.replace(identity(str(directory), layers), **how)


@pytest.mark.parametrize("digests", ["parts", "whole"])
@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 220), marks=pytest.mark.slow)])
def test_a_build_takes_nothing_damaged(exported, digests, seeds, monkeypatch):
    monkeypatch.setattr(picture, "png", lambda *_: b"")

    plan = the_same(exported / digests)

    def read(directory):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a key of config.json that has become another, and is kept
            build(plan, exported / "out", models={name: str(directory) for name, _ in plan.sources})

    read(exported / digests)
    shutil.rmtree(exported / "out")
    how = {"kinds": KINDS[:-1], "skip": ("README.md", "jaxup_plan.yaml", "jaxup_manifest.json")}
    assert unnoticed(exported / digests, exported / "damaged", seeds, read, **how) == []
    assert not (exported / "out").exists()


def test_tensors_that_are_cast_scaled_or_gathered_are_compared_too(exported, monkeypatch):
    from jaxup.files import shards
    from jaxup.hub.reader import open_checkpoint

    monkeypatch.setattr(shards, "PIECE", 1000)  # of two bytes a number, where the file has four
    directory = exported / "parts"
    (tensor,) = (info for tensor, info in open_checkpoint(directory).tensors if tensor.paths == ("embed_tokens",))
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[tensor.offset + 2000] ^= 1
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors is not the file that was written here"):
        build(the_same(directory, dtype="bfloat16"), exported / "out")


@pytest.mark.parametrize("seed", range(12))
def test_tokenizer_template_and_generation_config_are_compared(exported, seed):
    from jaxup.hub.directory import CARRIED, carried_files, tokenizer_directory

    directory = exported / "parts"
    skip = {path.name for path in directory.iterdir()} - set(CARRIED)
    done = damage(directory, seed, KINDS[:-1], skip)
    for read in (carried_files, tokenizer_directory):
        assert "is not the file that was written here" in refusal(read, directory), done


def test_infinity_in_what_is_copied_is_said(exported, tmp_path):
    from jaxup.hub.reader import open_checkpoint

    directory = exported / "parts"
    (directory / "jaxup_manifest.json").unlink()
    tensors = open_checkpoint(directory).tensors
    content = bytearray((directory / "model.safetensors").read_bytes())
    for number, value in ((1, b"\0\0\x80\x7f"), (3, b"\1\0\x80\xff")):  # infinity; a NaN below zero
        offset = tensors[number][1].offset + 4
        content[offset : offset + 4] = value
    (directory / "model.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match=r" and 1 more: NaN or infinity in what is inherited"):
        build(the_same(directory), tmp_path / "out")
