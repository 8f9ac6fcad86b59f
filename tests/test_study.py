"""Studies: what their configurations become, what is refused, and that what cells share is done once."""

import pytest

from jaxup.errors import UserError
from jaxup.experiments import cells
from jaxup.experiments.config import load


def study(axes="", *more, spec="inherit_gpt2.py:smoke"):
    return load(spec, [("study.axes", axes), *more])


def test_axes_are_combined_and_named_by_what_differs():
    config = study("batch_size: 8 16; optimizer.learning_rate: 1e-3 2e-3", ("study.seeds", "0,1"))
    assert config.study.cells == {
        f"batch_size={batch},learning_rate={rate}": {"batch_size": batch, "optimizer.learning_rate": rate}
        for batch in (8, 16) for rate in (0.001, 0.002)
    }  # fmt: skip
    assert config.study.axes == ""
    assert cells.seeds(config) == (0, 1)
    cell = cells.configured(config, "batch_size=8,learning_rate=0.002", 1)
    assert (cell.batch_size, cell.optimizer.learning_rate, cell.seed) == (8, 0.002, 1)
    # A run like any other, and all but what was named is the study's.
    assert not cell.study.cells
    assert not cell.study.seeds
    assert cell.model == config.model
    assert cell.data == config.data
    assert config.batch_size == 16


def test_variants_are_an_axis_and_need_their_file_no_more():
    config = study("variant: ablation=attn control=2", ("inherit.tolerance", "0.5"))
    assert [*config.study.cells] == ["ablation=attn", "control=2"]  # in their order: the first is the control
    assert config.study.cells["control=2"] == {"inherit.control": 2}
    assert "mlp" not in cells.configured(config, "ablation=attn").inherit.parts
    assert cells.configured(config, "control=2").inherit.tolerance == 0.5


def test_bundles_are_multiplied_by_axes_and_seeds_alone_are_a_study():
    named = ("study.cells", "{'wide': {'model.hidden_size': 256}, 'last': {'inherit.which': 'last'}}")
    config = study("steps: 5 7", named)
    assert [*config.study.cells] == ["wide,steps=5", "wide,steps=7", "last,steps=5", "last,steps=7"]
    assert study("", named).study.cells["wide"] == {"model.hidden_size": 256}
    assert study("", ("study.seeds", "3,4")).study.cells == {cells.ALONE: {}}
    assert study().study.cells == {}


def test_values_may_have_spaces_and_names_are_those_of_directories():
    config = study("plan: 'identity(base)' \"upscale(base, 1:3, copies=1)\"", spec="heal.py:smoke")
    first, second = config.study.cells
    assert config.study.cells[second] == {"plan": "upscale(base, 1:3, copies=1)"}
    assert first.startswith("plan=identity_base_")
    assert second.startswith("plan=upscale_base,_1_3,_copies=1_")


@pytest.mark.parametrize(("axes", "more", "said"), [
    ("batch_siz: 8 16", (), "did you mean 'batch_size'"),
    ("batch_size: 8 many", (), "batch_size: expected an int, not 'many'"),
    ("batch_size 8 16", (), "'batch_size 8 16' is no axis"),
    ("batch_size: 8 8", (), "8 is there twice"),
    ("optimizer.learning_rate: 1e-3 0.001", (), "'learning_rate=0.001' is there twice"),
    ("seed: 0 1", (), "study.seeds says which"),
    ("study.stop: norms halving", (), "study.stop is the same in all cells"),
    ("variant: smok large", (), "unknown variant 'smok'; did you mean"),
    ("step.spike_window: 50 100", (), "cell 'spike_window=50': step.spike_window=50: goes with step.spike_factor"),
    ("batch_size: 1 2 3 4 5; steps: 1 2 3 4 5", (("study.max_cells", "20"),), "study.max_cells=20: 25 runs, each of"),
    ("batch_size: 8 16", (("study.seeds", "0,1,2"), ("study.max_cells", "5")), "6 runs"),
    ("batch_size: 8 16", (("study.seeds", "0,0"),), "study.seeds=0,0"),
    ("batch_size: 8 16", (("study.seeds", "one"),), "study.seeds=one: are whole numbers"),
    ("batch_size: 8 16", (("study.control", "batch_size=9"),), "study.control=batch_size=9: is no cell; did you mean"),
    ("", (("study.control", "a"),), "study.control=a: goes with study.cells"),
    ("", (("study.cells", "{'a': {}, 'b': {'batch_size': 16}}"),), "study: 'a' and 'b' are the same"),
    ("", (("study.cells", "{'a/b': {}}"),), "'a/b': is a directory's name, too"),
    ("", (("study.cells", "{'a': {'steps': 2.5}}"),), "expected an int, not 2.5"),
    ("", (("study.cells", "{'a': {'modle.num_layers': 2}}"),), "did you mean"),
])  # fmt: skip
def test_mistakes_are_one_line(axes, more, said):
    with pytest.raises(UserError) as error:
        study(axes, *more)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
