"""Conversions of dtypes, and weights that are NaN or infinite."""

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hetmoe.checkpoint.load import load_model
from hetmoe.errors import CheckpointWarning
from tests.checkpoint.golden_files import GOLDEN, copy, edit_config, edit_tensors, load_refuses, read_tensors
from tests.models.directories import assert_same_bits

NAME = "olmoe_tiny"
KEY = "model.layers.1.mlp.experts.2.down_proj.weight"  # turned on its way to the parameters
NORM = "model.norm.weight"  # copied
ASKED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
STORED = [np.float32, ml_dtypes.bfloat16, np.float16, np.float64]


@pytest.fixture
def folder(tmp_path):
    return copy(NAME, tmp_path / "model")


def convert(folder, dtype):
    """Stores everything in a dtype; float64 gets digits that float32 has not."""
    tensors = read_tensors(folder / "model.safetensors")
    if dtype == np.float64:
        rng = np.random.default_rng(3)
        tensors = {k: v * (1 + rng.uniform(-1e-8, 1e-8, v.shape)) for k, v in tensors.items()}
    tensors = {key: value.astype(dtype) for key, value in tensors.items()}
    edit_tensors(folder, **tensors)
    return tensors


def found_in(params):
    return {
        NORM: params.final_norm,
        "model.embed_tokens.weight": params.embed,
        "lm_head.weight": params.lm_head.T,
        KEY: params.layers.moe.experts.down[1, 2].T,
        "model.layers.0.mlp.gate.weight": params.layers.moe.router[0].T,
        "model.layers.1.self_attn.q_norm.weight": params.layers.attention.q_norm[1],
    }


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("asked", ASKED)
def test_conversions_are_those_of_numpy(folder, stored, asked):
    tensors = convert(folder, stored)
    for key, value in found_in(load_model(folder, asked).params).items():
        assert value.dtype == jnp.dtype(asked)
        assert np.asarray(value).tobytes() == tensors[key].astype(ASKED[asked]).tobytes(), key


def test_doubles_are_rounded_to_float32_first(folder):
    """As documented. 1 + 2**-8 lies between two bfloat16 and rounds to even; so does a little more, lost on the way."""
    convert(folder, np.float64)
    for key, shape in ((KEY, (64, 24)), (NORM, (64,))):
        for above, expected in ((2.0**-40, 1.0), (2.0**-20, 1 + 2.0**-7)):
            edit_tensors(folder, **{key: np.full(shape, 1 + 2.0**-8 + above)})
            value = found_in(load_model(folder, "bfloat16").params)[key]
            np.testing.assert_array_equal(value.astype(jnp.float32), expected)


@pytest.mark.parametrize("stored", STORED[:3])
def test_dtype_is_kept_unless_asked(folder, stored):
    tensors = convert(folder, stored)
    edit_config(folder, torch_dtype="float16")  # what is stored goes before what config.json says
    params = load_model(folder).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(stored)}
    assert np.asarray(params.layers.moe.experts.down[1, 2]).T.tobytes() == tensors[KEY].tobytes()


