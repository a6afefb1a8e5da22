"""The page of a search: the history of its trials, how much each setting decides, and the best recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from xception.evaluation.markup import escape, section, table
from xception.evaluation.plots import FAINT, PALETTE, drawing, standing_alone
from xception.evaluation.report import whole_page
from xception.weights.files import atomic_write

if TYPE_CHECKING:
    from optuna import Study

    from xception.experiments.tune import Found


def write_tune_page(path: Path, study: Study, found: Found, importance: Mapping[str, float]) -> None:
    """report.html and, beside it, the plots."""
    trials = study.get_trials(deepcopy=False)
    plots = {"history": history(trials), "importance": importance_bars(importance)}
    for name, svg in plots.items():
        if svg:
            _write_text(path.parent / "plots" / f"{name}.svg", standing_alone(svg) + "\n")
    title = "Settings search"
    facts = f"{found.complete} trials to the end, {found.pruned} stopped early, {found.failed} failed"
    header = f'<header><h1>{title}</h1><p class="facts">{facts}</p><p><b>{escape(told(found))}</b></p></header>'
    drawn = '<div class="plots">' + "".join(f"<figure>{svg}</figure>" for svg in plots.values() if svg) + "</div>"
    best = table(["setting", "best"], [[escape(k), escape(_short(v))] for k, v in found.best_params.items()])
    rows = [
        [
            str(trial.number),
            escape(trial.state.name.lower()),
            "&mdash;" if trial.value is None else f"{100 * trial.value:.2f}",
            escape(", ".join(f"{k} {_short(v)}" for k, v in trial.params.items())),
            escape(trial.user_attrs.get("error", "")),
        ]
        for trial in trials
    ]
    head = ["trial", "state", "validation %", "settings", "error"]
    parts = [
        header,
        section("Trials", drawn),
        section("Best", best),
        section("All trials", table(head, rows)),
    ]
    _write_text(path, whole_page(title, parts))


def told(found: Found) -> str:
    """What was gained, in words."""
    figure = "test_map_at_100" if "test_map_at_100" in found.best_test else "test_top1"
    text = f"Best of validation: {100 * found.best_value:.2f} %"
    if found.base_value is not None:
        text += f", the recipe as given {100 * found.base_value:.2f} %"
    if figure in found.best_test and figure in found.base_test:
        best, base = found.best_test[figure], found.base_test[figure]
        text += f"; on the test images, which chose nothing, {100 * best:.2f} % against {100 * base:.2f} %"
    return text + ". One seed each: differences of the size of seeds' own mean nothing."


def history(trials: Sequence[Any]) -> str:
    """The validation figure of each trial, hollow where it ended early, and the best so far; an SVG element."""
    values = [(t.number, t.value, t.state.name) for t in trials if t.value is not None]
    values += [
        (t.number, t.intermediate_values[max(t.intermediate_values)], t.state.name)
        for t in trials
        if t.state.name == "PRUNED" and t.value is None and t.intermediate_values
    ]
    if not values:
        return ""

    def draw(axes: Axes) -> None:
        for state, face in (("COMPLETE", PALETTE[0]), ("PRUNED", "none")):
            points = [(n, v) for n, v, s in values if s == state]
            if points:
                x, y = zip(*points, strict=True)
                label = "to the end" if state == "COMPLETE" else "stopped early"
                axes.scatter(x, y, s=22, facecolors=face, edgecolors=PALETTE[0], label=label)
        whole = sorted((n, v) for n, v, s in values if s == "COMPLETE")
        if whole:
            x, y = zip(*whole, strict=True)
            axes.step(x, np.maximum.accumulate(y), where="post", color=PALETTE[1], label="best so far")
        axes.set_title("Validation by trial", loc="left", fontweight="bold")
        axes.set_xlabel("trial")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)

    return drawing(draw, (5.4, 3.4), "validation figure of each trial")


def importance_bars(importance: Mapping[str, float]) -> str:
    """How much each setting decides; an SVG element, empty where it is not known."""
    if not importance:
        return ""
    ordered = sorted(importance.items(), key=lambda item: item[1])

    def draw(axes: Axes) -> None:
        axes.barh([name for name, _ in ordered], [value for _, value in ordered], color=PALETTE[2], alpha=0.7)
        axes.set_title("How much each setting decides", loc="left", fontweight="bold")
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.grid(axis="x", color=FAINT, linewidth=0.6)

    return drawing(draw, (5.4, 1.2 + 0.34 * len(ordered)), "importance of each setting")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(stream: BinaryIO) -> None:
        stream.write(text.encode("utf-8"))

    atomic_write(path, write)
