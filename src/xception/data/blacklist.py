"""The validation images of ImageNet that the paper leaves out: ILSVRC's black list.

The organisers found 1,762 of the 50,000 to be mislabelled; the paper evaluates on the 48,238 that remain. Their
development kit has the list as `ILSVRC2014_clsloc_validation_blacklist.txt`: one number a line, 1 for the first of the
validation images in the order of their file names. A validation image says its own number, wherever it lies:
`ILSVRC2012_val_00000001.JPEG` is number 1.
"""

from __future__ import annotations

import os
import re

from xception.data.labels import printable
from xception.data.split import Split, without
from xception.errors import DataError

VALIDATION_IMAGES = 50_000
_MAX_BYTES = 1 << 20
_NUMBERED = re.compile(r"ILSVRC20\d\d_val_(\d{8})(?!\d)[^/]*")


def read_blacklist(path: str | os.PathLike[str]) -> frozenset[int]:
    """The numbers of the images to leave out, from 1.

    Raises:
        DataError: A file that cannot be read, or that is another one: not one whole number from 1 to 50,000 a line, or
            the same twice (as in the kit's list of true classes).
    """
    shown = printable(os.fspath(path))
    try:
        if not os.path.isfile(path):
            raise DataError(f"{shown}: expected the black list, a file of one number a line")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise DataError(f"{shown}: larger than {_MAX_BYTES >> 20} MiB, which is no black list")
    numbers: dict[int, int] = {}
    for line, text in enumerate(data.splitlines(), start=1):
        digits = text.strip()
        if not digits:
            continue
        number = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        if not 1 <= number <= VALIDATION_IMAGES:
            got = printable(digits[:40].decode("utf-8", "replace"))
            raise DataError(
                f"{shown}, line {line}: expected the number of a validation image, 1 to 50,000, got {got!r}"
            )
        if number in numbers:
            raise DataError(f"{shown}, line {line}: {number} stands on line {numbers[number]} already: no black list")
        numbers[number] = line
    if not numbers:
        raise DataError(f"{shown}: holds no numbers; expected those of the images to leave out")
    return frozenset(numbers)


def without_blacklisted(split: Split, numbers: frozenset[int]) -> tuple[Split, int]:
    """The samples of `split` that are not on the list, and how many are.

    A listed image that is not there is no mistake: it may have been deleted for the same reason.

    Raises:
        DataError: A sample that is no validation image of ILSVRC by its file's name, or none that is left.
    """
    listed = [index for index, key in enumerate(split.keys) if _number(key) in numbers]
    if len(listed) == len(split):
        raise DataError("every image is on the black list")
    return without(split, listed), len(listed)


def _number(key: str) -> int:
    found = _NUMBERED.fullmatch(key.rpartition("/")[2])
    if found is None:
        raise DataError(
            f"{printable(key)}: a black list is for ImageNet's validation images, which are called such as "
            "ILSVRC2012_val_00000001.JPEG"
        )
    return int(found[1])
