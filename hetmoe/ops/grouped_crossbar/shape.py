"""What of a kernel is static."""

import dataclasses

from jaxtyping import Array

from hetmoe.analog.devices import Device
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.grouped_crossbar.block_sizes import BlockSizes, Platform
from hetmoe.ops.grouped_crossbar.blocks import Matrix
from hetmoe.ops.grouped_crossbar.packing import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What a change of recompiles.

    Attributes:
        options: of the converters.
        device: noise model, where weights are programmed on the way.
        interpret: runs the kernels of that platform operation by operation, anywhere.
        sizes: of the forward kernel's blocks; None = `block_sizes.choose`.
    """

    options: CrossbarOptions
    device: Device | None
    interpret: Platform | None
    sizes: BlockSizes | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a change of makes another kernel."""

    layout: Layout
    options: CrossbarOptions
    device: Device | None  # noise model, where weights are programmed on the way
    width: int  # columns of the logical matrix
    sizes: BlockSizes

    @property
    def columns(self) -> int:
        """Columns of outputs that one step or program makes, a divisor of the packed columns."""
        return self.sizes.columns


def weights_of(matrix: Matrix) -> Array:
    """Any weights of a matrix: all have the same shape and dtype but for their leading axis."""
    if matrix.programmed is not None:
        return matrix.programmed
    assert matrix.clean is not None
    return matrix.clean.w
