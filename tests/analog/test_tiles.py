"""How matrices are cut into row-blocks, and maxima over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.analog.tiles import block_max, row_blocks, spread_rows
from hetmoe.errors import InputError
from tests import numpy_reference


@pytest.mark.parametrize(
    ("rows", "tile_rows", "sizes"),
    [
        (1000, 512, [500, 500]),
        (1408, 512, [470, 469, 469]),
        (2048, 512, [512] * 4),
        (512, 512, [512]),
        (513, 512, [257, 256]),
        (3, 512, [3]),
        (5, 1, [1] * 5),
    ],
)
def test_published_splits(rows: int, tile_rows: int, sizes: list[int]) -> None:
    assert [size for _, size in row_blocks(rows, tile_rows)] == sizes


@settings(max_examples=200, deadline=None, derandomize=True)
@given(rows=st.integers(1, 3000), tile_rows=st.integers(1, 600))
def test_invariants(rows: int, tile_rows: int) -> None:
    blocks = row_blocks(rows, tile_rows)
    starts, sizes = zip(*blocks, strict=True)
    assert len(blocks) == -(-rows // tile_rows)
    assert list(starts) == [0, *np.cumsum(sizes[:-1])]
    assert sum(sizes) == rows
    assert 1 <= min(sizes) and max(sizes) <= tile_rows
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)
    assert [slice(start, start + size) for start, size in blocks] == numpy_reference.row_blocks(rows, tile_rows)


@pytest.mark.parametrize(("rows", "tile_rows"), [(0, 512), (-1, 512), (10, 0), (10, -4)])
def test_nothing_to_cut_is_refused(rows: int, tile_rows: int) -> None:
    with pytest.raises(InputError, match=f"rows={rows} and tile_rows={tile_rows} must both be at least 1"):
        row_blocks(rows, tile_rows)


@pytest.mark.parametrize("tile_rows", [4, 11, 512])
@pytest.mark.parametrize("per_column", [True, False])
def test_maxima(tile_rows: int, per_column: bool) -> None:
    w = np.random.default_rng(0).standard_normal((2, 11, 5)).astype(np.float32)
    w[0, 4:8] = 0
    compiled = jax.jit(block_max, static_argnums=1, static_argnames="per_column")
    found = np.asarray(compiled(w, tile_rows, per_column=per_column))
    axes = -2 if per_column else (-2, -1)
    blocks = numpy_reference.row_blocks(11, tile_rows)
    wanted = np.stack([np.max(np.abs(w[:, b]), axis=axes).reshape(2, -1) for b in blocks], axis=1)
    assert found.shape == (2, len(blocks), 5 if per_column else 1)
    np.testing.assert_array_equal(found, wanted)


def test_maximum_keeps_nan_and_dtype() -> None:
    w = jnp.asarray([[1.0, -3.0], [jnp.nan, 2.0]], jnp.bfloat16)
    found = block_max(w, 512, per_column=True)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), [[np.nan, 3.0]])
    assert np.isnan(block_max(w, 512, per_column=False)).all()


@pytest.mark.parametrize("axis", [0, -2, 1])
def test_one_value_per_row(axis: int) -> None:
    values = np.moveaxis(np.float32([[1, 2, 3], [4, 5, 6]]), 1, axis)  # three blocks of 11 rows: 4, 4, 3
    found = np.asarray(spread_rows(jnp.asarray(values), 11, 4, axis))
    np.testing.assert_array_equal(found, np.repeat(values, [4, 4, 3], axis=axis))


def test_one_block_is_left_to_broadcasting() -> None:
    values = jnp.ones((1, 3))
    assert spread_rows(values, 11, 512, 0).shape == (1, 3)
