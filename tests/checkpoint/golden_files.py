"""The tiny checkpoints of `tests/golden`, taken apart and put together again, right or wrong."""

import json
import math
import pathlib
import shutil
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hetmoe.checkpoint.load import load_model
from hetmoe.errors import InputError

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FOLDERS = tuple(sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
ROOT = GOLDEN.parent.parent

# numpy's names for the dtypes that safetensors headers name.
NUMPY: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I32": np.int32,
    "U8": np.uint8,
}
NAMES = {np.dtype(dtype): name for name, dtype in NUMPY.items()}

Header = dict[str, Any]
Tensors = dict[str, np.ndarray]


def split(path: pathlib.Path) -> tuple[Header, bytes]:
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: pathlib.Path, header: Any, data: bytes) -> None:
    """Writes a safetensors file, valid or not; `header` is its JSON content, or the bytes to put there."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_tensors(path: pathlib.Path) -> Tensors:
    """Every tensor of a valid file, without the library and without hetmoe."""
    header, data = split(path)
    header.pop("__metadata__", None)
    return {
        key: np.frombuffer(data[slice(*e["data_offsets"])], NUMPY[e["dtype"]]).reshape(e["shape"])
        for key, e in header.items()
    }


def write_tensors(path: pathlib.Path, tensors: Tensors) -> None:
    """A valid file."""
    header, end, parts = {}, 0, []
    for key, value in tensors.items():
        begin, end = end, end + value.nbytes
        header[key] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
        parts.append(np.ascontiguousarray(value).tobytes())
    join(path, header, b"".join(parts))


def copy(name: str, target: pathlib.Path) -> pathlib.Path:
    """A copy of a golden folder that the test may spoil."""
    target.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name / file, target / file)
    return target


def edit_config(directory: pathlib.Path, **changes: Any) -> None:
    """Sets fields of config.json; `...` removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def edit_tensors(directory: pathlib.Path, **changes: np.ndarray | None) -> None:
    """Sets or, with None, removes tensors of model.safetensors."""
    path = directory / "model.safetensors"
    tensors = read_tensors(path) | changes
    write_tensors(path, {key: value for key, value in tensors.items() if value is not None})


def refuses(call: Any, *words: str) -> str:
    """Asserts that a call raises an InputError that says all of `words`, in text that can be printed."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message
    message.encode()
    return message


def outcome(call: Any) -> Any:
    """What a call returns, or the InputError that it raises."""
    try:
        return call()
    except InputError as error:
        return error


def load_refuses(directory: pathlib.Path, *words: str, **arguments: Any) -> str:
    """`refuses` for `load_model`."""
    return refuses(lambda: load_model(directory, **arguments), *words)


def shard(directory: pathlib.Path, parts: int) -> dict[str, str]:
    """Replaces model.safetensors by shards with an index; returns the index's table."""
    single = directory / "model.safetensors"
    tensors, table = read_tensors(single), dict[str, str]()
    single.unlink()
    keys = list(tensors)
    size = math.ceil(len(keys) / parts)
    for number in range(parts):
        name, mine = f"model-{number + 1:05}-of-{parts:05}.safetensors", keys[number * size : (number + 1) * size]
        write_tensors(directory / name, {key: tensors[key] for key in mine})
        table |= dict.fromkeys(mine, name)
    write_index(directory, table)
    return table


def write_index(directory: pathlib.Path, table: Any) -> None:
    """The index of a sharded checkpoint."""
    content = {"metadata": {"total_size": 1}, "weight_map": table}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
