"""A search for settings: the Python side of ``xception tune``.

optuna draws the trials (a tree-structured Parzen estimator, the first of them the recipe itself) and stops those that
lag behind the median of the others at the same epoch. Its study lies in ``study.db``, an embedded SQLite file in the
folder, so that a search that was stopped goes on, within the very trial that was under way. A trial is chosen by its
validation figure after the last epoch; its figures on the test images are told beside, and choose nothing.

The folder also holds best.json, a recipe that ``xception train --recipe`` takes, report.html and plots, and the run
folder of the best trial; the others' are deleted when they end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from xception.errors import ConfigError, MissingPackageError, TrainingError
from xception.experiments.folder import held_folder
from xception.experiments.results import changed
from xception.experiments.space import Dimension, own_point, parse_space, suggest
from xception.training.interrupt import Stopped
from xception.training.prepare import prepare
from xception.training.recipe import FREE_FIELDS, Recipe, find_recipe, flat_values, override, recipe_to_dict
from xception.training.record import epoch_value
from xception.training.train import train
from xception.weights.files import atomic_write, shown

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

Say = Callable[[str], None]
STUDY, SETTINGS, BEST, TRIALS = "study.db", "tune.json", "best.json", "trials"


class Pruned(Exception):
    """A trial that lags behind was stopped."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found so far; figures are shares, `base` those of the recipe as it was given."""

    out: Path
    recipe: Path
    report: Path
    complete: int
    pruned: int
    failed: int
    best_number: int
    best_value: float
    best_params: Mapping[str, Any]
    best_test: Mapping[str, float]
    base_value: float | None
    base_test: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "trials": {"complete": self.complete, "pruned": self.pruned, "failed": self.failed},
            "best": {"trial": self.best_number, "val": self.best_value, **self.best_test},
            "base": {"val": self.base_value, **self.base_test},
            "settings": dict(self.best_params),
            "recipe": str(self.recipe),
            "report": str(self.report),
            "out": str(self.out),
        }


def tune(
    data: str,
    *,
    out: str | Path | None = None,
    model: str | None = None,
    recipe: str = "small",
    model_options: Mapping[str, Any] | None = None,
    search: Sequence[str] = (),
    trials: int = 20,
    epochs: int | None = None,
    seed: int = 0,
    prune: bool = True,
    data_root: str | None = None,
    download: bool = False,
    device: str | None = None,
    quiet: bool = False,
    say: Say = lambda _: None,
) -> Found:
    """Search until the study in `out` has `trials` trials that ended; called again, it goes on.

    Raises an `XceptionError` with one line for wrong input, `Stopped` after SIGINT or SIGTERM.
    """
    optuna = import_optuna()
    if type(trials) is not int or not 1 <= trials <= 10_000:
        raise ConfigError(f"trials must be from 1 to 10000; got {trials!r}")
    base = find_recipe(recipe, model=model)
    base = override(base, seed=seed, **({} if epochs is None else {"epochs": epochs}))
    space = parse_space(search, base)
    where = {"data_root": data_root, "download": download, "device": device}
    plan = prepare(data, override(base, check_images=False), model=model, model_options=model_options, **where)  # type: ignore[arg-type]
    if plan.val is None:
        raise ConfigError(
            f"{data} has no validation images, by which trials are compared: give --recipe a val_fraction"
        )
    folder = Path(out) if out is not None else _default_folder(data, base.model)
    settings = {
        "data": plan.source.fingerprint[:16],
        "model": base.model,
        "options": dict(model_options or {}),
        "recipe": {name: value for name, value in flat_values(base).items() if name not in FREE_FIELDS},
        "space": {dimension.name: dimension.to_dict() for dimension in space},
    }
    with held_folder(folder):
        _same_settings(folder, settings)
        search_ = _Search(
            study=_open_study(optuna, folder, prune=prune),
            folder=folder,
            base=base,
            space=space,
            train={"data": data, "model_options": model_options, "quiet": quiet, **where},
            say=say,
        )
        try:
            search_.run(trials)
        except Stopped as stopped:
            number, where_ = stopped.signal_number, shown(folder)
            raise Stopped(number, f"stopped by signal {number}; the same command goes on in {where_}") from None
        return search_.found()


