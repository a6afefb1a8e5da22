"""Data in shards: which files of a folder they are, to which part each belongs, and what their labels become.

A folder is one of shards when it holds .tar (or .parquet) files, itself or in sub-folders named as parts, and no other
folders. A shard belongs to the part that its folder, or the first word of its name, says (`train-000001.tar`,
`val_0.parquet`, `validation-00000-of-00002.parquet`); either all do or none does. Shards are taken in sorted order.

Labels are names, or whole numbers that stand for names. A sample whose label cannot be read is known by name and counts
as an image that cannot be decoded, so that one in a million does not end a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from xception.data.folder import PART_NAMES, is_folder
from xception.data.importance import importance_beside
from xception.data.labels import Targets, name_classes, printable
from xception.data.split import DataSource, Pixels, Split, SplitPlan, build_source
from xception.errors import DataError, ImageError

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
"""What a tar may be called; the compressed ones are refused by name when they are opened."""
PARQUET = (".parquet",)
MAX_SHARDS = 100_000
MAX_SAMPLES = 20_000_000
"""Keys, labels and places of samples are kept in memory: some hundred bytes each."""
MAX_LABELS = 10_000
MAX_LABEL_LENGTH = 1000


class Shard(NamedTuple):
    """A file of samples."""

    path: str
    name: str
    """Relative to the data's folder, with '/', as it stands in keys."""
    part: str | None
    """'train', 'val' or 'test' where folder or name says so."""


class Annotation(NamedTuple):
    """A sample's labels, or why they are not known."""

    labels: tuple[str, ...] = ()
    """Sorted, each once."""
    several: bool = False
    """Whether they came as a list, which makes the data multi-label."""
    flaw: str | None = None


@dataclass(frozen=True)
class Flawed:
    """Samples of which some cannot be used, whatever their images hold: index -> why."""

    base: Split
    flaws: Mapping[int, str]
    keys: Sequence[str]
    targets: Targets

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Pixels:
        if index in self.flaws:
            raise ImageError(self.flaws[index])
        return self.base.image(index)


def shards_in(folder: str) -> tuple[str, list[Shard]] | None:
    """('tar' or 'parquet', the shards in order), where `folder` is one of shards; None for any other folder.

    Raises:
        DataError: Both kinds, too many, some with a part and some without, or a folder that cannot be read.
    """
    files, folders = _list(folder)
    found = [(name, name) for name in files]
    for inner in folders:
        if inner.lower() not in PART_NAMES:
            return None
        inner_files, inner_folders = _list(os.path.join(folder, inner))
        if inner_folders or not any(map(_kind, inner_files)):
            return None
        found += [(f"{inner}/{name}", inner) for name in inner_files]
    shards = [(kind, name, said) for name, said in sorted(found) if (kind := _kind(name)) is not None]
    kinds = sorted({kind for kind, _, _ in shards})
    if not kinds:
        return None
    if len(kinds) > 1:
        raise DataError(f"{printable(folder)}: holds both .tar and .parquet files: keep one kind")
    if len(shards) > MAX_SHARDS:
        raise DataError(f"{printable(folder)}: {len(shards):,} shards, more than {MAX_SHARDS:,}: write larger ones")
    listed = [Shard(os.path.join(folder, name), name, _part(said)) for _, name, said in shards]
    with_part = [shard for shard in listed if shard.part is not None]
    if with_part and len(with_part) < len(listed):
        other = next(shard for shard in listed if shard.part is None)
        raise DataError(
            f"{printable(folder)}: {printable(with_part[0].name)} is of the part {with_part[0].part!r}, but the name "
            f"of {printable(other.name)} says no part: name all of them or none"
        )
    return kinds[0], listed


def single_shard(path: str) -> list[Shard]:
    """One file as data of its own; its name says nothing of parts."""
    return [Shard(path, os.path.basename(path), None)]


def is_tar_name(path: str) -> bool:
    """Whether a file is called as a tar is, compressed or not."""
    return path.lower().endswith(TAR)


def is_parquet_name(path: str) -> bool:
    """Whether a file is called as a Parquet file is."""
    return path.lower().endswith(PARQUET)


