"""Every token copy gets a slot in a block of its expert, for any load, and comes back from it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hetmoe.ops.dispatch import Dispatch, choose_block_size, dispatch, from_blocks, to_blocks

WIDTH = 3
# (tokens, copies, experts, block size); each compiles once, and then sees many loads
SHAPES = [(1, 1, 1, 8), (1, 2, 4, 8), (7, 2, 3, 4), (13, 3, 5, 8), (9, 2, 16, 1), (33, 1, 4, 16)]
each_shape = pytest.mark.parametrize(("tokens", "copies", "experts", "block"), SHAPES)
compiled = jax.jit(dispatch, static_argnums=(1, 2))


def naive_to_blocks(x: jax.Array, plan: Dispatch) -> jax.Array:
    """The same gather, with the derivative that JAX gives it."""
    padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])
    return padded[plan.slot_token].reshape(-1, plan.block_size, x.shape[1])


def naive_from_blocks(y: jax.Array, plan: Dispatch) -> jax.Array:
    return y.reshape(-1, y.shape[-1])[plan.token_slot]


def value_and_vjp(
    function: Callable[[jax.Array, Dispatch], jax.Array], x: jax.Array, plan: Dispatch, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    value, pull = jax.vjp(lambda v: function(v, plan), x)
    return value, pull(cotangent)[0]


@jax.jit
def move(x: jax.Array, plan: Dispatch, there: jax.Array, back: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Values and gradients of both directions, ours and naive; `there` and `back` are cotangents."""
    blocks = to_blocks(x, plan)
    return {
        "to": value_and_vjp(to_blocks, x, plan, there),
        "naive to": value_and_vjp(naive_to_blocks, x, plan, there),
        "from": value_and_vjp(from_blocks, blocks, plan, back),
        "naive from": value_and_vjp(naive_from_blocks, blocks, plan, back),
    }


