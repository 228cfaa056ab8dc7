"""Tables of steps against the estimates they are made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.hardware.demand import model_demand
from hetmoe.hardware.deployment import Deployment, deployment
from hetmoe.hardware.description import open_description
from hetmoe.hardware.estimate import estimate
from hetmoe.hardware.machine import System, system_of
from hetmoe.hardware.routing import uniform_frequency
from hetmoe.hardware.step import Step, decode_step, decode_steps, prefill_step, stack_steps
from hetmoe.placement.plan import all_digital, experts_analog
from hetmoe.serving.costs import StepCosts, step_tables
from tests.models.tiny import tiny_config

CONFIG = tiny_config(max_position_embeddings=512)
SYSTEM: System = system_of(
    open_description("jetson-orin-nx", "digital"), open_description("ibm-3d-cim", "analog"),
    open_description("pcie4-x16", "link"),
)  # fmt: skip
FREQUENCY = uniform_frequency(CONFIG)


def where(analog: bool = True) -> Deployment:
    return deployment((experts_analog if analog else all_digital)(CONFIG), CONFIG)


def costs(max_batch: int, analog: bool = True, system: System = SYSTEM) -> StepCosts:
    return StepCosts(CONFIG, where(analog), step_tables(CONFIG, FREQUENCY, max_batch), system, "serial")


def asked(step: Step, analog: bool = True) -> tuple[float, float]:
    found = estimate(CONFIG, model_demand(CONFIG, where(analog), step), SYSTEM)
    return float(found.step_time), float(found.step_energy)


@pytest.mark.parametrize("analog", [True, False])
def test_estimated_steps_are_looked_up_exactly(analog: bool) -> None:
    tables, found = step_tables(CONFIG, FREQUENCY, 40), costs(40, analog)
    assert tables.batches[:16] == tuple(range(1, 17)) and tables.batches[-1] == 40
    assert tables.contexts[0] == 1 and tables.contexts[-1] == 512
    for batch in (1, 7, 16, tables.batches[20], 40):
        for context in (1, tables.contexts[5], 512):
            expected = asked(decode_step(CONFIG, FREQUENCY, batch, context), analog)
            assert found.decode(batch, context) == pytest.approx(expected, rel=1e-6)
    for prompt in (1, tables.contexts[9], 512):
        assert found.prefill(prompt) == pytest.approx(
            asked(prefill_step(CONFIG, FREQUENCY, 1, prompt), analog), rel=1e-6
        )


def test_between_them_costs_are_close() -> None:
    """Linear in the context (bytes and FLOP are); batches beyond 16 and prompts are curved: within 2 %."""
    found, tables = costs(200), step_tables(CONFIG, FREQUENCY, 200)
    contexts = [c for c in (40, 70, 200, 400) if c not in tables.contexts]
    assert len(contexts) == 4 and not {19, 90, 150} & set(tables.batches)
    for context in contexts:
        expected = asked(decode_step(CONFIG, FREQUENCY, 8, context))
        assert found.decode(8, context) == pytest.approx(expected, rel=1e-5)
        for batch in (19, 90, 150):
            expected = asked(decode_step(CONFIG, FREQUENCY, batch, context))
            assert found.decode(batch, context) == pytest.approx(expected, rel=0.02)
        assert found.prefill(context) == pytest.approx(asked(prefill_step(CONFIG, FREQUENCY, 1, context)), rel=0.02)


def test_many_decoding_steps_are_the_single_ones() -> None:
    config = dataclasses.replace(CONFIG, sliding_window=100)
    batches, contexts = [1, 3, 20], [1, 99, 100, 101, 512]
    many = decode_steps(config, FREQUENCY, batches, contexts)
    single = stack_steps([decode_step(config, FREQUENCY, b, c) for b in batches for c in contexts])
    jax.tree.map(np.testing.assert_array_equal, many, single)
    with pytest.raises(InputError, match="context=513"):
        decode_steps(config, FREQUENCY, [1], [1, 513])
    with pytest.raises(InputError, match="batch=0"):
        decode_steps(config, FREQUENCY, [0], [1])


def test_room_for_the_cache_is_what_the_weights_leave() -> None:
    warm = dataclasses.replace(SYSTEM, analog=dataclasses.replace(SYSTEM.analog, static_power=jnp.float32(0.25)))
    found, digital = costs(2, system=warm), costs(2, analog=False, system=warm)
    heads = CONFIG.num_layers * 2 * CONFIG.num_kv_heads * CONFIG.head_dim
    assert found.position_bytes == digital.position_bytes == heads * 2
    c = CONFIG
    expert = 3 * c.hidden_size * c.expert_intermediate_size
    experts = len(c.moe_layers) * c.num_experts * expert * 2
    # Numbers of 1e10 bytes in float32 are whole multiples of 1,024.
    assert found.room - digital.room == pytest.approx(experts, abs=2048)
    assert digital.room < float(SYSTEM.digital.capacity)
    assert digital.idle_power == float(SYSTEM.digital.idle_power)
    assert found.idle_power - digital.idle_power == 0.25  # one chip holds the tiny model


def test_other_copies_may_be_resident() -> None:
    where_all, tables = where(), step_tables(CONFIG, FREQUENCY, 1)
    found = StepCosts(CONFIG, where_all, tables, SYSTEM, "serial", stored=1e9)
    assert found.room == float(SYSTEM.digital.capacity) - 1e9


def test_the_kink_at_a_window_is_estimated() -> None:
    assert 100 in step_tables(dataclasses.replace(CONFIG, sliding_window=100), FREQUENCY, 1).contexts


def test_what_does_not_fit_is_an_error() -> None:
    small = SYSTEM.replace(
        analog=SYSTEM.analog.replace(chips=SYSTEM.analog.chips * 0 + 1, tiles=SYSTEM.analog.tiles * 0 + 2)
    )
    with pytest.raises(InputError, match="do not fit the chips"):
        costs(2, system=small)
    with pytest.raises(InputError, match="max_batch=0 must be at least 1"):
        step_tables(CONFIG, FREQUENCY, 0)


def test_a_context_of_one_position() -> None:
    config = tiny_config(max_position_embeddings=1)
    found = StepCosts(
        config,
        deployment(all_digital(config), config),
        step_tables(config, uniform_frequency(config), 1),
        SYSTEM,
        "serial",
    )
    assert found.decode(1, 1.0)[0] > 0
