"""The very machine code for AMX and AVX-512 FP16, on processors that have neither; see traps/traps.cpp."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xception.ops import backend

ROOT = Path(__file__).parents[2]
TRAPS = Path(__file__).parent / "traps"
FLAGS = "-O2 -std=c++20 -fPIC -shared -fno-strict-aliasing -ffp-contract=off"
SETS = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"

# Some of what tiles compute, in seconds; and what takes minutes.
LAYERS = ("tests/inference/test_kernels.py", "-k", "amx_bf16 or amx_fp16")
TRAINING = ("tests/ops/test_units.py", "-k", "amx_bf16")
SOME = "test_what_is_not_finite or (test_numbers_beyond and 1-False-100000)"
SOME_HALF_MAPS = (*LAYERS[:1], "tests/inference/test_tiles.py", "-k", f"(amx_bf16 or amx_fp16) and ({SOME})")
NETWORKS = (
    "tests/inference/test_kernels.py",
    "tests/inference/test_tiles.py",
    "tests/inference/test_bytes.py",
    "tests/inference/test_compiled.py",
    "-k",
    "(amx_bf16 or amx_fp16 or test_compiled) and not emulated",
)
# Every operation of half precision is trapped as well: a network would take minutes.
HALF_MAPS = (*NETWORKS[:3], "-k", "(amx_bf16 or amx_fp16) and (test_kernels or test_tiles or test_layers_are_exact)")
ALL_TRAINING = ("tests/ops", "tests/native/test_unit_trainer.py")

TILES = {"configure", "release", "zero", "load", "store", "bf16"}

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or platform.machine() != "x86_64",
        reason="signals of Linux on x86 are what traps.cpp knows",
    ),
    pytest.mark.skipif("avx512" not in backend.detected_features(), reason="what lies around the tiles is AVX-512"),
    pytest.mark.skipif("amx_bf16" in backend.detected_features(), reason="the processor's own tiles are tested anyway"),
]


def compiles(*flags: str) -> bool:
    if shutil.which("c++") is None:
        return False
    command = ["c++", *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


FEATURES = backend.detected_features()
HALF_MAPS_MARKS = (
    pytest.mark.skipif("avx512_fp16" in FEATURES, reason="the processor executes half precision itself"),
    pytest.mark.skipif(
        "avx512_bf16" not in FEATURES, reason="those kernels round to bf16 by AVX-512, which is missing"
    ),
    pytest.mark.skipif(not compiles("-mavx512fp16"), reason="the compiler builds no kernels for AVX-512 FP16"),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("traps") / "traps.so"
    command = ["c++", *FLAGS.split(), *SETS.split(), "-o", str(built), str(TRAPS / "traps.cpp")]
    subprocess.run(command, check=True, capture_output=True)
    return built


def run(library: Path, selection: tuple[str, ...], halves: bool) -> dict[str, int]:
    """These tests in a process where the instructions are trapped: how many of each were executed."""
    counts = library.with_name("counts.json")
    counts.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "XCEPTION_MAX_ISA"} | {
        "PYTHONPATH": str(TRAPS),
        "XCEPTION_TRAPS": str(library),
        "XCEPTION_TRAPS_HALF": str(int(halves)),
        "XCEPTION_TRAPS_COUNTS": str(counts),
    }
    options = ["-p", "trapped", "-q", "-n", "0", "-p", "no:cacheprovider", "-o", "timeout=1200"]
    command = [sys.executable, "-m", "pytest", *options, *selection]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, int] = json.loads(counts.read_text())
    return found


def executed(counts: dict[str, int]) -> set[str]:
    return {name for name, count in counts.items() if count > 0}


@pytest.mark.parametrize(
    ("selection", "halves", "more"),
    [
        (LAYERS, False, {"fp16"}),
        (TRAINING, False, set()),
        pytest.param(SOME_HALF_MAPS, True, {"fp16", "half"}, marks=HALF_MAPS_MARKS),
    ],
    ids=["layers", "training", "half maps"],
)
def test_tiles(library: Path, selection: tuple[str, ...], halves: bool, more: set[str]) -> None:
    counts = run(library, selection, halves)
    assert executed(counts) == TILES | more
    assert counts["configure"] == counts["release"]  # every thread gives back what it configured


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(
    ("selection", "halves"),
    [(NETWORKS, False), pytest.param(HALF_MAPS, True, marks=HALF_MAPS_MARKS)],
    ids=["networks", "half maps"],
)
def test_all_on_tiles(library: Path, selection: tuple[str, ...], halves: bool) -> None:
    counts = run(library, selection, halves)
    assert executed(counts) == TILES | {"fp16", "bytes"} | ({"half"} if halves else set())
    assert counts["configure"] == counts["release"]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_training(library: Path) -> None:
    assert executed(run(library, ALL_TRAINING, halves=False)) >= TILES
