"""Expected loss increase: its parts against full gradients, an enumerated Fisher matrix, and Monte Carlo."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.devices import Additive, GroupRange, NoiseMoments, Programmed, Proportional
from hetmoe.analog.noise_moments import programming_moments, sampled_moments
from hetmoe.analog.programming import program
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.matrices import MATRICES, crossbar_matrices
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.transformer import forward
from hetmoe.placement.module_scores import ModuleScores
from hetmoe.placement.noise_sensitivity import NoiseSensitivity, noise_sensitivity
from tests.models.tiny import full_config, random_params, random_tokens, tiny_config

SPEC = analog_spec("pcm", noise_scale=2.0)
KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biased(Additive):
    """A mean that depends on the weight and on its group, the same at every time; pairs take long to compile."""

    name: str = "biased"

    def check_time(self, time_s: Any) -> None:
        """Any will do."""

    def program(self, w: jax.Array, *, scale: GroupRange, draw: Any, noise_scale: Any, time_s: Any) -> Programmed:
        noisy = super().program(w, scale=scale, draw=draw, noise_scale=noise_scale, time_s=time_s).at_time
        noisy += self.programming_moments(w, scale=scale, noise_scale=noise_scale).mean
        return Programmed(noisy, noisy)

    def programming_moments(self, w: jax.Array, *, scale: GroupRange, noise_scale: Any) -> NoiseMoments:
        mean = 0.05 * noise_scale * (scale.largest - 2 * jnp.abs(w))
        return NoiseMoments(mean, super().programming_moments(w, scale=scale, noise_scale=noise_scale).variance)


def made(config: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> Model:
    params = random_params(config, seed, dtype)
    return Model(params=params, config=config, tokenizer=None, eos_token_id=0, name="tiny")


def matrices(params: Params) -> dict[tuple[str, str], jax.Array]:
    """Every crossbar matrix by (kind of layer, name), the LM head too."""
    found = {("layers", n): w for n, w in crossbar_matrices(params.layers).items()}
    if params.dense_layers is not None:
        found |= {("dense_layers", n): w for n, w in crossbar_matrices(params.dense_layers).items()}
    return found | {("head", "lm_head"): params.embed.T if params.lm_head is None else params.lm_head}


def by_module(config: ModelConfig, per_matrix: dict[tuple[str, str], np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over the matrices of a module of values `[layers, (experts)]`; attention in model order."""
    total: dict[str, Any] = {}
    for (kind, name), value in per_matrix.items():
        module = "lm_head" if name == "lm_head" else MATRICES[name].module
        if module == "attention":
            numbers = list(config.moe_layers if kind == "layers" else config.dense_layers)
            whole = total.setdefault("attention", np.zeros(config.num_layers))
            whole[numbers] += value
        else:
            total[module] = total.get(module, 0.0) + value
    return total


def gradients(model: Model, tokens: jax.Array, labels: jax.Array) -> dict[tuple[str, str], np.ndarray]:
    """Of the summed loss with respect to every crossbar matrix (of an untied model), float64."""

    def loss(params: Params) -> jax.Array:
        log_probs = jax.nn.log_softmax(forward(params, tokens, model.config))
        return -jnp.sum(jnp.take_along_axis(log_probs, labels[..., None], axis=-1))

    return {k: np.asarray(g, np.float64) for k, g in matrices(jax.jit(jax.grad(loss))(model.params)).items()}


def moments(model: Model, spec: AnalogSpec) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    of_every = jax.jit(lambda params: {k: programming_moments(w, spec) for k, w in matrices(params).items()})
    found = of_every(model.params)
    return {k: (np.asarray(m.mean, np.float64), np.asarray(m.variance, np.float64)) for k, m in found.items()}


def parts(scores: ModuleScores) -> dict[str, np.ndarray]:
    values = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
    return {name: np.asarray(value) for name, value in values.items() if value is not None}


def test_gradient_part_is_the_gradient_times_the_bias() -> None:
    config, spec = full_config(), analog_spec(Biased(), noise_scale=2.0)
    model, windows = made(config), random_tokens(config, 1, (3, 12))
    found = noise_sensitivity(model, windows, spec, key=KEY, dense=True)
    expected: dict[tuple[str, str], np.ndarray] = {}
    for name, g in gradients(model, windows[:, :-1], windows[:, 1:]).items():
        magnitudes = np.abs(np.asarray(matrices(model.params)[name], np.float64))
        mean = 0.1 * (magnitudes.max(axis=-2, keepdims=True) - 2 * magnitudes)  # one tile has all rows
        expected[name] = (g * mean).sum(axis=(-2, -1)) / (3 * 11)
    check_gradient_part(found, by_module(config, expected))


