"""Model directories read: spellings of old files, every refusal, fuzzed headers, flipped bits."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, traverse_util
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxup
from jaxup.errors import UserError
from jaxup.hub.reader import load_config
from jaxup.hub.writer import save
from jaxup.model.config import LayerKind, ModelConfig, depth_scaled
from jaxup.model.decoder import abstract
from jaxup.model.spec import flatten

GPT2 = ModelConfig.gpt2(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, max_positions=32, bias=True)
BIASLESS = dataclasses.replace(GPT2, norm_bias=False, qkv_bias=False, o_bias=False, mlp_bias=False)
LLAMA = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    max_positions=32, norm="rmsnorm", norm_eps=1e-6, positions="rope", rope_theta=500.0, activation="silu",
    gated_mlp=True, tie_embeddings=False,
)  # fmt: skip
CONFIGS = {
    "gpt2": GPT2,
    "gpt2-biasless": BIASLESS,
    "gpt2-untied-scaled": dataclasses.replace(GPT2, tie_embeddings=False, kinds=depth_scaled(GPT2.num_layers)),
    "llama": LLAMA,
    "llama-qkv-bias-only": dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True),
    "mistral": dataclasses.replace(LLAMA, kinds=(LayerKind(window=3),)),
    "mistral-odd-heads": dataclasses.replace(LLAMA, num_heads=3, num_kv_heads=1),
    "gemma": dataclasses.replace(LLAMA, activation="gelu_tanh", norm_offset=1.0, embed_scale=4.0, tie_embeddings=True),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make(config, seed=0):
    """Params whose every leaf matters: biases are not zero, norms are not one."""
    rng = np.random.default_rng(seed)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract(config)[1]).items()}
    params = {p: 0.2 * rng.standard_normal(shape, dtype=np.float32) for p, shape in shapes.items()}
    params = {p: leaf + 1 if p.endswith("scale") else leaf for p, leaf in params.items()}
    return traverse_util.unflatten_dict(params, sep=".")


def write_hf(directory, tensors, config):
    """A directory written by nobody we know, to be damaged."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "model"
    save(out, LLAMA, make(LLAMA))
    return out


@pytest.fixture
def model(saved, tmp_path):
    """A copy without a manifest, to damage."""
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "jaxup_manifest.json").unlink()
    return tmp_path / "model"


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    for word in words:
        assert word in message, message


def load(directory):
    return nnx.to_pure_dict(nnx.state(jaxup.load(directory, strict=True)))


# ---- both directions


@configs
def test_transformers_loads_an_export_and_agrees(config, torch, tmp_path):
    from transformers import AutoModelForCausalLM

    params = make(config)
    save(tmp_path / "out", config, params)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(0).integers(0, 40, (2, 13), dtype=np.int32)
    ours = jax.jit(lambda params, tokens: nnx.merge(abstract(config)[0], params)(tokens))(params, tokens)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    error = np.abs(ours - theirs).max()
    print(f"EXPORT {model.config.model_type} logits={error:.1e}")
    assert error < 1e-4
    # What transformers saves of it is what we saved, names and bytes.
    model.save_pretrained(tmp_path / "again")
    a, b = (safetensors.numpy.load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_params_come_back_equal(tmp_path):
    for name, config in CONFIGS.items():
        params = make(config)
        save(tmp_path / name, config, params)
        back = flatten(load(tmp_path / name))
        for path, leaf in flatten(params).items():
            np.testing.assert_array_equal(back.pop(path), leaf)
        assert all(path.endswith(".bias") and not leaf.any() for path, leaf in back.items())


def test_names_without_the_prefix_and_old_buffers_are_read(saved, tmp_path):
    save(tmp_path / "a", GPT2, make(GPT2))
    tensors = safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors")
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    bare |= {f"h.{i}.attn.bias": np.ones((1, 1, 32, 32), np.uint8) for i in range(2)}
    bare |= {f"h.{i}.attn.masked_bias": np.array(-1e9, np.float32) for i in range(2)}
    bare["lm_head.weight"] = bare["wte.weight"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    write_hf(tmp_path / "b", bare, config)
    for path, leaf in flatten(load(tmp_path / "b")).items():
        np.testing.assert_array_equal(leaf, flatten(load(tmp_path / "a"))[path])
    bare["lm_head.weight"] = bare["wte.weight"] + 1
    write_hf(tmp_path / "b", bare, config)
    refused(lambda: load(tmp_path / "b"), "lm_head.weight", "ties")
    bare["transformer.wte.weight"] = bare["wte.weight"]
    write_hf(tmp_path / "b", bare, config)
    refused(lambda: load(tmp_path / "b"), "wte.weight", "same parameter")


@pytest.mark.parametrize("config", [GPT2, LLAMA, CONFIGS["gemma"]], ids=["gpt2", "llama", "gemma"])
def test_names_are_found_as_transformers_finds_them(config, torch, tmp_path):
    """Without the base model's prefix, with one too many, and a tied weight under the head's name alone."""
    from transformers import AutoModelForCausalLM

    save(tmp_path / "a", config, make(config))
    tensors = safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors")
    hf = json.loads((tmp_path / "a" / "config.json").read_text())
    embedding = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    prefix = embedding.split(".")[0] + "."
    forms = [tensors, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
             {prefix + name: tensor for name, tensor in tensors.items()}]  # fmt: skip
    if config.tie_embeddings:
        forms += [{"lm_head.weight" if name.endswith(embedding.removeprefix(prefix)) else name: tensor
                   for name, tensor in form.items()} for form in forms]  # fmt: skip
    tokens, logits, params = torch.arange(8)[None], [], []
    for i, form in enumerate(forms):
        write_hf(tmp_path / f"{i}", form, hf)
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"{i}")(tokens).logits)
        params.append(flatten(load(tmp_path / f"{i}")))
    assert len(forms) == (6 if config.tie_embeddings else 3)
    assert all(torch.equal(found, logits[0]) for found in logits)
    for found in params:
        assert found.keys() == params[0].keys()
        assert all(np.array_equal(leaf, params[0][path]) for path, leaf in found.items())


