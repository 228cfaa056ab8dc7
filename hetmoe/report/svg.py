"""An SVG file as a part of a page."""

import html
import re

_TITLE_AND_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)  # XML declaration and document type, with its address
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_ID = re.compile(r'\bid="([^"]+)"')
_REFERENCE = re.compile(r'(href="#|url\(#)([^")]+)')


def inline(svg: str, prefix: str, label: str) -> str:
    """The `<svg>` element with ids of its own in the page, named for those who do not see it, and free to scale."""
    svg = _METADATA.sub("", _TITLE_AND_HEAD.sub("", svg, count=1), count=1)
    svg = _ID.sub(lambda m: f'id="{prefix}.{m[1]}"', svg)
    svg = _REFERENCE.sub(lambda m: f"{m[1]}{prefix}.{m[2]}", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1).strip()
