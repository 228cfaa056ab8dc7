"""Descriptions of hardware in TOML: every number with its unit and source, read strictly.

A description has a `format`, a `kind` ("digital", "analog" or "link"), a `name`, and tables of entries such as

    [memory]
    bandwidth = { value = 2039, unit = "GB/s", source = "NVIDIA A100 data sheet, 2021" }

The fields of each kind are listed below (`FIELDS`), with the unit that they are kept in.
"""

import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal

from hetmoe.errors import InputError
from hetmoe.hardware.quantity import PLAIN, Quantity, convert
from hetmoe.toml_table import TomlFile, TomlTable, parse_toml, read_toml

FORMAT = "hetmoe-hardware-1"
Kind = Literal["digital", "analog", "link"]
KINDS: tuple[Kind, ...] = ("digital", "analog", "link")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """What an entry of a description is.

    Attributes:
        unit: that values are kept in; entries may use any unit of the same dimension.
        about: one line.
        zero: whether the value may be 0; otherwise it is above.
        most: the largest possible value; None = any.
        whole: whether it counts something.
        optional: without it, what depends on it is left unknown, or what it would allow is off.
    """

    unit: str
    about: str
    zero: bool = False
    most: float | None = None
    whole: bool = False
    optional: bool = False


def _fraction(about: str) -> Field:
    return Field(unit=PLAIN, about=about, most=1.0)


def _count(about: str, *, optional: bool = False) -> Field:
    return Field(unit=PLAIN, about=about, whole=True, optional=optional)


