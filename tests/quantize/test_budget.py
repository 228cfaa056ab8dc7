"""Bytes of packed experts against arrays of that many bytes, and bits under a byte budget against enumeration."""

import itertools

import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.quantize.budget import average_budget, bits_within, code_bits, expert_bytes
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.packed import packed_bytes
from tests.models.tiny import tiny_config

CONFIG = tiny_config(hidden_size=128, expert_intermediate_size=96)


def grids(*bits: int, group: int = 32, symmetric: bool = False) -> list[Grid]:
    return [Grid(bits=b, group=group, symmetric=symmetric) for b in bits]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bytes_are_those_of_the_arrays(bits, symmetric) -> None:
    grid = Grid(bits=bits, group=32, symmetric=symmetric)
    codes = np.packbits(np.zeros((96, 50, bits), bool))  # every bit of every code
    steps = np.zeros((3, 50), np.float16)
    assert packed_bytes(96, 50, grid) == codes.nbytes + steps.nbytes * (1 if symmetric else 2)
    assert packed_bytes(96, 50, grid) * 8 == 96 * 50 * grid.bits_per_weight


def test_bytes_of_an_expert_by_hand() -> None:
    # gate and up 128 x 96: 12,288 codes, 4 groups of 96 columns; down 96 x 128: 3 groups of 128: 384 steps each.
    # Bytes at 1 bit: 1,536 + 384 * 2 = 2,304; at 4 bits: 6,144 + 768 = 6,912. With zeros 768 more.
    np.testing.assert_array_equal(expert_bytes(CONFIG, grids(1, 4, symmetric=True)), [[2304, 6912]] * 3)
    np.testing.assert_array_equal(expert_bytes(CONFIG, grids(1)), [[3072]] * 3)
    # A grid may have zeros where another has none.
    mixed = [*grids(1, symmetric=True), *grids(4)]
    np.testing.assert_array_equal(expert_bytes(CONFIG, mixed), [[2304, 7680]] * 3)


def test_budget_of_an_average() -> None:
    # Three matrices of 12,288 codes in each of 5 experts.
    np.testing.assert_array_equal(code_bits(CONFIG, (1, 3)), [[12_288, 36_864]] * 3)
    for bits in (1, 2, 3, 4):
        assert average_budget(CONFIG, 5, bits) == 5 * 3 * 12_288 * bits
    assert average_budget(CONFIG, 5, 2.3) == 423_936
    assert average_budget(CONFIG, 5, 2.00001) == 368_641  # 368,641.8432 rounded down


def test_bits_by_enumeration() -> None:
    rng = np.random.default_rng(0)
    levels, digital = (1, 3, 8), np.array([[True, False], [False, True]])
    sizes = np.array([[10, 31, 77], [11, 30, 78], [12, 33, 79]])
    for budget in (70, 150, 200, 301, 460, 468):
        increase = rng.normal(size=(2, 2, 3, 3)) + np.array([3.0, 1.0, 0.0])
        items = [(layer, layer, matrix) for layer in range(2) for matrix in range(3)]  # the two digital experts
        best = min(
            (sum(increase[(*i, o)] for i, o in zip(items, pick, strict=True)), pick)
            for pick in itertools.product(range(3), repeat=6)
            if sum(sizes[i[2], o] for i, o in zip(items, pick, strict=True)) <= budget
        )
        plan = bits_within(increase, sizes, levels, budget, digital=digital)
        assert [plan.bits[i] for i in items] == [levels[o] for o in best[1]]
        np.testing.assert_allclose(plan.increase, best[0], rtol=1e-12)
        assert plan.stored == sum(sizes[i[2], o] for i, o in zip(items, best[1], strict=True)) <= budget
        assert plan.gap == 0
        assert not plan.bits[~digital].any()


def test_more_bytes_never_do_harm() -> None:
    rng = np.random.default_rng(1)
    increase = rng.lognormal(0, 2, (3, 8, 3, 1)) * 4.0 ** -np.arange(4)
    sizes = code_bits(CONFIG, (1, 2, 3, 4))
    found = [
        bits_within(increase, sizes, (1, 2, 3, 4), average_budget(CONFIG, 24, average))
        for average in (1, 1.5, 2, 2.5, 3, 3.5, 4)
    ]
    assert np.all(np.diff([plan.increase for plan in found]) < 0)
    assert np.all(found[0].bits == 1) and np.all(found[-1].bits == 4)
    for plan, average in zip(found, (1, 1.5, 2, 2.5, 3, 3.5, 4), strict=True):
        assert plan.bits.mean() == average  # all matrices are of one size, and every step is worth its bytes
        uniform = increase[..., int(average) - 1].sum()
        assert plan.increase <= uniform * (1 + 1e-12)


def test_bad_input_is_refused() -> None:
    increase, sizes = np.ones((1, 2, 3, 2)), np.array([[1, 2]] * 3)
    for call, message in (
        (lambda: bits_within(increase, sizes, (1, 2), 5), "budget=5 is too small.*cost 6"),
        (lambda: bits_within(increase * np.nan, sizes, (1, 2), 9), "must be finite"),
        (lambda: bits_within(increase, sizes, (1, 2, 3), 9), r"increase \[1, 2, 3, 2\].* 3 levels do not fit"),
        (lambda: expert_bytes(CONFIG, grids(1, group=64)), "group=64 does not divide the 96 rows"),
        (lambda: average_budget(CONFIG, 5, float("nan")), "bits=nan"),
        (lambda: average_budget(CONFIG, 5, 0), "bits=0"),
    ):
        with pytest.raises(InputError, match=message):
            call()
