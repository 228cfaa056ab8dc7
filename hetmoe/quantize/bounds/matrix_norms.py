"""Norms of matrices from above."""

import numpy as np
from jaxtyping import Float64

from hetmoe.quantize.bounds.rounding import MARGIN, UNIT

Array = np.ndarray


def spectral_norm(w: Float64[Array, "K N"]) -> float:
    """An upper bound of the largest singular value, beyond it by about 1e-9 of it.

    The least of three: the root of the largest eigenvalue of the smaller Gram matrix, with what rounding may have taken
    from it; the Frobenius norm; and `sqrt(|w|_1 |w|_inf)` (Hoelder's inequality for operator norms).
    """
    if not w.size:
        return 0.0
    size = np.abs(w)
    squared = float(np.sum(np.square(w)))
    hoelder = float(size.sum(axis=0).max() * size.sum(axis=1).max())
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    # The product is off by at most K u |w|_F^2 in norm, the symmetric eigenvalue solver, which is backward stable, by a
    # small multiple of n u times the matrix's norm: 16 n is far above what LAPACK's is known to need.
    lost = (max(w.shape) + 16 * len(gram)) * UNIT * squared
    largest = float(np.linalg.eigvalsh(gram)[-1]) + lost
    return float(np.sqrt(min(largest, squared, hoelder))) * MARGIN


def column_norms(w: Float64[Array, "K N"]) -> Float64[Array, "N"]:
    """Euclidean norms of columns, from above."""
    return np.sqrt(np.sum(np.square(w), axis=0)) * MARGIN


def stacked_spectral_norms(w: Float64[Array, "count K N"]) -> Float64[Array, "count"]:
    """Upper bounds of many small matrices' largest singular values, by products alone.

    The Schatten norm of order 8, `(sum s_i^8)^(1/8) = |(w^T w)^2|_F^(1/4)`: at most `min(K, N)^(1/8)` too large.
    """
    # Relative to the largest entry: 8th powers of tiny ones would be 0.
    unit = np.max(np.abs(w), axis=(1, 2))
    w = w / np.where(unit > 0, unit, 1)[:, None, None]
    gram = w @ np.swapaxes(w, 1, 2) if w.shape[1] <= w.shape[2] else np.swapaxes(w, 1, 2) @ w
    # Entries of the products are off by at most a few n u of the product of two Frobenius norms.
    squared = np.sum(np.square(w), axis=(1, 2))
    lost = 8 * max(w.shape[1:]) * gram.shape[1] * UNIT
    fourth = np.sqrt(np.sum(np.square(gram @ gram), axis=(1, 2))) + lost * np.square(squared)
    return np.sqrt(np.minimum(np.sqrt(fourth), squared)) * unit * MARGIN
