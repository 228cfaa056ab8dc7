"""The embedded model is what its card says."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import hetmoe
from hetmoe.checkpoint.load import model_directory
from hetmoe.evaluate.run import evaluate_digital, make_batches
from hetmoe.evaluate.text import heldout_files, load_windows
from hetmoe.models.generate import greedy


def test_size_and_shape() -> None:
    directory, model = model_directory("reference"), hetmoe.load_model("reference")
    assert str(model.params.embed.dtype) == "bfloat16"
    assert sum((directory / f).stat().st_size for f in ("config.json", "model.safetensors", "tokenizer.json")) < 20e6
    assert sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()) < 20e6
    assert model.config.num_experts >= 16 and model.config.experts_per_token >= 2
    assert sum(f.stat().st_size for f in heldout_files()) >= 200_000


def test_routers_of_step_zero_are_kept_and_differ() -> None:
    first = load_file(model_directory("reference") / "routers_step0.safetensors")
    model = hetmoe.load_model("reference", "float32")
    assert len(first) == model.config.num_layers
    for layer in range(model.config.num_layers):
        initial = first[f"model.layers.{layer}.mlp.gate.weight"].astype(np.float32)
        final = np.asarray(model.params.layers.moe.router[layer]).T
        assert initial.shape == final.shape
        assert np.linalg.norm(final - initial) > 0.5 * np.linalg.norm(initial)


@pytest.mark.slow  # the whole held-out text, 40 s; the demo prints the same quantity on a part of it
def test_heldout_bits_per_byte_are_those_of_the_card() -> None:
    model = hetmoe.load_model("reference", "float32")
    card = json.loads((model_directory("reference") / "training.json").read_text())["heldout"]
    total, size = 0.0, 0
    for file, windows in zip(heldout_files(), load_windows(model, heldout_files(), 256), strict=True):
        choices = windows.tokens[:, 1:, None]
        batches = make_batches(windows, choices, np.zeros(windows.whole_word.shape, bool), 16)
        nll = float(evaluate_digital(model.params, batches, model.config).nll)
        assert nll / np.log(2) / windows.byte_count.sum() == pytest.approx(card[file.stem]["bits_per_byte"], abs=2e-3)
        total, size = total + nll, size + int(windows.byte_count.sum())
    assert total / np.log(2) / size <= 1.75  # the quality bar that the model was trained to


def test_greedy_continuation_is_text() -> None:
    model = hetmoe.load_model("reference", "float32")
    text = greedy(model, "My lord, I will", 12)
    assert len(text.split()) >= 5
    with pytest.raises(hetmoe.InputError, match="fit the context"):
        greedy(model, "word " * 300, 5)
