"""The main job as a user runs it: resumed, interrupted, misused; and what it leaves behind."""

import dataclasses
import importlib
import inspect
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import processes
import pytest
from damage import damage
from runs import arguments, devices, losses, metrics

import jaxup
from jaxup import __main__, resume, train
from jaxup.errors import NonFinite, UserError
from jaxup.recipes import line as recipe_line

generate = importlib.import_module("jaxup.generate")  # in the package the name is the function's


def run(*args):
    train.main(["train", *args])


def test_the_run_directory(finished, corpus):
    workdir, out = finished
    config = json.loads((workdir / "config.json").read_text())
    assert config["steps"] == 8
    assert len(re.findall(r"\blearning_rate: ", out)) == 1, "the resolved config is printed once"
    assert "\nreference (model 1 of 3): random, seed 0; 4 layers" in out
    summary = (workdir / "SUMMARY.md").read_text()
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ?([-+.\d]*) \|$", summary, re.M
    )
    names = [row[0] for row in rows]
    assert names[:2] == ["reference", "target_2"]
    assert names[-1] == "control"
    assert [row[1] for row in rows][:2] == ["4", "2"]
    assert {row[4] for row in rows} == {f"{8 * 8 * 32:,}"}
    for name in names:
        results = json.loads((workdir / "checkpoints" / name / "result.json").read_text())
        assert results["sample"].startswith("def")
        assert results["kind"] == name.partition("_")[0]
    for picture in ("validation_loss", "training", "gradients", "difference"):
        assert f"](plots/{picture}.png)" in summary
        assert (workdir / "plots" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "plan.yaml").read_text() == (workdir / "export" / "jaxup_plan.yaml").read_text()
    records = [r for r in metrics(workdir) if r["model"] == "reference"]
    assert [r["step"] for r in records if "val_loss" in r] == [0, 4, 8]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert all(len(r["gradient_norm_layers"]) == 4 and r["tokens_per_second"] > 0 for r in steps)
    assert not list(workdir.rglob("*.tmp*"))


def test_export_has_the_logits_of_the_checkpoint(finished, torch):
    import jax.numpy as jnp
    from flax import nnx
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jaxup.hub import reader
    from jaxup.model.decoder import abstract
    from jaxup.training.checkpoint import Checkpoints
    from jaxup.training.loop import abstract_params
    from jaxup.training.sharding import MeshConfig, make_mesh

    workdir, _ = finished
    export = workdir / "export"
    model, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer("def f(x):\n    return x", return_tensors="np")["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    # The export has the zero biases that GPT-2 in transformers always has; the checkpoint has none.
    config = dataclasses.replace(
        reader.load_config(export), norm_bias=False, qkv_bias=False, o_bias=False, mlp_bias=False
    )
    target = max((workdir / "checkpoints").glob("target_*"))
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    with Checkpoints(target, keep=2) as checkpoints:
        params = checkpoints.restore_params(checkpoints.latest, abstract_params(config, mesh))
    decoder = nnx.merge(abstract(config)[0], params)
    np.testing.assert_allclose(decoder(jnp.asarray(ids)), expected, atol=1e-4)
    assert tokenizer.decode(ids[0]) == "def f(x):\n    return x"


def test_generate_from_the_run(finished, tmp_path, monkeypatch, capsys):
    workdir, _ = finished
    argv = ["generate", str(workdir), "--prompt", "def f", "--max-tokens", "10", "--seed", "3"]
    generate.main(argv)
    first = capsys.readouterr()
    generate.main(argv)
    assert capsys.readouterr().out == first.out
    assert first.out.startswith("def f")
    assert "tokens/s" in first.err
    assert "jaxup: drawn as the run's own samples are: temperature 0.8, top k 50\n" in first.err
    # Any model of the run, by its name; the export is the last target.
    last = max((workdir / "checkpoints").glob("target_*"), key=lambda path: int(path.name.partition("_")[2]))
    generate.main(["generate", f"{workdir}@{last.name}/8", *argv[2:]])
    assert capsys.readouterr().out == first.out
    monkeypatch.chdir(workdir.parent)  # the place of the tokens is relative to it
    for name in ("checkpoints", "config.json"):  # as before it is finished
        (tmp_path / name).symlink_to(workdir / name)
    generate.main(["generate", f"{tmp_path}@{last.name}", *argv[2:]])
    assert capsys.readouterr().out == first.out
    for what, message in {
        "refrence": "no checkpoints of a model 'refrence'; did you mean 'reference'?",
        "reference/9": "no checkpoint of reference at step 9; there are 6, 8",
        "reference/last": "'last' is no step; after the model, such as healed/100",
        "reference --revision=x": "a model of a run: --revision and --allow-pickle go with others",
    }.items():
        name, *more = what.split()
        with pytest.raises(UserError, match=re.escape(message)):
            generate.main(["generate", f"{workdir}@{name}", *argv[2:], *more])


def test_killed_and_resumed_ends_with_the_same_numbers(finished, corpus, tmp_path):
    shutil.copytree(finished[0].parent, tmp_path / "runs")
    workdir = tmp_path / "runs" / "whole"
    for name in ("checkpoints/target_2", "checkpoints/control", "export", "plots"):  # but for the reference
        shutil.rmtree(workdir / name)
    (workdir / "SUMMARY.md").unlink()
    done = [r for r in metrics(workdir) if r["model"] == "reference"]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in done))
    command = ("-m", "jaxup.train", *arguments(corpus, workdir))
    with processes.started(*command) as process:
        processes.wait_until((workdir / "checkpoints" / "target_2" / "4").exists, process)
        process.send_signal(signal.SIGKILL)
    damage(workdir / "checkpoints" / "target_2" / "4", 0, ["truncate"])  # or killed before its digests were written
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"model": "target_2", "step": 7, "lo')  # what a machine that dies while writing leaves
    done = processes.run(*command)
    assert "reference: finished before" in done.stdout
    assert "target_2: resumes at step 2" in done.stdout
    assert re.search(r"target_2/4: .*; (removed|set aside as 4.damaged), and step 2 is taken", done.stderr)
    # Bit for bit: the losses are printed with all their digits.
    assert losses(workdir) == losses(finished[0])
    table = lambda d: re.findall(r"^\|.*$", (d / "SUMMARY.md").read_text(), re.M)  # noqa: E731
    assert table(workdir) == table(finished[0])
    same = lambda d: (d / "export" / "model.safetensors").read_bytes()  # noqa: E731
    assert same(workdir) == same(finished[0])


