"""Rotary position embedding and its stretchings."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hetmoe.models.config import Rope, Yarn


def frequencies(rope: Rope, dim: int) -> np.ndarray:
    """Radians per position of each pair, float32 `[dim / 2]`: `theta^(-2 i / dim)` (Su et al. 2021), stretched.

    Linear stretching divides all by its factor (Chen et al. 2023); for YaRN see `_yarn`.
    """
    plain = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.linear is not None:
        plain = plain / rope.linear
    if rope.yarn is not None:
        plain = _yarn(plain, rope.yarn, rope.theta, dim)
    return plain.astype(np.float32)


def _yarn(plain: np.ndarray, yarn: Yarn, theta: float, dim: int) -> np.ndarray:
    """Keeps fast frequencies, divides slow ones by `factor`, and mixes the two along a ramp (arXiv 2309.00071, 3.2)."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(yarn.original_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero, as in the published code
    slowed = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return plain / yarn.factor * slowed + plain * (1 - slowed)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def amplitude(rope: Rope) -> float:
    """What multiplies cosine and sine: 1, or YaRN's attention temperature."""
    yarn = rope.yarn
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale is not None and yarn.mscale_all_dim is not None:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def latent_score_factor(rope: Rope) -> float:
    """What multiplies the attention scores of latent attention under YaRN (DeepSeek-V2's published code)."""
    if rope.yarn is None or rope.yarn.mscale_all_dim is None:
        return 1.0
    return _mscale(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2


def rotary(
    x: Float[Array, "batch seq heads dim"], positions: Int[Array, "seq"], rope: Rope
) -> Float[Array, "batch seq heads dim"]:
    """Turns each pair of elements by its frequency times the position.

    Interleaved pairs come out de-interleaved (first all first elements): queries and keys alike, so that their
    products are what they would be in the original order.
    """
    half = x.shape[-1] // 2
    angle = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies(rope, x.shape[-1]))[None, :]
    scale = amplitude(rope)
    cos, sin = (scale * part[None, :, None, :] for part in (jnp.cos(angle), jnp.sin(angle)))
    wide = x.astype(jnp.float32)
    low, high = (wide[..., ::2], wide[..., 1::2]) if rope.interleaved else (wide[..., :half], wide[..., half:])
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
