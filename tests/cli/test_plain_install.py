"""What ``pip install xception`` brings is enough: every command works without the extras, or says which one to get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

# The package's command line in a process that has none of the extras and test packages.
_PLAIN = """
import sys
extras = ("timm", "tensorboard", "pyarrow", "keras", "tensorflow", "sklearn", "torchmetrics", "hypothesis", "pytest")
for name in extras:
    sys.modules[name] = None
from xception.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def _plain(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _PLAIN, *arguments]
    return subprocess.run(command, cwd=cwd, env=dict(os.environ), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run on the digits was made, with an image beside it."""
    path = tmp_path_factory.mktemp("plain")
    done = _plain("train", "digits", "--recipe", "small", "--epochs", "1", "--out", "R", "--json", cwd=path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["epochs"] == 1
    Image.new("RGB", (40, 30), (10, 90, 200)).save(path / "a.png")
    return path


def test_models(tmp_path: Path) -> None:
    done = _plain("models", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert lines["xception"]["parameters"] == 22_855_952
    assert {"inception_v3", "xception65", "xception_small", "resnet152"} <= lines.keys()
    assert "pip install 'xception[hub]'" in done.stderr
    assert done.stderr.count("\n") == 1
    done = _plain("models", cwd=tmp_path)
    assert done.returncode == 0
    assert "22,855,952" in done.stdout


def test_a_network_of_an_extra_says_which(tmp_path: Path) -> None:
    done = _plain("models", "timm/resnet18", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "xception: error: this network needs timm: pip install 'xception[hub]'\n"


def test_evaluate_and_predict(folder: Path) -> None:
    done = _plain("evaluate", "R", "digits", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {"top1", "top5", "loss"} <= json.loads(done.stdout.splitlines()[-1]).keys()
    done = _plain("predict", "R", "a.png", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["predictions"]) == 5
    assert (folder / "R" / "report.html").stat().st_size > 10_000
