"""Products of rows with programmed matrices: by expert, or of all rows with one matrix; dispatch by name."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.programming import ProgrammedMatrix, SeededMatrix, realise
from hetmoe.analog.read_noise import ReadDraw
from hetmoe.analog.spec import AnalogSpec
from hetmoe.ops.crossbar_matmul import xla as crossbar_xla
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.grouped_crossbar import xla
from hetmoe.ops.grouped_crossbar.block_sizes import BLOCKS_MULTIPLE, rows_per_block
from hetmoe.ops.grouped_crossbar.blocks import Chip, Matrix
from hetmoe.ops.grouped_crossbar.digital import digital_blocks
from hetmoe.ops.grouped_crossbar.operands import make_matrix, make_tables
from hetmoe.ops.grouped_crossbar.packing import pad_axis, round_up
from hetmoe.ops.grouped_crossbar.pallas import crossbar_blocks
from hetmoe.ops.grouped_crossbar.shape import Static
from hetmoe.ops.grouped_matmul.xla import grouped_matmul
from hetmoe.ops.grouped_quantized.by_pool import pool_products
from hetmoe.ops.grouped_quantized.xla import quantized_products
from hetmoe.parallel.shard import WHOLE, Shard
from hetmoe.quantize.mixed import MixedMatrix, is_mixed, unquantized

Read = ReadDraw | None

# What `implementation=` may name, and the platform whose kernel is run operation by operation, for checks without it.
IMPLEMENTATIONS: dict[str, Any] = {"xla": None, "pallas": None, "interpret_tpu": "tpu", "interpret_cuda": "cuda"}


def check_implementation(name: str | None) -> str:
    """The implementation to run; None is `"xla"`, since the kernels have not been run on a device yet.

    Raises:
        NotImplementedError: for a name that does not exist.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise NotImplementedError(
            f"implementation={name!r} does not exist here; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    return name or "xla"


def expert_products(
    x: Float[Array, "blocks block K"],
    clean: tuple[Any, ...],
    analog_side: tuple[ProgrammedMatrix | SeededMatrix, ...],
    *,
    block_expert: Int[Array, "blocks"],
    used: Bool[Array, "blocks"],
    analog: Bool[Array, "experts"],
    input_range: Float[Array, "experts tiles"] | None,
    spec: AnalogSpec,
    read: tuple[Read, ...],
    implementation: str | None,
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "blocks block N"], ...]:
    """Every block of rows times the matrices of its expert, which share the converted rows; float32.

    Args:
        x: token blocks (`hetmoe.ops.dispatch`).
        clean: weights of digital experts, `[experts, K, N]`, all arrays or all `MixedMatrix`.
        analog_side: of analog ones.
        block_expert: expert of each block.
        used: False for blocks that hold only padding; their results mean nothing.
        analog: which experts are on crossbars.
        input_range: DAC range per expert and row-block; None = dynamic.
        spec: device and converters.
        read: per-product noise of each matrix, rows numbered `[blocks, block]`, or None.
        implementation: a name of `IMPLEMENTATIONS`, or None.
        shard: which experts and columns the weights are.

    Raises:
        NotImplementedError: if the named implementation cannot run this.
    """
    name = check_implementation(implementation)
    if is_mixed(clean[0]):
        return _mixed_products(x, clean, analog_side, block_expert, used, analog, input_range, spec, read, name)
    if name == "xla":
        results: list[Array] = []
        for w, side, noise in zip(clean, analog_side, read, strict=True):
            programmed = realise(side, w, spec, shard=shard)
            # Selected per expert, around one matmul: under vmap a `lax.cond` would compute both sides.
            chosen = jnp.where(analog[:, None, None], programmed.w, w)
            product = xla.grouped_crossbar(
                x, chosen, block_expert, used, analog, input_range, spec.adc_bound, programmed.weight_max, spec.options,
                noise, stored=block_expert,
            )  # fmt: skip
            results.append(product)
        return tuple(results)
    refuse_read(read, name)
    _refuse_drawing(analog_side, shard)
    tables = make_tables(block_expert, used, analog, input_range, spec.adc_bound)
    matrices = tuple(make_matrix(w, side, spec) for w, side in zip(clean, analog_side, strict=True))
    return crossbar_blocks(x, tables, matrices, _static(spec, name))


