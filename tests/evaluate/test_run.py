"""Totals over text, against log-softmax in float64 and against one-at-a-time evaluation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetmoe
from hetmoe.evaluate import run
from hetmoe.evaluate.run import Batches, answer_credit, evaluate_digital, evaluate_seeds
from hetmoe.evaluate.text import Windows
from hetmoe.models.model import Model
from hetmoe.placement.plan import Plan, all_analog, all_digital, experts_analog, place, stack_plans


def expected_totals(logits: np.ndarray, windows: Windows, choices: np.ndarray) -> tuple[float, float]:
    """(nats, correct) in float64 from logits [windows, seq, vocab]."""
    wide = logits.astype(np.float64)
    log_probs = (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )
    chosen = np.take_along_axis(log_probs, choices, axis=-1)
    best = (chosen[..., 0] > chosen[..., 1:].max(-1)) & windows.whole_word
    # A wrong answer may repeat the true one in this random data: then they tie.
    same = (choices[..., 1:] == choices[..., :1]).sum(-1)
    tied = (chosen[..., 0] >= chosen[..., 1:].max(-1)) & (same > 0) & windows.whole_word
    return -chosen[..., 0].sum(), float(best.sum() + (tied / (1 + same)).sum())


def test_digital_totals_match_float64(tiny: Model, windows: Windows, choices: np.ndarray, batches: Batches) -> None:
    logits = np.asarray(hetmoe.forward(tiny.params, jnp.asarray(windows.tokens[:, :-1]), tiny.config))
    nll, correct = expected_totals(logits, windows, choices)
    totals = evaluate_digital(tiny.params, batches, tiny.config)
    # 80 float32 terms of up to about 10 nats, each rounded to 1e-6 of its logits.
    assert float(totals.nll) == pytest.approx(nll, rel=3e-6)
    assert float(totals.correct) == pytest.approx(correct, rel=1e-6)
    assert 0 < correct < windows.whole_word.sum()


def seeds_and_plans(tiny: Model) -> tuple[jax.Array, list[Plan], Plan]:
    keys = jax.random.split(jax.random.key(5), 2)
    scores = jax.random.uniform(jax.random.key(0), (2, 8))
    plans = [experts_analog(tiny.config), place(scores, 0.25), all_digital(tiny.config)]
    return keys, plans, stack_plans([stack_plans(plans)] * 2)


def test_seeds_match_one_forward_each(tiny: Model, windows: Windows, choices: np.ndarray, batches: Batches) -> None:
    keys, plans, stacked = seeds_and_plans(tiny)
    spec = hetmoe.analog_spec("pcm", noise_scale=3.0, tile_rows=20)
    totals = evaluate_seeds(tiny.params, keys, stacked, spec, None, batches, tiny.config)
    assert totals.nll.shape == (2, 3)
    program = jax.jit(hetmoe.program, static_argnames="dense")
    logits_of = jax.jit(
        lambda plan, programmed: hetmoe.forward(
            tiny.params, jnp.asarray(windows.tokens[:, :-1]), tiny.config, plan=plan, spec=spec, programmed=programmed
        )
    )
    for s, key in enumerate(keys):
        programmed = program(key, tiny.params, spec, dense=False)
        for p, plan in enumerate(plans):
            logits = logits_of(plan, programmed)
            nll, correct = expected_totals(np.asarray(logits), windows, choices)
            # A partial sum within float32 rounding of an ADC boundary may move one code in the compiled program.
            assert float(totals.nll[s, p]) == pytest.approx(nll, rel=1e-3)
            assert abs(float(totals.correct[s, p]) - correct) <= 2
    digital = evaluate_digital(tiny.params, batches, tiny.config)
    np.testing.assert_allclose(totals.nll[:, 2], float(digital.nll), rtol=3e-6)
    assert float(totals.nll[0, 0]) != float(totals.nll[1, 0])


@pytest.mark.parametrize("weights", ["layer", "kernel"])
def test_weights_programmed_on_the_way_give_the_same_totals(tiny: Model, batches: Batches, weights: str) -> None:
    """Ideal converters: no code can move. `kernel` runs all seeds side by side."""
    keys, _, stacked = seeds_and_plans(tiny)
    spec = hetmoe.analog_spec("additive", noise_scale=1.0, tile_rows=20, dac_bits=None, adc_bits=None)
    found, stored = (
        evaluate_seeds(tiny.params, keys, stacked, spec, None, batches, tiny.config, weights=w)
        for w in (weights, "stored")
    )
    np.testing.assert_allclose(found.nll, stored.nll, rtol=3e-6)
    assert abs(float(stored.nll[0, 0]) - float(stored.nll[1, 0])) > 1e-4 * float(stored.nll[0, 0])


def test_a_sweep_compiles_once(tiny: Model, batches: Batches) -> None:
    keys, _, stacked = seeds_and_plans(tiny)
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(run.evaluate_seeds.__wrapped__, n=1), static_argnames="config")
    results = []
    for scale in (0.0, 1.0, 4.0):
        for shift in (0, 1):
            spec = hetmoe.analog_spec("pcm", noise_scale=scale)
            flipped = jax.tree.map(lambda leaf, shift=shift: jnp.roll(leaf, shift, axis=-1), stacked)
            shifted = jax.random.split(jax.random.key(shift), 2)
            results.append(counted(tiny.params, shifted, flipped, spec, None, batches, tiny.config).nll[0, 0])
    assert len(keys) == 2 and len({float(r) for r in results}) > 4


def test_dense_modules_and_read_noise_reach_the_result(tiny: Model, batches: Batches) -> None:
    keys = jax.random.split(jax.random.key(5), 2)
    plans = stack_plans([stack_plans([all_analog(tiny.config)])] * 2)
    quiet = hetmoe.analog_spec("pcm", noise_scale=0.0, dac_bits=None, adc_bits=None)
    noisy = quiet.replace(read_noise=hetmoe.make_read_noise("pcm", 0.2))
    digital = float(evaluate_digital(tiny.params, batches, tiny.config).nll)
    ideal = evaluate_seeds(tiny.params, keys, plans, quiet, None, batches, tiny.config).nll[:, 0]
    read = evaluate_seeds(tiny.params, keys, plans, noisy, None, batches, tiny.config).nll[:, 0]
    np.testing.assert_allclose(ideal, digital, rtol=1e-5)  # ideal hardware is the digital model, up to summation order
    assert abs(float(read[0]) - digital) > 1e-3 and float(read[0]) != float(read[1])


def test_ties_share_the_credit() -> None:
    log_probs = jnp.array([[-1.0, -2.0, -3.0], [-1.0, -1.0, -3.0], [-2.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    np.testing.assert_allclose(answer_credit(log_probs), [1, 1 / 2, 0, 1 / 3], rtol=1e-7)
