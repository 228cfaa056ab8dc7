"""The gradient kernels, interpreted, give what `blocks_gradient` gives, and lower for their platforms."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.converters import convert
from hetmoe.analog.devices import Device, Stream
from hetmoe.analog.devices.pcm import PCM
from hetmoe.analog.tiles import block_max, row_blocks
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.grouped_crossbar import kernel_math
from hetmoe.ops.grouped_crossbar.blocks import ANALOG, DIGITAL, EMPTY, Chip, Clean, Matrix, Noise, Tables
from hetmoe.ops.grouped_crossbar.pallas import crossbar_blocks
from hetmoe.ops.grouped_crossbar.shape import Static
from tests.ops.blocks_gradient import blocks_gradient
from tests.ops.crossbar_battery import UNIT_ROUNDOFF, sum_error
from tests.ops.test_kernel_lowering import lowered

BLOCK, ROWS, COLUMNS, TILE_ROWS, EXPERTS = 16, 100, 24, 40, 5  # row-blocks of 34, 33 and 33
TILES = 3
# Blocks of an expert are apart; expert 1 has only an empty block, expert 4 none.
EXPERT = np.int32([2, 0, 3, 0, 2, 1, 3])
MODE = np.int32([DIGITAL, ANALOG, ANALOG, ANALOG, DIGITAL, EMPTY, ANALOG])
ANALOG_EXPERTS, DIGITAL_EXPERTS, UNUSED_EXPERTS = [0, 3], [2], [1, 4]
PLATFORMS = pytest.mark.parametrize("platform", ["tpu", "cuda"])
NO_CONVERTERS = CrossbarOptions(dac_bits=None, adc_bits=None, bound_axis="tile", tile_rows=TILE_ROWS)

reference = jax.jit(blocks_gradient, static_argnums=(4, 5))

Weights = tuple[tuple[jax.Array | None, jax.Array | None], ...]  # (clean, programmed) of every matrix


def data(
    dtype: Any, *, matrices: int, static_range: bool, axis: str, adc_bound: float
) -> tuple[jax.Array, Tables, tuple[Matrix, ...], tuple[jax.Array, ...]]:
    """(x, tables, matrices with stored weights, gradients of the outputs); those of the empty block are NaN."""
    rng = np.random.default_rng(5)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    ranges = jnp.asarray(rng.uniform(0.8, 1.6, (len(MODE), TILES)), jnp.float32)
    expert = jnp.asarray(EXPERT)
    tables = Tables(
        mode=jnp.asarray(MODE),
        clean=expert,
        programmed=expert,
        chip=expert,
        input_range=ranges if static_range else None,
        adc_bound=jnp.full(len(MODE), adc_bound, jnp.float32),
    )
    found, grads = [], []
    for _ in range(matrices):
        clean, noise = normal(EXPERTS, ROWS, COLUMNS), normal(EXPERTS, ROWS, COLUMNS)
        programmed = (clean + 0.1 * noise).astype(dtype)
        maxima = block_max(programmed.astype(jnp.float32), TILE_ROWS, per_column=axis == "column")
        found.append(
            Matrix(
                clean=Clean(w=clean.astype(dtype), low=None, high=None),
                programmed=programmed,
                chip=Chip(weight_max=maxima, noise=None),
            )
        )
        grads.append(jnp.where(expert[:, None, None] == 1, jnp.nan, normal(len(MODE), BLOCK, COLUMNS)))
    return normal(len(MODE), BLOCK, ROWS).astype(dtype), tables, tuple(found), tuple(grads)


def weights_of(matrices: tuple[Matrix, ...]) -> Weights:
    return tuple((None if m.clean is None else m.clean.w, m.programmed) for m in matrices)


def gradients(
    x: jax.Array, tables: Tables, matrices: tuple[Matrix, ...], grads: tuple[jax.Array, ...], static: Static
) -> tuple[jax.Array, Weights]:
    """Those of the operation with respect to the rows and to all weights."""

    def product(x: jax.Array, weights: Weights) -> tuple[jax.Array, ...]:
        replaced = []
        for matrix, (clean, programmed) in zip(matrices, weights, strict=True):
            part = matrix.clean if clean is None else dataclasses.replace(matrix.clean, w=clean)
            replaced.append(dataclasses.replace(matrix, clean=part, programmed=programmed))
        return crossbar_blocks(x, tables, tuple(replaced), static)

    return jax.vjp(product, x, weights_of(matrices))[1](grads)


def assert_same(
    found: tuple[jax.Array, Weights],
    x: jax.Array,
    tables: Tables,
    matrices: tuple[Matrix, ...],
    grads: tuple[jax.Array, ...],
    options: CrossbarOptions,
    device: Device | None = None,
) -> None:
    """Compares with the reference; both sum in float32."""
    wanted = reference(x, tables, matrices, grads, options, device)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(lambda a: (a.shape, a.dtype), wanted)
    # Sums of magnitudes: the digital gradient of magnitudes. A rounded input is at most twice the input.
    largest = lambda m: jnp.full_like(m.clean.w, 2 * jnp.max(jnp.abs(m.clean.w)))  # noqa: E731
    magnitude_matrices = tuple(
        Matrix(
            clean=Clean(w=jnp.abs(m.clean.w.astype(jnp.float32)), low=None, high=None),
            programmed=(largest(m) if m.programmed is None else jnp.abs(m.programmed)).astype(jnp.float32),
            chip=dataclasses.replace(m.chip, noise=None),
        )
        for m in matrices
        if m.clean is not None
    )
    own = tables if matrices[0].programmed is not None else dataclasses.replace(tables, programmed=tables.clean)
    magnitude_x = 2 * jnp.abs(x.astype(jnp.float32))
    absolute = tuple(map(jnp.abs, grads))
    of_rows, of_weights = reference(magnitude_x, own, magnitude_matrices, absolute, NO_CONVERTERS, None)
    if matrices[0].programmed is None:  # all gradients are of the clean weights
        of_weights = tuple((clean + programmed, None) for clean, programmed in of_weights)

    is_narrow = x.dtype == jnp.bfloat16
    # Codes, steps and gradients are multiplied in another order; gradients are cut into two parts for bfloat16.
    products = 4 * UNIT_ROUNDOFF + (2.0**-15 if is_narrow else 0)
    terms = max(COLUMNS * len(matrices), BLOCK * len(MODE))
    for actual, value, magnitude in zip(
        jax.tree.leaves(found), jax.tree.leaves(wanted), jax.tree.leaves((of_rows, of_weights)), strict=True
    ):
        actual, value = (np.asarray(a, np.float64) for a in (actual, value))  # noqa: PLW2901
        allowed = (2 * sum_error(terms) + products) * np.asarray(magnitude, np.float64)
        allowed += (2.0**-7 if is_narrow else 0) * np.abs(value)  # both are rounded to the dtype
        difference = np.abs(actual - value)
        worst = np.argmax(difference - allowed)
        assert np.all(difference <= allowed), (
            f"{np.sum(~(difference <= allowed))} of {difference.size} elements differ; "
            f"worst: {actual.flat[worst]} instead of {value.flat[worst]}, allowed {allowed.flat[worst]}"
        )


def clipped_share(x: jax.Array, tables: Tables, matrix: Matrix, options: CrossbarOptions) -> float:
    """Share of the analog tiles' sums that their ADCs clip, none of which rounding decides."""
    clipped = []
    for b in np.flatnonzero(MODE == ANALOG):
        for tile, (start, size) in enumerate(row_blocks(ROWS, TILE_ROWS)):
            inputs = x[b, :, start : start + size].astype(jnp.float32)
            bound = jnp.max(jnp.abs(inputs), axis=1, keepdims=True)
            if tables.input_range is not None:
                bound = tables.input_range[b, tile].reshape(1, 1)
            if options.dac_bits is not None:
                inputs = convert(inputs, bound, options.dac_bits)
            assert matrix.programmed is not None
            w = np.asarray(matrix.programmed[EXPERT[b], start : start + size], np.float64)
            y = np.abs(np.asarray(inputs, np.float64) @ w)
            limit = np.asarray(bound * tables.adc_bound[b] * matrix.chip.weight_max[EXPERT[b], tile][None], np.float64)
            assert np.all(np.abs(y - limit) > sum_error(size) * (np.abs(np.asarray(inputs)) @ np.abs(w)))
            clipped.append(y > limit)
    return float(np.mean(clipped))


