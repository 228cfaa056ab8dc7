"""Colours that stay apart for the colour-blind, and styles that stay apart without colour."""

import itertools

import matplotlib.colors
import numpy as np
import pytest

from hetmoe.placement.scores import RULES
from hetmoe.report.groups import Line
from hetmoe.report.style import COLOURS, DIGITAL_COLOUR, line_styles

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
VISION = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}


def cielab(colour, matrix):
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.clip(matrix @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_any_two_colours_differ(vision) -> None:
    """A difference of 2.3 in CIELAB is just noticeable."""
    seen = [cielab(colour, VISION[vision]) for colour in (*COLOURS, DIGITAL_COLOUR)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


def test_every_colour_stands_out_from_white() -> None:
    for colour in (*COLOURS, DIGITAL_COLOUR):
        assert cielab("white", np.eye(3))[0] - cielab(colour, np.eye(3))[0] > 25


def test_lines_differ_in_marker_or_dash_and_placements_in_colour() -> None:
    lines = [Line(placement=name, fraction=None) for name in ("experts_analog", "all_analog")]
    lines += [Line(placement=rule, fraction=f) for rule in RULES for f in (0.0625, 0.125, 0.25, 0.5)]
    styles = line_styles(lines)
    looks = {(s.marker, str(s.dash)) for s in styles.values()}
    assert len(looks) == len(lines)
    colours = {s.colour for s in styles.values()}
    assert len(colours) == 2 + len(RULES) and colours <= set(COLOURS)


def test_unknown_rules_get_free_colours_first() -> None:
    names = ["max_neuron_norm", "new", "another", "random", "third"]
    styles = line_styles([Line(placement=name, fraction=None) for name in names])
    assert len({s.colour for s in styles.values()}) == len({s.marker for s in styles.values()}) == len(names)
