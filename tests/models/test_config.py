"""Validation of model configs: everything wrong is an InputError that names the field and the value."""

import math
import re
from typing import Any

import pytest

from hetmoe.errors import InputError
from hetmoe.models.config import LatentAttention, Rope, Yarn
from tests.models.tiny import full_config, tiny_config

COUNTS = (
    "vocab_size", "hidden_size", "expert_intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "num_experts", "experts_per_token", "max_position_embeddings",
)  # fmt: skip


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


@pytest.mark.parametrize("name", ["rms_norm_eps", "clip_qkv", "routed_scaling_factor"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf, "1", True])
def test_numbers_are_positive_and_finite(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"{name}={value!r}")):
        tiny_config(**{name: value})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf, "1", True])
def test_rotary_numbers_are_positive_and_finite(value: Any) -> None:
    for name in ("theta", "linear"):
        with pytest.raises(InputError, match=re.escape(f"rope.{name}={value!r}")):
            Rope(**({"theta": 1e4} | {name: value}))
    for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        with pytest.raises(InputError, match=re.escape(f"yarn.{name}={value!r}")):
            Yarn(**({"factor": 4.0, "original_positions": 16} | {name: value}))


def test_the_base_of_yarns_logarithms_is_above_one() -> None:
    for theta in (1.0, 0.5):
        Rope(theta=theta)
        with pytest.raises(InputError, match=f"rope.theta={theta} must be above 1"):
            Rope(theta=theta, yarn=Yarn(factor=4.0, original_positions=16))


SWITCHES = ("norm_topk_prob", "tie_embeddings", "qkv_bias", "output_bias", "selection_bias", "shared_gate")


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [0, 1, "no", None])
def test_switches_are_booleans(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"{name}={value!r}")):
        tiny_config(**{name: value})


@pytest.mark.parametrize("name", ["sliding_window", "shared_intermediate_size", "dense_intermediate_size"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
def test_optional_counts_are_whole_numbers_or_none(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"{name}={value!r}")):
        tiny_config(**{name: value})


LATENT: dict[str, Any] = {"query_rank": 17, "kv_rank": 13, "content_dim": 5, "rope_dim": 6, "value_dim": 7}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_dim": 5}, "latent.rope_dim=5 must be even"),
        ({"norm_eps": 0.0}, "latent.norm_eps=0.0"),
        *(({name: value}, f"latent.{name}={value!r}") for name in LATENT for value in (0, True, 2.0, "2")),
    ],
)
def test_latent_widths_are_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        LatentAttention(**(LATENT | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 12}, "head_dim=12 must be latent.content_dim + latent.rope_dim = 11"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"qk_norm": "head"}, "qk_norm='head' does not go with latent attention"),
        ({"clip_qkv": 1.0}, "clip_qkv=1.0 does not go with latent attention"),
        ({"sliding_window": 4}, "sliding_window=4 does not go with latent attention"),
        ({"qk_norm": "all"}, "qk_norm='all'"),
        ({"router_score": "relu"}, "router_score='relu'"),
        ({"group_score": "mean"}, "group_score='mean'"),
        ({"group_score": None}, "group_score=None"),
        ({"expert_groups": None}, "expert_groups=None"),
        ({"groups_per_token": None}, "groups_per_token=None"),
        ({"expert_groups": 3}, "expert_groups=3"),
        ({"expert_groups": 8}, "expert_groups=8 equal groups of at least 2"),
        ({"groups_per_token": 5}, "groups_per_token=5 of 4 groups"),
        ({"groups_per_token": 1}, "groups_per_token=1 of 4 groups of 2 experts cannot give experts_per_token=3"),
        ({"dense_layers": (3,)}, "dense_layers=(3,)"),
        ({"dense_layers": (-1,)}, "dense_layers=(-1,)"),
        ({"dense_layers": (True,)}, "dense_layers=(True,)"),
        ({"dense_layers": [1]}, "dense_layers=[1]"),
        ({"dense_layers": (1, 0)}, "ascending"),
        ({"dense_layers": (1, 1)}, "ascending"),
        ({"dense_layers": (0, 1, 2)}, "every layer is dense"),
        ({"dense_layers": ()}, "go together"),
        ({"dense_intermediate_size": None}, "go together"),
        ({"shared_intermediate_size": None}, "shared_gate=True needs shared_intermediate_size"),
    ],
)
def test_features_must_fit_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        full_config(**changes)


def test_runs_of_equal_layers() -> None:
    """(has experts, first, end) among the layers of that kind."""
    assert tiny_config(num_layers=3).runs == ((True, 0, 3),)
    assert full_config().runs == ((True, 0, 1), (False, 0, 1), (True, 1, 2))
    config = full_config(num_layers=6, dense_layers=(0, 1, 4))
    assert config.runs == ((False, 0, 2), (True, 0, 2), (False, 2, 3), (True, 2, 3))
    assert config.moe_layers == (2, 3, 5)
