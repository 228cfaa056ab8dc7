"""Results on disk, one file per task and chip, so that an interrupted run goes on where it stopped."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError
from hetmoe.evaluate.tasks.names import Metrics
from hetmoe.files import check_new_directory, check_writable, write_text
from hetmoe.models.hf_fields import read_json

FORMAT = "hetmoe-task-result-2"


def digest_of(value: Any) -> str:
    """Identifies plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of results that were all made with the same settings."""

    folder: Path
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def open(self) -> None:
        """Takes up an earlier run's folder, or begins a new one; writes the settings.

        Raises:
            InputError: for a folder that holds something else, or results of other settings.
        """
        path = self.folder / "settings.json"
        if not path.exists():
            check_new_directory(self.folder)
            check_writable(path)
            write_text(path, json.dumps(self.settings, indent=1) + "\n")
            return
        earlier = read_json(path)
        if not isinstance(earlier, dict):
            raise InputError(f"{path}: holds no settings; choose another output folder")
        differing = [
            f"{name} is {_short(earlier.get(name))} there and {_short(self.settings.get(name))} here"
            for name in self.settings | earlier
            if earlier.get(name) != self.settings.get(name)
        ]
        if differing:
            raise InputError(
                f"{self.folder}: holds results of other settings: {'; '.join(differing)}. Choose another output folder"
            )

    def read(self, task: str, chip: str, identity: dict[str, Any]) -> Metrics | None:
        """The result of a task on a chip, if there is one.

        Args:
            task: name.
            chip: `digital` or `seed<i>`.
            identity: what the result depends on beside the settings: digests of questions, plan and key.

        Raises:
            InputError: if there is one that was made of something else.
        """
        path = self._path(task, chip)
        if not path.exists():
            return None
        record = read_json(path)
        if not isinstance(record, dict) or record.get("format") != FORMAT or "metrics" not in record:
            raise InputError(f"{path}: not a result of 'hetmoe tasks'; remove it or choose another output folder")
        if record.get("digest") != self._digest(identity):
            earlier = record.get("identity")
            differing = [k for k in identity if not isinstance(earlier, dict) or earlier.get(k) != identity[k]]
            raise InputError(
                f"{path}: made with other {' and '.join(differing) or 'settings'}; remove it or choose another output "
                "folder"
            )
        return record["metrics"]

    def write(self, task: str, chip: str, identity: dict[str, Any], metrics: Metrics, seconds: float) -> None:
        """Keeps a result, whole or not at all."""
        record = {
            "format": FORMAT,
            "task": task,
            "chip": chip,
            "metrics": metrics,
            "identity": identity,
            "digest": self._digest(identity),
            "settings": self.settings,
            "seconds": round(seconds, 1),
            "provenance": self.provenance,
        }
        write_text(self._path(task, chip), json.dumps(record, indent=1, allow_nan=False) + "\n")

    def _path(self, task: str, chip: str) -> Path:
        return self.folder / "results" / f"{task}-{chip}.json"

    def _digest(self, identity: dict[str, Any]) -> str:
        return digest_of([self.settings, identity])


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "..."
