"""RMS norm, rotary embedding and causal grouped-query attention against float64 numpy, and causality to the bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.models.attention import LONG, attend, rms_norm
from hetmoe.models.config import ModelConfig, Rope, Yarn
from hetmoe.models.rotary import rotary
from hetmoe.models.transformer import forward
from tests.models import numpy_model
from tests.models.tiny import random_params, random_tokens, tiny_config

UNIT = 2.0**-24  # unit roundoff of float32
HEADS = [(4, 2), (4, 4), (4, 1), (6, 3)]


def turned(q: jax.Array, k: jax.Array, v: jax.Array, config: ModelConfig) -> jax.Array:
    """Attention over `[batch, seq, width]`: heads cut out, queries and keys turned."""
    q, k, v = (part.reshape(*part.shape[:2], -1, config.head_dim) for part in (q, k, v))
    positions = jnp.arange(q.shape[1])
    return attend(
        rotary(q, positions, config.rope), rotary(k, positions, config.rope), v,
        scale=config.head_dim**-0.5, window=config.sliding_window,
    )  # fmt: skip


_attend = jax.jit(turned, static_argnames="config")
_attend_turned = jax.jit(attend, static_argnames=("scale", "window"))


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


ROPES = [
    Rope(theta=100.0),
    Rope(theta=10000.0),
    Rope(theta=100.0, interleaved=True),
    Rope(theta=100.0, linear=2.5),
    Rope(theta=100.0, yarn=Yarn(factor=4.0, original_positions=16, beta_fast=2.0, beta_slow=0.5)),
    Rope(theta=50.0, yarn=Yarn(factor=8.0, original_positions=64, truncate=False, attention_factor=0.9)),
    Rope(
        theta=100.0,
        interleaved=True,
        yarn=Yarn(factor=4.0, original_positions=16, mscale=1.0, mscale_all_dim=0.7, beta_fast=2.0, beta_slow=0.5),
    ),
]


@pytest.mark.parametrize("rope", ROPES, ids=range(len(ROPES)))
def test_rotary(rope: Rope) -> None:
    seq, heads, dim = 50, 3, 10
    x = normal(0, 2, seq, heads, dim)
    actual = np.asarray(rotary(jnp.asarray(x), jnp.arange(seq), rope))
    expected = numpy_model.turn(x.astype(np.float64), rope)
    # The angle is float32: up to 50 radians, off by a unit of itself, times |x| < 5.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=50 * UNIT * 5)
    order = np.concatenate([np.arange(0, dim, 2), np.arange(1, dim, 2)]) if rope.interleaved else np.arange(dim)
    factor = np.linalg.norm(expected) / np.linalg.norm(x)
    np.testing.assert_allclose(actual[:, 0], factor * x[:, 0][..., order], rtol=4 * UNIT)  # position 0 is not turned
    if rope.yarn is None:
        np.testing.assert_array_equal(actual[:, 0], x[:, 0][..., order])


def test_every_rotary_option_matters() -> None:
    x = normal(0, 1, 50, 1, 10).astype(np.float64)
    results = [numpy_model.turn(x, rope) for rope in ROPES]
    for index, left in enumerate(results):
        for right in results[index + 1 :]:
            assert np.abs(left - right).max() > 0.01


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_the_distance_only(interleaved: bool) -> None:
    q, k = normal(0, 1, 1, 1, 6), normal(1, 1, 1, 1, 6)
    rope = Rope(theta=100.0, interleaved=interleaved)

    def score(i: int, j: int) -> float:
        left = rotary(jnp.asarray(q), jnp.array([i]), rope)
        return float(np.sum(np.asarray(left) * np.asarray(rotary(jnp.asarray(k), jnp.array([j]), rope))))

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
        return jnp.sum(turned(q, k, v, config) * weight)

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


def heads_of(seq: int, heads: int, kv_heads: int, dim: int, value: int) -> list[np.ndarray]:
    """Turned queries, keys and values `[1, seq, heads, dim]`; values of another width."""
    q, k, v = normal(0, 1, seq, heads, dim), normal(1, 1, seq, kv_heads, dim), normal(2, 1, seq, kv_heads, value)
    return [3 * q, k, v]


def attended(parts: list[np.ndarray], window: int | None) -> np.ndarray:
    return np.asarray(_attend_turned(*(jnp.asarray(p) for p in parts), scale=6**-0.5, window=window))


@pytest.mark.parametrize("window", [None, 1, 2, 5, 11, 12, 1000])
def test_sliding_window(window: int | None) -> None:
    """A query sees that many positions, itself included."""
    parts = heads_of(11, 4, 2, 6, 5)
    actual = attended(parts, window)
    expected = numpy_model.attend(*(part.astype(np.float64) for part in parts), 6**-0.5, window)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=40 * 2 * UNIT * np.abs(parts[2]).max())  # as above
    if window == 1:  # a query that sees itself alone
        np.testing.assert_array_equal(actual.reshape(11, 2, 2, 5), np.repeat(parts[2][0, :, :, None], 2, axis=2))
    full = attended(parts, None)
    if window is None or window >= 11:
        np.testing.assert_array_equal(actual, full)
    else:
        changed = np.any(actual != full, axis=-1)[0]
        np.testing.assert_array_equal(changed, np.arange(11) >= window)


@pytest.mark.parametrize("window", [None, 1, 300, 5000])
@pytest.mark.parametrize("seq", [LONG + 1, 700])
def test_queries_in_chunks(monkeypatch: pytest.MonkeyPatch, seq: int, window: int | None) -> None:
    """Neither length is a multiple of the chunk; against float64 and against all queries at once."""
    parts = heads_of(seq, 2, 1, 6, 5)
    actual = attended(parts, window)
    expected = numpy_model.attend(*(part.astype(np.float64) for part in parts), 6**-0.5, window)
    # As above; sums of up to 700 weights and products add their own relative error, which grows like its root.
    limit = (40 * 2 + 2 * seq**0.5) * UNIT * np.abs(parts[2]).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)
    monkeypatch.setattr("hetmoe.models.attention.LONG", seq)
    arrays = [jnp.asarray(part) for part in parts]
    text = str(jax.make_jaxpr(lambda *a: attend(*a, scale=6**-0.5, window=window))(*arrays))
    assert "scan" not in text  # this one is not cut into chunks
    whole = jax.jit(lambda *a: attend(*a, scale=6**-0.5, window=window))(*arrays)
    np.testing.assert_allclose(actual, whole, rtol=0, atol=limit)


def test_long_sequences_never_hold_all_scores() -> None:
    arrays = [jnp.asarray(part) for part in heads_of(4 * LONG, 2, 1, 6, 5)]
    text = str(jax.make_jaxpr(lambda *a: attend(*a, scale=1.0, window=None))(*arrays))
    assert "scan" in text
    assert f"{2 * 4 * LONG},{4 * LONG}]" not in text and f"{4 * LONG},{4 * LONG}]" not in text


@pytest.mark.parametrize("window", [None, 1, 37])
def test_gradient_through_chunks(window: int | None) -> None:
    """Finite, and that of all queries at once; the two differ in the order of their sums alone."""
    seq = 600
    parts = [jnp.asarray(part) for part in heads_of(seq, 2, 1, 6, 5)]
    weight = jnp.asarray(normal(5, 1, seq, 10))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, scale=6**-0.5, window=window) * weight)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Written out with one softmax over a masked table of scores."""
        scores = jnp.einsum("bsnd,btd->bnst", q, k[:, :, 0], precision="highest") * jnp.float32(6**-0.5)
        behind = np.arange(seq)[:, None] - np.arange(seq)
        seen = jnp.asarray((behind >= 0) & (behind < (window or seq)))
        weights = jax.nn.softmax(scores, axis=-1, where=seen[None, None])
        out = jnp.einsum("bnst,btd->bsnd", weights, v[:, :, 0], precision="highest")
        return jnp.sum(out.reshape(1, seq, -1) * weight)

    actual, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*parts) for f in (loss, plain))
    for left, right in zip(actual, expected, strict=True):
        assert np.all(np.isfinite(left))
        # Relative errors of the weights (80 units, as above) and sums over up to 2 * 600 queries.
        np.testing.assert_allclose(
            left, right, rtol=0, atol=(80 + 2 * (2 * seq) ** 0.5) * UNIT * np.abs(right).max() * 4
        )
    if window == 1:
        # One weight, always 1; its gradient is a difference of two equal sums of 5 products of up to 20.
        assert np.abs(actual[0]).max() < 100 * 20 * UNIT and np.abs(actual[1]).max() < 100 * 20 * UNIT
    else:
        assert np.abs(actual[0]).max() > 0.1
