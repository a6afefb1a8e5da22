"""A search at the smallest size: it ends, goes on, prunes, and gives a recipe that trains."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import xception
from xception.cli.main import main
from xception.errors import ConfigError, TrainingError
from xception.experiments import tune as room
from xception.training.interrupt import Stopped
from xception.training.recipe import read_recipe

pytest.importorskip("optuna")

TINY: dict[str, Any] = {
    "stem_widths": (4, 8),
    "entry_widths": (8, 12),
    "middle_modules": 1,
    "middle_units": 1,
    "exit_widths": (16,),
}
QUICK: dict[str, Any] = {
    "model_options": TINY,
    "epochs": 1,
    "quiet": True,
    "search": ("learning_rate=0.02..0.5,log", "batch_size=64|128"),
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> room.Found:
    return room.tune("digits", out=tmp_path_factory.mktemp("tune"), trials=3, **QUICK)


def test_it_finds_the_best_of_its_trials(searched: room.Found) -> None:
    assert (searched.complete, searched.pruned, searched.failed) == (3, 0, 0)
    assert searched.base_value is not None
    assert searched.best_value >= searched.base_value
    assert 0 < searched.best_test["test_top1"] <= 1
    assert set(searched.best_params) == {"learning_rate", "batch_size"}
    assert len(list((searched.out / "trials").iterdir())) == 1  # the best's alone
    page = searched.report.read_text(encoding="utf-8")
    assert "Validation by trial" in page
    assert "on the test images, which chose nothing" in page
    assert (searched.out / "plots" / "history.svg").exists()
    assert (searched.out / "plots" / "importance.svg").exists()
    assert json.loads(json.dumps(searched.to_dict()))["trials"] == {"complete": 3, "pruned": 0, "failed": 0}


def test_the_best_recipe_trains_as_the_trial_did(searched: room.Found, tmp_path: Path) -> None:
    recipe = read_recipe(str(searched.recipe))
    assert recipe.optimizer.learning_rate == searched.best_params["learning_rate"]
    assert recipe.batch_size == searched.best_params["batch_size"]
    options = {"recipe": str(searched.recipe), "model_options": TINY, "quiet": True}
    result = xception.train("digits", out=tmp_path / "run", **options)
    assert result.val is not None
    assert result.val.top1 == pytest.approx(searched.best_value)


def test_called_again_it_only_adds_what_is_missing(searched: room.Found, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Path] = []
    real = room.train

    def counting(*arguments: Any, **options: Any) -> Any:
        trained.append(options["out"])
        return real(*arguments, **options)

    monkeypatch.setattr(room, "train", counting)
    again = room.tune("digits", out=searched.out, trials=3, **QUICK)
    assert trained == []
    assert again.best_params == searched.best_params
    wider = {**QUICK, "search": ("learning_rate=0.02..1,log", "batch_size=64|128")}
    with pytest.raises(ConfigError, match=r"other settings \(space\.learning_rate\.high was 0\.5, is 1\.0\)"):
        room.tune("digits", out=searched.out, trials=3, **wider)


def test_stopped_within_a_trial_it_goes_on_in_that_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds, in the end, what an undisturbed search finds."""
    longer = {**QUICK, "epochs": 2}
    whole = room.tune("digits", out=tmp_path / "whole", trials=2, prune=False, **longer)
    real = room.train
    seen: list[tuple[Path, int]] = []

    def stopping(*arguments: Any, after_epoch: Any, **options: Any) -> Any:
        def watch(record: Any) -> None:
            after_epoch(record)
            seen.append((options["out"], record["epoch"]))
            if len(seen) == 3:  # the first epoch of the second trial
                raise Stopped(signal.SIGINT, "as if")

        return real(*arguments, after_epoch=watch, **options)

    monkeypatch.setattr(room, "train", stopping)
    out = tmp_path / "stopped"
    with pytest.raises(Stopped, match=r"stopped by signal 2; the same command goes on in .*stopped"):
        room.tune("digits", out=out, trials=2, prune=False, **longer)
    found = room.tune("digits", out=out, trials=2, prune=False, **longer)
    assert seen[2][0] == seen[3][0]
    assert [epoch for _, epoch in seen] == [1, 2, 1, 2]
    assert (found.complete, found.failed) == (2, 0)
    assert found.best_params == whole.best_params
    assert found.best_value == whole.best_value


def test_trials_that_lag_behind_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna.trial import Trial

    monkeypatch.setattr(Trial, "should_prune", lambda self: self.number == 1)
    said: list[str] = []
    found = room.tune("digits", out=tmp_path / "t", trials=2, say=said.append, **{**QUICK, "epochs": 2})
    assert (found.complete, found.pruned) == (1, 1)
    assert "stopped early: behind the median of the others" in said


def test_settings_that_cannot_be_trained_fail_alone(tmp_path: Path) -> None:
    space = ("optimizer=sgd|adamw", "nesterov=false|true")
    said: list[str] = []
    found = room.tune("digits", out=tmp_path / "t", trials=5, say=said.append, **{**QUICK, "search": space})
    assert found.complete + found.failed + found.pruned == 5
    assert found.complete >= 1
    if found.failed:
        assert any("nesterov must be off unless" in line for line in said)


def test_a_search_in_which_nothing_works_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise TrainingError("loss was not finite")

    monkeypatch.setattr(room, "train", broken)
    with pytest.raises(TrainingError, match="the first 3 trials failed, the last with: loss was not finite"):
        room.tune("digits", out=tmp_path / "t", trials=20, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["digits", "--search", "learning_rate=1..0"], "the lower first"),
        (["digits", "--search", "depth=1..2"], "unknown recipe field 'depth'"),
        (["digits", "--trials", "0"], "trials must be from 1 to 10000"),
        (["digits", "--recipe", "no.json"], "no.json: cannot be read: No such file or directory"),
        (["digits", "--recipe", "smal"], "unknown recipe 'smal' (did you mean small?)"),
        (["nothing-here"], "no data at 'nothing-here'"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    arguments: list[str],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *arguments]) == 2
    said = capsys.readouterr()
    assert match in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_without_optuna_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", "digits", "--out", str(tmp_path / "t")]) == 2
    assert "optuna is not installed: pip install 'xception[tune]'" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_damaged_study_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "t"
    room.tune("digits", out=out, trials=1, **QUICK)
    (out / "study.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(ConfigError, match="cannot be used as a study"):
        room.tune("digits", out=out, trials=1, **QUICK)
    (out / "tune.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected the settings of a search"):
        room.tune("digits", out=out, trials=1, **QUICK)
