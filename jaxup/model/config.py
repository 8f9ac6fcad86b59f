"""`ModelConfig`: the shape and the function of a decoder, for all families."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxup.errors import UserError, nearest
from jaxup.text import kinds_of, misfit

MAX_LAYERS = 10_000  # ten times the deepest trained: a slip of the keyboard must not fill the memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed to reach beyond the context a model was first trained on.

    `linear` divides all of them by `factor` (arXiv 2306.15595); `llama3` the low ones, and blends up to the
    high ones (LLaMA 3.1's reference code); `yarn` does so by dimension, and multiplies cosines and sines by
    `attention_factor` (arXiv 2309.00071). Fields that a kind does not use are 0, or None.
    """

    kind: str  # "linear", "llama3" or "yarn"
    factor: float
    original_max_positions: int = 0  # llama3, yarn: the context before
    low_freq_factor: float = 0.0  # llama3: wavelengths above original / low are divided,
    high_freq_factor: float = 0.0  # those below original / high are kept
    beta_fast: float = 0.0  # yarn: dimensions that turn more often than this within the
    beta_slow: float = 0.0  # original context are kept, those that turn less than this divided
    attention_factor: float = 0.0  # yarn
    truncate: bool | None = None  # yarn: the two bounds are rounded to whole dimensions

    def __post_init__(self):
        if self.kind not in _ROPE_FIELDS:
            raise UserError(f"model: rope_scaling kind {self.kind!r} is not one of {tuple(_ROPE_FIELDS)}")
        for field in dataclasses.fields(self)[2:]:
            used, value = field.name in _ROPE_FIELDS[self.kind], getattr(self, field.name)
            if used != (value is not None if field.name == "truncate" else value != 0):
                raise UserError(f"model: rope_scaling {self.kind} {'needs' if used else 'has no'} {field.name}")
            if used and field.name != "truncate" and not 0 < value < math.inf:
                raise UserError(f"model: rope_scaling.{field.name} must be a positive number, not {value!r}")
        if not 0 < self.factor < math.inf:
            raise UserError(f"model: rope_scaling.factor must be a positive number, not {self.factor!r}")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError("model: rope_scaling.low_freq_factor must be less than high_freq_factor")


_ROPE_FIELDS = {
    "linear": (),
    "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_positions", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}


@dataclasses.dataclass(frozen=True)
class Beside:
    """A parameter that stands beside the decoder's own and trains with it: of a connector or a head, a learned vector,
    or of a second decoder. What it computes is for those to say who put it there; a path ending in "kernel" is the
    matrix of a linear layer, and so is decayed."""

    path: str  # dotted, below "beside."
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # a name for each, as those of `jaxup.model.sharding.RULES` if the mesh is to split it, or ""
    fill: float = 0.0  # its first value,
    std: float = 0.0  # or, if not 0, the standard deviation of its first values, normal around 0
    inputs: int = 0  # of a kernel: how many axes are inputs

    def __post_init__(self):
        where = f"model: beside {self.path!r}"
        if not all(name.isidentifier() or name.isdecimal() for name in self.path.split(".")):
            raise UserError(f"{where}: a path is names with dots between them")
        if not self.shape or any(type(size) is not int or size < 1 for size in self.shape):
            raise UserError(f"{where}: shape={self.shape} must be of positive integers, at least one")
        if len(self.axes) != len(self.shape) or not 0 <= self.inputs <= len(self.shape):
            raise UserError(f"{where}: axes={self.axes} and inputs={self.inputs} do not go with shape={self.shape}")
        named = [axis for axis in self.axes if axis]
        if len({*named}) < len(named):
            raise UserError(f"{where}: axes={self.axes} names one twice", hint='"" is an axis that nothing splits')
        if not (math.isfinite(self.fill) and 0 <= self.std < math.inf):
            raise UserError(f"{where}: fill={self.fill} and std={self.std} must be finite, and std not negative")


