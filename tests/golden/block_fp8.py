"""DeepSeek-V3's storage: float8_e4m3fn matrices with a float32 scale per block, all other tensors bfloat16."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # pyright: ignore[reportMissingImports]

LARGEST = 448.0  # of float8_e4m3fn
QUANTISED = re.compile(r"\.(?!eh_proj)\w+_proj(_with_mqa)?\.weight$")
KEPT_IN_FLOAT32 = re.compile(r"\.e_score_correction_bias$")

Float32 = npt.NDArray[np.float32]


def to_bfloat16(x: Float32) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> Float32:
    """Exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float8(codes: npt.NDArray[np.uint8]) -> Float32:
    """float8_e4m3fn: a sign, four bits of exponent with bias 7, three of mantissa; no infinity, NaN is 0x7f."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    assert not np.any(codes & 127 == 127)
    return np.where(codes & 128, -size, size).astype(np.float32)


def expand(scale: Float32, shape: tuple[int, ...], block: int) -> Float32:
    """The scale of every element; blocks at the edges are partial."""
    return np.repeat(np.repeat(scale, block, axis=0), block, axis=1)[: shape[0], : shape[1]]


def quantise(
    weights: dict[str, Float32], block: int, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Float32]]:
    """What is stored, and what it stands for: bfloat16 values in float32, as DeepSeek's conversion script has them.

    Blocks are first multiplied by random factors, without which their scales would hardly differ.
    """
    stored: dict[str, Any] = {}
    meant: dict[str, Float32] = {}
    for key, value in weights.items():
        if KEPT_IN_FLOAT32.search(key):
            stored[key] = meant[key] = value
        elif QUANTISED.search(key):
            rows, columns = value.shape
            blocks = (-(-rows // block), -(-columns // block))
            factors = np.exp(0.3 * rng.standard_normal(blocks)).astype(np.float32)
            scaled = value * expand(factors, value.shape, block)
            padded = np.zeros((blocks[0] * block, blocks[1] * block), np.float32)
            padded[:rows, :columns] = np.abs(scaled)
            scale = padded.reshape(blocks[0], block, blocks[1], block).max(axis=(1, 3)) / np.float32(LARGEST)
            small = torch.from_numpy(scaled / expand(scale, value.shape, block)).to(torch.float8_e4m3fn)
            stored |= {key: small, f"{key}_scale_inv": scale}
            exact = from_float8(small.view(torch.uint8).numpy())
            assert np.array_equal(exact, small.to(torch.float32).numpy())
            meant[key] = from_bfloat16(to_bfloat16(exact * expand(scale, value.shape, block)))
        else:
            stored[key] = torch.from_numpy(value).to(torch.bfloat16)
            meant[key] = from_bfloat16(to_bfloat16(value))
            assert np.array_equal(meant[key], stored[key].to(torch.float32).numpy())
    return stored, meant
