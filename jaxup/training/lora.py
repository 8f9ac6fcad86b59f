"""Low-rank adapters (LoRA, Hu et al. 2021) over stacked blocks, whose kernels may be quantised (QLoRA, Dettmers et al.
2023).

Initialisers, scaling, quantisation and dequantisation are qwix's, and so is the function: that of
`qwix.apply_lora_to_model` on the unstacked blocks, with tests to show it. Its interception of calls is
not used: it misses products that are inside of a jit, and, without a word, kernels that are quantised
and reshaped. So `Linear` knows of both.

Names: kernels [in, out] with inputs and outputs as one axis each, adapters A [in, rank], B [rank, out].
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxup.errors import UserError, suggest
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Params
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import BESIDE, flatten, is_kernel, spec, unflatten
from jaxup.training.partition import Masks, Partition

QUANTISED = ("nf4", "int4", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int  # 0 = no adapters: what the masks choose trains itself
    alpha: float  # A @ B is multiplied by alpha / rank
    quantize: str  # what the blocks' kernels are stored as: nf4, int4, int8, or "" = as they are
    tile_size: int  # rows of a kernel [in, out] that share a scale (64 in the QLoRA paper); 0 = all


@dataclasses.dataclass(frozen=True)
class _Kernel:
    shape: tuple[int, ...]  # [L, *inputs, *outputs]
    inputs: int  # axes
    rows: np.ndarray  # int: the layers that have an adapter

    @property
    def matrix(self) -> tuple[int, int]:
        return math.prod(self.shape[1 : 1 + self.inputs]), math.prod(self.shape[1 + self.inputs :])


class Adapters(Partition):
    """Adapters for those kernels of linear layers in blocks that `masks` choose; only the adapters train, and what is
    beside the decoder.

    Biases, norms, embeddings and the head are frozen even where the masks choose them; a layer that they
    leave out runs without adapters. With `quantize` the kernels of all blocks are stored quantised.
    UserError if qwix is not installed, the masks choose no kernel, or a value of `config` cannot be.
    """

    def __init__(self, model: ModelConfig, compute: Compute, masks: Masks, config: LoraConfig, seed: int):
        super().__init__(model, compute, masks)
        self._qwix, self._config, self._seed = _import_qwix(), config, seed
        self.rounds = bool(config.quantize)
        decoder = nnx.merge(self._graphdef, self._shapes)
        self._kernels = {  # by the path of their module
            path.removesuffix(".kernel"): _Kernel(param.shape, param.inputs, self.rows(path))
            for path, param in spec(model).items()
            if param.stacked and is_kernel(path)
        }
        _check(config, self._kernels)

        self._masks = {path: mask & path.startswith(BESIDE) for path, mask in self._masks.items()}
        self._beside = [path for path in self._masks if path.startswith(BESIDE)]
        for path, kernel in self._kernels.items():
            if not len(kernel.rows):
                continue
            (inputs, outputs), count = kernel.matrix, len(kernel.rows)
            module = functools.reduce(getattr, path.split("."), decoder)
            module.lora_scale = config.alpha / config.rank
            module.kernel_lora_a = _param(count, inputs, config.rank)
            module.kernel_lora_b = _param(count, config.rank, outputs)
            chosen = np.isin(np.arange(model.num_layers), kernel.rows).reshape(-1, 1, 1)
            self._masks |= {f"{path}.kernel_lora_a": chosen, f"{path}.kernel_lora_b": chosen}
        self._graphdef, state = nnx.split(decoder)
        self._shapes = nnx.to_pure_dict(state)

    def split(self, params: Params) -> tuple[Params, Params]:
        """(fresh adapters in float32, with what is beside; the params with kernels quantised if they are to be).

        A depends only on the seed, the kernel's name and the layer. B is zero, so at first the
        adapters add nothing.
        """
        frozen = flatten(params)
        trained = {path: frozen.pop(path) for path in self._beside}
        for path, kernel in self._kernels.items():
            if self._config.quantize:
                frozen[f"{path}.kernel"] = self._quantise(kernel, frozen[f"{path}.kernel"])
            if len(kernel.rows):
                trained[f"{path}.kernel_lora_a"] = self._draw(path, kernel)
                trained[f"{path}.kernel_lora_b"] = jnp.zeros((len(kernel.rows), self._config.rank, kernel.matrix[1]))
        return unflatten(trained), unflatten(frozen)

    def join(self, trained: Params, frozen: Params) -> Params:
        """The params of a plain Decoder that computes the same: what is frozen, dequantised, with the adapters added.

        Where kernels are quantised they have lost precision; `merge` adds to those that `split` was given.
        """
        flat = flatten(frozen)
        if self._config.quantize:
            for path, kernel in self._kernels.items():
                dequantised = jax.lax.map(self._qwix.dequantize, flat[f"{path}.kernel"])
                flat[f"{path}.kernel"] = dequantised.reshape(kernel.shape)
        return self.merge(trained, unflatten(flat | {path: flatten(trained)[path] for path in self._beside}))

    def merge(self, trained: Params, params: Params) -> Params:
        """`params` with the adapters added to their kernels, in float32, rounded to the kernel's dtype.

        Rows without adapters keep their every bit.
        """
        flat, adapters = flatten(params), flatten(trained)
        flat |= {path: adapters[path].astype(flat[path].dtype) for path in self._beside}
        for path, kernel in self._kernels.items():
            if not len(kernel.rows):
                continue
            a, b = (adapters[f"{path}.kernel_lora_{name}"].astype(jnp.float32) for name in "ab")
            # A TPU multiplies in bfloat16 unless told otherwise.
            added = jnp.matmul(a, b, precision="highest") * (self._config.alpha / self._config.rank)
            old = flat[f"{path}.kernel"]
            new = old[kernel.rows].astype(jnp.float32) + added.reshape(-1, *kernel.shape[1:])
            flat[f"{path}.kernel"] = jnp.asarray(old).at[kernel.rows].set(new.astype(old.dtype))
        return unflatten(flat)

    def shardings(self, mesh: Mesh) -> tuple[Params, Params]:
        """NamedShardings of `split`'s two trees: A, B and a quantised kernel are split as the kernel is."""
        frozen = flatten(param_shardings(self._model, mesh))
        trained = {path: frozen.pop(path) for path in self._beside}
        for path, kernel in self._kernels.items():
            # Of the axes that are inputs, and of those that are outputs, only the first is ever split.
            spec = frozen[f"{path}.kernel"].spec
            inputs, outputs = spec[1], spec[1 + kernel.inputs]
            place = lambda *axes: NamedSharding(mesh, PartitionSpec(None, *axes))  # noqa: E731
            if self._config.quantize:
                stack = jax.eval_shape(lambda k=kernel: self._quantise(k, jnp.zeros(k.shape)))
                frozen[f"{path}.kernel"] = dataclasses.replace(
                    stack, qvalue=place(inputs, outputs), scale=place(None, outputs)
                )
            if len(kernel.rows):
                trained[f"{path}.kernel_lora_a"] = place(inputs, None)
                trained[f"{path}.kernel_lora_b"] = place(None, outputs)
        return unflatten(trained), unflatten(frozen)

    def _draw(self, path: str, kernel: _Kernel) -> jax.Array:
        """[rows, in, rank]"""
        rule = self._qwix.LoraRule(rank=self._config.rank, alpha=self._config.alpha)
        key = jax.random.fold_in(jax.random.key(self._seed), zlib.crc32(path.encode()))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, kernel.rows)
        return jax.vmap(lambda key: rule.lora_a_initializer(key, (kernel.matrix[0], rule.rank)))(keys)

    def _quantise(self, kernel: _Kernel, stack: jax.Array) -> Any:
        """A QArray of [L, in, out], made layer by layer: the memory that quantising needs is that of one layer."""

        def quantise(layer: jax.Array) -> Any:
            tiles = {0: self._config.tile_size} if self._config.tile_size else {}
            matrix = layer.reshape(kernel.matrix)
            return self._qwix.quantize(matrix, self._config.quantize, channelwise_axes=[1], tiled_axes=tiles)

        return jax.lax.map(quantise, stack)


