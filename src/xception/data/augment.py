"""Random changes to training images: what is asked for (`Augment`) and what does it (`SampleAugmenter`, `mix_batch`).

All of it is torchvision.transforms.v2 on uint8 C H W on the CPU, but for shift, flip and erasing: these make the same
draws and the same images, without the transforms' inspection of their arguments, which costs small images most of
their time.
They draw from torch's global generator; `isolated_rng` seeds it from the sample's own coordinates and puts it back
afterwards, so that what happens to a sample depends on nothing but its seed, and the caller's random numbers on none of
this.

Order: random resized crop (in place of the preprocessing's resize and crop), shift, flip, RandAugment, erasing; then
the batch is normalised and mixed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Which augmentations, and how strong; everything is off by default. `ConfigError` for values out of range."""

    random_resized_crop: tuple[float, float] | None = None
    """Cut out a box of this share of the area (low, high), of aspect ratio 3/4 to 4/3, and scale it to the input."""
    translate_pixels: int = 0
    """Shift by up to so many pixels each way; what comes in is the repeated edge."""
    horizontal_flip: float = 0.0
    """Probability of a mirror image."""
    rand_augment: int = 0
    """Number of RandAugment operations (Cubuk et al., arXiv:1909.13719); what they uncover is filled with the mean."""
    rand_augment_magnitude: int = 9
    """Their strength, 0 to 30."""
    random_erasing: float = 0.0
    """Probability that a box is overwritten with the mean (Zhong et al., arXiv:1708.04896)."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution (Zhang et al., arXiv:1710.09412); 0 for none."""
    cutmix: float = 0.0
    """Alpha of CutMix's (Yun et al., arXiv:1905.04899); 0 for none. With both, each batch gets one of the two."""

    def __post_init__(self) -> None:
        crop = self.random_resized_crop
        if crop is not None and not (
            isinstance(crop, tuple) and len(crop) == 2 and all(map(_is_number, crop)) and 0 < crop[0] <= crop[1] <= 1
        ):
            raise ConfigError(f"random_resized_crop: expected (low, high) with 0 < low <= high <= 1, got {crop!r}")
        for name, high in (("translate_pixels", 1024), ("rand_augment", 16), ("rand_augment_magnitude", 30)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= high:
                raise ConfigError(f"{name}: expected a whole number from 0 to {high}, got {value!r}")
        for name in ("horizontal_flip", "random_erasing"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1):
                raise ConfigError(f"{name}: expected a probability, 0 to 1, got {value!r}")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1000):
                raise ConfigError(f"{name}: expected 0 to 1000, got {value!r}")

    @property
    def mixes(self) -> bool:
        """Whether targets become probabilities, float N K."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes_samples(self) -> bool:
        """Whether anything random happens to single images."""
        return self.replaces_geometry or any(
            (self.translate_pixels, self.horizontal_flip, self.rand_augment, self.random_erasing)
        )

    @property
    def replaces_geometry(self) -> bool:
        """Whether the preprocessing's resize and crop give way to a random one."""
        return self.random_resized_crop is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def isolated_rng() -> Iterator[Callable[[int], None]]:
    """Lends torch's CPU generator: call the yielded function to seed it; its former state is back at the end."""
    import torch

    generator = torch.default_generator
    state = generator.get_state()

    def reseed(seed: int) -> None:
        generator.manual_seed(seed)

    try:
        yield reseed
    finally:
        generator.set_state(state)


