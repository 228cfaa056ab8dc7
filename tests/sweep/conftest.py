"""A tiny model directory with text, and a small sweep of it."""

import itertools
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.pre_tokenizers import Whitespace

from hetmoe.checkpoint.save import save_model
from tests.models.directories import model, tokenizer

WORDS = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, "ae")][:39]
SMALL = {
    "rules": '["router_norm", "random"]', "fractions": "[0.25]", "devices": '["pcm"]', "noise_scales": "[0, 4]",
    "seeds": "2", "seed": "3",
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model and `text.txt`."""
    folder = tmp_path_factory.mktemp("sweep")
    words = tokenizer({word: number for number, word in enumerate(WORDS)})
    words.pre_tokenizer = Whitespace()
    save_model(folder / "model", model(words=words, num_layers=1, num_experts=8))
    drawn = np.random.default_rng(0).choice(WORDS, 8 * 40)
    (folder / "text.txt").write_text(" ".join(drawn))
    return folder


@pytest.fixture
def write_config(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a CONFIG; keyword arguments replace keys of [grid] (None leaves one out)."""

    def write(
        name: str = "s.toml", *, head: str = "", hardware: str = "", text: str = "", execution: str = "", **grid: Any
    ) -> Path:
        lines = [f"{key} = {value}" for key, value in (SMALL | grid).items() if value is not None]
        path = tmp_path / name
        path.write_text(
            f'model = "{folder / "model"}"\n{head}\n[text]\nfiles = ["{folder / "text.txt"}"]\ntokens = 64\nseq = 8\n'
            f"batch = 4\n{text}\n[grid]\n" + "\n".join(lines) + f"\n[execution]\n{execution}\n[hardware]\n{hardware}\n"
        )
        return path

    return write
