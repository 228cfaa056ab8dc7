"""Counter-based draws: threefry to the letter, JAX's own normals, and nothing but key and index in them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hetmoe.analog.random import (
    bits_to_normal,
    key_words,
    matrix_counter,
    matrix_normal,
    require_key,
    rows_normal,
    threefry2x32,
)

LARGEST = 2**32 - 1
words32 = st.integers(0, LARGEST)
compiled_rows = jax.jit(rows_normal, static_argnums=2)
compiled_normal = jax.jit(matrix_normal, static_argnums=1)


def word(value: int) -> jax.Array:
    return jnp.asarray(value, jnp.uint32)


def threefry_in_integers(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """The paper's definition in Python integers."""
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (counter[0] + keys[0]) % 2**32, (counter[1] + keys[1]) % 2**32
    rotations = (13, 15, 26, 6, 17, 29, 16, 24)
    for step in range(20):
        x, distance = (x + y) % 2**32, rotations[step % 8]
        y = ((y << distance | y >> (32 - distance)) % 2**32) ^ x
        if step % 4 == 3:
            group = step // 4 + 1
            x = (x + keys[group % 3]) % 2**32
            y = (y + keys[(group + 1) % 3] + group) % 2**32
    return x, y


@pytest.mark.parametrize(
    ("key", "counter", "wanted"),
    [
        # `threefry2x32 20` in kat_vectors of the Random123 library: zeros, ones, digits of pi.
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((LARGEST, LARGEST), (LARGEST, LARGEST), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(key: tuple[int, int], counter: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert threefry_in_integers(key, counter) == wanted
    found = threefry2x32((word(key[0]), word(key[1])), word(counter[0]), word(counter[1]))
    assert tuple(int(x) for x in found) == wanted
    compiled = jax.jit(threefry2x32)((word(key[0]), word(key[1])), word(counter[0]), word(counter[1]))
    assert tuple(int(x) for x in compiled) == wanted


@functools.partial(jax.jit, static_argnums=1)
def matrix_bits(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    rows, columns = (jnp.arange(n, dtype=jnp.uint32) for n in shape)
    first, second = threefry2x32(key_words(key), *matrix_counter(rows[:, None], columns[None], shape[1]))
    return first ^ second


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, -3])
def test_word_for_word_the_draws_of_jax(seed: int) -> None:
    key, shape = jax.random.fold_in(jax.random.key(seed), 7), (37, 29)
    with jax.threefry_partitionable(True):
        np.testing.assert_array_equal(matrix_bits(key, shape), jax.random.bits(key, shape))
        wanted = jax.random.normal(key, shape)
    found = compiled_normal(key, shape)
    assert found.dtype == jnp.float32 and found.shape == shape
    np.testing.assert_array_equal(found, wanted)


def test_eager_draws_are_those_of_jax_too() -> None:
    key = jax.random.key(5)
    with jax.threefry_partitionable(True):
        np.testing.assert_array_equal(matrix_normal(key, (1, 3)), jax.random.normal(key, (1, 3)))


@pytest.mark.parametrize("partitionable", [True, False])
def test_the_flag_of_jax_changes_nothing(partitionable: bool) -> None:
    wanted = compiled_normal(jax.random.key(3), (6, 5))
    with jax.threefry_partitionable(partitionable):
        np.testing.assert_array_equal(jax.jit(lambda key: matrix_normal(key, (6, 5)))(jax.random.key(3)), wanted)


def test_the_flag_would_matter_to_jax() -> None:
    draws = []
    for partitionable in (True, False):
        with jax.threefry_partitionable(partitionable):
            draws.append(np.asarray(jax.random.normal(jax.random.key(3), (6, 5))))
    assert not np.array_equal(*draws)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(row=words32, column=words32, width=st.integers(1, LARGEST))
@example(row=256 * 7168 - 1, column=2047, width=2048)  # the last weight of 256 experts of 7168 x 2048: no overflow
@example(row=2**32 - 1, column=2**32 - 2, width=2**32 - 1)
@example(row=65537, column=65535, width=65535)  # 65537 * 65535 = 2**32 - 1: the column carries
@example(row=2**21, column=0, width=2**11)  # 2**32 itself
def test_counter_equals_big_integers(row: int, column: int, width: int) -> None:
    # The column is any word here, so that the carry of the last addition is met often.
    high, low = matrix_counter(word(row), word(column), width)
    assert high.dtype == low.dtype == jnp.uint32
    assert (int(high) << 32) + int(low) == row * width + column % 2**32


def test_counter_broadcasts_rows_against_columns() -> None:
    rows, columns, width = np.uint32([[0], [5], [3_000_000_000]]), np.uint32([[0, 1, 70_000]]), 70_001
    high, low = jax.jit(matrix_counter, static_argnums=2)(jnp.asarray(rows), jnp.asarray(columns), width)
    wanted = rows.astype(object) * width + columns.astype(object)
    np.testing.assert_array_equal((np.asarray(high).astype(object) << 32) + np.asarray(low).astype(object), wanted)


def test_rows_are_rows_of_the_matrix_in_any_order() -> None:
    key = jax.random.key(9)
    whole = np.asarray(compiled_normal(key, (12, 7)))
    chosen = jnp.asarray([11, 0, 5, 5], jnp.uint32)
    np.testing.assert_array_equal(compiled_rows(key, chosen, 7), whole[np.asarray(chosen)])


def test_rows_beyond_32_bits_are_their_own() -> None:
    """Row 2**24 of a matrix of 512 columns starts at counter 2**33; counters cut to 32 bits would repeat row 0."""
    key, width, row = jax.random.key(9), 512, 2**24
    found = np.asarray(compiled_rows(key, jnp.asarray([row], jnp.uint32), width))[0]
    a, b = (int(w) for w in key_words(key))
    pairs = [threefry_in_integers((a, b), divmod(row * width + column, 2**32)) for column in range(width)]
    bits = jnp.asarray(np.array([first ^ second for first, second in pairs], np.uint32))
    np.testing.assert_array_equal(found, bits_to_normal(bits))
    assert not np.any(found == np.asarray(compiled_rows(key, jnp.zeros(1, jnp.uint32), width))[0])


def test_normals_from_the_extreme_bits() -> None:
    """The ends of the uniform map, 2**-23 apart, give finite normals of some five and a half standard deviations."""
    low, middle, high = np.asarray(bits_to_normal(jnp.asarray([0, 2**31, LARGEST], jnp.uint32)))
    assert -5.6 < low < -5.3 and abs(middle) < 1e-7 and 5.0 < high < 5.6


@pytest.fixture
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of jaxtyping, where they are on, would refuse bad input before the code under test sees it."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("bad", [None, 0, 1.5, "key", np.zeros(2, np.uint32), jnp.zeros(2, jnp.uint32)])
def test_only_keys_are_keys(bad: Any) -> None:
    for use in (require_key, key_words, lambda key: matrix_normal(key, (2, 2))):
        with pytest.raises(TypeError, match=f"a PRNG key is needed, got {type(bad).__name__}: pass jax.random.key"):
            use(bad)


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_other_generators_are_refused(implementation: str) -> None:
    with pytest.raises(TypeError, match=f"a threefry2x32 key is needed, got .*{implementation}"):
        require_key(jax.random.key(0, impl=implementation))


def test_threefry_keys_pass_also_traced() -> None:
    key = jax.random.key(0)
    assert require_key(key) is key
    words = jax.jit(jax.vmap(key_words))(jax.random.split(key, 3))
    np.testing.assert_array_equal(jnp.stack(words, axis=1), jax.random.key_data(jax.random.split(key, 3)))
