"""What a point of a sweep is, and what identifies it."""

import dataclasses
import hashlib
import json


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One placement on one piece of hardware with one noise seed."""

    placement: str  # "all_digital", "experts_analog", "all_analog", or a rule's name
    fraction: float | None  # digital fraction; None for placements without a rule
    device: str
    noise_scale: float
    time_s: float | None  # None = programming noise only
    bits: int  # of DACs and ADCs; 0 = ideal converters
    seed_index: int


def point_id(point: SweepPoint) -> str:
    """Identity of a point: a hash of its canonical JSON."""
    content = json.dumps(dataclasses.asdict(point), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
