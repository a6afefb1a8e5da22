"""Drawings of a report: SVG whose colours are CSS variables, so that they follow a light or a dark page.

matplotlib's `Figure` is used directly; there is no pyplot, and so no global figure. No text from outside is
drawn: names of classes stand in the page itself, where the browser has the fonts for every script.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from xception.evaluation.figures import CalibrationBin

# Colours that nothing else uses stand for the page's CSS variables and are replaced in the finished SVG.
_INK, _FAINT, _LINE, _SECOND = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {_INK: "var(--ink-2)", _FAINT: "var(--rule)", _LINE: "var(--accent)", _SECOND: "var(--second)"}
# What the variables are on a light page, for a drawing that stands alone.
_LIGHT = {_INK: "#525c6b", _FAINT: "#dfe3e9", _LINE: "#2f6feb", _SECOND: "#d6780a"}
# Many lines at once: told apart with most kinds of colour vision, and visible on light and dark pages alike.
PALETTE = (
    "#3b82d6", "#d6780a", "#1f9e77", "#c9518f", "#8a63c9", "#a08a10", "#5f9ea8", "#b5533c", "#7f8896", "#4fae3a",
    "#d19a66", "#6a7fdb",
)  # fmt: skip
FAINT = _FAINT
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 10,
}
_MAX_HEAT_MAP_SIDE = 256


def curves(
    epochs: Sequence[int],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    percent: bool = False,
    logarithmic: bool = False,
) -> str:
    """One or two lines over the epochs as an SVG element; NaN leaves a gap. `percent` shows 0..1 as 0..100 %."""

    def draw(axes: Axes) -> None:
        for (name, values), color in zip(series.items(), (_LINE, _SECOND), strict=False):
            marker = "o" if sum(map(math.isfinite, values)) <= 25 else None
            axes.plot(epochs, values, color=color, label=name, linewidth=1.8, marker=marker, markersize=3.5)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        if logarithmic:
            axes.set_yscale("log")
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.grid(axis="y", color=_FAINT, linewidth=0.6)
        if len(series) > 1:
            axes.legend(frameon=False)

    return drawing(draw, (4.6, 2.9), f"{title} by epoch")


def reliability(bins: Sequence[CalibrationBin]) -> str:
    """Accuracy against confidence as an SVG element; a calibrated network's bars end at the diagonal."""

    def draw(axes: Axes) -> None:
        filled = [b for b in bins if b.count]
        width = bins[0].upper - bins[0].lower
        middles = [(b.lower + b.upper) / 2 for b in filled]
        axes.bar(middles, [b.accuracy for b in filled], width=0.92 * width, color=_LINE, alpha=0.55)
        # The share of the samples in each bin is the size of its dot: a bar of three samples proves little.
        total = sum(b.count for b in filled)
        sizes = [8 + 160 * b.count / total for b in filled]
        axes.scatter([b.confidence for b in filled], [b.accuracy for b in filled], s=sizes, color=_SECOND, zorder=3)
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("confidence")
        axes.set_ylabel("share that is right")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.04)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.grid(axis="y", color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)

    return drawing(draw, (4.6, 3.6), "reliability diagram: accuracy against confidence")


def heat_map(shares: NDArray[np.float64]) -> str:
    """A square matrix of 0..1 as a PNG in a data URI, transparent at 0, at most 256 cells a side.

    A larger one is reduced by the greatest value of each block, as a mean would hide single confusions.
    """
    side = len(shares)
    step = math.ceil(side / _MAX_HEAT_MAP_SIDE)
    padded = np.zeros((math.ceil(side / step) * step,) * 2)
    padded[:side, :side] = shares
    blocks = padded.reshape(len(padded) // step, step, len(padded) // step, step).max(axis=(1, 3))
    # The root lifts small shares, which are what one looks for.
    alpha = np.round(255 * np.sqrt(np.clip(blocks, 0, 1))).astype(np.uint8)
    pixels = np.empty((*blocks.shape, 4), np.uint8)
    pixels[...] = (214, 69, 65, 0)
    pixels[np.eye(len(blocks), dtype=bool)] = (47, 111, 235, 0)
    pixels[..., 3] = alpha
    return data_uri(Image.fromarray(pixels, "RGBA"))


def data_uri(image: Image.Image) -> str:
    """The image as PNG in a ``data:`` address."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def standing_alone(svg: str) -> str:
    """A drawing as the contents of a file: with the colours of a light page in place of a page's variables."""
    for color, variable in _VARIABLES.items():
        svg = svg.replace(variable, _LIGHT[color])
    return svg.replace("<svg ", '<svg style="font-family: sans-serif" ', 1)


def drawing(draw: Callable[[Axes], None], size: tuple[float, float], label: str) -> str:
    """What `draw` puts on the axes, as an SVG element `size` inches wide and high; `label` is for who cannot see it."""
    # Ids are hashes of what they name and of the salt: the label keeps the plots of one page apart.
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": label}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # Left out: a fixed size (the page's width decides, by the viewBox), fonts (the page has its own), the
    # matplotlib version's metadata, a style that would reach the whole page, and ids that nothing refers to.
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'(width|height)="[^"]*" ?', "", opening)
    rest = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r' id="[a-zA-Z0-9.]+_[0-9]+"|font-family: [^;]*; ', "", rest)
    svg = f'{opening} role="img" aria-label="{label}">{rest}'
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.strip()
