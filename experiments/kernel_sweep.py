"""Times the kernels' products over block sizes, for `bench_kernels.py --sweep-blocks`.

What is fastest belongs in `hetmoe/ops/grouped_crossbar/block_sizes.py`.
"""

import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import hetmoe
from hetmoe.analog.tiles import block_max
from hetmoe.ops.grouped_crossbar.api import IMPLEMENTATIONS
from hetmoe.ops.grouped_crossbar.block_sizes import ROWS, BlockSizes, Platform, rows_per_block
from hetmoe.ops.grouped_crossbar.blocks import Chip, Matrix, Tables
from hetmoe.ops.grouped_crossbar.operands import make_tables
from hetmoe.ops.grouped_crossbar.pallas import crossbar_blocks
from hetmoe.ops.grouped_crossbar.shape import Static
from kernel_cases import Program, make_experts, normal, random_routing, tile_ranges
from kernel_work import Sizes

CUDA = [
    BlockSizes(columns=columns, chunk=chunk, warps=warps, stages=stages, apart=True)
    for columns in (64, 128)
    for chunk in (32, 64)
    for warps, stages in ((4, 3), (8, 3), (8, 4))
]
TPU = [BlockSizes(columns=columns, chunk=chunk) for columns in (128, 256, 512) for chunk in (128, 256, 512)]
ALTERNATIVES: dict[Platform, list[BlockSizes]] = {"cuda": CUDA, "tpu": TPU}

SWEPT = ("crossbar", "grouped", "decode")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One product with explicit sizes; `sizes` None is the table's choice."""

    case: str
    product: str
    rows: int
    sizes: BlockSizes | None
    program: Program


def candidates(cases: list[str], sizes: Sizes, implementation: str) -> Generator[Candidate]:
    """Products of the cases, each with the table's sizes first; rows of a block next to the table's are tried too."""
    platform: Platform = IMPLEMENTATIONS[implementation] or ("tpu" if jax.default_backend() == "tpu" else "cuda")
    c = sizes.config
    for case in cases:
        tokens = {"grouped": sizes.tokens, "decode": sizes.decode_tokens}.get(case)
        chosen = None if tokens is None else random_routing(sizes, tokens)
        default = rows_per_block(sizes.side, 1) if chosen is None else rows_per_block(chosen.size, c.num_experts)
        near = ROWS.index(default)
        for rows in dict.fromkeys((default, *ROWS[max(near - 1, 0) : near + 2])):
            for product, operands in _products(sizes, chosen, rows).items():
                for choice in (None, *ALTERNATIVES[platform]):
                    yield Candidate(case, product, rows, choice, _program(operands, choice, implementation))


def _products(sizes: Sizes, chosen: np.ndarray | None, rows: int) -> dict[str, tuple[Array, Tables, Any]]:
    """Operands of `crossbar_blocks` by product: those that share their inputs are one."""
    spec = hetmoe.analog_spec()

    def tables(groups: Array, used: Array, count: int, inputs: int) -> Tables:
        return make_tables(groups, used, jnp.ones((count,), bool), tile_ranges(spec, inputs, count), spec.adc_bound)

    if chosen is None:
        x = normal(0, sizes.side // rows, rows, sizes.side)
        w = normal(1, 1, sizes.side, sizes.side, scale=0.02)
        maxima = block_max(w[0], spec.options.tile_rows, per_column=False)[None]
        of = tables(jnp.zeros((len(x),), jnp.int32), jnp.ones((len(x),), bool), 1, sizes.side)
        return {"matmul": (x, of, (Matrix(clean=None, programmed=w, chip=Chip(weight_max=maxima, noise=None)),))}
    o = make_experts(sizes, chosen, rows)

    def matrix(name: str) -> Matrix:
        chip = Chip(weight_max=getattr(o.maxima, name), noise=None)
        return Matrix(clean=None, programmed=getattr(o.programmed, name), chip=chip)

    def product(x: Array, *names: str) -> tuple[Array, Tables, Any]:
        count, inputs = o.clean.gate.shape[0], x.shape[2]
        return x, tables(o.block_expert, o.used, count, inputs), tuple(matrix(name) for name in names)

    return {"gate+up": product(o.x, "gate", "up"), "down": product(o.mid, "down")}


def _program(operands: tuple[Array, Tables, Any], choice: BlockSizes | None, implementation: str) -> Program:
    options = hetmoe.analog_spec().options
    static = Static(options=options, device=None, interpret=IMPLEMENTATIONS[implementation], sizes=choice)
    return Program(lambda x, tables, matrices: crossbar_blocks(x, tables, matrices, static), operands)
