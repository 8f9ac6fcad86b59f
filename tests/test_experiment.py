"""Experiment files: found, read with variants, locked, overridden; every mistake is one line."""

import ast
import dataclasses
import functools
import importlib
import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxup.errors import ELSEWHERE, NEEDLESS, UserError
from jaxup.experiments.config import find, load, meant, section, variants
from jaxup.experiments.defaults import defaults
from jaxup.train import parse_args

ONE_LINE = r"\A[^\n]+\Z"


def test_found_in_configs_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("inherit_gpt2.py").parent.name == "configs"
    assert find("inherit_gpt2") == find("inherit_gpt2.py")
    (tmp_path / "inherit_gpt2.py").write_text("def get_config(arg): ...")
    assert find("inherit_gpt2.py").resolve() == tmp_path / "inherit_gpt2.py"


def test_a_derived_file_finds_the_shipped_one_from_anywhere(tmp_path, monkeypatch):
    shutil.copy(find("heal_tunguska.py"), tmp_path / "mine.py")
    (tmp_path / "heal.py").write_text("def get_config(arg): ...")
    expected = load("heal_tunguska.py:quick,lora").to_dict()
    monkeypatch.chdir(tmp_path)
    assert load("mine.py:quick,lora").to_dict() == expected
    with pytest.raises(UserError, match=r"no experiment file 'hael.py'; did you mean 'heal.py'"):
        find("hael.py", shipped=True)


def test_a_file_cannot_misspell_a_key_that_all_have(tmp_path):
    file = tmp_path / "mine.py"
    begin = (
        "from jaxup.experiments.defaults import defaults\ndef get_config(arg):\n c = defaults('inherit', small=True)\n"
    )
    file.write_text(f"{begin} c.notes = {{'seeds': 3}}\n c.eval.rows = 1\n return c\n")
    assert load(str(file)).notes.seeds == 3
    file.write_text(f"{begin} c.eval.row = 1\n return c\n")
    with pytest.raises(UserError, match=r'mine.py:4: AttributeError: Key "row" .* locked; did you mean "rows"'):
        load(str(file))


def test_every_kind_has_a_class_and_a_configuration_names_it(monkeypatch):
    from jaxup import experiments
    from jaxup.experiments.common import Experiment

    shipped = {load(file.name).experiment for file in find("heal.py").parent.glob("*.py")}
    assert shipped == experiments.KINDS.keys()
    for kind in experiments.KINDS:
        config = defaults(kind, small=True)
        if kind == "pretrain":
            config.model = ConfigDict()  # which files add
        assert issubclass(experiments.kind_of(config), Experiment)
    with pytest.raises(UserError, match="unknown kind ''; known: audit, continuous, heal, inherit, learn, pretrain"):
        experiments.kind_of(ConfigDict())


def test_overrides_keep_types():
    pairs = [
        ("optimizer.learning_rate", "1e-3"), ("steps", "7"), ("data.source", "3"), ("model.bias", "true"),
        ("inherit.parts", "attention,norms"), ("inherit.tolerance", "1"),
    ]  # fmt: skip
    c = load("inherit_gpt2.py:smoke", pairs)
    assert (c.optimizer.learning_rate, c.steps, c.data.source, c.model.bias) == (1e-3, 7, "3", True)
    assert c.inherit.parts == ("attention", "norms")
    assert c.inherit.tolerance == 1.0
    assert isinstance(c.inherit.tolerance, float)
    with pytest.raises(AttributeError, match="locked"):
        c.unheard_of = 1


def test_flags_with_and_without_equals_sign():
    args, overrides = parse_args(["train", "--config=a.py:x", "--config.a.b", "1", "--config.c=2=3", "--workdir", "w"])
    assert (args.config, args.workdir, overrides) == ("a.py:x", "w", [("a.b", "1"), ("c", "2=3")])


