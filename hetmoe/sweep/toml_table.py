"""A table of a TOML file whose every key must be asked for, with its type."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError

LARGEST = 2**63 - 1  # of TOML's whole numbers; Python's reader takes larger ones


class TomlTable:
    """Hands out values by key; `finish` refuses the keys that nobody asked for.

    A key without a default is required. Every method raises InputError for a value of another type, naming file, table
    and key.
    """

    def __init__(self, source: Path, name: str, content: dict[str, Any]) -> None:
        self._where = f"{source}: [{name}]" if name else f"{source}:"
        self._source, self._content = source, content
        self._asked: list[str] = []

    def finish(self) -> None:
        """Raises InputError if the table has a key that was not asked for."""
        for key in self._content:
            if key not in self._asked:
                raise InputError(f"{self._where} unknown key {key!r}; valid are {', '.join(self._asked)}")

    def table(self, key: str, *, required: bool = False) -> "TomlTable":
        """A table of this one, empty if it is absent."""
        value = self._take(key, *(() if required else ({},)))
        if not isinstance(value, dict):
            raise self._wrong(key, value, f"a table: [{key}]")
        return TomlTable(self._source, key, value)

    def text(self, key: str, *default: str) -> str:
        """Text."""
        value = self._take(key, *default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "text in quotes")
        return value

    def number(self, key: str, *default: float) -> float:
        """A number, whole or not, as a float."""
        value = self._take(key, *default)
        if not _is_number(value):
            raise self._wrong(key, value, "a number")
        return float(value) + 0.0  # -0.0 is 0

    def whole(self, key: str, *default: Any, at_least: int, at_most: int = LARGEST) -> Any:
        """A whole number, or the default as it is."""
        value = self._take(key, *default)
        if key in self._content and (type(value) is not int or not at_least <= value <= at_most):
            limit = "" if at_most == LARGEST else f" and at most {at_most}"
            raise self._wrong(key, value, f"a whole number of at least {at_least}{limit}")
        return value

    def flag(self, key: str, *default: bool) -> bool:
        """True or false."""
        value = self._take(key, *default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def texts(self, key: str, *default: Sequence[str], of: Iterable[str] | None = None) -> list[str]:
        """Different texts, all of them among `of` if that is given."""
        values = self._list(key, *default)
        if not all(isinstance(v, str) for v in values):
            raise self._wrong(key, values, "a list of texts in quotes")
        valid = values if of is None else list(of)
        for value in values:
            if value not in valid:
                raise InputError(f"{self._where} {key}: unknown {value!r}; use {', '.join(valid)}")
        return self._different(key, values)

    def wholes(self, key: str, *default: Sequence[int]) -> list[int]:
        """Different whole numbers of at least 0."""
        values = self._list(key, *default)
        if not all(type(v) is int and 0 <= v <= LARGEST for v in values):
            raise self._wrong(key, values, "a list of whole numbers of at least 0")
        return self._different(key, values)

    def numbers(self, key: str, *default: Sequence[Any], or_text: str | None = None) -> list[Any]:
        """Different numbers, as floats; one of them may be the text `or_text`."""
        values = self._list(key, *default)
        if not all(_is_number(v) or (or_text is not None and v == or_text) for v in values):
            raise self._wrong(key, values, "a list of numbers" + ("" if or_text is None else f" or {or_text!r}"))
        return self._different(key, [v if isinstance(v, str) else float(v) + 0.0 for v in values])

    def _take(self, key: str, *default: Any) -> Any:
        self._asked.append(key)
        if key in self._content:
            return self._content[key]
        if not default:
            raise InputError(f"{self._where} lacks {key!r}")
        return default[0]

    def _list(self, key: str, *default: Sequence[Any]) -> list[Any]:
        value = self._take(key, *default)
        if not isinstance(value, list | tuple):
            raise self._wrong(key, value, "a list")
        return list(value)

    def _different(self, key: str, values: list[Any]) -> list[Any]:
        for index, value in enumerate(values):
            if value in values[:index]:
                raise InputError(f"{self._where} {key} repeats {value!r}; name every value once")
        return values

    def _wrong(self, key: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self._where} {key} = {value!r} must be {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) <= LARGEST)
