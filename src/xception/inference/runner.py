"""What runs a network that does not learn, chosen once and named: the compiled executor, OpenVINO or PyTorch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.inference.compiled import ENGINES, CompiledModel, Engine, compile_model
from xception.inference.embedding import pooled
from xception.inference.precision import DTYPES, PRECISIONS, Precision
from xception.ops import backend as machine


class Runner:
    """Logits or pooled features of image batches: on a CPU as `compile_model` gives them, elsewhere PyTorch's.

    `engine` says what runs, and why not the compiled executor: "native, avx512, fp32", "openvino, fp32: InceptionV3 is
    no Xception", "torch: the device is cuda". The choice is made here, once: `use_backend` and `XCEPTION_MAX_ISA` count
    as they are now, and what the compiled executor and OpenVINO run are the weights as they are now. Raises
    `ConfigError` for a wrong argument, and where the engine that `backend` names cannot be had.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        precision: Precision = "fp32",
        num_threads: int | None = None,
        backend: Engine = "auto",
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        if backend not in ENGINES:
            raise ConfigError(f"backend must be auto, native, openvino or torch; got {backend!r}")
        if num_threads is not None and (type(num_threads) is not int or not 1 <= num_threads <= 1024):
            raise ConfigError(f"num_threads must be from 1 to 1024; got {num_threads!r}")
        self._model, self._device, self._precision = model, device, precision
        floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
        self._dtype = next(floating, torch.float32)
        self._compiled: CompiledModel | None = None
        self._reason = reason = _why_torch(model, device, backend)
        if reason is None:
            compiled = compile_model(model, precision, num_threads=num_threads, backend=backend)
            self._reason = compiled.reason
            self._compiled = compiled if compiled.backend != "torch" else None
        elif backend in ("native", "openvino"):
            name = "the compiled executor" if backend == "native" else "OpenVINO"
            raise ConfigError(f"{name} cannot be used: {reason}")
        logging.getLogger("xception").info("xception: the network runs on %s", self.engine)

    @property
    def engine(self) -> str:
        """What runs, and why not the compiled executor."""
        compiled, precision = self._compiled, self._precision
        if compiled is None:
            return f"torch: {self._reason}" if precision == "fp32" else f"torch, {precision}: {self._reason}"
        if compiled.backend == "native":
            return f"native, {compiled.level}, {precision}"
        return f"{compiled.backend}, {precision}: {compiled.reason}"

    def logits(self, images: Tensor) -> Tensor:
        """N C H W, normalised -> N `num_classes`, float64 on the CPU."""
        if self._compiled is not None:
            return self._compiled(images).double()
        return self._in_torch(lambda batch: self._model(batch).double(), images)

    def pooled(self, images: Tensor) -> Tensor:
        """N C H W, normalised -> the pooled features, N C, in the type that they are computed in, on the CPU."""
        if self._compiled is not None:
            return self._compiled(images, "pooled")
        model: Any = self._model
        return self._in_torch(lambda batch: pooled(model, model.forward_features(batch)), images)

    def _in_torch(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        kind = self._device.type
        with (
            torch.inference_mode(),
            torch.autocast(kind, DTYPES[self._precision], enabled=self._precision != "fp32"),
        ):
            # Depthwise convolutions are up to twice as fast with channels last.
            return network(images.to(self._device, self._dtype, memory_format=torch.channels_last)).cpu()


def runner_beside_training(model: nn.Module, precision: Precision) -> Runner:
    """The compiled executor where it covers the model as it is now, on a CPU with the native backend; else the model.

    For a network that is still being trained: compiling costs less than a batch, exporting to another engine more than
    many.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if machine.active_backend() == "native" and like.dtype == torch.float32:
        with contextlib.suppress(ConfigError):
            return Runner(model, like.device, precision=precision, backend="native")
    return Runner(model, like.device, precision=precision, backend="torch")


def _why_torch(model: nn.Module, device: torch.device, backend: Engine) -> str | None:
    """What leaves no choice but PyTorch; None where nothing does."""
    if backend == "torch":
        return "asked for"
    if device.type != "cpu":
        return f"the device is {device}"
    if backend == "auto" and machine.native_available() and machine.active_backend() == "reference":
        return "the reference backend is chosen"
    if not hasattr(model, "config"):
        return f"{type(model).__name__} is no Xception"
    return None
