"""The parts of a recipe: update rule, learning rate over time, loss, and how images come to the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from xception.errors import ConfigError


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """`ConfigError` unless `condition` holds: `name` must be `expected`."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}; got {value!r}")


def is_finite(value: float) -> bool:
    """Neither infinite nor NaN."""
    return math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule. Weight decay is L2, added to the gradient as ``weight_decay * w`` (AdamW: decoupled)."""

    optimizer: Literal["sgd", "rmsprop", "adamw"] = "sgd"
    """Update rule: SGD with momentum, RMSprop as TensorFlow of 2016 had it, or AdamW."""
    learning_rate: float = 0.045
    """Rate at the start of the schedule (after warm-up)."""
    momentum: float = 0.9
    """Momentum of SGD and RMSprop, the first beta of AdamW."""
    nesterov: bool = False
    """Nesterov momentum (SGD only)."""
    rho: float | None = None
    """Decay of RMSprop's mean square (by default 0.9), the second beta of AdamW (0.999)."""
    epsilon: float | None = None
    """RMSprop: inside the root (by default 1). AdamW: outside (1e-8)."""
    weight_decay: float = 1e-5
    """L2 on the weights of convolutions and linear layers."""
    decay_depthwise: bool = True
    """Whether weight decay acts on depthwise filters as well."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 clips nothing."""
    trunk_factor: float = 1.0
    """The trunk's learning rate as a share of the head's."""

    def __post_init__(self) -> None:
        require(
            is_finite(self.learning_rate) and self.learning_rate > 0,
            "learning_rate",
            "a finite number above 0",
            self.learning_rate,
        )
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        require(self.rho is None or 0 <= self.rho < 1, "rho", "in [0, 1)", self.rho)
        epsilon = self.epsilon
        require(epsilon is None or (is_finite(epsilon) and epsilon > 0), "epsilon", "above 0", epsilon)
        require(
            is_finite(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            "0 or more",
            self.weight_decay,
        )
        require(is_finite(self.clip_norm) and self.clip_norm >= 0, "clip_norm", "0 or more", self.clip_norm)
        require(0 <= self.trunk_factor <= 1, "trunk_factor", "in [0, 1]", self.trunk_factor)
        require(
            not self.nesterov or (self.optimizer == "sgd" and self.momentum > 0),
            "nesterov",
            "off unless optimizer is sgd with momentum",
            self.nesterov,
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time, as a pure function of the samples seen (`optimizers.rate_factor`)."""

    schedule: Literal["constant", "exponential", "cosine"] = "exponential"
    """Shape of the decay."""
    decay_factor: float = 0.94
    """Exponential: the rate is multiplied by this ..."""
    decay_epochs: float = 2.0
    """... every so many epochs ..."""
    decay_samples: int = 0
    """... or, where this is not 0, every so many samples."""
    staircase: bool = True
    """Exponential: in steps (as published) or smoothly."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises from 0."""
    final_factor: float = 0.0
    """Cosine: the share of the rate that is left at the end."""

    def __post_init__(self) -> None:
        require(0 < self.decay_factor <= 1, "decay_factor", "in (0, 1]", self.decay_factor)
        require(is_finite(self.decay_epochs) and self.decay_epochs > 0, "decay_epochs", "above 0", self.decay_epochs)
        require(self.decay_samples >= 0, "decay_samples", "0 or more", self.decay_samples)
        require(
            is_finite(self.warmup_epochs) and self.warmup_epochs >= 0,
            "warmup_epochs",
            "0 or more",
            self.warmup_epochs,
        )
        require(0 <= self.final_factor <= 1, "final_factor", "in [0, 1]", self.final_factor)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Softmax cross entropy with one label an image, sigmoid cross entropy with several (or none)."""

    loss: Literal["auto", "softmax", "sigmoid"] = "auto"
    """auto: softmax where every image has one label, sigmoid for multi-label data."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class weighs as much as any other, whatever its number of images."""
    auxiliary_weight: float = 0.3
    """Weight of each auxiliary tower's loss, for networks built with towers."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)", self.label_smoothing)
        require(
            is_finite(self.auxiliary_weight) and self.auxiliary_weight >= 0,
            "auxiliary_weight",
            "0 or more",
            self.auxiliary_weight,
        )


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How images come to the network: size, resizing, the split, and who reads them."""

    image_size: int | None = None
    """Side in pixels; by default the weights' own, else the model's."""
    resize: Literal["crop", "squash"] = "crop"
    """In evaluation: centre crop after resizing the shorter side, or a straight resize."""
    crop_fraction: float = 1.0
    """Side of the centre crop as a share of the resized shorter side."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Always antialiased."""
    val_fraction: float = 0.1
    """Share of the training images kept for validation where the data has no such part."""
    test_fraction: float = 0.1
    """Share kept for the test where the data has no parts at all."""
    balanced_sampling: bool = False
    """Draw every class equally often."""
    check_images: bool = True
    """Decode every file once before training, so that bad images are found first."""
    max_bad_share: float = 0.01
    """Share of bad images above which the run stops."""
    workers: int = 0
    """Processes that read images; 0 reads in the training process."""

    def __post_init__(self) -> None:
        require(
            self.image_size is None or 1 <= self.image_size <= 8192,
            "image_size",
            "in 1..8192",
            self.image_size,
        )
        require(0 < self.crop_fraction <= 1, "crop_fraction", "in (0, 1]", self.crop_fraction)
        require(0 <= self.val_fraction < 1, "val_fraction", "in [0, 1)", self.val_fraction)
        require(0 <= self.test_fraction < 1, "test_fraction", "in [0, 1)", self.test_fraction)
        total = self.val_fraction + self.test_fraction
        require(total < 1, "val_fraction + test_fraction", "below 1", total)
        require(0 <= self.max_bad_share <= 1, "max_bad_share", "in [0, 1]", self.max_bad_share)
        require(0 <= self.workers <= 256, "workers", "in 0..256", self.workers)
