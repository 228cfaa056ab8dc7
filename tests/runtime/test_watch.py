"""What a policy decides reaches the chips: ages, new draws, factors, noise, and probes of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.runtime import watch as watch_module
from hetmoe.runtime.deploy import deployed_weights, fresh_chips
from hetmoe.runtime.watch import Watch
from tests.runtime.small import SPEC, knowledge, model

KEY = jax.random.key(21)


def test_actions_reach_the_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programming that costs nothing, of whatever is noisier than the median: some experts, not all."""
    free = jnp.float32(1e-30)
    know = dataclasses.replace(knowledge(), program_energy=free, stale=jnp.float32(0.0), dwell_s=jnp.float32(0.0))
    keys, probe = list[np.ndarray](), watch_module.probe_experts

    def spy(key, *given):
        keys.append(np.asarray(jax.random.key_data(key)))
        return probe(key, *given)

    monkeypatch.setattr(watch_module, "probe_experts", spy)
    watch = Watch(KEY, model().params, SPEC, know, probes=8, budget=0.0)
    programmed, epoch = np.zeros((2, 4)), np.zeros((2, 4), int)
    corrected = False
    for time, noise in ((60.0, 1.0), (40_000.0, 1.0), (80_000.0, 2.0)):
        before = watch.held() if time > 60 else None
        done = watch.observe(time, noise=noise, budget=1.0, tokens=1e12)
        again = np.asarray(done.reprogram)
        programmed, epoch = np.where(again, time, programmed), epoch + again
        wanted = dataclasses.replace(
            fresh_chips(2, 4), age=jnp.asarray(time - programmed, jnp.float32), epoch=jnp.asarray(epoch, jnp.int32),
            noise=jnp.float32(noise), factor=watch._state.factor,
        )  # fmt: skip
        held = watch.held()
        jax.tree.map(np.testing.assert_array_equal, held, deployed_weights(KEY, model().params, SPEC, wanted))
        corrected |= bool((np.asarray(watch._state.factor) != 1).any())
        if before is not None:
            for name in EXPERT_MATRICES:
                changed = np.asarray(before.layers[name].w != held.layers[name].w).any(axis=(-2, -1))
                assert changed[again].all()
    assert corrected and 0 < epoch.sum() < 16
    assert len({key.tobytes() for key in keys}) == len(keys) == 3
