"""Sizes of models with quantized experts, counted by hand."""

import pytest

from hetmoe.quantize.sizes import sizes
from tests.quantize.tiny_quantized import bits, plain, quantized


def test_sizes_by_hand() -> None:
    found, before = sizes(quantized().params), sizes(plain().params)
    weights = 64 * 96  # of an expert matrix
    digital = [int(b) for b in bits().flat if b]
    assert found.quantized == weights * len(digital)
    assert found.codes == weights * sum(digital)
    # A step of 16 bits for every 32 weights, and above 1 bit a zero.
    assert found.overhead == weights // 32 * sum(16 if b == 1 else 32 for b in digital)
    assert found.rest == before.rest - found.quantized and before.quantized == before.overhead == 0
    assert (found.rest_bits, before.rest_bits) == (32 * found.rest, 32 * before.rest)
    assert found.bytes == (found.codes + found.overhead + found.rest_bits) // 8
    assert found.places == 3 * 2 * 2 * 8 * 4  # matrices, pool and slot, layers, experts, int32
    experts, model = found.averages().values()
    assert experts == (sum(digital) / len(digital), (found.codes + found.overhead) / found.quantized)
    everything = found.quantized + found.rest
    assert model == (
        (found.codes + 32 * found.rest) / everything, (found.codes + found.overhead + 32 * found.rest) / everything,
    )  # fmt: skip


def test_a_model_that_is_not_quantized_has_one_average() -> None:
    assert list(sizes(plain().params).averages()) == ["whole model"]
    assert sizes(plain().params).averages()["whole model"] == pytest.approx((32.0, 32.0))
