"""What an evaluation reads, and its keys: the same for a single evaluation and for a sweep."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from hetmoe.evaluate.next_word import word_questions
from hetmoe.evaluate.noise_sweep import TextSize
from hetmoe.evaluate.run import Batches, make_batches
from hetmoe.evaluate.text import Windows, apart, load_windows, split_windows
from hetmoe.models.model import Model

DEFAULT_TOKENS = 16384
WINDOWS_TO_CALIBRATE = 16  # set aside from the evaluated text


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalText:
    """Text to evaluate, and text to calibrate on and to score experts by."""

    batches: Batches
    size: TextSize
    aside: Windows | None  # for calibration; None = none is wanted
    sample: Windows  # for rules that read text: not evaluated, unless the text is too short


def prepare_text(
    model: Model,
    files: Sequence[Path],
    *,
    tokens: int | None,
    seq: int,
    batch: int,
    seed: int,
    calibrate: bool,
    parts: int = 1,
) -> EvalText:
    """Windows, questions and batches.

    Args:
        model: whose tokenizer reads the text.
        files: one per source.
        tokens: to evaluate; None = `DEFAULT_TOKENS`, or what there is.
        seq: tokens of a window.
        batch: windows run at once.
        seed: of the questions' wrong answers.
        calibrate: set windows aside.
        parts: into which a mesh cuts a batch.

    Raises:
        InputError: for unusable or too little text.
    """
    sources = load_windows(model, files, seq)
    to_calibrate = WINDOWS_TO_CALIBRATE if calibrate else 0
    available = sum(len(s) for s in sources) - to_calibrate
    count = min(DEFAULT_TOKENS // seq, available) if tokens is None else tokens // seq
    windows, aside = split_windows(sources, max(count, 1), to_calibrate)
    choices, asked = word_questions(windows, sources, seed)
    sample = aside if calibrate else apart(sources, len(windows), 0, WINDOWS_TO_CALIBRATE)
    return EvalText(
        batches=make_batches(windows, choices, asked, min(batch, -(-len(windows) // parts) * parts)),
        size=TextSize(tokens=windows.byte_count.size, bytes=int(windows.byte_count.sum()), questions=int(asked.sum())),
        aside=aside if calibrate else None,
        sample=windows if sample is None else sample,
    )


def noise_keys(seed: int, seeds: int) -> jax.Array:
    """One noise key per seed."""
    return jax.random.split(jax.random.key(seed), seeds)


def placement_keys(seed: int, seeds: int) -> jax.Array:
    """One key per seed for placements drawn at random."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), seeds)


def unevaluated_text(model: Model, files: Sequence[Path], *, tokens: int, seq: int) -> tuple[Windows, bool]:
    """Windows to choose placements and ranges on, and whether they are apart from what is evaluated by default.

    They are, unless the text is too short for both: then they are spread over all of it.

    Args:
        model: whose tokenizer reads the text.
        files: one per source.
        tokens: at most so many, in whole windows.
        seq: tokens of a window.

    Raises:
        InputError: for unusable text.
    """
    sources = load_windows(model, files, seq)
    count, available = max(tokens // seq, 1), sum(len(s) for s in sources)
    rest = apart(sources, DEFAULT_TOKENS // seq, WINDOWS_TO_CALIBRATE, count)
    if rest is not None:
        return rest, True
    return split_windows(sources, min(count, available), 0)[0], False
