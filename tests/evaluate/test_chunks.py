"""Text in pieces: all of it once, and the same numbers as in one piece, stopped or not."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetmoe
from hetmoe.evaluate import noise_sweep as module
from hetmoe.evaluate.noise_sweep import Placement, Point, TextSize, digital_result, noise_sweep
from hetmoe.evaluate.progress import Progress, open_progress
from hetmoe.evaluate.run import Batches, chunks, evaluate_digital_and_load
from hetmoe.models.model import Model
from hetmoe.placement.plan import experts_analog

SIZE = TextSize(tokens=80, bytes=240, questions=50)
SCALES = [1.0, 4.0]


def numbered(count: int, batch: int = 2) -> Batches:
    """Batches whose values tell where they come from; the last window only fills its batch."""
    windows = np.arange(count * batch).reshape(count, batch)
    return Batches(
        tokens=jnp.asarray(np.repeat(windows[..., None], 4, axis=2), jnp.int32),
        choices=jnp.asarray(np.repeat(windows[..., None, None], 3, axis=2), jnp.int32),
        asked=jnp.ones((count, batch, 3), bool),
        weight=jnp.ones((count, batch), jnp.float32).at[-1, -1].set(0),
    )


@pytest.mark.parametrize(
    ("count", "size", "starts", "length"),
    [
        (6, 6, [0], 6),
        (6, 3, [0, 3], 3),
        (6, 1, [0, 1, 2, 3, 4, 5], 1),
        (7, 3, [0, 3, 6], 3),
        (5, 3, [0, 3], 3),
        (5, 4, [0, 3], 3),  # no more filled up than must be
        (9, 7, [0, 5], 5),
        (2, 16, [0], 2),  # less text than fits into a piece
        (1, 1, [0], 1),
    ],
)
def test_pieces_hold_all_batches_once_and_in_order(count: int, size: int, starts: list[int], length: int) -> None:
    text = numbered(count)
    found = chunks(text, size)
    assert [first for first, _ in found] == starts
    for first, part in found:
        there = min(length, count - first)
        assert jax.tree.structure(part) == jax.tree.structure(text)
        for ours, whole in zip(jax.tree.leaves(part), jax.tree.leaves(text), strict=True):
            assert ours.shape == (length, *whole.shape[1:]) and ours.dtype == whole.dtype
            np.testing.assert_array_equal(ours[:there], whole[first : first + there])
        # What fills the last piece is real text that counts for nothing.
        assert not np.any(part.weight[there:]) and not np.any(part.asked[there:])
        for ours, whole in ((part.tokens, text.tokens), (part.choices, text.choices)):
            for filled in np.asarray(ours[there:]):
                np.testing.assert_array_equal(filled, whole[first])


def test_what_fills_a_piece_adds_nothing(tiny: Model, batches: Batches) -> None:
    """Of 3 batches the second piece is one of text and one that fills it."""
    arguments = (tiny.config, None, None)
    parts = [evaluate_digital_and_load(tiny.params, part, *arguments) for _, part in chunks(batches, 2)]
    whole, load = evaluate_digital_and_load(tiny.params, batches, *arguments)
    for name in ("nll", "correct"):
        np.testing.assert_allclose(sum(getattr(part, name) for part, _ in parts), getattr(whole, name), rtol=1e-6)
    # One window of 16 tokens, in two layers, to two experts.
    assert int(parts[1][1].sum()) == 16 * 2 * 2
    np.testing.assert_array_equal(parts[0][1] + parts[1][1], load)


def swept(tiny: Model, batches: Batches, store: Progress | None) -> list[Point]:
    """The digital point and those of two scales and seeds, with read noise, which follows a batch's number."""
    noise = hetmoe.make_read_noise("pcm", 0.3)
    placements = [Placement(name="experts", plans=[experts_analog(tiny.config)])]
    done: list[float] = []
    points = noise_sweep(
        tiny, hetmoe.analog_spec("pcm", read_noise=noise), None, placements, SCALES,
        jax.random.split(jax.random.key(0), 2), batches, SIZE, jobs=2, progress=done.append, store=store,
    )  # fmt: skip
    assert sum(done) == pytest.approx(2 * 2)  # two scales, two seeds
    return [digital_result(tiny, batches, SIZE, store=store)[0], *points]


def kept(path: Path) -> Any:
    return open_progress(path, {"what": "sweep"}, 2, is_main=True, share=lambda content: content)


def values(points: list[Point]) -> np.ndarray:
    return np.array([[*point.perplexity, *point.bits_per_byte, *point.accuracy] for point in points[1:]])


def test_pieces_give_what_all_text_at_once_does(tiny: Model, batches: Batches, tmp_path: Path) -> None:
    whole = swept(tiny, batches, None)
    with kept(tmp_path / "progress") as store:
        pieces = swept(tiny, batches, store)
        assert store.finished == 2 + 2 * 2  # both pieces, digital and at two scales
    for found, wanted in zip(pieces, whole, strict=True):
        assert (found.placement, found.noise_scale) == (wanted.placement, wanted.noise_scale)
        for metric in ("perplexity", "bits_per_byte", "accuracy"):
            np.testing.assert_allclose(getattr(found, metric), getattr(wanted, metric), rtol=1e-6)
    assert len(set(whole[1].perplexity + whole[2].perplexity)) == 4


def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_bits(
    tiny: Model, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, computed = tmp_path / "progress", []
    monkeypatch.setattr(module, "evaluate_digital_and_load", counting(evaluate_digital_and_load, computed))
    with kept(path) as store:
        wanted = swept(tiny, batches, store)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 6 and len(computed) == 2
    for stop in range(len(lines) + 1):
        path.write_bytes(b"".join(lines[:stop]))
        computed.clear()
        with kept(path) as store:
            assert store.finished == max(0, stop - 1)
            assert swept(tiny, batches, store) == wanted
            assert store.finished == 6
        # The digital parts are the last two lines: those that are there are not computed again.
        assert len(computed) == 2 - max(0, stop - 5)
        # Scales and seeds may be finished in any order; what was there stays where it was.
        found = path.read_bytes().splitlines(keepends=True)
        assert found[:stop] == lines[:stop] and sorted(found) == sorted(lines)


def counting(function: Any, calls: list[None]) -> Any:
    def counted(*arguments: Any) -> Any:
        calls.append(None)
        return function(*arguments)

    return counted
