"""The two data sets that work without a network: the bundled digits, and Fashion-MNIST from the files of a package.

`digits` is 1,797 grey images of 8 x 8 pixels (UCI, see NOTICE.txt beside this file). `fashion-mnist` is 60,000 +
10,000 grey images of 28 x 28 pixels in the IDX format of MNIST (http://yann.lecun.com/exdb/mnist/: bytes 0, 0, type,
number of dimensions; the dimensions, big-endian; the values), as Debian and torchvision lay them out.
"""

from __future__ import annotations

import gzip
import importlib.resources
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from xception.data.labels import printable
from xception.data.split import ArraySplit, DataSource, SplitPlan, build_source
from xception.errors import DataError

Pixels = npt.NDArray[np.uint8]

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"
_MAX_DEFLATE_RATIO = 1032  # what one byte of deflate can become at most (RFC 1951: 258 bytes from two bits)


def array_split(array: Pixels, targets: Sequence[int], prefix: str) -> ArraySplit:
    """uint8 N H W C and its class indices, with keys such as 'digits/0017'."""
    digits = max(4, len(str(len(array) - 1)))
    keys = tuple(f"{prefix}/{index:0{digits}d}" for index in range(len(array)))
    return ArraySplit(array, np.arange(len(array)), keys, tuple(int(target) for target in targets))


def open_digits(*, spec: str, plan: SplitPlan) -> DataSource:
    """The bundled digits; 0..16 becomes round(255 v / 16)."""
    packed = importlib.resources.files("xception.data").joinpath("digits.csv.gz").read_bytes()
    values = np.array(gzip.decompress(packed).replace(b"\n", b",").rstrip(b",").split(b","), np.float64)
    table = values.astype(np.int64).reshape(-1, 65)
    images = ((table[:, :64] * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    split = array_split(images, table[:, 64].tolist(), "digits")
    return build_source(spec, tuple("0123456789"), {"all": split}, plan=plan, channels=1)


def open_fashion_mnist(*, spec: str, plan: SplitPlan, root: str | None, download: bool) -> DataSource:
    """Fashion-MNIST; 'val' is dealt from the 60,000 training images, the 10,000 test images stay as they are.

    Args:
        spec: What the user wrote.
        plan: How 'val' is dealt.
        root: Folder to look in; otherwise Debian's package, then torchvision's layout in $XCEPTION_DATA and ./data.
        download: Let torchvision fetch the files where there are none.

    Raises:
        DataError: No such files (says where it looked and what to install), or damaged ones.
    """
    given = {
        part: array_split(images[..., None], labels.tolist(), f"fashion-mnist/{part}")
        for part, (images, labels) in fashion_arrays(root=root, download=download).items()
    }
    return build_source(spec, FASHION_CLASSES, given, plan=plan, channels=1)


def fashion_arrays(*, root: str | None, download: bool) -> dict[str, tuple[Pixels, Pixels]]:
    """The images (uint8 N 28 28) and class indices (uint8 N) of Fashion-MNIST's 'train' and 'test'.

    Arguments and errors are those of `open_fashion_mnist`.
    """
    places = list(_fashion_places(root))
    folder = next((place for place in places if _idx_path(place, "train-images-idx3-ubyte")), None)
    if folder is None and download:
        folder = _download_fashion(data_root(root))
    if folder is None:
        looked = ", ".join(printable(place) for place in places)
        raise DataError(
            f"fashion-mnist: no files in {looked}; install them (Debian, Ubuntu: 'apt install dataset-fashion-mnist') "
            "or fetch them with --download"
        )
    given = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(_need(folder, f"{stem}-images-idx3-ubyte"), dimensions=3)
        labels = read_idx(_need(folder, f"{stem}-labels-idx1-ubyte"), dimensions=1)
        if len(images) != len(labels):
            raise DataError(f"{printable(folder)}: {len(images)} {part} images, but {len(labels)} labels")
        if len(labels) and labels.max() >= len(FASHION_CLASSES):
            raise DataError(f"{printable(folder)}: {part} labels up to {labels.max()}, expected 0 to 9")
        given[part] = images, labels
    return given


def data_root(root: str | None) -> str:
    """Where named data sets are kept: `root`, else $XCEPTION_DATA, else ./data."""
    return root if root is not None else os.environ.get("XCEPTION_DATA") or "data"


def _fashion_places(root: str | None) -> Iterator[str]:
    if root is None:
        yield DEBIAN_FASHION
    bases = [root] if root is not None else [os.environ.get("XCEPTION_DATA", ""), "data"]
    for base in filter(None, bases):
        yield os.path.join(base, "FashionMNIST", "raw")
        yield os.path.join(base, "fashion-mnist")
        yield base


def _idx_path(folder: str, name: str) -> str | None:
    return next(
        (p for p in (os.path.join(folder, name), os.path.join(folder, f"{name}.gz")) if os.path.isfile(p)), None
    )


def _need(folder: str, name: str) -> str:
    path = _idx_path(folder, name)
    if path is None:
        raise DataError(f"{printable(folder)}: {name} (or {name}.gz) is missing")
    return path


def _download_fashion(root: str) -> str:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(root, download=True)
    except Exception as error:  # network, disk, checksums: whatever it is, the data is not there
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise DataError(f"fashion-mnist: the download into {printable(root)} failed: {reason}") from error
    return os.path.join(root, "FashionMNIST", "raw")


def read_idx(path: str, *, dimensions: int) -> Pixels:
    """One IDX file of bytes, gzipped or not -> uint8 array of `dimensions` axes.

    Sizes are checked against the file before memory is taken.

    Raises:
        DataError: Another kind of file, truncated, or with something behind its end.
    """
    shown = printable(path)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if packed else plain
            head = stream.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes([0, 0, 8, dimensions]):
                raise DataError(f"{shown}: not an IDX file of bytes with {dimensions} dimensions")
            shape = tuple(int(n) for n in np.frombuffer(head, ">u4", offset=4))
            count = math.prod(shape)
            if count > size * (_MAX_DEFLATE_RATIO if packed else 1):
                raise DataError(f"{shown}: truncated: {size} bytes cannot hold {' x '.join(map(str, shape))} values")
            values = np.empty(count, np.uint8)
            if _read_into(stream, values) < count or stream.read(1):
                raise DataError(f"{shown}: does not hold exactly the {count} values it announces")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or "truncated"
        raise DataError(f"{shown}: cannot be read: {reason}") from error
    return values.reshape(shape)


def _read_into(stream: Any, values: Pixels) -> int:
    view, done = memoryview(values.data), 0
    while done < len(values):
        count = stream.readinto(view[done:])
        if not count:
            break
        done += count
    return done
