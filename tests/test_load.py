"""`jaxup.load`: every source, mesh and plan gives the same bits as reading the files one by one."""

import contextlib
import dataclasses
import http.server
import json
import re
import shutil
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, traverse_util
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from plain import load_params

import jaxup
from jaxup.building.work import build
from jaxup.continuous.load import load as whole
from jaxup.depth.apply import apply
from jaxup.depth.plan import ZEROED, DepthPlan, Row
from jaxup.depth.recipes import identity, inherit
from jaxup.depth.result import result_config
from jaxup.errors import UserError
from jaxup.hub import reader
from jaxup.hub.directory import carried_files, tokenizer_directory
from jaxup.hub.load import load
from jaxup.hub.reader import is_finite
from jaxup.hub.writer import save
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import abstract, init
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import flatten

LLAMA = dataclasses.replace(
    ModelConfig.llama(vocab_size=41, hidden_size=16, intermediate_size=20, num_layers=4, num_heads=4, num_kv_heads=2,
                      max_positions=32),
    head_dim=6, qkv_bias=True,
)  # fmt: skip
LLAMA = dataclasses.replace(LLAMA, o_bias=True)
GPT2 = ModelConfig.gpt2(vocab_size=41, hidden_size=16, num_layers=4, num_heads=2, max_positions=30, bias=True)
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "gpt2-untied": dataclasses.replace(GPT2, tie_embeddings=False)}


def random(config, seed=0):
    rng = np.random.default_rng(seed)
    leaves = flatten(abstract(config)[1])
    values = {path: rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(values, sep=".")


def params_of(model):
    return flatten(nnx.to_pure_dict(nnx.state(model)))


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for path, leaf in expected.items():
        got = params[path]
        assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype), path
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(leaf).view(np.uint8), err_msg=path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of every config in two dtypes, several shards each."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        for dtype in ("float32", "bfloat16"):
            save(root / f"{name}-{dtype}", config, random(config), dtype=dtype, max_shard_size=3000)
    return root


def make_mesh(fsdp, tensor, data=1):
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("name", "stored", "dtype"),
    [("llama", "float32", None), ("llama", "bfloat16", "float32"), ("gpt2", "float32", "bfloat16"),
     ("gpt2", "bfloat16", None),
     # The first is what a URL gives as well, the second what a mesh gets.
     pytest.param("llama", "bfloat16", None, marks=pytest.mark.slow),
     pytest.param("gpt2-untied", "float32", None, marks=pytest.mark.slow)],
)  # fmt: skip
def test_loaded_params_are_those_of_the_files(models, name, stored, dtype):
    model = load(models / f"{name}-{stored}", dtype=dtype)
    assert model.config == CONFIGS[name]
    assert_same(params_of(model), flatten(load_params(models / f"{name}-{stored}", CONFIGS[name], dtype=dtype)))
    assert model.compute.dtype == (dtype or stored)
    if dtype is None:
        tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
        logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
        assert (logits.shape, logits.dtype) == ((2, 5, 41), jnp.dtype(stored))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("llama", (2, 2, 2)), ("gpt2", (4, 2)),
        pytest.param("gpt2-untied", (1, 8), marks=pytest.mark.slow),
        pytest.param("llama", (8, 1), marks=pytest.mark.slow),  # that which a URL is read to below
    ],
)  # fmt: skip
def test_a_mesh_gets_the_same_params_in_its_layout(models, name, shape, capfd):
    """41 tokens, 20 rows and 6 dimensions divide over none of these: the last rows are padded."""
    mesh = make_mesh(*shape)
    model = load(models / f"{name}-bfloat16", mesh=mesh)
    params = params_of(model)
    assert_same(params, flatten(load_params(models / f"{name}-bfloat16", CONFIGS[name])))
    for path, sharding in flatten(param_shardings(CONFIGS[name], mesh)).items():
        assert params[path].sharding == sharding, path
    assert "rematerialization" not in capfd.readouterr().err  # XLA's word for a needless copy of all of it


@contextlib.contextmanager
def counting(monkeypatch):
    """Counts the bytes of tensors read, by file."""
    counts = {}
    original = reader.Checkpoint.read

    def read(self, info, rows=slice(None)):
        array = original(self, info, rows)
        key = (self.storage.name, info.file, info.offset)
        counts[key] = counts.get(key, 0) + array.nbytes
        return array

    with monkeypatch.context() as patch:
        patch.setattr(reader.Checkpoint, "read", read)
        yield counts


