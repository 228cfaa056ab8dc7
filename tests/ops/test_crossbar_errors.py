"""Every refusal of the public crossbar matmul names the value and what is allowed."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hetmoe.analog.read_noise import make_read_noise
from hetmoe.errors import InputError
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from hetmoe.ops.grouped_crossbar.api import IMPLEMENTATIONS
from tests.ops.crossbar_battery import KERNELS

NOISE = make_read_noise("additive", 0.1)


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of jaxtyping, where they are on, would refuse bad input before the code under test sees it."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


BITS = "must be a whole number from 2 to 16, or None"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": jnp.ones((2, 9))}, r"x\[2, 9\] @ w\[10, 3\]: the last axis of x must equal the first of w"),
    ({"x": jnp.ones(())}, r"x\[\] @ w\[10, 3\]"),
    ({"w": jnp.ones((2, 10, 3))}, r"x\[2, 10\] @ w\[2, 10, 3\]"),
    ({"w": jnp.ones((10,))}, r"x\[2, 10\] @ w\[10\]"),
    ({"x": jnp.ones((2, 10), jnp.int32)}, "x has dtype int32: give floating-point"),
    ({"w": jnp.ones((10, 3), jnp.int8)}, "w has dtype int8: give floating-point"),
    ({"x": jnp.ones((2, 10), bool)}, "x has dtype bool"),
    ({"x": jnp.ones((2, 0)), "w": jnp.ones((0, 3))}, "rows=0 .* must both be at least 1"),
    ({"dac_bits": 1}, f"bits=1 {BITS}"),
    ({"adc_bits": 17}, f"bits=17 {BITS}"),
    ({"dac_bits": 8.0}, f"bits=8.0 {BITS}"),
    ({"adc_bits": True}, f"bits=True {BITS}"),
    ({"adc_bits": "8"}, f"bits='8' {BITS}"),
    ({"dac_bits": 0}, f"bits=0 {BITS}"),
    ({"adc_bits": -1}, f"bits=-1 {BITS}"),
    ({"bound_axis": "row"}, "bound_axis='row' must be 'tile' or 'column'"),
    ({"tile_rows": 0}, "tile_rows=0 must be a whole number of at least 1"),
    ({"tile_rows": 4.0}, "tile_rows=4.0 must be a whole number"),
    ({"tile_rows": True}, "tile_rows=True must be a whole number"),
    ({"adc_bound": 0.0}, "adc_bound=0.0 must be positive and finite"),
    ({"adc_bound": -12}, "adc_bound=-12 must be positive"),
    ({"adc_bound": float("nan")}, "adc_bound=nan must be positive"),
    ({"adc_bound": float("inf")}, "adc_bound=inf must be positive and finite"),
    ({"input_range": jnp.ones(2)}, r"input_range has shape \[2\]: one range per row-block is \[3\]"),
    ({"input_range": jnp.ones(())}, r"input_range has shape \[\]: .* \[3\]"),
    ({"input_range": jnp.ones((3, 1))}, r"input_range has shape \[3, 1\]: .* \[3\]"),
    ({"weight_max": jnp.ones((3, 3))}, r"weight_max has shape \[3, 3\]: expected \[3, 1\]"),
    ({"weight_max": jnp.ones((3, 1)), "bound_axis": "column"}, r"weight_max has shape \[3, 1\]: expected \[3, 3\]"),
    ({"weight_max": jnp.ones(3)}, r"weight_max has shape \[3\]: expected \[3, 1\]"),
    ({"read_noise": NOISE}, "read_noise and read_key go together: give both or neither"),
    ({"read_key": jax.random.key(0)}, "read_noise and read_key go together: give both or neither"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"x": jnp.ones((2, 10)), "w": jnp.ones((10, 3)), "tile_rows": 4} | changes
    with pytest.raises(InputError, match=message):
        crossbar_matmul(arguments.pop("x"), arguments.pop("w"), **arguments)


@pytest.mark.parametrize("bad", [0, [0, 1], "seed"])
def test_read_key_must_be_a_key(bad: object) -> None:
    with pytest.raises(TypeError, match="a PRNG key is needed"):
        crossbar_matmul(jnp.ones((2, 10)), jnp.ones((10, 3)), read_noise=NOISE, read_key=bad)  # pyright: ignore[reportArgumentType]


def test_read_key_must_be_threefry() -> None:
    with pytest.raises(TypeError, match=r"a threefry2x32 key is needed, got .*rbg"):
        crossbar_matmul(jnp.ones((2, 10)), jnp.ones((10, 3)), read_noise=NOISE, read_key=jax.random.key(0, impl="rbg"))


@pytest.mark.parametrize("name", ["pallas_of_tomorrow", "", "XLA", "reference"])
def test_unknown_implementation_never_falls_back(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"implementation={name!r} .* one of {', '.join(IMPLEMENTATIONS)}"):
        crossbar_matmul(jnp.ones((2, 10)), jnp.ones((10, 3)), implementation=name)


@pytest.mark.parametrize("name", ["pallas", *KERNELS])
def test_kernels_refuse_read_noise(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"implementation={name!r} has no read noise"):
        crossbar_matmul(
            jnp.ones((2, 10)), jnp.ones((10, 3)), read_noise=NOISE, read_key=jax.random.key(0), implementation=name
        )


def test_kernels_refuse_a_cpu() -> None:
    with pytest.raises(NotImplementedError, match=r"runs on TPU and NVIDIA GPU.* 'xla'"):
        crossbar_matmul(jnp.ones((2, 10)), jnp.ones((10, 3)), implementation="pallas")


@pytest.mark.parametrize(("kind", "std"), [("additive", -0.1), ("pcm", float("nan")), ("pcm", float("inf"))])
def test_read_noise_magnitude_is_checked(kind: str, std: float) -> None:
    with pytest.raises(InputError, match=re.escape(f"read noise std={std!r} must be a finite number")):
        make_read_noise(kind, std)


def test_read_noise_kind_is_checked() -> None:
    with pytest.raises(InputError, match="read noise 'gaussian' is unknown; choose one of additive, pcm"):
        make_read_noise("gaussian", 0.1)
