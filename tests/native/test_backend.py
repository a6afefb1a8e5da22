"""The choice of a path and its cap, with the extension and without it."""

from __future__ import annotations

import json
import platform
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from xception.errors import ConfigError
from xception.ops import backend

RunPython = Callable[..., subprocess.CompletedProcess[str]]

needs_native = pytest.mark.skipif(not backend.native_available(), reason="needs the compiled extension")
on_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="needs x86-64")

REPORT = """
import json
from xception.ops import backend
print(json.dumps([backend.detected_features(), backend.cpu_features(), backend.available_levels()]))
"""
# Put before an import of the package: as if it had been installed without a compiler.
WITHOUT_NATIVE = "import sys; sys.modules['xception._native'] = None\n"
MISSING = "the compiled extension is missing (no C++ compiler at install time?)"

# A finder in front of all others, that takes the extension from a file of our choice.
FROM_FILE = """
import importlib.util, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "xception._native":
            return importlib.util.spec_from_file_location(name, {path!r})
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_process_choice", "auto")


# ------------------------------------------------------------------------------------------------ the cap


@pytest.mark.native
@needs_native
@on_x86
@pytest.mark.parametrize("cap", backend._X86_LEVELS)
def test_the_cap_removes_everything_above_it(run_python: RunPython, cap: str) -> None:
    free = json.loads(run_python(REPORT).stdout)
    capped = json.loads(run_python(REPORT, XCEPTION_MAX_ISA=cap).stdout)
    assert free[0] == free[1]  # no cap: all that was detected is usable
    assert capped[0] == free[0]  # what was detected is told apart from what may be used
    allowed = backend._X86_LEVELS[: backend._X86_LEVELS.index(cap) + 1]
    assert capped[2] == [level for level in free[2] if level in allowed]
    assert capped[1] == [name for name in free[1] if backend._PART_OF.get(name, name) in allowed]


@pytest.mark.native
@needs_native
@on_x86
def test_an_empty_cap_is_no_cap(run_python: RunPython) -> None:
    assert run_python(REPORT, XCEPTION_MAX_ISA="").stdout == run_python(REPORT).stdout


@pytest.mark.native
@needs_native
def test_levels_start_at_scalar_and_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XCEPTION_MAX_ISA", raising=False)
    levels = backend.available_levels()
    assert levels[0] == "scalar"
    assert set(levels[1:]) <= set(backend.cpu_features())
    monkeypatch.setenv("XCEPTION_MAX_ISA", "scalar")
    assert backend.available_levels() == ("scalar",)
    assert backend.cpu_features() == ()


AVX512 = ("avx2", "avx512", "avx512_vnni")


@on_x86
@pytest.mark.parametrize(
    ("features", "inference", "training", "fast"),
    [
        ((), "scalar", "scalar", "fp32"),
        (AVX512, "avx512", "avx512", "fp32"),
        ((*AVX512, "avx512_bf16"), "avx512_bf16", "avx512_bf16", "bf16"),
        ((*AVX512, "avx512_bf16", "avx512_fp16"), "avx512_fp16", "avx512", "bf16"),
        ((*AVX512, "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"), "amx_bf16", "amx_bf16", "bf16"),
    ],
)
def test_kernels_of_bf16(
    features: tuple[str, ...], inference: str, training: str, fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision arithmetic is for inference only, and tells that pairs of bf16 are slow."""
    monkeypatch.setattr(backend, "cpu_features", lambda: features)
    backend._kernel_level.cache_clear()
    try:
        found = backend.kernel_level("bf16"), backend.training_level("bf16"), backend.fast_precision()
    finally:
        backend._kernel_level.cache_clear()
    assert found == (inference, training, fast)


