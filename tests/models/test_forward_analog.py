"""The analog path's promises: what is digital stays digital, a flip stays where it is, one compile serves a sweep."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.programming import ProgrammedWeights, program
from hetmoe.analog.read_noise import make_read_noise
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.models.params import Params
from hetmoe.models.transformer import forward, head_logits, hidden_states
from hetmoe.placement.plan import Plan, all_analog, all_digital, experts_analog, stack_plans
from tests.models.analog_tiny import matrices_of, programmed_by_hand, random_ranges
from tests.models.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(num_layers=2)
LAYERS, EXPERTS = CONFIG.num_layers, CONFIG.num_experts
TILE_ROWS = 24  # one row-block each, which compiles faster; `test_forward_numpy.py` has several
TOKENS = random_tokens(CONFIG, 1, (3, 7))
# Two float32 results of the same numbers summed in another order: 20 products in a row of a few units (6e-8) each,
# relative to the largest logit. Measured below 3e-7.
ROUNDING = 2e-6

_forward = jax.jit(lambda params, **analog: forward(params, TOKENS, CONFIG, **analog))


@jax.jit
@chex.assert_max_traces(n=1)
def _program(key: jax.Array, params: Params, spec: AnalogSpec) -> ProgrammedWeights:
    return program(key, params, spec, dense=True)


@jax.jit
@chex.assert_max_traces(n=1)
def _run(params: Params, plan: Plan, spec: AnalogSpec, programmed: ProgrammedWeights) -> tuple[jax.Array, jax.Array]:
    """(logits [tokens, vocab], experts chosen [layers, tokens, copies]); dynamic ranges."""
    analog: dict[str, Any] = {"plan": plan, "spec": spec, "programmed": programmed, "calibration": None}
    hidden, routing, _ = hidden_states(params, TOKENS, CONFIG, **analog)
    return head_logits(hidden.reshape(-1, CONFIG.hidden_size), params, **analog, read_key=None), routing.chosen


@jax.jit
@chex.assert_max_traces(n=1)
def _run_read(
    params: Params, plan: Plan, spec: AnalogSpec, programmed: ProgrammedWeights, read_key: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `_run`, with read noise and static ranges."""
    ranges = random_ranges(CONFIG, 5, tile_rows=TILE_ROWS)
    analog: dict[str, Any] = {
        "plan": plan, "spec": spec, "programmed": programmed, "calibration": ranges, "read_key": read_key
    }  # fmt: skip
    hidden, routing, _ = hidden_states(params, tokens, CONFIG, **analog)
    return head_logits(hidden.reshape(-1, CONFIG.hidden_size), params, **analog), routing.chosen


@functools.cache
def params() -> Params:
    return random_params(CONFIG, 0)


@functools.cache
def noisy() -> ProgrammedWeights:
    return programmed_by_hand(params(), 2, noise=0.2, per_column=False, tile_rows=TILE_ROWS)


@functools.cache
def digital_logits() -> np.ndarray:
    return np.asarray(_forward(params())).reshape(-1, CONFIG.vocab_size)


def spec_of(**changes: Any) -> AnalogSpec:
    return analog_spec(**{"device": "additive", "adc_bound": 6.0, "tile_rows": TILE_ROWS, **changes})


def plan_of(experts: Any, dense: bool) -> Plan:
    """Dense modules all analog or all digital, by value: the structure is the same."""
    flags = jnp.asarray(np.broadcast_to(experts, (LAYERS, EXPERTS)), bool)
    return Plan(experts=flags, attention=jnp.full((LAYERS,), dense), lm_head=jnp.asarray(dense))


def random_experts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((LAYERS, EXPERTS)) < 0.5


def largest(difference: Any) -> float:  # relative to the largest digital logit
    return float(np.abs(difference).max() / np.abs(digital_logits()).max())


def test_a_plan_that_is_all_digital_is_the_digital_model() -> None:
    """By value and by structure, however noisy the programmed weights."""
    assert np.all(noisy().layers["gate"].w != params().layers.moe.experts.gate)
    by_value, _ = _run(params(), plan_of(False, False), spec_of(), noisy())
    assert largest(by_value - digital_logits()) < ROUNDING
    by_structure = _forward(params(), plan=all_digital(CONFIG), spec=spec_of(), programmed=noisy())
    assert by_structure.dtype == jnp.float32
    assert largest(by_structure.reshape(by_value.shape) - digital_logits()) < ROUNDING
    read, _ = _run_read(params(), plan_of(False, False), READ_SPEC, noisy(), jax.random.key(0), TOKENS)
    assert largest(read - digital_logits()) < ROUNDING


