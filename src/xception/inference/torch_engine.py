"""A network in PyTorch itself: what runs where no other engine does."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xception.inference.embedding import Output, pooled
from xception.inference.precision import DTYPES, Precision


class TorchEngine:
    """A copy of `model` on the CPU, in eval mode; half precision is autocast. Threads are torch's own."""

    def __init__(self, model: nn.Module, *, precision: Precision) -> None:
        self._model: Any = copy.deepcopy(model).float().cpu().eval()
        self._dtype = DTYPES[precision]

    def __call__(self, batch: NDArray[np.float32], output: Output) -> Tensor:
        """N H W C, contiguous -> logits N `num_classes`, features N C H' W', or pooled features N C."""
        model = self._model
        with torch.inference_mode(), torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            features: Tensor = model.forward_features(torch.from_numpy(batch).permute(0, 3, 1, 2))
            if output == "features":
                return features.float()
            if output == "pooled":
                return pooled(model, features.float()).float()
            logits: Tensor = model.forward_head(features)
            return logits.float()
