"""Evaluates, calibrates and scores a small model on meshes, beside one device; a process of its own."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetmoe
from hetmoe.analog.calibration import RangeMethod
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import calibrate
from hetmoe.evaluate.noise_sweep import Placement, TextSize, digital_result, noise_sweep, random_placement
from hetmoe.evaluate.run import Batches
from hetmoe.models.model import Model
from hetmoe.parallel.mesh import make_mesh, parse_mesh
from hetmoe.parallel.model import forward_on
from hetmoe.parallel.rules import param_shardings
from hetmoe.placement.plan import all_analog, experts_analog
from hetmoe.placement.scores import score_experts
from tests.models.tiny import random_params
from tests.parallel.sharded_cases import CONFIGS

CONFIG = CONFIGS["grouped"]()
SEEDS, CONTEXT = 8, 7


def model(mesh: jax.sharding.Mesh | None) -> Model:
    params = random_params(CONFIG, 1)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(CONFIG, mesh))
    return Model(params=params, config=CONFIG, tokenizer=None, eos_token_id=0, name="tiny", mesh=mesh)


def batches() -> Batches:
    """Two batches of 8 windows; of the last one three only fill it."""
    rng = np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (2, 8, CONTEXT)), jnp.int32)
    choices = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (2, 8, CONTEXT - 1, 4)), jnp.int32)
    weight = jnp.ones((2, 8), jnp.float32).at[1, 5:].set(0)
    asked = jnp.asarray(rng.random((2, 8, CONTEXT - 1)) < 0.5)
    return Batches(tokens=tokens, choices=choices.at[..., 0].set(tokens[..., 1:]), asked=asked, weight=weight)


SIZE = TextSize(tokens=13 * (CONTEXT - 1), bytes=200, questions=40)


def evaluated(mesh: jax.sharding.Mesh | None, *, few: bool = False):
    """(perplexities of all placements and seeds, digital, load); `few` placements take less time."""
    of, keys = model(mesh), jax.random.split(jax.random.key(0), SEEDS)
    spec = hetmoe.analog_spec("pcm", tile_rows=7)
    placements = [
        Placement(name="all", plans=[all_analog(CONFIG)]),
        Placement(name="experts", plans=[experts_analog(CONFIG)]),
        random_placement("random", of, 0.5, keys),
    ]
    if few:
        placements = placements[1:]
    done: list[float] = []
    points = noise_sweep(
        of, spec, None, placements, [1.0, 3.0], keys, batches(), SIZE, jobs=1, progress=done.append, weights="stored"
    )
    assert sum(done) == len(placements) * 2 * SEEDS
    digital, load = digital_result(of, batches(), SIZE)
    return np.array([p.perplexity for p in points]), digital.perplexity[0], load


def compare_evaluations(meshes: tuple[str, ...], *, few: bool) -> None:
    alone = evaluated(None, few=few)
    routed = 13 * (CONTEXT - 1) * CONFIG.experts_per_token
    np.testing.assert_array_equal(alone[2].sum(axis=1), routed)  # windows that fill the batch are not counted
    for text in meshes:
        found = evaluated(make_mesh(parse_mesh(text)), few=few)
        if text == "seed=8":  # every device runs the program of one
            np.testing.assert_array_equal(found[0], alone[0])
        # A flipped converter step moves the mean over 78 tokens by little.
        np.testing.assert_allclose(found[0], alone[0], rtol=2e-2)
        assert np.median(np.abs(found[0] / alone[0] - 1)) < 1e-5
        np.testing.assert_allclose(found[1], alone[1], rtol=1e-5)
        np.testing.assert_array_equal(found[2], alone[2])
        print("evaluated", text)


def compare_ranges(meshes: tuple[str, ...], methods: tuple[str, ...]) -> None:
    tokens = batches().tokens.reshape(-1, CONTEXT)[:6]  # which 8 does not divide
    one = model(None)
    for text in meshes:
        there = model(make_mesh(parse_mesh(text)))
        for method in methods:
            how = RangeMethod(method=method)
            wanted = calibrate(one.params, tokens, CONFIG, how, tile_rows=7)
            found = calibrate(there.params, tokens, CONFIG, how, tile_rows=7, mesh=there.mesh)
            for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
        for rule in ("max_neuron_norm", "router_norm", "activation_frequency", "activation_weight"):
            scores = [score_experts(of, rule, tokens=tokens) for of in (one, there)]
            np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)
        with pytest.raises(InputError, match="runs on one device"):
            score_experts(there, "measured", tokens=tokens, key=jax.random.key(0), spec=hetmoe.analog_spec())
        with pytest.raises(InputError, match="cannot be cut"):
            forward_on(there.mesh, there.params, tokens[:5], CONFIG)
        with pytest.raises(InputError, match="different models"):
            forward_on(there.mesh, there.params, tokens, dataclasses.replace(CONFIG, vocab_size=44))
        print("calibrated and scored", text)


def main(part: str) -> None:
    if part == "seeds":
        compare_evaluations(("seed=8",), few=True)
    elif part == "ranges":
        compare_ranges(("data=2,expert=4",), ("ema_std",))
    else:
        compare_evaluations(("seed=8", "data=2,seed=2,expert=2", "data=4,tensor=2"), few=False)
        compare_ranges(("data=2,expert=4", "expert=2,tensor=4"), ("ema_std", "max", "quantile"))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    main(sys.argv[1])
