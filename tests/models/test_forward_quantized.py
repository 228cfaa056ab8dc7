"""Models whose experts are quantized, analog, or neither, side by side."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.programming import program, seeded_weights
from hetmoe.analog.read_noise import make_read_noise
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.decode import empty_cache, extend
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.transformer import forward
from hetmoe.placement.plan import Plan, all_analog, experts_analog
from hetmoe.placement.scores import score_experts
from hetmoe.quantize.expected_loss import expected_increase
from hetmoe.quantize.mixed import dense, is_mixed
from tests.models.tiny import random_params, random_tokens, tiny_config
from tests.ops.crossbar_battery import KERNELS
from tests.quantize.random_quantized import random_mixed

CONFIG = tiny_config(
    hidden_size=64, expert_intermediate_size=128, num_layers=2, head_dim=16, num_experts=6, experts_per_token=2
)
POOL = np.array([[0, 3, 3, 1, 2, 3], [3, 2, 3, 0, 0, 1]])  # 3: not quantized
SPEC = analog_spec("additive", tile_rows=32, adc_bound=4.0, noise_scale=2.0)
KEY = jax.random.key(5)

_forward = jax.jit(forward, static_argnames=("config", "implementation"))
_program = jax.jit(program, static_argnames="dense")


def _eighth(leaf: jax.Array) -> jax.Array:
    """Smaller steps and weights: on random grids weights are of order 1."""
    return (leaf / 8).astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@functools.cache
def models() -> tuple[Params, Params]:
    """(with quantized experts, with the weights that they stand for)."""
    return with_quantized_experts(CONFIG, POOL)


def with_quantized_experts(config: ModelConfig, pool: np.ndarray) -> tuple[Params, Params]:
    """As `models`, for experts in any pools."""
    base = random_params(config, 0)
    moe = base.layers.moe
    shapes = {name: getattr(moe.experts, name).shape[2:] for name in ("gate", "up", "down")}
    mixed = {name: random_mixed(n, pool, *shape)[0] for n, (name, shape) in enumerate(shapes.items())}
    small = {name: jax.tree.map(_eighth, matrix) for name, matrix in mixed.items()}

    def with_experts(leaves: dict[str, Any]) -> Params:
        experts = dataclasses.replace(moe.experts, **leaves)
        return base.replace(layers=base.layers.replace(moe=moe.replace(experts=experts)))

    plain = {name: dense(m, jnp.float32) for name, m in small.items()}
    return with_experts(small), with_experts(plain)


def tokens() -> jax.Array:
    return random_tokens(CONFIG, 1, (2, 9))


def partly(plan: Plan) -> Plan:
    """Only experts that are not quantized, and not all of those."""
    analog = POOL == 3
    analog[0, 1] = False
    return dataclasses.replace(plan, experts=jnp.asarray(analog))


def assert_same(found: Any, wanted: Any) -> None:
    # The same weights in the same order of operations, but for that of sums: a float32 rounding of 64 terms.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())


def test_digital_model_is_that_of_the_weights_that_codes_stand_for() -> None:
    quantized, plain = models()
    assert_same(_forward(quantized, tokens(), CONFIG), _forward(plain, tokens(), CONFIG))


@pytest.mark.parametrize("is_analog", [False, True])
def test_decoding_gives_the_logits_of_the_whole_text(is_analog: bool) -> None:
    quantized, plain = models()
    spec = analog_spec("additive", noise_scale=2.0, dac_bits=None, adc_bits=None)
    analog: dict[str, Any] = {}
    if is_analog:
        held = _program(KEY, quantized, spec, dense=False)
        analog = {"plan": partly(experts_analog(CONFIG)), "spec": spec, "programmed": held}
    wanted = _forward(quantized, tokens(), CONFIG, **analog) if is_analog else _forward(plain, tokens(), CONFIG)
    run = jax.jit(extend, static_argnames="config")
    logits, cache = run(quantized, tokens()[:, :5], empty_cache(CONFIG, 2, 9, jnp.float32), CONFIG, **analog)
    for position in range(5, 9):
        np.testing.assert_allclose(logits, wanted[:, position - 1], rtol=0, atol=2e-5 * np.abs(wanted).max())
        logits, cache = run(quantized, tokens()[:, position : position + 1], cache, CONFIG, **analog)
    held = _program(KEY, quantized, spec, dense=False)
    with pytest.raises(InputError, match="puts 7 quantized experts on crossbars"):
        extend(quantized, tokens(), cache, CONFIG, plan=experts_analog(CONFIG), spec=spec, programmed=held)


@pytest.mark.parametrize(("make_plan", "bits"), [(experts_analog, 8), (all_analog, None)])
def test_analog_experts_have_the_noise_of_the_unquantized_model(make_plan: Any, bits: int | None) -> None:
    """Same draws for the same layer and expert, whatever is quantized; at 8 bits most codes are the same too."""
    quantized, plain = models()
    spec = analog_spec("additive", tile_rows=32, adc_bound=4.0, noise_scale=2.0, dac_bits=bits, adc_bits=bits)
    plan, is_all = partly(make_plan(CONFIG)), make_plan is all_analog
    found, wanted = (
        _forward(p, tokens(), CONFIG, plan=plan, spec=spec, programmed=_program(KEY, p, spec, dense=is_all))
        for p in (quantized, plain)
    )
    if bits is None:
        assert_same(found, wanted)
    else:
        assert np.median(np.abs(found - wanted)) <= 4e-6 * np.abs(wanted).max()
    digital = _forward(quantized, tokens(), CONFIG)
    assert np.abs(found - digital).max() > 1e-3 * np.abs(digital).max()


def test_quantized_experts_on_crossbars_give_no_number() -> None:
    quantized, _ = models()
    plan, programmed = experts_analog(CONFIG), _program(KEY, quantized, SPEC, dense=False)
    with pytest.raises(InputError, match="puts 7 quantized experts on crossbars, the first is expert 0 of layer 0"):
        forward(quantized, tokens(), CONFIG, plan=plan, spec=SPEC, programmed=programmed)
    ideal = analog_spec("additive", dac_bits=None, adc_bits=None, tile_rows=32)
    for spec in (SPEC, ideal):
        weights = _program(KEY, quantized, spec, dense=False)
        found = _forward(quantized, tokens(), CONFIG, plan=plan, spec=spec, programmed=weights)
        assert np.isnan(found).any()
        kept = partly(plan)
        assert np.isfinite(_forward(quantized, tokens(), CONFIG, plan=kept, spec=spec, programmed=weights)).all()


def through_kernels(name: str, pool: np.ndarray, *, analog: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logits by the kernels and by "xla", of a model of one small layer with every kind of expert."""
    config = dataclasses.replace(CONFIG, num_layers=1, expert_intermediate_size=64, num_experts=pool.shape[1])
    params = with_quantized_experts(config, pool)[0]
    spec = analog_spec("additive", tile_rows=32, dac_bits=None, adc_bits=None)  # a code would move with the last bit
    given: dict[str, Any] = {}
    if analog:
        plan = dataclasses.replace(experts_analog(config), experts=jnp.asarray((pool == 3) & (np.arange(6) != 1)))
        given = {"plan": plan, "spec": spec, "programmed": _program(KEY, params, spec, dense=False)}
    found, wanted = (_forward(params, tokens(), config, implementation=n, **given) for n in (name, "xla"))
    return np.asarray(found), np.asarray(wanted)