# The other signal: of two processes in `test_processes`.
@pytest.mark.parametrize(
    ("signum", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_leaves(signum, code, finished, corpus, tmp_path):
    shutil.copytree(finished[0].parent / "data", tmp_path / "data")
    workdir = tmp_path / "stopped"
    more = ["--config.steps=100000", "--config.checkpoint.interval=100000", "--config.eval.interval=100000"]
    log = workdir / "metrics.jsonl"
    with processes.started("-m", "jaxup.train", *arguments(corpus, workdir, *more)) as process:
        processes.wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 5, process)
        with pytest.raises(UserError, match=rf"\A[^\n]*in use by process {process.pid}[^\n]*\Z"):
            run(*arguments(corpus, workdir, *more))
        process.send_signal(signum)
        _, err = process.communicate(timeout=processes.LIMIT)
    assert process.returncode == code, err
    assert "Traceback" not in err
    saved = int(re.search(r"saved at step (\d+) of 100000", err).group(1))
    assert (workdir / "checkpoints" / "reference" / str(saved)).is_dir()


@pytest.mark.parametrize(("format", "when"), [(None, "an earlier"), (3, "a later")])
def test_a_run_of_another_format_is_refused(finished, corpus, tmp_path, format, when):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config = json.loads((finished[0] / "config.json").read_text())
    assert config.pop("format") == 2
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | ({} if format is None else {"format": format})))
    with pytest.raises(UserError, match=rf"{when} version of jaxup \(format {format or 1}, here 2\)") as error:
        run(*arguments(corpus, tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert len(list((tmp_path / "run").iterdir())) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.steps=9"], "another configuration: steps was 8, now 9"),
        (["--config.optimizer.b1=0.8"], "optimizer.b1 was 0.9, now 0.8"),
    ],
)
def test_a_changed_config_is_refused(finished, corpus, more, message):
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    for flags in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=message):
            run(*arguments(corpus, workdir, *more), *flags)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.data.source=/nowhere/at/all.txt"], "/nowhere/at/all.txt"),
        (["--config.data.tokenizer=bpe:many"], "bpe"),
        (["--config.inherit.layers=5"], "inherit: 5 layers asked of 'reference', which has 4"),
        (["--config.inherit.parts=attention,mpl"], "did you mean 'mlp'"),
        (["--config.inherit.parts=attention,lm_head"], "the head of this model is its embed_tokens"),
        (["--config.inherit.which=fist"], "neither 'first', 'middle', 'last'"),
        (["--config.batch_size=12"], "batch_size=12 does not divide over data x fsdp = 8 devices; 16 would"),
        (["--config.mesh.tensor=3"], "is not the 8 devices"),
        (["--config.mesh.tensor=4"], "2 attention heads do not divide over mesh.tensor=4; 2 would"),
        (["--config.compute.dtype=float16"], "float16"),
        (["--config.optimizer.schedule=cosin"], "did you mean 'cosine'"),
        (["--config.data.seq_len=64"], "seq_len=64 exceeds the model's 32 positions"),
        (["--config.model.num_heads=3"], "not a multiple of num_heads=3"),
        (["--config.reference.path=/nowhere/model"], "/nowhere/model"),
        (["--config.log.trackers=tensorbord"], "did you mean 'tensorboard'"),
        (["--config.steps=0"], "steps"),
        (["--config.processes.timeout=0"], "processes.timeout must be positive, not 0"),
        (["--workdir=s3://bucket/run"], "--workdir=s3:/bucket/run: a run directory is one of this machine, or gs://"),
        (
            ["--workdir=gs://bucket"],
            "--workdir=gs://bucket: a run directory is one of this machine, or gs://BUCKET/RUN;",
        ),
        (["--config.experiment=inhert"], "experiment: unknown kind 'inhert'; did you mean 'inherit'?"),
        (["--config.experiment=heal"], "experiment: 'heal' needs the section 'base', which is not there"),
    ],
)
def test_mistakes_write_nothing(corpus, tmp_path, more, message):
    # In a folder of their own: not even the tokens of a good source are written before all else is checked.
    for flags in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            run(*arguments(corpus, tmp_path / "runs" / "run", *more), *flags)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "runs" / "run").exists()


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UserError, match="no text"):
        run(*arguments(tmp_path / "corpus", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_foreign_directory_is_refused(corpus, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run directory"):
        run(*arguments(corpus, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_tokens_in_the_store_are_refused(finished, corpus, tmp_path):
    store = next((finished[0].parent / "data").iterdir())
    with pytest.raises(UserError, match=r"tokenizer") as error:
        run(*arguments(corpus, tmp_path / "run", f"--config.data.store={store}", "--config.data.tokenizer=bpe:310"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(corpus, tmp_path):
    # Adam's second moment overflows float32 with such a rate, and the loss after it.
    more = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.schedule=constant", "--config.batch_size=16"]
    with devices(1), pytest.raises(NonFinite, match=r"reference: step (\d+): .* is saved") as error:
        run(*arguments(corpus, tmp_path / "run", *more))
    step = int(re.search(r"step (\d+)", str(error.value)).group(1))
    assert (tmp_path / "run" / "checkpoints" / "reference" / str(step - 1)).is_dir()


def test_inheriting_from_a_hugging_face_directory(finished, corpus, tmp_path, capsys):
    """The exported target of one run is the reference of another; parts and last layers; TensorBoard."""
    export = finished[0] / "export"
    more = [
        f"--config.reference.path={export}", "--config.data.tokenizer=", "--config.inherit.which=last",
        "--config.inherit.layers=1", "--config.inherit.parts=attention,norms,embed_tokens",
        "--config.inherit.control=2", "--config.inherit.tolerance=100.0",
        "--config.log.trackers=tensorboard", "--config.mesh.fsdp=2", "--config.steps=4",
        "--config.checkpoint.interval=100", "--config.sample.tokens=0",
    ]  # fmt: skip
    with devices(2):
        run(*arguments(corpus, tmp_path / "run", *more))
    summary = (tmp_path / "run" / "SUMMARY.md").read_text()
    assert [m for m in re.findall(r"^\| (\w+) \|", summary, re.M)][1:] == [
        "reference",
        "target_1",
        "control",
        "control_2x",
    ]
    last = json.loads((export / "config.json").read_text())["n_layer"] - 1
    assert f"layers {last} of the reference (attention, norms, embed_tokens)" in summary
    assert {path.name for path in (tmp_path / "run" / "tensorboard").iterdir()} == {"target_1", "control", "control_2x"}
    stored = json.loads((tmp_path / "run" / "checkpoints" / "control_2x" / "result.json").read_text())
    assert stored["steps"] == 8


def test_half_the_width_of_a_reference(finished, corpus, tmp_path, capsys):
    """transformers has no such GPT-2, so the export is in the native format, and the run is as finished as any."""
    more = [
        f"--config.reference.path={finished[0] / 'export'}", "--config.data.tokenizer=", "--config.sample.tokens=0",
        "--config.inherit.start=half_width", "--config.inherit.layers=2", "--config.inherit.control=0",
        "--config.steps=4", "--config.checkpoint.interval=100",
    ]  # fmt: skip
    workdir = tmp_path / "run"
    with devices(1):
        run(*arguments(corpus, workdir, *more))
        summary = (workdir / "SUMMARY.md").read_text()
        assert "the first half of heads and MLP of layers 0-1 of the reference (attention, mlp, norms, " in summary
        said = capsys.readouterr().err
        assert "export: in jaxup's own format: no transformers family computes this: gpt2 needs num_kv_heads" in said
        run(*arguments(corpus, workdir, *more))
        assert "target_2: finished before" in capsys.readouterr().out
    made = jaxup.load(workdir)
    assert (made.config.num_heads, made.config.head_dim, made.config.intermediate_size) == (1, 8, 32)


ROOT = Path(__file__).parent.parent
DOCS = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))


def documented_commands():
    blocks = re.findall(r"```bash\n(.*?)```", DOCS, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [line.split("#")[0].strip() for line in lines if "jaxup." in line]


@pytest.fixture
def documented_files(tmp_path, monkeypatch):
    """What the pages call `# FILE.py` lies here."""
    files = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCS, re.S))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return files


def test_documented_experiment_file(documented_files, capsys):
    from jaxup.experiments.config import load

    c, short = load("mine.py"), load("mine.py:short,copies=1")
    assert (c.plan, c.steps, c.epochs, c.train.layers) == ("upscale(base, 8:24, copies=2)", 0, 2, "copies")
    assert (short.plan, short.steps, short.epochs) == ("upscale(base, 8:24, copies=1)", 100, 0)
    assert c.lora.rank > 0
    run("--config=mine.py", "--help")
    assert capsys.readouterr().out.startswith("Name-7B with its middle layers twice more")
    with pytest.raises(UserError, match="unknown variant 'shrt'; did you mean 'short'"):
        load("mine.py:shrt")


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command, documented_files):
    """Each command line names an entry point, files, variants and keys that exist."""
    from jaxup.experiments.config import load

    words = shlex.split(command[command.index("-m jaxup.") :])
    if words[1] in ("jaxup.train", "jaxup.resume"):
        args, overrides = train.parse_args(words[1:] if words[1] == "jaxup.train" else resume.as_train(words[1:]))
        config = load(args.config or "inherit_gpt2.py", overrides)  # with --resume it is that of a run
        assert config.sample.prompt.strip() == config.sample.prompt
    else:
        args = importlib.import_module(words[1]).parse_args(words[1:])
        prompts = getattr(args, "prompt", None) or ()  # of some commands there is one
        assert all(prompt.strip() == prompt for prompt in ([prompts] if isinstance(prompts, str) else prompts))
        if "(" in getattr(args, "recipe", ""):
            assert recipe_line.parse(args.recipe).plan(num_layers=60)


def test_documented_flags_exist():
    from jaxup.experiments.config import load

    def has(config, key):
        for part in key.split("."):
            if part not in config:
                return False
            config = config[part]
        return True

    configs = [load(name) for name in ("inherit_gpt2.py", "heal.py", "pretrain.py", "search_and_learn.py")]
    keys = set(re.findall(r"--config\.([\w.]+)", DOCS))
    assert len(keys) > 15
    assert [key for key in keys if not any(has(config, key) for config in configs)] == []


ENTRIES = (
    "", ".train", ".resume", ".generate", ".chat", ".export", ".plan", ".build", ".prepare", ".diff", ".explain",
    ".probe", ".verify", ".__main__", ".experiments.config", ".experiments.shown",
)  # fmt: skip


@pytest.mark.parametrize("module", [f"jaxup{name}" for name in ENTRIES])
def test_start_up_imports_nothing_heavy(module):
    heavy = "jax flax numpy torch transformers orbax tensorstore matplotlib datasets"
    code = f"import sys, {module}; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert processes.run("-c", code).stdout.strip() == "[]"


def test_to_say_what_a_run_would_do_imports_nothing_heavy():
    code = (
        "import sys, jaxup.train; jaxup.train.main(sys.argv); print([m for m in ('jax', 'numpy') if m in sys.modules])"
    )
    said = processes.run("-c", code, "--config=heal_tunguska.py:quick", "--help").stdout
    assert said.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("args", "code"), [(["--help"], 0), (["--version"], 0), (["trian"], 2), (["train", "--config=no_such.py"], 2)]
)
def test_console_command(args, code):
    done = processes.run("-m", "jaxup", *args, check=False)
    assert done.returncode == code
    assert (len(done.stderr.splitlines()), "Traceback" in done.stderr) == (1 if code else 0, False)


def test_what_may_be_run_is_listed(capsys):
    with pytest.raises(UserError, match=r"\Awhat to train is not said; give --config=FILE, or --resume=RUN\Z"):
        run()
    listed = capsys.readouterr().out
    for file in (ROOT / "configs").glob("*.py"):
        assert re.search(rf"^  {file.name} +{re.escape(file.read_text()[3:].splitlines()[0])}$", listed, re.M)
    words = r"smoke, grow, medium, large, xl, attn, .*baselines, depth_scaled, layers=,\s+control=, seed="
    assert re.search(rf"inherit_gpt2.*\n +{words}\n", listed)


def test_what_an_experiment_file_says(finished, capsys, monkeypatch):
    """Its docstring, and every key with its value, its meaning, and what keeps it from being read."""
    from jaxup.experiments.config import find, leaves, load

    monkeypatch.setattr(train, "run_experiment", None)
    specs = ("heal.py", "heal.py:quick,lora", "heal_tunguska.py", "inherit_gpt2.py", "inherit_llama.py:tiny")
    for spec in (*specs, "pretrain.py"):
        run("--help", f"--config={spec}", "--config.seed=7")
        said = capsys.readouterr().out
        assert said.startswith(find(spec.partition(":")[0]).read_text()[3:].splitlines()[0])
        values = dict(leaves(load(spec, [("seed", "7")]).to_dict()))
        given = dict(re.findall(r"^  ([\w.]+)=(.*?)(?:  .*)?$", said, re.M))
        assert given.keys() == values.keys()
        assert given["seed"] == "7"
        again = load(spec, [(key, text) for key, text in given.items() if values[key] != ""])
        assert again == load(spec, [("seed", "7")])
        assert re.search(r"^  optimizer.learning_rate=[\d.e-]+ +the peak$", said, re.M)
        assert re.search(r"^  step.spike_window=100 +\(not read: step.spike_factor=0.0\)$", said, re.M)
    run(f"--resume={finished[0]}", "--help")
    said = capsys.readouterr().out
    assert re.search(r"^  model.hidden_size=16$", said, re.M)
    with pytest.raises(UserError, match="unknown key 'sed'; did you mean 'seed'"):
        run("--help", "--config=heal.py", "--config.sed=7")


def test_every_comment_beside_a_default_is_found():
    """Whoever adds a key sees its comment in the help."""
    from jaxup.experiments import defaults
    from jaxup.experiments.config import leaves
    from jaxup.experiments.shown import comments

    for kind in defaults.SECTIONS:
        said, keys = comments(kind), dict(leaves(defaults.defaults(kind, small=True).to_dict()))
        sections = {".".join(key.split(".")[:count]) for key in keys for count in range(1, key.count(".") + 1)}
        assert said.keys() <= keys.keys() | sections
        assert len(said.keys() & keys.keys()) > 30
        about = "\n".join(said.values())
        for function in (defaults.defaults, defaults.SECTIONS[kind]):
            for comment in re.findall(r"^    c\..*  # (.*)$", inspect.getsource(function), re.M):
                assert comment in about or "1e-4 is more" in comment


def test_resume_is_a_command(finished, capsys):
    workdir = str(finished[0])
    __main__.main(["jaxup", "resume", workdir, "--config.log.interval", "2"])
    assert f"finished before: {workdir}/SUMMARY.md" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--config.log.intervl: unknown key 'intervl'; did you mean 'interval'"):
        resume.main(["resume", "--config.log.intervl=2", workdir])
    with pytest.raises(UserError, match=r"unknown argument '--skip-stp'; did you mean '--skip-step'"):
        resume.main(["resume", workdir, "--skip-stp=2"])
    with pytest.raises(UserError, match=r"the following arguments are required: RUN; see --help"):
        resume.main(["resume"])


def test_both_spellings_of_a_command_say_the_same(capsys):
    __main__.main(["jaxup", "--version"])
    assert capsys.readouterr().out == f"jaxup {jaxup.__version__}\n"
    __main__.main(["jaxup"])
    listed = capsys.readouterr().out
    for name in __main__.COMMANDS:
        module = importlib.import_module(f"jaxup.{name}")
        said = []
        for main, argv in ((__main__.main, ["jaxup", name]), (module.main, [module.__file__])):
            with pytest.raises(SystemExit):
                main([*argv, "--help"])
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
        assert said[0].startswith(f"usage: jaxup {name} ")
        assert re.search(rf"^  {name} +{re.escape(module.__doc__.partition(':')[0])}$", listed, re.M)
