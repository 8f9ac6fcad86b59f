"""Healing from end to end: an up-scaled model trained whole or in part, interrupted, exported, and asked."""

import importlib
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import HEAL, devices, losses, result, write_chats, write_corpus
from safetensors.numpy import load_file, save_file

from jaxup import export, train
from jaxup.data.batches import Batches
from jaxup.depth.plan import DepthPlan
from jaxup.errors import Stopped, UserError
from jaxup.experiments import on_base
from jaxup.experiments.heal import HEALED
from jaxup.experiments.on_base import CONTROL
from jaxup.lens.claims import claims, open_runs
from jaxup.training import loop
from jaxup.training.partition import digest
from jaxup.training.sharding import MeshConfig, make_mesh

generate = importlib.import_module("jaxup.generate")  # in the package the name is the function's

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder for runs, with some text and some chats; both are tokenised once for all of them."""
    folder = tmp_path_factory.mktemp("heal")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    write_chats(folder / "chats.jsonl")
    return folder


def run(runs, name, *more):
    data = [f"--config.data.files={runs / 'chats.jsonl'}", f"--config.pretrain.data.source={runs / 'corpus'}"]
    seldom = ["--config.checkpoint.interval=100", "--config.eval.interval=100", "--config.sample.tokens=0"]
    train.main(["train", *HEAL, *data, *seldom, f"--workdir={runs / name}", *more])
    return runs / name


def exported(workdir, out, *more):
    export.main(["export", str(workdir), str(out), *more])
    return load_file(out / "model.safetensors")


SAMPLED = ["--config.checkpoint.interval=6", "--config.sample.tokens=4"]


@pytest.fixture(scope="module")
def whole(runs):
    """Everything trains; and which rows each model was trained on."""
    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        read, begin = Batches.__call__, loop._train

        def recorded(self, step, share=slice(None)):
            rows.setdefault(rows["now"], []).append(self.rows_of(step))
            return read(self, step, share)

        def named(run, name, *args):
            rows["now"] = name
            return begin(run, name, *args)

        patch.setattr(Batches, "__call__", recorded)
        patch.setattr(loop, "_train", named)
        return run(runs, "whole", *SAMPLED), rows


def test_healing_begins_with_the_function_of_the_base_and_ends_better(whole):
    workdir, rows = whole
    base, before, healed, control = (result(workdir, name) for name in ("base", "before", "healed", "control"))
    assert (base["layers"], before["layers"], healed["layers"], control["layers"]) == (3, 5, 5, 3)
    # The zeroed copies add exact zeros; the two models are two programs, whose sums may round apart.
    assert before["val_loss"] == pytest.approx(base["val_loss"], abs=1e-5)
    first = next(r for r in losses(workdir) if r["model"] == "healed" and "val_loss" in r)
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5)
    assert healed["val_loss"] < before["val_loss"] - 0.5
    np.testing.assert_array_equal(rows["healed"], rows["control"])  # the same batches
    assert DepthPlan.from_yaml((workdir / "plan.yaml").read_text()).num_layers == 5


def test_a_dry_run_says_what_a_healing_does(whole, runs, capsys):
    """The models and their numbers; memory of the control, in which all trains, and time of the deeper one as well."""
    run(runs, "dry", "--config.train.layers=copies", "--dry-run")
    said = capsys.readouterr().out
    assert not (runs / "dry").exists()
    table = re.search(r"^models of the run.*?\n\n", said, re.M | re.S)[0].splitlines()[2:-1]
    assert [line.split()[0] for line in table] == ["pretrained", "base", "before", "healed", "control"]
    for name, *cells in map(str.split, table):
        done = result(whole[0], name)
        assert cells[:2] == [f"{done[key]:,}" for key in ("layers", "params")]
        if done["steps"]:
            assert cells[3] == f"{done['steps']:,}"
            assert cells[5:7] == [f"{done['tokens']:,}", f"{done['epochs']:.3g}"]
            assert float(cells[7]) > 0  # PFLOPs
            assert (cells[2] == "all") == (name != "healed")
    assert re.search(r"⟦[^⟧]+⟧", said)
    assert "memory of a device while control trains, which takes most" in said
    assert "by 3 steps of healed:" in said


def test_claims_are_tested_on_the_ends_of_epochs(whole):
    """Those whose checkpoints the run keeps; what the control changed is held against the same layers of `before`."""
    workdir, rows = whole
    (found,), (control,) = open_runs([str(workdir)])
    per_epoch = -(-len(np.unique(np.concatenate(rows["healed"]))) // 8)
    ends = per_epoch, len(rows["healed"])
    assert found.models == (f"{workdir}@before", *(f"{workdir}@healed/{step}" for step in ends))
    assert [origin[:2] for origin in control.origins] == [origin[:2] for origin in found.origins]
    assert (control.values["changed"][0, [0, 1, 2]] > 0.9).all()
    said = claims([found], [control])
    assert {result.of for result in said.results if result.claim == "epochs"} == {*found.modules}
    assert all(result.ratio > 0 for result in said.results)


def test_every_row_is_trained_on_once_an_epoch(whole):
    workdir, rows = whole
    epochs, steps = 2, result(workdir, "healed")["steps"]
    seen = np.concatenate(rows["healed"])
    count = len(np.unique(seen))
    assert steps == -(-epochs * count // 8)
    assert (np.bincount(seen[: epochs * count]) == epochs).all()
    # What is told of it counts each token once, and no padding.
    store = json.loads((workdir / "checkpoints" / "healed" / "model.json").read_text())["store"]
    meta = json.loads((Path(store) / "meta.json").read_text())["statistics"]["train"]
    healed = result(workdir, "healed")
    assert healed["tokens"] == meta["tokens"] < meta["rows"] * 64
    assert healed["epochs"] == steps * 8 / count >= epochs


def test_the_run_keeps_the_model_before_and_after_each_epoch(whole, tmp_path):
    workdir, rows = whole
    count = len(np.unique(np.concatenate(rows["healed"])))
    ends = [-(-count // 8), -(-2 * count // 8)]
    kept = sorted(int(p.name) for p in (workdir / "checkpoints" / "healed").iterdir() if p.name.isdecimal())
    assert kept == ends
    assert [
        r["step"] for r in losses(workdir) if r["model"] == "healed" and "val_loss" in r and r["step"] in ends
    ] == ends
    evaluated = [[r["step"] for r in losses(workdir) if r["model"] == n and "val_loss" in r] for n in (HEALED, CONTROL)]
    assert evaluated == [[0, *ends]] * 2, "curves side by side have the same points"
    base = exported(workdir, tmp_path / "base", "--model", "pretrained")
    before = exported(workdir, tmp_path / "before", "--model", "before")
    for i, layer in enumerate((0, 1, 2, 1, 2)):
        for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
            np.testing.assert_array_equal(
                before[f"model.layers.{i}.{name}.weight"], base[f"model.layers.{layer}.{name}.weight"]
            )
    assert not before["model.layers.3.self_attn.o_proj.weight"].any()
    healed = exported(workdir, tmp_path / "healed")
    final = load_file(workdir / "export" / "model.safetensors")
    assert healed.keys() == final.keys()
    for name in final:
        np.testing.assert_array_equal(healed[name], final[name])
    middle = exported(workdir, tmp_path / "middle", "--step", str(ends[0]))
    assert (middle["model.norm.weight"] != final["model.norm.weight"]).any()


def test_a_second_call_does_nothing(whole, runs, capsys):
    workdir, _ = whole
    before = {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*") if p.name != "model.json"}
    run(runs, "whole", *SAMPLED)
    assert "healed: finished before" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*") if p.name != "model.json"}
    assert {p: t for p, t in after.items() if p.is_file()} == {p: t for p, t in before.items() if p.is_file()}


COPIES = ["--config.train.layers=copies", "--config.train.parameters=o_proj|down_proj", "--config.heal.control=False"]


@pytest.fixture(scope="module")
def copies(runs):
    """Only the copies train, and of them only what was zeroed; no control. With two devices."""
    with devices(2):
        return run(runs, "copies", *COPIES)


def test_what_does_not_train_keeps_every_bit_in_the_export(copies, runs, tmp_path):
    final = load_file(copies / "export" / "model.safetensors")
    before = exported(copies, tmp_path / "before", "--model", "before")
    changed = {name for name in final if final[name].tobytes() != before[name].tobytes()}
    assert changed == {
        f"model.layers.{i}.{name}.weight" for i in (3, 4) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert result(copies, "healed")["trained"] == 2 * (16 * 16 + 24 * 16)
    card = (copies / "export" / "README.md").read_text()
    before, after = (result(copies, name)["val_loss"] for name in ("before", "healed"))
    for said in (
        "| kind | `healed: fine-tuned after its depth was changed` |", "| recipe | `upscale(base, 1:3, copies=1)` |",
        "| data | `chats.jsonl` |", "| chat format | `metharme` |", "| learning rate | `0.001, constant` |",
        r"| parameters trained | `1,280 (layers copies, parameters o_proj\|down_proj)` |",
        f"| validation loss | `{after:.4f} nats per loss token` |", f"| validation loss of before | `{before:.4f}` |",
    ):  # fmt: skip
        assert said in card
    assert str(runs) not in card
    assert (
        "1,280 parameters trained (layers copies, parameters o_proj|down_proj)" in (copies / "SUMMARY.md").read_text()
    )
    healed = exported(copies, tmp_path / "healed")
    assert all(healed[name].tobytes() == final[name].tobytes() for name in final)


def test_the_number_of_devices_does_not_matter(copies, tmp_path):
    """Two devices wrote the checkpoints; one reads them, and so do eight."""
    there = exported(copies, tmp_path / "out", "--model", "healed")
    with devices(8):
        assert len(jax.devices()) == 8
        here = exported(copies, tmp_path / "here")
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        np.testing.assert_array_equal(tensor, here[name])
    with pytest.raises(UserError, match=r"\A[^\n]*exists already[^\n]*\Z"):
        exported(copies, tmp_path / "out", "--model", "healed")


def test_checkpoints_hold_what_trains_alone(copies):
    """Two moments and the params of 1,280 numbers: the 8 kB of them, not the model's."""
    (newest,) = (
        p for p in (copies / "checkpoints" / "healed").iterdir() if p.name == str(result(copies, "healed")["steps"])
    )
    size = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
    whole = sum(p.stat().st_size for p in (copies / "checkpoints" / "before" / "0").rglob("*") if p.is_file())
    assert size < whole