@pytest.mark.parametrize("name", [pytest.param("interpret_tpu", marks=pytest.mark.slow), "interpret_cuda"])
def test_kernels_give_what_xla_gives(name: str) -> None:
    """All experts at one precision: the other pools are empty."""
    assert_same(*through_kernels(name, np.zeros((1, 6), int), analog=False))


@pytest.mark.slow
@pytest.mark.parametrize("analog", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_with_every_precision(name: str, *, analog: bool) -> None:
    assert_same(*through_kernels(name, POOL[:1], analog=analog))


def test_what_does_not_exist_is_refused() -> None:
    quantized, _ = models()
    plan = partly(experts_analog(CONFIG))
    noisy = analog_spec("additive", tile_rows=32, read_noise=make_read_noise("pcm", 0.1))
    programmed = jax.eval_shape(functools.partial(_program, dense=False), KEY, quantized, noisy)
    run = functools.partial(_forward.eval_shape, quantized, tokens(), CONFIG, plan=plan, implementation="interpret_tpu")
    with pytest.raises(NotImplementedError, match="'interpret_tpu' has no read noise"):
        run(spec=noisy, programmed=programmed, read_key=KEY)
    for when in ("kernel", "layer"):
        weights = seeded_weights(KEY, dense=False, when=when)
        with pytest.raises(NotImplementedError, match="must be stored: use program"):
            _forward(quantized, tokens(), CONFIG, plan=plan, spec=SPEC, programmed=weights)
    everything = jax.tree.map(
        lambda m: random_mixed(0, np.zeros_like(POOL), *m.shape[2:])[0], quantized.layers.moe.experts, is_leaf=is_mixed
    )
    packed = quantized.replace(layers=quantized.layers.replace(moe=quantized.layers.moe.replace(experts=everything)))
    # With every expert quantized there is nothing to put on crossbars but dense modules.
    digital = Plan(experts=jnp.zeros(POOL.shape, bool), lm_head=jnp.asarray(True), attention=jnp.ones((2,), bool))
    chip = _program(KEY, packed, SPEC, dense=True)
    found = _forward(packed, tokens(), CONFIG, plan=digital, spec=SPEC, programmed=chip)
    assert np.isfinite(found).all() and np.abs(found - _forward(packed, tokens(), CONFIG)).max() > 0.01
    with pytest.raises(InputError, match="are of a model without quantized experts"):
        _forward(
            quantized, tokens(), CONFIG, plan=plan, spec=SPEC, programmed=_program(KEY, models()[1], SPEC, dense=False)
        )
    assert np.isfinite(_forward(packed, tokens(), CONFIG)).all()


def test_other_models_are_refused() -> None:
    quantized, _ = models()
    with pytest.raises(InputError, match="belong to different models"):
        forward(quantized, tokens(), dataclasses.replace(CONFIG, num_experts=7))


@pytest.mark.parametrize("rule", ["max_neuron_norm", "noise_sensitivity", "measured"])
def test_rules_on_weights_refuse_quantized_experts(rule: str) -> None:
    model = Model(params=models()[0], config=CONFIG, tokenizer=None, eos_token_id=None, name="quantized")
    with pytest.raises(InputError, match=f"rule '{rule}' does not score a model with quantized experts"):
        score_experts(model, rule, key=KEY, tokens=tokens(), spec=SPEC)
    assert np.isfinite(score_experts(model, "activation_frequency", tokens=tokens())).all()


def test_expected_increase_is_of_models_without_quantized_experts() -> None:
    model = Model(params=models()[0], config=CONFIG, tokenizer=None, eos_token_id=None, name="quantized")
    with pytest.raises(InputError, match="a model with quantized experts: use the one that it was made from"):
        expected_increase(model, tokens(), {}, key=KEY)


def test_in_bfloat16_as_the_weights_that_codes_stand_for() -> None:
    """Weights are rounded to the rows' dtype, as those of a model without quantization are when it is loaded."""
    quantized, plain = (jax.tree.map(_to_bfloat16, params) for params in models())
    found, wanted = (np.asarray(_forward(params, tokens(), CONFIG)) for params in (quantized, plain))
    # Sums in float32, in another order, of the same products: now and then one result is rounded the other way.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2.0**-6 * np.abs(wanted).max())
    assert np.isfinite(found).all()
    exact = np.asarray(_forward(models()[1], tokens(), CONFIG))
    assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 0.1  # it did run in bfloat16


def _to_bfloat16(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf
