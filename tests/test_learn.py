"""A model that learns from its own answers: rounds, what they leave, and how they go on."""

import json

import numpy as np
import pytest
import runs

from jaxup import train
from jaxup.errors import UserError
from jaxup.experiments.common import read_settings
from jaxup.experiments.config import load as load_config
from jaxup.experiments.learn import Learn
from jaxup.experiments.learned import COLUMNS, _quoted
from jaxup.learning.data import rows
from jaxup.learning.rounds import ENTROPY, LOGP, REFERENCE, VALUES, Samples, described, fitted, problems_of, template
from jaxup.learning.weights import METHODS
from jaxup.training import loop
from jaxup.training.sharding import MeshConfig, make_mesh

TINY = [
    "--config=search_and_learn.py:smoke", "--config.model.hidden_size=16", "--config.model.intermediate_size=24",
    "--config.compute.unroll=1", "--config.pretrain.steps=4", "--config.pretrain.optimizer.warmup_steps=2",
    "--config.learn.train=60", "--config.learn.test=8", "--config.learn.final_samples=4", "--config.learn.slots=16",
    "--config.learn.reward=random", "--config.log.interval=1", "--config.checkpoint.interval=1",
    "--config.sample.tokens=2",
]  # fmt: skip
TIMED = ("sampling", "scoring", "fitting")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("learn")

    def carried_out(name, *more):
        with runs.devices(1):
            train.main(["train", *TINY, *more, f"--workdir={root / name}"])
        return root / name

    return carried_out


@pytest.fixture(scope="module")
def whole(run):
    return run("whole")


def rounds_of(workdir):
    lines = [json.loads(line) for line in (workdir / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def left(workdir):
    files = [workdir / "export" / "model.safetensors", workdir / "tasks.json", workdir / "answers.json"]
    return runs.losses(workdir), [file.read_bytes() for file in files], repr(rounds_of(workdir))


def test_a_run_leaves_a_row_for_each_round_and_what_test_problems_say(whole):
    page = (whole / "ROUNDS.md").read_text()
    head, _, *table = [line for line in page.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert columns == [name for name, _ in COLUMNS.values()]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:4]]
    assert [row[columns.index("learns by")] for row in cells] == ["cloning", "grpo", "grpo", "grpo"]
    assert [bool(row[columns.index("pass@1, test")]) for row in cells] == [True, False, True, False]
    assert all(float(row[columns.index("fitting, s")]) > 0 for row in cells)
    sampled = [samples.facts["tokens"] for samples in map(Samples.load, sorted((whole / "rounds").glob("0*.npz")))]
    assert cells[-1][columns.index("tokens sampled")] == f"{sum(sampled):,}"
    assert "## Answers of the last round" in page
    # What the cloned model says of its own answers, by the trainer, is what they were drawn by: a few roundings of
    # float32 in log-probabilities of some nats. After an update it is not the same any more.
    kl = [row.get("kl") for row in rounds_of(whole)]
    assert abs(kl[1]) < 1e-6 < kl[2]
    tasks = json.loads((whole / "tasks.json").read_text())
    assert {"pass_1", "pass_4", "pass_1_before", "best_of_4_noisy", "best_of_4_length", "length"} <= tasks.keys()
    answers = json.loads((whole / "answers.json").read_text())
    assert len(answers["problems"]) == len(answers["before"]) == len(answers["after"]) == 8
    assert np.mean(answers["after"]) / 4 == pytest.approx(tasks["pass_1"])
    assert {path.name for path in (whole / "plots").glob("*_*.png")} >= {"pass_at_k.png", "best_of_n.png"}
    assert "pass@4 on test problems from" in (whole / "SUMMARY.md").read_text()
    # Of cloning, and of each second round.
    assert {"2", "4", "8"} <= {path.name for path in (whole / "checkpoints" / "learned").iterdir()}


def test_a_run_that_is_killed_goes_on_within_its_round(run, whole, monkeypatch):
    """Fitting a round that was sampled before, from a checkpoint within it; then sampling the next one."""
    write, save = loop.Meter._write, Samples.save

    def die_at_step(self, now, **values):
        write(self, now, **values)
        if self._name == "learned" and now == 6 and "loss" in values:
            raise InterruptedError

    def die_sampling(self, path):
        if path.name == "00003.npz":
            raise InterruptedError
        save(self, path)

    for owner, name, dying in ((loop.Meter, "_write", die_at_step), (Samples, "save", die_sampling)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            with pytest.raises(InterruptedError):
                run("killed")
        (reached,) = {4, 5, 6} & {max(int(p.name) for p in (whole.parent / "killed/checkpoints/learned").glob("[0-9]"))}
        assert reached == (5 if dying is die_at_step else 6)
    assert left(run("killed")) == left(whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["learn.method=grop", "learn.reward=outcome"], "learn.method: unknown 'grop'; did you mean 'grpo'"),
        (["learn.options=bta=1"], "'bta=1': a method has no such setting; did you mean 'beta'"),
        (["learn.options=clip_low=1.5"], "clip_low=1.5"),
        (["learn.reward=outcom"], "'outcom'; did you mean 'outcome'"),
        (["learn.task=contdown:3"], "did you mean 'countdown'"),
        (["learn.updates=3"], "rounds of 3 steps do not make 8; steps=9"),
        (["steps=0", "epochs=1"], "epochs=1: rounds have steps"),
        (["learn.max_tokens=100"], "exceed the model's 64 positions; at most"),
        (["data.seq_len=23", "learn.max_tokens=40"], "are longer than a row"),
        (["learn.top_k=5"], "learn.top_k=5: grpo weighs the probabilities that the trainer computes"),
        (["learn.samples=1"], "grpo compares the answers to a problem with each other"),
        (["learn.problems=61"], "a round asks so many different problems, and there are 60"),
        (["learn.compare=true"], "an answer to countdown:3 is one step"),
        (["learn.chat=true"], "learn.chat=True: the base has no chat template"),
        (["pretrain.data.tokenizer=bpe:300"], "data.tokenizer=bpe:300"),
        (["learn.method=reject", "learn.search=bean"], "unknown search 'bean'; did you mean 'beam'"),
        (["learn.search=best_of"], "goes with learn.method=reject or dpo"),
        (["learn.method=reject", "learn.search=best_of", "learn.budget=3"], "learn.budget=3: smaller than one answer"),
    ],
)
def test_what_cannot_be_learned_is_one_line_and_writes_nothing(run, whole, flags, message):
    with pytest.raises(UserError) as error:
        run("refused", *(f"--config.{flag}" for flag in flags))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (whole.parent / "refused").exists()