def test_a_run_that_breaks_off_in_an_epoch_goes_on_as_if_it_had_not(copies, runs, monkeypatch, capsys):
    read = Batches.__call__
    healing = []

    def stopping(self, step, share=slice(None)):
        if healing and step == 5:
            signal.raise_signal(signal.SIGTERM)
        return read(self, step, share)

    begin = loop._train

    def named(run, name, *args):
        healing.extend([name] * (name == "healed"))
        return begin(run, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", stopping)
        patch.setattr(loop, "_train", named)
        # A signal reaches the main thread; the batch is read in another one, and it is the handler that counts.
        with devices(2), pytest.raises(Stopped, match="healed: saved at step"):
            run(runs, "broken", *COPIES)
    assert not (runs / "broken" / "SUMMARY.md").exists()
    with devices(2):
        run(runs, "broken", *COPIES)
    assert "healed: resumes at step" in capsys.readouterr().out
    assert losses(runs / "broken") == losses(copies)
    final, want = (load_file(r / "export" / "model.safetensors") for r in (runs / "broken", copies))
    assert all(final[name].tobytes() == want[name].tobytes() for name in want)


def test_a_digest_sees_every_bit_and_place():
    tree = {"a": jnp.arange(24.0).reshape(2, 3, 4), "b": jnp.zeros((3,), jnp.bfloat16), "c": jnp.int8(3)}
    first = digest(tree)
    assert digest(jax.tree.map(jnp.copy, tree)) == first
    flipped = np.asarray(tree["a"]).copy()
    flipped.view(np.uint32)[1, 2, 3] ^= 1
    swapped = np.asarray(tree["a"])[:, ::-1]
    for a in (flipped, swapped):
        assert digest({**tree, "a": jnp.asarray(a)}) != first
    assert digest({**tree, "b": jnp.array([0.0, -0.0, 0.0], jnp.bfloat16)}) != first
    assert digest({**tree, "c": jnp.int8(2)}) != first


# ---- from a Hugging Face directory in bfloat16, and back


@pytest.fixture(scope="module")
def from_directory(whole, runs):
    """The base as a bfloat16 directory; its layers, but not its ends, are frozen."""
    workdir, _ = whole
    export.main(["export", str(workdir), str(runs / "base"), "--model", "pretrained", "--dtype", "bfloat16"])
    return run(
        runs, "directory", "--config.pretrain.steps=0", f"--config.base.path={runs / 'base'}", "--config.steps=6",
        "--config.epochs=0", "--config.train.freeze=0:3", "--config.train.rates.ends=0.5",
        "--config.data.format=chatml", "--config.heal.control=False",
    )  # fmt: skip


def test_a_bfloat16_model_comes_back_with_the_bits_that_did_not_train(from_directory, runs):
    base = load_file(runs / "base" / "model.safetensors")
    final = load_file(from_directory / "export" / "model.safetensors")
    assert {a.dtype.name for a in final.values()} == {"bfloat16"}
    for i in range(3):
        for name in [n for n in base if f"layers.{i}." in n]:
            assert final[name].tobytes() == base[name].tobytes()
    assert final["model.norm.weight"].tobytes() != base["model.norm.weight"].tobytes()
    results = [result(from_directory, name) for name in ("base", "before")]
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"], abs=1e-4)


def test_the_export_answers_in_transformers_as_generate_does(from_directory, torch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = from_directory / "export"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 4?"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    want = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    generate.main(["generate", str(from_directory), "--chat", "--prompt", "3 + 4?", "--greedy", "--max-tokens", "12"])
    assert capsys.readouterr().out.rstrip("\n") == want.rstrip("\n")


def test_a_base_that_is_replaced_is_noticed(from_directory, runs, monkeypatch):
    """After it was measured and before the model is made of it, by files; at another start by the numbers in them."""
    place = runs / "replaced"
    shutil.copytree(runs / "base", place)
    (place / "jaxup_manifest.json").unlink()  # as a model of others comes
    weights, config = load_file(place / "model.safetensors"), (place / "config.json").read_text()
    more = (
        "replaced-run", "--config.pretrain.steps=0", f"--config.base.path={place}", "--config.data.format=chatml",
        "--config.heal.control=False",
    )  # fmt: skip
    measured = on_base.measured

    def replaced(run, name, *args, **kwargs):
        result = measured(run, name, *args, **kwargs)
        if name == "base":
            save_file({k: 2 * v for k, v in weights.items()}, place / "model.safetensors", metadata={"format": "pt"})
        return result

    with monkeypatch.context() as patch:
        patch.setattr(on_base, "measured", replaced)
        with pytest.raises(UserError, match=r"replaced: model.safetensors has been replaced while the run was"):
            run(runs, *more)
    with pytest.raises(UserError, match=r"checkpoints/base: these parameters are not those the run began with"):
        run(runs, *more)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(config.replace("10000.0", "20000.0"))
    with pytest.raises(UserError, match=r"the run began with another model: rope_theta was 10000.0, now 20000.0"):
        run(runs, *more)
    (place / "config.json").write_text(config)
    assert not list((runs / "replaced-run" / "checkpoints" / "before").glob("[0-9]*"))


def test_adapters_are_merged_into_the_export(runs, whole, tmp_path):
    pytest.importorskip("qwix")
    workdir = run(
        runs, "lora", "--config.lora.rank=2", "--config.lora.alpha=4", "--config.train.layers=copies",
        "--config.heal.control=False", "--config.steps=6", "--config.epochs=0",
    )  # fmt: skip
    before = exported(workdir, tmp_path / "before", "--model", "before")
    final = load_file(workdir / "export" / "model.safetensors")
    changed = {name for name in final if final[name].tobytes() != before[name].tobytes()}
    kernels = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert changed == {f"model.layers.{i}.{name}.weight" for i in (3, 4) for name in kernels}
    for name in changed:
        assert np.linalg.matrix_rank(final[name].astype(np.float64) - before[name], tol=1e-6) == 2
    healed, merged = result(workdir, "healed"), result(workdir, "merged")
    # The merged weights are rounded to float32 once more.
    assert merged["val_loss"] == pytest.approx(healed["val_loss"], abs=1e-5)
    again = exported(workdir, tmp_path / "healed")
    assert all(np.allclose(again[name], final[name], rtol=0, atol=1e-7) for name in final)


# ---- inputs that change under a run


def edited(copies, runs, name):
    """A copy of the run that looks as if it had been stopped before its end."""
    shutil.copytree(copies, runs / name)
    (runs / name / "checkpoints" / "healed" / "result.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path / "inputs.json", "begun with another plan and another data"),
        (lambda path: path / "checkpoints" / "healed" / "digest.json", "not those the run began with"),
        (
            lambda path: path / "checkpoints" / "before" / "model.json",
            "gone or damaged; remove .* to have it built again",
        ),
    ],
)
def test_a_run_does_not_go_on_from_something_else(copies, runs, change, message, tmp_path_factory):
    name = tmp_path_factory.mktemp("name").name
    edited(copies, runs, name)
    change(runs / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        run(runs, name, *COPIES)


def test_a_finished_model_whose_checkpoint_is_gone_is_not_taken_for_another(copies, runs):
    shutil.copytree(copies, runs / "gone")
    steps = result(copies, "healed")["steps"]
    shutil.rmtree(runs / "gone" / "checkpoints" / "healed" / str(steps))
    with pytest.raises(UserError, match=f"finished at step {steps}, and that checkpoint is gone; that of step"):
        run(runs, "gone", *COPIES)


def test_a_plan_of_one_model_may_call_it_anything(whole, runs, tmp_path):
    """A mergekit file with the name of a model that is not at hand; base.path says where it is."""
    from jaxup.experiments.common import read_settings
    from jaxup.experiments.config import load
    from jaxup.experiments.heal import Heal

    base = tmp_path / "base"
    export.main(["export", str(whole[0]), str(base), "--model", "pretrained"])
    recipe = tmp_path / "recipe.yaml"
    slices = [{"sources": [{"model": "org/Name", "layer_range": r}]} for r in ([0, 2], [1, 3])]
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    overrides = [("pretrain.steps", "0"), ("base.path", str(base)), ("plan", str(recipe))]
    config = load("heal.py:smoke", overrides)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    assert Heal(config, read_settings(config), mesh)._plan.num_layers == 4
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": slices, "chat_template": "chatml"}))
    with pytest.raises(UserError, match=r"plan: .*chat_template are carried out by"):
        Heal(config, read_settings(config), mesh)
    slices[1]["sources"][0]["model"] = "org/Other"
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    with pytest.raises(UserError, match="several models, 'org/Name' and 'org/Other'"):
        Heal(config, read_settings(config), mesh)
    config = load("heal.py:smoke", [*overrides, ("base.models", f"org/Name={base},org/Other={base}")])
    with config.unlocked():
        config.base.path = "elsewhere"
    with pytest.raises(UserError, match=r"base.path=elsewhere: the plan takes nothing from it"):
        Heal(config, read_settings(config), mesh)


# ---- mistakes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.train.parameters=no_such"], r"train: nothing would train: no parameter's path contains 'no_such'"),
        (["--config.train.layers=new"], "train: nothing would train: no layers are new"),
        (["--config.train.layers=7:9"], "train: layers '7:9': the model has layers 0:5, half open"),
        (["--config.train.layers=copies", "--config.train.freeze=all"], "no layers are copies without all"),
        (["--config.train.freeze=all"], "no layers are all without all"),
        (["--config.optimizer.learning_rate=-1e-3"], "optimizer.learning_rate=-0.001: must be a number"),
        (["--config.export.dtype=float8"], "export.dtype='float8': not known"),
        (
            ["--config.base.path=x", "--config.pretrain.steps=0", "--config.base.dtype=bf16"],
            "base.dtype='bf16': not known",
        ),
        (["--config.lora.quantize=nf4"], "lora.quantize=nf4: goes with lora.rank"),
        (["--config.train.rates.new=2"], "train.rates.new=2.0: nothing of that kind is among what trains"),
        (["--config.train.rates.ends=0.5", "--config.train.layers=copies"], "train.rates.ends=0.5: nothing of that"),
        (["--config.eval.rows=-1"], "eval.rows must be at least 0"),
        (["--config.step.loss_chunk=0"], "step.loss_chunk must be at least 1"),
        (["--config.train.rates.ends=-1"], "train.rates.ends=-1.0: must be a number and not negative"),
        (["--config.plan=upscale(base, 2:9)"], "layer"),
        (["--config.plan=upscale(other, 1:2)"], "plan: 'other': the one model there is, trained here, is called"),
        (["--config.plan=plan.yaml"], "plan='plan.yaml': for a base that is trained here, one line"),
        (["--config.data.seq_len=3"], "data"),
        (["--config.data.format=chatlm"], "data.format='chatlm': .*did you mean 'chatml'"),
        (["--config.data.files=nowhere.jsonl"], "data.files: .*nowhere.jsonl"),
        (["--config.pretrain.steps=0"], "base.path: "),
        (["--config.lora.rank=-1"], "lora"),
        (["--config.base.path=no/such/model", "--config.pretrain.steps=0"], "no/such/model, said to be 'base'"),
        (["--config.base.path=no/such/model"], r"model.* and 9 more: nothing reads it where base.path=no/such"),
    ],
)  # fmt: skip
def test_mistakes_write_nothing(runs, more, message):
    with pytest.raises(UserError, match=message) as caught:
        run(runs, "mistake", *more)
    assert "\n" not in str(caught.value)
    assert not (runs / "mistake").exists()


def test_a_bad_row_is_named(runs, tmp_path):
    path = tmp_path / "bad.jsonl"
    rows = (runs / "chats.jsonl").read_text().splitlines()
    path.write_text("\n".join([*rows[:40], '{"messages": [{"role": "assistant", "content": "first"}]}', *rows[40:]]))
    with pytest.raises(UserError, match=re.escape(f"{path}:41")):
        run(runs, "mistake", f"--config.data.files={path}")
    assert not (runs / "mistake").exists()
