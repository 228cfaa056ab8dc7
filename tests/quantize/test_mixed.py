"""Every expert finds its own matrix, whatever pool it is in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.quantize.mixed import attach, dense, detach, expert_weights, make_mixed
from hetmoe.quantize.packed import pack
from tests.quantize.random_quantized import GRIDS, random_mixed, random_quantized

POOL = np.array([[0, 3, 1, 0, 2], [2, 1, 1, 3, 3], [0, 0, 0, 0, 0]])  # another share of each in every layer
ROUNDING = 3 * 2.0**-24  # of two float32 operations, relative


def test_all_matrices_are_where_their_experts_are() -> None:
    mixed, exact = random_mixed(0, POOL, 64, 6)
    assert mixed.shape == (3, 5, 64, 6) and mixed.dtype == jnp.float32
    found = jax.jit(dense, static_argnames="dtype")(mixed, dtype=jnp.float32)
    np.testing.assert_allclose(found, exact, rtol=ROUNDING, atol=ROUNDING)


def test_layers_of_a_loop_find_theirs_too() -> None:
    (gate, exact_gate), (up, exact_up) = random_mixed(0, POOL, 64, 6), random_mixed(1, POOL[::-1].copy(), 64, 6)
    tree = {"gate": gate, "bias": jnp.arange(3.0), "up": up}

    @jax.jit
    def run(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
        scanned, pools = detach(tree)

        def step(carry: None, layer: dict[str, jax.Array]) -> tuple[None, dict[str, jax.Array]]:
            layer = attach(layer, pools)
            names = ("gate", "up")
            got = {
                n: jax.lax.map(lambda e, n=n: expert_weights(layer[n], e, jnp.float32), jnp.arange(5)) for n in names
            }
            return carry, got | {"bias": layer["bias"]}

        return jax.lax.scan(step, None, scanned)[1]

    found = run(tree)
    np.testing.assert_allclose(found["gate"], exact_gate, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(found["up"], exact_up, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_array_equal(found["bias"], [0, 1, 2])


@pytest.mark.parametrize("only", [0, 3])
def test_one_precision_for_all(only: int) -> None:
    """The other pools are empty."""
    mixed, exact = random_mixed(2, np.full((1, 4), only), 64, 3)
    layer = mixed.replace(places=jax.tree.map(lambda leaf: leaf[0], mixed.places))
    for expert in range(4):
        found = expert_weights(layer, jnp.int32(expert), jnp.float32)
        np.testing.assert_allclose(found, exact[0, expert], rtol=ROUNDING, atol=ROUNDING)


def test_pools_that_do_not_fit_are_refused() -> None:
    w = jnp.ones((3, 64, 2))
    with pytest.raises(InputError, match=r"pools hold \[3\] matrices, and \[2\] of 2 experts"):
        make_mixed([w], np.zeros((1, 2), int))
    with pytest.raises(InputError, match=r"pools hold \[3\] matrices, and \[3\] of 4 experts"):
        make_mixed([w], np.array([[0, 0, 0, 1]]))
    packed = pack(random_quantized(np.random.default_rng(0), GRIDS[0], 1, 64, 3))
    with pytest.raises(InputError, match="must have one shape"):
        make_mixed([w, packed], np.array([[0, 0, 0, 1]]))
    with pytest.raises(InputError, match="two pools are not quantized"):
        make_mixed([w, w[:1]], np.array([[0, 0, 0, 1]]))
