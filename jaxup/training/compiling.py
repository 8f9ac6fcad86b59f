"""What XLA is told when it compiles for TPUs, where what it does by itself does not suit split parameters."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxup.progress import say

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
