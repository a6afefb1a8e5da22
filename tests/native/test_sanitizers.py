"""The kernels' own tests once more, on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nanobind
import pytest

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/inference/test_kernels.py",
    "tests/inference/test_tiles.py",
    "tests/inference/test_pieces.py",
    "tests/inference/test_bytes.py",
    "tests/inference/test_compiled.py",
    "tests/inference/test_halves.py",
    "tests/native/test_batch_norm.py",
    "tests/native/test_unit_trainer.py",
    "tests/ops/test_convolutions.py",
    "tests/ops/test_separable.py",
    "tests/ops/test_steps.py",
    "tests/ops/test_trained_pieces.py",
    "tests/ops/test_units.py",
)
# Minutes each where every operation of a tile is a loop that is watched; smaller maps go through the same code.
TOO_LARGE = "test_layers_together and size2 and emulated"
MEASURES_MEMORY = "test_layers_share_their_memory"  # and the sanitizer holds freed memory back


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.timeout(5400)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers are preloaded, as on Linux")
def test_kernels_are_clean(tmp_path: Path) -> None:
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        runtimes.append(found.stdout.strip())
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip(f"the compiler has no sanitizers: {runtimes}")
    build = ["-DXCEPTION_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DPython_EXECUTABLE={sys.executable}"]
    build += [f"-Dnanobind_DIR={nanobind.cmake_dir()}", "-DSKBUILD_SABI_VERSION="]
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert cmake is not None
    subprocess.run([cmake, "-S", ROOT, "-B", tmp_path / "build", *build], check=True, capture_output=True)
    subprocess.run([cmake, "--build", tmp_path / "build", "-j", "2"], check=True, capture_output=True)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "_native*.so"))
    (extension,) = (tmp_path / "build").glob("_native*.so")
    shutil.copy(extension, tmp_path / "src" / "xception")
    # The editable install would put its own extension before this one.
    plain = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import pytest; import xception._native as n; assert n.__file__.startswith(sys.argv[1]), n.__file__;"
        "sys.exit(pytest.main(sys.argv[2:]))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "src"),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they took
        "OMP_NUM_THREADS": "1",
    }
    tests = [
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=2000",
        "-k",
        f"not ({TOO_LARGE}) and not {MEASURES_MEMORY}",
        *TESTS,
    ]
    command = [sys.executable, "-c", plain, str(tmp_path), *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "runtime error" not in done.stdout + done.stderr
