"""From a trained model and a data source to figures: which images, with whose preprocessing, under which names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from xception.data.loader import Loader
from xception.data.relabel import as_label_sets, with_labels_of
from xception.data.sources import BadImage, DataSource, Split, all_samples, drop_samples, open_source
from xception.errors import ConfigError, DataError
from xception.evaluation.metrics import Evaluation, Precision, evaluate_model
from xception.weights.bundle import BundleInfo
from xception.weights.load import load_model

Part = Literal["auto", "train", "val", "test", "all"]


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """The figures, what they are figures of, and the images that they were found on."""

    evaluation: Evaluation
    info: BundleInfo
    source: DataSource
    part: str
    split: Split


def evaluate(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    part: Part = "auto",
    batch_size: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
    device: str | None = None,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluatedModel:
    """Evaluate a bundle or run folder on `data`, with the preprocessing that is stored with the weights.

    `part` "auto" never takes images that the model was trained on where it can know: the test part of the very
    data it was trained on (split again as it was then), else the data's own test part, else its validation part,
    else everything. Raises `WeightsError`, `DataError` or `ConfigError` with one line for what cannot be used.
    """
    network, info = load_model(model)
    trained_on: Mapping[str, Any] = info.provenance.get("data") or {}
    splitting = {k: trained_on[k] for k in ("seed", "val_fraction", "test_fraction") if k in trained_on}
    source = open_source(
        os.fspath(data), root=None if data_root is None else Path(data_root), download=download, **splitting
    )
    same_data = source.fingerprint == trained_on.get("fingerprint")
    left_out: dict[str, str] = trained_on.get("bad", {}) if same_data else {}
    source = drop_samples(source, list(left_out))
    chosen, split = choose_part(source, part, same_data=same_data)
    if source.multi_label and not info.multi_label:
        raise DataError(f"{source.spec} has several labels an image, the model was trained for one")
    split = with_labels_of(split, source.class_names, info.class_names)
    if info.multi_label:
        split = as_label_sets(split)
    loader = Loader(
        split,
        info.preprocess,
        num_classes=len(info.class_names),
        multi_label=info.multi_label,
        batch_size=batch_size,
        workers=workers,
    )
    try:
        evaluation = evaluate_model(
            network,
            loader,
            class_names=info.class_names,
            multi_label=info.multi_label,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            precision=precision,
            progress=progress,
        )
    finally:
        loader.close()
    # Images that training could not read were dealt to no part; here each is an error, as any other bad image.
    unread = tuple(BadImage(key, str(why)) for key, why in left_out.items())
    evaluation = replace(evaluation, errors=evaluation.errors + unread)
    return EvaluatedModel(evaluation=evaluation, info=info, source=source, part=chosen, split=split)


def choose_part(source: DataSource, part: Part, *, same_data: bool) -> tuple[str, Split]:
    """The part to evaluate on, by name; see `evaluate` for what "auto" means."""
    given = source.split_origin
    if part == "auto":
        own = [p for p in ("test", "val") if p in source.splits and (same_data or given.get(p) == "given")]
        part = own[0] if own else "all"
    if part == "all":
        return "all", all_samples(source)
    if part not in source.splits or not len(source.splits[part]):
        have = ", ".join(p for p, s in source.splits.items() if len(s))
        raise ConfigError(f"{source.spec} has no part {part!r}; it has {have}, all")
    return part, source.splits[part]
