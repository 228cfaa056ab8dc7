"""Values of safetensors files bit by bit, against the library's."""

import json

import numpy as np
import pytest
import safetensors.numpy

from hetmoe.checkpoint.safetensors_file import MappedFile, read_header
from tests.checkpoint.golden_files import NUMPY, join, write_tensors


def all_kinds():
    """Every dtype, with every bit pattern of the small ones; no size a multiple of a page."""
    rng = np.random.default_rng(3)
    tensors = {}
    for name, dtype in NUMPY.items():
        width = np.dtype(dtype).itemsize
        raw = bytes(range(256)) if width == 1 else rng.bytes(width * 7 * 301)
        tensors[name] = np.frombuffer(raw, dtype).reshape(-1, 256 if width == 1 else 301)
        tensors[f"{name}_empty"] = np.zeros((3, 0, 2), dtype)
        tensors[f"{name}_scalar"] = np.frombuffer(raw[:width], dtype).reshape(())
    return tensors


def test_values_are_those_of_the_library(tmp_path):
    path = tmp_path / "kinds.safetensors"
    tensors = {key: value for key, value in all_kinds().items() if value.dtype != np.int32}
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if v.dtype.itemsize > 1}, path)
    library, header, mapped = safetensors.numpy.load_file(path), read_header(path), MappedFile(path)
    assert library.keys() == header.keys()
    for key, expected in library.items():
        view = mapped.view(header[key])
        assert (view.dtype, view.shape, view.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    write_tensors(path, tensors)  # the library's numpy reader has no 8-bit floats, its parser has
    header, mapped = read_header(path), MappedFile(path)
    for key, expected in safetensors.deserialize(path.read_bytes()):
        assert header[key].dtype == expected["dtype"]
        assert mapped.view(header[key]).dtype == NUMPY[expected["dtype"]]
        assert mapped.view(header[key]).shape == tuple(expected["shape"])
        assert mapped.view(header[key]).tobytes() == bytes(expected["data"])


def test_views_are_read_only_and_survive_release(tmp_path):
    path = tmp_path / "kinds.safetensors"
    tensors = {key: value for key, value in all_kinds().items() if value.dtype != np.int32}
    write_tensors(path, tensors)
    header, mapped = read_header(path), MappedFile(path)
    for key, expected in tensors.items():
        view = mapped.view(header[key])
        assert (view.dtype, view.shape, view.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
        assert not view.flags.writeable
        with pytest.raises(ValueError, match=r"read-only|WRITEABLE"):
            view[...] = 0
        mapped.release(header[key])
        assert view.tobytes() == mapped.view(header[key]).tobytes() == expected.tobytes()
    assert read_header(path) == header


def test_empty_tensor_at_the_end_of_a_page_is_read(tmp_path):
    """Its first byte is the end of the file, which is where no page begins."""
    text = json.dumps({"empty": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    join(tmp_path / "empty", text + b" " * (4096 - 8 - len(text)), b"")
    tensor = read_header(tmp_path / "empty")["empty"]
    mapped = MappedFile(tmp_path / "empty")
    assert mapped.view(tensor).shape == (0,)
    mapped.release(tensor)
