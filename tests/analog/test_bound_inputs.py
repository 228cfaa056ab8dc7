"""What bounds refuse."""

import subprocess
import sys

REFUSED = {
    "Moments(np.zeros((3, 2)), -W)": "variance has a negative value, -1.0",
    "Moments(np.zeros((2, 2)), W)": "mean has shape [2, 2], but variance [3, 2]",
    "Moments(W * np.nan, W)": "mean[0, 0] is nan",
    "linear_second_moment(X * np.inf, NONE)": "x[0, 0] is inf",
    "linear_second_moment(X[:, :2], NONE)": "x has 2 columns, but the matrix 3 rows",
    "linear_tail(X, NONE, W[:2], 0.1)": "slopes has shape [2, 2], but noise [3, 2]",
    "markov_bound(-np.ones(1), 0.1)": "rms has a negative value, -1.0",
    "markov_bound(np.array([np.nan]), 0.1)": "rms[0] is nan",
    "TwoLayer(W, W)": "down has 3 rows, but up 2 neurons (columns)",
    "Expert(W, W[:2], W.T)": "up has shape [2, 2], but gate [3, 2]",
    "Expert(W, W * np.nan, W.T)": "up[0, 0] is nan",
    "linear_second_moment(np.full((2, 3), 100, np.int8), NONE)": "x is int8: bounds take float64 arrays",
    "two_layer_second_moment(np.float16(X), TwoLayer(W, W.T), TwoLayerNoise(NONE, DOWN))": "x is float16",
    "linear_second_moment(X + 1j, NONE)": "x is complex128",
    "Moments(np.float32(W), W)": "mean is float32",
    "noise_of(W, 'pcm')": "spec='pcm' must be an AnalogSpec",
    "noise_of(W[0], SPEC)": "w has shape [2]: it must be [K, N]",
    "noise_of(W * np.nan, SPEC)": "w[0, 0] is nan",
    "draw_slopes(W * np.inf, SPEC)": "w[0, 0] is inf",
    "half_steps(W)": "half_steps takes a Packed matrix, not ndarray",
    "activation_bound(CHANGE, activations(X, GATED), np.ones(2), -np.ones(2))": "radius[0] is -1.0",
    "activation_bound(CHANGE, activations(X, GATED), np.ones(3), np.ones(2))": "size has shape [3]: it must be [2]",
    "norm_bound(CHANGE, np.array([1.0, np.nan]))": "size[1] is nan",
    "norm_bound(CHANGE, 3.0)": "size is float: bounds take float64 arrays",
    "linear_tail(X, NONE, W, 0.1, weights=np.ones((2, 1)))": "weights has shape [2, 1], but the outputs [2, 2]",
    "linear_tail(X, NONE, W, 0.1, weights=np.full((2, 2), np.nan))": "weights[0, 0] is nan",
    "change_of(GATED, Expert(W[:, :1], W[:, :1], W.T[:1]))": "changed.gate has shape [3, 1], but clean.gate [3, 2]",
    "expert_second_moment(X, activations(X[:1], GATED), GATED, ExpertNoise(NONE, NONE, DOWN))": "activations of [1, 2]",
    "routing_margin(X, W, 3)": "experts_per_token=3 must be from 1 to 2",
    "routing_margin(X * np.nan, W, 1)": "x[0, 0] is nan",
    "certain_sets(ROUTED, NORMS, -np.ones(2), None, None)": "radius[0] is -1.0",
    "certain_sets(ROUTED, NORMS, np.ones(1), None, None)": "radius has shape [1]: it must be [2]",
    "converter_error_bound(X + 1j, W, input_range=None, adc_bound=1.0, options=SPEC.options)": "x is complex128",
    "converter_error_bound(X, W, input_range=None, adc_bound=1.0, options=SPEC)": "must be CrossbarOptions",
    "converter_error_bound(X, W, input_range=-X[0, :1], adc_bound=1.0, options=SPEC.options)": "negative value, -1.0",
}


def test_bounds_refuse_what_they_cannot_bound() -> None:
    """In a process of its own: here shapes are checked by the tests themselves (`check_arrays`)."""
    script = f"""
import numpy as np
from hetmoe.analog.error_tail import draw_slopes, linear_tail, markov_bound, noise_of
from hetmoe.analog.expert_tail import ExpertSlopes, TwoLayerSlopes, expert_tail, two_layer_tail
from hetmoe.analog.gaussian_moments import swiglu_exact, two_layer_exact
from hetmoe.analog.neuron_norm import expert_neuron_norm_bound, neuron_norm_bound
from hetmoe.analog.second_moment import ExpertNoise, Moments, expert_second_moment, linear_second_moment
from hetmoe.analog.two_layer import TwoLayer, TwoLayerNoise, two_layer, two_layer_change_bound, two_layer_second_moment
from hetmoe.errors import InputError
from hetmoe.quantize.bounds.a_priori import half_steps
from hetmoe.quantize.bounds.expert import Expert, activation_bound, activations, change_of, norm_bound
from hetmoe.quantize.bounds.routing import Routed
from hetmoe.quantize.bounds.routing_change import certain_sets, router_norms
from hetmoe.quantize.bounds.stability_margin import routing_margin
from hetmoe.analog.converter_error import converter_error_bound
from hetmoe.analog.spec import analog_spec
X, W = np.ones((2, 3)), np.ones((3, 2))
NONE, DOWN = Moments(0 * W, 0 * W), Moments(0 * W.T, 0 * W.T)
GATED, SPEC = Expert(W, W, W.T), analog_spec("pcm")
CHANGE, NORMS = change_of(GATED, GATED), router_norms(np.ones(3), W)
ROUTED = Routed(X @ W, np.zeros((2, 1), int), np.ones((2, 1)))
for ask in {list(REFUSED)}:
    try:
        print("a number:", eval(ask))
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for said, (ask, wanted) in zip(done.stdout.splitlines(), REFUSED.items(), strict=True):
        assert wanted in said, (ask, said)