def test_variants():
    options = dict(size=("small", "large"), layers=0, deep=False)
    assert variants("", **options) == {"size": "small", "layers": 0, "deep": False}
    assert variants("large,layers=3,deep", **options) == {"size": "large", "layers": 3, "deep": True}


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        ("inherit_gpt.py", [], "did you mean 'inherit_gpt2.py'"),
        ("inherit_gpt2.py:smok", [], "unknown variant 'smok'; did you mean 'smoke'"),
        ("inherit_gpt2.py:layer=3", [], "did you mean 'layers'"),
        ("inherit_gpt2.py:layers=3,layers=4", [], "variants 'layers=3' and 'layers=4': choose one"),
        ("heal_tunguska.py:one_duplicate,five_duplicates", [], "'one_duplicate' and 'five_duplicates': choose one"),
        ("heal_tunguska.py:freeze_base=1:2,whole", [], "freeze_base trains the base, which is not up-scaled"),
        ("heal.py:lora,qlora", [], "variants lora and qlora: choose one"),
        ("heal.py:rank=3", [], "goes with lora or qlora"),
        ("inherit_gpt2.py:layers=x", [], "expected an int, not 'x'"),
        ("inherit_gpt2.py:ablation=attention", [], "did you mean 'attn'|known"),
        ("inherit_gpt2.py", [("optimizer.learning_rat", "1")], "did you mean 'learning_rate'"),
        ("heal.py", [("lr", "3")], r"--config.lr: unknown key 'lr'; did you mean --config.optimizer.learning_rate=3\?"),
        ("heal.py", [("data.steps", "3")], r"--config.data.steps: unknown key 'steps'; did you mean --config.steps=3"),
        ("inherit_gpt2.py", [("base_model", "a/b")], r"did you mean --config.reference.path=a/b\?"),
        ("inherit_gpt2.py", [("optimiser.learning_rate", "1")], "did you mean 'optimizer'"),
        ("inherit_gpt2.py", [("optimizer", "1")], "is a section"),
        ("inherit_gpt2.py", [("steps", "many")], "--config.steps: expected an int"),
        ("inherit_gpt2.py", [("steps.x", "1")], "unknown key 'x'"),
        ("inherit_gpt2.py", [("model.bias", "maybe")], "expected true or false"),
        ("heal.py:steps=3,epochs=1", [], "variants steps and epochs: choose one"),
        ("heal.py", [("data.replay", "0.1")], "data.replay=0.1: goes with data.phases; nothing reads it where"),
        ("inherit_gpt2.py", [("reference.revision", "main")],
         "reference.revision=main: goes with reference.path; nothing reads it where reference.path=$"),
        ("inherit_gpt2.py", [("reference.path", "DIR"), ("reference.steps", "9")], "reference.steps=9: nothing reads "
         "it where reference.path=DIR; it goes with reference.path=$"),
        ("inherit_llama.py", [("model.num_layers", "9")], "model.num_layers=9: nothing reads it where reference.path="),
        ("inherit_gpt2.py", [("inherit.which", "0,2"), ("inherit.layers", "2")], "inherit.layers=2: goes with "
         "inherit.which=first or middle or last; nothing reads it where inherit.which=0,2"),
        ("inherit_gpt2.py", [("optimizer.decay_fraction", "0.5")], "goes with optimizer.schedule=wsd; nothing reads"),
        ("heal.py", [("optimizer.end_learning_rate", "1e-6")], "optimizer.end_learning_rate=1e-06: goes with "
         "optimizer.schedule=linear or cosine or wsd; nothing reads it where optimizer.schedule=constant"),
        ("heal.py", [("step.spike_window", "5")], "step.spike_window=5: goes with step.spike_factor; nothing reads"),
        ("heal.py", [("sample.top_k", "5")], "top_k=5: goes with sample.temperature; nothing reads it where"),
        ("heal.py", [("lora.alpha", "5")], "lora.alpha=5.0: goes with lora.rank; nothing reads it where lora.rank=0"),
        ("heal.py:lora", [("lora.tile_size", "8")], "lora.tile_size=8: goes with lora.quantize; nothing reads it"),
        ("heal.py", [("lora.tile_size", "8"), ("lora.quantize", "nf4")], "=nf4, lora.tile_size=8: goes with lora.rank"),
        ("heal.py", [("data.val_files", "a"), ("data.val_fraction", "0.2")], "val_fraction=0.2: nothing reads it where "
         "data.val_files=a; it goes with data.val_files="),
        ("heal.py", [("pretrain.batch_size", "8")], "pretrain.batch_size=8: goes with pretrain.steps; nothing"),
        ("heal.py", [("model.num_layers", "8")], "model.num_layers=8: goes with pretrain.steps; nothing reads it"),
        ("heal.py:quick", [("base.path", "DIR"), ("pretrain.batch_size", "8")], "pretrain.batch_size=8: nothing reads "
         "it where base.path=DIR; it goes with base.path="),
        ("heal.py:quick", [("base.path", "DIR"), ("pretrain.steps", "8")], "pretrain.steps=8: nothing reads it where"),
        ("heal.py:quick", [("base.dtype", "float16")], "base.dtype=float16: nothing reads it where pretrain.steps=400; "
         "it goes with pretrain.steps=0"),
        ("inherit_gpt2.py", [("data.format", "chatml")], "data.format=chatml: goes with data.layout; nothing reads it"),
        ("heal.py:quick", [("pretrain.data.format", "chatml")], "goes with pretrain.data.layout; nothing reads it"),
        ("heal.py:quick", [("pretrain.optimizer.decay_fraction", "0.5")], "goes with pretrain.optimizer.schedule=wsd"),
    ],
)  # fmt: skip
def test_mistakes(spec, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load(spec, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "overrides"),
    [
        ("heal.py:quick", [("base.path", "DIR"), ("plan", "")]),  # what the variant says of a base to train
        ("heal.py:quick", [("base.path", "DIR"), ("pretrain.steps", "0"), ("pretrain.batch_size", "8")]),
        ("heal.py", [("lora.rank", "0"), ("lora.alpha", "8")]),  # one of several that a script tries
        ("heal.py", [("lora.rank", "4"), ("lora.alpha", "8")]),
        ("heal.py", [("data.format", "chatml")]),  # layouts are detected
        ("heal.py", [("sample.temperature", "0"), ("sample.top_k", "0")]),
        ("heal.py", [("lora.tile_size", "64"), ("base.dtype", "bfloat16")]),  # as it is by default
        ("inherit_gpt2.py", [("inherit.which", "0,2")]),
        ("inherit_gpt2.py:smoke", [("optimizer.schedule", "constant")]),
        ("inherit_llama.py:tiny", [("reference.path", "DIR")]),
    ],
)
def test_what_files_say_for_other_cases_is_no_mistake(spec, overrides):
    load(spec, overrides)


