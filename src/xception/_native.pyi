"""The compiled extension's signatures; built from native/src/bindings.cpp, missing without a C++ compiler."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]

INTERFACE: int

def cpu_name() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def assume_features(names: list[str]) -> None: ...
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

class Crews:
    """Threads and the memory of their runs, for networks that may share them."""

    threads: int

    def __init__(self, threads: int) -> None: ...

class Network:
    """A network whose layers are added one by one, run without Python in between; see native/src/network.hpp."""

    def __init__(self, level: str, type: str, channels: int, crews: Crews, latency: bool = False) -> None: ...
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
        steps: _Floats | None = None,
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
        steps: _Floats | None = None,
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

_Array: TypeAlias = NDArray[Any]

class UnitTrainer:
    """Arrays are contiguous NumPy arrays: float32; maps in bf16 as int16; channel blocks and winners as uint8."""

    threads: int
    level: str

    def __init__(self, level: str, type: str, threads: int, openmp: tuple[int, int, int] = (0, 0, 0)) -> None: ...
    def blocked_bytes(self, channels: int, sizes: tuple[int, int, int]) -> int: ...
    def forward(
        self,
        sizes: tuple[int, int, int],
        input: _Array,
        *,
        scale: _Array | None,
        shift: _Array | None,
        relu: bool,
        dilation: int,
        filters: _Array,
        weights: _Array,
        z: _Array,
        mean: _Array,
        variance: _Array,
    ) -> None: ...
    def backward(
        self,
        sizes: tuple[int, int, int],
        input: _Array,
        *,
        scale: _Array | None,
        shift: _Array | None,
        relu: bool,
        dilation: int,
        filters: _Array,
        weights: _Array,
        z: _Array,
        gradient: _Array,
        out_scale: _Array | None,
        out_shift: _Array | None,
        out_relu: bool,
        factors: _Array,
        in_mean: _Array | None,
        residual: _Array | None,
        input_gradient: _Array | None,
        filter_gradient: _Array,
        weight_gradient: _Array | None,
        sums: _Array | None,
    ) -> None: ...
    def convolve(
        self,
        sizes: tuple[int, int, int],
        input: _Array,
        *,
        output: tuple[int, int, int],
        kernel: int,
        stride: int,
        pad_top: int,
        pad_left: int,
        weights: _Array,
        z: _Array,
        mean: _Array,
        variance: _Array,
    ) -> None: ...
    def convolve_backward(
        self,
        sizes: tuple[int, int, int],
        input: _Array,
        *,
        output: tuple[int, int, int],
        kernel: int,
        stride: int,
        pad_top: int,
        pad_left: int,
        weights: _Array,
        z: _Array,
        gradient: _Array,
        out_scale: _Array | None,
        out_shift: _Array | None,
        out_relu: bool,
        factors: _Array,
        input_gradient: _Array | None,
        adds: bool,
        weight_gradient: _Array | None,
    ) -> None: ...
    def finish(
        self,
        sizes: tuple[int, int, int],
        channels: int,
        *,
        z: _Array,
        scale: _Array,
        shift: _Array,
        relu: bool,
        residual: _Array | None,
        residual_scale: _Array | None,
        residual_shift: _Array | None,
        output: _Array,
    ) -> None: ...
    def gradient_sums(
        self,
        sizes: tuple[int, int, int],
        channels: int,
        *,
        z: _Array,
        scale: _Array,
        shift: _Array,
        relu: bool,
        mean: _Array,
        gradient: _Array,
        sums: _Array,
    ) -> None: ...
    def pool(
        self,
        sizes: tuple[int, int, int],
        channels: int,
        *,
        pooled: tuple[int, int, int],
        stride: int,
        dilation: int,
        pad_top: int,
        pad_left: int,
        z: _Array,
        scale: _Array,
        shift: _Array,
        residual: _Array | None,
        residual_scale: _Array | None,
        residual_shift: _Array | None,
        output: _Array,
        winners: _Array,
    ) -> None: ...
    def pool_backward(
        self,
        sizes: tuple[int, int, int],
        channels: int,
        *,
        pooled: tuple[int, int, int],
        stride: int,
        dilation: int,
        pad_top: int,
        pad_left: int,
        gradient: _Array,
        winners: _Array,
        input_gradient: _Array,
    ) -> None: ...
    @staticmethod
    def normalise(norm: _Array, *, gamma: _Array | None, beta: _Array | None, epsilon: float) -> None: ...
    @staticmethod
    def norm_gradients(
        norm: _Array, *, epsilon: float, pixels: int, sums: _Array, gradients: _Array, factors: _Array
    ) -> None: ...

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
