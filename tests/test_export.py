"""`jaxup.export`: any model of a run, finished or not, and models written again."""

import dataclasses
import inspect
import json
import os
import re
import shutil
import types

import huggingface_hub
import numpy as np
import processes
import pytest
import safetensors.numpy
from plain import load_params
from runs import result

from jaxup import build, export
from jaxup.data.tokenizer import load_tokenizer
from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError
from jaxup.hub.load import load
from jaxup.hub.reader import load_config
from jaxup.model.spec import flatten
from jaxup.recipes.open import open_plan, open_recipe
from jaxup.training import stored


@pytest.fixture
def run(finished, tmp_path):
    """A copy without its export: what an unfinished run has. The tokens stay where they are."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    (tmp_path / "run" / "plan.yaml").unlink()
    return tmp_path / "run"


def main(*args):
    export.main(["export", *map(str, args)])


def refused(*args):
    with pytest.raises(UserError) as caught:
        main(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def weights(directory):
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(path).items()
    }


def test_the_last_target_is_what_the_run_exported(finished, run, tmp_path, torch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finished, _ = finished
    main(run, tmp_path / "out")
    ours, theirs = weights(tmp_path / "out"), weights(finished / "export")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    text = "def f(x):\n    return x"
    a, b = (AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (tmp_path / "out", finished / "export"))
    assert a == b
    assert (tmp_path / "out" / "jaxup_plan.yaml").read_text() == (finished / "plan.yaml").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert DepthPlan.from_yaml((finished / "plan.yaml").read_text()).strip() in card
    assert "target_2 at step 8 of the run run" in card
    losses = {name: result(run, name)["val_loss"] for name in ("target_2", "reference", "control")}
    said = dict(re.findall(r"^\| ([\w ]+) \| `(.*)` \|$", card, re.M))
    assert said == {
        "kind": "target: begun from layers of the reference, then trained", "data": "corpus",
        "steps": "8 of 8 rows of 32 tokens", "learning rate": "0.002, cosine", "tokens": "2,048",
        "parameters trained": "all", "validation loss": f"{losses['target_2']:.4f} nats per token",
        "validation loss of control": f"{losses['control']:.4f}",
        "validation loss of reference": f"{losses['reference']:.4f}",
    }  # fmt: skip
    # What the run exported itself says the same.
    card = (finished / "export" / "README.md").read_text()
    assert dict(re.findall(r"^\| ([\w ]+) \| `(.*)` \|$", card, re.M)) == said


def test_other_models_steps_dtypes_and_shards(run, tmp_path):
    main(run, tmp_path / "new", "--model", "reference")
    main(run, tmp_path / "old", "--model", "reference", "--step", "6", "--dtype", "bfloat16", "--max-shard-size", "9KB")
    main(run, tmp_path / "target")
    assert not np.array_equal(*(weights(tmp_path / d)["transformer.wte.weight"] for d in ("new", "target")))
    assert len(list((tmp_path / "old").glob("model-*"))) > 2
    new, old = (flatten(load_params(tmp_path / d, load_config(tmp_path / d))) for d in ("new", "old"))
    assert {str(leaf.dtype) for leaf in old.values()} == {"bfloat16"}
    moved = np.abs(old["embed_tokens"].astype(np.float32) - new["embed_tokens"]).max()
    # An update of Adam moves by the learning rate, more than rounding to bfloat16 does.
    assert 1e-4 < moved < 1e-1
    assert not (tmp_path / "new" / "jaxup_plan.yaml").exists()
    new, old = ((tmp_path / d / "README.md").read_text() for d in ("new", "old"))
    assert f"validation loss | `{result(run, 'reference')['val_loss']:.4f} nats per token`" in new
    assert "validation loss" not in old, "it was not measured at that step"
    assert "| steps | `6 of 8 rows of 32 tokens` |" in old
    (run / "config.json").unlink()
    main(run, tmp_path / "bare", "--model", "reference")
    assert "| parameters trained | `all` |" in (tmp_path / "bare" / "README.md").read_text()


def test_a_run_is_a_model(finished, run, tmp_path):
    """To all that takes one: its export, and whatever else of it has been put into files."""
    opened = open_recipe(f"upscale({finished[0]}, 1:2, copies=1)").models[str(finished[0])]
    assert opened.hf == json.loads((finished[0] / "export" / "config.json").read_text())
    build.main(["build", f"identity({finished[0]})", str(tmp_path / "built")])
    assert weights(tmp_path / "built").keys() == weights(finished[0] / "export").keys()
    with pytest.raises(UserError, match="overlaps with what is read"):
        build.main(["build", f"identity({finished[0]})", str(finished[0] / "export" / "built")])
    for name, message in {
        "": f"{run}: this run has no export yet; it is written when the run finishes; what it has so far is "
            f"{run}@control, {run}@reference, {run}@target_2",
        "@target_1": f"{run}@target_1: this run has no target_1; did you mean 'target_2'?",
        "@reference/7": f"{run}@reference/7: this run has no reference/7; did you mean 'reference/8'?",
        "@reference/6": f"{run}@reference/6: it is in the run's checkpoints, not in files; "
            f"`jaxup export {run}@reference/6` makes files of it, which this name then stands for",
    }.items():  # fmt: skip
        given = lambda name: open_recipe("identity(m)", models={"m": name})  # noqa: E731
        for use in (load_config, open_plan, load_tokenizer, given):
            with pytest.raises(UserError) as error:
                use(f"identity({run}{name})" if use is open_plan else f"{run}{name}")
            assert str(error.value).removeprefix("tokenizer: ") == message
    with pytest.raises(UserError, match=f"a run, and no model; its export is file://{finished[0]}/export"):
        load_config(f"file://{finished[0]}")
    main(f"{run}@reference/6")
    main(run, tmp_path / "out", "--model", "reference", "--step", "6")
    here = run / "models" / "reference" / "6"
    assert (here / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    model = load(f"{run}@reference/6")
    assert (model.config, model.origin.path) == (load_config(here), f"{run}@reference/6")
    assert load_tokenizer(f"{run}@reference/6").eos_token_id is not None
    plan = open_plan("identity(m)", models={"m": f"{run}@reference/6"})
    assert plan.sources == ((f"{run}@reference/6", 4),)
    assert "exists already" in refused(f"{run}@reference/6")
    assert "OUT is needed" in refused(run)
    assert "--model and --step go with a run alone" in refused(f"{run}@reference", tmp_path / "b", "--step", "6")
    with pytest.raises(UserError, match=r"reference` makes files"):
        load_config(f"{run}@reference")  # the newest


def test_help_is_quick():
    began = os.times()
    done = processes.run("-X", "importtime", "-m", "jaxup.export", "--help")
    assert not re.search(r"\| +(jax|numpy|transformers|flax)$", done.stderr, re.M)
    ended = os.times()
    assert ended.children_user + ended.children_system - began.children_user - began.children_system < 3  # it takes 0.1


def test_a_model_is_written_again(run, tmp_path):
    main(run, tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    main(tmp_path / "a", tmp_path / "b", "--dtype", "float16", "--max-shard-size", "10KB")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        np.testing.assert_array_equal(tensor.astype(np.float16), b[name])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    hf = [json.loads((tmp_path / d / "config.json").read_text()) for d in "ab"]
    assert hf[1]["eos_token_id"] == hf[0]["eos_token_id"] is not None
    assert "Layers as in" in (tmp_path / "b" / "README.md").read_text()


def test_a_run_of_the_first_format_is_read(run, tmp_path):
    """Its files had no number, and of a model's kind its name said enough."""
    main(run, tmp_path / "new")
    for path in run.glob("checkpoints/*/model.json"):
        about = json.loads(path.read_text())
        assert (about.pop("format"), about.pop("kind")) == (2, path.parent.name.partition("_")[0])
        path.write_text(json.dumps(about))
    main(run, tmp_path / "old")
    a, b = weights(tmp_path / "new"), weights(tmp_path / "old")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    path.write_text(json.dumps(about | {"format": 3}))
    assert "format 3, and 2 is the newest" in refused(run, tmp_path / "out", "--model", path.parent.name)