# ---- refusals


def edit_tensors(change):
    def damage(model):
        tensors = safetensors.numpy.load_file(model / "model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, model / "model.safetensors")

    return damage


def replace_file(name, content):
    return lambda model: (model / name).write_bytes(content)


def index(weight_map):
    def damage(model):
        os.rename(model / "model.safetensors", model / "a.safetensors")
        real = dict.fromkeys(safetensors.numpy.load_file(model / "a.safetensors"), "a.safetensors")
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": real | weight_map})
        (model / "model.safetensors.index.json").write_text(text)

    return damage


def link_outside(name):
    def damage(model):
        os.rename(model / name, model.parent / "elsewhere")
        (model / name).symlink_to("../elsewhere")

    return damage


def pickle_only(model):
    os.rename(model / "model.safetensors", model / "pytorch_model.bin")


def pipe(model):
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
DAMAGE = {
    "missing tensor": (edit_tensors(lambda t: t.pop(NORM)), [NORM, "missing"]),
    "a layer too few": (edit_tensors(lambda t: [t.pop(k) for k in list(t) if ".1." in k]), ["and 6 more"]),
    "unexpected": (edit_tensors(lambda t: t.update({"z\nz": t[NORM]})), ["unexpected", "z\\nz"]),
    "two names": (edit_tensors(lambda t: t.update({"norm.weight": t[NORM]})), [NORM, "same parameter"]),
    "a prefix that nobody strips": (edit_tensors(lambda t: t.update({f"module.{NORM}": t.pop(NORM)})), ["missing"]),
    "transposed": (edit_tensors(lambda t: t.update({DOWN: t[DOWN].T.copy()})), [DOWN, "[24, 16]", "[16, 24]"]),
    "float64": (edit_tensors(lambda t: t.update({NORM: t[NORM].astype(np.float64)})), [NORM, "F64"]),
    "NaN": (edit_tensors(lambda t: t.update({NORM: t[NORM] * np.nan})), [NORM, "NaN"]),
    "empty": (replace_file("model.safetensors", b""), ["not a safetensors"]),
    "header too long": (replace_file("model.safetensors", b"\xff" * 64), ["not a safetensors"]),
    "pickle only": (pickle_only, ["pytorch_model.bin"]),
    "no tensors": (lambda model: (model / "model.safetensors").unlink(), ["no model.safetensors"]),
    "pipe": (pipe, ["regular file"]),
    "no config": (lambda model: (model / "config.json").unlink(), ["config.json"]),
    "corrupt config": (replace_file("config.json", b'{"a": \n\n'), ["config.json", "JSON"]),
    "config not text": (replace_file("config.json", b"\xff\xfe"), ["config.json", "JSON"]),
    "config a list": (replace_file("config.json", b"[]"), ["config.json", "object"]),
    "config twice": (replace_file("config.json", b'{"a": 1, "a": 1}'), ["'a'", "twice"]),
    "config deep": (replace_file("config.json", b'{"a":' * 100_000), ["config.json"]),
    "config NaN": (replace_file("config.json", b'{"rope_theta": NaN}'), ["NaN"]),
    "config linked outside": (link_outside("config.json"), ["config.json", "leaves"]),
    "tensors linked outside": (link_outside("model.safetensors"), ["leaves"]),
    "index absolute": (index({NORM: "/etc/passwd"}), ["/etc/passwd"]),
    "index up": (index({NORM: "../a.safetensors"}), ["../a.safetensors"]),
    "index not Unicode": (index({NORM: "\ud800.safetensors"}), ["safetensors"]),
    "index of nothing": (index({NORM: "b.safetensors"}), ["b.safetensors"]),
    "index of more": (index({"more": "a.safetensors"}), ["more"]),
    "index corrupt": (index("{"), ["index.json"]),
    "index without map": (index("{}"), ["weight_map"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_directories_are_refused(damage, model):
    change, words = DAMAGE[damage]
    change(model)
    refused(lambda: load(model), str(model), *words)


def test_index_must_tell_the_truth(model):
    index({})(model)
    assert load(model)
    index_path = model / "model.safetensors.index.json"
    weights = json.loads(index_path.read_text())
    del weights["weight_map"][NORM]
    index_path.write_text(json.dumps(weights))
    refused(lambda: load(model), NORM)


def test_missing_directory(tmp_path):
    refused(lambda: load_config(tmp_path / "none"), "no such directory")


def test_hub_cache_links_are_followed(saved, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(saved / name, blobs / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    assert load(snapshot)


def test_flipped_bits_are_noticed(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data), 40):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        refused(lambda: load(tmp_path / "m"), "model.safetensors")
    path.write_bytes(data)
    text = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(text.replace("500.0", "501.0"))
    refused(lambda: load_config(tmp_path / "m"), "config.json", "manifest")


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_entry(**fields):
    return lambda header, data: (header | {NORM: header[NORM] | fields}, data)


@pytest.mark.parametrize(
    "change",
    [
        edit_entry(dtype="F99"), edit_entry(dtype=3), edit_entry(shape=[2**62, 2**62]), edit_entry(shape=[-16]),
        edit_entry(shape=[True] * 16), edit_entry(shape=[16.0]), edit_entry(shape="16"), edit_entry(shape=[1] * 99),
        edit_entry(data_offsets=[0, 64]), edit_entry(data_offsets=[64, 0]), edit_entry(data_offsets=[9**9, 9**9 + 64]),
        edit_entry(data_offsets=[0]), edit_entry(data_offsets=None), edit_entry(more=1),
        lambda header, data: (header, data + b"\0"),
        lambda header, data: (header, data[:-1]),
        lambda header, data: (header | {NORM: 3}, data),
        lambda header, data: (header | {"__metadata__": {"a": 1}}, data),
        lambda header, data: (header | {"__metadata__": []}, data),
        lambda header, data: (b" " + json.dumps(header).encode(), data),
        lambda header, data: (b"[" * 200_000, data),
        lambda header, data: (b'{"a":' * 200_000, data),
        lambda header, data: (json.dumps(header).encode()[:-1] + b',"%s":0}' % NORM.encode(), data),
        lambda header, data: (b'{"a": ' + b"9" * 5000 + b"}", data),
        lambda header, data: ({k: v for k, v in header.items() if k != NORM}, data),
    ],
)  # fmt: skip
def test_malformed_headers_are_refused(change, model):
    path = model / "model.safetensors"
    write_raw(path, *change(*header_of(path)))
    refused(lambda: load(model), "model.safetensors")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzzed_headers_load_alike_or_are_refused(saved, tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("fuzz")
    shutil.copy(saved / "config.json", directory)
    original = (saved / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, end - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete"]))
        if kind == "set":
            mutated[position] = data.draw(st.sampled_from(b'0123456789{}[]",: \0\xff') | st.integers(0, 255))
        elif kind == "insert":
            mutated.insert(position, data.draw(st.sampled_from(b'019{}[]",: ')))
        else:
            del mutated[position]
    (directory / "model.safetensors").write_bytes(mutated)
    try:
        params = load(directory)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    expected = flatten(load(saved))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, expected[path])
