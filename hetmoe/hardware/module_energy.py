"""Energy that one module alone takes per token, digital or analog: what a budget of energy adds up.

The estimate of a whole step (`hetmoe.hardware.estimate`) is not a sum over modules: modules share roofs, transfers and
waiting. These energies leave out what no single module decides (attention over the cache, link, idle power).
"""

import math

import numpy as np

from hetmoe.hardware.description import Description
from hetmoe.hardware.shapes import ModuleShape


def digital_energy(
    weights: int, stored_bytes: np.ndarray | float, share: np.ndarray | float, batch: int, digital: Description
) -> np.ndarray:
    """Joules per token of a module's matmuls on a digital unit: the larger of reading its weights and its arithmetic.

    The weights are read once per step of `batch` tokens, if any of them needs the module; tokens choose independently.

    Args:
        weights: of the module.
        stored_bytes: that they take.
        share: of tokens that need the module.
        batch: tokens of a step.
        digital: the unit.
    """
    value = digital.entries
    bandwidth = value["memory.bandwidth"].value * value["memory.utilisation"].value
    rate = value["compute.rate"].value * value["compute.utilisation"].value
    share = np.asarray(share, np.float64)
    read = -np.expm1(batch * np.log1p(-np.minimum(share, 1 - 1e-16))) / batch  # of a token's part of the step
    seconds = np.maximum(read * stored_bytes / bandwidth, share * (2 * weights / rate))
    return value["power.busy"].value * seconds


def analog_energy(shape: ModuleShape, share: np.ndarray | float, analog: Description) -> np.ndarray:
    """Joules per token of a module's tile operations: every tile that a token passes is operated once."""
    return (
        np.asarray(share, np.float64) * module_tile_count(shape, analog) * analog.entries["tile.operation_energy"].value
    )


def module_tile_count(shape: ModuleShape, analog: Description) -> int:
    """Tiles that hold a module's matrices."""
    rows, columns = (analog.entries[f"tile.{axis}"].value for axis in ("rows", "columns"))
    return sum(math.ceil(k / rows) * math.ceil(n / columns) for stage in shape.stages for k, n in stage)
