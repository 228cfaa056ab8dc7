"""Kernels for packed weights are accepted by the compilers' front ends for TPU and NVIDIA GPU, at real sizes."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hetmoe.analog.programming import ProgrammedMatrix
from hetmoe.analog.spec import analog_spec
from hetmoe.ops.dispatch import dispatch, to_blocks
from hetmoe.ops.grouped_crossbar.api import digital_products, expert_products
from hetmoe.ops.grouped_crossbar.block_sizes import rows_per_block
from hetmoe.ops.grouped_quantized import triton_codes
from hetmoe.quantize.grid import BITS, GROUPS, Grid
from hetmoe.quantize.mixed import MixedMatrix, Places
from hetmoe.quantize.packed import PLANES, Packed
from tests.ops.test_kernel_lowering import EXPERTS, MODELS, PLATFORMS, Shape, lowered


def abstract_matrix(grids: list[Grid], rows: int, columns: int, *, dtype: Any = None) -> MixedMatrix:
    """As many matrices in each pool as there are experts; `dtype` is that of one more pool, not quantized."""

    def pool(grid: Grid) -> Packed:
        values = Shape((EXPERTS, rows // grid.group, columns), jnp.float16)
        planes = tuple(Shape((EXPERTS, rows * bits // 8, columns), jnp.uint8) for bits in PLANES[grid.bits])
        return Packed(planes=planes, scale=values, zero=None if grid.symmetric else values, grid=grid)

    pools = [*map(pool, grids), *([] if dtype is None else [Shape((EXPERTS, rows, columns), dtype)])]
    place = Shape((EXPERTS,), jnp.int32)
    return MixedMatrix(pools=tuple(pools), places=Places(pool=place, slot=place))


def products(x: Any, mid: Any, matrices: Any, chosen: Any, multiply: Any = digital_products) -> tuple[jax.Array, ...]:
    """Gate and up of `x`, down of `mid`."""
    plan = dispatch(chosen, EXPERTS, rows_per_block(chosen.size, EXPERTS))
    used = jnp.ones(plan.block_expert.shape, bool)
    run = functools.partial(multiply, block_expert=plan.block_expert, used=used, implementation="pallas")
    return (*run(to_blocks(x, plan), matrices[:2]), *run(to_blocks(mid, plan), matrices[2:]))


def layer(model: str, tokens: int, dtype: Any, grids: list[Grid], float_pool: Any = None) -> tuple[Any, ...]:
    hidden, inner, copies = MODELS[model]
    shapes = [(hidden, inner), (hidden, inner), (inner, hidden)]
    matrices = tuple(abstract_matrix(grids, *shape, dtype=float_pool) for shape in shapes)
    return Shape((tokens, hidden), dtype), Shape((tokens, inner), dtype), matrices, Shape((tokens, copies), jnp.int32)


def calls(given: tuple[Any, ...], platform: str) -> int:
    """One for each pool of each matrix, but gate and up share those that multiply codes."""
    x, _, (gate, *_), chosen = given
    rows = Shape((1, rows_per_block(chosen.size, EXPERTS), x.shape[1]), x.dtype)
    shared = [
        platform == "cuda" and isinstance(pool, Packed) and triton_codes.serves(rows, pool) for pool in gate.pools
    ]
    return sum(2 if is_shared else 3 for is_shared in shared)


SIZES = [
    ("olmoe", 32, jnp.bfloat16),
    *(
        pytest.param(*given, marks=pytest.mark.slow)
        for given in (("olmoe", 4096, jnp.float32), ("deepseek", 500, jnp.bfloat16))
    ),
]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("model", "tokens", "dtype"), SIZES)
def test_layers_of_real_models(model: str, tokens: int, dtype: Any, bits: int, platform: str) -> None:
    """As few calls as possible, forward and in gradients, and no copy of the weights."""
    grid = Grid(bits=bits, group=64 if model == "olmoe" else 128, symmetric=tokens == 4096)
    given = layer(model, tokens, dtype, [grid])
    text = lowered(products, platform, *given)
    assert text.count(PLATFORMS[platform]) == calls(given, platform)
    assert not re.search(
        rf"stablehlo\.(pad|concatenate|convert|transpose|gather) .*<{EXPERTS}x\d+x\d+x(ui8|f16)>", text
    )

    def loss(x: Any, mid: Any, matrices: Any, chosen: Any) -> jax.Array:
        return sum((jnp.sum(jnp.sin(y)) for y in products(x, mid, matrices, chosen)), jnp.float32(0))

    assert lowered(jax.grad(loss, argnums=(0, 1)), platform, *given).count(PLATFORMS[platform]) == calls(
        given, platform
    )


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("bits", "group"), [((3,), 32), *(pytest.param(BITS, group, marks=pytest.mark.slow) for group in GROUPS)]
)
def test_experts_at_several_precisions_and_seeds(bits: tuple[int, ...], group: int, platform: str) -> None:
    """One of the pools is not quantized; a mapped axis adds no call."""
    grids = [Grid(bits=b, group=group, symmetric=b == 2) for b in bits]
    x, mid, matrices, chosen = given = layer("olmoe", 32, jnp.bfloat16, grids, jnp.bfloat16)
    count = calls(given, platform)
    assert lowered(products, platform, *given).count(PLATFORMS[platform]) == count
    seeds = tuple(Shape((8, *rows.shape), rows.dtype) for rows in (x, mid))
    mapped = jax.vmap(products, in_axes=(0, 0, None, None))
    assert lowered(mapped, platform, *seeds, matrices, chosen).count(PLATFORMS[platform]) == count


@pytest.mark.parametrize("platform", PLATFORMS)
def test_analog_experts_beside_quantized_ones(platform: str) -> None:
    spec, grid = analog_spec(), Grid(bits=3, group=64, symmetric=False)
    x, mid, matrices, chosen = layer("olmoe", 32, jnp.bfloat16, [grid], jnp.bfloat16)
    sides = tuple(
        ProgrammedMatrix(
            w=MixedMatrix(pools=matrix.pools[-1:], places=matrix.places),
            weight_max=Shape((EXPERTS, -(-matrix.shape[1] // 512), 1), jnp.float32),
        )
        for matrix in matrices
    )

    def run(x: Any, mid: Any, matrices: Any, sides: Any, chosen: Any, analog: Any) -> tuple[jax.Array, ...]:
        def multiply(rows: Any, clean: Any, **blocks: Any) -> tuple[jax.Array, ...]:
            own = sides[:2] if len(clean) == 2 else sides[2:]
            return expert_products(
                rows, clean, own, analog=analog, input_range=None, spec=spec, read=(None,) * len(clean), **blocks
            )

        return products(x, mid, matrices, chosen, multiply)

    text = lowered(run, platform, x, mid, matrices, sides, chosen, Shape((EXPERTS,), bool))
    assert text.count(PLATFORMS[platform]) == calls((x, mid, matrices, chosen), platform) + 3  # and the analog ones


def test_other_platforms_are_refused() -> None:
    given = layer("olmoe", 32, jnp.bfloat16, [Grid(bits=4, group=64, symmetric=True)])
    with pytest.raises(NotImplementedError, match="runs on TPU and NVIDIA GPU"):
        lowered(products, "cpu", *given)
