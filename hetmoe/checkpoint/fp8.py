"""Block-wise FP8 weights (DeepSeek-V3, arXiv 2412.19437, 3.3): one float32 scale per block of the stored matrix."""

import math

import numpy as np

SUFFIX = "_scale_inv"  # of the key that holds the scales; a weight is its FP8 value times the scale


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a tensor `[..., rows, columns]`; blocks at the edges may be partial."""
    return (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))


def dequantize(values: np.ndarray, scales: np.ndarray, block: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """`values * scale`, in float32 and then rounded to `dtype`, one row of blocks at a time.

    Args:
        values: float8_e4m3fn `[rows, columns]`.
        scales: float32 `[row blocks, column blocks]`.
        block: rows and columns of a block.
        dtype: of the result.
    """
    out = np.empty(values.shape, dtype)
    for number, scale in enumerate(scales):
        rows = slice(number * block[0], (number + 1) * block[0])
        wide = np.repeat(scale.astype(np.float32), block[1])[: values.shape[1]]
        out[rows] = (values[rows].astype(np.float32) * wide).astype(dtype)
    return out
