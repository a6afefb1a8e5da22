"""`fashion-composites`: an open stand-in for JFT, the private data of the paper's second table.

JFT has what ImageNet lacks: many labels an image (36.5 of them in its evaluation set), classes from everyday to rare,
and a weight for each. This is that in small, from the real photographs of Fashion-MNIST: one to four garments, large or
small, lie in the quarters of a black canvas of 48 x 48 pixels, garments drawn by Zipf's law (the k-th of the ten as
often as 1/k says). The labels are all that is true of a canvas:

| label                               | classes | such as          |
| ----------------------------------- | ------- | ---------------- |
| which garments lie on it            | 10      | Bag              |
| how large                           | 20      | Bag, small       |
| in which quarter                    | 40      | Bag, top left    |
| which lie together                  | 55      | Bag with Coat    |
| which in the left and right halves  | 100     | Bag left of Coat |
| which in the upper and lower halves | 100     | Bag above Coat   |

325 classes with about 13 labels an image, so that 100 guesses are a choice; from T-shirts, on two thirds of
the images, to pairs of rare garments, on one of 500. Small details and their places decide the rarest, so that there is
room above a network that only sees garments. A class weighs as much as it is common among the training images, as the
paper's classes do by how common they are in social media images.

12,000 composites to train on, 1,500 to validate and 3,000 to test, from garments of their own: the first 54,000
training images of Fashion-MNIST, the other 6,000, and its test images. `fashion-composites:2000` has the first 2,000
(and 250, and 500); classes that do not occur among so few are no labels then. Composite number i of a part is a
function of (seed, part, i) alone, in whole numbers, the same bits everywhere; another seed makes
others of the same garments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from xception.data.builtin import FASHION_CLASSES, fashion_arrays
from xception.data.labels import count_classes, name_classes, printable
from xception.data.split import ArraySplit, DataSource, Pixels, SplitPlan, build_source
from xception.errors import DataError

Integers = npt.NDArray[np.int64]

NAME = "fashion-composites"
TRAINING_IMAGES = 12_000
CELL = 24
CANVAS = 2 * CELL
SIDES = (22, 13)
SIZES = ("large", "small")
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
_LAST_FOR_TRAINING = 54_000
_LEAST, _MOST = 100, 200_000
_SHARES = np.array([2520 // k for k in range(1, 11)])  # 1 / k, in whole numbers
_COUNTS = np.array([1, 2, 2, 3, 3, 3, 4, 4])  # garments on a canvas, each entry as likely as any other
_WORDS = 32  # random words a composite: the number of garments, four that order the cells, five a garment; a few spare


def is_composites(text: str) -> bool:
    """Whether a person who wrote this means these."""
    return text == NAME or text.startswith(f"{NAME}:")


def open_composites(
    *, spec: str = NAME, plan: SplitPlan | None = None, root: str | None = None, download: bool = False, seed: int = 0
) -> DataSource:
    """The composites that `spec` asks for, as a multi-label source with class weights.

    Args:
        spec: 'fashion-composites', or with ':' and a number of training images behind it.
        plan: Only whether there is a 'val' part is taken from it (none where `val_fraction` is 0).
        root: Where Fashion-MNIST is (`builtin.open_fashion_mnist`).
        download: Let torchvision fetch it where it is not.
        seed: Decides what lies where on each canvas, 0 or more.

    Raises:
        DataError: No Fashion-MNIST, or a number that is none or out of range.
    """
    plan = plan or SplitPlan()
    count = _training_images(spec)
    arrays = fashion_arrays(root=root, download=download)
    images, labels = arrays["train"]
    half = min(_LAST_FOR_TRAINING, len(labels) * 9 // 10)
    garments = {
        "train": (images[:half], labels[:half]),
        "val": (images[half:], labels[half:]),
        "test": arrays["test"],
    }
    counts = {"train": count, "val": count // 8 if plan.val_fraction else 0, "test": count // 4}
    found = {
        part: compose(*garments[part], count=counts[part], seed=seed, part=number)
        for number, part in enumerate(garments)
        if counts[part]
    }
    names = name_classes(label for labels in found["train"][1] for label in labels)
    index = {name: i for i, name in enumerate(names)}
    given = {}
    for part, (array, label_sets) in found.items():
        targets = tuple(tuple(sorted(index[name] for name in labels if name in index)) for labels in label_sets)
        keys = tuple(f"{NAME}/{part}/{i:06d}" for i in range(len(array)))
        given[part] = ArraySplit(array, np.arange(len(array)), keys, targets)
    occurrences = count_classes(given["train"].targets, len(names))
    importance = [n / count for n in occurrences]
    return build_source(spec, names, given, plan=plan, multi_label=True, channels=1, importance=importance)


def _training_images(spec: str) -> int:
    _, colon, text = spec.partition(":")
    if not colon:
        return TRAINING_IMAGES
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not _LEAST <= count <= _MOST:
        raise DataError(
            f"{NAME}: expected a number of training images from {_LEAST} to {_MOST:,} behind the ':', got "
            f"{printable(text)!r:.40}"
        )
    return count


@dataclass(frozen=True)
class _Layout:
    """What lies where, for every garment of some composites; the arrays are int64 P."""

    canvas: Integers
    quarter: Integers
    garment: Integers
    """Index among the images."""
    kind: Integers
    """Index in `FASHION_CLASSES`."""
    size: Integers
    """Index in `SIDES` and `SIZES`."""
    top: Integers
    left: Integers


def compose(
    images: Pixels, kinds: npt.NDArray[np.uint8], *, count: int, seed: int, part: int
) -> tuple[Pixels, list[tuple[str, ...]]]:
    """The first `count` composites, uint8 N 48 48 1, and each one's labels, from garments N 28 28 and their classes."""
    layout = _lay_out(kinds, count=count, seed=seed, part=part)
    canvases = np.zeros((count, CANVAS, CANVAS), np.uint8)
    for size, side in enumerate(SIDES):
        (of_size,) = np.nonzero(layout.size == size)
        pixels = resample(images[layout.garment[of_size]], side)
        rows = layout.top[of_size, None, None] + np.arange(side)[:, None]
        columns = layout.left[of_size, None, None] + np.arange(side)
        canvases[layout.canvas[of_size, None, None], rows, columns] = pixels
    return canvases[..., None], _labels(layout, count)


