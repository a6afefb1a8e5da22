"""What every system does in training: steps of SGD with momentum on one batch, from the same weights.

A step begins with the batch as bytes N H W C, as decoding leaves it, and ends with the weights changed. Before anything
is timed each system makes two from the given weights, whose numbers must be PyTorch's (`first_steps`): the loss and the
gradient's norm of the first, and the loss of the second, which tells that the weights were changed as they should be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xception.benchmark.case import PARTS, Loaded, Part
from xception.benchmark.memory import give_back
from xception.benchmark.networks import BUNDLE, pictures
from xception.ops.backend import use_backend
from xception.weights.bundle import load_bundle

LEARNING_RATE, MOMENTUM = 0.01, 0.9
PIXELS, LABELS, STEPS = "pixels.npy", "labels.npy", "steps.npy"

Done = Callable[[Part], None]
Step = Callable[[Done, bool], tuple[float, float]]
"""Makes a step, telling each part of it that is done; returns the loss and, where the flag asks for it, the norm."""


def write_steps(folder: Path, batch: int, size: int) -> None:
    """Write a batch, and what the first steps on it must give, beside the network in `folder`."""
    pixels = np.round((pictures(batch, size).transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)
    model, info = load_bundle(folder / BUNDLE)
    labels = np.arange(batch, dtype=np.int64) * 7 % len(info.class_names)
    np.save(folder / PIXELS, pixels)
    np.save(folder / LABELS, labels)
    with use_backend("reference"):
        np.save(folder / STEPS, _definition(model.train(), normalised(pixels), torch.from_numpy(labels)))
    give_back()


def normalised(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """From -1 to 1, N C H W with channels last in memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1)


def _definition(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> NDArray[np.float64]:
    """`first_steps` in the open."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)
    losses, norms = [], []
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
    return np.array([losses[0], norms[0], losses[1]], np.float64)


def first_steps(step: Step) -> NDArray[np.float64]:
    """Loss and norm of the first step, loss of the second; to be called once."""
    loss, norm = step(_ignore, True)
    return np.array([loss, norm, step(_ignore, True)[0]], np.float64)


def _ignore(part: Part) -> None:
    pass


def loaded(step: Step, images: int) -> Loaded:
    """A system whose `step` works on so many images."""
    last: dict[Part, float] = {}

    def rate(seconds: float) -> float:
        step(_ignore, False)  # takes back the memory that it gave, and fills the caches
        taken: list[float] = []
        spent: dict[Part, float] = {}
        while sum(taken) < seconds or not taken:
            clock = _Clock()
            step(clock, False)
            taken.append(clock.total())
            for part, time_of_it in clock.spent.items():
                spent[part] = spent.get(part, 0.0) + time_of_it
        last.clear()
        last.update({part: spent[part] / sum(taken) for part in PARTS if part in spent})
        give_back()
        return images / fmean(taken)

    def shares() -> Mapping[Part, float]:
        return last

    return Loaded(call=lambda: first_steps(step), logits=lambda result: result, images=images, rate=rate, shares=shares)


class _Clock:
    """Divides the time since it was made among the parts that are told to be done."""

    def __init__(self) -> None:
        self.spent: dict[Part, float] = {}
        self._began = self._last = time.perf_counter()

    def __call__(self, part: Part) -> None:
        now = time.perf_counter()
        self.spent[part] = self.spent.get(part, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._began
