"""Single terms of the bound of attention's change, each in a case where it is nearly all of a change that happens.

One head, with rotary angles so small that nothing turns. Each projection reads one element of a token's normed input
and writes the first element of queries, keys, values or outputs.
"""

import numpy as np
import pytest

from hetmoe.models.config import Rope
from hetmoe.models.params import Attention
from hetmoe.quantize.bounds.attention import attention, project, score_scale
from hetmoe.quantize.bounds.attention_change import attention_change
from hetmoe.quantize.bounds.attention_norms import attention_norms
from tests.models.tiny import tiny_config

WIDTH = 4
CONFIG = tiny_config(
    hidden_size=WIDTH, num_heads=1, num_kv_heads=1, head_dim=2, qk_norm=None, rope=Rope(theta=100.0, linear=1e9)
)
VALUE, QUERY, KEY, NOTHING = range(WIDTH)  # elements of normed inputs


def matrix(element, size):
    """Reads one element."""
    result = np.zeros((WIDTH, 2))
    result[element, 0] = size
    return result


def last_change(clean, moved, query, key, value=(VALUE, 1.0)):
    """(change of the last token's output, its bound) for one sequence, where each token may move as far as it does.

    Args:
        clean: normed inputs `[seq, WIDTH]`.
        moved: likewise.
        query: factor of the query projection.
        key: likewise.
        value: the element that values are, and its factor.
    """
    weights = Attention(q=matrix(QUERY, query), k=matrix(KEY, key), v=matrix(*value), o=np.eye(2, WIDTH))
    before, after = project(clean[None], weights, CONFIG), project(moved[None], weights, CONFIG)
    change = np.linalg.norm(attention(after, weights, CONFIG) - attention(before, weights, CONFIG), axis=-1)
    norms, radius = attention_norms(np.ones(WIDTH), weights, CONFIG), np.linalg.norm(moved - clean, axis=1)
    return change[0, -1], attention_change(before, norms, weights, [radius[None]], CONFIG)[0][0, -1]


def inputs(*tokens):
    """Each token's elements that are not 0."""
    result = np.zeros((len(tokens), WIDTH))
    for token, elements in zip(result, tokens, strict=True):
        token[list(elements)] = list(elements.values())
    return result


def test_a_query_and_keys_that_move_together_reach_the_bound():
    """Queries and keys are 0 before they move: scores change by nothing but the product of both changes, tau.

    Of values 1, -1 and 0 the weights are 1/3 each, then proportional to e^tau, e^-tau and 1: the output is
    2 sinh(tau) / (1 + 2 cosh(tau)), 2/3 tau to first order. To second order the bound is above it by tau / 2 of itself
    (powers) and tau (its denominator): 1.5 %. Values, which may move by the radius, add that: 0.15 %.
    """
    tau, radius = 0.01, 1e-5
    factor = (tau / score_scale(CONFIG)) ** 0.5 / radius
    clean = inputs({VALUE: 1}, {VALUE: -1}, {NOTHING: 1})
    change, bound = last_change(clean, clean + inputs({KEY: radius}, {KEY: -radius}, {QUERY: radius}), factor, factor)
    assert change == pytest.approx(2 * np.sinh(tau) / (1 + 2 * np.cosh(tau)), rel=1e-6)
    assert change <= bound <= 1.02 * change


def test_a_value_that_moves_with_its_key_reaches_the_bound():
    """The key is what the value is: moved, the token takes a share of e^tau among others of 1, not of 1 as before.

    All values are 0 before, and no other score moves: nothing else is in the bound but rounding.
    """
    seq, tau = 8, 3.0
    clean = inputs(*[{NOTHING: 1}] * (seq - 1), {QUERY: 1})
    moved = clean + inputs({KEY: 1}, *[{}] * (seq - 1))
    change, bound = last_change(clean, moved, 1.0, tau / score_scale(CONFIG), (KEY, 1.0))
    assert change == pytest.approx(np.exp(tau) / (np.exp(tau) + seq - 1), rel=1e-6)
    assert change <= bound <= (1 + 1e-6) * change


def test_a_query_that_moves_across_uncorrelated_keys_reaches_the_bound():
    """Values are 1 for keys of 1 and -1, and -1 for keys of 0: their covariance is 0, the change is of second order.

    It is tanh(tau / 2)^2, about tau^2 / 4. To third order the bound is above it by tau of itself (the remainder's
    power) and tau / 2 (its denominator): 3 %. The last token's value adds 1/4 of the radius, 0.003 %.
    """
    tau, radius = 0.02, 1e-8
    clean = inputs({VALUE: 1, KEY: 1}, {VALUE: 1, KEY: -1}, {VALUE: -1}, {VALUE: -1})
    change, bound = last_change(
        clean, clean + inputs({}, {}, {}, {QUERY: radius}), tau / score_scale(CONFIG) / radius, 1.0
    )
    assert change == pytest.approx(np.tanh(tau / 2) ** 2, rel=1e-6)
    assert change <= bound <= 1.04 * change
