"""One call from an experiment's name to its results, plots and page: the Python side of ``xception reproduce``.

The folder holds results.jsonl, plots and report.html, and in ``runs/`` the run folder of each arm and seed. What is
finished is not run again, what was stopped goes on, and where everything is finished nothing is read but results.jsonl:
the same command draws plots and page anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xception.data.labels import printable
from xception.data.sources import open_source
from xception.errors import ConfigError
from xception.experiments.catalog import find_experiment
from xception.experiments.experiment import SCALES, Arm, Experiment, Scale, ScaleName, Task
from xception.experiments.folder import held_folder
from xception.experiments.outcome import Outcome, outcome_of, rates_outcome
from xception.experiments.results import Results, changed
from xception.experiments.table3 import Rates, measure_rates
from xception.experiments.trial import Place, run_published, run_trial, setting_of
from xception.training.interrupt import Stopped, StopRequest
from xception.weights.files import shown

Say = Callable[[str], None]
FIRST_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a person asked for; None is what the folder says, or else the scale."""

    scale: ScaleName | None = None
    data: str | None = None
    seeds: int | None = None
    epochs: int | None = None
    weights: str | None = None
    blacklist: str | None = None
    data_root: str | None = None
    download: bool = False
    device: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, value in (("seeds", self.seeds), ("epochs", self.epochs)):
            if value is not None and not (type(value) is int and 1 <= value <= 1000):
                raise ConfigError(f"{name} must be from 1 to 1000; got {value!r}")
        if self.scale is not None and self.scale not in SCALES:
            raise ConfigError(f"scale must be one of {', '.join(SCALES)}; got {self.scale!r}")
        if self.weights not in (None, "published"):
            raise ConfigError(f"weights must be 'published' or left out; got {self.weights!r}")


def reproduce(name: str, out: str | Path | None = None, *, say: Say = lambda _: None, **asked: Any) -> Outcome:
    """Run an experiment, or what is left of it, and write its plots and page; `asked` are fields of `Asked`.

    Raises an `XceptionError` with one line for wrong input, and where `out` holds results of other settings, which
    are never mixed; `Stopped` after SIGINT or SIGTERM, when the same call goes on where it was stopped.
    """
    experiment = find_experiment(name)
    try:
        wanted = Asked(**asked)
    except TypeError as error:
        raise ConfigError(str(error)) from None
    if isinstance(experiment, Rates):
        refuse = [n for n in ("data", "epochs", "weights", "blacklist") if getattr(wanted, n) is not None]
        if refuse:
            raise ConfigError(f"{name} trains nothing and needs no {', '.join(refuse)}")
    scale = wanted.scale or "smoke"
    folder = Path(out) if out is not None else Path("runs", "reproduce", f"{name}-{scale}")
    with held_folder(folder), StopRequest():
        try:
            if isinstance(experiment, Rates):
                return _rates(experiment, folder, wanted, say)
            return _Reproduction(experiment, folder, wanted, say).run()
        except Stopped as stopped:
            again = f"; what is finished is in {shown(folder)}: the same command goes on there"
            raise Stopped(stopped.signal_number, f"stopped by signal {stopped.signal_number}{again}") from None


