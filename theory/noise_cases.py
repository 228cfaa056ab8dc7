"""Bounds of noise in weights against simulated chips: single matrices, two-layer and gated experts.

Second moments of single matrices, and of experts on devices that do not clip, are exact: measured over calculated is 1
within the standard error of the chips.
"""

import jax
import numpy as np

from hetmoe.analog.devices.pair import DifferentialPair
from hetmoe.analog.error_tail import draw_slopes, linear_tail, markov_bound, noise_of
from hetmoe.analog.expert_tail import expert_slopes, expert_tail, two_layer_slopes, two_layer_tail
from hetmoe.analog.gaussian_moments import swiglu_exact, two_layer_exact
from hetmoe.analog.neuron_norm import neuron_norm_bound
from hetmoe.analog.second_moment import ExpertNoise, expert_second_moment, linear_second_moment
from hetmoe.analog.spec import analog_spec
from hetmoe.analog.two_layer import TwoLayer, TwoLayerNoise, two_layer, two_layer_second_moment
from hetmoe.quantize.bounds.expert import Expert, activations
from theory.cases import DELTA, TOKENS, Case, case_of, programmed, random_weights, root_mean_square

SIZES = (2, 9, 40)  # of matrices: few, so that few programs are compiled


def linear_cases(seed: int, device: str, chips: int) -> list[Case]:
    """The second moment of one matrix, exactly; and what the error exceeds with probability DELTA."""
    rng = np.random.default_rng([seed, 0])
    rows, columns = (int(n) for n in rng.choice(SIZES, 2))
    w, x = (
        random_weights(rng, rows, columns, 0.5),
        rng.normal(size=(TOKENS, rows)) * np.exp(rng.normal(size=(TOKENS, 1))),
    )
    # Tiles of 16 rows: devices that map each to its own range have several.
    spec = analog_spec(device, noise_scale=float(np.exp(rng.uniform(-2, 1))), tile_rows=int(rng.choice([16, 512])))
    noise = noise_of(w, spec)
    errors = np.einsum("tk,ckn->ctn", x, programmed(_key(rng), w, spec, chips) - w)
    root, error = root_mean_square(errors)
    bound = np.sqrt(linear_second_moment(x, noise).sum(axis=1))
    norms = np.linalg.norm(errors, axis=2)
    found = [case_of("linear, second moment", device, root, bound, error, exact=True)]
    tails = {
        "concentration": linear_tail(x, noise, draw_slopes(w, spec), DELTA), "Markov": markov_bound(bound, DELTA)
    }  # fmt: skip
    found += [_tail_case(f"linear, {name}", device, norms, tail) for name, tail in tails.items()]
    if device == "proportional":
        found.append(
            case_of("linear, neuron norms", device, root, neuron_norm_bound(x, w, float(spec.noise_scale)), error)
        )
    return found


def _tail_case(name: str, device: str, norms: np.ndarray, tail: np.ndarray) -> Case:
    """Of `[chips, tokens]` errors and what they exceed with probability DELTA."""
    share = float((norms > tail).mean())
    return case_of(f"{name}, {DELTA:.0%}", device, np.quantile(norms, 1 - DELTA, axis=0), tail, share=share)


def _key(rng: np.random.Generator) -> jax.Array:
    return jax.random.key(int(rng.integers(2**31)))


def expert_cases(seed: int, device: str, chips: int) -> list[Case]:
    """Second moments of two-layer and SwiGLU experts: bounds, and exactly where noise is Gaussian."""
    rng = np.random.default_rng([seed, 1])
    hidden, inner = (int(n) for n in rng.choice(SIZES, 2))
    x = rng.normal(size=(TOKENS, hidden))
    spec = analog_spec(device, noise_scale=float(np.exp(rng.uniform(-3, 0.5))))
    gate, up = (random_weights(rng, hidden, inner, 0.5) for _ in range(2))
    down = random_weights(rng, inner, hidden, 0.5)
    held = [programmed(_key(rng), w, spec, chips) for w in (gate, up, down)]
    noise = [noise_of(w, spec) for w in (gate, up, down)]
    relu, relu_noise = TwoLayer(up, down), TwoLayerNoise(noise[1], noise[2])
    swiglu, swiglu_noise = Expert(gate, up, down), ExpertNoise(*noise)
    before = activations(x, swiglu)
    of_relu = np.stack([two_layer(x, TwoLayer(u, d)) for u, d in zip(*held[1:], strict=True)]) - two_layer(x, relu)
    of_swiglu = np.stack([activations(x, Expert(*one)).out for one in zip(*held, strict=True)]) - before.out
    kinds = {
        "two-layer": (
            of_relu, two_layer_second_moment(x, relu, relu_noise).rms,
            two_layer_tail(x, relu, relu_noise, two_layer_slopes(relu, spec), DELTA),
            two_layer_exact(x, relu, relu_noise),
        ),
        "gated": (
            of_swiglu, expert_second_moment(x, before, swiglu, swiglu_noise).rms,
            expert_tail(x, swiglu, swiglu_noise, expert_slopes(swiglu, spec), DELTA),
            swiglu_exact(x, swiglu, swiglu_noise),
        ),
    }  # fmt: skip
    found = list[Case]()
    for kind, (errors, bound, tail, exact) in kinds.items():
        root, error = root_mean_square(errors)
        norms = np.linalg.norm(errors, axis=2)
        found += [
            case_of(f"{kind} expert, bound", device, root, bound, error),
            _tail_case(f"{kind} expert, concentration", device, norms, tail),
            _tail_case(f"{kind} expert, Markov", device, norms, markov_bound(bound, DELTA)),
        ]
        if not isinstance(spec.device, DifferentialPair):
            found.append(case_of(f"{kind} expert, Gaussian noise", device, root, exact, error, exact=True))
    return found
