"""What `gpu_checks.py` runs: the tests of the kernels with another implementation, and shapes of real models.

A case is a function that raises where a result is not what it should be, and returns what else is to be said.
"""

import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.programming import ProgrammedMatrix, SeededMatrix, program_matrix, realise
from hetmoe.analog.spec import analog_spec
from hetmoe.analog.tiles import block_max, row_blocks
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.dispatch import dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_crossbar.api import IMPLEMENTATIONS, digital_products, expert_products
from hetmoe.ops.grouped_crossbar.shape import Static
from hetmoe.ops.grouped_quantized.pallas import packed_blocks
from hetmoe.ops.grouped_quantized.shape import Static as PackedStatic
from tests.models import test_forward_kernels as of_models
from tests.ops import crossbar_battery as battery
from tests.ops import test_backward_kernels as of_gradients
from tests.ops import test_crossbar_golden as of_golden_files
from tests.ops import test_crossbar_gradients as of_matrix_gradients
from tests.ops import test_crossbar_matmul as of_matrices
from tests.ops import test_grouped_kernels as of_experts
from tests.ops import test_quantized_codes as of_codes
from tests.ops import test_quantized_kernels as of_packed

Case = Callable[[], str]

F32, BF16 = jnp.float32, jnp.bfloat16

# Of the tests: they look at the program instead of at numbers, or change a kernel.
LEFT_OUT = (
    "test_seeds_share_one_call_and_one_copy_of_the_weights", "test_a_perturbed_kernel_fails",
    "test_a_perturbed_gradient_fails", "test_lowers", "test_blocks_of_kernels_have_at_least_16_rows",
)  # fmt: skip


def enter(name: str) -> None:
    """Makes an implementation known to the tests."""
    run = functools.partial(crossbar_matmul, implementation=name)
    battery.IMPLEMENTATIONS.setdefault(name, run)
    battery.COMPILED.setdefault(name, jax.jit(run, static_argnames=battery.STATIC))
    of_golden_files.KERNELS = (*battery.KERNELS, name)
    of_packed.platform = IMPLEMENTATIONS.get
    of_packed.SIZES.setdefault(name, of_packed.SIZES["interpret_cuda"])


_IS_NAME = ("name", "implementation", "platform")
Given = tuple[tuple[str, "_Value"], ...]


@dataclasses.dataclass(frozen=True)
class _Value:
    """A parameter of a test; the same as another that is shown in the same way."""

    shown: str
    value: Any = dataclasses.field(compare=False)


def tests_of(module: types.ModuleType, name: str) -> dict[str, Case]:
    """Tests of a module that are parametrised by implementation or platform, with this one."""
    found: dict[str, Case] = {}
    for label, test in vars(module).items():
        if not label.startswith("test_") or label in LEFT_OUT:
            continue
        for given in dict.fromkeys(_parameters(test, name)):
            shown = ", ".join(value.shown for key, value in given if key not in _IS_NAME)
            found[f"{label.removeprefix('test_')} [{shown}]"] = functools.partial(_run_test, test, given)
    return found


