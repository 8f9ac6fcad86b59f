"""Plans of compilers: what is read of them, against what is counted by hand and what XLA says itself."""

import dataclasses
import importlib.util
import json
import re
import types

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from runs import GPT2

from jaxup import train
from jaxup.errors import UserError
from jaxup.experiments import lowered, target
from jaxup.experiments.common import new_model
from jaxup.experiments.config import load
from jaxup.hub.reader import load_config
from jaxup.model.attention import described
from jaxup.model.spec import count_params
from jaxup.targets import chips, cost, dump, hlo
from jaxup.targets.roofline import Roofline, roofline
from jaxup.training import trial
from jaxup.training.sharding import MeshConfig, make_mesh

# One layer of fully sharded data parallelism over 2 x 4 devices, four times in a loop: its weights are gathered over
# fsdp, multiplied, and their gradient is summed over fsdp, each keeping its own part, and over data.
LAYER = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b)
}

%fused (p0: f32[4,64,256], p1: s32[]) -> bf16[64,256] {
  %p0 = f32[4,64,256]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %slice = f32[1,64,256]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,64,256}
  %view = f32[64,256]{1,0:T(8,128)} bitcast(%slice)
  ROOT %cast = bf16[64,256]{1,0:T(8,128)(2,1)} convert(%view)
}

