"""Programmed weights and logits on meshes of 1 to 8 devices, beside those of one device."""

import json

import pytest

from tests.parallel.processes import output_of
from tests.parallel.sharded_cases import CONFIGS, meshes

# All axes in combinations. Of all models `tensor` cuts columns: those of "tied" have ADCs of their own, and 4 parts are
# more than "grouped" has key heads.
FEW = {
    "grouped": ["expert=2,tensor=4"],
    "full": ["data=2,expert=2,tensor=2"],
    "tied": ["seed=2,expert=2,tensor=2"],
}
MOST = {"grouped": 8, "full": 2, "tied": 2}  # parts of an axis: a mesh takes a minute or two


def check(config: str, wanted: list[str]) -> None:
    lines = [json.loads(line) for line in output_of("tests.parallel.sharded_cases", config, *wanted).splitlines()]
    assert [line["mesh"] for line in lines] == wanted
    for line in lines:
        assert not line["programmed_differ"], line
        # Rounding: sums of K <= 44 products in another order are off by 2^-24 sqrt(K) < 4e-7 of their size, through at
        # most 3 layers of 6 such sums.
        assert line["digital"]["most"] < 18 * 4e-7, line
        # Weights that are programmed layer by layer in the pass are those that were stored.
        if config == "tied":
            assert line["layer"]["high"] < 18 * 4e-7 and line["layer"]["most"] < 0.5, line
        # A last bit may flip a step of a converter, which is 1/254 of a range: in few tokens, if any. Logits of
        # unrelated tokens are apart by sqrt(2) of their spread, on average.
        assert line["analog"]["high"] < 18 * 4e-7, line
        assert line["analog"]["most"] < 0.5, line


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_are_equal_and_logits_but_for_rounding(config: str) -> None:
    check(config, FEW[config])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("config", CONFIGS)
def test_all_meshes(config: str, devices: int) -> None:
    check(config, meshes(devices, MOST[config]))
