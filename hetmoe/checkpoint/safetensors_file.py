"""Reading safetensors files: the header checked entry by entry before anything else, the data through a memory map.

The format (huggingface/safetensors, README): 8 bytes little-endian header length, a JSON header of name to dtype, shape
and data offsets, then the data without holes. The `safetensors` library's reader copies every tensor into new memory
and names neither key nor value when a header is wrong, hence this one; files are written with the library.
"""

import dataclasses
import json
import math
import mmap
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hetmoe.errors import InputError
from hetmoe.models.hf_fields import repeated_name

MAX_HEADER = 32_000_000  # bytes; all of DeepSeek-V3 in one file would need 14 million
_READ_AHEAD = 1 << 28  # bytes; larger tensors are left to the system, which reads ahead as they are used

# Stored dtypes that hold weights.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}
_VIEWED = DTYPES | {"U8": np.dtype("uint8")}  # codes of quantized weights too
_OTHER_SIZES = {
    "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "C64": 8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, dtype as the header spells it, shape, and first byte in the file."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * _itemsize(self.dtype)


def _itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_SIZES[dtype]


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(v) is int and 0 <= v < 2**63 for v in value)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        InputError: if the file is absent or its header is not exactly what the format demands; the message names file,
            key, what was found and what is expected.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise _unreadable(path, f"it has {size} bytes; the length of the header alone takes 8")
            if length > min(size - 8, MAX_HEADER):
                raise _unreadable(
                    path,
                    f"the header is said to have {length:,} bytes; the file has {size:,}, the limit is {MAX_HEADER:,}",
                )
            text = file.read(length)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if text.count(b"[") > 2 * text.count(b'"data_offsets"') + 1000:  # parsed, it could fill memory
        raise _unreadable(path, "the header holds more lists than shapes and offsets")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _object(path, pairs))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _unreadable(path, f"the header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _unreadable(path, "__metadata__ must be an object of strings")
    tensors = {key: _entry(path, key, entry, 8 + length) for key, entry in header.items()}
    _check_layout(path, list(tensors.values()), 8 + length, size)
    return tensors


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: not a readable safetensors file: {reason}")


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _unreadable(path, f"{repeated_name(pairs)!r} appears twice in the header")
    for name in result:
        if any("\ud800" <= character <= "\udfff" for character in name):  # halves of a character: cannot be printed
            raise _unreadable(path, f"the name {name!a} is not valid Unicode")
    return result


def _entry(path: Path, key: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _unreadable(path, f"{key}: expected an object of dtype, shape and data_offsets, found {str(entry)[:200]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in _OTHER_SIZES):
        raise _unreadable(path, f"{key}: dtype {str(dtype)[:50]!r} is unknown")
    if not _whole_numbers(shape):
        raise _unreadable(path, f"{key}: shape {str(shape)[:200]} must be a list of whole numbers, at most 8")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _unreadable(path, f"{key}: data_offsets {str(offsets)[:200]} must be two ascending whole numbers")
    needed = math.prod(shape) * _itemsize(dtype)
    if offsets[1] - offsets[0] != needed:
        raise _unreadable(
            path, f"{key}: {dtype} {shape} needs {needed} bytes, data_offsets {offsets} give {offsets[1] - offsets[0]}"
        )
    return StoredTensor(path, key, dtype, tuple(shape), start + offsets[0])


def _check_layout(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Data must be gapless: what overlaps, lies outside or is left over is a file that was damaged or forged."""
    end, last = start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else "leaves a gap behind"
            raise _unreadable(
                path,
                f"{tensor.key}: begins at byte {tensor.offset - start} of the data, expected "
                f"{end - start}: {what} {last}",
            )
        end, last = tensor.offset + tensor.nbytes, tensor.key
        if end > size:
            raise _unreadable(
                path, f"{tensor.key}: ends at byte {end} of a file of {size}: truncated, or a wrong header"
            )
    if end != size:
        raise _unreadable(path, f"{size - end} bytes follow the last tensor, {last}")


class MappedFile:
    """A safetensors file in memory; its pages come and go with the operating system's cache."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def view(self, tensor: StoredTensor) -> np.ndarray:
        """The tensor's values, read-only and without a copy."""
        if tensor.offset + tensor.nbytes > len(self._map):
            raise InputError(f"{tensor.path}: {tensor.key}: the file was cut short after its header was read")
        if 0 < tensor.nbytes <= _READ_AHEAD:
            self._map.madvise(mmap.MADV_WILLNEED, *self._pages(tensor.offset, tensor.nbytes))
        flat = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        return flat.view(_VIEWED[tensor.dtype]).reshape(tensor.shape)

    def release(self, tensor: StoredTensor, row: int | None = None) -> None:
        """Gives the pages of a tensor, or of one of its rows, back; reading them again is possible, and slower."""
        offset, size = tensor.offset, tensor.nbytes
        if row is not None:
            size //= tensor.shape[0]
            offset += row * size
        if size:
            self._map.madvise(mmap.MADV_DONTNEED, *self._pages(offset, size))

    @staticmethod
    def _pages(offset: int, size: int) -> tuple[int, int]:
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        return first, offset + size - first
