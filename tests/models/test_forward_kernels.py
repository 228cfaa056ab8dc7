"""The whole model through the kernels, and through weights that are programmed on the way.

Converters are ideal: a code, or a choice of experts, that moves with the last bit would hide what is compared. Theirs
are compared in `tests/ops`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.programming import SeededWeights, program, seeded_weights
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.errors import InputError
from hetmoe.models import moe
from hetmoe.models.params import Params
from hetmoe.models.transformer import forward
from hetmoe.placement.plan import Plan, all_analog, experts_analog
from tests.models.tiny import full_config, random_params, random_tokens, tiny_config
from tests.ops.crossbar_battery import KERNELS

FULL, SMALL = full_config(), tiny_config()
KEY = jax.random.key(3)
ROUNDING = 4e-6  # of the largest logit: as in `test_forward_numpy.py`, for two float32 results

_forward = jax.jit(forward, static_argnames=("config", "implementation"))
_program = jax.jit(program, static_argnames="dense")


def ideal(**changes: Any) -> AnalogSpec:
    return analog_spec("additive", tile_rows=24, dac_bits=None, adc_bits=None, **changes)


@functools.cache
def params(config: Any) -> Params:
    return random_params(config, 0)


def mixed(plan: Plan) -> Plan:
    """Every other expert digital."""
    return dataclasses.replace(plan, experts=plan.experts.at[:, ::2].set(False))


def logits(config: Any, plan: Plan, spec: AnalogSpec, programmed: Any, implementation: str | None) -> np.ndarray:
    tokens = random_tokens(config, 1, (2, 9))
    return np.asarray(
        _forward(
            params(config), tokens, config, plan=plan, spec=spec, programmed=programmed, implementation=implementation
        )
    )


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(found - wanted).max() <= ROUNDING * np.abs(wanted).max()


# TPU's kernels take a minute to compile here (last run, and passed, on 2026-11-28); the next test has them too.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "interpret_tpu" else ()) for n in KERNELS]
)
def test_every_kind_of_module(name: str) -> None:
    """Latent attention, shared experts, a dense layer, the LM head, all stored; and nothing analog at all."""
    spec, plan = ideal(), mixed(all_analog(FULL))
    stored = _program(KEY, params(FULL), spec, dense=True)
    found, wanted = (logits(FULL, plan, spec, stored, n) for n in (name, "xla"))
    assert_same(found, wanted)
    off = jax.tree.map(jnp.zeros_like, plan)
    assert_same(
        logits(FULL, off, spec, stored, name), np.asarray(_forward(params(FULL), random_tokens(FULL, 1, (2, 9)), FULL))
    )
    assert np.abs(wanted - logits(FULL, off, spec, stored, "xla")).max() > 1000 * ROUNDING * np.abs(wanted).max()


@pytest.mark.parametrize("name", KERNELS)
def test_digital_experts(name: str) -> None:
    """Without a plan, and gradients too."""
    tokens = random_tokens(SMALL, 1, (2, 9))

    def loss(params: Params, name: str | None) -> tuple[jax.Array, jax.Array]:
        found = forward(params, tokens, SMALL, implementation=name)
        return jnp.sum(jnp.sin(found)), found

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnames="name")
    (gradient, found), (wanted_gradient, wanted) = (run(params(SMALL), name=n) for n in (name, "xla"))
    assert_same(np.asarray(found), np.asarray(wanted))
    for leaf, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        # Roundings of a whole backward pass: ten times those of the forward pass.
        assert np.abs(leaf - expected).max() <= 10 * ROUNDING * np.abs(expected).max()
    assert "grouped_crossbar" in str(jax.make_jaxpr(functools.partial(loss, name=name))(params(SMALL)))


@pytest.mark.parametrize(
    ("when", "implementation"), [("layer", "xla"), ("kernel", "xla"), *(("kernel", k) for k in KERNELS)]
)
def test_weights_programmed_on_the_way_are_the_stored_ones(when: Any, implementation: str) -> None:
    spec, plan = ideal(noise_scale=1.0), mixed(all_analog(SMALL))
    wanted = logits(SMALL, plan, spec, _program(KEY, params(SMALL), spec, dense=True), "xla")
    found = logits(SMALL, plan, spec, seeded_weights(KEY, dense=True, when=when), implementation)
    assert_same(found, wanted)
    other = logits(SMALL, plan, spec, seeded_weights(jax.random.key(4), dense=True, when=when), implementation)
    assert np.abs(other - wanted).max() > 1000 * ROUNDING * np.abs(wanted).max()


@pytest.mark.parametrize("when", ["layer", "kernel"])
def test_maximum_of_seeded_weights_sets_the_adc(when: Any) -> None:
    """8-bit converters, read noise too: XLA makes the same numbers, whether weights are stored or not."""
    spec, plan = analog_spec("additive", tile_rows=24, adc_bound=2.0), mixed(experts_analog(SMALL))
    wanted = logits(SMALL, plan, spec, _program(KEY, params(SMALL), spec, dense=False), None)
    found = logits(SMALL, plan, spec, seeded_weights(KEY, dense=False, when=when), None)
    # Most are the same to the last bit; an element of programmed weights that is not may move a code.
    assert np.median(np.abs(found - wanted)) <= ROUNDING * np.abs(wanted).max()


def test_vmap_over_keys_is_a_loop() -> None:
    spec, plan = ideal(noise_scale=1.0), mixed(experts_analog(SMALL))
    tokens, keys = random_tokens(SMALL, 1, (2, 9)), jax.random.split(KEY, 2)
    clean = params(SMALL)  # outside of what is traced: it is cached

    def one(key: jax.Array) -> jax.Array:
        weights = seeded_weights(key, dense=False, when="kernel")
        return forward(clean, tokens, SMALL, plan=plan, spec=spec, programmed=weights, implementation="interpret_tpu")

    for found, key in zip(np.asarray(jax.jit(jax.vmap(one))(keys)), keys, strict=True):
        assert_same(found, logits(SMALL, plan, spec, seeded_weights(key, dense=False, when="kernel"), "xla"))


@pytest.mark.parametrize(("name", "rows"), [("xla", 8), *((kernel, 16) for kernel in KERNELS)])
def test_blocks_of_kernels_have_at_least_16_rows(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """54 token copies for 8 experts fit blocks of 8 rows in XLA, which no kernel's matrix unit takes."""
    seen: dict[str, set[int]] = {"digital_products": set(), "expert_products": set()}
    for function, found in seen.items():
        original = getattr(moe, function)

        def spy(x: jax.Array, *given: Any, original: Any = original, found: Any = found, **named: Any) -> Any:
            found.add(x.shape[1])
            return original(x, *given, **named)

        monkeypatch.setattr(moe, function, spy)
    spec, tokens = ideal(), random_tokens(FULL, 1, (2, 9))
    stored = jax.eval_shape(functools.partial(program, dense=False), KEY, params(FULL), spec)

    def run(programmed: Any, plan: Plan | None) -> jax.Array:
        analog: dict[str, Any] = {} if plan is None else {"plan": plan, "spec": spec, "programmed": programmed}
        return forward(params(FULL), tokens, FULL, implementation=name, **analog)

    jax.eval_shape(run, stored, None)
    jax.eval_shape(run, stored, experts_analog(FULL))
    # Without crossbars XLA's experts go through all matrices block by block, by another function.
    assert seen == {"digital_products": set() if name == "xla" else {rows}, "expert_products": {rows}}


def test_bad_input() -> None:
    with pytest.raises(InputError, match="when='never' must be 'layer' or 'kernel'"):
        seeded_weights(KEY, dense=False, when="never")
    with pytest.raises(TypeError, match="a PRNG key is needed"):
        seeded_weights(0, dense=False, when="layer")
    weights = seeded_weights(KEY, dense=False, when="layer")
    assert isinstance(weights, SeededWeights)
    with pytest.raises(InputError, match="not programmed"):
        logits(SMALL, all_analog(SMALL), ideal(), weights, None)
    with pytest.raises(NotImplementedError, match="implementation='fast' does not exist"):
        logits(SMALL, experts_analog(SMALL), ideal(), weights, "fast")
    with pytest.raises(NotImplementedError, match="runs on TPU and NVIDIA GPU"):
        logits(SMALL, experts_analog(SMALL), ideal(), weights, "pallas")
