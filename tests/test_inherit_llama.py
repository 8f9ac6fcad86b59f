"""The low-data recipe on small LLaMAs: one target or a sweep, epochs of few tokens, a reference from a directory."""

import contextlib
import inspect
import json
import re
import signal

import jax
import numpy as np
import pytest
from runs import beside, losses, metrics, result, write_corpus

from jaxup import train
from jaxup.data.batches import Batches
from jaxup.errors import NonFinite, Stopped, UserError
from jaxup.model.spec import flatten
from jaxup.training import loop
from jaxup.training.stored import read_stored, restore

pytestmark = pytest.mark.usefixtures("one_device")

# 64 rows of 32 tokens in batches of 8: eight steps are one epoch.
TINY = [
    "--config.model.hidden_size=16", "--config.model.intermediate_size=24", "--config.model.num_heads=2",
    "--config.model.num_kv_heads=1", "--config.model.max_positions=32", "--config.data.seq_len=32",
    "--config.data.tokenizer=bpe:300", "--config.data.val_fraction=0.3", "--config.data.tokens=2048",
    "--config.epochs=1", "--config.batch_size=8", "--config.reference.steps=4", "--config.optimizer.warmup_steps=2",
    "--config.eval.interval=8", "--config.eval.rows=16", "--config.eval.batch_size=8",
    "--config.checkpoint.interval=8", "--config.log.interval=1", "--config.sample.tokens=0",
    "--config.compute.unroll=1",
]  # fmt: skip
SWEEP = "--config.inherit.sweep=1,2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder for runs, with a few kilobytes of this project's own text; the tokens are made once for all of them."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    return folder


def run(runs, name, *more):
    arguments = [*beside(TINY, more), f"--config.data.source={runs / 'corpus'}", *more, f"--workdir={runs / name}"]
    train.main(["train", "--config=inherit_llama.py:smoke", *arguments])
    return runs / name


@pytest.fixture(scope="module")
def swept(runs, drawing):
    """A whole sweep, and which rows each of its models was trained on, in order."""
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        read = Batches.__call__

        def recorded(self, step, share=slice(None)):
            rows.append((step, self.rows_of(step)))
            return read(self, step, share)

        patch.setattr(Batches, "__call__", recorded)
        with drawing(), open(runs / "said", "w") as said, contextlib.redirect_stderr(said):
            return run(runs, "sweep", SWEEP), rows


