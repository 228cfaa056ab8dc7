"""Rows of certificates of the embedded model, rounded to the nearest level."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe import load_model
from hetmoe.errors import InputError
from hetmoe.models.transformer import hidden_states
from hetmoe.quantize.bounds.certify import certify
from hetmoe.quantize.bounds.report import certificate_rows, rounded_experts, rows_of
from hetmoe.quantize.grid import Grid


@pytest.fixture(scope="module")
def model():
    return load_model("reference", dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokens(model):
    text = "It was the opinion of her sister that the two ladies were to be in the room. A dog is an animal that barks."
    return jnp.asarray([model.tokenizer.encode(text).ids[:24]], jnp.int32)


def test_rows_of_the_reference_model(model, tokens):
    rows = certificate_rows(model.params, tokens, model.config, bits=(8, 2), group=64, symmetric=False)
    assert [(row["bits"], row["layer"]) for row in rows] == [(bits, layer) for bits in (8, 2) for layer in range(4)]
    for row in rows:
        assert row["violations"] == 0
        assert 0.02 < row["tightness"] <= row["largest_tightness"] <= 1
        assert 0.001 < row["norm_tightness"] < row["tightness"] and row["largest_norm_tightness"] <= 1
        assert 0 < row["output_error"] < row["output_bound"] and 0 < row["expert_error"] < row["expert_bound"]
        for name in ("one_layer", "whole_model"):
            if row["layer"] == 0 and name == "one_layer":
                assert row[f"{name}_certified"] is None and row[f"{name}_logit_bound"] is None
                continue
            certified = (row[f"{name}_certified"], row[f"{name}_certified_measured"])
            assert 0 <= certified[0] <= certified[1] <= row[f"{name}_observed"] <= 1
            assert row[f"{name}_logit_change"] <= row[f"{name}_logit_bound"]
        if row["layer"] == 0:
            assert row["whole_model_certified"] == row["whole_model_observed"] == 1
    # Eight bits are certain for some tokens if one starts from measured errors, two bits for none, and few change.
    assert rows[1]["one_layer_certified_measured"] > 0.1 and rows[1]["whole_model_observed"] > 0.9
    assert rows[5]["one_layer_certified_measured"] == 0 and rows[5]["whole_model_observed"] < 0.9


def test_certain_sets_hold_in_the_models_own_forward_pass(model, tokens):
    """In float32, whose rounding is far below the changes that the certificate allows for."""
    quantized = rounded_experts(model.params, Grid(bits=8, group=32, symmetric=True))
    certificate = certify(model.params, quantized, tokens, model.config)
    chosen = [np.sort(hidden_states(p, tokens, model.config)[1].chosen, axis=-1) for p in (model.params, quantized)]
    differs = np.any(np.not_equal(*chosen), axis=-1)
    for layer, changed in zip(certificate.layers, differs, strict=True):
        whole = layer.whole_model
        assert not (changed & (whole.certified | whole.certified_measured)).any()
        np.testing.assert_array_equal(changed, whole.changed)
    assert certificate.layers[1].whole_model.certified_measured.any()


def test_experts_that_nothing_changes_have_a_tightness_of_1(model, tokens):
    moe = model.params.layers.moe
    nothing = dataclasses.replace(moe.experts, down=moe.experts.down * 0)
    params = dataclasses.replace(
        model.params, layers=dataclasses.replace(model.params.layers, moe=dataclasses.replace(moe, experts=nothing))
    )
    for row in rows_of(certify(params, params, tokens[:, :3], model.config), model.config):
        assert row["tightness"] == row["norm_tightness"] == 1 and row["expert_bound"] == 0


def test_what_is_quantized_is_not_quantized_again(model):
    quantized = rounded_experts(model.params, Grid(bits=4, group=128, symmetric=False))
    with pytest.raises(InputError, match="quantized already: give the unquantized model"):
        rounded_experts(quantized, Grid(bits=2, group=32, symmetric=False))
    with pytest.raises(InputError, match=r"bits=5 must be one of"):
        certificate_rows(model.params, jnp.zeros((1, 2), jnp.int32), model.config, bits=(5,), group=32, symmetric=True)