def test_every_byte_is_read_once_whatever_the_mesh(models, monkeypatch):
    path = models / "llama-float32"
    total = sum(leaf.nbytes for leaf in flatten(load_params(path, LLAMA)).values())
    for mesh in (None, make_mesh(8, 1), make_mesh(2, 2, 2)):
        with counting(monkeypatch) as counts:
            load(path, mesh=mesh)
        assert sum(counts.values()) == total


parts = st.sampled_from([("attention", "mlp", "norms"), ("mlp",), ("norms", "attention")])
scales = st.sampled_from([(), ZEROED, (("mlp", 0.3),), (("k_proj", (-2.0, 0.7)), ("", 1.0))])
row = st.builds(Row, st.sampled_from("ab"), st.integers(0, 3), st.just("copy"), scales, parts) | st.builds(
    lambda source, layer, parts: Row(source, layer, "copy", parts=parts, noise=0.25),
    st.sampled_from("ab"), st.integers(0, 3), parts,
)  # fmt: skip
plans = given(
    rows=st.lists(row, min_size=1, max_size=6),
    ends=st.tuples(*[st.sampled_from(["a", "b", None])] * 4),
    scales=st.sampled_from([(), (("embed_tokens", 0.3), ("norm", 0.0), ("lm_head", 3.0))]),
    dtypes=st.sampled_from([(None, None, None), (None, None, "bfloat16"), ("float16", "float32", None)]),
    names=st.sampled_from([("llama",) * 2, ("gpt2",) * 2, ("gpt2-untied",) * 2, ("gpt2", "gpt2-untied")]),
    sharded=st.booleans(),
)