def test_a_file_that_says_what_nothing_reads(tmp_path):
    """Compared with the defaults, and with the files that it is made from where they say it for cases of their own."""
    file = tmp_path / "mine.py"

    def says(start, *lines):
        begin = "from jaxup.experiments.config import load\nfrom jaxup.experiments.defaults import defaults\n"
        file.write_text("\n ".join([f"{begin}def get_config(arg):", f"c = {start}", *lines, "return c"]))

    says("defaults('heal', small=True)", "c.lora.alpha = 3.0")
    with pytest.raises(UserError, match=r"lora.alpha=3.0: goes with lora.rank; nothing reads it where lora.rank=0"):
        load(str(file))
    assert load(str(file), [("lora.rank", "2")]).lora.alpha == 3
    says("load('heal.py:quick', shipped=True)", "c.base.path = 'DIR'")
    load(str(file))
    says("load('heal.py:quick', shipped=True)", "c.base.path = 'DIR'", "c.pretrain.batch_size = 3")
    with pytest.raises(UserError, match=r"pretrain.batch_size=3: nothing reads it where base.path=DIR"):
        load(str(file))


def test_of_a_run_only_what_is_read_must_stay(tmp_path):
    """A run goes on whose files said more, and what is changed then is looked at like any override."""
    from jaxup.experiments.resuming import check_config, load_run
    from jaxup.training.rundir import write_json

    config = load("heal.py", [("base.path", "DIR")])
    stored = config.to_dict()
    stored["lora"]["tile_size"], stored["pretrain"]["data"]["tokenizer"] = 32, "bpe:2048"
    write_json(tmp_path / "config.json", stored)
    assert check_config(tmp_path, config) == []
    assert load_run(tmp_path)[0].lora.tile_size == 32
    with pytest.raises(UserError, match=r"lora.alpha=2.0: goes with lora.rank; nothing reads it where lora.rank=0"):
        load_run(tmp_path, [("lora.alpha", "2")])
    stored["base"]["dtype"] = "float16"
    write_json(tmp_path / "config.json", stored)
    with pytest.raises(UserError, match=r"another configuration: base.dtype was 'float16', now ''; choose"):
        check_config(tmp_path, config)


BEGIN = "from jaxup.experiments.config import load\ndef get_config(arg=''):\n c = load('heal.py', shipped=True)\n "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef get_config(:\n", r"mine.py:2: invalid syntax$"),
        ("\nimport nosuchmodule", "mine.py:2: ModuleNotFoundError: No module named 'nosuchmodule'$"),
        ("from jaxup.experiments.config import laod", r"mine.py:1: ImportError: cannot import name 'laod'"),
        ("x = 1", "mine.py defines no get_config"),
        ("\0", "mine.py:1: source code string cannot contain null bytes$"),
        ("def get_config(arg, more): ...", "mine.py:1: TypeError: get_config.. missing 1 required positional argument"),
        ("x = 1\ny = z", "mine.py:2: NameError: name 'z' is not defined$"),
        (f"{BEGIN}return d", "mine.py:4: NameError: name 'd' is not defined$"),
        (f"{BEGIN}c.log.intervals = 1\n return c", "mine.py:4: AttributeError: Key .* config is locked; did you mean"),
        (f"{BEGIN}c.steps = 'x'\n return c", "mine.py:4: TypeError: Could not override field 'steps'"),
        (f"{BEGIN}return c['x']", "mine.py:4: KeyError: 'x'$"),
        (f"{BEGIN}pass", "mine.py: get_config returns a NoneType, and no ConfigDict$"),
        (f"{BEGIN}return load('hael.py', shipped=True)", "did you mean 'heal.py'"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "mine.py"), "mine.py"):
        with pytest.raises(UserError, match=message) as error:
            load(name)
        assert "\n" not in str(error.value)


def test_variants_that_a_file_does_not_read_are_refused(tmp_path):
    file = tmp_path / "mine.py"
    for head in ("arg: str = ''", ""):
        file.write_text(BEGIN.replace("arg=''", head) + "return c")
        assert load(str(file)) == load("heal.py")
        with pytest.raises(UserError, match=r"mine.py:quick: \S*mine.py reads no variants, and so not 'quick'$"):
            load(f"{file}:quick")
    file.write_text(BEGIN.replace("'heal.py'", "'heal.py:' + arg") + "return c")
    assert load(f"{file}:quick") == load("heal.py:quick")
    with pytest.raises(UserError, match=r"heal.py:nope: unknown variant 'nope'; known: default, small, quick"):
        load(f"{file}:nope")


