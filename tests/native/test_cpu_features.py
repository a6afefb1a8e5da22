"""Detection of instruction sets: against the kernel's own list, and for processors that are not at hand."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xception.ops import backend

native = pytest.importorskip("xception._native", reason="needs the compiled extension")
pytestmark = pytest.mark.native

X86 = platform.machine().lower() in ("x86_64", "amd64")
CPUINFO = Path("/proc/cpuinfo")
RunPython = Callable[..., subprocess.CompletedProcess[str]]

# Where each feature's bit lies: the Intel manual's tables for CPUID (volume 2A), written down a second time.
LEAF1_ECX = {"fma": 12, "osxsave": 27, "avx": 28, "f16c": 29}
LEAF7_EBX = {"avx2": 5, "avx512f": 16, "avx512dq": 17, "avx512bw": 30, "avx512vl": 31}
LEAF7_ECX = {"avx512_vnni": 11}
LEAF7_EDX = {"amx_bf16": 22, "avx512_fp16": 23, "amx_tile": 24, "amx_int8": 25}
LEAF7_1_EAX = {"avx512_bf16": 5, "amx_fp16": 21}
REGISTERS = {
    "leaf1_ecx": LEAF1_ECX,
    "leaf7_ebx": LEAF7_EBX,
    "leaf7_ecx": LEAF7_ECX,
    "leaf7_edx": LEAF7_EDX,
    "leaf7_1_eax": LEAF7_1_EAX,
}
SSE, AVX, AVX512, TILES = 0b11, 0b111, 0b1110_0111, 0b0110_0000_0000_1110_0111
PALETTE_1 = {"tile_palette_ebx": 8 << 16 | 64, "tile_palette_ecx": 16}

HASWELL = {"osxsave", "avx", "fma", "f16c", "avx2"}
SKYLAKE_SERVER = HASWELL | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
CASCADE_LAKE = SKYLAKE_SERVER | {"avx512_vnni"}
ZEN_4 = CASCADE_LAKE | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN_4 | {"avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
GRANITE_RAPIDS = SAPPHIRE_RAPIDS | {"amx_fp16"}
KNIGHTS_LANDING = HASWELL | {"avx512f"}

ALL_TO_BF16 = {"avx2", "avx512", "avx512_vnni", "avx512_bf16"}
ALL_OF_SPR = ALL_TO_BF16 | {"avx512_fp16", "amx_int8", "amx_bf16"}


def judge(bits: set[str], xcr0: int, permission: bool = True, **changes: int) -> set[str]:
    """The features the extension sees on a processor with these CPUID bits."""
    values = {
        register: sum(1 << position for name, position in table.items() if name in bits)
        for register, table in REGISTERS.items()
    }
    if "amx_tile" in bits:
        values |= PALETTE_1
    found = native.interpret_x86(**(values | changes), xcr0=xcr0, tile_permission=permission)
    return {name for name, usable in found.items() if usable}


@pytest.mark.parametrize(
    ("bits", "xcr0", "permission", "expected"),
    [
        pytest.param(set(), 0, False, set(), id="no AVX at all"),
        pytest.param(HASWELL, AVX, False, {"avx2"}, id="Haswell"),
        pytest.param(HASWELL, SSE, False, set(), id="Haswell, the system does not save AVX registers"),
        pytest.param(HASWELL - {"osxsave"}, AVX, False, set(), id="no XGETBV: the mask means nothing"),
        pytest.param(HASWELL - {"fma"}, AVX, False, set(), id="AVX2 without FMA"),
        pytest.param(HASWELL - {"f16c"}, AVX, False, set(), id="AVX2 without F16C"),
        pytest.param(KNIGHTS_LANDING, AVX512, False, {"avx2"}, id="AVX-512 F alone"),
        pytest.param(SKYLAKE_SERVER, AVX512, False, {"avx2", "avx512"}, id="Skylake server"),
        pytest.param(SKYLAKE_SERVER, AVX, False, {"avx2"}, id="Skylake server, AVX-512 state off"),
        pytest.param(CASCADE_LAKE, AVX512, False, {"avx2", "avx512", "avx512_vnni"}, id="Cascade Lake"),
        pytest.param(ZEN_4, AVX512, False, ALL_TO_BF16, id="Zen 4"),
        pytest.param(SAPPHIRE_RAPIDS, TILES, True, ALL_OF_SPR, id="Sapphire Rapids"),
        pytest.param(SAPPHIRE_RAPIDS, TILES, False, ALL_TO_BF16 | {"avx512_fp16"}, id="Sapphire Rapids, tiles refused"),
        pytest.param(
            SAPPHIRE_RAPIDS, AVX512, True, ALL_TO_BF16 | {"avx512_fp16"}, id="Sapphire Rapids, tiles not saved"
        ),
        pytest.param(GRANITE_RAPIDS, TILES, True, ALL_OF_SPR | {"amx_fp16"}, id="Granite Rapids"),
    ],
)
def test_known_processors(bits: set[str], xcr0: int, permission: bool, expected: set[str]) -> None:
    assert judge(bits, xcr0, permission) == expected


def test_an_unknown_tile_palette_is_not_used() -> None:
    larger_rows = 8 << 16 | 128
    assert judge(GRANITE_RAPIDS, TILES, tile_palette_ebx=larger_rows) == ALL_TO_BF16 | {"avx512_fp16"}


registers_32 = st.integers(0, 2**32 - 1)
any_registers = st.fixed_dictionaries(dict.fromkeys(REGISTERS, registers_32) | {"xcr0": st.integers(0, 2**64 - 1)})


@settings(deadline=None)  # a shared machine may take any time
@given(values=any_registers, permission=st.booleans())
def test_no_feature_without_what_it_stands_on(values: dict[str, int], permission: bool) -> None:
    found = native.interpret_x86(**values, **PALETTE_1, tile_permission=permission)
    names = {name for name, usable in found.items() if usable}
    amx = {name for name in names if name.startswith("amx")}
    assert not names or values["leaf1_ecx"] >> LEAF1_ECX["osxsave"] & 1
    assert not names or "avx2" in names
    assert names <= {"avx2"} or "avx512" in names
    assert not names or values["xcr0"] & AVX & ~1 == AVX & ~1
    assert not amx or permission
    assert "neon" not in names


@settings(deadline=None)  # a shared machine may take any time
@given(values=any_registers, mask=st.integers(0, 2**64 - 1))
def test_a_system_that_saves_less_never_gains_a_feature(values: dict[str, int], mask: int) -> None:
    whole = native.interpret_x86(**values, **PALETTE_1, tile_permission=True)
    values["xcr0"] &= mask
    less = native.interpret_x86(**values, **PALETTE_1, tile_permission=True)
    assert all(whole[name] or not usable for name, usable in less.items())


@pytest.mark.parametrize("wrong", [-1, 2**32, "1", 1.5, None])
def test_registers_of_a_wrong_kind_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError):
        native.interpret_x86(leaf7_ebx=wrong)


def test_what_is_assumed_is_counted_from_then_on(run_python: RunPython) -> None:
    code = (
        "import xception._native as n; before = n.cpu_features(); n.assume_features(['amx_bf16']);"
        "assert n.cpu_features() == before | {'amx_bf16': True};"
        "from xception.ops import backend; assert 'amx_bf16' in backend.detected_features()"
    )
    assert run_python(code).returncode == 0


def test_an_unknown_instruction_set_is_refused() -> None:
    before = native.cpu_features()
    with pytest.raises(ValueError, match="no instruction set is called 'amx'"):
        native.assume_features(["avx2", "amx"])
    assert native.cpu_features() == before


def kernel_flags() -> set[str]:
    line = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    return set(line.partition(":")[2].split())


def tiles_permitted() -> bool:
    """What the kernel says about this process, asked without the extension."""
    arch_prctl, get_permission, tile_data = 158, 0x1022, 18
    granted = ctypes.c_uint64(0)
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(arch_prctl, get_permission, ctypes.byref(granted)) == 0 and bool(granted.value >> tile_data & 1)


@pytest.mark.skipif(not (X86 and CPUINFO.exists()), reason="needs Linux on x86-64")
def test_detection_agrees_with_the_kernel() -> None:
    flags = kernel_flags()
    detected = set(backend.detected_features())  # asks for the tiles, so that `tiles_permitted` can tell
    expected = {
        "avx2": {"avx2", "fma", "f16c"} <= flags,
        "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags,
        "avx512_vnni": "avx512_vnni" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "avx512_fp16": "avx512_fp16" in flags,
        "amx_int8": {"amx_tile", "amx_int8"} <= flags and tiles_permitted(),
        "amx_bf16": {"amx_tile", "amx_bf16"} <= flags and tiles_permitted(),
    }
    # amx_fp16 is left out: the kernel's list does not name it.
    assert detected - {"amx_fp16"} == {name for name, usable in expected.items() if usable}


@pytest.mark.skipif(not (X86 and CPUINFO.exists()), reason="needs Linux on x86-64")
def test_the_processor_name_is_the_kernels() -> None:
    line = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("model name"))
    assert backend.cpu_name() == " ".join(line.partition(":")[2].split())


def test_every_feature_has_a_level() -> None:
    known = {*backend._X86_LEVELS, *backend._ARM_LEVELS, *backend._OTHER_LEVELS}
    assert {backend._PART_OF.get(name, name) for name in native.cpu_features()} <= known
