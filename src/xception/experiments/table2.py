"""Table 2: Xception and Inception V3 on many labels an image, each with and without two fully connected layers.

    xception reproduce table2 --scale smoke                # half a minute
    xception reproduce table2 --scale laptop               # about 50 minutes on 2 cores, fashion-composites, 3 seeds
    xception reproduce table2 --scale paper --data SHARDS  # JFT's size took over a month on 60 GPUs

The paper (JFT, 350 million images, 17,000 classes; MAP@100 on FastEval14k, weighted): Inception V3 6.36 without
and 6.50 with fully connected layers, Xception 6.70 and 6.78. JFT is private: `fashion-composites` is an open stand-in
made from real images (`data.composites`), and docs say in which format to bring data of your own. The recipe is `jft`:
TensorFlow's RMSprop at the paper's rate, no dropout, Polyak average; decay and epochs are ours at laptop scale. What we
measured there: Inception V3's design 92.7 without and 86.7 with fully connected layers, Xception 93.4 and 92.4
(docs/reproduction.md, from experiments/results/table2-laptop).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xception.experiments.budgets import SMOKE_TOLERANCE, TOLERANCE, cost_of, fit
from xception.experiments.experiment import Arm, Contrast, Experiment, Scale, ScaleName, Task
from xception.experiments.scales import LAPTOP_REMARK, PAPER_REMARK
from xception.experiments.small_networks import xception_options

SIDE = 48
HIDDEN: dict[ScaleName, int] = {"smoke": 64, "laptop": 512, "paper": 4096}
"""Width of each of the two hidden layers: in the paper twice the features; so here."""

LABELS = {
    "inception_v3": "Inception V3, no fully connected layers",
    "inception_v3_fc": "Inception V3 with two fully connected layers",
    "xception": "Xception, no fully connected layers",
    "xception_fc": "Xception with two fully connected layers",
}


def arms(scale: ScaleName, task: Task) -> tuple[Arm, ...]:
    """Both networks, Inception V3 at Xception's number of parameters where they are small; then with hidden layers."""
    common: dict[str, Any] = {"num_classes": task.num_classes, "in_channels": task.channels}
    hidden = {"fully_connected": (HIDDEN[scale],) * 2}
    if scale == "paper":
        models = {"inception_v3": ("inception_v3", common), "xception": ("xception", common)}
    else:
        common["input_size"] = SIDE
        xception = {**xception_options(scale, task, deep=False), **common}
        budget = cost_of("xception", xception, "parameters")

        def inception(multiple: float) -> dict[str, Any]:
            return {**common, "width": 0.125 * multiple}

        tolerance = SMOKE_TOLERANCE if scale == "smoke" else TOLERANCE
        fitted = fit("inception_v3_small", inception, cost="parameters", budget=budget, tolerance=tolerance)
        models = {"inception_v3": ("inception_v3_small", fitted), "xception": ("xception", xception)}
    return tuple(
        Arm(name=f"{name}{suffix}", label=LABELS[f"{name}{suffix}"], model=model, options={**options, **more})
        for name, (model, options) in models.items()
        for suffix, more in (("", {}), ("_fc", hidden))
    )


def contrasts(scale: ScaleName, names: Sequence[str]) -> tuple[Contrast, ...]:
    """Xception against Inception V3 decides; whether the layers help is told beside it."""
    return (
        Contrast(
            says="Xception is better than Inception V3 without fully connected layers",
            weights={"xception": 1.0, "inception_v3": -1.0},
        ),
        Contrast(
            says="Xception is better than Inception V3 with fully connected layers",
            weights={"xception_fc": 1.0, "inception_v3_fc": -1.0},
        ),
        *(
            Contrast(
                says=f"fully connected layers help {word}",
                weights={f"{name}_fc": 1.0, name: -1.0},
                decides=False,
            )
            for name, word in (("xception", "Xception"), ("inception_v3", "Inception V3"))
        ),
    )


_TRAINING: dict[str, Any] = {
    "batch_size": 64,
    "image_size": SIDE,
    "learning_rate": 0.001,
    "polyak_decay": 0.995,
    "decay_samples": 12_000,
    "workers": 0,
    # Which half, and which quarter, a garment lies in are labels: neither crops nor mirrors.
    "random_resized_crop": None,
    "horizontal_flip": 0.0,
    "checkpoint_minutes": 5.0,
    "check_images": False,
}

EXPERIMENT = Experiment(
    name="table2",
    title="Table 2: many labels an image",
    claim="Xception has a higher MAP@100 than Inception V3, with and without fully connected layers",
    source="F. Chollet, Xception, arXiv 1610.02357v3, section 4.5 and Table 2",
    paper_head=("MAP@100 on FastEval14k", "no fully connected layers", "with them"),
    paper=(("Inception V3", "6.36", "6.50"), ("Xception", "6.70", "6.78")),
    figure="map_at_100",
    scales={
        "smoke": Scale(
            data="fashion-composites:1000",
            recipe="jft",
            settings={**_TRAINING, "epochs": 2, "polyak_decay": 0.9},
            seeds=2,
            time="half a minute",
            remark="Smoke scale: tiny networks and 1,000 composites show that everything runs. What comes out is no "
            "evidence about the claim.",
        ),
        "laptop": Scale(
            data="fashion-composites",
            recipe="jft",
            settings={**_TRAINING, "epochs": 12},
            seeds=3,
            time="50 minutes on 2 cores",
            remark=LAPTOP_REMARK.replace("Fashion-MNIST", "composites of Fashion-MNIST"),
        ),
        "paper": Scale(
            data=None,
            recipe="jft",
            settings={"check_images": False, "workers": 8, "precision": "bf16"},
            seeds=1,
            time="weeks on GPUs",
            remark=PAPER_REMARK,
        ),
    },
    arms=arms,
    contrasts=contrasts,
)
