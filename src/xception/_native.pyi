"""The compiled extension's signatures; built from native/src/bindings.cpp, missing without a C++ compiler."""

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]

INTERFACE: int

def cpu_name() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def interpret_x86(
    *,
    leaf1_ecx: int = 0,
    leaf7_ebx: int = 0,
    leaf7_ecx: int = 0,
    leaf7_edx: int = 0,
    leaf7_1_eax: int = 0,
    tile_palette_ebx: int = 0,
    tile_palette_ecx: int = 0,
    xcr0: int = 0,
    tile_permission: bool = False,
) -> dict[str, bool]: ...

class Network:
    """A network whose layers are added one by one, run without Python in between; see native/src/network.hpp."""

    def __init__(self, level: str, type: str, channels: int, threads: int, latency: bool = False) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def level(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...
    def convolution(
        self,
        input: int,
        *,
        weights: _Floats,
        bias: _Floats | None = None,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        padding: str = "fixed",
        amount: int = 0,
        input_relu: bool = False,
        residual: int = -1,
        activation: str = "none",
    ) -> int: ...
    def separable(
        self,
        input: int,
        *,
        filters: _Floats,
        filter_bias: _Floats | None = None,
        middle: str = "none",
        weights: _Floats,
        bias: _Floats | None = None,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        padding: str = "fixed",
        amount: int = 0,
        input_relu: bool = False,
        residual: int = -1,
        activation: str = "none",
    ) -> int: ...
    def depthwise(
        self,
        input: int,
        *,
        filters: _Floats,
        bias: _Floats | None = None,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        padding: str = "fixed",
        amount: int = 0,
        input_relu: bool = False,
        residual: int = -1,
        activation: str = "none",
    ) -> int: ...
    def grouped(
        self,
        input: int,
        *,
        weights: _Floats,
        bias: _Floats | None = None,
        segments: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        padding: str = "fixed",
        amount: int = 0,
        residual: int = -1,
        activation: str = "none",
    ) -> int: ...
    def pool(
        self,
        input: int,
        *,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        padding: str = "fixed",
        amount: int = 0,
        residual: int = -1,
        relu: bool = False,
    ) -> int: ...
    def load(self, channels: int = 0) -> int: ...
    def reduce(self, input: int, *, maximum: bool = False) -> int: ...
    def linear(self, input: int, *, weights: _Floats, bias: _Floats | None = None, activation: str = "none") -> int: ...
    def shape(self, value: int, height: int, width: int) -> tuple[int, int, int]: ...
    def profile(self, images: _Floats, value: int, repeats: int = 5) -> list[float]: ...
    def run(self, images: _Floats, value: int, output: _Floats, beside: _Floats | None = None) -> None: ...
