"""Reading `config.json`: fields by name and kind, so that an error says what was found and what is expected."""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError

_REQUIRED = object()
_MAX_JSON = 50_000_000  # bytes; the index of DeepSeek-V3 has 9 million


class Fields:
    """The fields of a config, each looked up once; what nobody looked up is unknown (`refuse_unread`)."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        if not isinstance(config, Mapping):
            raise InputError(f"{source}: expected a JSON object, found {type(config).__name__}")
        self._config, self._read, self.source = config, set[str](), source

    def get(self, kind: type, *names: str, default: Any = _REQUIRED) -> Any:
        """The value under any of `names` (other spellings of one field); `null` counts as absent.

        Raises:
            InputError: if it is absent and there is no default, is not of `kind`, or two spellings contradict.
        """
        self._read.update(names)
        given = {n: self._config[n] for n in names if self._config.get(n) is not None}
        if not given:
            if default is _REQUIRED:
                others = "".join(f" (or {n!r})" for n in names[1:])
                raise InputError(f"{self.source}: field {names[0]!r}{others} is missing; it must be {kind.__name__}")
            return default
        values = [self._typed(name, value, kind) for name, value in given.items()]
        if any(v != values[0] for v in values[1:]):
            raise InputError(f"{self.source}: {' and '.join(f'{n}={v!r}' for n, v in given.items())} contradict")
        return values[0]

    def _typed(self, name: str, value: Any, kind: type) -> Any:
        if kind is float and type(value) is int and abs(value) < 2**53:  # exact as a float
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{self.source}: {name}={value!r} must be {kind.__name__}")
        return value

    def only(self, name: str, *supported: Any) -> None:
        """Refuses values other than `supported`; an absent field and `null` pass."""
        self._read.add(name)
        value = self._config.get(name)
        if value is not None and not any(type(value) is type(s) and value == s for s in supported):
            allowed = " or ".join(repr(s) for s in supported) or "null"
            raise InputError(f"{self.source}: {name}={value!r} is not supported (supported: {allowed})")

    def ignore(self, *names: str) -> None:
        """Fields that do not change what the model computes."""
        self._read.update(names)

    def refuse_unread(self) -> None:
        """Refuses what nobody asked for: an option that is not known is not silently dropped."""
        for name, value in self._config.items():
            if name not in self._read and value is not None:
                raise InputError(
                    f"{self.source}: {name}={value!r} is not known for this model_type; if it does not change what the "
                    "model computes, remove it from the file"
                )


def read_json(path: Path) -> Any:
    """Parses a JSON file.

    Raises:
        InputError: if it is absent, unreadable, not UTF-8, not JSON, or nested too deep.
    """
    try:
        size = path.stat().st_size
        if size <= _MAX_JSON:
            return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:  # not JSON, not UTF-8, nested too deep, not readable
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    raise InputError(f"{path}: has {size:,} bytes, more than the {_MAX_JSON:,} that such a file may have")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"{repeated_name(pairs)!r} appears twice")
    return result


def repeated_name(pairs: list[tuple[str, Any]]) -> str:
    """The first name that a JSON object repeats."""
    counts = collections.Counter(name for name, _ in pairs)
    return next(name for name, count in counts.items() if count > 1)
