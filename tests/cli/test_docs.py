"""The documents say what is so: the reference is current, the tree exists, the README's blocks run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from xception.cli.evaluate import Evaluate
from xception.cli.main import main
from xception.cli.parse import COMMANDS, parse
from xception.cli.reference import reference
from xception.data.importance import read_importance

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "README.ko.md"]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m xception.cli.reference > docs/cli.md"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"xception {command}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_exists(readme: str) -> None:
    """Each line of the tree block is a path, indented by its depth, then a comment."""
    tree = next(b for b in blocks(readme, "text") if "src/xception/" in b)
    folders: list[str] = []
    seen = 0
    for line in tree.splitlines():
        path = line.split("#")[0].rstrip()
        if not path.strip():
            continue
        depth = (len(path) - len(path.lstrip())) // 4
        folders = folders[:depth]
        for name in path.split():
            full = ROOT.joinpath(*folders, name)
            assert full.exists(), f"{readme}: {full.relative_to(ROOT)} does not exist"
            seen += 1
        folders.append(path.split()[0])
    assert seen > 30


def test_both_readmes_have_the_same_blocks_and_figures() -> None:
    english, korean = ([b for language in ("sh", "python") for b in blocks(r, language)] for r in READMES)
    strip = [re.sub(r"#.*", "", b) for b in english], [re.sub(r"#.*", "", b) for b in korean]
    assert strip[0] == strip[1]
    figures = [
        re.findall(r"(?<![\w.])\d[\d,.]*\d(?![\w.])", (ROOT / r).read_text(encoding="utf-8").split("```")[-1])
        for r in READMES
    ]
    assert figures[0] == figures[1]


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes = blocks("README.md", "python")
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "README.md", "exec"), {})


def test_the_command_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [b for b in blocks("README.md", "sh") if "runs/digits" in b]
    assert len(commands) == 1
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for line in commands[0].splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "xception"
            assert main(words[1:]) == 0, line


def test_the_page_on_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its Python runs; its training command resolves; its layout of a class-weight file is one."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/data.md", "python")
    exec(compile(code, "docs/data.md", "exec"), {})
    assert len(list((tmp_path / "digits-shards").glob("*.tar"))) == 5
    train, evaluate = (" ".join(b.split("\\\n")) for b in blocks("docs/data.md", "console"))
    assert main([*shlex.split(train, comments=True)[1:], "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["classes"], told["images"]["train"], told["images"]["test"]) == (325, 12_000, 3_000)
    assert told["fields"]["horizontal_flip"]["value"] == 0.0
    assert isinstance(parse(shlex.split(evaluate, comments=True)[1:]), Evaluate)
    layout = next(b for b in blocks("docs/data.md", "text") if b.startswith("class,weight"))
    rows = [re.split(r" {2,}", line) for line in layout.splitlines()]
    Path("class_weights.csv").write_text("\n".join(row[0] for row in rows), encoding="utf-8")
    Path("class_weights.json").write_text(rows[0][1], encoding="utf-8")
    for name in ("class_weights.csv", "class_weights.json"):
        assert read_importance(name, ("indoors", "cat", "dog")) == (3.0, 12.5, 0.0)
