"""Reading and writing `config.json`: everything wrong is an InputError that names the field and the value."""

import copy
import json
import pathlib
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig, Rope, Yarn
from hetmoe.models.hf_config import config_from_hf
from hetmoe.models.hf_config_write import config_to_hf
from hetmoe.models.hf_fields import read_json
from tests.models.tiny import SIZES, tiny_config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
HUB = (GOLDEN / "olmoe_tiny" / "config.json").read_text()
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
COUNTS = (
    "vocab_size", "hidden_size", "expert_intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "num_experts", "experts_per_token", "max_position_embeddings",
)  # fmt: skip
REQUIRED = {
    "vocab_size": int, "hidden_size": int, "intermediate_size": int, "num_hidden_layers": int,
    "num_attention_heads": int, "num_experts": int, "num_experts_per_tok": int,
    "max_position_embeddings": int, "norm_topk_prob": bool, "rms_norm_eps": float,
}  # fmt: skip
OPTIONAL = {"num_key_value_heads": int, "tie_word_embeddings": bool, "head_dim": int, "clip_qkv": float}
WRONG: dict[type, list[Any]] = {
    int: [True, False, 2.0, 2.5, "2", [2], {}],
    bool: [0, 1, 1.0, "true", []],
    float: [True, False, "1e-5", [1.0]],
}


def read_config(path: pathlib.Path) -> ModelConfig:
    return config_from_hf(read_json(path), source=str(path))


def hub(**changes: Any) -> dict[str, Any]:
    """The config of a hub checkpoint with some fields replaced."""
    return json.loads(HUB) | changes


def refused(config: Any, *words: str) -> None:
    """Asserts an InputError whose message holds the source and every word."""
    with pytest.raises(InputError) as caught:
        config_from_hf(config, source="here.json")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("model_type", ["olmoe"]),
        ("hidden_act", "gelu"),
        ("hidden_act", ["silu"]),
        ("attention_bias", True),
        ("attention_bias", 0),
        ("mlp_bias", True),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_unsupported_option_is_refused_by_name(name: str, value: Any) -> None:
    refused(hub(**{name: value}), "here.json", name, repr(value), "supported")


