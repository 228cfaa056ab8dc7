"""Which mesh axis cuts which axis of every parameter, programmed weight, plan and range, as stated here by name."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import hetmoe
from hetmoe.errors import InputError
from hetmoe.evaluate import calibrate as calibrate_module
from hetmoe.evaluate.calibrate import _observe
from hetmoe.models.abstract import abstract_params, is_leaf
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_config import config_from_hf
from hetmoe.parallel.mesh import check_divides
from hetmoe.parallel.rules import (
    calibration_specs,
    leaf_spec,
    param_shardings,
    param_specs,
    plan_specs,
    programmed_specs,
)  # fmt: skip
from hetmoe.parallel.shard import Shard
from hetmoe.placement.plan import Plan, all_analog, experts_analog, stack_plans
from tests.checkpoint.golden_files import ROOT
from tests.models.tiny import full_config, random_params, random_tokens, tiny_config
from tests.parallel.sharded_cases import FULL_WIDTHS, WIDTHS

ON_ALL = (None, None)
COLUMNS = (None, None, "tensor")
BIAS = (None, "tensor")
EXPERTS = (None, "expert", None, "tensor")
WHERE: dict[str, tuple[str | None, ...]] = {
    "embed": ("tensor", None), "lm_head": (None, "tensor"), "final_norm": (None,), "input_norm": ON_ALL,
    "ffn_norm": ON_ALL, "attention.q": COLUMNS, "attention.k": COLUMNS, "attention.v": COLUMNS, "attention.o": COLUMNS,
    "attention.q_bias": BIAS, "attention.k_bias": BIAS, "attention.v_bias": BIAS, "attention.o_bias": BIAS,
    "attention.q_norm": ON_ALL, "attention.k_norm": ON_ALL, "attention.q_a": COLUMNS, "attention.q_a_bias": BIAS,
    "attention.q_a_norm": ON_ALL, "attention.q_b": COLUMNS, "attention.kv_a": COLUMNS, "attention.kv_a_bias": BIAS,
    "attention.kv_a_norm": ON_ALL, "attention.kv_b": COLUMNS, "moe.router": (None, None, None),
    "moe.experts.gate": EXPERTS, "moe.experts.up": EXPERTS, "moe.experts.down": EXPERTS, "moe.selection_bias": ON_ALL,
    "moe.shared.gate": COLUMNS, "moe.shared.up": COLUMNS, "moe.shared.down": COLUMNS,
    "moe.shared_gate": (None, None, None), "ffn.gate": COLUMNS, "ffn.up": COLUMNS, "ffn.down": COLUMNS,
}  # fmt: skip
PROGRAMMED = {name: path for path in WHERE for name in [path.split(".")[-1]] if WHERE[path] in (COLUMNS, EXPERTS)} | {
    "gate": "moe.experts.gate", "up": "moe.experts.up", "down": "moe.experts.down",
    "shared_gate": "moe.shared.gate", "shared_up": "moe.shared.up", "shared_down": "moe.shared.down",
    "ffn_gate": "ffn.gate", "ffn_up": "ffn.up", "ffn_down": "ffn.down",
}  # fmt: skip


def published(name: str) -> ModelConfig:
    return config_from_hf(json.loads((ROOT / "experiments" / "architectures" / f"{name}.json").read_text()))


# With meshes that divide them.
MODELS: dict[str, tuple[ModelConfig, Shard]] = {
    "plain": (tiny_config(**WIDTHS, qkv_bias=True, output_bias=True), Shard(expert=8, tensor=2)),
    "tied": (tiny_config(**WIDTHS, qk_norm="head", tie_embeddings=True), Shard(expert=2, tensor=4)),
    "full": (full_config(**FULL_WIDTHS), Shard(expert=4, tensor=4)),
    "olmoe_7b": (published("olmoe_7b"), Shard(expert=64, tensor=16)),
    "deepseek_moe_16b": (published("deepseek_moe_16b"), Shard(expert=16, tensor=8)),
    "deepseek_v3_671b": (published("deepseek_v3_671b"), Shard(expert=128, tensor=64)),
    "moe_1t": (published("moe_1t"), Shard(expert=384, tensor=32)),
}
each_model = pytest.mark.parametrize("model", MODELS)


def named(tree: Any, of: Any = None) -> dict[str, Any]:
    """Leaves by path, without the stack of layers they are in."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=of)
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    return {path: leaf for path, leaf in found.items() if leaf is not None}


def short(path: str) -> str:
    return path.removeprefix("layers.").removeprefix("dense_layers.")


def check_cuts(shape: tuple[int, ...], spec: P, shard: Shard) -> None:
    assert len(spec) <= len(shape)
    for size, axis in zip(shape, spec, strict=False):
        assert axis is None or size % getattr(shard, axis) == 0, (shape, spec)