@pytest.mark.parametrize(
    "argv", [["t"], ["t", "--confg=x"], ["t", "--config=x", "extra"], ["t", "--config=x", "--config.a"]]
)
def test_bad_flags(argv):
    with pytest.raises(UserError, match=ONE_LINE):
        parse_args(argv)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --steps 10", "unknown argument '--steps'; did you mean --config.steps=10?"),
        ("train heal.py:lr=1e-5", "unknown argument 'heal.py:lr'; did you mean --config=heal.py:lr=1e-5?"),
        ("train inherit_gpt2", "unknown argument 'inherit_gpt2'; did you mean --config=inherit_gpt2?"),
        ("train runs/a", "unknown argument 'runs/a'; did you mean --resume=runs/a?"),
        (f"train {'x' * 999}", "x'; see --help"),
        ("train runs/b", "unknown argument 'runs/b'; see --help"),
        ("train steps=10", "unknown argument 'steps'; did you mean --config.steps=10?"),
        ("train --confg.steps=3", "unknown argument '--confg.steps'; did you mean --config.steps=3?"),
        ("train --config=heal.py --learning-rate 1e-4", "did you mean --config.optimizer.learning_rate=1e-4?"),
        ("train --config=heal.py --model_name_or_path=a/b", "did you mean --config.base.path=a/b?"),
        ("train --per_device_train_batch_size 4", "did you mean --config.batch_size=4?"),
        ("train --lora_r --output_dir=x", "unknown argument '--lora_r'; did you mean --config.lora.rank?"),
        ("train --output_dir x", "unknown argument '--output_dir'; did you mean '--workdir'?"),
        ("train --config=x --wrkdir=y", "unknown argument '--wrkdir'; did you mean '--workdir'?"),
        ("train --nothing-like-it", "unknown argument '--nothing-like-it'; see --help"),
        ("build r.yaml OUT --lazy-unpickle --cuda", "unknown argument '--lazy-unpickle'; leave it out: tensors are"),
        ("build r.yaml OUT --copy-tokenizer", "'--copy-tokenizer'; leave it out: the tokenizer comes along"),
        ("build --out-shard-size=5B r.yaml OUT", "'--out-shard-size'; did you mean '--max-shard-size'?"),
        ("build r.yaml OUT --dtype bf16", "(choose from 'float32', 'bfloat16', 'float16'); did you mean 'bfloat16'?"),
        ("build r.yaml OUT --dtype int8", "(choose from 'float32', 'bfloat16', 'float16'); see --help"),
        ("generate m --max_new_tokens 4", "'--max_new_tokens'; did you mean '--max-tokens'?"),
        ("prepare x --tokenizer y --max-seq-length 4", "'--max-seq-length'; did you mean '--seq-len'?"),
    ],
)  # fmt: skip
def test_words_of_other_tools(command, message, tmp_path, monkeypatch):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    name, *words = command.split()
    with pytest.raises(UserError) as error:
        importlib.import_module(f"jaxup.{name}").parse_args([name, *words])
    # Newer versions of Python leave out the quotes of choices.
    assert message.replace("'", "") in str(error.value).replace("'", "")
    assert "\n" not in str(error.value)


def test_words_of_other_tools_name_what_is_here():
    """What is suggested is a key, a value or a flag that there is."""
    flags = {"max_shard_size", "dtype", "max_tokens", "workdir", "resume", "tokenizer"}
    ours = {word for word in ELSEWHERE.values() if "float" not in word} - flags
    assert [word for word in ours if not meant(word)] == []
    assert not ELSEWHERE.keys() & NEEDLESS.keys()


GPT2 = ["", "smoke", "medium", "large,ablation=attn", "xl,control=2,depth_scaled", "layers=3"]
GPT2 += ["ablation=mlp", "ablation=no_norm", "seed=1"]
LLAMA = ["", "tiny", "smoke", "sweep", "tiny,sweep", "smoke,sweep", "code", "layers=8,control=2", "tiny,code,seed=1"]


HEAL = [
    "",
    "small",
    "quick",
    "smoke",
    "lr=1e-6,epochs=1",
    "steps=5,layers=originals,freeze=0:4",
    "lora,rank=8",
    "qlora",
]
TUNGUSKA = ["", "quick", "smoke", "one_duplicate", "five_duplicates,quick", "interleaved,whole", "lr=1e-4", "epochs=3"]
TUNGUSKA += ["lora", "quick,qlora", "freeze_originals", "freeze_base=19:41", "quick,freeze_base=0:1+4:6", "undercook=5"]
SMOKE = {"inherit_gpt2.py": GPT2, "inherit_llama.py": LLAMA, "heal.py": HEAL, "heal_tunguska.py": TUNGUSKA}


def a_mesh():
    from jaxup.training.sharding import MeshConfig, make_mesh

    return make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))


def shipped(*files):
    """The variants of these files; those by name are among the default tests, as each is traced by itself."""
    named = {
        "inherit_gpt2.py:", "inherit_gpt2.py:xl,control=2,depth_scaled", "inherit_llama.py:sweep", "heal.py:qlora",
        "heal.py:steps=5,layers=originals,freeze=0:4", "heal_tunguska.py:", "heal_tunguska.py:one_duplicate",
        "heal_tunguska.py:interleaved,whole", "heal_tunguska.py:quick,freeze_base=0:1+4:6",
    }  # fmt: skip
    specs = [f"{file}:{variant}" for file in files for variant in SMOKE[file]]
    return pytest.mark.parametrize(
        "spec", [pytest.param(spec, marks=[pytest.mark.slow] * (spec not in named)) for spec in specs]
    )


