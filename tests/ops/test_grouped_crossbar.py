"""Blocks of analog experts go through converters as in the dense crossbar matmul, blocks of digital ones do not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.read_noise import ReadDraw, ReadNoise, make_read_noise
from hetmoe.analog.tiles import block_max
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.dispatch import dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_crossbar.xla import grouped_crossbar
from tests.numpy_reference import Float32, crossbar_tiles
from tests.ops.crossbar_battery import assert_matches, expectation, sum_error
from tests.ops.matmul_count import dots, multiplications

TOKENS, COPIES, EXPERTS, ROWS, COLUMNS, TILE_ROWS = 11, 2, 4, 20, 6, 12  # two row-blocks of 10
ANALOG = np.array([True, False, True, False])
# Range of every expert and row-block; some inputs are clipped.
RANGES = np.random.default_rng(8).uniform(0.9, 2.0, (EXPERTS, 2)).astype(np.float32)


def routed() -> tuple[Float32, Float32, np.ndarray]:
    """(x, w, chosen experts), experts of different magnitude."""
    rng = np.random.default_rng(6)
    scale = np.float32([1.0, 0.5, 0.1, 3.0])[:, None, None]
    w = rng.standard_normal((EXPERTS, ROWS, COLUMNS)).astype(np.float32) * scale
    chosen = rng.permutation(np.arange(TOKENS * COPIES) % EXPERTS).reshape(TOKENS, COPIES)
    return rng.standard_normal((TOKENS, ROWS)).astype(np.float32), w, chosen


def through_blocks(
    x: jax.Array,
    w: jax.Array,
    chosen: np.ndarray,
    *,
    analog: np.ndarray | jax.Array = ANALOG,
    ranges: Float32 | jax.Array | None = RANGES,
    read: tuple[ReadNoise, jax.Array] | None = None,
    adc_bound: float = 12.0,
    block: int = 4,
    **options: Any,
) -> jax.Array:
    """`[tokens, copies, columns]`; read noise is numbered by token copy."""
    settings = CrossbarOptions(**{"tile_rows": TILE_ROWS} | options)
    plan = dispatch(jnp.asarray(chosen, jnp.int32), EXPERTS, block)
    numbers = jnp.arange(chosen.size, dtype=jnp.uint32)
    rows = jnp.zeros(plan.slot_token.shape, jnp.uint32).at[plan.token_slot.reshape(-1)].set(numbers)
    y = grouped_crossbar(
        to_blocks(x, plan),
        w,
        plan.block_expert,
        None,
        jnp.asarray(analog),
        None if ranges is None else jnp.asarray(ranges),
        jnp.float32(adc_bound),
        block_max(w.astype(jnp.float32), settings.tile_rows, per_column=settings.bound_axis == "column"),
        settings,
        None if read is None else ReadDraw(*read, rows.reshape(-1, block)),
        stored=plan.block_expert,
    )
    return from_blocks(y, plan)


def run(x: Float32, w: Float32, chosen: np.ndarray, **options: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda x, w: through_blocks(x, w, chosen, **options))(jnp.asarray(x), jnp.asarray(w)))


@pytest.mark.parametrize(
    ("ranges", "options"),
    [
        (RANGES, {}),
        (None, {"bound_axis": "column", "adc_bound": 0.7}),
        (RANGES, {"adc_bits": None}),
        (None, {"dac_bits": None, "adc_bits": 6}),
    ],
    ids=["static-tile", "dynamic-column", "static-dac_only", "dynamic-adc_only"],
)
def test_equals_a_crossbar_per_token(ranges: Float32 | None, options: dict[str, Any]) -> None:
    x, w, chosen = routed()
    y = run(x, w, chosen, ranges=ranges, **options)
    seen = {True: 0, False: 0}
    for token, copy in np.ndindex(chosen.shape):
        expert = chosen[token, copy]
        on = {"dac_bits": 8, "adc_bits": 8, "adc_bound": 12.0, "bound_axis": "tile"} | options
        off = {"dac_bits": None, "adc_bits": None, "adc_bound": 12.0, "bound_axis": "tile"}
        kind = on if ANALOG[expert] else off
        own = None if ranges is None else ranges[expert]
        expected = expectation(x[token], w[expert], input_range=own, tile_rows=TILE_ROWS, **kind)
        assert_matches(y[token, copy], expected)
        seen[bool(ANALOG[expert])] += 1
    assert min(seen.values()) > 5


def test_digital_blocks_never_meet_a_converter() -> None:
    """Ranges, bounds and noise that would ruin an analog product leave digital ones as they are, gradients included."""
    x, w, chosen = routed()
    digital = ~ANALOG[chosen]
    read = (make_read_noise("additive", 10.0), jax.random.key(0))
    coarse: dict[str, Any] = {"dac_bits": 2, "adc_bits": 2, "adc_bound": 0.01, "tile_rows": 512}

    @jax.jit
    def run(x: jax.Array, w: jax.Array, analog: jax.Array, ranges: jax.Array) -> jax.Array:
        return through_blocks(x, w, chosen, analog=analog, ranges=ranges, read=read, **coarse)

    arrays = jnp.asarray(x), jnp.asarray(w)
    narrow, off = np.where(ANALOG[:, None], RANGES[:, :1], np.float32(1e-3)), np.zeros(EXPERTS, bool)
    plain = np.asarray(run(*arrays, off, narrow))
    np.testing.assert_allclose(plain, np.einsum("tk,tjkn->tjn", x, w[chosen]), rtol=0, atol=sum_error(ROWS) * ROWS * 20)
    for ranges in (narrow, narrow * np.float32(np.nan)):
        found = np.asarray(run(*arrays, ANALOG, ranges))
        np.testing.assert_array_equal(found[digital], plain[digital])
        assert not np.array_equal(found[~digital], plain[~digital])

    @jax.jit
    def gradient(x: jax.Array, w: jax.Array, analog: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(x: jax.Array, w: jax.Array) -> jax.Array:
            y = through_blocks(x, w, chosen, analog=analog, ranges=narrow, **coarse)
            return jnp.sum(jnp.where(digital[..., None], y, 0.0))

        return jax.grad(loss, argnums=(0, 1))(x, w)

    for actual, expected in zip(gradient(*arrays, ANALOG), gradient(*arrays, off), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_all_digital_is_the_plain_product_in_bf16() -> None:
    x, w, chosen = routed()
    low_x, low_w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    y = jax.jit(lambda x, w: through_blocks(x, w, chosen, analog=np.zeros(EXPERTS, bool)))(low_x, low_w)
    assert y.dtype == jnp.float32
    wide_x, wide_w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (low_x, low_w))
    picked = wide_w[chosen]
    bound = sum_error(ROWS) * np.einsum("tk,tjkn->tjn", np.abs(wide_x), np.abs(picked))
    assert np.all(np.abs(np.asarray(y) - np.einsum("tk,tjkn->tjn", wide_x, picked)) <= bound)


@pytest.mark.parametrize(("kind", "tiles", "blocks"), [("additive", 1, (2, 8)), ("pcm", 2, (4,))])
def test_read_noise_follows_the_token_copy(kind: str, tiles: int, blocks: tuple[int, ...]) -> None:
    """Copy number m gets row m of its tile's draws, at any block size and with any load."""
    x, w, chosen = routed()
    analog = np.array([True, True, True, False])
    noise, key = make_read_noise(kind, 0.1), jax.random.key(5)
    options: dict[str, Any] = {"ranges": RANGES[:, :tiles], "tile_rows": ROWS // tiles}

    def noise_at(block: int) -> np.ndarray:
        def call(x: jax.Array, w: jax.Array, noise: ReadNoise) -> jax.Array:
            return through_blocks(x, w, chosen, read=(noise, key), analog=analog, adc_bits=None, block=block, **options)

        compiled, arrays = jax.jit(call), (jnp.asarray(x), jnp.asarray(w))
        return np.asarray(compiled(*arrays, noise)) - np.asarray(compiled(*arrays, make_read_noise(kind, 0.0)))

    found = [noise_at(block) for block in blocks]
    wanted = np.zeros(found[0].shape)
    with jax.threefry_partitionable(True):
        z = [np.asarray(jax.random.normal(jax.random.fold_in(key, t), (chosen.size, COLUMNS))) for t in range(tiles)]
    for token, copy in np.ndindex(chosen.shape):
        expert = chosen[token, copy]
        arguments: dict[str, Any] = {"dac_bits": 8, "adc_bits": None, "adc_bound": 12.0, "bound_axis": "tile"}
        cut = crossbar_tiles(
            x[token], w[expert], input_range=RANGES[expert, :tiles], tile_rows=ROWS // tiles, **arguments
        )
        for index, tile in enumerate(cut):
            weights = np.abs(np.split(w[expert].astype(np.float64), tiles)[index])
            inputs = tile.dac_codes.astype(np.float64) * tile.dac_step
            square = np.square(inputs) @ weights if kind == "pcm" else weights.max() * np.sum(np.square(inputs))
            if analog[expert]:
                wanted[token, copy] += 0.1 * np.sqrt(weights.max() * square) * z[index][token * COPIES + copy]
    assert np.abs(wanted[analog[chosen]]).min() > 1e-4
    for noise_found in found:  # recovered from outputs of magnitude up to 40
        np.testing.assert_allclose(noise_found, wanted, rtol=0, atol=12 * 2.0**-23 * 40)


def test_gradients_are_finite_with_padding() -> None:
    """Padding slots are rows of zeros, where the root in the noise's spread has an infinite slope."""
    x, w, chosen = routed()
    read = (make_read_noise("pcm", 0.1), jax.random.key(5))

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(through_blocks(x, w, chosen, read=read, ranges=RANGES[:, :1], tile_rows=512))

    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(x), jnp.asarray(w))
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()


def test_the_plan_is_traced_and_adds_no_work() -> None:
    """Converters are selected around one product per block: neither recompiled nor computed on two sides."""
    x, w, chosen = routed()
    busy = min(EXPERTS, TOKENS * COPIES)
    slots = 4 * (busy + (TOKENS * COPIES - busy) // 4)  # the tight bound of `dispatch`
    arrays = jnp.asarray(x), jnp.asarray(w), jnp.asarray(ANALOG)
    count = multiplications(lambda x, w, analog: through_blocks(x, w, chosen, analog=analog), *arrays)
    assert count == slots * ROWS * COLUMNS


def test_float32_products_ask_for_full_precision() -> None:
    """The default on GPU and TPU is TF32 or bf16, which would round DAC codes times their step to 11 or 8 bits."""
    x, w, chosen = routed()
    function = jax.make_jaxpr(lambda x, w: through_blocks(x, w, chosen))(jnp.asarray(x), jnp.asarray(w))
    highest = jax.lax.Precision.HIGHEST
    asked = [equation.params["precision"] for equation, _ in dots(function.jaxpr)]
    assert len(asked) == 2
    assert all(precision in (highest, (highest, highest)) for precision in asked)
