"""What a trained network does with each single image, so that confidence can be had by drawing images again."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xception.data.loader import Loader
from xception.data.relabel import as_label_sets, with_labels_of
from xception.data.sources import DataSource, Split, drop_samples, open_source
from xception.errors import DataError
from xception.evaluation.evaluate import TrainingData, choose_part
from xception.evaluation.ranking import target_ranks
from xception.ops.device import usable_device
from xception.weights.load import load_model

Floats = NDArray[np.float64]
BATCH = 200


@dataclass(frozen=True, kw_only=True)
class PerImage:
    """A figure as a quotient of two sums over images: N values that were gained, and N that could have been.

    Top-1 gains 1 for an image that is right, of 1 possible. An image that could not be read has 0 possible.
    """

    gained: Floats
    possible: Floats

    @property
    def figure(self) -> float:
        """The figure itself, 0 to 1."""
        total = self.possible.sum()
        if not total:
            raise DataError("not one image could be evaluated")
        return float(self.gained.sum() / total)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a bit an image where only right and wrong occur, else 32-bit floats, in base64."""
        if np.isin(self.gained, (0, 1)).all() and np.isin(self.possible, (0, 1)).all():
            kind, arrays = "bits", [np.packbits(a.astype(bool)) for a in (self.gained, self.possible)]
        else:
            kind, arrays = "floats", [a.astype("<f4") for a in (self.gained, self.possible)]
        gained, possible = (base64.b64encode(a.tobytes()).decode("ascii") for a in arrays)
        everything = kind == "bits" and bool(self.possible.all())
        return {
            "kind": kind, "images": len(self.gained), "gained": gained, "possible": None if everything else possible
        }  # fmt: skip

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> PerImage:
        """What `to_dict` gave. Raises `DataError` for anything else."""
        try:
            count = stored["images"]
            arrays = [
                np.ones(count) if stored[name] is None else _decode(stored["kind"], stored[name], count)
                for name in ("gained", "possible")
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"expected stored figures of images: {error}") from None
        return cls(gained=arrays[0], possible=arrays[1])


def _decode(kind: str, text: str, count: int) -> Floats:
    data = base64.b64decode(text, validate=True)
    if kind == "bits":
        values = np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(np.float64)
    elif kind == "floats":
        values = np.frombuffer(data, "<f4").astype(np.float64)
    else:
        raise ValueError(f"unknown kind {kind!r}")
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count} images")
    return values


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures of a network on the `part` of a data set; `images` identifies which images, in which order."""

    part: str
    images: str
    figures: Mapping[str, PerImage]


def measure(
    model: str | os.PathLike[str],
    data: str,
    *,
    device: str | None = None,
    data_root: str | None = None,
    blacklist: str | None = None,
    workers: int = 0,
) -> Measured:
    """Run the network of a bundle, run folder or published name over images that it was not trained on.

    The images and their labels are those that `evaluate` would take. Top-1 and top-5 for one label an image, MAP@100
    for several.
    """
    network, info = load_model(model)
    trained_on = TrainingData.of(info)
    source = open_source(
        data,
        root=data_root,
        seed=trained_on.seed,
        val_fraction=trained_on.val_fraction,
        test_fraction=trained_on.test_fraction,
    )
    same_data = source.fingerprint == trained_on.fingerprint
    source = drop_samples(source, list(trained_on.bad if same_data else {}))
    part, split = choose_part(source, "auto", same_data=same_data)
    if blacklist is not None:
        split = _without_blacklisted(split, blacklist)
    split = with_labels_of(split, source.class_names, info.class_names)
    several = info.multi_label
    figures = _rank(network, info, source, as_label_sets(split) if several else split, device, workers)
    names = hashlib.sha256("\n".join(split.keys).encode("utf-8", "surrogateescape")).hexdigest()
    return Measured(part=part, images=names[:16], figures=figures)


def _without_blacklisted(split: Split, path: str) -> Split:
    from xception.data.blacklist import read_blacklist, without_blacklisted

    return without_blacklisted(split, read_blacklist(path))[0]


def _rank(
    network: torch.nn.Module, info: Any, source: DataSource, split: Split, device: str | None, workers: int
) -> dict[str, PerImage]:
    """Every image's contribution to each figure; where it cannot be read, nothing gained of nothing possible."""
    from xception.evaluation.map_at_k import average_precisions

    names = ("map_at_100", "top1") if info.multi_label else ("top1", "top5")
    found = {name: np.zeros((2, len(split))) for name in names}
    where = usable_device(device)
    network = network.to(where)
    importance = None
    if info.multi_label and source.importance is not None:
        known = dict(zip(source.class_names, source.importance, strict=True))
        importance = torch.tensor([known.get(name, 0.0) for name in info.class_names], dtype=torch.float64)
    loader = Loader(
        split,
        info.preprocess,
        num_classes=len(info.class_names),
        multi_label=info.multi_label,
        batch_size=BATCH,
        workers=workers,
    )
    with loader, torch.inference_mode():
        for batch in loader.epoch(0):
            if not len(batch.images):
                continue
            logits = network(batch.images.to(where, memory_format=torch.channels_last)).float().cpu()
            indices = batch.indices.numpy()
            if info.multi_label:
                positive = batch.targets > 0.5
                gained, possible = average_precisions(logits, positive, importance, k=100)
                found["map_at_100"][:, indices] = torch.stack([gained, possible]).numpy()
                best = logits.topk(1, dim=1).indices
                found["top1"][:, indices] = np.stack([positive.gather(1, best)[:, 0].numpy(), np.ones(len(indices))])
            else:
                ranks = target_ranks(logits, batch.targets).numpy()
                for name, most in (("top1", 1), ("top5", 5)):
                    found[name][:, indices] = np.stack([ranks < most, np.ones(len(ranks))])
    return {name: PerImage(gained=values[0], possible=values[1]) for name, values in found.items()}
