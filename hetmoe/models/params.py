"""The parameter tree of a model."""

import dataclasses
from typing import Any

from flax import struct


@struct.dataclass
class FeedForward:
    """SwiGLU: `down(silu(x @ gate) * (x @ up))`; for experts with one more leading axis."""

    gate: Any  # [*stack, hidden, inner]
    up: Any  # [*stack, hidden, inner]
    down: Any  # [*stack, inner, hidden]


@struct.dataclass
class Attention:
    """Projections of one kind of attention; what the config switches off is None.

    Without latent attention: q, k, v, o. With it: q (or q_a, q_a_norm, q_b), kv_a, kv_a_norm, kv_b, o.
    """

    o: Any  # [L, heads * value_dim, hidden]
    q: Any = None  # [L, hidden, heads * head_dim]
    k: Any = None  # [L, hidden, kv_heads * head_dim]
    v: Any = None  # [L, hidden, kv_heads * head_dim]
    q_bias: Any = None
    k_bias: Any = None
    v_bias: Any = None
    o_bias: Any = None  # [L, hidden]
    q_norm: Any = None  # [L, heads * head_dim], or [L, head_dim] for a norm over each head
    k_norm: Any = None
    q_a: Any = None  # [L, hidden, query_rank]
    q_a_bias: Any = None
    q_a_norm: Any = None  # [L, query_rank]
    q_b: Any = None  # [L, query_rank, heads * head_dim]
    kv_a: Any = None  # [L, hidden, kv_rank + rope_dim]
    kv_a_bias: Any = None
    kv_a_norm: Any = None  # [L, kv_rank]
    kv_b: Any = None  # [L, kv_rank, heads * (content_dim + value_dim)]


@struct.dataclass
class MoE:
    """Router, routed experts and, in some families, shared experts."""

    router: Any  # [L, hidden, experts]
    experts: FeedForward  # [L, experts, ...]
    selection_bias: Any = None  # [L, experts], float32
    shared: FeedForward | None = None  # [L, ...], all shared experts side by side
    shared_gate: Any = None  # [L, hidden, 1]


@struct.dataclass
class Layer:
    """Weights of all decoder layers with experts, stacked on a leading axis L (so that one `lax.scan` runs them).

    Matrices are stored `[input, output]`: `y = x @ w`.
    """

    input_norm: Any  # [L, hidden]
    attention: Attention
    ffn_norm: Any  # [L, hidden]
    moe: MoE


@struct.dataclass
class DenseLayer:
    """Weights of all decoder layers without experts, stacked likewise."""

    input_norm: Any  # [L, hidden]
    attention: Attention
    ffn_norm: Any  # [L, hidden]
    ffn: FeedForward  # [L, ...]


@struct.dataclass
class Params:
    """All weights of a model. `lm_head` is None when it is tied to `embed`, `dense_layers` when there are none.

    Both stacks are in model order; `ModelConfig.runs` says how they interleave.
    """

    embed: Any  # [vocab, hidden]
    layers: Layer
    dense_layers: DenseLayer | None
    final_norm: Any  # [hidden]
    lm_head: Any  # [hidden, vocab] or None


def with_experts(params: Params, experts: FeedForward) -> Params:
    """The parameters with other routed experts."""
    moe = dataclasses.replace(params.layers.moe, experts=experts)
    return dataclasses.replace(params, layers=dataclasses.replace(params.layers, moe=moe))