@on_x86
@pytest.mark.parametrize("bad", ["avx3", "AVX2", "neon", "none", " ", "avx2,avx512"])
def test_an_unknown_cap_is_one_line_with_the_choices(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv("XCEPTION_MAX_ISA", bad)
    for ask in (backend.cpu_features, backend.available_levels, backend.describe):
        with pytest.raises(ConfigError) as caught:
            ask()
        message = str(caught.value)
        assert "\n" not in message
        assert "XCEPTION_MAX_ISA" in message
        assert repr(bad) in message
        assert all(level in message for level in backend._X86_LEVELS)


@on_x86
def test_an_unknown_cap_is_noticed_without_the_extension_too(run_python: RunPython) -> None:
    done = run_python(WITHOUT_NATIVE + REPORT, XCEPTION_MAX_ISA="avx3")
    assert done.returncode == 1
    assert "ConfigError: expected XCEPTION_MAX_ISA to be one of" in done.stderr


@pytest.mark.parametrize(
    ("machine", "levels"),
    [("arm64", ("scalar", "neon")), ("aarch64", ("scalar", "neon")), ("riscv64", ("scalar",))],
)
def test_the_choices_are_the_architectures(
    monkeypatch: pytest.MonkeyPatch, machine: str, levels: tuple[str, ...]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("XCEPTION_MAX_ISA", "avx2")
    with pytest.raises(ConfigError, match=f"one of {', '.join(levels)} on {machine}, got 'avx2'"):
        backend.cpu_features()


# ------------------------------------------------------------------------------------------------ the choice


@pytest.mark.native
@needs_native
def test_auto_takes_the_extension() -> None:
    assert backend.active_backend() == "native"


def test_a_forced_backend_ends_with_its_block() -> None:
    before = backend.active_backend()
    with backend.use_backend("reference"):
        assert backend.active_backend() == "reference"
        with backend.use_backend("auto"):
            assert backend.active_backend() == before
        assert backend.active_backend() == "reference"
    assert backend.active_backend() == before


def test_a_forced_backend_ends_with_an_error_too() -> None:
    before = backend.active_backend()
    with pytest.raises(RuntimeError, match="inside"), backend.use_backend("reference"):
        raise RuntimeError("inside")
    assert backend.active_backend() == before


def test_set_backend_holds_for_other_threads_and_use_backend_does_not() -> None:
    seen: list[str] = []

    def look() -> None:
        seen.append(backend.active_backend())

    automatic = backend.active_backend()
    with backend.use_backend("reference"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    backend.set_backend("reference")
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [automatic, "reference"]


@pytest.mark.parametrize("bad", ["gpu", "Native", "", None])
def test_an_unknown_backend_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="expected the backend 'auto', 'native' or 'reference'"):
        backend.set_backend(bad)
    with pytest.raises(ConfigError), backend.use_backend(bad):
        pass


# ------------------------------------------------------------------------------------------------ no extension


def test_without_the_extension_it_runs_and_says_so_once(run_python: RunPython) -> None:
    done = run_python(
        WITHOUT_NATIVE
        + f"""
from xception.ops import backend
assert backend.describe() == 'plain PyTorch: {MISSING}'
assert (backend.native_available(), backend.available_levels(), backend.cpu_features()) == (False, (), ())
assert [backend.active_backend() for _ in range(3)] == ['reference'] * 3
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == f"xception: running on plain PyTorch: {MISSING}\n"


def test_without_the_extension_nothing_is_said_where_plain_pytorch_was_asked_for(run_python: RunPython) -> None:
    done = run_python(
        WITHOUT_NATIVE
        + """
from xception.ops import backend
with backend.use_backend('reference'):
    backend.active_backend()
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_forcing_a_missing_extension_is_a_clear_error(run_python: RunPython) -> None:
    done = run_python(
        WITHOUT_NATIVE
        + """
from xception.errors import ConfigError
from xception.ops import backend
for force in (backend.set_backend, lambda choice: backend.use_backend(choice).__enter__()):
    try:
        force('native')
    except ConfigError as error:
        print(error)
"""
    )
    assert done.stdout == f"the backend 'native' cannot be used: {MISSING}\n" * 2


def test_an_extension_that_does_not_load_is_told_apart(run_python: RunPython, tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a shared object")
    done = run_python(FROM_FILE.format(path=str(broken)) + "from xception.ops import backend\nbackend.active_backend()")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("xception: running on plain PyTorch: the compiled extension does not load (")
    assert "_native.so" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_extension_with_another_interface_is_not_used(run_python: RunPython, tmp_path: Path) -> None:
    stale = tmp_path / "_native.py"
    stale.write_text("INTERFACE = 0\n")
    done = run_python(FROM_FILE.format(path=str(stale)) + "from xception.ops import backend\nprint(backend.describe())")
    assert "not of this version (its interface is 0, " in done.stdout
    assert "install the package again" in done.stdout


def test_an_extension_for_another_python_is_named(run_python: RunPython, tmp_path: Path) -> None:
    (tmp_path / "_native.cpython-399-x86_64-linux-gnu.so").touch()
    done = run_python(
        WITHOUT_NATIVE
        + f"import xception; xception.__path__ = [{str(tmp_path)!r}, *xception.__path__]\n"
        + "from xception.ops import backend\nprint(backend.describe())"
    )
    assert "is for another Python (_native.cpython-399-x86_64-linux-gnu.so)" in done.stdout


# ------------------------------------------------------------------------------------------------ many at once


@pytest.mark.parametrize("prelude", ["", WITHOUT_NATIVE], ids=["as installed", "without the extension"])
def test_sixteen_threads_import_it_at_once(run_python: RunPython, prelude: str) -> None:
    done = run_python(
        prelude
        + """
import threading
start, seen = threading.Barrier(16), []
def work():
    start.wait()
    from xception.ops import backend
    seen.append((backend.active_backend(), backend.cpu_features(), backend.describe()))
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(seen), len(set(seen)))
"""
    )
    assert done.stdout == "16 1\n", done.stderr
    assert done.stderr.count("\n") == (1 if "plain PyTorch" in done.stderr else 0)


@pytest.mark.skipif(platform.system() == "Windows", reason="needs fork")
def test_it_answers_the_same_after_a_fork(run_python: RunPython) -> None:
    done = run_python(
        """
import os
from xception.ops import backend
before = (backend.active_backend(), backend.cpu_features(), backend.available_levels())
for _ in range(20):
    child = os.fork()
    if child == 0:
        same = (backend.active_backend(), backend.cpu_features(), backend.available_levels()) == before
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
print("same")
"""
    )
    assert done.stdout == "same\n", done.stderr
    assert done.stderr.count("\n") == (1 if "plain PyTorch" in done.stderr else 0)


# ------------------------------------------------------------------------------------------------ the import


def test_the_import_is_light(run_python: RunPython) -> None:
    done = run_python(
        """
import sys
import xception
before = set(sys.modules)
import xception.ops.backend
print(sorted({"torch", "numpy"} & set(sys.modules)))
print(sorted({"typing", "dataclasses", "logging", "platform"} & (set(sys.modules) - before)))
"""
    )
    assert done.stdout == "[]\n[]\n", done.stderr
