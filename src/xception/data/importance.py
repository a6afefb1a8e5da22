"""What each class of multi-label data weighs in MAP@100: a file `class_weights.csv` or `class_weights.json` beside it.

    class,weight            {"cat": 12.5, "dog": 3}
    cat,12.5
    dog,3

The CSV may leave out its header and have columns between and behind; names may be those of classes that the data lacks,
since such a list is often made for a larger vocabulary. A class that is not in the file has no weight (0). Weights are
finite, 0 or more, and only their ratios matter. The text is UTF-8.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from xception.data.labels import printable
from xception.errors import DataError

FILE_NAMES = ("class_weights.csv", "class_weights.json")
MAX_BYTES = 64 * 2**20
_NAME_COLUMNS = ("class", "class_name", "label", "name")
_WEIGHT_COLUMNS = ("weight", "class_weight", "importance")


def importance_beside(folder: str, class_names: Sequence[str]) -> tuple[float, ...] | None:
    """The weights in the class-weight file of `folder`, in the order of `class_names`; None where there is none.

    Raises:
        DataError: Two such files, or one that cannot be used; one line that names the file and the place in it.
    """
    found = [path for name in FILE_NAMES if os.path.lexists(path := os.path.join(folder, name))]
    if len(found) > 1:
        raise DataError(f"{printable(folder)}: both {' and '.join(FILE_NAMES)} give class weights: keep one")
    return read_importance(found[0], class_names) if found else None


def read_importance(path: str | os.PathLike[str], class_names: Sequence[str]) -> tuple[float, ...]:
    """The weights of the classes `class_names` by the file at `path`, which is JSON if it ends in .json, else CSV.

    Raises:
        DataError: A file that cannot be read or is malformed, a class named twice, a weight that is none, or no class
            of the data with a weight above 0.
    """
    shown = printable(os.fspath(path))
    text = _read(os.fspath(path), shown)
    entries = _from_json(text, shown) if shown.lower().endswith(".json") else _from_csv(text, shown)
    weights: dict[str, float] = {}
    for place, name, weight in entries:
        if name in weights:
            raise DataError(f"{place}: class {printable(name)!r} has a weight already")
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"{place}: expected a finite weight of 0 or more, got {weight!r}")
        weights[name] = weight
    found = tuple(weights.get(name, 0.0) for name in class_names)
    if not any(found):
        example = f"; it names {printable(next(iter(weights)))!r}" if weights else ""
        raise DataError(
            f"{shown}: gives none of the data's classes ({printable(class_names[0])!r}, ...) a weight above 0{example}"
        )
    return found


def _read(path: str, shown: str) -> str:
    try:
        if not os.path.isfile(path):
            raise DataError(f"{shown}: expected a file of class weights")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{shown}: larger than {MAX_BYTES >> 20} MiB, which is no file of class weights")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown}: is not UTF-8 at byte {error.start}") from error


def _from_json(text: str, shown: str) -> Iterator[tuple[str, str, float]]:
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown}: not well-formed JSON: {error}") from error
    if not isinstance(pairs, _Pairs):
        raise DataError(f'{shown}: expected an object such as {{"cat": 12.5}}')
    for name, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise DataError(f"{shown}: class {printable(name)!r}: expected a number, got {type(weight).__name__}")
        yield shown, name, _number(weight)


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object as they stand there, so that a name that occurs twice is noticed."""


def _from_csv(text: str, shown: str) -> Iterator[tuple[str, str, float]]:
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    name_at, weight_at, first = 0, 1, True
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            place = f"{shown}, line {reader.line_num}"
            if first:
                first = False
                lower = [cell.lower() for cell in cells]
                names = [i for i, cell in enumerate(lower) if cell in _NAME_COLUMNS]
                weights = [i for i, cell in enumerate(lower) if cell in _WEIGHT_COLUMNS]
                if names and weights:
                    name_at, weight_at = names[0], weights[0]
                    continue
            if len(cells) <= max(name_at, weight_at) or not cells[name_at]:
                raise DataError(f"{place}: expected a class and its weight")
            try:
                weight = float(cells[weight_at])
            except ValueError:
                raise DataError(f"{place}: expected a number, got {printable(cells[weight_at])!r:.80}") from None
            yield place, cells[name_at], weight
    except csv.Error as error:
        raise DataError(f"{shown}, line {reader.line_num}: not well-formed CSV: {error}") from error


def _number(value: float) -> float:
    """JSON knows whole numbers of any size, floats do not."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