@shipped("inherit_gpt2.py", "inherit_llama.py")
def test_every_shipped_variant_builds_its_settings(spec):
    """Shapes and optimizers of all variants are traced, without allocating anything."""
    from jaxup.depth.result import result_config
    from jaxup.experiments.common import new_model, read_settings
    from jaxup.experiments.inherit import Inherit, InheritConfig, check
    from jaxup.training.selection import EVERYTHING

    config = load(spec)
    with config.unlocked():
        config.reference.path = ""  # there is no network: the `model` section has the same sizes
    settings = read_settings(config)
    Inherit(config, settings, a_mesh())
    reference = new_model(config.model, 512)
    for plan in check(section(InheritConfig, config.inherit), reference):
        model = result_config(plan, {"reference": reference})
    trace(model, settings, EVERYTHING, config.data.seq_len)


@shipped("heal.py", "heal_tunguska.py")
def test_every_shipped_healing_builds_its_settings(spec, tmp_path):
    import jax

    from jaxup.depth.result import result_config
    from jaxup.experiments.common import read_settings
    from jaxup.experiments.heal import Heal

    config = load(spec)
    if config.lora.rank:
        pytest.importorskip("qwix")
    if not config.pretrain.steps:
        # There is no network: the sizes of Mistral-Small-Instruct-2409, as its config.json has them.
        (tmp_path / "config.json").write_text(json.dumps({
            "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "head_dim": 128,
            "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 32768, "vocab_size": 32768,
            "num_attention_heads": 48, "num_hidden_layers": 56, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
        }))  # fmt: skip
        config.base.path, config.data.files = str(tmp_path), "chats.jsonl"
    settings = read_settings(config)
    job = Heal(config, settings, mesh := a_mesh())
    model = result_config(job._plan, job._models)
    assert model.num_layers == {"heal_tunguska.py:": 99, "heal_tunguska.py:one_duplicate": 77}.get(
        spec, model.num_layers
    )
    with jax.set_mesh(mesh):
        trace(model, settings, job._select(model, job._plan), config.data.seq_len)


@pytest.mark.parametrize(("study", "count"), [("grid", 12), ("schedule", 6), ("phases", 3), ("methods", 3)])
def test_all_cells_of_the_recipe_can_begin(study, count):
    from jaxup.experiments.cells import configured
    from jaxup.experiments.common import read_settings
    from jaxup.experiments.heal import Heal

    assert len(load(f"recipe.py:{study}").study.cells) == {"grid": 24}.get(study, count)
    config, mesh = load(f"recipe.py:quick,{study}"), a_mesh()
    assert config.study.seeds == (0, 1, 2)
    assert len(config.study.cells) == count
    for cell in config.study.cells:
        made = configured(config, cell, 1)
        Heal(made, read_settings(made), mesh)
        # The same base, data and number of samples, whatever the batch.
        assert (made.seed, made.epochs, made.steps, made.pretrain, made.data.files) == (
            1, 1, 0, config.pretrain, config.data.files
        )  # fmt: skip


# ---- options that nothing reads

ROOT = Path(find("heal.py")).parent.parent


def flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed(value):
    """Another one of its type; one that will not do is refused by what reads it."""
    match value:
        case bool():
            return not value
        case str():
            return f"{value}x"
        case tuple():
            return (*value, "x")
    return value + type(value)(1)


def as_text(value):
    return ",".join(value) if isinstance(value, tuple) else str(value)


def effect(config):
    """What an experiment makes of its configuration before it looks at data."""
    from jaxup.experiments import kind_of
    from jaxup.experiments.common import new_model, read_settings

    settings = read_settings(config)
    made = vars(kind_of(config)(config, settings, a_mesh()))
    own = ("_config", "_settings", "_mesh")
    return settings, new_model(config.model), {k: v for k, v in made.items() if k not in own}


