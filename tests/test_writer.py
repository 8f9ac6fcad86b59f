"""Models written: the same bytes as others write, little memory, and writers that are refused or die."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import processes
import pytest
import safetensors
import safetensors.numpy
import yaml
from flax import nnx
from huggingface_hub import ModelCard
from plain import load_params
from test_reader import GPT2, LLAMA, configs, load, make, refused

import jaxup
from jaxup.depth.apply import apply
from jaxup.depth.plan import DepthPlan, Row
from jaxup.errors import UserError
from jaxup.files import shards
from jaxup.files import staging as staging_module
from jaxup.hub.card import model_card
from jaxup.hub.reader import load_config
from jaxup.hub.writer import save
from jaxup.model.decoder import abstract
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import flatten

ROOT = str(Path(staging_module.__file__).parents[2])
DTYPES = ("float32", "bfloat16", "float16")


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- bytes


@configs
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loading_and_saving_keeps_every_byte(config, dtype, tmp_path):
    save(tmp_path / "a", config, make(config), dtype=dtype, max_shard_size=3000)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
    read = load_config(tmp_path / "a")
    params = load_params(tmp_path / "a", read)
    assert {str(leaf.dtype) for leaf in flatten(params).values()} == {dtype}
    save(tmp_path / "b", read, params, dtype=dtype, max_shard_size=3000)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert {leaf.dtype for leaf in flatten(load_params(tmp_path / "a", read, dtype=np.float32)).values()} == {
        np.dtype(np.float32)
    }


def test_bytes_are_those_of_safetensors(tmp_path):
    """Several dtypes in one file: the order in the file is then by dtype, then by name."""
    params = make(LLAMA)
    params["norm"]["scale"] = params["norm"]["scale"].astype(ml_dtypes.bfloat16)
    params["embed_tokens"] = params["embed_tokens"].astype(np.float16)
    for block in ("input_layernorm", "post_attention_layernorm"):
        params["blocks"][block]["scale"] = params["blocks"][block]["scale"].astype(ml_dtypes.bfloat16)
    save(tmp_path / "m", LLAMA, params, dtype=None)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float32"
    ours = tmp_path / "m" / "model.safetensors"
    tensors = safetensors.numpy.load_file(ours)
    assert {str(t.dtype) for t in tensors.values()} == set(DTYPES)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()
    for path, leaf in flatten(load(tmp_path / "m")).items():
        np.testing.assert_array_equal(leaf, flatten(params)[path])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral"])
def test_what_transformers_saved_is_saved_again_byte_for_byte(model_type, hf_model, tmp_path):
    hf_model(model_type).save_pretrained(tmp_path / "theirs")
    save(tmp_path / "ours", load_config(tmp_path / "theirs"), load(tmp_path / "theirs"), dtype=None)
    a, b = (tmp_path / d / "model.safetensors" for d in ("theirs", "ours"))
    assert a.read_bytes() == b.read_bytes()


def test_the_index_is_that_of_transformers(hf_model, tmp_path):
    hf_model("gpt2").save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    save(tmp_path / "ours", load_config(tmp_path / "theirs"), load(tmp_path / "theirs"), max_shard_size="20KB")
    theirs, ours = (json.loads((tmp_path / d / "model.safetensors.index.json").read_text()) for d in ("theirs", "ours"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    for path in (tmp_path / "ours").glob("model-*"):
        one = len(safetensors.numpy.load_file(path)) == 1
        assert one or path.stat().st_size < 20_000 + 4000, "a shard, without its header, is no larger than asked for"


def test_sharded_arrays_give_the_same_bytes(tmp_path):
    config = dataclasses.replace(LLAMA, hidden_size=32, head_dim=8, num_kv_heads=4, intermediate_size=64)
    params = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), make(config))
    save(tmp_path / "host", config, params, dtype=None, max_shard_size=9000)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    for name, placed in {
        "one": jax.device_put(params, jax.devices()[3]),
        "eight": jax.tree.map(jax.device_put, params, param_shardings(config, mesh)),
    }.items():
        save(tmp_path / name, config, placed, dtype=None, max_shard_size=9000)
        assert contents(tmp_path / name) == contents(tmp_path / "host")


TWO = """
import os, sys
import jax, numpy as np
out = sys.argv[1]
jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], 2, int(os.environ["JAX_PROCESS_ID"]))
from jaxup.errors import UserError
from jaxup.hub import writer
from jaxup.hub.reader import load_config
from plain import load_params
from jaxup.model.sharding import param_shardings
config = load_config(out + "/host")
params = load_params(out + "/host", config)
mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
place = lambda a, s: jax.make_array_from_callback(a.shape, s, lambda index: a[index])
params = jax.tree.map(place, params, param_shardings(config, mesh))
def attempt(name, params=params):
    try:
        writer.save(out + "/" + name, config, params, max_shard_size=3000)
    except UserError as error:
        print(name, error)