def test_mixed_dtypes_become_what_the_config_says(folder):
    """DeepSeek-V3's bias alone keeps float32, the others need one dtype."""
    edit_tensors(folder, **{KEY: read_tensors(folder / "model.safetensors")[KEY].astype(np.float16)})
    for fields in ({"torch_dtype": "bfloat16"}, {"torch_dtype": ..., "dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}):
        edit_config(folder, **fields)
        assert {leaf.dtype for leaf in jax.tree.leaves(load_model(folder).params)} == {jnp.dtype("bfloat16")}
    for unknown in ("int8", "auto"):
        edit_config(folder, torch_dtype=..., dtype=unknown)
        load_refuses(folder, str(folder / "config.json"), unknown, "float32, bfloat16, float16")
    for nothing in (..., None, "float64"):
        edit_config(folder, torch_dtype=..., dtype=nothing)
        load_refuses(folder, str(folder), "F16", "F32", "dtype=")
        assert_same_bits(load_model(folder, "float32").params, load_model(folder, jnp.float32).params)


@pytest.mark.parametrize("value", [3, True, [], {}, ["float32"]])
def test_dtype_in_the_config_must_be_a_name(folder, value):
    edit_config(folder, torch_dtype=..., dtype=value)
    load_refuses(folder, str(folder / "config.json"), "dtype")


def warnings_of(folder, dtype=None):
    """The parameters, and what was warned of, anything but CheckpointWarning being an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("always", CheckpointWarning)
        params = load_model(folder, dtype).params
    return params, [str(w.message) for w in caught]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("key", [KEY, NORM])
def test_nan_and_infinity_are_counted(folder, stored, asked, key):
    value = convert(folder, stored)[key].copy()
    value.reshape(-1)[[1, 5, 7]] = np.array([np.nan, np.inf, -np.inf], np.float32).astype(stored)
    edit_tensors(folder, **{key: value})
    params, messages = warnings_of(folder, asked)
    assert len(messages) == 1
    assert all(word in messages[0] for word in (str(folder), "3 weights are NaN or infinite", f"{key} (3)"))
    found = np.asarray(found_in(params)[key]).astype(np.float32).reshape(-1)
    np.testing.assert_array_equal(found[[1, 5, 7]], [np.nan, np.inf, -np.inf])
    assert np.isfinite(np.delete(found, [1, 5, 7])).all()


@pytest.mark.parametrize("key", [KEY, NORM])
@pytest.mark.parametrize(
    ("stored", "asked", "size"),
    [(np.float32, "float16", 1e6), (ml_dtypes.bfloat16, "float16", 1e6), (np.float64, "float32", 1e300),
     (np.float32, "bfloat16", 3.4e38), (np.float64, "bfloat16", 1e300), (np.float64, "float16", 1e300)],
)  # fmt: skip
def test_overflow_is_warned_of_and_of_nothing_else(folder, stored, asked, size, key):
    value = convert(folder, stored)[key].copy()
    value.reshape(-1)[3] = size
    edit_tensors(folder, **{key: value})
    params, messages = warnings_of(folder, asked)
    assert len(messages) == 1
    assert f"{key} (1)" in messages[0]
    assert np.asarray(found_in(params)[key]).reshape(-1)[3] == np.inf


def test_large_finite_values_are_not_warned_of(folder):
    tensors = read_tensors(folder / "model.safetensors")
    largest = {np.float32: 3.4028235e38, ml_dtypes.bfloat16: 3.3895314e38, np.float16: 65504.0}
    for dtype, value in largest.items():
        edit_tensors(folder, **{k: np.full(v.shape, value).astype(dtype) for k, v in tensors.items()})
        params, messages = warnings_of(folder)
        assert messages == []
        np.testing.assert_array_equal(np.asarray(params.embed).astype(np.float32), np.float32(value))


def test_many_tensors_are_summed_up(folder):
    tensors = read_tensors(folder / "model.safetensors")
    edit_tensors(folder, **{key: np.full_like(value, np.nan) for key, value in tensors.items()})
    _, messages = warnings_of(folder)
    total = sum(value.size for value in tensors.values())
    assert len(messages) == 1
    assert f"{total:,} weights are NaN" in messages[0]
    assert f"and {len(tensors) - 5} more tensors" in messages[0]


def test_both_halves_of_a_fused_tensor_are_counted_once(tmp_path):
    folder, key = copy("olmoe_fused", tmp_path / "fused"), "model.layers.1.mlp.experts.gate_up_proj"
    value = read_tensors(folder / "model.safetensors")[key].copy()
    value[3, 0, 0] = value[3, -1, -1] = value[7, 5, 2] = np.nan
    edit_tensors(folder, **{key: value})
    _, messages = warnings_of(folder)
    assert [f"{key} (3)" in message for message in messages] == [True]


def test_golden_folders_hold_no_such_weights():
    for folder in GOLDEN.glob("*/config.json"):
        _, messages = warnings_of(folder.parent, "float16")
        assert not any("NaN" in message for message in messages)
