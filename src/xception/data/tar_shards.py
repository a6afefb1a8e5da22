"""Images in tars, as WebDataset has them: files that share a name up to the first dot are one sample.

    train-000000.tar:  00000000.jpg  00000000.json    the image, and its labels
                       00000001.jpg  00000001.json

`.json` holds a list of labels, or an object with `labels` (a list) or `label` (one, or a list). `.cls`, which is looked
at first, holds one label as text, or several with ';' between them; a label is a name or a whole number. Other files of
a sample are left alone. Members are read where they lie, by offset; nothing is extracted (`tar_index` says what is
refused). `write_shards` writes any source so.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from xception.data.containers import IMAGE_SUFFIXES
from xception.data.importance import FILE_NAMES
from xception.data.labels import Targets, printable
from xception.data.shards import MAX_SAMPLES, Annotation, Shard, annotation, build_labelled
from xception.data.split import DataSource, Pixels, SplitPlan
from xception.data.tar_index import Member, read_at, read_members
from xception.errors import ConfigError, DataError, ImageError

MAX_LABEL_BYTES = 1 << 16
_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", flags=re.DOTALL)  # a name that begins with a dot is hidden


@dataclass(frozen=True, eq=False)
class TarSplit:
    """Images that lie in tars: `members` is int64 N 3, for each sample its file's number, its offset and its size."""

    files: Sequence[str]
    members: npt.NDArray[np.int64]
    keys: Sequence[str]
    targets: Targets

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Pixels:
        from xception.data.decode import DEFAULT_LIMITS, decode_image

        number, offset, size = self.members[index].tolist()
        if size > DEFAULT_LIMITS.max_bytes:
            raise ImageError(f"a file of {size:,} bytes, more than the limit of {DEFAULT_LIMITS.max_bytes:,}")
        try:
            with open(self.files[number], "rb", buffering=0) as file:
                data = read_at(file, offset, size)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise ImageError("cannot be read: its shard has become shorter")
        return decode_image(data)


def open_tar_shards(shards: Sequence[Shard], folder: str, *, spec: str, plan: SplitPlan) -> DataSource:
    """Read the headers and labels (not the images) of all `shards`, which lie in `folder`.

    Raises:
        DataError: A shard that is compressed, damaged or truncated, or data that cannot be used; names the shard.
    """
    parts: dict[str, _Gathered] = {}
    for shard in shards:
        parts.setdefault(shard.part or "all", _Gathered()).take(shard)
    return build_labelled(
        spec, folder, {part: (found.split(), found.notes) for part, found in parts.items()}, plan=plan
    )


