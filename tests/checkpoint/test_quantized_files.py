"""Models with quantized experts on disk: the documented layout read by other means, exact bytes, and damage."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.save import save_model
from hetmoe.errors import InputError
from hetmoe.quantize.mixed import dense, make_mixed
from tests.checkpoint.golden_files import edit_tensors, load_refuses, read_tensors
from tests.quantize.tiny_quantized import CONFIG, RECIPE, bits, plain, quantized, same


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    save_model(tmp_path / "model", quantized(), made_by={"rule": "by hand"})
    return tmp_path / "model"


def by_the_documentation(tensors: dict[str, np.ndarray], key: str, bits: int, group: int) -> np.ndarray:
    """The weights `[input, output]` that a matrix stands for, float64, bit by bit from its tensors."""
    scale = tensors[f"{key}_scale"].astype(np.float64)
    zero = tensors.get(f"{key}_zero")
    groups, columns = scale.shape

    def plane(name: str, width: int) -> np.ndarray:
        stored = tensors[name].reshape(groups, -1, columns)
        parts = [(stored >> shift) & (2**width - 1) for shift in range(0, 8, width)]
        return np.concatenate(parts, axis=1)  # within a group the lowest bits hold its first rows

    codes = plane(f"{key}_codes", 2 if bits == 3 else bits).astype(np.float64)
    if bits == 3:
        codes += 4.0 * plane(f"{key}_codes_high", 1)
    middle = (2**bits - 1) / 2 if zero is None else zero.astype(np.float64)[:, None]
    assert codes.shape == (groups, group, columns)
    return ((codes - middle) * scale[:, None]).reshape(groups * group, columns)


def test_files_are_as_documented(folder: pathlib.Path) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (content["quant_method"], content["format"], content["made_by"]) == ("hetmoe", 1, {"rule": "by hand"})
    for column, (name, stem) in enumerate((("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))):
        for place, layer in enumerate(CONFIG.moe_layers):
            assert content["experts"][name][place] == [
                -1 if b == 0 else [g["bits"] for g in content["grids"]].index(b) for b in bits()[place, :, column]
            ]
            for expert in range(8):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{stem}.weight"
                wanted = np.asarray(dense(getattr(quantized().params.layers.moe.experts, name), jnp.float32))
                level = int(bits()[place, expert, column])
                if level:
                    found = by_the_documentation(tensors, key, level, RECIPE.group)
                    # (code - zero) is exact in float32, or rounded once, and so is its product with the step.
                    np.testing.assert_allclose(wanted[place, expert], found, rtol=2**-22, atol=0)
                    assert (f"{key}_zero" in tensors) == (level != 1) and key not in tensors
                else:
                    np.testing.assert_array_equal(wanted[place, expert], tensors[key].T)


def test_bytes_are_bits_and_stated_overhead(folder: pathlib.Path) -> None:
    """In files and in memory: codes of b bits, 16 bits of step and, above 1 bit, 16 of zero for every 32 weights."""
    tensors = read_tensors(folder / "model.safetensors")
    weights = 64 * 96
    wanted = sum(weights * b + weights // 32 * (16 if b == 1 else 32) for b in bits().flat if b)
    stored = [value.nbytes for name, value in tensors.items() if "weight_" in name]
    held = jax.tree.leaves([[p for p in m.pools if not isinstance(p, jax.Array)] for m in matrices()])
    assert 8 * sum(stored) == wanted == 8 * sum(array.nbytes for array in held)


def matrices() -> list[Any]:
    experts = quantized().params.layers.moe.experts
    return [experts.gate, experts.up, experts.down]


def test_there_and_back_by_both_formats(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert same(load_model(folder), quantized())
    orbax_directory.write(tmp_path / "orbax", quantized())
    loaded = load_model(tmp_path / "orbax")
    assert same(loaded, quantized()) and loaded.eos_token_id == 39
    save_model(tmp_path / "again", loaded, made_by={"rule": "by hand"}, shard_bytes=20_000)
    assert same(load_model(tmp_path / "again"), quantized())
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3


def test_pools_in_another_order_are_the_same_model(tmp_path: pathlib.Path) -> None:
    """Pools as a user may have made them: two of one precision, and one that is empty."""
    gate = quantized().params.layers.moe.experts.gate
    number, slot = np.asarray(gate.places.pool), np.asarray(gate.places.slot)
    split = np.where((number == 1) & (slot >= 2), len(gate.pools), number)
    pools = [*gate.pools, jax.tree.map(lambda leaf: leaf[2:], gate.pools[1])]
    pools[1] = jax.tree.map(lambda leaf: leaf[:2], gate.pools[1])
    pools, split = [*pools, jax.tree.map(lambda leaf: leaf[:0], pools[0])][::-1], len(pools) - split
    moe = quantized().params.layers.moe
    experts = moe.experts.replace(gate=make_mixed(pools, split))
    params = quantized().params.replace(layers=quantized().params.layers.replace(moe=moe.replace(experts=experts)))
    other = quantized().replace(params=params)
    np.testing.assert_array_equal(dense(experts.gate, jnp.float32), dense(gate, jnp.float32))
    save_model(tmp_path / "safetensors", other)
    orbax_directory.write(tmp_path / "orbax", other)
    for name in ("safetensors", "orbax"):
        assert same(load_model(tmp_path / name), quantized())


def test_other_dtypes_are_those_of_what_is_not_quantized(folder: pathlib.Path) -> None:
    params = load_model(folder, "bfloat16").params
    pools = params.layers.moe.experts.up.pools
    assert params.embed.dtype == pools[-1].dtype == jnp.bfloat16 and pools[0].scale.dtype == jnp.float16


GATE = "model.layers.0.mlp.experts.1.gate_proj.weight"  # at 3 bits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{GATE}_codes_high": None}, ("_codes_high is missing", "quantized to 3 bits")),
        ({f"{GATE}_scale": np.ones((2, 95), np.float16)}, ("_scale is F16 [2, 95], expected float16 [2, 96]",)),
        ({f"{GATE}_scale": np.ones((2, 96), np.float32)}, ("_scale is F32 [2, 96], expected float16",)),
        ({f"{GATE}_zero": np.full((2, 96), np.nan, np.float16)}, ("_zero holds NaN or infinity",)),
        ({f"{GATE}_scale": -np.ones((2, 96), np.float16)}, ("_scale holds negative steps",)),
        ({GATE: np.ones((96, 64), np.float32)}, ("1 tensors do not belong", GATE)),
        ({GATE.replace("experts.1", "experts.2"): None}, ("1 tensors are missing", "experts.2.gate_proj")),
    ],
)
def test_damaged_tensors_are_refused(folder: pathlib.Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    edit_tensors(folder, **changes)
    load_refuses(folder, str(folder), *words)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), 2, ("format=2", "supported: 1")),
        (("format",), None, ("format", "missing")),
        (("grids", 0, "bits"), 5, ("grids[0]", "bits=5")),
        (("grids", 0, "group"), 48, ("grids[0]", "group=48")),
        (("grids", 0, "group"), 128, ("group=128 does not divide the 64 rows", "these do: 32, 64")),
        (("grids", 0, "symmetric"), 1, ("symmetric=1 must be bool",)),
        (("grids", 0, "kind"), "int", ("kind='int' is not known",)),
        (("experts", "up", 1, 3), 3, ("experts.up[1][3]=3 must be one of the 3 grids",)),
        (("experts", "up", 1), [0] * 7, ("experts.up[1]", "one grid for each expert")),
        (("experts", "down"), [[0] * 8], ("experts.down places 1 layers of 8 experts; this model has 2 of 8",)),
        (("experts", "gate"), None, ("field 'gate' is missing",)),
        (("experts", "router"), [], ("router=[] is not known",)),
        (("activation_scheme",), "dynamic", ("activation_scheme='dynamic' is not known",)),
    ],
)
def test_malformed_layouts_are_refused(
    folder: pathlib.Path, path: tuple[Any, ...], value: object, words: tuple[str, ...]
) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    node = content["quantization_config"]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    file.write_text(json.dumps(content))
    load_refuses(folder, str(file) if "places" not in words[0] and "divide" not in words[0] else str(folder), *words)


def test_quantized_experts_are_not_sharded(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    orbax_directory.write(tmp_path / "orbax", quantized())
    for directory in (folder, tmp_path / "orbax"):
        with pytest.raises(InputError, match="cannot be spread over a mesh"):
            load_model(directory, mesh=mesh)


def test_a_matrix_alone_cannot_be_quantized(tmp_path: pathlib.Path) -> None:
    moe = plain().params.layers.moe
    experts = moe.experts.replace(gate=quantized().params.layers.moe.experts.gate)
    params = plain().params.replace(layers=plain().params.layers.replace(moe=moe.replace(experts=experts)))
    with pytest.raises(InputError, match="experts' up is not quantized beside matrices that are"):
        save_model(tmp_path / "model", plain().replace(params=params))
