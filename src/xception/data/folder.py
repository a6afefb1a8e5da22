"""A folder of class folders: ROOT/<class>/**/<image>, or ROOT/<part>/<class>/**/<image>.

Class folders are taken in plain sorted order. Files count by their ending (`IMAGE_SUFFIXES`), whatever they turn out to
hold; hidden files and folders (a dot in front) do not. Folders inside a class folder belong to that class. Links
are followed, each folder once a class, so that a loop of links ends. Nothing depends on the order of the file system.

Parts: sub-folders named train or training, val, valid or validation, test or testing (in any case) that hold folders
and no images. Anything with images beside them is an error, since it would be left out unseen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from xception.data.containers import IMAGE_SUFFIXES
from xception.data.labels import name_classes, printable
from xception.data.split import DataSource, FileSplit, Split, SplitPlan, build_source
from xception.errors import DataError

PART_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What people call the parts, in lower case, and what we do."""


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image when a folder is searched."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def open_folder(root: str, *, spec: str, plan: SplitPlan) -> DataSource:
    """Read the names (not the contents) of a folder's images.

    Raises:
        DataError: No classes, a class folder without images, a class in val or test that train lacks, parts that cannot
            be told from classes, or a folder that cannot be read.
    """
    folders, has_images = _list(root, root)
    parts = _parts(root, folders)
    if not parts:
        if not folders:
            hint = "images, but no class folders" if has_images else "no class folders"
            raise DataError(f"{printable(root)}: holds {hint}; expected {printable(root)}/<class>/<image>")
        classes = {name: _class_keys(root, name) for name in folders}
        names = name_classes(classes)
        return build_source(spec, names, {"all": _split(root, names, classes)}, plan=plan)

    found: dict[str, dict[str, list[str]]] = {}
    for part, folder in parts.items():
        class_folders, _ = _list(os.path.join(root, folder), root)
        found[part] = {
            name: _class_keys(root, f"{folder}/{name}", may_be_empty=part != "train") for name in class_folders
        }
    if "train" in found:
        names = name_classes(found["train"])
        for part, classes in found.items():
            for name, keys in classes.items():
                if keys and name not in found["train"]:
                    where = printable(f"{root}/{parts[part]}")
                    raise DataError(f"{where}: class {printable(name)!r} does not occur in {printable(parts['train'])}")
    else:
        names = name_classes(name for classes in found.values() for name, keys in classes.items() if keys)
    given: dict[str, Split] = {part: _split(root, names, classes) for part, classes in found.items()}
    return build_source(spec, names, given, plan=plan)


def _split(root: str, names: tuple[str, ...], classes: Mapping[str, list[str]]) -> FileSplit:
    index = {name: i for i, name in enumerate(names)}
    samples = sorted((key, index[name]) for name, keys in classes.items() for key in keys)
    return FileSplit(root, tuple(key for key, _ in samples), tuple(target for _, target in samples))


def _parts(root: str, folders: list[str]) -> dict[str, str]:
    """Part -> folder name; empty where the folders are classes."""
    parts: dict[str, str] = {}
    for name in folders:
        part = PART_NAMES.get(name.lower())
        if part is None:
            continue
        inner, has_images = _list(os.path.join(root, name), root)
        if has_images or not inner:
            continue  # a class that happens to be called so
        if part in parts:
            raise DataError(
                f"{printable(root)}: both {parts[part]!r} and {name!r} would be the part {part!r}: keep one"
            )
        parts[part] = name
    others = [name for name in folders if name not in parts.values()]
    for name in others if parts else ():
        if next(_walk(root, name, set()), None) is not None:
            raise DataError(
                f"{printable(root)}: {', '.join(sorted(parts.values()))} look like parts, but {printable(name)!r} "
                "beside them holds images too: move it, or put the parts elsewhere"
            )
    return parts


def _class_keys(root: str, folder: str, *, may_be_empty: bool = False) -> list[str]:
    keys = list(_walk(root, folder, set()))
    if not keys and not may_be_empty:
        raise DataError(
            f"{printable(root)}: class folder {printable(folder)!r} holds no images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return keys


def _walk(root: str, folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Keys of all images below `root`/`folder`, each physical folder once."""
    path = os.path.join(root, folder)
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    # Windows gives 0 for both; there are no loops to fear there without privileges.
    identity = (status.st_dev, status.st_ino)
    if identity in visited and status.st_ino:
        return
    visited.add(identity)
    for entry in listed:
        if entry.name.startswith("."):
            continue
        if is_folder(entry):
            yield from _walk(root, f"{folder}/{entry.name}", visited)
        elif is_image_name(entry.name):
            yield f"{folder}/{entry.name}"  # broken links and pipes too: reported as bad, not passed over


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _list(path: str, root: str) -> tuple[list[str], bool]:
    """Names of the visible folders in `path`, sorted, and whether there are images beside them."""
    try:
        with os.scandir(path) as entries:
            listed = list(entries)
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    folders = sorted(entry.name for entry in listed if not entry.name.startswith(".") and is_folder(entry))
    return folders, any(is_image_name(entry.name) for entry in listed if not is_folder(entry))
