"""TOML files read strictly: every key must be asked for, with its type, and errors name the line."""

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError

LARGEST = 2**63 - 1  # of TOML's whole numbers; Python's reader takes larger ones


class TomlFile:
    """A file's name and text, which errors point into."""

    def __init__(self, path: Path | str, text: str) -> None:
        self.path, self.text = path, text

    def where(self, keys: Sequence[str]) -> str:
        """`file:line` of a key or a table, by its path from the top; of the table around it, where it is absent."""
        for depth in range(len(keys), 0, -1):
            if (line := _line_of(self.text, keys[:depth])) is not None:
                return f"{self.path}:{line}"
        return f"{self.path}"


def _line_of(text: str, keys: Sequence[str]) -> int | None:
    """Where a key is first set: the first line of the statement behind which the parsed file has it."""
    lines = text.splitlines()
    first = 0  # line of the statement that is not complete yet
    for end in range(1, len(lines) + 1):
        try:
            content: Any = tomllib.loads("\n".join(lines[:end]) + "\n")
        except tomllib.TOMLDecodeError:
            continue  # within a statement of several lines
        if _holds(content, keys):
            written = (n for n in range(first, end) if (code := lines[n].strip()) and not code.startswith("#"))
            return next(written) + 1
        first = end
    return None


def _holds(content: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            return False
        content = content[key]
    return True


class TomlTable:
    """Hands out values by key; `finish` refuses the keys that nobody asked for.

    A key without a default is required. Every method raises InputError for a value of another type, naming file, line,
    table and key.
    """

    def __init__(self, file: TomlFile, keys: tuple[str, ...], content: dict[str, Any]) -> None:
        self.file = file
        self._keys, self._content = keys, content
        self._asked: list[str] = []

    def error(self, key: str, said: str) -> InputError:
        """An error about a key of this table."""
        table = f" [{'.'.join(self._keys)}]" if self._keys else ""
        return InputError(f"{self.file.where((*self._keys, key))}:{table} {said}")

    def finish(self) -> None:
        """Raises InputError if the table has a key that was not asked for."""
        self.only(self._asked)

    def only(self, keys: Sequence[str]) -> None:
        """Raises InputError if the table has another key than these."""
        for key in self._content:
            if key not in keys:
                raise self.error(key, f"unknown key {key!r}; valid are {', '.join(keys)}")

    def has(self, key: str) -> bool:
        """Whether the table holds a key."""
        return key in self._content

    def entry(self, key: str, form: str) -> "TomlTable":
        """A required table within a line; `form` shows what one looks like."""
        value = self._take(key)
        if not isinstance(value, dict):
            raise self._wrong(key, value, form)
        return TomlTable(self.file, (*self._keys, key), value)

    def table(self, key: str, *, required: bool = False) -> "TomlTable":
        """A table of this one, empty if it is absent."""
        value = self._take(key, *(() if required else ({},)))
        if not isinstance(value, dict):
            raise self._wrong(key, value, f"a table: [{key}]")
        return TomlTable(self.file, (*self._keys, key), value)

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
                raise self.error(key, f"{key}: unknown {value!r}; use {', '.join(valid)}")
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
            raise self.error(key, f"lacks {key!r}")
        return default[0]

    def _list(self, key: str, *default: Sequence[Any]) -> list[Any]:
        value = self._take(key, *default)
        if not isinstance(value, list | tuple):
            raise self._wrong(key, value, "a list")
        return list(value)

    def _different(self, key: str, values: list[Any]) -> list[Any]:
        for index, value in enumerate(values):
            if value in values[:index]:
                raise self.error(key, f"{key} repeats {value!r}; name every value once")
        return values

    def _wrong(self, key: str, value: Any, wanted: str) -> InputError:
        return self.error(key, f"{key} = {value!r} must be {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) <= LARGEST)


def read_toml(path: Path) -> TomlTable:
    """The top table of a file.

    Raises:
        InputError: if it cannot be read, or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not readable as TOML ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_toml(text, path)


def parse_toml(text: str, path: Path | str) -> TomlTable:
    """The top table of a file's text; `path` is what errors name.

    Raises:
        InputError: if it is not TOML.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not readable as TOML ({error})") from None
    return TomlTable(TomlFile(path, text), (), content)