def whole_numbers(seed: int, *shape: int) -> jax.Array:
    """Small integers other than zero: their float32 sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(1, 100, shape) * rng.choice([-1, 1], shape), jnp.float32)


def check_plan(chosen: np.ndarray, experts: int, block: int) -> Dispatch:
    """Makes the plan of a load and checks all that it promises."""
    plan = compiled(jnp.asarray(chosen), experts, block)
    slot_token, token_slot, block_expert = map(np.asarray, (plan.slot_token, plan.token_slot, plan.block_expert))
    tokens, copies = chosen.shape
    busy = min(experts, tokens * copies)  # the most experts that can hold a copy; each of them opens one block
    blocks = busy + (tokens * copies - busy) // block
    assert slot_token.shape == (blocks * block,) and block_expert.shape == (blocks,) and plan.block_size == block
    assert slot_token.dtype == token_slot.dtype == block_expert.dtype == np.int32
    # No copy is dropped, and no two share a slot.
    assert token_slot.min() >= 0 and token_slot.max() < blocks * block
    assert np.unique(token_slot).size == tokens * copies
    np.testing.assert_array_equal(slot_token[token_slot], np.arange(tokens)[:, None] * np.ones_like(chosen))
    # Slots hold nothing else.
    assert np.sum(slot_token != tokens) == tokens * copies
    # A block holds copies of its own expert only; blocks are in the order of experts (`grouped_matmul` relies on it).
    np.testing.assert_array_equal(block_expert[token_slot // block], chosen)
    assert np.all(np.diff(block_expert) >= 0) and block_expert.min() >= 0 and block_expert.max() < experts
    # Every group starts a block, so that the experts use no more blocks than they must.
    used = np.unique(token_slot // block)
    wanted = sum(-(-int(np.sum(chosen == e)) // block) for e in range(experts))
    np.testing.assert_array_equal(used, np.arange(wanted))
    return plan


def check_movement(chosen: np.ndarray, plan: Dispatch) -> None:
    """Rows go to their slots and back; gradients are exactly those of the naive gathers."""
    tokens, copies = chosen.shape
    slots = plan.slot_token.size
    x, there = whole_numbers(1, tokens, WIDTH), whole_numbers(2, slots // plan.block_size, plan.block_size, WIDTH)
    found = jax.tree.map(np.asarray, move(x, plan, there, whole_numbers(3, tokens, copies, WIDTH)))
    for direction in ("to", "from"):
        for ours, naive in zip(found[direction], found[f"naive {direction}"], strict=True):
            np.testing.assert_array_equal(ours, naive)
    flat, gradient = found["to"][0].reshape(slots, WIDTH), found["from"][1].reshape(slots, WIDTH)
    padding = np.asarray(plan.slot_token) == tokens
    assert not flat[padding].any() and flat[~padding].all()
    assert not gradient[padding].any()
    np.testing.assert_array_equal(found["from"][0], np.repeat(np.asarray(x)[:, None], copies, axis=1))


@each_shape
def test_any_load(tokens: int, copies: int, experts: int, block: int) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(chosen=arrays(np.int32, (tokens, copies), elements=st.integers(0, experts - 1)))
    @example(chosen=np.full((tokens, copies), experts - 1, np.int32))  # everything to the last
    @example(chosen=np.zeros((tokens, copies), np.int32))  # everything to the first
    @example(chosen=(np.arange(tokens * copies, dtype=np.int32) % experts).reshape(tokens, copies))  # balanced
    def check(chosen: np.ndarray) -> None:
        check_movement(chosen, check_plan(chosen, experts, block))

    check()


def test_load_that_needs_every_block() -> None:
    """One copy more than full blocks for every expert but the last: the largest number of blocks there can be."""
    chosen = np.repeat(np.int32([0, 1, 2]), [9, 5, 9])[:, None]  # blocks of 4: 3 + 2 + 3, of 23 // 4 + 3 = 8
    plan = check_plan(chosen, 3, 4)
    check_movement(chosen, plan)
    assert np.all(np.any(np.asarray(plan.slot_token).reshape(8, 4) < 23, axis=1))


def test_under_vmap() -> None:
    """Routing differs per noise key, so plans are made and used under vmap."""
    chosen = np.random.default_rng(0).integers(0, 5, (4, 13, 3)).astype(np.int32)
    x = jnp.stack([whole_numbers(seed, 13, WIDTH) for seed in range(4)])

    def there_and_back(rows: jax.Array, experts: jax.Array) -> jax.Array:
        plan = dispatch(experts, 5, 8)
        return from_blocks(2 * to_blocks(rows, plan), plan)

    found = jax.jit(jax.vmap(there_and_back))(x, jnp.asarray(chosen))
    np.testing.assert_array_equal(found, np.repeat(2 * np.asarray(x)[:, :, None], 3, axis=2))


def test_dtype_is_kept() -> None:
    plan = compiled(jnp.asarray([[0, 1], [1, 1]], jnp.int32), 2, 8)
    ones = jnp.ones((2, 8, WIDTH), jnp.bfloat16)
    found = move(ones[:, 0], plan, ones, ones[:, :2])
    assert all(array.dtype == jnp.bfloat16 for array in jax.tree.leaves(found))
    np.testing.assert_array_equal(found["to"][1].astype(jnp.float32), np.full((2, WIDTH), 2.0))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(copies=st.integers(1, 10**7), experts=st.integers(1, 512))
def test_block_size(copies: int, experts: int) -> None:
    size = choose_block_size(copies, experts)
    assert (size == 1) == (copies <= experts)  # one copy for each expert, or less
    assert size in (1, 8, 16, 32, 64, 128)
    assert size <= choose_block_size(2 * copies, experts)
    quarter = copies / experts / 4
    assert size <= 8 or size / 2 < quarter
    assert size == 128 or size >= quarter


def test_blocks_of_padding_up_to_a_multiple() -> None:
    experts = jnp.asarray(np.random.default_rng(0).integers(0, 5, (13, 3)), jnp.int32)
    plain, padded = dispatch(experts, 5, 8), dispatch(experts, 5, 8, multiple=16)
    assert plain.block_expert.shape == (9,) and padded.block_expert.shape == (16,)
    np.testing.assert_array_equal(padded.token_slot, plain.token_slot)
    np.testing.assert_array_equal(padded.slot_token[: 9 * 8], plain.slot_token)
    assert np.all(padded.slot_token[9 * 8 :] == 13)


def check_without_some(chosen: np.ndarray, experts: int, block: int) -> None:
    """Copies whose expert is `experts` have none; every other gets the slot that it would have had without them."""
    tokens = chosen.shape[0]
    plan = compiled(jnp.asarray(chosen), experts, block)
    slot_token, token_slot, block_expert = map(np.asarray, (plan.slot_token, plan.token_slot, plan.block_expert))
    has_one = chosen < experts
    # Slots hold the copies with an expert, once each, and nothing else.
    assert np.sum(slot_token < tokens) == has_one.sum() and slot_token.max(initial=tokens) == tokens
    used = token_slot[has_one]
    assert np.unique(used).size == used.size
    np.testing.assert_array_equal(slot_token[used], np.nonzero(has_one)[0])
    np.testing.assert_array_equal(block_expert[used // block], chosen[has_one])
    # Others are read from a slot that is there, whatever it holds.
    assert token_slot.min() >= 0 and token_slot.max() < slot_token.size
    assert block_expert.max() < experts and np.all(np.diff(block_expert) >= 0)
    if has_one.any():
        fewer = compiled(jnp.asarray(chosen[has_one][:, None]), experts, block)
        np.testing.assert_array_equal(np.asarray(fewer.token_slot)[:, 0], used)
        blocks = fewer.block_expert.size
        np.testing.assert_array_equal(block_expert[:blocks], fewer.block_expert)
    # Slots of padding stay zero.
    x = whole_numbers(1, tokens, WIDTH)
    flat = np.asarray(to_blocks(x, plan)).reshape(-1, WIDTH)
    assert not flat[slot_token == tokens].any()
    np.testing.assert_array_equal(flat[used], np.asarray(x)[np.nonzero(has_one)[0]])


@pytest.mark.parametrize(("tokens", "copies", "experts", "block"), SHAPES[2:5])
def test_copies_without_an_expert_get_no_slot(tokens: int, copies: int, experts: int, block: int) -> None:
    rng = np.random.default_rng(tokens)
    chosen = rng.integers(0, experts, (tokens, copies)).astype(np.int32)
    without = np.where(rng.random(chosen.shape) < 0.4, np.int32(experts), chosen)
    assert (without == experts).any() and (without < experts).any()
    last_only = np.where(np.arange(tokens)[:, None] % 3 > 0, np.int32(experts), np.int32(experts - 1)) + 0 * chosen
    one = np.full_like(chosen, experts)
    one[-1, 0] = 0
    for load in (without, last_only, one, chosen):
        check_without_some(load, experts, block)


@each_shape
def test_when_no_copy_has_an_expert_all_slots_are_padding(tokens: int, copies: int, experts: int, block: int) -> None:
    plan = compiled(jnp.full((tokens, copies), experts, jnp.int32), experts, block)
    np.testing.assert_array_equal(plan.slot_token, np.full(plan.slot_token.shape, tokens))
    np.testing.assert_array_equal(plan.block_expert, np.full(plan.block_expert.shape, experts - 1))
    assert np.asarray(plan.token_slot).min() >= 0 and np.asarray(plan.token_slot).max() < plan.slot_token.size
    assert not np.asarray(to_blocks(whole_numbers(0, tokens, WIDTH), plan)).any()