def test_without_data_a_step_is_compiled_for_the_same_fields():
    config = load_config("search_and_learn.py:smoke", [("data.seq_len", "24"), ("model.vocab_size", "64")])
    job = Learn(config, read_settings(config), make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1)))
    job.without_data()
    (stage,) = (stage for stage in job.stages() if stage.name == "learned")
    batch = stage.data.batches(batch_size=2, seed=0)(0)
    assert batch.keys() == fitted(METHODS["grpo"], samples_of(*SAMPLES), PROMPTS, 24).keys()
    assert batch["tokens"].shape == (2, 24)


# ---- rows


def samples_of(texts, rewards, count):
    """Answers of as many tokens as they have characters."""
    tokens = [np.array([*text.encode()], np.int32) for text in texts]
    known = {name: [np.full(len(t), at - 3, np.float32) for t in tokens]
             for at, name in enumerate((LOGP, ENTROPY, REFERENCE, VALUES))}  # fmt: skip
    return Samples(
        numbers_P=np.arange(len(texts) // count), tokens=tokens, known=known, texts=list(texts),
        ended_N=np.ones(len(texts), bool), rewards_N=np.array(rewards, float), right_N=np.array(rewards, float),
        facts={"tokens": 7},
    )  # fmt: skip


PROMPTS = [[1, 2], [3, 4, 5]]
SAMPLES = (["a", "bb", "a", "c", "d", "ee", "fff", "g"], [1, 1, 1, 0, 0, np.nan, 0, 0], 4)


def test_a_row_has_a_weight_for_each_token_of_the_answer():
    found = rows([[1, 2], [3]], [[7, 8, 9], [6]], 5)
    assert found["tokens"].tolist() == [[1, 2, 7, 8, 0], [3, 0, 0, 0, 0]]
    assert found["targets"].tolist() == [[2, 7, 8, 9, 0], [6, 0, 0, 0, 0]]
    assert found["loss_weights"].tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "verdict"])
