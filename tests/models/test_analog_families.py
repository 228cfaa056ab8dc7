"""Every kind of module on crossbars: latent attention, shared experts, a dense layer, biases.

What is computed is compared with numpy in `test_forward_numpy.py`; here, that no matrix was forgotten on the way.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.calibration import Calibration, RangeMethod
from hetmoe.analog.programming import ProgrammedWeights, program
from hetmoe.analog.read_noise import make_read_noise
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.evaluate.calibrate import calibrate
from hetmoe.models.analog_arguments import check_analog
from hetmoe.models.matrices import MATRICES, crossbar_matrices
from hetmoe.models.params import Params
from hetmoe.models.transformer import forward, hidden_states
from hetmoe.placement.plan import Plan, all_analog, all_digital
from tests.models import numpy_model
from tests.models.analog_tiny import EXPERT_MATRICES, SITE_OF, matrices_of, programmed_by_hand, site_widths
from tests.models.tiny import full_config, random_params, random_tokens
from tests.numpy_reference import row_blocks

CONFIG = full_config()
MOE, EXPERTS = len(CONFIG.moe_layers), CONFIG.num_experts
TILE_ROWS = 24  # one row-block each, which compiles faster
TOKENS = random_tokens(CONFIG, 1, (4, 9))
ROUNDING = 2e-6  # as in `test_forward_numpy.py`
KINDS = ("layers", "dense_layers")
FLAG_OF = {name: info.module for name, info in MATRICES.items()}

_forward = jax.jit(lambda params, **analog: forward(params, TOKENS, CONFIG, **analog))
_program = jax.jit(program, static_argnames="dense")


@functools.cache
def params() -> Params:
    return random_params(CONFIG, 0)


@functools.cache
def noisy() -> ProgrammedWeights:
    return programmed_by_hand(params(), 2, noise=0.1, per_column=False, tile_rows=TILE_ROWS)


@functools.cache
def digital_logits() -> np.ndarray:
    return np.asarray(_forward(params()))


@functools.cache
def drawn() -> ProgrammedWeights:
    """As `program` makes them, of noise that does not depend on the weights."""
    return jax.tree.map(np.asarray, _program(jax.random.key(3), params(), spec_of(device="additive"), dense=True))


def spec_of(**changes: Any) -> AnalogSpec:
    return analog_spec(**{"adc_bound": 6.0, "tile_rows": TILE_ROWS, **changes})


def largest(difference: Any) -> float:  # relative to the largest digital logit
    return float(np.abs(difference).max() / np.abs(digital_logits()).max())


def every_matrix() -> list[tuple[str, str, int]]:
    """(kind of layer, name, position among the layers of the kind)."""
    stacks = ((kind, matrices_of(getattr(params(), kind))) for kind in KINDS)
    return [(kind, name, place) for kind, stack in stacks for name, w in stack.items() for place in range(w.shape[0])]


def test_no_matrix_is_forgotten() -> None:
    """Those of `crossbar_matrices` are those written down for the tests; together they are all that there are."""
    for kind in KINDS:
        stack, expected = getattr(params(), kind), matrices_of(getattr(params(), kind))
        found = crossbar_matrices(stack)
        assert found.keys() == expected.keys()
        assert all(found[name] is expected[name] for name in expected)
        experts = crossbar_matrices(stack, dense=False)
        assert experts.keys() == (set(EXPERT_MATRICES) if kind == "layers" else set())
        shapes = sorted(leaf.shape for leaf in jax.tree.leaves(stack) if leaf.ndim > 2)
        digital = (
            [(MOE, 23, EXPERTS), (MOE, 23, 1)] if kind == "layers" else []
        )  # router and gate of the shared experts
        assert sorted([*digital, *(w.shape for w in expected.values())]) == shapes
    plain = matrices_of(random_params(dataclasses.replace(CONFIG, **PLAIN), 0).layers)
    assert crossbar_matrices(params().layers).keys() | crossbar_matrices(
        params().dense_layers
    ).keys() | plain.keys() == (MATRICES.keys())


PLAIN: dict[str, Any] = {"latent": None, "head_dim": 6, "num_kv_heads": 2}


def test_ideal_crossbars_are_the_digital_model() -> None:
    """Noise scale 0, converters off, everything on crossbars: biases, gates and norms stay where they were."""
    clean = _program(jax.random.key(0), params(), spec_of(device="additive", noise_scale=0.0), dense=True)
    for kind in KINDS:
        for name, w in matrices_of(getattr(params(), kind)).items():
            np.testing.assert_array_equal(getattr(clean, kind)[name].w, w)
    np.testing.assert_array_equal(clean.lm_head.w, params().lm_head)
    ideal = spec_of(dac_bits=None, adc_bits=None)
    analog = _forward(params(), plan=all_analog(CONFIG), spec=ideal, programmed=clean)
    assert largest(analog - digital_logits()) < ROUNDING
    converted = _forward(params(), plan=all_analog(CONFIG), spec=spec_of(), programmed=clean)
    assert largest(converted - digital_logits()) > 1000 * ROUNDING


def test_a_plan_that_is_all_digital_is_the_digital_model() -> None:
    """By value and by structure, however noisy the programmed weights."""
    off = jax.tree.map(jnp.zeros_like, all_analog(CONFIG))
    for plan in (off, all_digital(CONFIG)):
        result = _forward(params(), plan=plan, spec=spec_of(), programmed=noisy())
        assert largest(result - digital_logits()) < ROUNDING


def only(module: str, index: Any = ...) -> Plan:
    """One module on crossbars, at one index."""
    off = jax.tree.map(jnp.zeros_like, all_analog(CONFIG))
    return dataclasses.replace(off, **{module: getattr(off, module).at[index].set(True)})


def but(module: str, index: Any = ...) -> Plan:
    """All but one module on crossbars."""
    return jax.tree.map(jnp.logical_not, only(module, index))


def without(kind: str, name: str, place: int) -> ProgrammedWeights:
    """One programmed matrix replaced by zeros; its maxima stay."""
    matrix = getattr(noisy(), kind)[name]
    spoiled = dataclasses.replace(matrix, w=matrix.w.at[place].set(0))
    return dataclasses.replace(noisy(), **{kind: getattr(noisy(), kind) | {name: spoiled}})


@pytest.mark.parametrize("module", ["experts", "attention", "shared_experts", "dense_ffn"])
def test_every_matrix_follows_its_flag(module: str) -> None:
    """Zeros in place of its programmed weights change the logits if its flag is analog, and no bit of them if not."""
    cases = [case for case in every_matrix() if FLAG_OF[case[1]] == module]
    expected = {"experts": 3 * MOE, "attention": 5 * CONFIG.num_layers, "shared_experts": 3 * MOE, "dense_ffn": 3}
    assert len(cases) == expected[module]
    results: dict[tuple[bool, int], Any] = {}

    def run(flag: bool, index: int, programmed: ProgrammedWeights) -> np.ndarray:
        plan = only(module, index) if flag else but(module, index)
        return np.asarray(_forward(params(), plan=plan, spec=spec_of(), programmed=programmed))

    for kind, name, place in cases:
        numbers = CONFIG.moe_layers if kind == "layers" else CONFIG.dense_layers
        index = numbers[place] if module == "attention" else place
        for flag in (True, False):
            if (flag, index) not in results:
                results[flag, index] = run(flag, index, noisy())
            before, after = results[flag, index], run(flag, index, without(kind, name, place))
            if flag:
                assert largest(after - before) > 1000 * ROUNDING, (kind, name, place)
            else:
                np.testing.assert_array_equal(after, before, err_msg=f"{kind} {name} {place}")


def test_the_head_follows_its_flag() -> None:
    spoiled = dataclasses.replace(noisy(), lm_head=jax.tree.map(jnp.zeros_like, noisy().lm_head))
    for plan, follows in ((only("lm_head"), True), (but("lm_head"), False)):
        before, after = (_forward(params(), plan=plan, spec=spec_of(), programmed=p) for p in (noisy(), spoiled))
        assert np.any(np.asarray(before) != after) == follows


def test_single_experts_follow_their_flags() -> None:
    """The programmed weights of an expert matter only where its own flag is set."""
    plan = only("experts", (1, 5))
    before = _forward(params(), plan=plan, spec=spec_of(), programmed=noisy())
    for name in EXPERT_MATRICES:
        matrix = noisy().layers[name]
        for place, expert in np.ndindex(MOE, EXPERTS):
            spoiled = dataclasses.replace(matrix, w=matrix.w.at[place, expert].set(0))
            programmed = dataclasses.replace(noisy(), layers=noisy().layers | {name: spoiled})
            after = _forward(params(), plan=plan, spec=spec_of(), programmed=programmed)
            assert np.any(np.asarray(before) != after) == ((place, expert) == (1, 5)), (name, place, expert)


def test_every_matrix_has_its_own_draws() -> None:
    """No two matrices, layers or experts share a normal; the noise is the device's, its scale taken out."""
    draws: dict[Any, np.ndarray] = {}
    for kind in KINDS:
        for name, clean in matrices_of(getattr(params(), kind)).items():
            noise = getattr(drawn(), kind)[name].w - np.asarray(clean)
            for index in np.ndindex(noise.shape[:-2]):
                draws[kind, name, *index] = noise[index].ravel()
    draws["lm_head"] = (drawn().lm_head.w - np.asarray(params().lm_head)).ravel()
    # Per layer with experts: three matrices of each expert, five of attention, three shared; a dense layer: 5 + 3.
    assert len(draws) == MOE * (3 * EXPERTS + 5 + 3) + 8 + 1
    size = min(part.size for part in draws.values())
    table = np.array([part[:size] / part.std() for part in draws.values()])
    correlation = table @ table.T / size - np.eye(len(table))
    assert np.abs(correlation[~np.eye(len(table), dtype=bool)]).max() < 6 * size**-0.5  # of independent normals: none
    again = jax.tree.map(np.asarray, _program(jax.random.key(3), params(), spec_of(device="additive"), dense=True))
    jax.tree.map(np.testing.assert_array_equal, again, drawn())


