"""Experiments from end to end at the smallest size: what is finished stays, what was stopped goes on."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from xception.cli.main import main
from xception.errors import ConfigError, DataError
from xception.experiments import reproduce as room
from xception.experiments.reproduce import reproduce
from xception.experiments.results import Results
from xception.experiments.summary import BEGIN, END, arms_of, read_outcome, table, with_table
from xception.training.interrupt import Stopped

SHORT: dict[str, Any] = {"scale": "smoke", "epochs": 1, "seeds": 1, "quiet": True}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """figure9 at smoke scale with one epoch and one seed."""
    out = tmp_path_factory.mktemp("figure9")
    reproduce("figure9", out, **SHORT)
    return out


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished experiment, without its runs, as it is committed."""
    out = tmp_path / "figure9-smoke"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("runs"))
    return out


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing was to be trained or opened")

    monkeypatch.setattr(room, "run_trial", trained)
    monkeypatch.setattr(room, "open_source", trained)


def test_it_leaves_results_plots_and_a_page(finished: Path) -> None:
    about, *lines = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert about["experiment"] == "figure9"
    assert [(line["arm"], line["seed"]) for line in lines] == [("residual", 0), ("plain", 0)]
    for line in lines:
        assert line["machine"]["versions"]["torch"]
        assert "commit" in line["machine"]
        assert 0 < line["figures"]["top1"] < 1
        assert len(line["history"]) == 1
        assert (finished / "runs" / line["arm"] / "seed-0" / "model.safetensors").exists()
    assert {path.name for path in (finished / "plots").iterdir()} == {"learning.svg", "final.svg"}
    page = (finished / "report.html").read_text(encoding="utf-8")
    for text in ("Residual connections help", "is undecided", "a single seed", "Fig. 9", "no evidence"):
        assert text in page, text
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_again_it_draws_from_the_results_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with results that are committed: no run folders, no data, no training, the same plots and page."""
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder / "plots")
    (folder / "report.html").unlink()
    forbid_training(monkeypatch)
    outcome = reproduce("figure9", folder)
    after = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
    assert outcome.scale == "smoke"
    assert outcome.held is None


def test_the_json_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "figure9", "--out", str(folder), "--json"]) == 0
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    found = json.loads(line)
    assert {"claim", "held", "arms"} <= set(found)
    assert [arm["name"] for arm in found["arms"]] == ["residual", "plain"]
    for arm in found["arms"]:
        assert {"name", "parameters", "top1_mean", "top1_std", "seeds"} <= set(arm)
        assert arm["top1_std"] is None  # of a single seed
    assert main(["reproduce", "figure9", "--out", str(folder)]) == 0
    assert "the claim is undecided" in capsys.readouterr().out


def test_more_seeds_are_added_to_what_is_there(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a stop between two runs loses nothing."""
    out = tmp_path / "more"
    shutil.copytree(finished, out)
    real, calls = room.run_trial, []

    def stopping(arm: Any, seed: int, **options: Any) -> Any:
        calls.append((arm.name, seed))
        if len(calls) == 2:
            raise Stopped(signal.SIGINT, "as if")
        return real(arm, seed, **options)

    monkeypatch.setattr(room, "run_trial", stopping)
    with pytest.raises(Stopped, match="the same command goes on there"):
        reproduce("figure9", out, seeds=2, quiet=True)
    assert calls == [("residual", 1), ("plain", 1)]
    assert [(line["arm"], line["seed"]) for line in Results.read(out).lines][2:] == [("residual", 1)]
    outcome = reproduce("figure9", out, quiet=True)
    assert calls[2:] == [("plain", 1)]
    assert [arm["seeds"] for arm in outcome.arms] == [2, 2]
    assert all(arm["top1_std"] is not None for arm in outcome.arms)
    assert all(judged.low is not None for judged in outcome.contrasts)


