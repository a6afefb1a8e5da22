"""The documents say what is so: the reference is current, the tree exists, the README's blocks run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from xception.cli.main import main
from xception.cli.parse import COMMANDS
from xception.cli.reference import reference

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "README.ko.md"]


def blocks(readme: str, language: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
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