def _kind(name: str) -> str | None:
    if name.lower().endswith(TAR):
        return "tar"
    return "parquet" if name.lower().endswith(PARQUET) else None


def _part(name: str) -> str | None:
    return PART_NAMES.get(re.split(r"[-_.]", name.lower(), maxsplit=1)[0])


def _list(folder: str) -> tuple[list[str], list[str]]:
    """Visible files and folders, sorted."""
    try:
        with os.scandir(folder) as entries:
            listed = [(entry.name, is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be read: {error.strerror}") from error
    return sorted(name for name, inner in listed if not inner), sorted(name for name, inner in listed if inner)


# ------------------------------------------------------------------------------------------------ labels


def annotation(value: Any) -> Annotation:
    """The labels that `value` stands for: a name or whole number, or a list of them, as JSON and Parquet have them."""
    several = isinstance(value, list)
    values = value if several else [value]
    if len(values) > MAX_LABELS:
        return Annotation(several=several, flaw=f"{len(values):,} labels, more than {MAX_LABELS:,}")
    labels = []
    for label in values:
        if isinstance(label, bool) or not isinstance(label, int | str):
            what = "none" if label is None else f"one of type {type(label).__name__}"
            return Annotation(several=several, flaw=f"expected a label that is a name or a whole number, got {what}")
        try:
            text = str(label).strip()
        except ValueError:  # Python refuses to print whole numbers of more than 4,300 digits
            text = ""
        if not text or len(text) > MAX_LABEL_LENGTH:
            flaw = f"a label of more than {MAX_LABEL_LENGTH:,} characters" if text else "an empty label"
            return Annotation(several=several, flaw=flaw)
        labels.append(text)
    return Annotation(tuple(sorted(set(labels))), several)


def build_labelled(
    spec: str,
    folder: str,
    parts: Mapping[str, tuple[Split, Sequence[Annotation]]],
    *,
    plan: SplitPlan,
) -> DataSource:
    """A source of samples (their targets still to be set) and their annotations, by part ('all' for no parts).

    The data is multi-label when any sample has a list of labels. Class weights come from the file in `folder`.

    Raises:
        DataError: No labels at all, a class in val or test that train lacks, or what `build_source` refuses.
    """
    total = sum(len(split) for split, _ in parts.values())
    if total > MAX_SAMPLES:
        raise DataError(f"{printable(spec)}: {total:,} samples, more than the {MAX_SAMPLES:,} that are kept in memory")
    known = [note for _, notes in parts.values() for note in notes if note.flaw is None]
    names = name_classes(label for note in known for label in note.labels)
    if not names:
        flaws = [
            f" ({printable(split.keys[i])}: {note.flaw})"
            for split, notes in parts.values()
            for i, note in enumerate(notes)
            if note.flaw is not None
        ]
        raise DataError(f"{printable(spec)}: no sample has a label{flaws[0] if flaws else ''}")
    multi_label = any(note.several for note in known)
    index = {name: i for i, name in enumerate(names)}
    trained = {label for note in parts["train"][1] for label in note.labels} if "train" in parts else set(names)
    given: dict[str, Split] = {}
    for part, (split, notes) in parts.items():
        targets: list[Any] = []
        flaws_at: dict[int, str] = {}
        for i, note in enumerate(notes):
            if note.flaw is not None:
                flaws_at[i] = note.flaw
            if missing := set(note.labels) - trained:
                where = f"{printable(spec)}: {printable(split.keys[i])}"
                raise DataError(f"{where}: class {printable(min(missing))!r} is in {part!r} but not in 'train'")
            numbers = tuple(sorted(index[label] for label in note.labels))
            targets.append(numbers if multi_label else (numbers or (0,))[0])  # 0: flawed, and never trained on
        labelled = cast(Targets, tuple(targets))
        labels_set: Any = replace(cast(Any, split), targets=labelled)
        given[part] = Flawed(labels_set, flaws_at, split.keys, labelled) if flaws_at else labels_set
    importance = importance_beside(folder, names) if multi_label else None
    return build_source(spec, names, given, plan=plan, multi_label=multi_label, importance=importance)
