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
from hetmoe.models.config import ModelConfig
from hetmoe.models.transformer import _layer_hardware, check_analog, forward, hidden_states
from hetmoe.placement.plan import Plan, all_analog, all_digital, experts_analog
from tests.models.analog_tiny import TILE_ROWS, programmed_by_hand, random_ranges
from tests.models.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(num_layers=2)
NOISE = make_read_noise("additive", 0.01)


@functools.cache
def programmed(config: ModelConfig, *, per_column: bool = False, tile_rows: int = TILE_ROWS) -> ProgrammedWeights:
    """Dense modules included."""
    return programmed_by_hand(random_params(config, 0), 0, noise=0.1, per_column=per_column, tile_rows=tile_rows)


def without_dense(weights: ProgrammedWeights) -> ProgrammedWeights:
    """As `program(dense=False)` returns them."""
    return ProgrammedWeights(layers=dataclasses.replace(weights.layers, q=None, k=None, v=None, o=None), lm_head=None)


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
    refused("program(dense=True)", plan=plan, programmed=without_dense(programmed(CONFIG)))


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


def test_read_noise_of_every_layer_and_matrix_has_a_key_of_its_own() -> None:
    spec: AnalogSpec = analog_spec(tile_rows=TILE_ROWS, read_noise=NOISE)
    plan: Plan = all_analog(CONFIG)
    rows = jnp.arange(3, dtype=jnp.uint32)
    seen = set()
    for key in (jax.random.key(0), jax.random.key(1)):
        stacked = _layer_hardware(plan, spec, programmed(CONFIG), None, key)
        for layer in range(CONFIG.num_layers):
            hardware = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            for matrix in Matrix:
                if matrix is not Matrix.LM_HEAD:
                    read = hardware.read(matrix.name.lower(), rows)
                    assert read is not None
                    assert read[2] is rows
                    seen.add(tuple(jax.random.key_data(read[1]).tolist()))
    assert len(seen) == 2 * CONFIG.num_layers * (len(Matrix) - 1)
    silent = jax.tree.map(lambda leaf: leaf[0], _layer_hardware(plan, spec, programmed(CONFIG), None, None))
    assert silent.read("q", rows) is None
