"""Products by expert through every implementation: which weights a block meets, converters, padding, draws, seeds.

The arithmetic of one matrix is compared in `test_crossbar_*.py`; here, what belonging to experts adds to it.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.devices import DEVICES
from hetmoe.analog.programming import ProgrammedMatrix, SeededMatrix, program_matrix, realise
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.analog.tiles import block_max
from hetmoe.ops.dispatch import dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_crossbar import api, kernel_math, pallas, pallas_tpu, pallas_triton
from hetmoe.ops.grouped_crossbar.api import expert_products, matrix_product
from hetmoe.ops.grouped_crossbar.blocks import Matrix, Tables
from tests.numpy_reference import Float32
from tests.ops.crossbar_battery import KERNELS, assert_matches, expectation, sum_error

TOKENS, EXPERTS, ROWS, COLUMNS, TILE_ROWS = 40, 4, 52, 24, 20  # row-blocks of 18, 17 and 17 rows: all padded
ANALOG = np.array([True, False, True, False])
RANGES = np.random.default_rng(8).uniform(1.0, 2.5, (EXPERTS, 3)).astype(np.float32)
NAMES = ("xla", *KERNELS)


def weights(seed: int, columns: int = COLUMNS) -> Float32:
    scale = np.float32([1.0, 0.5, 0.1, 3.0])[:, None, None]
    return np.random.default_rng(seed).standard_normal((EXPERTS, ROWS, columns)).astype(np.float32) * scale


def inputs(seed: int = 6) -> Float32:
    return np.random.default_rng(seed).standard_normal((TOKENS, ROWS)).astype(np.float32)


ROUTES = {
    "even": np.arange(TOKENS) % EXPERTS,
    "one_empty": np.where(np.arange(TOKENS) % EXPERTS == 2, 1, np.arange(TOKENS) % EXPERTS),
    "all_to_one": np.full(TOKENS, 2),
}


def stored(w: Float32, spec: AnalogSpec) -> ProgrammedMatrix:
    maxima = block_max(jnp.asarray(w, jnp.float32), TILE_ROWS, per_column=spec.options.bound_axis == "column")
    return ProgrammedMatrix(w=jnp.asarray(w), weight_max=maxima)


@functools.partial(jax.jit, static_argnames=("name",))
def products(
    x: Any, clean: Any, analog_side: Any, chosen: Any, spec: AnalogSpec, ranges: Any, analog: Any, name: str
) -> tuple[jax.Array, ...]:
    """`[tokens, N]` of each matrix."""
    plan = dispatch(chosen[:, None].astype(jnp.int32), EXPERTS, 16)
    used = (plan.slot_token < TOKENS).reshape(-1, 16).any(axis=1)
    found = expert_products(
        to_blocks(x, plan), clean, analog_side, block_expert=plan.block_expert, used=used, analog=analog,
        input_range=ranges, spec=spec, read=(None,) * len(clean), implementation=name,
    )  # fmt: skip
    return tuple(from_blocks(y, plan)[:, 0] for y in found)


def run(
    name: str, spec: AnalogSpec, *, route: str = "even", ranges: Any = RANGES, dtype: Any = jnp.float32
) -> tuple[np.ndarray, ...]:
    """Gate and up: two matrices that share their inputs."""
    clean = tuple(jnp.asarray(weights(seed), dtype) for seed in (0, 1))
    noisy = tuple(stored(jnp.asarray(weights(seed), dtype), spec) for seed in (2, 3))
    x = jnp.asarray(inputs(), dtype)
    return tuple(map(np.asarray, products(x, clean, noisy, ROUTES[route], spec, ranges, ANALOG, name)))


def assert_is_expected(found: tuple[np.ndarray, ...], spec: AnalogSpec, chosen: np.ndarray, ranges: Any) -> None:
    x, options = inputs(), dataclasses.asdict(spec.options)
    for y, clean, noisy in zip(found, (weights(0), weights(1)), (weights(2), weights(3)), strict=True):
        for expert in np.unique(chosen):
            rows = chosen == expert
            if ANALOG[expert]:
                bound = {"adc_bound": float(spec.adc_bound), "input_range": None if ranges is None else ranges[expert]}
                wanted = expectation(x[rows], noisy[expert], implementations=1, **options, **bound)
                assert assert_matches(y[rows], wanted) <= wanted.near.sum()
            else:
                exact = x[rows].astype(np.float64) @ clean[expert].astype(np.float64)
                limit = sum_error(ROWS) * (np.abs(x[rows]) @ np.abs(clean[expert]))
                assert np.all(np.abs(y[rows] - exact) <= limit)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_every_token_meets_the_weights_of_its_expert(name: str, route: str) -> None:
    spec = analog_spec(adc_bound=2.0, tile_rows=TILE_ROWS)
    assert_is_expected(run(name, spec, route=route), spec, ROUTES[route], RANGES)


@pytest.mark.parametrize("changes", [{"bound_axis": "column"}, {"adc_bound": 0.3}, {"adc_bits": None, "dac_bits": 4}])
@pytest.mark.parametrize("name", KERNELS)
def test_dynamic_ranges_column_bounds_and_saturation(name: str, changes: dict[str, Any]) -> None:
    spec = analog_spec(**{"adc_bound": 2.0, "tile_rows": TILE_ROWS, **changes})
    assert_is_expected(run(name, spec, ranges=None), spec, ROUTES["even"], None)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("dtype", "dac_bits"), [(jnp.bfloat16, 8), (jnp.float16, 11), (jnp.bfloat16, 10)])
def test_two_byte_operands_lose_nothing(name: str, dtype: Any, dac_bits: int) -> None:
    """Codes are whole numbers that the dtype holds (10 bits in bfloat16 are not, and go through float32)."""
    spec = analog_spec(adc_bits=None, dac_bits=dac_bits, tile_rows=TILE_ROWS)
    found, wanted = (run(n, spec, dtype=dtype) for n in (name, "xla"))
    for y, reference in zip(found, wanted, strict=True):
        assert y.dtype == np.float32
        # Both sum up to 18 products of magnitude up to 2.5 * 12 in float32, in three tiles; one code is 2.5 / 2**9.
        np.testing.assert_allclose(y, reference, rtol=0, atol=4 * sum_error(ROWS) * 2.5 * 12 * 18)


@pytest.mark.parametrize("name", KERNELS)
def test_empty_blocks_are_zero_and_bad_weights_stay_with_their_expert(name: str) -> None:
    """NaN in an expert that no token chose reaches nothing; in one that was chosen, every token of its tile."""
    spec = analog_spec(adc_bound=2.0, tile_rows=TILE_ROWS)
    noisy = weights(2)
    noisy[0, 3, 5] = np.nan
    side = (stored(jnp.asarray(noisy), spec),)
    for chosen, bad in ((np.full(TOKENS, 2), False), (np.arange(TOKENS) % 3, True)):
        (y,) = products(inputs(), (weights(0),), side, chosen, spec, RANGES, ANALOG, name)
        # All of the row: the bound of the tile's ADCs is not a number either.
        assert np.isnan(np.asarray(y)).all(axis=1).tolist() == ((chosen == 0) & bad).tolist()
        assert np.isnan(np.asarray(y)).any(axis=1).tolist() == ((chosen == 0) & bad).tolist()
    x = inputs()
    x[7, 2] = np.nan
    (y,) = products(x, (weights(0),), (stored(weights(2), spec),), ROUTES["even"], spec, RANGES, ANALOG, name)
    assert np.flatnonzero(np.isnan(np.asarray(y)).all(axis=1)).tolist() == [7]


@pytest.mark.parametrize("name", KERNELS)
def test_blocks_that_are_not_used_are_zero(name: str) -> None:
    spec = analog_spec(tile_rows=TILE_ROWS)
    x = jnp.asarray(inputs()[:32].reshape(2, 16, ROWS))
    (y,) = expert_products(
        x, (jnp.asarray(weights(0)),), (stored(weights(2), spec),), block_expert=jnp.array([0, 0]),
        used=jnp.array([True, False]), analog=jnp.asarray(ANALOG), input_range=None, spec=spec, read=(None,),
        implementation=name,
    )  # fmt: skip
    assert np.all(np.any(np.asarray(y[0]), axis=1)) and not np.any(y[1])


SEEDED = [(device, {}) for device in DEVICES] + [
    ("pcm", {"time_s": 86400.0}), ("pcm", {"time_s": 86400.0, "drift_compensation": True}),
    ("reram_cmo", {"time_s": 3600.0}),
]  # fmt: skip


@pytest.mark.parametrize(("device", "changes"), SEEDED, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_weights_programmed_in_the_kernel_are_those_of_program(name: str, device: str, changes: dict[str, Any]) -> None:
    """Read out with one-hot inputs, for every device; padding of rows and columns moves no draw."""
    spec = analog_spec(device, noise_scale=1.5, tile_rows=TILE_ROWS, dac_bits=None, adc_bits=None, **changes)
    clean, key = weights(0), jax.random.key(11)
    one_hot = np.eye(TOKENS, ROWS, dtype=np.float32)
    for first in (0, ROWS - TOKENS):
        x = np.roll(one_hot, first, axis=1)
        for expert in (0, 2):
            chosen = np.full(TOKENS, expert)
            (y,) = products(x, (clean,), (SeededMatrix(key=key),), chosen, spec, None, ANALOG, name)
            wanted = np.asarray(_programmed(key, clean[expert], spec, expert))[first : first + TOKENS]
            # Different orders of fused multiplications and additions: a few roundings of numbers as large as these.
            np.testing.assert_allclose(y, wanted, rtol=0, atol=8 * 2.0**-23 * np.abs(wanted).max())
            assert np.abs(wanted - clean[expert, first : first + TOKENS]).max() > 0.005 * np.abs(clean[expert]).max()


_programmed = jax.jit(lambda key, w, spec, expert: program_matrix(key, w, spec, expert=expert))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("axis", ["tile", "column"])
def test_bounds_of_seeded_weights_are_those_of_stored_ones(name: str, axis: str) -> None:
    spec = analog_spec(noise_scale=3.0, adc_bound=0.5, bound_axis=axis, tile_rows=TILE_ROWS)
    clean, seeded = (jnp.asarray(weights(0)),), SeededMatrix(key=jax.random.key(1))
    kept = jax.jit(realise)(seeded, clean[0], spec)
    found, wanted = (
        np.asarray(products(inputs(), clean, (side,), ROUTES["even"], spec, RANGES, ANALOG, name)[0])
        for side in (seeded, kept)
    )
    step = 2 * 0.5 * RANGES.max() * float(kept.weight_max.max()) / 254
    assert (np.abs(found - wanted) > 1e-4 * step).mean() < 0.01  # a sum at a code's boundary goes to either side
    assert np.abs(found - wanted).max() < 1.01 * step


@pytest.mark.parametrize("name", KERNELS)
def test_seeds_share_one_call_and_one_copy_of_the_weights(name: str) -> None:
    """Vmap over keys: the same numbers as one key at a time, from one kernel that is given the clean weights once."""
    spec = analog_spec(noise_scale=1.0, adc_bits=None, tile_rows=TILE_ROWS)
    clean, keys, x = jnp.asarray(weights(0)), jax.random.split(jax.random.key(4), 3), inputs()

    def one(key: jax.Array, x: Any) -> jax.Array:
        side = (SeededMatrix(key=key),)
        return products(x, (clean,), side, ROUTES["even"], spec, RANGES, ANALOG, name)[0]

    wanted = [one(key, (1 + n) * x) for n, key in enumerate(keys)]
    batch = jnp.stack([(1 + n) * x for n in range(3)])
    np.testing.assert_array_equal(jax.vmap(one)(keys, batch), jnp.stack(wanted))
    calls = [
        e for e in _equations(jax.make_jaxpr(jax.vmap(one))(keys, batch).jaxpr) if e.primitive.name == "pallas_call"
    ]
    assert len(calls) == 1
    shapes = [v.aval.shape for v in calls[0].invars]
    assert sum(len(s) == 3 and s[0] == EXPERTS and s[1] > ROWS for s in shapes) == 1  # not 3 * EXPERTS
    assert not any(len(s) == 3 and s[0] == 3 * EXPERTS and s[1] > ROWS for s in shapes)


def _equations(jaxpr: Any) -> list[Any]:
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += _equations(inner)
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_seeds_of_one_matrix_each_have_their_own_draws(name: str) -> None:
    """Blocks of one matrix follow each other: what one seed drew must not serve the next."""
    spec = analog_spec(noise_scale=1.0, dac_bits=None, adc_bits=None, tile_rows=TILE_ROWS)
    clean, keys, x = jnp.asarray(weights(0)[0]), jax.random.split(jax.random.key(4), 3), jnp.asarray(inputs())

    def one(key: jax.Array, implementation: str) -> jax.Array:
        return matrix_product(
            x, clean, SeededMatrix(key=key), analog=jnp.array(True), input_range=None, spec=spec, read=None,
            implementation=implementation,
        )  # fmt: skip

    found = jax.vmap(lambda key: one(key, name))(keys)
    for y, key in zip(found, keys, strict=True):
        wanted = np.asarray(one(key, "xla"))
        np.testing.assert_allclose(y, wanted, rtol=0, atol=8 * sum_error(ROWS) * np.abs(wanted).max())


@pytest.mark.parametrize("name", KERNELS)
def test_mapped_weights_plans_and_bounds_become_blocks(name: str) -> None:
    spec = analog_spec(adc_bound=2.0, tile_rows=TILE_ROWS)
    clean, x = jnp.asarray(weights(0)), inputs()
    noisy = jnp.stack([jnp.asarray(weights(seed)) for seed in (2, 3)])
    analog = jnp.stack([ANALOG, ~ANALOG])
    bounds = jnp.float32([2.0, 0.4])

    def one(w: Any, analog: Any, bound: Any) -> jax.Array:
        at = dataclasses.replace(spec, adc_bound=bound)
        return products(x, (clean,), (stored(w, spec),), ROUTES["even"], at, RANGES, analog, name)[0]

    found = jax.vmap(one)(noisy, analog, bounds)
    np.testing.assert_array_equal(found, jnp.stack([one(*item) for item in zip(noisy, analog, bounds, strict=True)]))
    only_plans = jax.vmap(one, in_axes=(None, 0, None))(noisy[0], analog, bounds[0])
    np.testing.assert_array_equal(only_plans[1], one(noisy[0], ~ANALOG, bounds[0]))


@pytest.mark.parametrize("name", KERNELS)
def test_plans_share_seeded_weights(name: str) -> None:
    """Blocks of one chip follow each other; what a digital one leaves unprogrammed must not serve the analog next."""
    spec = analog_spec(noise_scale=3.0, dac_bits=None, adc_bits=None, tile_rows=TILE_ROWS)
    clean, side, plans = weights(0), SeededMatrix(key=jax.random.key(4)), np.stack([~ANALOG, ANALOG, ANALOG])

    def one(analog: Any, implementation: str) -> jax.Array:
        return products(inputs(), (clean,), (side,), ROUTES["even"], spec, None, analog, implementation)[0]

    found = jax.vmap(lambda analog: one(analog, name))(plans)
    for y, analog in zip(found, plans, strict=True):
        wanted = np.asarray(one(analog, "xla"))
        np.testing.assert_allclose(y, wanted, rtol=0, atol=8 * sum_error(ROWS) * np.abs(wanted).max())


def few_differ(found: Any, wanted: Any) -> bool:
    """Beyond rounding; a sum at a code's boundary, or at an ADC's bound, goes to either side."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    return found.shape == wanted.shape and bool(
        (~(np.abs(found - wanted) <= 2e-5 * np.abs(wanted).max())).mean() < 0.01
    )


