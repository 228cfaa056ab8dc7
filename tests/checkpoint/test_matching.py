"""What a checkpoint holds against what its config demands: missing, unknown, misshapen tensors, and the layouts."""

import functools
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.checkpoint.load import load_model
from hetmoe.errors import CheckpointWarning, InputError
from tests.checkpoint.golden_files import (
    FOLDERS,
    GOLDEN,
    copy,
    edit_config,
    edit_tensors,
    load_refuses,
    outcome,
    read_tensors,
)
from tests.models.directories import assert_same_bits

INVERSE = "model.layers.0.self_attn.rotary_emb.inv_freq"
FUSED = {"olmoe_fused": "olmoe_tiny", "mixtral_fused": "mixtral_tiny"}
# What DeepSeek-V3's further layer warns of is the subject of one test only.
pytestmark = pytest.mark.filterwarnings("ignore:.*predict further tokens:hetmoe.errors.CheckpointWarning")


@functools.cache
def stored(name):
    return read_tensors(GOLDEN / name / "model.safetensors")


@functools.cache
def params_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        return load_model(GOLDEN / name).params


def used(name):
    """Keys of a golden folder, less those of DeepSeek-V3's layer for the token after next."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return [key for key in stored(name) if f"layers.{config['num_hidden_layers']}." not in key]


def some_keys(name):
    """A key of every kind in the folder's last layers: keys that differ in numbers only are one kind."""
    kinds = {tuple(part for part in key.split(".") if not part.isdigit()): key for key in used(name)}
    return list(kinds.values())


@pytest.fixture
def folder(request, tmp_path):
    return copy(request.param, tmp_path / request.param)


every_folder = pytest.mark.parametrize("folder", FOLDERS, indirect=True)


@every_folder
def test_missing_tensors_are_named(folder):
    for key in some_keys(folder.name):
        edit_tensors(folder, **(stored(folder.name) | {key: None}))
        if folder.name in FUSED and ".mlp." in key:
            # Nobody knows which layout the layer should have had; the message has the hub's names.
            part = ".gate.weight" if key.endswith(".gate.weight") else ".experts.0."
            load_refuses(folder, str(folder), "missing", ".".join(key.split(".")[:3]), part)
        else:
            load_refuses(
                folder, str(folder), key, "stored as FP8, but there is no" if "_inv" in key else "1 tensors are missing"
            )


@every_folder
@pytest.mark.parametrize(
    "key",
    ["model.new", "", "lm_head.bias", "model.layers.0.mlp.experts.999.down_proj.weight",
     "model.layers.99.input_layernorm.weight",
     "model.embed_tokens.weight_scale_inv", "model.layers.-1.input_layernorm.weight", "a.rotary_emb.inv_freq.b"],
)  # fmt: skip
def test_unknown_tensors_are_named(folder, key):
    edit_tensors(folder, **{key: np.zeros(3, np.float32)})
    load_refuses(folder, str(folder / "model.safetensors"), "1 tensors do not belong", key)


def misshapen(value):
    """The same values turned, flattened, with one row more, one column less, one axis more."""
    yield value.reshape(1, *value.shape)
    yield np.concatenate([value, value[:1]])
    yield value[..., :-1]
    yield value[:0]
    if value.ndim > 1:
        yield value.reshape(-1)
        if len(set(value.shape[-2:])) > 1:
            yield np.ascontiguousarray(np.swapaxes(value, -1, -2))
            yield value.reshape(*value.shape[:-2], value.shape[-1], value.shape[-2])


@every_folder
def test_wrong_shapes_are_named(folder):
    original = stored(folder.name)
    for key in some_keys(folder.name)[::2]:
        for value in misshapen(original[key]):
            edit_tensors(folder, **(original | {key: value}))
            load_refuses(
                folder, f"{folder / 'model.safetensors'}: {key}", str(list(value.shape)), str(list(original[key].shape))
            )


@every_folder
def test_integers_are_no_weights(folder):
    original = stored(folder.name)
    for key in some_keys(folder.name)[::3]:
        integers = {key: np.zeros(original[key].shape, np.int32), f"{key}_scale_inv": None}  # scales are for FP8
        edit_tensors(folder, **(original | integers))
        for dtype in (None, "float32"):
            load_refuses(folder, f"{folder / 'model.safetensors'}: {key}", "I32", dtype=dtype)


CONVERSIONS = {"narrow": np.float16, "wide": np.float64, "integer": np.int32}
ORIGINALS = [name for name in FOLDERS if name not in ("olmoe_tiny_clip", "qwen3_moe_bias")]


