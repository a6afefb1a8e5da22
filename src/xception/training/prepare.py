"""From what a person asked for to what the loop needs: data checked and split, model and preprocessing settled.

Nothing is written here, so that ``--dry-run`` and a real run resolve in exactly the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from xception.data.loader import BadImage, Loader
from xception.data.preprocess import Preprocess
from xception.data.relabel import as_label_sets
from xception.data.sources import DataSource, Split, clean_source, drop_samples, open_source
from xception.errors import ConfigError, DataError
from xception.models import registry
from xception.ops.backend import fast_precision
from xception.ops.device import usable_device
from xception.training.recipe import Recipe
from xception.weights.bundle import BundleInfo
from xception.weights.imports import imported_info
from xception.weights.load import create_with_transfer

Say = Callable[[str], None]
STARTS_FROM_WEIGHTS = ("finetune", "head")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run, resolved."""

    recipe: Recipe
    model: str
    config: Any
    preprocess: Preprocess
    source: DataSource
    """The data without its bad images."""
    opened: str
    """The fingerprint of the data as it was found, bad images included."""
    bad: tuple[BadImage, ...]
    multi_label: bool
    weights: str | None
    trunk_only: bool
    device: torch.device

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """The recipe's, with "auto" decided by the processor."""
        if self.recipe.precision != "auto":
            return self.recipe.precision
        if self.device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return fast_precision() if self.device.type == "cpu" else "fp32"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def train(self) -> Split:
        return self.source.splits["train"]

    @property
    def val(self) -> Split | None:
        return self.source.splits.get("val")

    @property
    def test(self) -> Split | None:
        return self.source.splits.get("test")

    def build_model(self, say: Say = lambda _: None) -> nn.Module:
        """The network with its initial weights: random from the recipe's seed, or a trunk from a file."""
        torch.manual_seed(self.recipe.seed)
        if self.weights is None:
            return registry.build(self.model, self.config)
        model, transfer = create_with_transfer(
            self.model,
            weights=self.weights,
            class_names=self.class_names,
            trunk_only=self.trunk_only,
            **registry.config_to_dict(self.config),
        )
        new = f"; new and random: {', '.join(transfer.fresh)}" if transfer.fresh else ""
        say(f"{len(transfer.loaded)} tensors from {self.weights}{new}")
        return model

    def _labelled(self, split: Split) -> Split:
        return as_label_sets(split) if self.multi_label else split

    def train_loader(self) -> Loader:
        """Shuffled, augmented batches; the last one short of a batch is left out where there are others."""
        r = self.recipe
        return Loader(
            self._labelled(self.train),
            self.preprocess,
            num_classes=len(self.class_names),
            multi_label=self.multi_label,
            batch_size=min(r.batch_size, len(self.train)),
            augment=r.augment,
            seed=r.seed,
            shuffle=True,
            balanced=r.input.balanced_sampling,
            drop_last=True,
            workers=r.input.workers,
        )

    def evaluation_loader(self, split: Split) -> Loader:
        """The images of `split` in order, as evaluation and prediction see them."""
        return Loader(
            self._labelled(split),
            self.preprocess,
            num_classes=len(self.class_names),
            multi_label=self.multi_label,
            batch_size=max(32, min(self.recipe.batch_size, 256)),
            workers=self.recipe.input.workers,
        )


