"""A small model that reads bytes, and its log-likelihoods by the numpy model."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hetmoe.models.config import Rope
from hetmoe.models.model import Model
from tests.models import numpy_model
from tests.models.tiny import random_params, tiny_config

POSITIONS = 150  # not a power of two, and shorter than some prompts
END = 256


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tiny_model() -> Model:
    config = tiny_config(vocab_size=257, max_position_embeddings=POSITIONS, num_experts=4, rope=Rope(theta=100.0))
    params = random_params(config, 5)
    # Logits of a spread that makes answers differ in likelihood.
    params = params.replace(lm_head=params.lm_head * 10)
    return Model(params=params, config=config, tokenizer=byte_tokenizer(), eos_token_id=END, name="tiny")


def numpy_score(model: Model, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """(log-likelihood, greedy) in float64, one sequence without padding, its last positions if it is too long."""
    ids = np.asarray([*context, *continuation])[-(model.config.max_position_embeddings + 1) :]
    logits = numpy_model.forward(model.params, ids[None, :-1], model.config, numpy_model.digital)[0][0]
    return score_of_logits(logits, ids, len(continuation))


def score_of_logits(logits: np.ndarray, ids: np.ndarray, count: int) -> tuple[float, bool]:
    """From the logits behind all but the last of `ids`, for the last `count` of them."""
    wide = np.asarray(logits, np.float64)[-count:]
    shifted = wide - wide.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    wanted = ids[-count:]
    return float(log_probs[np.arange(count), wanted].sum()), bool((wide.argmax(axis=-1) == wanted).all())
