"""Parquet files, as Hugging Face's data sets and others have them: an image a row, with its labels.

    image: binary | struct<bytes: binary, ...>      or      path: string      (as `table.py` names them)
    labels: list<string | integer>   or   label: string | integer            [split: string]

Paths are relative to the file's folder (or to the root that is given) and stay within it. The data is multi-label when
the label column holds lists. Labels are read when the data is opened, images when they are asked for: each asks for the
row group that it is in, of which the last few are kept. Random access therefore wants small ones:
`row_group_size=100`, as Hugging Face writes images; groups of more than 256 MiB are refused.

Needs pyarrow (`pip install 'xception[shards]'`).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from xception.data.folder import PART_NAMES
from xception.data.labels import Targets, printable
from xception.data.shards import MAX_SAMPLES, Annotation, Shard, annotation, build_labelled
from xception.data.split import DataSource, FileSplit, Pixels, Split, SplitPlan
from xception.data.table import LABEL_COLUMNS, PATH_COLUMNS, SPLIT_COLUMNS
from xception.errors import DataError, ImageError, MissingPackageError

IMAGE_COLUMNS = ("image", "images", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp", "img")
MAX_GROUP_BYTES = 256 * 2**20
_KEPT_BYTES = 256 * 2**20  # of row groups in memory, beyond the one in use
_OPEN_FILES = 16
_MAX_FOOTER = 64 * 2**20  # of strings and of lists in a footer, which pyarrow takes memory for


def open_parquet(
    shards: Sequence[Shard], folder: str, *, spec: str, plan: SplitPlan, root: str | None = None
) -> DataSource:
    """Read the labels (not the images) of all `shards`, which lie in `folder`.

    Args:
        shards: The files, in order.
        folder: Where they lie, and perhaps the class weights.
        spec: What the user wrote.
        plan: How missing parts are dealt.
        root: What paths in a path column are relative to; by default `folder`.

    Raises:
        MissingPackageError: No pyarrow.
        DataError: A file that is none or damaged, columns that are missing, or data that cannot be used.
    """
    parts: dict[str, _Gathered] = {}
    columns: _Columns | None = None
    for number, shard in enumerate(shards):
        shown = printable(shard.path)
        file = _open(shard.path)
        mine = _columns(file.schema_arrow, shown)
        if columns is not None and mine != columns:
            raise DataError(f"{shown}: other columns ({mine}) than {printable(shards[0].name)} ({columns})")
        columns = mine
        if shard.part is not None and mine.split is not None:
            raise DataError(f"{shown}: its name says the part {shard.part!r}, and so does its column {mine.split!r}")
        row = 0
        for group in range(file.num_row_groups):
            for within, cells in enumerate(_rows(file, group, mine, shown)):
                part = _part(cells, mine, f"{shown}, row {row}") or shard.part or "all"
                gathered = parts.setdefault(part, _Gathered())
                gathered.rows.append((number, group, within))
                gathered.notes.append(_annotation(cells, mine))
                if mine.image is None:
                    gathered.keys.append(_inside(cells, mine, f"{shown}, row {row}"))
                else:
                    gathered.keys.append(f"{shard.name}/{row:07d}")
                row += 1
            if sum(len(gathered.keys) for gathered in parts.values()) > MAX_SAMPLES:
                raise DataError(f"{shown}: more than {MAX_SAMPLES:,} samples, which memory is kept for")
    if columns is None or not parts:
        raise DataError(f"{printable(spec)}: holds no samples")
    groups = RowGroups(tuple(shard.path for shard in shards), columns.image or "", columns.nested)
    splits = {
        part: (_split(found, columns, groups, folder if root is None else root), found.notes)
        for part, found in parts.items()
    }
    return build_labelled(spec, folder, splits, plan=plan)


@dataclass
class _Gathered:
    """The samples of one part so far."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    notes: list[Annotation] = field(default_factory=list)


@dataclass(frozen=True)
class _Columns:
    """Which column holds what."""

    image: str | None
    nested: bool
    """Whether the image is the field 'bytes' of a struct."""
    path: str | None
    label: str
    several: bool
    split: str | None

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.image or self.path, self.label, self.split)))


def _split(found: _Gathered, columns: _Columns, groups: RowGroups, root: str) -> Split:
    keys = tuple(found.keys)
    if columns.image is None:
        return FileSplit(root, keys, ())
    return ParquetSplit(groups, np.array(found.rows, np.int64).reshape(-1, 3), keys, ())


@dataclass(frozen=True, eq=False)
class ParquetSplit:
    """Images in Parquet files: `rows` is int64 N 3, each sample's file, row group, and row in that."""

    groups: RowGroups
    rows: npt.NDArray[np.int64]
    keys: Sequence[str]
    targets: Targets

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Pixels:
        from xception.data.decode import decode_image

        file, group, row = self.rows[index].tolist()
        data = self.groups.value(file, group, row)
        if not data:
            raise ImageError("an empty cell instead of an image")
        return decode_image(data)


