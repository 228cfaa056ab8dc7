"""Every field of every golden config.json: refused, or it changes the config; nothing that matters is ignored."""

import copy
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.storage import storage_from_hf
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_config import config_from_hf
from hetmoe.models.hf_config_write import config_to_hf
from tests.checkpoint.config_alternatives import FAMILIES, HARMLESS, REFUSED, alternatives
from tests.checkpoint.golden_files import FOLDERS, GOLDEN, ROOT, outcome, refuses
from tests.models.tiny import full_config, tiny_config

CONFIGS = {name: json.loads((GOLDEN / name / "config.json").read_text()) for name in FOLDERS}
SOURCE = "somewhere/config.json"
every_folder = pytest.mark.parametrize("name", FOLDERS)


def read(config):
    return config_from_hf(config, source=SOURCE)


def changed(name, **fields):
    return copy.deepcopy(CONFIGS[name]) | fields


@every_folder
def test_every_field_is_either_harmless_or_has_alternatives(name):
    config = CONFIGS[name]
    given_up = {  # read, and rightly without effect in this very config
        "qwen2_moe": {"sliding_window"},  # refused if used
        "deepseek_v2": {"n_group", "topk_group"} if config.get("topk_method") == "greedy" else set(),
        "qwen3_moe": {"sliding_window"},
    }.get(config["model_type"], set())
    dense = read(config).dense_layers
    if "qwen" in config["model_type"]:
        given_up = given_up | {"intermediate_size"}  # dense layers only: tested below
        assert (read(changed(name, intermediate_size=77)) != read(config)) == bool(dense)
    assert config.keys() <= HARMLESS | alternatives(config).keys() | given_up


@every_folder
def test_alternatives_change_what_they_should_or_are_refused(name):
    config = read(CONFIGS[name])
    for field, values in alternatives(CONFIGS[name]).items():
        effects = 0
        for value, effect in values:
            new = changed(name, **{field: value})
            if effect is REFUSED:
                refuses(lambda new=new: read(new), SOURCE)
            elif getattr(read(new), effect) == getattr(config, effect):
                # The same as before, by its value or by what an absent field means.
                assert CONFIGS[name].get(field) in (value, None, False) or value is None, (field, value)
            else:
                effects += 1
        assert effects or all(e is REFUSED for _, e in values) or len(values) == 1, field


@every_folder
def test_harmless_fields_change_nothing(name):
    config = CONFIGS[name]
    assert read({k: v for k, v in config.items() if k not in HARMLESS}) == read(config)
    for field in HARMLESS & config.keys():
        for value in (None, 12345, "other", ["other"], {"other": 1}, True):
            assert read(changed(name, **{field: value})) == read(config), field


@every_folder
def test_unknown_options_are_refused_by_name_and_null_passes(name):
    refuses(lambda: read(changed(name, new_option=True)), SOURCE, "new_option=True")
    for value in (False, 0, "", [], {}):  # it cannot be known that these mean "off"
        refuses(lambda value=value: read(changed(name, new_option=value)), SOURCE, f"new_option={value!r}")
    assert read(changed(name, new_option=None)) == read(CONFIGS[name])
    for option in ("attn_logit_softcapping", "layer_norm_eps", "n_shared", "num_experts_per_token", "k_proj_bias"):
        refuses(lambda option=option: read(changed(name, **{option: 1})), SOURCE, option)


@every_folder
def test_required_fields_are_missed_by_name(name):
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok",
                  "max_position_embeddings", "rms_norm_eps"):  # fmt: skip
        for absent in ({k: v for k, v in CONFIGS[name].items() if k != field}, changed(name, **{field: None})):
            refuses(lambda absent=absent: read(absent), SOURCE, repr(field), "missing")
    bare = {k: v for k, v in CONFIGS[name].items() if not k.startswith("rope_")}
    refuses(lambda: read(bare), SOURCE, "rope_theta")


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("value", [None, "llama", "", 3, ["olmoe"], {}])
def test_unknown_model_types_are_refused_with_the_known_ones(value, absent):
    config = changed("olmoe_tiny", model_type=value)
    if absent:
        del config["model_type"]
    refuses(lambda: read(config), SOURCE, "model_type", *FAMILIES)


@pytest.mark.parametrize("content", [None, [], "olmoe", 3, True])
def test_config_must_be_an_object(content):
    refuses(lambda: read(content), SOURCE, "JSON object")
    refuses(lambda: storage_from_hf(content, source=SOURCE), SOURCE, "JSON object")


def test_spellings_that_contradict_are_refused():
    for name, fields in (
        ("olmoe_tiny", {"num_local_experts": 7}), ("mixtral_tiny", {"num_experts": 7}),
        ("qwen3_moe_tiny", {"num_local_experts": 7}), ("deepseek_v3_tiny", {"num_local_experts": 7}),
        ("olmoe_tiny", {"rope_parameters": {"rope_theta": 7.0}}), ("olmoe_tiny_clip", {"rope_theta": 7.0}),
        ("deepseek_v3_tiny", {"rope_parameters": {"rope_type": "yarn", "factor": 7.0}}),
        ("deepseek_v3_tiny", {"head_dim": 7}), ("deepseek_v3_tiny", {"qk_head_dim": 7}),
    ):  # fmt: skip
        message = refuses(lambda name=name, fields=fields: read(changed(name, **fields)), SOURCE, "7")
        assert "contradict" in message or "not supported" in message
        agreed = {k: CONFIGS[name][{"num_local_experts": "num_experts", "num_experts": "num_local_experts"}[k]]
                  for k in fields if k in ("num_experts", "num_local_experts") and "deepseek" not in name}  # fmt: skip
        assert read(changed(name, **agreed)) == read(CONFIGS[name])
    both = changed("olmoe_tiny", dtype="bfloat16")
    refuses(lambda: storage_from_hf(both, source=SOURCE), SOURCE, "dtype='bfloat16'", "torch_dtype='float32'")
    assert storage_from_hf(changed("olmoe_tiny", dtype="float32"), source=SOURCE).dtype == "float32"