def test_ideal_crossbars_are_the_digital_model() -> None:
    """Converters off, noise scale 0, everything on crossbars."""
    clean = _program(jax.random.key(7), params(), spec_of(noise_scale=0.0))
    np.testing.assert_array_equal(clean.layers["down"].w, params().layers.moe.experts.down)
    ideal = spec_of(noise_scale=0.0, dac_bits=None, adc_bits=None)
    result = _forward(params(), plan=all_analog(CONFIG), spec=ideal, programmed=clean)
    assert largest(result.reshape(digital_logits().shape) - digital_logits()) < ROUNDING
    converted, _ = _run(params(), all_analog(CONFIG), spec_of(), clean)
    assert largest(converted - digital_logits()) > 1000 * ROUNDING  # converters alone do change something
    noise = _forward(params(), plan=all_analog(CONFIG), spec=ideal, programmed=noisy())
    assert largest(noise.reshape(digital_logits().shape) - digital_logits()) > 1000 * ROUNDING  # and so does noise


def assert_flips_stay_with_their_tokens(run: Any) -> None:
    """Flipping an expert of the last layer changes the tokens routed to it, and no bit of the others."""
    for dense, seed in ((False, 0), (True, 1)):
        base = random_experts(seed)
        before, chosen = run(plan_of(base, dense))
        sizes = []
        for expert in range(EXPERTS):
            flipped = base.copy()
            flipped[-1, expert] ^= True
            after, same = run(plan_of(flipped, dense))
            np.testing.assert_array_equal(same, chosen)
            routed = np.any(np.asarray(chosen)[-1] == expert, axis=-1)
            np.testing.assert_array_equal(np.any(np.asarray(after) != np.asarray(before), axis=-1), routed)
            sizes.append(routed.sum())
        assert max(sizes) < TOKENS.size  # every flip left some tokens alone
        assert sum(sizes) == TOKENS.size * CONFIG.experts_per_token


def test_flipping_an_expert_changes_its_tokens_only() -> None:
    assert_flips_stay_with_their_tokens(lambda plan: _run(params(), plan, spec_of(), noisy()))


def test_flipping_an_expert_changes_its_tokens_only_under_read_noise() -> None:
    """The draws follow the token and the matrix, not the placement."""
    key = jax.random.key(3)
    assert_flips_stay_with_their_tokens(lambda plan: _run_read(params(), plan, READ_SPEC, noisy(), key, TOKENS))


def test_digital_experts_stay_exactly_digital() -> None:
    """Their programmed weights are never read, and tokens with digital experts alone see the digital model."""
    experts = random_experts(2)
    experts[0] = False  # so that no token has met noise before the last layer
    plan = plan_of(experts, False)
    before, chosen = _run(params(), plan, spec_of(), noisy())
    touched = experts[-1][np.asarray(chosen)[-1]].any(axis=-1)
    assert 0 < touched.sum() < touched.size
    difference = np.abs(np.asarray(before) - digital_logits()).max(axis=-1) / np.abs(digital_logits()).max()
    assert difference[~touched].max() < ROUNDING
    assert difference[touched].min() > 100 * ROUNDING

    def poison(stacked: jax.Array) -> jax.Array:
        flags = experts.reshape(LAYERS, EXPERTS, *[1] * (stacked.ndim - 2))
        return jnp.where(flags, stacked, jnp.nan)

    layers = noisy().layers
    spoiled_experts = {name: jax.tree.map(poison, layers[name]) for name in ("gate", "up", "down")}
    spoiled_dense = {name: jax.tree.map(lambda a: a + jnp.nan, layers[name]) for name in "qkvo"}
    assert spoiled_experts.keys() | spoiled_dense.keys() == layers.keys()
    head = jax.tree.map(lambda a: a + jnp.nan, noisy().lm_head)
    spoiled = dataclasses.replace(noisy(), layers=spoiled_experts | spoiled_dense, lm_head=head)
    after, _ = _run(params(), plan, spec_of(), spoiled)
    np.testing.assert_array_equal(after, before)


