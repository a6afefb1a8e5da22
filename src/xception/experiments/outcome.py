"""What an experiment's results say: its arms in summary, each contrast judged, and whether the claim held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xception.experiments.experiment import Arm, Experiment, ScaleName
from xception.experiments.judge import Judged, judge, overall
from xception.experiments.results import Results
from xception.experiments.table3 import Rates

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an experiment found. `arms` are summaries, as ``--json`` prints them."""

    experiment: str
    scale: str
    claim: str
    held: bool | None
    why: str
    arms: tuple[Mapping[str, Any], ...]
    contrasts: tuple[Judged, ...]
    remark: str
    folder: Path
    report: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "claim": self.claim,
            "held": self.held,
            "arms": [dict(arm) for arm in self.arms],
            "experiment": self.experiment,
            "scale": self.scale,
            "why": self.why,
            "contrasts": [judged.to_dict() for judged in self.contrasts],
            "remark": self.remark,
            "out": str(self.folder),
            "report": str(self.report),
        }


def outcome_of(experiment: Experiment, results: Results, arms: Sequence[Arm], folder: Path) -> Outcome:
    """What the results say; nothing is written."""
    assert results.about is not None
    scale: ScaleName = results.about["scale"]
    lines = {arm.name: results.of(arm.name) for arm in arms}
    contrasts = experiment.contrasts(scale, [arm.name for arm in arms])
    judged = tuple(judge(contrast, lines, experiment.figure) for contrast in contrasts)
    held, why = overall(judged)
    return Outcome(
        experiment=experiment.name,
        scale=scale,
        claim=experiment.claim,
        held=held,
        why=why,
        arms=tuple(summary(arm, lines[arm.name]) for arm in arms),
        contrasts=judged,
        remark=experiment.scales[scale].remark,
        folder=folder,
        report=folder / REPORT,
    )


def summary(arm: Arm, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An arm's mean and spread (sample deviation over seeds, None for a single one) of each figure, 0 to 1."""
    about: dict[str, Any] = {
        "name": arm.name, "parameters": lines[0]["parameters"] if lines else None,
        "top1_mean": None, "top1_std": None, "seeds": len(lines),
    }  # fmt: skip
    if not lines:
        return about
    for figure in lines[0]["figures"]:
        values = [line["figures"][figure] for line in lines]
        about[f"{figure}_mean"] = float(np.mean(values))
        about[f"{figure}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return about | {"multiply_adds": lines[0]["multiply_adds"], "label": arm.label}


def rates_outcome(experiment: Rates, results: Results, folder: Path) -> Outcome:
    """As `outcome_of`, of Table 3."""
    assert results.about is not None
    held, why = experiment.judge(results)
    scale: ScaleName = results.about["scale"]
    return Outcome(
        experiment=experiment.name,
        scale=scale,
        claim=experiment.claim,
        held=held,
        why=why,
        arms=tuple(experiment.summaries(results)),
        contrasts=(),
        remark=experiment.remarks[scale],
        folder=folder,
        report=folder / REPORT,
    )
