"""Norms of one layer's attention matrices, the gains of the norms before them included."""

import dataclasses

import numpy as np
from jaxtyping import Float64

from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Attention
from hetmoe.quantize.bounds.attention import head_outputs
from hetmoe.quantize.bounds.matrix_norms import spectral_norm
from hetmoe.quantize.bounds.rounding import rounding

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix `diag(gain) w`, cut into heads.

    Attributes:
        heads: spectral norm of each head's columns.
        together: spectral norm.
        lost: rounding of each head's outputs, for inputs of the length that an RMS norm gives.
        triangles: R with `|B q| = |R q|` for each head's columns B and every vector q (QR factorisation).
    """

    heads: Float64[Array, "heads"]
    together: float
    lost: Float64[Array, "heads"]
    triangles: Float64[Array, "heads rank dim"]

    def each(self, radius: Float64[Array, "batch seq"]) -> Float64[Array, "batch seq heads"]:
        """Bounds the change of each head if the inputs move by at most `radius`."""
        return radius[..., None] * self.heads + self.lost

    def all(self, radius: Float64[Array, "batch seq"]) -> Float64[Array, "batch seq"]:
        """Bounds the change of all heads together."""
        return radius * self.together + float(np.linalg.norm(self.lost))


def linear(w: Float64[Array, "K N"], gain: Float64[Array, "K"], heads: int, behind: Array | None = None) -> Linear:
    """Norms of `diag(gain) w`; its triangles are those of `diag(gain) w diag(behind)`, where a gain follows."""
    scaled = gain[:, None] * w
    parts = np.split(scaled, heads, axis=1)
    lost = [rounding(len(w), len(w) ** 0.5 * float(np.linalg.norm(part))) for part in parts]
    gains = (
        np.ones((heads, 1))
        if behind is None
        else np.broadcast_to(behind.reshape(-1, parts[0].shape[1]), (heads, parts[0].shape[1]))
    )
    return Linear(
        np.array([spectral_norm(part) for part in parts]), spectral_norm(scaled), np.array(lost),
        np.stack([np.linalg.qr(part * each, mode="r") for part, each in zip(parts, gains, strict=True)]),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AttentionNorms:
    """Norms of one layer's attention.

    Attributes:
        linear: projections by name.
        value_out: spectral norms of `value projection @ output projection` of each head.
        value_size: the largest sum of magnitudes of the products in an output of each head.
        out_triangles: R with `|q @ O| = |R q|` for each head's output projection O.
    """

    linear: dict[str, Linear]
    value_out: Float64[Array, "heads"]
    value_size: Float64[Array, "heads"]
    out_triangles: Float64[Array, "heads rank value"]


def attention_norms(gain: Float64[Array, "hidden"], weights: Attention, config: ModelConfig) -> AttentionNorms:
    """Norms of one layer's attention behind a norm with this gain, weights in float64."""
    parts, latent = dict[str, Linear](), config.latent
    if latent is None:
        v, into, bias = weights.v, gain, weights.v_bias
        parts["q"] = linear(weights.q, gain, config.num_heads, weights.q_norm)
        parts["k"] = linear(weights.k, gain, config.num_kv_heads, weights.k_norm)
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
    offsets = np.zeros((len(values), 1)) if bias is None else bias.reshape(len(values), -1)
    lengths = len(v) ** 0.5 * np.linalg.norm(values, axis=(1, 2)) + np.linalg.norm(offsets, axis=1)
    out, size = list[float](), list[float]()
    for head, matrix in enumerate(o):
        shared = head * len(values) // len(o)
        apart = spectral_norm(values[shared]) * spectral_norm(matrix)
        # Clipping between the two leaves only the product of their norms.
        out.append(apart if config.clip_qkv is not None else min(apart, spectral_norm(values[shared] @ matrix)))
        size.append(float(lengths[shared] * np.linalg.norm(matrix)))
    triangles = np.stack([np.linalg.qr(matrix.T, mode="r") for matrix in o])
    return AttentionNorms(parts, np.array(out), np.array(size), triangles)