@pytest.mark.parametrize("is_seeded", [False, True], ids=["stored", "seeded"])
@pytest.mark.parametrize("name", KERNELS)
def test_stripes_of_columns_and_groups_of_blocks(
    name: str, monkeypatch: pytest.MonkeyPatch, *, is_seeded: bool
) -> None:
    """Products and gradients where the grids have several of each: 300 columns, and room for the sums of 2 blocks."""
    columns, bytes_each = 300, 16 * 128 * 4  # of a block's sums: a stripe of columns, and a packed tile of rows
    # No other test has as many columns, so that every kernel is made under the smaller limit.
    monkeypatch.setattr(pallas_tpu, "SUM_BYTES", 2 * bytes_each)
    assert pallas_tpu.group_size(6, bytes_each) == 2
    # Blocks are of experts 0, 0, 1, 2, 2, 3: no group repeats what the one before has.
    chosen, analog = np.repeat(np.arange(EXPERTS), [17, 4, 17, 2]), np.array([True, False, False, True])
    assert dispatch(jnp.asarray(chosen[:, None], jnp.int32), EXPERTS, 16).block_expert.tolist() == [0, 0, 1, 2, 2, 3]
    spec = analog_spec("additive", noise_scale=3.0, adc_bound=0.5, bound_axis="column", tile_rows=TILE_ROWS)
    clean, seeded = jnp.asarray(weights(0, columns)), SeededMatrix(key=jax.random.key(2))
    # Gradients take programming noise as a constant.
    kept = jax.jit(realise)(seeded, clean, spec) if is_seeded else stored(weights(2, columns), spec)
    cotangent = jnp.asarray(np.random.default_rng(7).standard_normal((TOKENS, columns)), jnp.float32)

    def run(implementation: str) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """(products, gradient of the rows, those of the clean and of stored weights)."""
        is_drawn = is_seeded and implementation != "xla"

        def of(x: Any, clean: Any, programmed: Any) -> jax.Array:
            side = seeded if is_drawn else kept.replace(w=programmed)
            return products(x, (clean,), (side,), chosen, spec, RANGES, analog, implementation)[0]

        y, pull = jax.vjp(of, jnp.asarray(inputs()), clean, kept.w)
        dx, *dw = pull(cotangent)
        return y, dx, (dw[0] + dw[1],) if is_seeded else tuple(dw)

    found, wanted = (jax.jit(run, static_argnums=0)(implementation) for implementation in (name, "xla"))
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert few_differ(leaf, expected)


