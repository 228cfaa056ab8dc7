"""Searches for violations of all bounds, and what counts as one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.analog.devices import DEVICES
from theory.cases import Case, case_of
from theory.digital_cases import converter_cases, quantization_cases, routing_cases
from theory.noise_cases import expert_cases, linear_cases

SEEDS = st.integers(0, 2**31)


@settings(max_examples=12)
@given(seed=SEEDS, device=st.sampled_from(list(DEVICES)))
def test_no_noise_violates_a_bound_of_a_matrix(seed: int, device: str) -> None:
    assert not any(case.violated for case in linear_cases(seed, device, 2000))


@settings(max_examples=6)
@given(seed=SEEDS, device=st.sampled_from(list(DEVICES)))
def test_no_noise_violates_a_bound_of_an_expert(seed: int, device: str) -> None:
    assert not any(case.violated for case in expert_cases(seed, device, 1000))


@settings(max_examples=15)
@given(seed=SEEDS)
def test_no_rounding_violates_a_bound(seed: int) -> None:
    assert not any(case.violated for case in converter_cases(seed) + quantization_cases(seed) + routing_cases(seed))


def test_what_is_neither_moved_nor_bounded_is_left_out() -> None:
    found = case_of("b", "d", np.array([0.0, 1.0, 1.0]), np.array([0.0, 2.0, 0.0]), np.array([0.0, 0.2, 0.1]))
    assert found.ratios.tolist() == [0.5, np.inf] and found.error.tolist() == [0.1, 0.0] and found.violated


def test_what_counts_as_violated() -> None:
    ratios = np.array([0.5, 1.04])
    assert not Case(bound="b", device="d", ratios=ratios, error=np.array([0.01])).violated
    assert Case(bound="b", device="d", ratios=ratios, error=np.array([0.001])).violated
    assert Case(bound="b", device="d", ratios=np.array([0.9]), error=np.array([0.01]), exact=True).violated
    assert not Case(bound="b", device="d", ratios=np.array([0.0]), error=np.array([0.01]), exact=True).violated
    assert not Case(bound="b", device="d", ratios=np.array([0.9]), error=np.array([0.01])).violated
    assert Case(bound="b", device="d", ratios=np.array([2.0]), error=np.array([1.0]), share=0.02).violated
    assert not Case(bound="b", device="d", ratios=np.array([2.0]), error=np.array([1.0]), share=0.01).violated
