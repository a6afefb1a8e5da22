"""``xception reproduce``: the paper's tables and figures, each as one command."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xception.cli.output import json_line, percent, printable, table
from xception.training.allocator import keep_freed_memory
from xception.training.interrupt import StopRequest

if TYPE_CHECKING:
    from xception.experiments.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Repeat a table or figure of the paper: arms, seeds, plots, and whether the claim held, with confidence.

    What is finished in --out is not run again, what was stopped goes on; where everything is finished, plots and page
    are drawn anew from results.jsonl.
    """

    what: Annotated[
        Positional[Literal["table1", "table2", "table3", "figure9", "figure10", "spectrum"]],
        arg(metavar="{table1,table2,table3,figure9,figure10,spectrum}"),
    ]
    """Which of them."""
    scale: Literal["smoke", "laptop", "paper"] | None = None
    """smoke: digits, minutes, no evidence; laptop: Fashion-MNIST, small networks, under an hour or so; paper: the
    published network and recipe on --data, with GPUs. By default that of --out, else smoke."""
    data: str | None = None
    """Data in place of the scale's own: as for train. Paper scale needs it: a folder with train/ and val/."""
    seeds: int | None = None
    """Seeds an arm (for table3: rounds); more can be added to results that are there."""
    epochs: int | None = None
    """Epochs in place of the scale's own."""
    weights: Literal["published"] | None = None
    """table1: evaluate published weights in place of training."""
    blacklist: str | None = None
    """Leave out the validation images of ImageNet that this file of the ILSVRC development kit lists."""
    out: str | None = None
    """Folder for results.jsonl, plots, report.html and runs; by default runs/reproduce/NAME-SCALE."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line with claim, held, arms and more."""
    device: str | None = None
    """cpu, cuda, ...; by default cuda where there is one."""
    data_root: str | None = None
    """Where a named data set lies."""
    download: FlagCreatePairsOff[bool] = False
    """Let torchvision download a named data set."""

    def run(self) -> int:
        with StopRequest():  # already while torch is imported
            keep_freed_memory()
            from xception.experiments.reproduce import reproduce

            outcome = reproduce(
                self.what,
                self.out,
                say=_say,
                scale=self.scale,
                data=self.data,
                seeds=self.seeds,
                epochs=self.epochs,
                weights=self.weights,
                blacklist=self.blacklist,
                device=self.device,
                data_root=self.data_root,
                download=self.download,
            )
        if self.json:
            json_line(outcome.to_dict())
        else:
            _print(outcome)
        return 0


def _say(message: str) -> None:
    sys.stderr.write(f"xception: {printable(message)}\n")
    sys.stderr.flush()


def _print(outcome: Outcome) -> None:
    from xception.experiments.page import sentence

    head, rows = _table(outcome.arms)
    print(table(head, rows))
    print(f"\nclaim: {outcome.claim}")
    for judged in outcome.contrasts:
        print(f"  {judged.verdict}: {judged.says}" + (f" ({_points(judged)})" if judged.value is not None else ""))
    print(f"{sentence(outcome)}\n{outcome.remark}\nreport: {outcome.report}")


def _table(arms: Any) -> tuple[list[str], list[list[str]]]:
    if arms and "training_steps_per_second" in arms[0]:
        head = ["network", "parameters", "steps/s", "images/s"]
        return head, [
            [
                a["name"],
                f"{a['parameters']:,}",
                f"{a['training_steps_per_second']:.3g}",
                f"{a['inference_images_per_second']:.3g}",
            ]
            for a in arms
        ]
    figure = "map_at_100" if any("map_at_100_mean" in arm for arm in arms) else "top1"
    head = ["arm", "parameters", "MAP@100" if figure == "map_at_100" else "top-1", "+-", "seeds"]
    return head, [
        [
            a["name"],
            "" if a["parameters"] is None else f"{a['parameters']:,}",
            percent(a.get(f"{figure}_mean")),
            percent(a.get(f"{figure}_std")),
            str(a["seeds"]),
        ]
        for a in arms
    ]


def _points(judged: Any) -> str:
    return f"{100 * judged.value:+.2f} points, 95 %: {100 * judged.low:+.2f} to {100 * judged.high:+.2f}"
