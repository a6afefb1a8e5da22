"""``xception tune``: a search for settings on DATA."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from xception.cli.output import json_line, percent, printable, table
from xception.cli.train import model_options
from xception.training.allocator import keep_freed_memory
from xception.training.interrupt import StopRequest


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search settings of a recipe on DATA; trials that lag behind end early. Stopped, the same command goes on."""

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """As for train; it needs validation images, or some are kept apart."""
    model: str | None = None
    """Network (see xception models); by default the recipe's own."""
    recipe: str = "small"
    """Where the search begins: a recipe's name or .json file; what is not searched keeps its values."""
    search: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field to search, as in --search learning_rate=0.01..0.5,log --search 'batch_size=64|128'; may be repeated. By
    default learning_rate, weight_decay, momentum, label_smoothing and dropout around the recipe's own."""
    trials: int = 20
    """Trials in all; more can be added later."""
    epochs: int | None = None
    """Epochs a trial; by default the recipe's own."""
    seed: int = 0
    """Decides the split, the order, the weights, and where the search looks."""
    no_prune: FlagCreatePairsOff[bool] = False
    """Let every trial come to its end."""
    model_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of the network's config, as in --model-option middle_modules=4; may be repeated."""
    out: str | None = None
    """Folder for the study, best.json, report.html and runs; by default runs/tune/DATA-MODEL."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line with the best settings and figures."""
    device: str | None = None
    """cpu, cuda, ...; by default cuda where there is one."""
    data_root: str | None = None
    """Where a named data set lies."""
    download: FlagCreatePairsOff[bool] = False
    """Let torchvision download a named data set."""

    def run(self) -> int:
        with StopRequest():
            keep_freed_memory()
            from xception.experiments.tune import tune

            found = tune(
                self.data,
                out=self.out,
                model=self.model,
                recipe=self.recipe,
                model_options=model_options(self.model_option),
                search=self.search,
                trials=self.trials,
                epochs=self.epochs,
                seed=self.seed,
                prune=not self.no_prune,
                data_root=self.data_root,
                download=self.download,
                device=self.device,
                say=_say,
            )
        if self.json:
            json_line(found.to_dict())
            return 0
        from xception.experiments.tune_page import told

        rows = [
            [name, f"{value:.6g}" if isinstance(value, float) else str(value)]
            for name, value in found.best_params.items()
        ]
        print(table(["setting", f"trial {found.best_number}, {percent(found.best_value)}"], rows))
        print(f"\n{told(found)}\nreport: {found.report}")
        print(f"next:   xception train {printable(self.data)} --recipe {printable(str(found.recipe))}")
        return 0


def _say(message: str) -> None:
    sys.stderr.write(f"xception: {printable(message)}\n")
    sys.stderr.flush()