%body (arg: (s32[], f32[4,64,256], bf16[32,256])) -> (s32[], f32[4,64,256], bf16[32,256]) {
  %arg = (s32[]{:T(128)}, f32[4,64,256]{2,1,0:T(8,128)}, /*index=2*/bf16[32,256]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %stack = f32[4,64,256]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
  %x = bf16[32,256]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2, frontend_attributes={kernel_metadata={
"said":"{}"
}}, metadata={op_name="while/body"}
  %mine = bf16[64,256]{1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%fused, metadata={op_name="while/body"}
  %whole = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather(%mine), channel_id=1, GATHER, dimensions={0}
  %y = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %whole), dim_labels=bf_io->bf
  %dw = f32[256,256]{1,0:T(8,128)} convolution(%x, %y), dim_labels=fb_io->bf
  %part = f32[64,256]{1,0:T(8,128)} reduce-scatter(%dw), SCATTER, dimensions={0}, to_apply=%add
  %sum = f32[64,256]{1,0:T(8,128)} all-reduce(%part), REDUCE, to_apply=%add
  %shift = f32[64,256]{1,0:T(8,128)} collective-permute(%sum), source_target_pairs={{0,4},{4,0}}
  ROOT %out = (s32[]{:T(128)}, f32[4,64,256]{2,1,0:T(8,128)}, bf16[32,256]{1,0}) tuple(%i, %stack, %x)
}

%condition (arg: (s32[], f32[4,64,256], bf16[32,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %arg = (s32[]{:T(128)}, f32[4,64,256]{2,1,0:T(8,128)}, bf16[32,256]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[4,64,256], bf16[32,256])) -> (s32[], f32[4,64,256], bf16[32,256]) {
  %a = (s32[]{:T(128)}, f32[4,64,256]{2,1,0:T(8,128)}, bf16[32,256]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %loop = (s32[], f32[4,64,256]{2,1,0}, bf16[32,256]{1,0}) while(%a), condition=%condition, body=%body, metadata={op_name="while"}
}
"""  # noqa: E501
# The same groups, as compilers write them: of eight devices those of fsdp are 0 to 3 and 4 to 7.
SPELLINGS = [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups={{0,4},{1,5},{2,6},{3,7}}"),
    ("replica_groups=[2,4]<=[8]", "replica_groups=[4,2]<=[2,4]T(1,0)"),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}"),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", "replica_groups=mesh['a'=8] {'a':(1)2}"),
]
MESH = {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(("fsdp", "data"), SPELLINGS)
@pytest.mark.parametrize("counter", ["s32", "u32"])  # of loops that are in the program, and of those that XLA makes
def test_collectives_of_a_layer_by_hand(fsdp, data, counter):
    text = (
        LAYER.replace("%limit = s32", f"%limit = {counter}")
        .replace("GATHER", fsdp)
        .replace("SCATTER", fsdp)
        .replace("REDUCE", data)
    )
    found = [(c.kind, c.axes, c.bytes, c.times) for c in hlo.collectives(hlo.parse(text), MESH)]
    mine = 64 * 256  # values of the weights that a device keeps
    assert found == [
        ("all-gather", ("fsdp",), 3 * mine * 2, 4),  # those of the three others, in bfloat16
        ("reduce-scatter", ("fsdp",), 3 * mine * 4, 4),
        ("all-reduce", ("data",), mine * 4, 4),  # reduced and gathered again: twice a half
        ("collective-permute", ("data",), mine * 4, 4),
    ]


def test_costs_of_a_layer_by_hand():
    text = LAYER.replace("GATHER", "").replace("SCATTER", "").replace("REDUCE", "")
    found = [(c.flops, c.bytes, c.times) for c in cost.costs(hlo.parse(text))]
    cast = 64 * 256 * (4 + 2) + 4  # one of four layers is read, and which
    forward = (32 * 256 + 256 * 256) * 2  # the result stays on the chip
    backward = 32 * 256 * 2 + 256 * 256 * 4
    product = 2 * 32 * 256 * 256
    assert found == [(0, cast, 4), (product, forward, 4), (product, backward, 4)]


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "how", "products"),
    [
        # A free axis of the right side as a window that is moved over one element.
        ("bf16[64,1,32]", "bf16[8,32,16]", "bf16[64,8,16]",
         "window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=b0f_0io->b0f", 64 * 8 * 16 * 32),
        # A batch as strides over what is dilated, and another free axis.
        ("f32[8,64,128,1]", "f32[8,32,6,128]", "f32[8,64,32,6]",
         "window={size=8x6 stride=7x1 pad=0_0x5_5 lhs_dilate=8x1 rhs_reversal=0x1}, dim_labels=0bf1_0o1i->0bf1",
         8 * 64 * 32 * 6 * 128),
        # A contracted axis as a window of its size.
        ("bf16[64,8,16]", "bf16[8,16,32]", "bf16[64,1,32]",
         "window={size=8}, dim_labels=b0f_0io->b0f", 64 * 8 * 16 * 32),
        ("f32[1,5,1]", "f32[3,1,1]", "f32[1,5,1]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 13),
        ("f32[1,9,1]", "f32[3,1,1]", "f32[1,5,1]", "window={size=3 rhs_dilate=2}, dim_labels=b0f_0io->b0f", 15),
    ],
)  # fmt: skip
def test_products_written_as_convolutions(lhs, rhs, out, how, products):
    text = f"""HloModule m

ENTRY %main (a: {lhs}, b: {rhs}) -> {out} {{
  %a = {lhs} parameter(0)
  %b = {rhs} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {how}
}}
"""
    (found,) = cost.costs(hlo.parse(text))
    assert found.flops == 2 * products


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5p:4x4x5", "there is no such slice of v5p; the nearest is v5p:4x4x4"),
        ("v5e:3x3", "the nearest is v5e:2x4"),
        ("v6e:4x4x4", "the nearest is v6e:8x8"),
        ("v5:4x4", "no TPU 'v5'; did you mean 'v5"),
        ("v5p", "chips along each axis belong after the colon; such as v5p:"),
        ("v5p:4*4", "'4*4' is no shape"),
        ("v4:64x64x64", "the nearest is v4:16x16x16"),
        ("auto:v5", "no TPU 'v5'; did you mean 'v5"),
        ("auto:v5e,v7", "no TPU 'v7'; known: v4, v5e, v5p, v6e; such as v5p:4x4x4, auto:v5p"),
    ],
)
def test_a_topology_that_does_not_exist(text, said):
    with pytest.raises(UserError, match=f"^{re.escape(f'--target={text}: ')}.*{re.escape(said)}"):
        train.main(["train", "--config=inherit_gpt2.py:smoke", f"--target={text}"])


def test_slices_in_ascending_order():
    """Of several chips of one number the least memory first; whole hosts of v4 and v5p."""
    names = [str(t) for t in chips.ascending("auto")]
    assert names[:7] == ["v5e:1x1", "v6e:1x1", "v5e:2x2", "v4:2x2x1", "v6e:2x2", "v5p:2x2x1", "v5e:2x4"]
    flat = [str(t) for t in chips.ascending("auto:v6e")]
    assert flat == [f"v6e:{n}" for n in ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")]
    assert "v5p:4x4x4" in names and "v5p:4x4x16" not in names  # noqa: PT018
    assert {t.generation for t in chips.ascending("auto:v4,v5e")} == {"v4", "v5e"}


def test_rings_and_links():
    """As pods are wired: cubes of 64 in rings, less in lines; flat ones have rings of 16."""
    ingress = {"v5p:4x4x4": 540e9, "v5p:2x2x4": 270e9, "v6e:4x4": 180e9, "v5e:4x4": 90e9, "v5e:16x16": 180e9}
    assert {name: chips.parse(name).ingress for name in ingress} == ingress
    assert str(chips.parse("v5p:8x4x4").larger()) == "v5p:4x8x8"


@pytest.mark.parametrize(
    ("asked", "dtype", "seq_len", "head_dim", "said"),
    [
        ("splash", "bfloat16", 8192, 128, "splash, blocks of 1,024"),
        ("splash", "bfloat16", 1500, 64, "splash, blocks of 768"),  # two of one size, a multiple of 128
        ("splash", "float32", 2048, 256, "splash, blocks of 512"),
        ("blocked", "float32", 4096, 64, "blocked, 128 queries each"),
        ("auto", "float32", None, 64, "xla"),
    ],
)
def test_what_is_said_of_attention(asked, dtype, seq_len, head_dim, said):
    assert described(asked, dtype=dtype, seq_len=seq_len, head_dim=head_dim, packed=False) == said


def configuration(*more):
    overrides = [tuple(a.removeprefix("--config.").split("=", 1)) for a in GPT2[1:]]
    return load("inherit_gpt2.py:smoke", [*overrides, *more])


@pytest.fixture
def compiling():
    """What has been compiled before is compiled again."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("compiling")
def test_memory_is_what_the_compiler_says(tmp_path):
    """On eight devices of a CPU, where programs are compiled to the end: of the step that a run makes."""
    config = configuration(("mesh.data", "2"), ("mesh.fsdp", "4"), ("step.accumulation", "1"))
    mesh = make_mesh(MeshConfig(**config.mesh))
    stage = lowered.stage_of(config, mesh)
    assert (stage.name, stage.model.num_layers, stage.data.seq_len) == ("reference", 4, 32)
    program, facts = lowered.lower("train_step", config, stage, mesh)
    compiled = program.compile(compiler_options={"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True})
    stats, plan = compiled.memory_analysis(), dump.read_dump(tmp_path, facts)
    assert plan.memory.arguments == stats.argument_size_in_bytes
    assert plan.memory.temporary == stats.temp_size_in_bytes
    returned = stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert plan.memory.outputs + plan.memory.constants == pytest.approx(returned, abs=1000)
    assert 0 <= plan.memory.arguments - sum(facts["memory"].values()) < 2000  # the batch, and counters
    bound = roofline(plan, chips.parse("v5e:2x4"))
    assert bound.flops >= facts["flops"] / 8
    assert {axes for _, axes, _ in bound.received} >= {"fsdp", "data"}


TOO_LARGE = dump.Memory(arguments=4 * 2**30, outputs=0, constants=0, temporary=14 * 2**30)


@pytest.fixture
def planned(monkeypatch):
    """Nothing is compiled: the layer from above, with so much memory."""
    asked = []

    def compiled(module, given, directory, generation, whole):
        config, topology, name, _ = given
        asked.append((ConfigDict(config), topology, name))
        facts = {
            "stage": "reference", "mesh": {"data": 4, "fsdp": 2, "tensor": 1}, "layers": 4, "parameters": 10_000,
            "rows": 64, "seq_len": 32, "accumulation": 2, "remat": "dots", "flops": 4e8,
            "memory": {"parameters": 2**30}, "beside": 0, "partial": False, "micro_batches": [1, 2, 4, 8],
            "attention": "splash, blocks of 32",
        }  # fmt: skip
        assert topology.generation == "v5e"
        fits = name != "train_step" or given[0]["step"]["accumulation"] == 8
        facts["accumulation"] = given[0]["step"]["accumulation"] or 1
        memory = TOO_LARGE if not fits else dataclasses.replace(TOO_LARGE, temporary=1)
        text = LAYER.replace("GATHER", "").replace("SCATTER", "").replace("REDUCE", "")
        return dump.Plan(memory, hlo.parse(text), facts, 7.0)

    monkeypatch.setattr(target, "compiled", compiled)
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: name)
    return asked


def test_what_is_said_of_a_target(planned, tmp_path, capsys):
    file = tmp_path / "figures.json"
    command = ["train", "--config=heal_tunguska.py", "--target=v5e:2x4", f"--target-json={file}"]
    train.main(command)  # in as many micro-batches as fit
    assert "64 rows of 32 in 8 micro-batches, remat dots; attention: splash, blocks of 32\n" in capsys.readouterr().out
    assert [config.step.accumulation for config, _, _ in planned] == [0, 2, 4, 8, 0, 0]
    planned.clear()
    command.append("--config.step.accumulation=2")
    fits = "it fits with --config.step.accumulation=8, in 4.00 GiB"
    with pytest.raises(UserError, match=rf"18\.00 GiB a chip, which has 15\.75; {fits}$"):
        train.main(command)
    printed = capsys.readouterr()
    assert "from its sizes as they were published" in printed.err
    assert [name for _, _, name in planned] == ["train_step", "eval_step", "decode", "train_step", "train_step"]
    assert [config.step.accumulation for config, _, _ in planned] == [2, 2, 2, 4, 8]  # what may do is tried
    assert planned[0][0].base.path.endswith("mistralai--Mistral-Small-Instruct-2409")
    for line in (
        "heal_tunguska.py on v5e:2x4: 8 chips, mesh data 4 x fsdp 2 x tensor 1",
        "     18.000 GiB  peak, of 15.75 GiB: IT DOES NOT FIT",
        "     14.000 GiB  gradients, activations",
        "planned in 7 s of CPU",
        "assumed of a v5e: 197 TFLOP/s, 0.819 TB/s of HBM, 90 GB/s",
    ):
        assert line in printed.out
    assert list(tmp_path.iterdir()) == [file]
    step, *_ = json.loads(file.read_text())
    assert step["memory"]["peak"] == 18 * 2**30
    assert not step["memory"]["fits"]
    assert step["bound"] == pytest.approx(sum(step["seconds"].values()))
    assert step["tokens_per_second"] == pytest.approx(64 * 32 / step["bound"])


@pytest.fixture
def fake(monkeypatch):
    """Nothing is compiled: a state of so many GiB, and for each row of a micro-batch more; shards cost some time."""
    said = types.SimpleNamespace(asked=[], state=437.0)
    rows = {"dots": 30.0, "context": 12.0, "full": 9.0, "offload": 9.0}
    times = {"dots": 1.0, "context": 1.1, "full": 1.2, "offload": 1.3}

    def compiled(module, given, directory, generation, whole):
        config, topology, name, _ = given
        mesh = target.mesh_sizes(config["mesh"], topology.count)
        count, remat = config["step"]["accumulation"], config["compute"]["remat"]
        said.asked.append((str(topology), mesh["data"], remat, count, name))
        parts = mesh["data"] * mesh["fsdp"]
        assert parts * mesh["tensor"] == topology.count
        assert config["batch_size"] % (parts * count) == config["eval"]["batch_size"] % parts == 0
        facts = {
            "stage": "healed", "mesh": mesh, "layers": 4, "parameters": 10_000, "rows": config["batch_size"],
            "seq_len": 32, "accumulation": count, "remat": remat, "flops": 4e8, "memory": {}, "beside": 0,
            "partial": False, "micro_batches": [], "attention": "splash, blocks of 32",
            "seconds": times[remat] * (1 + count / 100) * (1 + mesh["fsdp"] / 1000),
        }  # fmt: skip
        held = said.state / (mesh["fsdp"] * mesh["tensor"])
        temporary = rows[remat] * config["batch_size"] / parts / count if name == "train_step" else 0.0
        memory = dump.Memory(arguments=int(held * 2**30), outputs=0, constants=0, temporary=int(temporary * 2**30))
        return dump.Plan(memory, hlo.parse(LAYER), facts, 7.0)

    monkeypatch.setattr(target, "compiled", compiled)
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(target, "roofline", lambda plan, _: Roofline(1.0, 1.0, {}, {"products": plan.facts["seconds"]}))
    return said


def test_the_smallest_that_fits(fake, tmp_path, capsys):
    """Arithmetic spares what cannot fit; on each slice what takes least is first, then the fastest is looked for."""
    file = tmp_path / "figures.json"
    train.main(["train", "--config=heal_tunguska.py", "--target=auto:v5e", f"--target-json={file}"])
    # 437 GiB between steps are 28 chips. On 32 and 64 of them a row of 9 beside 13.7 and 6.8 is too much for 15.75.
    assert fake.asked == [
        ("v5e:4x8", 1, "full", 8, "train_step"), ("v5e:4x8", 1, "offload", 8, "train_step"),
        ("v5e:8x8", 1, "full", 4, "train_step"), ("v5e:8x8", 1, "offload", 4, "train_step"),
        ("v5e:8x16", 1, "full", 2, "train_step"), ("v5e:8x16", 1, "dots", 1, "train_step"),
        ("v5e:8x16", 1, "context", 1, "train_step"), ("v5e:8x16", 1, "context", 2, "train_step"),
        ("v5e:8x16", 1, "full", 1, "train_step"),
        ("v5e:8x16", 1, "context", 2, "eval_step"), ("v5e:8x16", 1, "context", 2, "decode"),
    ]  # fmt: skip
    printed = capsys.readouterr()
    assert printed.err.count("trying") == 9
    assert "trying v5e:4x8, fsdp 32, 8 micro-batches, remat full" in printed.err
    flags = "--config.mesh.fsdp=128 --config.step.accumulation=2 --config.compute.remat=context"
    command = f"python -m jaxup.train --config=heal_tunguska.py {flags} --config.eval.batch_size=128"
    out = re.sub(" +", " ", printed.out)
    for line in (
        "slice mesh micro-batches remat peak GiB of s a step chip-seconds",
        "v5e:4x8 fsdp 32 8 full 22.66 15.75 too large",
        "v5e:8x16 fsdp 128 2 context 15.41 15.75 1.27 162",
        f" {command}",
    ):
        assert f"{line}\n" in out
    assert "heal_tunguska.py on v5e:8x16: 128 chips, mesh " in out
    assert "a token of the sample" in out
    figures = json.loads(file.read_text())
    assert (figures["target"], figures["command"]) == ("v5e:8x16", command)
    assert [one["program"] for one in figures["programs"]] == list(target.PROGRAMS)
    assert [one["fits"] for one in figures["tried"]] == [*[False] * 4, True, False, False, True, False]


def test_what_is_given_stays(fake, capsys):
    fake.state = 4.0
    given = ["--config.step.accumulation=4", "--config.eval.batch_size=96"]
    train.main(["train", "--config=inherit_gpt2.py:medium", "--target=auto:v6e", *given])
    steps = {one[:4] for one in fake.asked}
    assert {count for _, _, _, count in steps} == {4}
    # One chip says that 28 are needed at least, of 32 each has 3 rows of a micro-batch; whole states are faster.
    assert [one[:3] for one in fake.asked] == [
        ("v6e:1x1", 1, "full"), ("v6e:1x1", 1, "offload"), ("v6e:4x8", 1, "full"),
        ("v6e:4x8", 32, "dots"), ("v6e:4x8", 32, "context"), ("v6e:4x8", 32, "full"),
        ("v6e:4x8", 1, "dots"), ("v6e:4x8", 1, "context"), *[("v6e:4x8", 32, "full")] * 2,
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert f"medium {' '.join(given)} --config.mesh.data=32 --config.compute.remat=full\n" in out


def test_nothing_fits(fake, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake.state = 1e5
    said = (
        r"--target=auto:v5e: healed fits on no slice: on v5e:4x8 it takes 3134\.00 GiB of each chip, which has 15\.75; "
    )
    with pytest.raises(UserError, match=f"^{said}adapters"):
        train.main(["train", "--config=heal_tunguska.py", "--target=auto:v5e", "--target-json=x"])
    assert len(fake.asked) == 2  # and they say how many it would need
    assert "too large" in capsys.readouterr().out
    monkeypatch.setattr(trial, "needed", lambda stage, mesh: 2**60)
    with pytest.raises(
        UserError, match=r"healed keeps 1073741824\.00 GiB between steps: no slice that its rows divide"
    ):
        train.main(["train", "--config=heal_tunguska.py", "--target=auto:v5e"])
    assert len(fake.asked) == 2
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--target=auto: compiling for TPUs needs libtpu; install jaxup\[tpu\]$"):
        train.main(["train", "--config=heal_tunguska.py", "--target=auto"])
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_come_along(capsys):
    """Of the models that shipped files name, those that the files themselves say, and published sums."""
    config = load("inherit_llama.py")
    stood = load("inherit_llama.py")
    target.stand_in(stood)
    assert "published" in capsys.readouterr().err
    assert load_config(stood.reference.path) == new_model(config.model)
    sums = {
        "mistralai/Mistral-Small-Instruct-2409": 22_247_282_688, "mistralai/Mistral-7B-v0.1": 7_241_732_096,
        "meta-llama/Llama-3.1-8B": 8_030_261_248,
    }  # fmt: skip
    for name, params in sums.items():
        config = load("heal.py", [("base.path", name)])
        target.stand_in(config)
        assert count_params(load_config(config.base.path)) == params


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config=heal_tunguska.py", "--target=v5p:4x4x4"], "compiling for TPUs needs libtpu; install jaxup[tpu]"),
        (["--config=heal_tunguska.py", "--target-json=x"], "--target-json=x: goes with --target"),
        (["--config=heal.py", "--target=auto", "--target-compile"], "--target-compile: goes with --target=SLICE"),
        (["--config=heal.py", "--target=v4:2x2x1", "--dry-run"], "runs and writes nothing; leave --dry-run out"),
        (["--resume=run", "--target=v5p:4x4x4"], "--target=v5p:4x4x4: goes with --config"),
    ],
)
def test_what_a_target_needs(flags, said, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)):
        train.main(["train", *flags])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "where"),
    [
        ("heal_tunguska.py", "", "v5p:4x4x4"),
        ("heal_tunguska.py:freeze_originals", "", "v5p:4x4x4"),
        ("heal_tunguska.py:lora", "", "v5p:4x4x4"),
        ("heal.py", "base.path=mistralai/Mistral-7B-v0.1 plan=solar(base,8)", "v6e:4x4"),
        ("inherit_gpt2.py:medium", "", "v5e:4x4"),
        ("inherit_gpt2.py:large", "", "v5e:4x4"),
        ("inherit_gpt2.py:xl", "", "v5e:4x4"),
        ("inherit_llama.py", "", "v5e:4x4"),
        ("ecar.py:paper", "", "v5e:4x4"),
    ],
)
def test_shipped_configurations_fit(name, changes, where):
    """By the compiler for TPUs itself, which docs/pods.md has the figures of."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs")
    config = load(name, [tuple(change.split("=", 1)) for change in changes.split()])
    target.stand_in(config)
    one = target.plan(config, chips.parse(where), "train_step")
    assert one.fits
    assert 0 <= one.plan.memory.arguments - sum(one.plan.facts["memory"].values()) < 0.2 * one.plan.memory.arguments
    bound = one.bound
    # What is computed again is at most another pass forward; of the part that trains alone, less.
    assert 0.4 < bound.flops / (one.plan.facts["flops"] / one.topology.count) < 1.6
    assert bound.received
    if not one.plan.facts["partial"]:  # it counts as if everything trained
        assert 0.1 < one.mfu < 0.9


@pytest.mark.slow
def test_down_to_the_code(capsys):
    pytest.importorskip("libtpu", reason="the compiler for TPUs")
    config = load("inherit_gpt2.py:medium")
    target.stand_in(config)
    one = target.plan(config, chips.parse("v5e:1x1"), "decode", whole=True)
    assert one.fits
    target.told("inherit_gpt2.py:medium", [one])
    assert re.search(r"; compiled in \d+ s of CPU\n", capsys.readouterr().out)


@pytest.mark.slow
def test_a_proposal_by_the_compiler(capsys):
    pytest.importorskip("libtpu", reason="the compiler for TPUs")
    train.main(["train", "--config=inherit_gpt2.py:medium", "--target=auto:v5e"])
    printed = capsys.readouterr()
    command = re.search(r"smallest that fits is (v5e:\w+), .*\n  python -m jaxup.train (.*)\n$", printed.out)
    assert command is not None
    train.main(["train", *command[2].split(), f"--target={command[1]}"])  # is the same, and fits
    assert "IT DOES NOT FIT" not in capsys.readouterr().out
