"""Settings of every test: JAX promotes nothing silently, plots need no display, and nothing is fetched.

Warnings are errors as well; that, and the use of `check_arrays`, are set in `pyproject.toml`.
"""

import os

# Read when their libraries are first imported, also by a process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import functools
import gc
import typing
from pathlib import Path

import beartype
import hypothesis
import jax
import pytest
from flax import struct
from jaxtyping import AbstractArray

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a test compiles, so there is no deadline; every run tries the same examples.
hypothesis.settings.register_profile("hetmoe", deadline=None, derandomize=True)
hypothesis.settings.load_profile("hetmoe")


def check_arrays(function):
    """Checks the arguments and results of hetmoe's functions whose annotation holds a shape.

    Other types are left to the static checker, so that a test can pass wrong values to the package's own checks.
    """
    hints = function.__annotations__
    function.__annotations__ = {name: hint if _has_shape(hint) else typing.Any for name, hint in hints.items()}
    return beartype.beartype(function)


def _has_shape(hint):
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in typing.get_args(hint))


def _leave_fields_unchecked(dataclass):
    """Exempts the fields of pytrees, but not their methods, from `check_arrays`.

    JAX rebuilds pytrees with leaves of any shape or none: batched by `vmap`, stacked by `scan`, placeholders.
    """

    @functools.wraps(dataclass)
    def wrapped(cls, **kwargs):
        cls = dataclass(cls, **kwargs)
        cls.__no_type_check__ = True
        return cls

    return wrapped


struct.dataclass = _leave_fields_unchecked(struct.dataclass)


MOST_MAPS = 16_384  # a quarter of what Linux allows a process by default (vm.max_map_count)


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps():
    """Every program that XLA compiles takes memory maps; a process that has none left crashes in the next compilation.

    What a file compiled is thus thrown away behind it, once there is much of it.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `hetmoe ARGUMENTS` in this process: (exit code, stdout, stderr)."""
    from hetmoe import cli

    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["hetmoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call