@functools.cache
def compiled(static: Static) -> Any:
    return jax.jit(functools.partial(gradients, static=static))


def without_ties(x: jax.Array, tables: Tables, dac_bits: int | None) -> jax.Array:
    """Zeros in place of inputs halfway between two DAC codes, where a division that is a bit off takes the other."""
    if dac_bits is None:
        return x
    parts = []
    for tile, (start, size) in enumerate(row_blocks(ROWS, TILE_ROWS)):
        inputs = x[:, :, start : start + size].astype(jnp.float32)
        if tables.input_range is None:
            bound = jnp.max(jnp.abs(inputs), axis=2, keepdims=True)
        else:
            bound = tables.input_range[:, tile, None, None]
        position = inputs / (bound / (2 ** (dac_bits - 1) - 1))
        parts.append(jnp.where(jnp.abs(position - jnp.floor(position) - 0.5) < 1e-3, 0, x[:, :, start : start + size]))
    return jnp.concatenate(parts, axis=2)


# Dtype; static ranges; bound axis; DAC and ADC bits; lambda.
CASES: dict[str, tuple[Any, bool, str, int | None, int | None, float]] = {
    "static-tile-saturated-float32": (jnp.float32, True, "tile", 8, 8, 2.0),
    "static-tile-saturated-bfloat16": (jnp.bfloat16, True, "tile", 8, 8, 2.0),
    "dynamic-column-saturated-bfloat16": (jnp.bfloat16, False, "column", 8, 8, 2.0),
    "static-dac_only-float32": (jnp.float32, True, "tile", 4, None, 12.0),
    "dynamic-adc_only-bfloat16": (jnp.bfloat16, False, "tile", None, 6, 12.0),
    "static-codes_beyond_bfloat16": (jnp.bfloat16, True, "column", 10, 8, 12.0),
}