PLACEMENTS = ("pre", "post", "peri")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The constants that a layer computes with. They go with its weights, wherever a plan puts the layer.

    Those in which layers differ are arrays [L] beside the stacked weights (`ModelConfig.columns`).
    """

    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None: all of them
    attention_divisor: float = 1.0  # attention logits are divided by it, besides sqrt(head_dim)
    # Where attention and the MLP, each F, have their norm N. pre: x + F(N(x)); post: N(x + F(x)) (Vaswani et al. 2017);
    # peri: x + N(F(N(x))), which has two norms more (arXiv 2502.02732; Gemma 2). All layers are peri, or none.
    placement: str = "pre"
    norm_factor: float = 1.0  # of pre: what the norm gives is multiplied by it; 1 / sqrt(l + 1) in arXiv 2502.05795

    def __post_init__(self):
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise UserError(f"model: a layer's window must be a positive integer, not {self.window!r}")
        if not 0 < self.attention_divisor < math.inf:
            raise UserError(f"model: attention_divisor must be a positive number, not {self.attention_divisor!r}")
        if self.placement not in PLACEMENTS:
            raise UserError(f"model: placement={self.placement!r} is not one of {PLACEMENTS}")
        if not 0 < self.norm_factor < math.inf:
            raise UserError(f"model: norm_factor must be a positive number, not {self.norm_factor!r}")
        if self.norm_factor != 1 and self.placement != "pre":
            raise UserError(f"model: norm_factor={self.norm_factor} goes with placement='pre', not {self.placement!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides what a decoder computes; nothing about how fast.

    Its numbers have no defaults: the file or the experiment that describes a model is their only source.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # < num_heads: grouped-query attention
    head_dim: int  # need not be hidden_size / num_heads
    max_positions: int

    norm: str  # "layernorm" or "rmsnorm"
    norm_eps: float
    positions: str  # "learned" or "rope"
    rope_theta: float | None  # None exactly when positions are learned
    activation: str  # "gelu", "gelu_tanh", "silu" or "relu"
    gated_mlp: bool  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    tie_embeddings: bool

    norm_offset: float = 0.0  # norms multiply by this plus their scale
    embed_scale: float = 1.0  # what embeddings are multiplied by; a tied head is not
    norm_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # each head's queries and keys are RMS-normalised before the rotation
    rope_scaling: RopeScaling | None = None
    kinds: tuple[LayerKind, ...] = (LayerKind(),)  # one for each layer, or one for all
    beside: tuple[Beside, ...] = ()  # parameters that are not the decoder's own

    # Of first values only; see INITIAL.
    init_std: float = 0.02  # GPT-2's
    scaled_init: bool = True  # residual projections get init_std / sqrt(2 * num_layers)
    embed_std: float = 0.0  # of the token embedding; 0: init_std

    def __post_init__(self):
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                      "num_kv_heads", "head_dim", "max_positions"):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"model: {field} must be a positive integer, not {value!r}")
        if self.num_layers > MAX_LAYERS:
            raise UserError(f"model: num_layers={self.num_layers} is more than {MAX_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"model: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if (self.positions == "rope") != (self.rope_theta is not None):
            raise UserError(f"model: rope_theta={self.rope_theta} does not go with positions={self.positions!r}")
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"model: rotary positions need an even head_dim, not {self.head_dim}")
        if self.positions == "learned" and self.rope_scaling is not None:
            raise UserError("model: rope_scaling needs positions='rope'")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and (self.rope_theta or 0) <= 1:
            raise UserError(f"model: rope_scaling yarn needs a rope_theta above 1, not {self.rope_theta}")
        if len(self.kinds) not in (1, self.num_layers):
            raise UserError(f"model: {len(self.kinds)} layer kinds for {self.num_layers} layers")
        if 0 < sum(kind.placement == "peri" for kind in self.kinds) < len(self.kinds):
            raise UserError("model: layers of placement 'peri' have norms that others lack: all are, or none")
        paths = sorted(entry.path + "." for entry in self.beside)  # one that another begins with is before it
        if clash := [two for one, two in itertools.pairwise(paths) if two.startswith(one)]:
            raise UserError(f"model: beside {clash[0][:-1]!r} is there twice, or lies in another parameter")
        # One spelling of each function, so that equal models compare equal.
        if len(set(self.kinds)) == 1:
            object.__setattr__(self, "kinds", self.kinds[:1])
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"model: {name}={value!r} is not one of {choices}{nearest(value, choices)}")

    @property
    def kinds_of_layers(self) -> tuple[LayerKind, ...]:
        """One for each layer."""
        return self.kinds * self.num_layers if len(self.kinds) == 1 else self.kinds

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of the layers, in order of their first use."""
        return tuple(dict.fromkeys(kind.window for kind in self.kinds))

    @property
    def placements(self) -> frozenset[str]:
        """Those of the layers."""
        return frozenset(kind.placement for kind in self.kinds)

    def placement_words(self) -> str:
        """Where blocks normalise: "pre", or "3 of 12 layers post, the others pre"."""
        kinds = self.kinds_of_layers
        post, factors = sum(kind.placement == "post" for kind in kinds), any(kind.norm_factor != 1 for kind in kinds)
        mixed = 0 < post < len(kinds)
        words = f"{post} of {len(kinds)} layers post, the others pre" if mixed else kinds[0].placement
        return words + ", with factors" * factors

    def columns(self) -> dict[str, tuple[Any, ...]]:
        """The fields of `LayerKind` in which the layers differ: numbers [L], of a window its index in `windows`, of a
        placement in PLACEMENTS."""
        columns = {f.name: tuple(getattr(kind, f.name) for kind in self.kinds) for f in dataclasses.fields(LayerKind)}
        columns["window"] = tuple(map(self.windows.index, columns["window"]))
        columns["placement"] = tuple(map(PLACEMENTS.index, columns["placement"]))
        return {name: column for name, column in columns.items() if len(set(column)) > 1}

    def speaks(self, layer: int) -> str:
        """Why this layer is not the identity when its o_proj and down_proj are zero, in words; "" if it is."""
        placement = self.kinds_of_layers[layer].placement
        if placement == "post":
            return "normalises after the sum (post), and N(x) is not x"
        return "adds the bias of its output norms (peri)" if placement == "peri" and self.norm_bias else ""

    def alone(self) -> ModelConfig:
        """The configuration of the decoder without what stands beside it."""
        return dataclasses.replace(self, beside=())

    def with_layers(self, layers: Sequence[int]) -> ModelConfig:
        """The configuration of a model made of these layers of this one, in this order."""
        kinds = self.kinds_of_layers
        return dataclasses.replace(self, num_layers=len(layers), kinds=tuple(kinds[layer] for layer in layers))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """What `dataclasses.asdict` gave, also if JSON has kept it; UserError for values that no config has."""
        fields = dict(fields)
        if "kinds" not in fields and "layer_types" in fields:  # as it was before there were kinds
            window, types = fields.pop("sliding_window", None), fields.pop("layer_types") or ["sliding_attention"]
            kinds = tuple(LayerKind(window=None if kind == "full_attention" else window) for kind in types)
            if fields.pop("depth_scaled_attention", False):
                kinds = depth_scaled(min(fields["num_layers"], MAX_LAYERS))
            fields["kinds"] = [dataclasses.asdict(kind) for kind in kinds]
        known = kinds_of(cls, fields)
        if wrong := misfit(fields, known) or ", ".join(f"unknown {name!r}" for name in sorted(fields.keys() - known)):
            raise UserError(f"model: {wrong}")
        beside = fields.get("beside", ())
        inside = {f.name for c in (LayerKind, RopeScaling, Beside) for f in dataclasses.fields(c)}
        for each in [*fields["kinds"], *filter(None, [fields["rope_scaling"]]), *beside]:
            if strange := sorted(each.keys() - inside):
                raise UserError(f"model: unknown {strange[0][:100]!r}")
        fields["beside"] = tuple(
            Beside(**{**each, "shape": tuple(each["shape"]), "axes": tuple(each["axes"])}) for each in beside
        )
        if fields["rope_scaling"] is not None:
            given = {name: value for name, value in fields["rope_scaling"].items() if value is not None}
            fields["rope_scaling"] = RopeScaling(**given)
        return cls(**{**fields, "kinds": tuple(LayerKind(**kind) for kind in fields["kinds"])})

    @classmethod
    def llama(
        cls, *, vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int,
        num_kv_heads: int, max_positions: int, norm_eps: float = 1e-6, rope_theta: float = 10_000.0,
        tie_embeddings: bool = False, placement: str = "pre", alpha: float = 0.0, init_std: float = 0.02,
        scaled_init: bool = True, embed_std: float = 0.0,
    ) -> ModelConfig:  # fmt: skip
        """LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, gated SiLU, no biases.

        Args:
          placement: where blocks normalise: one of PLACEMENTS; "lns", LayerNorm scaling, which is pre with what the
            norms of layer l give divided by sqrt(l + 1) (arXiv 2502.05795); or "mix", Mix-LN (arXiv 2412.13795),
            whose first round(alpha * num_layers) layers are post, and the others pre.
          scaled_init: see `ModelConfig`; never of "lns", where both together would damp the deep layers twice.
          embed_std: the code of Mix-LN draws embeddings with sqrt(2 / 5) = .632, that of LayerNorm scaling with .02 as
            all else, so that perplexities of the two papers do not compare.
        """
        if hidden_size % num_heads:
            raise UserError(f"model: hidden_size={hidden_size} is not a multiple of num_heads={num_heads}")
        if not 0 <= alpha <= 1:
            raise UserError(f"model: alpha={alpha} is not a share of the layers, from 0 to 1")
        kinds = {
            **{name: (LayerKind(placement=name),) for name in PLACEMENTS}, "mix": mixed(num_layers, alpha),
            "lns": tuple(LayerKind(norm_factor=(layer + 1) ** -0.5) for layer in range(min(num_layers, MAX_LAYERS))),
        }  # fmt: skip
        if placement not in kinds:
            raise UserError(f"model: placement={placement!r} is not one of {tuple(kinds)}{nearest(placement, kinds)}")
        return cls(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
            num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=hidden_size // num_heads, max_positions=max_positions,
            norm="rmsnorm", norm_eps=norm_eps, positions="rope", rope_theta=rope_theta,
            activation="silu", gated_mlp=True, tie_embeddings=tie_embeddings, kinds=kinds[placement],
            init_std=init_std, scaled_init=scaled_init and placement != "lns", embed_std=embed_std,
        )  # fmt: skip

    @classmethod
    def gpt2(
        cls, *, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_positions: int,
        bias: bool, depth_scaled_attention: bool = False,
    ) -> ModelConfig:  # fmt: skip
        """GPT-2 (Radford et al. 2019); `bias=False` is nanoGPT's variant without any bias.

        `depth_scaled_attention` divides the attention logits of layer l by l + 1 as well.
        """
        if hidden_size % num_heads:
            raise UserError(f"model: hidden_size={hidden_size} is not a multiple of num_heads={num_heads}")
        return cls(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=4 * hidden_size,
            num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads, max_positions=max_positions,
            norm="layernorm", norm_eps=1e-5, positions="learned", rope_theta=None,
            activation="gelu_tanh", gated_mlp=False, tie_embeddings=True,
            norm_bias=bias, qkv_bias=bias, o_bias=bias, mlp_bias=bias,
            kinds=depth_scaled(num_layers) if depth_scaled_attention else (LayerKind(),),
        )  # fmt: skip


