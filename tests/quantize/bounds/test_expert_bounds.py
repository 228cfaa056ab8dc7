"""Error bounds of one expert: a search for violations, and cases in which they are reached."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from hetmoe.errors import InputError
from hetmoe.quantize.bounds.a_priori import a_priori_change, half_steps
from hetmoe.quantize.bounds.expert import (
    Expert,
    activation_bound,
    activations,
    change_of,
    error_constant,
    norm_bound,
    norms,
    unchanged,
)  # fmt: skip
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.packed import dequantize_packed, pack
from hetmoe.quantize.rtn import round_to_nearest

HIDDEN, INNER = 32, 32  # one compilation of each grid
GRIDS = [Grid(bits=b, group=32, symmetric=s) for b, s in [(1, True), (2, False), (8, True)]]


def swiglu(x, expert):
    """By another way than the package's: neuron by neuron."""
    a, b = x @ expert.gate, x @ expert.up
    h = a * (1 + np.tanh(a / 2)) / 2 * b
    return sum(h[:, j : j + 1] * expert.down[j] for j in range(a.shape[1]))


def draw(rng, kind, hidden=HIDDEN, inner=INNER):
    gate, up, down = (rng.standard_normal(s) / 8 for s in ((hidden, inner), (hidden, inner), (inner, hidden)))
    if kind == "one neuron":
        gate[:, 1:], up[:, 1:], down[1:] = 0, 0, 0
    elif kind == "low rank":
        gate, up = np.outer(gate[:, 0], gate[0]), np.outer(gate[:, 0], up[0])
    elif kind == "outlier":
        gate[0, 0] = up[0, 0] = down[0, 0] = 40.0
    elif kind == "zeros":
        gate[:] = 0
    return Expert(gate, up, down)


KINDS = ["plain", "one neuron", "low rank", "outlier", "zeros"]


def inputs(rng, difference, size):
    """Random inputs, an input of 0, single elements, and those that the differences stretch most."""
    rows = [rng.standard_normal((4, len(difference.gate))), np.eye(len(difference.gate))[:2]]
    rows += [np.linalg.svd(w)[0][:, :2].T for w in (difference.gate, difference.up)]
    x = np.concatenate(rows) * size
    return np.concatenate([x, -x, np.zeros((1, x.shape[1]))])


def adversary(rng, x, expert, radius):
    """Inputs at the given distance: random, towards steep gates, and away from 0."""
    steps = np.stack([rng.standard_normal(x.shape), np.broadcast_to(expert.gate[:, 0], x.shape), x, -x])
    lengths = np.maximum(np.linalg.norm(steps, axis=-1, keepdims=True), 1e-300)
    return x + radius[:, None] * steps / lengths


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    of_change=st.sampled_from(KINDS),
    change_size=st.sampled_from([0.0, 1e-7, 0.01, 1.0, 50.0]),
    size=st.sampled_from([1e-20, 0.1, 3.0, 100.0, 1e6]),
    ratio=st.sampled_from([0.0, 1e-9, 0.1, 2.0]),
)
def test_no_output_changes_by_more(seed, kind, of_change, change_size, size, ratio):
    rng = np.random.default_rng(seed)
    old, change = draw(rng, kind, 7, 9), draw(rng, of_change, 7, 9)
    new = Expert(*(getattr(old, n) + change_size * getattr(change, n) for n in ("gate", "up", "down")))
    x = inputs(rng, change, size)
    length = np.linalg.norm(x, axis=1)
    bounds, clean = change_of(old, new), activations(x, old)
    before, after = swiglu(x, old), swiglu(x, new)
    measured = np.linalg.norm(after - before, axis=1)
    assert (measured <= norm_bound(bounds, length)).all()
    assert (measured <= activation_bound(bounds, clean, length, np.zeros(len(x)))).all()
    radius = ratio * length + (ratio > 1)
    limit = activation_bound(bounds, clean, length, radius)
    still = activation_bound(unchanged(norms(new)), activations(x, new), length, radius)
    for y in adversary(rng, x, new, radius):
        assert (np.linalg.norm(swiglu(y, new) - before, axis=1) <= limit).all()
        assert (np.linalg.norm(swiglu(y, new) - after, axis=1) <= still).all()


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.sampled_from(GRIDS), st.sampled_from([-40, -6, 0, 9]))
def test_no_rounded_expert_is_beyond_what_its_steps_allow(seed, kind, grid, exponent):
    rng = np.random.default_rng(seed)
    old = Expert(*(np.float32(w * 2.0**exponent).astype(float) for w in vars(draw(rng, kind)).values()))
    packed = [pack(round_to_nearest(jnp.asarray(w, jnp.float32), grid)) for w in vars(old).values()]
    new = Expert(*(np.asarray(dequantize_packed(w)).astype(float) for w in packed))
    difference = new.minus(old)
    for part, matrix in zip(vars(difference).values(), packed, strict=True):
        assert (np.abs(part) <= half_steps(matrix)).all()
    prior, actual = a_priori_change(*packed), change_of(old, new)
    for name, value in vars(actual.difference).items():
        assert np.all(value <= getattr(prior.difference, name) * (1 + 1e-8)), name
    x = inputs(rng, difference, 3.0)
    length = np.linalg.norm(x, axis=1)
    measured = np.linalg.norm(swiglu(x, new) - swiglu(x, old), axis=1)
    assert (measured <= norm_bound(prior, length)).all()
    assert error_constant(actual) <= error_constant(prior) * (1 + 1e-6)


