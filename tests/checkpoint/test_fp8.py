"""Block-wise FP8 weights: values against the maker's file and plain numpy, and every way to lack or spoil a scale."""

import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hetmoe.checkpoint.load import load_model
from tests.checkpoint.golden_files import GOLDEN, copy, edit_config, edit_tensors, load_refuses, read_tensors

NAME, BLOCK = "deepseek_v3_fp8", 16
FP8 = ml_dtypes.float8_e4m3fn
KEY = "model.layers.1.mlp.experts.5.down_proj.weight"
SCALE = f"{KEY}_scale_inv"
pytestmark = pytest.mark.filterwarnings("ignore:.*predict further tokens:hetmoe.errors.CheckpointWarning")


@pytest.fixture
def folder(tmp_path):
    return copy(NAME, tmp_path / "model")


def stored():
    return read_tensors(GOLDEN / NAME / "model.safetensors")


def multiplied(values, scales, block=(BLOCK, BLOCK)):
    """Every element times its block's scale, by the format's definition and one element at a time."""
    out = np.empty(values.shape, np.float32)
    for row, column in np.ndindex(*values.shape):
        bits = int(values.view(np.uint8)[row, column])
        exponent, mantissa = bits >> 3 & 15, bits & 7
        size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
        value = np.float32(-size if bits & 128 else size)
        out[row, column] = value * scales[row // block[0], column // block[1]]
    return out


def test_values_are_those_of_the_golden_file():
    with np.load(GOLDEN / NAME / "golden.npz") as file:
        expected, key = file["dequantised"], json.loads(str(file["metadata"]))["dequantised_key"]
    assert key == KEY
    for dtype in ("bfloat16", None):  # config.json says bfloat16
        found = np.asarray(load_model(GOLDEN / NAME, dtype).params.layers.moe.experts.down[0, 5])
        np.testing.assert_array_equal(found.T.view(np.uint16), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_are_rounded_once_from_float32(dtype):
    tensors, params = stored(), load_model(GOLDEN / NAME, dtype).params
    layers, dense = params.layers, params.dense_layers
    found = {
        KEY: layers.moe.experts.down[0, 5],
        "model.layers.2.mlp.experts.15.gate_proj.weight": layers.moe.experts.gate[1, 15],
        "model.layers.2.mlp.shared_experts.up_proj.weight": layers.moe.shared.up[1],
        "model.layers.0.mlp.down_proj.weight": dense.ffn.down[0],
        "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": layers.attention.kv_a[1],
        "model.layers.1.self_attn.o_proj.weight": layers.attention.o[0],
    }
    for key, value in found.items():
        assert tensors[key].dtype == FP8
        expected = multiplied(tensors[key], tensors[f"{key}_scale_inv"]).astype(jnp.dtype(dtype))
        assert value.dtype == jnp.dtype(dtype)
        assert np.asarray(value).T.tobytes() == expected.tobytes()


def test_what_is_not_fp8_keeps_its_own_precision():
    tensors, params = stored(), load_model(GOLDEN / NAME, "bfloat16").params
    bias = params.layers.moe.selection_bias
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[1], tensors["model.layers.2.mlp.gate.e_score_correction_bias"])
    assert np.asarray(params.lm_head).T.tobytes() == tensors["lm_head.weight"].tobytes()


@pytest.mark.parametrize("block", [(8, 16), (16, 4), (1, 1), (7, 5), (128, 128), (56, 20)])
def test_blocks_of_any_size_partial_at_the_edges(folder, block):
    """All scales are drawn anew, in shapes that the block demands."""
    rng, new = np.random.default_rng(3), {}
    for key, value in stored().items():
        if value.dtype == FP8:
            shape = [-(-n // b) for n, b in zip(value.shape, block, strict=True)]
            new[f"{key}_scale_inv"] = rng.uniform(0.001, 0.1, shape).astype(np.float32)
    edit_tensors(folder, **new)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
    found = load_model(folder, "float32").params.layers.moe.experts.down[0, 5]
    np.testing.assert_array_equal(np.asarray(found).T, multiplied(stored()[KEY], new[SCALE], block))


def test_scales_may_be_bfloat16(folder):
    narrow = stored()[SCALE].astype(ml_dtypes.bfloat16)
    edit_tensors(folder, **{SCALE: narrow})
    found = load_model(folder, "float32").params.layers.moe.experts.down[0, 5]
    np.testing.assert_array_equal(np.asarray(found).T, multiplied(stored()[KEY], narrow.astype(np.float32)))


def test_missing_and_spare_scales_are_named(folder):
    edit_tensors(folder, **{SCALE: None})
    load_refuses(folder, str(folder), "stored as FP8, but there is no", SCALE)
    spare = "model.norm.weight_scale_inv"
    edit_tensors(folder, **{SCALE: stored()[SCALE], spare: np.ones(1, np.float32)})
    load_refuses(folder, "do not belong", spare)


@pytest.mark.parametrize("shape", [(2, 4), (4,), (8,), (4, 2, 1), (1, 1), (5, 2), (4, 3), (0, 2), ()])
def test_wrong_shapes_of_scales_are_named(folder, shape):
    assert stored()[SCALE].shape == (4, 2)
    edit_tensors(folder, **{SCALE: np.ones(shape, np.float32)})
    load_refuses(folder, f"{folder / 'model.safetensors'}: {SCALE}", str(list(shape)), "[4, 2]", "[16, 16]")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, FP8])
def test_wrong_dtypes_of_scales_are_named(folder, dtype):
    edit_tensors(folder, **{SCALE: np.ones((4, 2), dtype)})
    load_refuses(folder, f"{folder / 'model.safetensors'}: {SCALE}", "expected F32")


def test_scales_need_a_quantization_config(folder):
    for absent in (..., None):
        edit_config(folder, quantization_config=absent)
        load_refuses(folder, str(folder / "model.safetensors"), "FP8", "no quantization_config")


def test_vectors_have_no_blocks(folder):
    norm = "model.norm.weight"
    edit_tensors(folder, **{norm: np.ones(56, FP8), f"{norm}_scale_inv": np.ones(4, np.float32)})
    load_refuses(folder, f"{folder / 'model.safetensors'}: {norm}", "FP8")


@pytest.mark.parametrize(
    "size",
    [
        None,
        ...,
        [],
        [16],
        [16, 16, 16],
        [16, 0],
        [16, -16],
        [16.0, 16],
        ["16", 16],
        [True, 16],
        16,
        "16",
        {},
        [None, 1],
    ],
)
def test_malformed_block_size_is_refused(folder, size):
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": size}
    edit_config(folder, quantization_config={k: v for k, v in config.items() if v is not ...})
    load_refuses(folder, str(folder / "config.json"), "weight_block_size")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq"}, ("quant_method='gptq'", "'fp8'")),
        ({"quant_method": "awq", "bits": 4}, ("quant_method='awq'",)),
        ({"quant_method": "bitsandbytes"}, ("quant_method='bitsandbytes'",)),
        ({"quant_method": None}, ("quant_method", "'fp8'")),
        ({"quant_method": 8}, ("quant_method=8",)),
        ({"fmt": "e5m2"}, ("fmt='e5m2'", "'e4m3'")),
    ],
)
def test_other_quantisations_are_refused_by_name(folder, change, words):
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]} | change
    edit_config(folder, quantization_config=config)
    load_refuses(folder, str(folder / "config.json"), *words)