class RowGroups:
    """The image column of some files, a row group at a time; any number of threads and processes may use it.

    The last groups stay in memory, up to 256 MiB of them. A copy in another process begins empty.
    """

    def __init__(self, files: Sequence[str], column: str, nested: bool) -> None:
        self._files, self._column, self._nested = files, column, nested
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._opened: OrderedDict[int, Any] = OrderedDict()  # a file's footer is long, and takes its time to parse

    def __getstate__(self) -> tuple[Sequence[str], str, bool]:
        return self._files, self._column, self._nested

    def __setstate__(self, state: tuple[Sequence[str], str, bool]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def value(self, file: int, group: int, row: int) -> memoryview | None:
        """The bytes in a cell, None for none; raises `ImageError` where the group cannot be read."""
        if self._process != os.getpid():  # after a fork, in which another thread may have held the lock
            self._begin()
        with self._lock:
            column = self._kept.get((file, group))
            if column is None:
                column = self._read(file, group)
                self._kept[file, group] = column
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((file, group))
        if row >= len(column):
            raise ImageError("cannot be read: its row group has become shorter")
        cell = column[row]
        cell = cell["bytes"] if self._nested and cell.is_valid else cell
        return memoryview(cell.as_buffer()) if cell.is_valid else None

    def _read(self, number: int, group: int) -> Any:
        try:
            file = self._opened.pop(number, None) or _open(self._files[number])
            self._opened[number] = file
            while len(self._opened) > _OPEN_FILES:
                self._opened.popitem(last=False)[1].close()
            name = f"{self._column}.bytes" if self._nested else self._column
            return _read_columns(file, group, [name], printable(self._files[number])).column(self._column)
        except DataError as error:
            raise ImageError(f"cannot be read: {error}") from error


# ------------------------------------------------------------------------------------------------ reading


def _open(path: str) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingPackageError("Parquet files need pyarrow: pip install 'xception[shards]'") from None
    shown = printable(path)
    if not os.path.isfile(path):
        raise DataError(f"{shown}: expected a Parquet file")
    try:
        return parquet.ParquetFile(
            path,
            memory_map=False,
            pre_buffer=False,
            page_checksum_verification=True,
            thrift_string_size_limit=_MAX_FOOTER,
            thrift_container_size_limit=_MAX_FOOTER,
        )
    except Exception as error:  # pyarrow's own kinds and OSError; whatever it is, this is no usable file
        raise DataError(f"{shown}: cannot be read as Parquet: {_reason(error)}") from error


def _read_columns(file: Any, group: int, names: list[str], shown: str) -> Any:
    """Some columns of a row group, their sizes checked before memory is taken; raises `DataError`."""
    try:
        found = file.metadata.row_group(group)
        roots = {name.partition(".")[0] for name in names}
        chunks = [found.column(i) for i in range(found.num_columns)]
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in roots)
        if size > MAX_GROUP_BYTES:
            raise DataError(
                f"{shown}: row group {group} has {size / 2**20:,.0f} MiB of {', '.join(sorted(roots))}, more than "
                f"{MAX_GROUP_BYTES >> 20}: write it with row_group_size=100"
            )
        table = file.read_row_group(group, columns=names, use_threads=False)
        if table.num_rows != found.num_rows or table.num_columns != len(roots):
            raise DataError(f"{shown}: row group {group} does not hold what the file says")
        return table
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{shown}: row group {group} cannot be read: {_reason(error)}") from error


def _columns(schema: Any, shown: str) -> _Columns:
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def text(kind: Any) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def nested(kind: Any) -> bool:
        return bool(pa.types.is_struct(kind)) and any(f.name == "bytes" and binary(f.type) for f in kind)

    def label(kind: Any) -> bool:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        return text(kind) or bool(pa.types.is_integer(kind))

    def several(kind: Any) -> bool:
        return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) and label(kind.value_type)

    kinds = {entry.name: entry.type for entry in schema}
    if len(kinds) < len(schema):
        raise DataError(f"{shown}: two columns of the same name")

    def find(names: Sequence[str], *accepted: Any) -> str | None:
        return next(
            (
                n
                for wanted in names
                for n, kind in kinds.items()
                if n.lower() == wanted and any(a(kind) for a in accepted)
            ),
            None,
        )

    image, path = find(IMAGE_COLUMNS, binary, nested), find(PATH_COLUMNS, text)
    labels = find(("labels", *LABEL_COLUMNS), label, several)
    if (image is None and path is None) or labels is None:
        what = "label" if labels is None else "image or path"
        have = ", ".join(f"{printable(name)}: {kind}" for name, kind in list(kinds.items())[:20])
        raise DataError(f"{shown}: no {what} column; expected image (bytes) or path, and labels or label; got {have}")
    return _Columns(
        image=image,
        nested=image is not None and nested(kinds[image]),
        path=path if image is None else None,
        label=labels,
        several=several(kinds[labels]),
        split=find(SPLIT_COLUMNS, text),
    )


def _rows(file: Any, group: int, columns: _Columns, shown: str) -> Iterator[dict[str, Any]]:
    names = [name for name in (columns.path, columns.label, columns.split) if name is not None]
    table = _read_columns(file, group, names, shown)
    try:
        yield from table.to_pylist()
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{shown}: row group {group} cannot be read: {_reason(error)}") from error


def _annotation(cells: dict[str, Any], columns: _Columns) -> Annotation:
    value = cells[columns.label]
    if value is None:
        return Annotation(several=columns.several, flaw=f"no value in column {columns.label!r}")
    return annotation(value)


def _part(cells: dict[str, Any], columns: _Columns, where: str) -> str | None:
    if columns.split is None:
        return None
    said = str(cells[columns.split])
    part = PART_NAMES.get(said.strip().lower())
    if part is None:
        raise DataError(f"{where}: expected train, val or test in {columns.split!r}, got {printable(said)!r:.80}")
    return part


def _inside(cells: dict[str, Any], columns: _Columns, where: str) -> str:
    """The path in a row, which must not lead out of the data's folder: whoever wrote it did not see this machine."""
    path = cells[columns.path or ""]
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise DataError(f"{where}: expected the path of an image in {columns.path!r}, got {path!r:.80}")
    path = os.path.normpath(path.strip())
    if os.path.isabs(path) or path.split(os.sep)[0] in ("..", "."):
        raise DataError(f"{where}: {printable(path)!r:.200} is no path of an image within the data's folder")
    return path


def _reason(error: BaseException) -> str:
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