def _param(*shape: int) -> Any:
    return nnx.data(nnx.LoRAParam(jax.ShapeDtypeStruct(shape, jnp.float32)))


def _import_qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise UserError("lora: qwix is not installed; pip install 'jaxup[lora]'") from None
    return qwix


def _check(config: LoraConfig, kernels: dict[str, _Kernel]) -> None:
    if config.rank < 1:
        raise UserError(f"lora.rank={config.rank}: adapters need a rank of at least 1")
    if not 0 < config.alpha < math.inf:
        raise UserError(f"lora.alpha={config.alpha}: must be positive: A @ B is multiplied by alpha / rank")
    if config.quantize and config.quantize not in QUANTISED:
        raise UserError(f"lora.quantize={config.quantize!r}: unknown{suggest(config.quantize, QUANTISED)}")
    names = [path.rpartition(".")[2] for path in kernels]
    largest = max(min(kernel.matrix) for kernel in kernels.values())
    if config.rank > largest:
        raise UserError(f"lora.rank={config.rank}: more than the kernels themselves have, at most {largest}")
    if not any(len(kernel.rows) for kernel in kernels.values()):
        raise UserError(f"lora: no kernel of a block is among what is to train; adapters go to {', '.join(names)}")
    if config.tile_size < 0:
        raise UserError(f"lora.tile_size={config.tile_size}: must be at least 0; 0 = one scale for each column")
    for name, kernel in zip(names, kernels.values(), strict=True):
        inputs = kernel.matrix[0]
        if config.quantize and config.tile_size and inputs % config.tile_size:
            fits = math.gcd(config.tile_size, *(other.matrix[0] for other in kernels.values()))
            raise UserError(
                f"lora.tile_size={config.tile_size}: does not divide the {inputs} rows of {name}; {fits} would, and 0 "
                "makes one tile of all rows"
            )