def depth_scaled(num_layers: int) -> tuple[LayerKind, ...]:
    """Attention logits of layer l divided by l + 1 (transformers' scale_attn_by_inverse_layer_idx)."""
    return tuple(LayerKind(attention_divisor=layer + 1.0) for layer in range(num_layers))


def mixed(num_layers: int, alpha: float) -> tuple[LayerKind, ...]:
    """Mix-LN: the first round(alpha * num_layers) layers normalise after the sum, the others before the branch."""
    post, layers = round(alpha * num_layers), min(num_layers, MAX_LAYERS)
    return tuple(LayerKind(placement="post" if layer < post else "pre") for layer in range(layers))


# The fields that decide first values and not the function.
INITIAL = ("init_std", "scaled_init", "embed_std")

_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope"),
    "activation": ("gelu", "gelu_tanh", "silu", "relu"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a decoder is run: changes speed, memory and rounding, never the function."""

    dtype: str = "float32"  # of activations, or "bfloat16"; params keep their own
    attention: str = "auto"  # see jaxup.model.attention
    # What the backward pass computes again: none, dots (all but products with parameters and what a kernel of attention
    # gave, unless a TPU would store it in twice its bytes), context (all but the latter), full. offload: as full, and
    # the input of each block is in the memory of the host until then.
    remat: str = "none"
    unroll: int = 1  # layers per iteration of the scan; 0 = all, faster but for compiling
    # Mesh axes that split the batch, where a mesh is set. Its axis "context" then splits sequences, which are in the
    # order of `jaxup.model.attention.balanced`.
    batch_axes: tuple[str, ...] = ()

    def __post_init__(self):
        for name, choices in (
            ("dtype", ("float32", "bfloat16")),
            ("attention", ("auto", "xla", "blocked", "cudnn", "splash")),
            ("remat", ("none", "dots", "context", "full", "offload")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"compute: {name}={value!r} is not one of {choices}{nearest(value, choices)}")

    @property
    def rows_over(self) -> tuple[str, ...]:
        """Of `batch_axes` those that split the rows here: of the mesh that is set, if one is, and not of a `shard_map`
        around, inside of which each device has its own rows."""
        import jax

        mesh = jax.sharding.get_abstract_mesh()
        return tuple(axis for axis in self.batch_axes if axis in mesh.shape and axis not in mesh.manual_axes)
