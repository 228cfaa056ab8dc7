"""How far attention's output moves when the tokens' normed inputs do.

Inputs are bounded as `|dn_u| <= radius_u`, where n_u is token u's RMS-normed state without the norm's gain (gains are
part of the matrices behind). Queries, keys and values are linear in n, but for norms and clipping, which does not
lengthen differences; rotary embedding turns. Scores, `s = scale q k`, then change by at most

    tau = scale (|dq| |k| + |q| |dk| + |dq| |dk|),

and the attention weights p to `p' = p e^ds / sum p e^ds` with `|ds| <= tau`. With y_u, what value u adds to the output
through the head's output projection, and o = sum p y,

    o' - o = sum_u p'_u (y'_u - y_u) + sum_u p'_u (y_u - o),

of which the second sum is `sum_u p_u (e^ds_u - 1) (y_u - o) / sum_u p_u e^ds_u`, because the p-weighted mean of y_u - o
is 0: at most `sum_u p_u (e^tau_u - 1) |y_u - o| / sum_u p_u e^-tau_u`, and at most the largest |y_u - o|, being a mean.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

from hetmoe.models.config import LatentAttention, ModelConfig
from hetmoe.models.params import Attention
from hetmoe.models.rotary import amplitude
from hetmoe.quantize.bounds.attention import Heads, cut, head_outputs, score_scale, sees
from hetmoe.quantize.bounds.matrix_norms import spectral_norm
from hetmoe.quantize.bounds.rms_norm import lifted_length, norm_change
from hetmoe.quantize.bounds.rounding import rounding, widened

Array = np.ndarray

LARGEST_TAU = 300.0  # its powers stay far from float64's ends; beyond it only the largest |y - o| is used


@dataclasses.dataclass(frozen=True)
class Linear:
    """Norms of a matrix, gains of its inputs included, and of its heads' columns."""

    heads: Float64[Array, "heads"]  # spectral
    together: float  # spectral
    lost: Float64[Array, "heads"]  # rounding of inputs of the length that an RMS norm gives

    def each(self, radius: Float64[Array, "batch seq"]) -> Float64[Array, "batch seq heads"]:
        """Bounds the change of each head."""
        return radius[..., None] * self.heads + self.lost

    def all(self, radius: Float64[Array, "batch seq"]) -> Float64[Array, "batch seq"]:
        """Bounds the change of all heads together."""
        return radius * self.together + np.linalg.norm(self.lost)


def linear(w: Float64[Array, "K N"], gain: Float64[Array, "K"], heads: int) -> Linear:
    """Norms of `diag(gain) w`."""
    scaled = gain[:, None] * w
    parts = np.split(scaled, heads, axis=1)
    lost = [rounding(len(w), len(w) ** 0.5 * float(np.linalg.norm(part))) for part in parts]
    return Linear(np.array([spectral_norm(part) for part in parts]), spectral_norm(scaled), np.array(lost))


@dataclasses.dataclass(frozen=True)
class AttentionNorms:
    """Norms of one layer's attention: of projections by name, and of `value projection @ output projection`."""

    linear: dict[str, Linear]
    value_out: Float64[Array, "heads"]
    value_size: Float64[Array, "heads"]  # largest sum of magnitudes of the products in an output