def test_what_is_wrong_is_one_line(run, tmp_path):
    out = tmp_path / "out"
    assert "no such" in refused(tmp_path / "nothing", out)
    (tmp_path / "empty").mkdir()
    assert "neither" in refused(tmp_path / "empty", out)
    (tmp_path / "early").mkdir()
    shutil.copy(run / "config.json", tmp_path / "early")
    assert "no checkpoints" in refused(tmp_path / "early", out)
    (tmp_path / "early" / "checkpoints").mkdir()
    assert "no checkpoints" in refused(tmp_path / "early", out)
    assert "did you mean 'target_2'" in refused(run, out, "--model", "target_1")
    assert "reference, target_2" in refused(run, out, "--model", "zzz")
    assert "there are 6, 8" in refused(run, out, "--step", "7")
    assert "--dtype" in refused(run, out, "--dtype", "int8")
    assert "--revision and --allow-pickle go with a model" in refused(run, out, "--revision", "main")
    assert "max_shard_size" in refused(run, out, "--max-shard-size", "5")
    before = sorted(run.rglob("*"))
    for place in (run, run / "checkpoints", run / "checkpoints" / "x", tmp_path):
        assert "overwrite" in refused(run, place, "--force")
    assert sorted(run.rglob("*")) == before
    (run / "checkpoints" / "target_2" / "model.json").rename(tmp_path / "model.json")
    assert "model.json" in refused(run, out)
    about = json.loads((tmp_path / "model.json").read_text())
    (run / "checkpoints" / "target_2" / "model.json").write_text(json.dumps(about | {"store": str(tmp_path / "gone")}))
    assert "gone with its token store" in refused(run, out)
    about["model"]["hidden_size"] = 32
    (run / "checkpoints" / "target_2" / "model.json").write_text(json.dumps(about))
    assert "the config needs [320, 32]" in refused(run, out)
    shutil.rmtree(run / "checkpoints" / "target_2")
    assert "choose with --model among control, reference" in refused(run, out)
    assert not out.exists()


