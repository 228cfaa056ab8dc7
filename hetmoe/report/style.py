"""Colours, markers and line styles of the figures: told apart without colour vision, and in black and white."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hetmoe.report.groups import Line

# Okabe and Ito's colour-blind safe palette without its yellow, too pale for lines on white; then a violet and a brown
# that are as far from these, whatever the colour vision, as these are from each other.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#D55E00", "#000000", "#6622EE", "#662200",
)  # fmt: skip
DIGITAL_COLOUR = "#595959"  # the reference line; no nearer to any of COLOURS than they are to each other
SEQUENTIAL = "cividis"
CHOSEN_MARKERS = ("o", "s", "^", "D", "v", "P")  # experts of a score map that stay digital, by fraction

# What is known to be swept looks the same in every report.
_KNOWN = {
    "experts_analog": ("#D55E00", "o"),
    "all_analog": ("#000000", "X"),
    "max_neuron_norm": ("#0072B2", "s"),
    "router_norm": ("#E69F00", "D"),
    "activation_frequency": ("#009E73", "^"),
    "activation_weight": ("#56B4E9", "P"),
    "random": ("#CC79A7", "v"),
    "noise_sensitivity": ("#6622EE", "<"),
    "measured": ("#662200", "p"),
}
_OTHER_MARKERS = (">", "*", "h", "d", "8", "+", "x")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (6, 1, 1, 1, 1, 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineStyle:
    """How a line is drawn."""

    colour: str
    marker: str
    dash: Any
    filled: bool

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of a plotted line."""
        face = self.colour if self.filled else "white"
        return {"color": self.colour, "marker": self.marker, "ls": self.dash, "mfc": face, "ms": 5, "lw": 1.5}


def placement_colours(names: Sequence[str]) -> dict[str, str]:
    """Rules and placements that are known have the same colour in every figure; others take what is left."""
    known = {name: _KNOWN.get(name.replace(" ", "_")) for name in names}
    found = {name: look[0] for name, look in known.items() if look is not None}
    free = [*(c for c in COLOURS if c not in found.values()), *COLOURS]
    others = [name for name in names if name not in found]
    return found | {name: free[index % len(free)] for index, name in enumerate(others)}


def line_styles(lines: Sequence[Line]) -> dict[Line, LineStyle]:
    """Colour and marker tell placements apart; line style and filling tell fractions of one rule apart."""
    names = list(dict.fromkeys(line.placement for line in lines))
    looks = {name: _KNOWN[name] for name in names if name in _KNOWN}
    colours = placement_colours(names)
    others = [name for name in names if name not in _KNOWN]
    for index, name in enumerate(others):
        looks[name] = (colours[name], _OTHER_MARKERS[index % len(_OTHER_MARKERS)])
    fractions = sorted({line.fraction for line in lines if line.fraction is not None})
    styles: dict[Line, LineStyle] = {}
    for line in lines:
        rank = 0 if line.fraction is None else fractions.index(line.fraction)
        colour, marker = looks[line.placement]
        styles[line] = LineStyle(
            colour=colour, marker=marker, dash=_DASHES[rank % len(_DASHES)], filled=rank % 2 == 0
        )  # fmt: skip
    return styles