class SampleAugmenter:
    """The transforms that an `Augment` asks for, ready to run on one image after the other."""

    def __init__(self, augment: Augment, preprocess: Preprocess) -> None:
        self._preprocess = preprocess
        self._margin = augment.translate_pixels
        # Reductions over an image add up in another order on another number of threads.
        self.needs_one_thread = augment.rand_augment > 0
        self._crop = _resized_crop(augment.random_resized_crop, preprocess) if augment.random_resized_crop else None
        self._transforms: list[Callable[[Any], Any]] = []
        if augment.translate_pixels:
            self._transforms.append(functools.partial(_shift, size=preprocess.size, places=2 * self._margin + 1))
        if augment.horizontal_flip:
            self._transforms.append(functools.partial(_flip, probability=augment.horizontal_flip))
        mean = [min(max(round(255 * value), 0), 255) for value in preprocess.mean]
        if augment.rand_augment:
            self._transforms.append(_rand_augment(augment, mean))
        if augment.random_erasing:
            self._transforms.append(functools.partial(_erase, probability=augment.random_erasing, mean=mean))

    def __call__(self, image: npt.NDArray[np.uint8]) -> torch.Tensor:
        """uint8 H W C -> uint8 C H W of the input size, drawing from torch's generator as it is."""
        if self._crop is None:
            return self.from_padded(self.pad(self._preprocess.geometry(image)))
        return self.from_padded(self.pad(self._crop(self._preprocess.convert(image))))

    def pad(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [...,] C H W of the input size -> the same with the margin that shifting needs."""
        import numpy as np
        import torch

        if self._margin == 0:
            return images
        sides = [(0, 0)] * (images.ndim - 2) + [(self._margin, self._margin)] * 2
        return torch.from_numpy(np.pad(images.numpy(), sides, mode="edge"))

    def from_padded(self, image: torch.Tensor) -> torch.Tensor:
        """What `pad` gave for one image -> uint8 C H W of the input size: all that is random but the resized crop."""
        for transform in self._transforms:
            image = transform(image)
        return image


# Where none of torchvision's transforms is asked for it is not loaded: that takes a second.


def _resized_crop(share: tuple[float, float], preprocess: Preprocess) -> Callable[[Any], Any]:
    from torchvision.transforms import v2

    crop: Callable[[Any], Any] = v2.RandomResizedCrop(
        preprocess.size,
        scale=share,
        interpolation=preprocess.interpolation_mode,
        antialias=preprocess.interpolation != "nearest",
    )
    return crop


def _rand_augment(augment: Augment, mean: list[int]) -> Callable[[Any], Any]:
    from torchvision.transforms import v2

    transform: Callable[[Any], Any] = v2.RandAugment(
        augment.rand_augment,
        augment.rand_augment_magnitude,
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=mean,
    )
    return transform


def _shift(image: torch.Tensor, *, size: tuple[int, int], places: int) -> torch.Tensor:
    """One of `places` x `places` cuts of this size, as v2.RandomCrop makes it."""
    import torch

    top, left = int(torch.randint(0, places, ())), int(torch.randint(0, places, ()))
    return image[:, top : top + size[0], left : left + size[1]]


def _flip(image: torch.Tensor, *, probability: float) -> torch.Tensor:
    """The image or its mirror image, as v2.RandomHorizontalFlip makes it."""
    import torch

    return image.flip(-1) if float(torch.rand(1)) < probability else image


def _erase(image: torch.Tensor, *, probability: float, mean: list[int]) -> torch.Tensor:
    """The image or one with a box of `mean` in it, as v2.RandomErasing makes it.

    The box has 2 to 33 % of the area, and is 0.3 to 3.3 times as high as wide.
    """
    import torch

    if float(torch.rand(1)) >= probability:
        return image
    height, width = image.shape[-2:]
    lowest, highest = torch.tensor([0.3, 3.3]).log().tolist()
    for _ in range(10):  # a box that does not fit is drawn again
        area = height * width * float(torch.empty(1).uniform_(0.02, 0.33))
        ratio = float(torch.empty(1).uniform_(lowest, highest).exp())
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows < height and columns < width:
            top, left = int(torch.randint(height - rows + 1, ())), int(torch.randint(width - columns + 1, ()))
            erased = image.clone()
            erased[:, top : top + rows, left : left + columns] = torch.tensor(mean, dtype=torch.uint8)[:, None, None]
            return erased
    return image


def mix_batch(
    augment: Augment, images: torch.Tensor, targets: torch.Tensor, *, num_classes: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or CutMix of a batch.

    Args:
        augment: Says which, and how strong.
        images: float32 N C H W.
        targets: int64 N, or float N K.
        num_classes: K.
        seed: Decides everything random about it.

    Returns:
        Images of the same shape, and targets as float32 N K that sum to what they summed to before.
    """
    import torch

    if targets.ndim == 1:
        targets = torch.nn.functional.one_hot(targets, num_classes).to(torch.float32)
    if not augment.mixes or len(images) == 0:
        return images, targets
    from torchvision.transforms import v2

    with isolated_rng() as reseed:
        reseed(seed)
        choices = [v2.MixUp(alpha=augment.mixup)] if augment.mixup else []
        choices += [v2.CutMix(alpha=augment.cutmix)] if augment.cutmix else []
        chosen = choices[int(torch.randint(len(choices), ()))]
        images, targets = chosen(images, targets)
    return images, targets
