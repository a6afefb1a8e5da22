"""The table of what was reproduced: ``python -m xception.experiments.summary README.md README.ko.md``.

It is made of the results.jsonl of each folder ``experiments/results/NAME-SCALE`` beside the document, judged anew, and
put between two marks. What was not run says so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from xception.errors import ConfigError, DataError
from xception.experiments.catalog import EXPERIMENTS
from xception.experiments.experiment import Arm, Experiment, Task
from xception.experiments.outcome import Outcome, outcome_of, rates_outcome
from xception.experiments.results import Results
from xception.experiments.table3 import Rates

FOLDER = Path("experiments", "results")
BEGIN, END = "<!-- reproduce -->", "<!-- /reproduce -->"
_HEAD = ("| experiment | claim | held | ours |", "| --- | --- | --- | --- |")
_HELD = {True: "yes", False: "no", None: "undecided"}


def read_outcome(folder: Path) -> Outcome:
    """What the results in a folder say. Raises `DataError` where there are none."""
    results = Results.read(folder)
    if results.about is None:
        raise DataError(f"{folder}: no results")
    experiment = EXPERIMENTS[results.about["experiment"]]
    if isinstance(experiment, Rates):
        return rates_outcome(experiment, results, folder)
    return outcome_of(experiment, results, arms_of(experiment, results), folder)


def arms_of(experiment: Experiment, results: Results) -> tuple[Arm, ...]:
    """The arms that the results are of."""
    assert results.about is not None
    if results.about.get("weights"):
        assert experiment.published is not None
        return experiment.published()
    return experiment.arms(results.about["scale"], Task(**results.about["task"]))


def table(folder: Path) -> str:
    """The table, Markdown: a row a folder of results, and one for each experiment that has none."""
    rows = []
    for name in EXPERIMENTS:
        outcomes = [read_outcome(found) for found in sorted(folder.glob(f"{name}-*")) if found.is_dir()]
        rows += [_row(outcome) for outcome in outcomes]
        if not outcomes:
            rows.append(f"| `{name}` | {EXPERIMENTS[name].claim} | not yet run | |")
    return "\n".join([*_HEAD, *rows]) + "\n"


def _row(outcome: Outcome) -> str:
    return f"| `{outcome.experiment}`, {outcome.scale} | {outcome.claim} | {_HELD[outcome.held]} | {_ours(outcome)} |"


def _ours(outcome: Outcome) -> str:
    cells = []
    for arm in outcome.arms:
        if "training_steps_per_second" in arm:
            cells.append(f"{arm['name']} {arm['training_steps_per_second']:.3g} steps/s")
            continue
        figure = "map_at_100" if "map_at_100_mean" in arm else "top1"
        mean, spread = arm[f"{figure}_mean"], arm.get(f"{figure}_std")
        if mean is not None:
            cells.append(f"{arm['name']} {100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}"))
    return ", ".join(cells)


def with_table(text: str, made: str) -> str:
    """`text` with `made` between the two marks. Raises `ConfigError` where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"expected {BEGIN} and, after it, {END}")
    return f"{before}{BEGIN}\n{made}{END}{after}"


def main(paths: Sequence[str]) -> None:
    """Put the table of the results beside each document into it."""
    for path in map(Path, paths):
        if not path.is_file():
            raise SystemExit(f"expected Markdown files with {BEGIN}, got {str(path)!r}")
        root = path.parent if (path.parent / FOLDER).is_dir() else path.parent.parent
        text = path.read_text(encoding="utf-8")
        path.write_text(with_table(text, table(root / FOLDER)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
