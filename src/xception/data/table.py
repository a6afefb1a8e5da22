"""A CSV table: one image a row, with its label or labels.

    path,label              path,labels               path,label,split
    a/1.jpg,cat             a/1.jpg,cat;indoors       a/1.jpg,cat,train
    a/2.jpg,dog             a/2.jpg,                  a/2.jpg,dog,test

The first row is a header when its cells, in any order, name a path column (`path`, `file`, `filename`, `image`, ...)
and a label column (`label`, `labels`, `class`, `target`, ...); others in it are ignored, but for `split`. Without a
header the columns are path, label and optionally split. The data is multi-label when any label holds a ';' or the label
column is called `labels`; only there may a row have no label. Paths are relative to the table's folder. The text is
UTF-8, with or without byte order mark; bytes that are not UTF-8 stay as they are, so that every file name can be
written. Rows are sorted by path, so their order does not matter; a repeated row counts once. Weights of the classes of
a multi-label table may stand beside it (`importance.py`).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from xception.data.containers import IMAGE_SUFFIXES
from xception.data.folder import PART_NAMES
from xception.data.importance import importance_beside
from xception.data.labels import Targets, name_classes, printable
from xception.data.split import DataSource, FileSplit, Split, SplitPlan, build_source
from xception.errors import DataError

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category")
SPLIT_COLUMNS = ("split", "part", "subset")


@dataclass(frozen=True)
class _Row:
    line: int
    path: str
    label: str
    part: str | None


@dataclass(frozen=True)
class _Columns:
    path: int
    label: int
    part: int | None


def open_table(path: str, *, spec: str, plan: SplitPlan, root: str | None = None) -> DataSource:
    """Read a table; the images are not looked at.

    Args:
        path: The CSV file.
        spec: What the user wrote, for the `DataSource`.
        plan: How missing parts are dealt.
        root: Folder the paths are relative to; by default the table's own.

    Raises:
        DataError: Names the file and the line.
    """
    rows, named_labels = _read(path)
    multi_label = named_labels or any(";" in row.label for row in rows)
    samples: dict[str, tuple[_Row, tuple[str, ...]]] = {}
    for row in rows:
        labels = _labels(row, multi_label, path)
        first, known = samples.setdefault(row.path, (row, labels))
        if known != labels or first.part != row.part:
            what = "label" if known != labels else "part"
            raise _error(path, row.line, f"{printable(row.path)!r} has another {what} on line {first.line}")

    names = name_classes(label for _, labels in samples.values() for label in labels)
    index = {name: i for i, name in enumerate(names)}
    by_part: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for key, (row, labels) in sorted(samples.items()):
        by_part.setdefault(row.part or "all", []).append((key, tuple(sorted(index[label] for label in labels))))
    trained = {i for _, target in by_part.get("train", by_part.get("all", [])) for i in target}
    for part, entries in by_part.items() if trained else ():
        for key, target in entries:
            if missing := set(target) - trained:
                name = printable(names[min(missing)])
                raise _error(path, samples[key][0].line, f"class {name!r} is in {part!r} but not in 'train'")
    folder = os.path.dirname(path) if root is None else root
    given: dict[str, Split] = {}
    for part, entries in by_part.items():
        targets = tuple(target if multi_label else target[0] for _, target in entries)
        given[part] = FileSplit(folder, tuple(key for key, _ in entries), cast(Targets, targets))
    importance = importance_beside(os.path.dirname(path) or ".", names) if multi_label else None
    return build_source(spec, names, given, plan=plan, multi_label=multi_label, importance=importance)


def _error(path: str, line: int, message: str) -> DataError:
    return DataError(f"{printable(path)}, line {line}: {message}")


def _read(path: str) -> tuple[list[_Row], bool]:
    """The rows, and whether the header calls the label column 'labels'."""
    records = _records(path)
    first = next(records, None)
    if first is None:
        raise DataError(f"{printable(path)}: the table is empty; expected rows of path,label")
    columns = _header(first[1])
    rows = []
    if columns is None:
        columns, width = _Columns(0, 1, 2 if len(first[1]) > 2 else None), 3 if len(first[1]) > 2 else 2
        rows.append(_row(path, *first, columns, width))
        named_labels = False
    else:
        width = len(first[1])
        named_labels = first[1][columns.label].lower() == "labels"
    rows += [_row(path, line, cells, columns, width) for line, cells in records]
    if not rows:
        raise DataError(f"{printable(path)}: the table has a header but no rows")
    if rows[0].line == first[0]:
        _check_no_header(path, rows)
    return rows, named_labels


def _check_no_header(path: str, rows: list[_Row]) -> None:
    """A header in words that we do not know would become a sample of a class of its own."""
    names = (os.path.splitext(row.path)[1].lower() in IMAGE_SUFFIXES for row in rows)
    if not next(names) and next(names, False) and all(names):
        raise _error(
            path,
            rows[0].line,
            f"looks like a header, but {printable(rows[0].path)},{printable(rows[0].label)} names no path and label "
            f"column; expected {', '.join(PATH_COLUMNS)} and {', '.join(LABEL_COLUMNS)}",
        )


def _records(path: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every row that is not blank."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            if file.read(2) in ("\udcff\udcfe", "\udcfe\udcff"):
                raise DataError(f"{printable(path)}: is UTF-16; save it as UTF-8")
            file.seek(0)
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            line = 1
            for cells in reader:
                stripped = [cell.strip() for cell in cells]
                if any(stripped):
                    yield line, stripped
                line = reader.line_num + 1
    except csv.Error as error:
        raise _error(path, line, f"not well-formed CSV: {error}") from error
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from error


def _header(cells: list[str]) -> _Columns | None:
    names = [cell.lower() for cell in cells]

    def find(choices: tuple[str, ...]) -> int | None:
        return next((names.index(choice) for choice in choices if choice in names), None)

    path, label = find(PATH_COLUMNS), find(LABEL_COLUMNS)
    return None if path is None or label is None else _Columns(path, label, find(SPLIT_COLUMNS))


def _row(path: str, line: int, cells: list[str], columns: _Columns, width: int) -> _Row:
    if len(cells) != width:
        hint = "; separate them with commas" if len(cells) == 1 and any(c in cells[0] for c in ";\t|") else ""
        raise _error(
            path, line, f"expected {width} cells (path,label or as the first row has them), got {len(cells)}{hint}"
        )
    name, label = cells[columns.path], cells[columns.label]
    if not name or "\0" in name:
        raise _error(path, line, "expected the path of an image, got an empty cell" if not name else "a path with NUL")
    part = None
    if columns.part is not None:
        part = PART_NAMES.get(cells[columns.part].lower())
        if part is None:
            raise _error(
                path, line, f"expected train, val or test as the split, got {printable(cells[columns.part])!r}"
            )
    return _Row(line, os.path.normpath(name), label, part)


def _labels(row: _Row, multi_label: bool, path: str) -> tuple[str, ...]:
    if not multi_label:
        if not row.label:
            raise _error(path, row.line, "expected a label, got an empty cell (only multi-label tables may have none)")
        return (row.label,)
    if not row.label:
        return ()
    labels = [label.strip() for label in row.label.split(";")]
    if "" in labels:
        raise _error(path, row.line, f"expected labels between the ';', got {printable(row.label)!r}")
    return tuple(sorted(set(labels)))
