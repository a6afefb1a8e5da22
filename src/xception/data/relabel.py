"""The same samples with other targets: a model's class numbers, or label sets instead of single labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from xception.data.labels import Targets, printable
from xception.data.split import ArraySplit, FileSplit, Split, Subset
from xception.errors import DataError


def with_targets(split: Split, targets: Targets) -> Split:
    """`split`, each sample with its new target; the images stay where they are."""
    if isinstance(split, FileSplit | ArraySplit | Subset):
        return replace(split, targets=targets)
    return Subset(split, range(len(split)), split.keys, targets)


def as_label_sets(split: Split) -> Split:
    """Each single label as a set of one, for a network with sigmoid scores; label sets stay as they are."""
    return with_targets(split, tuple((t,) if isinstance(t, int) else t for t in split.targets))


def with_labels_of(split: Split, names: Sequence[str], model_names: Sequence[str]) -> Split:
    """`split`, whose targets number `names`, with the numbers that `model_names` has for them.

    The data may lack classes that the model has, and have them in another order; `DataError` names the classes of
    its samples that the model lacks. ImageNet's folders are named by WordNet ids, its published networks' classes by
    words: where the data has all 1,000 ids, their order is that of the classes.
    """
    if tuple(names) == tuple(model_names):
        return split
    if _are_synsets(names) and len(model_names) == len(names) and tuple(model_names[:2]) == ("tench", "goldfish"):
        model_names = sorted(names)
    number = {name: i for i, name in enumerate(model_names)}
    used = {k for target in split.targets for k in ((target,) if isinstance(target, int) else target)}
    unknown = [names[k] for k in sorted(used) if names[k] not in number]
    if unknown:
        raise DataError(
            f"the data has {len(unknown)} class{'es' * (len(unknown) > 1)} that the model does not know: "
            f"{_some(unknown)}; it knows {_some(model_names)}"
        )
    to_model = [number.get(name, -1) for name in names]
    targets = tuple(
        to_model[target] if isinstance(target, int) else tuple(sorted(to_model[k] for k in target))
        for target in split.targets
    )
    return with_targets(split, cast(Targets, targets))


def _are_synsets(names: Sequence[str]) -> bool:
    return len(set(names)) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
