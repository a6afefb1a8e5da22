"""Samples with keys and targets, and the data source that deals them to train, val and test.

Everything that reads a data set ends here: files on disk (`FileSplit`), arrays in memory (`ArraySplit`), or anything
else that offers the four members of `Split`. Nothing of torch is needed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from xception.data.labels import (
    Targets,
    check_fractions,
    count_classes,
    display_names,
    fingerprint,
    printable,
    stratified_split,
)
from xception.errors import DataError

Pixels = npt.NDArray[np.uint8]
PARTS = ("train", "val", "test")


class BadImage(NamedTuple):
    """A sample that could not be decoded."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.key)}: {self.reason}"


@runtime_checkable
class Split(Protocol):
    """Samples in a fixed order; see `FileSplit` and `ArraySplit` for the two kinds there are."""

    @property
    def keys(self) -> Sequence[str]:
        """A unique, stable name for each sample: the path relative to the data's root, or such as 'digits/0017'."""

    @property
    def targets(self) -> Targets:
        """The class index of each sample; for multi-label data the sorted class indices of each."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Pixels:
        """uint8 H W C, with C = 3, or 1 for grey arrays; raises `ImageError`."""


@dataclass(frozen=True)
class FileSplit:
    """Image files, decoded when asked for. A key is the path relative to `root`."""

    root: str
    keys: Sequence[str]
    targets: Targets

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Pixels:
        from xception.data.decode import decode_image  # Pillow is not needed to look at a data set

        return decode_image(os.path.join(self.root, self.keys[index]))

    def select(self, indices: Sequence[int]) -> FileSplit:
        return FileSplit(self.root, _pick(self.keys, indices), _pick_targets(self.targets, indices))


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """Images in memory: `array`, uint8 N H W C (C = 3 or 1), is shared by all parts; `rows` are those of this one."""

    array: Pixels
    rows: npt.NDArray[np.int64]
    keys: Sequence[str]
    targets: Targets

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Pixels:
        pixels: Pixels = self.array[self.rows[index]]
        return pixels

    def select(self, indices: Sequence[int]) -> ArraySplit:
        rows = self.rows[np.asarray(indices, np.int64)]
        return ArraySplit(self.array, rows, _pick(self.keys, indices), _pick_targets(self.targets, indices))


@dataclass(frozen=True)
class Subset:
    """Some samples of another split."""

    base: Split
    indices: Sequence[int]
    keys: Sequence[str]
    targets: Targets

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Pixels:
        return self.base.image(self.indices[index])


@dataclass(frozen=True)
class Concatenation:
    """Several splits, one after the other."""

    parts: Sequence[Split]
    keys: Sequence[str]
    targets: Targets

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Pixels:
        for part in self.parts:
            if index < len(part):
                return part.image(index)
            index -= len(part)
        raise IndexError(index)


def _pick(values: Sequence[str], indices: Sequence[int]) -> tuple[str, ...]:
    return tuple(values[index] for index in indices)


def _pick_targets(targets: Targets, indices: Sequence[int]) -> Targets:
    return cast(Targets, tuple(targets[index] for index in indices))


def select(split: Split, indices: Sequence[int]) -> Split:
    """The samples at `indices`, in that order."""
    if isinstance(split, FileSplit | ArraySplit):
        return split.select(indices)
    return Subset(split, tuple(indices), _pick(split.keys, indices), _pick_targets(split.targets, indices))


def without(split: Split, indices: Collection[int]) -> Split:
    """All samples but those at `indices`."""
    dropped = set(indices)
    return select(split, [index for index in range(len(split)) if index not in dropped]) if dropped else split


def concatenate(splits: Sequence[Split]) -> Split:
    """All samples of `splits`, in order."""
    if len(splits) == 1:
        return splits[0]
    keys = tuple(key for split in splits for key in split.keys)
    targets = cast(Targets, tuple(target for split in splits for target in split.targets))
    first = splits[0]
    if isinstance(first, ArraySplit) and all(isinstance(s, ArraySplit) and s.array is first.array for s in splits):
        rows = np.concatenate([cast(ArraySplit, split).rows for split in splits])
        return ArraySplit(first.array, rows, keys, targets)
    if isinstance(first, FileSplit) and all(isinstance(s, FileSplit) and s.root == first.root for s in splits):
        return FileSplit(first.root, keys, targets)
    return Concatenation(tuple(splits), keys, targets)


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """How parts that the data does not come with are dealt; the same plan on the same samples gives the same parts."""

    seed: int = 0
    val_fraction: float = 0.1
    """Share of the training samples (of all samples, where there are no parts) that becomes 'val'."""
    test_fraction: float = 0.1
    """Share of all samples that becomes 'test', where the data has no parts at all."""
    min_classes: int = 2
    """Data of fewer is refused: nothing can be learnt from one class, but a model can be tried on it."""

    def __post_init__(self) -> None:
        check_fractions({"val": self.val_fraction, "test": self.test_fraction})


@dataclass(frozen=True)
class DataSource:
    """A data set, ready for training or evaluation."""

    spec: str
    class_names: tuple[str, ...]
    multi_label: bool
    channels: int
    """Of the images: 3, or 1 where all of them are grey arrays."""
    splits: dict[str, Split]
    """Parts by name, of 'train', 'val' and 'test'; a part without samples is left out."""
    split_origin: dict[str, str]
    """For each part 'given' where the data came with it, 'split' where we dealt it."""
    fingerprint: str
    """SHA-256 over class names and each sample's part, key and labels."""
    importance: tuple[float, ...] | None = None
    """What each class weighs in MAP@100, 0 or more, where the data says so; it has no part in the fingerprint."""
    given: Mapping[str, Split] = field(default_factory=dict, repr=False, compare=False)
    """The parts as the data came, before anything was dealt; 'all' where it has no parts."""
    plan: SplitPlan = field(default_factory=SplitPlan)

    def counts(self) -> dict[str, dict[str, int]]:
        """Samples of each class in each part; a multi-label sample counts for each of its classes."""
        return {
            part: dict(zip(self.class_names, count_classes(split.targets, len(self.class_names)), strict=True))
            for part, split in self.splits.items()
        }