@PLATFORMS
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(platform: Any, case: str) -> None:
    """Two matrices share rows; blocks are analog, digital and empty; tiles and columns are padded."""
    dtype, static_range, axis, dac_bits, adc_bits, adc_bound = CASES[case]
    x, tables, matrices, grads = data(dtype, matrices=2, static_range=static_range, axis=axis, adc_bound=adc_bound)
    arrays = without_ties(x, tables, dac_bits), tables, matrices, grads
    options = CrossbarOptions(dac_bits=dac_bits, adc_bits=adc_bits, bound_axis=axis, tile_rows=TILE_ROWS)
    if adc_bits is not None:
        share = clipped_share(arrays[0], tables, matrices[0], options)
        assert 0.05 < share < 0.7 if "saturated" in case else share == 0
    found = compiled(Static(options=options, device=None, interpret=platform))(*arrays)
    assert_same(found, *arrays, options)
    for clean, programmed in found[1]:
        assert clean is not None and programmed is not None
        assert not np.any(clean[np.array(ANALOG_EXPERTS + UNUSED_EXPERTS)])
        assert not np.any(programmed[np.array(DIGITAL_EXPERTS + UNUSED_EXPERTS)])


BREAKS = {
    "passes_adc": lambda y, bound: (jnp.abs(y) >= bound).astype(jnp.int8),
    "passes_dac": lambda x, bound: jnp.abs(x.astype(jnp.float32)) > bound,
}


@pytest.fixture
def uncached() -> Iterator[None]:
    """Compiles anew what a test changes, and again behind it."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("uncached")
@PLATFORMS
@pytest.mark.parametrize("broken", BREAKS)
def test_a_perturbed_gradient_fails(platform: Any, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the converters clip passes its gradient on, the rest does not."""
    monkeypatch.setattr(kernel_math, broken, BREAKS[broken])
    x, tables, matrices, grads = data(jnp.float32, matrices=1, static_range=True, axis="tile", adc_bound=2.0)
    arrays = without_ties(x, tables, 8), tables, matrices, grads
    options = CrossbarOptions(dac_bits=8, adc_bits=8, bound_axis="tile", tile_rows=TILE_ROWS)
    static = Static(options=options, device=None, interpret=platform)
    found = jax.jit(functools.partial(gradients, static=static))(*arrays)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same(found, *arrays, options)


def seeded(matrix: Matrix, words: jax.Array) -> Matrix:
    """To be programmed in the kernel, from the clean weights; `words` are the keys of one expert's streams."""
    assert matrix.clean is not None
    w = matrix.clean.w
    high = block_max(w.astype(jnp.float32), TILE_ROWS, per_column=False)
    noise = Noise(
        words=words[None] + jnp.arange(EXPERTS, dtype=jnp.uint32)[:, None, None],
        scale=jnp.linspace(0.5, 1.5, EXPERTS),
        time_s=None,
        factor=jnp.broadcast_to(jnp.float32([1.1, 1.2, 1.3]), (EXPERTS, TILES)),
    )
    return Matrix(clean=Clean(w=w, low=-high, high=high), programmed=None, chip=Chip(weight_max=2 * high, noise=noise))


def key_words(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**31, (len(Stream), 2)), jnp.uint32)


@PLATFORMS
def test_noise_drawn_in_the_kernel(platform: Any) -> None:
    """The gradient of rows is that through the noisy weights; the gradient of all weights goes to the clean ones."""
    x, tables, matrices, grads = data(jnp.float32, matrices=1, static_range=True, axis="tile", adc_bound=12.0)
    options = CrossbarOptions(dac_bits=8, adc_bits=8, bound_axis="tile", tile_rows=TILE_ROWS)
    static = Static(options=options, device=PCM(), interpret=platform)
    noisy = (seeded(matrices[0], key_words(1)),)
    found = compiled(static)(x, tables, noisy, grads)
    assert_same(found, x, tables, noisy, grads, options, PCM())
    assert found[1][0][0] is not None
    has_gradient = np.any(np.asarray(found[1][0][0]), axis=(1, 2))
    np.testing.assert_array_equal(has_gradient, ~np.isin(np.arange(EXPERTS), UNUSED_EXPERTS))


