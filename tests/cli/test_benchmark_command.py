"""``xception benchmark inference`` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xception.benchmark import inference
from xception.benchmark.case import Case
from xception.benchmark.session import Visit
from xception.cli.main import main

KEYS = {
    "system", "variant", "precision", "mode", "model", "batch", "size", "threads", "images_per_second", "latency_ms",
    "ratio_to_best_peer", "logit_error", "peak_memory_mb", "fraction_of_peak", "rounds",
}  # fmt: skip
SMALL = ["--size", "71", "--batch", "1", "--threads", "1", "--rounds", "1"]


@pytest.mark.native
def test_ours_alone_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xception._native")
    out = tmp_path / "inference.jsonl"
    what = ["--systems", "xception", "--precision", "fp32", "--mode", "latency", "--json", "--out", str(out)]
    assert main(["benchmark", "inference", *SMALL, *what]) == 0
    (text,) = capsys.readouterr().out.splitlines()
    line = json.loads(text)
    assert line.keys() >= KEYS
    assert (line["system"], line["model"], line["batch"], line["size"]) == ("xception", "xception", 1, 71)
    assert line["logit_error"] < 1e-4
    assert line["ratio_to_best_peer"] is None
    assert line["images_per_second"] > 0
    machine, written = (json.loads(row) for row in out.read_text().splitlines())
    assert written == line
    assert machine["system"] == "machine"
    assert machine["cpu"]
    assert machine["versions"]["torch"]


@pytest.mark.native
def test_training_of_ours_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xception._native")
    out = tmp_path / "training.jsonl"
    what = ["--systems", "xception", "--precision", "fp32", "--json", "--out", str(out)]
    sizes = ["--size", "71", "--batch", "4", "--threads", "1", "--rounds", "1"]
    assert main(["benchmark", "training", *sizes, *what]) == 0
    lines = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert {(line["system"], line["variant"], line["mode"]) for line in lines if line["model"] == "xception"} == {
        ("xception", "native", "training"), ("xception", "reference", "training"),
    }  # fmt: skip
    for line in lines:
        assert line.keys() >= KEYS
        shares = [line[f"{part}_share"] for part in ("data", "forward", "backward", "optimiser")]
        assert 0.9 < sum(shares) <= 1.01
        assert line["logit_error"] < 5e-3
        assert line["peak_memory_mb"] > 100
    machine, *written = (json.loads(row) for row in out.read_text().splitlines())
    assert machine["system"] == "machine"
    assert written == lines


class Fake:
    """A session that takes no time; timm is half as fast as ours, and disagrees where `wrong` says so."""

    wrong = False

    def __init__(self, case: Case, folder: Path, environment: dict[str, str]) -> None:
        self.case = case
        self.logit_error = 0.9 if Fake.wrong and case.system == "timm" else 0.0

    def visit(self, seconds: float) -> Visit:
        return Visit(rate=self.case.batch * (20.0 if self.case.system == "xception" else 10.0), peak_memory_mb=1.0)

    def close(self) -> None:
        pass


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Any:
    from xception.benchmark.networks import Work

    def works(self: Any, cases: list[Case], root: Path) -> dict[str, Work]:
        return {case.model: Work(model=case.model, batch=case.batch, size=self.settings.size) for case in cases}

    monkeypatch.setattr(inference.Run, "_write", works)
    monkeypatch.setattr(inference, "Process", Fake)
    monkeypatch.setattr(inference, "installed", lambda package: package != "openvino")
    monkeypatch.setattr(Fake, "wrong", False)
    return Fake


def test_a_table_for_people(fakes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    systems = ["--systems", "xception", "timm", "openvino"]
    assert main(["benchmark", "inference", *SMALL, *systems, "--precision", "fp32"]) == 0
    out, err = capsys.readouterr()
    assert out.split()[:6] == ["system", "network", "threads", "precision", "mode", "images/s"]
    assert sum("xception compiled" in row and "2.00" in row for row in out.splitlines()) == 2
    assert "not installed: openvino (it needs openvino)" in err


def test_a_peer_that_disagrees_gives_an_error_line_and_status_1(
    fakes: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "wrong", True)
    what = ["--systems", "xception", "timm", "--precision", "fp32", "--mode", "throughput", "--json"]
    assert main(["benchmark", "inference", *SMALL, *what]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(row) for row in out.splitlines()]
    assert [line["variant"] for line in lines if "error" in line] == ["eager", "channels-last", "compiled"]
    assert [line["system"] for line in lines if "error" not in line] == ["xception"]
    assert "3 measurements failed" in err


def test_scaling_measures_ours_and_the_best_peer(fakes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    what = ["--systems", "xception", "timm", "--precision", "fp32", "--mode", "throughput", "--json", "--scaling"]
    assert main(["benchmark", "inference", *SMALL[:-4], "--threads", "3", "--rounds", "1", *what]) == 0
    lines = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    scaled = [line for line in lines if "scaling" in line]
    assert {(line["system"], line["variant"]) for line in scaled} == {("xception", "compiled"), ("timm", "eager")}
    for axis, values in (("batch", [1, 2, 4, 8, 16]), ("size", [150, 224, 299, 320]), ("threads", [1, 2, 3])):
        found = [line[axis] for line in scaled if line["scaling"] == axis and line["system"] == "xception"]
        assert found == values


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "inference"),
        (["serving"], "inference"),
        (["training", "--mode", "latency"], "--mode is one of inference"),
        (["training", "--precision", "int8"], "unknown precision"),
        (["training", "--systems", "openvino"], "unknown system"),
        (["inference", "--model", "xcepton"], "did you mean xception"),
        (["inference", "--batch", "0"], "batch must be from 1"),
        (["inference", "--rounds", "0"], "rounds must be from 1"),
        (["inference", "--threads", "-1"], "threads must be from 1"),
        (["inference", "--precision", "fp8"], "--precision"),
        (["inference", "--systems", "caffe"], "--systems"),
        (["inference", "--out", "no/such/folder/r.jsonl"], "cannot write no/such/folder/r.jsonl"),
        (["inference", "--systems", "xception", "--size", "20"], "at least 32"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
