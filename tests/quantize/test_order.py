"""Orders of experts against orders worked out by hand, and the reordering against the rule's own words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.quantize.order import (
    by_activation_frequency,
    by_router_change,
    by_router_norm,
    max_variance,
    promote,
    random_order,
)


def router(*norms):
    """Columns (3, 4) / 5 times the norms: two equal norms are equal to the last bit."""
    return jnp.array([[0.6], [0.8]]) * jnp.array([norms], jnp.float32)


def test_router_change_by_hand() -> None:
    # Changes 2-1 = 1, 4-4 = 0, 1-3 = -2, 3-2 = 1, 7-7 = 0: ascending -2 | 0, 0 | 1, 1, ties to the lower index.
    order = by_router_change(router(2, 4, 1, 3, 7), router(1, 4, 3, 2, 7))
    np.testing.assert_array_equal(order, [2, 1, 4, 0, 3])


def test_router_change_is_not_the_norm_of_the_change() -> None:
    # Expert 0 turns by 90 degrees and keeps its norm (change 0); expert 1 grows by 0.5.
    initial, final = jnp.array([[3.0, 1.0], [0.0, 0.0]]), jnp.array([[0.0, 1.5], [3.0, 0.0]])
    np.testing.assert_array_equal(by_router_change(final, initial), [0, 1])


def test_router_norm_by_hand_and_layer_by_layer() -> None:
    layers = jnp.stack([router(2, 4, 1, 4), router(1, 1, 1, 0)])
    np.testing.assert_array_equal(by_router_norm(layers), [[2, 0, 1, 3], [3, 0, 1, 2]])
    np.testing.assert_array_equal(by_router_change(layers, layers), [[0, 1, 2, 3]] * 2)


def test_rare_experts_come_first_unless_asked_otherwise() -> None:
    frequency = jnp.array([0.5, 0.125, 0.5, 0.25])
    np.testing.assert_array_equal(by_activation_frequency(frequency), [1, 3, 0, 2])
    np.testing.assert_array_equal(by_activation_frequency(frequency, more_bits="frequent"), [0, 2, 3, 1])


def test_random_orders_differ_by_layer_and_key_and_are_complete() -> None:
    orders = random_order(jax.random.key(0), 3, 40)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(40), (3, 1)))
    assert len({tuple(row) for row in orders}) == 3
    assert np.any(orders != random_order(jax.random.key(1), 3, 40))
    np.testing.assert_array_equal(orders, random_order(jax.random.key(0), 3, 40))


# MaxVar by expert index, the order before and after. Three times the MaxVar of each, in the order of the list, is what
# an expert's own must be above.
PROMOTED = {
    # Nobody has three times the MaxVar of another.
    "none": ([1, 2, 3], [0, 1, 2], [0, 1, 2]),
    # Exactly three times is not above three times: 3 * 1 < 3 is false.
    "tie stays": ([1, 3], [0, 1], [0, 1]),
    # Taken 2: 3*1 < 4, first position 0, list 2 0 1. Taken 1: 3*4, 3*1 < 4, position 1, list 2 1 0. Taken 0: none.
    # Had the walk started at the front, expert 1 would have come first.
    "from the end": ([1, 4, 4], [0, 1, 2], [2, 1, 0]),
    # Taken 3 (5): 12, 39, 3 < 5, position 2, list 0 1 3 2. Taken 2 (1): none. Taken 1 (13): 12 < 13, position 0, list
    # 1 0 3 2. Taken 0 (4): 39, 12, 15, 3 < 4 at position 3, but it stands at 1, before that: stays.
    "already before": ([4, 13, 1, 5], [0, 1, 2, 3], [1, 0, 3, 2]),
    # Taken 2 (3): 6, 3 (a tie), 93, 30, 9: none. Taken 1 (10): 6 < 10, position 0, list 1 3 0 4 2. Taken 4 (31):
    # 30 < 31, position 0, list 4 1 3 0 2. Taken 0 (1): none. Taken 3 (2): none.
    "not in index order": ([1, 10, 3, 2, 31], [3, 0, 4, 1, 2], [4, 1, 3, 0, 2]),
    # Taken 2 (9): 15, 3 < 9 at position 1, list 0 2 1. It does not go before expert 0. Taken 1 and 0: none.
    "into the middle": ([5, 1, 9], [0, 1, 2], [0, 2, 1]),
    # Zeros: 3 * 0 < 2, but 0 is not below 0. Taken 2 (2): position 0, list 2 0 1. Taken 1 (0), 0 (0): none.
    "zeros": ([0, 0, 2], [0, 1, 2], [2, 0, 1]),
}


@pytest.mark.parametrize("name", PROMOTED)
def test_promotion_by_hand(name) -> None:
    variance, order, expected = PROMOTED[name]
    found = promote(np.array(order), jnp.array(variance, jnp.float32))
    np.testing.assert_array_equal(found, expected)


def test_zeta_decides_who_moves() -> None:
    # 2 * 2 < 5 with zeta 2; 3 * 2 < 5 is false.
    order, variance = np.array([0, 1]), jnp.array([2.0, 5.0])
    np.testing.assert_array_equal(promote(order, variance, 2.0), [1, 0])
    np.testing.assert_array_equal(promote(order, variance, 3.0), [0, 1])


def test_layers_are_promoted_on_their_own() -> None:
    cases = [PROMOTED["none"], PROMOTED["from the end"]]
    variance = jnp.array([case[0] for case in cases], jnp.float32)
    found = promote(np.array([case[1] for case in cases]), variance)
    np.testing.assert_array_equal(found, [case[2] for case in cases])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from([1.0, 2.0, 3.0]), st.randoms())
def test_promotion_keeps_all_experts_and_only_moves_larger_variances_ahead(variance, zeta, random) -> None:
    order = np.array(random.sample(range(len(variance)), len(variance)))
    found = promote(order, jnp.array(variance, jnp.float32), zeta)
    assert sorted(found) == sorted(order)
    before, after = order.tolist(), found.tolist()
    largest, smallest = max(variance), min(variance)
    if largest <= zeta * smallest:
        assert before == after
    # An expert of the smallest MaxVar never moves ahead of another: nobody's is below it.
    for expert in np.flatnonzero(np.array(variance) == smallest).tolist():
        others = [e for e in before[: before.index(expert)] if variance[e] > smallest]
        assert set(others) <= set(after[: after.index(expert)])


def test_max_variance_by_hand() -> None:
    # Two experts, three inputs, three neurons (columns). Expert 0: norms^2 27, 14, 2; variances 0, 2/3, 2/3.
    # Expert 1: norms^2 6, 9, 9 (a tie, the lower index), variances 2, 2, 0.
    gate = jnp.array([
        [[3, 1, 0], [3, 2, 1], [3, 3, -1]],
        [[1, 0, -1.7320508], [1, 0, -1.7320508], [-2, 3, -1.7320508]],
    ])  # fmt: skip
    np.testing.assert_allclose(max_variance(gate[:1], "highest_norm"), [0.0])
    np.testing.assert_allclose(max_variance(gate[:1], "all"), [2 / 3], rtol=1e-6)
    np.testing.assert_allclose(max_variance(gate[1:], "highest_norm"), [2.0], rtol=1e-6)


def test_max_variance_against_float64() -> None:
    gate = np.random.default_rng(0).standard_normal((2, 3, 50, 7)).astype(np.float32)
    gate[..., 0] += 2  # the highest norm is not the largest variance
    one, every = (np.asarray(max_variance(jnp.asarray(gate), how)) for how in ("highest_norm", "all"))
    for index in np.ndindex(2, 3):
        columns = gate[index].T.astype(np.float64)
        spreads = [np.mean(c**2) - np.mean(c) ** 2 for c in columns]
        # Sums of 50 float32: relative error below 50 * 2**-24 < 1e-5.
        np.testing.assert_allclose(one[index], spreads[int(np.argmax([c @ c for c in columns]))], rtol=1e-5)
        np.testing.assert_allclose(every[index], max(spreads), rtol=1e-5)
    assert np.all(one < every)


def test_bad_input_is_refused() -> None:
    order, fine = np.array([0, 1]), jnp.array([1.0, 2.0])
    for call, message in (
        (lambda: by_router_norm(router(1, np.nan)), "router norms are not finite"),
        (lambda: by_router_change(router(1, np.inf), router(1, 2)), "changes of router norms are not finite"),
        (lambda: by_router_change(router(1, 2), router(1, 2, 3)), r"shape \[2, 3\], the final one \[2, 2\]"),
        (lambda: by_activation_frequency(fine, more_bits="most"), "more_bits='most'"),
        (lambda: by_activation_frequency(jnp.array([0.0, np.nan])), "not finite"),
        (lambda: max_variance(jnp.ones((1, 2, 2)), "largest"), "how='largest'"),
        (lambda: promote(order, jnp.array([1.0, np.nan])), "finite and at least 0"),
        (lambda: promote(order, jnp.array([1.0, -1.0])), "finite and at least 0"),
        (lambda: promote(order, fine, 0.5), "zeta=0.5"),
        (lambda: promote(order, fine, np.nan), "zeta=nan"),
        (lambda: promote(order, fine, np.inf), "zeta=inf"),
    ):
        with pytest.raises(InputError, match=message):
            call()
