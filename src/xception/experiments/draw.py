"""Drawings of an experiment: learning curves with their spread over seeds, final figures with intervals, lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from xception.evaluation.plots import FAINT, PALETTE, drawing
from xception.experiments.experiment import Arm, Axis
from xception.experiments.judge import interval, sample_of
from xception.experiments.results import Line

Lines = Mapping[str, Sequence[Line]]


def color_of(number: int) -> str:
    """The colour of an arm, by its place among them."""
    return PALETTE[number % len(PALETTE)]


def learning_curves(arms: Sequence[Arm], lines: Lines, figure: str, title: str) -> str:
    """The validation figure over the epochs: the mean over seeds, in a band from the least to the greatest.

    An SVG element; empty where no arm has such figures.
    """
    found: dict[int, tuple[Any, Any]] = {}
    for number, arm in enumerate(arms):
        curves = [[record.get(f"val_{figure}") for record in line["history"]] for line in lines[arm.name]]
        curves = [curve for curve in curves if curve and None not in curve]
        if curves:
            length = min(map(len, curves))
            found[number] = np.arange(1, length + 1), np.array([curve[:length] for curve in curves])
    if not found:
        return ""

    def draw(axes: Axes) -> None:
        for number, (epochs, values) in found.items():
            color, label = color_of(number), arms[number].name
            axes.plot(epochs, values.mean(axis=0), color=color, label=label, linewidth=1.8, marker="o", markersize=3)
            if len(values) > 1:
                axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, linewidth=0)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.legend(frameon=False, fontsize=7.5, ncols=2 if len(found) > 6 else 1)

    return drawing(draw, (5.4, 3.6), f"{title} by epoch, mean and range over seeds")


def final_figures(arms: Sequence[Arm], lines: Lines, figure: str, title: str) -> str:
    """Each arm's figure with its 95 % interval, and each seed as a dot; an SVG element."""
    there = [(number, arm) for number, arm in enumerate(arms) if lines[arm.name]]
    if not there:
        return ""

    def draw(axes: Axes) -> None:
        for place, (number, arm) in enumerate(reversed(there)):
            value, low, high = interval([(1.0, sample_of(lines[arm.name], figure))])
            color = color_of(number)
            axes.plot([low, high], [place, place], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
            seeds = [line["figures"][figure] for line in lines[arm.name]]
            axes.plot(seeds, [place] * len(seeds), "o", color=color, markersize=3.5, alpha=0.8)
            axes.plot([value], [place], "|", color=color, markersize=13, markeredgewidth=2)
        axes.set_yticks(range(len(there)), [arm.name for _, arm in reversed(there)])
        axes.set_ylim(-0.6, len(there) - 0.4)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))
        axes.grid(axis="x", color=FAINT, linewidth=0.6)

    return drawing(draw, (5.4, 1.2 + 0.32 * len(there)), f"{title} of each arm with its 95 % interval")


def along(axis: Axis, lines: Lines, figure: str, title: str) -> str:
    """The final figure over what the arms differ in, a line each with 95 % intervals; an SVG element."""
    points = {
        label: [(x, *interval([(1.0, sample_of(lines[arm], figure))])) for x, arm in line if lines.get(arm)]
        for label, line in axis.lines.items()
    }
    points = {label: line for label, line in points.items() if line}
    if not points:
        return ""
    ticks = sorted({x for line in axis.lines.values() for x, _ in line})

    def draw(axes: Axes) -> None:
        for number, (label, line) in enumerate(points.items()):
            x, value, low, high = (np.array(column) for column in zip(*line, strict=True))
            axes.errorbar(
                x * 1.03 ** (number - 1), value, yerr=[value - low, high - value], color=color_of(number), label=label,
                linewidth=1.6, marker="o", markersize=4, capsize=3,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, place: ""))
        axes.set_xlabel(axis.label)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)

    return drawing(draw, (5.4, 3.6), f"{title} by {axis.label}")


def rates(values: Mapping[str, Sequence[float]], title: str) -> str:
    """The rate of each network in each round, as dots, and its median; an SVG element."""

    def draw(axes: Axes) -> None:
        for place, (number, (_, rounds)) in enumerate(reversed(list(enumerate(values.items())))):
            axes.barh([place], [median(rounds)], color=color_of(number), alpha=0.45, height=0.6)
            axes.plot(rounds, [place] * len(rounds), "o", color=color_of(number), markersize=3.5)
        axes.set_yticks(range(len(values)), list(values)[::-1])
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)

    return drawing(draw, (5.4, 1.1 + 0.36 * len(values)), title)
