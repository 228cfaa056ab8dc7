"""Reading and validating model configs: everything wrong is an InputError that names the field and the value."""

import copy
import json
import math
import pathlib
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from tests.models.tiny import SIZES, tiny_config

HUB = (pathlib.Path(__file__).parents[1] / "golden" / "olmoe_tiny" / "config.json").read_text()
COUNTS = (
    "vocab_size", "hidden_size", "expert_intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "num_experts", "experts_per_token", "max_position_embeddings",
)  # fmt: skip
REQUIRED = {
    "vocab_size": int, "hidden_size": int, "intermediate_size": int, "num_hidden_layers": int,
    "num_attention_heads": int, "num_key_value_heads": int, "num_experts": int, "num_experts_per_tok": int,
    "max_position_embeddings": int, "norm_topk_prob": bool, "tie_word_embeddings": bool, "rms_norm_eps": float,
}  # fmt: skip
WRONG: dict[type, list[Any]] = {
    int: [True, False, 2.0, 2.5, "2", None, [2], {}],
    bool: [0, 1, 1.0, "true", None, []],
    float: [True, False, "1e-5", None, [1.0]],
}


def hub(**changes: Any) -> dict[str, Any]:
    """The config of a hub checkpoint with some fields replaced."""
    return json.loads(HUB) | changes


def refused(config: Any, *words: str) -> None:
    """Asserts an InputError whose message holds the source and every word."""
    with pytest.raises(InputError) as caught:
        ModelConfig.from_hf(config, source="here.json")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "mixtral"),
        ("model_type", None),
        ("model_type", ["olmoe"]),
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", "yarn"),
    ],
)
def test_unsupported_option_is_refused_by_name(name: str, value: Any) -> None:
    refused(hub(**{name: value}), "here.json", name, repr(value), "supported")


@pytest.mark.parametrize("name", ["rope_type", "type"])  # transformers reads the older "type" as well
def test_unsupported_rotary_kind_is_refused_by_name(name: str) -> None:
    refused(hub(rope_parameters={name: "yarn", "factor": 2.0, "rope_theta": 1e4}), "here.json", name, "'yarn'")


def test_model_type_must_be_there() -> None:
    config = hub()
    del config["model_type"]
    refused(config, "model_type")


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_field_is_named(name: str) -> None:
    config = hub()
    del config[name]
    refused(config, "here.json", repr(name), "missing")


@pytest.mark.parametrize(("name", "kind"), REQUIRED.items())
def test_wrong_type_is_named(name: str, kind: type) -> None:
    for value in WRONG[kind]:
        refused(hub(**{name: value}), "here.json", f"{name}={value!r}", kind.__name__)


@pytest.mark.parametrize("value", [True, "0.8", [0.8], {}])
def test_wrong_type_of_clip_is_named(value: Any) -> None:
    refused(hub(clip_qkv=value), f"clip_qkv={value!r}", "float")


@pytest.mark.parametrize("value", [True, "10000", None, [1e4]])
def test_wrong_type_of_rope_theta_is_refused(value: Any) -> None:
    refused(hub(rope_theta=value), "here.json", "rope_theta")
    refused(hub(rope_parameters={"rope_type": "default", "rope_theta": value}), "here.json", "rope_theta")


def test_missing_rope_theta_is_named() -> None:
    config = hub()
    del config["rope_theta"]
    refused(config, "here.json", "rope_theta")


@pytest.mark.parametrize("value", [[1], "default", 3, True])
def test_rope_parameters_must_be_an_object(value: Any) -> None:
    refused(hub(rope_parameters=value), "here.json", "rope_parameters")


@pytest.mark.parametrize("value", [0, False, "", [], True, 16.0, "16", -16])
def test_wrong_head_dim_is_not_replaced_by_a_default(value: Any) -> None:
    refused(hub(head_dim=value), "head_dim", repr(value))


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps", "clip_qkv"])
def test_integer_too_large_for_a_float_is_refused(field: str) -> None:
    refused(hub(**{field: 10**400}), field)


@pytest.mark.parametrize("config", [None, [], "olmoe", 3])
def test_not_an_object(config: Any) -> None:
    refused(config, "here.json", "object", type(config).__name__)


