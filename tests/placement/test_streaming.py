"""Scores from a checkpoint's files against those of the loaded model."""

import pathlib

import jax
import numpy as np
import pytest

from hetmoe.checkpoint.load import load_model, open_checkpoint
from hetmoe.errors import InputError
from hetmoe.models.model import model_fingerprint
from hetmoe.placement.scores import score_experts
from hetmoe.placement.streaming import STREAMED, stored_identity, stream_scores

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FOLDERS = ("olmoe_tiny", "olmoe_fused", "mixtral_fused", "qwen2_moe_sparse_step", "deepseek_v3_fp8")
KEY = jax.random.key(7)
pytestmark = pytest.mark.filterwarnings("ignore::hetmoe.errors.CheckpointWarning")  # one holds a prediction layer


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("rule", STREAMED)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_streamed_scores_are_those_of_the_loaded_model(name: str, rule: str, dtype: str | None) -> None:
    model = load_model(GOLDEN / name, dtype)
    for axis in ("hidden", "output"):
        scores, identity = stream_scores(open_checkpoint(GOLDEN / name), rule, key=KEY, down_axis=axis, dtype=dtype)
        expected = score_experts(model, rule, key=KEY, down_axis=axis)
        # Sums of up to 64 squares in another order, under a root, and a product of three.
        np.testing.assert_allclose(scores, expected, rtol=64 * 2.0**-24)
        assert identity == model_fingerprint(model)
    assert stored_identity(open_checkpoint(GOLDEN / name), dtype) == (identity, model.params.embed.dtype)


def test_a_key_does_not_make_another_rule_random() -> None:
    with_key, without = (
        stream_scores(open_checkpoint(GOLDEN / "olmoe_tiny"), "max_neuron_norm", key=key)[0] for key in (KEY, None)
    )
    np.testing.assert_array_equal(with_key, without)


def test_what_cannot_be_streamed_is_refused() -> None:
    checkpoint = open_checkpoint(GOLDEN / "olmoe_tiny")
    with pytest.raises(InputError, match="needs text"):
        stream_scores(checkpoint, "activation_weight")
    with pytest.raises(InputError, match="needs a key"):
        stream_scores(checkpoint, "random")
    with pytest.raises(InputError, match="down_axis='inner'"):
        stream_scores(checkpoint, "max_neuron_norm", down_axis="inner")
