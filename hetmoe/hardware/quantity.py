"""Numbers with their unit and source, as descriptions of hardware state them."""

import dataclasses
import functools
import math
from typing import Any

import pint

from hetmoe.errors import InputError

# Only what descriptions need, so that a byte is not a number and a bandwidth not a frequency, as they are by default.
_PREFIXES = {
    "femto": ("1e-15", "f"), "pico": ("1e-12", "p"), "nano": ("1e-9", "n"), "micro": ("1e-6", "u"),
    "milli": ("1e-3", "m"), "kilo": ("1e3", "k"), "mega": ("1e6", "M"), "giga": ("1e9", "G"), "tera": ("1e12", "T"),
    "peta": ("1e15", "P"), "kibi": ("2**10", "Ki"), "mebi": ("2**20", "Mi"), "gibi": ("2**30", "Gi"),
    "tebi": ("2**40", "Ti"),
}  # fmt: skip
_UNITS = (
    "byte = [information] = B", "bit = byte / 8", "second = [time] = s", "minute = 60 * second = min",
    "hour = 60 * minute = h", "day = 24 * hour", "joule = [energy] = J", "watt = joule / second = W",
    "meter = [length] = m", "flop = [operation] = FLOP",
)  # fmt: skip
LARGEST = 1e30  # sums and ratios stay within float32
PLAIN = "1"  # the unit of counts and fractions


@functools.cache
def _registry() -> Any:
    registry = pint.UnitRegistry(None)  # pyright: ignore[reportArgumentType] (without a file of units)
    for name, (factor, symbol) in _PREFIXES.items():
        registry.define(f"{name}- = {factor} = {symbol}-")
    for definition in _UNITS:
        registry.define(definition)
    return registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantity:
    """A value in the unit that the code works with, and how and where it was stated.

    Attributes:
        value: in the unit asked for (SI units, bytes, FLOP; "1" for counts and fractions).
        stated: as it was written, such as "2039 GB/s".
        source: where it is from.
    """

    value: float
    stated: str
    source: str


def convert(value: float, unit: str, wanted: str) -> float:
    """A value in another unit of the same dimension.

    Raises:
        InputError: for a unit that does not exist, has a number in it, or measures something else; and for a value
            that is not finite.
    """
    if not math.isfinite(value):
        raise InputError(f"{value} is not finite")
    if unit.strip() == PLAIN or wanted == PLAIN:
        if unit.strip() == wanted:
            return _within(value, value, unit, wanted)
        raise InputError(f"unit {unit!r} does not fit: use a unit like {wanted!r}")
    registry = _registry()
    try:
        given = registry.parse_units(unit)
    except Exception as error:  # noqa: BLE001 (the parser raises its own errors, and those of Python's tokenizer)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"unit {unit!r} is not understood ({reason}): use a unit like {wanted!r}") from None
    try:
        found = float(registry.Quantity(value, given).to(wanted).magnitude)
    except pint.DimensionalityError:
        raise InputError(f"unit {unit!r} does not fit: use a unit like {wanted!r}") from None
    return _within(found, value, unit, wanted)


def _within(found: float, value: float, unit: str, wanted: str) -> float:
    if abs(found) > LARGEST or 0 < abs(found) < 1 / LARGEST:
        raise InputError(f"{value:g} {unit} is beyond what is calculated with, 1e-30 to 1e30 {wanted}")
    return found


def parse_quantity(text: str, wanted: str) -> float:
    """A value with its unit, such as "20 uJ", in the unit `wanted`.

    Raises:
        InputError: for anything else, and as `convert`.
    """
    number, _, unit = text.strip().partition(" ")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not unit.strip() or math.isnan(value):
        raise InputError(f"{text!r} must be a number, a space and a unit like {wanted!r}")
    return convert(value, unit.strip(), wanted)
