"""Certificates of whole models: beside the model's own forward pass, and a search for violations."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from hetmoe.errors import InputError
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.trajectory import trajectory
from hetmoe.quantize.bounds.certify import certify, layer_by_layer
from tests.models.tiny import full_config, random_params, random_tokens, tiny_config

CONFIGS = {
    "olmoe": tiny_config(num_layers=3),
    "mixtral": tiny_config(num_layers=2, qk_norm=None, norm_topk_prob=True, sliding_window=4),
    "qwen": tiny_config(
        num_layers=3, qk_norm="head", qkv_bias=True, shared_intermediate_size=15, shared_gate=True, dense_layers=(0,),
        dense_intermediate_size=19, norm_topk_prob=True,
    ),
    "latent": full_config(),
    "latent, groups by their best": full_config(
        router_score="softmax", group_score="best", selection_bias=False, norm_topk_prob=False, shared_gate=False
    ),
}  # fmt: skip
_trajectory = jax.jit(trajectory, static_argnames="config")


def changed(params: Params, seed: int, size: float, *, only: int | None = None, aligned: bool = False) -> Params:
    """With other routed experts: changed at random, or all in one direction, in all layers or one."""
    rng, moe = np.random.default_rng(seed), params.layers.moe
    leaves = {}
    for name in ("gate", "up", "down"):
        w = np.asarray(getattr(moe.experts, name))
        change = rng.standard_normal(w.shape) * size * w.std()
        if aligned:
            change = np.broadcast_to(np.outer(change[0, 0, :, 0], np.sign(change[0, 0, 0])), w.shape)
        if only is not None:
            change = change * (np.arange(len(w)) == only)[:, None, None, None]
        leaves[name] = jnp.asarray(np.float32(w + change))
    moe = dataclasses.replace(moe, experts=dataclasses.replace(moe.experts, **leaves))
    return dataclasses.replace(params, layers=dataclasses.replace(params.layers, moe=moe))


def case(kind, seed=0):
    config = CONFIGS[kind]
    return config, random_params(config, seed), random_tokens(config, seed, (2, 6))


@pytest.mark.parametrize("kind", ["olmoe", "latent"])
def test_runs_are_those_of_the_model(kind):
    config, params, tokens = case(kind)
    other = changed(params, 1, 0.1)
    clean, whole = (_trajectory(p, tokens, config) for p in (params, other))
    done = [part for part in layer_by_layer(params, other, tokens, config) if part[1] is not None]
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-4)  # float32 through up to three layers
    for index, (streams, certificate) in enumerate(done):
        close(streams.clean, clean.out[index])
        close(streams.runs["whole_model"], whole.out[index])
        found = certificate.whole_model
        close(found.logit_change, np.abs(whole.routing.logits - clean.routing.logits)[index].max(axis=1))
        sets = (np.sort(run.routing.chosen[index], axis=1) for run in (clean, whole))
        np.testing.assert_array_equal(found.changed, np.any(np.not_equal(*sets), axis=1))
        if index:
            one = _trajectory(changed(params, 1, 0.1, only=index - 1), tokens, config)
            found = certificate.one_layer
            close(found.logit_change, np.abs(one.routing.logits - clean.routing.logits)[index].max(axis=1))
            close(done[index - 1][0].runs["one_layer"], one.out[index - 1])
            close(done[index - 1][1].output_error, np.linalg.norm(one.out - clean.out, axis=-1)[index - 1].reshape(-1))


@settings(max_examples=15)
@given(
    kind=st.sampled_from(list(CONFIGS)),
    seed=st.integers(0, 2**16),
    size=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 0.3, 3.0]),
    aligned=st.booleans(),
)
def test_no_certificate_is_violated(kind, seed, size, aligned):
    config, params, tokens = case(kind, seed % 5)
    certificate = certify(params, changed(params, seed, size, aligned=aligned), tokens, config)
    assert certificate.violations == 0
    first = certificate.layers[0]
    assert first.one_layer is None and first.whole_model.certified.all()
    for layer in certificate.layers:
        bounds = (layer.expert_bound, layer.expert_norm_bound, layer.output_bound, layer.whole_model.logit_bound)
        assert all(np.isfinite(bound).all() for bound in bounds)


@pytest.mark.parametrize("kind", CONFIGS)
def test_small_changes_are_certified_and_large_ones_are_not(kind):
    config, params, tokens = case(kind)
    last = {size: certify(params, changed(params, 1, size), tokens, config).layers[-1] for size in (1e-7, 3.0)}
    assert last[1e-7].whole_model.certified.mean() > 0.7
    assert not last[3.0].whole_model.certified.any()
    for layer in last.values():
        whole, one = layer.whole_model, layer.one_layer
        assert (one is None) == (len(config.moe_layers) == 1)
        # What starts from measured errors starts from less.
        assert (whole.certified_measured >= whole.certified).mean() == 1
        assert (layer.expert_error <= layer.expert_bound).all() and (layer.output_error <= layer.output_bound).all()


def test_violations_are_counted():
    config, params, tokens = case("olmoe")
    layer = certify(params, changed(params, 1, 1.0), tokens, config).layers[1]
    assert layer.violations == 0 and layer.whole_model.changed.any()
    for name in ("expert_bound", "expert_norm_bound", "output_bound"):
        count = getattr(layer, name).size
        assert dataclasses.replace(layer, **{name: getattr(layer, name) * 0}).violations == count
    sure = np.ones_like(layer.whole_model.certified)
    for name in ("certified", "certified_measured"):
        reading = dataclasses.replace(layer.whole_model, **{name: sure})
        assert reading.violations == layer.whole_model.changed.sum()
    reading = dataclasses.replace(layer.one_layer, logits_above=np.array(3))
    assert dataclasses.replace(layer, one_layer=reading).violations == 3


def test_what_is_no_quantized_version_is_refused():
    config, params, tokens = case("qwen")
    with pytest.raises(InputError, match="quantized is a Model: give the parameters"):
        certify(params, Model(params, config, None, None, "m"), tokens, config)
    with pytest.raises(InputError, match="quantized do not have the shapes of this config"):
        certify(params, case("olmoe")[1], tokens, config)
    with pytest.raises(InputError, match="tokens must be a non-empty integer array"):
        certify(params, params, tokens[:, :0], config)
    with pytest.raises(InputError, match="outside the vocabulary of 40"):
        certify(params, params, tokens + 40, config)
    tuned = dataclasses.replace(params, final_norm=params.final_norm * 2)
    with pytest.raises(InputError, match=r"differ in \.final_norm"):
        certify(params, tuned, tokens, config)
