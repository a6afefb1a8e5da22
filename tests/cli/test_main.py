"""The command line as a person meets it: quick help, one line for a mistake, the right exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import xception
from xception.cli.main import main
from xception.cli.parse import COMMANDS

TINY = [
    "--model-option=stem_widths=[4,8]", "--model-option=entry_widths=[8,12]", "--model-option=middle_modules=1",
    "--model-option=exit_widths=[16]", "--image-size", "8", "--epochs", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits", "--recipe", "small", "--seed", "7", "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "an image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(path)
    return path


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "xception", *arguments], input=stdin, capture_output=True, check=False)


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    """A ratio, since machines differ: help must cost a small part of what importing torch costs."""
    code = (
        "import sys; from xception.cli.main import main; main(['--help']);"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'PIL', 'numpy'} & set(sys.modules); sys.exit(bool(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0

    def seconds(*command: str) -> float:
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        return time.perf_counter() - began

    help_time = min(seconds(sys.executable, "-m", "xception", "--help") for _ in range(3))
    torch_time = min(seconds(sys.executable, "-c", "import torch") for _ in range(2))
    assert help_time < 0.5 * torch_time


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"xception {command}" in capsys.readouterr().out


def test_version_says_what_the_machine_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"xception {xception.__version__}")
    assert "torch" in out
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian", "digits"], "trian"),
        (["train"], "data"),
        (["train", "digits", "--epochs", "many"], "epochs"),
        (["train", "digits", "--epochs", "0"], "epochs"),
        (["train", "digits", "--recipe", "smal"], "small"),
        (["train", "digits", "--model", "xceptoin"], "xception"),
        (["train", "digits", "--bogus"], "--bogus"),
        (["train", "no/such/folder"], "no/such/folder"),
        (["train", "digits", "--weights", "no-such.safetensors"], "no-such.safetensors"),
        (["train", "digits", "--model-option", "middle_modules"], "NAME=VALUE"),
        (["train", "digits", "--model-option", "middle_modules=-1"], "middle_modules"),
        (["train", "digits", "--model-option", "colour=red"], "colour"),
        (["train", "digits", "--model-option", "num_classes=3"], "num_classes"),
        (["train", "digits", "--image-size", "2"], "at least"),
        (["train", "digits", "--device", "abacus"], "abacus"),
        (["train", "digits", "--learning-rate", "-1"], "learning_rate"),
        (["train", "digits", "--recipe", "finetune"], "--weights"),
        (["evaluate", "no-such-run", "digits"], "no-such-run"),
        (["evaluate", "xception", "digits"], "random"),
        (["predict", "no-such-run", "x.png"], "no-such-run"),
        (["predict", "no-such-run"], "at least one IMAGE"),
        (["predict", "m", "x.png", "--top", "0"], "--top"),
        (["predict", "m", "x.png", "--json", "--csv"], "not both"),
        (["models", "xeption"], "xception"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else None,
)
def test_wrong_use_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xception: error: ")
    assert err.count("\n") == 1, err
    assert says in err
    assert list(tmp_path.iterdir()) == [], "nothing is written for a mistake"


def test_train_prints_json_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "digits", "--recipe", "small", "--seed", "7", "--out", str(out), "--json", *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert 0 <= result["test_top1"] <= 1
    assert Path(result["bundle"]).exists()


@pytest.mark.parametrize("recipe", ["small", "imagenet", "jft"])
def test_dry_run_tells_everything_and_writes_nothing(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "digits", "--recipe", recipe, "--model", "xception_small", "--dry-run", *TINY]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "xception_small"
    assert told["memory_bytes"] > told["activation_bytes"] > 0
    assert told["seconds"] > 0
    sources = {f["source"] for f in told["fields"].values()}
    assert sources == ({"recipe"} if recipe == "small" else {"paper", "our choice"})
    assert main(arguments) == 0
    assert "learning_rate" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_evaluate(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.html"
    assert main(["evaluate", str(trained), "digits", "--json", "--report", str(report)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"top1", "top5", "loss"} <= last.keys()
    assert last["part"] == "test"
    assert sum(map(sum, last["confusion"])) == last["images"]
    assert "<html" in report.read_text()
    assert main(["evaluate", str(trained), "digits"]) == 0
    assert "top-1" in capsys.readouterr().out


def test_predict_json_csv_and_partial_failure(
    trained: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(trained), str(image), "--json", "--top", "3"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["path"] == str(image)
    assert len(line["predictions"]) == 3
    assert {"label", "score"} <= line["predictions"][0].keys()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"")
    assert main(["predict", str(trained), str(tmp_path), "--json"]) == 1
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert {tuple(sorted(x)) for x in lines} == {("path", "predictions"), ("error", "path")}
    assert main(["predict", str(trained), str(image), str(bad), "--csv"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == "path,rank,label,score,error"


def test_predict_reads_paths_from_standard_input(trained: Path, image: Path) -> None:
    result = run("predict", str(trained), "-", "--json", stdin=os.fsencode(image) + b"\n")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["path"] == str(image)
    empty = run("predict", str(trained), "-", stdin=b"")
    assert empty.returncode == 2
    assert empty.stderr.count(b"\n") == 1


def test_a_closed_pipe_is_no_traceback(trained: Path, image: Path) -> None:
    command = f"{sys.executable} -m xception predict {trained} {' '.join([repr(str(image))] * 50)} | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert b"Traceback" not in result.stderr


def test_models_lists_every_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_name = {line["name"]: line for line in lines}
    assert set(by_name) == set(xception.list_models())
    assert by_name["xception"]["parameters"] == 22_855_952
    assert 8.3e9 < by_name["xception"]["multiply_adds"] < 8.5e9


def test_models_shows_one_stage_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "xception"]) == 0
    out = capsys.readouterr().out
    assert "22,855,952" in out
    assert "middle_flow" in out
