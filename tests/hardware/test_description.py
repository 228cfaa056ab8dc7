"""Descriptions: what ships, and that every error names its line."""

import re
from pathlib import Path

import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.hardware.description import (
    FIELDS,
    open_description,
    parse_description,
    read_description,
    shipped_descriptions,
)
from hetmoe.hardware.machine import analog_chips, digital_unit, link_of
from hetmoe.hardware.quantity import convert

A100, TILE = (shipped_descriptions()[name].read_text() for name in ("a100-80gb", "ibm-3d-cim"))


def line_of(text: str, part: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if part in line)


def test_all_that_ships_is_read_and_every_number_has_a_source() -> None:
    kinds = []
    for name, path in shipped_descriptions().items():
        found = read_description(path)
        kinds.append(found.kind)
        text = path.read_text()
        assert all(len(line) <= 200 for line in text.splitlines()), name
        for field, entry in found.entries.items():
            assert entry.source.strip() and field in FIELDS[found.kind]
    assert {kind: kinds.count(kind) for kind in FIELDS} == {"digital": 5, "analog": 3, "link": 4}


def test_published_numbers_arrive_in_si_units() -> None:
    unit = digital_unit(open_description("a100-80gb", "digital"))
    np.testing.assert_allclose(float(unit.bandwidth), 0.85 * 2.039e12, rtol=1e-6)
    np.testing.assert_allclose(float(unit.area), 826e-6, rtol=1e-6)
    tile = analog_chips(open_description("ibm-3d-cim", "analog"))
    np.testing.assert_allclose([float(tile.operation_time), float(tile.operation_energy)], [1e-7, 1e-8], rtol=1e-6)
    assert float(tile.programming_time) == np.inf and float(tile.chips) == 0
    hermes = analog_chips(open_description("hermes-64core", "analog"))
    # 64 cores of 256 x 256 at 63.1 TOPS and 9.76 TOPS/W.
    operations = 2 * 256 * 256
    assert operations * 64 / float(hermes.operation_time) == pytest.approx(63.1e12, rel=0.01)
    assert operations / float(hermes.operation_energy) == pytest.approx(9.76e12, rel=0.01)
    link = link_of(open_description("pcie4-x16", "link"))
    np.testing.assert_allclose([float(link.bandwidth), float(link.energy)], [26e9, 6.5e-12 * 8], rtol=1e-6)


def test_columns_that_share_an_adc_take_its_time_each() -> None:
    text = shipped_descriptions()["neurram"].read_text()
    one = analog_chips(parse_description(text))
    four = analog_chips(parse_description(re.sub(r"(columns_per_adc = { value = )1", r"\g<1>4", text)))
    np.testing.assert_allclose(float(one.operation_time), 8.9e-6 + 3e-6, rtol=1e-6)
    np.testing.assert_allclose(float(four.operation_time), 8.9e-6 + 4 * 3e-6, rtol=1e-6)


BANDWIDTH = 'bandwidth = { value = 2039, unit = "GB/s"'
BAD = [
    (A100, BANDWIDTH, 'bandwidth = { value = 0, unit = "GB/s"', "bandwidth = 0 GB/s must be above 0"),
    (A100, BANDWIDTH, 'bandwidth = { value = -1, unit = "GB/s"', "bandwidth = -1 GB/s must be above 0"),
    (A100, BANDWIDTH, 'bandwidth = { value = nan, unit = "GB/s"', "nan is not finite"),
    (A100, BANDWIDTH, 'bandwidth = { value = inf, unit = "GB/s"', "inf is not finite"),
    (A100, BANDWIDTH, 'bandwidth = { value = "2039", unit = "GB/s"', "value = '2039' must be a number"),
    (A100, BANDWIDTH, 'bandwidth = { value = 1e300, unit = "GB/s"', "1e+300 GB/s is beyond what is calculated with"),
    (A100, BANDWIDTH, 'bandwidth = { value = 1e-300, unit = "GB/s"', "1e-300 GB/s is beyond"),
    (A100, "idle = { value = 60", "idle = { value = 6000", "idle = 6000 W exceeds busy = 400 W"),
    (A100, BANDWIDTH, "bandwidth = { value = 2039", "lacks 'unit'"),
    (A100, BANDWIDTH, 'bandwidth = { value = 2039, unit = ""', "unit '' does not fit: use a unit like 'B/s'"),
    (A100, BANDWIDTH, 'bandwidth = { value = 2039, unit = "1"', "unit '1' does not fit"),
    (A100, BANDWIDTH, 'bandwidth = { value = 2039, unit = "GB"', "unit 'GB' does not fit: use a unit like 'B/s'"),
    (A100, BANDWIDTH, 'bandwidth = { value = 2039, unit = "FLOP/s"', "unit 'FLOP/s' does not fit"),
    (A100, BANDWIDTH, 'bandwidth = { value = 2039, unit = "parsec"', "unit 'parsec' is not understood"),
    (A100, BANDWIDTH, 'bandwidth = { value = 2039, unit = "2 GB/s"', "unit '2 GB/s' is not understood"),
    (A100, BANDWIDTH, 'bandwidth = { value = 2039, unit = "GB/s", peak = true', "unknown key 'peak'"),
    (A100, "bandwidth = {", "bandwith = {", "unknown key 'bandwith'; valid are capacity, bandwidth, utilisation"),
    (A100, "[die]", "[dye]", "unknown key 'dye'"),
    (A100, "utilisation = { value = 0.85", "utilisation = { value = 1.2", "utilisation = 1.2 must be at most 1"),
    (A100, BANDWIDTH, 'bandwidth = { value = 2039, source = "x", unit = "GB/s" }\nspeed = { value = 1', "unknown key"),
    (A100, 'kind = "digital"', 'kind = "optical"', "kind = 'optical' must be one of digital, analog, link"),
    (A100, "hetmoe-hardware-1", "hetmoe-hardware-9", "format must be 'hetmoe-hardware-1'"),
    (A100, 'name = "NVIDIA A100-SXM4-80GB"', "name = 100", "name = 100 must be text"),
    (TILE, "rows = { value = 512", "rows = { value = 512.5", "rows = 512.5 must be a whole number"),
    (TILE, "rows = { value = 512", "rows = { value = 0", "rows = 0 must be above 0"),
    (TILE, "array_time = { value = 100", "array_time = { value = 0", "array_time and conversion_time are both 0"),
    (TILE, "columns_per_adc = { value = 1", "columns_per_adc = { value = 513", "exceeds columns = 512"),
    (TILE, "time_multiplexing = { value = false", "time_multiplexing = { value = 1", "must be true or false"),
    (TILE, 'source = "weights stay where they are"', 'because = "x"', "lacks 'source'"),
]