@pytest.mark.parametrize("quantization", [[], "fp8", 8, True, {}])
def test_quantization_config_must_say_how(folder, quantization):
    edit_config(folder, quantization_config=quantization)
    load_refuses(folder, str(folder / "config.json"), "quantization_config")


def test_fused_experts_may_be_fp8(folder):
    """In the layout of transformers 5, where scales stack over experts too; 20 rows of gate end within a block."""
    tensors, fused = stored(), dict[str, np.ndarray]()
    prefix = "model.layers.1.mlp.experts"
    parts = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}
    for target, sources in parts.items():
        values = [
            np.concatenate([tensors[f"{prefix}.{e}.{s}.weight"].view(np.uint8) for s in sources]) for e in range(16)
        ]
        stack = np.stack(values).view(FP8)
        shape = (16, -(-stack.shape[1] // BLOCK), -(-stack.shape[2] // BLOCK))
        scales = np.random.default_rng(4).uniform(0.01, 0.1, shape).astype(np.float32)
        fused |= {f"{prefix}.{target}": stack, f"{prefix}.{target}_scale_inv": scales}
    plain = {key: None for key in tensors if key.startswith(prefix)}
    edit_tensors(folder, **(plain | fused))
    experts = load_model(folder, "float32").params.layers.moe.experts
    for number in (0, 7, 15):
        both = multiplied(fused[f"{prefix}.gate_up_proj"][number], fused[f"{prefix}.gate_up_proj_scale_inv"][number])
        np.testing.assert_array_equal(np.asarray(experts.gate[0, number]).T, both[:20])
        np.testing.assert_array_equal(np.asarray(experts.up[0, number]).T, both[20:])
        down = multiplied(fused[f"{prefix}.down_proj"][number], fused[f"{prefix}.down_proj_scale_inv"][number])
        np.testing.assert_array_equal(np.asarray(experts.down[0, number]).T, down)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_in_fp8_is_counted(folder, dtype):
    values = stored()[KEY].copy()
    values.view(np.uint8)[3, 4] = 0x7F
    values.view(np.uint8)[9, 19] = 0xFF
    edit_tensors(folder, **{KEY: values})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load_model(folder, dtype).params.layers.moe.experts.down[0, 5]
    assert any(f"{KEY} (2)" in str(w.message) for w in caught)
    assert np.argwhere(np.isnan(np.asarray(found).T.astype(np.float32))).tolist() == [[3, 4], [9, 19]]
    assert not jax.numpy.isinf(found).any()
