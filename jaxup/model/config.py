"""`ModelConfig`: the shape and the function of a decoder, for all families."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxup.errors import UserError


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

    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    positions: Literal["learned", "rope"]
    rope_theta: float | None  # None exactly when positions are learned
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"]
    gated_mlp: bool  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    tie_embeddings: bool

    norm_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
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
        for field in dataclasses.fields(self):
            choices = _CHOICES.get(field.name)
            if choices and getattr(self, field.name) not in choices:
                raise UserError(f"model: {field.name}={getattr(self, field.name)!r} is not one of {choices}")

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
        span = min(seq_len, 2 * (self.sliding_window or seq_len))
        return 6 * matmuls + self.num_layers * 12 * heads * span / 2


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
