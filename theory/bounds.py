"""Bounds against measurements on random experts: how often they are violated (never), and how tight they are.

Every case draws shapes, magnitudes and a device; measures an error, through hetmoe's own programming and crossbars; and
divides it by its bound.
"""

from hetmoe.analog.devices import DEVICES
from theory.cases import Case
from theory.digital_cases import converter_cases, quantization_cases, routing_cases
from theory.noise_cases import expert_cases, linear_cases


def search(
    cases: int, chips: int, devices: tuple[str, ...] = tuple(DEVICES), *, digital: int, seed: int = 0
) -> list[Case]:
    """Random cases of every bound: `cases` for every device, and for each of these `digital` of what is not noise."""
    found = list[Case]()
    for number in range(cases):
        first = 1000 * (cases * seed + number)
        for index, device in enumerate(devices):
            found += linear_cases(first + index, device, chips) + expert_cases(first + index, device, chips)
        for index in range(digital):
            found += [case for of in (converter_cases, quantization_cases, routing_cases) for case in of(first + index)]
    return found
