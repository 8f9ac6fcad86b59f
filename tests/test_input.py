"""Files from anywhere: damaged JSON, links and pipes in model directories, names that would reach the terminal."""

import base64
import importlib.util
import json
import os
import re
import socket
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest

from jaxup.data.sources import find_files
from jaxup.data.tokenizer import encoder, load_tokenizer, train_bpe
from jaxup.errors import UserError, entry_point
from jaxup.files import manifest, storage
from jaxup.generate import main as generate
from jaxup.hub import text_generation
from jaxup.model.config import ModelConfig
from jaxup.recipes.open import open_recipe
from jaxup.text import read_json
from jaxup.training.metrics import MetricsLog
from jaxup.training.run import Result, read_result
from jaxup.training.stored import read_stored

CONTROLS = "\x1b]0;x\x07 \x9b31m \u202e\u2066 \r\x08"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def refused(message, action, *args):
    with pytest.raises(UserError, match=message) as error:
        action(*args)
    assert "\n" not in str(error.value)


# ---- JSON of ours


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"[]", "not a JSON object but list"),
        (b"null", "not a JSON object but NoneType"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON: 'utf-8'"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "not valid JSON: Exceeds"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        ({}, "a is missing"),
        ({"a": True, "b": []}, "a must be int, not True"),
        ({"a": float("nan")}, "a must be int, not nan"),
        ({"a": 1, "b": {"x": "1"}}, "b must be"),
        ({"a": 1, "c": "huge"}, "c must be"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, content, wrong):
    path = put(tmp_path / "some.json", content)
    kinds = {"a": int, "b": dict[str, int] | None, "c": float | None}
    refused(rf"\A{path}: damaged: .*{wrong}.*; delete it\Z", read_json, path, kinds, "delete it")


def test_json_of_ours_is_read(tmp_path):
    kinds = {"a": int, "b": dict[str, int] | None, "c": float | None}
    for value in ({"a": 1}, {"a": 1, "b": {"x": 2}, "c": 3, "more": []}, {"a": 0, "c": float("inf")}):
        assert read_json(put(tmp_path / "some.json", value), kinds, "") == value
    assert read_json(tmp_path / "none.json", kinds, "") is None
    os.mkfifo(tmp_path / "pipe.json")
    refused("pipe.json: not a regular file; delete it", read_json, tmp_path / "pipe.json", kinds, "delete it")


MODEL = ModelConfig.gpt2(vocab_size=9, hidden_size=8, num_layers=2, num_heads=2, max_positions=8, bias=True)
ABOUT = {"kind": "target", "model": MODEL.__dict__ | {"kinds": [{}]}, "store": "s", "plan": None}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"model": []}, "damaged: model must be"),
        ({"model": {}}, "model: vocab_size is missing"),
        ({"model": ABOUT["model"] | {"num_layers": 10**9}}, "num_layers=1000000000 is more than 10000"),
        ({"model": ABOUT["model"] | {"norm_eps": "x"}}, "norm_eps must be float, not 'x'"),
        ({"model": ABOUT["model"] | {"kinds": 5}}, "kinds must be"),
        ({"model": ABOUT["model"] | {"other": 5}}, "unknown 'other'"),
        ({"dtypes": {"norm.scale": "object"}}, "dtypes must be"),
        ({"format": "2"}, "format must be"),
        ({"format": 99}, "format 99, and 2 is the newest"),
        ({"plan": "[" * 10_000}, "not what this version of jaxup writes"),
        ({"before": 5}, "before must be str, not 5"),
        ({"before": "../x", "train": {}, "lora": {}, "seed": 0}, "train must be TrainConfig"),
    ],
)
def test_a_hostile_description_of_a_model_is_one_line(tmp_path, change, wrong):
    put(tmp_path / "checkpoints" / "x" / "model.json", ABOUT)
    assert read_stored(tmp_path, "x").model == MODEL
    put(tmp_path / "checkpoints" / "x" / "model.json", ABOUT | change)
    refused(f"model.json: .*{wrong}", read_stored, tmp_path, "x")


def test_a_result_and_metrics(tmp_path):
    numbers = {"layers": 1, "params": 2, "steps": 3, "tokens": 4, "val_loss": 5.0, "seconds": 6.0}
    result = Result(name="x", kind="target", origin="o", sample="", **numbers)
    put(tmp_path / "result.json", {**result.__dict__, "format": 2})
    assert read_result(tmp_path) == result
    put(tmp_path / "result.json", {**result.__dict__, "steps": "3"})
    refused("result.json: damaged: steps must be int, not '3'; delete it to finish again", read_result, tmp_path)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    lines = b'{"model": "x", "step": 1, "loss": NaN}\n{"model": "x", "step": 2}\n'
    put(tmp_path / "metrics.jsonl", lines + b'{"model": "x", "st')
    assert [record["step"] for record in log.read()] == [1, 2]
    for damaged in (b"\xff\xfe\n", b"[]\n", b'{"model": "x", "step": "3"}\n'):
        put(tmp_path / "metrics.jsonl", lines + damaged)
        refused(r"metrics.jsonl:3: .*damaged.*; delete the line", log.read)