def attention_norms(gain: Float64[Array, "hidden"], weights: Attention, config: ModelConfig) -> AttentionNorms:
    """Norms of one layer's attention behind a norm with this gain, weights in float64."""
    parts, latent = dict[str, Linear](), config.latent
    if latent is None:
        v, into, bias = weights.v, gain, weights.v_bias
        parts["q"] = linear(weights.q, gain, config.num_heads)
        parts["k"] = linear(weights.k, gain, config.num_kv_heads)
    else:
        if latent.query_rank is None:
            parts["q"] = linear(weights.q, gain, config.num_heads)
        else:
            parts["q_a"] = linear(weights.q_a, gain, 1)
            parts["q_b"] = linear(weights.q_b, weights.q_a_norm, config.num_heads)
        parts["content"] = linear(weights.kv_a[:, : latent.kv_rank], gain, 1)
        parts["rope"] = linear(weights.kv_a[:, latent.kv_rank :], gain, 1)
        kv = weights.kv_b.reshape(latent.kv_rank, config.num_heads, -1)
        key, value = kv[..., : latent.content_dim], kv[..., latent.content_dim :]
        parts["k"] = linear(key.reshape(latent.kv_rank, -1), weights.kv_a_norm, config.num_heads)
        v, into, bias = value.reshape(latent.kv_rank, -1), weights.kv_a_norm, None
    o = head_outputs(weights, config)
    values = np.stack(np.split(into[:, None] * v, v.shape[1] // o.shape[1], axis=1))
    offsets = np.zeros(v.shape[1]) if bias is None else bias
    lengths = len(v) ** 0.5 * np.linalg.norm(values, axis=(1, 2)) + np.linalg.norm(
        offsets.reshape(len(values), -1), axis=1
    )
    out, size = list[float](), list[float]()
    for head, matrix in enumerate(o):
        shared = head * len(values) // len(o)
        apart = spectral_norm(values[shared]) * spectral_norm(matrix)
        # Clipping between the two keeps only the product of their norms.
        out.append(apart if config.clip_qkv is not None else min(apart, spectral_norm(values[shared] @ matrix)))
        size.append(float(lengths[shared] * np.linalg.norm(matrix)))
    return AttentionNorms(parts, np.array(out), np.array(size))


def attention_change(
    heads: Heads, norms: AttentionNorms, weights: Attention, radius: Float64[Array, "batch seq"], config: ModelConfig
) -> Float64[Array, "batch seq"]:
    """Bounds the change of what attention adds to the residual stream, for each token.

    Args:
        heads: of the clean run.
        norms: of this layer.
        weights: of this layer in float64.
        radius: of the normed inputs, without the norm's gain.
        config: of the model.
    """
    if config.latent is None:
        dq, dk, dvalue = _plain(heads, norms, weights, radius, config)
    else:
        dq, dk, dvalue = _latent(heads, norms, config.latent, radius, config)
    width = config.num_heads * config.head_dim
    q_size, k_size = np.linalg.norm(heads.q, axis=-1), np.linalg.norm(heads.k, axis=-1)
    dq, dk = dq + rounding(width, q_size), dk + rounding(width, k_size)
    seen, scale = sees(heads.q.shape[1], config.sliding_window)[None], score_scale(config)
    o, total = head_outputs(weights, config), np.zeros_like(radius)
    for head, shared, share in heads.weights(config):
        per_query = (q_size[:, :, head, None], dq[:, :, head, None])
        per_key = (k_size[:, None, :, shared], dk[:, None, :, shared])
        tau = per_query[1] * per_key[0] + (per_query[0] + per_query[1]) * per_key[1]
        tau = scale * (tau + rounding(config.head_dim, per_query[0] * per_key[0]))
        tau = np.where(seen, widened(tau), 0.0)
        value_change = dvalue * norms.value_out[head]
        total += _moved_weights(share, tau, heads.v[:, :, shared] @ o[head], seen)
        total += _moved_values(share, tau, value_change, seen)
        total += rounding(sum(o.shape) + config.hidden_size + radius.shape[1], float(norms.value_size[head]))
    return widened(total)


def _moved_weights(share: Array, tau: Array, y: Array, seen: Array) -> Array:
    """Bounds `sum_u p'_u (y_u - o)`."""
    o = share @ y
    squared = np.sum(np.square(y), axis=-1)[:, None, :] + np.sum(np.square(o), axis=-1)[:, :, None]
    apart = squared - 2 * (o @ np.swapaxes(y, 1, 2))
    apart = np.sqrt(np.maximum(apart, 0) + rounding(y.shape[-1], squared))  # the difference cancels
    farthest = np.max(np.where(seen, apart, 0.0), axis=-1)
    small = np.minimum(tau, LARGEST_TAU)
    sums = np.sum(share * np.expm1(small) * apart, axis=-1) / np.sum(share * np.exp(-small), axis=-1)
    return np.where(np.max(tau, axis=-1) <= LARGEST_TAU, np.minimum(sums, farthest), farthest)


def _moved_values(share: Array, tau: Array, change: Array, seen: Array) -> Array:
    """Bounds `sum_u p'_u (y'_u - y_u)`, by the largest p'_u that the changes of scores admit, or by the largest change.

    p'_u is largest if its own score rises and all others fall.
    """
    change = change[:, None, :]
    largest = np.max(np.where(seen, change, 0.0), axis=-1)
    small = np.minimum(tau, LARGEST_TAU)
    up, down = share * np.exp(small), share * np.exp(-small)
    others = np.maximum(np.sum(down, axis=-1, keepdims=True) - down, 0)
    most = np.where(up > 0, up / np.maximum(up + others, np.finfo(np.float64).tiny), 0.0)
    sums = np.sum(most * change, axis=-1)
    return np.where(np.max(tau, axis=-1) <= LARGEST_TAU, np.minimum(sums, largest), largest)


def _plain(
    heads: Heads, norms: AttentionNorms, weights: Attention, radius: Array, config: ModelConfig
) -> tuple[Array, Array, Array]:
    """Changes of each head's queries and keys, and of what values are made from."""
    gains = {"q": weights.q_norm, "k": weights.k_norm}

    def moved(name: str) -> Array:
        part, raw = norms.linear[name], heads.raw[name]
        each = part.each(radius)
        if config.qk_norm == "width":
            gain = np.abs(gains[name]).reshape(-1, config.head_dim).max(axis=1)
            each = _width_norm(raw, each, part.all(radius), config) * gain
        elif config.qk_norm == "head":
            each = norm_change(cut(raw, config.head_dim), each, config.rms_norm_eps) * np.abs(gains[name]).max()
        return each * abs(amplitude(config.rope))

    return moved("q"), moved("k"), radius


def _width_norm(raw: Array, each: Array, together: Array, config: ModelConfig) -> Array:
    """Change of each head behind a norm over all heads.

    At most that of all heads; and, as `q / l` with the norm's length l changes by `dq / l' - (q / l) dl / l'`, at most
    `(|dq| + |q| |dl| / l) / (l - |dl|)` of each head, times the root of the width.
    """
    of_all = norm_change(raw, together, config.rms_norm_eps)[..., None]
    length = lifted_length(raw, config.rms_norm_eps)[..., None]
    together = together[..., None]
    size = np.linalg.norm(cut(raw, config.head_dim), axis=-1)
    left = length - together
    one = (each + size * together / length) / np.where(left > 0, left, 1) * raw.shape[-1] ** 0.5
    return np.where(left > 0, np.minimum(one, of_all), of_all)


def _latent(
    heads: Heads, norms: AttentionNorms, latent: LatentAttention, radius: Array, config: ModelConfig
) -> tuple[Array, Array, Array]:
    """Likewise, through the norms of the latents, whose gains are part of the matrices behind."""
    part, turned = norms.linear, max(1.0, abs(amplitude(config.rope)))
    if latent.query_rank is None:
        dq = part["q"].each(radius)
    else:
        dq = part["q_b"].each(norm_change(heads.raw["q_a"], part["q_a"].all(radius), latent.norm_eps))
    raw = heads.raw["kv_a"][..., : latent.kv_rank]
    content = norm_change(raw, part["content"].all(radius), latent.norm_eps)
    dk = np.hypot(part["k"].each(content), part["rope"].each(radius) * turned)
    return dq * turned, dk, content
