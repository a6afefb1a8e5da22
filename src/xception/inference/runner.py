"""What runs a predictor's network, chosen once and named: the compiled executor where it can, else PyTorch."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.inference.compiled import PRECISIONS, CompiledModel, Engine, Precision, compile_model
from xception.ops import backend as machine

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Runner:
    """Logits of image batches, from the compiled executor on a CPU that it covers or from PyTorch.

    `engine` says which of the two, and why not the compiled one: "native, avx512, fp32", "torch: the device is cuda".
    The choice is made here, once: `use_backend` and `XCEPTION_MAX_ISA` count as they are now, and what the compiled
    executor runs are the weights as they are now. Raises `ConfigError` for a wrong argument, and for `backend`
    "native" where that cannot be had.
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
        if backend not in ("auto", "native", "torch"):
            raise ConfigError(f"backend must be auto, native or torch; got {backend!r}")
        if num_threads is not None and (type(num_threads) is not int or not 1 <= num_threads <= 1024):
            raise ConfigError(f"num_threads must be from 1 to 1024; got {num_threads!r}")
        self._model, self._device, self._precision = model, device, precision
        floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
        self._dtype = next(floating, torch.float32)
        self._compiled: CompiledModel | None = None
        reason = _why_torch(model, device, backend)
        if reason is None:
            compiled = compile_model(model, precision, num_threads=num_threads, backend=backend)
            reason = compiled.reason
            self._compiled = compiled if compiled.backend == "native" else None
        elif backend == "native":
            raise ConfigError(f"the compiled executor cannot be used: {reason}")
        if self._compiled is not None:
            self.engine = f"native, {self._compiled.level}, {precision}"
        else:
            self.engine = f"torch: {reason}" if precision == "fp32" else f"torch, {precision}: {reason}"
        logging.getLogger("xception").info("xception: the network runs on %s", self.engine)

    def logits(self, images: Tensor) -> Tensor:
        """N C H W, normalised -> N `num_classes`, float64 on the CPU."""
        if self._compiled is not None:
            return self._compiled(images).double()
        kind = self._device.type
        with (
            torch.inference_mode(),
            torch.autocast(kind, _AUTOCAST.get(self._precision), enabled=self._precision in _AUTOCAST),
        ):
            # Depthwise convolutions are up to twice as fast with channels last (and evaluation has them so too).
            batch = images.to(self._device, self._dtype, memory_format=torch.channels_last)
            logits: Tensor = self._model(batch)
            return logits.double().cpu()


def _why_torch(model: nn.Module, device: torch.device, backend: Engine) -> str | None:
    """What rules the compiled executor out whatever the layers are; None where nothing does."""
    if backend == "torch":
        return "asked for"
    if device.type != "cpu":
        return f"the device is {device}"
    if not machine.native_available():
        return machine.describe().removeprefix("plain PyTorch: ")
    if backend == "auto" and machine.active_backend() == "reference":
        return "the reference backend is chosen"
    if not hasattr(model, "config"):
        return f"{type(model).__name__} is no Xception"
    return None
