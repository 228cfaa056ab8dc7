"""From a figure to files: the same bytes for the same sweep."""

import io
from collections.abc import Callable
from typing import TypeVar

import matplotlib as mpl
import matplotlib.figure

T = TypeVar("T")

_SETTINGS = {
    "svg.hashsalt": "hetmoe",  # else ids are drawn at random
    "svg.fonttype": "path",  # the same look without our fonts
    "text.parse_math": False,  # a name with $ is no formula
    "axes.formatter.use_mathtext": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "path.simplify_threshold": 0.0,
}


def with_settings(draw: Callable[[], T]) -> T:
    """What `draw` returns, drawn under the report's settings and not under the user's."""
    with mpl.rc_context():
        mpl.rcdefaults()
        for name, value in _SETTINGS.items():
            mpl.rcParams[name] = value  # pyright: ignore[reportArgumentType]
        return draw()


def to_files(figure: matplotlib.figure.Figure) -> tuple[bytes, bytes]:
    """(PNG, SVG), the latter without the time of its making."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is found; finding it again for each file takes most of the time
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    figure.savefig(svg, format="svg", dpi=130, metadata={"Date": None})
    return png.getvalue(), svg.getvalue()