def _mixed_products(
    x: Array,
    clean: tuple[MixedMatrix, ...],
    analog_side: tuple[ProgrammedMatrix | SeededMatrix, ...],
    block_expert: Array,
    used: Array,
    analog: Array,
    input_range: Array | None,
    spec: AnalogSpec,
    read: tuple[Read, ...],
    name: str,
) -> tuple[Array, ...]:
    """As `expert_products` where digital experts may be quantized: NaN where those are on crossbars."""
    for side in analog_side:
        if isinstance(side, SeededMatrix):
            raise NotImplementedError("beside quantized experts, programmed weights must be stored: use program()")
    if name != "xla":
        refuse_read(read, name)
    on_crossbar = analog[block_expert]
    digital = _quantized_products(x, clean, block_expert, used & ~on_crossbar, name)
    results: list[Array] = []
    for w, side, noise, plain in zip(clean, analog_side, read, digital, strict=True):
        programmed: Any = side
        stored, slot = programmed.w.pools[0], programmed.w.places.slot[block_expert]
        if name == "xla":
            product = xla.grouped_crossbar(
                x, stored, block_expert, used & on_crossbar, analog, input_range, spec.adc_bound,
                programmed.weight_max, spec.options, noise, stored=slot,
            )  # fmt: skip
        else:
            tables = make_tables(block_expert, used & on_crossbar, analog, input_range, spec.adc_bound)
            matrix = Matrix(clean=None, programmed=stored, chip=Chip(weight_max=programmed.weight_max, noise=None))
            at = dataclasses.replace(tables, programmed=slot)
            found: tuple[Array, ...] = crossbar_blocks(x, at, (matrix,), _static(spec, name))
            product = found[0]
        product = jnp.where(unquantized(w)[1][block_expert][:, None, None], product, jnp.nan)
        results.append(jnp.where(on_crossbar[:, None, None], product, plain))
    return tuple(results)


def _quantized_products(
    x: Array, matrices: tuple[MixedMatrix, ...], block_expert: Array, used: Array, name: str
) -> tuple[Array, ...]:
    if name == "xla":
        return quantized_products(x, matrices, block_expert, used)
    return pool_products(x, matrices, block_expert, used, IMPLEMENTATIONS[name])


def digital_products(
    x: Float[Array, "blocks block K"],
    weights: tuple[Any, ...],
    *,
    block_expert: Int[Array, "blocks"],
    used: Bool[Array, "blocks"],
    implementation: str | None,
) -> tuple[Float[Array, "blocks block N"], ...]:
    """Every block of rows times matrices of its expert where none is on a crossbar; float32.

    Args:
        x: token blocks (`hetmoe.ops.dispatch`).
        weights: of the matrices that share the rows, `[experts, K, N]`, all arrays or all `MixedMatrix`.
        block_expert: expert of each block.
        used: False for blocks that hold only padding; their results mean nothing.
        implementation: a name of `IMPLEMENTATIONS`, or None.

    Raises:
        NotImplementedError: if the named implementation cannot run this.
    """
    name = check_implementation(implementation)
    if is_mixed(weights[0]):
        return _quantized_products(x, weights, block_expert, used, name)
    if name == "xla":
        return tuple(grouped_matmul(x, w, block_expert, used) for w in weights)
    return digital_blocks(x, weights, block_expert, used, IMPLEMENTATIONS[name])


