"""Meshes as text, what they divide, and devices that make one."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.models.config import LatentAttention, ModelConfig
from hetmoe.parallel.mesh import check_divides, describe_mesh, make_mesh, parse_mesh, parts_of, shard_of, window_parts
from hetmoe.parallel.shard import WHOLE, Shard
from tests.models.tiny import full_config, tiny_config

SIZES = st.integers(1, 10**9 - 1)


@pytest.mark.parametrize(
    ("text", "shard"),
    [
        ("data=2", Shard(data=2)),
        ("data=2,expert=4", Shard(data=2, expert=4)),
        ("tensor=8,seed=3,expert=16,data=1", Shard(tensor=8, seed=3, expert=16)),
        (" expert = 4 , data=02", Shard(expert=4, data=2)),
        ("data=1", WHOLE),
    ],
)
def test_axes_are_read_in_any_order(text: str, shard: Shard) -> None:
    assert parse_mesh(text) == shard


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts=2", "unknown axis 'experts'; use data, seed, expert, tensor"),
        ("Data=2", "unknown axis 'Data'"),
        ("data=2,,expert=2", "unknown axis ''"),
        ("data=2,", "unknown axis ''"),
        ("", "unknown axis ''"),
        ("=2", "unknown axis ''"),
        ("4", "unknown axis '4'"),
        ("data=2 expert=2", "data='2 expert=2' must be"),
        ("data=2,expert=2,data=2", "axis 'data' is named twice"),
        ("seed=0", "seed='0' must be a whole number of at least 1"),
        ("seed=-2", "seed='-2' must be"),
        ("seed=+2", "seed='+2' must be"),
        ("tensor=two", "tensor='two' must be"),
        ("tensor=2.0", "tensor='2.0' must be"),
        ("tensor=1e1", "tensor='1e1' must be"),
        ("tensor=²", "tensor='²' must be"),
        ("expert=", "expert='' must be"),
        ("expert", "expert='' must be"),
        ("expert=" + "9" * 5000, "must be a whole number of at least 1"),
    ],
)
def test_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as found:
        parse_mesh(text)
    assert repr(text)[:40] in str(found.value)


@given(shard=st.builds(Shard, data=SIZES, seed=SIZES, expert=SIZES, tensor=SIZES))
def test_what_describes_a_mesh_is_read_back(shard: Shard) -> None:
    assert parse_mesh(describe_mesh(shard)) == shard


@pytest.mark.parametrize(
    ("shard", "text", "parts"),
    [
        (WHOLE, "data=1", 1),
        (Shard(expert=4), "expert=4", 4),
        (Shard(tensor=2, data=3, expert=5, seed=7), "data=3,seed=7,expert=5,tensor=2", 210),
    ],
)
def test_axes_of_one_part_are_left_out(shard: Shard, text: str, parts: int) -> None:
    assert describe_mesh(shard) == text and parts_of(shard) == parts


# Every number that tensor has to divide is a multiple of 12 here, so that each can be made the only one that is not.
EVEN: dict[str, Any] = {
    "num_heads": 12, "num_kv_heads": 12, "head_dim": 2, "hidden_size": 24, "expert_intermediate_size": 36,
    "vocab_size": 48, "num_experts": 12,
}  # fmt: skip
LATENT = {"query_rank": 24, "kv_rank": 18, "content_dim": 1, "rope_dim": 6, "value_dim": 3}


def plain(**changes: Any) -> ModelConfig:
    return tiny_config(**(EVEN | changes))


def full(**changes: Any) -> ModelConfig:
    latent = LatentAttention(**(LATENT | {name: changes.pop(name) for name in list(changes) if name in LATENT}))
    whole = {"shared_intermediate_size": 60, "dense_intermediate_size": 72, "latent": latent}
    head_dim = latent.content_dim + latent.rope_dim
    return full_config(**(EVEN | whole | {"expert_groups": 4, "head_dim": head_dim} | changes))


@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 6, 12])
def test_what_is_divided_passes(tensor: int) -> None:
    for config in (plain(), full(), full(query_rank=None)):
        check_divides(Shard(tensor=tensor, expert=12), config, batch=24, seeds=None)


NOT_DIVIDED = [
    (plain(), Shard(expert=8), {}, "expert of 8 parts does not divide the 12 experts of a layer"),
    (plain(), Shard(expert=24), {}, "expert of 24 parts does not divide the 12 experts of a layer"),
    (plain(num_heads=6, num_kv_heads=6), Shard(tensor=4), {}, "tensor of 4 parts does not divide the 6 attention"),
    (plain(hidden_size=23), Shard(tensor=4), {}, "does not divide the 23 hidden_size"),
    (plain(expert_intermediate_size=21), Shard(tensor=4), {}, "the 21 expert_intermediate_size"),
    (plain(vocab_size=50), Shard(tensor=4), {}, "the 50 vocab_size"),
    (full(shared_intermediate_size=58), Shard(tensor=4), {}, "the 58 shared_intermediate_size"),
    (full(dense_intermediate_size=70), Shard(tensor=4), {}, "the 70 dense_intermediate_size"),
    (full(kv_rank=17), Shard(tensor=4), {}, "the 23 columns of kv_a"),
    (full(query_rank=22), Shard(tensor=4), {}, "the 22 query_rank"),
    (plain(), Shard(data=3, expert=4), {"batch": 16}, "data x expert of 12 parts does not divide the 16 windows"),
    (plain(), Shard(data=4), {"batch": 2}, "data x expert of 4 parts does not divide the 2 windows"),
    (plain(), Shard(seed=4), {"seeds": 6}, "seed of 4 parts does not divide the 6 noise seeds"),
]


@pytest.mark.parametrize(("config", "shard", "work", "message"), NOT_DIVIDED, ids=lambda v: v if type(v) is str else "")
def test_what_is_not_divided_is_named(config: ModelConfig, shard: Shard, work: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as found:
        check_divides(shard, config, **work)
    assert str(found.value).startswith(f"mesh {describe_mesh(shard)}: ")


def test_work_that_is_not_known_is_not_divided() -> None:
    check_divides(Shard(data=5, seed=7), plain())
    check_divides(Shard(data=5, seed=7), plain(), batch=5, seeds=7)
    check_divides(Shard(data=2, expert=3), plain(), batch=6)


@pytest.mark.parametrize(
    ("keys", "head_dim", "tensor", "fits"),
    [
        (12, 2, 4, True),  # 3 key heads each
        (4, 2, 4, True),
        (2, 2, 4, True),  # half a head's columns each
        (1, 12, 12, True),
        (1, 2, 4, False),  # 2 columns for 4 devices
        (6, 2, 4, False),  # neither a divisor nor a multiple
        (3, 8, 2, False),
    ],
)
def test_fewer_key_heads_than_parts_share_them(keys: int, head_dim: int, tensor: int, *, fits: bool) -> None:
    config = plain(num_kv_heads=keys, head_dim=head_dim)
    if fits:
        check_divides(Shard(tensor=tensor), config)
        return
    with pytest.raises(InputError, match=f"tensor of {tensor} parts neither divides the {keys} key heads"):
        check_divides(Shard(tensor=tensor), config)


def test_a_mesh_of_the_one_device() -> None:
    mesh = make_mesh(WHOLE)
    assert dict(mesh.shape) == {"data": 1, "seed": 1, "expert": 1, "tensor": 1}
    assert mesh.devices.ravel().tolist() == jax.devices() and shard_of(mesh) == WHOLE


def test_more_parts_than_devices_are_refused() -> None:
    assert jax.device_count() == 1
    with pytest.raises(InputError, match=r"mesh data=2,expert=3 has 6 parts, but there is 1 device"):
        make_mesh(Shard(data=2, expert=3))
    with pytest.raises(InputError, match="mesh data=2 has 2 parts, but there is 1 device"):
        make_mesh(Shard(data=2), jax.devices())


def test_windows_are_cut_along_data_and_experts() -> None:
    mesh = make_mesh(Shard(data=2, seed=5, expert=3, tensor=7), [str(number) for number in range(210)])
    assert window_parts(mesh) == 6 and window_parts(None) == 1


def test_given_devices_are_taken_in_order() -> None:
    devices = [f"device {number}" for number in range(7)]  # a mesh only holds them
    mesh = make_mesh(Shard(data=2, tensor=3), devices)
    assert mesh.devices.shape == (2, 1, 1, 3) and mesh.devices.ravel().tolist() == devices[:6]
    assert shard_of(mesh) == Shard(data=2, tensor=3)


def mesh_of(names: tuple[str, ...]) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()).reshape((1,) * len(names)), names)


def test_axes_that_a_mesh_lacks_are_not_cut() -> None:
    assert shard_of(mesh_of(("expert",))) == WHOLE
    described = jax.sharding.Mesh(np.arange(6).astype(object).reshape(3, 2), ("tensor", "data"))
    assert shard_of(described) == Shard(tensor=3, data=2)


def test_axes_of_other_names_are_refused() -> None:
    with pytest.raises(InputError, match="mesh axis 'model' is unknown; use data, seed, expert, tensor"):
        shard_of(mesh_of(("data", "model")))