def test_rows_have_what_the_objective_of_the_method_asks_for(name):
    """And no others than the rows that a program is compiled for."""
    samples = samples_of(*SAMPLES)
    found = fitted(METHODS[name], samples, PROMPTS, 6)
    shapes = {field: (array.shape[1:], array.dtype) for field, array in found.items()}
    like = template(METHODS[name], samples.rows(PROMPTS, 6))
    assert {field: (array.shape[1:], array.dtype) for field, array in like.items()} == shapes
    if name == "reject":  # each text once
        assert found["tokens"].tolist() == [[1, 2, 0, 0, 0, 0], [1, 2, 98, 0, 0, 0]]
    if name == "dpo":
        assert found["targets"][0, 1] == ord("a")
        assert found["rejected_targets"][0, 1] == ord("c")
        assert found["reference_chosen"].tolist() == [-1.0]
    if name == "grpo":  # of the second problem all that can be said is the same
        assert (found["advantages"][4:] == 0).all()
        np.testing.assert_array_equal(found["old_logp"], -3 * found["loss_weights"])
        np.testing.assert_array_equal(found["reference_logp"], -1 * found["loss_weights"])
    if name == "ppo":  # nothing is learned of what cannot be scored
        assert (found["advantages"][5] == 0).all()
        np.testing.assert_array_equal(found["returns"][5], found["old_values"][5])


def test_without_anything_right_nothing_weighs():
    nothing = samples_of(["a", "b"], [0, 0], 2)
    assert not fitted(METHODS["reject"], nothing, PROMPTS[:1], 4)["advantages"].any()
    found = fitted(METHODS["dpo"], nothing, PROMPTS[:1], 4)
    assert not found["loss_weights"].any()
    assert not found["rejected_weights"].any()


def test_samples_come_back_from_their_file(tmp_path):
    samples, path = samples_of(*SAMPLES), tmp_path / "00001.npz"
    samples.save(path)
    again = Samples.load(path)
    assert again.texts == samples.texts
    assert again.facts == samples.facts
    np.testing.assert_array_equal(again.rewards_N, samples.rewards_N)
    for name, values in samples.known.items():
        assert all((a == b).all() for a, b in zip(again.known[name], values, strict=True))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="damaged"):
        Samples.load(path)


def test_what_is_said_of_a_round():
    said = described(samples_of(*SAMPLES))
    assert said["reward"] == pytest.approx(3 / 7)
    assert said["flat"] == 0.5
    assert said["unique"] == pytest.approx((3 / 4 + 1) / 2)
    assert said["length"] == 12 / 8
    d = 2.0  # of the reference's log-probability and the model's
    assert said["kl"] == pytest.approx(np.expm1(d) - d)


def test_all_problems_are_asked_before_one_is_again():
    asked = np.concatenate([problems_of(10, 4, 0, number) for number in range(5)])
    assert sorted(asked[:10]) == sorted(asked[10:]) == [*range(10)]
    assert (asked[:10] != asked[10:]).any()


def test_a_text_cannot_leave_its_cell():
    assert _quoted("a|b`c\n\x1b[2J") == "`` a\\|b`c\\n\\x1b[2J ``"


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["learn.method=reject"],
        ["learn.method=sft", "learn.reward=outcome"],
        ["learn.method=ppo"],
        ["learn.method=dpo"],
        ["lora.rank=2"],
        ["plan=upscale(base, 1:2, copies=1)", "train.layers=copies"],
        ["learn.method=reject", "learn.task=countdown:3:steps", "learn.search=beam", "learn.compare=true"],
    ],
)
def test_every_way_to_learn_goes_to_its_end(run, whole, more):
    where = run("-".join(more).replace(" ", ""), *(f"--config.{flag}" for flag in more))
    assert len(rounds_of(where)) == 4
