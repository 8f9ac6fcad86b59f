"""The one table of a decoder's parameters, by name. Whatever needs to know of a parameter reads it here.

Modules are built from it; so are initial values, shapes, shardings, counts, FLOPs, the parts that
depth plans know, and the tensors of model files. It needs no jax.

Glossary: a *path* is the dotted name of a parameter, as transformers names modules in its LLaMA models, whatever
the family: one vocabulary for recipes, filters and reports. What is under "blocks" is *stacked*: the layer is axis 0.
A *part* is what plans inherit together: of a block attention, mlp or norms; each of the *ends* (embeddings, final
norm, head) by itself. What stands *beside* the decoder is of no plan: it trains, and is saved apart.

Axes: L layers, D hidden, N heads, K key/value heads, H head_dim, F MLP width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxup.model.config import LayerKind, ModelConfig

STACK = "blocks."  # what the paths of stacked parameters begin with,
BESIDE = "beside."  # and those of what is not the decoder's own: `ModelConfig.beside`


class Param(NamedTuple):
    """One parameter, a stacked one with all its layers."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # their names, from which shardings follow; "layers" first if it is stacked
    part: str
    fill: float = 0.0  # its first value,
    std: float = 0.0  # or, if not 0, the standard deviation of its first values, normal around 0
    inputs: int = 0  # of a kernel: how many axes are inputs, that of the layers not counted

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers" and self.part != "beside"  # a second decoder's are no layers of this one

    @property
    def each(self) -> tuple[int, ...]:
        """Its shape in one layer."""
        return self.shape[self.stacked :]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@functools.lru_cache(maxsize=64)
def spec(config: ModelConfig) -> Mapping[str, Param]:
    """Path -> parameter, of a `jaxup.model.decoder.Decoder` of this config."""
    return MappingProxyType(dict(_table(config)))


def _table(c: ModelConfig) -> Iterator[tuple[str, Param]]:
    sizes = {
        "layers": c.num_layers, "embed": c.hidden_size, "heads": c.num_heads, "kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim, "mlp": c.intermediate_size, "vocab": c.vocab_size, "positions": c.max_positions,
        "norm": c.hidden_size,
    }  # fmt: skip
    # Of what is added to the residual stream, as GPT-2 has it.
    residual_std = c.init_std / (2 * c.num_layers) ** 0.5 if c.scaled_init else c.init_std
    peri = "peri" in c.placements

    def param(
        path: str, axes: str, part: str, *, fill: float = 0.0, std: float = 0.0, inputs: int = 0
    ) -> tuple[str, Param]:
        names = (("layers " if path.startswith(STACK) else "") + axes).split()
        return path, Param(tuple(sizes[name] for name in names), tuple(names), part, fill, std, inputs)

    def norm(path: str, part: str, axes: str = "norm", *, bias: bool = c.norm_bias) -> Iterator[tuple[str, Param]]:
        yield param(f"{path}.scale", axes, part, fill=1.0 - c.norm_offset)
        if bias:
            yield param(f"{path}.bias", axes, part)

    def linear(
        path: str, inputs: str, outputs: str, part: str, *, bias: bool, std: float = c.init_std
    ) -> Iterator[tuple[str, Param]]:
        yield param(f"{path}.kernel", f"{inputs} {outputs}", part, std=std, inputs=len(inputs.split()))
        if bias:
            yield param(f"{path}.bias", outputs, part)

    yield param("embed_tokens", "vocab embed", "embed_tokens", std=c.embed_std or c.init_std)
    if c.positions == "learned":
        yield param("embed_positions", "positions embed", "embed_positions", std=c.init_std)
    yield from norm("blocks.input_layernorm", "norms")
    attention = functools.partial(linear, part="attention")
    yield from attention("blocks.self_attn.q_proj", "embed", "heads head_dim", bias=c.qkv_bias)
    yield from attention("blocks.self_attn.k_proj", "embed", "kv_heads head_dim", bias=c.qkv_bias)
    yield from attention("blocks.self_attn.v_proj", "embed", "kv_heads head_dim", bias=c.qkv_bias)
    yield from attention("blocks.self_attn.o_proj", "heads head_dim", "embed", bias=c.o_bias, std=residual_std)
    if c.qk_norm:
        for name in "qk":
            yield from norm(f"blocks.self_attn.{name}_norm", "attention", "head_dim", bias=False)
    if peri:
        yield from norm("blocks.attention_output_layernorm", "norms")
    yield from norm("blocks.post_attention_layernorm", "norms")
    mlp = functools.partial(linear, part="mlp", bias=c.mlp_bias)
    if c.gated_mlp:
        yield from mlp("blocks.mlp.gate_proj", "embed", "mlp")
    yield from mlp("blocks.mlp.up_proj", "embed", "mlp")
    yield from mlp("blocks.mlp.down_proj", "mlp", "embed", std=residual_std)
    if peri:
        yield from norm("blocks.feedforward_output_layernorm", "norms")
    yield from norm("norm", "norm")
    if not c.tie_embeddings:
        yield from linear("lm_head", "embed", "vocab", "lm_head", bias=False)
    # Last, so that the decoder's own first values are what they are without it.
    for b in c.beside:
        yield BESIDE + b.path, Param(b.shape, b.axes, "beside", b.fill, b.std, b.inputs)


# Every parameter that some model has.
_LARGEST = ModelConfig(
    vocab_size=1, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=1,
    max_positions=1, norm="layernorm", norm_eps=1e-6, positions="learned", rope_theta=None, activation="silu",
    gated_mlp=True, tie_embeddings=False, norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True,
    kinds=(LayerKind(placement="peri"),),
)  # fmt: skip
PART_OF: Mapping[str, str] = MappingProxyType({path: param.part for path, param in spec(_LARGEST).items()})


def count_params(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(param.size for param in spec(config).values())


def depth_params(config: ModelConfig) -> tuple[int, int]:
    """Number of parameters of what is no layer, and of one layer."""
    blocks = sum(param.size for param in spec(config).values() if param.stacked)
    return count_params(config) - blocks, blocks // config.num_layers


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one training token (forward + backward), as PaLM's appendix B counts them.

    6 per weight of every matrix product, head included, embedding look-ups excluded; attention
    adds 12 * heads * head_dim * seq_len per layer, halved because a causal token sees on
    average half the sequence. Rematerialised work is not counted, nor what is done beside the decoder.
    """
    table = spec(config)
    products = sum(param.size for path, param in table.items() if is_kernel(path) and param.part != "beside")
    products += table["embed_tokens"].size if config.tie_embeddings else 0
    spans = sum(min(seq_len, 2 * (kind.window or seq_len)) for kind in config.kinds_of_layers)
    return 6 * products + 12 * config.num_heads * config.head_dim * spans / 2


def is_kernel(path: str) -> bool:
    """Whether the parameter is the matrix of a linear layer: what is decayed, mixed with noise and given adapters."""
    return path.rpartition(".")[2] == "kernel"


# ---- trees of parameters


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict from path to leaf."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def without_beside(params: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's own: params of `ModelConfig.alone`."""
    return {name: value for name, value in params.items() if name != "beside"}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *owners, name = path.split(".")
        functools.reduce(lambda node, owner: node.setdefault(owner, {}), owners, tree)[name] = leaf
    return tree
