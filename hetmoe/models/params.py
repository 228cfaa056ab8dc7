"""The parameter tree, and the one abstract description that drives init, loading and shape checks."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from hetmoe.models.config import ModelConfig


@struct.dataclass
class Layer:
    """Weights of all decoder layers, stacked on a leading axis L (so that one `lax.scan` runs them).

    Matrices are stored `[input, output]`: `y = x @ w`.
    """

    input_norm: Any  # [L, hidden]
    q: Any  # [L, hidden, heads * head_dim]
    k: Any  # [L, hidden, kv_heads * head_dim]
    v: Any  # [L, hidden, kv_heads * head_dim]
    o: Any  # [L, heads * head_dim, hidden]
    q_norm: Any  # [L, heads * head_dim], RMS norm over the whole width
    k_norm: Any  # [L, kv_heads * head_dim]
    moe_norm: Any  # [L, hidden]
    router: Any  # [L, hidden, experts]
    gate: Any  # [L, experts, hidden, intermediate]
    up: Any  # [L, experts, hidden, intermediate]
    down: Any  # [L, experts, intermediate, hidden]


@struct.dataclass
class Params:
    """All weights of a model. `lm_head` is None when it is tied to `embed`."""

    embed: Any  # [vocab, hidden]
    layers: Layer
    final_norm: Any  # [hidden]
    lm_head: Any  # [hidden, vocab] or None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree before it exists.

    `key` is the checkpoint's name with `{layer}` and `{expert}` where the leaf stacks over them;
    `transposed` says that the checkpoint stores the last two axes as `[output, input]`;
    `init` is the standard deviation of the initial normal draw, or None for ones (norm gains).
    """

    shape: tuple[int, ...]
    key: str
    transposed: bool
    init: float | None


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree of `config` with a `Leaf` in place of every array."""
    layers, hidden, experts = config.num_layers, config.hidden_size, config.num_experts
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.expert_intermediate_size

    def norm(width: int, key: str) -> Leaf:
        return Leaf((layers, width), f"model.layers.{{layer}}.{key}.weight", False, None)

    def matrix(rows: int, columns: int, key: str) -> Leaf:
        return Leaf((layers, rows, columns), f"model.layers.{{layer}}.{key}.weight", True, rows**-0.5)

    def expert(rows: int, columns: int, key: str) -> Leaf:
        name = f"model.layers.{{layer}}.mlp.experts.{{expert}}.{key}.weight"
        return Leaf((layers, experts, rows, columns), name, True, rows**-0.5)

    return Params(
        embed=Leaf((config.vocab_size, hidden), "model.embed_tokens.weight", False, 0.02),
        layers=Layer(
            input_norm=norm(hidden, "input_layernorm"),
            q=matrix(hidden, q_width, "self_attn.q_proj"),
            k=matrix(hidden, kv_width, "self_attn.k_proj"),
            v=matrix(hidden, kv_width, "self_attn.v_proj"),
            o=matrix(q_width, hidden, "self_attn.o_proj"),
            q_norm=norm(q_width, "self_attn.q_norm"),
            k_norm=norm(kv_width, "self_attn.k_norm"),
            moe_norm=norm(hidden, "post_attention_layernorm"),
            router=matrix(hidden, experts, "mlp.gate"),
            gate=expert(hidden, inner, "gate_proj"),
            up=expert(hidden, inner, "up_proj"),
            down=expert(inner, hidden, "down_proj"),
        ),
        final_norm=Leaf((hidden,), "model.norm.weight", False, None),
        lm_head=None if config.tie_embeddings else Leaf((hidden, config.vocab_size), "lm_head.weight", True, 0.02),
    )


def is_leaf(node: object) -> bool:
    """For `jax.tree` calls over an abstract tree."""
    return isinstance(node, Leaf)


def checkpoint_keys(leaf: Leaf) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yields (index into the stacked leaf, checkpoint key) for every tensor that the leaf is made of."""
    if "{expert}" in leaf.key:
        for layer in range(leaf.shape[0]):
            for expert in range(leaf.shape[1]):
                yield (layer, expert), leaf.key.format(layer=layer, expert=expert)
    elif "{layer}" in leaf.key:
        for layer in range(leaf.shape[0]):
            yield (layer,), leaf.key.format(layer=layer)
    else:
        yield (), leaf.key


def init_params(key: jax.Array, config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal with the leaf's std (1/sqrt(fan-in) for projections), ones for norm gains."""
    leaves, treedef = jax.tree.flatten(abstract_params(config), is_leaf=is_leaf)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            jnp.ones(leaf.shape, dtype)
            if leaf.init is None
            else (leaf.init * jax.random.normal(k, leaf.shape, jnp.float32)).astype(dtype)
            for leaf, k in zip(leaves, keys, strict=True)
        ],
    )
