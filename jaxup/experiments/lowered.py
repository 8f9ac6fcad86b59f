"""A program of a run, compiled for a topology in a process that `jaxup.experiments.target` starts and ends.

Standard input says what to compile. The compiler leaves what it plans in a directory; code generation, which comes
after that, takes ten times as long and answers nothing that is asked, so the process is ended meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxup.errors import UserError
from jaxup.experiments import kind_of
from jaxup.experiments.common import read_settings
from jaxup.experiments.config import section
from jaxup.model import sampling
from jaxup.model.attention import described
from jaxup.model.spec import count_params
from jaxup.targets.chips import Topology
from jaxup.targets.dump import FACTS, REFUSED
from jaxup.text import write_atomically
from jaxup.training.loop import abstract_params, make_program
from jaxup.training.run import Stage
from jaxup.training.sharding import MeshConfig, batch_sharding, check_batch, make_mesh, micro_batches, ordered
from jaxup.training.trial import arguments, held, needed

PROGRAMS = ("train_step", "eval_step", "decode")


def stage_of(config: ConfigDict, mesh: Mesh) -> Stage:
    """The one whose training takes most memory, as the run would train it; UserError for what would be refused."""
    settings = read_settings(config)
    check_batch("batch_size", settings.batch_size, mesh, settings.step.accumulation)
    check_batch("eval.batch_size", settings.eval_batch_size, mesh)
    experiment = kind_of(config)(config, settings, mesh)
    experiment.without_data()
    return max((s for s in experiment.stages(most=True) if s.steps), key=lambda s: (needed(s, mesh), s.flops))


def lower(name: str, config: ConfigDict, stage: Stage, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """One of PROGRAMS as the run jits it, on arguments without arrays; and what is known of it without its plan."""
    s, model = stage.settings, stage.model
    program = make_program(model, s.update, mesh, stage.selection, stage.objective)
    state, rate, *beside = arguments(stage, mesh)
    count = s.step.accumulation or 1
    rows = s.batch_size if name == "train_step" else s.eval_batch_size
    shape = ordered(stage.data.batches(batch_size=1, seed=0)(0), mesh)
    batch = {
        key: jax.ShapeDtypeStruct((rows, *value.shape[1:]), value.dtype, sharding=batch_sharding(mesh, value.ndim))
        for key, value in shape.items()
    }
    with jax.set_mesh(mesh):
        kernel = described(
            s.compute.attention, dtype=s.compute.dtype, seq_len=None if name == "decode" else stage.data.seq_len,
            head_dim=model.head_dim, packed=stage.data.packed, stepwise=stage.data.stepwise,
        )  # fmt: skip
    facts: dict[str, Any] = {
        "stage": stage.name, "mesh": dict(mesh.shape), "layers": model.num_layers, "parameters": count_params(model),
        "rows": rows, "seq_len": stage.data.seq_len, "accumulation": count, "remat": s.compute.remat,
        "flops": stage.flops * rows / s.batch_size / (1 if name == "train_step" else 3), "memory": held(stage, mesh),
        "beside": 0, "partial": stage.selection.partition is not None,
        "micro_batches": micro_batches(s.batch_size, mesh), "attention": kernel,
    }  # fmt: skip
    with jax.set_mesh(mesh):
        if name == "train_step":
            return program.cut_into(count).lower(state, batch, rate, *beside), facts
        if name == "eval_step":
            # A teacher is not asked, and stays where it is, as the optimizer does; and what trains beside its averages.
            idle = ["optimizer", "teacher", *["parameters"] * (state.ema is not None)]
            facts["beside"] = sum(facts["memory"].get(name, 0) for name in idle)
            frozen = beside[: len(beside) - (stage.objective.teacher is not None)]
            return program.eval_step.lower(state.averaged, batch, *frozen), facts
        params, c = abstract_params(model, mesh), config.sample
        decode = sampling.lowered(
            model, params, mesh, length=64 + c.tokens, temperature=c.temperature, top_k=c.top_k
        )  # fmt: skip
        return decode, {**facts, "rows": 1, "seq_len": 1, "flops": 2 * count_params(model), "memory": {}}


def devices_of(topology: Topology) -> list[Any]:
    """Devices that are only to be compiled for."""
    more: dict[str, Any] = {"chip_config_name": "megacore"} if topology.generation == "v4" else {}
    if any(topology.wrap):
        more["wrap"] = topology.wrap
    if topology.count < 4:  # a part of a host, which has four
        more["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
    return topologies.get_topology_desc(str(topology), "tpu", **more).devices


@contextlib.contextmanager
def _refusals(directory: Path) -> Iterator[None]:
    """What is wrong is for the process that started this one to say."""
    try:
        yield
    except UserError as error:
        write_atomically(directory / REFUSED, json.dumps({"what": error.what, "at": error.at, "hint": error.hint}))
        sys.exit(error.exit_code)


def main() -> None:
    given, topology, name, place = pickle.load(sys.stdin.buffer)
    config, directory = ConfigDict(given), Path(place)
    with _refusals(directory):
        mesh = make_mesh(section(MeshConfig, config.mesh), devices_of(topology))
        program, facts = lower(name, config, stage_of(config, mesh), mesh)
    write_atomically(directory / FACTS, json.dumps(facts))
    program.compile(compiler_options={"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True})
    os._exit(0)  # libtpu takes its time to leave


if __name__ == "__main__":
    main()