def test_a_damaged_checkpoint_is_one_line(run, tmp_path):
    """In a process of its own: Orbax would say more, and later than its exception."""
    for path in (run / "checkpoints" / "reference" / "8").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")
    how = ("--model", "reference", "--step", "8")
    assert re.search(
        r"8: this checkpoint is damaged: \S+ is not what was written", refused(run, tmp_path / "out", *how)
    )
    (run / "checkpoints" / "reference" / "8" / "jaxup_digests.json").unlink()
    done = processes.run("-m", "jaxup.export", run, tmp_path / "out", *how, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"jaxup: warning: .*it has no digests.*\njaxup: .*cannot restore.*\n", done.stderr)
    assert not (tmp_path / "out").exists()


def refusal(kind, status):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("Client Error\n", response=response, server_message="not for you")


class Hub:
    """Stands for the Hub and `HfApi`, whose signatures it takes: the files of each model, and whether it is private."""

    def __init__(self):
        self.models, self.fault = {}, None

    def __getattr__(self, name):
        signature, call = (
            inspect.signature(getattr(huggingface_hub.hf_api.HfApi, name)),
            getattr(type(self), f"_{name}"),
        )

        def checked(*args, **how):
            signature.bind(None, *args, **how)
            if self.fault and name == self.fault[0]:
                raise refusal(huggingface_hub.errors.HfHubHTTPError, self.fault[1])
            return call(self, *args, **how)

        return checked

    def _model_info(self, repo):
        if repo not in self.models:
            raise refusal(huggingface_hub.errors.RepositoryNotFoundError, 404)
        files, private = self.models[repo]
        return types.SimpleNamespace(
            private=private, siblings=[types.SimpleNamespace(rfilename=file) for file in [".gitattributes", *files]]
        )

    def _create_repo(self, repo, private, exist_ok):
        assert exist_ok
        self.models.setdefault(repo, ({}, bool(private)))
        return f"https://hub/{repo}"

    def _create_commit(self, repo, operations, commit_message):
        for change in operations:
            if isinstance(change, huggingface_hub.CommitOperationAdd):
                with change.as_file() as file:
                    self.models[repo][0][change.path_in_repo] = file.read()
            else:
                del self.models[repo][0][change.path_in_repo]


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return hub