@pytest.mark.parametrize("absent", [{"head_dim": None}, {}])
def test_head_dim_defaults_to_the_quotient_only_if_there_is_one(absent: dict[str, None]) -> None:
    assert ModelConfig.from_hf(hub() | absent).head_dim == 16
    assert ModelConfig.from_hf(hub(head_dim=10)).head_dim == 10
    refused(hub(num_attention_heads=6) | absent, "hidden_size=64", "num_attention_heads=6")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_counts_are_whole_numbers_of_at_least_one(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"{name}={value!r}")):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts_per_token": 9}, "experts_per_token=9 exceeds num_experts=8"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_kv_heads": 8}, "num_heads=4 is not a multiple of num_kv_heads=8"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
    ],
)
def test_sizes_must_fit_together(changes: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny_config(**changes)
    tiny_config(experts_per_token=8)
    tiny_config(num_kv_heads=4)


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "clip_qkv"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf, "1", True])
def test_numbers_are_positive_and_finite(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"{name}={value!r}")):
        tiny_config(**{name: value})


@pytest.mark.parametrize("name", ["norm_topk_prob", "tie_embeddings"])
@pytest.mark.parametrize("value", [0, 1, "no", None])
def test_switches_are_booleans(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"{name}={value!r}")):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    "changes", [{}, {"clip_qkv": 0.8, "norm_topk_prob": True}, {"tie_embeddings": True, "rope_theta": 5e5}]
)
def test_round_trip(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    again = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert again == config
    assert hash(again) == hash(config)  # it is a static argument of jit
    for name, value in SIZES.items():
        assert (getattr(again, name), type(getattr(again, name))) == (
            changes.get(name, value),
            type(getattr(config, name)),
        )


def test_whole_numbers_serve_as_floats() -> None:
    config = ModelConfig.from_hf(hub(rope_theta=10000, clip_qkv=8, rms_norm_eps=1))
    for value, expected in ((config.rope_theta, 10000.0), (config.clip_qkv, 8.0), (config.rms_norm_eps, 1.0)):
        assert type(value) is float
        assert value == expected


def test_the_newer_rope_spelling_wins() -> None:
    assert ModelConfig.from_hf(hub(rope_parameters={"rope_type": "default", "rope_theta": 500})).rope_theta == 500.0
    assert ModelConfig.from_hf(hub(rope_parameters=None)).rope_theta == 10000.0


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"nul", b"[1, 2", b'{"model_type": "olmoe",}', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[]", b"3",
        b"[" * 100_000, b'{"model_type": ' + b"1" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_unreadable_file_is_named(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        ModelConfig.from_file(path)


def test_absent_file_or_directory_is_named(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path))):
            ModelConfig.from_file(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from([10**400, "default", "silu", "olmoe", 16, 2, 1.0]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "x"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
FIELDS = st.sampled_from([*json.loads(HUB), "head_dim", "rope_parameters"])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.dictionaries(FIELDS, JSON, max_size=3), st.sets(FIELDS, max_size=2))
def test_any_change_gives_a_config_or_an_input_error(changes: dict[str, Any], removed: set[str]) -> None:
    config = {key: value for key, value in hub(**changes).items() if key not in removed}
    before = copy.deepcopy(config)
    try:
        result = ModelConfig.from_hf(config)
    except InputError:
        return
    finally:
        assert repr(config) == repr(before)  # the caller's object is left alone (repr: NaN is not equal to itself)
    assert ModelConfig.from_hf(json.loads(json.dumps(result.to_hf(), allow_nan=False))) == result
    assert all(type(getattr(result, name)) is int for name in COUNTS)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(HUB) - 1), st.binary(max_size=2)), min_size=1, max_size=4))
def test_any_change_of_the_bytes_gives_a_config_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]
) -> None:
    data = HUB.encode()
    for position, replacement in changes:
        data = data[:position] + replacement + data[position + 1 :]
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(data)
    try:
        result = ModelConfig.from_file(path)
    except InputError:
        return
    assert isinstance(result, ModelConfig)
