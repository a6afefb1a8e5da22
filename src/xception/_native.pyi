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
    ) -> int: ...
    def load(self, channels: int = 0) -> int: ...
    def reduce(self, input: int, *, maximum: bool = False) -> int: ...
    def linear(self, input: int, *, weights: _Floats, bias: _Floats | None = None, activation: str = "none") -> int: ...
    def shape(self, value: int, height: int, width: int) -> tuple[int, int, int]: ...
    def profile(self, images: _Floats, value: int, repeats: int = 5) -> list[float]: ...
    def run(self, images: _Floats, value: int, output: _Floats, beside: _Floats | None = None) -> None: ...

class Optimiser:
    """Steps of an optimiser, and of a running average, in one pass over memory; see native/src/optimise.hpp.

    `rows` N x 6: the addresses of weight, gradient, first, second and average, and the size. They are believed:
    xception/ops/steps.py alone makes them.
    """

    def __init__(self, level: str, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    def step(
        self,
        rows: NDArray[np.uint64],
        rule: str,
        *,
        nesterov: bool = False,
        momentum: bool = False,
        begins: bool = False,
        decays: bool = False,
        scale: float = 1.0,
        rate: float = 0.0,
        decay: float = 0.0,
        first: float = 0.0,
        second: float = 0.0,
        rest: float = 0.0,
        epsilon: float = 0.0,
        correction: float = 1.0,
        share: float = 0.0,
    ) -> None: ...
