"""Model directories for the tests of loading and saving."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.save import save_model
from hetmoe.errors import InputError
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from tests.models.tiny import random_params, tiny_config


def tokenizer(vocab: dict[str, int]) -> Tokenizer:
    """Words to ids."""
    return Tokenizer(WordLevel(vocab, unk_token=next(iter(vocab))))


def model(dtype: Any = jnp.float32, words: Tokenizer | None = None, **changes: Any) -> Model:
    """A random model that was never saved."""
    config = tiny_config(**{"num_layers": 2, "num_experts": 3, **changes})
    return Model(
        params=random_params(config, 3, dtype), config=config, tokenizer=words, eos_token_id=39, name="never saved"
    )


def save_valid(directory: pathlib.Path) -> pathlib.Path:
    """Saves a model with a tokenizer, whose files the test may then spoil."""
    save_model(directory, model(words=tokenizer({"a": 0, "b": 1})))
    load_model(directory)
    return directory


def refused(directory: pathlib.Path, *words: str, **arguments: Any) -> None:
    """Asserts that loading raises an InputError that says all of `words`."""
    with pytest.raises(InputError) as caught:
        load_model(directory, **arguments)
    for word in words:
        assert word in str(caught.value)


def assert_same_bits(actual: Params, expected: Params) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
