"""Every kind of image that a predictor takes, brought to the size of the network's input."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from xception.data.decode import decode_image, rgb_pixels
from xception.data.labels import printable
from xception.data.preprocess import Preprocess
from xception.errors import ImageError

ImageInput: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8] | Tensor"
)


def fitted(image: Any, preprocess: Preprocess, fast_decode: bool = False) -> Tensor:
    """An `ImageInput` resized and cut out, uint8 C H W, not yet normalised.

    `fast_decode` allows files to be decoded at less than their size, see `Preprocess.reduction`. Raises `ImageError`.
    """
    if isinstance(image, str | os.PathLike | bytes | bytearray | memoryview):
        return preprocess.geometry(decode_image(image, reduction=preprocess.reduction if fast_decode else None))
    return preprocess.geometry(_as_array(image))


def path_of(image: Any) -> str | None:
    """The path of an image that is given as one."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else None


def _as_array(image: Any) -> NDArray[np.uint8]:
    """Any accepted image that needs no decoding as uint8 H W C; raises `ImageError`."""
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ImageError(
                "expected a uint8 tensor of C H W with 1 or 3 channels, "
                f"got {image.dtype} {' x '.join(map(str, image.shape))}"
            )
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
            raise ImageError(
                "expected a uint8 array of H W C with 1 or 3 channels, "
                f"got {image.dtype} {' x '.join(map(str, image.shape))}"
            )
        return np.ascontiguousarray(image)
    raise ImageError(f"expected a path, bytes, a PIL image, a uint8 array or tensor, got {type(image).__name__}")


def _from_pillow(image: Image.Image) -> NDArray[np.uint8]:
    """As from its file: turned by its EXIF orientation, converted to RGB by the same rules."""
    if 0 in image.size:
        raise ImageError(f"expected an image with pixels, got one of {image.size[0]} x {image.size[1]}")
    try:
        return rgb_pixels(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow reads lazily, and a damaged file can raise anything
        raise ImageError(f"Pillow cannot read it: {printable(str(error))[:160]}") from error
