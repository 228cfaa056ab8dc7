"""Ways to compute the same results, but for rounding: when crossbars are programmed, and by what."""

import jax

from hetmoe.errors import InputError
from hetmoe.ops.grouped_crossbar.api import IMPLEMENTATIONS

WEIGHTS = ("stored", "layer", "kernel")  # when they are programmed: see `seeded_weights`


def check_execution(prefix: str, weights: str, implementation: str, *, read_noise: bool) -> None:
    """Refuses before minutes of work what could not run here; `prefix` is what messages put before names of options.

    Raises:
        InputError: naming the option, its value and the fix.
    """
    check_choices(prefix, weights, implementation, read_noise=read_noise)
    if implementation == "pallas" and jax.default_backend() == "cpu":
        raise InputError(f"{prefix}implementation pallas runs on TPU and NVIDIA GPU, this is a CPU: leave it out")


def check_choices(prefix: str, weights: str, implementation: str, *, read_noise: bool) -> None:
    """Refuses what could not run on any device; arguments as of `check_execution`.

    Raises:
        InputError: naming the option, its value and the fix.
    """
    if weights not in WEIGHTS:
        raise InputError(f"{prefix}weights {weights!r} is unknown: use {', '.join(WEIGHTS)}")
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"{prefix}implementation {implementation!r} is unknown: use {', '.join(IMPLEMENTATIONS)}")
    if implementation != "xla" and read_noise:
        raise InputError(f"{prefix}implementation {implementation} has no read noise: leave out one of them")
