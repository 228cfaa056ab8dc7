"""Decoding with a cache gives the logits of the whole forward pass."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.programming import program, seeded_weights
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.decode import empty_cache, extend
from hetmoe.models.transformer import forward
from hetmoe.placement.plan import all_analog
from tests.models.tiny import full_config, random_params, random_tokens, tiny_config

CONFIGS = {
    "plain": tiny_config(num_layers=2),
    "window": tiny_config(num_layers=2, sliding_window=4),
    "everything": full_config(),
}


def check(config: ModelConfig, actual: jax.Array, wanted: jax.Array) -> None:
    """The same products and sums, but for the order of sums over masked positions: some roundings of the largest."""
    del config
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_whole_text(name: str) -> None:
    config = CONFIGS[name]
    params, tokens = random_params(config, 0), random_tokens(config, 1, (3, 11))
    wanted = forward(params, tokens, config)
    cache = empty_cache(config, 3, 16, jnp.float32)
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(extend, 2), static_argnames="config", donate_argnames="cache")
    logits, cache = run(params, tokens[:, :5], cache, config)  # a prompt, then one token after the other
    check(config, logits, wanted[:, 4])
    for position in range(5, 11):
        logits, cache = run(params, tokens[:, position : position + 1], cache, config)
        check(config, logits, wanted[:, position])
    assert int(cache.length) == 11


@pytest.mark.parametrize("when", ["stored", "layer"])
def test_analog_logits_are_those_of_the_whole_text(when: str) -> None:
    """Ideal converters: with others a rounding may turn a code."""
    config = full_config() if when == "stored" else tiny_config(num_layers=2)
    params, tokens = random_params(config, 0), random_tokens(config, 1, (2, 6))
    spec = analog_spec("pcm", noise_scale=3.0, dac_bits=None, adc_bits=None)
    key = jax.random.key(1)
    weights = program(key, params, spec, dense=True) if when == "stored" else seeded_weights(key, dense=True, when=when)
    analog = {"plan": all_analog(config), "spec": spec, "programmed": weights}
    whole, run = (jax.jit(function, static_argnames="config") for function in (forward, extend))
    wanted = whole(params, tokens, config, **analog)
    cache = empty_cache(config, 2, 6, jnp.float32)
    _, cache = run(params, tokens[:, :4], cache, config, **analog)
    for position in (4, 5):
        logits, cache = run(params, tokens[:, position : position + 1], cache, config, **analog)
        check(config, logits, wanted[:, position])
    digital = whole(params, tokens, config)
    assert float(jnp.abs(digital - wanted).max()) > 0.1 * float(jnp.abs(wanted).max())  # the noise is there


def test_long_prompts_and_narrow_caches() -> None:
    config = tiny_config(max_position_embeddings=700)
    params, tokens = random_params(config, 0), random_tokens(config, 1, (1, 650))  # queries are taken in chunks
    whole, run = (jax.jit(function, static_argnames="config") for function in (forward, extend))
    cache = empty_cache(config, 1, 700, jnp.float32)
    _, cache = run(params, tokens[:, :20], cache, config)
    logits, _ = run(params, tokens[:, 20:], cache, config)
    wanted = whole(params, tokens, config)[:, -1]
    check(config, logits, wanted)
    rough, _ = run(params, tokens, empty_cache(config, 1, 700, jnp.bfloat16), config)
    assert 1e-4 < float(jnp.abs(rough - wanted).max() / jnp.abs(wanted).max()) < 0.1  # keys and values of 8 bits


def test_bad_input_is_refused() -> None:
    config = tiny_config()
    params, cache = random_params(config, 0), empty_cache(config, 2, 8, jnp.float32)
    for shape in ((3, 1), (2, 9), (2, 0)):
        with pytest.raises(InputError, match="must be"):
            extend(params, jnp.zeros(shape, jnp.int32), cache, config)
    for batch, capacity in ((0, 4), (1, 0), (1, 65)):
        with pytest.raises(InputError, match="capacity"):
            empty_cache(config, batch, capacity, jnp.float32)
    noisy = analog_spec("pcm")
    with pytest.raises(InputError, match="missing"):
        extend(params, jnp.zeros((2, 1), jnp.int32), cache, config, spec=noisy)