def prepare(
    data: str | os.PathLike[str],
    recipe: Recipe,
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    trunk_only: bool = False,
    model_options: Mapping[str, Any] | None = None,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    device: str | None = None,
    known_bad: Callable[[str], Mapping[str, str] | None] = lambda _: None,
    say: Say = lambda _: None,
) -> Plan:
    """Resolve a run. `model_options` are fields of the model's config; `image_size` and the like are the recipe's.

    `weights` are a bundle, run folder, public checkpoint file or published name; `trunk_only` leaves out a head in
    them that cannot be represented. `known_bad` (data fingerprint -> key -> reason) spares a resumed run the check
    of every image.

    Raises `ConfigError`, `DataError` or `WeightsError` with one line for whatever cannot be used.
    """
    options = dict(model_options or {})
    source = open_source(
        os.fspath(data),
        root=None if data_root is None else Path(data_root),
        seed=recipe.seed,
        val_fraction=recipe.input.val_fraction,
        test_fraction=recipe.input.test_fraction,
        download=download,
    )
    info = None if weights is None else imported_info(weights, model=model, trunk_only=trunk_only)
    if info is None and recipe.name in STARTS_FROM_WEIGHTS:
        raise ConfigError(
            f"recipe {recipe.name} starts from trained weights: give --weights FILE (a bundle, a run folder, any "
            "public checkpoint) or --weights imagenet"
        )
    if info is None and trunk_only:
        raise ConfigError("--trunk-only says what to take from --weights FILE, which is missing")
    name = model or (info.model if info else recipe.model)
    config = _model_config(name, recipe, source, info, options)
    multi_label = _multi_label(recipe, source)
    preprocess = _preprocess(recipe, config, info)
    cleaned, bad = _readable(source, recipe, known_bad(source.fingerprint), say)
    training_images = len(cleaned.splits.get("train", ()))
    if training_images < 2:
        raise DataError(f"{source.spec}: expected at least 2 training images, got {training_images}")
    return Plan(
        recipe=replace(recipe, model=name),
        model=name,
        config=config,
        preprocess=preprocess,
        source=cleaned,
        opened=source.fingerprint,
        bad=bad,
        multi_label=multi_label,
        weights=None if weights is None else os.fspath(weights),
        trunk_only=trunk_only,
        device=usable_device(device),
    )


def _model_config(
    name: str, recipe: Recipe, source: DataSource, info: BundleInfo | None, options: dict[str, Any]
) -> Any:
    num_classes = len(source.class_names)
    if options.get("num_classes", num_classes) != num_classes:
        raise ConfigError(
            f"num_classes is {num_classes}, the number of classes in {source.spec}; got {options['num_classes']}"
        )
    settings: dict[str, Any] = {"in_channels": source.channels}
    if recipe.dropout is not None:
        settings["dropout"] = recipe.dropout
    if info is not None and info.model == name:
        base = {k: v for k, v in info.config.items() if k != "num_classes"}
        settings = {**base, **({"dropout": recipe.dropout} if recipe.dropout is not None else {})}
    config = registry.get_config(name, **{**settings, **options, "num_classes": num_classes})
    if config.in_channels not in (1, 3):
        raise ConfigError(f"images have 1 or 3 channels; got in_channels={config.in_channels}")
    return config


def _preprocess(recipe: Recipe, config: Any, info: BundleInfo | None) -> Preprocess:
    """The weights' own preprocessing where there are weights; `image_size` overrides its size."""
    r = recipe.input
    if info is not None and info.preprocess.channels == config.in_channels:
        size = info.preprocess.size if r.image_size is None else (r.image_size, r.image_size)
        preprocess = replace(info.preprocess, size=size)
    else:
        side = r.image_size or config.input_size
        channels = config.in_channels
        preprocess = Preprocess(
            size=(side, side),
            resize=r.resize,
            crop_fraction=r.crop_fraction,
            interpolation=r.interpolation,
            channels=channels,
            mean=(0.5,) * channels,
            std=(0.5,) * channels,
        )
    if min(preprocess.size) < config.minimum_size:
        raise ConfigError(
            f"image_size must be at least {config.minimum_size} for this network; got {min(preprocess.size)}"
        )
    return preprocess


def _multi_label(recipe: Recipe, source: DataSource) -> bool:
    if recipe.loss.loss == "softmax" and source.multi_label:
        raise ConfigError(
            f"{source.spec} has several labels an image, which the softmax loss cannot learn: give --loss sigmoid"
        )
    return source.multi_label or recipe.loss.loss == "sigmoid"


def _readable(
    source: DataSource, recipe: Recipe, known_bad: Mapping[str, str] | None, say: Say
) -> tuple[DataSource, tuple[BadImage, ...]]:
    """The source without the images that cannot be decoded, each of which is said once.

    Removing them before anything is dealt or shuffled makes the run the same as one on a folder without them.
    """
    if known_bad is not None:
        return drop_samples(source, list(known_bad)), tuple(BadImage(k, v) for k, v in known_bad.items())
    if not recipe.input.check_images:
        return source, ()
    cleaned, bad = clean_source(
        source,
        max_bad_share=recipe.input.max_bad_share,
        on_bad=lambda image: say(f"bad image, left out: {image}"),
    )
    return cleaned, tuple(bad)
