"""The experiments by name. Importing this file imports PyTorch; the command line's names stand in `cli.reproduce`."""

from __future__ import annotations

from xception.experiments import figure9, figure10, spectrum, table1, table2, table3
from xception.experiments.experiment import Experiment
from xception.experiments.table3 import Rates
from xception.models.fields import unknown_name

EXPERIMENTS: dict[str, Experiment | Rates] = {
    room.EXPERIMENT.name: room.EXPERIMENT for room in (table1, table2, table3, figure9, figure10, spectrum)
}


def find_experiment(name: str) -> Experiment | Rates:
    """The experiment of that name; `ConfigError` if there is none."""
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