def asked(config, place):
    """What the floors below are asked when the experiment is carried out, where none of them does anything."""
    import jax

    from jaxup.data.open import Data
    from jaxup.experiments import common, heal, inherit, on_base, run
    from jaxup.training import sharding
    from jaxup.training.run import Result, Run

    seen = []

    def shown(value):
        if isinstance(value, Run):
            return value.data.store, *value.course
        plain = dataclasses.is_dataclass(value) or isinstance(value, (int, float, str, tuple, np.ndarray))
        return repr(value) if plain else type(value).__name__

    def note(name, answer=None):
        def called(*args, **kwargs):
            seen.append((name, *map(shown, (*args, *kwargs.values()))))
            return answer(*args, **kwargs) if callable(answer) and not isinstance(answer, mock.Mock) else answer

        return called

    result = Result(name="", kind="", origin="", layers=1, params=1, steps=1, tokens=1, val_loss=1.0, seconds=0.0,
                    sample="")  # fmt: skip
    rows = {"vocab_size": 512, "seq_len": 32, "train_rows": 64, "validation_tokens": 64, "chat_template": None,
            "epoch_rows": 64, "ends": lambda: iter([64]), "phases": None, "validation": None}  # fmt: skip
    tokenizer = mock.Mock(side_effect=note("tokenizer", {"input_ids": [1, 2]}), chat_template=None, eos_token_id=0)
    text = mock.Mock(Data, tokenizer=tokenizer, store="text", **rows)
    text.whole = lambda: mock.Mock(Data, store="all", **rows)
    chat = mock.Mock(Data, tokenizer=tokenizer, store="chat", report=str, example=str, **rows)
    floors = {
        run: {"Processes": run.Processes}, sharding: {"make_mesh": sharding.make_mesh},
        common.sampling: {"generate": ()}, on_base.picture: {"png": b""},
        common.Experiment: {"_finish": lambda self, run, *_, **__: run.sample(self._model, {})},
        on_base.OnBase: {"_before": {}, "_vocabulary_files": {}}, jax: {"jit": lambda *_, **__: lambda *_: {}},
    }  # fmt: skip
    made = {"train_model": result, "train_fresh": result, "measured": result, "load_trained": {}}
    floors |= {inherit: made, on_base: {**made, "open_text": text}, common: {"open_text": text}}
    floors |= {heal: {"open_data": chat, "check_files": None}}
    with pytest.MonkeyPatch.context() as patch:
        for floor, names in floors.items():
            for name, answer in names.items():
                patch.setattr(floor, name, note(name, answer))
        run.run_experiment(config, place, "title")
    return seen


@pytest.mark.parametrize("file", ["inherit_gpt2.py", "heal.py", *(pytest.param(f"{n}.py", marks=pytest.mark.slow)
                                  for n in ("inherit_llama", "heal_tunguska"))])  # fmt: skip
def test_every_key_is_read(file, tmp_path):
    """Changed, it makes another experiment, or one that asks for something else when carried out; or is refused."""
    base = load(f"{file}:smoke")
    flattened = dict(flat(base.to_dict()))
    assert {key for variant in SMOKE[file] for key, _ in flat(load(f"{file}:{variant}").to_dict())} == flattened.keys()
    usual, asks, unread = effect(base), asked(base, tmp_path / "base"), []
    assert asks == asked(load(f"{file}:smoke"), tmp_path / "again")
    for key, value in flattened.items():
        try:
            config = load(f"{file}:smoke", [(key, as_text(changed(value)))])
            if effect(config) == usual and asked(config, tmp_path / key) == asks:
                unread.append(key)
        except (UserError, ImportError):
            continue
    assert unread == []


def test_a_target_that_grows_is_one_more_to_train(tmp_path):
    seen = asked(load("inherit_gpt2.py:smoke", [("inherit.tolerance", "-1.0")]), tmp_path / "run")
    trained = [(name, run[1:]) for run, name, *_ in (a[1:] for a in seen if a[0] in ("train_fresh", "train_model"))]
    first, grown = ("reference", "target_2", "control"), ("reference", "target_2", "target_4", "control")
    assert trained == [("'reference'", first), ("'target_2'", first), ("'target_4'", grown), ("'control'", grown)]


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ([("inherit.start", "random")], ["target_2"]),
        ([("inherit.start", "stacked")], ["half", "target_2", "control"]),
        ([("inherit.start", "random"), ("inherit.distill.alpha", "0.6")], ["reference", "target_2"]),
        ([("inherit.which", "0,1,0,1")], ["reference", "target_4", "control"]),
        ([("inherit.start", "half_width"), ("inherit.which", "middle")], ["reference", "target_2", "control"]),
    ],
)
def test_only_what_is_needed_is_trained(changes, trained, tmp_path):
    seen = asked(load("inherit_gpt2.py:smoke", changes), tmp_path / "run")
    names = [name.strip("'") for _, _, name, *_ in (a for a in seen if a[0] in ("train_fresh", "train_model"))]
    assert names == trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inherit.start": "staked"}, "inherit.start: unknown 'staked'; did you mean 'stacked'?"),
        (
            {"inherit.start": "stacked", "inherit.layers": "3"},
            "inherit.start=stacked: 3 layers are no model of half of them twice; 2 or 4 would be",
        ),
        ({"inherit.start": "random", "inherit.layers": "5"}, "inherit: 5 layers asked of 'reference', which has 4"),
        (
            {"inherit.start": "half_width", "model.num_heads": "1"},
            "inherit.start=half_width: num_heads=1 cannot be halved",
        ),
        (
            {"inherit.start": "random", "inherit.control": "2"},
            "inherit.control=2: goes with inherit.start=inherited or ",
        ),
        (
            {"inherit.start": "stacked", "reference.steps": "5"},
            "reference.steps=5: goes with inherit.start=inherited or half_width; nothing reads it where "
            "inherit.start=stacked",
        ),
        (
            {"inherit.start": "stacked", "inherit.which": "last"},
            "inherit.which=last: goes with inherit.start=inherited",
        ),
        ({"inherit.distill.alpha": "1.5"}, "inherit.distill: alpha=1.5: must be a share from 0, which is no teacher"),
        (
            {"inherit.distill.alpha": "0.5", "inherit.distill.temperature": "0"},
            "inherit.distill: temperature=0.0: must be a positive number",
        ),
        ({"inherit.distill.temperature": "2"}, "inherit.distill.temperature=2.0: goes with inherit.distill.alpha"),
    ],
)
def test_contestants_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        effect(load("inherit_gpt2.py:smoke", list(changes.items())))