def test_every_dense_module_follows_its_flag() -> None:
    """Attention of each layer and the LM head, one at a time."""
    flags = {"0": (True, False, False), "1": (False, True, False), "head": (False, False, True)}
    results = {}
    for name, (first, second, head) in flags.items():
        plan = Plan(
            experts=jnp.zeros((LAYERS, EXPERTS), bool),
            attention=jnp.asarray([first, second]),
            lm_head=jnp.asarray(head),
        )
        results[name], _ = _run(params(), plan, spec_of(), noisy())
        assert largest(results[name] - digital_logits()) > 100 * ROUNDING
    assert largest(results["0"] - results["1"]) > 100 * ROUNDING


def test_one_compile_serves_plans_noise_scales_and_keys() -> None:
    """`_program` and `_run` may be traced once in this whole file; here every traced argument changes."""
    seen = []
    for seed, scale, fraction, adc_bound in ((0, 0.5, 0.3, 6.0), (0, 1.0, 0.3, 6.0), (1, 1.0, 0.7, 3.0)):
        spec = spec_of(noise_scale=scale, adc_bound=adc_bound)
        experts = np.random.default_rng(seed).random((LAYERS, EXPERTS)) < fraction
        logits, _ = _run(params(), plan_of(experts, True), spec, _program(jax.random.key(seed), params(), spec))
        seen.append(np.asarray(logits))
    for i, left in enumerate(seen):
        for right in seen[i + 1 :]:
            assert largest(left - right) > 100 * ROUNDING


def test_programmed_noise_is_one_draw_per_weight() -> None:
    """Common random numbers over noise scales; different draws for every matrix, layer and expert."""
    one, two = (_program(jax.random.key(4), params(), spec_of(noise_scale=c)) for c in (1.0, 2.0))
    draws: list[np.ndarray] = []
    for name in ("gate", "up", "q", "o"):
        clean = np.asarray(matrices_of(params().layers)[name])
        first = np.asarray(one.layers[name].w) - clean
        second = np.asarray(two.layers[name].w) - clean
        # One rounding to float32 of weight plus noise in each: both are below 2, where an ulp is 2^-23.
        np.testing.assert_allclose(second, 2 * first, rtol=0, atol=4 * 2.0**-23)
        draws += [part.ravel()[:400] for part in first.reshape(-1, *clean.shape[-2:])]
    size = min(len(part) for part in draws)
    assert all(abs(part.mean()) < 6 * part.std() * len(part) ** -0.5 for part in draws)
    correlation = np.corrcoef([part[:size] for part in draws])
    # Of 36 * 35 / 2 independent correlations of 400 draws, each normal with std 0.05, none exceeds 6 std.
    assert np.abs(correlation - np.eye(len(draws))).max() < 6 * size**-0.5


def test_vmap_over_keys_plans_and_noise_scales_equals_a_loop() -> None:
    def one(key: jax.Array, plan: Plan, spec: AnalogSpec) -> jax.Array:
        weights = program(key, params(), spec, dense=False)
        return forward(params(), TOKENS, CONFIG, plan=plan, spec=spec, programmed=weights)

    keys = jax.random.split(jax.random.key(0), 3)
    plans = [dataclasses.replace(all_digital(CONFIG), experts=jnp.asarray(random_experts(seed))) for seed in range(3)]
    specs = [spec_of(noise_scale=c) for c in (0.5, 1.0, 2.0)]
    mapped = jax.jit(jax.vmap(one))(keys, stack_plans(plans), jax.tree.map(lambda *leaves: jnp.stack(leaves), *specs))
    loop = [
        _forward(params(), plan=plan, spec=spec, programmed=_program(key, params(), spec))
        for key, plan, spec in zip(keys, plans, specs, strict=True)
    ]
    # A batched matmul may sum in another order, and a code next to a boundary then moves: of 7-token sequences, most.
    off = np.abs(np.asarray(mapped) - np.stack(loop)).max(axis=(2, 3)) / np.abs(digital_logits()).max() > ROUNDING
    assert off.mean() <= 0.25
    assert largest(loop[0] - loop[1]) > 100 * ROUNDING


