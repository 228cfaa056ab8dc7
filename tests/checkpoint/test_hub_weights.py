"""Malformed weight files: an InputError with file, key, expected and found, never another exception."""

import json
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.read import read_params
from hetmoe.checkpoint.safetensors_file import read_header
from hetmoe.checkpoint.storage import Storage
from hetmoe.checkpoint.weight_files import WeightFiles
from hetmoe.errors import CheckpointWarning, InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Params
from tests.models.directories import model, refused, save_valid
from tests.models.tiny import tiny_config

CONFIG = tiny_config(num_layers=2, num_experts=3)
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"
Entries = dict[str, dict[str, Any]]


def load_params(path: pathlib.Path, config: ModelConfig) -> Params:
    """Parameters of a config from a file, as stored."""
    storage = Storage(dtype=None, fp8_block=None, extra_layers=0)
    return read_params(WeightFiles(path.parent, read_header(path)), config, storage, None, None)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return save_valid(tmp_path / "model")


def split(path: pathlib.Path) -> tuple[Entries, bytes]:
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: pathlib.Path, header: Entries, data: bytes) -> None:
    """Writes a safetensors file, valid or not."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def rename(header: Entries) -> None:
    header[DOWN + "s"] = header.pop(DOWN)


def add(header: Entries) -> None:
    header["model.layers.2.extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def turn(header: Entries) -> None:
    header[DOWN]["shape"].reverse()


def flatten(header: Entries) -> None:
    header[DOWN]["shape"] = [21 * 23]


def integers(header: Entries) -> None:
    header[DOWN]["dtype"] = "I32"


def shift(header: Entries) -> None:
    header[DOWN]["data_offsets"][1] += 4


def overlap(header: Entries) -> None:
    header[DOWN]["data_offsets"] = header[DOWN.replace("experts.2", "experts.1")]["data_offsets"]


def unknown(header: Entries) -> None:
    header[DOWN]["dtype"] = "F31"


def negative(header: Entries) -> None:
    header[DOWN]["shape"] = [-23, -21]


def pruned(header: Entries) -> None:
    del header[DOWN]["shape"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (rename, ("1 tensors are missing", DOWN)),
        (add, ("model.safetensors", "1 tensors do not belong", "model.layers.2.extra")),
        (turn, ("model.safetensors", DOWN, "[21, 23]", "expected [23, 21]")),
        (flatten, ("model.safetensors", DOWN, "[483]", "expected [23, 21]")),
        (integers, ("model.safetensors", DOWN, "I32", "expected one of", "BF16")),
        (shift, ("not a readable safetensors file", DOWN, "bytes")),
        (overlap, ("not a readable safetensors file", "overlaps")),
        (unknown, ("not a readable safetensors file", DOWN, "'F31'", "unknown")),
        (negative, ("not a readable safetensors file", DOWN, "[-23, -21]", "whole numbers")),
        (pruned, ("not a readable safetensors file", DOWN, "dtype, shape and data_offsets")),
    ],
)
def test_wrong_tensors_are_named(
    folder: pathlib.Path, spoil: Callable[[Entries], None], words: tuple[str, ...]
) -> None:
    path = folder / "model.safetensors"
    header, data = split(path)
    spoil(header)
    join(path, header, data)
    refused(folder, str(folder), *words)
    refused(folder, str(folder), *words, dtype="float32")


def set_dtype(folder: pathlib.Path, dtype: str | None) -> None:
    """What config.json says of the dtype, under the older name."""
    content = json.loads((folder / "config.json").read_text())
    content.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(content | {"torch_dtype": dtype}))


def test_mixed_dtypes_need_a_choice(folder: pathlib.Path) -> None:
    """That of the caller or of config.json."""
    path = folder / "model.safetensors"
    header, data = split(path)
    start, stop = header[DOWN]["data_offsets"]
    half = np.frombuffer(data[start:stop], "<f4").astype(np.float16).tobytes()
    for entry in header.values():
        offsets = entry.get("data_offsets", [0, 0])
        entry["data_offsets"] = [o - len(half) if o > start else o for o in offsets]
    del header["__metadata__"]["data_offsets"]
    header[DOWN]["dtype"] = "F16"
    join(path, header, data[:start] + half + data[stop:])
    expected = np.asarray(model().params.layers.moe.experts.down)
    for dtype in (None, "float64"):
        set_dtype(folder, dtype)
        refused(folder, str(folder), "F16 (", "F32 (", DOWN, "config.json names no dtype", "dtype=")
    for dtype, asked in (("float32", None), ("torch.float32", None), ("bfloat16", "float32")):
        set_dtype(folder, dtype)
        loaded = load_model(folder, asked).params
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
        down = np.asarray(loaded.layers.moe.experts.down)
        np.testing.assert_array_equal(down[0], expected[0])
        np.testing.assert_array_equal(down[1, 2], expected[1, 2].astype(np.float16).astype(np.float32))
    set_dtype(folder, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(load_model(folder).params)} == {jnp.dtype(jnp.bfloat16)}


def test_dtype_of_the_config_does_not_convert_weights_of_one_dtype(folder: pathlib.Path) -> None:
    set_dtype(folder, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(load_model(folder).params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_told_of(folder: pathlib.Path, bad: float) -> None:
    """By key and count; nothing is changed, and other tensors are not named."""
    path, spoilt = folder / "model.safetensors", {DOWN: (2, 5), "model.norm.weight": (3,)}
    header, data = split(path)
    values = bytearray(data)
    for key, places in spoilt.items():
        for place in places:
            start = header[key]["data_offsets"][0] + 4 * place
            values[start : start + 4] = np.float32(bad).tobytes()
    join(path, header, bytes(values))
    for dtype in (None, "bfloat16"):
        with pytest.warns(CheckpointWarning) as caught:
            loaded = load_model(folder, dtype).params
        (warning,) = caught
        message = str(warning.message)
        assert message.startswith(f"{folder}: 3 weights are NaN or infinite: ")
        assert f"{DOWN} (2)" in message and "model.norm.weight (1)" in message
        assert message.count("weight (") == 2
        found = np.asarray(loaded.layers.moe.experts.down[1, 2], np.float32).T.ravel()  # as stored: [out, in]
        np.testing.assert_array_equal(found[[2, 5]], np.float32([bad, bad]))
        assert np.isfinite(np.delete(found, [2, 5])).all()


@pytest.mark.parametrize("changes", [{"num_layers": 3}, {"num_layers": 1}, {"num_experts": 4}, {"num_experts": 2}])
def test_config_of_another_model_is_noticed_by_keys(folder: pathlib.Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"tensors (are missing|do not belong)"):
        load_params(folder / "model.safetensors", tiny_config(**{"num_layers": 2, "num_experts": 3, **changes}))


def test_a_stored_head_must_be_that_of_a_tied_config(folder: pathlib.Path) -> None:
    """Transformers may store it all the same; if it differs, one of the two files is wrong."""
    path = folder / "model.safetensors"
    tied = tiny_config(num_layers=2, num_experts=3, tie_embeddings=True)
    with pytest.raises(InputError, match=r"lm_head.*differs from model.*embed_tokens"):
        load_params(path, tied)
    header, data = split(path)
    copy, into = (slice(*header[key]["data_offsets"]) for key in ("model.embed_tokens.weight", "lm_head.weight"))
    values = bytearray(data)
    values[into] = data[copy]
    join(path, header, bytes(values))
    assert load_params(path, tied).lm_head is None


@pytest.mark.parametrize("name", ["vocab_size", "expert_intermediate_size", "hidden_size", "head_dim"])
@pytest.mark.parametrize("size", [42, 10**12])
def test_config_of_another_model_is_noticed_by_shapes(folder: pathlib.Path, name: str, size: int) -> None:
    """However large: nothing is allocated before the shapes were compared."""
    with pytest.raises(InputError, match=r"has shape .*, expected"):
        load_params(folder / "model.safetensors", tiny_config(num_layers=2, num_experts=3, **{name: size}))


def test_truncated_file_is_refused(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 7, 8, 100, header_end - 1, header_end, header_end + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, str(path), "not a readable safetensors file")
    path.write_bytes(whole + b"x")
    refused(folder, str(path), "not a readable safetensors file")


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**31, 2**62, 2**64 - 1])
def test_header_length_beyond_the_file_is_refused(folder: pathlib.Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(folder, str(path), "not a readable safetensors file")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_valid(tmp_path_factory.mktemp("pristine")) / "model.safetensors"


POSITION = st.integers(0, 11) | st.integers(0, 3000)  # the header's length and beginning, or anywhere in the header
BYTE = st.integers(0, 255) | st.sampled_from(b'0123456789{}[]",:-')


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes=st.lists(st.tuples(POSITION, BYTE), min_size=1, max_size=4), cut=st.none() | st.integers(0, 40_000))
def test_any_change_of_the_bytes_gives_a_model_or_an_input_error(
    pristine: pathlib.Path, changes: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(pristine.read_bytes())
    assert struct.unpack("<Q", data[:8])[0] > 3000  # all positions are within the header
    for position, byte in changes:
        data[position] = byte
    path = pristine.with_name("mutated.safetensors")
    path.write_bytes(data[:cut])
    try:
        params = load_params(path, CONFIG)
    except (InputError, CheckpointWarning):  # warnings are errors here
        return
    assert all(leaf.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) for leaf in jax.tree.leaves(params))
