"""How pictures look: one style, a colour-blind-safe palette, PNG for files and SVG that follows the page's colours."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation import Group

INK, MUTED, RULE = "#1f2328", "#59626d", "#d3d9e0"
PAPER = "#fefefe"
"""Almost white, so that the page can tell it from the white of a picture."""

COLOURS: dict[Group, str] = {
    "tuned": "#0b5cad",
    "method": "#00785a",
    "stock": "#c8460c",
    "corrected": "#96600a",
    "adaptive": "#8a4a9c",
    "other": "#6e7781",
}
"""Blue, bluish green, vermilion, orange and purple after Okabe and Ito, darkened to be readable as text.

Marks and dashes differ too.
"""

DPI = 150
RASTER_DPI = 110
"""Of the dots and curves that are pixels inside an SVG."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "fewstep",
    "axes.unicode_minus": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save inside; the user's own matplotlib settings neither matter nor change."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in a script that the font lacks shows boxes; that is no reason to fail or to warn.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def png(figure: Figure) -> bytes:
    """The figure as PNG at `DPI`."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as inline SVG: no fixed size, text in the page's font, our colours as CSS variables.

    Args:
        figure: drawn under `style`.
        name: makes the ids unique in the page (letters only).
        description: plain text for screen readers, without markup.
    """
    buffer = StringIO()
    figure.savefig(
        buffer, format="svg", dpi=RASTER_DPI, transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = _unsized(text)
    text = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1system-ui, sans-serif", text)
    for variable, colour in {"ink": INK, "muted": MUTED, "rule": RULE, "paper": PAPER, **COLOURS}.items():
        text = text.replace(f": {colour}", f": var(--{variable})")
    label = re.sub(r"[<>&\"]", " ", description)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()


def _unsized(text: str) -> str:
    head, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def bare(axes: Axes) -> None:
    """No frame, no ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
