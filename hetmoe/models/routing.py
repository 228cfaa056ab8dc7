"""Which experts a token goes to, and with what weights."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hetmoe.models.config import ModelConfig
from hetmoe.models.params import MoE


@struct.dataclass
class Routing:
    """What the routers decided; `forward`'s internals stack it over layers."""

    logits: Float[Array, "*layers tokens experts"]
    chosen: Int[Array, "*layers tokens copies"]
    weights: Float[Array, "*layers tokens copies"]


def route(x: Float[Array, "tokens hidden"], moe: MoE, config: ModelConfig) -> Routing:
    """Scores all experts in float32 and takes the top k, best first; ties go to the lower index.

    The selection bias and the limit to the best groups (DeepSeek-V3, arXiv 2412.19437, 2.1.2; DeepSeek-V2,
    arXiv 2405.04434, 2.2.2) change the choice only: the weights are the plain scores, whose sum is 1 only with
    `norm_topk_prob` (OLMoE-1B-7B leaves them as they are), times the scaling factor.
    """
    logits = jnp.matmul(x, moe.router, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if config.router_score == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if moe.selection_bias is None else scores + moe.selection_bias.astype(jnp.float32)[None]
    if config.expert_groups is not None and config.groups_per_token is not None:
        best = 1 if config.group_score == "best" else 2
        grouped = choice.reshape(-1, config.expert_groups, config.num_experts // config.expert_groups)
        of_group = jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1)
        _, taken = jax.lax.top_k(of_group, config.groups_per_token)
        allowed = jnp.any(jax.nn.one_hot(taken, config.expert_groups, dtype=bool), axis=-2)
        choice = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    _, chosen = jax.lax.top_k(choice, config.experts_per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)  # sigmoids may all be 0
    if config.routed_scaling_factor != 1:
        weights = weights * config.routed_scaling_factor
    return Routing(logits=logits, chosen=chosen.astype(jnp.int32), weights=weights)