def test_an_export_is_pushed_as_it_is(finished, hub, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished[0] / "export", tmp_path / "run" / "export")
    (tmp_path / "run" / "checkpoints").mkdir()
    main(tmp_path / "run", "--push", "org/name", "--private")
    files = {path.name: path.read_bytes() for path in (finished[0] / "export").iterdir()}
    assert hub.models == {"org/name": (files, True)}
    said = capsys.readouterr().out
    assert re.search(rf"^pushing {len(files)} files, [\d.]+ KB, of \S+/run/export to org/name, private$", said, re.M)
    assert said.endswith("pushed to https://hub/org/name\n")

    (tmp_path / "run" / "export" / "README.md").write_text("by hand")
    (tmp_path / "run" / "export" / "notes.txt").write_text("mine")
    main(tmp_path / "run" / "export", "--push", "org/other")
    assert hub.models["org/other"] == (files | {"README.md": b"by hand"}, False)
    assert "notes.txt was not written by jaxup, and is not pushed" in capsys.readouterr().err

    hub.models["org/other"][0]["model-00001-of-00002.safetensors"] = b"of before"
    assert "org/other: holds" in refused(finished[0] / "export", out, "--push", "org/other", "--dtype", "bfloat16")
    assert not out.exists()
    main(finished[0] / "export", out, "--push", "org/other", "--dtype", "bfloat16", "--force")
    assert hub.models["org/other"][0] == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_push_that_is_refused_leaves_what_is_there(finished, hub, tmp_path, monkeypatch):
    export, out = finished[0] / "export", tmp_path / "out"
    hub.models["org/public"] = ({}, False)
    push = ("--push", "org/name")
    for wrong, *args in (
        ("OUT is needed, or --push", export),
        ("--private goes with --push", export, out, "--private"),
        ("--max-shard-size goes with OUT", export, *push, "--max-shard-size", "1GB"),
        ("^--push name: a model of the Hub is ORG/NAME", export, "--push", "name"),
        ("^--push org/na me: Repo id must use alphanumeric", export, "--push", "org/na me"),
        ("^--push org/public: is there, and public", export, out, "--push", "org/public", "--private"),
        ("has no jaxup_manifest.json; `jaxup export DIR OUT --push` writes one", tmp_path, *push),
        ("only a directory of this machine", "gs://bucket/there", *push),
    ):
        assert re.search(wrong, refused(*args))
    assert not out.exists()
    for call, code, wrong in (("model_info", 401, "may not write"), ("create_repo", 403, "may not write"),
                              ("create_commit", 500, "not for you")):  # fmt: skip
        hub.fault = (call, code)
        assert re.search(f"^--push org/name: .*{wrong}", refused(export, out, *push))
        assert out.exists() == (call != "model_info")
        if out.exists():
            assert hub.models.get("org/name", ({}, False))[0] == {}
            shutil.rmtree(out)
    hub.fault = None
    shutil.copytree(export, out)
    with open(out / "model.safetensors", "r+b") as file:
        file.write(b"x")
    assert "model.safetensors is not what was written" in refused(out, *push)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "there is no token; `hf auth login`" in refused(export, *push)
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "offline" in refused(export, *push)


def test_model_configs_come_back(tmp_path):
    from jaxup.model.config import LayerKind, ModelConfig, RopeScaling

    model = dataclasses.replace(
        ModelConfig.llama(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1, max_positions=8
        ),
        kinds=(LayerKind(), LayerKind(window=3)),
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
    )
    (tmp_path / "checkpoints" / "x").mkdir(parents=True)
    about = {"model": dataclasses.asdict(model), "store": "s", "plan": None}
    (tmp_path / "checkpoints" / "x" / "model.json").write_text(json.dumps(about))
    assert stored.read_stored(tmp_path, "x").model == model


def test_model_configs_of_before_layer_kinds_come_back():
    from jaxup.model.config import LayerKind, ModelConfig, depth_scaled

    model = ModelConfig.gpt2(vocab_size=9, hidden_size=8, num_layers=2, num_heads=2, max_positions=8, bias=True)
    old = dataclasses.asdict(model)
    del old["kinds"]
    for then, now in (
        ((None, None, False), (LayerKind(),)),
        ((3, None, False), (LayerKind(window=3),)),
        ((3, ["full_attention", "sliding_attention"], False), (LayerKind(), LayerKind(window=3))),
        ((None, None, True), depth_scaled(2)),
    ):
        fields = dict(zip(("sliding_window", "layer_types", "depth_scaled_attention"), then))
        assert ModelConfig.from_dict(old | fields) == dataclasses.replace(model, kinds=now)
