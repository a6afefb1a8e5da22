"""What is installed: one version everywhere, declared dependencies, and the right files in the archives."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from xception._version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "xception"
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]

needs_the_build_backend = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("scikit_build_core", "nanobind"))
    or (shutil.which("cmake") is None and find_spec("cmake") is None),
    reason="needs scikit-build-core, nanobind and cmake",
)


# ------------------------------------------------------------------------------------------------ declarations


def test_one_version_everywhere() -> None:
    assert PROJECT["version"] == __version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE).group(1) == __version__  # type: ignore[union-attr]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changes, re.MULTILINE)[0] in ("Unreleased", __version__)


def test_the_licence_is_the_one_declared() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def declared(*extras: str) -> list[Requirement]:
    """The requirements of these extras (of the package itself where none is named), extras of ours resolved."""
    lines = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    found = [Requirement(line) for line in (lines if extras else PROJECT["dependencies"])]
    ours = [requirement for requirement in found if requirement.name == PROJECT["name"]]
    inner = [one for requirement in ours for one in declared(*sorted(requirement.extras))]
    return [requirement for requirement in found if requirement not in ours] + inner


def test_every_requirement_has_a_floor_and_is_met_here() -> None:
    for requirement in declared() + declared("dev"):
        assert any(part.operator in (">=", "==") for part in requirement.specifier), f"{requirement}: no floor"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        assert requirement.specifier.contains(version), f"{requirement}: {version} is installed"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def third_party_imports() -> Iterator[tuple[str, bool, str]]:
    """(top-level module, whether it is imported as soon as its file is, where) for all of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(node) for function in ast.walk(tree) if _is_deferred(function) for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"xception"}:
                yield name, id(node) not in inside, f"{path.relative_to(ROOT)}:{node.lineno}"


def _is_deferred(node: ast.AST) -> bool:
    type_checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    return type_checking or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Try))


def test_every_import_is_declared() -> None:
    distributions = importlib.metadata.packages_distributions()
    core = {canonical(requirement.name) for requirement in declared()}
    extras = {canonical(requirement.name) for requirement in declared(*PROJECT["optional-dependencies"])}
    wrong: dict[str, str] = {}  # one example a module
    for module, at_once, where in third_party_imports():
        names = {canonical(name) for name in distributions.get(module, [module])}
        if at_once and not names & core:
            wrong.setdefault(module, f"{where} imports it at once, but it is not among the dependencies")
        elif not names & (core | extras):
            wrong.setdefault(module, f"{where} imports it, but it is neither a dependency nor in an extra")
    assert wrong == {}


# ------------------------------------------------------------------------------------------------ archives


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all that is kept in the repository and can matter to a build, with litter that must not."""
    copy = tmp_path_factory.mktemp("checkout")
    litter = shutil.ignore_patterns("__pycache__", "*.so", ".*_cache")
    for name in ("src", "native", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=litter)
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    (copy / ".ci").mkdir()
    (copy / ".ci" / "run").touch()
    (copy / "runs").mkdir()
    (copy / "runs" / "model.safetensors").touch()
    (copy / "src" / "xception" / "__pycache__").mkdir()
    (copy / "src" / "xception" / "__pycache__" / "errors.cpython-399.pyc").touch()
    return copy


def run_hook(checkout: Path, hook: str, out: Path, **environment: str) -> Path:
    """Run one hook of the build back-end, as pip does, and return the archive."""
    code = f"import scikit_build_core.build as backend; print(backend.{hook}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


def package_files(checkout: Path) -> set[str]:
    source = checkout / "src"
    files = {path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    return {path.relative_to(source).as_posix() for path in files}


@needs_the_build_backend
def test_without_a_compiler_the_wheel_is_plain_python_and_whole(checkout: Path, tmp_path: Path) -> None:
    wheel = run_hook(checkout, "build_wheel", tmp_path, CC="/bin/false", CXX="/bin/false")
    assert wheel.name == f"xception-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    info = f"xception-{PROJECT['version']}.dist-info"
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert names == package_files(checkout) | {f"{info}/{name}" for name in metadata}
    assert "xception/py.typed" in names
    code = "import xception.ops.backend as backend; print(backend.__file__); print(backend.describe())"
    environment = {name: value for name, value in os.environ.items() if name != "XCEPTION_MAX_ISA"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # -S: no site-packages, so no other xception and no torch
        env=environment | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [
        str(tmp_path / "site" / "xception" / "ops" / "backend.py"),
        "plain PyTorch: the compiled extension is missing (no C++ compiler at install time?)",
    ], done.stderr


@needs_the_build_backend
def test_the_sdist_holds_all_that_a_build_and_its_tests_need(checkout: Path, tmp_path: Path) -> None:
    archive_path = run_hook(checkout, "build_sdist", tmp_path)
    with tarfile.open(archive_path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {f"src/{name}" for name in package_files(checkout)}
    for folder in ("native/src", "tests"):
        files = (path for path in (checkout / folder).rglob("*") if path.is_file())
        expected |= {path.relative_to(checkout).as_posix() for path in files}
    expected |= {"CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert names - {""} == expected
