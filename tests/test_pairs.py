"""Pictures and features as continuous tokens: sources, encoders, splits, few pairs; what is refused; what judges."""

import base64
import io
import json
import struct
import zipfile
import zlib
from collections import Counter

import numpy as np
import pytest
import tensorstore as ts
from PIL import Image
from scipy.linalg import sqrtm

from jaxup import features
from jaxup.continuous import judge, tables
from jaxup.continuous.builtin import builtin
from jaxup.continuous.encoders import Encoder, fit, open_encoder
from jaxup.continuous.images import grid_png, read_picture
from jaxup.continuous.pairs import PairsConfig, open_pairs
from jaxup.data.tokenizer import train_bpe
from jaxup.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["draw 7 moving right left up down which digit? a red circle"] * 3, 300)


@pytest.fixture
def opened(tokenizer, tmp_path):
    def opened(source, encoder, **options):
        return open_pairs(PairsConfig(source=str(source), encoder=encoder, **options), tokenizer, tmp_path / "root")

    return opened


def png(array, mode=None):
    out = io.BytesIO()
    Image.fromarray(np.asarray(array), mode).save(out, "PNG")
    return out.getvalue()


def some(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(message, action, *args, **options):
    with pytest.raises(UserError) as error:
        action(*args, **options)
    assert message in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


# ---- what every machine has


def test_digits_are_those_of_scikit_learn_and_come_back_as_they_are(opened, tokenizer):
    from sklearn.datasets import load_digits

    real = load_digits()
    pairs = opened("digits", "patches:2")
    assert (pairs.grid, pairs.frames, pairs.channels) == ((4, 4), 0, 4)
    assert np.abs(pairs.look(range(1797)) / (255 / 16) - real.images).max() <= 0.5 / (255 / 16)
    example = pairs.train.of("tell")[0]
    number = pairs.train.of("tell").chosen[0][1]
    assert tokenizer.decode(example.prompt) == "which digit?"
    assert tokenizer.decode(example.answer[:-1]) == f" {real.target[number]}"
    assert example.answer[-1] == tokenizer.eos_token_id
    picture = pairs.look([number])[0]
    # Tokens are in reading order, and a token is its pixels: the second one is rows 0 to 1 of columns 2 to 3.
    pixels = example.values[1] * pairs.encoder.scale + pairs.encoder.shift
    np.testing.assert_allclose(pixels, picture[:2, 2:4].ravel() / 127.5 - 1, atol=1e-6)
    assert (pairs.decode(example.values) == picture).all()
    values = pairs.encoder.encode(pairs.look(pairs.seen))
    assert abs(values.mean()) < 1e-5
    assert abs(values.std() - 1) < 1e-5
    assert (pairs.decode(np.full((2, 16, 4), np.nan)) == 0).all()
    some = [*pairs.train[:50], *pairs.train[-50:]]
    assert pairs.longest == (max(len(e.prompt) for e in some), max(len(e.answer) for e in some))


def test_clips_move_as_their_prompts_say(opened):
    pairs = opened("moving_digits:8", "patches:4", pairs=0, tell=40)
    assert (pairs.grid, pairs.frames, pairs.train[0].values.shape) == ((4, 4), 8, (8, 16, 16))
    clips, said = pairs.look(pairs.unseen), np.array(pairs.pictures.texts)[pairs.unseen]
    assert (pairs.decode(pairs.encoder.encode(clips[:4])) == clips[:4]).all()
    paths = pairs.pictures.paths[pairs.unseen]
    assert judge.position_error(clips, paths).max() < 1e-6
    assert np.allclose(judge.position_error(clips[:, [0] * 8], paths)[:, -1], 7)  # it stands still, and had 7 to go
    assert (judge.position_error(np.zeros_like(clips[:1]), paths[:1]) == np.hypot(16, 16) / 2).all()
    for way, step in {"right": (0, 7), "left": (0, -7), "down": (7, 0), "up": (-7, 0)}.items():
        assert (paths[[text.endswith(way) for text in said], -1] == step).all()
    # All clips of one digit as it was written are on one side.
    keys = pairs.pictures.keys
    assert not {keys[n] for n in pairs.seen} & {keys[n] for n in pairs.unseen}
    assert (len(pairs.seen) + len(pairs.unseen), len(set(keys))) == (4 * 1797, 1797)
    for frames in (2, 12):
        clips = builtin(f"moving_digits:{frames}")
        assert judge.position_error(clips.pixels[:64], clips.paths[:64]).max() < 1e-6


def test_shapes_have_their_colours_and_textures_are_valid():
    shapes, textures = builtin("shapes"), builtin("xor")
    brightest = shapes.pixels.reshape(len(shapes.texts), -1, 3).max(1).argmax(1)
    assert all(("red", "green", "blue")[c] in text for c, text in zip(brightest, shapes.texts, strict=True))
    assert len(set(shapes.keys)) == len(shapes.keys)
    assert judge.valid_textures(textures.pixels) == (1.0, 1.0)
    # Of cells drawn independently half of the pairs are valid; 3 standard deviations of 4,096 x 8 pairs are .0083.
    noise = some(4096, 4, 4).repeat(2, 1).repeat(2, 2)
    share, whole = judge.valid_textures(noise)
    assert abs(share - 0.5) < 0.0083
    assert whole < 0.02


# ---- which are seen, and how few


def test_unseen_pictures_are_so_whatever_else_there_is(opened, tmp_path):
    pictures = some(60, 4, 4)
    rows = [{"image": picture.tolist(), "text": f"draw {n}"} for n, picture in enumerate(pictures)]
    (tmp_path / "again.png").write_bytes(png(pictures[7]))
    rows.append({"image": "again.png", "text": "the same once more"})
    few, all_of_them = (
        opened(write_rows(tmp_path / f"{n}.jsonl", rows[:n]), "patches:2", val_fraction=0.3) for n in (40, 61)
    )
    assert [n for n in all_of_them.unseen if n < 40] == few.unseen.tolist()
    assert (7 in all_of_them.unseen) == (60 in all_of_them.unseen)
    assert 5 < len(all_of_them.unseen) < 32
    assert few.digest != all_of_them.digest
    assert opened(tmp_path / "40.jsonl", "patches:2", val_fraction=0.3, seed=5).unseen.tolist() == few.unseen.tolist()


def test_few_pairs_are_among_more_of_them_and_each_class_has_as_many(opened):
    def numbers(**options):
        pairs = opened("digits", "patches:2", tell=0, **options)
        return [number for _, number in pairs.train.chosen], pairs

    ten, pairs = numbers(pairs=10)
    twenty, more = numbers(pairs=20)
    assert twenty[:10] == ten
    assert sorted(pairs.pictures.labels[ten]) == list(range(10))
    assert sorted(pairs.pictures.labels[twenty]) == sorted([*range(10)] * 2)
    assert numbers(pairs=10, seed=1)[0] != ten
    assert pairs.digest != more.digest
    assert pairs.encoder.digest == more.encoder.digest  # or their losses could not be compared
    assert len(pairs.validation.of("draw")) == len(pairs.validation.of("tell")) == len(pairs.unseen)
    assert {kind for kind, _ in opened("digits", "patches:2", pairs=0, tell=5).train.chosen} == {"tell"}


def test_what_there_is_little_of_is_repeated_until_there_is_as_much_of_it(opened):
    for few, many in (("pairs", "tell"), ("tell", "draw")):
        plain, even = (opened("digits", "patches:2", balance=balance, **{few: 20}).train for balance in (False, True))
        few = "draw" if few == "pairs" else few
        assert even.of(many).chosen == plain.of(many).chosen
        counts = Counter(even.of(few).chosen)
        assert counts == dict.fromkeys(plain.of(few).chosen, round(len(plain.of(many)) / 20))
        assert len(counts) == 20
    alone = opened("digits", "patches:2", pairs=20, tell=0, balance=True).train
    assert alone.chosen == opened("digits", "patches:2", pairs=20, tell=0).train.chosen


def test_text_alone_comes_from_a_corpus(opened, tokenizer, tmp_path):
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(f"number {n} " + "word " * 300)
    pairs = opened("digits", "patches:2", pairs=3, tell=0, text=12, corpus=str(tmp_path), text_tokens=20)
    rows = [tokenizer.decode(example.answer) for example in pairs.train.of("text")]
    held = [tokenizer.decode(example.answer) for example in pairs.validation.of("text")]
    assert len(rows) == 12
    assert all(len(example.answer) <= 20 and example.values is None for example in pairs.train.of("text"))
    assert all(row.startswith("number ") for row in rows)
    assert held
    assert not set(rows) & set(held)


# ---- encoders


def test_components_are_those_of_the_training_part_and_are_kept(opened, tmp_path):
    pairs = opened("digits", "pca:4:6")
    pixels = pairs.look(pairs.seen).reshape(-1, 2, 4, 2, 4).swapaxes(2, 3).reshape(-1, 16) / 127.5 - 1
    covariance = np.cov(pixels, rowvar=False, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    got = pairs.encoder.components
    np.testing.assert_allclose(np.abs((got * vectors[:, ::-1].T[:6]).sum(1)), 1, atol=1e-5)
    np.testing.assert_allclose(pairs.encoder.mean, pixels.mean(0), atol=1e-6)
    # The variance of all components together, as one number, is that of the values before they are scaled.
    assert abs(pairs.encoder.scale**2 - values[::-1][:6].mean()) < 1e-5
    unseen = pairs.look(pairs.unseen)
    lost = np.square(pairs.decode(pairs.encoder.encode(unseen)) / 127.5 - unseen / 127.5).mean()
    assert lost < 1.3 * values[:-6].sum() / 16  # of the training part as much, but for rounding and clipping less
    (kept,) = (tmp_path / "root").iterdir()
    again = Encoder.from_bytes(kept.read_bytes(), "x")
    assert again.digest == pairs.encoder.digest
    assert (again.decode(pairs.train[0].values) == pairs.decode(pairs.train[0].values)).all()
    whole = opened("digits", "pca:4:16")
    assert (whole.decode(whole.encoder.encode(unseen)) == unseen).all()
    before = kept.stat().st_mtime_ns
    assert opened("digits", "pca:4:6", pairs=20).encoder.digest == pairs.encoder.digest
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(kept.read_bytes()[:-30])
    refused("not an encoder that jaxup has written", opened, "digits", "pca:4:6")
    grey = np.full((9, 4, 4), 7, np.uint8)
    refused("all of the training part is one value", fit, open_encoder("patches:2", (4, 4), frames=0), lambda: [grey])
    refused("span 0", fit, open_encoder("pca:2:3", (4, 4), frames=0), lambda: [grey])
    changed = io.BytesIO()
    with np.load(io.BytesIO(pairs.encoder.to_bytes())) as file:
        np.savez(changed, **{**file, "mean": file["mean"] + 1})
    refused("its digest is another", Encoder.from_bytes, changed.getvalue(), "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "patches:3"}, "patches of 3 x 3 pixels do not divide images of 8 x 8; 1, 2, 4, 8 would"),
        ({"encoder": "patchs:2"}, "no encoder 'patchs'; did you mean 'patches'?"),
        ({"encoder": "patches"}, "write patches:K"),
        ({"encoder": "pca:2:0"}, "write pca:K:C"),
        ({"encoder": "pca:2:5"}, "5 components of patches that have 4 numbers; at most 4"),
        ({"encoder": "features"}, "digits has no stored features"),
        ({"source": "digit"}, "no such source, file or directory: 'digit'; did you mean 'digits'?"),
        ({"source": "moving_digits:1"}, "moving_digits:8 has 8"),
        ({"source": "digits:4"}, "digits takes nothing after a colon"),
        ({"source": "xor", "tell": 4}, "tell: 4 examples, and of the seen pictures of xor 0 are for that"),
        ({"pairs": 1700}, "pairs: 1,700 examples, and of the seen pictures of digits 1,632"),
        ({"pairs": 0, "tell": 0}, "nothing to train on"),
        ({"pairs": -2}, "pairs: -2 examples"),
        ({"text": 3}, "corpus: text=3 and no text"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: not a fraction"),
        ({"val_fraction": 1e-9}, "none of 1,797 pictures is unseen"),
        ({"size": 16}, "size: digits is pictures of its own"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message, opened, tmp_path):
    refused(message, opened, **{"source": "digits", "encoder": "patches:2"} | options)
    assert not (tmp_path / "root").exists()


# ---- pictures of others


def test_rows_of_files_and_datasets_are_read_alike(opened, tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = some(24, 6, 4, 3)
    said = [{"text": f"draw {n}", "question": "which?", "answer": f" {n}", "label": "ab"[n % 2]} for n in range(24)]
    (tmp_path / "in").mkdir()
    rows, encoded = [], [png(picture) for picture in pictures]
    for n, picture in enumerate(pictures):
        (tmp_path / "in" / f"{n}.png").write_bytes(encoded[n])
        uri = "data:image/png;base64," + base64.b64encode(encoded[n]).decode()
        rows.append(
            {"image": (f"in/{n}.png", str(tmp_path / "in" / f"{n}.png"), picture.tolist(), uri)[n % 4], **said[n]}
        )
    jsonl = opened(write_rows(tmp_path / "a.jsonl", rows), "patches:2", val_fraction=0.3)
    assert (jsonl.grid, jsonl.channels, jsonl.pictures.classes) == ((3, 2), 12, ("a", "b"))
    assert (jsonl.look(range(24)) == pictures).all()
    assert (jsonl.decode(jsonl.encoder.encode(pictures)) == pictures).all()
    pq.write_table(
        pa.Table.from_pylist([{"img": e, **s} for e, s in zip(encoded, said, strict=True)]), tmp_path / "b.parquet"
    )
    features = datasets.Features(image=datasets.Image(), **{name: datasets.Value("string") for name in said[0]})
    images = [{"image": {"bytes": e, "path": None}, **s} for e, s in zip(encoded, said, strict=True)]
    datasets.Dataset.from_list(images, features=features).save_to_disk(tmp_path / "c")
    for source, options in (("b.parquet", {"columns": "image=img"}), ("c", {})):
        other = opened(tmp_path / source, "patches:2", val_fraction=0.3, **options)
        assert other.digest == jsonl.digest
    named = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    labelled = [{"image": {"bytes": e, "path": None}, "label": n % 2} for n, e in enumerate(encoded)]
    datasets.DatasetDict(train=datasets.Dataset.from_list(labelled, features=named)).save_to_disk(tmp_path / "d")
    pairs = opened(tmp_path / "d", "patches:2", val_fraction=0.3)
    assert (pairs.pictures.texts[1], pairs.pictures.questions[1], pairs.pictures.answers[1]) == (
        "draw dog", "what is it?", " dog"
    )  # fmt: skip
    refused("no split 'tain'; its splits: train", opened, f"{tmp_path / 'd'}:tain", "patches:2")


def test_pictures_are_made_of_one_size_where_that_is_asked_for_and_clips_are_lists(
    opened, tmp_path, capsys, monkeypatch
):
    sizes = [(8, 8), (6, 4), (8, 8), (12, 6), (8, 8), (9, 9)]
    rows = [{"image": some(1, *size, seed=n)[0].tolist(), "text": f"t{n}"} for n, size in enumerate(sizes)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    refused("a.jsonl:2: 6 x 4 pixels, and the first has 8 x 8 pixels; size=8 makes all", opened, source, "patches:2")
    pairs = opened(source, "patches:2", size=8, val_fraction=0.4)
    assert "3 of 6 pictures were of another size, and are made 8 x 8" in capsys.readouterr().err
    resized = Image.fromarray(np.array(rows[3]["image"], np.uint8)).resize((8, 8), Image.Resampling.LANCZOS)
    assert (pairs.look([3])[0] == np.asarray(resized)).all()
    clips = some(12, 3, 4, 4)
    rows = [{"frames": clip.tolist(), "text": "a clip"} for clip in clips]
    rows[5]["frames"][1] = np.stack([clips[5, 1]] * 3, -1).tolist()  # in colours, as all are shown then
    monkeypatch.setattr(tables, "IN_MEMORY", 100)
    pairs = opened(write_rows(tmp_path / "b.jsonl", rows), "patches:2", val_fraction=0.3)
    assert (pairs.grid, pairs.frames, pairs.channels) == ((2, 2), 3, 12)
    assert (pairs.look(range(12)) == clips[..., None]).all()


def bomb():
    """A PNG of 20,000 x 20,000 pixels in some hundred bytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def animated():
    out, frames = io.BytesIO(), [Image.fromarray(each) for each in some(3, 4, 4)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(some(1, 64, 64, 3)[0])[:900], "not a sound image: "),
        (b"", "no image: the file is empty"),
        (bomb(), "pixels, Pillow's limit"),
        (bomb().replace(struct.pack(">I", 20_000), struct.pack(">I", 0)), "image: no image; known: PNG"),
        (b"<?xml version='1.0'?><svg/>", "no image: it is XML, perhaps an SVG drawing"),
        (b"  <!DOCTYPE html><p>404", "no image: it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image: it is PostScript"),
        (png(np.zeros((4, 4), np.uint16)), "pixels of more than 8 bits"),
        (animated(), "3 pictures in one file"),
    ],
)  # fmt: skip
def test_what_is_no_sound_image_is_refused(content, message, opened, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    refused(message, opened, write_rows(tmp_path / "a.jsonl", [{"image": "x.png", "text": "t"}]), "patches:2")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "../outside.png", "text": "t"}, "a.jsonl:1: image: ../outside.png leads out of"),
        ({"image": "link.png", "text": "t"}, "link.png leads out of"),
        ({"image": "https://example.org/a.png", "text": "t"}, "is a URL; download the images first"),
        ({"image": "in.pgn", "text": "t"}, "in.png'?"),
        ({"image": "pipe", "text": "t"}, "not a file"),
        ({"image": [[0, 300]], "text": "t"}, "whole numbers 0 to 255"),
        ({"image": [[0.5, 1.0]], "text": "t"}, "whole numbers 0 to 255"),
        ({"image": [[0, 1], [2]], "text": "t"}, "not equally long"),
        ({"image": [1, 2], "text": "t"}, "pixels of shape [2]"),
        ({"image": "data:image/png,abc", "text": "t"}, "is not base64"),
        ({"image": "", "text": "t"}, "no image: it is empty"),
        ({"image": "in.png", "frames": ["in.png"], "text": "t"}, "both image and frames"),
        ({"frames": [], "text": "t"}, "no frames"),
        ({"frames": "in.png", "text": "t"}, "not a list of images"),
        ({"img": "in.png", "text": "t"}, "neither image nor frames; columns=image=img reads 'img' as that"),
        ({"image": "in.png", "caption": "t"}, "neither text nor question and answer; columns=text=caption reads"),
        ({"image": "in.png", "text": "  "}, "a.jsonl:1: text: empty"),
        ({"image": "in.png", "text": 5}, "text: 5 is no text"),
        ({"image": "in.png", "question": "which?"}, "a question without an answer"),
        (["in.png", "t"], "a row is an object"),
    ],
)  # fmt: skip
def test_what_is_no_sound_row_is_refused(row, message, opened, tmp_path):
    import os

    inside = tmp_path / "in"
    inside.mkdir()
    for path in (tmp_path / "outside.png", inside / "in.png"):
        path.write_bytes(png(some(1, 4, 4)[0]))
    (inside / "link.png").symlink_to("../outside.png")
    os.mkfifo(inside / "pipe")
    refused(message, opened, write_rows(inside / "a.jsonl", [row]), "patches:2")


def test_transparent_pixels_are_on_white_and_photographs_upright(tmp_path):
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (read_picture(png(clear), tmp_path) == 255).all()
    assert read_picture(png(np.zeros((2, 2), bool)), tmp_path).shape == (2, 2)
    turned, out = Image.fromarray(some(1, 2, 4, 3)[0]), io.BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(out, "PNG", exif=exif)
    assert (read_picture(out.getvalue(), tmp_path) == np.rot90(np.asarray(turned), -1)).all()


# ---- stored features


def stored(directory, array, captions=None):
    np.save(directory / "f.npy", array)
    rows = [{"text": f"draw {n}"} for n in range(len(array) if captions is None else captions)]
    write_rows(directory / "f.jsonl", rows)
    return directory / "f.npy"


def test_features_are_scaled_by_one_number_and_read_as_they_are_asked_for(opened, tmp_path):
    array = np.random.default_rng(0).normal(3, 2, (40, 6, 5)).astype(np.float32)
    pairs = opened(stored(tmp_path, array), "features", val_fraction=0.3)
    assert (pairs.grid, pairs.channels, pairs.encoder.shift) == ((1, 6), 5, 0.0)
    assert abs(pairs.encoder.scale - array[pairs.seen].std()) < 1e-5
    number = pairs.train.chosen[3][1]
    np.testing.assert_allclose(pairs.train[3].values, array[number] / pairs.encoder.scale, rtol=1e-6)
    refused("no way back to pixels", pairs.decode, pairs.train[3].values)
    for driver in ("zarr", "zarr3"):
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(tmp_path / f"{driver}.zarr")}}
        ts.open(spec, create=True, dtype="float32", shape=array.shape).result()[...] = array
        other = opened(tmp_path / f"{driver}.zarr", "features", captions=str(tmp_path / "f.jsonl"), val_fraction=0.3)
        assert other.digest == pairs.digest
    clips = opened(stored(tmp_path, array.reshape(10, 4, 6, 5)), "features", val_fraction=0.5)
    assert (clips.frames, clips.train[0].values.shape) == (4, (4, 6, 5))


FEATURES = np.random.default_rng(0).normal(size=(9, 2, 5)).astype(np.float32)


def cut(directory):
    path = stored(directory, FEATURES)
    path.write_bytes(path.read_bytes()[:200])


def archive(directory):
    zipfile.ZipFile(stored(directory, FEATURES), "w").close()


def empty(directory):
    stored(directory, FEATURES).unlink()
    (directory / "f.npy").mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: stored(d, FEATURES[:, 0]), "one token each is [n, 1, channels]"),
        (lambda d: stored(d, FEATURES.astype(np.int32)), "features of int32"),
        (lambda d: stored(d, FEATURES * np.float32(np.nan)), "row 0 (from 0) holds a number that is not finite"),
        (lambda d: stored(d, FEATURES, captions=3), "3 captions in"),
        (lambda d: stored(d, FEATURES[:0]), "there are none"),
        (lambda d: stored(d, FEATURES.astype(object)), "it holds objects of Python"),
        (cut, "cannot be read"),
        (archive, "not an array of NumPy; an archive"),
        (lambda d: [stored(d, FEATURES), (d / "f.jsonl").unlink()], "no captions: "),
        (lambda d: None, "no such file or directory"),
        (empty, "not an array of zarr"),
        (lambda d: stored(d, np.ones_like(FEATURES)), "none of 9 pictures is unseen"),
    ],
)
def test_what_are_no_sound_features_is_refused(make, message, opened, tmp_path):
    make(tmp_path)
    refused(message, opened, tmp_path / "f.npy", "features", val_fraction=0.5)
    assert not (tmp_path / "root").exists()


# ---- `jaxup features`


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """The directories of a tiny SiglipVisionModel and a ViTModel, and those models."""
    import torch
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24,
        "patch_size": 8,
    }  # fmt: skip
    made = {}
    torch.manual_seed(0)
    for name, network in (
        ("siglip", SiglipVisionModel(SiglipVisionConfig(**sizes))),
        ("vit", ViTModel(ViTConfig(**sizes))),
    ):
        path = tmp_path_factory.mktemp(name)
        network.save_pretrained(path)
        SiglipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(path)
        made[name] = path, network.eval()
    return made


def ran(capsys, *args):
    features.main(["features", *map(str, args)])
    return capsys.readouterr()


def test_features_are_what_torch_code_gives(vision, opened, tmp_path, capsys):
    import torch

    pictures = [some(1, 30, 40, 3, seed=n)[0] for n in range(4)] + [some(1, 24, 24, seed=9)[0]]
    rows = [{"image": p.tolist(), "text": f"draw {n}", "label": "ab"[n % 2]} for n, p in enumerate(pictures)]
    data = write_rows(tmp_path / "a.jsonl", rows)
    path, network = vision["siglip"]
    out = ran(capsys, path, data, tmp_path / "out", "--grid", 2, "--normalize", "--batch", 2)
    assert out.out.startswith(f"{tmp_path / 'out'}: 5 x 4 x 16 float32; ")
    pixels = []
    for picture in pictures:  # by Pillow, as SigLIP's preprocessing says: bicubic, then -1 to 1
        image = Image.fromarray(picture).convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)
        pixels.append(torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1))
    with torch.no_grad():
        hidden = network(pixel_values=torch.stack(pixels)).last_hidden_state
        grid = hidden.transpose(1, 2).reshape(5, 16, 3, 3)
        pooled = torch.nn.functional.interpolate(grid, size=(2, 2), mode="bilinear", align_corners=False)
        wanted = torch.nn.functional.normalize(pooled.flatten(2).transpose(1, 2), dim=-1).numpy()
    # Products of 16 to 192 numbers in two orders: a batch of 2, and one of 5.
    np.testing.assert_allclose(np.load(tmp_path / "out" / "features.npy"), wanted, atol=2e-6)
    pairs = opened(tmp_path / "out", "features", val_fraction=0.5)
    assert (pairs.grid, pairs.pictures.classes, pairs.pictures.texts[3]) == ((2, 2), ("a", "b"), "draw 3")
    refused("exists already", ran, capsys, path, data, tmp_path / "out")
    # A ViT's first token is of no place; zarr has the same numbers as npy.
    path, network = vision["vit"]
    for form in ("npy", "zarr"):
        said = ran(capsys, path, data, tmp_path / form, "--format", form).err
        assert "of 10 tokens the first 1, which stand for no place, are left out" in said
    with torch.no_grad():
        wanted = network(pixel_values=torch.stack(pixels)).last_hidden_state[:, 1:].numpy()
    for form in ("npy", "zarr"):
        got = opened(tmp_path / form, "features", val_fraction=0.5)
        np.testing.assert_allclose(got.look(range(5)), wanted, atol=1e-5)
        assert got.grid == (3, 3)


def test_a_features_run_that_cannot_be_leaves_nothing(vision, tmp_path, capsys):
    path, network = vision["vit"]
    data = write_rows(tmp_path / "a.jsonl", [{"image": some(1, 8, 8)[0].tolist(), "text": "t"}] * 3)
    for args, message in (
        ((path / "no", data), "no such directory"),
        ((tmp_path, data), "no config.json in it"),
        ((path, tmp_path / "no.jsonl"), "no such source, file or directory"),
        ((path, data, "--grid", "0"), "N or RxC, such as 8 or 4x16"),
        ((path, data, "--batch", "0"), "at least one picture"),
        ((path, data, "--size", "8"), "goes with --vae"),
    ):  # fmt: skip
        refused(message, ran, capsys, *args[:2], tmp_path / "out", *args[2:])
    nan = tmp_path / "nan"
    import torch

    with torch.no_grad():
        kept = network.layernorm.bias.clone()
        network.layernorm.bias[0] = float("nan")
        network.save_pretrained(nan)
        network.layernorm.bias.copy_(kept)
    (nan / "preprocessor_config.json").write_text((path / "preprocessor_config.json").read_text())
    refused("numbers that are not finite, among pictures 0 to 2", ran, capsys, nan, data, tmp_path / "out")
    (nan / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Evil"}, "model_type": "evil"}))
    (nan / "evil.py").write_text("raise SystemExit('code of a model was run')")
    refused("ValueError: ", ran, capsys, nan, data, tmp_path / "out")
    assert not [each for each in tmp_path.iterdir() if "out" in each.name]


@pytest.mark.slow
def test_latents_are_those_of_diffusers(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    import torch

    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        block_out_channels=(8, 8), norm_num_groups=4,
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path / "pipeline" / "vae")
    pictures = some(3, 16, 16, 3)
    data = write_rows(tmp_path / "a.jsonl", [{"image": p.tolist(), "text": "t"} for p in pictures])
    refused("its VAE is ", ran, capsys, tmp_path / "pipeline", data, tmp_path / "out", "--vae", "--size", 16)
    vae = tmp_path / "pipeline" / "vae"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    refused("is of 'UNet2DModel', and", ran, capsys, tmp_path / "other", data, tmp_path / "out", "--vae", "--size", 16)
    refused("a multiple of 2 pixels", ran, capsys, vae, data, tmp_path / "out", "--vae", "--size", 15)
    ran(capsys, vae, data, tmp_path / "out", "--vae", "--size", 16)
    with torch.no_grad():
        pixels = torch.from_numpy(pictures / np.float32(127.5) - 1).permute(0, 3, 1, 2)
        wanted = network.encode(pixels).latent_dist.mean.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out" / "features.npy"), wanted, atol=1e-5)


# ---- judging


def test_the_judge_knows_real_digits_and_distances_are_scipys(opened):
    pairs = opened("digits", "pca:4:3")
    labels = pairs.pictures.labels
    seen, unseen = pairs.look(pairs.seen), pairs.look(pairs.unseen)
    one = judge.judge(seen, labels[pairs.seen], unseen, labels[pairs.unseen])
    assert one.accuracy > 0.97
    assert one.share(unseen, labels[pairs.unseen]) == one.accuracy
    assert one.share(unseen, np.roll(labels[pairs.unseen], 1)) < 0.25
    real, other = one.features(seen), one.features(pairs.decode(pairs.encoder.encode(unseen)))
    a, b = np.cov(real, rowvar=False), np.cov(other, rowvar=False)
    wanted = np.square(real.mean(0) - other.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert judge.frechet(real, other) == pytest.approx(wanted, rel=1e-6)
    assert judge.frechet(real, real) < 1e-9
    assert judge.frechet(real, one.features(unseen)) < judge.frechet(real, one.features(some(165, 8, 8)))
    refused("have no such distance", judge.frechet, real, real[:, :4])
    assert judge.alike(np.array([2, 0, 2, 2]), np.array([0, 1, 2, 0, 2])).tolist() == [2, 0, 4, 2]
    refused("pictures of one class", judge.judge, seen, 0 * labels[pairs.seen], unseen, labels[pairs.unseen])
    assert judge.diversity(seen[:1].repeat(4, 0)) == 0
    assert judge.diversity(np.array([[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]])) == pytest.approx(2)
    refused("cannot differ", judge.diversity, seen[:1])


def test_cosines_are_of_tokens_at_the_same_places():
    drawn, real = (np.random.default_rng(seed).normal(size=(count, 2, 3, 4)) for seed, count in ((0, 3), (1, 5)))
    which = np.random.default_rng(2).random((3, 5)) < 0.5
    plain = [
        np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(x.reshape(6, 4), y.reshape(6, 4))])
        for x, row in zip(drawn, which) for y, counts in zip(real, row) if counts
    ]  # fmt: skip
    assert judge.cosine(drawn, real, which) == pytest.approx(np.mean(plain), rel=1e-12)
    assert judge.cosine(real, 3 * real, np.eye(5, dtype=bool)) == pytest.approx(1, rel=1e-12)
    assert np.isnan(judge.cosine(drawn, real, np.zeros((3, 5), bool)))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (4, 8, 8), (4, 8, 8, 3)])
def test_grids_show_each_picture_large_enough(shape):
    pictures = some(5, *shape)
    with Image.open(io.BytesIO(grid_png(pictures, 3, [f"draw {n}" for n in range(5)]))) as image:
        sheet = np.asarray(image)
    first = pictures[0] if len(shape) == 2 or shape == (8, 8, 3) else pictures[0, 0]
    wanted = first if first.ndim == 3 else np.stack([first] * 3, -1)
    assert (sheet[4 + 15 :, 4:][:48, :48] == wanted.repeat(6, 0).repeat(6, 1)).all()
    refused("5 pictures in 0 columns", grid_png, pictures, 0)
