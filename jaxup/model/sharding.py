"""From the names of a parameter's axes to its sharding, by one rule table."""

from __future__ import annotations

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Params
from jaxup.model.spec import spec, unflatten

# A parameter's axis -> the mesh axis that splits it. `fsdp` splits every matrix once more along
# its hidden axis; XLA gathers a layer just before the scan uses it. Axes not named stay whole, as
# do those whose mesh axis is not there.
RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The rule table applied to one parameter; an axis whose size the mesh axis does not divide stays whole."""
    names = (RULES.get(axis) for axis in axes)
    return PartitionSpec(
        *(n if n in mesh.shape and size % mesh.shape[n] == 0 else None for n, size in zip(names, shape))
    )


def undivided(model: ModelConfig, mesh: Mesh) -> dict[str, int]:
    """Axes of the model's parameters, with their sizes, that would be split over the mesh and stay whole."""
    axes = {axis: size for param in spec(model).values() for axis, size in zip(param.axes, param.shape)}
    return {axis: size for axis, size in axes.items() if size % mesh.shape.get(RULES.get(axis), 1)}


def param_shardings(model: ModelConfig, mesh: Mesh) -> Params:
    """A NamedSharding for each parameter."""
    return unflatten({
        path: NamedSharding(mesh, partition_spec(param.axes, param.shape, mesh))
        for path, param in spec(model).items()
    })  # fmt: skip
