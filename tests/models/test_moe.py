"""Routing and the experts' block against float64 numpy that runs every token through its experts one by one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.models.config import ModelConfig
from hetmoe.models.hardware import Probe
from hetmoe.models.moe import feed_forward, moe_block
from hetmoe.models.params import MoE
from hetmoe.models.routing import Routing, route
from hetmoe.ops.dispatch import choose_block_size
from tests.models import numpy_model
from tests.models.tiny import full_config, random_params, tiny_config

UNIT = 2.0**-24  # unit roundoff of float32
EXPERTS, HIDDEN = 8, 23

_route = jax.jit(route, static_argnums=2)


@jax.jit
def _block(x: jax.Array, moe: MoE, routing: Routing) -> jax.Array:
    return moe_block(x, moe, routing, None, Probe(None), None)


@functools.cache
def layer(dtype: Any = jnp.float32) -> MoE:
    params = random_params(tiny_config(num_experts=EXPERTS), 0, dtype)
    return jax.tree.map(lambda leaf: leaf[0], params.layers.moe)


def routers(router: Any, bias: Any = None) -> MoE:
    """A layer of which only the router is used."""
    return MoE(router=router, experts=None, selection_bias=bias)


def route_config(copies: int, normed: bool = False) -> ModelConfig:
    return tiny_config(num_experts=EXPERTS, experts_per_token=copies, norm_topk_prob=normed)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def routing(chosen: np.ndarray, weights: np.ndarray) -> Routing:
    """As if the router had chosen so."""
    logits = jnp.zeros((chosen.shape[0], EXPERTS))
    return Routing(logits=logits, chosen=jnp.asarray(chosen, jnp.int32), weights=jnp.asarray(weights, jnp.float32))


def naive(x: np.ndarray, chosen: np.ndarray, weights: np.ndarray, of: MoE) -> np.ndarray:
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), of.experts)
    return numpy_model.experts(x.astype(np.float64), chosen, weights, wide, numpy_model.digital, 0)


def check(x: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Asserts that the block agrees with the naive computation."""
    actual = _block(jnp.asarray(x), layer(), routing(chosen, weights))
    expected = naive(x, chosen, weights, layer())
    assert actual.dtype == jnp.float32
    # Three float32 products in a row, of 23, 23 and 21 terms, each off by a few units of its largest outputs.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=16 * UNIT * np.abs(expected).max())
    return np.asarray(actual)


