"""Products of bytes: the steps in which what a convolution reads is counted.

Of a separable convolution that is what its depthwise half gives; of the stem's second one and of shortcuts, the map
itself. It is counted in steps of a size for each channel, from -128 to 127 (where nothing is below zero, from 0 to
255), and weighed in 127 parts of each output channel's largest weight; the product itself is exact. The steps' sizes go
into the depthwise filters and out of the 1x1 weights, so they cost nothing there.

One size for all channels wastes the range of most of them; the finest for each makes the weights of rarely large
channels so coarse, and cuts off so much of what calibration has not seen, that it is worse still. So a channel's step
grows with the cube root of its largest number. (The idea of moving range between activations and weights is that of
Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019. The root was chosen
on an ImageNet-trained Xception: its logits' relative error with powers 1/3, 1/2 and 2/3 is 0.067, 0.087 and 0.097.)
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.inference.lowering import Array, Counted
from xception.models.layers import ConvNorm, SeparableConv2d
from xception.models.xception_aligned import AlignedUnit
from xception.ops.separable import depthwise_conv2d

_BATCH = 1  # image at a time: more take memory, and no less time
_MOST_BYTES = 1 << 15  # in a sum, which has 32 bits
_FINEST = 1 / 32  # of the coarsest step of a layer: a channel that was always zero has a step, too


def steps_of(model: nn.Module, images: NDArray[np.float32]) -> dict[nn.Module, Counted]:
    """The size of a step for each channel that a convolution of `model` reads.

    `images` are N H W C, normalised, and should be like those to come: one or two dozen are enough. The convolution
    that reads them, those behind an ELU, and 1x1 that come before their depthwise one are left out. Raises
    `ConfigError` where there is no image, or what the network makes of one is not finite.
    """
    if len(images) == 0:
        raise ConfigError("expected at least one calibration image for int8, got none")
    watched = copy.deepcopy(model).float().cpu().eval()
    seen: dict[str, _Range] = {}
    for name, module in watched.named_modules():
        if isinstance(module, AlignedUnit) or (isinstance(module, SeparableConv2d) and _counts(module)):
            seen[f"{name}.pointwise"] = _Range(module)
        elif isinstance(module, ConvNorm) and not name.endswith("stem.conv1") and _fits(module.conv):
            seen[f"{name}.conv"] = _Range(module)
    with torch.inference_mode():
        for first in range(0, len(images), _BATCH):
            logits = watched(torch.from_numpy(images[first : first + _BATCH]).permute(0, 3, 1, 2))
            if not bool(torch.isfinite(logits).all()):
                raise ConfigError("expected finite logits of the calibration images of int8, got NaN or infinity")
    modules = dict(model.named_modules())
    used = {name: found for name, found in seen.items() if found.largest}
    return {modules[name]: Counted(found.steps(), found.signed) for name, found in used.items()}


def _counts(conv: SeparableConv2d) -> bool:
    return conv.order == "depthwise_pointwise" and conv.intermediate_activation != "elu"


def _fits(conv: nn.Conv2d) -> bool:
    return conv.weight[0].numel() <= _MOST_BYTES


class _Range:
    """The largest absolute number of each channel that a unit's last convolution reads, in each image."""

    def __init__(self, unit: SeparableConv2d | AlignedUnit | ConvNorm) -> None:
        self.largest: list[Tensor] = []
        if isinstance(unit, ConvNorm):  # a map, which may have been rectified somewhere before
            self.signed = False
            unit.register_forward_pre_hook(self.with_sign)
        elif isinstance(unit, AlignedUnit):
            self.signed = unit.activation == "before"
            unit.pointwise.register_forward_pre_hook(lambda _, inputs: self.note(inputs[0]))
        else:  # which is one operation
            self.signed = unit.intermediate_activation == "none"
            unit.register_forward_pre_hook(self.between)

    def with_sign(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        self.signed = self.signed or bool((inputs[0] < 0).any())
        self.note(inputs[0])

    def between(self, conv: Any, inputs: tuple[Tensor]) -> None:
        x = torch.relu(inputs[0]) if conv.input_relu else inputs[0]
        y = depthwise_conv2d(x, conv.depthwise.weight, **conv.depthwise.sampling)
        self.note(y if self.signed else torch.relu(y))

    def note(self, numbers: Tensor) -> None:
        self.largest.append(numbers.abs().amax((2, 3)))

    def steps(self) -> Array:
        """They grow with the cube root of each channel's largest number, which the range holds.

        One image in many has numbers that others never reach: for them the steps of all would be coarser the more
        images there are. So a channel's largest number is what two standard deviations above the images' mean are.
        """
        each = torch.cat(self.largest).double()
        largest = each.amax(0)
        if len(each) > 1:
            largest = torch.minimum(largest, each.mean(0) + 2 * each.std(0))
        sizes = largest.clamp_min(1e-30) ** (1 / 3)
        sizes = torch.maximum(sizes, sizes.max() * _FINEST)
        coarse = (largest / sizes).max() / (127 if self.signed else 255)
        return np.ascontiguousarray((sizes * coarse.clamp_min(1e-30)).numpy(), np.float32)
