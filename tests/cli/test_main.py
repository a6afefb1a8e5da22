"""The command line as a person meets it: quick help, one line for a mistake, the right exit status."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import xception
from xception.cli.main import main, script
from xception.cli.output import printable
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


@pytest.mark.parametrize(
    "code",
    [
        "main(['predict', RUN, IMAGE])",
        "main(['predict', RUN, IMAGE, '--backend', 'torch'])",
        "main(['evaluate', RUN, 'digits'])",
        "xception.load(RUN).predict([IMAGE])",
        "xception.create_model('xception_small').eval()(torch.zeros(1, 3, 28, 28))",
        "xception.compile(xception.create_model('xception_small'))(torch.zeros(1, 3, 28, 28))",
    ],
)
def test_answers_load_torch_and_no_more(code: str, trained: Path, image: Path) -> None:
    """To load torchvision, torch.compile and sympy takes longer than most answers."""
    whole = (
        "import sys, torch, xception; from xception.cli.main import main; RUN, IMAGE = sys.argv[1:];"
        f"torch.set_grad_enabled(False); {code};"
        "print('loaded', {'torchvision', 'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", whole, trained, image], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["loaded set()"], done.stderr


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
        (["trian", "digits"], "did you mean train"),
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
        (["models", "XCEPTOIN"], "did you mean xception"),
        (["models", "zzz*"], "no model matches 'zzz*'"),
        (["predict", "m", "x.png", "--device", "meta"], "no such bundle"),
        (["predict", "", "x.png"], "empty name"),
        ([], "xception demo"),
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["digits", "--device", "meta"], "device 'meta' cannot be used"),
        (["digits", "--device", "abacus"], "such as cpu"),
        (["digits", "--data-root", "x"], "leave it out"),
        (["cifar10"], "--data-root"),
        (["digits", "--report", "no/such/folder/r.html"], "cannot write no/such/folder/r.html"),
        (["digits", "--report", "."], "cannot write ."),
    ],
)
def test_evaluate_mistakes(
    arguments: list[str], says: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(trained), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xception.evaluation.evaluate.evaluate", lambda *_, **__: pytest.fail("evaluated first"))
    assert main(["evaluate", str(trained), "digits", "--report", "/no/such/folder/r.html"]) == 2


def exit_status(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Of the installed command, in this process."""
    monkeypatch.setattr(sys, "argv", ["xception", *arguments])
    with pytest.raises(SystemExit) as leaving:
        script()
    return leaving.value.code


def test_closed_streams(
    trained: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after ``<&-`` and ``>&-``."""
    monkeypatch.setattr(sys, "stdin", None)
    assert exit_status(monkeypatch, "predict", str(trained), "-") == 2
    assert "no image was named on standard input" in capsys.readouterr().err
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert exit_status(monkeypatch, "predict", str(trained), str(image)) == 0
    assert exit_status(monkeypatch, "predict", str(trained), "no-such.png") == 1
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_output_that_cannot_show_every_name(trained: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal or a pipe in ASCII."""
    korean = image.rename(image.with_name("고양이.png"))
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert exit_status(monkeypatch, "predict", str(trained), str(korean)) == 0
    assert exit_status(monkeypatch, "--help") == 0
    ascii_only.flush()
    text = ascii_only.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "\\uace0\\uc591\\uc774.png: " in text
    assert "usage: xception" in text


def test_names_that_are_not_utf8_read_alike_everywhere() -> None:
    assert printable(os.fsdecode(b"caf\xe9\n.jpg")) == "caf\\xe9\\n.jpg"


def test_a_wrong_cap_on_instruction_sets_is_told_by_every_command(
    trained: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XCEPTION_MAX_ISA", "abacus")
    for arguments in (["--version"], ["predict", str(trained), str(image)], ["evaluate", str(trained), "digits"]):
        assert main(arguments) == 2
        assert "XCEPTION_MAX_ISA" in capsys.readouterr().err


def test_evaluate_on_a_folder_of_one_class(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "3").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "data" / "3" / name)
    assert main(["evaluate", str(trained), str(tmp_path / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 2


def test_a_read_only_home_is_no_matter(trained: Path, tmp_path: Path) -> None:
    """Drawing keeps a cache of fonts there, and does without; a file in the home's place stops root too."""
    (tmp_path / "home").write_text("")
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    for variable in ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        environment.pop(variable, None)
    arguments = ["evaluate", str(trained), "digits", "--json", "--report", str(tmp_path / "report.html")]
    told = subprocess.run(
        [sys.executable, "-m", "xception", *arguments], env=environment, capture_output=True, check=False
    )
    assert told.returncode == 0
    assert re.fullmatch(rb"xception: the network ran on .*\n", told.stderr)
