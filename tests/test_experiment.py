"""Experiment files: found, read with variants, locked, overridden; every mistake is one line."""

import pytest

from jaxup import experiment
from jaxup.errors import UserError
from jaxup.train import parse_args

ONE_LINE = r"\A[^\n]+\Z"


def test_found_in_configs_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert experiment.find("inherit_gpt2.py").parent.name == "configs"
    assert experiment.find("inherit_gpt2") == experiment.find("inherit_gpt2.py")
    (tmp_path / "inherit_gpt2.py").write_text("def get_config(arg): ...")
    assert experiment.find("inherit_gpt2.py").resolve() == tmp_path / "inherit_gpt2.py"


def test_overrides_keep_types():
    pairs = [
        ("optimizer.learning_rate", "1e-3"), ("steps", "7"), ("data.source", "3"), ("model.bias", "true"),
        ("inherit.parts", "attention,norms"), ("inherit.tolerance", "1"),
    ]  # fmt: skip
    c = experiment.load("inherit_gpt2.py:smoke", pairs)
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
    assert experiment.variants("", **options) == {"size": "small", "layers": 0, "deep": False}
    assert experiment.variants("large,layers=3,deep", **options) == {"size": "large", "layers": 3, "deep": True}


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        ("inherit_gpt.py", [], "did you mean 'inherit_gpt2.py'"),
        ("inherit_gpt2.py:smok", [], "unknown variant 'smok'; did you mean 'smoke'"),
        ("inherit_gpt2.py:layer=3", [], "did you mean 'layers'"),
        ("inherit_gpt2.py:layers=x", [], "expected an int, not 'x'"),
        ("inherit_gpt2.py:ablation=attention", [], "did you mean 'attn'|known"),
        ("inherit_gpt2.py", [("optimizer.learning_rat", "1")], "did you mean 'learning_rate'"),
        ("inherit_gpt2.py", [("optimiser.learning_rate", "1")], "did you mean 'optimizer'"),
        ("inherit_gpt2.py", [("optimizer", "1")], "is a section"),
        ("inherit_gpt2.py", [("steps", "many")], "--config.steps: expected an int"),
        ("inherit_gpt2.py", [("steps.x", "1")], "unknown key 'x'"),
        ("inherit_gpt2.py", [("model.bias", "maybe")], "expected true or false"),
    ],
)
def test_mistakes(spec, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        experiment.load(spec, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("x = 1\ndef get_config(:\n", r"mine.py:2: invalid syntax"), ("import nosuchmodule", "mine.py: No module named"),
     ("x = 1", "defines no get_config")],
)  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        experiment.load(str(tmp_path / "mine.py"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv", [["t"], ["t", "--confg=x"], ["t", "--config=x", "extra"], ["t", "--config=x", "--config.a"]]
)
def test_bad_flags(argv):
    with pytest.raises(UserError, match=ONE_LINE):
        parse_args(argv)


@pytest.mark.parametrize(
    "variant", ["", "smoke", "medium", "large,ablation=attn", "xl,control=2,depth_scaled", "layers=3"]
)
def test_every_shipped_variant_builds_its_settings(variant):
    """Shapes and optimizers of all variants are traced, without allocating anything."""
    import jax

    from jaxup.depth.recipes import inherit
    from jaxup.model.config import ModelConfig
    from jaxup.model.decoder import abstract
    from jaxup.train import read_settings
    from jaxup.training.optimizer import make_optimizer
    from jaxup.training.step import TrainState, make_train_step

    config = experiment.load(f"inherit_gpt2.py:{variant}")
    settings, steps = read_settings(config)
    values = config.model.to_dict()
    values["vocab_size"] = values["vocab_size"] or 512
    model = ModelConfig.gpt2(**values)
    assert inherit("r", model.num_layers, config.inherit.layers or model.num_layers // 2, parts=config.inherit.parts)
    optimizer = make_optimizer(settings.optimizer, steps)
    params = abstract(model)[1]
    state = TrainState(params, jax.eval_shape(optimizer.init, params), *(
        jax.ShapeDtypeStruct((), d) for d in ("int32", "bool")
    ))  # fmt: skip
    shape = (settings.batch_size, config.data.seq_len)
    batch = {k: jax.ShapeDtypeStruct(shape, d) for k, d in
             (("tokens", "int32"), ("targets", "int32"), ("loss_weights", "float32"))}  # fmt: skip
    out, _ = jax.eval_shape(make_train_step(model, settings.compute, optimizer, settings.step), state, batch)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), out) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
