"""Text to windows of tokens, with what is needed for bits per byte and next-word questions."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hetmoe.checkpoint.load import model_directory
from hetmoe.errors import InputError
from hetmoe.models.model import Model

SEPARATOR = "\n<|endoftext|>\n"  # between documents of a text file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One tokenised document. All arrays have one entry per token."""

    ids: np.ndarray  # int32; starts with the model's start token if it has one
    byte_count: np.ndarray  # UTF-8 bytes of text that the token adds
    whole_word: np.ndarray  # bool: the token is one whole word of letters behind a space


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        InputError: if it is absent, empty, or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; give some text")
    return text


def heldout_files() -> list[Path]:
    """The held-out text that ships with the reference model, one file per source."""
    return sorted((model_directory("reference") / "heldout").glob("*.txt"))


def tokenize(text: str, tokenizer: Tokenizer, start: int | None, vocab_size: int) -> Document:
    """Tokenises one document; `start` goes before it and adds no bytes.

    Raises:
        InputError: if a token is outside the model's vocabulary.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, np.int32)
    if ids.size and ids.max() >= vocab_size:
        raise InputError(f"token id {ids.max()} is outside the model's vocabulary of {vocab_size}")
    byte_at = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text])])  # bytes before each character
    ends = np.asarray([end for _, end in encoding.offsets], np.int64)
    # Tokens that share a multi-byte character report the same end: the first of them counts its bytes.
    byte_count = np.diff(byte_at[np.maximum.accumulate(ends)], prepend=0) if ids.size else np.zeros(0, np.int64)
    words = np.array([_is_whole_word(text, *span) for span in encoding.offsets], bool)
    if start is not None:
        ids = np.concatenate([np.array([start], np.int32), ids])
        byte_count = np.concatenate([[0], byte_count])
        words = np.concatenate([[False], words])
    return Document(ids=ids, byte_count=byte_count, whole_word=words)


def _is_whole_word(text: str, start: int, end: int) -> bool:
    if start > 0 and text[start] != " ":
        start -= 1  # some tokenizers report a token without its leading space
    piece = text[start:end]
    return (
        len(piece) > 1
        and piece[0] == " "
        and piece[1:].isalpha()
        and (end == len(text) or not (text[end].isalnum() or text[end] in "'-"))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of seq + 1 tokens (the first is context only) and what belongs to the `seq` predicted ones."""

    tokens: np.ndarray  # int32 [windows, seq + 1]
    byte_count: np.ndarray  # [windows, seq]
    whole_word: np.ndarray  # bool [windows, seq]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Sequence[int] | np.ndarray) -> "Windows":
        """The windows of the given numbers."""
        return Windows(tokens=self.tokens[index], byte_count=self.byte_count[index], whole_word=self.whole_word[index])


def cut(documents: Sequence[Document], seq: int) -> Windows:
    """Joins documents and cuts them into windows that overlap by one token; a last partial window is dropped."""
    ids, byte_count, words = (
        np.concatenate([getattr(d, name) for d in documents]) for name in ("ids", "byte_count", "whole_word")
    )
    count = (len(ids) - 1) // seq

    def predicted(values: np.ndarray) -> np.ndarray:
        return values[1 : count * seq + 1].reshape(count, seq)

    windows = np.lib.stride_tricks.sliding_window_view(ids, seq + 1)[: count * seq : seq] if count else ids[:0, None]
    return Windows(tokens=np.ascontiguousarray(windows), byte_count=predicted(byte_count), whole_word=predicted(words))


def join(parts: Sequence[Windows]) -> Windows:
    """All windows of several sources, in order."""
    return Windows(
        tokens=np.concatenate([p.tokens for p in parts]),
        byte_count=np.concatenate([p.byte_count for p in parts]),
        whole_word=np.concatenate([p.whole_word for p in parts]),
    )


def load_windows(model: Model, files: Sequence[Path], seq: int) -> list[Windows]:
    """Windows of each file.

    Raises:
        InputError: if the model has no tokenizer, or a file is unusable or shorter than a window.
    """
    if model.tokenizer is None:
        raise InputError(f"model {model.name!r} has no tokenizer.json, so text cannot be read for it")
    sources = []
    for file in files:
        documents = [
            tokenize(part, model.tokenizer, model.start_token_id, model.config.vocab_size)
            for part in read_text(file).split(SEPARATOR)
        ]
        windows = cut(documents, seq)
        if not len(windows):
            raise InputError(f"{file}: shorter than one window of {seq + 1} tokens; give more text, or a smaller seq")
        sources.append(windows)
    return sources


def split_windows(sources: Sequence[Windows], evaluate: int | None, calibrate: int) -> tuple[Windows, Windows]:
    """(windows to evaluate, windows to calibrate on): disjoint, evenly spread over every source, as equal as can be.

    Args:
        sources: windows per source.
        evaluate: how many to evaluate; None = all that calibration leaves.
        calibrate: how many to set aside for calibration.

    Raises:
        InputError: if the sources do not hold that many.
    """
    picks = _split(sources, evaluate, calibrate)
    chosen, aside = (join([s.take(p[i]) for s, p in zip(sources, picks, strict=True)]) for i in range(2))
    return chosen, aside


def apart(sources: Sequence[Windows], evaluate: int, calibrate: int, count: int) -> Windows | None:
    """Up to `count` windows that `split_windows(sources, evaluate, calibrate)` uses for neither; None if all are used.

    Spread as evenly as there. What a placement is chosen on should not be what it is judged on.
    """
    available = sum(len(s) for s in sources)
    if available - evaluate - calibrate < 1:
        return None
    picks = _split(sources, evaluate, calibrate)
    rest = [s.take(np.setdiff1d(np.arange(len(s)), np.concatenate(p))) for s, p in zip(sources, picks, strict=True)]
    return split_windows(rest, min(count, available - evaluate - calibrate), 0)[0]


def _split(sources: Sequence[Windows], evaluate: int | None, calibrate: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Numbers of the windows of each source to evaluate and to calibrate on."""
    available = sum(len(s) for s in sources)
    wanted = calibrate + (1 if evaluate is None else evaluate)
    if wanted > available:
        raise InputError(
            f"the text has {available} windows, but {wanted} are asked for ({calibrate} of them for calibration): "
            "give more text, ask for fewer tokens, or use dynamic input ranges"
        )
    evaluate = available - calibrate if evaluate is None else evaluate
    shares = _shares([len(s) for s in sources], evaluate + calibrate)
    held = _shares(shares, calibrate)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for source, share, count in zip(sources, shares, held, strict=True):
        picks = np.unique(np.linspace(0, len(source) - 1, share).round().astype(int)) if share else np.zeros(0, int)
        for_calibration = np.linspace(0, len(picks) - 1, count).round().astype(int) if count else np.zeros(0, int)
        parts.append((np.delete(picks, for_calibration), picks[for_calibration]))
    return parts


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """Splits `total` over sources as equally as their sizes allow."""
    shares = [0] * len(sizes)
    for index in itertools.cycle(range(len(sizes))):
        if sum(shares) == total:
            return shares
        if shares[index] < sizes[index]:
            shares[index] += 1
    raise AssertionError("unreachable")
