"""How far queries and keys move when the tokens' normed inputs do."""

import dataclasses

import numpy as np
from jaxtyping import Float64

from hetmoe.models.config import LatentAttention, ModelConfig
from hetmoe.models.params import Attention
from hetmoe.models.rotary import amplitude
from hetmoe.quantize.bounds.attention import Heads, cut
from hetmoe.quantize.bounds.attention_norms import AttentionNorms
from hetmoe.quantize.bounds.rms_norm import lifted_length, norm_change
from hetmoe.quantize.bounds.rounding import rounding

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Moves:
    """Bounds of the changes of queries or keys, `[batch, seq, heads]`, or `[seq]` of one head.

    Attributes:
        size: of any change.
        through: with `own`, of its parts: a change is `B^T dn` of at most `through` (by which dn and all factors behind
            B are bounded), plus a part parallel to the query or key itself of at most `own` times it, where B is the
            head's projection with all gains. Infinite where this is not known.
        own: see there.
        lost: rounding, which is no part of these two, but of `size`.
    """

    size: Float64[Array, "*shape"]
    through: Float64[Array, "*shape"]
    own: Float64[Array, "*shape"]
    lost: Float64[Array, "*shape"]


def head_moves(
    heads: Heads, norms: AttentionNorms, weights: Attention, radius: Float64[Array, "batch seq"], config: ModelConfig
) -> tuple[Moves, Moves, Float64[Array, "batch seq"]]:
    """Moves of queries and of keys, and by how much the inputs of the value projection move.

    Args:
        heads: of the clean run.
        norms: of this layer.
        weights: of this layer in float64.
        radius: of the normed inputs, without the norm's gain.
        config: of the model.
    """
    width = config.num_heads * config.head_dim
    if config.latent is None:
        q = _plain("q", weights.q_norm, heads, norms, radius, config)
        k, value = _plain("k", weights.k_norm, heads, norms, radius, config), radius
    else:
        q, k, value = _latent(heads, norms, config.latent, radius, config)
    lost = [rounding(width, np.linalg.norm(part, axis=-1)) for part in (heads.q, heads.k)]
    q, k = (dataclasses.replace(m, size=m.size + off, lost=m.lost + off) for m, off in zip((q, k), lost, strict=True))
    return q, k, value


def _plain(
    name: str, gain: Array | None, heads: Heads, norms: AttentionNorms, radius: Array, config: ModelConfig
) -> Moves:
    """Of queries or keys.

    Behind a norm of length l, `q = g * q0 / l` times a constant c, so that `q' - q = c g * dq0 / l' + q (l / l' - 1)`:
    the parts of `Moves`, with `|l' - l| <= |dq0|`.
    """
    part, raw, turned = norms.linear[name], heads.raw[name], abs(amplitude(config.rope))
    each, lost = part.each(radius), np.broadcast_to(part.lost, (*radius.shape, len(part.lost)))
    if gain is None:
        size, through, own = each, np.broadcast_to(radius[..., None], each.shape), np.zeros_like(each)
    else:
        if config.qk_norm == "width":
            whole, change = raw[..., None, :], part.all(radius)[..., None]
            most = np.abs(gain).reshape(-1, config.head_dim).max(axis=1)
        else:
            whole, change, most = cut(raw, config.head_dim), each, np.abs(gain).max()
        length = lifted_length(whole, config.rms_norm_eps)
        left = length - change
        factor = whole.shape[-1] ** 0.5 / np.where(left > 0, left, 1)
        through = np.where(left > 0, factor * radius[..., None], np.inf) * np.ones_like(each)
        own = np.where(left > 0, change / np.where(left > 0, left, 1), np.inf) * np.ones_like(each)
        # Of this head by its parts, or of all that is normed together.
        parts = factor * (each + np.linalg.norm(cut(raw, config.head_dim), axis=-1) * change / length)
        size = norm_change(whole, change, config.rms_norm_eps)
        size = np.where(left > 0, np.minimum(parts, size), size) * most
        lost = factor * lost * most
    if config.clip_qkv is not None:  # brings changes of elements closer to 0, each by itself
        through, own = np.full_like(each, np.inf), np.full_like(each, np.inf)
    return Moves(size * turned, through * turned, own, lost * turned)


def _latent(
    heads: Heads, norms: AttentionNorms, latent: LatentAttention, radius: Array, config: ModelConfig
) -> tuple[Moves, Moves, Array]:
    """Of queries and keys, through the norms of the latents (gains are part of the matrices behind)."""
    part, turned = norms.linear, max(1.0, abs(amplitude(config.rope)))
    if latent.query_rank is None:
        dq = part["q"].each(radius)
    else:
        dq = part["q_b"].each(norm_change(heads.raw["q_a"], part["q_a"].all(radius), latent.norm_eps))
    raw = heads.raw["kv_a"][..., : latent.kv_rank]
    content = norm_change(raw, part["content"].all(radius), latent.norm_eps)
    dk = np.hypot(part["k"].each(content), part["rope"].each(radius) * turned)
    q, k = (Moves(d, np.full_like(d, np.inf), np.full_like(d, np.inf), np.zeros_like(d)) for d in (dq * turned, dk))
    return q, k, content
