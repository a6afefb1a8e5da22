"""Table 1: VGG-16, ResNet-152, Inception V3 and Xception on ImageNet, single crop, single model.

    xception reproduce table1 --scale smoke                     # a minute
    xception reproduce table1 --scale laptop                    # about 40 minutes on 2 cores, Fashion-MNIST, 3 seeds
    xception reproduce table1 --scale paper --data IMAGENET --weights published --blacklist LIST   # an hour
    xception reproduce table1 --scale paper --data IMAGENET     # weeks on GPUs, four networks of 120 epochs

The paper (top-1, top-5; 48,238 validation images, those on ILSVRC's black list left out): VGG-16 0.715, 0.901;
ResNet-152 0.770, 0.933; Inception V3 0.782, 0.941; Xception 0.790, 0.945. IMAGENET is a folder with train/ and val/,
each with a folder a class (the 1,000 WordNet ids or the class names); LIST is the file of ILSVRC's development kit.

At laptop scale the question is another one: four designs at one budget of parameters. Each keeps its depth and gets
widths that meet Xception's number of parameters within 2 %; each stem halves images of 32 pixels once. VGG-16 has batch
normalisation, which as published it has not, since one recipe has to train all four. What we measured there: VGG-16's
design 91.4 %, Inception V3's 90.1, Xception 90.1, ResNet-152's 86.9 (docs/reproduction.md, from
experiments/results/table1-laptop).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xception.experiments.budgets import SMOKE_TOLERANCE, TOLERANCE, cost_of, fit, widths
from xception.experiments.experiment import Arm, Contrast, Experiment, ScaleName, Task
from xception.experiments.scales import common_scales
from xception.experiments.small_networks import xception_options
from xception.models import registry

OptionsAt = Callable[[float], dict[str, Any]]
SIDE = 32
LABELS = {"vgg16": "VGG-16", "resnet152": "ResNet-152", "inception_v3": "Inception V3", "xception": "Xception"}


def arms(scale: ScaleName, task: Task) -> tuple[Arm, ...]:
    """The four designs: as published at paper scale, else at Xception's budget."""
    common = {"num_classes": task.num_classes, "in_channels": task.channels}
    if scale == "paper":
        return tuple(Arm(name=name, label=label, model=name, options=common) for name, label in LABELS.items())
    common["input_size"] = SIDE
    xception = {**xception_options(scale, task), **common}
    budget = cost_of("xception", xception, "parameters")
    tolerance = SMOKE_TOLERANCE if scale == "smoke" else TOLERANCE
    models = {"xception": ("xception", xception)}
    for name, options_at in (("vgg16", _vgg16), ("resnet152", _resnet152), ("inception_v3", _inception_v3)):
        fitted = fit(
            f"{name}_small",
            options_at(common),
            cost="parameters",
            budget=budget,
            tolerance=tolerance,
            finer=_last_stage if name == "resnet152" else None,
        )
        models[name] = (f"{name}_small", fitted)
    return tuple(
        Arm(name=name, label=f"{label}'s design", model=models[name][0], options=models[name][1])
        for name, label in LABELS.items()
    )


def _vgg16(common: dict[str, Any]) -> OptionsAt:
    config = registry.get_config("vgg16_small")
    return lambda multiple: {
        **common,
        "widths": widths(config.widths, multiple),
        "fully_connected": widths(config.fully_connected, multiple),
    }


def _resnet152(common: dict[str, Any]) -> OptionsAt:
    config = registry.get_config("resnet152_small")

    return lambda multiple: {
        **common,
        "stem_width": max(4, round(config.stem_width * multiple)),
        "widths": widths(config.widths, multiple),
    }


def _last_stage(options: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """In ResNet's third stage of 36 blocks a channel is a tenth of so narrow a network; in the last a hundredth."""
    *first, last = options["widths"]
    return {**options, "widths": (*first, max(1, last + channels))}


def _inception_v3(common: dict[str, Any]) -> OptionsAt:
    return lambda multiple: {**common, "width": 0.125 * multiple}


def published() -> tuple[Arm, ...]:
    """Weights that anyone can have; Xception's and Inception V3's are Keras's, as the paper's author published them."""
    weights = {
        "vgg16": "vgg16.tv_in1k",
        "resnet152": "resnet152.tv_in1k",
        "inception_v3": "inception_v3.keras_in1k",
        "xception": "xception.keras_in1k",
    }
    return tuple(
        Arm(name=name, label=f"{LABELS[name]}, published weights", model=name, weights=weights[name])
        for name in weights
    )


def contrasts(scale: ScaleName, names: Sequence[str]) -> tuple[Contrast, ...]:
    """Xception against each of the others."""
    return tuple(
        Contrast(says=f"Xception is more accurate than {LABELS[other]}", weights={"xception": 1.0, other: -1.0})
        for other in ("inception_v3", "resnet152", "vgg16")
    )


EXPERIMENT = Experiment(
    name="table1",
    title="Table 1: four networks on one task",
    claim="Xception is more accurate than Inception V3, ResNet-152 and VGG-16",
    source="F. Chollet, Xception, arXiv 1610.02357v3, section 4.5 and Table 1",
    paper_head=("network", "top-1", "top-5"),
    paper=(
        ("VGG-16", "0.715", "0.901"),
        ("ResNet-152", "0.770", "0.933"),
        ("Inception V3", "0.782", "0.941"),
        ("Xception", "0.790", "0.945"),
    ),
    scales=common_scales(
        laptop_epochs=5,
        smoke={"image_size": SIDE},
        laptop={"image_size": SIDE},
        times=("a minute", "40 minutes on 2 cores", "weeks on GPUs; with published weights an hour"),
    ),
    arms=arms,
    contrasts=contrasts,
    published=published,
)
