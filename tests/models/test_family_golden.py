"""Every family against transformers' float32 outputs of the tiny models in `tests/golden` (`make_families.py`).

DeepSeekMoE v1 is not in transformers: its expected values are those of `numpy_deepseek.py`, in float64.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.checkpoint.load import load_model
from hetmoe.models.attention import attention_block, rms_norm
from hetmoe.models.hardware import Probe
from hetmoe.models.model import Model
from hetmoe.models.moe import feed_forward, routed_experts
from hetmoe.models.routing import Routing
from hetmoe.models.transformer import forward, hidden_states
from tests.models import numpy_deepseek

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FAMILIES = (
    "mixtral_tiny",
    "mixtral_window",
    "qwen2_moe_tiny",
    "qwen2_moe_sparse_step",
    "qwen3_moe_tiny",
    "qwen3_moe_bias",
    "deepseek_v1_tiny",
    "deepseek_v2_lite_tiny",
    "deepseek_v2_tiny",
    "deepseek_v3_tiny",
    "deepseek_v3_fp8",
)
FROM_TRANSFORMERS = tuple(name for name in FAMILIES if name != "deepseek_v1_tiny")
# transformers' own float32 error is up to 1.5e-5 (`float32_error` in the metadata), and ours is alike.
ATOL = 5e-5
pytestmark = pytest.mark.filterwarnings("ignore::hetmoe.errors.CheckpointWarning")  # one holds a prediction layer


@functools.cache
def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(GOLDEN / name / "golden.npz") as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("metadata")))


@functools.cache
def loaded(name: str) -> Model:
    """As stored, then in float32: the expected values of FP8 weights are of those rounded to bfloat16."""
    model = load_model(GOLDEN / name)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    return model.replace(params=wide)


@functools.cache
def logits_and_routing(name: str) -> tuple[np.ndarray, Routing]:
    model, tokens = loaded(name), jnp.asarray(golden(name)[0]["tokens"])
    logits = jax.jit(forward, static_argnames="config")(model.params, tokens, model.config)
    _, routing, _ = jax.jit(hidden_states, static_argnames="config")(model.params, tokens, model.config)
    return np.asarray(logits), jax.tree.map(np.asarray, routing)


def near(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(actual).reshape(expected.shape), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name: str) -> None:
    expected, metadata = golden(name)
    assert max(metadata["float32_error"].values()) < ATOL / 2
    near(logits_and_routing(name)[0], expected["logits"])


@pytest.mark.parametrize("name", FAMILIES)
def test_router_chooses_the_same_experts_then_weights(name: str) -> None:
    expected, metadata = golden(name)
    assert metadata["min_gap"] > 1e-3  # no choice hangs on rounding
    _, routing = logits_and_routing(name)
    np.testing.assert_array_equal(routing.chosen, expected["router_indices"].reshape(routing.chosen.shape))
    # Sums of 50 terms or so, then softmax or sigmoid, times a scaling factor of up to 16.
    np.testing.assert_allclose(routing.weights, expected["router_weights"].reshape(routing.weights.shape), rtol=2e-5)
    assert len(loaded(name).config.moe_layers) == len(expected["router_indices"])


@pytest.mark.parametrize("name", FROM_TRANSFORMERS)
def test_attention_of_the_first_layer(name: str) -> None:
    model, (expected, _) = loaded(name), golden(name)
    config, params = model.config, model.params
    stack = params.dense_layers if 0 in config.dense_layers else params.layers
    layer = jax.tree.map(lambda leaf: leaf[0], stack)
    normed = rms_norm(params.embed[expected["tokens"]], layer.input_norm, config.rms_norm_eps)
    near(attention_block(normed, layer.attention, config, None, Probe(None)), expected["attention_0"])


@pytest.mark.parametrize("name", FROM_TRANSFORMERS)
def test_one_expert_and_the_shared_ones(name: str) -> None:
    model, (expected, metadata) = loaded(name), golden(name)
    position = model.config.moe_layers.index(metadata["expert_layer"])
    moe = jax.tree.map(lambda leaf: leaf[position], model.params.layers).moe
    x = jnp.asarray(expected["expert_input"])
    chosen = jnp.full((len(x), 1), metadata["expert_index"], jnp.int32)
    routing = Routing(
        logits=jnp.zeros((len(x), model.config.num_experts)), chosen=chosen, weights=jnp.ones((len(x), 1))
    )
    near(routed_experts(x, moe.experts, routing, None, Probe(None), None), expected["expert_output"])
    assert (moe.shared is None) == ("shared_output" not in expected)
    if moe.shared is not None:
        shared = np.asarray(feed_forward(x, moe.shared, "shared", None, Probe(None)), np.float64)
        if moe.shared_gate is not None:
            shared = shared / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(moe.shared_gate, np.float64)))
        near(shared, expected["shared_output"])


def test_deepseek_v1_equals_the_numpy_forward_run_now() -> None:
    """The saved values and the code that made them have not parted."""
    folder, (expected, _) = GOLDEN / "deepseek_v1_tiny", golden("deepseek_v1_tiny")
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    again = numpy_deepseek.forward(load_file(folder / "model.safetensors"), config, expected["tokens"])
    np.testing.assert_allclose(again["logits"], expected["logits"], rtol=0, atol=1e-6)
    near(logits_and_routing("deepseek_v1_tiny")[0], again["logits"])


@pytest.mark.parametrize(("fused", "plain"), [("olmoe_fused", "olmoe_tiny"), ("mixtral_fused", "mixtral_tiny")])
def test_fused_experts_are_the_same_model(fused: str, plain: str) -> None:
    left, right = load_model(GOLDEN / fused), load_model(GOLDEN / plain)
    assert left.config == right.config
    assert jax.tree.structure(left.params) == jax.tree.structure(right.params)
    for a, b in zip(jax.tree.leaves(left.params), jax.tree.leaves(right.params), strict=True):
        np.testing.assert_array_equal(a, b)
