"""Bytes of a model with quantized experts, and its average bits with and without overhead."""

import dataclasses
import math
from typing import Any

import jax

from hetmoe.models.params import Params
from hetmoe.quantize.mixed import MixedMatrix, is_mixed
from hetmoe.quantize.packed import Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Weights and the bits that they take; steps and zeros are overhead.

    Attributes:
        quantized: weights of experts that are quantized.
        codes: bits of their codes.
        overhead: bits of their steps and zeros.
        rest: all other parameters.
        rest_bits: bits of those.
        places: bytes of the tables that say where each expert is, which are not stored in files.
    """

    quantized: int
    codes: int
    overhead: int
    rest: int
    rest_bits: int
    places: int

    @property
    def bytes(self) -> int:
        """Of all parameters, in memory as on disk (beside file headers)."""
        return (self.codes + self.overhead + self.rest_bits) // 8

    def averages(self) -> dict[str, tuple[float, float]]:
        """Bits per weight (without overhead, with it): of the quantized experts, if any, and of the whole model."""
        weights, bits = self.quantized + self.rest, self.codes + self.rest_bits
        found = {"whole model": (bits / weights, (bits + self.overhead) / weights)}
        if not self.quantized:
            return found
        experts = self.codes / self.quantized, (self.codes + self.overhead) / self.quantized
        return {"quantized experts": experts} | found


def sizes(params: Params) -> Sizes:
    """Sizes of a model in memory."""
    quantized = codes = overhead = rest = rest_bits = places = 0
    for leaf in jax.tree.leaves(params, is_leaf=is_mixed):
        arrays: list[Any] = []
        if isinstance(leaf, MixedMatrix):
            places += _bytes(leaf.places)
            for pool in leaf.pools:
                if not isinstance(pool, Packed):
                    arrays.append(pool)
                    continue
                quantized += math.prod(pool.shape)
                codes += 8 * _bytes(pool.planes)
                overhead += 8 * _bytes((pool.scale, pool.zero))
        else:
            arrays.append(leaf)
        rest += sum(array.size for array in arrays)
        rest_bits += 8 * _bytes(arrays)
    return Sizes(quantized=quantized, codes=codes, overhead=overhead, rest=rest, rest_bits=rest_bits, places=places)


def _bytes(tree: Any) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(tree))