def resample(images: Pixels, side: int) -> Pixels:
    """uint8 N S S -> N `side` `side`, each pixel the rounded mean of the area that it covers.

    In whole numbers, which float64 holds exactly: the same bits on every machine.
    """
    before = images.shape[1]
    starts, pixels = np.arange(side)[:, None] * before, np.arange(before) * side
    covered = np.minimum(starts + before, pixels + side) - np.maximum(starts, pixels)
    shares = np.clip(covered, 0, None).astype(np.float64)  # side S, rows add up to S
    sums = shares @ images.astype(np.float64) @ shares.T
    area = before * before
    means: Pixels = ((2 * sums.astype(np.int64) + area) // (2 * area)).astype(np.uint8)
    return means


def _lay_out(kinds: npt.NDArray[np.uint8], *, count: int, seed: int, part: int) -> _Layout:
    key = hashlib.blake2b(f"{seed}\0{part}".encode(), digest_size=16, person=b"composites").digest()
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    words = np.asarray(generator.random_raw(count * _WORDS), np.uint64).reshape(count, _WORDS)
    number = _COUNTS[words[:, 0] % np.uint64(len(_COUNTS))]
    quarters = np.argsort(words[:, 1:5], axis=1, kind="stable")
    canvas, place = np.nonzero(np.arange(4) < number[:, None])
    kind_word, which, size_word, top, left = np.moveaxis(words[:, 5:25].reshape(count, 4, 5)[canvas, place], 1, 0)
    kind = np.searchsorted(np.cumsum(_SHARES), _below(kind_word, int(_SHARES.sum())), side="right")
    garment = np.empty(len(canvas), np.int64)
    for k in range(len(FASHION_CLASSES)):
        (pool,) = np.nonzero(kinds == k)
        if len(pool) == 0:
            raise DataError(f"{NAME}: Fashion-MNIST has no {FASHION_CLASSES[k]!r} to draw from")
        garment[kind == k] = pool[_below(which[kind == k], len(pool))]
    size = _below(size_word, len(SIDES))
    quarter = quarters[canvas, place]
    room = CELL - np.array(SIDES)[size] + 1
    return _Layout(
        canvas=canvas,
        quarter=quarter,
        garment=garment,
        kind=kind.astype(np.int64),
        size=size,
        top=quarter // 2 * CELL + _below(top, room),
        left=quarter % 2 * CELL + _below(left, room),
    )


def _below(words: npt.NDArray[np.uint64], limit: int | Integers) -> Integers:
    """Random words as numbers from 0 to `limit` - 1; of 2^64 values none is noticeably likelier than another."""
    return (words % np.asarray(limit, np.uint64)).astype(np.int64)


def _labels(layout: _Layout, count: int) -> list[tuple[str, ...]]:
    garments: list[list[tuple[str, int, int]]] = [[] for _ in range(count)]
    columns = (layout.canvas, layout.kind, layout.size, layout.quarter)
    for canvas, kind, size, quarter in zip(*(column.tolist() for column in columns), strict=True):
        garments[canvas].append((FASHION_CLASSES[kind], size, quarter))
    return [tuple(sorted(_true_of(lying))) for lying in garments]


def _true_of(garments: Sequence[tuple[str, int, int]]) -> set[str]:
    """All labels of a canvas on which garments lie, each with its class, size and quarter."""
    labels: set[str] = set()
    for name, size, quarter in garments:
        labels |= {name, f"{name}, {SIZES[size]}", f"{name}, {QUARTERS[quarter]}"}
    for one, other in combinations(garments, 2):
        labels.add(" with ".join(sorted((one[0], other[0]))))
        left, right = sorted((one, other), key=lambda garment: garment[2] % 2)
        if left[2] % 2 < right[2] % 2:
            labels.add(f"{left[0]} left of {right[0]}")
        upper, lower = sorted((one, other), key=lambda garment: garment[2] // 2)
        if upper[2] // 2 < lower[2] // 2:
            labels.add(f"{upper[0]} above {lower[0]}")
    return labels