def search(examples):
    """Not shrunk: every example compiles its own programs."""
    return settings(
        max_examples=examples, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


@search(2)
@plans
def test_loading_through_a_plan_is_applying_it_afterwards(models, **example):
    check_plan(models, **example)


def check_plan(models, rows, ends, scales, dtypes, names, sharded):
    *of_plan, dtype = dtypes
    if dtype is not None:  # rounds what noise is mixed with
        rows = [dataclasses.replace(row, noise=0.0) for row in rows]
    plan = DepthPlan(tuple(rows), *ends, (("a", 4), ("b", 4)), scales, *of_plan)
    configs = {source: CONFIGS[name] for source, name in zip("ab", names)}
    paths = {"a": models / f"{names[0]}-float32", "b": models / f"{names[1]}-bfloat16"}
    model = load(paths, plan=plan, dtype=dtype, mesh=make_mesh(4, 2) if sharded else None)
    sources = {
        source: load_params(path, configs[source], dtype=dtype and jnp.dtype(dtype)) for source, path in paths.items()
    }

    config = result_config(plan, configs)
    fresh = jax.jit(init, static_argnums=0)(config, 0)
    if dtype:
        fresh = jax.tree.map(lambda leaf: leaf.astype(dtype), fresh)
    expected = flatten(jax.jit(apply, static_argnums=0)(plan, sources, fresh))
    assert model.config == config
    params = params_of(model)
    for path in set(expected) & {path for path in params if has_fresh(plan, path)}:
        # Two programs may draw, or mix, what differs by a unit in the last place of float32, and is then rounded.
        got, want = (np.asarray(leaf, np.float32) for leaf in (params.pop(path), expected.pop(path)))
        np.testing.assert_allclose(got, want, rtol=1e-6 if dtypes == (None,) * 3 else 2**-7, atol=1e-7)
    assert_same(params, expected)


def has_fresh(plan, path):
    inside = path.removeprefix("blocks.")
    if inside == path:
        return getattr(plan, path.split(".")[0]) is None
    return not all(row.inherits(inside) and not (row.noise and path.endswith(".kernel")) for row in plan.rows)


@pytest.mark.slow
@search(60)
@plans
def test_loading_through_many_plans_is_applying_them_afterwards(models, **example):
    check_plan(models, **example)


def test_what_a_plan_drops_or_zeroes_is_not_read(models, monkeypatch):
    rows = [Row("m", 1), Row("m", 1, "copy", ZEROED), Row("m", 3, "original", ZEROED)]
    plan = DepthPlan(tuple(rows), *["m"] * 4, sources=(("m", 4),))
    with counting(monkeypatch) as counts:
        model = load(models / "llama-float32", plan=plan)
    expected = random(LLAMA)
    leaves = {p: leaf for p, leaf in flatten(expected).items() if p.startswith("blocks.")}
    layer = sum(leaf[0].nbytes for leaf in leaves.values())
    written = sum(leaf[0].nbytes for p, leaf in leaves.items() if "o_proj" in p or "down_proj" in p)
    ends = sum(leaf.nbytes for p, leaf in flatten(expected).items() if not p.startswith("blocks."))
    assert sum(counts.values()) == ends + 2 * layer - written
    assert model.origin.plan == plan
    # The zeroed copy adds nothing: the function is that of two layers of which the second is zeroed.
    assert not np.asarray(model.blocks.self_attn.o_proj.kernel[...][1:]).any()


def test_a_plan_needs_its_sources(models):
    plan = inherit("reference", 4, 2)
    assert load(models / "llama-float32", plan=plan).config.num_layers == 2
    two = DepthPlan((Row("a", 0), Row("b", 0)), *["a"] * 4, sources=(("a", 4), ("b", 4)))
    for call, words in (
        (lambda: load(models / "llama-float32", plan=two), ["'a', 'b'", "mapping"]),
        (lambda: load({"a": models / "llama-float32"}, plan=two), ["'b'"]),
        (lambda: load({"a": models / "llama-float32"}), ["plan"]),
        (lambda: load(models / "llama-float32", plan=inherit("reference", 5, 2)), ["4 layers", "5"]),
        (lambda: load({"a": models / "llama-float32", "b": models / "gpt2-float32"}, plan=two), ["'a'", "'b'"]),
    ):
        refused(call, *words)


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message, message


# ---- sources


@pytest.fixture
def server(models):
    """An https-like server of the models, with byte ranges, as buckets have; also its log of requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = models / self.path.lstrip("/")
            wanted = self.headers.get("Range")
            requests.append((self.command, self.path, wanted))
            if not path.is_file():
                return self.answer(404, b"")
            data = path.read_bytes()
            if wanted is None:
                return self.answer(200, data)
            start, stop = (int(part) for part in re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            if start >= len(data):
                return self.answer(416, b"", f"bytes */{len(data)}")
            part = data[start : stop + 1]
            return self.answer(206, part, f"bytes {start}-{start + len(part) - 1}/{len(data)}")

        do_HEAD = do_GET

        def answer(self, status, body, content_range=None):
            self.send_response(status)
            if content_range:
                self.send_header("Content-Range", content_range)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()


def test_urls_are_read_by_byte_ranges(models, server):
    url, requests = server
    expected = flatten(load_params(models / "llama-bfloat16", LLAMA))
    assert_same(params_of(load(f"{url}/llama-bfloat16/")), expected)
    assert all(wanted for command, path, wanted in requests if command == "GET" and path.endswith(".safetensors"))
    assert_same(params_of(load(f"{url}/llama-bfloat16", mesh=make_mesh(8, 1))), expected)
    assert_same(params_of(load(f"file://{models}/llama-bfloat16")), expected)
    refused(lambda: load(f"{url}/nothing"), "nothing", "config.json")
    refused(lambda: load(f"{url}/llama-bfloat16", revision="main"), "revision")
    refused(lambda: load("ftp://somewhere/model"), "ftp", "gs")


def test_a_truncated_file_behind_a_url_is_refused(models, server):
    url, _ = server
    copy = models / "short"
    shutil.copytree(models / "llama-float32", copy)
    try:
        victim = sorted(copy.glob("model-*.safetensors"))[1]
        data = victim.read_bytes()
        victim.write_bytes(data[:-1])
        refused(lambda: load(f"{url}/short"), victim.name, "truncated")
        victim.write_bytes(data + b"\0")
        refused(lambda: load(f"{url}/short"), victim.name, "goes on")
    finally:
        shutil.rmtree(copy)


@pytest.fixture
def hub_cache(models, tmp_path, monkeypatch):
    """A cache as huggingface_hub leaves it, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "models--org--name", "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in (models / "llama-float32").iterdir():
        if file.name != "jaxup_manifest.json":
            shutil.copy(file, repo / "blobs" / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return repo


def test_hub_ids_are_read_from_the_cache_when_offline(hub_cache, models):
    expected = flatten(load_params(models / "llama-float32", LLAMA))
    model = load("org/name")
    assert_same(params_of(model), expected)
    assert model.origin.path == "org/name"
    assert_same(params_of(load("org/name", revision="main")), expected)
    refused(lambda: load("org/other"), "org/other", "could not be fetched")
    refused(lambda: load("org/name", revision="v2"), "v2")
    refused(lambda: load("a/b/c"), "no such directory")
    refused(lambda: load("./org/name"), "no such directory")


def test_a_hub_cache_is_still_checked(hub_cache):
    (blob,) = (hub_cache / "blobs").glob("model-00001-*")
    blob.write_bytes(blob.read_bytes()[:-1])
    refused(lambda: load("org/name"), "truncated")


@pytest.mark.parametrize(
    ("error", "word"),
    [("GatedRepoError", "gated"), ("RepositoryNotFoundError", "no such model"), ("RevisionNotFoundError", "revision")],
)
def test_what_the_hub_refuses_is_said_in_a_line(error, word, monkeypatch):
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, error)

    def download(*args, **kwargs):
        raise kind.__new__(kind, "several\nlines")  # what it is made from differs between versions

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    refused(lambda: load("org/name"), "org/name", word)


def test_pickles_are_read_only_when_asked_for(torch, models, tmp_path):
    tensors = {}
    for file in (models / "llama-bfloat16").glob("*.safetensors"):
        from safetensors.torch import load_file

        tensors |= load_file(file)
    shutil.copy(models / "llama-bfloat16" / "config.json", tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    refused(lambda: load(tmp_path), "pytorch_model.bin", "pickle")
    expected = flatten(load_params(models / "llama-bfloat16", LLAMA))
    assert_same(params_of(load(tmp_path, allow_pickle=True)), expected)
    assert_same(params_of(load(tmp_path, allow_pickle=True, mesh=make_mesh(4, 2))), expected)

    # Two files and an index.
    names = sorted(tensors)
    files = {"a.bin": names[:5], "b.bin": names[5:]}
    for file, some in files.items():
        torch.save({name: tensors[name] for name in some}, tmp_path / file)
    (tmp_path / "pytorch_model.bin").unlink()
    weight_map = {name: file for file, some in files.items() for name in some}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(params_of(load(tmp_path, allow_pickle=True)), expected)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_pickles_never_run_code(torch, models, tmp_path):
    shutil.copy(models / "llama-bfloat16" / "config.json", tmp_path)
    torch.save({"model.norm.weight": Evil(str(tmp_path / "was_here"))}, tmp_path / "pytorch_model.bin")
    refused(lambda: load(tmp_path, allow_pickle=True), "pytorch_model.bin", "tensors only")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    refused(lambda: load(tmp_path, allow_pickle=True), "pytorch_model.bin")
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    refused(lambda: load(tmp_path, allow_pickle=True), "dict of tensors")
    torch.save({"model.norm.weight": torch.zeros(16, dtype=torch.float64)}, tmp_path / "pytorch_model.bin")
    refused(lambda: load(tmp_path, allow_pickle=True), "float64")
    monkeyed = torch.__version__
    try:
        torch.__version__ = "2.9.1"
        refused(lambda: load(tmp_path, allow_pickle=True), "2.10")
    finally:
        torch.__version__ = monkeyed
    assert not (tmp_path / "was_here").exists()


# ---- content


def test_nan_is_a_warning_and_with_strict_an_error(models, tmp_path):
    shutil.copytree(models / "llama-float32", tmp_path / "m", ignore=shutil.ignore_patterns("jaxup_manifest.json"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    for name, value in (("model.norm.weight", np.nan), ("model.layers.2.mlp.up_proj.weight", np.inf)):
        tensors = safetensors.numpy.load_file(tmp_path / "m" / index[name])
        tensors[name][-1] = value
        safetensors.numpy.save_file(tensors, tmp_path / "m" / index[name])
    for mesh in (None, make_mesh(8, 1)):
        with pytest.warns(UserWarning, match=r"NaN or infinity in .*model\.norm\.weight") as caught:
            model = load(tmp_path / "m", mesh=mesh)
        assert "model.layers.2.mlp.up_proj.weight" in str(caught[0].message)
        assert np.isnan(np.asarray(model.norm.scale[...])[-1])
        refused(lambda mesh=mesh: load(tmp_path / "m", mesh=mesh, strict=True), "model.norm.weight")
    # What is not read cannot be noticed.
    plan = DepthPlan((Row("m", 0),), "m", None, None, "m", sources=(("m", 4),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "m", plan=plan)


@given(st.binary(min_size=4, max_size=64), st.sampled_from(["float16", "bfloat16", "float32"]))
@settings(max_examples=200)
def test_is_finite_by_bits(data, dtype):
    array = np.frombuffer(data[: len(data) // 4 * 4], jnp.dtype(dtype))
    with np.errstate(invalid="ignore"):  # a cast of a signalling NaN says so
        assert is_finite(array) == np.isfinite(array.astype(np.float64)).all()


def test_a_manifest_is_checked_while_loading(models, tmp_path):
    shutil.copytree(models / "llama-float32", tmp_path / "m")
    victim = sorted((tmp_path / "m").glob("model-*.safetensors"))[-1]
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    refused(lambda: load(tmp_path / "m"), victim.name, "manifest")


def test_a_tied_head_that_differs_is_refused(tmp_path):
    save(tmp_path / "m", GPT2, random(GPT2))
    tensors = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "jaxup_manifest.json").unlink()
    head = tensors["transformer.wte.weight"].copy()
    safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, tmp_path / "m" / "model.safetensors")
    load(tmp_path / "m", mesh=make_mesh(8, 1))
    head[-1, -1] += 1
    safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, tmp_path / "m" / "model.safetensors")
    for mesh in (None, make_mesh(8, 1)):
        refused(lambda mesh=mesh: load(tmp_path / "m", mesh=mesh), "lm_head.weight", "ties")


def test_files_beside_the_tensors(models, server, tmp_path):
    url, _ = server
    directory = models / "gpt2-float32"
    assert tokenizer_directory(directory) == directory
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    (directory / "modeling.py").write_text("raise SystemExit")
    expected = {name: (directory / name).read_bytes() for name in ("generation_config.json", "tokenizer_config.json")}
    assert carried_files(directory) == expected == carried_files(f"{url}/gpt2-float32")
    fetched = tokenizer_directory(f"{url}/gpt2-float32")
    assert {p.name for p in fetched.iterdir()} == {"config.json", *expected}


def test_all_that_a_tokenizer_reads_is_kept(models, tmp_path):
    directory = shutil.copytree(models / "gpt2-float32", tmp_path / "in")
    (directory / "jaxup_manifest.json").unlink(missing_ok=True)
    more = {
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}", "tekken.json": b"{}", "vocab_v2.json": b"{}",
        "qwen.tiktoken": b"YQ== 0", "merges_v2.txt": b"a b",
    }  # fmt: skip
    (directory / "additional_chat_templates").mkdir()
    for name, content in more.items():
        (directory / name).write_bytes(content)
    (directory / "additional_chat_templates" / "run.py").write_text("raise SystemExit")
    jaxup.save(load(directory), tmp_path / "saved")
    build(identity(str(directory), GPT2.num_layers), tmp_path / "built")
    jaxup.save(load(tmp_path / "saved"), tmp_path / "again")
    for out in ("saved", "built", "again"):
        assert {name: (tmp_path / out / name).read_bytes() for name in more} == more
        assert not (tmp_path / out / "additional_chat_templates" / "run.py").exists()
    (tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"{{ other }}")
    refused(lambda: tokenizer_directory(tmp_path / "saved"), "tool_use.jinja is not the file that was written here")


def test_the_readme_example_runs(models, tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block.replace("DIR_OR_ID", str(models / "llama-float32")), scope)
    assert scope["logits"].shape == (2, 8, 41)
    assert load(tmp_path / "copy").config == LLAMA


def test_the_example_of_docs_depth_runs(models, tmp_path):
    docs = (Path(__file__).parent.parent / "docs" / "depth.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", docs, re.S)
    model = load(models / "llama-float32")
    scope = {"num_layers": 4, "model": model, "params": nnx.to_pure_dict(nnx.state(model)),
             "tokens": jnp.arange(8).reshape(2, 4)}  # fmt: skip
    exec(block.replace("DIR", str(models / "llama-float32")).replace("OUT", str(tmp_path / "out")), scope)
    assert_same(params_of(scope["upscaled"]), flatten(scope["grown"]))
    assert_same(params_of(load(tmp_path / "out")), flatten(scope["grown"]))
    assert np.flatnonzero(scope["masks"]["blocks"]["mlp"]["down_proj"]["kernel"]).tolist() == [3, 4, 5, 6]
    assert scope["logits"].shape == (2, 4, 41)


def test_the_example_of_docs_index_runs(models, tmp_path):
    docs = (Path(__file__).parent.parent / "docs" / "index.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", docs, re.S)
    exec(block.replace("DIR", str(models / "llama-float32")).replace("OUT", str(tmp_path / "out")), {})
    assert load(tmp_path / "out").config.num_layers == 8


def test_the_public_names():
    assert jaxup.load is whole
    refused(lambda: jaxup.load("/nowhere/at/all"), "/nowhere/at/all", "no such directory")
    refused(lambda: jaxup.load("x", dtype="float64"), "float64")
