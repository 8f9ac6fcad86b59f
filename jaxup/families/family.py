"""What a family of transformers models is here: two tables, each used in both directions.

So an import and an export cannot disagree: `keys` and `rules` relate config.json to `ModelConfig`,
`modules` relates the names and layouts of tensors to the parameters of `jaxup.model.spec`. A key or
tensor that neither mentions is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from jaxup.families.keys import ACTIVATIONS, Key, Rule, activation, boolean
from jaxup.families.layouts import Layout, TensorRow
from jaxup.model.config import INITIAL, ModelConfig
from jaxup.model.spec import PART_OF, Param, is_kernel

# Keys of any config.json that would change the function, with the values that do not.
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "auto_map": (None,),  # code of the repository's own, which is never run
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    rules: tuple[Rule, ...]  # applied after the keys, in this order
    fixed: dict[str, tuple[Any, ...]]  # other keys that change the function: the values accepted
    fields: dict[str, Any]  # those of ModelConfig that nothing in config.json decides, unless they have their defaults
    obstacle: Callable[[ModelConfig], str | None] = lambda config: None  # what the sizes must be, if they are not
    has_bias: dict[str, bool] = dataclasses.field(default_factory=dict)  # transformers always has these
    modules: Mapping[str, str]  # module of ours -> its name in a file, {layer} for its number; see `tensor_name`
    kernels: Layout = "linear"  # of the blocks
    ignored_tensors: tuple[str, ...]  # constant buffers that old versions saved
    native: bool = False  # ours, which has all that a ModelConfig says and that transformers cannot load

    @functools.cached_property
    def decisive(self) -> frozenset[str]:
        """The keys that decide something, or would."""
        return frozenset(self.fixed).union((key.name for key in self.keys), *(rule.names for rule in self.rules))

    def full_name(self, stored: str, known: Collection[str]) -> str:
        """The name among `known` that transformers finds for one in a file; else what it is.

        The prefix of the base model may be left out, as where it was saved alone, or stand before what is beside it.
        """
        prefix = f"{self.modules['norm'].rpartition('.')[0]}."
        return next((name for name in (stored.removeprefix(prefix), prefix + stored) if name in known), stored)

    def tensor_name(self, path: str) -> str:
        """In the files, of a parameter, with {layer}; several may share a tensor, one after the other."""
        module, _, leaf = path.rpartition(".")
        return f"{self.modules[module or path]}.{'bias' if leaf == 'bias' else 'weight'}"

    def rows(self, table: Mapping[str, Param]) -> list[TensorRow]:
        """The tensors that hold the parameters of a `spec`."""
        held: dict[str, list[str]] = {}
        for path in table:
            held.setdefault(self.tensor_name(path), []).append(path)
        return [TensorRow(name, tuple(paths), *self._layout(paths[0], table)) for name, paths in held.items()]

    def _layout(self, path: str, table: Mapping[str, Param]) -> tuple[Layout, int]:
        if is_kernel(path):
            return self.kernels if table[path].stacked else "linear", table[path].inputs
        return "same" if path.startswith("embed_") else "flat", 1

    def obstacles(self, config: ModelConfig) -> Iterator[str]:
        """What a model of this family needs and `config` lacks."""
        yield from () if self.native else placed(config)
        config = without_placement(config)
        decided = set(self.has_bias).union(*(key.fields for key in self.keys), *(rule.fields for rule in self.rules))
        for field in dataclasses.fields(config):
            needed = self.fields.get(field.name, field.default)
            if field.name not in decided.union(INITIAL) and needed not in (
                dataclasses.MISSING,
                getattr(config, field.name),
            ):
                yield f"{field.name}={needed!r}"
        for obstacle in (self.obstacle, *(rule.obstacle for rule in self.rules)):
            if (need := obstacle(config)) is not None:
                yield need

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The keys that decide what the model computes."""
        hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for key in self.keys:
            values = [getattr(config, field) for field in key.fields]
            # Several fields under one key are either equal counts or biases that come together.
            hf[key.name] = any(values) if key.parse is boolean else values[0]
            if key.parse is activation:
                hf[key.name] = next(name for name, ours in ACTIVATIONS.items() if ours == values[0])
        for rule in self.rules:
            hf |= rule.write(config)
        return hf


def placed(config: ModelConfig) -> Iterator[str]:
    """What every family of transformers needs of where layers normalise, and `config` has otherwise."""
    kinds = config.kinds_of_layers
    for name, formula in {"post": "N(x + F(x))", "peri": "x + N(F(N(x)))"}.items():
        if layers := [layer for layer, kind in enumerate(kinds) if kind.placement == name]:
            which = "all" if len(layers) == len(kinds) else f"{len(layers)} of {len(kinds)}"
            yield f"x + F(N(x)) in every layer, and {which} of its layers are {formula} ({name})"
    if any(kind.norm_factor != 1 for kind in kinds):
        yield "norms without a factor (norm_factor)"


def without_placement(config: ModelConfig) -> ModelConfig:
    kinds = (dataclasses.replace(kind, placement="pre", norm_factor=1.0) for kind in config.kinds)
    return dataclasses.replace(config, kinds=tuple(kinds))


def our_names(prefix: str) -> dict[str, str]:
    """The modules of a family that names them as we do, those of blocks below `prefix`.layers."""
    modules = dict.fromkeys(path.rpartition(".")[0] or path for path in PART_OF)
    ours = {module: f"{prefix}.{module.replace('blocks.', 'layers.{layer}.')}" for module in modules}
    return {**ours, "lm_head": "lm_head"}