@pytest.mark.parametrize("name", ["rope_type", "type"])  # transformers reads the older "type" as well
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_unsupported_rotary_kind_is_refused_by_name(field: str, name: str) -> None:
    for kind in ("dynamic", "longrope", "llama3", "su", ""):
        refused(hub(**{field: {name: kind, "factor": 2.0, "rope_theta": 1e4}}), "here.json", name, repr(kind))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_type": "linear"}, ("'factor'", "missing")),
        ({"rope_type": "linear", "factor": 0.0}, ("rope.linear=0.0",)),
        ({"rope_type": "linear", "factor": "2"}, ("factor='2'", "float")),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, ("beta_fast=32", "not known")),
        ({"rope_type": "default", "factor": 2.0}, ("factor=2.0", "not known")),
        ({"rope_type": "yarn"}, ("'factor'", "missing")),
        ({"rope_type": "yarn", "factor": -4.0}, ("yarn.factor=-4.0",)),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": True}, ("beta_fast=True",)),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, ("truncate=1", "bool")),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0.5}, ("original_max", "int")),
        ({"rope_type": "yarn", "factor": 4.0, "finetuned": True}, ("finetuned=True", "not known")),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5", "supported")),
        ({"rope_type": "yarn", "type": "linear", "factor": 4.0}, ("contradict",)),
    ],
)
def test_wrong_rotary_options_are_named(options: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(hub(rope_scaling=options), "here.json", *words)
    refused(hub(rope_parameters=options), "here.json", *words)


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_rotary_stretchings_are_read(field: str) -> None:
    linear = config_from_hf(hub(**{field: {"type": "linear", "factor": 2}}))
    assert linear.rope == Rope(theta=1e4, linear=2.0)
    least = config_from_hf(hub(**{field: {"rope_type": "yarn", "factor": 4.0}}))
    assert least.rope.yarn == Yarn(factor=4.0, original_positions=least.max_position_embeddings)
    given = {
        "type": "yarn", "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 20,
        "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.8, "attention_factor": 1.5, "truncate": False,
    }  # fmt: skip
    most = config_from_hf(hub(**{field: given}))
    assert most.rope.yarn == Yarn(
        factor=4.0, original_positions=16, beta_fast=20.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.8,
        attention_factor=1.5, truncate=False,
    )  # fmt: skip


def test_unknown_fields_are_refused_by_name_unless_null() -> None:
    refused(hub(attention_sinks=4), "here.json", "attention_sinks=4", "not known")
    refused(hub(q_lora_rank=4), "here.json", "q_lora_rank=4", "not known")  # known, but of another family
    assert config_from_hf(hub(attention_sinks=None)) == config_from_hf(hub())
    harmless = {"torch_dtype": "bfloat16", "use_cache": False, "attention_dropout": 0.1, "transformers_version": "4.1"}
    assert config_from_hf(hub(**harmless)) == config_from_hf(hub())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, ("rope_theta=10000.0", "500.0")),
        ({"num_local_experts": 9}, ("num_experts=8", "num_local_experts=9")),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            ("rope_scaling", "rope_parameters"),
        ),
    ],
)
def test_spellings_that_contradict_are_refused(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(hub(**changes), "here.json", "contradict", *words)


def test_model_type_must_be_there() -> None:
    config = hub()
    del config["model_type"]
    refused(config, "model_type")


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_field_is_named(name: str) -> None:
    config = hub()
    del config[name]
    refused(config, "here.json", repr(name), "missing")


@pytest.mark.parametrize("name", REQUIRED)
def test_null_is_missing(name: str) -> None:
    refused(hub(**{name: None}), "here.json", repr(name), "missing")


@pytest.mark.parametrize(("name", "kind"), (REQUIRED | OPTIONAL).items())
def test_wrong_type_is_named(name: str, kind: type) -> None:
    for value in WRONG[kind]:
        refused(hub(**{name: value}), "here.json", f"{name}={value!r}", kind.__name__)


def test_defaults_are_those_of_transformers() -> None:
    for absent in (dict.fromkeys(OPTIONAL), {}):
        config = {name: value for name, value in hub().items() if name not in OPTIONAL} | absent
        found = config_from_hf(config)
        assert (found.num_kv_heads, found.tie_embeddings, found.head_dim, found.clip_qkv) == (4, False, 16, None)


@pytest.mark.parametrize("value", [True, "0.8", [0.8], {}])
def test_wrong_type_of_clip_is_named(value: Any) -> None:
    refused(hub(clip_qkv=value), f"clip_qkv={value!r}", "float")


@pytest.mark.parametrize("value", [True, "10000", None, [1e4]])
def test_wrong_type_of_rope_theta_is_refused(value: Any) -> None:
    refused(hub(rope_theta=value), "here.json", "rope_theta")
    alone = hub(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": value})
    refused(alone, "here.json", "rope_theta")


def test_missing_rope_theta_is_named() -> None:
    config = hub()
    del config["rope_theta"]
    refused(config, "here.json", "rope_theta")


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("value", [[1], "default", 3, True, []])
def test_rope_options_must_be_an_object(name: str, value: Any) -> None:
    refused(hub(**{name: value}), "here.json", f"{name}={value!r}", "dict")


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
    assert config_from_hf(hub() | absent).head_dim == 16
    assert config_from_hf(hub(head_dim=10)).head_dim == 10
    refused(hub(num_attention_heads=6) | absent, "hidden_size=64", "num_attention_heads=6")


def test_layers_without_experts_are_read_as_each_family_says_it() -> None:
    qwen = json.loads((GOLDEN / "qwen3_moe_tiny" / "config.json").read_text()) | {"num_hidden_layers": 7}
    cases = [
        (qwen | {"decoder_sparse_step": 1, "mlp_only_layers": [3, 0]}, (0, 3)),
        (qwen | {"decoder_sparse_step": 3, "mlp_only_layers": []}, (0, 1, 3, 4, 6)),
        (qwen | {"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (0, 1, 2, 3, 4, 6)),
    ]
    deepseek = json.loads((GOLDEN / "deepseek_v1_tiny" / "config.json").read_text()) | {"num_hidden_layers": 7}
    cases += [
        (deepseek | {"first_k_dense_replace": 2, "moe_layer_freq": 1}, (0, 1)),
        (deepseek | {"first_k_dense_replace": 2, "moe_layer_freq": 3}, (0, 1, 2, 4, 5)),
        (deepseek | {"first_k_dense_replace": 0, "moe_layer_freq": 1}, ()),
        (deepseek | {"first_k_dense_replace": 4, "moe_layer_freq": 4}, (0, 1, 2, 3, 5, 6)),
    ]
    for content, dense in cases:
        config = config_from_hf(content)
        assert config.dense_layers == dense
        assert (config.dense_intermediate_size is None) == (dense == ())
        assert config_from_hf(config_to_hf(config)) == config
        if dense:
            with pytest.raises(InputError, match="'intermediate_size' is missing, the width of the dense layers"):
                config_from_hf(content | {"intermediate_size": None})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_survives_a_round_trip(name: str) -> None:
    config = read_config(GOLDEN / name / "config.json")
    again = config_from_hf(json.loads(json.dumps(config_to_hf(config), allow_nan=False)))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("olmoe", {"qk_norm": None}, "qk_norm"),
        ("olmoe", {"sliding_window": 4}, "sliding_window"),
        ("mixtral", {"qk_norm": None}, "norm_topk_prob"),
        ("qwen3_moe", {"qk_norm": "head", "qkv_bias": True}, "output_bias"),
        ("deepseek", {"qk_norm": None, "rope": Rope(theta=100.0, interleaved=True)}, "rope"),
        ("deepseek", {"qk_norm": None, "shared_intermediate_size": 50}, "shared_intermediate_size"),
    ],
)
def test_what_a_family_cannot_say_is_refused(family: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"model_type '{family}' cannot say {field}="):
        config_to_hf(tiny_config(family=family, **changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_qkv": 0.8, "norm_topk_prob": True}, {"tie_embeddings": True, "rope": Rope(theta=5e5)}],
)
def test_round_trip(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    again = config_from_hf(json.loads(json.dumps(config_to_hf(config))))
    assert again == config
    assert hash(again) == hash(config)  # it is a static argument of jit
    for name, value in SIZES.items():
        assert (getattr(again, name), type(getattr(again, name))) == (
            changes.get(name, value),
            type(getattr(config, name)),
        )


def test_whole_numbers_serve_as_floats() -> None:
    config = config_from_hf(hub(rope_theta=10000, clip_qkv=8, rms_norm_eps=1))
    for value, expected in ((config.rope.theta, 10000.0), (config.clip_qkv, 8.0), (config.rms_norm_eps, 1.0)):
        assert type(value) is float
        assert value == expected


def test_both_rope_spellings_serve() -> None:
    newer = {"rope_type": "default", "rope_theta": 500}
    assert config_from_hf(hub(rope_theta=None, rope_parameters=newer)).rope == Rope(theta=500.0)
    assert config_from_hf(hub(rope_theta=500, rope_parameters=newer)).rope == Rope(theta=500.0)
    assert config_from_hf(hub(rope_parameters=None)).rope == Rope(theta=10000.0)
    assert config_from_hf(hub(rope_parameters={"rope_type": "default"})).rope == Rope(theta=10000.0)


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
        read_config(path)


def test_absent_file_or_directory_is_named(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_config(path)


ROPE_KEYS = ("rope_theta", "rope_type", "type", "factor", "mscale", "attention_factor", "truncate", "x")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers(0, 6) | st.integers() | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([10**400, "default", "yarn", "linear", "silu", "olmoe", "sigmoid", "greedy", 16, 2, 1.0]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
CONTENTS = {name: json.loads((GOLDEN / name / "config.json").read_text()) for name in FAMILIES}
FIELDS = st.sampled_from(sorted({"head_dim", "rope_parameters", "num_local_experts"}.union(*CONTENTS.values())))


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.sampled_from(FAMILIES), st.dictionaries(FIELDS, JSON, max_size=3), st.sets(FIELDS, max_size=2))
def test_any_change_gives_a_config_or_an_input_error(name: str, changes: dict[str, Any], removed: set[str]) -> None:
    config = {key: value for key, value in (CONTENTS[name] | changes).items() if key not in removed}
    before = copy.deepcopy(config)
    try:
        result = config_from_hf(config)
    except InputError:
        return
    finally:
        assert repr(config) == repr(before)  # the caller's object is left alone (repr: NaN is not equal to itself)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(result), allow_nan=False))) == result
    assert all(type(getattr(result, count)) is int for count in COUNTS)


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
        result = read_config(path)
    except InputError:
        return
    assert isinstance(result, ModelConfig)
