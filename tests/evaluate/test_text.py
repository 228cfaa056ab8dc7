"""Tokenised text: bytes, whole words, windows, and how they are shared out."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hetmoe.checkpoint.load import load_model, model_directory
from hetmoe.errors import InputError
from hetmoe.evaluate.text import (
    Document,
    Windows,
    apart,
    cut,
    heldout_files,
    load_windows,
    read_text,
    split_windows,
    tokenize,
)  # fmt: skip
from hetmoe.models.model import Model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_directory("reference") / "tokenizer.json"))


@given(st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_bytes_of_tokens_add_up_to_the_text(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(model_directory("reference") / "tokenizer.json"))
    document = tokenize(text.replace("<|endoftext|>", ""), tokenizer, 0, 4096)
    assert document.byte_count.sum() == len(text.replace("<|endoftext|>", "").encode())
    assert (document.byte_count >= 0).all()
    assert len(document.ids) == len(document.byte_count) == len(document.whole_word)


def test_end_of_text_comes_first_and_adds_no_bytes(tokenizer: Tokenizer) -> None:
    with_eos, without = tokenize("A cat.", tokenizer, 0, 4096), tokenize("A cat.", tokenizer, None, 4096)
    assert with_eos.ids[0] == 0 and with_eos.byte_count[0] == 0
    np.testing.assert_array_equal(with_eos.ids[1:], without.ids)


def test_whole_words_are_letters_between_a_space_and_a_boundary(tokenizer: Tokenizer) -> None:
    text = "the man saw the house, and the dog's 12 men unquestionably-so the"
    document = tokenize(text, tokenizer, None, 4096)
    encoding = tokenizer.encode(text)
    words = [text[s:e] for (s, e), whole in zip(encoding.offsets, document.whole_word, strict=True) if whole]
    assert " man" in words and " house" in words and words[-1] == " the"
    assert " dog" not in words  # followed by an apostrophe
    assert all(w[0] == " " and w[1:].isalpha() for w in words)


def test_tokens_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="outside the model's vocabulary of 300"):
        tokenize("The unfortunate gentleman", tokenizer, None, 300)


def numbered(count: int) -> Document:
    ids = np.arange(count, dtype=np.int32)
    return Document(ids=ids, byte_count=ids.astype(np.int64), whole_word=ids % 3 == 0)


def test_windows_overlap_by_one_token_and_drop_the_rest() -> None:
    windows = cut([numbered(6), numbered(6)], 5)  # 0..5 0..5: two windows of 5 predictions, one token left over
    np.testing.assert_array_equal(windows.tokens, [[0, 1, 2, 3, 4, 5], [5, 0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(windows.byte_count, windows.tokens[:, 1:])
    np.testing.assert_array_equal(windows.whole_word, windows.tokens[:, 1:] % 3 == 0)


def test_text_shorter_than_a_window_gives_none() -> None:
    assert len(cut([numbered(5)], 5)) == 0
    assert len(cut([numbered(6)], 5)) == 1


def source(first: int, count: int) -> Windows:
    tokens = np.arange(first, first + count, dtype=np.int32)[:, None].repeat(4, axis=1)
    return Windows(tokens=tokens, byte_count=tokens[:, 1:], whole_word=tokens[:, 1:] > 0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_evaluation_and_calibration_windows_are_disjoint(sizes: list[int], data: st.DataObject) -> None:
    calibrate = data.draw(st.integers(0, sum(sizes) - 1))
    evaluate = data.draw(st.integers(1, sum(sizes) - calibrate))
    starts = np.cumsum([0, *sizes])
    chosen, aside = split_windows([source(int(s), n) for s, n in zip(starts, sizes, strict=False)], evaluate, calibrate)
    ids, held = set(chosen.tokens[:, 0].tolist()), set(aside.tokens[:, 0].tolist())
    assert len(chosen) == len(ids) == evaluate and len(aside) == len(held) == calibrate
    assert not ids & held


def test_sources_share_equally() -> None:
    chosen, aside = split_windows([source(0, 100), source(100, 100), source(200, 100)], 30, 6)
    assert np.bincount(chosen.tokens[:, 0] // 100).tolist() == [10, 10, 10]
    assert np.bincount(aside.tokens[:, 0] // 100).tolist() == [2, 2, 2]
    assert chosen.tokens[0, 0] < 10 and 85 < chosen.tokens[9, 0] < 100  # spread over the whole source


def test_too_little_text_is_refused() -> None:
    with pytest.raises(InputError, match="has 5 windows, but 8 are asked for"):
        split_windows([source(0, 5)], 6, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9", "not UTF-8 at byte 3")],
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "absent.txt")


def test_heldout_text_is_embedded_and_long_enough() -> None:
    files = heldout_files()
    assert [f.stem for f in files] == ["austen", "shakespeare", "wordnet"]
    assert sum(f.stat().st_size for f in files) >= 200_000
    windows = load_windows(load_model("reference"), files, 256)
    assert sum(w.byte_count.size for w in windows) >= 16384 + 16 * 256


def test_a_model_without_tokenizer_cannot_read_text() -> None:
    model: Model = load_model("reference").replace(tokenizer=None)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_windows(model, heldout_files(), 256)


def numbered_sources(counts: list[int]) -> list[Windows]:
    """Sources whose windows carry their own number."""
    first = np.cumsum([0, *counts])
    return [
        Windows(
            tokens=np.repeat(np.arange(a, b, dtype=np.int32)[:, None], 5, axis=1),
            byte_count=np.ones((b - a, 4), int),
            whole_word=np.zeros((b - a, 4), bool),
        )
        for a, b in itertools.pairwise(first)
    ]


@pytest.mark.parametrize("counts", [[95, 150, 135], [3, 100], [90]])
def test_windows_apart_are_used_for_neither_evaluation_nor_calibration(counts: list[int]) -> None:
    sources = numbered_sources(counts)
    chosen, aside = split_windows(sources, 64, 16)
    rest = apart(sources, 64, 16, 10)
    assert rest is not None and len(rest) == min(10, sum(counts) - 80)
    used = set(chosen.tokens[:, 0].tolist()) | set(aside.tokens[:, 0].tolist())
    assert len(used) == 80 and not used & set(rest.tokens[:, 0].tolist())
    assert len(set(rest.tokens[:, 0].tolist())) == len(rest)


def test_nothing_is_apart_of_a_short_text() -> None:
    assert apart(numbered_sources([80]), 64, 16, 5) is None
    assert apart(numbered_sources([10, 20]), 64, 16, 5) is None