@every_folder
def test_round_trip(name):
    config = read(CONFIGS[name])
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == config
    assert config_to_hf(config_from_hf(written)) == written


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "head"}, {"qk_norm": None}, {"qkv_bias": True}, {"output_bias": True}, {"sliding_window": 4},
        {"router_score": "sigmoid"}, {"selection_bias": True}, {"routed_scaling_factor": 2.0},
        {"shared_intermediate_size": 8}, {"dense_layers": (0,), "dense_intermediate_size": 8},
        {"expert_groups": 2, "groups_per_token": 2, "group_score": "best"},
        {"family": "mixtral", "qk_norm": None, "norm_topk_prob": False},
        {"family": "mixtral", "qk_norm": None, "norm_topk_prob": True, "clip_qkv": 1.0},
        {"family": "qwen2_moe", "qk_norm": None}, {"family": "qwen2_moe", "qk_norm": None, "output_bias": True},
        {"family": "qwen3_moe", "qk_norm": "head", "qkv_bias": True, "output_bias": False},
        {"family": "deepseek", "qk_norm": "width"},
    ],
)  # fmt: skip
def test_what_a_family_cannot_say_is_refused(changes):
    config = tiny_config(num_layers=2, **changes)
    message = refuses(lambda: config_to_hf(config))
    assert config.family in message or "is missing" in message or "must be" in message


def test_what_is_refused_is_named():
    config = full_config(shared_intermediate_size=21)
    refuses(lambda: config_to_hf(config), "deepseek_v3", "shared_gate=True")
    refuses(lambda: config_to_hf(tiny_config(output_bias=True)), "olmoe", "output_bias=True")
    refuses(lambda: config_to_hf(full_config(shared_gate=False)), "deepseek_v3", "shared_intermediate_size=15")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.sampled_from([2**31, 2**53, 2**64, 10**30])
    | st.floats() | st.text(max_size=5)
    | st.sampled_from(["", "yarn", "linear", "silu", "sigmoid", "fp8", "bfloat16", "float32"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["type", "rope_type", "factor", "rope_theta", "quant_method", "mscale"]) | st.text(max_size=3),
        inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
# A count of layers is limited: `test_absurd_counts_end_at_once` is about those.
MORE = ("new_option", "clip_qkv", "sliding_window", "rope_scaling", "head_dim", "n_group", "layer_types",
        "quantization_config", "num_nextn_predict_layers")  # fmt: skip
FIELDS = {name: [*config, *MORE] for name, config in CONFIGS.items()}


@settings(max_examples=400)
@given(name=st.sampled_from(FOLDERS), number=st.integers(0, 10**6), value=JSON | st.just(...))
def test_any_value_in_any_field_is_refused_or_gives_a_config(name, number, value):
    field = FIELDS[name][number % len(FIELDS[name])]
    new = changed(name, **{field: value})
    if value is ...:
        del new[field]
    if field == "num_hidden_layers" and type(value) is int and value > 10**6:
        return
    for reader in (read, lambda c: storage_from_hf(c, source=SOURCE)):
        result = outcome(lambda reader=reader: reader(new))
        if isinstance(result, InputError):
            assert SOURCE in str(result)
            str(result).encode()
        else:
            assert hash(result) == hash(reader(json.loads(json.dumps(new))))
            if isinstance(result, ModelConfig):
                assert config_from_hf(config_to_hf(result)) == result


@pytest.mark.parametrize(
    ("name", "field"),
    [("olmoe_tiny", "num_hidden_layers"), ("qwen2_moe_tiny", "num_hidden_layers"), ("olmoe_tiny", "num_experts")],
)
def test_absurd_counts_end_at_once(name, field, tmp_path):
    """10**12 layers or experts must not be listed one by one: in a process that may take little memory and time."""
    (tmp_path / "config.json").write_text(json.dumps(changed(name, **{field: 10**12})))
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / name / "model.safetensors").read_bytes())
    script = """
import resource, sys, time
from hetmoe.checkpoint.load import load_model
from hetmoe.errors import InputError
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
limit = int(status["VmSize"].split()[0]) * 1024 + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
seconds = int(time.process_time()) + 2
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
try:
    load_model(sys.argv[1])
except InputError as error:
    print("refused")
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout == "refused\n", run.stderr[-300:]


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_attention_heads", "intermediate_size"])
def test_numbers_of_thousands_of_digits_are_refused(field, tmp_path):
    huge = 10**4000
    fields = {field: huge, "head_dim": huge} | ({"num_key_value_heads": huge} if "heads" in field else {})
    (tmp_path / "config.json").write_text(json.dumps(changed("olmoe_tiny", **fields)))
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "olmoe_tiny" / "model.safetensors").read_bytes())
    refuses(lambda: load_model(tmp_path), str(tmp_path))
