"""Figure 10: what stands between the depthwise and the pointwise convolution: nothing, ReLU or ELU.

    xception reproduce figure10 --scale smoke                    # 10 seconds
    xception reproduce figure10 --scale laptop                   # about 35 minutes on 2 cores, Fashion-MNIST, 3 seeds
    xception reproduce figure10 --scale paper --data IMAGENET    # days on GPUs, three networks of 120 epochs

The paper: "the absence of any non-linearity leads to both faster convergence and better final performance", the
opposite of what Szegedy et al. report of Inception modules. It gives curves and no numbers. What we measured at laptop
scale: nothing is 0.7 points above ReLU over the epochs, 0.3 (open) at the end, and level with ELU
(docs/reproduction.md, from experiments/results/figure10-laptop).
"""

from __future__ import annotations

from collections.abc import Sequence

from xception.experiments.experiment import Arm, Contrast, Experiment, ScaleName, Task
from xception.experiments.scales import common_scales
from xception.experiments.small_networks import xception_options

ACTIVATIONS = {"none": "nothing in between", "relu": "ReLU in between", "elu": "ELU in between"}


def arms(scale: ScaleName, task: Task) -> tuple[Arm, ...]:
    """The same network, of the same size, with each of the three."""
    base = xception_options(scale, task)
    return tuple(
        Arm(name=name, label=label, model="xception", options={**base, "intermediate_activation": name})
        for name, label in ACTIVATIONS.items()
    )


def contrasts(scale: ScaleName, names: Sequence[str]) -> tuple[Contrast, ...]:
    """None against each of the two, in the end and on the way."""
    found = []
    for other in ("relu", "elu"):
        weights, word = {"none": 1.0, other: -1.0}, other.upper() if other == "elu" else "ReLU"
        found.append(Contrast(says=f"final accuracy is higher with nothing than with {word}", weights=weights))
        found.append(
            Contrast(
                says=f"accuracy over the epochs is higher with nothing than with {word}",
                weights=weights,
                of="learning",
            )
        )
    return tuple(found)


EXPERIMENT = Experiment(
    name="figure10",
    title="Figure 10: the activation between depthwise and pointwise",
    claim="No activation between depthwise and pointwise converges faster and ends higher than ReLU or ELU there",
    source="F. Chollet, Xception, arXiv 1610.02357v3, section 4.8 and Fig. 10",
    paper_head=("in between", "convergence", "final accuracy"),
    paper=(("nothing", "fastest", "highest"), ("ELU", "slower", "lower"), ("ReLU", "slower", "lower")),
    scales=common_scales(laptop_epochs=6, times=("10 seconds", "35 minutes on 2 cores", "days on GPUs")),
    arms=arms,
    contrasts=contrasts,
)
