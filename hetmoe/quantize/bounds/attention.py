"""Attention in float64, with what its bounds start from."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from hetmoe.models.config import LatentAttention, ModelConfig
from hetmoe.models.params import Attention
from hetmoe.models.rotary import amplitude, frequencies, latent_score_factor
from hetmoe.quantize.bounds.rms_norm import rms_norm

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys and values of all heads, turned; consecutive heads share a key head."""

    q: Float64[Array, "batch seq heads dim"]
    k: Float64[Array, "batch seq kv_heads dim"]
    v: Float64[Array, "batch seq kv_heads value"]
    raw: dict[str, Array]  # `[batch, seq, width]`, what norms behind projections read, by name

    def weights(self, config: ModelConfig) -> Iterator[tuple[int, int, Array]]:
        """(head, its key head, attention weights `[batch, queries, keys]`) of one head after the other."""
        heads, seen = self.q.shape[2], sees(self.q.shape[1], config.sliding_window)
        for head in range(heads):
            shared = head * self.k.shape[2] // heads
            scores = score_scale(config) * (self.q[:, :, head] @ np.swapaxes(self.k[:, :, shared], 1, 2))
            scores = np.where(seen[None], scores, -np.inf)
            powers = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
            yield head, shared, powers / np.sum(powers, axis=-1, keepdims=True)


def sees(seq: int, window: int | None) -> Array:
    """Which positions a query attends to, boolean `[queries, keys]`."""
    behind = np.arange(seq)[:, None] - np.arange(seq)[None, :]
    return (behind >= 0) & (behind < (seq if window is None else window))


def score_scale(config: ModelConfig) -> float:
    """What multiplies products of queries and keys."""
    return config.head_dim**-0.5 * (1.0 if config.latent is None else latent_score_factor(config.rope))


def head_outputs(weights: Attention, config: ModelConfig) -> Float64[Array, "heads value hidden"]:
    """The output projection, cut into heads."""
    return weights.o.reshape(config.num_heads, -1, config.hidden_size)


def attention(heads: Heads, weights: Attention, config: ModelConfig) -> Float64[Array, "batch seq hidden"]:
    """What attention adds to the residual stream."""
    o = head_outputs(weights, config)
    out = sum(share @ heads.v[:, :, shared] @ o[head] for head, shared, share in heads.weights(config))
    return np.asarray(out) + (0 if weights.o_bias is None else weights.o_bias)


def project(x: Float64[Array, "batch seq hidden"], weights: Attention, config: ModelConfig) -> Heads:
    """Queries, keys and values of normed inputs."""

    def linear(inputs: Array, name: str) -> Array:
        bias = getattr(weights, f"{name}_bias", None)
        return inputs @ getattr(weights, name) + (0 if bias is None else bias)

    if config.latent is not None:
        return _latent(x, weights, config, config.latent, linear)
    raw = {name: linear(x, name) for name in ("q", "k", "v")}
    values = dict(raw)
    for name, gain in (("q", weights.q_norm), ("k", weights.k_norm)):
        if config.qk_norm == "width":
            values[name] = gain * rms_norm(raw[name], config.rms_norm_eps)
    if config.clip_qkv is not None:
        values = {name: np.clip(value, -config.clip_qkv, config.clip_qkv) for name, value in values.items()}
    q, k, v = (cut(value, config.head_dim) for value in values.values())
    if config.qk_norm == "head":
        raw = values
        q = weights.q_norm * rms_norm(q, config.rms_norm_eps)
        k = weights.k_norm * rms_norm(k, config.rms_norm_eps)
    return Heads(turn(q, config), turn(k, config), v, raw)


def _latent(x: Array, weights: Attention, config: ModelConfig, latent: LatentAttention, linear: Any) -> Heads:
    raw = {"kv_a": linear(x, "kv_a")}
    if latent.query_rank is None:
        q = linear(x, "q")
    else:
        raw["q_a"] = linear(x, "q_a")
        q = linear(weights.q_a_norm * rms_norm(raw["q_a"], latent.norm_eps), "q_b")
    content = weights.kv_a_norm * rms_norm(raw["kv_a"][..., : latent.kv_rank], latent.norm_eps)
    kv = cut(linear(content, "kv_b"), latent.content_dim + latent.value_dim)
    q, split = cut(q, config.head_dim), latent.content_dim
    key = turn(raw["kv_a"][..., None, latent.kv_rank :], config)  # one for all heads
    key = np.broadcast_to(key, (*kv.shape[:-1], latent.rope_dim))
    return Heads(
        np.concatenate([q[..., :split], turn(q[..., split:], config)], axis=-1),
        np.concatenate([kv[..., :split], key], axis=-1), kv[..., split:], raw,
    )  # fmt: skip


def cut(values: Array, dim: int) -> Array:
    """Values `[batch, seq, heads * dim]` as heads."""
    return values.reshape(*values.shape[:2], -1, dim)


def turn(x: Float64[Array, "batch seq heads dim"], config: ModelConfig) -> Float64[Array, "batch seq heads dim"]:
    """Rotary embedding (`hetmoe.models.rotary`)."""
    turned = (turn_rows(sequence, np.arange(x.shape[1]), config) for sequence in x)
    return amplitude(config.rope) * np.stack(list(turned))


def turn_rows(
    x: Float64[Array, "seq rows dim"], positions: Int[Array, "seq"], config: ModelConfig
) -> Float64[Array, "seq rows dim"]:
    """Rows turned by the angles of their positions, in the order of elements that rotary embedding leaves."""
    half = x.shape[-1] // 2
    cos, sin = (part[:, None, :] for part in _turns(positions, x.shape[-1], config))
    low, high = (x[..., ::2], x[..., 1::2]) if config.rope.interleaved else (x[..., :half], x[..., half:])
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def turn_back(
    x: Float64[Array, "seq rows dim"], positions: Int[Array, "seq"], config: ModelConfig
) -> Float64[Array, "seq rows dim"]:
    """Rows turned back by the angles of their positions, in the order of elements before rotary embedding."""
    half = x.shape[-1] // 2
    cos, sin = (part[:, None, :] for part in _turns(positions, x.shape[-1], config))
    low, high = x[..., :half], x[..., half:]
    low, high = low * cos + high * sin, high * cos - low * sin
    if not config.rope.interleaved:
        return np.concatenate([low, high], axis=-1)
    return np.stack([low, high], axis=-1).reshape(x.shape)


def _turns(positions: Array, dim: int, config: ModelConfig) -> tuple[Array, Array]:
    angle = positions[:, None] * frequencies(config.rope, dim).astype(np.float64)
    return np.cos(angle), np.sin(angle)