# ---- links, pipes and endless files


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/x.jinja", "vocab.txt", "spiece.model"]
)
def test_what_a_tokenizer_is_made_of_lies_in_its_directory(tmp_path, file, monkeypatch):
    put(tmp_path / "secret", b"secret")
    path = put(tmp_path / "model" / file, b"{}")
    storage.check_texts(tmp_path / "model")
    monkeypatch.setattr(storage, "LARGEST_TEXT", 1)
    refused(f"model: {file} is larger than 1 bytes", storage.check_texts, tmp_path / "model")
    path.unlink()
    path.symlink_to(tmp_path / "nothing")  # which nobody opens
    storage.check_texts(tmp_path / "model")
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    refused(f"model: {file} is a link that leaves the directory", storage.check_texts, tmp_path / "model")
    path.unlink()
    os.mkfifo(path)
    refused(f"model: {file} is not a regular file", storage.check_texts, tmp_path / "model")


def test_pipes_and_endless_files_beside_a_model_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / manifest.NAME)
    refused("jaxup_manifest.json is not a regular file", manifest.check_manifest, tmp_path, ["config.json"])
    (tmp_path / manifest.NAME).unlink()
    for name in (manifest.NAME, "generation_config.json"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(3 * 2**30)
    refused("jaxup_manifest.json is larger than", manifest.check_manifest, tmp_path, ["config.json"])
    refused("generation_config.json is larger than", text_generation.stop_ids, tmp_path, None)


# ---- the terminal


def test_errors_have_no_control_characters():
    error = UserError(f"what {CONTROLS}", at=[f"at {CONTROLS}"], hint=f"hint\n{CONTROLS}")
    for text in (str(error), str(error.within(CONTROLS))):
        assert text.isprintable()


# ---- tokenizers, and the Hub


@pytest.fixture
def tokenizer_files(tmp_path):
    """change(state) -> the directory of a tokenizer whose tokenizer.json is what `change` made of it."""
    train_bpe(["some text and more"], 270).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"

    def made(change):
        state = json.loads(file.read_text())
        change(state)
        file.write_text(json.dumps(state))
        return str(tmp_path)

    return made


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(longest):
    """Of sentencepiece: a trie that finds nothing, and the texts that it might put for characters."""
    table = (1024).to_bytes(4, "little") + bytes(1024) + b"ab\0" + longest.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


@pytest.mark.parametrize(
    "normalizers",
    [
        [replace({"String": "a"}, "a" * 1000)],
        [replace({"String": "a"}, "aa")] * 40,
        [replace({"Regex": "."}, "ab")] * 40,
        [{"type": "Sequence", "normalizers": [replace({"String": ""}, "x" * 200)]}, {"type": "Lowercase"}],
        [{"type": "Prepend", "prepend": "x" * 60}] * 2,
        [charsmap("x" * 101)],
        [charsmap("x" * 11), replace({"Regex": "."}, "x" * 11)],
    ],
)
def test_a_tokenizer_that_multiplies_text_is_refused(tokenizer_files, normalizers):
    harmless = [{"type": "Prepend", "prepend": "_"}, replace({"String": " "}, "_"), replace({"String": "…"}, "...")]
    load_tokenizer(
        tokenizer_files(lambda state: state.update(normalizer={"type": "Sequence", "normalizers": harmless}))
    )
    load_tokenizer(tokenizer_files(lambda state: state.update(normalizer=charsmap("x" * 18))))
    hostile = lambda state: state.update(normalizer={"type": "Sequence", "normalizers": normalizers})  # noqa: E731
    refused("multiplies text", load_tokenizer, tokenizer_files(hostile))


def test_tokens_that_are_empty_are_none(tokenizer_files, tmp_path):
    directory = tokenizer_files(lambda state: None)
    file = tmp_path / "tokenizer_config.json"
    empty = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
    file.write_text(json.dumps(json.loads(file.read_text()) | empty))
    found = load_tokenizer(directory)
    assert (found.bos_token, found.eos_token_id, found.unk_token, found.pad_token_id) == (None, None, None, None)
    assert load_tokenizer(directory)("some")["input_ids"]


@pytest.mark.parametrize("template", [5, {"default": 7}, [{"name": "default", "template": ["x"]}]])
def test_templates_that_are_no_text(tokenizer_files, tmp_path, template):
    directory = tokenizer_files(lambda state: None)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    refused("its chat template is no text, but ", load_tokenizer, directory)


def test_a_tokenizer_that_needs_sentencepiece(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("tokenizer: tokenizer.model: needs sentencepiece; pip install sentencepiece", load_tokenizer, str(tmp_path))


def test_a_panic_is_one_line(tokenizer_files, capfd):
    table = base64.b64encode(b"\xff\xff\xff\x7f").decode()  # a trie longer than its file
    broken = {"type": "Precompiled", "precompiled_charsmap": table}
    refused("cannot load", load_tokenizer, tokenizer_files(lambda state: state.update(normalizer=broken)))
    assert "panicked" not in capfd.readouterr().err


def test_a_tokenizer_that_fails_when_it_is_used_is_one_line(tokenizer_files, capfd):
    special = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}], "pair": []}
    change = lambda state: state.update(post_processor={**special, "special_tokens": {}})  # noqa: E731
    directory = tokenizer_files(change)

    def use():
        text_generation.encode(load_tokenizer(directory), "some text")

    refused("(the tokenizer fails|cannot load)", use)
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    directory = tokenizer_files(lambda state: state.update(post_processor=None, pre_tokenizer=split))
    tokenizer = load_tokenizer(directory)
    refused("the tokenizer fails", text_generation.encode, tokenizer, "a" * 40 + " x!")
    refused("the tokenizer fails", encoder(tokenizer), ["a" * 40 + " x!"])
    (Path(directory) / "config.json").write_text('{"model_type": "gpt2"}')
    refused(f"{directory}: the tokenizer fails", generate, ["generate", directory, "--prompt", "a" * 40 + " x!"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base-modle", "no such file or directory; did you mean 'base-model'?"),
        ("org/lama-3b", "no such file or directory; did you mean 'org/llama-3b'? (the Hub's is org/lama-3b@main)"),
        ("ogr/llama-3b", "no such file or directory; did you mean 'org/llama-3b'? (the Hub's is ogr/llama-3b@main)"),
        ("org/unlike", "no such file or directory; the Hub's is org/unlike@main"),
        ("nothing", "no such directory; a model on the Hub is ORG/NAME"),
        ("./base-modle", "no such directory; did you mean 'base-model'?"),
        ("{here}/ogr/llama-3b", "no such directory; did you mean '{here}/org/llama-3b'?"),
        ("a/b/c", "no such directory"),
        ("~nobody-of-that-name/x", "no such directory"),
        ("other/model.safetensors", "no such directory"),
        ("runs/one@healed", "no such file or directory; did you mean 'runs/none'?"),
        ("runs/xyz@healed", "no such file or directory; the runs there are runs/none"),
    ],
)
def test_a_mistyped_directory_asks_no_network(name, message, tmp_path, monkeypatch):
    """Nor does what looks like one of this machine, whatever reads it."""

    def no_network(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.chdir(tmp_path)
    for ask in ("hf_hub_download", "dataset_info"):
        monkeypatch.setattr(huggingface_hub, ask, no_network)
    for directory in ("base-model", "org/llama-3b", "runs/none/checkpoints"):
        (tmp_path / directory).mkdir(parents=True)
    name, message = (text.format(here=tmp_path) for text in (name, message))
    path = name.removeprefix("./").partition("@")[0]
    refused(f"^{re.escape(f'{path}: {message}')}$", storage.open_storage, name)
    refused(f"^tokenizer: .*{re.escape(message.partition(';')[2])}$", load_tokenizer, name)
    meant = message.partition("; ")[2].partition(" (the Hub")[0]
    if "@" not in name and "/" in name:
        message = meant.replace("the Hub's is org/unlike@main", "a split of the Hub's is org/unlike:train")
        refused(f"no such file or directory.*{re.escape(message)}", find_files, name)


@pytest.mark.parametrize("name", ["(" * 4000, "a" * 4000, "a/" * 3000, "identity(" + "a" * 4000 + ")"])
def test_names_longer_than_the_system_allows_are_one_line(name):
    refused("(File name too long|no such|syntax|expected|ends|not at hand)", open_recipe, name)


def test_a_hub_or_server_that_does_not_answer_is_one_line(monkeypatch):
    refused("tokenizer: no such directory, and cannot load org/name: ", load_tokenizer, "org/name")
    monkeypatch.setattr(storage, "SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: time.sleep(5))
    refused("org/name: no such directory, and the Hub does not answer within", storage.open_storage, "org/name")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        monkeypatch.setattr(storage, "SECONDS", 20)
        refused("config.json cannot be read: .* retry attempts", url_of(port).exists, "config.json")
        silent.listen()
        monkeypatch.setattr(storage, "SECONDS", 0.2)
        refused("config.json cannot be read: no answer within 0.2 s", url_of(port).exists, "config.json")


def url_of(port):
    return storage.open_storage(f"http://127.0.0.1:{port}/model")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "some/file"), 6, "some/file: No space left on device"),
        (OSError(36, "File name too long", "a" * 300), 1, "aaa"),
        (MemoryError("7 TiB"), 1, "there is not enough memory: 7 TiB"),
        (RecursionError("too deep"), 1, "a file is nested too deeply, or damaged: too deep"),
        (UserError(f"name {CONTROLS}"), 2, "name"),
    ],
)
def test_what_no_check_foresaw_is_one_line(error, code, said, capsys):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as end:
        entry_point(main)
    assert end.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxup: {said}")
    assert line.isprintable()
