"""From an image to the network's input: one frozen object that travels with the weights.

The steps, in order: channels (luma, or grey repeated), resize, centre crop, normalise. `geometry` does the first three
and stays in uint8, `normalize` the last; training puts its augmentation between them.
"""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from xception.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torchvision.transforms import InterpolationMode

Resize = Literal["crop", "squash"]
Interpolation = Literal["bilinear", "bicubic", "nearest"]

MAX_SIZE = 8192
"""Largest height or width of a network's input."""
_MAX_ASPECT = 8  # longer than this, an image is cut around its centre before it is resized


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How images become inputs; the defaults map 0..255 to -1..1, as x / 127.5 - 1, the way Xception was trained.

    Raises `ConfigError` for values that make no sense.
    """

    size: tuple[int, int]
    """Height and width given to the network."""
    resize: Resize = "crop"
    """'crop': the image is scaled until it just covers size / crop_fraction, its shape kept; 'squash': it is scaled to
    exactly that, whatever its shape. Then the centre is cut out."""
    crop_fraction: float = 1.0
    """Share of the scaled image's side that is kept, such as 299 / 333."""
    interpolation: Interpolation = "bilinear"
    """Of the resize; bilinear and bicubic are antialiased, nearest takes the exact nearest pixel."""
    channels: int = 3
    """3 for RGB, 1 for grey (ITU-R 601 luma)."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted, on the scale 0..1; one for each channel, or one for all."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Divided by, on the scale 0..1; one for each channel, or one for all."""

    def __post_init__(self) -> None:
        size = self.size
        if not (
            isinstance(size, tuple) and len(size) == 2 and all(type(n) is int and 1 <= n <= MAX_SIZE for n in size)
        ):
            raise ConfigError(f"size: expected (height, width), each 1 to {MAX_SIZE}, got {size!r}")
        if self.resize not in get_args(Resize):
            raise ConfigError(f"resize: expected one of {', '.join(get_args(Resize))}, got {self.resize!r}")
        if self.interpolation not in get_args(Interpolation):
            choices = ", ".join(get_args(Interpolation))
            raise ConfigError(f"interpolation: expected one of {choices}, got {self.interpolation!r}")
        if not (_is_number(self.crop_fraction) and 0.1 <= self.crop_fraction <= 1):
            raise ConfigError(f"crop_fraction: expected 0.1 to 1, got {self.crop_fraction!r}")
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise ConfigError(f"channels: expected 1 or 3, got {self.channels!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not (isinstance(values, tuple) and values and all(_is_number(v) and math.isfinite(v) for v in values)):
                raise ConfigError(f"{name}: expected a tuple of finite numbers, got {values!r}")
            if name == "std" and min(values) <= 0:
                raise ConfigError(f"std: expected numbers above 0, got {values!r}")
            if len(set(values)) == 1:
                values = values[:1] * self.channels  # the same for all channels, however many there are
            if len(values) != self.channels:
                raise ConfigError(f"{name}: expected {self.channels} numbers, one a channel, got {values!r}")
            object.__setattr__(self, name, tuple(map(float, values)))
        object.__setattr__(self, "crop_fraction", float(self.crop_fraction))

    def __call__(self, image: npt.NDArray[np.uint8]) -> torch.Tensor:
        """uint8 H W C (C of 1 or 3) -> float32 C H W, the network's input."""
        return self.normalize(self.geometry(image))

    def geometry(self, image: npt.NDArray[np.uint8]) -> torch.Tensor:
        """uint8 H W C -> uint8 C H W of `channels` and `size`: everything but the normalisation."""
        return self.fit(self.convert(image))

    def reduction(self, height: int, width: int) -> int:
        """How many times smaller an image of this size may be decoded: 1, 2, 4 or 8.

        Only as far as the antialiased resize still halves what is left, which takes away most of what a decoder does
        to the finest details, and as both sides are whole multiples: else the picture would be stretched a little.
        """
        if self.interpolation == "nearest" or max(height, width) > _MAX_ASPECT * min(height, width):
            return 1
        target = self._resized(height, width)
        shrinks = min(height / target[0], width / target[1])
        return next((n for n in (8, 4, 2) if shrinks >= 2 * n and height % n == width % n == 0), 1)

    def convert(self, image: npt.NDArray[np.uint8]) -> torch.Tensor:
        """uint8 H W C -> uint8 C H W with the right channels and the image's own size."""
        import numpy as np
        import torch

        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.size):
            got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ConfigError(f"expected an image as a uint8 array H W C, got {got}")
        if image.shape[2] not in (1, 3):
            raise ConfigError(f"expected an image of 1 or 3 channels, got {image.shape[2]}")
        if self.channels == 1 and image.shape[2] == 3:
            # Pillow's integer luma, exact for grey: the weights add up to 65536.
            red, green, blue = (image[..., channel].astype(np.uint32) for channel in range(3))
            image = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)[..., None]
        if not image.flags.writeable or any(stride < 0 for stride in image.strides):
            image = image.copy()  # torch has no read-only tensors and no negative strides
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        return tensor.expand(self.channels, -1, -1) if self.channels > tensor.shape[0] else tensor

    def fit(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [...,] C H W of one size -> the same with H W = `size`: resize and centre crop."""
        height, width = images.shape[-2:]
        if self.resize == "crop" and max(height, width) > _MAX_ASPECT * min(height, width):
            # A line of a million pixels, scaled until its one row covers the input, would not fit into memory.
            images = _centre(images, (min(height, _MAX_ASPECT * width), min(width, _MAX_ASPECT * height)))
            height, width = images.shape[-2:]
        target = self._resized(height, width)
        if target != (height, width):
            images = _scaled(images, target, self.interpolation)
        return _centre(images, self.size)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [...,] C H W -> float32 of the same shape: (x / 255 - mean) / std."""
        import torch

        mean = torch.tensor(self.mean, dtype=torch.float32).mul_(255)[:, None, None].to(images.device)
        std = torch.tensor(self.std, dtype=torch.float32).mul_(255)[:, None, None].to(images.device)
        return images.to(torch.float32, memory_format=torch.contiguous_format, copy=True).sub_(mean).div_(std)

    @property
    def interpolation_mode(self) -> InterpolationMode:
        """Torchvision's word for `interpolation`."""
        from torchvision.transforms import InterpolationMode

        exact = "nearest-exact"  # torchvision's plain 'nearest' is off by half a pixel
        return InterpolationMode(exact if self.interpolation == "nearest" else self.interpolation)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Size of the image before the centre is cut out."""
        cover = (
            math.floor(self.size[0] / self.crop_fraction + 0.5),
            math.floor(self.size[1] / self.crop_fraction + 0.5),
        )
        if self.resize == "squash":
            return cover
        scale = max(cover[0] / height, cover[1] / width)
        return max(cover[0], math.floor(height * scale + 0.5)), max(cover[1], math.floor(width * scale + 0.5))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives back an equal object."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> Preprocess:
        """Rebuild from `to_dict`'s result; `ConfigError` unless exactly its fields are there, each of its type."""
        if not isinstance(values, dict):
            raise ConfigError(f"preprocess: expected an object, got {type(values).__name__}")
        names = {field.name for field in fields(cls)}
        if unknown := sorted(map(str, set(values) - names)):
            raise ConfigError(f"preprocess: unknown field {', '.join(unknown)}; expected {', '.join(sorted(names))}")
        if missing := sorted(names - set(values)):
            raise ConfigError(f"preprocess: field {', '.join(missing)} is missing")
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        for name in ("resize", "interpolation"):
            if not isinstance(tuples[name], str):
                raise ConfigError(f"{name}: expected a word, got {tuples[name]!r}")
        return cls(**tuples)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Both give what torchvision's functions of transforms.v2 give, bit for bit. These are two calls of PyTorch, and loading
# torchvision for them takes longer than a folder of pictures.


def _centre(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle of [...,] H W, of a size that it has; where it cannot be the middle, what is rounded to even."""
    top, left = (round((has - wants) / 2) for has, wants in zip(images.shape[-2:], size, strict=True))
    return images[..., top : top + size[0], left : left + size[1]]


def _scaled(images: torch.Tensor, size: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
    """uint8 [...,] C H W -> uint8 [...,] C and `size`."""
    import torch

    # PyTorch turns to H W C what is not, and fails on it where the result has one pixel.
    batch = images.reshape(-1, *images.shape[-3:]).contiguous(memory_format=torch.channels_last)
    if len(batch) == 1:  # its stride means nothing: this one lets PyTorch see that H W C lie together, and keep it so
        batch = batch.as_strided(batch.shape, (batch.numel(), *batch.stride()[1:]))
    options: dict[str, Any] = {"mode": "nearest-exact"}  # plain 'nearest' is off by half a pixel
    if interpolation != "nearest":
        options = {"mode": interpolation, "align_corners": False, "antialias": True}
    # Bytes only where torchvision has them interpolated as bytes: elsewhere its numbers are those of floats, rounded.
    as_floats = interpolation == "bilinear" and not _has_byte_kernels()
    result = torch.nn.functional.interpolate(batch.float() if as_floats else batch, size, **options)
    if as_floats:
        result = result.round_().to(torch.uint8)
    return result.reshape(images.shape[:-2] + size)


def _has_byte_kernels() -> bool:
    import torch

    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