@pytest.mark.parametrize(("text", "old", "new", "message"), BAD, ids=[row[3] for row in BAD])
def test_what_is_wrong_is_named_with_its_line(text: str, old: str, new: str, message: str) -> None:
    changed = text.replace(old, new, 1)
    assert changed != text
    with pytest.raises(InputError) as caught:
        parse_description(changed, "mine.toml")
    said = str(caught.value)
    assert message in said and "\n" not in said
    at = int(re.match(r"mine\.toml:(\d+):", said).group(1))
    assert at == line_of(changed, new.splitlines()[-1].split("{")[0].strip()), said


def test_a_missing_entry_is_named_with_the_line_of_its_table() -> None:
    without = "\n".join(line for line in A100.splitlines() if not line.startswith("bandwidth"))
    with pytest.raises(InputError, match=rf"mine.toml:{line_of(without, '[memory]')}: \[memory\] lacks 'bandwidth'"):
        parse_description(without, "mine.toml")
    empty = A100.replace('"NVIDIA A100 80GB data sheet, 2021"', '" "')
    with pytest.raises(InputError, match="capacity = 80 GB has an empty source"):
        parse_description(empty)


def test_time_multiplexing_needs_what_programming_takes() -> None:
    lines = [line for line in TILE.splitlines() if not line.startswith("programming_energy")]
    text = "\n".join(lines).replace("time_multiplexing = { value = false", "time_multiplexing = { value = true")
    with pytest.raises(InputError, match=r"time_multiplexing needs \[tile\] programming_energy"):
        parse_description(text)
    allowed = TILE.replace("time_multiplexing = { value = false", "time_multiplexing = { value = true")
    np.testing.assert_allclose(float(analog_chips(parse_description(allowed)).programming_time), 61e-3, rtol=1e-6)


def test_files_and_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(A100)
    assert open_description(str(path), "digital").entries == open_description("a100-80gb", "digital").entries
    with pytest.raises(InputError, match="describes digital hardware"):
        open_description(str(path), "analog")
    with pytest.raises(InputError, match="neither a file nor known: use one of hermes-64core, ibm-3d-cim, neurram"):
        open_description("hermes", "analog")
    path.write_text("kind = ")
    with pytest.raises(InputError, match="not readable as TOML"):
        open_description(str(path), "digital")


@pytest.mark.parametrize(
    ("value", "unit", "wanted", "result"),
    [
        (2, "GB/s", "B/s", 2e9), (1, "GiB", "B", 2**30), (8, "bit", "B", 1.0), (1, "pJ/bit", "J/B", 8e-12),
        (3, "kW", "W", 3e3), (2, "J/s", "W", 2.0), (5, "mm^2", "m**2", 5e-6), (2, "min", "s", 120.0),
        (1, "TFLOP/s", "FLOP/s", 1e12), (7, "us", "s", 7e-6), (0.5, "1", "1", 0.5),
    ],
)  # fmt: skip
def test_units(value: float, unit: str, wanted: str, result: float) -> None:
    assert convert(value, unit, wanted) == pytest.approx(result, rel=1e-12)
