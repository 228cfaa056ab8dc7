"""Grids, weights and float64 arithmetic that the tests of the quantisers share."""

import itertools

import numpy as np

from hetmoe.quantize.grid import BITS, GROUPS, Grid

# Every bits with either zero, and every group. (Each grid is compiled once for each shape of weights.)
ALL_GRIDS = [
    Grid(bits=bits, group=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product(BITS, GROUPS, [True, False])
    if group == 32 or bits == 3
]

# Fewer, for what takes longer to compile: every bits, zero and group is among them.
SOME_GRIDS = [
    Grid(bits=1, group=32, symmetric=True),
    Grid(bits=2, group=64, symmetric=False),
    Grid(bits=3, group=128, symmetric=True),
    Grid(bits=4, group=32, symmetric=False),
    Grid(bits=8, group=64, symmetric=True),
]


def grid_name(grid):
    return f"{grid.bits}bit-{grid.group}-{'symmetric' if grid.symmetric else 'asymmetric'}"


def heavy_tailed(seed, *shape, size=0.05):
    return (np.random.default_rng(seed).standard_t(3, size=shape) * size).astype(np.float32)


def per_weight(values, grid):
    """Steps or zeros of groups `[..., groups, N]` for every weight, float64."""
    return np.repeat(np.asarray(values, np.float64), grid.group, axis=-2)


def steps_and_zeros(quantized):
    """Of every weight, float64."""
    grid = quantized.grid
    step = per_weight(quantized.scale, grid)
    middle = np.full_like(step, (2**grid.bits - 1) / 2)
    return step, middle if quantized.zero is None else per_weight(quantized.zero, grid)


def values_of(quantized):
    """The weights that codes stand for, float64."""
    step, zero = steps_and_zeros(quantized)
    return (np.asarray(quantized.codes, np.float64) - zero) * step


def slack(grid):
    """By how much, in steps, rounding in float32 may move the place where a weight changes its code, or its distance.

    A weight is at most 2**bits steps from 0. Dividing by the step and adding the zero round to 2**-24 of that each, and
    so do the stored level and the smallest step before it is rounded up.
    """
    return 4 * 2.0 ** (grid.bits - 24)
