"""From a trained model and a data source to figures: which images, with whose preprocessing, under which names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from xception.data.blacklist import read_blacklist, without_blacklisted
from xception.data.loader import Loader
from xception.data.relabel import as_label_sets, with_labels_of
from xception.data.sources import BadImage, DataSource, Split, all_samples, drop_samples, open_source
from xception.errors import ConfigError, DataError
from xception.evaluation.metrics import Evaluation, Precision, evaluate_model
from xception.inference.compiled import Engine
from xception.inference.runner import Runner
from xception.ops.device import usable_device
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
    note: str | None
    """What a person should know about the choice of images."""
    engine: str
    """What ran the network, and why not the compiled executor: see `Runner`."""
    blacklisted: int = 0
    """Images of the part that were left out because they are on the black list."""


def evaluate(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    part: Part = "auto",
    batch_size: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
    backend: Engine = "auto",
    device: str | None = None,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    blacklist: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluatedModel:
    """Evaluate a bundle or run folder on `data`, with the preprocessing that is stored with the weights.

    `part` "auto" never takes images that the model was trained on where it can know: the test part of the very
    data it was trained on (split again as it was then), else the data's own test part, else its validation part,
    else everything. `backend` says what runs the network, as for `compile_model`; `EvaluatedModel.engine` what was
    chosen. `blacklist` is ILSVRC's list of validation images to leave out, as the paper does.

    Raises `WeightsError`, `DataError` or `ConfigError` with one line for what cannot be used.
    """
    listed = None if blacklist is None else read_blacklist(blacklist)
    where = usable_device("cpu" if device is None and backend in ("native", "openvino") else device)
    network, info = load_model(model)
    trained_on = TrainingData.of(info)
    source = open_source(
        os.fspath(data),
        root=None if data_root is None else Path(data_root),
        download=download,
        seed=trained_on.seed,
        val_fraction=trained_on.val_fraction,
        test_fraction=trained_on.test_fraction,
        min_classes=1,
    )
    same_data = source.fingerprint == trained_on.fingerprint
    left_out = trained_on.bad if same_data else {}
    source = drop_samples(source, list(left_out))
    chosen, split = choose_part(source, part, same_data=same_data)
    blacklisted = 0
    if listed is not None:
        split, blacklisted = without_blacklisted(split, listed)
    note = None
    if chosen == "all" and part == "auto" and source.spec == trained_on.spec:
        note = f"{source.spec} has changed since the model was trained on it: all of it is taken, training images too"
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
        runner = Runner(network.to(where).eval(), where, precision=precision, backend=backend)
        evaluation = evaluate_model(
            network,
            loader,
            class_names=info.class_names,
            multi_label=info.multi_label,
            importance=_importance(source, info.class_names),
            runner=runner,
            progress=progress,
        )
    finally:
        loader.close()
    # Images that training could not read were dealt to no part; here each is an error, as any other bad image.
    unread = tuple(BadImage(key, why) for key, why in left_out.items())
    evaluation = replace(evaluation, errors=evaluation.errors + unread)
    return EvaluatedModel(
        evaluation=evaluation, info=info, source=source, part=chosen, split=split, note=note, blacklisted=blacklisted,
        engine=runner.engine,
    )  # fmt: skip


def _importance(source: DataSource, class_names: Sequence[str]) -> list[float] | None:
    """The data's class weights in the model's order; a class that the data lacks is no label there and needs none."""
    if source.importance is None:
        return None
    known = dict(zip(source.class_names, source.importance, strict=True))
    return [known.get(name, 0.0) for name in class_names]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a bundle's provenance says of the data it was trained on; defaults where it says nothing usable."""

    spec: str | None = None
    fingerprint: str | None = None
    seed: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    bad: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, info: BundleInfo) -> TrainingData:
        """Provenance is free JSON that anyone may have written: a value of another type counts as not there."""
        said = info.provenance.get("data")
        if not isinstance(said, dict):
            return cls()
        kinds = {"spec": str, "fingerprint": str, "seed": int, "val_fraction": float, "test_fraction": float}
        known: dict[str, Any] = {k: said[k] for k, kind in kinds.items() if type(said.get(k)) is kind}
        bad = said.get("bad")
        if isinstance(bad, dict):
            known["bad"] = {key: str(why) for key, why in bad.items()}
        return cls(**known)


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
