"""From the names of a parameter's axes to its sharding, by one rule table."""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxup.model.config import ModelConfig
from jaxup.model.spec import spec, unflatten

# A parameter's axis -> the mesh axes that split it. `fsdp` and `context`, whose devices have other tokens, split every
# matrix once more along its hidden axis; XLA gathers a layer just before the scan uses it. Axes not named stay whole,
# as do those whose mesh axis is not there.
RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp", "context"), "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",),
    "vocab": ("tensor",),
}  # fmt: skip


def splits(axis: str, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that split a parameter's axis: of those that would, the first so many that divide its size."""
    names = named(axis, mesh)
    while size % math.prod(mesh.shape[name] for name in names):
        names = names[:-1]
    return names


def named(axis: str, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that would split a parameter's axis."""
    return tuple(name for name in RULES.get(axis, ()) if mesh.shape.get(name, 1) > 1)


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The rule table applied to one parameter."""
    return PartitionSpec(*(splits(axis, size, mesh) or None for axis, size in zip(axes, shape)))


def undivided(model: ModelConfig, mesh: Mesh) -> dict[str, int]:
    """Axes of the decoder's own parameters, with their sizes, that some axis of the mesh would split and does not."""
    own = [param for param in spec(model).values() if param.part != "beside"]
    axes = {axis: size for param in own for axis, size in zip(param.axes, param.shape)}
    return {axis: size for axis, size in axes.items() if splits(axis, size, mesh) != named(axis, mesh)}


def param_shardings(model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """A NamedSharding for each parameter."""
    return unflatten({
        path: NamedSharding(mesh, partition_spec(param.axes, param.shape, mesh))
        for path, param in spec(model).items()
    })  # fmt: skip
