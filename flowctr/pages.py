"""What the HTML pages share: their template, their colours, and figures drawn in them."""

import io
import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

DASH = "–"

# Okabe-Ito colours as (on white, on dark): 3:1 against their background, and apart from each other in every common
# colour blindness.
COLORS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#e69f00"),
    ("#009e73", "#009e73"),
    ("#cc79a7", "#cc79a7"),
    ("#000000", "#f0e442"),
)
# Matplotlib draws with these stand-ins; `svg` turns them into the page's CSS colours, which know light and dark.
INK, LINE = "#fe0000", "#fe0001"
COLOR_INKS = tuple(f"#fe01{i:02x}" for i in range(len(COLORS)))
CSS_COLORS = {INK: "var(--ink)", LINE: "var(--line)"} | {ink: f"var(--run-{i})" for i, ink in enumerate(COLOR_INKS)}
STYLE = {
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: small, sharp, in the page's font
    "svg.hashsalt": "flowctr",  # equal results give an equal page
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a column name is a "$"
    "xtick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
}


def svg(figure: Figure, description: str) -> Markup:
    """Renders a figure as inline SVG in the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    source = buffer.getvalue()
    source = source[source.index("<svg ") :].replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    for stand_in, css in CSS_COLORS.items():
        source = source.replace(f": {stand_in}", f": {css}")
    return Markup(re.sub(r' id="[^"]+_\d+"', "", source))  # nothing refers to these, and they repeat in every figure


def shown(value: Any, spec: str = "") -> str:
    """Formats a value, a dash for what is not there."""
    return DASH if value is None else format(value, spec) if spec else str(value)


def breakable(name: str) -> Markup:
    """Lets a long name break after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes a page that needs no other file and no network; it is there as a whole or not at all.

    Args:
        path: The file, in a folder that is created if needed; an older page is replaced.
        template: Name of its template.
        **values: What the template shows.

    Returns:
        The path.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "breakable": breakable}
    page = environment.get_template(template).render(**values, colors=COLORS)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
