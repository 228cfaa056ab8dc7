"""Log-probabilities taken chunk by chunk against a log-softmax of all logits at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.models.likelihood import CHUNK, choice_log_probs, choice_log_probs_and_best

UNIT = 2.0**-24  # unit roundoff of float32
HIDDEN, VOCAB = 7, 50
SIZES = [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 100]


def inputs(tokens: int, choices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hidden, head, ids)."""
    rng = np.random.default_rng(tokens)
    hidden = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
    head = rng.standard_normal((HIDDEN, VOCAB)).astype(np.float32)
    return hidden, head, rng.integers(0, VOCAB, (tokens, choices)).astype(np.int32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(("tokens", "choices"), [(5, 1), *((size, 4) for size in SIZES)])
def test_equals_log_softmax(tokens: int, choices: int) -> None:
    hidden, head, ids = inputs(tokens, choices)
    actual = choice_log_probs(lambda rows, _: rows @ head, jnp.asarray(hidden), jnp.asarray(ids))
    logits = hidden.astype(np.float64) @ head
    expected = np.take_along_axis(log_softmax(logits), ids, axis=1)
    assert (actual.shape, actual.dtype) == ((tokens, choices), jnp.float32)
    # Two numbers of the size of the logits, each off by a few of its units, and their difference.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=8 * UNIT * np.abs(logits).max())


def test_no_tokens_give_no_log_probs() -> None:
    hidden, head, ids = inputs(0, 2)
    assert choice_log_probs(lambda rows, _: rows @ head, jnp.asarray(hidden), jnp.asarray(ids)).shape == (0, 2)


def test_all_choices_together_are_certain() -> None:
    hidden, head, _ = inputs(300, 1)
    everything = jnp.tile(jnp.arange(VOCAB, dtype=jnp.int32), (300, 1))
    actual = choice_log_probs(lambda rows, _: rows @ head, jnp.asarray(hidden), everything)
    # A sum of 50 probabilities; each is relatively off by its log's absolute error, the bound of the test above.
    limit = 8 * UNIT * np.abs(hidden @ head).max()
    np.testing.assert_allclose(np.exp(np.asarray(actual, np.float64)).sum(axis=1), 1, rtol=0, atol=limit)


def test_large_logits_do_not_overflow() -> None:
    hidden, head, ids = inputs(3, 2)
    actual = choice_log_probs(lambda rows, _: 1e4 * (rows @ head), jnp.asarray(hidden), jnp.asarray(ids))
    logits = 1e4 * (hidden.astype(np.float64) @ head)
    expected = np.take_along_axis(log_softmax(logits), ids, axis=1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=8 * UNIT * np.abs(logits).max())  # as in the first test


@pytest.mark.parametrize("tokens", [1, CHUNK, 3 * CHUNK + 100])
def test_first_row_numbers_the_tokens(tokens: int) -> None:
    """Logits that depend on a token's number alone: chunk by chunk they must come out as for all tokens at once."""
    hidden, _, ids = inputs(tokens, 2)
    table = np.random.default_rng(0).standard_normal((4 * CHUNK, VOCAB)).astype(np.float32)
    seen: list[Any] = []

    def logits_of(rows: jax.Array, first: jax.Array) -> jax.Array:
        seen.append(first.dtype)
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), first.astype(jnp.int32), rows.shape[0])

    actual = choice_log_probs(logits_of, jnp.asarray(hidden), jnp.asarray(ids))
    expected = np.take_along_axis(log_softmax(table[:tokens].astype(np.float64)), ids, axis=1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=8 * UNIT * np.abs(table).max())  # as in the first test
    assert set(seen) == {np.dtype(np.uint32)}  # a shape-independent counter of read noise


def test_never_holds_all_logits() -> None:
    hidden, head, ids = inputs(4 * CHUNK + 3, 1)
    rows_at_once: list[int] = []

    def logits_of(rows: jax.Array, first: jax.Array) -> jax.Array:
        del first
        rows_at_once.append(rows.shape[0])
        return rows @ head

    choice_log_probs(logits_of, jnp.asarray(hidden), jnp.asarray(ids))
    assert max(rows_at_once) == CHUNK


@pytest.mark.parametrize("tokens", [3, CHUNK + 9])
def test_gradient(tokens: int) -> None:
    """Against the closed form, (one-hot - softmax) through the head; padding rows add nothing to its gradient."""
    hidden, head, ids = inputs(tokens, 2)
    weight = np.random.default_rng(1).standard_normal((tokens, 2)).astype(np.float32)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return jnp.sum(choice_log_probs(lambda rows, _: rows @ head, hidden, jnp.asarray(ids)) * weight)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(hidden), jnp.asarray(head))
    probabilities = np.exp(log_softmax(hidden.astype(np.float64) @ head))
    by_logits = -probabilities * weight.sum(axis=1, keepdims=True)
    for column in range(2):
        by_logits[np.arange(tokens), ids[:, column]] += weight[:, column]
    expected = by_logits @ head.T.astype(np.float64), hidden.T.astype(np.float64) @ by_logits
    for actual, exact in zip(grads, expected, strict=True):
        # Probabilities relatively off by a few units of the logits (about 10), in sums of up to 265 terms.
        np.testing.assert_allclose(actual, exact, rtol=0, atol=32 * UNIT * np.abs(exact).max())


def test_the_best_is_the_first_of_equals() -> None:
    hidden, head, ids = inputs(CHUNK + 9, 2)
    head[:, 7] = head[:, 3]  # two tokens are always equally likely
    head[:, 3:8:4] *= 3
    log_probs, best = choice_log_probs_and_best(lambda rows, _: rows @ head, jnp.asarray(hidden), jnp.asarray(ids))
    np.testing.assert_array_equal(best, (hidden @ head).argmax(axis=1))
    assert 3 in best and 7 not in best
    alone = choice_log_probs(lambda rows, _: rows @ head, jnp.asarray(hidden), jnp.asarray(ids))
    np.testing.assert_array_equal(log_probs, alone)
