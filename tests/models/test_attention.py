"""RMS norm, rotary embedding and causal grouped-query attention against float64 numpy, and causality to the bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.models.attention import attend, rms_norm, rotary
from hetmoe.models.config import ModelConfig
from hetmoe.models.transformer import forward
from tests.models import numpy_model
from tests.models.tiny import random_params, random_tokens, tiny_config

UNIT = 2.0**-24  # unit roundoff of float32
HEADS = [(4, 2), (4, 4), (4, 1), (6, 3)]

_attend = jax.jit(attend, static_argnames="config")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def qkv(config: ModelConfig, batch: int, seq: int) -> list[np.ndarray]:
    """Queries, keys and values; queries large enough for sharp attention."""
    widths = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    q, k, v = (normal(i, batch, seq, heads * config.head_dim) for i, heads in enumerate(widths))
    return [3 * q, k, v]


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_rms_norm(scale: float) -> None:
    x, gain = scale * normal(0, 3, 5, 23), 1 + 0.2 * normal(1, 23)
    actual = rms_norm(jnp.asarray(x), jnp.asarray(gain), 1e-5)
    expected = numpy_model.rms_norm(x.astype(np.float64), gain.astype(np.float64), 1e-5)
    # The mean of 23 squares errs by at most 23 units, halved by the root; then a root and two products.
    np.testing.assert_allclose(actual, expected, rtol=16 * UNIT)
    assert actual.dtype == jnp.float32


def test_rms_norm_of_zeros_and_in_bfloat16() -> None:
    assert not np.any(rms_norm(jnp.zeros((2, 4)), jnp.ones((4,)), 1e-5))
    x, gain = jnp.asarray(normal(0, 3, 257), jnp.bfloat16), jnp.asarray(normal(1, 257), jnp.bfloat16)
    actual = rms_norm(x, gain, 1e-5)
    assert actual.dtype == jnp.bfloat16
    # Computed in float32 and rounded once: within half an ulp of bfloat16 (8 bits) of the exact value, and a little.
    exact = numpy_model.rms_norm(np.asarray(x).astype(np.float64), np.asarray(gain).astype(np.float64), 1e-5)
    np.testing.assert_allclose(np.asarray(actual).astype(np.float64), exact, rtol=1.01 * 2.0**-8)


@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_rotary(theta: float) -> None:
    seq, heads, dim = 50, 3, 6
    x = normal(0, 2, seq, heads, dim)
    actual = np.asarray(rotary(jnp.asarray(x), jnp.arange(seq), theta))
    expected = np.stack([[numpy_model.rotary(x[b, :, h], theta) for h in range(heads)] for b in range(2)], axis=0)
    # The angle is float32: up to 50 radians, off by a unit of itself, times |x| < 5.
    np.testing.assert_allclose(actual, expected.swapaxes(1, 2), rtol=0, atol=50 * UNIT * 5)
    np.testing.assert_array_equal(actual[:, 0], x[:, 0])  # position 0 is not turned


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = normal(0, 1, 1, 1, 6), normal(1, 1, 1, 1, 6)

    def score(i: int, j: int) -> float:
        left = rotary(jnp.asarray(q), jnp.array([i]), 100.0)
        return float(np.sum(np.asarray(left) * np.asarray(rotary(jnp.asarray(k), jnp.array([j]), 100.0))))

    # Angles up to 40 radians, off by a few units of themselves, times |q| |k| of about 6.
    assert abs(score(7, 3) - score(40, 36)) < 40 * 4 * UNIT * 6
    assert abs(score(7, 3) - score(7, 4)) > 0.1


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_causal_grouped_query_attention(heads: int, kv_heads: int) -> None:
    config = tiny_config(num_heads=heads, num_kv_heads=kv_heads)
    q, k, v = qkv(config, 2, 11)
    actual = _attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), config)
    expected = numpy_model.attention(*(part.astype(np.float64) for part in (q, k, v)), config)
    # Scores reach about 40, so their float32 error of a unit or two becomes a relative error of the softmax weights.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=40 * 2 * UNIT * np.abs(v).max())
    assert actual.dtype == jnp.float32


def test_large_scores_do_not_overflow() -> None:
    config = tiny_config()
    q, k, v = qkv(config, 1, 6)
    actual = _attend(jnp.asarray(1e4 * q), jnp.asarray(k), jnp.asarray(v), config)
    assert np.all(np.isfinite(actual))
    assert np.abs(actual).max() <= np.abs(v).max() * (1 + 8 * UNIT)  # a weighted mean of values


def test_bfloat16_attention() -> None:
    config = tiny_config()
    parts = [jnp.asarray(part, jnp.bfloat16) for part in qkv(config, 2, 11)]
    actual = _attend(parts[0], parts[1], parts[2], config)
    assert actual.dtype == jnp.bfloat16
    q, k, v = (np.asarray(part).astype(np.float64) for part in parts)
    # Queries and keys are rounded after turning (2^-9 each), and meet in scores whose terms sum to about 40.
    limit = 40 * 2.0**-9 * np.abs(v).max()
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), numpy_model.attention(q, k, v, config), rtol=0, atol=limit
    )
    assert np.mean(np.abs(np.asarray(actual, np.float64) - numpy_model.attention(q, k, v, config))) < limit / 10


@pytest.mark.parametrize("position", [1, 6, 10])
def test_later_tokens_do_not_change_attention(position: int) -> None:
    """Bitwise: a masked score has weight exactly zero."""
    config = tiny_config()
    parts = qkv(config, 2, 11)
    changed = [part.copy() for part in parts]
    for part in changed:
        part[1, position:] = 100 * normal(9, *part[1, position:].shape)
    before, after = (np.asarray(_attend(*(jnp.asarray(p) for p in ps), config)) for ps in (parts, changed))
    np.testing.assert_array_equal(before[0], after[0])  # the other sequence
    np.testing.assert_array_equal(before[1, :position], after[1, :position])
    assert np.all(np.any(before[1, position:] != after[1, position:], axis=-1))


def test_later_tokens_do_not_change_logits() -> None:
    """Through the whole model.

    Other tokens move a token to another slot of its expert's block, where a matmul may sum in another order: a few
    units of the largest logit.
    """
    config = tiny_config(num_layers=2)
    params, tokens = random_params(config, 0), random_tokens(config, 1, (2, 12))
    run: Any = jax.jit(forward, static_argnames="config")
    before = np.asarray(run(params, tokens, config))
    for position in (1, 5, 11):
        after = np.asarray(run(params, tokens.at[1, position:].set((tokens[1, position:] + 7) % 40), config))
        changed = np.abs(after - before).max(axis=-1) > 32 * UNIT * np.abs(before).max()
        assert not changed[0].any()
        np.testing.assert_array_equal(changed[1], np.arange(12) >= position)


def test_gradient_of_attention() -> None:
    """Along a random direction, against central differences of the float64 reference."""
    config = tiny_config()
    parts = qkv(config, 1, 5)
    weight, directions = normal(5, 1, 5, 24), [normal(6 + i, *part.shape) for i, part in enumerate(parts)]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, config) * weight)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(jnp.asarray(p) for p in parts))
    for index, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
        step, sides = 1e-5, []
        for sign in (1, -1):
            q, k, v = (p.astype(np.float64) + sign * step * directions[i] * (i == index) for i, p in enumerate(parts))
            sides.append(np.sum(numpy_model.attention(q, k, v, config) * weight))
        expected = (sides[0] - sides[1]) / (2 * step)
        scale = float(np.sum(np.abs(np.asarray(grad) * direction)))
        assert abs(float(np.sum(np.asarray(grad) * direction)) - expected) < 80 * UNIT * scale  # as above
        assert abs(expected) > 1e-3 * scale