def build_source(
    spec: str,
    class_names: Sequence[str],
    given: Mapping[str, Split],
    *,
    plan: SplitPlan,
    multi_label: bool = False,
    channels: int = 3,
    importance: Sequence[float] | None = None,
) -> DataSource:
    """Deal the parts that are missing and put a `DataSource` together.

    `given` is {'all': ...} for data without parts, which becomes train, val and test, or has keys among train, val and
    test. There, 'val' is dealt from 'train' when it is missing; 'test' is never taken from data that came with parts.
    A fraction of 0 asks for no such part.

    Raises:
        DataError: Nothing there, fewer than two classes, a class without a training sample, or a sample named twice.
    """
    if sum(map(len, given.values())) == 0:
        raise DataError(f"{printable(spec)}: holds no samples")
    if len(class_names) < (1 if multi_label else plan.min_classes):
        found = f"only {printable(class_names[0])!r}" if class_names else "none"
        raise DataError(f"{printable(spec)}: expected at least two classes, found {found}")
    keys = [key for split in given.values() for key in split.keys]
    if len(set(keys)) < len(keys):
        raise DataError(f"{printable(spec)}: the same sample appears more than once")

    splits: dict[str, Split] = {}
    origin: dict[str, str] = {}
    for name, split in given.items():
        if name == "all":
            dealt = _deal(split, {"val": plan.val_fraction, "test": plan.test_fraction}, plan.seed)
        elif name == "train" and "val" not in given and plan.val_fraction > 0:
            dealt = _deal(split, {"val": plan.val_fraction}, plan.seed)
        else:
            dealt = {name: split}
        for part, samples in dealt.items():
            if len(samples):
                splits[part] = samples
                origin[part] = "given" if len(dealt) == 1 and name != "all" else "split"
    splits = {part: splits[part] for part in PARTS if part in splits}
    if "train" in splits:
        counts = count_classes(splits["train"].targets, len(class_names))
        if 0 in counts:
            raise DataError(
                f"{printable(spec)}: class {printable(class_names[counts.index(0)])!r} has no sample to train on"
            )
    return DataSource(
        spec=spec,
        class_names=display_names(class_names),
        multi_label=multi_label,
        channels=channels,
        splits=splits,
        split_origin={part: origin[part] for part in splits},
        fingerprint=fingerprint({p: (s.keys, s.targets) for p, s in splits.items()}, class_names),
        importance=None if importance is None else tuple(importance),
        given=dict(given),
        plan=plan,
    )


def _deal(split: Split, fractions: dict[str, float], seed: int) -> dict[str, Split]:
    parts = stratified_split(split.keys, split.targets, fractions=fractions, seed=seed)
    return {name: select(split, indices) for name, indices in parts.items()}


def all_samples(source: DataSource) -> Split:
    """Every sample of every part, as one split."""
    return concatenate(list(source.splits.values()))


def drop_samples(source: DataSource, keys: Collection[str]) -> DataSource:
    """The source as it would have been opened without the samples named `keys`: parts are dealt anew.

    A run on it equals, bit for bit, a run on a copy of the data from which those files were deleted.
    """
    dropped = set(keys)
    if not dropped:
        return source
    given, plan = source.given, source.plan
    if not given:  # put together by hand: the parts are what they are
        given, plan = source.splits, replace(plan, val_fraction=0, test_fraction=0)
    cleaned = {
        name: without(split, [index for index, key in enumerate(split.keys) if key in dropped])
        for name, split in given.items()
    }
    return build_source(
        source.spec,
        source.class_names,
        cleaned,
        plan=plan,
        multi_label=source.multi_label,
        channels=source.channels,
        importance=source.importance,
    )
