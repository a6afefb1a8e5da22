"""Any of torchvision's classification data sets, by name.

Torchvision's classes differ in how they name parts, targets and classes; the table below says for each how its parts
are asked for, the rest is found by looking. Sets that torchvision keeps in memory become arrays; sets that take a
`loader` hand out paths, and the files are decoded by `decode.py` like any others; what is left comes as Pillow images.

Nothing is downloaded unless asked for. Where torchvision itself unpickles files (CIFAR), it checks their MD5 sums
first.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from xception.data.builtin import array_split, data_root
from xception.data.labels import Targets, printable
from xception.data.split import ArraySplit, DataSource, Pixels, Split, SplitPlan, build_source
from xception.errors import DataError, ImageError

_Options = dict[str, Any]
_BY_FLAG: Mapping[str, _Options] = {"train": {"train": True}, "test": {"train": False}}


def _by_split(**parts: str) -> Mapping[str, _Options]:
    return {part: {"split": name} for part, name in parts.items()}


_TRAIN_TEST = _by_split(train="train", test="test")
_TRAIN_VAL_TEST = _by_split(train="train", val="val", test="test")
_WHOLE: Mapping[str, _Options] = {"all": {}}

# Part -> the options that ask torchvision for it; 'all' where it knows no parts.
SETS: Mapping[str, Mapping[str, _Options]] = {
    "CIFAR10": _BY_FLAG,
    "CIFAR100": _BY_FLAG,
    "CLEVRClassification": _by_split(train="train", val="val"),  # its test part comes without labels
    "Caltech101": _WHOLE,
    "Caltech256": _WHOLE,
    "CelebA": _by_split(train="train", val="valid", test="test"),
    "Country211": _by_split(train="train", val="valid", test="test"),
    "DTD": _TRAIN_VAL_TEST,
    "EMNIST": {part: {"split": "balanced", **options} for part, options in _BY_FLAG.items()},
    "EuroSAT": _WHOLE,
    "FER2013": _TRAIN_TEST,
    "FGVCAircraft": _TRAIN_VAL_TEST,
    "FakeData": _WHOLE,
    "FashionMNIST": _BY_FLAG,
    "Flowers102": _TRAIN_VAL_TEST,
    "Food101": _TRAIN_TEST,
    "GTSRB": _TRAIN_TEST,
    "INaturalist": {"train": {"version": "2021_train"}, "val": {"version": "2021_valid"}},
    "ImageNet": _by_split(train="train", val="val"),
    "Imagenette": _by_split(train="train", val="val"),
    "KMNIST": _BY_FLAG,
    "LFWPeople": _by_split(all="10fold"),
    "MNIST": _BY_FLAG,
    "Omniglot": _WHOLE,
    "OxfordIIITPet": _by_split(train="trainval", test="test"),
    "PCAM": _TRAIN_VAL_TEST,
    "Places365": _by_split(train="train-standard", val="val"),
    "QMNIST": _BY_FLAG,
    "RenderedSST2": _TRAIN_VAL_TEST,
    "SEMEION": _WHOLE,
    "STL10": _TRAIN_TEST,
    "SUN397": _WHOLE,
    "SVHN": _TRAIN_TEST,
    "StanfordCars": _TRAIN_TEST,
    "USPS": _BY_FLAG,
}
_BY_SIMPLE_NAME = {name.lower(): name for name in SETS}


def simple_name(name: str) -> str:
    """'CIFAR-10', 'cifar_10' and 'CIFAR10' are one name."""
    return name.lower().replace("-", "").replace("_", "")


def set_name(name: str) -> str | None:
    """The class in torchvision that a name stands for, whatever its case and hyphens; None for no such data set."""
    return _BY_SIMPLE_NAME.get(simple_name(name))


def open_torchvision(name: str, *, spec: str, plan: SplitPlan, root: str | None, download: bool) -> DataSource:
    """Open one of torchvision's data sets.

    Args:
        name: Its class in torchvision, in any case.
        spec: What the user wrote.
        plan: How parts that torchvision does not know are dealt.
        root: Folder its files are in; by default $XCEPTION_DATA or ./data.
        download: Fetch them there first.

    Raises:
        DataError: Not a classification data set; files that are missing or damaged.
    """
    known = set_name(name)
    if known is None:
        raise DataError(_unknown(name))
    folder = data_root(root)
    datasets = {part: _construct(known, options, folder, download) for part, options in SETS[known].items()}
    prefix = f"torchvision/{known}"
    try:
        labelled = {part: _Labelled(dataset, _targets(dataset)) for part, dataset in datasets.items()}
        names, multi_label = _class_names(known, labelled)
        given: dict[str, Split] = {}
        for part, labels in labelled.items():
            part_prefix = prefix if part == "all" else f"{prefix}/{part}"
            given[part] = _split(labels.dataset, labels.targets, part_prefix)
    except (DataError, ImageError):
        raise
    except Exception as error:
        raise DataError(f"{prefix}: cannot be read: {_reason(error)}") from error
    grey = all(isinstance(split, ArraySplit) and split.array.shape[-1] == 1 for split in given.values())
    return build_source(spec, names, given, plan=plan, multi_label=multi_label, channels=1 if grey else 3)


@dataclass(frozen=True)
class _Labelled:
    dataset: Any
    targets: Targets


@dataclass(frozen=True)
class DatasetSplit:
    """Samples of a torchvision data set that hands out paths or Pillow images."""

    dataset: Any
    keys: Sequence[str]
    targets: Targets

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Pixels:
        from xception.data.decode import decode_image, rgb_pixels

        try:
            picture = self.dataset[index][0]
            if isinstance(picture, str | os.PathLike):
                return decode_image(picture)
            with picture:
                return rgb_pixels(picture)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"cannot be decoded: {_reason(error)}") from error


def _unknown(name: str) -> str:
    import torchvision.datasets

    shown = printable(name)
    others = {simple_name(other): other for other in torchvision.datasets.__all__}
    if simple_name(name) in ("imagefolder", "datasetfolder"):
        return f"torchvision/{shown}: give the folder itself instead of this name"
    if simple_name(name) in others:
        return f"torchvision/{others[simple_name(name)]}: not a data set of images with one class each"
    close = difflib.get_close_matches(simple_name(name), _BY_SIMPLE_NAME, n=3)
    hint = "did you mean " + " or ".join(_BY_SIMPLE_NAME[c] for c in close) if close else "known: " + ", ".join(SETS)
    return f"torchvision/{shown}: no such data set; {hint}"


def can_download(name: str) -> bool:
    """Whether torchvision fetches the files of a set itself."""
    import torchvision.datasets

    accepted = inspect.signature(getattr(torchvision.datasets, name)).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return "download" in accepted or (passes_on and name != "ImageNet")


def _construct(name: str, options: _Options, root: str, download: bool) -> Any:
    import torchvision.datasets

    constructor = getattr(torchvision.datasets, name, None)
    if constructor is None:
        raise DataError(f"torchvision/{name}: the installed torchvision does not have it")
    accepted = inspect.signature(constructor).parameters
    keywords = dict(options)
    if "root" in accepted:
        keywords["root"] = root
    downloads = can_download(name)
    if downloads:
        keywords["download"] = download
    if "loader" in accepted:
        keywords["loader"] = _path_itself
    try:
        return constructor(**keywords)
    except Exception as error:  # each class has its own way of saying that its files are not there
        where = printable(root)
        if download and downloads:
            advice = "the download failed"
        elif downloads:
            advice = f"its files are not in {where}; fetch them with --download, or say where they are with --data-root"
        else:
            advice = (
                f"its files are not in {where}, and torchvision cannot fetch them; say where they are with --data-root"
            )
        raise DataError(f"torchvision/{name}: {advice} ({_reason(error)})") from error


def _path_itself(path: Any) -> Any:
    """Given to torchvision as the loader: it then hands out paths, so that targets cost nothing and we decode."""
    return path


def _targets(dataset: Any) -> Targets:
    """Class indices: as the data set lists them if it does, by going through it otherwise."""
    attributes = getattr(dataset, "attr", None)
    if attributes is not None and getattr(dataset, "attr_names", None):
        return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in attributes)
    for name in ("targets", "labels", "_labels", "y"):
        listed = getattr(dataset, name, None)
        if listed is not None and len(listed) == len(dataset) and len(dataset) and np.ndim(listed) == 1:
            targets = tuple(int(target) for target in listed)
            if all(_target(dataset, i) in (targets[i], None) for i in _probes(dataset)):
                return targets
    samples = getattr(dataset, "_samples", None)
    if isinstance(samples, list) and samples and len(samples) == len(dataset) and isinstance(samples[0][1], int):
        return tuple(int(target) for _, target in samples)
    return tuple(_target(dataset, index, required=True) or 0 for index in range(len(dataset)))


def _probes(dataset: Any) -> set[int]:
    return {0, len(dataset) // 2, len(dataset) - 1}


def _target(dataset: Any, index: int, *, required: bool = False) -> int | None:
    """The class index that comes with a sample; None where its image is so broken that there is none to be had."""
    try:
        picture, target = dataset[index]
    except Exception:
        if required:
            raise
        return None
    if hasattr(picture, "close"):
        picture.close()
    return int(target)


def _class_names(name: str, parts: Mapping[str, _Labelled]) -> tuple[tuple[str, ...], bool]:
    dataset = next(iter(parts.values())).dataset
    attributes = getattr(dataset, "attr_names", None)
    if attributes:
        return tuple(filter(None, attributes)), True
    listed: Any = next(
        (found for key in ("classes", "categories", "all_categories") if (found := getattr(dataset, key, None))), None
    )
    highest = max((cast(int, target) for part in parts.values() for target in part.targets), default=-1)
    lowest = min((cast(int, target) for part in parts.values() for target in part.targets), default=0)
    if lowest < 0:
        raise DataError(f"torchvision/{name}: has samples without a label")
    if listed is None:
        index = getattr(dataset, "class_to_idx", None)
        listed = sorted(index, key=index.__getitem__) if index else range(highest + 1)
    names = [", ".join(entry) if isinstance(entry, tuple | list) else str(entry) for entry in listed]
    if highest >= len(names):
        raise DataError(f"torchvision/{name}: a label of {highest}, but {len(names)} class names")
    # ImageNet has two cranes and two maillots.
    return tuple(f"{n} ({i})" if n in names[:i] else n for i, n in enumerate(names)), False


def _split(dataset: Any, targets: Targets, prefix: str) -> Split:
    array = _array(dataset)
    if array is not None:
        return array_split(array, cast("Sequence[int]", targets), prefix)
    digits = max(4, len(str(len(dataset) - 1)))
    keys = tuple(f"{prefix}/{index:0{digits}d}" for index in range(len(dataset)))
    return DatasetSplit(dataset, keys, targets)


def _array(dataset: Any) -> Pixels | None:
    """The data set's images as uint8 N H W C, if it holds them all in memory and hands out just those."""
    from xception.data.decode import rgb_pixels

    data: Any = getattr(dataset, "data", None)
    data = data.numpy() if hasattr(data, "numpy") else data
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim in (3, 4) and len(data)):
        return None
    if data.ndim == 3:
        data = data[..., None]
    elif data.shape[-1] not in (1, 3) and data.shape[1] in (1, 3):
        data = data.transpose(0, 2, 3, 1)
    if data.shape[-1] not in (1, 3) or len(data) != len(dataset):
        return None
    for index in _probes(dataset):
        if not np.array_equal(np.broadcast_to(data[index], (*data.shape[1:3], 3)), rgb_pixels(dataset[index][0])):
            return None
    return cast(Pixels, data)


def _reason(error: BaseException) -> str:
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
