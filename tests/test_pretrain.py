"""Pretraining on small LLaMAs: what it leaves, and that it goes on."""

import re

import pytest
from runs import metrics, result

import jaxup
from jaxup import train
from jaxup.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")

TINY = [
    "--config=pretrain.py:smoke", "--config.model.hidden_size=16", "--config.model.intermediate_size=24",
    "--config.model.num_heads=2", "--config.model.num_kv_heads=1", "--config.model.num_layers=3",
    "--config.model.max_positions=32", "--config.data.seq_len=32", "--config.data.tokenizer=bpe:300",
    "--config.data.val_fraction=0.3", "--config.steps=12", "--config.batch_size=8",
    "--config.optimizer.warmup_steps=2", "--config.eval.interval=4", "--config.eval.rows=16",
    "--config.eval.batch_size=8", "--config.checkpoint.interval=4", "--config.log.interval=1",
    "--config.sample.tokens=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """run(name, *more) -> the run's directory; all of them have the tokens beside them."""
    folder = tmp_path_factory.mktemp("pretrain")

    def started(name, *more):
        train.main(["train", *TINY, f"--config.data.source={corpus}", *more, f"--workdir={folder / name}"])
        return folder / name

    return started


@pytest.fixture(scope="module")
def fixed(run):
    return run("fixed")


def test_a_model_from_random_values(fixed):
    made, summary = result(fixed, "model"), (fixed / "SUMMARY.md").read_text()
    assert summary.splitlines()[2] == (
        f"The 3-layer model reaches {made['val_loss']:.4f} nats per token of validation in 12 steps from random "
        "values. One seed: by how much another one's numbers differ is not measured."
    )
    assert re.findall(r"^!\[.*\]\(plots/(\w+)\.png\)$", summary, re.M) == ["validation_loss", "training", "gradients"]
    losses = {r["step"]: r["val_loss"] for r in metrics(fixed) if "val_loss" in r}
    assert list(losses) == [0, 4, 8, 12]
    assert losses[12] == made["val_loss"] < losses[0]
    assert jaxup.load(fixed / "export").config.num_layers == 3
    assert "trained from random values" in (fixed / "export" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--config.steps=0"], "steps=0, epochs=0: one of them must be positive"),
        (["--config.optimizer.warmup_steps=20"], "optimizer.warmup_steps=20: does not fit a run of 12 steps"),
        (["--config.model.family=lama"], "model.family: unknown 'lama'; did you mean 'llama'"),
    ],
)
def test_what_cannot_work_is_refused(run, fixed, more, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        run("refused", *more)
    assert not (fixed.parent / "refused").exists()