attempt("two")
attempt("host")
params["norm"]["scale"] = params["norm"]["scale"] * np.nan
attempt("nan")
attempt("none/x")
"""


@pytest.mark.slow
def test_two_processes_write_what_one_does_and_are_refused_together(tmp_path):
    save(tmp_path / "host", LLAMA, make(LLAMA), max_shard_size=3000)
    ranks = processes.run_two("-c", TWO, tmp_path)
    said, other = ([line for line in rank.stdout.splitlines() if not line.startswith("[Gloo]")] for rank in ranks)
    assert said == other
    assert [line.split()[0] for line in said] == ["host", "nan", "none/x"]
    assert "exists already" in said[0]
    assert "model.norm.weight" in said[1]
    assert contents(tmp_path / "two") == contents(tmp_path / "host")
    assert sorted(os.listdir(tmp_path)) == ["host", "two"]


MEMORY = """
import resource, sys, threading, time
import jax, numpy as np
from jaxup.hub.writer import save
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import abstract
def make(layers):
    config = ModelConfig.llama(vocab_size=1000, hidden_size=768, intermediate_size=3072, num_layers=layers, num_heads=8,
                               num_kv_heads=8, max_positions=64)
    leaf = lambda a: np.full(a.shape, 0.5, "float16").astype(jax.numpy.bfloat16)
    return config, jax.tree.map(leaf, abstract(config)[1])