FIELDS: dict[Kind, dict[str, Field]] = {
    "digital": {
        "memory.capacity": Field(unit="B", about="memory for weights and the key-value cache"),
        "memory.bandwidth": Field(unit="B/s", about="peak rate of reading and writing it"),
        "memory.utilisation": _fraction("share of that rate that large transfers reach"),
        "compute.rate": Field(unit="FLOP/s", about="peak rate of dense matmuls; a multiply-add is 2 FLOP"),
        "compute.utilisation": _fraction("share of that rate that large matmuls reach"),
        "power.busy": Field(unit="W", about="while it works"),
        "power.idle": Field(unit="W", about="while it waits for other parts", zero=True),
        "die.area": Field(unit="m**2", about="of the processor's die, without memory", optional=True),
    },
    "analog": {
        "tile.rows": _count("inputs of a tile"),
        "tile.columns": _count("outputs of a tile"),
        "tile.array_time": Field(
            unit="s", about="of one operation (a vector times a tile) without output conversion", zero=True
        ),
        "tile.conversion_time": Field(unit="s", about="of one ADC for one column", zero=True),
        "tile.columns_per_adc": _count("columns that take turns at one ADC"),
        "tile.operation_energy": Field(unit="J", about="of one operation, converters included"),
        "tile.planes": _count("planes of weights that share the converters of a tile, and take turns"),
        "tile.area": Field(unit="m**2", about="of a tile with all its planes and converters", optional=True),
        "tile.programming_time": Field(unit="s", about="of programming one plane of a tile", optional=True),
        "tile.programming_energy": Field(unit="J", about="of the same", optional=True),
        "chip.tiles": _count("tiles that can work at the same time"),
        "chip.chips": _count("chips; without it, as many as the weights need", optional=True),
        "chip.static_power": Field(unit="W", about="of a chip beside its operations, all the time", zero=True),
    },
    "link": {
        "link.bandwidth": Field(unit="B/s", about="in each direction"),
        "link.latency": Field(unit="s", about="of one transfer", zero=True),
        "link.energy": Field(unit="J/B", about="of a byte that is moved", zero=True),
    },
}
# Whether tiles may be programmed anew in every step, where weights do not all fit; needs time and energy of that.
MULTIPLEXING = "chip.time_multiplexing"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A description that was read: its fields by name, such as "memory.bandwidth"; optional ones may be absent."""

    kind: Kind
    name: str
    entries: Mapping[str, Quantity]
    multiplexing: bool
    file: TomlFile

    def value(self, field: str) -> float | None:
        """In the unit of `FIELDS`; None where it is absent."""
        return self.entries[field].value if field in self.entries else None

    def error(self, field: str, said: str) -> InputError:
        """An error about a field, which names its line."""
        table, _, key = field.partition(".")
        return InputError(f"{self.file.where((table, key))}: [{table}] {said}")


def shipped_descriptions() -> dict[str, Path]:
    """The files that come with hetmoe, by name."""
    folder = resources.files("hetmoe.hardware").joinpath("descriptions")
    return {Path(entry.name).stem: Path(str(entry)) for entry in sorted(folder.iterdir(), key=lambda e: e.name)}


def open_description(name_or_file: str, kind: Kind) -> Description:
    """A shipped description by its name, or one in a file.

    Raises:
        InputError: for a name that does not exist, another kind, and all that `parse_description` refuses.
    """
    shipped = shipped_descriptions()
    path = shipped.get(name_or_file, Path(name_or_file))
    if name_or_file not in shipped and not path.is_file():
        known = [name for name, file in shipped.items() if read_description(file).kind == kind]
        raise InputError(
            f"{kind} hardware {name_or_file!r} is neither a file nor known: use one of {', '.join(known)}, or a TOML "
            f"file like that of 'hetmoe hardware --show {known[0]}'"
        )
    found = read_description(path)
    if found.kind != kind:
        raise InputError(f"{name_or_file}: describes {found.kind} hardware ({found.name}), not {kind}")
    return found


def read_description(path: Path) -> Description:
    """A description in a file. Raises InputError as `parse_description`, or if the file cannot be read."""
    return _read(read_toml(path))


def parse_description(text: str, path: str = "description") -> Description:
    """A description from its text; `path` is what errors name.

    Raises:
        InputError: naming the line, for unknown or missing keys, units that are missing, unknown or of another
            dimension, missing sources, and values that no hardware has.
    """
    return _read(parse_toml(text, path))


def _read(top: TomlTable) -> Description:
    if top.text("format") != FORMAT:
        raise top.error("format", f"format must be {FORMAT!r}")
    kind, name = top.text("kind"), top.text("name")
    if kind not in KINDS:
        raise top.error("kind", f"kind = {kind!r} must be one of {', '.join(KINDS)}")
    fields = FIELDS[kind]
    tables = {part: top.table(part) for part in dict.fromkeys(field.partition(".")[0] for field in fields)}
    top.finish()
    for part, table in tables.items():  # a misspelt key is named itself, not only what is then missing
        keys = [field.partition(".")[2] for field in (*fields, MULTIPLEXING) if field.startswith(f"{part}.")]
        table.only(keys if kind == "analog" else [key for key in keys if f"{part}.{key}" in fields])
    entries: dict[str, Quantity] = {}
    for field, about in fields.items():
        part, _, key = field.partition(".")
        if not about.optional or tables[part].has(key):
            entries[field] = _entry(tables[part], key, about)
    multiplexing = kind == "analog" and _flag(tables["chip"], MULTIPLEXING.partition(".")[2])
    if kind == "digital" and entries["power.idle"].value > entries["power.busy"].value:
        stated = {key: entries[f"power.{key}"].stated for key in ("idle", "busy")}
        raise tables["power"].error("idle", "idle = {idle} exceeds busy = {busy}".format(**stated))
    if kind == "analog":
        _check_analog(tables, entries, multiplexing)
    return Description(kind=kind, name=name, entries=entries, multiplexing=multiplexing, file=top.file)


def _entry(table: TomlTable, key: str, field: Field) -> Quantity:
    entry = table.entry(key, f'{{ value = ..., unit = "{field.unit}", source = "..." }}')
    value, source = entry.number("value"), entry.text("source")
    unit = entry.text("unit")
    entry.finish()
    stated = f"{value:g}" if unit == PLAIN else f"{value:g} {unit}"
    if not source.strip():
        raise table.error(key, f"{key} = {stated} has an empty source: say where the number is from")
    try:
        found = convert(value, unit, field.unit)
    except InputError as error:
        raise table.error(key, f"{key}: {error}") from None
    if field.whole and found != round(found):
        raise table.error(key, f"{key} = {stated} must be a whole number")
    if found < 0 or (found == 0 and not field.zero):
        raise table.error(key, f"{key} = {stated} must be {'at least' if field.zero else 'above'} 0")
    if field.most is not None and found > field.most:
        raise table.error(key, f"{key} = {stated} must be at most {field.most:g}")
    return Quantity(value=found, stated=stated, source=source)


def _flag(table: TomlTable, key: str) -> bool:
    entry = table.entry(key, '{ value = true, source = "..." }')
    value, _ = entry.flag("value"), entry.text("source")
    entry.finish()
    return value


def _check_analog(tables: dict[str, TomlTable], entries: Mapping[str, Quantity], multiplexing: bool) -> None:
    if entries["tile.array_time"].value + entries["tile.conversion_time"].value == 0:
        raise tables["tile"].error("array_time", "array_time and conversion_time are both 0: an operation takes time")
    if entries["tile.columns_per_adc"].value > entries["tile.columns"].value:
        stated = {key: entries[f"tile.{key}"].stated for key in ("columns_per_adc", "columns")}
        raise tables["tile"].error("columns_per_adc", "columns_per_adc = {columns_per_adc} exceeds columns = {columns}"
                                   .format(**stated))  # fmt: skip
    missing = [key for key in ("programming_time", "programming_energy") if f"tile.{key}" not in entries]
    if multiplexing and missing:
        raise tables["chip"].error(
            "time_multiplexing", f"time_multiplexing needs [tile] {' and '.join(missing)}: tiles are programmed anew"
        )
