"""How the experts of a model are quantized, whatever the bits of each."""

import dataclasses
from typing import Literal

from hetmoe.errors import InputError
from hetmoe.quantize.gptq import GptqOptions
from hetmoe.quantize.grid import GROUPS, Grid

Method = Literal["rtn", "hqq", "gptq"]
METHODS: dict[str, str] = {
    "rtn": "round-to-nearest",
    "hqq": "half-quadratic, without calibration text",
    "gptq": "GPTQ, on calibration text",
}
Zeros = Literal["auto", "symmetric", "asymmetric"]
ZEROS = ("auto", "symmetric", "asymmetric")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Quantiser and grids; static.

    Attributes:
        method: one of `METHODS`.
        group: rows of a column that share a step (`hetmoe.quantize.grid.GROUPS`).
        zeros: `"auto"` is symmetric at 1 bit, where an asymmetric grid must spend one of two levels on 0, and
            asymmetric above.
        gptq: regularisation of GPTQ's Hessians.

    Raises:
        InputError: for values that do not exist.
    """

    method: Method
    group: int = 128
    zeros: Zeros = "auto"
    gptq: GptqOptions = dataclasses.field(default_factory=GptqOptions)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"quantiser {self.method!r} is unknown: use one of {', '.join(METHODS)}")
        if self.group not in GROUPS:
            raise InputError(f"group={self.group!r} must be one of {', '.join(map(str, GROUPS))}")
        if self.zeros not in ZEROS:
            raise InputError(f"zeros={self.zeros!r} must be one of {', '.join(ZEROS)}")

    def grid(self, bits: int) -> Grid:
        """The grid of matrices at `bits` bits."""
        symmetric = self.zeros == "symmetric" or (self.zeros == "auto" and bits == 1)
        return Grid(bits=bits, group=self.group, symmetric=symmetric)