@dataclass
class _Gathered:
    """The samples of one part so far."""

    files: list[str] = field(default_factory=list)
    members: list[tuple[int, int, int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    notes: list[Annotation] = field(default_factory=list)

    def take(self, shard: Shard) -> None:
        number = len(self.files)
        self.files.append(shard.path)
        for name, image, note in _samples(shard):
            self.members.append((number, image.offset, image.size))
            self.keys.append(f"{shard.name}/{name}")
            self.notes.append(note)
            if len(self.keys) > MAX_SAMPLES:
                raise DataError(f"{printable(shard.path)}: more than {MAX_SAMPLES:,} samples, which memory is kept for")

    def split(self) -> TarSplit:
        members = np.array(self.members, np.int64).reshape(-1, 3)
        return TarSplit(tuple(self.files), members, tuple(self.keys), ())


@dataclass
class _Sample:
    """The members of a tar that share a name."""

    images: list[Member] = field(default_factory=list)
    labels: dict[str, Annotation] = field(default_factory=dict)


def _samples(shard: Shard) -> Iterator[tuple[str, Member, Annotation]]:
    """Each sample of a shard, in the order of their first members."""
    shown = printable(shard.path)
    found: dict[str, _Sample] = {}
    try:
        if not os.path.isfile(shard.path):
            raise DataError(f"{shown}: expected a tar file")
        with open(shard.path, "rb", buffering=0) as file:
            for member in read_members(file, shown):
                _sort_in(member, found, file)
                if len(found) > MAX_SAMPLES:
                    raise DataError(f"{shown}: more than {MAX_SAMPLES:,} samples")
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from error
    if not found:
        raise DataError(f"{shown}: holds no samples; expected images, each with a .json or .cls beside it")
    for name, sample in found.items():
        image = sample.images[0] if sample.images else Member(name, 0, 0)
        if len(sample.images) != 1:
            yield (
                name,
                image,
                Annotation(flaw="several images of this name" if sample.images else "labels, but no image"),
            )
        elif not sample.labels:
            yield name, image, Annotation(flaw="no .json or .cls with its labels beside it")
        else:
            yield name, image, sample.labels["cls" if "cls" in sample.labels else "json"]


def _sort_in(member: Member, found: dict[str, _Sample], file: BinaryIO) -> None:
    name = re.sub(r"^(\./)+", "", member.name)
    parts = _SAMPLE.fullmatch(name)
    if parts is None:
        return
    base, ending = parts[1], parts[2].lower()
    if f".{ending}" in IMAGE_SUFFIXES:
        found.setdefault(base, _Sample()).images.append(member)
    elif ending in ("json", "cls"):
        labels = found.setdefault(base, _Sample()).labels
        read = Annotation(flaw=f"two .{ending} of this name") if ending in labels else None
        labels[ending] = read or _read_labels(member, ending, file)


def _read_labels(member: Member, ending: str, file: BinaryIO) -> Annotation:
    if member.size > MAX_LABEL_BYTES:
        return Annotation(flaw=f"its .{ending} has {member.size:,} bytes, more than {MAX_LABEL_BYTES:,}")
    data = read_at(file, member.offset, member.size)
    try:
        text = data.decode("utf-8-sig")
        if ending == "cls":
            cells = [cell.strip() for cell in text.strip().split(";")]
            note = annotation(cells if len(cells) > 1 else cells[0])
        else:
            note = _from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "is not well-formed JSON"
        return Annotation(flaw=f"its .{ending} {reason}")
    return note if note.flaw is None else note._replace(flaw=f"its .{ending} cannot be used: {note.flaw}")


def _from_json(value: Any) -> Annotation:
    if isinstance(value, dict):
        if "labels" in value:
            labels = value["labels"]
            return annotation(labels if isinstance(labels, list) else [labels])
        if "label" not in value:
            return Annotation(flaw="expected 'labels' or 'label' in its object")
        value = value["label"]
    return annotation(value)


# ------------------------------------------------------------------------------------------------ writing


def write_shards(source: DataSource, folder: str | os.PathLike[str], *, images_per_shard: int = 1000) -> list[Path]:
    """Write every part of `source` as tars of PNG and .json into the new folder `folder`; returns them in order.

    With class weights where the source has them. The same source gives the same bytes. Files are kept in the order of
    the samples, and the key of each in its .json.

    Raises:
        ConfigError: Fewer than one image a shard, or a folder that exists or cannot be made.
        ImageError: An image that cannot be decoded; nothing is left behind then.
    """
    if images_per_shard < 1:
        raise ConfigError(f"images_per_shard must be 1 or more; got {images_per_shard}")
    target = Path(folder)
    partial = target.with_name(f".{target.name}.partial")
    try:
        if target.exists():
            raise ConfigError(f"{printable(str(target))} exists: name a new folder")
        partial.mkdir(parents=True)
        try:
            names = list(_write_parts(source, partial, images_per_shard))
            if source.importance is not None:
                weights = dict(zip(source.class_names, source.importance, strict=True))
                (partial / FILE_NAMES[1]).write_text(json.dumps(weights, indent=1), encoding="utf-8")
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial)
            raise
    except OSError as error:
        where = printable(str(error.filename or target))
        raise ConfigError(f"cannot write {printable(str(target))}: {where}: {error.strerror}") from error
    return [target / name for name in names]


def _write_parts(source: DataSource, folder: Path, images_per_shard: int) -> Iterator[str]:
    from PIL import Image

    for part, split in source.splits.items():
        for number, start in enumerate(range(0, len(split), images_per_shard)):
            name = f"{part}-{number:06d}.tar"
            with tarfile.open(folder / name, "w", format=tarfile.PAX_FORMAT) as tar:
                for index in range(start, min(start + images_per_shard, len(split))):
                    pixels, target = split.image(index), split.targets[index]
                    png = io.BytesIO()
                    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(png, "PNG")
                    one = isinstance(target, int)
                    numbers: Iterable[int] = (target,) if isinstance(target, int) else target
                    labels = [source.class_names[k] for k in numbers]
                    text = {"key": split.keys[index], **({"label": labels[0]} if one else {"labels": labels})}
                    _add(tar, f"{index:08d}.png", png.getvalue())
                    _add(tar, f"{index:08d}.json", json.dumps(text).encode("ascii"))
            yield name


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # without owner and time, so that the same data gives the same file
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
