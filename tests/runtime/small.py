"""A small model, its deployment and what a policy knows of it, for tests of the runtime."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.hardware.description import open_description
from hetmoe.models.model import Model
from hetmoe.runtime.knowledge import Costs, make_knowledge
from hetmoe.runtime.policy import Knowledge
from tests.models.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(num_layers=2, num_experts=4, hidden_size=24, expert_intermediate_size=40)
SPEC: AnalogSpec = analog_spec("pcm", noise_scale=2.0, time_s=1.0, tile_rows=16, adc_bound=4.0)
DESCRIBED = {
    "digital": open_description("a100-80gb", "digital"),
    "analog": open_description("ibm-3d-cim", "analog"),
    "link": open_description("pcie4-x16", "link"),
}


@functools.cache
def model() -> Model:
    return Model(params=random_params(CONFIG, 0), config=CONFIG, tokenizer=None, eos_token_id=0, name="tiny")


def frequency() -> np.ndarray:
    return np.full((2, 4), 0.5)


@functools.cache
def knowledge() -> Knowledge:
    windows = random_tokens(CONFIG, 1, (4, 12))
    return make_knowledge(model(), windows, SPEC, frequency(), **DESCRIBED, costs=Costs(batch=4), key=jax.random.key(5))


def made_up(seed: int, layers: int = 2, experts: int = 6) -> Knowledge:
    """Knowledge of no model; energies are whole numbers, so that float32 sums them exactly."""
    rng = np.random.default_rng(seed)
    shape = (layers, experts)
    analog = rng.integers(1, 4, shape)
    one = {
        "noise_loss": rng.exponential(size=shape), "scale_loss": 5 * rng.exponential(size=shape),
        "fresh_rest": rng.uniform(0.05, 0.1, shape), "ages": np.array([0.0, 1e3, 1e5]),
        "growth": np.array([1.1, 1.3, 2.0]), "digital_energy": analog + rng.integers(1, 20, shape),
        "analog_energy": analog, "move_energy": 8.0, "program_energy": 64.0, "probe_energy": 2.0,
        "joules_per_nat": 10.0, "horizon_tokens": 1e3, "action_share": 0.5, "margin": 0.2, "stale": 0.05,
        "dwell_s": 3600.0, "memory": 1.0,
    }  # fmt: skip
    return Knowledge(**{name: jnp.asarray(value, jnp.float32) for name, value in one.items()})