save(sys.argv[1] + "/warm", *make(1), dtype=None)
config, params = make(10)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, peak = resident(), 0
def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
save(sys.argv[1] + "/out", config, params, dtype=None, max_shard_size="80MB")
print(peak - before)
"""


def test_memory_is_a_few_tensors(tmp_path):
    """190 MB in three shards, the largest tensor 5 MB: two of those, and their pages given back late."""
    done = processes.run("-c", MEMORY, tmp_path)
    assert len(list((tmp_path / "out").glob("model-*"))) == 3
    shutil.rmtree(tmp_path)
    print(f"MEMORY above the model {int(done.stdout) / 1e6:.0f} MB")
    assert int(done.stdout) < 40e6


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("300KB", 300_000), ("0.5 kib", 512), (7, 7)],
)
def test_shard_sizes(text, size):
    assert shards.parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "", "GB", "5XB", "-1GB", "5GB5", "1e3MB", "0GB", 0, -3, "0.1B", "٣GB", True])
def test_shard_sizes_that_are_none(text, tmp_path):
    refused(lambda: save(tmp_path / "o", LLAMA, make(LLAMA), max_shard_size=text), "max_shard_size")
    assert not list(tmp_path.iterdir())


# ---- what is carried along


def test_a_tokenizer_is_saved_with_the_model(torch, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel()
    core.train_from_iterator(["one two three two one"], trainers.BpeTrainer(vocab_size=30, special_tokens=["<e>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", bos_token="<e>")
    save(tmp_path / "m", GPT2, make(GPT2), tokenizer=tokenizer, extra_files={"README.md": "hello", "b.bin": b"\0"})
    back = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert back("two one")["input_ids"] == tokenizer("two one")["input_ids"]
    assert back.eos_token_id == tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (tmp_path / "m" / "README.md").read_text() == "hello"
    small = dataclasses.replace(GPT2, vocab_size=1)
    tokenizer.eos_token = "one" if "one" in tokenizer.get_vocab() else next(t for t, i in core.get_vocab().items() if i)
    refused(lambda: save(tmp_path / "n", small, make(small), tokenizer=tokenizer), "eos_token_id", "vocab_size=1")
    bad_extra = {"tokenizer.json": "{}"}
    refused(lambda: save(tmp_path / "n", GPT2, make(GPT2), tokenizer=back, extra_files=bad_extra), "tokenizer.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_loaded_model_takes_its_files_and_ids_along(hf_model, tmp_path):
    hf_model("mistral", eos_token_id=[1, 2], pad_token_id=3).save_pretrained(tmp_path / "a")
    files = {
        "tokenizer.json": b'{"x": 1}',
        "chat_template.jinja": b"{{ x }}\r\n",
        "generation_config.json": b'{"a": 1}',
    }
    for name, content in files.items():
        (tmp_path / "a" / name).write_bytes(content)
    (tmp_path / "a" / "evil.py").write_text("x")
    model = jaxup.load(str(tmp_path / "a"))
    jaxup.save(model, tmp_path / "b", dtype="bfloat16")
    written = contents(tmp_path / "b")
    assert {name: written[name] for name in files} == files
    assert "evil.py" not in written
    a, b = (json.loads((tmp_path / d / "config.json").read_text()) for d in "ab")
    assert b["dtype"] == "bfloat16"
    for key in ("model_type", "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window"):
        assert b[key] == a[key]
    assert "Layers as in" in written["README.md"].decode()


def test_a_model_loaded_through_a_plan_says_so(hf_model, torch, tmp_path):
    from transformers import AutoModelForCausalLM

    hf_model("llama").save_pretrained(tmp_path / "a")
    rows = tuple(Row("a", layer, role) for layer, role in ((0, "original"), (1, "original"), (1, "copy")))
    plan = DepthPlan(rows, "a", "a", "a", "a", sources=(("a", 3),))
    model = jaxup.load({"a": str(tmp_path / "a")}, plan=plan)
    jaxup.save(model, tmp_path / "b")
    assert DepthPlan.from_yaml((tmp_path / "b" / "jaxup_plan.yaml").read_text()) == plan
    assert "==X\n= original  X copy\n" in (tmp_path / "b" / "README.md").read_text()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    expected = apply(plan, {"a": load(tmp_path / "a")})
    for path, leaf in flatten(expected).items():
        np.testing.assert_array_equal(leaf, flatten(params)[path])
    tokens = np.arange(9, dtype=np.int32)[None]
    ours = jax.jit(lambda params, tokens: nnx.merge(abstract(model.config)[0], params)(tokens))(params, tokens)
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor(tokens).long()).logits.numpy(), atol=1e-4)


HOSTILE = ["a: b\n---\nx: [", "`` ``` | <script> </td>", "]]}} 'x' \"y\" \0\x1b[31m", "org/na me", "\n# Heading\n```\n"]


@pytest.mark.parametrize("name", HOSTILE)
def test_cards_hold_hostile_names(name):
    rows = (Row(name, 1), Row(name, 0, "copy", (("o_proj", 0.0), ("down_proj", 0.0))))
    plan = DepthPlan(rows, name, None, name, name, sources=((name, 3),))
    for used in (plan, None):
        card = model_card(LLAMA, title=name, dtype="float32", source=name, plan=used, base_models=[name, "org/x-1.y"])
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front) == {
            "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["jaxup"],
            "base_model": ["org/x-1.y"],
        }  # fmt: skip
        trained = {"data": name, "recipe": name + " a|b"}
        told = model_card(LLAMA, title=name, dtype="float32", source=name, base_models=["org/x-1.y"], training=trained)
        assert ModelCard(told).data.base_model_relation == "finetune"
        assert re.findall(r"^\| (data|recipe) \| `.*` \|$", told, re.M) == ["data", "recipe"]
        assert not set(card + told) & set("\0\x1b")
        # Everything that is not code is ours: no name reaches it.
        lines, outside, fence = body.splitlines(), [], None
        for line in lines:
            marks = len(line) - len(line.lstrip("`"))
            if fence is None and line.endswith("text") and marks >= 3:
                fence = marks
            elif fence is not None:
                fence = None if line == "`" * marks and marks >= fence else fence
            else:
                outside.append(line)
        assert fence is None
        headings = [line for line in outside if line.startswith("#")]
        assert [h[:3] for h in headings] == ["# `", "## "]
        assert not any(line.startswith(("<", "---", "x:")) for line in outside)
    assert "| layers | 2 |" in card


def test_a_card_names_no_path_of_the_machine(tmp_path):
    """Of directories the names; and what their own files say they are from, if that may be a Hub id."""
    download = tmp_path / "hub" / "models--org--Name-7B" / "snapshots" / "0123abc"
    saved, ours, strange, twin = (
        tmp_path / name for name in ("my models/saved", "run 1/export", "strange", "a/strange")
    )
    for directory in (download, saved, ours, strange, twin):
        directory.mkdir(parents=True)
    (saved / "config.json").write_text('{"_name_or_path": "org/parent"}')
    (ours / "config.json").write_text('{"_name_or_path": "/home/someone/model"}')
    (ours / "README.md").write_text("---\nbase_model:\n- org/grand-parent\n- ../x\n- 3\n---\n")
    (strange / "config.json").write_text('{"_name_or_path": "../up"}')
    (strange / "README.md").write_text("---\nbase_model: [\n---\n")
    places = [str(place) for place in (download, saved, ours, strange, twin)]
    rows = tuple(Row(place, 0, "copy" if place == places[0] else "original") for place in places)
    plan = DepthPlan(rows, None, None, None, None, sources=tuple((place, 1) for place in places))
    card = model_card(
        LLAMA, title="t", dtype="float32", source=f"concat({', '.join(places)})", plan=plan,
        base_models=[*places, "a/b"], training={
            "data": f"{tmp_path}/chats.jsonl*2,~/more.jsonl,org/data", "recipe": f"/etc/recipes/x.yaml on {saved}",
        },
    )  # fmt: skip
    assert ModelCard(card).data.base_model == ["org/Name-7B", "org/parent", "org/grand-parent", "a/b"]
    assert "`concat(org/Name-7B, saved, run 1/export, strange, strange)`" in card
    assert "5 layers from 'org/Name-7B' (1), 'saved' (1), 'run 1/export' (1), 'strange' (1), 'strange (2)' (1)" in card
    assert "| data | `chats.jsonl*2,more.jsonl,org/data` |" in card
    assert "| recipe | `x.yaml on saved` |" in card
    assert not re.search("/home|/etc|/tmp|~|my models", card)
    assert str(tmp_path) not in card


# ---- writers that are refused or die


def test_params_must_be_the_configs(tmp_path):
    params = make(LLAMA)
    refused(lambda: save(tmp_path / "o", GPT2, params), "params")
    params["norm"]["scale"] = params["norm"]["scale"][:-1]
    refused(lambda: save(tmp_path / "o", LLAMA, params), "norm.scale", "[15]", "[16]")
    params["norm"]["scale"] = np.full(16, 1e30, np.float32)
    refused(lambda: save(tmp_path / "o", LLAMA, params, dtype="float16"), "model.norm.weight", "infinity")
    refused(lambda: save(tmp_path / "o", LLAMA, params, dtype="float8"), "float8")
    for name in ("../x", "/x", "config.json", "a/b", ".."):
        refused(lambda name=name: save(tmp_path / "o", LLAMA, make(LLAMA), extra_files={name: ""}), name)
    assert not list(tmp_path.iterdir())


def test_existing_output_is_refused_and_replaced_by_force(tmp_path):
    out = tmp_path / "out"
    save(out, LLAMA, make(LLAMA), extra_files={"old": ""})
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refused(lambda: save(out, LLAMA, make(LLAMA, 1)), "exists already")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    save(out, LLAMA, make(LLAMA, 1), force=True)
    assert not (out / "old").exists()
    np.testing.assert_array_equal(load(out)["norm"]["scale"], make(LLAMA, 1)["norm"]["scale"])
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_only_models(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("home")
    for name in ("home", "run", "file", "link"):
        refused(lambda name=name: save(tmp_path / name, LLAMA, make(LLAMA), force=True), "not be replaced")
    refused(lambda: save(tmp_path / "none" / "out", LLAMA, make(LLAMA)), "parent")
    refused(lambda: save(tmp_path / "file" / "out", LLAMA, make(LLAMA)), "parent")
    assert sorted(os.listdir(tmp_path)) == ["file", "home", "link", "run"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("target", [(os, "fsync"), (os, "rename"), (shards, "header")])
def test_a_failing_write_leaves_what_was_there(error, existing, target, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if existing:
        save(out, LLAMA, make(LLAMA))
    before = {p.name: p.read_bytes() for p in out.iterdir()} if existing else None

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
            save(out, LLAMA, make(LLAMA, 1), force=True)
    assert os.listdir(tmp_path) == (["out"] if existing else [])
    assert before is None or {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_disk_that_is_too_small_or_fills_up(tmp_path, monkeypatch):
    """Before the first byte where it can be known; else when the system refuses a write, in whichever thread."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 20_000))
        refused(lambda: save(tmp_path / "o", LLAMA, make(LLAMA)), "needs 2.", "2e-05 GB are free")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        refused(lambda: save(tmp_path / "o", LLAMA, make(LLAMA)), "not written", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from jaxup.files import staging
when, out = sys.argv[1:]
calls = {"rename": 0}
def kill(): os.kill(os.getpid(), 9)
real = os.rename
def rename(a, b):
    if when == f"rename{calls['rename']}": kill()
    calls["rename"] += 1
    real(a, b)
os.rename = rename
staging.shutil.rmtree = (lambda *a, **k: kill()) if when == "delete" else staging.shutil.rmtree
with staging.staged_directory(out, force=True, marks=("mark",)) as directory:
    (directory / "mark").write_text("new")
    (directory / "data").write_text("new")
    if when == "write": kill()
"""


@pytest.mark.parametrize(("when", "left"), [("write", "old"), ("rename0", "old"), ("rename1", None), ("delete", "new")])
def test_a_killed_writer_leaves_old_or_new_and_the_next_cleans_up(when, left, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mark").write_text("old")
    (out / "data").write_text("old")
    done = processes.run("-c", KILLED, when, out, check=False)
    assert done.returncode == -signal.SIGKILL
    if left is None:  # between the two renames; the old one is whole, and comes back
        assert not out.exists()
    else:
        assert {p.read_text() for p in out.iterdir()} == {left}
    with pytest.raises(UserError, match="exists already"), staging_module.staged_directory(out, force=False, marks=()):
        pass
    assert {p.read_text() for p in out.iterdir()} == {left or "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_writer_is_told_of_the_first(tmp_path):
    with staging_module.staged_directory(tmp_path / "out", force=False, marks=()) as directory:
        (directory / "x").write_text("")
        with (
            pytest.raises(UserError, match=str(os.getpid())),
            staging_module.staged_directory(tmp_path / "out", force=True, marks=()),
        ):
            pass
    assert (tmp_path / "out" / "x").exists()


def test_bfloat16_is_read_bit_for_bit(tmp_path):
    params = make(LLAMA)
    save(tmp_path / "m", LLAMA, params, dtype="bfloat16")
    for path, leaf in flatten(load(tmp_path / "m")).items():
        np.testing.assert_array_equal(leaf, flatten(params)[path].astype(ml_dtypes.bfloat16))
