"""`xception.compile`: a trained network as one call, in the fastest engine that there is for it on this machine.

For Xceptions that is the compiled executor (native/): one call into C++, without Python between the layers. Networks
and machines that it does not cover go to OpenVINO where that is installed, else to PyTorch; `CompiledModel.backend` and
`CompiledModel.reason` say which and why. Nothing is replaced silently.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.inference.embedding import OUTPUTS, Output
from xception.inference.lowering import Uncovered
from xception.inference.native_engine import NativeEngine
from xception.inference.openvino_engine import OpenVinoEngine, Unusable, openvino_installed
from xception.inference.precision import COMPILED_PRECISIONS, CompiledPrecision
from xception.inference.torch_engine import TorchEngine
from xception.ops import backend as machine

Mode = Literal["throughput", "latency"]
Engine = Literal["auto", "native", "openvino", "torch"]
Images: TypeAlias = "Tensor | NDArray[Any]"

ENGINES: tuple[Engine, ...] = ("auto", "native", "openvino", "torch")
_MEAN_AND_STD = (0.5, 0.5)  # of Xception everywhere: pixels to -1..1


class CompiledModel:
    """A network in eval mode with its weights as they were when it was compiled; see `compile_model`.

    `backend` is what it runs on ("native", "openvino" or "torch"), `level` the instruction set of native kernels,
    `reason` why not on the compiled executor, or None. Calls from several threads are safe, and wait for each other.
    """

    level: str | None = None
    backend: Literal["native", "openvino", "torch"]

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: CompiledPrecision,
        num_threads: int,
        mode: Mode,
        backend: Engine,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        calibration: Images | None,
    ) -> None:
        self.precision, self.mode, self.num_threads = precision, mode, num_threads
        self.in_channels = int(model.config.in_channels)  # type: ignore[union-attr, arg-type]
        self.minimum_size = int(model.config.minimum_size)  # type: ignore[union-attr, arg-type]
        self._mean = self._per_channel("mean", mean, _MEAN_AND_STD[0])
        self._std = self._per_channel("std", std, _MEAN_AND_STD[1])
        self.reason: str | None = None
        self._forced = backend != "auto"
        self._engine = self._choose(model, backend, calibration)

    def __repr__(self) -> str:
        where = f"native, {self.level}" if self.backend == "native" else f"{self.backend}: {self.reason}"
        return f"CompiledModel({self.precision}, {self.mode}, {self.num_threads} threads, {where})"

    def __call__(self, images: Images, output: Output = "logits") -> Tensor:
        """Logits N `num_classes`, features N C H' W', or pooled features N C; float32 on the CPU.

        `images` are N C H W or N H W C (told by the number of channels; N C H W where both could be), a tensor or an
        array: float32, normalised as the network expects, or uint8 pixels, which are normalised with `mean` and `std`.
        Raises `ConfigError` for anything else.
        """
        if output not in OUTPUTS:
            raise ConfigError(f"output must be logits, features or pooled; got {output!r}")
        batch = self._channels_last(images)
        try:
            return self._engine(batch, output)
        except Unusable as unusable:  # OpenVINO, at this size
            if self._forced:
                raise ConfigError(str(unusable)) from unusable
            return self._in_torch_from_now_on(unusable)(batch, output)

    # ---- building -------------------------------------------------------------------------------------------

    def _choose(
        self, model: nn.Module, backend: Engine, calibration: Images | None
    ) -> NativeEngine | OpenVinoEngine | TorchEngine:
        """The engine; `backend`, `reason` and `level` are set on the way."""
        options: dict[str, Any] = {"num_threads": self.num_threads, "latency": self.mode == "latency"}
        why_not = self._why_not_native(backend)
        if why_not is None:
            like_these = None if calibration is None else self._channels_last(calibration)
            try:
                native = NativeEngine(model, precision=self.precision, calibration=like_these, **options)
            except Uncovered as uncovered:
                why_not = str(uncovered)
            else:
                self.backend, self.level = "native", native.level
                return native
        if backend == "native":
            raise ConfigError(f"the compiled executor does not cover this network here: {why_not}")
        if self.precision == "int8":
            raise ConfigError(f"int8 is for the compiled executor only, which cannot be used: {why_not}")
        options["precision"] = self.precision
        self.reason = why_not
        plain = backend == "torch" or (backend == "auto" and _plain_torch_is_chosen())
        if not plain and (backend == "openvino" or openvino_installed()):
            try:
                openvino = OpenVinoEngine(model, **options)
            except Unusable as unusable:
                if backend == "openvino":
                    raise ConfigError(str(unusable)) from unusable
                self.reason = f"{why_not}; {unusable}"
            else:
                self.backend = "openvino"
                return openvino
        elif not plain:
            self.reason = f"{why_not}; openvino is not installed"
        self.backend = "torch"
        return TorchEngine(model, precision=self.precision)

    def _in_torch_from_now_on(self, why: Unusable) -> TorchEngine:
        if isinstance(self._engine, OpenVinoEngine):  # no other thread was here first
            assert self.precision != "int8"  # which is the compiled executor's
            engine = TorchEngine(self._engine.model, precision=self.precision)
            self.backend, self.reason, self._engine = "torch", f"{self.reason}; {why}", engine
            logging.getLogger("xception").warning("xception: the network runs on torch from now on: %s", why)
        assert isinstance(self._engine, TorchEngine)
        return self._engine

    @staticmethod
    def _why_not_native(backend: Engine) -> str | None:
        """What rules the compiled executor out whatever the network is."""
        if backend in ("openvino", "torch"):
            return "asked for"
        if not machine.native_available():
            return machine.describe().removeprefix("plain PyTorch: ")
        if backend == "auto" and _plain_torch_is_chosen():
            return "the backend is set to 'reference'"
        return None

    def _per_channel(self, name: str, values: Sequence[float] | None, default: float) -> NDArray[np.float32]:
        found = [default] * self.in_channels if values is None else list(values)
        if len(found) != self.in_channels or not all(np.isfinite(found)) or (name == "std" and min(found) <= 0):
            raise ConfigError(f"{name} must be a number for each of {self.in_channels} channels; got {values!r}")
        return np.asarray(found, np.float32)

    # ---- running --------------------------------------------------------------------------------------------

    def _channels_last(self, images: Images) -> NDArray[np.float32]:
        """The batch as float32 N H W C, contiguous and normalised."""
        tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(images).__name__
            raise ConfigError(f"expected images of N C H W or N H W C, got {got}")
        channels = self.in_channels
        if tensor.shape[1] == channels:
            tensor = tensor.permute(0, 2, 3, 1)
        elif tensor.shape[3] != channels:
            raise ConfigError(f"expected images of {channels} channels, got {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.uint8):
            raise ConfigError(f"expected images in float32 or uint8, got {tensor.dtype}")
        if min(tensor.shape[1:3]) < self.minimum_size:
            height, width = tensor.shape[1:3]
            raise ConfigError(
                f"expected images of at least {self.minimum_size}x{self.minimum_size} pixels, got {height}x{width}"
            )
        array: NDArray[Any] = np.ascontiguousarray(tensor.detach().cpu().numpy())
        if array.dtype == np.uint8:
            array = (array.astype(np.float32) / np.float32(255) - self._mean) / self._std
        return array


def _plain_torch_is_chosen() -> bool:
    return machine.native_available() and machine.active_backend() == "reference"


def compile_model(
    model: nn.Module,
    precision: CompiledPrecision = "fp32",
    *,
    num_threads: int | None = None,
    mode: Mode = "throughput",
    backend: Engine = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    calibration: Images | None = None,
) -> CompiledModel:
    """Compile a network of the registry, of any family, for inference on this machine's CPU.

    `precision` is that of activations and weights between layers; sums are float32 always. On AMX "fp32" multiplies
    each number as three of bfloat16 that sum to it, which is as exact (`native/src/pieces.hpp`). `num_threads` are the
    engine's own (None: as many as torch has; in torch they are torch's). `mode` "throughput" takes several images
    through the network at once, one a thread, where a batch has them; "latency" lets all threads work on one.
    `backend` "auto" takes the compiled executor where it covers the network, else OpenVINO where it is installed and
    has this precision here, else torch, and the result says which and why; a name forces that one. Where OpenVINO finds
    at a call that it cannot run the network at that size, "auto" goes over to torch, and logs it.
    `mean` and `std`, one a channel on a scale of 0 to 1, are for uint8 images (None: 0.5, pixels to -1..1).

    "int8" multiplies bytes in all convolutions but the first and is bf16 otherwise (with AVX-512 FP16, half
    precision); it is for the compiled executor only. It needs `calibration`: images as a call takes them, like those to
    come, one or two dozen (`quantize.steps_of`).
    An image that holds NaN or infinity gives NaN.

    Weights are copied: later training does not change the result. Raises `ConfigError` for a wrong argument, and where
    the engine that `backend` names cannot run the network (`MissingPackageError` where it is not installed).
    """
    if not hasattr(model, "config"):
        raise ConfigError(f"expected a network of the registry, got {type(model).__name__}")
    if precision not in COMPILED_PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(COMPILED_PRECISIONS)}; got {precision!r}")
    if (precision == "int8") != (calibration is not None):
        got = "none" if calibration is None else f"some for {precision}"
        raise ConfigError(f"calibration images are for the precision int8, which needs them; got {got}")
    if mode not in ("throughput", "latency"):
        raise ConfigError(f"mode must be throughput or latency; got {mode!r}")
    if backend not in ENGINES:
        raise ConfigError(f"backend must be auto, native, openvino or torch; got {backend!r}")
    threads = torch.get_num_threads() if num_threads is None else num_threads
    if type(threads) is not int or not 1 <= threads <= 1024:
        raise ConfigError(f"num_threads must be from 1 to 1024; got {threads!r}")
    return CompiledModel(
        model,
        precision=precision,
        num_threads=threads,
        mode=mode,
        backend=backend,
        mean=mean,
        std=std,
        calibration=calibration,
    )
