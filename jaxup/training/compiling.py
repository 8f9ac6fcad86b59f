"""How a step is compiled: what XLA is told on TPUs, and into how many micro-batches it is cut so that it fits."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxup.errors import UserError, first_line
from jaxup.progress import say
from jaxup.targets.dump import Memory
from jaxup.text import read_json
from jaxup.together import gather, told
from jaxup.training.run import Run
from jaxup.training.rundir import write_json
from jaxup.training.sharding import micro_batches
from jaxup.training.step import StepConfig

# For split parameters, where what it does by itself does not suit them.
_TPU: dict[str, bool | str] = {
    # A product with gathered weights is one product. XLA would make a loop over the shards of it, whose sum, of the
    # whole product's size and in 16 bits, goes to memory and back in each turn.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # Weights of one layer are gathered while the products of another are computed.
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    # Each device gets the sum of the gradients that it keeps, not of all: half of the bytes.
    "xla_tpu_assign_all_reduce_scatter_layout": True,
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
}


@functools.lru_cache(maxsize=8)
def compiler_options(mesh: Mesh) -> dict[str, bool | str]:
    """For `jax.jit`: what the compiler for the devices of this mesh is told, be they here or those of a topology."""
    return accepted(mesh, _TPU) if mesh.devices.flat[0].platform == "tpu" else {}


def accepted(mesh: Mesh, options: Mapping[str, bool | str]) -> dict[str, bool | str]:
    """Without those that the compiler does not take, by which any program would fail; a line says which.

    They are not part of what a libtpu promises: it is asked, with a program that does nothing.
    """
    taken = dict(options)
    nothing = jax.jit(lambda: jnp.int32(0), out_shardings=NamedSharding(mesh, PartitionSpec())).lower()
    while taken:
        try:
            nothing.compile(compiler_options=taken)
            break
        except jax.errors.JaxRuntimeError as error:
            refused = next((name for name in taken if name in str(error)), None)
            if refused is None:
                raise
            del taken[refused]
            say(f"this compiler does not take the option {refused}: training may be slower")
    return taken


@contextlib.contextmanager
def memory(config: StepConfig) -> Iterator[None]:
    """Around a step: that the devices have not enough memory for it is a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _ran_out(error):
            raise
        what = f"the devices have not enough memory: {first_line(error)}"
        hint = "more micro-batches take less, 0 = the fewest that fit; so does compute.remat=full"
        raise UserError(what, at=f"step.accumulation={config.accumulation}", hint=hint) from None


def fitting_step(run: Run, name: str, make: Callable[[int], Any], inputs: Sequence[Any]) -> Callable:
    """A step of the run's model in the fewest micro-batches that there is memory for; see `fewest_that_fit`.

    The number is kept beside the model's checkpoints: where the run resumes on such devices it is the same.
    """
    s, path = run.settings, run.directory / "checkpoints" / name / "micro_batches.json"
    where = f"{s.batch_size} rows, {run.mesh.devices.flat[0].device_kind}, {dict(run.mesh.shape)}, {s.compute}"
    read = lambda: read_json(path, {"count": int, "where": str}, "delete it to find the number again")  # noqa: E731
    kept, counts = told(read, f"read {path}"), micro_batches(s.batch_size, run.mesh)
    if kept and kept["where"] == where and kept["count"] in counts:
        counts = counts[counts.index(kept["count"]) :]
    with run.processes.long_work():
        count, step = fewest_that_fit(make, counts, inputs, run.mesh)
    if jax.process_index() == 0:
        write_json(path, {"count": count, "where": where})
    cut = "at once" if count == 1 else f"in {count} micro-batches of {s.batch_size // count}"
    print(f"{name}: the {s.batch_size} rows of a step {cut}", flush=True)
    return step


def fewest_that_fit(
    make: Callable[[int], Any], counts: Sequence[int], inputs: Sequence[Any], mesh: Mesh
) -> tuple[int, Callable]:
    """Of these numbers of micro-batches, ascending, the first that the devices have memory for, and its step, compiled.

    `make` gives the step to jit for a number, and `inputs` are its arguments, or ShapeDtypeStructs with shardings. All
    processes take the same number. UserError if none fits.
    """
    room, least = _room(mesh), 0.0
    for count in counts:
        step, fits = None, False
        if count >= least:  # below that the program before has said that it cannot be
            try:
                step = make(count).lower(*inputs).compile()
                needs = _needs(step)
                fits, least = needs.total <= room, needs.least(count, room)
            except jax.errors.JaxRuntimeError as error:
                if not _ran_out(error):
                    raise
        if all(gather(fits, "done with compiling")):
            assert step is not None
            return count, step
    what = f"the devices have not enough memory for a step, not even in {counts[-1]} micro-batches"
    hint = "use more devices along fsdp or context, compute.remat=full, a shorter data.seq_len, or adapters (lora.rank)"
    raise UserError(what, at="step.accumulation=0", hint=hint)


def _ran_out(error: BaseException) -> bool:
    """Whether it says that there is too little memory: on TPUs when a program is compiled, elsewhere when it runs."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _room(mesh: Mesh) -> float:
    """Bytes of a device, where it is not its compiler that refuses what does not fit, and the device says so."""
    if mesh.devices.flat[0].platform == "tpu":
        return math.inf
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", math.inf)


def _needs(step: Any) -> Memory:
    """Of each device."""
    memory = step.memory_analysis()
    return Memory(
        arguments=memory.argument_size_in_bytes, constants=0, temporary=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )  # fmt: skip
