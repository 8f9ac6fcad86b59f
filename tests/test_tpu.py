"""What only the TPU's compiler can show, which needs no TPU: `pip install libtpu`; elsewhere skipped."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxup.experiments.lowered import devices_of
from jaxup.model.attention import attention
from jaxup.targets import chips

pytestmark = pytest.mark.slow


def mesh_of(topology, axis):
    """The four devices of a slice that is not here."""
    pytest.importorskip("libtpu", reason="needs the TPU's compiler: pip install libtpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ["TPU_ACCELERATOR_TYPE"] = topology.split(":")[0] + "-8"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return jax.make_mesh((2, 2), ("data", axis), axis_types=(AxisType.Auto,) * 2, devices=devices)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "seq", "window", "packed", "dtype", "axis"),
    [
        (64, 16, 16, 1024, None, False, "bfloat16", "tensor"),
        (64, 16, 16, 16_384, 1000, True, "bfloat16", "tensor"),
        (100, 8, 8, 4096, None, True, "bfloat16", "tensor"),
        (128, 8, 2, 4096, None, True, "bfloat16", "tensor"),
        (128, 8, 2, 16_384, None, True, "bfloat16", "context"),
        (256, 4, 1, 4096, None, True, "float32", "tensor"),
    ],
)
def test_the_kernel_of_attention_compiles(topology, head_dim, heads, kv_heads, seq, window, packed, dtype, axis):
    """Forward and backward, down to the code: that is where its blocks may not fit fast memory."""
    mesh = mesh_of(topology, axis)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    q, k = (jax.ShapeDtypeStruct((2, seq, n, head_dim), dtype, sharding=rows) for n in (heads, kv_heads))
    ids = jax.ShapeDtypeStruct((2, seq), jnp.int32, sharding=rows)

    def total(q, k, v, ids):
        out = attention(q, k, v, window=window, segment_ids=ids if packed else None, batch_axes=("data",))
        return jnp.sum(out.astype(jnp.float32))

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k, ids).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == (2 if seq <= 8192 else 3)
    assert program.memory_analysis().peak_memory_in_bytes < heads * seq**2 * 4  # no logits of all positions


@pytest.mark.parametrize("name", ["v4:1x1x1", "v5e:1x1", "v5p:1x2x1", "v6e:1x1", "v5e:2x2"])
def test_slices_that_are_less_than_a_host(name):
    pytest.importorskip("libtpu", reason="needs the TPU's compiler: pip install libtpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    topology = chips.parse(name)
    assert len(devices_of(topology)) == topology.count
