"""Table [execution] of CONFIG reaches the evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hetmoe.evaluate.run import Totals
from hetmoe.sweep import worker
from hetmoe.sweep.config import read_config
from hetmoe.sweep.points import expand, group_points
from hetmoe.sweep.setup import load_for_sweep, make_setup

EXECUTION = 'weights = "layer"\nimplementation = "interpret_cuda"'


def test_points_are_evaluated_as_asked(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def digital(*arguments: Any) -> Totals:
        *_, implementation, mesh = arguments
        seen.append((implementation, mesh))
        return Totals(nll=jnp.float32(1), correct=jnp.float32(0))

    def seeds(*arguments: Any, mesh: jax.sharding.Mesh | None) -> Totals:
        seen.append((*arguments[7:], mesh))
        plans = arguments[2].experts.shape[1]
        return Totals(nll=jnp.ones((1, plans)), correct=jnp.zeros((1, plans)))

    monkeypatch.setattr(worker, "evaluate_digital", digital)
    monkeypatch.setattr(worker, "evaluate_seeds", seeds)
    config = read_config(write_config(execution=EXECUTION, rules=None, fractions=None, seeds="1"))
    setup = make_setup(config, load_for_sweep(config))
    for points in group_points(expand(config)):
        worker.evaluate_group(setup, points)
    assert set(seen) == {("interpret_cuda", None), ("layer", "interpret_cuda", None)}
