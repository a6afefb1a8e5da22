"""A network in the compiled executor (native/), where that covers it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xception.inference.embedding import Output
from xception.inference.lowering import lower
from xception.inference.precision import CompiledPrecision
from xception.inference.quantize import steps_of
from xception.ops import backend as machine


class NativeEngine:
    """`model` as one call into C++, weights and all; its head runs in torch where the executor has no such layer.

    For "int8", `calibration` images N H W C, normalised, tell how large numbers become. Raises `Uncovered`, and
    `ConfigError` where the extension is missing, and like `steps_of`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: CompiledPrecision,
        num_threads: int,
        latency: bool,
        calibration: NDArray[np.float32] | None = None,
    ) -> None:
        config: Any = model.config
        steps = None if calibration is None else steps_of(model, calibration)
        self._in_bytes = precision == "int8"
        self._network = machine.new_network(precision, config.in_channels, num_threads, latency=latency)
        self._outputs = lower(model, self._network, steps)
        self.level = self._network.level
        self._head: nn.Module | None = None
        if self._outputs.logits is None:
            head: Any = model.classifier
            self._head = copy.deepcopy(head).float().cpu().eval()

    def __call__(self, batch: NDArray[np.float32], output: Output) -> Tensor:
        """N H W C, contiguous -> logits N `num_classes`, features N C H' W', or pooled features N C."""
        head = self._head if output == "logits" else None
        value = self._outputs.pooled if head is not None else getattr(self._outputs, output)
        result = np.empty((len(batch), *self._network.shape(value, *batch.shape[1:3])), np.float32)
        self._network.run(batch, value, result)
        if self._in_bytes:  # which have no NaN, and no infinity
            result[~np.isfinite(batch).all(axis=(1, 2, 3))] = np.nan
        found = torch.from_numpy(result).permute(0, 3, 1, 2)
        if head is not None:
            with torch.inference_mode():
                logits: Tensor = head(found)
                return logits
        return found if output == "features" else found[:, :, 0, 0]
