"""Analog arguments that are incomplete, or made for another model or other tiles, are refused before anything runs."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hetmoe.analog.programming import Matrix, ProgrammedWeights
from hetmoe.analog.read_noise import make_read_noise
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.errors import InputError
from hetmoe.models.abstract import abstract_params
from hetmoe.models.analog_arguments import check_analog
from hetmoe.models.analog_stack import stacked_hardware
from hetmoe.models.config import ModelConfig
from hetmoe.models.transformer import forward, hidden_states
from hetmoe.placement.plan import Plan, all_analog, all_digital, experts_analog
from tests.models.analog_tiny import EXPERT_MATRICES, TILE_ROWS, programmed_by_hand, random_ranges
from tests.models.tiny import full_config, random_params, random_tokens, tiny_config

CONFIG = tiny_config(num_layers=2)
NOISE = make_read_noise("additive", 0.01)


@functools.cache
def programmed(config: ModelConfig, *, per_column: bool = False, tile_rows: int = TILE_ROWS) -> ProgrammedWeights:
    """Dense modules included."""
    return programmed_by_hand(random_params(config, 0), 0, noise=0.1, per_column=per_column, tile_rows=tile_rows)


def without_dense(weights: ProgrammedWeights) -> ProgrammedWeights:
    """As `program(dense=False)` returns them."""
    return ProgrammedWeights(
        layers={name: weights.layers[name] for name in EXPERT_MATRICES}, dense_layers={}, lm_head=None
    )


def arguments(**changes: Any) -> dict[str, Any]:
    """A complete set that fits, with some replaced."""
    return {
        "plan": all_analog(CONFIG),
        "spec": analog_spec(tile_rows=TILE_ROWS),
        "programmed": programmed(CONFIG),
        "calibration": random_ranges(CONFIG, 0),
        "read_key": None,
        **changes,
    }


def refused(words: str, **changes: Any) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        check_analog(CONFIG, **arguments(**changes))


NOTHING: dict[str, None] = dict.fromkeys(("plan", "spec", "programmed", "calibration", "read_key"))


def test_complete_sets_are_accepted() -> None:
    check_analog(CONFIG, **arguments())
    check_analog(CONFIG, **arguments(calibration=None))
    check_analog(CONFIG, **NOTHING)
    noisy = analog_spec(tile_rows=TILE_ROWS, read_noise=NOISE)
    check_analog(CONFIG, **arguments(spec=noisy, read_key=jax.random.key(0)))
    for plan in (all_digital(CONFIG), experts_analog(CONFIG)):
        check_analog(CONFIG, **arguments(plan=plan, programmed=without_dense(programmed(CONFIG))))
    columns = analog_spec(tile_rows=TILE_ROWS, bound_axis="column")
    check_analog(CONFIG, **arguments(spec=columns, programmed=programmed(CONFIG, per_column=True)))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), programmed(CONFIG))
    check_analog(CONFIG, **arguments(programmed=narrow))


@pytest.mark.parametrize("absent", ["plan", "spec", "programmed"])
def test_what_is_missing_is_named(absent: str) -> None:
    refused(f"missing: {absent}", **{absent: None})
    others = {name: None for name in ("plan", "spec", "programmed") if name != absent}
    refused(f"missing: {', '.join(others)}", **others)


@pytest.mark.parametrize("extra", [{"calibration": random_ranges(CONFIG, 0)}, {"read_key": jax.random.key(0)}])
def test_analog_options_without_analog_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="calibration and read_key are used on the analog path only"):
        check_analog(CONFIG, **(NOTHING | extra))


def test_read_noise_needs_its_key_and_a_key_its_noise() -> None:
    refused("spec.read_noise and read_key go together", read_key=jax.random.key(0))
    refused("spec.read_noise and read_key go together", spec=analog_spec(tile_rows=TILE_ROWS, read_noise=NOISE))


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), 0, jax.random.key(0, impl="rbg")])
def test_read_key_must_be_a_threefry_key(key: Any) -> None:
    with pytest.raises(TypeError, match=r"threefry|PRNG key"):
        check_analog(CONFIG, **arguments(spec=analog_spec(tile_rows=TILE_ROWS, read_noise=NOISE), read_key=key))


def test_plan_of_another_model_is_refused() -> None:
    for other in (tiny_config(num_layers=3), tiny_config(num_layers=2, num_experts=4)):
        refused("plan: experts has shape", plan=all_analog(other))


@pytest.mark.parametrize("given", ["attention", "lm_head"])
def test_dense_modules_must_be_programmed(given: str) -> None:
    plan = dataclasses.replace(all_digital(CONFIG), **{given: getattr(all_analog(CONFIG), given)})
    refused("make `programmed` with dense=True", plan=plan, programmed=without_dense(programmed(CONFIG)))


@pytest.mark.parametrize(
    "changes",
    [{"num_experts": 4}, {"num_layers": 3}, {"hidden_size": 22}, {"expert_intermediate_size": 20}, {"vocab_size": 39}],
    ids=lambda changes: next(iter(changes)),
)
def test_weights_programmed_for_another_model_are_refused(changes: dict[str, int]) -> None:
    refused("programmed", programmed=programmed(dataclasses.replace(CONFIG, **changes)))


@pytest.mark.parametrize("options", [{"tile_rows": 512}, {"tile_rows": 8}, {"per_column": True}])
def test_weights_programmed_for_other_tiles_are_refused(options: dict[str, Any]) -> None:
    """Their maxima would be those of other tiles: the ADC bounds silently wrong."""
    refused("programmed", programmed=programmed(CONFIG, **options))


@pytest.mark.parametrize("tile_rows", [6, 512])
def test_calibration_for_other_tiles_is_refused(tile_rows: int) -> None:
    """JAX clamps an index beyond the end: the last range would silently serve the other row-blocks."""
    spec = analog_spec(tile_rows=tile_rows)
    refused("tile_rows", spec=spec, programmed=programmed(CONFIG, tile_rows=tile_rows))


@pytest.mark.parametrize("changes", [{"num_experts": 4}, {"num_layers": 3}])
def test_calibration_of_another_model_is_refused(changes: dict[str, int]) -> None:
    refused("calibration", calibration=random_ranges(dataclasses.replace(CONFIG, **changes), 0))


def test_forward_and_hidden_states_check_first() -> None:
    params, tokens = random_params(CONFIG, 0), random_tokens(CONFIG, 0, (1, 2))
    for run in (forward, hidden_states):
        with pytest.raises(InputError, match="missing: spec, programmed"):
            run(params, tokens, CONFIG, plan=all_analog(CONFIG))


FULL = full_config()


def full(**changes: Any) -> dict[str, Any]:
    """A complete set for the model that has every kind of module, with some replaced."""
    complete = {"plan": all_analog(FULL), "programmed": programmed(FULL), "calibration": random_ranges(FULL, 0)}
    return arguments(**(complete | changes))


def refused_full(words: str, **changes: Any) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        check_analog(FULL, **full(**changes))


def test_complete_sets_with_every_kind_of_module_are_accepted() -> None:
    check_analog(FULL, **full())
    check_analog(FULL, **full(calibration=None))
    for plan in (all_digital(FULL), experts_analog(FULL)):
        check_analog(FULL, **full(plan=plan, programmed=without_dense(programmed(FULL))))


@pytest.mark.parametrize("given", ["attention", "shared_experts", "dense_ffn", "lm_head"])
def test_every_kind_of_dense_module_must_be_programmed(given: str) -> None:
    plan = dataclasses.replace(all_digital(FULL), **{given: getattr(all_analog(FULL), given)})
    refused_full("make `programmed` with dense=True", plan=plan, programmed=without_dense(programmed(FULL)))


@pytest.mark.parametrize("kind", ["layers", "dense_layers"])
def test_matrices_that_are_absent_or_too_many_are_refused(kind: str) -> None:
    stack = getattr(programmed(FULL), kind)
    for name in stack:
        fewer = {other: matrix for other, matrix in stack.items() if other != name}
        for changed in (fewer, stack | {"k": stack[name]}):
            refused_full(f"programmed {kind} hold", programmed=dataclasses.replace(programmed(FULL), **{kind: changed}))


@pytest.mark.parametrize("kind", ["layers", "dense_layers"])
def test_ranges_of_another_shape_are_refused(kind: str) -> None:
    ranges = getattr(random_ranges(FULL, 0), kind)
    for site, values in ranges.items():
        fewer = {other: array for other, array in ranges.items() if other != site}
        for changed in (fewer, ranges | {site: values[1:]}, ranges | {site: values[..., :-1]}):
            calibration = dataclasses.replace(random_ranges(FULL, 0), **{kind: changed})
            refused_full(f"calibration {site} has shape", calibration=calibration)


@pytest.mark.parametrize(
    "changes",
    [
        {"shared_intermediate_size": 14},
        {"dense_intermediate_size": 18},
        {"dense_layers": (0, 1)},
        {"latent": dataclasses.replace(FULL.latent, kv_rank=12)},
        {"latent": dataclasses.replace(FULL.latent, query_rank=16)},
        {"latent": dataclasses.replace(FULL.latent, query_rank=None)},
        {"latent": dataclasses.replace(FULL.latent, value_dim=8)},
    ],
    ids=str,
)
def test_weights_of_other_modules_are_refused(changes: dict[str, Any]) -> None:
    refused_full("programmed", programmed=programmed(dataclasses.replace(FULL, **changes)))


def test_read_noise_of_every_layer_and_matrix_has_a_key_of_its_own() -> None:
    """Of both kinds of layers; the LM head's is folded with a number between theirs."""
    spec: AnalogSpec = analog_spec(tile_rows=TILE_ROWS, read_noise=NOISE)
    rows = jnp.arange(3, dtype=jnp.uint32)
    seen = set()
    for config in (CONFIG, FULL):
        plan: Plan = all_analog(config)
        for seed in (0, 1):
            key = jax.random.key(10 * config.num_layers + seed)
            kinds = stacked_hardware(abstract_params(config), config, plan, spec, programmed(config), None, key, None)
            assert kinds.keys() == ({True, False} if config.dense_layers else {True})
            head = jax.random.fold_in(jax.random.fold_in(key, len(config.moe_layers)), Matrix.LM_HEAD)
            seen.add(tuple(jax.random.key_data(head).tolist()))
            for moe, stacked in kinds.items():
                for layer in range(len(config.moe_layers if moe else config.dense_layers)):
                    hardware = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
                    for matrix in Matrix:
                        if matrix is not Matrix.LM_HEAD:
                            read = hardware.read(matrix.name.lower(), rows)
                            assert read is not None
                            assert read[2] is rows
                            seen.add(tuple(jax.random.key_data(read[1]).tolist()))
    assert len(seen) == 2 * (2 + 3) * (len(Matrix) - 1) + 2 * 2
    params = abstract_params(CONFIG)
    silent = stacked_hardware(params, CONFIG, all_analog(CONFIG), spec, programmed(CONFIG), None, None, None)[True]
    assert jax.tree.map(lambda leaf: leaf[0], silent).read("q", rows) is None
