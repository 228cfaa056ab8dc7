"""Causal self-attention: RMS norm, rotary embedding, grouped-query attention."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from hetmoe.models.config import ModelConfig


def rms_norm(x: Float[Array, "*batch width"], gain: Float[Array, "width"], eps: float) -> Float[Array, "*batch width"]:
    """Root-mean-square norm over the last axis, computed in float32, returned in the dtype of `x`.

    `gain * x / sqrt(mean(x^2) + eps)` (Zhang and Sennrich 2019).
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) * wide).astype(x.dtype)


def rotary(
    x: Float[Array, "batch seq heads dim"], positions: Int[Array, "seq"], theta: float
) -> Float[Array, "batch seq heads dim"]:
    """Rotary position embedding (Su et al. 2021), pairing element i with i + dim/2 as in Llama and OLMoE."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]  # [seq, half], radians
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    low, high = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "batch seq q_width"],
    k: Float[Array, "batch seq kv_width"],
    v: Float[Array, "batch seq kv_width"],
    config: ModelConfig,
) -> Float[Array, "batch seq q_width"]:
    """Causal attention over projected (and normed) queries, keys and values; softmax in float32."""
    batch, seq, _ = q.shape
    groups = config.num_heads // config.num_kv_heads
    positions = jnp.arange(seq)
    q = rotary(rearrange(q, "b s (n d) -> b s n d", n=config.num_heads), positions, config.rope_theta)
    k = rotary(rearrange(k, "b s (n d) -> b s n d", n=config.num_kv_heads), positions, config.rope_theta)
    # One leading axis of independent heads: `jax.nn.dot_product_attention` took 3 times as long on CPU.
    # Query heads that share a key head become rows of one matmul.
    q = rearrange(q * config.head_dim**-0.5, "b s (n g) d -> (b n) (g s) d", g=groups)
    k = rearrange(k, "b s n d -> (b n) d s")
    v = rearrange(v, "b s (n d) -> (b n) s d", n=config.num_kv_heads)
    scores = jnp.matmul(q, k, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    causal = jnp.tile(jnp.tril(jnp.ones((seq, seq), bool)), (groups, 1))[None]
    scores = jnp.where(causal, scores, -jnp.inf)
    exp = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.matmul(exp.astype(v.dtype), v, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    out = (out / jnp.sum(exp, axis=-1, keepdims=True)).astype(v.dtype)
    return rearrange(out, "(b n) (g s) d -> b s (n g d)", b=batch, g=groups)
