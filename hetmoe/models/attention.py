"""Causal self-attention: projections, plain or through latents, and grouped-query attention over them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from hetmoe.models.config import LatentAttention, ModelConfig
from hetmoe.models.hardware import LayerHardware, Probe, dense_matmul
from hetmoe.models.params import Attention
from hetmoe.models.rotary import latent_score_factor, rotary
from hetmoe.parallel.shard import WHOLE, Shard

QUERY_CHUNK = 256  # queries of a long sequence whose scores are held at once
LONG = 512  # positions from which on queries are taken in chunks


def rms_norm(x: Float[Array, "*batch width"], gain: Float[Array, "width"], eps: float) -> Float[Array, "*batch width"]:
    """Root-mean-square norm over the last axis, computed in float32, returned in the dtype of `x`.

    `gain * x / sqrt(mean(x^2) + eps)` (Zhang and Sennrich 2019).
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) * wide).astype(x.dtype)


def attention_block(
    x: Float[Array, "batch seq hidden"],
    weights: Attention,
    config: ModelConfig,
    hardware: LayerHardware | None,
    probe: Probe,
    shard: Shard = WHOLE,
) -> Float[Array, "batch seq hidden"]:
    """What attention adds to the residual stream; `x` is already normed. A device attends with its own heads."""
    q, k, v = queries_keys_values(x, weights, config, hardware, probe, jnp.arange(x.shape[1]), shard)
    mixed = attend(q, k, v, scale=score_scale(config), window=config.sliding_window)
    return project_out(mixed, weights, hardware, probe, shard)


def queries_keys_values(
    x: Float[Array, "batch seq hidden"],
    weights: Attention,
    config: ModelConfig,
    hardware: LayerHardware | None,
    probe: Probe,
    positions: Int[Array, "seq"],
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "batch seq heads dim"], Float[Array, "batch seq kv dim"], Float[Array, "batch seq kv value"]]:
    """Turned queries and keys, and values, of normed states at `positions`; latents are expanded.

    Of the device's own heads, where a mesh axis `tensor` cuts them.
    """
    flat = x.reshape(-1, x.shape[-1])

    def project(inputs: Array, name: str) -> Array:
        return _project(inputs, weights, name, hardware)

    def heads(values: Array, width: int) -> Array:
        return rearrange(values, "(b s) (n d) -> b s n d", b=x.shape[0], d=width)

    probe.single("attention_in", flat)
    if config.latent is None:
        return _plain(flat, weights, config, project, heads, positions, shard)
    return _latent(flat, weights, config, config.latent, project, heads, probe, positions, shard)


def score_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by."""
    return config.head_dim**-0.5 * (1.0 if config.latent is None else latent_score_factor(config.rope))


def project_out(
    mixed: Float[Array, "batch seq width"],
    weights: Attention,
    hardware: LayerHardware | None,
    probe: Probe,
    shard: Shard = WHOLE,
) -> Float[Array, "batch seq hidden"]:
    """The output projection of what attention mixed, on all devices along `tensor`."""
    flat = shard.gather_columns(mixed.reshape(-1, mixed.shape[-1]))
    probe.single("attention_out", flat)
    return shard.gather_columns(_project(flat, weights, "o", hardware)).reshape(*mixed.shape[:-1], -1)


def _project(inputs: Array, weights: Attention, name: str, hardware: LayerHardware | None) -> Array:
    out = dense_matmul(inputs, getattr(weights, name), name, hardware)
    bias = getattr(weights, f"{name}_bias", None)
    return out if bias is None else out + bias[None]


def _plain(
    x: Array, weights: Attention, config: ModelConfig, project: Callable[[Array, str], Array],
    heads: Callable[[Array, int], Array], positions: Array, shard: Shard,
) -> tuple[Array, Array, Array]:  # fmt: skip
    q, k, v = project(x, "q"), project(x, "k"), project(x, "v")
    eps = config.rms_norm_eps
    if config.qk_norm == "width":
        q = shard.own_columns(rms_norm(shard.gather_columns(q), weights.q_norm, eps))
        k = shard.own_columns(rms_norm(shard.gather_columns(k), weights.k_norm, eps))
    if config.clip_qkv is not None:
        q, k, v = (jnp.clip(t, -config.clip_qkv, config.clip_qkv) for t in (q, k, v))
    q = heads(q, config.head_dim)
    k, v = (heads(_of_own_heads(values, config, shard), config.head_dim) for values in (k, v))
    if config.qk_norm == "head":
        q, k = rms_norm(q, weights.q_norm, eps), rms_norm(k, weights.k_norm, eps)
    return rotary(q, positions, config.rope), rotary(k, positions, config.rope), v


def _of_own_heads(values: Array, config: ModelConfig, shard: Shard) -> Array:
    """Keys or values of the heads that a device's queries look at: its part or, of fewer heads than devices, one."""
    if config.num_kv_heads % shard.tensor == 0:
        return values
    head = shard.first("tensor", 1) // (shard.tensor // config.num_kv_heads)
    return jax.lax.dynamic_slice_in_dim(
        shard.gather_columns(values), head * config.head_dim, config.head_dim, axis=values.ndim - 1
    )