@PLATFORMS
def test_mapped_over_stored_weights(platform: Any) -> None:
    """Clean weights that the elements share have one gradient for each."""
    x, tables, matrices, grads = data(jnp.float32, matrices=1, static_range=False, axis="tile", adc_bound=12.0)
    options = CrossbarOptions(dac_bits=8, adc_bits=8, bound_axis="tile", tile_rows=TILE_ROWS)
    static = Static(options=options, device=None, interpret=platform)

    def one(factor: jax.Array) -> tuple[Matrix, ...]:
        assert matrices[0].programmed is not None
        return (dataclasses.replace(matrices[0], programmed=matrices[0].programmed * factor),)

    factors = jnp.float32([1.0, 0.5, 0.75])
    mapped = jax.jit(jax.vmap(lambda factor: gradients(x, tables, one(factor), grads, static)))(factors)
    for index, factor in enumerate(factors):
        found = jax.tree.map(lambda leaf, index=index: leaf[index], mapped)
        assert_same(found, x, tables, one(factor), grads, options)


@PLATFORMS
def test_mapped_over_noise(platform: Any) -> None:
    """Elements share all weights, and differ in the key and in their inputs."""
    x, tables, matrices, grads = data(jnp.float32, matrices=1, static_range=True, axis="tile", adc_bound=12.0)
    options = CrossbarOptions(dac_bits=8, adc_bits=8, bound_axis="tile", tile_rows=TILE_ROWS)
    static = Static(options=options, device=PCM(), interpret=platform)
    words, inputs = jnp.stack([key_words(1), key_words(2)]), jnp.stack([x, x[:, ::-1]])

    def of_element(words: jax.Array, x: jax.Array) -> tuple[jax.Array, Weights]:
        return gradients(x, tables, (seeded(matrices[0], words),), grads, static)

    mapped = jax.jit(jax.vmap(of_element))(words, inputs)
    for index in range(2):
        found = jax.tree.map(lambda leaf, index=index: leaf[index], mapped)
        assert_same(found, inputs[index], tables, (seeded(matrices[0], words[index]),), grads, options, PCM())


@PLATFORMS
@pytest.mark.parametrize(
    ("rows", "columns", "block", "dtype", "is_seeded"),
    [
        (2048, 1024, 16, jnp.bfloat16, False),
        (2048, 1024, 128, jnp.float32, True),
        (2048, 1408, 16, jnp.float32, False),
        (2048, 1408, 128, jnp.bfloat16, True),
        (1408, 2048, 128, jnp.bfloat16, False),
    ],
    ids=["olmoe-16-bfloat16", "olmoe-128-float32", "deepseek-16-float32", "deepseek-128-bfloat16", "deepseek-down"],
)
def test_lowers(platform: Any, rows: int, columns: int, block: int, dtype: Any, *, is_seeded: bool) -> None:
    """64 experts of OLMoE and DeepSeekMoE, for a platform that need not be here."""
    experts, blocks, tiles = 64, 96, -(-rows // 512)
    shape = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)  # noqa: E731
    index = shape(blocks, dtype=jnp.int32)
    tables = Tables(
        mode=index,
        clean=index,
        programmed=index,
        chip=index,
        input_range=None if block == 128 else shape(blocks, tiles),
        adc_bound=shape(blocks),
    )
    weights, per_tile, noise = shape(experts, rows, columns, dtype=dtype), shape(experts, tiles, 1), None
    if is_seeded:
        words = shape(experts, len(Stream), 2, dtype=jnp.uint32)
        noise = Noise(words=words, scale=shape(experts), time_s=None, factor=shape(experts, tiles))
    group = per_tile if is_seeded else None
    matrix = Matrix(
        clean=Clean(w=weights, low=group, high=group),
        programmed=None if is_seeded else weights,
        chip=Chip(weight_max=per_tile, noise=noise),
    )
    options = CrossbarOptions(dac_bits=8, adc_bits=8, bound_axis="tile", tile_rows=512)
    static = Static(options=options, device=PCM() if is_seeded else None, interpret=None)
    grads = shape(blocks, block, columns)
    arguments = (shape(blocks, block, rows, dtype=dtype), tables, (matrix, matrix), (grads, grads))
    text = lowered(functools.partial(gradients, static=static), platform, *arguments)
    # Forward, rows, and clean weights, with programmed ones where they are stored.
    for name, count in (("inputs_gradient", 1), ("weights_gradient", 1 if is_seeded else 2)):
        assert text.count(f"grouped_crossbar_{name}") >= count, name