@each_model
def test_every_parameter_is_cut_as_its_name_says(model: str) -> None:
    config, shard = MODELS[model]
    check_divides(shard, config)
    leaves, specs = named(abstract_params(config), is_leaf), named(param_specs(config))
    assert leaves.keys() == specs.keys()
    for path, leaf in leaves.items():
        wanted = WHERE[short(path)]
        assert tuple(specs[path]) == wanted and tuple(leaf_spec(leaf)) == wanted, path
        check_cuts(leaf.shape, specs[path], shard)


def test_all_names_are_seen() -> None:
    assert {short(path) for config, _ in MODELS.values() for path in named(abstract_params(config), is_leaf)} == {
        *WHERE
    }


def test_parameters_of_a_mesh_that_lacks_axes() -> None:
    config = MODELS["plain"][0]
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    found = named(param_shardings(config, mesh))
    assert tuple(found["layers.moe.experts.up"].spec) == (None, "expert", None, None)
    assert tuple(found["embed"].spec) == (None, None)
    assert all(sharding.mesh == mesh for sharding in found.values())
    odd = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(InputError, match="mesh axis 'model' is unknown"):
        param_shardings(config, odd)


def wanted_programmed(path: str, *, per_column: bool) -> tuple[str | None, ...]:
    """Of `layers.NAME.w`, `lm_head.weight_max` and so on."""
    *_, name, field = path.split(".")
    spec = (None, "tensor") if name == "lm_head" else WHERE[PROGRAMMED[name]]
    if field == "weight_max":
        return (*spec[:-2], None, "tensor" if per_column else None)
    return spec


@pytest.mark.parametrize(
    ("model", "dense", "per_column"),
    [
        ("plain", True, True), ("tied", True, False), ("full", True, False), ("full", True, True),
        ("full", False, False), ("olmoe_7b", True, True), ("deepseek_v3_671b", True, False), ("moe_1t", False, True),
    ],
)  # fmt: skip
def test_programmed_weights_are_cut_as_their_targets(model: str, *, dense: bool, per_column: bool) -> None:
    config, shard = MODELS[model]
    spec = hetmoe.analog_spec("pcm", bound_axis="column" if per_column else "tile")
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype(jnp.bfloat16)),
        abstract_params(config),
        is_leaf=is_leaf,
    )
    shapes = jax.eval_shape(
        lambda key, params: hetmoe.program(key, params, spec, dense=dense),
        jax.eval_shape(lambda: jax.random.key(0)),
        params,
    )
    specs = programmed_specs(config, dense=dense, per_column=per_column)
    assert jax.tree.structure(specs) == jax.tree.structure(shapes)
    for path, found in named(specs).items():
        assert tuple(found) == wanted_programmed(path, per_column=per_column), path
        shape = named(shapes)[path].shape
        assert len(found) == len(shape), path
        check_cuts(shape, found, shard)


@pytest.mark.parametrize("make", [all_analog, experts_analog])
@pytest.mark.parametrize("model", ["plain", "full"])
def test_plans_are_cut_by_expert(model: str, make: Any) -> None:
    plan: Plan = make(MODELS[model][0])
    stacked = stack_plans([stack_plans([plan] * 3)] * 2)
    one, many = plan_specs(plan), plan_specs(stacked, "seed", None)
    assert jax.tree.structure(one) == jax.tree.structure(many) == jax.tree.structure(plan)
    assert {name: tuple(spec) for name, spec in named(one).items()} == {
        name: (None, "expert") if name == "experts" else () for name in named(plan)
    }
    assert {name: tuple(spec) for name, spec in named(many).items()} == {
        name: ("seed", None, None, "expert") if name == "experts" else ("seed", None) for name in named(plan)
    }
    for name, leaf in named(stacked).items():
        check_cuts(leaf.shape, named(many)[name], Shard(seed=2, expert=8))


@pytest.mark.parametrize("model", ["tied", "full"])
def test_ranges_of_experts_are_cut_by_expert(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shard = MODELS[model]
    shapes = functools.partial(jax.eval_shape, _observe, config=config, tile_rows=7, histogram=False, mesh=None)

    def observe_nothing(params, tokens, *_: object):  # what the real one returns, but not compiled: only shapes matter
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes(params, tokens))

    monkeypatch.setattr(calibrate_module, "_observe", observe_nothing)
    params, tokens = random_params(config, 0), random_tokens(config, 1, (2, 6))
    calibration = hetmoe.calibrate(params, tokens, config, hetmoe.RangeMethod(), tile_rows=7)
    specs = calibration_specs(calibration)
    assert jax.tree.structure(specs) == jax.tree.structure(calibration)
    of_experts = {"layers.experts_in", "layers.experts_mid", "tokens_seen"}
    found = named(specs)
    assert {name: tuple(spec) for name, spec in found.items()} == {
        name: (None, "expert") if name in of_experts else () for name in found
    }
    assert of_experts < found.keys()
    for name, leaf in named(calibration).items():
        check_cuts(leaf.shape, found[name], shard)
    assert calibration_specs(None) is None