def test_a_sweep_trains_each_size_from_the_reference(swept):
    workdir, _ = swept
    summary = (workdir / "SUMMARY.md").read_text()
    table = re.findall(r"^\| (\w+) \| (\d+) \| [\d,]+ \| (\d+) \| ([\d,]+) \| ([\d.]+) \|", summary, re.M)
    assert [row[:4] for row in table] == [
        ("reference", "4", "4", "1,024"), ("target_1", "1", "8", "2,048"), ("target_2", "2", "8", "2,048"),
        ("control_1", "1", "8", "2,048"), ("control_2", "2", "8", "2,048"),
    ]  # fmt: skip
    said = (workdir.parent / "said").read_text()
    for place, (name, _, steps, _, loss) in enumerate(table, 1):
        last = rf"^{name} \(model {place} of 5\): {steps}/{steps} steps in [\d:]+  validation loss {loss}$"
        assert re.search(last, said, re.M), "the last words of a bar are the result"
    assert "control_1 (model 4 of 5): compiling" not in said, "it is the program of its target"
    evaluated = [[r["step"] for r in metrics(workdir) if r["model"] == row[0] and "val_loss" in r] for row in table]
    assert evaluated == [[0, 4], *[[0, 4, 8]] * 4], "each also where the shorter one ends"
    for picture in ("validation_loss", "training", "loss_by_layers"):
        assert f"](plots/{picture}.png)" in summary
        assert (workdir / "plots" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "layers 0-1 of the reference (attention, mlp, norms, embed_tokens, lm_head)" in summary
    assert "2,048 of them used" in summary
    exported = json.loads((workdir / "export" / "config.json").read_text())
    assert (exported["model_type"], exported["num_hidden_layers"], exported["num_key_value_heads"]) == ("llama", 2, 1)


def test_targets_see_little_data_and_the_reference_all(swept):
    _, rows = swept
    # Each model reads its steps once, and none after the last.
    assert [step for step, _ in rows] == [*range(4), *list(range(8)) * 4]
    _, *models = np.split(np.stack([r for _, r in rows]), [4, 12, 20, 28])
    for epoch in models:
        assert len(np.unique(epoch)) == 64
        np.testing.assert_array_equal(epoch, models[0])
    assert set(np.unique(np.stack([r for _, r in rows[:4]]))) - set(np.unique(models[0]))


STACKED = ["--config.inherit.start=stacked", "--config.inherit.distill.alpha=0.6"]


@pytest.fixture(scope="module")
def stacked(runs, swept):
    """A stacked target that learns from a reference, and with what each model begins: its params and its teacher's."""
    begun, original = {}, loop._train
    known = list(inspect.signature(original).parameters).index("known")

    def watched(*args):
        _, name, _, _, _, _, state, *_ = args
        begun[name] = jax.device_get((state.params, args[known]))
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_train", watched)
        return run(runs, "stacked", *STACKED), begun


def test_a_stacked_target_begins_with_a_trained_half_twice_and_learns_from_the_reference(swept, stacked):
    workdir, begun = stacked
    summary = (workdir / "SUMMARY.md").read_text()
    table = re.findall(r"^\| (\w+) \| (\d+) \| [\d,]+ \| (\d+) \|", summary, re.M)
    assert table == [("reference", "4", "4"), ("half", "1", "8"), ("target_2", "2", "8"), ("control", "2", "8")]
    assert "the layers of half, twice; learns from the reference's predictions (alpha 0.6, temperature 1)" in summary
    assert "It has the half's 8 steps of training behind it, too." in summary
    # The others train on the tokens alone, as in any run.
    for name, same in (("reference", "reference"), ("half", "control_1"), ("control", "control_2")):
        assert result(workdir, name)["val_loss"] == result(swept[0], same)["val_loss"]
    assert result(workdir, "target_2")["val_loss"] != result(workdir, "control")["val_loss"]

    def trained(name, step):
        return flatten(restore(workdir, name, step, read_stored(workdir, name)))

    half, (target, (known,)) = trained("half", 8), begun["target_2"]
    for path, leaf in flatten(target).items():
        twice = np.concatenate([half[path]] * 2) if path.startswith("blocks.") else half[path]
        np.testing.assert_array_equal(leaf, twice)
    jax.tree.map(np.testing.assert_array_equal, flatten(known), trained("reference", 4))
    assert not any(teacher for name, (_, teacher) in begun.items() if name != "target_2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["swept", "stacked"])
def test_interrupted_and_resumed_ends_with_the_same_numbers(runs, kind, request, monkeypatch):
    (whole, _), more = request.getfixturevalue(kind), STACKED if kind == "stacked" else [SWEEP]
    write = loop.Meter._write

    def write_and_stop(self, step, **values):
        write(self, step, **values)
        if (self._name, step) == ("target_2", 5):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Meter, "_write", write_and_stop)
        with pytest.raises(Stopped, match=r"target_2: saved at step [56] of 8"):
            run(runs, f"{kind} resumed", *more)
    run(runs, f"{kind} resumed", *more)
    assert losses(runs / f"{kind} resumed") == losses(whole)
    both = (runs / f"{kind} resumed", whole)
    exports = [(folder / "export" / "model.safetensors").read_bytes() for folder in both]
    assert exports[0] == exports[1]


def test_a_reference_from_a_directory(runs, swept, torch, monkeypatch):
    """Reference and untrained target have the losses that transformers computes; nothing of the former stays."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jaxup.hub import load as hub
    from jaxup.hub import reader, writer
    from jaxup.model.decoder import init

    workdir, _ = swept
    config = reader.load_config(workdir / "export").with_layers([0, 1, 0, 1])
    rng = np.random.default_rng(0)
    # Far from trivial, norms too: a part that is inherited by mistake, or is not, must show.
    params = jax.tree.map(
        lambda a: np.asarray(a) + rng.normal(0, 0.1, a.shape).astype(np.float32),
        jax.jit(init, static_argnums=0)(config, 3),  # which is kept nowhere
    )
    directory = runs / "model"
    writer.save(directory, config, params, tokenizer=AutoTokenizer.from_pretrained(workdir / "export"))

    left = {}
    original = loop._train

    def watched(run, name, *args):
        left[name] = [a.shape for a in jax.live_arrays() if a.ndim >= 2 and a.shape[0] == config.num_layers]
        return original(run, name, *args)

    monkeypatch.setattr(loop, "_train", watched)
    more = [f"--config.reference.path={directory}", "--config.data.tokenizer=", "--config.inherit.control=0"]
    out = run(runs, "given", *more)
    assert left == {"target_2": []}, "the reference's weights are still in memory"

    oracle = AutoModelForCausalLM.from_pretrained(directory).eval()
    (store,) = (runs / "data").glob("corpus-model-*")
    from jaxup.data.rows import open_rows
    from jaxup.data.store import META, Store

    meta = Store(str(store)).read_json(META)
    _, validation = open_rows(Store(str(store)), meta, isolate=False, eos=0)
    rows = torch.tensor(validation.read(np.arange(16))[0], dtype=torch.long)

    def loss():
        with torch.no_grad():
            logits = oracle(rows[:, :-1]).logits.double()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()

    # float32 sums in another order, averaged over 512 tokens.
    assert result(out, "reference")["val_loss"] == pytest.approx(loss(), rel=1e-5)
    oracle.model.layers = oracle.model.layers[:2]
    with torch.no_grad():
        oracle.model.norm.weight.fill_(1.0)  # the final norm is not inherited
    untrained = next(r["val_loss"] for r in metrics(out) if r["model"] == "target_2" and r["step"] == 0)
    assert untrained == pytest.approx(loss(), rel=1e-5)
    assert result(out, "target_2")["val_loss"] < untrained

    monkeypatch.setattr(hub, "load", lambda *_, **__: pytest.fail("a finished run loads its reference again"))
    assert run(runs, "given", *more) == out
    with pytest.raises(UserError, match="revision goes with a hub id"):
        run(runs, "revision", *more, "--config.reference.revision=main")


def test_a_signal_at_a_step_that_is_not_finite(runs, swept, monkeypatch):
    """It is the non-finite step that is reported, and the state before it that is saved."""
    more = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.schedule=constant",
            "--config.reference.steps=8"]  # fmt: skip
    with pytest.raises(NonFinite, match=r"reference: step \d+: ") as error:
        run(runs, "broken", *more)
    bad = int(re.search(r"step (\d+)", str(error.value)).group(1))
    update = loop.Progress.update

    def update_and_stop(self, done, detail=""):
        update(self, done, detail)
        if done == bad:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Progress, "update", update_and_stop)
    with pytest.raises(NonFinite, match=rf"reference: step {bad}: .* step {bad - 1} is saved"):
        run(runs, "broken and stopped", *more)
    assert (runs / "broken and stopped" / "checkpoints" / "reference" / str(bad - 1)).is_dir()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([SWEEP, "--config.inherit.grow_by=2"], "inherit.sweep: goes with inherit.grow_by=0, not 2"),
        ([SWEEP, "--config.inherit.layers=2"], "inherit.sweep: goes with inherit.layers=0, not 2"),
        ([SWEEP, "--config.inherit.which=0,2"], "inherit.sweep: goes with inherit.which=first, middle or last"),
        (["--config.inherit.sweep=1,2,1"], "inherit.sweep='1,2,1': 1 is named more than once"),
        (["--config.inherit.sweep=2,5"], "inherit: 5 layers asked of 'reference', which has 4"),
        (["--config.inherit.sweep=0,1"], "at least one layer"),
        (["--config.inherit.sweep=2,x"], "inherit.sweep='2,x': not numbers of layers"),
        (["--config.data.seed=3"], "corpus is not split at random; files are split by their names"),
        (["--config.inherit.grow_by=-1"], "inherit.grow_by must be at least 0"),
        (["--config.inherit.control=-1"], "inherit.control must be at least 0"),
        (["--config.model.family=lama"], "model.family: unknown 'lama'; did you mean 'llama'"),
        (["--config.model.family=gpt2"], "a gpt2 model has no such setting"),
        (
            ["--config.steps=5"],
            "steps=5, epochs=1: one of them must be positive, the other 0; for 5 steps, --config.epochs=0",
        ),
        (["--config.epochs=0"], "steps=0, epochs=0"),
        (["--config.epochs=-1", "--config.steps=5"], "steps=5, epochs=-1"),
        (["--config.optimizer.warmup_steps=9", "--config.reference.steps=9"], "does not fit a run of 8 steps"),
        (["--config.optimizer.warmup_steps=5"], "does not fit a run of 4 steps"),
        (["--config.reference.steps=-1"], "reference.steps must be at least 0"),
        (["--config.data.tokens=100000000"], "data.tokens=100,000,000: "),
        (["--config.data.fraction=0.5"], "give one of the two"),
        (["--config.reference.path=gcs://bucket/model"], "cannot read gcs://; did you mean 'gs'"),
    ],
)
def test_mistakes_write_nothing(runs, swept, more, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        run(runs, "mistake", *more)
    assert "\n" not in str(error.value)
    assert not (runs / "mistake").exists()
