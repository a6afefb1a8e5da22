"""The rules no reviewer should have to remember: imports point downwards, and nothing runs foreign code.

Both are read from the source with `ast`, so a rule also holds for code that no test reaches. Imports inside
functions and under `TYPE_CHECKING` count: the arrows are about who may know whom, not about load time.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "xception"

# From the ground up. A room imports only from the rooms above it in this list; rooms of one line do not know each
# other. `_native` is the compiled extension, `xception` the package's own __init__ with the public names.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors", "_native", "_version"),
    ("data",),
    ("ops",),
    ("models",),
    ("weights",),
    ("inference",),  # which evaluation and training run a network through that does not learn
    ("evaluation",),
    ("training",),
    ("dense", "explain", "export", "benchmark"),
    ("serving",),
    ("experiments",),
    ("xception",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

RUNS_CODE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNS_CODE_CALLS = {
    "builtins.eval",
    "builtins.exec",
    "eval",
    "exec",
    "os.popen",
    "os.system",
    "shutil.unpack_archive",
    "torch.hub.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.unsafe_load",
}


# ------------------------------------------------------------------------------------------------ reading sources


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of "xception.data.decode" is "data"; that of "xception" itself is "xception"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def dotted(node: ast.AST) -> str:
    """The text of a plain chain of names such as `torch.load`; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        front = dotted(node.value)
        return f"{front}.{node.attr}" if front else ""
    return ""


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that is imported: `from a import b` gives "a.b".

    `package`: what relative imports start from. Names given to `import_module` as text count as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


# ------------------------------------------------------------------------------------------------ the rules


def arrows_up(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of this module that run the wrong way."""
    package = module if is_package else module.rpartition(".")[0]
    own = room_of(module)
    if own not in RANK:
        return [f"{module}: no such room: give {own!r} a place in ROOMS"]
    wrong = []
    for line, name in imported(ast.parse(source), package):
        if name.split(".")[0] != "xception":
            continue
        target = room_of(name)
        if target not in RANK:
            target = "xception"  # a public name, taken from the package itself
        if target != own and RANK[target] >= RANK[own]:
            wrong.append(f"{module}:{line}: {own} imports {name}, which is {target}, above it")
    return wrong


def runs_foreign_code(source: str) -> list[str]:
    """What in this source could run code from a file, with its lines."""
    tree = ast.parse(source)
    found = [
        (line, f"import of {name}")
        for line, name in imported(tree, "")
        if name.split(".")[0] in RUNS_CODE_MODULES or name == "torch.load" or name in RUNS_CODE_CALLS
    ]
    safe_loads = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_weights_only(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.load" and id(node) not in safe_loads:
            found.append((node.lineno, "torch.load without weights_only=True"))
        elif isinstance(node, ast.Attribute) and node.attr == "extractall":
            found.append((node.lineno, "extractall"))
        elif isinstance(node, (ast.Attribute, ast.Name)) and dotted(node) in RUNS_CODE_CALLS:
            found.append((node.lineno, dotted(node)))
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell") and not _is_false(node.value):
            found.append((node.value.lineno, f"{node.arg}="))
    return [f"line {line}: {what}" for line, what in sorted(set(found))]


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_weights_only(call: ast.Call) -> bool:
    return any(
        keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in call.keywords
    )


# ------------------------------------------------------------------------------------------------ held to them


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    is_package = path.name == "__init__.py"
    assert arrows_up(path.read_text(encoding="utf-8"), module_name(path), is_package=is_package) == []


@pytest.mark.parametrize(
    "path",
    python_files(PACKAGE, ROOT / "benchmarks", ROOT / "examples"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_runs_foreign_code(path: Path) -> None:
    assert runs_foreign_code(path.read_text(encoding="utf-8")) == []


def test_no_junk_drawers() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert [str(path) for path in python_files(PACKAGE, ROOT / "tests") if path.stem in drawers] == []


def test_the_extension_is_taken_from_one_place_in_ops() -> None:
    """`ops/backend.py` decides whether the extension may be used; who imports it directly goes around that."""
    direct = [
        str(path.relative_to(PACKAGE))
        for path in python_files(PACKAGE)
        for _, name in imported(ast.parse(path.read_text(encoding="utf-8")), "")
        if name.startswith("xception._native")
    ]
    assert set(direct) == {"ops/backend.py"}


# ------------------------------------------------------------------------------------------------ that they can fail


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("xception.data.loader", "from xception.models import registry"),
        ("xception.data.loader", "from xception import models"),
        ("xception.data.loader", "from xception import create_model"),
        ("xception.data.loader", "import xception"),
        ("xception.data.loader", "import xception.training.loop as loop"),
        ("xception.data.loader", "from ..training import loop"),
        ("xception.data.loader", "from .. import training"),
        ("xception.data.loader", "def f():\n    from xception.ops import reference"),
        ("xception.data.loader", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import xception.ops"),
        ("xception.data.loader", "import importlib\nimportlib.import_module('xception.cli')"),
        ("xception.errors", "from xception.data import labels"),
        ("xception.explain", "from xception.export import onnx"),
        ("xception.inference.runner", "from xception.training.train import train"),
        ("xception.attic.old", ""),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str) -> None:
    assert len(arrows_up(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("xception.data.loader", "from xception.errors import DataError\nfrom xception.data.labels import counts"),
        ("xception.data.loader", "from .labels import counts\nfrom ..errors import DataError\nfrom . import labels"),
        ("xception.data.loader", "import torch, numpy\nfrom PIL import Image"),
        ("xception.explain", "from xception.inference.predictor import Predictor"),
        ("xception.cli.main", "import xception\nfrom xception import __version__, training"),
        ("xception.ops.backend", "import xception._native as native"),
    ],
)
def test_a_right_arrow_is_not(module: str, source: str) -> None:
    assert arrows_up(source, module) == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert arrows_up("from .decode import decode_image", "xception.data", is_package=True) == []
    assert len(arrows_up("from ..training import loop", "xception.data", is_package=True)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "from importlib import import_module\nimport_module('pickle')",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import torch\nload = torch.load",
        "from torch import load",
        "import torch\ntorch.jit.load(path)",
        "eval(text)",
        "exec(text)",
        "run = eval",
        "archive.extractall(folder)",
        "import shutil\nshutil.unpack_archive(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "import os\nos.system(line)",
    ],
)
def test_running_foreign_code_is_found(source: str) -> None:
    assert len(runs_foreign_code(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True, map_location='cpu')",
        "model.eval()",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "from safetensors.torch import load_file\nload_file(path)",
        "import subprocess\nsubprocess.run([program])",
        "import json\njson.load(file)",
    ],
)
def test_harmless_code_is_not(source: str) -> None:
    assert runs_foreign_code(source) == []
