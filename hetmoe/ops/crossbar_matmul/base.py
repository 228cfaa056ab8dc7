"""Static options of a crossbar, shared by all implementations."""

import dataclasses
from typing import Literal

from hetmoe.analog.converters import steps
from hetmoe.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossbarOptions:
    """What a change of recompiles: converter bits (None = ideal), the ADC bound's group, and the tile's rows."""

    dac_bits: int | None = 8
    adc_bits: int | None = 8
    bound_axis: Literal["tile", "column"] = "tile"
    tile_rows: int = 512

    def __post_init__(self) -> None:
        for bits in (self.dac_bits, self.adc_bits):
            if bits is not None:
                steps(bits)
        if self.bound_axis not in ("tile", "column"):
            raise InputError(f"bound_axis={self.bound_axis!r} must be 'tile' or 'column'")
        if isinstance(self.tile_rows, bool) or not isinstance(self.tile_rows, int) or self.tile_rows < 1:
            raise InputError(f"tile_rows={self.tile_rows!r} must be a whole number of at least 1")