def assert_ties_go_to_even(name: str) -> None:
    """Inputs halfway between two codes, of steps of 1: a range of 127."""
    x = (np.random.default_rng(9).integers(-100, 100, (TOKENS, ROWS)) + 0.5).astype(np.float32)
    spec = analog_spec(adc_bits=None, tile_rows=TILE_ROWS)
    ranges, chosen = np.full((EXPERTS, 3), 127.0, np.float32), ROUTES["even"]
    (y,) = products(x, (weights(0),), (stored(weights(2), spec),), chosen, spec, ranges, ANALOG, name)
    assert np.array_equal(np.round(x), 2 * np.round(x / 2))
    for expert in np.flatnonzero(ANALOG):
        rows, options = chosen == expert, dataclasses.asdict(spec.options)
        wanted = expectation(x[rows], weights(2)[expert], **options, adc_bound=12.0, input_range=ranges[expert])
        assert_matches(np.asarray(y)[rows], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_ties_go_to_even(name: str) -> None:
    assert_ties_go_to_even(name)


def assert_battery_passes(name: str) -> None:
    spec = analog_spec(adc_bound=0.5, tile_rows=TILE_ROWS)
    assert_is_expected(run(name, spec), spec, ROUTES["even"], RANGES)


def next_matrix(tables: Tables) -> Tables:
    return dataclasses.replace(tables, programmed=(tables.programmed + 1) % EXPERTS)


def next_chip(tables: Tables) -> Tables:
    return dataclasses.replace(tables, chip=(tables.chip + 1) % EXPERTS)


def next_tile(matrix: Matrix) -> Matrix:
    assert matrix.chip is not None
    maxima = jnp.roll(matrix.chip.weight_max, 1, axis=1)
    return dataclasses.replace(matrix, chip=dataclasses.replace(matrix.chip, weight_max=maxima))


def then(function: Any, change: Any) -> Any:
    return lambda *given: change(function(*given))


# What is replaced, by what, and which of the checks must notice; the GPU's kernel has clipping and rounding of its own.
BREAKS: dict[str, tuple[tuple[Any, ...], str, Any, Any]] = {
    "rounding": (
        (kernel_math, pallas_triton),
        "round_half_even",
        lambda x: jnp.floor(x + 0.5) + jnp.where(x > 1000.5, 1.0, 0.0) + 1.0,
        assert_battery_passes,
    ),
    "ties_up": (
        (kernel_math, pallas_triton),
        "round_half_even",
        lambda x: jnp.floor(x + 0.5),
        assert_ties_go_to_even,
    ),
    "clipping": ((kernel_math, pallas_triton), "clip", lambda x, bound, **_: x, assert_battery_passes),  # noqa: ARG005
    "step": ((kernel_math,), "step_size", lambda bound, bits: 2.0 * bound / (2**bits - 1), assert_battery_passes),
    "matrix_of_another_expert": ((api,), "make_tables", then(api.make_tables, next_matrix), assert_battery_passes),
    "chip_of_another_expert": ((api,), "make_tables", then(api.make_tables, next_chip), assert_battery_passes),
    "maximum_of_another_tile": ((pallas,), "pack_matrix", then(pallas.pack_matrix, next_tile), assert_battery_passes),
}


@pytest.fixture
def uncached() -> Iterator[None]:
    """Compiles anew what a test changes, and again behind it."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_perturbed_kernel_fails(name: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, attribute, replacement, check = BREAKS[broken]
    for module in modules:
        monkeypatch.setattr(module, attribute, replacement)
    with pytest.raises(AssertionError, match="elements differ"):
        check(name)