def test_changed_settings_are_said_and_never_mixed(folder: Path, tmp_path: Path) -> None:
    for asked, match in (
        ({"scale": "laptop"}, "holds results with scale smoke, not laptop: give another --out"),
        ({"epochs": 2}, "holds results with epochs 1, not 2: give another --out"),
        ({"seeds": 2, "data": "fashion-mnist"}, "holds results on other data .*fingerprint was"),
    ):
        with pytest.raises(ConfigError, match=match):
            reproduce("figure9", folder, **asked)
    with pytest.raises(ConfigError, match="holds results of figure9: give another --out"):
        reproduce("figure10", folder)
    with pytest.raises(ConfigError, match="holds results of figure9: give another --out"):
        reproduce("table3", folder)
    path = folder / "results.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"learning_rate": 0.1', '"learning_rate": 0.2'))
    with pytest.raises(ConfigError, match=r"recipe\.learning_rate was 0\.2, is 0\.1\): they cannot be mixed"):
        reproduce("figure9", folder)
    path.write_text(text[:-40])
    with pytest.raises(DataError, match="expected the results of xception reproduce"):
        reproduce("figure9", folder)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["figure8"], "figure8"),
        (["figure9", "--scale", "huge"], "scale"),
        (["figure9", "--scale", "paper"], "needs --data"),
        (["figure9", "--seeds", "0"], "seeds must be from 1 to 1000; got 0"),
        (["figure9", "--weights", "published"], "takes no published weights"),
        (["figure9", "--data", "no-such-folder"], "no data at 'no-such-folder'"),
        (["figure9", "--data", "fashion-composites:200"], "needs data of one label an image"),
        (["table2", "--data", "digits"], "needs data of several labels an image"),
        (["table3", "--data", "digits"], "table3 trains nothing and needs no data"),
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
    assert main(["reproduce", *arguments]) == 2
    said = capsys.readouterr()
    assert match in said.err
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("results.jsonl"))


def test_two_processes_do_not_share_a_folder(folder: Path) -> None:
    from xception.experiments.folder import held_folder

    with held_folder(folder), pytest.raises(ConfigError, match="another process is at work"):
        reproduce("figure9", folder)


def test_the_summary_is_of_the_results(folder: Path) -> None:
    made = table(folder.parent)
    rows = [line for line in made.splitlines() if line.startswith("| `figure9`")]
    assert len(rows) == 1
    assert "undecided" in rows[0]
    assert "residual " in rows[0]
    assert made.count("not yet run") == 5
    text = with_table(f"before\n{BEGIN}\nold\n{END}\nafter\n", made)
    assert text == f"before\n{BEGIN}\n{made}{END}\nafter\n"
    with pytest.raises(ConfigError, match="expected <!-- reproduce -->"):
        with_table("no marks", made)


@pytest.mark.parametrize("document", ["README.md", "README.ko.md", "docs/reproduction.md"])
def test_documents_have_the_table_of_what_is_committed(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    made = table(ROOT / "experiments" / "results")
    assert with_table(text, made) == text, f"run: python -m xception.experiments.summary {document}"


COMMITTED = sorted(path.parent for path in (ROOT / "experiments" / "results").glob("*/results.jsonl"))


@pytest.mark.skipif(not COMMITTED, reason="nothing was committed yet")
def test_committed_results_are_of_the_arms_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forbid_training(monkeypatch)
    for committed in COMMITTED:
        out = tmp_path / committed.name
        shutil.copytree(committed, out)
        name = committed.name.partition("-")[0]
        outcome = reproduce(name, out)
        assert outcome.held == read_outcome(committed).held
        assert (out / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table1", "table2", "table3", "figure9", "figure10", "spectrum"])
def test_a_whole_smoke_run_ends_in_three_minutes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert main(["reproduce", name, "--scale", "smoke", "--out", str(tmp_path / "out"), "--json"]) == 0
    seconds = time.monotonic() - began
    found = json.loads(capsys.readouterr().out)
    assert found["held"] in (True, False, None)
    assert all(arm["parameters"] > 0 for arm in found["arms"])
    if name != "table3":
        assert all(arm["seeds"] == 2 for arm in found["arms"])
        results = Results.read(tmp_path / "out")
        experiment = room.find_experiment(name)
        assert [arm.name for arm in arms_of(experiment, results)] == [arm["name"] for arm in found["arms"]]  # type: ignore[arg-type]
    assert seconds < 180