def import_optuna() -> Any:
    """The optuna package, quiet; `MissingPackageError` says how to get it where it is missing."""
    try:
        import optuna
    except ImportError:
        raise MissingPackageError("optuna is not installed: pip install 'xception[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _default_folder(data: str, model: str) -> Path:
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(os.fspath(data)).stem).strip("-.") or "data"
    return Path("runs", "tune", f"{stem}-{model.replace('/', '-')}")


def _same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings of the search; a search with others in the same folder is refused."""
    path = folder / SETTINGS
    if not path.exists():
        if (folder / STUDY).exists():
            raise ConfigError(f"{shown(folder)} holds a study without its {SETTINGS}: give another --out")
        _write_json(path, settings)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        difference = changed(before, settings)
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{shown(path)}: expected the settings of a search; give another --out") from None
    if difference:
        raise ConfigError(f"{shown(folder)} holds a search with other settings ({difference}): give another --out")


def _open_study(optuna: Any, folder: Path, *, prune: bool) -> Study:
    path = (folder / STUDY).absolute()
    if "?" in str(path):
        raise ConfigError(f"{shown(path)}: SQLite's addresses take no question mark; give another --out")
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1) if prune else optuna.pruners.NopPruner()
    try:
        study: Study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name="xception", direction="maximize", load_if_exists=True, pruner=pruner
        )
    except Exception as error:  # whatever a database that is none of ours makes SQLAlchemy say
        line = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{shown(path)}: cannot be used as a study: {line[:200]}") from None
    return study


@dataclass(kw_only=True)
class _Search:
    study: Study
    folder: Path
    base: Recipe
    space: Sequence[Dimension]
    train: Mapping[str, Any]
    say: Say

    def run(self, trials: int) -> None:
        self._take_up_what_was_stopped()
        while (done := len(self._ended())) < trials:
            if not self.study.get_trials(deepcopy=False):
                self._first()
            # Another seed for each trial: a search that was stopped draws what it would have drawn.
            self.study.sampler = _sampler(self.base.seed + len(self.study.get_trials(deepcopy=False)))
            trial = self.study.ask()
            self._one(trial, done + 1, trials)
            self._write()
        self._write()

    def _first(self) -> None:
        point = own_point(self.base, self.space)
        if point is None:
            self.say("the recipe itself is outside of the space, and is not tried")
        else:
            self.study.enqueue_trial(point, user_attrs={"base": True})

    def _take_up_what_was_stopped(self) -> None:
        """A trial that was under way comes again, at once, in the run folder in which it goes on."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            attributes = {"folder": self._folder_of(trial), **({"base": True} if trial.user_attrs.get("base") else {})}
            self.study.tell(trial.number, state=TrialState.FAIL)
            if trial.params:
                self.study.enqueue_trial(trial.params, user_attrs={**attributes, "again": trial.number})

    def _ended(self) -> list[FrozenTrial]:
        """Trials that count; not those that were stopped and came again."""
        from optuna.trial import TrialState

        ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        found = self.study.get_trials(deepcopy=False, states=ended)
        return [trial for trial in found if trial.state != TrialState.FAIL or "error" in trial.user_attrs]

    @staticmethod
    def _folder_of(trial: FrozenTrial | Trial) -> str:
        return str(trial.user_attrs.get("folder", f"trial-{trial.number:04d}"))

    def _one(self, trial: Trial, number: int, trials: int) -> None:
        from optuna.trial import TrialState

        point = suggest(trial, self.space)
        told = ", ".join(
            f"{name} {value:.4g}" if type(value) is float else f"{name} {value}" for name, value in point.items()
        )
        self.say(f"trial {number} of {trials}: {told}")
        out = self.folder / TRIALS / self._folder_of(trial)

        def after_epoch(record: Mapping[str, Any]) -> None:
            value = epoch_value(record)
            if value is not None:
                trial.report(value, int(record["epoch"]))
                if int(record["epoch"]) < self.base.epochs and trial.should_prune():
                    raise Pruned

        try:
            recipe = override(self.base, **point)
            for record in _earlier(out):
                after_epoch(record)
            result = train(
                recipe=recipe, model=self.base.model, out=out, resume=True, after_epoch=after_epoch, **self.train
            )
        except Pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            self.say("stopped early: behind the median of the others")
            self._delete(out)
            return
        except (ConfigError, TrainingError) as error:
            # Settings that exclude each other, or that diverge: a bad place in the space, and no end of the search.
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            self.say(f"failed: {error}")
            self._delete(out)
            if not self._worked() and len(self._ended()) >= 3:
                raise TrainingError(f"the first {len(self._ended())} trials failed, the last with: {error}") from None
            return
        value = epoch_value(result.history[-1])
        assert value is not None
        if result.test is not None:
            figures = {"test_top1": result.test.top1, "test_top5": result.test.top5, "test_loss": result.test.loss}
            if result.test.map_at_100 is not None:
                figures["test_map_at_100"] = result.test.map_at_100
            trial.set_user_attr("test", figures)
        trial.set_user_attr("seconds", round(result.seconds, 1))
        self.study.tell(trial, value)
        self._keep_best_only()

    def _worked(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def _keep_best_only(self) -> None:
        best = self._folder_of(self.study.best_trial)
        for trial in self._worked():
            if self._folder_of(trial) != best:
                self._delete(self.folder / TRIALS / self._folder_of(trial))

    def _delete(self, out: Path) -> None:
        assert out.parent == self.folder / TRIALS
        if out.exists():
            shutil.rmtree(out)

    def _write(self) -> None:
        """best.json and the page, as they are now."""
        if self._worked():
            from xception.experiments.tune_page import write_tune_page  # brings matplotlib

            best = override(self.base, **self.study.best_trial.params)
            # Its own name would bring that recipe's page of what the paper states.
            _write_json(self.folder / BEST, {**recipe_to_dict(best), "stated": []})
            write_tune_page(self.folder / "report.html", self.study, self.found(), importances(self.study))

    def found(self) -> Found:
        """What there is; `TrainingError` where no trial came to its end."""
        from optuna.trial import TrialState

        worked = self._worked()
        if not worked:
            raise TrainingError("no trial came to its end: nothing was found")
        best = self.study.best_trial
        base = next((trial for trial in worked if trial.user_attrs.get("base")), None)
        ended = self._ended()
        return Found(
            out=self.folder,
            recipe=self.folder / BEST,
            report=self.folder / "report.html",
            complete=len(worked),
            pruned=sum(trial.state == TrialState.PRUNED for trial in ended),
            failed=sum(trial.state == TrialState.FAIL for trial in ended),
            best_number=best.number,
            best_value=float(best.value or 0.0),
            best_params=best.params,
            best_test=best.user_attrs.get("test", {}),
            base_value=None if base is None else base.value,
            base_test={} if base is None else base.user_attrs.get("test", {}),
        )


def _sampler(seed: int) -> Any:
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)


def importances(study: Study) -> dict[str, float]:
    """How much each setting decides, as shares (PED-ANOVA); empty where there are too few trials to say."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna says that the method may change
        try:
            found = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
        except (RuntimeError, ValueError):  # fewer than two trials, or settings that did not vary
            return {}
    return {name: float(value) for name, value in found.items() if value == value}


def _earlier(out: Path) -> Iterator[Mapping[str, Any]]:
    """The records of the epochs that an earlier start of a trial finished."""
    try:
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
    except (OSError, ValueError):
        return


def _write_json(path: Path, value: object) -> None:
    data = (json.dumps(value, indent=1) + "\n").encode("ascii")

    def write(stream: BinaryIO) -> None:
        stream.write(data)

    atomic_write(path, write)
