"""Rows of certificates, and what they say of the embedded model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe import load_model
from hetmoe.errors import InputError
from hetmoe.models.params import FeedForward, with_experts
from hetmoe.models.transformer import hidden_states
from hetmoe.quantize.bounds.a_priori import a_priori_change
from hetmoe.quantize.bounds.certify import certify
from hetmoe.quantize.bounds.expert import Expert, change_of, error_constant
from hetmoe.quantize.bounds.report import expert_rows, rounded_experts, rounded_rows, rows_of
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.mixed import dense
from hetmoe.quantize.packed import dequantize_packed, take_packed
from tests.models.tiny import random_params, random_tokens, tiny_config

SIZES = {"hidden_size": 32, "expert_intermediate_size": 32}  # that a group of 32 divides
TINY = tiny_config(num_layers=3, dense_layers=(1,), dense_intermediate_size=19, **SIZES)
READINGS = ("one_layer", "whole_model")


def check_rows(rows):
    """What holds for any model: nothing is beyond its bound, and no more is certified than happens."""
    for number, row in enumerate(rows):
        assert row["violations"] == 0
        assert 0 < row["tightness"] <= row["largest_tightness"] <= 1
        assert 0 < row["norm_tightness"] <= row["largest_norm_tightness"] <= 1
        assert 0 < row["output_error"] < row["output_bound"] and 0 < row["expert_error"] < row["expert_bound"]
        for name in READINGS:
            if number == 0 and name == "one_layer":
                assert row[f"{name}_certified"] is None and row[f"{name}_logit_bound"] is None
                continue
            certified = (row[f"{name}_certified"], row[f"{name}_certified_measured"])
            assert 0 <= certified[0] <= certified[1] <= row[f"{name}_observed"] <= 1
            assert row[f"{name}_logit_change"] <= row[f"{name}_logit_bound"]
    assert rows[0]["whole_model_certified"] == rows[0]["whole_model_observed"] == 1


def a_priori_over_actual(params, quantized, layer):
    """Of every expert of a layer; the pools hold all experts, layer after layer."""
    found = []
    for expert in range(TINY.num_experts):
        leaves = [(getattr(tree.layers.moe.experts, n)) for n in ("gate", "up", "down") for tree in (params, quantized)]
        clean = [np.asarray(w[layer, expert], np.float64) for w in leaves[::2]]
        packed = [take_packed(w.pools[0], layer * TINY.num_experts + expert) for w in leaves[1::2]]
        rounded = [np.asarray(dequantize_packed(w), np.float64) for w in packed]
        actual = error_constant(change_of(Expert(*clean), Expert(*rounded)))
        found.append(error_constant(a_priori_change(*packed)) / actual)
    return found


def test_rows_are_those_of_each_width_and_layer():
    params, tokens = random_params(TINY, 0), random_tokens(TINY, 1, (2, 6))
    grids = [Grid(bits=bits, group=32, symmetric=False) for bits in (8, 2)]
    rows = [row for grid in grids for row in rounded_rows(params, tokens, TINY, grid)]
    assert [(row["bits"], row["layer"]) for row in rows] == [(8, 0), (8, 2), (2, 0), (2, 2)]
    check_rows(rows[:2])
    check_rows(rows[2:])
    quantized = rounded_experts(params, grids[1])
    certificate = certify(params, quantized, tokens, TINY)
    layer = certificate.layers[1]
    by_steps = layer.expert_norm_bound * np.array(a_priori_over_actual(params, quantized, 1))[layer.chosen]
    assert rows[3]["step_bound"] == pytest.approx(np.median(by_steps), rel=1e-12)
    assert all(row["step_bound"] > row["norm_bound"] for row in rows)  # no difference is beyond half a step
    assert rows[2:] == [
        {"bits": 2, **row, "step_bound": rows[2 + n]["step_bound"]} for n, row in enumerate(rows_of(certificate, TINY))
    ]
    layer, row = certificate.layers[1], rows[3]
    assert row["tightness"] == np.median(layer.expert_error / layer.expert_bound)
    assert row["largest_norm_tightness"] == np.max(layer.expert_error / layer.expert_norm_bound)
    assert row["whole_model_observed"] == 1 - np.mean(layer.whole_model.changed)
    assert row["one_layer_certified"] == np.mean(layer.one_layer.certified)


def test_experts_that_nothing_changes_have_a_tightness_of_1():
    params = random_params(TINY, 0)
    moe = params.layers.moe
    nothing = dataclasses.replace(moe.experts, down=moe.experts.down * 0)
    params = dataclasses.replace(
        params, layers=dataclasses.replace(params.layers, moe=dataclasses.replace(moe, experts=nothing))
    )
    for row in rows_of(certify(params, params, random_tokens(TINY, 1, (1, 3)), TINY), TINY):
        assert row["tightness"] == row["norm_tightness"] == 1 and row["expert_bound"] == 0


def test_what_is_quantized_is_not_quantized_again():
    params, tokens = random_params(TINY, 0), random_tokens(TINY, 1, (1, 2))
    quantized = rounded_experts(params, Grid(bits=8, group=32, symmetric=True))
    with pytest.raises(InputError, match="cannot quantize again a model with quantized experts"):
        rounded_rows(quantized, tokens, TINY, Grid(bits=2, group=32, symmetric=False))
    with pytest.raises(InputError, match="gate: group=64 does not divide the 32 rows"):
        rounded_rows(params, tokens, TINY, Grid(bits=4, group=64, symmetric=True))


@pytest.mark.parametrize(("bits", "certain"), [(8, True), pytest.param(2, False, marks=pytest.mark.slow)])
def test_the_reference_model(bits, certain):
    """With its own forward pass in float32, whose rounding is far below the changes that the certificate allows for."""
    model = load_model("reference", dtype=jnp.float32)
    tokens = jnp.asarray([model.tokenizer.encode("It was the opinion of her sister that a dog barks.").ids], jnp.int32)
    quantized = rounded_experts(model.params, Grid(bits=bits, group=64, symmetric=False))
    certificate = certify(model.params, quantized, tokens, model.config)
    check_rows(rows_of(certificate, model.config))
    routing = jax.jit(lambda params: hidden_states(params, tokens, model.config)[1].chosen)
    chosen = [np.sort(routing(params), axis=-1) for params in (model.params, quantized)]
    changes = np.any(np.not_equal(*chosen), axis=-1)
    for layer, changed in zip(certificate.layers, changes, strict=True):
        np.testing.assert_array_equal(changed, layer.whole_model.changed)
    # From measured errors 8 bits are certain for some tokens; 2 bits are for none, and change many.
    measured = np.mean([layer.one_layer.certified_measured for layer in certificate.layers[1:]])
    assert (measured > 0.05) == certain and (np.mean(changes[1:]) < 0.05) == certain


def test_experts_that_stay_as_they_are_are_left_out_of_the_rows():
    """Three of four experts exact: the medians are those of the fourth."""
    params, tokens = random_params(TINY, 0), random_tokens(TINY, 1, (2, 6))
    rounded = rounded_experts(params, Grid(bits=3, group=32, symmetric=True))
    kept = np.arange(TINY.num_experts) % 4 != 0
    mixed = {
        name: jnp.where(kept[None, :, None, None], getattr(params.layers.moe.experts, name),
                        dense(getattr(rounded.layers.moe.experts, name), jnp.float32))
        for name in ("gate", "up", "down")
    }  # fmt: skip
    certificate = certify(params, with_experts(params, FeedForward(**mixed)), tokens, TINY)
    for layer, row in zip(certificate.layers, rows_of(certificate, TINY), strict=True):
        altered = ~kept[layer.chosen]
        assert altered.any() and not altered.all()
        np.testing.assert_array_equal(layer.altered, altered)
        assert row["expert_error"] == np.median(layer.expert_error[altered]) > 0
        assert row["tightness"] == np.median((layer.expert_error / layer.expert_bound)[altered])
    by_expert = expert_rows(certificate, TINY)
    assert sum(row["tokens"] for row in by_expert) == 2 * 12 * TINY.experts_per_token
    for row in by_expert:
        layer = certificate.layers[TINY.moe_layers.index(row["layer"])]
        here = layer.chosen == row["expert"]
        assert row["tokens"] == here.sum() and row["bound"] == np.median(layer.expert_bound[here])
        assert (row["error"] > 0) == (row["expert"] % 4 == 0) and row["error"] <= row["bound"]
