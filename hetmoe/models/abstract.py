"""The one abstract description of a model's parameters: it drives init, loading, saving, sharding and shape checks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hetmoe.models.config import LatentAttention, ModelConfig
from hetmoe.models.params import Attention, DenseLayer, FeedForward, Layer, MoE, Params
from hetmoe.models.tensor_names import names_of


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree before it exists.

    `axes` names what each axis counts (a mesh axis of the same name shards it); `key` is the checkpoint's name with
    `{layer}` and `{expert}` where the leaf stacks over them, `layers` the numbers that `{layer}` takes; `transposed`
    says that the checkpoint stores the last two axes as `[output, input]`; `init` is the standard deviation of the
    initial normal draw, None for ones (norm gains), 0 for zeros (biases); `float32` leaves keep that dtype whatever
    the model's.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    key: str
    layers: tuple[int, ...] | None
    transposed: bool
    init: float | None
    float32: bool = False

    def dtype(self, model_dtype: Any) -> Any:
        """The dtype of this leaf in a model of `model_dtype`."""
        return jnp.float32 if self.float32 else model_dtype


def is_leaf(node: object) -> bool:
    """For `jax.tree` calls over an abstract tree."""
    return isinstance(node, Leaf)


class _Stack:
    """Makes the leaves of the decoder layers of one kind."""

    def __init__(self, config: ModelConfig, layers: tuple[int, ...]) -> None:
        self.config, self.layers, self.names = config, layers, names_of(config.family)

    def vector(self, axis: str, width: int, key: str, *, init: float | None = None, float32: bool = False) -> Leaf:
        shape = (len(self.layers), width)
        return Leaf(shape, ("layer", axis), f"model.layers.{{layer}}.{key}", self.layers, False, init, float32)

    def matrix(self, axes: tuple[str, str], rows: int, columns: int, key: str) -> Leaf:
        shape = (len(self.layers), rows, columns)
        name = f"model.layers.{{layer}}.{key}.weight"
        return Leaf(shape, ("layer", *axes), name, self.layers, True, rows**-0.5)

    def attention(self) -> Attention:
        c = self.config
        width = c.num_heads * (c.head_dim if c.latent is None else c.latent.value_dim)
        leaves = self.plain_attention() if c.latent is None else self.latent_attention(c.latent)
        leaves["o"] = self.matrix(("heads", "hidden"), width, c.hidden_size, "self_attn.o_proj")
        if c.output_bias:
            leaves["o_bias"] = self.vector("hidden", c.hidden_size, "self_attn.o_proj.bias", init=0.0)
        return Attention(**leaves)

    def plain_attention(self) -> dict[str, Leaf]:
        c, leaves = self.config, dict[str, Leaf]()
        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            width = heads * c.head_dim
            leaves[name] = self.matrix(("hidden", "heads"), c.hidden_size, width, f"self_attn.{name}_proj")
            if c.qkv_bias:
                leaves[f"{name}_bias"] = self.vector("heads", width, f"self_attn.{name}_proj.bias", init=0.0)
            if c.qk_norm == "width" and name != "v":
                leaves[f"{name}_norm"] = self.vector("heads", width, f"self_attn.{name}_norm.weight")
            elif c.qk_norm == "head" and name != "v":
                leaves[f"{name}_norm"] = self.vector("head", c.head_dim, f"self_attn.{name}_norm.weight")
        return leaves

    def latent_attention(self, latent: LatentAttention) -> dict[str, Leaf]:
        c, hidden = self.config, self.config.hidden_size
        q_width, shared = c.num_heads * c.head_dim, latent.kv_rank + latent.rope_dim
        kv_width = c.num_heads * (latent.content_dim + latent.value_dim)
        leaves = {
            "kv_a": self.matrix(("hidden", "latent"), hidden, shared, "self_attn.kv_a_proj_with_mqa"),
            "kv_a_norm": self.vector("latent", latent.kv_rank, "self_attn.kv_a_layernorm.weight"),
            "kv_b": self.matrix(("latent", "heads"), latent.kv_rank, kv_width, "self_attn.kv_b_proj"),
        }
        if c.qkv_bias:
            leaves["kv_a_bias"] = self.vector("latent", shared, "self_attn.kv_a_proj_with_mqa.bias", init=0.0)
        rank = latent.query_rank
        if rank is None:
            return leaves | {"q": self.matrix(("hidden", "heads"), hidden, q_width, "self_attn.q_proj")}
        leaves |= {
            "q_a": self.matrix(("hidden", "latent"), hidden, rank, "self_attn.q_a_proj"),
            "q_a_norm": self.vector("latent", rank, "self_attn.q_a_layernorm.weight"),
            "q_b": self.matrix(("latent", "heads"), rank, q_width, "self_attn.q_b_proj"),
        }
        if c.qkv_bias:
            leaves["q_a_bias"] = self.vector("latent", rank, "self_attn.q_a_proj.bias", init=0.0)
        return leaves

    def feed_forward(self, inner: int, prefix: str) -> FeedForward:
        hidden, names = self.config.hidden_size, self.names
        return FeedForward(
            gate=self.matrix(("hidden", "inner"), hidden, inner, f"{prefix}.{names.gate}"),
            up=self.matrix(("hidden", "inner"), hidden, inner, f"{prefix}.{names.up}"),
            down=self.matrix(("inner", "hidden"), inner, hidden, f"{prefix}.{names.down}"),
        )

    def expert(self, axes: tuple[str, str], rows: int, columns: int, key: str) -> Leaf:
        shape = (len(self.layers), self.config.num_experts, rows, columns)
        name = f"model.layers.{{layer}}.{self.names.block}.experts.{{expert}}.{key}.weight"
        return Leaf(shape, ("layer", "expert", *axes), name, self.layers, True, rows**-0.5)

    def moe(self) -> MoE:
        c, names = self.config, self.names
        hidden, inner = c.hidden_size, c.expert_intermediate_size
        shared = shared_gate = bias = None
        if c.shared_intermediate_size is not None:
            shared = self.feed_forward(c.shared_intermediate_size, f"{names.block}.{names.shared}")
        if c.shared_gate:
            shared_gate = self.matrix(("hidden", "one"), hidden, 1, f"{names.block}.{names.shared}_gate")
        if c.selection_bias:
            key = f"{names.block}.gate.e_score_correction_bias"
            bias = self.vector("score", c.num_experts, key, init=0.0, float32=True)
        return MoE(
            router=self.matrix(("hidden", "score"), hidden, c.num_experts, f"{names.block}.gate"),
            experts=FeedForward(
                gate=self.expert(("hidden", "inner"), hidden, inner, names.gate),
                up=self.expert(("hidden", "inner"), hidden, inner, names.up),
                down=self.expert(("inner", "hidden"), inner, hidden, names.down),
            ),
            selection_bias=bias,
            shared=shared,
            shared_gate=shared_gate,
        )

    def common(self) -> dict[str, Any]:
        """What layers with and without experts share."""
        hidden = self.config.hidden_size
        return {
            "input_norm": self.vector("hidden", hidden, "input_layernorm.weight"),
            "attention": self.attention(),
            "ffn_norm": self.vector("hidden", hidden, "post_attention_layernorm.weight"),
        }


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree of `config` with a `Leaf` in place of every array."""
    vocab, hidden = config.vocab_size, config.hidden_size
    moe, dense = _Stack(config, config.moe_layers), None
    if config.dense_intermediate_size is not None:
        stack = _Stack(config, config.dense_layers)
        ffn = stack.feed_forward(config.dense_intermediate_size, stack.names.block)
        dense = DenseLayer(**stack.common(), ffn=ffn)
    head = Leaf((hidden, vocab), ("hidden", "vocab"), "lm_head.weight", None, True, 0.02)
    return Params(
        embed=Leaf((vocab, hidden), ("vocab", "hidden"), "model.embed_tokens.weight", None, False, 0.02),
        layers=Layer(**moe.common(), moe=moe.moe()),
        dense_layers=dense,
        final_norm=Leaf((hidden,), ("hidden",), "model.norm.weight", None, False, None),
        lm_head=None if config.tie_embeddings else head,
    )


def init_params(key: jax.Array, config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal with the leaf's std (1/sqrt(fan-in) for projections), ones for norm gains."""
    leaves, treedef = jax.tree.flatten(abstract_params(config), is_leaf=is_leaf)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            jnp.ones(leaf.shape, leaf.dtype(dtype))
            if leaf.init is None
            else (leaf.init * jax.random.normal(k, leaf.shape, jnp.float32)).astype(leaf.dtype(dtype))
            for leaf, k in zip(leaves, keys, strict=True)
        ],
    )
