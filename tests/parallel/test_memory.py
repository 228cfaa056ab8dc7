"""Memory of a device of a mesh, against arithmetic from published sizes, and the mesh that is chosen by it."""

import dataclasses
import itertools
import json
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_config import config_from_hf
from hetmoe.parallel.memory import (
    GIB,
    HEADROOM,
    Workload,
    bytes_per_device,
    check_fits,
    choose_mesh,
    memory_of_device,
)  # fmt: skip
from hetmoe.parallel.mesh import check_divides, describe_mesh, parse_mesh, parts_of
from hetmoe.parallel.shard import WHOLE, Shard
from tests.checkpoint.golden_files import ROOT
from tests.models.tiny import tiny_config


def fields(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "experiments" / "architectures" / f"{name}.json").read_text())


OLMOE, DEEPSEEK = (config_from_hf(fields(name)) for name in ("olmoe_7b", "deepseek_v3_671b"))
DIGITAL = Workload(batch=64, seq=512, seeds=8, dtype=jnp.bfloat16, weights=None, dense=False)
NOISY = dataclasses.replace(DIGITAL, weights="stored", dense=True)


def weights_of_olmoe(expert: int, tensor: int) -> dict[str, int]:
    """Numbers of weights on a device, from the fields of its config.json."""
    f = fields("olmoe_7b")
    h, layers, e, inner, v = (
        f[n] for n in ("hidden_size", "num_hidden_layers", "num_experts", "intermediate_size", "vocab_size")
    )
    return {
        "experts": layers * (e // expert) * 3 * h * (inner // tensor) if tensor == 1 else layers * (e // expert)
        * (2 * h * (inner // tensor) + inner * (h // tensor)),
        "attention": layers * 4 * h * (h // tensor),
        "head": h * (v // tensor),
        "embedding": (v // tensor) * h,
        "whole": layers * (h * e + 4 * h) + h,  # router; norms of input, experts, queries and keys; the last norm
    }  # fmt: skip


def weights_of_deepseek(expert: int, tensor: int) -> dict[str, int]:
    f = fields("deepseek_v3_671b")
    h, v, heads, q_rank, kv_rank = (
        f[n] for n in ("hidden_size", "vocab_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    content, rope, value = (f[n] for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    dense, e, inner = f["first_k_dense_replace"], f["n_routed_experts"], f["moe_intermediate_size"]
    layers = f["num_hidden_layers"]
    moe = layers - dense

    def columns(count: int) -> int:
        assert count % tensor == 0
        return count // tensor

    attention = (
        h * columns(q_rank) + q_rank * columns(heads * (content + rope)) + h * columns(kv_rank + rope)
        + kv_rank * columns(heads * (content + value)) + heads * value * columns(h)
    )  # fmt: skip

    def swiglu(width: int) -> int:
        return 2 * h * columns(width) + width * columns(h)

    return {
        "experts": moe * (e // expert) * swiglu(inner),
        "attention": layers * attention,
        "shared": moe * f["n_shared_experts"] * swiglu(inner),
        "ffn": dense * swiglu(f["intermediate_size"]),
        "head": h * columns(v),
        "embedding": columns(v) * h,
        # Routers, norms of input, experts and latents, the last norm; and biases of the choice, in float32: twice.
        "whole": moe * h * e + layers * (2 * h + q_rank + kv_rank) + h + 2 * moe * e,
    }


MESHES = ["data=1", "data=4", "seed=2", "expert=8", "tensor=4", "data=2,seed=2,expert=16,tensor=8"]


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_are_those_of_the_config(mesh: str) -> None:
    shard = parse_mesh(mesh)
    for config, count in ((OLMOE, weights_of_olmoe), (DEEPSEEK, weights_of_deepseek)):
        found = bytes_per_device(config, shard, DIGITAL)
        assert found["parameters"] == 2 * sum(count(shard.expert, shard.tensor).values())
        assert found["programmed weights"] == found["weights in force"] == 0


def test_whole_models_have_their_published_sizes() -> None:
    assert sum(weights_of_olmoe(1, 1).values()) == pytest.approx(6.92e9, rel=1e-3)
    assert sum(weights_of_deepseek(1, 1).values()) == pytest.approx(671e9, rel=1e-3)
    wide = bytes_per_device(OLMOE, WHOLE, dataclasses.replace(DIGITAL, dtype=jnp.float32))
    assert wide["parameters"] == 4 * sum(weights_of_olmoe(1, 1).values())


@pytest.mark.parametrize("mesh", MESHES)
def test_programmed_weights_by_when_they_are_made(mesh: str) -> None:
    shard = parse_mesh(mesh)

    def programmed(config: ModelConfig, weights: str | None, *, dense: bool) -> int:
        run = dataclasses.replace(DIGITAL, weights=weights, dense=dense)
        return bytes_per_device(config, shard, run)["programmed weights"]

    olmoe, deepseek = (count(shard.expert, shard.tensor) for count in (weights_of_olmoe, weights_of_deepseek))
    # In a layer of DeepSeek-V3 with experts there is more to program than in one without.
    for config, counts, dense_modules, of_layer, layers in (
        (OLMOE, olmoe, ("attention",), olmoe["attention"] // 16, 16),
        (
            DEEPSEEK,
            deepseek,
            ("attention", "shared", "ffn"),
            deepseek["attention"] // 61 + deepseek["shared"] // 58,
            58,
        ),
    ):
        everything = counts["experts"] + counts["head"] + sum(counts[name] for name in dense_modules)
        assert programmed(config, "stored", dense=True) == 2 * everything
        assert programmed(config, "stored", dense=False) == 2 * counts["experts"]
        assert programmed(config, "layer", dense=True) == 2 * (counts["experts"] // layers + of_layer)
        assert programmed(config, "layer", dense=False) == 2 * counts["experts"] // layers
        for weights, dense in itertools.product(("kernel", None), (False, True)):
            assert programmed(config, weights, dense=dense) == 0


@pytest.mark.parametrize("weights", ["stored", "layer", "kernel"])
def test_a_copy_of_the_largest_matrix_is_in_force(weights: str) -> None:
    def in_force(config: ModelConfig, shard: Shard, *, dense: bool) -> int:
        run = dataclasses.replace(DIGITAL, weights=weights, dense=dense)
        return bytes_per_device(config, shard, run)["weights in force"]

    assert in_force(OLMOE, WHOLE, dense=False) == 2 * 64 * 2048 * 1024  # up, of all experts of a layer
    assert in_force(OLMOE, Shard(expert=4, tensor=2), dense=False) == 2 * 16 * 2048 * 512
    assert in_force(OLMOE, Shard(expert=64), dense=True) == 2 * 2048 * 50304  # the head is larger than an expert
    assert in_force(OLMOE, Shard(expert=64), dense=False) == 2 * 2048 * 1024


def activations(shard: Shard, **changes: Any) -> int:
    return bytes_per_device(OLMOE, shard, dataclasses.replace(NOISY, **changes))["activations"]


def test_activations_grow_with_the_work() -> None:
    assert activations(WHOLE, batch=16) < activations(WHOLE, batch=32) < activations(WHOLE, batch=64)
    assert activations(WHOLE, seq=64) < activations(WHOLE, seq=512) < activations(WHOLE, seq=1024)
    assert activations(WHOLE) < activations(WHOLE, dtype=jnp.float32)
    assert activations(WHOLE) == activations(WHOLE, seeds=16) == activations(WHOLE, weights=None)
    # At least the residual stream and a float32 result of every copy, and no more than ten times as much.
    tokens = 64 * 512
    assert 1 < activations(WHOLE) / (tokens * 2048 * (2 + 8 * 4)) < 10


@pytest.mark.parametrize("axis", ["data", "expert", "tensor"])
def test_activations_fall_with_the_parts(axis: str) -> None:
    found = [activations(Shard(**{axis: parts})) for parts in (1, 4, 16)]
    assert found[0] > found[1] > found[2]
    assert activations(Shard(seed=4)) == activations(WHOLE)


def test_what_fits_is_returned_up_to_the_headroom() -> None:
    found = bytes_per_device(OLMOE, Shard(expert=4), NOISY)
    needed = sum(found.values())
    assert check_fits(OLMOE, Shard(expert=4), NOISY, None) == found
    assert check_fits(OLMOE, Shard(expert=4), NOISY, int(needed / HEADROOM) + 2) == found
    with pytest.raises(InputError, match="does not fit"):
        check_fits(OLMOE, Shard(expert=4), NOISY, int(needed / HEADROOM) - 2)


def test_what_does_not_fit_is_refused_with_numbers_and_a_mesh_that_does() -> None:
    found = bytes_per_device(OLMOE, Shard(data=2), NOISY)
    with pytest.raises(InputError) as refused:
        check_fits(OLMOE, Shard(data=2), NOISY, 24 * GIB)
    text = str(refused.value)
    assert text.startswith("mesh data=2 does not fit: ") and "90% of its 24.00 GiB are 21.60 GiB" in text
    largest = max(found, key=found.__getitem__)
    assert f"needs {sum(found.values()) / 2**30:.2f} GiB ({largest}: {found[largest] / 2**30:.2f} GiB)" in text
    hint = re.search(r"--mesh (\S+) \((\d+) devices\) would$", text)
    assert hint is not None
    shard = parse_mesh(hint[1])
    assert parts_of(shard) == int(hint[2])
    check_divides(shard, OLMOE, batch=NOISY.batch, seeds=NOISY.seeds)
    assert sum(check_fits(OLMOE, shard, NOISY, 24 * GIB).values()) < 21.6 * GIB
    # Half as many devices would not do.
    with pytest.raises(InputError, match="no mesh of"):
        choose_mesh(OLMOE, parts_of(shard) // 2, NOISY, 24 * GIB)


def test_what_fits_nowhere_is_refused_with_advice() -> None:
    config = tiny_config(vocab_size=2**20, hidden_size=2**10)  # its 4 heads and 8 experts leave little to cut
    run = dataclasses.replace(NOISY, seeds=1, batch=8)
    with pytest.raises(InputError, match=r"no mesh of up to 4096 such devices would; try .*--batch"):
        check_fits(config, WHOLE, run, GIB // 8)


# Divided by anything that is a power of two, up to 16 columns and 8 experts.
SMALL = tiny_config(
    num_experts=8, num_heads=16, num_kv_heads=16, hidden_size=256, expert_intermediate_size=256, vocab_size=4096
)
RUN = Workload(batch=16, seq=32, seeds=4, dtype=jnp.float32, weights="stored", dense=True)


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        (1, "data=1"),
        (2, "seed=2"),
        (4, "seed=4"),
        (8, "data=2,seed=4"),  # there are 4 seeds
        (64, "data=16,seed=4"),
        (128, "data=16,seed=4,tensor=2"),  # data and expert cut the 16 windows
        (256, "data=16,seed=4,tensor=4"),
    ],
)
def test_seeds_are_spread_first_then_windows(devices: int, mesh: str) -> None:
    assert describe_mesh(choose_mesh(SMALL, devices, RUN, None)) == mesh
    assert describe_mesh(choose_mesh(SMALL, devices, RUN, 2**40)) == mesh
    assert choose_mesh(SMALL, devices, RUN, None) == choose_mesh(SMALL, devices, RUN, None)


def test_experts_are_cut_as_far_as_memory_asks_and_columns_last() -> None:
    run = dataclasses.replace(RUN, seq=1)  # weights take nearly all memory

    def needed(mesh: str) -> int:
        return int(sum(bytes_per_device(SMALL, parse_mesh(mesh), run).values()) / HEADROOM) + 2

    for mesh in ("data=2,seed=4", "seed=4,expert=2", "seed=2,expert=4", "expert=8", "expert=4,tensor=2"):
        assert describe_mesh(choose_mesh(SMALL, 8, run, needed(mesh))) == mesh
    # Less than any mesh needs that does not cut experts.
    assert describe_mesh(choose_mesh(SMALL, 8, run, needed("data=8") - 100)) == "seed=4,expert=2"


def test_only_meshes_that_divide_are_chosen() -> None:
    without_seeds = dataclasses.replace(RUN, weights=None)
    assert choose_mesh(SMALL, 8, without_seeds, None) == Shard(data=8)  # nothing is analog: there are no seeds
    assert choose_mesh(SMALL, 6, dataclasses.replace(RUN, batch=3, seeds=2), None) == Shard(data=3, seed=2)
    assert choose_mesh(SMALL, 8, dataclasses.replace(RUN, batch=1, seeds=1), None) == Shard(tensor=8)
    with pytest.raises(
        InputError, match="no mesh of 7 devices divides 8 experts, 16 heads, batches of 16 windows and 4"
    ):
        choose_mesh(SMALL, 7, RUN, None)


def test_no_mesh_of_so_many_devices_fits() -> None:
    least = min(
        sum(bytes_per_device(SMALL, parse_mesh(text), RUN).values())
        for text in ("data=2", "seed=2", "expert=2", "tensor=2")
    )
    with pytest.raises(InputError) as refused:
        choose_mesh(SMALL, 2, RUN, int(least / HEADROOM) - 2)
    gib = int(least / HEADROOM) - 2
    assert f"needs {least / 2**30:.2f} GiB on each, 90% of its {gib / 2**30:.2f} GiB" in str(refused.value)
    assert "no mesh of 2 devices fits" in str(refused.value)


def device(**has: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"platform": "gpu", "device_kind": "something new"} | has))


def test_memory_is_what_the_driver_says_or_what_the_maker_does() -> None:
    assert memory_of_device(device(memory_stats=lambda: {"bytes_limit": 123, "bytes_in_use": 5})) == 123
    for stats in (dict, lambda: None, lambda: {"bytes_in_use": 5}):
        assert memory_of_device(device(memory_stats=stats)) is None
        assert memory_of_device(device(memory_stats=stats, device_kind="TPU v5 lite")) == 16 * 2**30
    assert memory_of_device(device(platform="tpu", device_kind="TPU v4")) == 32 * 2**30
    assert memory_of_device(device(device_kind="NVIDIA H200")) == 141 * 10**9


def test_memory_of_a_cpu_is_its_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}[name])
    assert memory_of_device(jax.devices("cpu")[0]) == 2**32
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    assert memory_of_device(device(platform="cpu")) == 2**29
