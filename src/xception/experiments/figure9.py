"""Figure 9: residual connections on and off.

    xception reproduce figure9 --scale smoke                    # 10 seconds
    xception reproduce figure9 --scale laptop                   # about 15 minutes on 2 cores, Fashion-MNIST, 3 seeds
    xception reproduce figure9 --scale paper --data IMAGENET    # days on GPUs, two networks of 120 epochs

The paper trains Xception on ImageNet with and without its residual connections, all other settings equal: those "are
clearly essential in helping with convergence, both in terms of speed and final classification performance". It gives
curves and no numbers. What we measured at laptop scale: 1.1 points more at the end with them, 2.5 over the epochs
(docs/reproduction.md, from experiments/results/figure9-laptop).

Without shortcuts their 1x1 convolutions are gone as well: the network has a few parameters less, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from xception.experiments.experiment import Arm, Contrast, Experiment, ScaleName, Task
from xception.experiments.scales import common_scales
from xception.experiments.small_networks import xception_options


def arms(scale: ScaleName, task: Task) -> tuple[Arm, ...]:
    """The same network with and without shortcuts."""
    base = xception_options(scale, task)
    return (
        Arm(name="residual", label="with residual connections", model="xception", options=base),
        Arm(name="plain", label="without residual connections", model="xception", options={**base, "residual": False}),
    )


def contrasts(scale: ScaleName, names: Sequence[str]) -> tuple[Contrast, ...]:
    """Higher in the end, and higher on the way there."""
    weights = {"residual": 1.0, "plain": -1.0}
    return (
        Contrast(says="final accuracy is higher with residual connections", weights=weights),
        Contrast(says="accuracy over the epochs is higher with residual connections", weights=weights, of="learning"),
    )


EXPERIMENT = Experiment(
    name="figure9",
    title="Figure 9: residual connections",
    claim="Residual connections help Xception to converge, in speed and in final accuracy",
    source="F. Chollet, Xception, arXiv 1610.02357v3, section 4.7 and Fig. 9",
    paper_head=("", "convergence", "final accuracy"),
    paper=(("with residual connections", "faster", "higher"), ("without", "slower", "clearly lower")),
    scales=common_scales(laptop_epochs=6, times=("10 seconds", "15 minutes on 2 cores", "days on GPUs")),
    arms=arms,
    contrasts=contrasts,
)