def matrix_product(
    x: Float[Array, "rows K"],
    clean: Float[Array, "K N"],
    analog_side: ProgrammedMatrix | SeededMatrix,
    *,
    analog: Bool[Array, ""],
    input_range: Float[Array, "tiles"] | None,
    spec: AnalogSpec,
    read: Read,
    implementation: str | None,
    shard: Shard = WHOLE,
) -> Float[Array, "rows N"]:
    """All rows times one matrix, by programmed weights through converters where the scalar `analog` is True; float32.

    Raises:
        NotImplementedError: if the named implementation cannot run this.
    """
    name = check_implementation(implementation)
    if name == "xla":
        programmed = realise(analog_side, clean, spec, shard=shard)
        chosen = jnp.where(analog, programmed.w, clean)
        return crossbar_xla.crossbar_matmul(
            x, chosen, input_range, spec.adc_bound, programmed.weight_max, spec.options, analog.reshape(1, 1), read
        )
    refuse_read((read,), name)
    _refuse_drawing((analog_side,), shard)
    if isinstance(analog_side, ProgrammedMatrix):
        analog_side = ProgrammedMatrix(w=analog_side.w[None], weight_max=analog_side.weight_max[None])
    ranges = None if input_range is None else input_range[None]
    matrix = make_matrix(clean[None], analog_side, spec)
    return _in_blocks(x, matrix, analog.reshape(1), ranges, spec.adc_bound, _static(spec, name))


def programmed_product(
    x: Float[Array, "rows K"],
    w: Float[Array, "K N"],
    input_range: Float[Array, "tiles"] | None,
    adc_bound: Float[Array, ""],
    weight_max: Float[Array, "tiles columns"],
    options: CrossbarOptions,
    name: str,
) -> Float[Array, "rows N"]:
    """All rows times weights as they are on the crossbar, by a kernel; float32."""
    matrix = Matrix(clean=None, programmed=w[None], chip=Chip(weight_max=weight_max[None], noise=None))
    ranges = None if input_range is None else input_range[None]
    static = Static(options=options, device=None, interpret=IMPLEMENTATIONS[name])
    return _in_blocks(x, matrix, jnp.ones((1,), bool), ranges, adc_bound, static)


def _in_blocks(
    x: Array, matrix: Matrix, analog: Array, ranges: Array | None, adc_bound: Array, static: Static
) -> Array:
    rows = x.shape[0]
    block = rows_per_block(rows, 1)
    multiple = block if rows <= block * BLOCKS_MULTIPLE else block * BLOCKS_MULTIPLE
    blocks = pad_axis(x, round_up(max(rows, 1), multiple), 0).reshape(-1, block, x.shape[1])
    count = blocks.shape[0]
    group, used = jnp.zeros((count,), jnp.int32), jnp.arange(count) * block < rows
    tables = make_tables(group, used, analog, ranges, adc_bound)
    results: tuple[Array, ...] = crossbar_blocks(blocks, tables, (matrix,), static)
    return results[0].reshape(-1, results[0].shape[2])[:rows]


def _static(spec: AnalogSpec, name: str) -> Static:
    return Static(options=spec.options, device=spec.device, interpret=IMPLEMENTATIONS[name])


def _refuse_drawing(sides: tuple[ProgrammedMatrix | SeededMatrix, ...], shard: Shard) -> None:
    """Kernels that draw noise number experts and columns from 0."""
    if shard.expert * shard.tensor > 1 and any(isinstance(side, SeededMatrix) for side in sides):
        raise NotImplementedError(
            "kernels do not program weights where a mesh cuts experts or columns: use weights 'layer' or 'stored', or "
            "the mesh axes data and seed only"
        )


def refuse_read(read: tuple[Read, ...], name: str) -> None:
    """Raises NotImplementedError: no kernel draws read noise."""
    if any(noise is not None for noise in read):
        raise NotImplementedError(
            f"implementation={name!r} has no read noise: it is drawn for every product of every token; use "
            "implementation='xla'"
        )