def check_gradient_part(found: NoiseSensitivity, expected: dict[str, np.ndarray]) -> None:
    for name, value in parts(found.gradient).items():
        # Sums of up to 2,000 float32 products of either sign: 1e-5 of the largest module.
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5 * np.abs(value).max())
    assert parts(found.gradient).keys() == expected.keys()


def enumerated(
    model: Model, window: jax.Array, spec: AnalogSpec
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(sum_i F_ii s_i^2 / 2, b' F b / 2, g . b) per token, float64; F sums over all labels by their probability."""
    config, tokens = model.config, window[None, :-1]
    logits = np.asarray(forward(model.params, tokens, config), np.float64)[0]
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    jacobian_of = jax.jit(jax.jacrev(lambda p: jax.nn.log_softmax(forward(p, tokens, config))[0]))
    jacobian = matrices(jacobian_of(model.params))
    variance: dict[Any, np.ndarray] = {}
    pulled: dict[Any, np.ndarray] = {}
    for key, (mean, spread) in moments(model, spec).items():
        j = np.asarray(jacobian[key], np.float64)  # [positions, vocabulary, ...]
        weight = probabilities.reshape(probabilities.shape + (1,) * (j.ndim - 2))
        variance[key] = (((weight * j**2).sum(axis=(0, 1))) * spread).sum(axis=(-2, -1)) / 2
        pulled[key] = (j * mean).sum(axis=(-2, -1))
    squares = by_module_of_labels(config, pulled, probabilities)
    count, own = logits.shape[0], np.asarray(window[1:])
    gradient = by_module(config, {k: -v[np.arange(count), own].sum(axis=0) for k, v in pulled.items()})
    variance, squares, gradient = (
        {n: v / count for n, v in part.items()} for part in (by_module(config, variance), squares, gradient)
    )
    return variance, squares, gradient


def by_module_of_labels(
    config: ModelConfig, pulled: dict[Any, np.ndarray], probabilities: np.ndarray
) -> dict[str, Any]:
    """Half the mean square of the sums over a module's matrices, for every position and label."""
    result: dict[str, Any] = {}
    for position, label in np.ndindex(probabilities.shape):
        sums = by_module(config, {k: v[position, label] for k, v in pulled.items()})
        for name, value in sums.items():
            result[name] = result.get(name, 0.0) + probabilities[position, label] * value**2 / 2
    return result


def test_second_order_parts_are_those_of_the_fisher_matrix() -> None:
    """The same window many times over: the mean of the sampled labels against all labels enumerated."""
    config = tiny_config(vocab_size=12, num_experts=4, hidden_size=14, expert_intermediate_size=9)
    model = made(config)
    window = random_tokens(config, 2, (1, 6))
    repeats = 400
    found = noise_sensitivity(model, jnp.repeat(window, repeats, axis=0), SPEC, key=KEY, dense=True)
    variance, bias, gradient = enumerated(model, window[0], SPEC)
    check_gradient_part(found, gradient)
    for name, value in parts(found.variance).items():
        error = 4.5 * parts(found.standard_error)[name] + 1e-4 * np.abs(variance[name]).max()
        assert np.all(np.abs(value - variance[name]) <= error), name
        assert np.all(np.abs(parts(found.bias)[name] - bias[name]) <= error), name
        assert np.all(error < 0.5 * np.abs(variance[name]).max())  # else the comparison says nothing


def test_standard_error_is_that_of_the_sequences() -> None:
    config = tiny_config()
    windows = random_tokens(config, 4, (5, 9))
    total, means = noise_sensitivity(made(config), windows, SPEC, key=KEY, dense=False), []
    label_keys = jax.random.split(jax.random.split(KEY)[0], 5)
    from hetmoe.placement.noise_sensitivity import _per_sequence

    spread, pulled, gradient = (
        np.asarray(v.experts, np.float64)
        for v in _per_sequence(made(config).params, windows, label_keys, SPEC, None, config, False)
    )
    means = (spread / 2 + pulled**2 / 2 + gradient) / 8  # 8 predicted tokens each
    np.testing.assert_allclose(total.total.experts, means.mean(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(total.standard_error.experts, means.std(0, ddof=1) / np.sqrt(5), rtol=1e-6, atol=1e-12)


def test_variance_part_grows_with_the_square_of_the_noise() -> None:
    config = tiny_config()
    model, windows = made(config), random_tokens(config, 4, (4, 9))

    def at(scale: float) -> NoiseSensitivity:
        return noise_sensitivity(model, windows, analog_spec(Proportional(), noise_scale=scale), key=KEY, dense=False)

    one, three = at(0.1), at(0.3)
    assert three.total.attention is None and three.total.lm_head is None
    for name, value in parts(three.variance).items():
        assert np.all(value > 0)
        np.testing.assert_allclose(value, 9 * parts(one.variance)[name], rtol=1e-4, atol=1e-12)
    assert not np.any(three.bias.experts) and not np.any(three.gradient.experts)  # noise without a mean


def test_moments_at_a_time_are_those_of_the_chips() -> None:
    config = tiny_config(num_layers=3, dense_layers=(1,), dense_intermediate_size=19)
    params, spec, chips = random_params(config, 0), analog_spec("additive", noise_scale=0.3), 5
    found = sampled_moments(KEY, params, spec, dense=True, chips=chips)

    def some(moments_or_chip: Any) -> dict[str, Any]:  # of every kind; the draws of the others are not compiled
        of_dense = {"ffn_down": moments_or_chip.dense_layers["ffn_down"]}
        return {n: moments_or_chip.layers[n] for n in ("gate", "q")} | of_dense | {"head": moments_or_chip.lm_head}

    programmed = jax.jit(jax.vmap(lambda key: some(program(key, params, spec, dense=True))))(
        jax.random.split(KEY, chips)
    )
    targets = crossbar_matrices(params.dense_layers) | crossbar_matrices(params.layers) | {"head": params.lm_head}
    for name, moments in some(found).items():
        deviations = np.asarray(programmed[name].w, np.float64) - np.asarray(targets[name], np.float64)
        np.testing.assert_allclose(moments.mean, deviations.mean(0), atol=1e-6)
        np.testing.assert_allclose(moments.variance, deviations.var(0, ddof=1), rtol=1e-3, atol=1e-6)
    assert found.layers.keys() == crossbar_matrices(params.layers).keys()
    assert found.dense_layers.keys() == crossbar_matrices(params.dense_layers).keys()
    experts_only = jax.eval_shape(lambda: sampled_moments(KEY, params, spec, dense=False, chips=2))
    assert experts_only.lm_head is None and experts_only.dense_layers == {}
    assert experts_only.layers.keys() == {"gate", "up", "down"}


def test_bias_from_few_chips_is_not_inflated() -> None:
    """The square of a mean of two chips exceeds the true one by half the variance part, unless it is corrected."""
    config = tiny_config()
    model, windows = made(config), random_tokens(config, 6, (12, 10))
    spec = analog_spec(Biased(), noise_scale=2.0)
    exact = np.sum(noise_sensitivity(model, windows, spec, key=KEY, dense=False).bias.experts)
    at_time = analog_spec(Biased(), noise_scale=2.0, time_s=1.0)
    keys = jax.random.split(KEY, 30)
    few = [noise_sensitivity(model, windows, at_time, key=key, dense=False, chips=2) for key in keys]
    bias, inflation = (
        np.array([np.sum(part) for part in parts])
        for parts in ([f.bias.experts for f in few], [np.asarray(f.variance.experts) / 2 for f in few])
    )
    error = bias.std(ddof=1) / np.sqrt(len(bias))
    assert abs(bias.mean() - exact) < 4.5 * error
    assert min(inflation.mean(), exact) > 9 * error  # the check could see it


@pytest.mark.parametrize(
    ("shape", "chips", "message"),
    [((1, 9), 8, "at least 2"), ((4, 1), 8, "at least 2"), ((4, 9), 1, "chips=1")],
)
def test_too_little_to_estimate_from_is_refused(shape: tuple[int, int], chips: int, message: str) -> None:
    config = tiny_config()
    spec = analog_spec("pcm", time_s=60.0)
    with pytest.raises(InputError, match=message):
        noise_sensitivity(made(config), random_tokens(config, 1, shape), spec, key=KEY, dense=False, chips=chips)
