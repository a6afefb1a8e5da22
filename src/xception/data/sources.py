"""One way in: `open_source` turns what a person writes on the command line into a `DataSource`.

A word is understood as follows, first match wins:

1. `digits`, `fashion-mnist`, `fashion-composites` (and `fashion-composites:2000`, the first 2,000 of them): the
   built-in sets, always. (For a folder of that name write `./digits`.)
2. An existing folder or file: a folder of class folders (`folder.py`), a .csv table (`table.py`), a .tar
   (`tar_shards.py`) or .parquet file (`parquet.py`), or a folder of those (`shards.py` says which folders are).
3. `torchvision/NAME`, or NAME alone: one of torchvision's classification data sets, in any case
   (`torchvision_sets.py`).

Nothing of torch is imported unless a torchvision data set is asked for.
"""

from __future__ import annotations

import difflib
import os

from xception.data.builtin import open_digits, open_fashion_mnist
from xception.data.check import check_images, clean_source
from xception.data.composites import NAME as COMPOSITES
from xception.data.composites import is_composites, open_composites
from xception.data.folder import open_folder
from xception.data.labels import printable
from xception.data.shards import Shard, is_parquet_name, is_tar_name, shards_in, single_shard
from xception.data.split import (
    ArraySplit,
    BadImage,
    DataSource,
    FileSplit,
    Split,
    SplitPlan,
    all_samples,
    drop_samples,
    without,
)
from xception.data.table import open_table
from xception.errors import ConfigError, DataError

__all__ = [
    "BUILT_IN",
    "ArraySplit",
    "BadImage",
    "DataSource",
    "FileSplit",
    "Split",
    "SplitPlan",
    "all_samples",
    "check_images",
    "clean_source",
    "drop_samples",
    "open_source",
    "without",
]

BUILT_IN = ("digits", "fashion-mnist", COMPOSITES)


def open_source(
    spec: str | bytes | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    download: bool = False,
    min_classes: int = 2,
) -> DataSource:
    """Open a data set: its classes, its samples by part, no image decoded yet.

    Args:
        spec: A folder, a .csv, .tar or .parquet file, a built-in set, or a torchvision name; a `Path` is always a path.
        root: For named sets where their files are (by default $XCEPTION_DATA or ./data), for a table or
            Parquet what its paths are relative to. Not for folders, tars and digits.
        seed: Decides, with each sample's key, how missing parts are dealt.
        val_fraction: Share of the training samples, or of all, that becomes 'val' where the data has none; 0 for none.
        test_fraction: Share of all samples that becomes 'test' where the data brings no parts at all; 0 for none.
        download: Let torchvision fetch the files of a named set.
        min_classes: Data of fewer classes is refused; 1 for data to evaluate on.

    Raises:
        DataError: Nothing of that name, or data that cannot be used; one line that says what was expected.
        ConfigError: Fractions out of range, or a `root` where it has no meaning.
    """
    plan = SplitPlan(seed=seed, val_fraction=val_fraction, test_fraction=test_fraction, min_classes=min_classes)
    text = os.fsdecode(spec)
    base = None if root is None else os.fspath(root)
    named = not isinstance(spec, os.PathLike)
    if named and text == "digits":
        _no_root(text, base)
        return open_digits(spec=text, plan=plan)
    if named and text == "fashion-mnist":
        return open_fashion_mnist(spec=text, plan=plan, root=base, download=download)
    if named and is_composites(text):
        return open_composites(spec=text, plan=plan, root=base, download=download)
    if os.path.isdir(text):
        found = shards_in(text)
        if found is not None:
            return _open_shards(*found, text, text, plan=plan, root=base)
        _no_root(text, base)
        return open_folder(text, spec=text, plan=plan)
    if os.path.exists(text):
        if os.path.isfile(text) and text.lower().endswith(".csv"):
            return open_table(text, spec=text, plan=plan, root=base)
        folder = os.path.dirname(text) or "."
        if is_tar_name(text):
            return _open_shards("tar", single_shard(text), folder, text, plan=plan, root=base)
        if is_parquet_name(text):
            return _open_shards("parquet", single_shard(text), folder, text, plan=plan, root=base)
        raise DataError(
            f"{printable(text)}: expected a folder of class folders, a .csv file, or .tar or .parquet shards"
        )
    if named:
        from xception.data.torchvision_sets import open_torchvision, set_name

        prefix, slash, rest = text.partition("/")
        if slash and prefix.lower() == "torchvision":
            return open_torchvision(rest, spec=text, plan=plan, root=base, download=download)
        if set_name(text) is not None:
            return open_torchvision(text, spec=text, plan=plan, root=base, download=download)
    raise DataError(_unknown(text))


def _open_shards(
    kind: str, shards: list[Shard], folder: str, spec: str, *, plan: SplitPlan, root: str | None
) -> DataSource:
    if kind == "parquet":
        from xception.data.parquet import open_parquet

        return open_parquet(shards, folder, spec=spec, plan=plan, root=root)
    from xception.data.tar_shards import open_tar_shards

    _no_root(spec, root)
    return open_tar_shards(shards, folder, spec=spec, plan=plan)


def _no_root(text: str, root: str | None) -> None:
    if root is not None:
        raise ConfigError(f"a data root ({printable(root)!r}) has no meaning for {printable(text)!r}: leave it out")


def _unknown(text: str) -> str:
    from xception.data.torchvision_sets import SETS

    choices = {name.lower(): name for name in (*BUILT_IN, *SETS)}
    beside = _siblings(text)
    close = difflib.get_close_matches(text, beside, n=2)
    close += [choices[name] for name in difflib.get_close_matches(text.lower(), choices, n=2)]
    hint = f" (did you mean {' or '.join(printable(name) for name in close)}?)" if close else ""
    return (
        f"no data at {printable(text)!r}{hint}: expected a folder of class folders, a .csv file, .tar or "
        ".parquet shards, 'digits', 'fashion-mnist', 'fashion-composites', or a torchvision data set such as 'cifar10'"
    )


def _siblings(text: str) -> list[str]:
    """Names near a path that does not exist, for the hint."""
    folder = os.path.dirname(text)
    try:
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder or "."))[:1000] if name[0] != "."]
    except (OSError, ValueError):
        return []