@settings(max_examples=60)
@given(
    name=st.sampled_from(ORIGINALS),
    number=st.integers(0, 10**6),
    change=st.sampled_from(["drop", "rename", "turn", "flatten", "axis", "rows", *CONVERSIONS, "none", "0d"]),
)
def test_any_change_is_refused_or_harmless(tmp_path_factory, name, number, change):
    """A changed dtype that still loads gives values of that dtype's precision, and all others bit by bit."""
    folder = tmp_path_factory.mktemp("changed") / "model"
    copy(name, folder)
    tensors = dict(stored(name))
    key = list(tensors)[number % len(tensors)]
    value = tensors.pop(key)
    turned = value.T if value.ndim == 2 else value
    tensors |= {
        "drop": dict, "rename": lambda: {key + "s": value}, "turn": lambda: {key: turned},
        "flatten": lambda: {key: value.reshape(-1)}, "axis": lambda: {key: value[None]},
        "rows": lambda: {key: np.concatenate([value, value])}, "none": lambda: {key: value},
        "0d": lambda: {key: value.reshape(-1)[0]},
    }.get(change, lambda: {key: value.astype(np.float32).astype(CONVERSIONS[change])})()  # fmt: skip
    edit_tensors(folder, **(dict.fromkeys(stored(name)) | tensors))
    dtype = "bfloat16" if name == "deepseek_v3_fp8" else "float32"
    loaded = outcome(lambda: load_model(folder, dtype).params)
    if isinstance(loaded, InputError):
        assert str(folder) in str(loaded)
        assert change != "none"
        return
    unused = key not in used(name)
    assert unused or change in ("none", "narrow", "wide") or (value.ndim == 1 and change in ("turn", "flatten"))
    if unused or change != "narrow":
        assert_same_bits(loaded, params_of(name))


@pytest.mark.parametrize("name", FUSED)
def test_fused_layout_is_the_same_model(name):
    assert_same_bits(load_model(GOLDEN / name).params, params_of(FUSED[name]))


def mixed(name, layer_of_fused):
    """Tensors of one layer from the fused folder, all others from the plain one."""
    prefix = f"model.layers.{layer_of_fused}."
    plain = {k: v for k, v in stored(FUSED[name]).items() if not k.startswith(prefix)}
    return plain | {k: v for k, v in stored(name).items() if k.startswith(prefix)}


@pytest.mark.parametrize("folder", FUSED, indirect=True)
@pytest.mark.parametrize("layer", [0, 1])
def test_layouts_may_differ_from_layer_to_layer(folder, layer):
    edit_tensors(folder, **(dict.fromkeys(stored(folder.name)) | mixed(folder.name, layer)))
    assert_same_bits(load_model(folder).params, params_of(FUSED[folder.name]))


@pytest.mark.parametrize("folder", FUSED, indirect=True)
def test_both_layouts_of_one_layer_are_refused(folder):
    experts = {key: v for key, v in stored(folder.name).items() if ".layers.0." in key and ".experts." in key}
    plain = stored(FUSED[folder.name])
    edit_tensors(folder, **(dict.fromkeys(stored(folder.name)) | plain | experts))
    load_refuses(folder, str(folder), "2 tensors do not belong", "model.layers.0.mlp.experts.down_proj")
    one = next(key for key in plain if ".layers.0." in key and ".experts.0." in key)
    edit_tensors(folder, **(dict.fromkeys(plain) | stored(folder.name) | {one: plain[one]}))
    load_refuses(folder, str(folder))


@pytest.mark.parametrize("folder", ["mixtral_window"], indirect=True)
def test_tied_head_may_be_stored_if_it_is_equal(folder):
    embed = stored(folder.name)["model.embed_tokens.weight"]
    edit_tensors(folder, **{"lm_head.weight": embed})
    assert_same_bits(load_model(folder).params, params_of(folder.name))
    other = embed.copy()
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(9))
    for different in (other, embed[:-1], embed.T, embed.astype(np.float64), other[:0]):
        edit_tensors(folder, **{"lm_head.weight": np.ascontiguousarray(different)})
        load_refuses(folder, f"{folder / 'model.safetensors'}: lm_head.weight", "differs", "tie_word_embeddings")


@pytest.mark.parametrize("folder", ["mixtral_window"], indirect=True)
@pytest.mark.parametrize("both", [np.zeros((96, 48), np.int32), np.float32(1), np.zeros(0, np.float32)])
def test_tied_head_and_embedding_may_both_be_wrong(folder, both):
    both = np.asarray(both)
    edit_tensors(folder, **{"lm_head.weight": both, "model.embed_tokens.weight": both})
    load_refuses(folder, str(folder / "model.safetensors"), "model.embed_tokens.weight")


@every_folder
def test_stored_rotary_frequencies_are_ignored(folder):
    edit_tensors(folder, **{INVERSE: np.full(5, np.nan, np.float32)})
    assert_same_bits(load_model(folder).params, params_of(folder.name))


@pytest.mark.parametrize("folder", ["deepseek_v3_fp8"], indirect=True)
def test_layers_for_further_tokens_are_left_out_with_a_warning(folder):
    with pytest.warns(CheckpointWarning, match="left out 1 layer.*model.layers.3") as caught:
        load_model(folder)
    assert len(caught) == 1
    assert str(folder) in str(caught[0].message)
    for count in (..., 0, None):
        edit_config(folder, num_nextn_predict_layers=count)
        load_refuses(folder, str(folder / "model.safetensors"), "do not belong", "model.layers.3.")
    edit_config(folder, num_nextn_predict_layers=-1)
    load_refuses(folder, "num_nextn_predict_layers=-1")
    edit_config(folder, num_nextn_predict_layers=1)
    edit_tensors(folder, **{"model.layers.4.enorm.weight": np.zeros(56, np.float32)})
    load_refuses(folder, "1 tensors do not belong", "model.layers.4.enorm.weight")