def test_without_dense_modules_only_routed_experts_are_programmed() -> None:
    """And they are what they would be with them."""
    found = _program(jax.random.key(3), params(), spec_of(device="additive"), dense=False)
    assert found.layers.keys() == set(EXPERT_MATRICES)
    assert found.dense_layers == {}
    assert found.lm_head is None
    for name in EXPERT_MATRICES:
        jax.tree.map(np.testing.assert_array_equal, found.layers[name], drawn().layers[name])
    assert drawn().layers.keys() == matrices_of(params().layers).keys()
    assert drawn().dense_layers.keys() == matrices_of(params().dense_layers).keys()


CALIBRATION_TILES = 8  # two or three row-blocks everywhere
HOW = RangeMethod(k=5.0, decay=0.9, min_tokens=1)  # experts have ranges of their own, however few tokens they saw


@functools.cache
def calibrated() -> Calibration:
    """One batch, so that the moving average is its standard deviation."""
    return calibrate(params(), TOKENS, CONFIG, HOW, tile_rows=CALIBRATION_TILES, batch=TOKENS.shape[0])


def test_calibration_gives_every_site_its_range() -> None:
    for kind, dense, count in (("layers", False, MOE), ("dense_layers", True, len(CONFIG.dense_layers))):
        ranges = getattr(calibrated(), kind)
        widths = site_widths(CONFIG, dense=dense)
        assert ranges.keys() == widths.keys()
        assert ranges.keys() == {SITE_OF[name] for name in matrices_of(getattr(params(), kind))}
        for site, values in ranges.items():
            leading = (count, EXPERTS) if site.startswith("experts") else (count,)
            assert values.shape == (*leading, -(-widths[site] // CALIBRATION_TILES))
            assert values.dtype == jnp.float32
            assert np.all(np.asarray(values) > 0)
    assert calibrated().lm_head.shape == (3,)
    assert np.asarray(calibrated().tokens_seen).sum(axis=1).tolist() == [TOKENS.size * CONFIG.experts_per_token] * MOE
    spec = spec_of(tile_rows=CALIBRATION_TILES)
    programmed = programmed_by_hand(params(), 2, noise=0.0, per_column=False, tile_rows=CALIBRATION_TILES)
    check_analog(CONFIG, all_analog(CONFIG), spec, programmed, calibrated(), None)


def test_ranges_are_those_of_the_inputs_that_numpy_sees() -> None:
    """K times the standard deviation of what every product of the float64 model receives."""
    inputs: dict[tuple[str, int, int], list[np.ndarray]] = {}

    def record(name: str, layer: int, expert: int, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        if name != "lm_head":
            inputs.setdefault((name, layer, expert), []).append(x.reshape(-1, x.shape[-1]))
        return x @ w

    numpy_model.forward(params(), np.asarray(TOKENS), CONFIG, record)
    compared = set()
    for (name, layer, expert), parts in inputs.items():
        dense = layer in CONFIG.dense_layers
        place = (CONFIG.dense_layers if dense else CONFIG.moe_layers).index(layer)
        found = np.asarray((calibrated().dense_layers if dense else calibrated().layers)[SITE_OF[name]][place])
        found = found[expert] if name in EXPERT_MATRICES else found
        x = np.concatenate(parts)
        expected = [HOW.k * x[:, block].std() for block in row_blocks(x.shape[1], CALIBRATION_TILES)]
        # The variance is a difference of float32 means of up to 36 * 8 numbers.
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=f"{name} {layer} {expert}")
        compared.add((dense, SITE_OF[name]))
    assert compared == {(dense, site) for dense in (False, True) for site in site_widths(CONFIG, dense=dense)}


def test_observations_are_stacked_by_kind_of_layer() -> None:
    """Through alternating runs of layers they come back in model order."""
    config = full_config(num_layers=5, dense_layers=(1, 2))
    model = random_params(config, 0)

    def observe(x: jax.Array, real: jax.Array, group: jax.Array) -> jax.Array:
        del group
        return jnp.sum(jnp.where(real[..., None], jnp.abs(x), 0))

    _, routing, (moe, dense) = jax.jit(lambda p: hidden_states(p, TOKENS, config, observe=observe))(model)
    inputs: dict[tuple[str, int], float] = {}

    def record(name: str, layer: int, expert: int, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        del expert
        if name != "lm_head":
            inputs[name, layer] = inputs.get((name, layer), 0.0) + float(np.abs(x).sum())
        return x @ w

    _, routes = numpy_model.forward(model, np.asarray(TOKENS), config, record)
    np.testing.assert_array_equal(routing.chosen, np.stack(routes))
    for found, numbers in ((moe, config.moe_layers), (dense, config.dense_layers)):
        for site, values in found.items():
            name = next(n for n in SITE_OF if SITE_OF[n] == site and (n, numbers[0]) in inputs)
            expected = [inputs[name, number] for number in numbers]
            np.testing.assert_allclose(values, expected, rtol=1e-5, err_msg=site)
            assert len(set(np.round(expected, 3))) == len(numbers)


READ = {"read_noise": make_read_noise("additive", 0.02)}


def test_read_noise_is_a_function_of_its_key() -> None:
    def run(seed: int) -> np.ndarray:
        analog: dict[str, Any] = {"plan": all_analog(CONFIG), "programmed": noisy()}
        return np.asarray(_forward(params(), **analog, spec=spec_of(**READ), read_key=jax.random.key(seed)))

    first = run(0)
    np.testing.assert_array_equal(run(0), first)
    assert largest(run(1) - first) > 1000 * ROUNDING


@pytest.mark.parametrize("module", ["experts", "attention", "shared_experts", "dense_ffn", "lm_head"])
def test_every_module_has_read_noise(module: str) -> None:
    """One module on crossbars at a time; digital ones draw nothing."""
    off = jax.tree.map(jnp.zeros_like, all_analog(CONFIG))
    for plan, noise in ((only(module), True), (off, False)):
        results = [
            np.asarray(
                _forward(params(), plan=plan, spec=spec_of(**READ), programmed=noisy(), read_key=jax.random.key(s))
            )
            for s in (0, 1)
        ]
        assert np.any(results[0] != results[1]) == noise
