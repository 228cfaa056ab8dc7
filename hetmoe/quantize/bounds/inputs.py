"""What bounds refuse: other dtypes than float64, axes and widths that do not fit, values that are not finite.

Bounds are calculated in the dtype of what they are given: squares of int8 or float16 would overflow or vanish in it.
"""

import numpy as np

from hetmoe.errors import InputError


def check_float64(name: str, values: np.ndarray) -> None:
    """Raises InputError unless it is a numpy array of float64."""
    if not isinstance(values, np.ndarray) or values.dtype != np.float64:
        kind = getattr(values, "dtype", type(values).__name__)
        raise InputError(f"{name} is {kind}: bounds take float64 arrays, np.asarray({name}, np.float64)")


def check_sizes(name: str, values: np.ndarray, tokens: int) -> None:
    """Raises InputError unless there is one number for each token, of at least 0 (infinity is one)."""
    check_float64(name, values)
    if values.shape != (tokens,):
        raise InputError(f"{name} has shape {list(values.shape)}: it must be [{tokens}], one for each token")
    if not (values >= 0).all():
        raise InputError(f"{name}[{int(np.argmin(values >= 0))}] is {values[~(values >= 0)][0]}: it must be at least 0")


def check_finite(name: str, values: np.ndarray, axes: str) -> None:
    """Raises InputError unless an array is float64, and has these axes (`"K N"`) and finite numbers only."""
    check_float64(name, values)
    found = np.shape(values)
    if len(found) != len(axes.split()):
        raise InputError(f"{name} has shape {list(found)}: it must be [{', '.join(axes.split())}]")
    if not np.isfinite(values).all():
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise InputError(f"{name}{place} is {values[tuple(place)]}: bounds take finite numbers only")


def check_inputs(x: np.ndarray, rows: int) -> None:
    """Raises InputError unless inputs are finite `[tokens, rows]`."""
    check_finite("x", x, "tokens K")
    if x.shape[1] != rows:
        raise InputError(f"x has {x.shape[1]} columns, but the matrix {rows} rows: x[tokens, K] @ w[K, N]")


def check_network(**matrices: np.ndarray) -> None:
    """Raises InputError unless matrices are finite, the first ones of one shape, and the last one fits behind them."""
    for name, matrix in matrices.items():
        check_finite(name, matrix, "K N")
    (first, *same), (last_name, last) = list(matrices.items())[:-1], list(matrices.items())[-1]
    for name, matrix in same:
        if matrix.shape != first[1].shape:
            raise InputError(f"{name} has shape {list(matrix.shape)}, but {first[0]} {list(first[1].shape)}")
    if last.shape[0] != first[1].shape[1]:
        raise InputError(f"{last_name} has {last.shape[0]} rows, but {first[0]} {first[1].shape[1]} neurons (columns)")


def check_same_shape(name: str, values: np.ndarray, like: str, matrix: np.ndarray) -> None:
    """Raises InputError unless two arrays have one shape."""
    if values.shape != matrix.shape:
        raise InputError(f"{name} has shape {list(values.shape)}, but {like} {list(matrix.shape)}")