@pytest.mark.parametrize("size", [1e-36, 2e-38, 1e-39])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, False), (2, True)])
def test_steps_too_small_for_float32_are_covered(size, bits, symmetric):
    """Such steps count as 0, and with them weights of up to 2**bits of them."""
    w = jnp.full((32, 3), size, jnp.float32)
    packed = pack(round_to_nearest(w, Grid(bits=bits, group=32, symmetric=symmetric)))
    moved = np.abs(np.asarray(dequantize_packed(packed), np.float64) - np.asarray(w, np.float64))
    assert (moved <= half_steps(packed)).all()


def test_a_priori_bounds_need_one_packed_expert():
    stack = pack(round_to_nearest(jnp.ones((2, 32, 3)), GRIDS[0]))
    with pytest.raises(InputError, match="gate must be the packed matrix of one expert"):
        a_priori_change(stack, stack, stack)


def single(gate, up, down):
    return Expert(np.array([[gate], [0.0]]), np.array([[up], [0.0]]), np.array([[0.0, down]]))


@pytest.mark.parametrize(
    ("name", "activation", "norm"),
    # The norm's bound takes |silu(z)| for |z|, reached by large z, and the steepest slope for the one at large z, 1.
    [("down", 1.0, 1.0), ("up", 1.0, 1.0), ("gate", 1.0, 1 / 1.09984)],
)
def test_one_neuron_with_one_changed_matrix_reaches_its_bounds(name, activation, norm):
    old = {"gate": 2.0, "up": -3.0, "down": 0.5}
    new = old | {name: old[name] * (1 + 1e-3)}
    x = np.array([[20.0, 0.0]])
    change, length = change_of(single(**old), single(**new)), np.array([20.0])
    measured = np.linalg.norm(swiglu(x, single(**new)) - swiglu(x, single(**old)))
    found = activation_bound(change, activations(x, single(**old)), length, np.zeros(1))[0]
    assert measured / found == pytest.approx(activation, rel=1e-5)
    # Parts of the split hold old or new weights: apart by the change itself.
    assert measured / norm_bound(change, length)[0] == pytest.approx(norm, rel=2e-3)


def test_a_linear_expert_reaches_its_bound_in_the_worst_direction():
    """Steep gates that all have the same value make the expert linear: the spectral norms of its parts are reached."""
    rng = np.random.default_rng(0)
    gate = np.zeros((5, 4))
    gate[4] = 50.0
    up, down = np.linalg.qr(rng.standard_normal((5, 4)))[0], np.linalg.qr(rng.standard_normal((5, 4)))[0].T
    up[4] = 0
    changed_up = up + 1e-3 * np.outer(np.r_[1.0, 0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5])
    old, new = Expert(gate, up, down), Expert(gate, changed_up, down)
    x = np.array([[3.0, 0, 0, 0, 1.0]])
    length = np.linalg.norm(x, axis=1)
    measured = np.linalg.norm(swiglu(x, new) - swiglu(x, old))
    found = activation_bound(change_of(old, new), activations(x, old), length, np.zeros(1))[0]
    # |dU x| = 3e-3 against |dU| |x|: the input's other element, which makes the gates steep, is all that is lost.
    assert measured / found == pytest.approx(3 / 10**0.5, rel=1e-5)