def test_the_default_answers_to_a_control_of_twice_the_steps():
    given = {variant: load(f"inherit_gpt2.py:{variant}").inherit.control for variant in (
        "", "seed=1", "control=1", "control=0", "smoke", "grow", "medium", "medium,control=2")}  # fmt: skip
    assert list(given.values()) == [2, 2, 1, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("size", ["", "smoke,", "medium,", "large,", "xl,"])
def test_every_contestant_builds(size):
    from jaxup.experiments.cells import configured
    from jaxup.experiments.inherit import InheritConfig, check

    config = load(f"inherit_gpt2.py:{size}baselines")
    assert config.study.seeds == (0, 1, 2)
    assert config.study.control in config.study.cells
    begins = {}
    for name in config.study.cells:
        cell = configured(config, name)
        _, model, _ = effect(cell)
        (plan,) = check(section(InheritConfig, cell.inherit), model)
        begins[name] = cell.inherit.start, [row.layer for row in plan.rows]
    layers = {"": 4, "smoke,": 2, "medium,": 16, "large,": 18, "xl,": 24}[size]
    half = [*range(layers // 2)] * 2
    assert begins["first"] == ("inherited", [*range(layers)])
    assert (begins["hybrid"], begins["stacked"]) == (("inherited", half), ("stacked", half))
    assert "half_width" not in begins or len(begins["half_width"][1]) == config.model.num_layers


def test_every_setting_is_used():
    """Of what sections become: each field is read somewhere."""
    from jaxup.data.config import DataConfig
    from jaxup.experiments.inherit import InheritConfig
    from jaxup.model.config import Compute
    from jaxup.training.lora import LoraConfig
    from jaxup.training.optimizer import OptimizerConfig
    from jaxup.training.run import Settings
    from jaxup.training.selection import TrainConfig
    from jaxup.training.step import StepConfig

    used = {
        node.attr for path in (ROOT / "jaxup").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }  # fmt: skip
    kinds = (DataConfig, InheritConfig, Compute, LoraConfig, Settings, OptimizerConfig, TrainConfig, StepConfig)
    assert [field.name for kind in kinds for field in dataclasses.fields(kind) if field.name not in used] == []


# (a key of the step, its value, what else has to be so for it to count). The rows are as short as one block of
# `blocked`, which is what `xla` makes of them.
PROGRAMS = [
    ("optimizer.learning_rate", 3e-3, {}), ("optimizer.end_learning_rate", 3e-5, {}),
    ("optimizer.schedule", "linear", {}), ("optimizer.warmup_steps", 3, {}),
    ("optimizer.decay_fraction", 0.5, {"optimizer.schedule": "wsd"}), ("optimizer.b1", 0.8, {}),
    ("optimizer.b2", 0.9, {}), ("optimizer.eps", 1e-6, {}), ("optimizer.weight_decay", 0.2, {}),
    ("optimizer.clip_norm", 2.0, {}), ("step.accumulation", 2, {}), ("step.loss_chunk", 4, {}),
    ("step.noise_scale", True, {"step.accumulation": 2}), ("step.z_loss", 0.1, {}),
    ("step.spike_factor", 2.0, {}), ("step.spike_window", 5, {"step.spike_factor": 2.0}),
    ("step.ema", 0.9, {}),
    ("compute.dtype", "bfloat16", {}), ("compute.attention", "splash", {}), ("compute.remat", "full", {}),
    ("compute.unroll", 1, {}),
]  # fmt: skip


SCHEDULE = {f"optimizer.{key}" for key in
            ("learning_rate", "end_learning_rate", "schedule", "warmup_steps", "decay_fraction")}  # fmt: skip


@pytest.mark.slow
def test_every_key_of_the_step_makes_another_program():
    import jax

    from jaxup.experiments.common import read_settings
    from jaxup.model.config import ModelConfig
    from jaxup.model.decoder import abstract
    from jaxup.training.optimizer import learning_rate, make_optimizer
    from jaxup.training.step import TrainState, make_train_step

    model = ModelConfig.llama(
        num_layers=2, hidden_size=4, intermediate_size=4, num_heads=1, num_kv_heads=1, max_positions=8, vocab_size=8
    )
    batch = {k: jax.ShapeDtypeStruct((2, 8), d) for k, d in
             (("tokens", "int32"), ("targets", "int32"), ("loss_weights", "float32"))}  # fmt: skip

    @functools.cache
    def program(*changes):
        config = load("inherit_gpt2.py:smoke")
        for key, value in changes:
            section, name = key.split(".")
            config[section][name] = value
        settings = read_settings(config)
        optimizer = make_optimizer(settings.optimizer)
        params = abstract(model)[1]
        state = TrainState(
            params, jax.eval_shape(optimizer.init, params), *(jax.ShapeDtypeStruct((), d) for d in ("int32", "bool")),
            jax.eval_shape(settings.step.spikes), params if settings.step.ema else None,
        )  # fmt: skip
        step = make_train_step(model, settings.compute, optimizer, settings.step)
        schedule = jax.make_jaxpr(lambda count: 1.0 * learning_rate(settings.optimizer, 20)(count))(np.int32(0))
        return str(jax.make_jaxpr(step)(state, batch, np.float32(0))), str(schedule)

    sections = load("inherit_gpt2.py:smoke")
    named = {f"{section}.{key}" for section in ("optimizer", "step", "compute") for key in sections[section]}
    assert {key for key, _, _ in PROGRAMS} == named
    for key, value, context in PROGRAMS:
        others = tuple(context.items())
        changed = [a != b for a, b in zip(program(*others, (key, value)), program(*others), strict=True)]
        # A schedule is asked by the loop: runs which differ in it have one program.
        assert changed == ([False, True] if key in SCHEDULE else [True, False]), key


@functools.cache  # variants of seeds and of controls train the same
def trace(model, settings, selection, seq_len):
    import jax

    from jaxup.model.decoder import abstract
    from jaxup.training.optimizer import make_optimizer
    from jaxup.training.step import TrainState, make_train_step

    optimizer = make_optimizer(settings.optimizer, selection.rates)
    params, frozen = abstract(model)[1], ()
    if selection.partition is not None:
        params, *frozen = jax.eval_shape(selection.partition.split, params)
    state = TrainState(
        params, jax.eval_shape(optimizer.init, params), *(jax.ShapeDtypeStruct((), d) for d in ("int32", "bool"))
    )
    shape = (settings.batch_size, seq_len)
    batch = {k: jax.ShapeDtypeStruct(shape, d) for k, d in
             (("tokens", "int32"), ("targets", "int32"), ("loss_weights", "float32"))}  # fmt: skip
    step = make_train_step(model, settings.compute, optimizer, settings.step, selection.partition)
    out, _ = jax.eval_shape(step, state, batch, np.float32(0), *frozen)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), out) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


def test_the_low_data_recipe_is_the_papers():
    """arXiv 2404.08634 and its released code; the sizes of OpenLLaMA-3B as its config.json has them."""
    from jaxup.experiments.common import new_model
    from jaxup.experiments.inherit import InheritConfig, check
    from jaxup.families import config_from_hf
    from jaxup.model.spec import count_params

    c = load("inherit_llama.py")
    assert (c.reference.path, c.reference.allow_pickle) == ("openlm-research/open_llama_3b", True)
    model = new_model(c.model)
    assert model == config_from_hf({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 3200,
        "intermediate_size": 8640, "max_position_embeddings": 2048, "num_attention_heads": 32,
        "num_hidden_layers": 26, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": 32000,
    })  # fmt: skip
    assert count_params(model) == 3_426_473_600  # as transformers counts it
    (plan,) = check(section(InheritConfig, c.inherit), model)
    assert [row.layer for row in plan.rows] == list(range(13))
    assert (plan.embed_tokens, plan.norm, plan.lm_head) == ("reference", None, "reference")
    rows = round(c.data.tokens / c.data.seq_len)
    assert (c.epochs * rows, -(-c.epochs * rows // c.batch_size)) == (3_906_248, 61_036)
    assert c.batch_size * c.data.seq_len == 131_072
    o, code = c.optimizer, load("inherit_llama.py:code").optimizer
    assert (o.learning_rate, o.schedule, o.warmup_steps, o.weight_decay) == (3e-4, "cosine", 1000, 0.1)
    assert (code.learning_rate, code.schedule, code.warmup_steps, code.weight_decay) == (3e-4, "constant", 1000, 0.01)
    assert (code.b1, code.b2, code.clip_norm) == (0.9, 0.999, 0)
    assert load("inherit_llama.py:code").inherit.parts == ("attention", "mlp", "norms", "lm_head")
    assert load("inherit_llama.py:sweep").inherit.sweep == "4,6,8,10,13,16,18,20"


@pytest.mark.parametrize(
    ("rows", "tokens", "steps", "said"),
    [
        (16, 1000, 30, ""),
        (12, 1000, 30, "batch_size=16 rows, and there are 12 for training: 30 steps see each 40 times"),
        (24, 1000, 3, "epochs=2 of 24 rows are 3 steps, which change little; more epochs, or a smaller batch_size"),
        (16, 999, 30, "the validation loss is of 999 tokens, and uncertain"),
    ],
)
def test_too_few_data_are_said(rows, tokens, steps, said, capsys):
    from jaxup.experiments.heal import Heal

    experiment = object.__new__(Heal)
    experiment._config, experiment._settings = mock.Mock(epochs=2), mock.Mock(batch_size=16)
    experiment.data, experiment.steps = mock.Mock(train_rows=rows, validation_tokens=tokens), steps
    experiment._say_little()
    heard = capsys.readouterr().err
    assert said in heard
    assert bool(said) == bool(heard)