class _Reproduction:
    """An experiment on its way in a folder."""

    def __init__(self, experiment: Experiment, folder: Path, wanted: Asked, say: Say) -> None:
        self.experiment, self.folder, self.say = experiment, folder, say
        self.results = Results.read(folder)
        self.wanted = self._with_what_is_there(wanted)
        assert self.wanted.scale is not None
        self.scale_name: ScaleName = self.wanted.scale
        self.scale: Scale = experiment.scales[self.scale_name]
        published = self.wanted.weights is not None
        if published and experiment.published is None:
            raise ConfigError(f"{experiment.name} compares networks that it trains: it takes no published weights")
        self.place = Place(
            data=self.wanted.data or self.scale.data or self._no_data(),
            data_root=self.wanted.data_root,
            download=self.wanted.download,
            device=self.wanted.device,
            blacklist=self.wanted.blacklist,
            quiet=self.wanted.quiet,
        )
        self.task = self._task()
        if published:
            assert experiment.published is not None
            self.arms = experiment.published()
        else:
            self.arms = experiment.arms(self.scale_name, self.task)
        before = 0 if self.results.about is None else int(self.results.about["seeds"])
        # What is there, or was begun, is not thrown away.
        self.seeds = 1 if published else max(self.wanted.seeds or 0, before) or self.scale.seeds
        self._settings = {arm.name: self._setting(arm) for arm in self.arms}

    # ---- what is there ---------------------------------------------------------------------------------------

    def _with_what_is_there(self, wanted: Asked) -> Asked:
        """What was asked for, completed by what the folder's results were made with, and held against it."""
        about = self.results.about
        if about is None:
            return replace(wanted, scale=wanted.scale or "smoke")
        where = shown(self.folder)
        if about["experiment"] != self.experiment.name:
            raise ConfigError(f"{where} holds results of {about['experiment']}: give another --out")
        for name in ("scale", "weights", "epochs"):
            was, now_is = about.get(name), getattr(wanted, name)
            if now_is is not None and now_is != was:
                raise ConfigError(f"{where} holds results with {name} {was}, not {now_is}: give another --out")
        return replace(
            wanted,
            scale=about["scale"],
            weights=about.get("weights"),
            epochs=about.get("epochs"),
            data=wanted.data or about["data"],
        )

    def _no_data(self) -> str:
        raise ConfigError(
            f"at scale {self.scale_name} {self.experiment.name} needs --data, a folder such as ImageNet's"
        )

    def _task(self) -> Task:
        """The data's, if it has to be opened; what results.jsonl says, if everything is finished."""
        about = self.results.about
        if about is not None and self._is_complete(about):
            return Task(**about["task"])
        source = open_source(self.place.data, root=self.place.data_root, download=self.place.download)
        task = Task(
            num_classes=len(source.class_names),
            channels=source.channels,
            multi_label=source.multi_label,
            fingerprint=source.fingerprint[:16],
        )
        several = self.experiment.figure == "map_at_100"
        if task.multi_label != several:
            kind = "several labels" if several else "one label"
            raise ConfigError(f"{self.experiment.name} needs data of {kind} an image; {printable(source.spec)} has not")
        if about is not None and (difference := changed(about["task"], asdict(task))):
            raise ConfigError(f"{shown(self.folder)} holds results on other data ({difference}): give another --out")
        return task

    def _is_complete(self, about: Mapping[str, Any]) -> bool:
        needed = max(self.wanted.seeds or 0, int(about["seeds"]))
        seeds = range(FIRST_SEED, FIRST_SEED + needed)
        return all(self.results.find(arm, seed) is not None for arm in about["arms"] for seed in seeds)

    def _setting(self, arm: Arm) -> dict[str, Any]:
        setting = setting_of(arm, self.scale, self.task, epochs=self.wanted.epochs)
        for line in self.results.of(arm.name):
            if difference := changed(line["setting"], setting):
                raise ConfigError(
                    f"{shown(self.folder)} holds results of {arm.name} with other settings ({difference}): they cannot "
                    "be mixed, give another --out"
                )
        return setting

    # ---- what is left ----------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Everything that is not finished, seed by seed, so that whatever is there is comparable; then the page."""
        left = [
            (arm, seed)
            for seed in range(FIRST_SEED, FIRST_SEED + self.seeds)
            for arm in self.arms
            if self.results.find(arm.name, seed) is None
        ]
        about = {
            "experiment": self.experiment.name,
            "scale": self.scale_name,
            "data": self.place.data,
            "weights": self.wanted.weights,
            "epochs": self.wanted.epochs,
            "seeds": self.seeds,
            "arms": [arm.name for arm in self.arms],
            "task": asdict(self.task),
        }
        if self.results.about != about:
            self.results.begin(about)
        total = len(self.arms) * self.seeds
        if left and len(left) < total:
            self.say(f"{total - len(left)} of {total} runs are finished already")
        for number, (arm, seed) in enumerate(left, start=1 + total - len(left)):
            self.say(f"{self.experiment.name} {number} of {total}: {arm.name}, seed {seed} ({arm.label})")
            if arm.weights is not None:
                line = run_published(arm, task=self.task, scale=self.scale, place=self.place)
            else:
                line = run_trial(
                    arm,
                    seed,
                    scale=self.scale,
                    task=self.task,
                    place=self.place,
                    folder=self.folder / "runs",
                    epochs=self.wanted.epochs,
                    say=self.say,
                )
            self.results.add(line)
        return write_outcome(self.experiment, self.results, self.arms, self.folder)


def write_outcome(experiment: Experiment, results: Results, arms: Sequence[Arm], folder: Path) -> Outcome:
    """Judge the results, draw their plots and page into `folder`."""
    from xception.experiments.page import write_page  # brings matplotlib

    outcome = outcome_of(experiment, results, arms, folder)
    write_page(experiment, results, arms, outcome)
    return outcome


def _rates(experiment: Rates, folder: Path, wanted: Asked, say: Say) -> Outcome:
    from xception.experiments.page import write_rates_page

    results = Results.read(folder)
    about = results.about
    if about is not None and about["experiment"] != experiment.name:
        raise ConfigError(f"{shown(folder)} holds results of {about['experiment']}: give another --out")
    if about is not None and wanted.scale not in (None, about["scale"]):
        raise ConfigError(
            f"{shown(folder)} holds results with scale {about['scale']}, not {wanted.scale}: give another --out"
        )
    scale: ScaleName = about["scale"] if about is not None else wanted.scale or "smoke"
    if about is None or not results.lines or wanted.seeds not in (None, about["rounds"]):
        measure_rates(results, scale=scale, rounds=wanted.seeds, say=say)
    outcome = rates_outcome(experiment, results, folder)
    write_rates_page(experiment, results, outcome)
    return outcome