READ_SPEC = spec_of(read_noise=make_read_noise("additive", 0.02))


def test_read_noise_is_drawn_anew_for_every_key() -> None:
    plan = plan_of(random_experts(0), True)

    def run(seed: int, std: float) -> np.ndarray:
        spec = spec_of(read_noise=make_read_noise("additive", std))
        return np.asarray(_run_read(params(), plan, spec, noisy(), jax.random.key(seed), TOKENS)[0])

    first = run(0, 0.02)
    np.testing.assert_array_equal(run(0, 0.02), first)
    assert largest(run(1, 0.02) - first) > 100 * ROUNDING
    np.testing.assert_array_equal(run(1, 0.0), run(0, 0.0))
    assert largest(run(0, 0.0) - first) > 100 * ROUNDING


def test_read_noise_follows_the_token_and_not_its_slot() -> None:
    """Another last token moves the others to other slots of their experts' blocks; their noise stays with them."""
    other = TOKENS.at[-1, -1].set((TOKENS[-1, -1] + 1) % CONFIG.vocab_size)
    plan, key = plan_of(True, True), jax.random.key(0)
    (before, chosen), (after, changed) = (
        _run_read(params(), plan, READ_SPEC, noisy(), key, tokens) for tokens in (TOKENS, other)
    )
    assert np.any(chosen[:, -1] != changed[:, -1])  # so the groups' sizes, and with them the slots, did change
    off = np.abs(np.asarray(before) - np.asarray(after)).max(axis=-1) > ROUNDING * np.abs(digital_logits()).max()
    assert off[-1]
    assert off[:-1].mean() <= 0.15  # a row moved to another slot may be summed in another order, next to a boundary


def test_read_noise_of_the_head_follows_the_token_through_chunks() -> None:
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((10, CONFIG.hidden_size)), jnp.float32)

    @jax.jit
    def logits(rows: jax.Array, first_row: jax.Array) -> jax.Array:
        analog: dict[str, Any] = {"plan": plan_of(True, True), "programmed": noisy(), "calibration": None}
        key = jax.random.key(0)
        return head_logits(rows, params(), **analog, spec=READ_SPEC, read_key=key, first_row=first_row)

    whole = np.asarray(logits(hidden, jnp.uint32(0)))
    halves = np.concatenate([logits(hidden[:5], jnp.uint32(0)), logits(hidden[5:], jnp.uint32(5))])
    wrong = np.asarray(logits(hidden[5:], jnp.uint32(0)))
    scale = ROUNDING * np.abs(whole).max()
    assert np.mean(np.abs(whole - halves) > scale) < 0.02  # but for codes next to a boundary
    assert np.mean(np.abs(whole[5:] - wrong) > scale) > 0.5


def test_bfloat16_runs_and_agrees_loosely() -> None:
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    plan, spec = experts_analog(CONFIG), spec_of(noise_scale=1.0)
    wide = _program(jax.random.key(0), params(), spec)
    # As `program` stores them, without compiling it once more: weights in bfloat16, their maxima in float32.
    shapes = jax.eval_shape(functools.partial(program, dense=True), jax.random.key(0), narrow, spec)
    weights = jax.tree.map(lambda leaf, shape: leaf.astype(jnp.bfloat16).astype(shape.dtype), wide, shapes)
    assert weights.layers["down"].w.dtype == jnp.bfloat16
    assert weights.layers["down"].weight_max.dtype == jnp.float32
    actual = _forward(narrow, plan=plan, spec=spec, programmed=weights)
    assert actual.dtype == jnp.float32
    expected = np.asarray(_forward(params(), plan=plan, spec=spec, programmed=wide))
    # Relative roundings of 2^-9 add up over two layers of about ten roundings each; a few tokens choose other experts.
    error = np.abs(np.asarray(actual) - expected).max(axis=-1) / np.abs(expected).max()
    assert np.median(error) < 20 * 2.0**-9
    difference = np.abs(expected.reshape(digital_logits().shape) - digital_logits()).max(axis=-1)
    assert np.median(error) < 0.5 * np.median(difference) / np.abs(expected).max()  # and it is the same noise
