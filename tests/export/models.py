"""Tiny models to export: digital, analog, and with experts at several precisions, some of them analog."""

import functools
from typing import Any, NamedTuple

import jax

from hetmoe.analog.programming import program
from hetmoe.analog.spec import analog_spec
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.transformer import forward
from hetmoe.placement.plan import all_analog, experts_analog
from tests.models.test_forward_quantized import CONFIG, models, partly
from tests.models.tiny import full_config, random_params, tiny_config

SPEC = analog_spec("additive", tile_rows=32, adc_bound=4.0, noise_scale=2.0)
KEY = jax.random.key(5)

run_forward = jax.jit(forward, static_argnames=("config", "implementation"))
_program = jax.jit(program, static_argnames="dense")


class Case(NamedTuple):
    model: Model
    analog: dict[str, Any]

    def logits(self, tokens: Any) -> jax.Array:
        return run_forward(self.model.params, tokens, self.model.config, **self.analog)


def make_model(params: Params, config: ModelConfig) -> Model:
    return Model(params=params, config=config, tokenizer=None, eos_token_id=None, name="tiny")


@functools.cache
def case(name: str) -> Case:
    if name == "mixed":
        params, config = models()[0], CONFIG
    else:
        config = full_config() if name.startswith("full") else tiny_config()
        params = random_params(config, 0)
    if name in ("plain", "full"):
        return Case(make_model(params, config), {})
    plan = partly(experts_analog(config)) if name == "mixed" else all_analog(config)
    programmed = _program(KEY, params, SPEC, dense=plan.switches_dense)
    return Case(make_model(params, config), {"plan": plan, "spec": SPEC, "programmed": programmed})
