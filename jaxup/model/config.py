"""`ModelConfig`: the shape and the function of a decoder, for all families."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jaxup.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed to reach beyond the context a model was first trained on.

    `linear` divides all of them by `factor` (position interpolation, arXiv 2306.15595); `llama3`
    divides the low ones and blends up to the high ones (LLaMA 3.1's reference code); `yarn` does so
    by dimension, and multiplies cosines and sines by `attention_factor` (arXiv 2309.00071). Fields
    that a kind does not use are None.
    """

    kind: str  # "linear", "llama3" or "yarn"
    factor: float
    original_max_positions: int | None = None  # llama3, yarn: the context before
    low_freq_factor: float | None = None  # llama3: wavelengths above original / low are divided,
    high_freq_factor: float | None = None  # those below original / high are kept
    beta_fast: float | None = None  # yarn: dimensions that turn more often than this within the
    beta_slow: float | None = None  # original context are kept, those that turn less than this divided
    attention_factor: float | None = None  # yarn
    truncate: bool | None = None  # yarn: the two bounds are rounded to whole dimensions

    def __post_init__(self):
        if self.kind not in _ROPE_FIELDS:
            raise UserError(f"model: rope_scaling kind {self.kind!r} is not one of {tuple(_ROPE_FIELDS)}")
        for field in dataclasses.fields(self)[2:]:
            used, value = field.name in _ROPE_FIELDS[self.kind], getattr(self, field.name)
            if used != (value is not None):
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

LAYER_TYPES = ("full_attention", "sliding_attention")  # as transformers names them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides what a decoder computes; nothing about how fast.

    Sizes are counts of elements. There are no defaults for anything numerical: the file or the
    experiment that describes a model is the only source of its numbers.
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

    norm_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # each head's queries and keys are RMS-normalised before the rotation
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    layer_types: tuple[str, ...] | None = None  # one of LAYER_TYPES per layer, if not all have the window
    depth_scaled_attention: bool = False  # logits of layer l are further divided by l + 1

    init_std: float = 0.02  # GPT-2's; residual projections get init_std / sqrt(2 * num_layers)

    def __post_init__(self):
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                      "num_kv_heads", "head_dim", "max_positions"):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"model: {field} must be a positive integer, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"model: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if (self.positions == "rope") != (self.rope_theta is not None):
            raise UserError(f"model: rope_theta={self.rope_theta} does not go with positions={self.positions!r}")
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"model: rotary positions need an even head_dim, not {self.head_dim}")
        if self.positions == "learned" and self.rope_scaling is not None:
            raise UserError("model: rope_scaling needs positions='rope'")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and not self.rope_theta > 1:
            raise UserError(f"model: rope_scaling yarn needs a rope_theta above 1, not {self.rope_theta}")
        self._check_layer_types()
        for field in dataclasses.fields(self):
            choices = _CHOICES.get(field.name)
            if choices and getattr(self, field.name) not in choices:
                raise UserError(f"model: {field.name}={getattr(self, field.name)!r} is not one of {choices}")

    def _check_layer_types(self) -> None:
        types = self.layer_types
        if types is None:
            return
        if len(types) != self.num_layers or set(types) - set(LAYER_TYPES):
            raise UserError(f"model: layer_types must name one of {LAYER_TYPES} for each of {self.num_layers} layers")
        if "sliding_attention" in types and self.sliding_window is None:
            raise UserError("model: layer_types has sliding_attention, but there is no sliding_window")
        # One spelling of each function, so that equal models compare equal.
        if len(set(types)) == 1:
            object.__setattr__(self, "layer_types", None)
            if types[0] == "full_attention":
                object.__setattr__(self, "sliding_window", None)

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer, None if it sees everything before it."""
        full = self.layer_types is not None and self.layer_types[layer] == "full_attention"
        return None if full else self.sliding_window

    def with_layers(self, layers: Sequence[int]) -> ModelConfig:
        """The configuration of a model made of these layers of this one, in this order."""
        types = self.layer_types and tuple(self.layer_types[layer] for layer in layers)
        return dataclasses.replace(self, num_layers=len(layers), layer_types=types)

    @classmethod
    def llama(
        cls, *, vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int,
        num_kv_heads: int, max_positions: int, norm_eps: float = 1e-6, rope_theta: float = 10_000.0,
        tie_embeddings: bool = False,
    ) -> ModelConfig:  # fmt: skip
        """LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, gated SiLU, no biases."""
        if hidden_size % num_heads:
            raise UserError(f"model: hidden_size={hidden_size} is not a multiple of num_heads={num_heads}")
        return cls(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
            num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=hidden_size // num_heads, max_positions=max_positions,
            norm="rmsnorm", norm_eps=norm_eps, positions="rope", rope_theta=rope_theta,
            activation="silu", gated_mlp=True, tie_embeddings=tie_embeddings,
        )  # fmt: skip

    @classmethod
    def gpt2(
        cls, *, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_positions: int,
        bias: bool, depth_scaled_attention: bool = False,
    ) -> ModelConfig:  # fmt: skip
        """GPT-2 (Radford et al. 2019); `bias=False` is nanoGPT's variant without any bias."""
        if hidden_size % num_heads:
            raise UserError(f"model: hidden_size={hidden_size} is not a multiple of num_heads={num_heads}")
        return cls(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=4 * hidden_size,
            num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads, max_positions=max_positions,
            norm="layernorm", norm_eps=1e-5, positions="learned", rope_theta=None,
            activation="gelu_tanh", gated_mlp=False, tie_embeddings=True,
            norm_bias=bias, qkv_bias=bias, o_bias=bias, mlp_bias=bias,
            depth_scaled_attention=depth_scaled_attention,
        )  # fmt: skip

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of one training token (forward + backward), as PaLM's appendix B counts them.

        6 per weight of every matrix product, head included, embedding look-ups excluded; attention
        adds 12 * heads * head_dim * seq_len per layer, halved because a causal token sees on
        average half the sequence. Rematerialised work is not counted.
        """
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * heads + 2 * kv_heads)
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        matmuls = self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size
        windowed = self.num_layers if self.layer_types is None else self.layer_types.count("sliding_attention")
        span = min(seq_len, 2 * (self.sliding_window or seq_len))
        spans = windowed * span + (self.num_layers - windowed) * seq_len
        return 6 * matmuls + 12 * heads * spans / 2


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
    remat: str = "none"  # what the backward pass computes again: none, dots (all but products), full
    unroll: int = 1  # layers per iteration of the scan; 0 = all, which is faster on CPU
    batch_axes: tuple[str, ...] = ()  # mesh axes that split the batch; () = no mesh

    def __post_init__(self):
        for name, choices in (
            ("dtype", ("float32", "bfloat16")),
            ("attention", ("auto", "xla", "blocked", "cudnn")),
            ("remat", ("none", "dots", "full")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"compute: {name}={getattr(self, name)!r} is not one of {choices}")