def _parameters(test: Any, name: str) -> Iterator[Given]:
    ours: dict[str, Any] = {"name": name, "implementation": name, "platform": IMPLEMENTATIONS[name]}
    choices: list[list[Given]] = []
    for mark in (mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"):
        keys, values = mark.args
        keys = [keys] if isinstance(keys, str) else keys
        rows = [zip(keys, _row(given, len(keys)), strict=True) for given in values]
        choices.append([tuple((key, _as_value(ours.get(key, value))) for key, value in row) for row in rows])
    for chosen in itertools.product(*choices):
        given = tuple(itertools.chain(*chosen))
        if any(key in _IS_NAME for key, _ in given):
            yield given


def _row(given: Any, count: int) -> tuple[Any, ...]:
    if isinstance(given, type(pytest.param())):
        return tuple(given.values)
    return (given,) if count == 1 else given


def _as_value(value: Any) -> _Value:
    shown = value["name"] if isinstance(value, dict) and "name" in value else getattr(value, "__name__", value)
    return _Value(" ".join(str(shown).split()), value)


def _run_test(test: Any, given: Given) -> str:
    arguments = {key: value.value for key, value in given}
    fixtures: dict[str, Callable[[], Any]] = {
        "x": lambda: _normal(1, 5, of_matrices.ROWS), "w": lambda: _normal(2, of_matrices.ROWS, of_matrices.COLUMNS),
    }  # fmt: skip
    wanted = inspect.signature(test).parameters
    arguments |= {key: make() for key, make in fixtures.items() if key in wanted}
    with pytest.MonkeyPatch.context() as patch:
        test(**arguments, **({"monkeypatch": patch} if "monkeypatch" in wanted else {}))
    return ""


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Float32 values that the dtype holds."""
    return np.asarray(jnp.asarray(values, dtype).astype(F32))


def without_ties(x: np.ndarray, ranges: np.ndarray | None, dac_bits: int | None, tile_rows: int) -> np.ndarray:
    """Zeros in place of inputs `[rows, K]` halfway between two DAC codes: a division that is a bit off takes the other.

    `ranges` are `[tiles]` or `[rows, tiles]`; None = dynamic.
    """
    if dac_bits is None:
        return x
    parts: list[np.ndarray] = []
    for tile, (start, size) in enumerate(row_blocks(x.shape[1], tile_rows)):
        part = x[:, start : start + size]
        bound = np.abs(part).max(axis=1, keepdims=True) if ranges is None else ranges[..., tile, None]
        position = part / (bound / (2 ** (dac_bits - 1) - 1))
        parts.append(np.where(np.abs(position - np.floor(position) - 0.5) < 1e-3, 0, part))
    return np.concatenate(parts, axis=1).astype(np.float32)


def one_matrix(name: str, rows: int, inputs: int, outputs: int, dtype: Any, **changes: Any) -> str:
    """A matrix of a real model's size, every element against the numpy reference."""
    options: dict[str, Any] = {
        "input_range": None, "dac_bits": 8, "adc_bits": 8, "adc_bound": 12.0, "bound_axis": "tile", "tile_rows": 512,
    } | changes  # fmt: skip
    if options["input_range"] is not None:
        options["input_range"] = np.full(len(row_blocks(inputs, options["tile_rows"])), changes["input_range"], "f4")
    w = _rounded(0.02 * _normal(2, inputs, outputs), dtype)
    x = without_ties(
        _rounded(_normal(1, rows, inputs), dtype), options["input_range"], options["dac_bits"], options["tile_rows"]
    )
    traced = {key: None if options[key] is None else jnp.asarray(options[key]) for key in ("input_range", "adc_bound")}
    static = {key: options[key] for key in battery.STATIC}
    y = battery.COMPILED[name](jnp.asarray(x, dtype), jnp.asarray(w, dtype), **traced, **static)
    moved = battery.assert_matches(np.asarray(y), battery.expectation(x, w, **options))
    return f"{moved} of {y.size} a code apart, as rounding allows"


EXPERTS, USED_EXPERTS, ANALOG = 4, 3, np.array([True, False, True, True])


@functools.partial(jax.jit, static_argnames=("block", "name", "is_digital"))
def _products(
    x: Any, clean: Any, sides: Any, spec: Any, ranges: Any, chosen: Any, block: int, name: str, *, is_digital: bool
) -> tuple[jax.Array, ...]:
    """`[tokens, N]` of every matrix."""
    plan = dispatch(chosen[:, None].astype(jnp.int32), EXPERTS, block)
    used = (plan.slot_token < x.shape[0]).reshape(-1, block).any(axis=1)
    blocks: dict[str, Any] = {"block_expert": plan.block_expert, "used": used, "implementation": name}
    if is_digital:
        found = digital_products(to_blocks(x, plan), clean, **blocks)
    else:
        found = expert_products(
            to_blocks(x, plan), clean, sides, analog=jnp.asarray(ANALOG), input_range=ranges, spec=spec,
            read=(None,) * len(clean), **blocks,
        )  # fmt: skip
    return tuple(from_blocks(y, plan)[:, 0] for y in found)


def experts(
    name: str, block: int, inputs: int, outputs: int, dtype: Any, *, is_static: bool, matrices: int = 2,
    is_digital: bool = False, **changes: Any,
) -> str:  # fmt: skip
    """Experts of a real model's size, digital and analog ones, one without tokens."""
    settings: dict[str, Any] = {"adc_bound": 2.0, **changes}
    spec = analog_spec(**settings)
    options, tokens = spec.options, 2 * block * USED_EXPERTS
    chosen = np.random.default_rng(0).integers(0, USED_EXPERTS, tokens)
    tiles = len(row_blocks(inputs, options.tile_rows))
    ranges = np.random.default_rng(8).uniform(1.0, 2.5, (EXPERTS, tiles)).astype(np.float32) if is_static else None
    x = without_ties(
        _rounded(_normal(1, tokens, inputs), dtype), None if ranges is None else ranges[chosen], options.dac_bits,
        options.tile_rows,
    )  # fmt: skip
    clean = [_rounded(0.02 * _normal(10 + m, EXPERTS, inputs, outputs), dtype) for m in range(matrices)]
    noisy = [_rounded(w + 0.002 * _normal(20 + m, *w.shape), dtype) for m, w in enumerate(clean)]
    maxima = functools.partial(block_max, tile_rows=options.tile_rows, per_column=options.bound_axis == "column")
    sides = tuple(ProgrammedMatrix(w=jnp.asarray(w, dtype), weight_max=maxima(jnp.asarray(w))) for w in noisy)
    found = _products(
        jnp.asarray(x, dtype), tuple(jnp.asarray(w, dtype) for w in clean), sides, spec, ranges, chosen, block, name,
        is_digital=is_digital,
    )  # fmt: skip
    moved = 0
    for y, plain, programmed in zip(map(np.asarray, found), clean, noisy, strict=True):
        for expert in range(USED_EXPERTS):
            rows = chosen == expert
            if is_digital or not ANALOG[expert]:
                exact = x[rows].astype(np.float64) @ plain[expert]
                limit = battery.sum_error(inputs) * (np.abs(x[rows]) @ np.abs(plain[expert]))
                assert np.all(np.abs(y[rows] - exact) <= limit), f"{np.abs(y[rows] - exact).max()} off"
                continue
            given = {"adc_bound": float(spec.adc_bound), "input_range": None if ranges is None else ranges[expert]}
            shape = {key: getattr(options, key) for key in battery.STATIC}
            wanted = battery.expectation(x[rows], programmed[expert], **given, **shape)
            moved += battery.assert_matches(y[rows], wanted)
    return "" if is_digital else f"{moved} of {sum(y.size for y in found)} a code apart, as rounding allows"


def drawn(name: str, device: str, block: int, inputs: int, outputs: int, dtype: Any, **changes: Any) -> str:
    """Weights programmed in the kernel, through ideal converters, are those that XLA programs on the same device."""
    spec = analog_spec(device, noise_scale=1.5, dac_bits=None, adc_bits=None, **changes)
    chosen = np.random.default_rng(0).integers(0, USED_EXPERTS, 2 * block * USED_EXPERTS)
    x = jnp.asarray(_normal(1, len(chosen), inputs), dtype)
    clean, side = jnp.asarray(0.02 * _normal(2, EXPERTS, inputs, outputs), dtype), SeededMatrix(key=jax.random.key(3))
    (y,) = _products(x, (clean,), (side,), spec, None, chosen, block, name, is_digital=False)
    stored = np.asarray(jax.jit(realise)(side, clean, spec).w.astype(F32))
    rows, plain = np.asarray(x.astype(F32)), np.asarray(clean.astype(F32))
    exact = np.zeros(y.shape)
    for expert, is_analog in enumerate(ANALOG):
        weights = (stored if is_analog else plain)[expert]
        exact[chosen == expert] = rows[chosen == expert].astype(np.float64) @ weights
    off = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    noise = np.linalg.norm(stored - plain) / np.linalg.norm(plain)
    # A weight's last bit may differ where it was rounded to two bytes; noise is far larger.
    assert off < (5e-4 if dtype == BF16 else 2e-6) < noise / 20, f"{off:.2g} off relatively, noise {noise:.2g}"
    return f"{off:.1e} off, of a noise of {noise:.1e}"


_program = jax.jit(lambda key, w, spec: program_matrix(key, w, spec, expert=jnp.int32(1)))


def same_as_on_cpu(device: str, **changes: Any) -> str:
    """XLA programs the same chip on this device as on a CPU."""
    spec, w = analog_spec(device, noise_scale=1.5, **changes), 0.02 * _normal(2, 512, 256)
    here = np.asarray(_program(jax.random.key(3), jnp.asarray(w), spec))
    with jax.default_device(jax.devices("cpu")[0]):
        there = np.asarray(_program(jax.random.key(3), jnp.asarray(w), analog_spec(device, noise_scale=1.5, **changes)))
    off, noise = np.abs(here - there).max() / np.abs(there).max(), np.abs(here - w).max() / np.abs(w).max()
    assert off <= 8 * 2.0**-23 < noise / 1000, f"{off:.2g} off relatively, noise {noise:.2g}"
    return f"{off:.1e} off, of a noise of {noise:.1e}"


def gradients(name: str, block: int, inputs: int, outputs: int, dtype: Any, *, is_static: bool) -> str:
    """Of rows and weights at a real model's size; no ADC clips, since rounding would decide which do."""
    sizes = {"BLOCK": block, "ROWS": inputs, "COLUMNS": outputs, "TILE_ROWS": 512, "TILES": -(-inputs // 512)}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in sizes.items():
            patch.setattr(of_gradients, key, value)
        data = of_gradients.data(dtype, matrices=2, static_range=is_static, axis="column", adc_bound=60.0)
        arrays = of_gradients.without_ties(data[0], data[1], 8), *data[1:]
        options = CrossbarOptions(dac_bits=8, adc_bits=8, bound_axis="column", tile_rows=512)
        static = Static(options=options, device=None, interpret=IMPLEMENTATIONS[name])
        of_gradients.assert_same(of_gradients.compiled(static)(*arrays), *arrays, options)
    return ""


def packed(
    name: str, bits: int, group: int, block: int, inputs: int, outputs: int, dtype: Any, *, symmetric: bool
) -> str:
    """Packed weights of a real model's size."""
    _, weights = of_packed.case(bits, group, inputs, outputs, symmetric=symmetric, dtype=dtype)
    own, slot = jnp.asarray(of_packed.OWN), jnp.asarray(of_packed.SLOT)
    x = jnp.asarray(_normal(1, len(of_packed.OWN), block, inputs), dtype)
    static = PackedStatic(interpret=IMPLEMENTATIONS[name])
    y = jax.jit(packed_blocks, static_argnums=4)(x, own, slot, weights, static)
    of_packed.assert_is_product(y, x, of_packed.exact_weights(weights)[of_packed.SLOT], of_packed.OWN)
    return ""


def _label(given: tuple[Any, ...], named: dict[str, Any]) -> str:
    shown = [getattr(value, "__name__", str(value)) for value in given]
    return ", ".join([*shown, *(f"{key}={value}" for key, value in named.items())])


def _of(function: Callable[..., str], *given: Any, **named: Any) -> dict[str, Case]:
    """A case named after the arguments that follow the implementation."""
    shown = given[1:] if given and given[0] in IMPLEMENTATIONS else given
    return {f"{function.__name__} [{_label(shown, named)}]": functools.partial(function, *given, **named)}


def matrix_cases(name: str) -> dict[str, Case]:
    """Rows of a block: 16 to 128; odd sizes; every dtype and kind of range."""
    one = functools.partial(_of, one_matrix, name)
    return {
        **one(32, 2048, 1024, BF16, input_range=2.5),
        **one(1000, 2048, 1024, BF16, input_range=2.5),
        **one(1000, 1000, 1408, BF16, bound_axis="column"),
        **one(100, 1408, 1000, F32, input_range=2.5),
        **one(1000, 1000, 1000, F32, bound_axis="column"),
        **one(32, 2048, 1024, BF16, input_range=2.5, adc_bound=0.2),
        **one(64, 1024, 2048, BF16, input_range=2.5, dac_bits=10),
        **one(64, 1024, 2048, BF16, dac_bits=None, adc_bits=None),
        **one(1, 2048, 1024, BF16),
    }


def expert_cases(name: str) -> dict[str, Case]:
    """Gate and up, which share their rows, and down."""
    some = functools.partial(_of, experts, name)
    return {
        **some(16, 2048, 1024, BF16, is_static=True),
        **some(128, 2048, 1024, BF16, is_static=True),
        **some(16, 2048, 1024, BF16, is_static=True, is_digital=True),
        **some(128, 2048, 1024, BF16, is_static=True, is_digital=True),
        **some(128, 1408, 1000, BF16, is_static=False, bound_axis="column"),
        **some(32, 1024, 2048, BF16, is_static=False, matrices=1),
        **some(64, 1000, 1408, F32, is_static=True),
        **some(128, 2048, 1024, F32, is_static=False),
        **some(128, 1408, 1000, F32, is_static=True, is_digital=True, matrices=1),
        **some(64, 1000, 1408, BF16, is_static=True, is_digital=True),
        **some(128, 2048, 1024, BF16, is_static=True, adc_bound=0.2, matrices=1),
    }


def packed_cases(name: str) -> dict[str, Case]:
    """Decode and prefill at every number of bits, then the tests' own shapes and grids."""
    some = functools.partial(_of, packed, name)
    decode = [some(bits, 64, 16, 2048, 1024, BF16, symmetric=False) for bits in (4, 2, 3, 8)]
    prefill = [some(bits, 64, 128, 2048, 1024, BF16, symmetric=False) for bits in (4, 2, 3, 8)]
    odd = [some(bits, 128, 64, 1408, 1000, F32, symmetric=True) for bits in (4, 3, 2, 8, 1)]
    more = [some(3, 32, 16, 1408, 2048, BF16, symmetric=False), some(1, 64, 16, 2048, 1024, BF16, symmetric=True)]
    return dict(itertools.chain.from_iterable(one.items() for one in (*decode, *prefill, *odd, *more)))


def gradient_cases(name: str) -> dict[str, Case]:
    """The smallest first."""
    return tests_of(of_gradients, name) | {
        **_of(gradients, name, 128, 2048, 1024, BF16, is_static=False),
        **_of(gradients, name, 128, 1408, 1000, F32, is_static=True),
        **_of(gradients, name, 16, 1000, 1408, BF16, is_static=True),
    }


def drawn_cases(name: str) -> dict[str, Case]:
    """What is drawn by few streams first: it compiles faster."""
    some = functools.partial(_of, drawn, name)
    return {
        **some("pcm", 16, 2048, 1024, BF16),
        **some("pcm", 128, 2048, 1024, BF16),
        **some("additive", 16, 1408, 1000, F32),
        **some("pcm", 16, 1408, 1000, F32, time_s=86400.0, drift_compensation=True),
        **some("hermes", 16, 2048, 1024, BF16, time_s=3600.0),
    }


def xla_cases(_: str) -> dict[str, Case]:
    """What is the default, and what the kernels are compared with elsewhere."""
    found = [
        _of(same_as_on_cpu, "pcm"), _of(same_as_on_cpu, "hermes", time_s=3600.0), _of(same_as_on_cpu, "additive"),
        _of(one_matrix, "xla", 1000, 1000, 1408, BF16), _of(one_matrix, "xla", 100, 1408, 1000, F32, input_range=2.5),
        _of(experts, "xla", 32, 1408, 1000, F32, is_static=True),
        _of(experts, "xla", 16, 2048, 1024, BF16, is_static=False),
    ]  # fmt: skip
    return dict(itertools.chain.from_iterable(one.items() for one in found))


# Each in a process of its own, beside the others.
GROUPS: dict[str, Callable[[str], dict[str, Case]]] = {
    "matrix": matrix_cases,
    "experts": expert_cases,
    "packed": packed_cases,
    "gradients": gradient_cases,
    "drawn": drawn_cases,
    "xla": xla_cases,
    "models": lambda name: tests_of(of_models, name),
    "experts, tests": lambda name: tests_of(of_experts, name),
    "matrix, tests": lambda name: tests_of(of_matrices, name) | tests_of(of_matrix_gradients, name),
    "packed, tests": lambda name: tests_of(of_codes, name) | tests_of(of_packed, name),
    "golden files, tests": lambda name: tests_of(of_golden_files, name),
}