def distinct(seed: int, tokens: int, copies: int) -> np.ndarray:
    """Random experts, different ones for each token."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(EXPERTS)[:copies] for _ in range(tokens)])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("copies", [1, 2, 8])
def test_route(copies: int, normed: bool) -> None:
    x, router = normal(0, 200, HIDDEN), normal(1, HIDDEN, EXPERTS)
    config = route_config(copies, normed)
    result = _route(jnp.asarray(x), routers(jnp.asarray(router)), config)
    logits = x.astype(np.float64) @ router
    chosen, weights = numpy_model.route(x.astype(np.float64), routers(router.astype(np.float64)), config)
    gaps = np.diff(np.sort(logits, axis=1), axis=1).min()
    assert gaps > 100 * UNIT * np.abs(logits).max()  # far enough apart that rounding cannot reorder them
    np.testing.assert_array_equal(result.chosen, chosen)
    assert (result.chosen.dtype, result.weights.dtype, result.logits.dtype) == (jnp.int32, jnp.float32, jnp.float32)
    np.testing.assert_allclose(result.logits, logits, rtol=0, atol=4 * UNIT * np.abs(logits).max())
    # A logit of up to 20 that is off by 4 of its units makes the weight's relative error; the weights are below 1.
    np.testing.assert_allclose(result.weights, weights, rtol=0, atol=4 * UNIT * np.abs(logits).max())
    total = np.asarray(result.weights).sum(axis=1)
    if normed or copies == EXPERTS:
        np.testing.assert_allclose(total, 1, rtol=0, atol=8 * UNIT)  # eight roundings of numbers below 1
    else:
        assert np.all(total < 1 - 1e-6)  # the rest of the probability lies with the experts not taken
        assert np.mean(total) < 0.99


def test_ties_go_to_the_lower_index() -> None:
    router = np.zeros((HIDDEN, EXPERTS), np.float32)
    router[0] = [0, 1, 3, 1, 3, 3, 0, 1]
    result = _route(jnp.eye(2, HIDDEN), routers(jnp.asarray(router)), route_config(5))
    assert result.chosen.tolist() == [[2, 4, 5, 1, 3], [0, 1, 2, 3, 4]]
    assert result.weights[1].tolist() == [0.125] * 5


def test_weights_come_from_all_experts() -> None:
    """Softmax over all, then top k; normed, it is the softmax over those taken. Known numbers: e^0 : e^ln2 : e^ln5."""
    router = np.zeros((HIDDEN, EXPERTS), np.float32)
    router[0, [3, 6]] = np.log([5, 2])
    x = jnp.eye(1, HIDDEN)
    plain, normed = (_route(x, routers(jnp.asarray(router)), route_config(2, flag)) for flag in (False, True))
    assert plain.chosen.tolist() == normed.chosen.tolist() == [[3, 6]]
    np.testing.assert_allclose(plain.weights[0], [5 / 13, 2 / 13], rtol=8 * UNIT)  # exp, sum, quotient
    np.testing.assert_allclose(normed.weights[0], [5 / 7, 2 / 7], rtol=8 * UNIT)


def test_routing_of_bfloat16_is_done_in_float32() -> None:
    x, router = jnp.asarray(normal(0, 50, HIDDEN), jnp.bfloat16), jnp.asarray(normal(1, HIDDEN, EXPERTS), jnp.bfloat16)
    result = route(x, routers(router), route_config(2))  # not compiled: XLA may skip a rounding to bfloat16 and back
    assert (result.logits.dtype, result.weights.dtype) == (jnp.float32, jnp.float32)
    exact = np.asarray(x).astype(np.float64) @ np.asarray(router).astype(np.float64)
    np.testing.assert_allclose(result.logits, exact, rtol=0, atol=4 * UNIT * np.abs(exact).max())


@pytest.mark.parametrize(("tokens", "copies"), [(1, 1), (21, 2), (37, 3), (200, 2), (9, 8)])
def test_block_equals_token_by_token(tokens: int, copies: int) -> None:
    check(normal(2, tokens, HIDDEN), distinct(3, tokens, copies), np.abs(normal(4, tokens, copies)))


@pytest.mark.parametrize("expert", [0, 3, EXPERTS - 1])
def test_all_tokens_on_one_expert(expert: int) -> None:
    """Nothing is dropped at the highest load, whether it fills blocks exactly (96), or not."""
    for tokens in (95, 96):
        check(normal(2, tokens, HIDDEN), np.full((tokens, 1), expert), np.abs(normal(4, tokens, 1)))


def test_two_experts_take_everything() -> None:
    tokens = 21
    out = check(normal(2, tokens, HIDDEN), np.tile([[6, 1]], (tokens, 1)), np.abs(normal(4, tokens, 2)))
    assert np.all(np.any(out != 0, axis=1))


def test_a_copy_of_weight_zero_adds_nothing() -> None:
    x, chosen = normal(2, 21, HIDDEN), distinct(3, 21, 2)
    weights = np.abs(normal(4, 21, 2))
    weights[:, 1] = 0
    both = _block(jnp.asarray(x), layer(), routing(chosen, weights))
    elsewhere = np.stack([chosen[:, 0], (chosen[:, 1] + 1) % EXPERTS], axis=1)
    alone = _block(jnp.asarray(x), layer(), routing(elsewhere, weights))
    np.testing.assert_allclose(both, alone, rtol=0, atol=16 * UNIT * np.abs(alone).max())  # as in `check`


def test_experts_without_tokens_and_padding_do_not_leak() -> None:
    """NaN weights of an unused expert, which also own the blocks that hold padding only, reach no token."""
    x, chosen = normal(2, 21, HIDDEN), distinct(3, 21, 2) % (EXPERTS - 1)
    weights = np.abs(normal(4, 21, 2))
    expected = _block(jnp.asarray(x), layer(), routing(chosen, weights))
    spoiled = jax.tree.map(lambda leaf: leaf.at[EXPERTS - 1].set(jnp.nan), layer().experts)
    poisoned = dataclasses.replace(layer(), experts=spoiled)
    np.testing.assert_array_equal(_block(jnp.asarray(x), poisoned, routing(chosen, weights)), expected)


def test_a_token_of_nan_spoils_itself_only() -> None:
    x, chosen, weights = normal(2, 21, HIDDEN), distinct(3, 21, 2), np.abs(normal(4, 21, 2))
    expected = np.asarray(_block(jnp.asarray(x), layer(), routing(chosen, weights)))
    x[7] = np.nan
    actual = np.asarray(_block(jnp.asarray(x), layer(), routing(chosen, weights)))
    assert np.all(np.isnan(actual[7]))
    np.testing.assert_array_equal(np.delete(actual, 7, axis=0), np.delete(expected, 7, axis=0))


def test_permuting_tokens_permutes_outputs() -> None:
    x, chosen, weights = normal(2, 21, HIDDEN), distinct(3, 21, 2), np.abs(normal(4, 21, 2))
    order = np.random.default_rng(5).permutation(21)
    straight = np.asarray(_block(jnp.asarray(x), layer(), routing(chosen, weights)))
    permuted = _block(jnp.asarray(x[order]), layer(), routing(chosen[order], weights[order]))
    # A token moves to another slot of its block, where the matmul may sum in another order.
    np.testing.assert_allclose(permuted, straight[order], rtol=0, atol=16 * UNIT * np.abs(straight).max())
    assert np.abs(straight[order] - straight).max() > 0.1


def test_bfloat16_block() -> None:
    x = jnp.asarray(normal(2, 21, HIDDEN), jnp.bfloat16)
    chosen, weights = distinct(3, 21, 2), np.abs(normal(4, 21, 2))
    actual = _block(x, layer(jnp.bfloat16), routing(chosen, weights))
    assert actual.dtype == jnp.bfloat16
    expected = naive(np.asarray(x).astype(np.float64), chosen, weights, layer(jnp.bfloat16))
    # The inner activations are rounded to bfloat16 (2^-9 each, adding up like noise), and so is the result (2^-9).
    np.testing.assert_allclose(
        np.asarray(actual).astype(np.float64), expected, rtol=0, atol=2 * 2.0**-9 * np.abs(expected).max()
    )


def test_gradient_equals_that_of_the_naive_block() -> None:
    """Gradients to tokens, weights of the experts and routing weights; padding and unused experts get none."""
    tokens, copies = 21, 2
    x, chosen, weights = normal(2, tokens, HIDDEN), distinct(3, tokens, copies) % (EXPERTS - 1), normal(4, tokens, 2)
    cotangent = jnp.asarray(normal(5, tokens, HIDDEN))

    def block(x: jax.Array, weights: jax.Array, of: MoE) -> jax.Array:
        plan = Routing(logits=jnp.zeros((tokens, EXPERTS)), chosen=jnp.asarray(chosen, jnp.int32), weights=weights)
        return jnp.sum(moe_block(x, of, plan, None, Probe(None), None) * cotangent)

    def dense(x: jax.Array, weights: jax.Array, of: MoE) -> jax.Array:
        """Every token through every expert, most of them with weight zero."""
        gate, up = (jnp.einsum("th,ehi->tei", x, w) for w in (of.experts.gate, of.experts.up))
        spread = jnp.zeros((tokens, EXPERTS)).at[jnp.arange(tokens)[:, None], chosen].add(weights)
        return jnp.sum(jnp.einsum("tei,eih,te->th", jax.nn.silu(gate) * up, of.experts.down, spread) * cotangent)

    arguments = (jnp.asarray(x), jnp.asarray(weights), layer())
    actual, expected = (jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments) for loss in (block, dense))
    leaves = jax.tree.leaves_with_path(expected)
    assert len(leaves) == 2 + len(jax.tree.leaves(layer()))
    for (path, right), left in zip(leaves, jax.tree.leaves(actual), strict=True):
        # Two float32 results, each with sums of up to 42 token copies: a few units of the largest entries each.
        limit = 16 * UNIT * np.abs(right).max()
        np.testing.assert_allclose(left, right, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))
    assert np.abs(actual[0]).max() > 0.1
    assert not np.any(actual[2].experts.gate[EXPERTS - 1])


@functools.cache
def shared_layer() -> MoE:
    """Shared experts behind a gate, beside the routed ones."""
    config = tiny_config(num_experts=EXPERTS, shared_intermediate_size=15, shared_gate=True)
    return jax.tree.map(lambda leaf: leaf[0], random_params(config, 0).layers.moe)


@pytest.mark.parametrize("gated", [True, False])
def test_shared_experts_see_every_token(gated: bool) -> None:
    """They are added to what the routed experts give, with weight 1 or the sigmoid of their gate."""
    moe = shared_layer() if gated else dataclasses.replace(shared_layer(), shared_gate=None)
    x, chosen, weights = normal(2, 21, HIDDEN), distinct(3, 21, 2), np.abs(normal(4, 21, 2))
    actual = np.asarray(_block(jnp.asarray(x), moe, routing(chosen, weights)))
    wide: Any = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), moe)
    shared = numpy_model.feed_forward(x.astype(np.float64), wide.shared, "shared", numpy_model.digital, 0)
    if gated:
        gate = numpy_model.sigmoid(x.astype(np.float64) @ wide.shared_gate)
        assert gate.shape == (21, 1) and np.ptp(gate) > 0.3
        shared = gate * shared
    expected = naive(x, chosen, weights, moe) + shared
    np.testing.assert_allclose(actual, expected, rtol=0, atol=16 * UNIT * np.abs(expected).max())  # as in `check`
    assert np.abs(shared).max(axis=1).min() > 1000 * UNIT * np.abs(expected).max()


def test_feed_forward_of_a_dense_layer() -> None:
    config = full_config()
    ffn = jax.tree.map(lambda leaf: leaf[0], random_params(config, 0).dense_layers.ffn)
    x = normal(2, 21, HIDDEN)
    actual = jax.jit(lambda x, ffn: feed_forward(x, ffn, "ffn", None, Probe(None)))(jnp.asarray(x), ffn)
    wide: Any = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), ffn)
    expected = numpy_model.feed_forward(x.astype(np.float64), wide, "ffn", numpy_model.digital, 0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=16 * UNIT * np.abs(expected).max())


def test_a_block_size_above_the_least_is_covered() -> None:
    """The cases above use blocks of 8; 400 copies over 8 experts use 16."""
    assert choose_block_size(2 * 200, EXPERTS) == 16
    assert choose_block_size(2 * 37, EXPERTS) == 8
