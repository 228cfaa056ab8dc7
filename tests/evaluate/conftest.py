"""A model small enough to evaluate in a test, and text for it."""

import jax
import numpy as np
import pytest

from hetmoe.evaluate.run import Batches, make_batches
from hetmoe.evaluate.text import Windows
from hetmoe.models.abstract import init_params
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.models.model import Model


@pytest.fixture(scope="session")
def tiny() -> Model:
    config = ModelConfig(
        family="olmoe", vocab_size=64, hidden_size=32, expert_intermediate_size=24, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=16, qk_norm="width", num_experts=8, experts_per_token=2, norm_topk_prob=False,
        clip_qkv=None, rms_norm_eps=1e-5, rope=Rope(theta=1e4), max_position_embeddings=64, tie_embeddings=False,
    )  # fmt: skip
    params = init_params(jax.random.key(0), config)
    # Logits of a spread that makes a likelihood worth comparing.
    params = params.replace(lm_head=params.lm_head * 20)  # pyright: ignore[reportAttributeAccessIssue]
    return Model(params=params, config=config, tokenizer=None, eos_token_id=0, name="tiny")


@pytest.fixture(scope="session")
def windows() -> Windows:
    tokens = np.random.default_rng(0).integers(0, 64, (5, 17)).astype(np.int32)
    return Windows(tokens=tokens, byte_count=np.full((5, 16), 3), whole_word=tokens[:, 1:] < 40)


@pytest.fixture(scope="session")
def choices(windows: Windows) -> np.ndarray:
    wrong = np.random.default_rng(1).integers(0, 64, (5, 16, 3)).astype(np.int32)
    return np.concatenate([windows.tokens[:, 1:, None], wrong], axis=-1)


@pytest.fixture(scope="session")
def batches(windows: Windows, choices: np.ndarray) -> Batches:
    return make_batches(windows, choices, windows.whole_word, 2)  # 5 windows: the last batch is padded
