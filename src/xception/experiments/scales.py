"""What the scales have in common: smoke on the bundled digits, laptop on Fashion-MNIST, paper on ImageNet."""

from __future__ import annotations

from typing import Any

from xception.experiments.experiment import Scale, ScaleName

SMOKE_REMARK = (
    "Smoke scale: tiny networks, 1,258 digits of 8 x 8 pixels and a few epochs show that everything runs. "
    "What comes out is no evidence about the claim."
)
LAPTOP_REMARK = (
    "Laptop scale: networks of a few hundred thousand parameters on Fashion-MNIST, a few epochs. It tests whether the "
    "claim shows at that size; it neither proves nor refutes it for ImageNet."
)
PAPER_REMARK = (
    "Paper scale: the published network and recipe; what the paper leaves open is our choice (train --dry-run)."
)

# What the results in experiments/results were made with: an experiment does not change with the recipe.
_FIXED: dict[str, Any] = {
    "precision": "fp32",
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "dropout": 0.2,
    "random_erasing": 0.0,
}
# Enough validation images for a curve, and as many for training as can be.
_LAPTOP: dict[str, Any] = {**_FIXED, "val_fraction": 1 / 12, "image_size": 28, "checkpoint_minutes": 5.0}
_SMOKE: dict[str, Any] = {
    **_FIXED,
    "epochs": 3,
    "batch_size": 64,
    "image_size": 16,
    "translate_pixels": 1,
    "horizontal_flip": 0.0,
    "polyak_decay": 0.97,
    "val_fraction": 0.1,
    "test_fraction": 0.2,
}


def common_scales(
    *,
    laptop_epochs: int,
    times: tuple[str, str, str],
    smoke: dict[str, Any] | None = None,
    laptop: dict[str, Any] | None = None,
    seeds: int = 3,
) -> dict[ScaleName, Scale]:
    """The three scales of an experiment with one label an image; `times` are what to expect of each."""
    return {
        "smoke": Scale(
            data="digits",
            recipe="small",
            settings={**_SMOKE, **(smoke or {})},
            seeds=2,
            time=times[0],
            remark=SMOKE_REMARK,
        ),
        "laptop": Scale(
            data="fashion-mnist",
            recipe="small",
            settings={**_LAPTOP, "epochs": laptop_epochs, **(laptop or {})},
            seeds=seeds,
            time=times[1],
            remark=LAPTOP_REMARK,
        ),
        "paper": Scale(
            data=None,
            recipe="imagenet",
            settings={"check_images": False, "workers": 8, "precision": "bf16"},
            seeds=1,
            time=times[2],
            remark=PAPER_REMARK,
        ),
    }