def _latent(
    x: Array, weights: Attention, config: ModelConfig, latent: LatentAttention,
    project: Callable[[Array, str], Array], heads: Callable[[Array, int], Array], probe: Probe, positions: Array,
    shard: Shard,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Queries, keys and values of latent attention (DeepSeek-V2, arXiv 2405.04434, eqs. 9-19), latents expanded."""
    if latent.query_rank is None:
        q = project(x, "q")
    else:
        query = rms_norm(shard.gather_columns(project(x, "q_a")), weights.q_a_norm, latent.norm_eps)
        probe.single("query_latent", query)
        q = project(query, "q_b")
    compressed = shard.gather_columns(project(x, "kv_a"))
    content = rms_norm(compressed[:, : latent.kv_rank], weights.kv_a_norm, latent.norm_eps)
    probe.single("kv_latent", content)
    kv = heads(project(content, "kv_b"), latent.content_dim + latent.value_dim)
    q, shared_key = heads(q, config.head_dim), heads(compressed[:, latent.kv_rank :], latent.rope_dim)
    split = latent.content_dim
    turned_q = rotary(q[..., split:], positions, config.rope)
    turned_k = rotary(shared_key, positions, config.rope)
    turned_k = jnp.broadcast_to(turned_k, (*kv.shape[:-1], latent.rope_dim))
    q = jnp.concatenate([q[..., :split], turned_q], axis=-1)
    k = jnp.concatenate([kv[..., :split], turned_k], axis=-1)
    return q, k, kv[..., split:]


def attend(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch seq kv_heads dim"],
    v: Float[Array, "batch seq kv_heads value"],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "batch seq q_width"]:
    """Causal attention; softmax in float32.

    Args:
        q: queries, turned; consecutive heads share a key head.
        k: keys, turned.
        v: values.
        scale: multiplies the scores.
        window: how many positions a query sees, itself included; None = all up to its own.
    """
    batch, seq, heads, _ = q.shape
    groups = heads // k.shape[2]
    # One leading axis of independent heads: `jax.nn.dot_product_attention` took 3 times as long on CPU.
    # Query heads that share a key head become rows of one matmul.
    q = rearrange(q * jnp.asarray(scale, q.dtype), "b s (n g) d -> (b n) g s d", g=groups)
    k = rearrange(k, "b s n d -> (b n) d s")
    v = rearrange(v, "b s n d -> (b n) s d")
    if seq <= LONG:
        out = _rows(q, k, v, jnp.arange(seq), window)
    else:
        pad = -seq % QUERY_CHUNK
        parts = rearrange(jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0))), "h g (c s) d -> c h g s d", s=QUERY_CHUNK)
        # Padding rows repeat the last position: they are dropped, and a row that sees nothing would be NaN.
        positions = jnp.minimum(jnp.arange(seq + pad), seq - 1).reshape(-1, QUERY_CHUNK)
        rows = functools.partial(_rows, window=window)
        out = jax.lax.map(lambda chunk: jax.checkpoint(rows)(chunk[0], k, v, chunk[1]), (parts, positions))
        out = rearrange(out, "c h g s d -> h g (c s) d")[:, :, :seq]
    return rearrange(out, "(b n) g s d -> b s (n g d)", b=batch)


def attend_cached(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch kv_heads keys dim"],
    v: Float[Array, "batch kv_heads keys value"],
    *,
    scale: float,
    window: int | None,
    first: Int[Array, ""],
) -> Float[Array, "batch seq q_width"]:
    """`attend` of queries at positions from `first` on over keys and values that are kept by head.

    Keys behind a query's position are not seen, whatever they hold. Queries are taken in chunks where there are many.
    """
    batch, seq, heads, _ = q.shape
    q = rearrange(q * jnp.asarray(scale, q.dtype), "b s (n g) d -> (b n) g s d", g=heads // k.shape[1])
    k = jnp.swapaxes(k.reshape(-1, *k.shape[2:]), 1, 2)
    v = v.reshape(-1, *v.shape[2:])
    parts = [
        _rows(
            q[:, :, start : start + QUERY_CHUNK], k, v, first + jnp.arange(start, min(start + QUERY_CHUNK, seq)), window
        )
        for start in range(0, seq, QUERY_CHUNK)
    ]
    return rearrange(jnp.concatenate(parts, axis=2), "(b n) g s d -> b s (n g d)", b=batch)


def _rows(
    q: Float[Array, "heads groups rows dim"],
    k: Float[Array, "heads dim keys"],
    v: Float[Array, "heads keys value"],
    positions: Int[Array, "rows"],
    window: int | None,
) -> Float[Array, "heads groups rows value"]:
    """Attention of some queries, already scaled, at `positions`; keys are of positions from 0 on."""
    groups, count = q.shape[1:3]
    flat = rearrange(q, "h g s d -> h (g s) d")
    scores = jnp.matmul(flat, k, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    behind = positions[:, None] - jnp.arange(k.shape[2])[None, :]
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    scores = jnp.where(jnp.tile(seen, (groups, 1))[None], scores, -jnp.inf)
    exp = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.matmul(exp.astype(v.dtype), v, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    out = (out / jnp.sum(exp, axis=-1, keepdims=True)).astype(v.dtype)
    return rearrange(out, "h (g s) d -> h g s d", s=count)
